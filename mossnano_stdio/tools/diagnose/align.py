"""Lays another decoder's sound over ours: offset, gain, polarity, order of channels, rate, missing head or tail.

Each way to lay it is judged by the mean of all frames' signal-to-noise ratios, none of which counts for more than
CLEAR_DB: a recording whose first half is right and whose second half is noise is laid by its first half. It is taken
as it is unless another way is clearly better.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.tools.diagnose.spectrum import Sound, band_limited, lag_of, with_length

CLEAR_DB = 60.0
BETTER_DB, LEAST_DB = 3.0, 6.0
SURE_DB = 55.0  # nothing else needs to be tried
UNTOUCHED_GAIN = 2e-3  # full scale is 32767 to some and 32768 to others
USUAL_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)
USED_BAND = 0.85  # of what a resampler lets through, where all resamplers are alike
SILENCE = 1e-4


@dataclass(frozen=True)
class Misfit:
    """Something that is wrong with the sound as a whole."""

    name: str
    how: str
    look_for: str


@dataclass(frozen=True, eq=False)
class Aligned:
    """Another's sound as it lies over ours, all misfits undone."""

    sound: Sound  # as long as ours
    lag: int  # by how many samples it is late
    samples: int  # that it has
    misfits: tuple[Misfit, ...]
    gain: float = 1.0  # that it had
    maybe_highest_hz: float | None = None  # above this nothing is compared

    @property
    def present(self) -> slice:
        """Where it has samples."""
        start = min(max(0, -self.lag), len(self.sound))
        return slice(start, min(max(start, self.samples - self.lag), len(self.sound)))

    def beside(self, sound: Sound, sample_rate: int) -> Sound:
        """One of our decodes, as it is to be compared."""
        if self.maybe_highest_hz is None:
            return sound[self.present]
        return band_limited(sound, sample_rate, self.maybe_highest_hz)[self.present]

    @property
    def heard(self) -> Sound:
        return self.sound[self.present]


def align(other: Sound, other_rate: int, ours: Sound, codec: CodecFormat, right_lengths: Sequence[int]) -> Aligned:
    """`right_lengths`: how many samples a whole decode may have."""
    best, best_db = _as_it_is(other, ours, other_rate, codec)
    as_it_is = best
    if best_db < SURE_DB:
        for way in _ways(other, other_rate, ours, codec):
            way_db = _mean_db(way, ours, codec)
            needed_db = max(best_db, LEAST_DB - BETTER_DB) + (BETTER_DB if best is as_it_is else 0.01)
            if way_db > needed_db:
                best, best_db = way, way_db
    return replace(best, misfits=(*best.misfits, *_of_length(best, codec, right_lengths)))


def frame_snr_db(other: Sound, ours: Sound, frame_samples: int) -> NDArray[np.float64]:
    """Of each frame; infinite where there is no difference, NaN where there is nothing to hear."""
    signal = _frame_energies(ours, frame_samples)
    noise = _frame_energies(other - ours, frame_samples)
    with np.errstate(divide="ignore", invalid="ignore"):
        snr: NDArray[np.float64] = 10 * np.log10(signal / noise)
    snr[signal < SILENCE**2 * frame_samples * ours.shape[1]] = np.nan
    return snr


def _frame_energies(sound: Sound, frame_samples: int) -> NDArray[np.float64]:
    squares = np.square(sound).sum(axis=1)
    return np.add.reduceat(squares, np.arange(0, len(squares), frame_samples)) if len(squares) else squares


def _as_it_is(other: Sound, ours: Sound, other_rate: int, codec: CodecFormat) -> tuple[Aligned, float]:
    misfits, matched = _with_channels(other, ours, codec)
    if other_rate != codec.sample_rate:
        misfits = (*misfits, _wrong_header(other_rate, codec))
    way = _laid(matched, ours, 0, misfits)
    return way, _mean_db(way, ours, codec)


def _ways(other: Sound, other_rate: int, ours: Sound, codec: CodecFormat) -> Iterator[Aligned]:
    channel_misfits, matched = _with_channels(other, ours, codec)
    for rate_misfits, at_rate, maybe_highest_hz in _rates(matched, other_rate, ours, codec):
        if maybe_highest_hz is None:
            reference = ours
        else:
            reference = band_limited(ours, codec.sample_rate, maybe_highest_hz)
            at_rate = band_limited(at_rate, codec.sample_rate, maybe_highest_hz)
        lags = dict.fromkeys((0, lag_of(at_rate, reference)))
        for lag, order in itertools.product(lags, itertools.permutations(range(ours.shape[1]))):
            misfits = (*channel_misfits, *rate_misfits, *_of_order(order))
            laid = _laid(at_rate[:, order], ours, lag, misfits)
            yield replace(laid, maybe_highest_hz=maybe_highest_hz)
            yield from _scaled(replace(laid, maybe_highest_hz=maybe_highest_hz), reference, codec)


