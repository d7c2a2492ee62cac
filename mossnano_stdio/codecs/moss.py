"""MOSS-Audio-Tokenizer: transformers over frames of codes, each with a window, and nothing else that remembers.

Its published `decode_step` is stepped with its states by name. The graphs that we build from the same weights step
their rings in place on the CPU, and carry them along elsewhere: `fast` decodes, `encode_step` encodes (build/ has their
contracts).

Rules of this room:

- Many decoders share one runtime. Each belongs to one thread at a time.
- In the fast graph a code is a row of one table of all codebooks. Quantizers that are left out become its row of zeros,
  so a prefix needs no other graph.
- Audio comes as float32 [samples, channels], codes leave as [frames, quantizers].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import (
    FLOAT32,
    INT32,
    check_audio,
    check_audio_in,
    check_codes,
    check_codes_out,
    check_decode_contract,
    codes_feed,
    joined,
)
from mossnano_stdio.codecs.engine import Engine, TensorSpec, UnfitRuntimeError, open_session
from mossnano_stdio.codecs.in_place import InPlaceGraph
from mossnano_stdio.codecs.precisions import INT8, check_has_int8, int8_name
from mossnano_stdio.codecs.rings import context_frames
from mossnano_stdio.codecs.stepping import GraphState, run_step
from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.weights import Bundle

if TYPE_CHECKING:
    from mossnano_stdio.codecs.carried import CarriedGraph

ROUNDED_FRAMES = 1000  # 80 s, in which the official graph's float32 positions cost less than a 16-bit step
MAX_RUN_FRAMES = 8  # more frames in one run cost more per frame, not less

# Of the longest context. In stand-ins of 68 layers, as the 24 kHz member has, whose contexts add up to 68 of it, the
# error was 18 steps of 16 bits after 7 of them, and from 10 on no larger than float32 rounds: 0.04.
LOOK_BACK_CONTEXTS = 16

GraphName = Literal["official", "fast"]

log = logging.getLogger("mossnano")


# --- what a family offers ----------------------------------------------------------------------------------------

NAME = "MOSS-Audio-Tokenizer"
STEPPING_GRAPHS: Mapping[str, GraphName] = {"decode_step": "official", "fast": "fast"}


def recognises(bundle: Bundle) -> bool:
    """It is so far the only family that has official metadata. A folder may hold some of its graphs only."""
    return bundle.sidecar.maybe_codec is None and bool(
        bundle.graphs.keys() & {"decode_step", "fast", "encode", "encode_step"}
    )


def load_runtime(
    bundle: Bundle, engine: Engine, graph: str | None, precision: str | None
) -> OfficialRuntime | FastRuntime:
    """By default the fast graph where the bundle has it, else the official one; both give the same sound."""
    if graph not in (None, *get_args(GraphName)):
        raise UsageError(f"graph {graph!r} is not known, allowed are {' and '.join(get_args(GraphName))}")
    if precision == INT8:
        if graph == "official":
            raise UsageError("the official graph has no int8; leave the graph out, or int8")
        check_has_int8(bundle, "fast")
        return FastRuntime(bundle, engine, INT8)
    if graph == "fast":
        if not bundle.has_graph("fast"):
            raise BundleError(f"{bundle.folder}: has no fast graph; `mossnano build` makes one")
        return FastRuntime(bundle, engine)
    if graph is None and "fast" in bundle.graphs:
        try:
            return FastRuntime(bundle, engine)
        except UnfitRuntimeError as error:
            if not bundle.has_graph("decode_step"):
                raise
            log.warning("%s; the official graph runs instead", error)
    if "decode_step" not in bundle.graphs:
        what = "official graph" if "fast" in bundle.graphs else "decoder"
        raise BundleError(f"{bundle.folder}: has no {what}; `mossnano build` makes one of a checkpoint")
    return OfficialRuntime(bundle, engine)


def load_encoder_runtime(bundle: Bundle, engine: Engine) -> StreamEncoderRuntime:
    return StreamEncoderRuntime(bundle, engine)


def maybe_look_back_frames(runtime: OfficialRuntime | FastRuntime) -> int | None:
    """Each layer looks back from where the one after it does, so nothing lies further back than all contexts together.

    Of many layers each adds little to what it is given, so less is heard than their sum says. LOOK_BACK_CONTEXTS are
    enough to be within half a step of 16 bits; nano's sum is less anyway. The demo is no such model: its tones go on
    from where they were, since the start.
    """
    contexts = runtime.layer_context_frames
    return None if runtime.bundle.demo else min(sum(contexts), LOOK_BACK_CONTEXTS * max(contexts))


# --- the published graph -----------------------------------------------------------------------------------------


class OfficialRuntime:
    """A loaded `decode_step`, shared by the decoders that it makes."""

    graph_name: Literal["official"] = "official"
    decodes_prefix = False  # its inputs are as wide as the codec has quantizers

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.session = open_session(bundle.graph("decode_step"), engine)
        self.states = self.session.graph.states
        self.precision = self.session.graph.precision
        check_decode_contract(self.session, self.format)

    def new_decoder(self) -> OfficialDecoder:
        return OfficialDecoder(self)

    @cached_property
    def layer_context_frames(self) -> tuple[int, ...]:
        tokens_per_frame = self.tokens_per_frame
        return tuple(
            math.ceil(cache.context_tokens / tokens_per_frame[cache.offset_input_name]) for cache in self.bundle.caches
        )

    @cached_property
    def tokens_per_frame(self) -> dict[str, int]:
        """By the name of each counter's input: what one frame adds to it, found by decoding one."""
        decoder = self.new_decoder()
        decoder.step(np.zeros((1, self.format.quantizers), dtype=np.uint16))
        counted = decoder.snapshot().tensors
        return {
            state.input_name: int(counted[state.input_name].flat[0]) for state in self.states if state.shape == (1,)
        }


