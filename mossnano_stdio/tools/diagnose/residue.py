"""Faults that are made behind a decoder, where samples are finite, whole and in their places; found in the sound alone.

Most are a change to our own decode, as a hypothesis about the network is. What is left by rounding to 16 bits is no
sound that could be predicted: it is told by what it is like.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mossnano_stdio.pcm import FULL_SCALE
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.tools.diagnose.align import USUAL_RATES, Misfit
from mossnano_stdio.tools.diagnose.spectrum import BAND_HZ, Sound, best_filter

INT16_STEPS = 1 << 15
LEAST_CLIPPED = 4  # samples
CHUNK_FRAMES = (1, 2, 4, 8)
USED_BAND = 0.97  # what reaches higher was not cut off
HEARD_STEPS = 2.0  # what is larger is not rounded to zero

# Of samples rounded to the nearest step the error has an RMS of 0.289 steps, none of its own on average; with the usual
# dither (triangular, two steps wide) 0.5 steps; cut off instead of rounded, 0.577 steps, half a step to one side.
DITHERED_RMS = (0.38, 0.75)
ONE_SIDED_STEPS = 0.35


class Changed(NamedTuple):
    """What somebody may have done to the right samples, and what they would be then."""

    misfit: Misfit
    sound: Sound


def changes(ours: Sound, other: Sound, codec: CodecFormat) -> Iterator[Changed]:
    """Both [samples, channels], as they lie over each other."""
    yield from _clipped(ours, other)
    yield from _zeroed(ours, other)
    yield from _interleaved(ours, codec)
    yield from _mixed(ours)
    yield from _filtered(ours, other, codec)


def maybe_rounded_wrongly(ours: Sound, other: Sound) -> Misfit | None:
    """How the last bit of 16 was made, where everything else is right; None: by rounding, or there are more bits."""
    steps = other * FULL_SCALE
    if not len(steps) or np.abs(steps - np.rint(steps)).max() > 1e-2:
        return None
    error, sign = steps - ours * FULL_SCALE, np.sign(ours)
    is_loud = np.abs(ours) * FULL_SCALE > HEARD_STEPS
    if not is_loud.any():
        return None
    down, inwards = error[is_loud].mean(), (error * sign)[is_loud].mean()
    if abs(down) > ONE_SIDED_STEPS or abs(inwards) > ONE_SIDED_STEPS:
        way = "towards zero" if abs(inwards) > abs(down) else "downwards"
        return Misfit(
            "truncated to 16 bits", f"instead of rounded: {way}", "a cast to int16 without a rounding before it"
        )
    rms = float(np.sqrt(np.square(error).mean()))
    if DITHERED_RMS[0] < rms < DITHERED_RMS[1]:
        how = f"noise of {rms:.2f} steps, where rounding leaves 0.29"
        return Misfit("dithered", how, "dither in what writes the file; the decoder is right")
    return None


def _filtered(ours: Sound, other: Sound, codec: CodecFormat) -> Iterator[Changed]:
    gains, filtered = best_filter(ours, other, codec.sample_rate)
    passed = np.flatnonzero(gains > 0.5)
    if not len(passed):
        return
    highest_hz = int((passed[-1] + 1) * BAND_HZ)
    if highest_hz < USED_BAND * codec.sample_rate / 2:
        rate = min(rate for rate in USUAL_RATES if rate >= 2 * highest_hz)  # no resampler passes all up to its half
        how = f"and back again: nothing is left above {highest_hz} Hz, as where {rate} Hz lie on the way"
        yield Changed(Misfit("resampled", how, "resamplers on the way, and the rate between them"), filtered)
    else:
        quietest, loudest = 20 * np.log10(np.maximum([gains.min(), gains.max()], 1e-5))
        how = f"gains from {quietest:.1f} to {loudest:.1f} dB"
        yield Changed(Misfit("filtered", how, "an equaliser or a resampler behind the decoder"), filtered)


def _clipped(ours: Sound, other: Sound) -> Iterator[Changed]:
    highest, lowest = other.max(initial=0.0), other.min(initial=0.0)
    half_a_step = 0.5 / FULL_SCALE
    count = int((other >= highest - half_a_step).sum() + (other <= lowest + half_a_step).sum())
    if count >= LEAST_CLIPPED:
        misfit = Misfit(
            "clipped", f"at {lowest:+.4f} and {highest:+.4f}", "a gain before the samples are limited, and their scale"
        )
        yield Changed(misfit, np.clip(ours, lowest, highest))
    if np.abs(ours).max(initial=0.0) > 1:
        whole = np.rint(ours * FULL_SCALE).astype(np.int64)
        wrapped = (whole + INT16_STEPS) % (2 * INT16_STEPS) - INT16_STEPS
        misfit = Misfit(
            "wrapped around", "samples above full scale come out negative", "a cast to int16 without a clip before it"
        )
        yield Changed(misfit, wrapped / FULL_SCALE)


def _zeroed(ours: Sound, other: Sound) -> Iterator[Changed]:
    is_zeroed = (other == 0) & (np.abs(ours) * FULL_SCALE > HEARD_STEPS)
    if is_zeroed.any():
        misfit = Misfit(
            "NaN to 0",
            f"{int(is_zeroed.sum())} samples are exactly 0 where there is sound",
            "where NaN or infinity is replaced by 0; which chunk first holds it; chunks that were dropped",
        )
        yield Changed(misfit, np.where(is_zeroed, 0.0, ours))


def _interleaved(ours: Sound, codec: CodecFormat) -> Iterator[Changed]:
    samples, channels = ours.shape
    if channels == 1:
        return
    for frames in (*CHUNK_FRAMES, 0):
        chunk = frames * codec.frame_samples or samples
        whole = samples // chunk * chunk
        planar, mixed = ours.copy(), ours.copy()
        # [chunks, samples, channels] taken for [chunks, channels, samples], and the other way round
        planar[:whole] = ours[:whole].reshape(-1, chunk, channels).transpose(0, 2, 1).reshape(-1, channels)
        mixed[:whole] = ours[:whole].reshape(-1, channels, chunk).transpose(0, 2, 1).reshape(-1, channels)
        of = f"of chunks of {frames} frames" if frames else "of the whole"
        look_for = "the shape in which audio leaves the model, [channels, samples], and what reads it as another"
        yield Changed(Misfit("channels interleaved wrongly", f"{of}: planar read as interleaved", look_for), planar)
        yield Changed(Misfit("channels interleaved wrongly", f"{of}: interleaved read as planar", look_for), mixed)


def _mixed(ours: Sound) -> Iterator[Changed]:
    channels = ours.shape[1]
    if channels == 1:
        return
    look_for = "what makes mono of the channels"
    mean = np.repeat(ours.mean(axis=1, keepdims=True), channels, axis=1)
    yield Changed(Misfit("mono", "the mean of all channels", look_for), mean)
    for channel in range(channels):
        only = np.repeat(ours[:, channel : channel + 1], channels, axis=1)
        yield Changed(Misfit("mono", f"channel {channel} alone", look_for), only)