def _rates(
    other: Sound, other_rate: int, ours: Sound, codec: CodecFormat
) -> Iterator[tuple[tuple[Misfit, ...], Sound, float | None]]:
    """As it is, at the rate that it is said to have, and at the rate that its length says."""
    yield ((_wrong_header(other_rate, codec),) if other_rate != codec.sample_rate else ()), other, None
    ratio = len(other) / max(1, len(ours))
    of_length = [rate for rate in USUAL_RATES if abs(ratio * codec.sample_rate / rate - 1) < 0.02]
    for rate in dict.fromkeys([other_rate, *of_length]):
        if rate == codec.sample_rate or not len(other):
            continue
        label = "" if rate == other_rate else f", though the file says {other_rate} Hz"
        misfit = Misfit(
            "resampled",
            f"{rate} samples a second instead of {codec.sample_rate}{label}",
            "the rate that the file is written with, or a resampler behind the decoder",
        )
        at_rate = with_length(other, round(len(other) * codec.sample_rate / rate))
        yield (misfit,), at_rate, USED_BAND * min(rate, codec.sample_rate) / 2


def _laid(sound: Sound, ours: Sound, lag: int, misfits: tuple[Misfit, ...]) -> Aligned:
    laid = Aligned(np.zeros_like(ours), lag, len(sound), misfits)
    present = laid.present
    laid.sound[present] = sound[present.start + lag : present.stop + lag]
    return laid


def _scaled(laid: Aligned, reference: Sound, codec: CodecFormat) -> Iterator[Aligned]:
    """With polarity and gain undone. The gain is that of half of the frames, or of the one that is most like ours."""
    signs = np.sign((laid.heard * reference[laid.present]).sum(axis=0))
    signs[signs == 0] = 1
    upright = replace(laid, sound=laid.sound * signs, misfits=(*laid.misfits, *_of_polarity(signs)))
    yield upright
    edges = np.arange(laid.present.start, laid.present.stop, codec.frame_samples)
    if not len(edges):
        return
    pairs = ((upright.sound, reference), (reference, reference), (upright.sound, upright.sound))
    sums = (np.add.reduceat((one * other).sum(axis=1)[: laid.present.stop], edges) for one, other in pairs)
    products, powers, other_powers = sums
    audible = (products > 0) & (powers > 0)
    if not audible.any():
        return
    gains = products[audible] / powers[audible]
    likeness = np.square(products[audible]) / (powers[audible] * other_powers[audible])
    for gain in (float(np.median(gains)), float(gains[likeness.argmax()])):
        if abs(gain - 1) > UNTOUCHED_GAIN:
            misfit = Misfit(
                "gain", f"{20 * np.log10(gain):+.2f} dB ({gain:.6g})", "what the samples are multiplied with at the end"
            )
            misfits = (*upright.misfits, misfit)
            yield replace(upright, sound=upright.sound / gain, misfits=misfits, gain=gain)


def _mean_db(way: Aligned, ours: Sound, codec: CodecFormat) -> float:
    """Of all frames; one that is not there has none."""
    reference = ours
    if way.maybe_highest_hz is not None:
        reference = band_limited(ours, codec.sample_rate, way.maybe_highest_hz)
    snr = frame_snr_db(way.sound, reference, codec.frame_samples)
    heard = snr[~np.isnan(snr)]
    return float(np.clip(heard, 0, CLEAR_DB).mean()) if len(heard) else CLEAR_DB


def _with_channels(other: Sound, ours: Sound, codec: CodecFormat) -> tuple[tuple[Misfit, ...], Sound]:
    found = other.shape[1]
    if found == codec.channels:
        return (), other
    misfit = Misfit(
        "channels", f"{found} instead of {codec.channels}", "how samples become channels; what mixes them at the end"
    )
    return (misfit,), np.repeat(other[:, :1], codec.channels, axis=1)


def _wrong_header(other_rate: int, codec: CodecFormat) -> Misfit:
    return Misfit(
        "sample rate in the header",
        f"{other_rate} Hz for samples of {codec.sample_rate} Hz",
        "the rate that the file is written with",
    )


def _of_order(order: tuple[int, ...]) -> tuple[Misfit, ...]:
    if list(order) == sorted(order):
        return ()
    return (Misfit("channel order", f"channels come as {list(order)}", "which channel is written first"),)


def _of_polarity(signs: NDArray[np.float64]) -> tuple[Misfit, ...]:
    if (signs > 0).all():
        return ()
    turned = [channel for channel, sign in enumerate(signs) if sign < 0]
    of = "all channels" if len(turned) == len(signs) else f"channel {turned}"
    return (Misfit("polarity", f"of {of} is reversed", "a minus sign in front of the samples"),)


def _of_length(way: Aligned, codec: CodecFormat, right_lengths: Sequence[int]) -> Iterator[Misfit]:
    def so_many(samples: int) -> str:
        return f"{samples} samples ({samples / codec.frame_samples:.2f} frames)"

    end = way.samples - way.lag  # on our time
    tolerance = 0 if way.maybe_highest_hz is None else codec.frame_samples // 2  # resamplers end as they like
    if way.lag > tolerance:
        yield Misfit("offset", f"{so_many(way.lag)} late", "silence or a latency in front that is not taken off")
    if way.lag < -tolerance:
        yield Misfit("missing head", so_many(-way.lag), "what is dropped at the start of a stream")
    if end < min(right_lengths) - tolerance:
        missing = so_many(min(right_lengths) - end)
        yield Misfit("missing tail", missing, "the last chunk, and whether what is left is flushed at the end")
    if end > max(right_lengths) + tolerance:
        longer = so_many(end - max(right_lengths))
        yield Misfit("too long", longer, "padding of the last chunk that is not taken off")
