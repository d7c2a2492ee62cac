"""Graphs side by side: other programs, the official loop, our runtime on each graph that decodes in steps.

Rules of this room:

- Each side has a worker process (worker.py) for each number of threads. All run at once but work one at a time, in
  turns, A B C A B C: a machine that slows down slows all of them.
- Before each turn there is a pause: with onnxruntime's defaults, threads spin for a while after their work.
- A figure is the median over turns, with the lowest and highest beside it; "times" is how many times as good as the
  first side this one is, the median over turns.
- Figures go into the caller's dict after each turn, so that an interrupted caller has what was measured by then.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, Protocol

from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.tools.bench.measured import Measured, measured
from mossnano_stdio.weights import Bundle

INT8_SUFFIX: Final = "-int8"
WORKER: Final = Path(__file__).with_name("worker.py")
UTTERANCE_SECONDS: Final = (0.08, 1, 3, 10)  # the first is one frame of nano: the first audio of a stream
STREAM_COUNTS: Final = (1, 2, 4, 8)
MANY_STREAMS: Final = 4
FRAMES_PER_TURN: Final = 12
LEAST_STEPS_PER_TURN: Final = 3
SETTLING_SECONDS: Final = 0.1  # the threads were seen to spin for 40 ms
FRAMES_PER_STREAM: Final = 6

STREAM_FIGURES: Final = ("real_time_streams", "real_time_streams_per_core")
START_PARTS: Final = ("start_to_first_audio_ms", "import_ms", "load_ms", "first_step_ms", "resident_mb")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One way to run one weights folder, or the checkpoint that it was built of."""

    name: str  # as the table has it
    kind: str  # as worker.py has it
    weights: Path
    is_peer: bool = False  # another program, which has one stream
    python: str = sys.executable


def decoding_sides(bundle: Bundle) -> list[Side]:
    """The ways to run one weights folder, the quickest last. With official graphs their loop is first, as the others
    are measured against it.
    """
    from mossnano_stdio.codecs import int8_name, stepping_graphs

    sides = []
    for graph_name, maybe_choice in stepping_graphs(bundle).items():
        if not bundle.has_graph(graph_name):
            continue
        if maybe_choice is None:
            sides.append(Side("our runtime", "only", bundle.folder))
        elif maybe_choice == "official":
            sides.append(Side("official loop", "loop", bundle.folder))
            sides.append(Side("our runtime, official graph", "official", bundle.folder))
        else:
            sides.append(Side(f"{maybe_choice} graph", maybe_choice, bundle.folder))
        if bundle.has_graph(int8_name(graph_name)):
            sides.append(replace(sides[-1], name=f"{sides[-1].name}, int8", kind=f"{sides[-1].kind}{INT8_SUFFIX}"))
    if not sides:
        raise BundleError(
            f"{bundle.folder}: has no decoder to measure, `mossnano build` makes one; --encode measures an encoder"
        )
    return sides


def float32_side(bundle: Bundle) -> Side:
    """The quickest that decodes in float32."""
    return [side for side in decoding_sides(bundle) if not side.kind.endswith(INT8_SUFFIX)][-1]


def on_provider(side: Side, provider: str) -> Side:
    """The same elsewhere than on the CPU."""
    return replace(side, name=f"{side.name}, {provider}", kind=f"{side.kind}@{provider}")


def sides_of(
    bundle: Bundle, against: Sequence[Bundle] = (), peers: Sequence[Side] = (), maybe_provider: str | None = None
) -> list[Side]:
    """All sides; the others are measured against the first."""
    sides = [*peers, *decoding_sides(bundle)]
    if maybe_provider is not None:
        sides.append(on_provider(float32_side(bundle), maybe_provider))
    for other in against:
        kind = float32_side(other).kind
        taken = {side.name for side in sides}
        suffix = "" if kind == "only" else f", {kind}"
        names = [name for folder in (other.folder.name, other.folder) if (name := f"{folder}{suffix}") not in taken]
        if not names:
            raise UsageError(f"{other.folder} is to be measured twice; name it once")
        sides.append(Side(names[0], kind, other.folder))
    return sides


def check_quantizers(bundle: Bundle, sides: Sequence[Side], quantizers: int) -> None:
    """Raises a UsageError where some side cannot decode so many codes of a frame."""
    most = bundle.format.quantizers
    if quantizers > most:
        raise UsageError(f"--quantizers is {quantizers}; {bundle.folder} has {most}")
    if quantizers < most and (of_all := [side.name for side in sides if side.kind in ("loop", "official")]):
        raise UsageError(f"--quantizers is {quantizers}, but the {of_all[0]} decodes all {most} only; leave it out")


class SideProcess(Protocol):
    """One side, loaded; or a stand-in that computes how long it would take."""

    facts: Mapping[str, float]

    def ask(self, what: str, **details: int) -> Any:
        """Have worker.py do it; returns its answer."""

    def rest(self, seconds: float) -> None:
        """Let its threads come to rest."""


StartWorker = Callable[[Side, int], AbstractContextManager[SideProcess]]  # (side, threads)


