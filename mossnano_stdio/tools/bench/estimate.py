"""Estimates how long a benchmark of graphs takes, by running it with workers that only add up times.

Rules of this room:

- The estimate and the benchmark run the same GraphBench, which cannot tell the workers apart.
- A step's time comes from a short trial of each side, so the total is said with "about".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from mossnano_stdio.tools.bench.sides import START_PARTS, Side, StartWorker

TRIAL_FRAMES: Final = 8  # of a trial, in steps of one frame and in one step
FILL_CHUNK: Final = 8  # what worker.py fills caches with


@dataclass(frozen=True)
class Pace:
    """How fast a side is."""

    start_seconds: float
    load_seconds: float  # of one more session
    lone_step_seconds: float
    trial_step_seconds: float  # of TRIAL_FRAMES

    def step_seconds(self, frames: int) -> float:
        """Interpolate between the two steps that were tried, or extrapolate from them."""
        per_frame = (self.trial_step_seconds - self.lone_step_seconds) / (TRIAL_FRAMES - 1)
        return self.lone_step_seconds + max(0.0, per_frame) * (frames - 1)


def try_pace(side: Side, threads: int, start: StartWorker) -> Pace:
    """Time a start, and two short utterances for each size of step, of which the first warms up."""
    began = time.perf_counter()
    with start(side, threads) as worker:
        started = time.perf_counter()
        seconds = {}
        for chunk_frames in (1, TRIAL_FRAMES):
            for _ in range(2):
                seconds[chunk_frames] = worker.ask("utterance", frames=TRIAL_FRAMES, chunk_frames=chunk_frames) / 1000
        return Pace(
            start_seconds=started - began,
            load_seconds=worker.facts["load_ms"] / 1000,
            lone_step_seconds=seconds[1] / TRIAL_FRAMES,
            trial_step_seconds=seconds[TRIAL_FRAMES],
        )


class Estimate:
    """Stands in for the worker processes and the report, and adds up their seconds and parts."""

    def __init__(self, paces: Mapping[tuple[str, int], Pace], frames_to_fill: int) -> None:
        self._paces = paces  # by a side's name and threads
        self._frames_to_fill = frames_to_fill
        self.seconds = 0.0
        self.parts = 0

    def report(self, what: str) -> None:
        self.parts += 1

    def add(self, seconds: float) -> None:
        self.seconds += seconds

    @contextmanager
    def start(self, side: Side, threads: int) -> Iterator[_ReckoningWorker]:
        pace = self._paces[side.name, threads]
        self.add(pace.start_seconds)
        yield _ReckoningWorker(self, pace, self._frames_to_fill, has_session_each=side.kind == "loop")


class _ReckoningWorker:
    """Adds up the time that worker.py would take; the figures it answers mean nothing."""

    def __init__(self, estimate: Estimate, pace: Pace, frames_to_fill: int, *, has_session_each: bool) -> None:
        self.facts: Mapping[str, float] = dict.fromkeys(START_PARTS, 1.0)
        self._add = estimate.add
        self._pace = pace
        self._fill_steps = -(-frames_to_fill // FILL_CHUNK)
        self._has_session_each = has_session_each
        self._open = 1
        self._filled: set[int] = set()

    def ask(self, what: str, **details: int) -> Any:
        match what:
            case "steps":
                self._fill(1)
                self._step(details["chunk_frames"], details["steps"])
                return [1.0] * details["steps"]
            case "utterance":
                self._filled.discard(0)
                self._step(details["chunk_frames"], details["frames"] // details["chunk_frames"])
            case "streams":
                self._fill(details["count"])
                self._step(1, details["count"] * details["frames"])
                return [1.0, 1.0]
            case _:  # memory
                self._fill(details.get("streams", 1))
        return 1.0

    def rest(self, seconds: float) -> None:
        self._add(seconds)

    def _fill(self, streams: int) -> None:
        if self._has_session_each:
            self._add(max(0, streams - self._open) * self._pace.load_seconds)
        self._open = max(self._open, streams)
        for _ in set(range(streams)) - self._filled:
            self._step(FILL_CHUNK, self._fill_steps)
        self._filled |= set(range(streams))

    def _step(self, frames: int, times: int) -> None:
        self._add(times * self._pace.step_seconds(frames))
