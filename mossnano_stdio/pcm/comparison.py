"""Measures how far one recording is from another, and whether the joins between its chunks can be heard.

Rules of this room:

- Everything is measured in 16-bit steps, in float64, over all channels. Noise is candidate minus reference.
- Recordings of unequal length are compared up to the end of the shorter one. The answer holds both lengths.
- A join is the jump from the last sample of a chunk to the first of the next. It is compared with the jumps inside
  the candidate's chunks, and with the reference's jump at the same place: where that is as large, a sound begins
  there and the join is no click.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, UsageError
from mossnano_stdio.pcm.recordings import Recording

INSIDE_PERCENTILE: Final = 99.9
BLOCK_SAMPLES: Final = 1 << 18  # so that an hour needs no float64 copy of itself


@dataclass(frozen=True)
class Join:
    """The border between two chunks. `sample` is the first of the later one."""

    sample: int
    jump_steps: float
    reference_jump_steps: float


@dataclass(frozen=True)
class Comparison:
    """The differences between a candidate and its reference."""

    sample_rate: int
    channels: int
    reference_samples: int
    candidate_samples: int
    max_error_steps: float
    max_error_sample: int | None  # where the largest error is; None: there is no error
    rms_error_steps: float
    snr_db: float  # infinite: no noise; minus infinite: nothing but noise
    differing_values: int
    joins: tuple[Join, ...]
    inside_jump_steps: float | None  # the 99.9th percentile inside of chunks; None: chunks were not asked for

    @property
    def compared_samples(self) -> int:
        return min(self.reference_samples, self.candidate_samples)

    @property
    def identical(self) -> bool:
        return self.differing_values == 0 and self.reference_samples == self.candidate_samples

    @property
    def loud_joins(self) -> tuple[Join, ...]:
        """The joins that jump further than samples inside of chunks do, and further than the reference does there."""
        if self.inside_jump_steps is None:
            return ()
        return tuple(
            join
            for join in self.joins
            if join.jump_steps > self.inside_jump_steps and join.jump_steps > join.reference_jump_steps + 1
        )


def compare_recordings(
    reference: Recording, candidate: Recording, maybe_chunk_samples: int | None = None
) -> Comparison:
    """Compare sample by sample. `maybe_chunk_samples`: how many samples a chunk has; None: do not look at joins.

    >>> reference = Recording(48000, np.array([[0], [3], [-3]], dtype=np.int16))
    >>> candidate = Recording(48000, np.array([[0], [3], [-1]], dtype=np.int16))
    >>> comparison = compare_recordings(reference, candidate)
    >>> comparison.max_error_steps, comparison.max_error_sample, round(comparison.snr_db, 2)
    (2.0, 2, 6.53)
    """
    _check_comparable(reference, candidate)
    samples = min(len(reference.samples), len(candidate.samples))
    max_error, maybe_place, differing = 0.0, None, 0
    signal_power = noise_power = 0.0
    for start in range(0, samples, BLOCK_SAMPLES):
        expected = reference.steps_between(start, min(start + BLOCK_SAMPLES, samples))
        noise = candidate.steps_between(start, min(start + BLOCK_SAMPLES, samples)) - expected
        signal_power += float(np.vdot(expected, expected))
        noise_power += float(np.vdot(noise, noise))
        differing += int(np.count_nonzero(noise))
        error = np.abs(noise).max(axis=1)
        place = int(error.argmax())
        if error[place] > max_error:
            max_error, maybe_place = float(error[place]), start + place
    joins, maybe_inside = _joins(reference, candidate, samples, maybe_chunk_samples)
    channels = candidate.samples.shape[1]
    return Comparison(
        sample_rate=candidate.sample_rate,
        channels=channels,
        reference_samples=len(reference.samples),
        candidate_samples=len(candidate.samples),
        max_error_steps=max_error,
        max_error_sample=maybe_place,
        rms_error_steps=math.sqrt(noise_power / (samples * channels)) if samples else 0.0,
        snr_db=ratio_db(signal_power, noise_power),
        differing_values=differing,
        joins=joins,
        inside_jump_steps=maybe_inside,
    )


def ratio_db(signal_power: float, noise_power: float) -> float:
    """The signal-to-noise ratio: infinite without noise, minus infinity where there is nothing but noise.

    >>> ratio_db(100.0, 1.0), ratio_db(1.0, 0.0), ratio_db(0.0, 1.0)
    (20.0, inf, -inf)
    """
    if not noise_power:
        return math.inf
    return 10 * math.log10(signal_power / noise_power) if signal_power else -math.inf


def _check_comparable(reference: Recording, candidate: Recording) -> None:
    for name, expected, found in (
        ("sample rate", reference.sample_rate, candidate.sample_rate),
        ("number of channels", reference.samples.shape[1], candidate.samples.shape[1]),
    ):
        if expected != found:
            raise InputError(
                f"the {name} is {found} in the candidate and {expected} in the reference: they must be equal"
            )


def _joins(
    reference: Recording, candidate: Recording, samples: int, maybe_chunk_samples: int | None
) -> tuple[tuple[Join, ...], float | None]:
    if maybe_chunk_samples is None:
        return (), None
    if maybe_chunk_samples < 1:
        raise UsageError(f"a chunk of {maybe_chunk_samples} samples, allowed is 1 or more")
    places = range(maybe_chunk_samples, samples, maybe_chunk_samples)
    joins = tuple(
        Join(place, float(_jumps(candidate, place, place + 1)[0]), float(_jumps(reference, place, place + 1)[0]))
        for place in places
    )
    inside = np.delete(_jumps(candidate, 1, samples), np.arange(maybe_chunk_samples, samples, maybe_chunk_samples) - 1)
    return joins, float(np.percentile(inside, INSIDE_PERCENTILE)) if inside.size else 0.0


def _jumps(recording: Recording, first: int, stop: int) -> NDArray[np.float64]:
    """How far each sample from `first` to `stop` is from the one before it, on the channel where that is furthest."""
    jumps = np.empty(max(0, stop - first), dtype=np.float64)
    for start in range(first, stop, BLOCK_SAMPLES):
        steps = recording.steps_between(start - 1, min(start + BLOCK_SAMPLES, stop))
        jumps[start - first : start - first + BLOCK_SAMPLES] = np.abs(np.diff(steps, axis=0)).max(axis=1)
    return jumps
