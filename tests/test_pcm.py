"""pcm/samples.py, wav.py and recordings.py: exact samples, and WAVs that others read."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, NonFiniteError, UsageError
from mossnano_stdio.pcm import WavWriter, from_pcm16, pcm16_samples, to_pcm16, wav_header
from mossnano_stdio.pcm.recordings import read_audio, read_sound, resampled
from mossnano_stdio.pcm.samples import BLOCK_SAMPLES

RATE = 48000
EVERY_INT16 = np.arange(-32768, 32768, dtype=np.int16)


def nearest_even(value: float) -> int:
    """The oracle: exact rational arithmetic. Python rounds a Fraction half to even."""
    return round(Fraction(min(1.0, max(-1.0, value))) * 32767)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=40))
def test_every_float_becomes_the_nearest_step(values: list[float]) -> None:
    audio = np.array(values, dtype=np.float32)[:, np.newaxis]
    assert pcm16_samples(to_pcm16(audio), 1)[:, 0].tolist() == [nearest_even(value) for value in values]


def test_floats_next_to_a_tie_fall_on_their_own_side() -> None:
    """Where float32 rounds the product to n + 0.5 although it is less or more, the exact one decides."""
    ties = ((np.arange(-32767, 32767) + 0.5) / 32767).astype(np.float32)
    around = np.concatenate([np.nextafter(ties, np.float32(-2)), ties, np.nextafter(ties, np.float32(2))])
    got = pcm16_samples(to_pcm16(around[:, np.newaxis]), 1)[:, 0]
    assert got.tolist() == [nearest_even(value) for value in around.tolist()]
    in_float32 = np.rint(around * np.float32(32767))
    assert np.any(in_float32 != got), "these values no longer tell exact arithmetic from float32"


def test_the_only_exact_ties_go_to_even() -> None:
    """32767 is odd, so that no float but one half lies exactly between two steps: at 16383.5."""
    assert pcm16_samples(to_pcm16(np.array([[0.5], [-0.5]], dtype=np.float32)), 1).tolist() == [[16384], [-16384]]


def test_every_integer_comes_back_but_the_lowest() -> None:
    data = EVERY_INT16.astype("<i2").tobytes()
    audio = from_pcm16(data, 1)
    assert audio.dtype == np.float32
    assert audio.min() == -1.0
    assert audio.max() == 1.0
    back = pcm16_samples(to_pcm16(audio), 1)[:, 0]
    assert back[0] == -32767
    assert np.array_equal(back[1:], EVERY_INT16[1:])


def test_clipping_and_byte_order() -> None:
    audio = np.array([[0, 1], [-1, 1.5], [-3e38, 3e38], [1 / 32767, -0.0]], dtype=np.float32)
    assert to_pcm16(audio).hex(" ", 2) == "0000 ff7f 0180 ff7f 0180 ff7f 0100 0000"


def test_any_strides_and_any_length() -> None:
    planar = np.random.default_rng(0).uniform(-1, 1, (2, 2 * BLOCK_SAMPLES + 7)).astype(np.float32)
    interleaved = np.ascontiguousarray(planar.T)
    expected = np.rint(interleaved.astype(np.float64) * 32767).astype("<i2").tobytes()
    assert to_pcm16(planar.T) == expected
    assert to_pcm16(interleaved) == expected
    assert to_pcm16(interleaved[::-1])[-4:] == expected[:4]
    assert to_pcm16(np.empty((0, 2), dtype=np.float32)) == b""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sample", [0, 5, BLOCK_SAMPLES, BLOCK_SAMPLES + 9])
def test_what_is_not_finite_is_named_by_its_place(value: float, sample: int) -> None:
    audio = np.zeros((BLOCK_SAMPLES + 10, 2), dtype=np.float32)
    audio[sample, 1] = value
    with pytest.raises(NonFiniteError, match=f"sample {sample} of channel 1 is {value}"):
        to_pcm16(audio)


def test_shapes_that_are_no_audio() -> None:
    with pytest.raises(UsageError, match="1 axes"):
        to_pcm16(np.zeros(4, dtype=np.float32))
    with pytest.raises(InputError, match="6 bytes of PCM"):
        from_pcm16(bytes(6), 2)


# --- WAV ---------------------------------------------------------------------------------------------------------


def noise(samples: int, channels: int = 2) -> NDArray[np.int16]:
    return np.random.default_rng(7).integers(-32767, 32768, (samples, channels)).astype(np.int16)


def written(samples: NDArray[np.int16], *, to_pipe: bool, announced: int | None = None) -> bytes:
    """The WAV that a writer makes of `samples`, given to it in uneven pieces."""
    file = Pipe() if to_pipe else io.BytesIO()
    writer = WavWriter(file, RATE, samples.shape[1], announced)
    data = samples.astype("<i2").tobytes()
    third = len(data) // 3 // 4 * 4
    for piece in (data[:third], b"", data[third:]):
        writer.write(piece)
    writer.finish()
    return file.getvalue()


def sound_file(samples: NDArray[Any], **kind: str) -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, **{"format": "WAV", **kind})
    file.seek(0)
    return file


@contextlib.contextmanager
def piped(data: bytes) -> Iterator[BinaryIO]:
    reading_end, writing_end = os.pipe()
    with os.fdopen(writing_end, "wb") as pipe:
        pipe.write(data)
    with os.fdopen(reading_end, "rb") as pipe:
        yield pipe


class Pipe(io.BytesIO):
    """A file that cannot seek."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise AssertionError("a pipe was asked to seek")

    tell = seek