class OfficialDecoder:
    """Frames in, samples out, chunk after chunk as if they came at once."""

    def __init__(self, runtime: OfficialRuntime) -> None:
        self.runtime = runtime
        self._state = GraphState.initial(runtime.states)

    @property
    def format(self) -> CodecFormat:
        return self.runtime.format

    @property
    def decodes_prefix(self) -> bool:
        return self.runtime.decodes_prefix

    @property
    def next_frame(self) -> int:
        return self._state.next_frame

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]."""
        check_codes(codes, self.format)
        state = self._state
        pieces = []
        for start in range(0, len(codes), MAX_RUN_FRAMES):
            audio, state = self._run(codes[start : start + MAX_RUN_FRAMES], state)
            pieces.append(audio)
        self._state = state
        return joined(pieces, self.format)

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        state = GraphState.initial(self.runtime.states)
        self._state = state.starting_at(start_frame, self.runtime.tokens_per_frame) if start_frame else state

    def snapshot(self) -> GraphState:
        return self._state

    def restore(self, state: GraphState) -> None:
        self._state = state

    def _run(self, codes: Codes, state: GraphState) -> tuple[NDArray[np.float32], GraphState]:
        session = self.runtime.session
        (audio, lengths), state = run_step(session, codes_feed(session, codes), state, len(codes))
        check_audio(session, audio, lengths, len(codes), self.format)
        return audio[0].T, state


# --- ours --------------------------------------------------------------------------------------------------------


class OwnGraphRuntime:
    """A loaded graph of ours, shared by the decoders, or encoders, that it makes."""

    graph_name: str
    rounded_frames = ROUNDED_FRAMES

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        precision: str = "float32",
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        if precision == INT8 and engine.provider != "cpu":
            raise UsageError(
                f"{bundle.folder}: its int8 graph runs on provider 'cpu' only; on {engine.provider!r} leave int8 out"
            )
        graph = bundle.graph(int8_name(self.graph_name) if precision == INT8 else self.graph_name)
        self.path = graph.path
        self.precision = graph.precision
        parts = (graph, engine, inputs, outputs, self.rounded_frames)
        self.stack: InPlaceGraph | CarriedGraph
        if engine.provider == "cpu":
            self.stack = InPlaceGraph(*parts)
        else:
            from mossnano_stdio.codecs.carried import CarriedGraph  # milliseconds that no start on the CPU needs

            self.stack = CarriedGraph(*parts)

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""
        return context_frames(self.stack.specs)


class DecodeRowsRuntime(OwnGraphRuntime):
    """A graph that decodes."""

    decodes_prefix = True

    def __init__(self, bundle: Bundle, engine: Engine, precision: str = "float32") -> None:
        super().__init__(
            bundle,
            engine,
            inputs={"rows": TensorSpec((None, bundle.format.quantizers), INT32)},
            outputs={"audio": TensorSpec((None, bundle.format.channels), FLOAT32)},
            precision=precision,
        )

    def new_decoder(self) -> FastDecoder:
        return FastDecoder(self)


class FastRuntime(DecodeRowsRuntime):
    """The quickest graph of this family."""

    graph_name = "fast"


class StreamEncoderRuntime(OwnGraphRuntime):
    """The graph that encodes (build/encode_step.py has its contract)."""

    graph_name = "encode_step"

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        if not bundle.has_graph("encode_step"):
            raise BundleError(f"{bundle.folder}: has no streaming encoder; `mossnano build` makes one")
        super().__init__(
            bundle,
            engine,
            inputs={"audio": TensorSpec((None, bundle.format.channels), FLOAT32)},
            outputs={"codes": TensorSpec((None, bundle.format.quantizers), INT32)},
        )

    def new_encoder(self) -> StreamEncoder:
        return StreamEncoder(self)


class OwnGraphSteps:
    """One stream over such a graph, chunk after chunk as if they came at once."""

    def __init__(self, runtime: OwnGraphRuntime) -> None:
        self.runtime = runtime
        self.format = runtime.format
        self._stream = runtime.stack.open_stream()

    @property
    def next_frame(self) -> int:
        return self._stream.next_frame

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        self._stream.reset(start_frame)

    def snapshot(self) -> Any:
        return self._stream.snapshot()

    def restore(self, state: Any) -> None:
        self._stream.restore(state)


class FastDecoder(OwnGraphSteps):
    """Frames in, samples out."""

    decodes_prefix = True

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]. The first quantizers may come alone."""
        check_codes(codes, self.format, least_quantizers=1)
        frames, frame_samples = len(codes), self.format.frame_samples
        rows = table_rows(codes, self.format)
        audio = np.empty((frames * frame_samples, self.format.channels), dtype=np.float32)
        self._stream.step(
            frames,
            lambda start, end: {"rows": rows[start:end]},
            lambda start, end: {"audio": audio[start * frame_samples : end * frame_samples]},
        )
        return audio


