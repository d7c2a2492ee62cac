"""What the process has done so far, in numbers that take no more memory after a year than after a second.

Rules of this room:

- Durations go into buckets two per cent wide, so a percentile is right to one per cent, and nothing is kept per chunk.
- `snapshot` is a plain dict of JSON values with units in its names. It may be taken at any time.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

_BUCKET_RATIO: Final = math.log(1.02)
_STATUS_FILE: Final = Path("/proc/self/status")


class Durations:
    """Many durations, kept as a histogram.

    >>> durations = Durations()
    >>> for milliseconds in range(1, 101):
    ...     durations.add(milliseconds / 1000)
    >>> round(durations.percentile_ms(50)), round(durations.percentile_ms(95))
    (50, 95)
    """

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._count = 0

    def add(self, seconds: float) -> None:
        self._buckets[round(math.log(max(seconds, 1e-9)) / _BUCKET_RATIO)] += 1
        self._count += 1

    def percentile_ms(self, percent: float) -> float | None:
        """The duration that `percent` of all do not exceed; None where there are none."""
        rank = self._count * percent / 100
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return round(1000 * math.exp(bucket * _BUCKET_RATIO), 3)
        return None


class StepTimes:
    """How many frames were computed, and how long their steps took."""

    def __init__(self, frames_per_second: float) -> None:
        self._frames_per_second = frames_per_second
        self.frames = 0
        self.seconds = 0.0
        self.durations = Durations()

    def add(self, frames: int, seconds: float) -> None:
        self.frames += frames
        self.seconds += seconds
        self.durations.add(seconds)

    def snapshot(self) -> dict[str, Any]:
        audio_seconds = self.frames / self._frames_per_second
        return {
            "frames": self.frames,
            "seconds": round(audio_seconds, 3),
            "real_time_factor": round(audio_seconds / self.seconds, 2) if self.seconds else None,
            "step_p50_ms": self.durations.percentile_ms(50),
            "step_p95_ms": self.durations.percentile_ms(95),
        }


def peak_resident_bytes() -> int | None:
    """The most memory this process has had resident; None where the system does not tell.

    Linux is asked through /proc: what getrusage answers there counts the parent's memory before exec too.
    """
    if sys.platform == "win32":
        from mossnano_stdio.process.windows import resident_bytes

        return resident_bytes(peak=True)
    if _STATUS_FILE.exists():
        for line in _STATUS_FILE.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
