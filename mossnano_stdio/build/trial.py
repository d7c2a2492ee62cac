"""Runs our own graphs beside the official ones, before they are kept.

Rules of this room:

- Decoding: seeded random codes of 15 s, which is longer than every context of the published model, in chunks of mixed
  sizes. The audio must be that of the bundle's own decode_step within MAX_ERROR.
- Where a codec has no official graphs, the reference is its whole-file graph, over codes that go past the longest
  context.
- Encoding: 5 s of seeded noise and tones. The codes must be those of the bundle's own encode, except in one frame of
  MIN_FRAMES_PER_TIE.
- The error for a departure says at which frame it begins and how large it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs import (
    SeekingDecoder,
    load_decoder,
    load_encoder_runtime,
    load_full_decoder,
    load_full_encoder,
    load_runtime,
)
from mossnano_stdio.errors import CheckFailedError
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.weights import Bundle, Graph

DECODED_SECONDS = 15
FRAMES_PAST_CONTEXT = 12
ENCODED_SECONDS = 5  # the whole-file graph needs memory with the square of the length
MAX_ERROR = 1e-4  # three 16-bit steps: a wrong weight is louder by far, rounding far softer
CHUNK_FRAMES = (1, 2, 4, 8)  # in turn; the official graph takes the largest throughout, which is quickest
# Two rows can be equally near within float rounding. A code chosen the other way changes the codes after it in its
# frame, and nothing else.
MIN_FRAMES_PER_TIE = 50
LEVEL = 0.1  # RMS of what is encoded
PITCHES = (0.002, 0.005, 0.011, 0.023, 0.047)  # of its tones, in cycles per sample
SEED = 0

Audio = NDArray[np.float32]


def try_decoder(source: Bundle, built: Bundle) -> None:
    """Compare the fast graph of `built` with the decode_step of `source`."""
    codec = source.format
    shape = (round(DECODED_SECONDS * codec.frames_per_second), codec.quantizers)
    codes = np.random.default_rng(SEED).integers(0, codec.codebook_size, shape, dtype=np.uint16)
    expected = _decoded(load_decoder(source, graph="official"), codes, CHUNK_FRAMES[-1:])
    found = _decoded(load_decoder(built, graph="fast"), codes, CHUNK_FRAMES)
    _compare(found, expected, len(codes), "the fast graph", source.graph("decode_step"))


def try_against_whole(built: Bundle) -> None:
    """Compare the steps of `built` with what its whole-file graph makes of the same codes."""
    runtime = load_runtime(built)
    frames = max(runtime.layer_context_frames) + FRAMES_PAST_CONTEXT
    shape = (frames, built.format.quantizers)
    codes = np.random.default_rng(SEED).integers(0, built.format.codebook_size, shape, dtype=np.uint16)
    expected = load_full_decoder(built).decode(codes)
    _compare(
        _decoded(runtime.new_decoder(), codes, CHUNK_FRAMES), expected, frames, "stepping", built.graph("decode_full")
    )


def _compare(found: Audio, expected: Audio, frames: int, what: str, reference: Graph) -> None:
    errors = np.abs(found - expected).reshape(frames, -1).max(axis=1)
    worse = np.flatnonzero(~(errors <= MAX_ERROR))  # NaN is worse too
    if worse.size:
        raise CheckFailedError(
            f"{what} departs from {reference.path} at frame {worse[0]} by "
            f"{errors[worse[0]]:.2g} (by {errors.max():.2g} at most in {frames} frames; allowed is {MAX_ERROR:g}), "
            f"so it is not kept"
        )


def try_encoder(source: Bundle, built: Bundle) -> None:
    """Compare the streaming encoder of `built` with the whole-file encode of `source`."""
    audio = _recording(source.format)
    expected = load_full_encoder(source).encode(audio)
    found = load_encoder_runtime(built).new_encoder().step(audio)
    other = np.flatnonzero((found != expected).any(axis=1))
    if other.size * MIN_FRAMES_PER_TIE > len(expected):
        raise CheckFailedError(
            f"the streaming encoder departs from {source.graph('encode').path} at frame {other[0]} "
            f"(in {other.size} of {len(expected)} frames; allowed is one in {MIN_FRAMES_PER_TIE}), so it is not kept"
        )


def _recording(codec: CodecFormat) -> NDArray[np.float32]:
    """Noise under a chord that moves from one side to the other, [samples, channels]."""
    samples = round(ENCODED_SECONDS * codec.frames_per_second) * codec.frame_samples
    times = np.arange(samples)
    tones = sum(np.sin(2 * np.pi * pitch * times) for pitch in PITCHES)
    sides = np.linspace(0, 1, samples)[:, np.newaxis] - np.arange(codec.channels)
    noise = np.random.default_rng(SEED).standard_normal((samples, codec.channels))
    audio = tones[:, np.newaxis] * np.abs(sides) + noise
    levelled: NDArray[np.float32] = (audio * (LEVEL / audio.std())).astype(np.float32)
    return levelled


def _decoded(decoder: SeekingDecoder, codes: Codes, chunk_frames: Sequence[int]) -> NDArray[np.float32]:
    pieces: list[NDArray[np.float32]] = []
    start = 0
    while start < len(codes):
        frames = chunk_frames[len(pieces) % len(chunk_frames)]
        pieces.append(decoder.step(codes[start : start + frames]))
        start += frames
    return np.concatenate(pieces)
