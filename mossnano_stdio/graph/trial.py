"""Graphs of ours, tried against the official graphs that they replace, before they are kept.

Rules of this room:

- Seeded codes of 15 s, long enough to fill every context of the published model: what is built must give the
  sound of the bundle's own decode_step within MAX_ERROR, in chunks of mixed sizes. A code of random numbers uses
  every codebook; real speech would not find more.
- A departure is an error that says at which frame it begins and how large it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.bundle import Bundle
from mossnano_stdio.codec import StreamDecoder, load_decoder
from mossnano_stdio.errors import CheckFailedError
from mossnano_stdio.layout import CodecFormat, Codes

SECONDS = 15
MAX_ERROR = 1e-4  # three 16-bit steps: a wrong weight is louder by far, rounding far softer
CHUNK_FRAMES = (1, 2, 4, 8)  # in turn; the official graph takes the largest throughout, which is quickest
SEED = 0


def try_decoder(source: Bundle, built: Bundle) -> None:
    """Hold the fast graph of `built` against the decode_step of `source`."""
    codes = _codes(source.format)
    expected = _decoded(load_decoder(source, graph="official"), codes, CHUNK_FRAMES[-1:])
    found = _decoded(load_decoder(built, graph="fast"), codes, CHUNK_FRAMES)
    errors = np.abs(found - expected).reshape(len(codes), -1).max(axis=1)
    worse = np.flatnonzero(~(errors <= MAX_ERROR))  # NaN is worse too
    if worse.size:
        raise CheckFailedError(
            f"the fast graph departs from {source.graph('decode_step').path} at frame {worse[0]} by "
            f"{errors[worse[0]]:.2g} (by {errors.max():.2g} at most in {len(codes)} frames; allowed is {MAX_ERROR:g}), "
            f"so it is not kept"
        )


def _codes(codec: CodecFormat) -> Codes:
    frames = round(SECONDS * codec.frames_per_second)
    shape = (frames, codec.quantizers)
    return np.random.default_rng(SEED).integers(0, codec.codebook_size, shape, dtype=np.uint16)


def _decoded(decoder: StreamDecoder, codes: Codes, chunk_frames: Sequence[int]) -> NDArray[np.float32]:
    pieces: list[NDArray[np.float32]] = []
    start = 0
    while start < len(codes):
        frames = chunk_frames[len(pieces) % len(chunk_frames)]
        pieces.append(decoder.step(codes[start : start + frames]))
        start += frames
    return np.concatenate(pieces)
