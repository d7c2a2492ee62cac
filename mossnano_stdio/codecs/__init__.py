"""The only room that speaks onnxruntime: from a bundle to decoders and encoders that run.

Rules of this room:

- `load_runtime` loads a graph once; `runtime.new_decoder()` gives as many streams over it as are needed.
- A bundle's fast graph is taken where there is one, else the official `decode_step`; both give the same sound.
- Modules in here import each other, nobody else imports them: what others need is named here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from mossnano_stdio.chunks import Decoder, Encoder
from mossnano_stdio.codecs.engine import PROVIDERS, Engine, UnfitRuntimeError, default_threads
from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.tokens.arrays import warm_up_frames
from mossnano_stdio.tokens.format import CodecFormat, Codes
from mossnano_stdio.weights.folder import Bundle

if TYPE_CHECKING:
    from mossnano_stdio.codecs.encoder import FullEncoder as FullEncoder
    from mossnano_stdio.codecs.stepping import FullDecoder as FullDecoder

__all__ = [
    "PROVIDERS",
    "EncoderRuntime",
    "Engine",
    "GraphName",
    "Runtime",
    "StreamDecoder",
    "UnfitRuntimeError",
    "default_threads",
    "load_decoder",
    "load_encoder",
    "load_encoder_runtime",
    "load_full_decoder",
    "load_full_encoder",
    "load_runtime",
    "maybe_warm_up_frames",
    "seek",
]

log = logging.getLogger("mossnano")

GraphName = Literal["official", "fast"]

WARM_UP_STEP_FRAMES = 8


class StreamDecoder(Decoder, Protocol):
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
    def graph_name(self) -> GraphName: ...

    @property
    def decodes_prefix(self) -> bool: ...

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""

    def new_decoder(self) -> StreamDecoder:
        """A stream of its own, at its start."""


@runtime_checkable
class EncoderRuntime(Protocol):
    """A loaded streaming encoder, shared by all encoders over it."""

    bundle: Bundle
    engine: Engine
    format: CodecFormat
    precision: str

    @property
    def graph_name(self) -> Literal["encode_step"]: ...

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""

    def new_encoder(self) -> Encoder:
        """A stream of its own, at its start."""


def load_runtime(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    graph: GraphName | None = None,
    spin: bool = False,
) -> Runtime:
    """Load what decodes: by default the fast graph where the bundle has it, else the official one."""
    from mossnano_stdio.codecs.fast import FastRuntime
    from mossnano_stdio.codecs.stepping import OfficialRuntime

    if graph not in (None, *get_args(GraphName)):
        raise UsageError(f"graph {graph!r} is not known, allowed are {' and '.join(get_args(GraphName))}")
    engine = Engine.of(provider, threads, spin)
    if graph == "fast":
        if not bundle.has_graph("fast"):
            raise BundleError(f"{bundle.folder}: has no fast graph; `mossnano build` makes one")
        return FastRuntime(bundle, engine)
    if graph is None and provider == "cpu" and "fast" in bundle.graphs:
        try:
            return FastRuntime(bundle, engine)
        except UnfitRuntimeError as error:
            log.warning("%s; the official graph runs instead", error)
    return OfficialRuntime(bundle, engine)


def maybe_warm_up_frames(runtime: Runtime, maybe_seconds: float | None = None) -> int | None:
    """How many frames before a place are decoded for what they leave behind: as many as are asked for, or else as have
    to be, to lose nothing that could be heard there. None: all of them.

    Each layer looks back from where the one after it does, so it is the sum of what all look back. The demo is no such
    model: its tones go on from where they were, since the start.
    """
    if maybe_seconds is not None:
        return warm_up_frames(maybe_seconds, runtime.format.frames_per_second)
    return None if runtime.bundle.demo else sum(runtime.layer_context_frames)


def seek(decoder: StreamDecoder, codes: Codes, start_frame: int, maybe_warm_up: int | None) -> None:
    """Bring a decoder to `start_frame` of a stream by decoding the `maybe_warm_up` frames before it, or all (None).

    What lies further back is missing from the caches.
    """
    begin = 0 if maybe_warm_up is None else max(0, start_frame - maybe_warm_up)
    decoder.reset(begin)
    for frame in range(begin, start_frame, WARM_UP_STEP_FRAMES):
        decoder.step(codes[frame : min(frame + WARM_UP_STEP_FRAMES, start_frame)])


def load_decoder(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    graph: GraphName | None = None,
    spin: bool = False,
) -> StreamDecoder:
    """A decoder with a runtime of its own, for whoever needs only one."""
    return load_runtime(bundle, provider=provider, threads=threads, graph=graph, spin=spin).new_decoder()


def load_encoder_runtime(
    bundle: Bundle, *, provider: str = "cpu", threads: int | None = None, spin: bool = False
) -> EncoderRuntime:
    """Load what encodes frame after frame; no official bundle has that, `mossnano build` makes it."""
    from mossnano_stdio.codecs.encoder import StreamEncoderRuntime

    return StreamEncoderRuntime(bundle, Engine.of(provider, threads, spin))


def load_encoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> EncoderRuntime | FullEncoder:
    """Load what encodes: frame after frame where the bundle has such a graph, else recordings as a whole."""
    if provider == "cpu" and bundle.has_graph("encode_step"):
        try:
            return load_encoder_runtime(bundle, provider=provider, threads=threads)
        except UnfitRuntimeError as error:
            log.warning("%s; recordings are encoded as a whole instead", error)
    if not bundle.has_graph("encode"):
        raise BundleError(
            f"{bundle.folder}: has no encoder; `mossnano fetch --what encode` gets the official one, "
            "`mossnano build` makes a streaming one"
        )
    return load_full_encoder(bundle, provider=provider, threads=threads)


def load_full_decoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> FullDecoder:
    """The reference: whole streams at once, through `decode_full`."""
    from mossnano_stdio.codecs.stepping import FullDecoder

    return FullDecoder(bundle, Engine.of(provider, threads))


def load_full_encoder(bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> FullEncoder:
    """Whole recordings at once, through `encode`."""
    from mossnano_stdio.codecs.encoder import FullEncoder

    return FullEncoder(bundle, Engine.of(provider, threads))
