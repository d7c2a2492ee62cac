"""Measure, side by side: other programs, the official loop, our runtime on each of its graphs, the process.

  mossnano bench --weights DIR                  graphs: steps, utterances, starts, memory, streams, and the limit
  mossnano bench --weights DIR --against OTHER  another weights folder beside it
  mossnano bench --weights DIR --peer moshi     of Mimi: PyPI's moshi, or rustymimi, or both, beside it, out of the
                                                environment that --peer-python names
  mossnano bench --weights DIR --provider cuda  our runtime on a GPU beside those
  mossnano bench --weights DIR --steps          of all that the steps only: minutes instead of many
  mossnano bench --weights DIR --process        mossnano-stdio against a bare loop over the same graph
  mossnano bench --weights DIR --streams 1,4,16 so many streams in one process, against a process for each
  mossnano bench --weights DIR --encode         streaming encoding beside decoding
  mossnano bench --bits                         packing an hour of codes; needs no weights

Sides take turns in one run, each in processes of its own. Figures are medians, with the lowest and highest in
brackets; "x" is how many times as good as the first side a side is. The first is a peer where one is named, or else the
official loop, where the folder has official graphs. Where it has one graph of ours only, that is measured alone, or
with --against beside others. On a machine that does other things as well, believe the ratios and not the milliseconds,
or measure steps in --cpu-time.

What to compare: for one voice, steps and starts ("start to first audio" is a process from its very beginning, imports
included), with as many threads as it will have; for many voices, real-time streams with one thread each. Those are all
that the machine decodes at once; "per core" divides by the CPU time that they took, whatever ran how many threads.

How long it is going to take, and how far it is, goes to stderr. Ctrl-C and SIGTERM end it early: what was measured by
then is printed, and the exit status is 130 or 143.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from mossnano_stdio.errors import BundleError, ExitStatus, Terminated, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_output
from mossnano_stdio.process.flags import whole_number

if TYPE_CHECKING:
    from mossnano_stdio.tools.bench.sides import GraphBench, Side
    from mossnano_stdio.weights import Bundle

DEFAULT_CHUNKS = "1,2,4,8,17,23"
DEFAULT_THREADS = "1,2"
DEFAULT_TURNS = 7
PEERS = ("moshi", "rustymimi")
ELSEWHERE = ("cuda", "tensorrt", "coreml", "directml", "openvino")  # as codecs has them, which --help does not import
LIMITS_SECONDS = 5.0  # what measuring the machine was seen to take, for one number of threads

START_TITLES = {
    "start_to_first_audio_ms": "start to first audio, ms",
    "import_ms": "of that, imports, ms",
    "load_ms": "of that, loading, ms",
    "first_step_ms": "of that, the first step, ms",
    "resident_mb": "memory, caches full, MB",
}


STREAM_TITLES = {
    "real_time_streams": "real-time streams",
    "real_time_streams_per_core": "real-time streams per core that was busy",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="DIR", help="the weights folder to measure")
    parser.add_argument("--against", metavar="DIR", action="append", default=[], help="another one beside it")
    parser.add_argument("--peer", choices=PEERS, action="append", default=[], help="of Mimi: another program beside it")
    parser.add_argument(
        "--peer-python", metavar="PYTHON", help="the Python of an environment that has the peers (this one)"
    )
    parser.add_argument(
        "--peer-checkpoint", metavar="FILE", type=Path, help="what the peers read (the one in the weights folder)"
    )
    parser.add_argument("--provider", choices=ELSEWHERE, help="our runtime there beside the one on the CPU")
    parser.add_argument(
        "--quantizers", type=whole_number(1, 1000), metavar="N", help="codes of each frame that are decoded (all)"
    )
    parser.add_argument("--threads", type=_whole_numbers, default=DEFAULT_THREADS, metavar="N,...", help="(1,2)")
    parser.add_argument(
        "--chunks", type=_whole_numbers, default=DEFAULT_CHUNKS, metavar="N,...", help="frames per step (%(default)s)"
    )
    parser.add_argument(
        "--turns", type=whole_number(1, 1000), default=DEFAULT_TURNS, metavar="N", help="repeats (%(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--steps", action="store_true", help="measure steps only")
    what.add_argument("--process", action="store_true", help="measure mossnano-stdio itself")
    what.add_argument("--streams", type=_whole_numbers, metavar="N,...", help="measure so many streams over one pipe")
    what.add_argument("--encode", action="store_true", help="measure streaming encoding")
    what.add_argument("--bits", action="store_true", help="measure packing")
    parser.add_argument(
        "--cpu-time", action="store_true", help="with --steps or --encode: what all threads together computed"
    )
    parser.add_argument(
        "--seconds", type=whole_number(1, 86400), metavar="S", help="with --streams: how long each is played (4)"
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="a picture of the steps")


def run(args: argparse.Namespace) -> int:
    figures: dict[str, Any] = {}
    with _opened_picture(args) as maybe_picture:
        try:
            _measure(args, figures)
        except (KeyboardInterrupt, Terminated):
            _print_figures(figures, as_json=args.json)
            raise
        _print_figures(figures, as_json=args.json)
        if maybe_picture is not None:
            _plot(figures, maybe_picture)
    return ExitStatus.DONE


def _print_figures(figures: Mapping[str, Any], *, as_json: bool) -> None:
    if figures:
        print(json.dumps(figures, indent=1) if as_json else "\n".join(_tables(figures)), flush=True)


@contextmanager
def _opened_picture(args: argparse.Namespace) -> Iterator[BinaryIO | None]:
    """Opens the picture's file first, so that a fault in --plot shows before minutes of measuring."""
    if args.plot is None:
        yield None
        return
    if args.process or args.streams or args.encode or args.bits:
        raise UsageError("--plot draws the steps of graphs; leave --process, --encode and --bits out")
    if args.plot == STANDARD_STREAM:
        raise UsageError("--plot takes a file: stdout has the figures")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'mossnano-stdio[plot]'")
    with open_output(args.plot) as file:
        yield file


