"""pcm/form.py: a stream's sound at any rate, in mono or stereo, louder or softer, with levels, however it is cut."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio.errors import NonFiniteError, SettingsError
from mossnano_stdio.pcm import FORM_SETTINGS, ShapedSound, Shaper, SoundForm, to_pcm16
from mossnano_stdio.pcm.form import LEVELS_MS, _delay_samples, _piece_samples, _stream
from mossnano_stdio.tokens import CodecFormat

STEREO = CodecFormat(sample_rate=48000, channels=2, frame_samples=3840, quantizers=16, codebook_size=1024)
MONO = CodecFormat(sample_rate=24000, channels=1, frame_samples=1920, quantizers=8, codebook_size=2048)
RATES = (8_000, 11_111, 16_000, 22_050, 24_000, 44_100, 47_999, 48_001, 96_000, 192_000)


def noise(samples: int, channels: int = 2, loudness: float = 0.3) -> NDArray[np.float32]:
    return (np.random.default_rng(samples).standard_normal((samples, channels)) * loudness).astype(np.float32)


def shaped(codec: CodecFormat, form: SoundForm, *pieces: NDArray[np.float32]) -> ShapedSound:
    """All that leaves, as one."""
    shaper = Shaper(codec, form)
    parts = [*map(shaper.push, pieces), shaper.finish()]
    return ShapedSound(
        b"".join(part.sound for part in parts),
        sum(part.samples for part in parts),
        sum(part.clipped_samples for part in parts),
        b"".join(part.levels for part in parts),
    )


def floats(sound: ShapedSound, form: SoundForm) -> NDArray[np.float32]:
    return np.frombuffer(sound.sound, "<f4").reshape(-1, form.channels)


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


# --- what may be asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sample_rate", (8000, 11111, 48000, 192000)),
        ("channels", (1, 2)),
        ("sample_format", ("s16le", "f32le")),
        ("gain_db", (-60, -0.5, 0, 20.0)),
        ("levels_ms", (0, 10, 20, 40, 80)),
    ],
)
def test_every_setting_takes_its_values(name: str, values: tuple[Any, ...]) -> None:
    for codec in (STEREO, MONO):
        plain = SoundForm.of_codec(codec)
        for value in values:
            assert getattr(plain.changed(name, value, codec), name) == value
    assert name in FORM_SETTINGS


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sample_rate", 7999, "sample_rate is 7999; a whole number from 8000 to 192000 is allowed"),
        ("sample_rate", 192001, "sample_rate is 192001; a whole number from 8000 to 192000 is allowed"),
        ("sample_rate", 44100.0, "sample_rate is 44100.0; a whole number"),
        ("sample_rate", "44100", "sample_rate is '44100'; a whole number"),
        ("channels", 0, "channels is 0; 1 or 2 is allowed"),
        ("channels", 3, "channels is 3; 1 or 2 is allowed"),
        ("channels", True, "channels is True; 1 or 2 is allowed"),
        ("sample_format", "f32be", "sample_format is 'f32be'; 's16le' or 'f32le' is allowed"),
        ("sample_format", ["s16le"], r"sample_format is \['s16le'\]; 's16le' or 'f32le' is allowed"),
        ("gain_db", -60.1, "gain_db is -60.1; a number from -60 to 20 is allowed"),
        ("gain_db", 20.1, "gain_db is 20.1; a number from -60 to 20 is allowed"),
        ("gain_db", math.nan, "gain_db is nan; a number"),
        ("gain_db", False, "gain_db is False; a number"),
        ("gain_db", None, "gain_db is None; a number"),
        ("levels_ms", 15, r"levels_ms is 15; 0, 10, 20, 40 or 80 is allowed \(0: no levels\)"),
        ("levels_ms", False, "levels_ms is False; 0, 10"),
        ("volume", 1, "the form of the sound has no 'volume': it has sample_rate, channels, sample_format, gain_db"),
    ],
)
def test_every_setting_refuses_other_values(name: str, value: Any, said: str) -> None:
    for codec in (STEREO, MONO):
        with pytest.raises(SettingsError, match=said):
            SoundForm.of_codec(codec).changed(name, value, codec)


def test_a_codec_outside_of_the_range_keeps_its_own_rate_and_channels() -> None:
    codec = replace(STEREO, sample_rate=6000, channels=3)
    plain = SoundForm.of_codec(codec)
    assert plain.changed("sample_rate", 6000, codec).changed("channels", 3, codec) == plain
    with pytest.raises(SettingsError, match="channels is 2; 1 or 3 is allowed"):
        plain.changed("channels", 2, codec)


def test_the_bytes_of_a_sample() -> None:
    assert [SoundForm(48000, *of).sample_bytes for of in ((1,), (2,), (1, "f32le"), (2, "f32le"))] == [2, 4, 4, 8]


def test_without_soxr_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    plain = SoundForm.of_codec(STEREO)
    with pytest.raises(SettingsError, match=r"48000 Hz has to be resampled to 16000 Hz.*mossnano-stdio\[audio\]"):
        plain.changed("sample_rate", 16000, STEREO)
    assert plain.changed("sample_rate", 48000, STEREO) == plain


# --- nothing asked for -------------------------------------------------------------------------------------------


def test_a_form_that_asks_for_nothing_is_pcm16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    for codec in (STEREO, MONO):
        audio = noise(5000, codec.channels, loudness=1.0)
        shaper = Shaper(codec, SoundForm.of_codec(codec))
        assert SoundForm.of_codec(codec).is_plain_of(codec)
        assert shaper.push(audio).sound == to_pcm16(audio)
        assert shaper.push(audio[::-1]).sound == to_pcm16(audio[::-1])
        assert shaper.finish() == ShapedSound(b"", 0, 0, b"")
        assert (shaper.codec_samples, shaper.samples, shaper.delay_samples) == (10_000, 10_000, 0)


FORMS = [
    SoundForm(48000, 2),
    SoundForm(48000, 1),
    SoundForm(48000, 2, "f32le"),
    SoundForm(44100, 2, levels_ms=20),
    SoundForm(16000, 1, "f32le", 6.0, 10),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(form: SoundForm, value: float) -> None:
    audio, silence = noise(4000), np.zeros((700, 2), np.float32)
    bad = silence.copy()
    bad[123, 1] = value
    shaper = Shaper(STEREO, form)
    first = shaper.push(audio)
    with pytest.raises(NonFiniteError, match=f"sample 123 of channel 1 is {value}"):
        shaper.push(bad)
    parts = [first, shaper.push(silence), shaper.push(audio), shaper.finish()]
    expected = shaped(STEREO, form, audio, silence, audio)
    assert b"".join(part.sound for part in parts) == expected.sound
    assert b"".join(part.levels for part in parts) == expected.levels


@pytest.mark.parametrize("form", [replace(form, gain_db=20.0) for form in FORMS], ids=str)
def test_a_graph_that_answers_anything_finite_makes_nothing_that_is_not(form: SoundForm) -> None:
    audio = np.full((4000, 2), 3e38, np.float32)
    audio[::3] *= -1
    sound = shaped(STEREO, form, audio)
    dtype = "<i2" if form.sample_format == "s16le" else "<f4"
    assert np.isfinite(np.frombuffer(sound.sound, dtype)).all()
    assert not form.levels_ms or np.frombuffer(sound.levels, "<u2").min() == 65_535


# --- each thing by itself, against numpy -------------------------------------------------------------------------


def test_mono_is_the_mean() -> None:
    audio = noise(1000)
    form = SoundForm(48000, 1, "f32le")
    mean = (audio[:, :1].astype(np.float64) + audio[:, 1:]) / 2
    assert np.array_equal(floats(shaped(STEREO, form, audio), form), mean.astype(np.float32))
    assert shaped(STEREO, SoundForm(48000, 1), audio).sound == to_pcm16(mean.astype(np.float32))


def test_two_channels_of_a_mono_codec_are_the_same() -> None:
    audio = noise(1000, channels=1)
    sound = shaped(MONO, SoundForm(24000, 2), audio)
    assert sound.sound == to_pcm16(np.repeat(audio, 2, axis=1))
    assert sound.samples == 1000


def test_floats_are_what_the_codec_made() -> None:
    audio = noise(1000, loudness=1.0)
    form = SoundForm(48000, 2, "f32le")
    sound = shaped(STEREO, form, audio)
    assert np.array_equal(floats(sound, form), audio)
    assert np.abs(audio).max() > 1, "nothing is loud enough to be clipped"
    assert sound.clipped_samples == 0


@pytest.mark.parametrize("gain_db", [-60, -6.0206, 3, 20])
def test_gain_multiplies_and_what_exceeds_full_scale_is_clipped_and_counted(gain_db: float) -> None:
    audio = noise(1000)
    louder = audio * np.float32(10 ** (gain_db / 20))
    form = SoundForm(48000, 2, "f32le", gain_db)
    assert np.allclose(floats(shaped(STEREO, form, audio), form), louder, rtol=1e-6)
    sound = shaped(STEREO, replace(form, sample_format="s16le"), audio)
    steps = np.frombuffer(sound.sound, "<i2").reshape(-1, 2)
    assert np.abs(steps - np.clip(np.rint(louder * 32767), -32767, 32767)).max() <= 1
    assert sound.clipped_samples == np.count_nonzero((np.abs(louder) > 1).any(axis=1))
    assert (sound.clipped_samples > 0) == (gain_db > 0)


def test_without_gain_too_it_is_counted_what_is_clipped() -> None:
    audio = np.array([[0.5, 1.0], [-1.0, 0], [1.01, 0], [-1.5, 2.0]], np.float32)
    assert shaped(STEREO, SoundForm(48000, 2), audio).clipped_samples == 2


@pytest.mark.parametrize("sample_rate", [48_000, 44_100, 22_050, 11_111])
@pytest.mark.parametrize("levels_ms", [10, 80])
def test_levels_are_the_root_of_the_mean_square_of_each_window(sample_rate: int, levels_ms: int) -> None:
    audio = noise(30_000) * np.linspace(0, 12, 30_000, dtype=np.float32)[:, np.newaxis]
    form = SoundForm(sample_rate, 2, "f32le", -1.0, levels_ms)
    sound = shaped(STEREO, form, audio[:9000], audio[9000:])
    louder = floats(sound, form).astype(np.float64)
    windows = math.ceil(Fraction(len(louder) * 1000, sample_rate * levels_ms))
    edges = [math.floor(Fraction(window * sample_rate * levels_ms, 1000)) for window in range(windows)]
    expected = [
        min(65_535, round(65_535 * math.sqrt(np.mean(louder[start:stop] ** 2))))
        for start, stop in pairwise([*edges, len(louder)])
    ]
    assert np.abs(np.frombuffer(sound.levels, "<u2").astype(int) - expected).max() <= 1
    assert 65_535 in expected
    assert min(expected) < 40_000


def test_the_level_of_full_scale() -> None:
    square = np.ones((480, 2), np.float32)
    square[::2] = -1
    levels = shaped(
        STEREO, SoundForm(48000, 2, levels_ms=10), square, square / np.float32(2), square[:10] * np.float32(0)
    ).levels
    assert np.frombuffer(levels, "<u2").tolist() == [65_535, 32_768, 0]


def test_levels_are_told_with_the_sample_that_fills_their_window() -> None:
    shaper = Shaper(STEREO, SoundForm(48000, 1, levels_ms=10))
    audio = noise(1000)
    counts = [len(shaper.push(audio[start:stop]).levels) // 2 for start, stop in pairwise([0, 479, 480, 959, 1000])]
    assert counts == [0, 1, 0, 1]
    assert len(shaper.finish().levels) == 2


# --- another rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("codec", [STEREO, MONO], ids=["48 kHz", "24 kHz"])
def test_resampled_in_pieces_as_soxr_does_it_at_once(codec: CodecFormat, sample_rate: int) -> None:
    audio = noise(30_000, codec.channels)
    form = SoundForm(sample_rate, codec.channels, "f32le")
    got = floats(shaped(codec, form, audio[:11_111], audio[11_111:]), form)
    quality = "MQ" if codec.sample_rate > 5 * sample_rate else "HQ"
    at_once = soxr.resample(audio, codec.sample_rate, sample_rate, quality)
    assert len(got) - len(at_once) in (0, 1), "soxr's own count is one less where half a sample should be rounded up"
    assert np.allclose(got[: len(at_once)], at_once, atol=1e-6)


@pytest.mark.parametrize("sample_rate", RATES)
def test_a_click_lies_where_its_position_says(sample_rate: int) -> None:
    for click in (0, 1, 777, 9_999):
        audio = np.zeros((10_000, 2), np.float32)
        audio[click] = 0.5
        shaper = Shaper(STEREO, SoundForm(sample_rate, 2, "f32le"))
        form = shaper.form
        found = int(np.abs(floats(shaped(STEREO, form, audio), form)[:, 0]).argmax())
        assert abs(found - shaper.output_position(click)) <= 1


def test_mono_and_stereo_are_resampled_alike() -> None:
    audio = noise(9000)
    mono, stereo = SoundForm(16000, 1, "f32le"), SoundForm(16000, 2, "f32le")
    mean = floats(shaped(STEREO, stereo, audio), stereo).mean(axis=1, keepdims=True)
    assert np.allclose(floats(shaped(STEREO, mono, audio), mono), mean, atol=1e-6)


def test_half_a_sample_is_rounded_up() -> None:
    """From 48,000 to 44,100 Hz: soxr, which counts in floating point, gives one less for some of these."""
    form = SoundForm(44100, 2)
    for samples in (80, 240, 400, 560, 720, 3_600):
        exact = Fraction(samples * 44100, 48000)
        assert exact.denominator == 2
        assert shaped(STEREO, form, noise(samples)).samples == half_up(exact)


some_forms = st.builds(
    SoundForm,
    st.one_of(st.sampled_from(RATES), st.integers(8_000, 192_000)),
    st.integers(1, 2),
    st.sampled_from(["s16le", "f32le"]),
    st.sampled_from([0.0, 12.0]),
    st.sampled_from(LEVELS_MS),
)


@settings(max_examples=150)
@given(
    codec=st.sampled_from([STEREO, MONO]),
    form=some_forms,
    cuts=st.lists(st.integers(0, 6000), max_size=8),
    samples=st.integers(0, 6000),
)
def test_cuts_make_no_difference_and_every_count_is_known_before(
    codec: CodecFormat, form: SoundForm, cuts: list[int], samples: int
) -> None:
    audio = noise(6000, codec.channels)[:samples]
    shaper = Shaper(codec, form)
    parts = []
    for start, stop in pairwise(sorted([0, *(min(cut, samples) for cut in cuts), samples])):
        due_samples = shaper.samples_after(stop) - shaper.samples
        part = shaper.push(audio[start:stop])
        assert part.samples == due_samples <= shaper.form.most_samples(stop - start, codec)
        assert len(part.sound) == part.samples * form.sample_bytes
        assert shaper.samples == shaper.samples_after(shaper.codec_samples)
        parts.append(part)
    parts.append(shaper.finish())
    assert parts[-1].samples <= shaper.delay_samples <= shaper.form.most_samples(0, codec)
    assert shaper.samples == half_up(Fraction(samples * form.sample_rate, codec.sample_rate))
    at_once = shaped(codec, form, audio)
    assert b"".join(part.sound for part in parts) == at_once.sound
    assert b"".join(part.levels for part in parts) == at_once.levels
    assert sum(part.clipped_samples for part in parts) == at_once.clipped_samples


def most_behind(codec_rate: int, sample_rate: int, seconds: int) -> int:
    """How many samples are missing at the worst, just before soxr gets its next piece."""
    stream, piece = _stream(codec_rate, sample_rate, 1), np.zeros(_piece_samples(codec_rate), np.float32)
    given_samples, worst = 0, 0
    for fed in range(len(piece), seconds * codec_rate, len(piece)):
        given_samples += len(stream.resample_chunk(piece))
        asked = half_up(Fraction((fed + len(piece) - 1) * sample_rate, codec_rate))
        worst = max(worst, asked - given_samples)
    return worst


@pytest.mark.parametrize(
    ("rates", "seconds"), [(3, 5), pytest.param(300, 60, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("codec_rate", [48_000, 24_000])
def test_soxr_is_never_further_behind_than_a_second_of_it_showed(codec_rate: int, rates: int, seconds: int) -> None:
    some = np.random.default_rng(codec_rate + rates).integers(8_000, 192_001, rates).tolist()
    for sample_rate in {*RATES, *some} - {codec_rate}:
        assert most_behind(codec_rate, sample_rate, seconds) <= _delay_samples(codec_rate, sample_rate), sample_rate


@pytest.mark.parametrize("sample_rate", RATES)
def test_no_more_than_a_frame_of_nano_is_held_back_for_long(sample_rate: int) -> None:
    """At telephone rates soxr's better filter holds back 158 ms: two frames of nano would be silent."""
    shaper = Shaper(STEREO, SoundForm(sample_rate, 1))
    assert shaper.delay_samples <= (0.085 if sample_rate < 16_000 else 0.045) * sample_rate
    assert shaper.samples_after(2 * 3840) > 0
