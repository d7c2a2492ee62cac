"""tokens/arrays.py: every array is read in one way, or refused with the reason."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.tokens.arrays import (
    checked_quantizers,
    checked_rate,
    normalised_codes,
    normalised_wave,
    sample_range,
    warm_up_frames,
)

Q, SIZE = 16, 1024


FIRST, LAST = "quantizers first", "quantizers last"


@pytest.mark.parametrize(
    ("shape", "num_quantizers", "reading"),
    [
        # one end has all quantizers, the other could be anything but that
        ((16, 30), None, FIRST),
        ((30, 16), None, LAST),
        ((16, 1), None, FIRST),
        ((1, 16), None, LAST),
        ((16, 4, 30), None, FIRST),
        ((4, 30, 16), None, LAST),
        ((16, 16, 30), None, FIRST),
        ((30, 16, 16), None, LAST),
        # both ends have: the canonical order
        ((16, 16), None, FIRST),
        ((16, 1, 16), None, FIRST),
        ((16, 4, 16), None, FIRST),
        ((16, 16, 16), None, FIRST),
        # a prefix of all
        ((16, 30), 8, FIRST),
        ((30, 16), 8, LAST),
        ((4, 30, 16), 8, LAST),
        ((16, 16), 8, FIRST),
        ((16, 4, 16), 1, FIRST),
        # only the prefix is there
        ((8, 30), 8, FIRST),
        ((30, 8), 8, LAST),
        ((8, 4, 30), 8, FIRST),
        ((4, 30, 8), 8, LAST),
        ((8, 8), 8, FIRST),
        ((8, 4, 8), 8, FIRST),
        # as many frames as the prefix has: who asks for a prefix has more than that
        ((8, 16), 8, LAST),
        ((16, 8), 8, FIRST),
        ((1, 16), 1, LAST),
        ((16, 1), 1, FIRST),
        ((8, 4, 16), 8, LAST),
        ((16, 4, 8), 8, FIRST),
    ],
)
def test_every_reading(shape: tuple[int, ...], num_quantizers: int | None, reading: str) -> None:
    array = np.arange(np.prod(shape)).reshape(shape) % SIZE
    wanted = num_quantizers or Q
    three = array if array.ndim == 3 else array[:, None] if reading == FIRST else array[None]
    expected = three[:wanted] if reading == FIRST else np.stack([three[..., number] for number in range(wanted)])
    found = normalised_codes(array, Q, SIZE, num_quantizers)
    assert found.dtype == np.uint16
    assert found.tolist() == expected.tolist()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.none() | st.integers(1, 16))
def test_what_is_read_is_always_a_prefix_of_one_reading(a: int, b: int, c: int, num_quantizers: int | None) -> None:
    array = np.arange(a * b * c).reshape(a, b, c) % SIZE
    wanted = num_quantizers or Q
    readings = []
    if a in (wanted, Q):
        readings.append(array[:wanted].tolist())
    if c in (wanted, Q):
        readings.append(np.moveaxis(array, 2, 0)[:wanted].tolist())
    if readings:
        assert normalised_codes(array, Q, SIZE, num_quantizers).tolist() in readings
    else:
        with pytest.raises(ValueError, match="neither the first nor the last axis has"):
            normalised_codes(array, Q, SIZE, num_quantizers)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integers(dtype: Any) -> None:
    array = (np.arange(48).reshape(16, 3)).astype(dtype)
    assert normalised_codes(array, Q, SIZE)[:, 0].tolist() == array.tolist()
    assert normalised_codes(array.astype(">i4"), Q, SIZE)[:, 0].tolist() == array.tolist()
    assert normalised_codes(array.tolist(), Q, SIZE)[:, 0].tolist() == array.tolist()


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (np.zeros((16, 3)), "codes: float64, allowed are integers"),
        (np.zeros((16, 3), bool), "codes: bool, allowed are integers"),
        (np.zeros((16, 3), complex), "codes: complex128"),
        ([["a"] * 16], "codes: <U1, allowed are integers"),
        (None, "codes: object, allowed are integers"),
        ([[1] * 16, [1] * 15], "codes: ragged, the rows differ in length"),
        ([[2**70] * 16], "codes: object, allowed are integers"),
        (5, "codes: 0 axes, allowed are 2 or 3"),
        ([1] * 16, "codes: 1 axes, allowed are 2 or 3"),
        (np.zeros((16, 1, 1, 3), int), "codes: 4 axes, allowed are 2 or 3"),
        (np.zeros((16, 0), int), r"codes: empty, the shape is \(16, 0\)"),
        (np.zeros((0, 16), int), r"codes: empty, the shape is \(0, 16\)"),
        (np.zeros((0, 30, 16), int), r"codes: empty"),
        ([], r"codes: empty, the shape is \(0,\)"),
        (np.full((16, 3), 1024), "codes: holds 1024, allowed are 0 to 1023"),
        (np.full((16, 3), -1), "codes: holds -1, allowed are 0 to 1023"),
        (np.full((16, 3), 65536 + 5), "codes: holds 65541, allowed are 0 to 1023"),
        (
            np.zeros((17, 3), int),
            r"codes: the shape is \(17, 3\), neither the first nor the last axis has 16 quantizers$",
        ),
        (np.zeros((3, 15), int), r"neither the first nor the last axis has 16 quantizers; .* num_quantizers=3"),
    ],
)
def test_what_is_no_codes(codes: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        normalised_codes(codes, Q, SIZE)


def test_a_code_out_of_range_is_found_beyond_the_prefix_too() -> None:
    codes = np.zeros((16, 3), int)
    codes[12, 1] = 5000
    with pytest.raises(ValueError, match="codes: holds 5000"):
        normalised_codes(codes, Q, SIZE, num_quantizers=8)


@pytest.mark.parametrize("wrong", [0, 17, -1, 1.0, True, "8", np.float32(8)])
def test_quantizers_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"num_quantizers is .*, allowed is a whole number from 1 to 16"):
        checked_quantizers(wrong, Q)


@pytest.mark.parametrize("wrong", [0, -1, 44100.0, True, "48000", 10**9])
def test_rates_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"sample_rate is .*, allowed is a whole number"):
        checked_rate(wrong)


def test_numpy_integers_are_integers() -> None:
    assert checked_quantizers(np.int32(8), Q) == 8  # type: ignore[arg-type]
    assert checked_rate(np.int64(44100)) == 44100  # type: ignore[arg-type]


def test_waves() -> None:
    stereo = np.arange(6.0).reshape(2, 3) / 10
    assert normalised_wave(stereo, 2).tolist() == np.float32(stereo.T).tolist()
    mono = np.array([0.1, 0.2], np.float32)
    for given_wave in (mono, mono[None], mono.tolist(), mono.astype(np.float64)):
        found = normalised_wave(given_wave, 2)
        assert found.dtype == np.float32
        assert found.tolist() == np.stack([mono, mono], axis=1).tolist()
    assert normalised_wave(mono, 1).shape == (2, 1)


@pytest.mark.parametrize(
    ("wave", "says"),
    [
        (np.zeros((2, 3), np.int16), "wave: int16, allowed are floats, full scale being 1"),
        (np.zeros((3, 2)), r"wave: the shape is \(3, 2\), allowed are \(2, samples\), \(1, samples\) and \(samples,\)"),
        (np.zeros((1, 2, 3)), r"wave: the shape is \(1, 2, 3\)"),
        (np.float32(1), r"wave: the shape is \(\)"),
        (np.zeros((2, 0)), r"wave: empty, the shape is \(2, 0\)"),
        (np.array([0.0, np.nan]), "wave: holds NaN or infinity"),
        (np.array([0.0, -np.inf]), "wave: holds NaN or infinity"),
    ],
)
def test_what_is_no_wave(wave: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        normalised_wave(wave, 2)


@given(st.integers(1, 10_000), st.floats(0, 1.2), st.none() | st.floats(1e-6, 2))
def test_sample_ranges(total: int, start: float, duration: float | None) -> None:
    rate = 8000
    if start * rate >= total:
        with pytest.raises(ValueError, match="start is"):
            sample_range(start, duration, total, rate)
        return
    found = sample_range(start, duration, total, rate)
    assert 0 <= found.start < found.stop <= total
    assert abs(found.start - Fraction(start) * rate) <= 1
    if duration is None:
        assert found.stop == total


@pytest.mark.parametrize(
    ("start", "duration"),
    [(-0.1, None), (1.0, None), (np.nan, None), (0.0, 0.0), (0.0, -1.0), (0.0, np.nan), (0.0, np.inf)],
)
def test_ranges_that_are_none(start: float, duration: float | None) -> None:
    with pytest.raises(ValueError, match=r"(start|duration) is .*, allowed is"):
        sample_range(start, duration, 48000, 48000)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_warm_ups_that_are_none(wrong: float) -> None:
    with pytest.raises(ValueError, match="warm_up is"):
        warm_up_frames(wrong, 12.5)
