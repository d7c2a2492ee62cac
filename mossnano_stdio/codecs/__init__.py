"""The only room that speaks onnxruntime: from a weights folder to decoders and encoders that run.

Rules of this room:

- `load_runtime` loads a graph once; `runtime.new_decoder()` gives as many streams over it as are needed.
- A family of codecs is one file, moss.py for one. It offers what `Family` says, and is found by asking each.
- What no family has to itself: engine.py makes onnxruntime sessions, contract.py checks what goes in and comes out,
  stepping.py runs a graph with named states, in_place.py one whose rings are written in place, carried.py the same one
  elsewhere than on the CPU, whole.py whole files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from mossnano_stdio.chunks import RAMP_MAX_FRAMES, Decoder, Encoder, first_chunk_frames_of
from mossnano_stdio.codecs import encodec, mimi, moss
from mossnano_stdio.codecs.encodec import (
    FrameGraphEncoder,
    SegmentDecoder,
    SegmentEncoder,
    SegmentRuntime,
    refuse_segments,
)
from mossnano_stdio.codecs.engine import PROVIDERS, Engine, UnfitRuntimeError, check_provider, default_threads
from mossnano_stdio.codecs.moss import GraphName
from mossnano_stdio.codecs.precisions import INT8, PRECISIONS, PrecisionName, int8_name
from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.tokens.arrays import warm_up_frames
from mossnano_stdio.weights import Bundle

if TYPE_CHECKING:
    from mossnano_stdio.codecs.whole import FullDecoder as FullDecoder
    from mossnano_stdio.codecs.whole import FullEncoder as FullEncoder

__all__ = [
    "INT8",
    "PRECISIONS",
    "PROVIDERS",
    "EncoderRuntime",
    "Engine",
    "Family",
    "FrameGraphEncoder",
    "GraphName",
    "PrecisionName",
    "Runtime",
    "SeekingDecoder",
    "SegmentDecoder",
    "SegmentEncoder",
    "SegmentRuntime",
    "UnfitRuntimeError",
    "check_provider",
    "default_threads",
    "family_of",
    "int8_name",
    "load_decoder",
    "load_encoder",
    "load_encoder_runtime",
    "load_full_decoder",
    "load_full_encoder",
    "load_recording_encoder",
    "load_runtime",
    "load_segment_encoder",
    "maybe_warm_up_frames",
    "ramp_second_frames",
    "refuse_segments",
    "seek",
    "stepping_graphs",
]

WARM_UP_STEP_FRAMES = 8
LARGE_BYTES = 1 << 29  # of weights: a machine reads some ten times that in a second

log = logging.getLogger("mossnano")


class Family(Protocol):
    """What a family of codecs must offer. Its format, its graphs and their states are the weights folder's to say."""

    NAME: str
    STEPPING_GRAPHS: Mapping[str, GraphName | None]  # those that decode in steps, and what `graph` calls each of them

    def recognises(self, bundle: Bundle) -> bool: ...

    def load_runtime(self, bundle: Bundle, engine: Engine, graph: str | None, precision: str | None) -> Runtime: ...

    def load_encoder_runtime(self, bundle: Bundle, engine: Engine) -> EncoderRuntime: ...

    def maybe_look_back_frames(self, runtime: Runtime) -> int | None:
        """How many frames before a place decide what is heard there; None: all of them."""


class SeekingDecoder(Decoder, Protocol):
    """A Decoder that can also begin in the middle, and go back to where it was."""

    @property
    def next_frame(self) -> int:
        """Where in its stream the next frame stands."""

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""

    def snapshot(self) -> Any:
        """What the stream has left behind. It stays as it is while the decoder goes on."""

    def restore(self, state: Any) -> None:
        """Go back to a snapshot, taken from any decoder of the same runtime."""


class Runtime(Protocol):
    """A loaded graph, shared by all decoders over it."""

    bundle: Bundle
    engine: Engine
    format: CodecFormat
    precision: str

    @property
    def graph_name(self) -> str: ...

    @property
    def decodes_prefix(self) -> bool: ...

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""

    def new_decoder(self) -> SeekingDecoder:
        """A stream of its own, at its start."""


@runtime_checkable
class EncoderRuntime(Protocol):
    """A loaded streaming encoder, shared by all encoders over it."""

    bundle: Bundle
    engine: Engine
    format: CodecFormat
    precision: str

    @property
    def graph_name(self) -> str: ...

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""

    def new_encoder(self) -> Encoder:
        """A stream of its own, at its start."""


if TYPE_CHECKING:
    RecordingEncoder = EncoderRuntime | FullEncoder | SegmentEncoder | FrameGraphEncoder

FAMILIES = cast(tuple[Family, ...], (moss, mimi, encodec))


def family_of(bundle: Bundle) -> Family:
    for family in FAMILIES:
        if family.recognises(bundle):
            return family
    raise BundleError(f"{bundle.folder}: is of no codec that is known here")


def stepping_graphs(bundle: Bundle) -> Mapping[str, GraphName | None]:
    """The graphs that decode in steps, and by which choice of `graph` each is loaded; None: it is the only one."""
    return family_of(bundle).STEPPING_GRAPHS


def load_runtime(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    graph: str | None = None,
    precision: str | None = None,
    spin: bool = False,
) -> Runtime:
    """Load what decodes: by default the quickest graph that the bundle has, in float32."""
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"precision {precision!r} is not known, allowed are {' and '.join(PRECISIONS)}")
    runtime = family_of(bundle).load_runtime(bundle, Engine.of(provider, threads, spin), graph, precision)
    if precision not in (None, runtime.precision):
        raise BundleError(f"{bundle.folder}: decodes in {runtime.precision}, and {precision} was asked for")
    return runtime