class GraphBench:
    """Takes all measurements of some sides."""

    def __init__(
        self, frames_per_second: float, sides: Sequence[Side], turns: int, start: StartWorker, report: Report
    ) -> None:
        self._fps = frames_per_second
        self._sides = sides
        self._turns = turns
        self._start = start
        self._report = report

    def steps(self, threads: int, chunks: Sequence[int], found: dict[str, Any], *, cpu_time: bool = False) -> None:
        """Milliseconds per step with full caches, as a clock on the wall or one in the CPUs counts them."""

        def of_chunk(chunk_frames: int, worker: SideProcess) -> float:
            steps = max(LEAST_STEPS_PER_TURN, FRAMES_PER_TURN // chunk_frames)
            return float(median(worker.ask("steps", chunk_frames=chunk_frames, steps=steps, cpu_time=int(cpu_time))))

        cells = found.setdefault("steps_ms", {})
        with self._workers(threads) as workers:
            for chunk in chunks:
                self._report(f"{threads} threads, steps of {chunk}")
                for summary in self._in_turn(workers, partial(of_chunk, chunk)):
                    cells[str(chunk)] = summary

    def utterances(self, threads: int, found: dict[str, Any]) -> None:
        """Milliseconds for whole utterances from a reset, in 1-frame steps."""

        def of_seconds(seconds: float, worker: SideProcess) -> float:
            return float(worker.ask("utterance", frames=max(1, round(seconds * self._fps)), chunk_frames=1))

        cells = found.setdefault("utterances_ms", {})
        with self._workers(threads) as workers:
            for seconds in UTTERANCE_SECONDS:
                self._report(f"{threads} threads, {seconds} s from a reset")
                for summary in self._in_turn(workers, partial(of_seconds, seconds)):
                    cells[str(seconds)] = summary

    def starts(self, threads: int, found: dict[str, Any]) -> None:
        """Times from a process's start to its first audio, and the parts of that; then memory with full caches."""
        facts: dict[str, list[dict[str, float]]] = {side.name: [] for side in self._sides}
        for turn in range(self._turns):
            self._report(f"{threads} threads, start {turn + 1} of {self._turns}")
            for side in self._sides:
                with self._start(side, threads) as worker:
                    facts[side.name].append({**worker.facts, "resident_mb": worker.ask("memory") / 1e6})
            found["starts"] = {
                part: _summary({name: [fact[part] for fact in seen] for name, seen in facts.items()})
                for part in START_PARTS
            }

    def streams(self, threads: int, found: dict[str, Any]) -> None:
        """How many real-time streams the machine decodes, and a core of it; how much memory MANY_STREAMS take. Of our
        sides only, as the state of a peer's stream lies in its model.
        """
        per_core: list[float] = []  # beside what is measured on the wall, turn after turn

        def of_count(count: int, worker: SideProcess) -> float:
            on_the_wall, on_one_core = worker.ask("streams", count=count, frames=FRAMES_PER_STREAM)
            per_core.append(on_one_core / self._fps)
            return float(on_the_wall / self._fps)

        cells, core_cells = (found.setdefault(name, {}) for name in STREAM_FIGURES)
        with self._workers(threads, with_peers=False) as workers:
            for count in STREAM_COUNTS:
                self._report(f"{threads} threads, {count} streams at once")
                per_core.clear()
                for summary in self._in_turn(workers, partial(of_count, count), more_is_better=True):
                    turns = per_core[len(workers) :]  # the first of each warmed up
                    by_name = {name: turns[index :: len(workers)] for index, name in enumerate(workers)}
                    cells[str(count)], core_cells[str(count)] = summary, _summary(by_name, more_is_better=True)
        with self._workers(threads, with_peers=False) as workers:
            self._report(f"{threads} threads, memory of {MANY_STREAMS} streams")
            for summary in self._in_turn(workers, lambda worker: worker.ask("memory", streams=MANY_STREAMS) / 1e6):
                found["resident_mb_of_four_streams"] = summary

    def _in_turn(
        self, workers: Mapping[str, SideProcess], measure: Callable[[SideProcess], float], more_is_better: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Warms up, then takes turns; gives the summary so far after each."""
        figures: dict[str, list[float]] = {name: [] for name in workers}
        for worker in workers.values():
            measure(worker)  # warms up, and fills caches
        for _ in range(self._turns):
            for name, worker in workers.items():
                worker.rest(SETTLING_SECONDS)
                figures[name].append(measure(worker))
            yield _summary(figures, more_is_better)

    @contextmanager
    def _workers(self, threads: int, with_peers: bool = True) -> Iterator[dict[str, SideProcess]]:
        sides = [side for side in self._sides if with_peers or not side.is_peer]
        with ExitStack() as stack:
            yield {side.name: stack.enter_context(self._start(side, threads)) for side in sides}


class WorkerProcesses:
    """Starts the worker processes that measure."""

    def __init__(self, bundle: Bundle, maybe_quantizers: int | None = None) -> None:
        self.frames_to_fill = _frames_to_fill(bundle)
        self._format = bundle.format
        self._maybe_quantizers = maybe_quantizers

    @contextmanager
    def start(self, side: Side, threads: int) -> Iterator[SideProcess]:
        codec = self._format
        all_quantizers = codec.quantizers if side.is_peer else 0  # other weights of ours may have another number
        quantizers = all_quantizers if self._maybe_quantizers is None else self._maybe_quantizers
        numbers = (threads, self.frames_to_fill, codec.codebook_size, quantizers, codec.frame_samples)
        command = [side.python, str(WORKER), side.kind, str(side.weights), *map(str, numbers)]
        with measured(command, side.weights) as process:
            yield _WorkerProcess(process)


class _WorkerProcess:
    def __init__(self, process: Measured) -> None:
        self._process = process
        self.facts: Mapping[str, float] = {**process.facts, "start_to_first_audio_ms": process.ready_ms}

    def ask(self, what: str, **details: int) -> Any:
        return self._process.ask(json.dumps({"do": what, **details}))

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)


def _frames_to_fill(bundle: Bundle) -> int:
    """How many frames fill the longest cache, and eight more."""
    from mossnano_stdio.codecs import load_encoder_runtime, load_runtime, stepping_graphs

    decodes = any(map(bundle.has_graph, stepping_graphs(bundle)))
    runtime = load_runtime(bundle, threads=1) if decodes else load_encoder_runtime(bundle, threads=1)
    return max(runtime.layer_context_frames, default=1) + 8


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
