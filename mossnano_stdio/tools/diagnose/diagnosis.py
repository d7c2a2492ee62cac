"""Finds what is wrong with another decoder's sound: lays it over ours, and explains what is left between them.

Hypotheses about the network are tried on the few frames behind the first one that departs, all that lies before having
been decoded rightly once for all of them. The best of them decode the whole recording. A hypothesis is named where it
leaves a tenth of what the right decode leaves, or less, to be explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.pcm import FULL_SCALE
from mossnano_stdio.pcm.comparison import ratio_db
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.tools.diagnose.align import Aligned, Misfit, align, frame_snr_db
from mossnano_stdio.tools.diagnose.hypotheses import Hypothesis, after_a_while, coarser, from_the_start
from mossnano_stdio.tools.diagnose.network import Network, copied
from mossnano_stdio.tools.diagnose.residue import changes, maybe_rounded_wrongly
from mossnano_stdio.tools.diagnose.spectrum import Sound

DEPARTED_STEPS = 0.75  # RMS of a frame's error: rounding leaves 0.29, cutting off 0.58
CLEARLY_STEPS = 1.5  # where there is nothing before it to compare with, a sample's error
ABOVE_BEFORE = 4.0  # times the error of the frames before
START_FRAMES = 2  # what is wrong at once departs in one of these
WINDOW_FRAMES = 8
WATCHED_FRAMES = 250  # behind the first that departs: more says nothing new
FINALISTS = 6
EXPLAINED_DB = 10.0
EQUAL_DB = 0.5  # of two that explain equally much, the simpler one
FULLY_DB = 75.0  # a float32 network, or 16 bits, explains no more

NOISE_FRAMES = 24
LIKE_NOISE = 0.15  # the correlation of two noises of the same weights, rounded alike; by chance it is some 0.005
GOOD_FLOOR_DB = 25.0
STEADY_DB = 10.0  # within which four fifths of the frames' ratios lie


@dataclass(frozen=True)
class Explanation:
    name: str
    how: str
    look_for: str
    snr_db: float  # the right decode over what is left where this is taken off


@dataclass(frozen=True, eq=False)
class Diagnosis:
    is_fault: bool
    verdict: str
    named: Explanation | None
    next_ones: tuple[Explanation, ...]
    misfits: tuple[Misfit, ...]
    snr_db: float  # of the other's sound against the right decode
    first_frame: int | None  # that departs
    first_sample: int | None
    frame_snr_db: NDArray[np.float64]
    second_snr_db: NDArray[np.float64]
    named_frame_snr_db: NDArray[np.float64] | None
    contexts_frames: tuple[float, ...]


@dataclass(frozen=True)
class Subject:
    """What is diagnosed."""

    codes: Codes
    ours: Sound  # the right decode
    other: Sound
    other_rate: int
    right_lengths: tuple[int, ...]


def diagnose(subject: Subject, codec: CodecFormat, network: Network, threads: int = 1) -> Diagnosis:
    is_number = np.isfinite(subject.other)
    other = np.where(is_number, subject.other, 0.0)
    nans = int((~is_number).any(axis=1).sum())
    aligned = align(other, subject.other_rate, subject.ours, codec, subject.right_lengths)
    return _Examination(subject, codec, network, aligned, nans, threads).diagnosed()


class _Examination:
    def __init__(
        self, subject: Subject, codec: CodecFormat, network: Network, aligned: Aligned, nans: int, threads: int
    ) -> None:
        self._subject = subject
        self._codec = codec
        self._network = network
        self._aligned = aligned
        self._nans = nans
        self._threads = threads
        self._keeps_full_scale = np.abs(aligned.sound).max(initial=0.0) <= 1 + 1e-4
        self._right = self._as_written(subject.ours)

    def diagnosed(self) -> Diagnosis:
        error = self._aligned.heard - self._beside(self._right)
        maybe_sample = _first_departed(error * FULL_SCALE * self._aligned.gain, self._codec.frame_samples)
        if maybe_sample is None:
            return self._without_departure()
        sample = maybe_sample + self._aligned.present.start
        ranked = self._ranked(sample)
        right_db = self._snr_db(self._right)
        best = ranked[0][0] if ranked else None
        if best and best.snr_db >= right_db + EXPLAINED_DB:
            named, sound = ranked[0]
            how = f" ({named.how})" if named.how else ""
            met = "exactly" if np.isinf(named.snr_db) else f"to {named.snr_db:.1f} dB"
            verdict = f"{named.name}{how}: with it our decode is this sound {met}, without it to {right_db:.1f} dB"
            return self._diagnosis(verdict, sample, named, [other for other, _ in ranked[1:3]], sound)
        return self._of_noise(sample, right_db, [explanation for explanation, _ in ranked[:3]])

    # --- what is said ----------------------------------------------------------------------------------------------

    def _without_departure(self) -> Diagnosis:
        misfit = maybe_rounded_wrongly(self._beside(self._right), self._aligned.heard)
        snr_db = self._snr_db(self._right)
        found = (*self._of_nan(), *self._aligned.misfits, *([misfit] if misfit else []))
        if not found:
            return self._diagnosis("no fault: it is the right decode, within a 16-bit step", None)
        named, *others = (_explanation(one, snr_db) for one in found)
        verdict = f"{named.name} ({named.how}); with that undone it is the right decode"
        return self._diagnosis(verdict, None, named, others)

    def _of_noise(self, sample: int, right_db: float, nearest: list[Explanation]) -> Diagnosis:
        """Nothing explains it as a whole. Is it what fewer bits leave behind?"""
        by_frame = self._by_frame(self._right)
        heard = by_frame[np.isfinite(by_frame)]
        low, high = np.percentile(heard, [10, 90]) if len(heard) else (0.0, 0.0)
        is_steady = high - low < STEADY_DB and sample < START_FRAMES * self._codec.frame_samples
        if is_steady and right_db >= GOOD_FLOOR_DB / 2:
            noises = sorted(self._like_noises(), key=lambda noise: -noise[1])
            best, likeness = noises[0]
            if likeness >= LIKE_NOISE and (best.name != "int8" or right_db < GOOD_FLOOR_DB):
                verdict = (
                    f"{best.name} ({best.how}): a steady noise floor of {right_db:.1f} dB, "
                    f"which correlates with that of its rounding ({likeness:.2f})"
                )
                return self._diagnosis(verdict, sample, best, [noise for noise, _ in noises[1:3]])
            if right_db >= GOOD_FLOOR_DB and not self._aligned.misfits and not self._nans:
                like = f", like that of int8 ({likeness:.2f})" if likeness >= LIKE_NOISE else ""
                verdict = f"no fault: a steady noise floor of {right_db:.1f} dB{like}, as weights of few bits leave it"
                return self._diagnosis(verdict, sample, is_fault=False)
        misfits = (*self._of_nan(), *self._aligned.misfits)
        if misfits and (right_db >= GOOD_FLOOR_DB or self._nans):
            named, *others = (_explanation(one, right_db) for one in misfits)
            verdict = f"{named.name} ({named.how}); with that undone it is the right decode to {right_db:.1f} dB"
            return self._diagnosis(verdict, sample, named, others)
        verdict = (
            f"a fault, but none of these: it is the right decode to {right_db:.1f} dB, and nothing explains the rest"
        )
        return self._diagnosis(verdict, sample, next_ones=nearest)

    def _diagnosis(
        self,
        verdict: str,
        sample: int | None,
        named: Explanation | None = None,
        next_ones: Sequence[Explanation] = (),
        maybe_sound: Sound | None = None,
        *,
        is_fault: bool = True,
    ) -> Diagnosis:
        is_fault = is_fault and (sample is not None or named is not None)
        second = frame_snr_db(self._aligned.sound, self._right, self._codec.sample_rate)
        return Diagnosis(
            is_fault=is_fault,
            verdict=verdict,
            named=named,
            next_ones=tuple(next_ones),
            misfits=(*self._of_nan(), *self._aligned.misfits),
            snr_db=self._snr_db(self._right),
            first_frame=None if sample is None else sample // self._codec.frame_samples,
            first_sample=sample,
            frame_snr_db=self._by_frame(self._right),
            second_snr_db=second,
            named_frame_snr_db=None if maybe_sound is None else self._by_frame(maybe_sound),
            contexts_frames=tuple(transformer.context_frames for transformer in self._network.transformers),
        )

    def _of_nan(self) -> tuple[Misfit, ...]:
        if not self._nans:
            return ()
        how = f"{self._nans} samples are NaN or infinite"
        return (Misfit("NaN", how, "a division by 0, a softmax over nothing, float16 that overflows"),)

    def _seen_as_nan(self, misfit: Misfit) -> Misfit:
        """It was us who put those zeros where NaN was."""
        return self._of_nan()[0] if self._nans and misfit.name == "NaN to 0" else misfit

    # --- what is tried ---------------------------------------------------------------------------------------------

    def _ranked(self, sample: int) -> list[tuple[Explanation, Sound]]:
        """The best first."""
        explained = [
            (_explanation(self._seen_as_nan(change.misfit), self._snr_db(sound)), sound)
            for change in changes(self._subject.ours, self._aligned.sound, self._codec)
            for sound in [self._as_written(change.sound)]
        ]
        if max((explanation.snr_db for explanation, _ in explained), default=0.0) < FULLY_DB:
            explained += self._decoded_wrongly(sample)
        best_db = max((explanation.snr_db for explanation, _ in explained), default=0.0)
        equal_db = min(best_db, FULLY_DB) - EQUAL_DB
        # A stable sort: of those that explain equally much, the first, which is the simplest, stays in front.
        return sorted(explained, key=lambda pair: -min(pair[0].snr_db, equal_db))

    def _decoded_wrongly(self, sample: int) -> list[tuple[Explanation, Sound]]:
        frame = sample // self._codec.frame_samples
        codes, codec = self._subject.codes, self._codec
        screened: list[tuple[float, Hypothesis]] = []
        if frame <= START_FRAMES:
            hypotheses = from_the_start(self._network, codes, codec.codebook_size)
            screened += self._screened(hypotheses, 0)
        if frame >= 1:
            hypotheses = after_a_while(self._network, frame, sample, codec.frame_samples, len(codes))
            screened += self._screened(hypotheses, frame)
        finalists = sorted(range(len(screened)), key=lambda index: -min(screened[index][0], FULLY_DB))[:FINALISTS]
        frames = min(len(codes), frame + WATCHED_FRAMES)

        def decoded(index: int) -> tuple[Explanation, Sound]:
            hypothesis = screened[index][1]
            wrong = self._network.decode(hypothesis.codes_of(codes)[:frames], hypothesis.manner)
            sound = self._as_written(wrong.reshape(-1, codec.channels).astype(np.float64))
            snr_db = self._snr_db(sound)
            return Explanation(hypothesis.name, hypothesis.how, hypothesis.look_for, snr_db), sound

        return self._in_threads(decoded, sorted(finalists))

    def _screened(self, hypotheses: Iterable[Hypothesis], frame: int) -> list[tuple[float, Hypothesis]]:
        """The ratio that each reaches in a few frames from `frame` on."""
        codes, frame_samples = self._subject.codes, self._codec.frame_samples
        memory = self._network.start()
        if frame:
            self._network.decode(codes[:frame], memory=memory)
        end = min(len(codes), frame + WINDOW_FRAMES)
        window = slice(frame * frame_samples, end * frame_samples)
        heard = self._aligned.sound[window]

        def tried(hypothesis: Hypothesis) -> tuple[float, Hypothesis]:
            if hypothesis.manner.at_once:
                end_at_once = len(codes) if frame == 0 else end
                wrong = self._network.decode(
                    hypothesis.codes_of(codes)[frame:end_at_once], hypothesis.manner, copied(memory)
                )
            else:
                wrong = self._network.decode(hypothesis.codes_of(codes)[frame:end], hypothesis.manner, copied(memory))
            sound = self._as_written(wrong.reshape(-1, self._codec.channels).astype(np.float64))[: len(heard)]
            return _snr_db(self._right[window], heard - sound), hypothesis

        return self._in_threads(tried, list(hypotheses))

    def _like_noises(self) -> Iterator[tuple[Explanation, float]]:
        """Each way to have fewer bits, and how much of its noise is in the other's sound."""
        codes = self._subject.codes[:NOISE_FRAMES]
        samples = slice(0, len(codes) * self._codec.frame_samples)
        right = self._right[samples]
        noise = self._aligned.sound[samples] - right
        for hypothesis in coarser():
            decoded = self._network.decode(codes, hypothesis.manner).reshape(right.shape).astype(np.float64)
            own = self._as_written(decoded) - right
            likeness = float((own * noise).sum() / np.sqrt(np.square(own).sum() * np.square(noise).sum()))
            snr_db = _snr_db(right, self._aligned.sound[samples] - decoded)
            yield Explanation(hypothesis.name, hypothesis.how, hypothesis.look_for, snr_db), likeness

    def _in_threads(self, function: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(function, arguments))

    # --- how it is measured ----------------------------------------------------------------------------------------

    def _as_written(self, sound: Sound) -> Sound:
        """What leaves full scale is cut, where the other does so too."""
        return np.clip(sound, -1, 1) if self._keeps_full_scale else sound

    def _beside(self, sound: Sound) -> Sound:
        return self._aligned.beside(sound, self._codec.sample_rate)

    def _snr_db(self, sound: Sound) -> float:
        """The right decode over what is left where `sound`, which may be shorter, is taken off."""
        aligned = self._aligned
        whole = np.zeros_like(aligned.sound)
        whole[: len(sound)] = sound
        end = min(len(aligned.heard), max(0, len(sound) - aligned.present.start))
        return _snr_db(self._beside(self._right)[:end], (aligned.heard - self._beside(whole))[:end])

    def _by_frame(self, sound: Sound) -> NDArray[np.float64]:
        frames = -(-len(self._right) // self._codec.frame_samples)
        by_frame = np.full(frames, np.nan)
        found = frame_snr_db(self._aligned.sound[: len(sound)], sound, self._codec.frame_samples)
        by_frame[: len(found)] = found
        return by_frame


def _explanation(misfit: Misfit, snr_db: float) -> Explanation:
    return Explanation(misfit.name, misfit.how, misfit.look_for, snr_db)


def _snr_db(signal: Sound, noise: Sound) -> float:
    return ratio_db(float(np.square(signal).sum()), float(np.square(noise).sum()))


def _first_departed(error_steps: Sound, frame_samples: int) -> int | None:
    """The first sample whose error is more than that of the frames before it."""
    error = np.abs(error_steps).max(axis=1, initial=0.0)
    if not len(error):
        return None
    starts = np.arange(0, len(error), frame_samples)
    squares = np.add.reduceat(np.square(error_steps).mean(axis=1), starts)
    counts = np.diff(np.append(starts, len(error)))
    departed = np.flatnonzero(np.sqrt(squares / counts) > DEPARTED_STEPS)
    if not len(departed):
        return None
    first = int(departed[0])
    if first:
        largest = np.maximum.reduceat(error, starts)[:first]
        threshold = max(ABOVE_BEFORE * float(np.median(largest)), 1e-3)
    else:
        threshold = CLEARLY_STEPS
    above = np.flatnonzero(error > threshold)
    return int(above[0]) if len(above) else first * frame_samples
