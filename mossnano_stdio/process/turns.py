"""Which streams compute next, and how many frames: earliest deadline first.

Rules of this room:

- The stream whose listener has the least left to hear goes first; one that has sent nothing yet goes before all others,
  with the fewest frames that it can begin with. Urgency decides only among those that hold less than URGENT_SECONDS.
- A chunk is cut so that no other due stream runs dry while it is computed; but not to a size at which all that are due
  could not go on in real time, and a ramp passes over such a size: more streams make chunks grow, as a frame of a
  larger one costs less. Where more waits than one chunk takes, it leaves all others time for a chunk of their own, too,
  one after the other. Where tokens come as they are spoken, that would only make small chunks, and all of them late.
- A chunk that its credit cuts short waits for more of it, as a whole one costs less a frame, but no longer than until
  its listener has only URGENT_SECONDS left. One that does not play yet may need just that chunk.
- A chunk costs what such chunks took lately. No clock is read here: who asks says when it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from mossnano_stdio.protocol.connection import Turn
from mossnano_stdio.protocol.stream import Lane, Stream, smaller_chunks

URGENT_SECONDS: Final = 0.5
STALE_SECONDS: Final = 0.02  # how old a CREDIT may be, as sound cards ask 50 times a second
LATELY: Final = 0.2  # how much the newest cost counts


class Turns:
    """`at_once` is how many streams are computed side by side. A lone one keeps all threads of its session."""

    def __init__(self, frame_seconds: float, at_once: int = 1) -> None:
        self._frame_seconds = frame_seconds
        self._at_once = at_once
        self._costs: dict[int, float] = {}  # seconds, by frames

    def note_cost(self, frames: int, seconds: float) -> None:
        known = self._costs.get(frames, seconds)
        self._costs[frames] = known + LATELY * (seconds - known)

    def cost_seconds(self, frames: int) -> float:
        """Of a chunk; where there was none so long, that of the nearest, in proportion."""
        if not self._costs:
            return 0.0
        nearest = min(self._costs, key=lambda known: abs(math.log(known / frames)))
        return self._costs[nearest] * frames / nearest

    def next(self, due: Sequence[Lane], seconds: float) -> list[Turn]:
        """The lanes that are next, at `seconds` of the clock."""
        streams = {
            lane: lane.stream for lane in due if lane.stream is not None and _waits_until(lane.stream) <= seconds
        }
        order = sorted(streams, key=lambda lane: _precedence(streams[lane], seconds))
        chosen = order[: self._at_once]
        others_hold = sorted(streams[lane].held_seconds(seconds) for lane in order[self._at_once :])
        return [Turn(lane, self._frames(streams[lane], others_hold)) for lane in chosen]

    def wakes_at(self, due: Sequence[Lane]) -> float:
        """When the first of the lanes that wait for more credit stops to do so, if none comes."""
        return min((_waits_until(lane.stream) for lane in due if lane.stream is not None), default=math.inf)

    def _frames(self, stream: Stream, others_hold: Sequence[float]) -> int:
        frames = stream.allowed_frames
        if not others_hold or stream.chunks.schedule.maybe_chunk_frames is not None:
            return frames
        if stream.heard_until_seconds is None:
            return min(frames, stream.chunks.least_frames)
        all_due = (self._at_once + len(others_hold)) / self._at_once

        def falls_behind(chunk_frames: int) -> bool:
            return all_due * self.cost_seconds(chunk_frames) > chunk_frames * self._frame_seconds

        if falls_behind(frames):
            stream.chunks.schedule.advance()  # a ramp goes on to the next size; one that is at its end stays there
            frames = stream.allowed_frames
        smaller = takewhile(lambda fewer: not falls_behind(fewer), smaller_chunks(frames, stream.chunks.least_frames))
        sizes = [frames, *smaller]
        spare_seconds = others_hold[0]
        if stream.chunks.is_sated:
            turn_seconds = self.cost_seconds(sizes[-1])  # of each of the others, if all hurry
            spare_seconds = -STALE_SECONDS + min(
                held - (1 + index // self._at_once) * turn_seconds for index, held in enumerate(others_hold)
            )
        return next((size for size in sizes if self.cost_seconds(size) <= spare_seconds), sizes[-1])


def _waits_until(stream: Stream) -> float:
    is_cut = stream.allowed_frames < stream.chunks.due_frames
    if stream.heard_until_seconds is None or not is_cut or not stream.is_played:
        return -math.inf
    return stream.heard_until_seconds - URGENT_SECONDS


def _precedence(stream: Stream, seconds: float) -> tuple[float, ...]:
    if stream.heard_until_seconds is None:
        return (0, stream.settings.urgency, stream.due_seconds or 0.0)
    held = stream.held_seconds(seconds)
    if held < URGENT_SECONDS:
        return (1, stream.settings.urgency, held, stream.heard_until_seconds)  # of two that are dry, the one longer so
    return (2, 0, held, stream.heard_until_seconds)
