"""pcm/mixing.py: streams that sound at once, against sums made by numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio.pcm import Mixer, SoundForm

MONO = SoundForm(sample_rate=1000, channels=1)
STEREO = SoundForm(sample_rate=1000, channels=2)
PATIENCE_SAMPLES = 1000


def tone(samples: int, number: int = 1, channels: int = 1) -> NDArray[np.int16]:
    return np.random.default_rng([samples, number]).integers(-3000, 3000, (samples, channels)).astype("<i2")


def steps(*pieces: bytes, channels: int = 1) -> NDArray[np.int16]:
    return np.frombuffer(b"".join(pieces), "<i2").reshape(-1, channels)


def test_a_lone_stream_leaves_at_once_as_it_came() -> None:
    mixer = Mixer(STEREO)
    lowest = np.full((5, 2), -32768, "<i2").tobytes()  # no other way through floats keeps it
    assert mixer.push(None, lowest, STEREO) == lowest
    assert mixer.finish(None) == b""
    assert mixer.is_idle


def test_plain_streams_follow_one_another() -> None:
    mixer = Mixer(MONO)
    mixer.push(1, tone(10).tobytes(), MONO)
    waits = mixer.push(None, tone(20, 2).tobytes(), MONO) + mixer.finish(None)
    assert waits == b""
    assert mixer.push(None, tone(30, 3).tobytes(), MONO) == b""
    mixed = steps(mixer.finish(1), mixer.finish(None))
    assert np.array_equal(mixed, np.concatenate([tone(20, 2), tone(30, 3)]))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=30))
def test_streams_that_begin_together_are_summed(pushes: list[tuple[int, int]]) -> None:
    mixer = Mixer(MONO)
    sounds = {number: [np.zeros((0, 1), np.int16)] for number in range(3)}
    leaves = [mixer.push(number, b"", MONO) for number in range(3)]
    for place, (number, samples) in enumerate(pushes):
        sounds[number].append(tone(samples, place))
        leaves.append(mixer.push(number, sounds[number][-1].tobytes(), MONO))
    lengths = [sum(map(len, pieces)) for pieces in sounds.values()]
    if max(lengths) <= PATIENCE_SAMPLES:
        assert len(b"".join(leaves)) == 2 * min(lengths)
    leaves.append(mixer.finish_all())
    expected = np.zeros((max(lengths), 1), np.int64)
    for pieces in sounds.values():
        whole = np.concatenate(pieces)
        expected[: len(whole)] += whole
    assert np.array_equal(steps(*leaves), np.clip(expected, -32767, 32767))
    assert mixer.is_idle


def test_what_is_too_loud_together_is_clipped() -> None:
    mixer = Mixer(MONO)
    loud = np.array([[30000], [-30000]], "<i2").tobytes()
    mixer.push(1, b"", MONO)
    mixer.push(2, loud, MONO)
    assert steps(mixer.push(1, loud, MONO)).ravel().tolist() == [32767, -32767]


def test_a_stream_that_gives_nothing_holds_up_the_others_for_a_second() -> None:
    mixer = Mixer(MONO)
    mixer.push(1, b"", MONO)
    sound = tone(3000, 2)
    leaves = [mixer.push(2, sound[start : start + 100].tobytes(), MONO) for start in range(0, 3000, 100)]
    assert [len(leaf) // 2 for leaf in leaves] == [0] * 11 + [100] * 19
    late = tone(50, 3)
    leaves.append(mixer.push(1, late.tobytes(), MONO))
    leaves.append(mixer.finish_all())
    expected = sound.astype(np.int64)
    expected[1900:1950] += late
    assert np.array_equal(steps(*leaves), expected)


def test_streams_that_come_in_long_pieces_are_not_torn() -> None:
    """Each gives 5 s at a time, in turn, as with large chunks."""
    mixer = Mixer(MONO)
    leaves = [mixer.push(number, b"", MONO) for number in (1, 2)]
    for place in range(3):
        leaves += [mixer.push(number, tone(5000, 10 * number + place).tobytes(), MONO) for number in (1, 2)]
    expected = [tone(5000, 10 + place) + tone(5000, 20 + place) for place in range(3)]
    assert np.array_equal(steps(*leaves, mixer.finish_all()), np.concatenate(expected))


def test_what_is_dropped_is_not_mixed_and_holds_up_nobody() -> None:
    mixer = Mixer(MONO)
    mixer.push(1, tone(10).tobytes(), MONO)
    assert mixer.is_all_of(1)
    assert mixer.push(2, tone(20, 2).tobytes(), MONO) == b""
    assert mixer.push(3, tone(30, 3).tobytes(), MONO) == b""
    assert not mixer.is_all_of(1)
    assert mixer.drop(2) == b""
    assert np.array_equal(steps(mixer.drop(1)), tone(30, 3))
    assert mixer.finish(3) == b""
    assert mixer.is_idle
    assert mixer.is_all_of(4)


@pytest.mark.parametrize("form", [MONO, SoundForm(1000, 2, "f32le"), SoundForm(1000, 1, "f32le")])
def test_every_form_is_brought_into_that_of_the_mix(form: SoundForm) -> None:
    audio = tone(100, channels=form.channels)
    sound = audio.tobytes() if form.sample_format == "s16le" else (audio / np.float32(32767)).astype("<f4").tobytes()
    mixer = Mixer(STEREO)
    leaves = [mixer.push(5, sound, form), mixer.finish(5)]
    assert np.array_equal(
        steps(*leaves, channels=2), np.repeat(audio, 2, axis=1)[:, :2] if form.channels == 1 else audio
    )


def test_another_rate_gives_its_tail_at_its_end() -> None:
    mixer = Mixer(STEREO)
    first = mixer.push(5, tone(333).tobytes(), SoundForm(500, 1))
    assert len(first) // 4 < 666
    assert len(first + mixer.finish(5)) // 4 == 666