def table_rows(codes: Codes, codec: CodecFormat) -> NDArray[np.int32]:
    """Which row of the one table of all codebooks each code means; the last row for quantizers that are left out."""
    rows = np.full((len(codes), codec.quantizers), codec.quantizers * codec.codebook_size, dtype=np.int32)
    present = codes.shape[1]
    rows[:, :present] = codes + np.arange(present, dtype=np.int32) * codec.codebook_size
    return rows


class StreamEncoder(OwnGraphSteps):
    """Samples in, frames out."""

    def step(self, audio: NDArray[np.float32]) -> Codes:
        """Whole frames of [samples, channels] -> [frames, quantizers]."""
        check_audio_in(audio, self.format)
        frame_samples = self.format.frame_samples
        frames, rest = divmod(len(audio), frame_samples)
        if rest:
            raise UsageError(f"{len(audio)} samples, allowed are whole frames of {frame_samples}")
        return self._encoded(audio, frames)

    def _encoded(self, audio: NDArray[np.float32], frames: int) -> Codes:
        frame_samples = self.format.frame_samples
        audio = np.ascontiguousarray(audio, dtype=np.float32)
        codes = np.empty((frames, self.format.quantizers), dtype=np.int32)
        self._stream.step(
            frames,
            lambda start, end: {"audio": audio[start * frame_samples : end * frame_samples]},
            lambda start, end: {"codes": codes[start:end]},
        )
        check_codes_out(self.runtime.path, codes, self.format)
        return codes.astype(np.uint16)
