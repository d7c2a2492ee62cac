"""The ring: bounded PCM that one thread writes and another reads, without a lock.

Rules of this room:

- Both counters only grow. Each is written by one thread, which moves it after its copy is done, so the samples between
  the two are valid for either thread at any instant.
- Only the constructor and `grow` allocate, and `grow` is called before anybody reads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int16]  # [samples, channels]


class PcmRing:
    """`write` takes the samples that fit, `read_into` gives those that are there; both return how many that were.

    >>> ring = PcmRing(capacity_samples=3, channels=1)
    >>> ring.write(np.array([[1], [2], [3], [4]], np.int16)), ring.filled
    (3, 3)
    >>> out = np.zeros((2, 1), np.int16)
    >>> ring.read_into(out), out.tolist(), ring.filled
    (2, [[1], [2]], 1)
    """

    def __init__(self, capacity_samples: int, channels: int) -> None:
        self._pcm: Samples = np.zeros((capacity_samples, channels), np.int16)
        self.written = 0
        self.read = 0

    @property
    def capacity(self) -> int:
        return len(self._pcm)

    @property
    def filled(self) -> int:
        return self.written - self.read

    @property
    def free(self) -> int:
        return len(self._pcm) - self.filled

    def write(self, samples: Samples) -> int:
        """Take as many samples as there is room for. Only the writing thread calls this."""
        count = min(len(samples), self.free)
        start = self.written % len(self._pcm)
        until_wrap = min(count, len(self._pcm) - start)
        self._pcm[start : start + until_wrap] = samples[:until_wrap]
        self._pcm[: count - until_wrap] = samples[until_wrap:count]
        self.written += count
        return count

    def read_into(self, out: Samples) -> int:
        """Move as many samples into `out` as there are. Only the reading thread calls this."""
        count = min(len(out), self.filled)
        start = self.read % len(self._pcm)
        until_wrap = min(count, len(self._pcm) - start)
        out[:until_wrap] = self._pcm[start : start + until_wrap]
        out[until_wrap:count] = self._pcm[: count - until_wrap]
        self.read += count
        return count

    def grow(self, capacity_samples: int) -> None:
        """Make room for more. Call it only while nobody reads."""
        kept = np.empty((self.filled, self._pcm.shape[1]), np.int16)
        written = self.written
        self.read_into(kept)
        self._pcm = np.zeros((capacity_samples, kept.shape[1]), np.int16)
        self.written = self.read = written - len(kept)
        self.write(kept)
