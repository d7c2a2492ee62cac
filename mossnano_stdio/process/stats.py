"""What the process has done so far, in numbers that take no more memory after a year than after a second.

Rules of this room:

- Durations go into buckets two per cent wide, so a percentile is right to one per cent, and nothing is kept per chunk.
- Only the latest streams have numbers of their own.
- `snapshot` is a plain dict of JSON values with units in its names. It may be taken at any time.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mossnano_stdio.protocol.stream import Stream

_BUCKET_RATIO: Final = math.log(1.02)
LATEST_STREAMS: Final = 32  # that are told of one by one
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
    """How many frames were computed, in which chunks, and how long their steps took."""

    def __init__(self, frames_per_second: float) -> None:
        self._frames_per_second = frames_per_second
        self.frames = 0
        self.seconds = 0.0
        self.durations = Durations()
        self._chunks: Counter[int] = Counter()  # by their frames

    def add(self, frames: int, seconds: float) -> None:
        self.frames += frames
        self.seconds += seconds
        self.durations.add(seconds)
        self._chunks[frames] += 1

    def snapshot(self) -> dict[str, Any]:
        audio_seconds = self.frames / self._frames_per_second
        return {
            "frames": self.frames,
            "seconds": round(audio_seconds, 3),
            "real_time_factor": round(audio_seconds / self.seconds, 2) if self.seconds else None,
            "step_p50_ms": self.durations.percentile_ms(50),
            "step_p95_ms": self.durations.percentile_ms(95),
            "chunks": dict(sorted(self._chunks.items())),
        }


class SoundTimes:
    """How a stream's sound left, or that of all streams: how late, and with how much in its listener's hands."""

    def __init__(self) -> None:
        self._lateness = Durations()
        self._held = Durations()

    def add(self, late_seconds: float, held_seconds: float) -> None:
        self._lateness.add(late_seconds)
        self._held.add(held_seconds)

    def snapshot(self) -> dict[str, Any]:
        return {
            "lateness_p50_ms": self._lateness.percentile_ms(50),
            "lateness_p99_ms": self._lateness.percentile_ms(99),
            "held_p50_ms": self._held.percentile_ms(50),
        }


class StreamTimes:
    """The same for each of the latest streams, and for all together."""

    def __init__(self) -> None:
        self._all = SoundTimes()
        self._latest: dict[tuple[bool, int], tuple[SoundTimes, Mapping[int, int]]] = {}

    def add(self, stream: Stream, seconds: float) -> None:
        """Sound of this stream, which is counted already, leaves at `seconds` of the clock."""
        key = (stream.lane.maybe_number is not None, stream.number)
        times, _ = self._latest.setdefault(key, (SoundTimes(), stream.chunk_counts))
        for each in (self._all, times):
            each.add(stream.late_seconds(seconds), stream.held_seconds(seconds))
        if len(self._latest) > LATEST_STREAMS:
            del self._latest[next(iter(self._latest))]

    def snapshot(self) -> dict[str, Any]:
        return {
            **self._all.snapshot(),
            "latest_streams": [
                {
                    "stream": number,
                    "is_numbered": is_numbered,
                    **times.snapshot(),
                    "chunks": dict(sorted(chunks.items())),
                }
                for (is_numbered, number), (times, chunks) in self._latest.items()
            ],
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