class _Progress:
    """Says on stderr what is measured now, which part of how many that is, and how much time has passed."""

    def __init__(self, parts: int, seconds: float) -> None:
        _say(f"this takes about {_lasting(seconds)}")
        if sys.dont_write_bytecode and not Path(cache_from_source(__file__)).exists():
            _say("each start compiles our sources, as PYTHONDONTWRITEBYTECODE is set and no bytecode is there")
        self._parts, self._about = parts, _lasting(seconds)
        self._part = 0
        self._began = time.monotonic()

    def __call__(self, what: str) -> None:
        self._part += 1
        passed = _lasting(time.monotonic() - self._began)
        _say(f"[{self._part}/{self._parts}] {what} ({passed} of about {self._about})")


def _lasting(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _measure(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Puts figures into the dict as they come, so that an interrupted run has what was measured by then."""
    if not args.peer and (args.peer_python or args.peer_checkpoint):
        raise UsageError("--peer-python and --peer-checkpoint are for --peer, which is not given")
    if args.cpu_time and not (args.steps or args.encode):
        raise UsageError("--cpu-time is for steps; add --steps or --encode")
    if args.seconds and not args.streams:
        raise UsageError("--seconds is how long streams are played; add --streams")
    if (args.bits or args.process or args.streams) and (args.peer or args.quantizers or args.provider):
        raise UsageError(
            "--peer, --quantizers and --provider are for graphs; leave --bits, --process and --streams out"
        )
    if args.bits:
        from mossnano_stdio.tools.bench.bits import bits_figures

        _say("packing an hour of codes some times takes a few seconds")
        figures["bits"] = bits_figures()
        return
    from mossnano_stdio.codecs import check_provider, refuse_segments
    from mossnano_stdio.weights import find_weights, load_bundle

    if args.provider:
        check_provider(args.provider)
    bundle = load_bundle(find_weights(args.weights))
    refuse_segments(bundle)
    if args.process:
        _measure_process(bundle, args, figures)
    elif args.streams:
        from mossnano_stdio.tools.bench.voices import PLAYED_SECONDS, estimated_seconds, measure_voices

        played_seconds = PLAYED_SECONDS if args.seconds is None else args.seconds
        progress = _Progress(len(args.streams), estimated_seconds(args.streams, args.turns, played_seconds))
        figures["streams"] = {}
        measure_voices(bundle, args.streams, args.turns, played_seconds, progress, figures["streams"])
    elif args.encode:
        _measure_encoding(bundle, args, figures)
    else:
        _measure_graphs(bundle, [load_bundle(find_weights(folder)) for folder in args.against], args, figures)


def _measure_process(bundle: Bundle, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    from mossnano_stdio.tools.bench.overhead import PARTS, estimated_seconds, measure_process
    from mossnano_stdio.tools.bench.sides import decoding_sides

    decoding_sides(bundle)  # or it says that there are none
    seconds = sum(estimated_seconds(bundle.folder, threads, args.turns) for threads in args.threads)
    progress = _Progress(PARTS * len(args.threads), seconds)
    figures["process"] = []
    for threads in args.threads:
        figures["process"].append({})
        measure_process(bundle.folder, threads, args.turns, progress, figures["process"][-1])


def _measure_graphs(
    bundle: Bundle, against: Sequence[Bundle], args: argparse.Namespace, figures: dict[str, Any]
) -> None:
    from mossnano_stdio.tools.bench.peers import peer_sides
    from mossnano_stdio.tools.bench.sides import sides_of

    def measure(bench: GraphBench, threads: int, found: dict[str, Any]) -> None:
        bench.steps(threads, args.chunks, found, cpu_time=args.cpu_time)
        if args.steps:
            return
        bench.utterances(threads, found)
        bench.starts(threads, found)
        bench.streams(threads, found)

    peers = peer_sides(bundle, args.peer, args.peer_python or sys.executable, args.peer_checkpoint, encodes=False)
    sides = sides_of(bundle, against, peers, args.provider)
    _measure_sides(bundle, sides, args, measure, figures, has_limits=not args.steps)


def _measure_encoding(bundle: Bundle, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    from mossnano_stdio.codecs import stepping_graphs
    from mossnano_stdio.tools.bench.peers import peer_sides
    from mossnano_stdio.tools.bench.sides import Side, float32_side, on_provider

    if not bundle.has_graph("encode_step"):
        raise BundleError(f"{bundle.folder}: has no streaming encoder to measure; `mossnano build` makes one")
    if args.quantizers is not None:
        raise UsageError("--quantizers is for decoding: encoding gives all codes of a frame")
    sides = peer_sides(bundle, args.peer, args.peer_python or sys.executable, args.peer_checkpoint, encodes=True)
    if not sides and any(map(bundle.has_graph, stepping_graphs(bundle))):
        sides.append(replace(float32_side(bundle), name="decoding"))
    sides.append(Side("encoding", "encode", bundle.folder))
    if args.provider:
        sides.append(on_provider(sides[-1], args.provider))

    def measure(bench: GraphBench, threads: int, found: dict[str, Any]) -> None:
        bench.steps(threads, args.chunks, found, cpu_time=args.cpu_time)

    _measure_sides(bundle, sides, args, measure, figures, has_limits=False)


def _measure_sides(
    bundle: Bundle,
    sides: Sequence[Side],
    args: argparse.Namespace,
    measure: Callable[[GraphBench, int, dict[str, Any]], None],
    figures: dict[str, Any],
    *,
    has_limits: bool,
) -> None:
    """Goes through all measurements twice: first to estimate how long they take, then to take them."""
    from mossnano_stdio.tools.bench.estimate import Estimate, try_pace
    from mossnano_stdio.tools.bench.sides import GraphBench, WorkerProcesses, check_quantizers

    fps = bundle.format.frames_per_second
    if args.quantizers is not None:
        check_quantizers(bundle, sides, args.quantizers)
    processes = WorkerProcesses(bundle, args.quantizers)
    if len(sides) == 1:
        _say(f"{sides[0].name} of {bundle.folder} is measured alone: there is nothing in it to compare with")
    maybe_work = _maybe_work(bundle) if has_limits else None
    _say("trying each side, to tell how long this takes")
    paces = {
        (side.name, threads): try_pace(side, threads, processes.start) for side in sides for threads in args.threads
    }
    estimate = Estimate(paces, processes.frames_to_fill)
    for threads in args.threads:
        measure(GraphBench(fps, sides, args.turns, estimate.start, estimate.report), threads, {})
        if maybe_work is not None:
            estimate.report("limits")
            estimate.add(LIMITS_SECONDS)
    progress = _Progress(estimate.parts, estimate.seconds)
    figures |= {
        "weights": bundle.name,
        "cpu_time": args.cpu_time,
        **({} if maybe_work is None else maybe_work._asdict()),
        "threads": {},
    }
    for threads in args.threads:
        found: dict[str, Any] = {}
        figures["threads"][str(threads)] = found
        measure(GraphBench(fps, sides, args.turns, processes.start, progress), threads, found)
        if maybe_work is not None:
            progress(f"{threads} threads, what the machine allows")
            found |= _limits(maybe_work, threads)


class _Work(NamedTuple):
    """The work that any decoding has to do."""

    mflop_per_frame: float
    mb_per_step: float


def _maybe_work(bundle: Bundle) -> _Work | None:
    """With full caches; None where the weights cannot be read from a graph."""
    from mossnano_stdio.errors import MossnanoError

    if bundle.sidecar.maybe_codec is not None:
        _say(f"no limit is computed: the arithmetic of {bundle.sidecar.maybe_codec.family} is not counted")
        return None
    if not any(map(bundle.has_graph, ("decode_step", "decode_full"))):
        _say("no limit is computed, as the work is counted in official graphs, and there are none")
        return None
    try:
        from mossnano_stdio.build.arithmetic import bytes_per_step, decoding_macs
        from mossnano_stdio.build.extract import extract_weights

        decoder = extract_weights(bundle).decoder
        return _Work(2 * decoding_macs(decoder) / 1e6, bytes_per_step(decoder) / 1e6)
    except ImportError as error:
        _say(f"no limit is computed, as {error.name} is not installed: pip install 'mossnano-stdio[build]'")
    except MossnanoError as error:
        _say(f"no limit is computed: {error}")
    return None


def _limits(work: _Work, threads: int) -> dict[str, float]:
    """The least time that this machine needs for that work."""
    from mossnano_stdio.tools.bench.machine import gemm_gflops, stream_gb_per_second

    gflops, gb_per_second = gemm_gflops(threads), stream_gb_per_second(threads)
    return {
        "gemm_gflops": round(gflops, 1),
        "limit_ms_per_frame": round(work.mflop_per_frame / gflops, 3),
        "stream_gb_per_second": round(gb_per_second, 1),
        "reading_ms_per_step": round(work.mb_per_step / gb_per_second, 3),
    }


# --- what is shown --------------------------------------------------------------------------------


def _tables(figures: Mapping[str, Any]) -> list[str]:
    if "bits" in figures or "process" in figures or "streams" in figures:
        return json.dumps(figures, indent=1).replace('"', "").splitlines()
    lines = [f"{figures['weights']}"]
    for threads, found in figures["threads"].items():
        lines += ["", f"{threads} threads"]
        for frames, sides in found.get("steps_ms", {}).items():
            unit = "ms of CPU time" if figures.get("cpu_time") else "ms"
            lines += _rows(f"step of {frames}, caches full, {unit}", sides)
        for seconds, sides in found.get("utterances_ms", {}).items():
            lines += _rows(f"{seconds} s from a reset, steps of 1, ms", sides)
        for part, sides in found.get("starts", {}).items():
            lines += _rows(START_TITLES[part], sides)
        for figure, words in STREAM_TITLES.items():
            for count, sides in found.get(figure, {}).items():
                lines += _rows(f"{count} streams at once: {words}", sides)
        if "resident_mb_of_four_streams" in found:
            lines += _rows("resident_mb of four streams", found["resident_mb_of_four_streams"])
        if found.get("limit_ms_per_frame"):
            lines += _limit_rows(found)
    return lines


def _rows(title: str, sides: Mapping[str, Mapping[str, float]]) -> list[str]:
    width = max(map(len, sides))
    return [f"  {title}"] + [
        f"    {name:<{width}}  {side['median']:>10.3f}  ({side['lowest']:.3f} to {side['highest']:.3f})"
        + (f"  x {side['times']:.2f}" if len(sides) > 1 else "")
        for name, side in sides.items()
    ]


def _limit_rows(found: Mapping[str, Any]) -> list[str]:
    limit_ms, reading_ms = found["limit_ms_per_frame"], found["reading_ms_per_step"]
    rows = [
        f"  a bare float32 product reaches {found['gemm_gflops']} GFLOP/s: {limit_ms} ms a frame at the least",
        f"  memory is read at {found['stream_gb_per_second']} GB/s: {reading_ms} ms a step at the least",
    ]
    for frames, sides in found["steps_ms"].items():
        for name, side in sides.items():
            distance = side["median"] / int(frames) / limit_ms
            rows.append(f"    step of {frames}: {name} takes {distance:.2f} times what those products alone would")
    return rows


def _plot(figures: Mapping[str, Any], picture: BinaryIO) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(figures["threads"]), 4.5), layout="constrained")
    for number, (threads, found) in enumerate(figures["threads"].items()):
        axes = figure.add_subplot(1, len(figures["threads"]), number + 1)
        chunks = [int(chunk) for chunk in found["steps_ms"]]
        for name in next(iter(found["steps_ms"].values())):
            per_frame = [found["steps_ms"][str(chunk)][name]["median"] / chunk for chunk in chunks]
            axes.plot(chunks, per_frame, marker="o", label=name)
        axes.set(
            title=f"{threads} threads, caches full", xlabel="frames per step", ylabel="ms per frame", ylim=(0, None)
        )
        axes.legend()
    figure.savefig(picture, format="png")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _whole_numbers(text: str) -> list[int]:
    parse: Callable[[str], int] = whole_number(1, 1000)
    return [parse(part) for part in text.split(",")]