def test_a_seekable_wav_is_what_the_standard_library_writes() -> None:
    samples = noise(100)
    expected = io.BytesIO()
    with wave.open(expected, "wb") as writer:
        writer.setnchannels(2)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(samples.astype("<i2").tobytes())
    assert written(samples, to_pipe=False) == expected.getvalue()
    assert written(samples, to_pipe=True, announced=100) == expected.getvalue()
    assert written(samples, to_pipe=False, announced=100) == expected.getvalue()
    assert written(samples, to_pipe=False, announced=99) == expected.getvalue()


def test_a_wav_may_begin_anywhere_in_its_file() -> None:
    file = io.BytesIO(b"before")
    file.seek(6)
    writer = WavWriter(file, RATE, 2)
    writer.write(bytes(4))
    writer.finish()
    file.write(b"behind")
    assert file.getvalue() == b"before" + wav_header(RATE, 2, 4) + bytes(4) + b"behind"


def test_a_pipe_gets_the_size_that_means_to_the_end() -> None:
    data = written(noise(10), to_pipe=True)
    assert data[4:8] == data[40:44] == b"\xff\xff\xff\xff"
    assert len(data) == 44 + 40


@pytest.mark.parametrize("pcm_bytes", [0xFFFFFFFF - 36 + 1, 1 << 33])
def test_more_than_a_wav_can_count_is_to_the_end(pcm_bytes: int) -> None:
    assert wav_header(RATE, 2, pcm_bytes) == wav_header(RATE, 2)
    assert wav_header(RATE, 2, 0xFFFFFFFF - 36) != wav_header(RATE, 2)


@pytest.mark.parametrize(("rate", "channels"), [(0, 2), (RATE, 0), (RATE, 32768), (1 << 30, 2), (1 << 32, 1)])
def test_what_no_wav_can_hold(rate: int, channels: int) -> None:
    with pytest.raises(InputError, match=f"{channels} channels at {rate} Hz"):
        wav_header(rate, channels)


