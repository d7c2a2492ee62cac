"""Graphs side by side: the official loop, our runtime on the official graph, the fast graph.

Rules of this room:

- Each side is a worker process for each number of threads (worker.py). All are alive at once, one of them works at a
  time, and they take turns, A B C A B C: a machine that slows down slows all of them.
- A turn begins when the one before has come to rest: with onnxruntime's defaults, threads spin on after their work.
- A figure is the median over turns, with the lowest and highest beside it; "times" is how many times as good as the
  first side this one is, the median over turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from mossnano_stdio.benchmarks.measured import Measured, measured
from mossnano_stdio.bundle import Bundle
from mossnano_stdio.errors import UsageError

WORKER: Final = Path(__file__).with_name("worker.py")
UTTERANCE_SECONDS: Final = (0.08, 1, 3, 10)  # the first is one frame of nano: the first audio of a stream
STREAM_COUNTS: Final = (1, 2, 4, 8)
MANY_STREAMS: Final = 4
FRAMES_PER_TURN: Final = 12
LEAST_STEPS_PER_TURN: Final = 3
SETTLING_SECONDS: Final = 0.1  # the threads were seen to spin for 40 ms
FRAMES_PER_STREAM: Final = 6

Report = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One way to run one weights folder."""

    name: str  # as the table has it
    kind: str  # as worker.py has it
    folder: Path


def sides_of(bundle: Bundle, against: Sequence[Bundle] = ()) -> list[Side]:
    """The official loop first, everything else is measured against it."""
    sides = [
        Side("official loop", "loop", bundle.folder),
        Side("our runtime, official graph", "official", bundle.folder),
    ]
    if bundle.has_graph("fast"):
        sides.append(Side("fast graph", "fast", bundle.folder))
    for other in against:
        kind = "fast" if other.has_graph("fast") else "official"
        taken = {side.name for side in sides}
        names = [name for folder in (other.folder.name, other.folder) if (name := f"{folder}, {kind}") not in taken]
        if not names:
            raise UsageError(f"{other.folder} is to be measured twice; name it once")
        sides.append(Side(names[0], kind, other.folder))
    return sides


class GraphBench:
    """All measurements of some sides over one bundle's format."""

    def __init__(self, bundle: Bundle, sides: Sequence[Side], turns: int, report: Report) -> None:
        self._bundle = bundle
        self._sides = sides
        self._turns = turns
        self._report = report
        self._fps = bundle.format.frames_per_second
        self._fill_frames = _frames_to_fill(bundle)

    def steps(self, threads: int, chunks: Sequence[int]) -> dict[str, Any]:
        """Milliseconds per step with full caches."""

        def of_chunk(worker: _Worker, chunk_frames: int) -> float:
            steps = max(LEAST_STEPS_PER_TURN, FRAMES_PER_TURN // chunk_frames)
            return float(median(worker.ask("steps", chunk_frames=chunk_frames, steps=steps)))

        with self._workers(threads) as workers:
            return {
                str(chunk): self._in_turn(
                    f"{threads} threads, steps of {chunk}", workers, partial(_call, of_chunk, chunk)
                )
                for chunk in chunks
            }

    def utterances(self, threads: int) -> dict[str, Any]:
        """Milliseconds for whole utterances from a reset, in 1-frame steps."""

        def of_seconds(worker: _Worker, seconds: float) -> float:
            return float(worker.ask("utterance", frames=max(1, round(seconds * self._fps)), chunk_frames=1))

        with self._workers(threads) as workers:
            return {
                str(seconds): self._in_turn(
                    f"{threads} threads, {seconds} s from a reset", workers, partial(_call, of_seconds, seconds)
                )
                for seconds in UTTERANCE_SECONDS
            }

    def starts(self, threads: int) -> dict[str, Any]:
        """What a start is made of: imports, load, first step; and the memory that is taken then, caches full."""
        facts: dict[str, list[dict[str, float]]] = {side.name: [] for side in self._sides}
        for turn in range(self._turns):
            self._report(f"{threads} threads, start {turn + 1} of {self._turns}")
            for side in self._sides:
                with self._worker(side, threads) as worker:
                    facts[side.name].append({**worker.facts, "resident_mb": worker.ask("memory") / 1e6})
        return {
            part: _summary({name: [fact[part] for fact in found] for name, found in facts.items()})
            for part in ("import_ms", "load_ms", "first_step_ms", "resident_mb")
        }

    def streams(self, threads: int) -> dict[str, Any]:
        """How many streams in real time a core carries, and what four of them take: sessions of their own, or one."""

        def of_count(worker: _Worker, count: int) -> float:
            return float(worker.ask("streams", count=count, frames=FRAMES_PER_STREAM)) / self._fps / threads

        with self._workers(threads) as workers:
            carried = {
                str(count): self._in_turn(
                    f"{count} streams at once", workers, partial(_call, of_count, count), more_is_better=True
                )
                for count in STREAM_COUNTS
            }
        with self._workers(threads) as workers:
            memory = self._in_turn(
                f"memory of {MANY_STREAMS} streams",
                workers,
                lambda worker: float(worker.ask("memory", streams=MANY_STREAMS)) / 1e6,
            )
        return {"real_time_streams_per_core": carried, "resident_mb_of_four_streams": memory}

    def _in_turn(
        self,
        what: str,
        workers: Mapping[str, _Worker],
        measure: Callable[[_Worker], float],
        more_is_better: bool = False,
    ) -> dict[str, Any]:
        self._report(what)
        figures: dict[str, list[float]] = {name: [] for name in workers}
        for worker in workers.values():
            measure(worker)  # warms up, and fills caches
        for _ in range(self._turns):
            for name, worker in workers.items():
                time.sleep(SETTLING_SECONDS)
                figures[name].append(measure(worker))
        return _summary(figures, more_is_better)

    @contextmanager
    def _workers(self, threads: int) -> Iterator[dict[str, _Worker]]:
        with ExitStack() as stack:
            yield {side.name: stack.enter_context(self._worker(side, threads)) for side in self._sides}

    @contextmanager
    def _worker(self, side: Side, threads: int) -> Iterator[_Worker]:
        numbers = map(str, (threads, self._fill_frames, self._bundle.format.codebook_size))
        command = [sys.executable, str(WORKER), side.kind, str(side.folder), *numbers]
        with measured(command, side.folder) as process:
            yield _Worker(process)


class _Worker:
    def __init__(self, process: Measured) -> None:
        self._process = process
        self.facts = process.facts

    def ask(self, what: str, **details: int) -> Any:
        return self._process.ask(json.dumps({"do": what, **details}))


def _frames_to_fill(bundle: Bundle) -> int:
    """So many frames fill the longest cache: the metadata has it in tokens, and a module makes at least one a frame."""
    from mossnano_stdio.codec import load_runtime

    return max(load_runtime(bundle, graph="official").layer_context_frames, default=1) + 8


def _call(measure: Callable[[_Worker, Any], float], number: float, worker: _Worker) -> float:
    return measure(worker, number)


def _summary(figures: Mapping[str, Sequence[float]], more_is_better: bool = False) -> dict[str, Any]:
    first = next(iter(figures.values()))
    return {
        name: {
            "median": round(median(found), 3),
            "lowest": round(min(found), 3),
            "highest": round(max(found), 3),
            "times": round(median(b / a if more_is_better else a / b for a, b in zip(first, found, strict=True)), 3),
        }
        for name, found in figures.items()
    }
