"""How many frames the next chunk takes.

Rules of this room:

- A schedule knows counts, not frames: it is told how many wait and whether more may come, and answers how many to
  take now. 0 means: wait for more. It never asks for more than wait, and with `final` it never leaves any behind.
- A schedule's position in its stream is its only state. Only `advance` moves it, once a chunk was taken, and only
  `reset` takes it back to the start: asking changes nothing.
- Seconds become whole frames half up, and as they are written: 2.28 s at 12.5 frames/s is 28.5 frames, so 29,
  although the nearest binary fractions make it a little less.
"""

from __future__ import annotations

import copy
import math
from typing import Protocol

from mossnano_stdio.errors import UsageError

MAX_CHUNK_FRAMES = 1000  # what anybody may ask for: 80 s of nano
RAMP_MAX_FRAMES = 8  # larger chunks cost more per frame, and nobody hears that they came at once


def frames_for_seconds(seconds: float, frames_per_second: float) -> int:
    """The nearest whole number of frames, half up, at least 1.

    >>> [frames_for_seconds(seconds, 12.5) for seconds in (0.01, 1.333, 1.8, 2.28)]
    [1, 17, 23, 29]
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"a chunk of {seconds} seconds, allowed is any length above 0")
    from decimal import ROUND_HALF_UP, Decimal  # here, as few starts need it

    frames = Decimal(repr(float(seconds))) * Decimal(repr(float(frames_per_second)))
    return max(1, int(frames.to_integral_value(ROUND_HALF_UP)))


class Schedule(Protocol):
    @property
    def wanted_frames(self) -> int:
        """How large the next chunk would like to be. More waiting frames than that change nothing."""

    @property
    def max_frames(self) -> int:
        """How large a chunk can be at most."""

    @property
    def maybe_chunk_frames(self) -> int | None:
        """The fixed size, where there is one."""

    def next_frames(self, waiting: int, final: bool) -> int:
        """How many of the `waiting` frames the next chunk takes; 0 = wait for more. `final`: no more will come."""

    def advance(self) -> None:
        """The chunk that was asked for was taken."""

    def reset(self) -> None:
        """Back to the start of a stream."""


class Ramp:
    """Small chunks first, for audio at once, then larger ones, for less work per frame: 1, 2, 4, 8, 8, ...

    It never waits: what is there is taken, at most as much as its next step allows.

    >>> plan(20, Ramp())
    [(0, 1), (1, 2), (3, 4), (7, 8), (15, 5)]
    """

    maybe_chunk_frames = None

    def __init__(self, max_frames: int = RAMP_MAX_FRAMES) -> None:
        self.max_frames = _checked_chunk_frames(max_frames)
        self.wanted_frames = 1

    def next_frames(self, waiting: int, final: bool) -> int:
        return min(waiting, self.wanted_frames)

    def advance(self) -> None:
        self.wanted_frames = min(2 * self.wanted_frames, self.max_frames)

    def reset(self) -> None:
        self.wanted_frames = 1


class Fixed:
    """Chunks of one size; only the last may be smaller.

    >>> plan(20, Fixed(8))
    [(0, 8), (8, 8), (16, 4)]
    """

    def __init__(self, chunk_frames: int) -> None:
        self.maybe_chunk_frames = self.max_frames = self.wanted_frames = _checked_chunk_frames(chunk_frames)

    def next_frames(self, waiting: int, final: bool) -> int:
        if waiting < self.wanted_frames and not final:
            return 0
        return min(waiting, self.wanted_frames)

    def advance(self) -> None:
        """Every chunk is like the first."""

    def reset(self) -> None:
        """Every stream is like the first."""


def plan(frames: int, schedule: Schedule) -> list[tuple[int, int]]:
    """The chunks, (start_frame, frames), of a stream that is there as a whole. `schedule` stays where it is."""
    schedule = copy.copy(schedule)
    schedule.reset()
    chunks = []
    start_frame = 0
    while start_frame < frames:
        chunk_frames = schedule.next_frames(frames - start_frame, final=True)
        chunks.append((start_frame, chunk_frames))
        start_frame += chunk_frames
        schedule.advance()
    return chunks


def _checked_chunk_frames(frames: int) -> int:
    if frames < 1:
        raise UsageError(f"a chunk of {frames} frames, allowed is 1 or more")
    return frames
