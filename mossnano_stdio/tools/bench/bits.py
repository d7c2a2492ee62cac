"""Packing codes and unpacking them: an hour of nano's tokens, in this process."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from mossnano_stdio.tokens import pack_frames, unpack_frames


def bits_figures(turns: int = 9) -> dict[str, float]:
    """Milliseconds, the median of many turns."""
    codes = np.random.default_rng(0).integers(0, 1024, (45_000, 16)).astype(np.uint16)
    packed = pack_frames(codes, 1024)
    pack_ms, unpack_ms = [], []
    for _ in range(turns):
        began = time.perf_counter()
        pack_frames(codes, 1024)
        packed_at = time.perf_counter()
        unpack_frames(packed, 16, 1024)
        pack_ms.append(1000 * (packed_at - began))
        unpack_ms.append(1000 * (time.perf_counter() - packed_at))
    return {"frames": 45_000, "pack_ms": round(median(pack_ms), 2), "unpack_ms": round(median(unpack_ms), 2)}
