"""Measures what this machine can do at the most; graphs are compared with these limits.

Rules of this room:

- A limit is the best of many runs, as nothing may be faster than it.
- numpy runs in a process of its own, as its matrix library reads the number of threads when it is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

GEMM_SIZE: Final = 1024
STREAMED_BYTES: Final = 1 << 28  # more than caches hold

_BEST_OF: Final = """
import time
import numpy as np
def best_of(times, work):
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
"""
_MULTIPLY: Final = """
a = np.random.default_rng(0).random(({size}, {size}), np.float32)
print(best_of(30, lambda: a @ a))
"""
_READ: Final = """
from concurrent.futures import ThreadPoolExecutor
parts = np.ones(({threads}, {count} // {threads}), np.float32)
pool = ThreadPoolExecutor({threads})
print(best_of(10, lambda: list(pool.map(np.sum, parts))))
"""


def gemm_gflops(threads: int) -> float:
    """The speed of matrix products, in GFLOP/s."""
    return 2 * GEMM_SIZE**3 / _printed_seconds(_MULTIPLY.format(size=GEMM_SIZE), threads) / 1e9


def stream_gb_per_second(threads: int) -> float:
    """The speed of reading memory from one end to the other."""
    code = _READ.format(threads=threads, count=STREAMED_BYTES // 4)
    return STREAMED_BYTES / _printed_seconds(code, threads) / 1e9


def _printed_seconds(code: str, threads: int) -> float:
    libraries = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command = [sys.executable, "-c", _BEST_OF + code]
    environment = {**os.environ, **libraries}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, start_new_session=True)
    return float(done.stdout)
