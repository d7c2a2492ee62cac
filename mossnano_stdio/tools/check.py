"""Are these weights whole, and do they decode right?

Every file is read anew and held against its size and SHA-256: the published ones, or those recorded when it was built.
Every graph is loaded and held against the metadata. Then seeded codes are decoded by each graph in several chunkings,
which must give what decode_full (or else, frame by frame, the first graph there is) makes of them, within one 16-bit
step, or of an int8 graph with noise that is at most 3 dB louder than when it was built; and what came out is encoded in
several chunkings, which must give the codes of encoding it at once, but for one in a thousand.

Status 66: a file is missing or wrong. 1: all files are right, but the sound is not.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio import codecs
from mossnano_stdio.chunks import Fixed, SegmentingDecoder, first_chunk_frames_of, plan
from mossnano_stdio.codecs import (
    EncoderRuntime,
    GraphName,
    PrecisionName,
    Runtime,
    SegmentRuntime,
    UnfitRuntimeError,
)
from mossnano_stdio.errors import BundleError, ExitStatus, MossnanoError, UsageError
from mossnano_stdio.pcm import FULL_SCALE
from mossnano_stdio.pcm.comparison import ratio_db
from mossnano_stdio.process.flags import add_engine_arguments
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.tools.facts import as_json
from mossnano_stdio.weights import DEMO, Bundle, WeightFile, find_weights, load_bundle
from mossnano_stdio.weights.checked_json import Entry

if TYPE_CHECKING:
    from mossnano_stdio.codecs import FrameGraphEncoder, FullDecoder, FullEncoder, SegmentEncoder

SEED = 20
LONG_FRAMES, SHORT_FRAMES = 60, 24  # past the shortest context; what decode_full can do on any machine
CHUNKINGS = (1, 7, 23)  # frames
TOLERATED_STEPS = 1.0
TOLERATED_LOSS_DB = 3.0
TOLERATED_AGREEMENT = 0.999  # rows that are equally near within float rounding may be taken for each other

Audio = NDArray[np.float32]


class _EngineFlags(TypedDict):
    provider: str
    threads: int | None


@dataclass(frozen=True)
class Row:
    """The result of one check."""

    verdict: Literal["ok", "FAILED", "absent", "unknown"]
    about: Literal["file", "graph", "sound"]
    name: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", nargs="?", metavar="WEIGHTS", help=f"a weights folder, or {DEMO!r}")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    bundle = load_bundle(find_weights(args.weights))
    rows = list(_check_files(bundle))
    if not _failed(rows):
        graphs = _Graphs(bundle, args.provider, args.threads)
        rows += graphs.check()
        if not _failed(rows):
            rows += _check_sound(graphs)
    _show(bundle, rows, as_one_json=args.json)
    if _failed(row for row in rows if row.about != "sound"):
        return ExitStatus.NO_WEIGHTS
    return ExitStatus.CHECK_FAILED if _failed(rows) else ExitStatus.DONE


def _failed(rows: Iterable[Row]) -> bool:
    return any(row.verdict == "FAILED" for row in rows)


def _show(bundle: Bundle, rows: list[Row], *, as_one_json: bool) -> None:
    passed = not _failed(rows)
    if as_one_json:
        facts = {"weights": str(bundle.folder), "name": bundle.name, "demo": bundle.demo, "passed": passed}
        print(as_json(facts | {"checks": [asdict(row) for row in rows]}))
        return
    print(f"{bundle.folder}: {bundle.name}")
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"  {row.verdict:<7}  {row.about:<5}  {row.name:<{width}}  {row.detail}")
    print("all is well" if passed else "FAILED")


# --- files --------------------------------------------------------------------------------------------------------


def _check_files(bundle: Bundle) -> Iterator[Row]:
    """Checks each file once, although graphs share some."""
    # Of an official bundle one graph suffices. Where it is left out, whoever built the others needs them.
    needed_graphs = [bundle.graphs["decode_step"]] if "decode_step" in bundle.graphs else bundle.graphs.values()
    needed = {file.path for graph in needed_graphs for file in graph.files}
    files = {file.path: file for graph in bundle.graphs.values() for file in graph.files}
    yield _check_file(bundle.metadata_file, is_needed=True)
    for path, file in files.items():
        yield _check_file(file, is_needed=path in needed)


def _check_file(file: WeightFile, *, is_needed: bool) -> Row:
    name = file.path.name
    if not is_needed and not file.path.exists():
        return Row("absent", "file", name, "not needed for decoding")
    try:
        file.check_size()
        file.check_content(afresh=True)
    except BundleError as error:
        return Row("FAILED", "file", name, str(error).removeprefix(f"{file.path}: "))
    size = f"{file.path.stat().st_size:,} bytes"
    if file.record is None:
        return Row("unknown", "file", name, f"{size}, neither published nor recorded: nothing to compare them with")
    return Row("ok", "file", name, f"{size}, SHA-256 as {file.origin}")


# --- graphs -------------------------------------------------------------------------------------------------------


class _Graphs:
    """Loads each graph of a bundle once and keeps it for the checks of the sound."""

    def __init__(self, bundle: Bundle, provider: str, threads: int | None) -> None:
        self._bundle = bundle
        self._provider = provider
        self._threads = threads
        self.runtimes: list[Runtime] = []
        self.maybe_full_decoder: FullDecoder | None = None
        self.maybe_encoder: EncoderRuntime | None = None
        self.maybe_full_encoder: FullEncoder | None = None
        self.maybe_segment_encoder: SegmentEncoder | FrameGraphEncoder | None = None

    def check(self) -> Iterator[Row]:
        """Load every graph that is there."""
        for name, load in self._loaders().items():
            if not self._bundle.has_graph(name):
                continue
            if self._bundle.graphs[name].precision == codecs.INT8 and self._provider != "cpu":
                yield Row("absent", "graph", name, f"runs on the CPU only, not on {self._provider!r}")
                continue
            try:
                load()
            except BundleError as error:
                verdict: Literal["absent", "FAILED"] = "absent" if isinstance(error, UnfitRuntimeError) else "FAILED"
                yield Row(verdict, "graph", name, str(error).removeprefix(f"{self._bundle.graphs[name].path}: "))
            else:
                yield Row("ok", "graph", name, "loads, and its inputs and outputs are what they should be")

    def _loaders(self) -> dict[str, Callable[[], None]]:
        bundle, engine = self._bundle, _EngineFlags(provider=self._provider, threads=self._threads)

        def load_runtime(graph: GraphName | None, precision: PrecisionName | None = None) -> None:
            self.runtimes.append(codecs.load_runtime(bundle, graph=graph, precision=precision, **engine))

        def load_full_decoder() -> None:
            self.maybe_full_decoder = codecs.load_full_decoder(bundle, **engine)

        def load_encoder() -> None:
            self.maybe_encoder = codecs.load_encoder_runtime(bundle, **engine)

        def load_full_encoder() -> None:
            self.maybe_full_encoder = codecs.load_full_encoder(bundle, **engine)

        def load_segment_encoder() -> None:
            self.maybe_segment_encoder = codecs.load_segment_encoder(bundle, **engine)

        stepping = {name: partial(load_runtime, graph) for name, graph in codecs.stepping_graphs(bundle).items()}
        int8 = {
            codecs.int8_name(name): partial(load_runtime, graph, "int8")
            for name, graph in codecs.stepping_graphs(bundle).items()
        }
        return {
            "decode_step": stepping.pop("decode_step"),
            "decode_full": load_full_decoder,
            "encode": load_full_encoder,
            **stepping,
            **int8,
            "encode_step": load_encoder,
            "encode_segment": load_segment_encoder,
        }


# --- sound --------------------------------------------------------------------------------------------------------


def _check_sound(graphs: _Graphs) -> Iterator[Row]:
    judge = "decode_full"
    if any(isinstance(runtime, SegmentRuntime) for runtime in graphs.runtimes):
        yield from _check_segments(graphs)
        return
    try:
        if graphs.maybe_full_decoder:
            codes, whole = _reference(graphs.maybe_full_decoder)
        elif graphs.runtimes:
            yield Row("absent", "sound", judge, "without it the first graph in chunks of one frame is the measure")
            judge = _chunks_of(graphs.runtimes[0], 1)
            codes, whole = _stepped_reference(graphs.runtimes[0])
        else:
            yield Row("absent", "sound", judge, "there is no decoder")
            return
    except MossnanoError as error:
        yield Row("FAILED", "sound", judge, str(error))
        return
    yield _judge_reference(judge, whole)
    for runtime in graphs.runtimes:
        for chunk_frames in CHUNKINGS:
            if judge != _chunks_of(runtime, chunk_frames):
                yield _judge_chunks(runtime, codes, whole, chunk_frames, judge)
    if graphs.maybe_encoder and graphs.maybe_full_encoder:
        yield from _check_encoder(graphs.maybe_encoder, graphs.maybe_full_encoder, whole)


def _check_segments(graphs: _Graphs) -> Iterator[Row]:
    """There is one graph of each kind, so what they give is looked at, but not compared."""
    (runtime,) = graphs.runtimes
    decoder = runtime.new_decoder()
    assert isinstance(decoder, SegmentingDecoder)
    try:
        audio = decoder.decode_segment(_random_codes(runtime.format), 1.0)
        yield _judge_reference(runtime.graph_name, audio)
        if encoder := graphs.maybe_segment_encoder:
            codes, scale = encoder.encode_segment(audio)
            yield Row("ok", "sound", encoder.graph_name, f"{len(codes)} frames of codes, their scale {scale:.3g}")
    except MossnanoError as error:
        yield Row("FAILED", "sound", runtime.graph_name, str(error))


def _check_encoder(encoder: EncoderRuntime, full: FullEncoder, whole: Audio) -> Iterator[Row]:
    """Encode the decoded sound at once and in chunks, and compare the codes."""
    audio = whole[: SHORT_FRAMES * full.format.frame_samples]
    try:
        expected = full.encode(audio)
    except MossnanoError as error:
        yield Row("FAILED", "sound", "encode", str(error))
        return
    for chunk_frames in CHUNKINGS:
        yield _judge_encoded_chunks(encoder, audio, expected, chunk_frames)


def _stepped_reference(runtime: Runtime) -> tuple[Codes, Audio]:
    """Decode seeded codes frame by frame."""
    codes = _random_codes(runtime.format)
    return codes, _stepped(runtime.new_decoder(), codes, 1)


def _stepped(codec: Any, rows: NDArray[Any], chunk_frames: int, rows_per_frame: int = 1) -> NDArray[Any]:
    """What a decoder, or an encoder, makes of all rows in chunks of one size."""
    frames = len(rows) // rows_per_frame
    chunks = plan(frames, Fixed(chunk_frames), first_chunk_frames_of(codec))
    return np.concatenate(
        [codec.step(rows[start * rows_per_frame : (start + count) * rows_per_frame]) for start, count in chunks]
    )


def _reference(full: FullDecoder) -> tuple[Codes, Audio]:
    """Decode seeded codes at once; fewer of them where LONG_FRAMES do not fit into memory."""
    codes = _random_codes(full.format)
    try:
        return codes, full.decode(codes)
    except UsageError:
        return codes[:SHORT_FRAMES], full.decode(codes[:SHORT_FRAMES])


def _random_codes(codec: CodecFormat) -> Codes:
    # Not numpy's numbers: a frozen folder does without that part of it, 3 MB.
    numbers = random.Random(SEED).choices(range(codec.codebook_size), k=LONG_FRAMES * codec.quantizers)
    return np.array(numbers, np.uint16).reshape(LONG_FRAMES, codec.quantizers)


def _chunks_of(runtime: Runtime, chunk_frames: int) -> str:
    name = codecs.int8_name(runtime.graph_name) if runtime.precision == codecs.INT8 else runtime.graph_name
    return f"{name}, chunks of {chunk_frames}"


def _judge_reference(judge: str, whole: Audio) -> Row:
    level = float(np.sqrt(np.mean(np.square(whole, dtype=np.float64))))
    if not np.isfinite(level) or level == 0:
        found = "silence" if level == 0 else "NaN or infinity"
        return Row("FAILED", "sound", judge, f"gives {found} for {len(whole)} samples of random codes")
    detail = f"{len(whole)} samples of random codes at {20 * np.log10(level):.1f} dB"
    return Row("ok", "sound", judge, detail)


def _judge_chunks(runtime: Runtime, codes: Codes, whole: Audio, chunk_frames: int, judge: str) -> Row:
    name = _chunks_of(runtime, chunk_frames)
    try:
        stepped = _stepped(runtime.new_decoder(), codes, chunk_frames)
    except MossnanoError as error:
        return Row("FAILED", "sound", name, str(error))
    if runtime.precision == codecs.INT8:
        return _judge_int8(runtime, name, stepped, whole, judge)
    steps = float(np.abs(stepped - whole).max()) * FULL_SCALE
    detail = f"at most {steps:.3f} 16-bit steps from {judge} over {len(codes)} frames"
    return Row("ok" if steps <= TOLERATED_STEPS else "FAILED", "sound", name, detail)


def _judge_int8(runtime: Runtime, name: str, stepped: Audio, whole: Audio, judge: str) -> Row:
    """Its noise may be a little louder than where it was built: these are other codes, and fewer."""
    graph = runtime.bundle.graph(codecs.int8_name(runtime.graph_name))
    reached_db = Entry(dict(graph.facts), f"{graph.path}: facts").at(codecs.INT8).at("snr_db").number()
    noise_power = float(np.square(stepped - whole, dtype=np.float64).mean())
    found_db = ratio_db(float(np.square(whole, dtype=np.float64).mean()), noise_power)
    detail = (
        f"{found_db:.1f} dB above its noise against {judge}; {reached_db:.1f} in the worst second when it was built"
    )
    return Row("ok" if found_db >= reached_db - TOLERATED_LOSS_DB else "FAILED", "sound", name, detail)


def _judge_encoded_chunks(encoder: EncoderRuntime, audio: Audio, expected: Codes, chunk_frames: int) -> Row:
    name = f"{encoder.graph_name}, chunks of {chunk_frames}"
    try:
        stepped = _stepped(encoder.new_encoder(), audio, chunk_frames, encoder.format.frame_samples)
    except MossnanoError as error:
        return Row("FAILED", "sound", name, str(error))
    agreeing = float(np.mean(stepped == expected))
    detail = f"{agreeing:.2%} of {expected.size} codes are those of encode"
    return Row("ok" if agreeing >= TOLERATED_AGREEMENT else "FAILED", "sound", name, detail)