@pytest.mark.parametrize("to_pipe", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_floats_are_read_as_they_were_written(to_pipe: bool, channels: int) -> None:
    samples = (noise(1000, channels) / np.float32(9000)).astype("<f4")
    file = Pipe() if to_pipe else io.BytesIO()
    writer = WavWriter(file, RATE, channels, sample_format="f32le")
    writer.write(samples.tobytes())
    writer.finish()
    data = file.getvalue()
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        assert (sound.samplerate, sound.subtype, sound.channels) == (RATE, "FLOAT", channels)
        assert np.array_equal(sound.read(dtype="float32", always_2d=True), samples)
    if not to_pipe:
        riff_size, fact_samples, data_size = (struct.unpack_from("<I", data, at)[0] for at in (4, 46, 54))
        assert (riff_size, fact_samples, data_size) == (len(data) - 8, 1000, 4 * samples.size)


@pytest.mark.parametrize("to_pipe", [False, True])
def test_all_readers_here_read_what_we_write(to_pipe: bool, tmp_path: Path) -> None:
    samples = noise(1000)
    path = tmp_path / "x.wav"
    path.write_bytes(written(samples, to_pipe=to_pipe))
    read, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    assert np.array_equal(read, samples)
    with wave.open(str(path)) as by_wave:
        assert by_wave.readframes(by_wave.getnframes()) == samples.astype("<i2").tobytes()
    for command in (
        ["ffmpeg", "-v", "error", "-i", str(path), "-f", "s16le", "-"],
        ["sox", str(path), "-t", "raw", "-"],
    ):
        if shutil.which(command[0]):
            run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
            assert run.stdout == samples.astype("<i2").tobytes(), command


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["soundfile", "wave"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test once with the extra, and once as if it were not installed."""
    if request.param == "wave":
        monkeypatch.setitem(sys.modules, "soundfile", None)
    return str(request.param)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("to_pipe", [False, True])
def test_sixteen_bits_are_read_exactly(reader: str, channels: int, to_pipe: bool) -> None:
    samples = noise(500, channels)
    recording = read_audio(io.BytesIO(written(samples, to_pipe=to_pipe)), "x.wav")
    assert recording.sample_rate == RATE
    assert np.array_equal(recording.samples, samples)
    assert np.array_equal(recording.steps_between(3, 400), samples[3:400])
    assert recording.audio.dtype == np.float32
    assert to_pcm16(recording.audio) == samples.astype("<i2").tobytes()


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32"])
def test_other_widths_read_alike_with_and_without_the_extra(subtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = np.random.default_rng(1).uniform(-1, 1, (300, 2))
    file = sound_file(audio, subtype=subtype)
    with_extra = read_audio(file, "x.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    file.seek(0)
    if sys.version_info < (3, 12) and file.getvalue()[20:22] == b"\xfe\xff":
        pytest.skip("wave reads WAVE_FORMAT_EXTENSIBLE from 3.12 on")
    without = read_audio(file, "x.wav")
    assert np.array_equal(with_extra.samples, without.samples)
    steps = with_extra.steps_between(0, 300)
    assert steps.dtype == np.float64
    assert np.abs(steps / 32767 - audio).max() < {"PCM_U8": 1e-2}.get(subtype, 1e-6)


@pytest.mark.parametrize("place", range(0, 44, 4))
@pytest.mark.parametrize("value", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_every_field_of_a_wav_at_its_edges_is_read_or_refused(reader: str, place: int, value: int) -> None:
    data = bytearray(written(noise(10), to_pipe=False))
    struct.pack_into("<I", data, place, value)
    try:
        recording = read_audio(io.BytesIO(data), "x.wav")
    except InputError as error:
        assert str(error).startswith("x.wav ")
    else:
        assert recording.sample_rate >= 1
        assert len(recording.samples) <= 40


def test_a_damaged_header_makes_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    damaged = sound_file(noise(200), format="AIFF").getvalue().replace(b"SSND", b"SS\0\0")
    for data in (damaged, damaged[:50]):
        with pytest.raises(InputError):
            read_audio(io.BytesIO(data), "x.aiff")
    assert capfd.readouterr() == ("", "")


def test_no_more_is_allocated_than_is_there(reader: str) -> None:
    """A header that claims four gigabytes, and two samples behind it."""
    file = io.BytesIO(wav_header(RATE, 2, 0xFFFFFF00) + bytes(8))
    tracemalloc.start()
    try:
        assert len(read_audio(file, "x.wav").samples) == 2
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("place", "value", "words"), [(34, 64, "64 bits at 48000"), (24, 0, "16 bits at 0 Hz")])
def test_widths_and_rates_that_are_none(place: int, value: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    data = bytearray(wav_header(RATE, 2, 32) + bytes(32))
    data[place : place + 2] = struct.pack("<H", value)
    with pytest.raises(InputError, match=words):
        read_audio(io.BytesIO(data), "x.wav")


def test_floats_and_flac_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = np.random.default_rng(1).uniform(-1, 1, (300, 2)).astype(np.float32)
    as_float, as_flac = sound_file(audio, subtype="FLOAT"), sound_file(noise(300), format="FLAC")
    assert np.array_equal(read_audio(as_float, "x.wav").audio, audio)
    assert np.array_equal(read_audio(as_flac, "x.flac").samples, noise(300))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for file in (as_float, as_flac):
        file.seek(0)
        with pytest.raises(InputError, match=r"mossnano-stdio\[audio\]"):
            read_audio(file, "x")


def test_a_float_wav_with_nan_is_refused() -> None:
    audio = np.zeros((10, 2), dtype=np.float32)
    audio[3, 1] = np.nan
    with pytest.raises(InputError, match=r"x\.wav: sample 3 of channel 1 is nan"):
        read_audio(sound_file(audio, subtype="FLOAT"), "x.wav")


@pytest.mark.parametrize("data", [b"", b"RIFF", b"no audio at all" * 10, wav_header(RATE, 2)[:30]])
def test_what_is_no_audio_is_one_error(reader: str, data: bytes) -> None:
    for read in (read_audio, read_sound):
        with pytest.raises(InputError, match=r"^x\.wav is no "):
            read(io.BytesIO(data), "x.wav")


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_cut_wav_gives_its_whole_samples(reader: str, cut: int) -> None:
    samples = noise(10)
    recording = read_audio(io.BytesIO(written(samples, to_pipe=False)[:-cut]), "x.wav")
    assert np.array_equal(recording.samples, samples[: 10 - (cut + 3) // 4])


def test_a_wav_is_read_from_a_pipe(reader: str) -> None:
    samples = noise(50)
    with piped(written(samples, to_pipe=True)) as pipe:
        assert np.array_equal(read_audio(pipe, "-").samples, samples)


# --- block by block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 1, BLOCK_SAMPLES, 2 * BLOCK_SAMPLES + 17])
def test_blocks_make_the_whole(reader: str, samples: int) -> None:
    file = io.BytesIO(written(noise(samples), to_pipe=False))
    sound = read_sound(file, "x.wav")
    assert (sound.sample_rate, sound.channels, sound.samples) == (RATE, 2, samples)
    blocks = list(sound.blocks)
    assert all(0 < len(block) <= BLOCK_SAMPLES for block in blocks)
    file.seek(0)
    assert np.array_equal(np.concatenate([np.zeros((0, 2)), *blocks]), read_audio(file, "x.wav").audio)


def test_blocks_of_a_pipe(reader: str) -> None:
    with piped(written(noise(50), to_pipe=True)) as pipe:
        [block] = read_sound(pipe, "-").blocks
    assert np.array_equal(block, from_pcm16(noise(50).astype("<i2").tobytes(), 2))


def test_blocks_with_nan_are_refused_by_their_place() -> None:
    audio = np.zeros((BLOCK_SAMPLES + 10, 1), dtype=np.float32)
    audio[BLOCK_SAMPLES + 3] = np.nan
    file = sound_file(audio, subtype="FLOAT")
    with pytest.raises(InputError, match=rf"x\.wav: sample {BLOCK_SAMPLES + 3} of channel 0 is nan"):
        list(read_sound(file, "x.wav").blocks)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 44100, 47999, 48000, 96000])
@pytest.mark.parametrize("samples", [1, 3, 1000, 44100])
def test_resampling_keeps_the_length_and_does_not_see_the_blocks(sample_rate: int, samples: int) -> None:
    audio = np.random.default_rng(samples).uniform(-1, 1, (samples, 2)).astype(np.float32)
    whole = np.concatenate(list(resampled([audio], 2, sample_rate, RATE)))
    assert len(whole) == int(Fraction(samples * RATE, sample_rate) + Fraction(1, 2))
    pieces = [audio[start : start + 331] for start in range(0, samples, 331)]
    assert np.allclose(np.concatenate(list(resampled(pieces, 2, sample_rate, RATE))), whole, atol=1e-6)


@pytest.mark.parametrize("sample_rate", [1000, 8000])
def test_resampling_gives_no_more_at_once_for_a_low_rate(sample_rate: int) -> None:
    for piece in itertools.islice(resampled([np.ones((400_000, 2), np.float32)], 2, sample_rate, RATE), 30):
        assert len(piece) <= 2 * BLOCK_SAMPLES


def test_resampling_keeps_a_tone() -> None:
    times = np.arange(44100) / 44100
    tone = np.stack([np.sin(2 * np.pi * 440 * times), np.cos(2 * np.pi * 1000 * times)], axis=1).astype(np.float32)
    found = np.concatenate(list(resampled([tone], 2, 44100, RATE)))[1000:-1000]
    times = np.arange(RATE)[1000:-1000] / RATE
    expected = np.stack([np.sin(2 * np.pi * 440 * times), np.cos(2 * np.pi * 1000 * times)], axis=1)
    assert np.abs(found - expected).max() < 1e-4


def test_resampling_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    assert len(list(resampled([np.zeros((5, 2), np.float32)], 2, RATE, RATE))) == 1
    with pytest.raises(UsageError, match=r"mossnano-stdio\[audio\]"):
        list(resampled([np.zeros((5, 2), np.float32)], 2, 16000, RATE))
