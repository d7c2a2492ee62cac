"""Reads what a caller gives: arrays of codes and of audio, in any order of their axes, and times.

The quantizers' axis of an array is as long as the weights have quantizers, or as long as `num_quantizers` asks for.
It is the first axis or the last one:

    (quantizers, frames) or (frames, quantizers)
    (quantizers, batch, frames) or (batch, frames, quantizers)

Where both ends fit, the first axis is taken. But where `num_quantizers` is asked for and only one end is longer than
that, the longer end is taken: a caller who asks for a prefix has more quantizers than the prefix.

Rules of this room:

- Every array is read in one way or refused with a ValueError that says what was found.
- Inside, codes of a batch are (quantizers, batch, frames), and audio is float32 [samples, channels].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.tokens.format import Codes
from mossnano_stdio.tokens.packing import meaning_of

MONO = 1
LOWEST_RATE, HIGHEST_RATE = 1000, 1 << 20  # of what is resampled; from less, one sample would become seconds
MOST_FRAMES = 1 << 53  # more than any stream has; beyond, numbers of seconds are no whole frames any more


def is_whole_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def checked_quantizers(num_quantizers: int | None, quantizers: int) -> int:
    """Return how many quantizers are asked for; None asks for all.

    >>> checked_quantizers(None, 16), checked_quantizers(8, 16)
    (16, 8)
    """
    if num_quantizers is None:
        return quantizers
    if not is_whole_number(num_quantizers) or not 1 <= num_quantizers <= quantizers:
        raise ValueError(f"num_quantizers is {num_quantizers!r}, allowed is a whole number from 1 to {quantizers}")
    return int(num_quantizers)


def checked_rate(sample_rate: int) -> int:
    """Return a sample rate in Hz, if resampling supports it.

    >>> checked_rate(44100)
    44100
    """
    if not is_whole_number(sample_rate) or not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise ValueError(
            f"sample_rate is {sample_rate!r}, allowed is a whole number from {LOWEST_RATE} to {HIGHEST_RATE}"
        )
    return int(sample_rate)


def normalised_codes(
    codes: Any, quantizers: int, codebook_size: int, num_quantizers: int | None = None, name: str = "codes"
) -> Codes:
    """Codes in any order -> (num_quantizers, batch, frames), a prefix where one is asked for. `name` is for errors.

    >>> normalised_codes(np.zeros((16, 30), int), 16, 1024).shape
    (16, 1, 30)
    >>> normalised_codes(np.zeros((30, 16), int), 16, 1024, num_quantizers=8).shape
    (8, 1, 30)
    >>> normalised_codes(np.zeros((4, 30, 16), int), 16, 1024).shape
    (16, 4, 30)
    """
    wanted = checked_quantizers(num_quantizers, quantizers)
    array = integer_array(codes, name)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name}: {array.ndim} axes, allowed are 2 or 3: (quantizers, frames) or with a batch")
    if _quantizers_come_first(array.shape, quantizers, wanted, name):
        ordered = array if array.ndim == 3 else array[:, np.newaxis]
    else:
        ordered = np.moveaxis(array if array.ndim == 3 else array[np.newaxis], 2, 0)
    check_range(array, codebook_size, name)
    return ordered[:wanted].astype(np.uint16)


def integer_array(values: Any, name: str) -> NDArray[np.integer]:
    """Convert to an array of integers; refuse an empty or ragged one."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: ragged, the rows differ in length ({error})") from None
    if not array.size:
        raise ValueError(f"{name}: empty, the shape is {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: {array.dtype}, allowed are integers")
    return array


def check_range(codes: NDArray[np.integer], codebook_size: int, name: str) -> None:
    least, most = int(codes.min()), int(codes.max())
    if least < 0 or most >= codebook_size:
        outside = least if least < 0 else most
        meaning = meaning_of(outside, codebook_size)
        raise ValueError(f"{name}: holds {outside}, allowed are 0 to {codebook_size - 1}{meaning}")


def normalised_wave(wave: Any, channels: int) -> NDArray[np.float32]:
    """float [channels, samples], or [samples] of one channel -> float32 [samples, channels]; mono goes to all.

    >>> normalised_wave(np.zeros(480), channels=2).shape
    (480, 2)
    """
    array = np.asarray(wave)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"wave: {array.dtype}, allowed are floats, full scale being 1")
    if array.ndim == 1:
        array = array[np.newaxis]
    if array.ndim != 2 or array.shape[0] not in (MONO, channels):
        raise ValueError(
            f"wave: the shape is {array.shape}, allowed are ({channels}, samples), (1, samples) and (samples,)"
        )
    if not array.size:
        raise ValueError(f"wave: empty, the shape is {array.shape}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)  # a large float64 becomes infinity
    if not np.isfinite(array).all():
        raise ValueError("wave: holds NaN or infinity, allowed are numbers that are finite in float32")
    planar = np.broadcast_to(array, (channels, array.shape[1]))
    return np.ascontiguousarray(planar.T)


def sample_range(start: float, duration: float | None, total_samples: int, sample_rate: int) -> range:
    """The samples from `start` seconds on, for `duration` seconds but not beyond the end; None: to the end.

    >>> sample_range(1.5, 1.0, 48000 * 10, 48000), sample_range(9.5, None, 48000 * 10, 48000)
    (range(72000, 120000), range(456000, 480000))
    """
    if not 0 <= start < total_samples / sample_rate:
        raise ValueError(f"start is {start}, allowed is 0 up to the end, at {total_samples / sample_rate} seconds")
    if duration is not None and not 0 < duration < math.inf:
        raise ValueError(f"duration is {duration}, allowed is any number of seconds above 0")
    first = min(round(start * sample_rate), total_samples - 1)
    end = total_samples if duration is None else round(min((start + duration) * sample_rate, total_samples))
    return range(first, max(end, first + 1))


def warm_up_frames(seconds: float, frames_per_second: float) -> int:
    """The fewest whole frames that last so many seconds.

    >>> warm_up_frames(1.0, 12.5)
    13
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"warm_up is {seconds}, allowed is any number of seconds from 0")
    return math.ceil(min(seconds * frames_per_second, MOST_FRAMES))


def _quantizers_come_first(shape: tuple[int, ...], quantizers: int, wanted: int, name: str) -> bool:
    first, last = shape[0], shape[-1]
    fits_first, fits_last = first in (wanted, quantizers), last in (wanted, quantizers)
    if not (fits_first or fits_last):
        allowed = f"{quantizers}" if wanted == quantizers else f"{wanted} or {quantizers}"
        few = f"; for codes of fewer quantizers give num_quantizers={first}" if first < quantizers else ""
        raise ValueError(
            f"{name}: the shape is {shape}, neither the first nor the last axis has {allowed} quantizers{few}"
        )
    if fits_first and fits_last and wanted < max(first, last):
        return first >= last  # the longer end holds the quantizers; of equal ends, the first
    return fits_first