def load_decoder(bundle: Bundle, **options: Any) -> SeekingDecoder:
    """A decoder with a runtime of its own, for whoever needs only one. `options` are those of `load_runtime`."""
    return load_runtime(bundle, **options).new_decoder()


def load_encoder_runtime(
    bundle: Bundle, *, provider: str = "cpu", threads: int | None = None, spin: bool = False
) -> EncoderRuntime:
    """Load what encodes frame after frame; no official bundle has that, `mossnano build` makes it."""
    return family_of(bundle).load_encoder_runtime(bundle, Engine.of(provider, threads, spin))


def load_encoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> EncoderRuntime | FullEncoder:
    """Load what encodes: frame after frame where the bundle has such a graph, else recordings as a whole."""
    if bundle.has_graph("encode_step"):
        try:
            return load_encoder_runtime(bundle, provider=provider, threads=threads)
        except UnfitRuntimeError as error:
            if not bundle.has_graph("encode"):
                raise
            log.warning("%s; recordings are encoded as a whole instead", error)
    refuse_segments(bundle)
    if not bundle.has_graph("encode"):
        raise BundleError(
            f"{bundle.folder}: has no encoder; `mossnano fetch --what encode` gets the official one, "
            "`mossnano build` makes a streaming one"
        )
    return load_full_encoder(bundle, provider=provider, threads=threads)


def load_segment_encoder(
    bundle: Bundle, *, provider: str = "cpu", threads: int | None = None
) -> SegmentEncoder | FrameGraphEncoder:
    """Segments with their scales, of a codec that knows nothing else."""
    return encodec.load_segment_encoder(bundle, Engine.of(provider, threads))


def load_recording_encoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> RecordingEncoder:
    """Load what encodes recordings, whatever the codec makes of them."""
    load = load_segment_encoder if bundle.has_graph("encode_segment") else load_encoder
    return load(bundle, provider=provider, threads=threads)


def load_full_decoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> FullDecoder:
    """The reference: whole streams at once, through `decode_full`."""
    from mossnano_stdio.codecs.whole import FullDecoder

    return FullDecoder(bundle, Engine.of(provider, threads))


def load_full_encoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> FullEncoder:
    """Whole recordings at once, through `encode`."""
    from mossnano_stdio.codecs.whole import FullEncoder

    return FullEncoder(bundle, Engine.of(provider, threads))


def maybe_warm_up_frames(runtime: Runtime, maybe_seconds: float | None = None) -> int | None:
    """How many frames before a place are decoded for what they leave behind: as many as are asked for, or else as have
    to be, to lose nothing that could be heard there. None: all of them.
    """
    if maybe_seconds is not None:
        return warm_up_frames(maybe_seconds, runtime.format.frames_per_second)
    return family_of(runtime.bundle).maybe_look_back_frames(runtime)


def ramp_second_frames(runtime: Runtime | EncoderRuntime) -> int:
    """How many frames the second chunk of a live stream should have: the fewest whose step takes no longer than they
    sound, or as many as one run takes.

    A step reads all weights, however few frames it has. Where they are many that is what it costs, so it is measured
    here, by steps of 1, 2, 4 and 8 frames. Smaller models are quicker than their sound on any machine that plays it.
    """
    name = "decode_step" if runtime.graph_name == "official" else runtime.graph_name
    graph = runtime.bundle.graph(int8_name(name) if runtime.precision == INT8 else name)
    if sum(file.path.stat().st_size for file in graph.files) < LARGE_BYTES:
        return 2
    step = _step_of_nothing(runtime)
    step(1)  # the first one is the slowest of all
    frames = 1
    while frames < RAMP_MAX_FRAMES:
        started = time.perf_counter()
        step(frames)
        if time.perf_counter() - started <= frames / runtime.format.frames_per_second:
            break
        frames *= 2
    return max(2, frames)


def _step_of_nothing(runtime: Runtime | EncoderRuntime) -> Callable[[int], object]:
    """What decodes so many frames of zeros in a new stream, or encodes so many of silence."""
    codec = runtime.format
    if isinstance(runtime, EncoderRuntime):
        encoder = runtime.new_encoder()
        return lambda frames: encoder.step(np.zeros((frames * codec.frame_samples, codec.channels), np.float32))
    decoder = runtime.new_decoder()
    return lambda frames: decoder.step(np.zeros((frames, codec.quantizers), np.uint16))


def seek(decoder: SeekingDecoder, codes: Codes, start_frame: int, maybe_warm_up: int | None) -> int:
    """Bring a decoder to `start_frame` of a stream by decoding the `maybe_warm_up` frames before it, or all (None).

    What lies further back is missing from the caches. Returns where the decoder stands: before `start_frame` only where
    a stream's first chunk would have fewer frames than the codec needs in it.
    """
    begin = 0 if maybe_warm_up is None else max(0, start_frame - maybe_warm_up)
    decoder.reset(begin)
    if start_frame - begin < first_chunk_frames_of(decoder):
        return begin
    for frame in range(begin, start_frame, WARM_UP_STEP_FRAMES):
        decoder.step(codes[frame : min(frame + WARM_UP_STEP_FRAMES, start_frame)])
    return start_frame
