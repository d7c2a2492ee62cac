"""EnCodec: convolutions around an LSTM, at 75 or 150 frames/s.

The model of 24 kHz is causal and runs frame by frame (build/encodec_steps.py has its graphs' contracts). What differs
from other graphs that step is how a stream begins and ends. The model of 48 kHz looks ahead: it codes segments of a
second (build/encodec_whole.py), each by itself, which overlap.

Rules of this room:

- A stream begins with its own first columns, mirrored. So its first chunk has `first_chunk_frames`, or is all of it,
  and whoever steps otherwise is told so when it goes on.
- A recording that ends inside a frame is encoded as it is: it is completed by mirroring, not by silence.
- A frame may have any number of codes from 1 on: the first so many codebooks are decoded.
- An LSTM looks back as far as its stream goes. So to begin in the middle, all of what lies before is decoded.
- A segment has a scale, by which its sound is multiplied, and which is no code. So frames of codes alone, as they come
  in TOKENS and in a `.mossnano`, are not decoded by a model that has segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import FLOAT32, INT32, check_audio_in, check_codes, check_codes_out
from mossnano_stdio.codecs.engine import Array, Engine, TensorSpec, check_contract, open_session
from mossnano_stdio.codecs.moss import (
    DecodeRowsRuntime,
    FastDecoder,
    OwnGraphRuntime,
    StreamEncoder,
    StreamEncoderRuntime,
    table_rows,
)
from mossnano_stdio.codecs.rings import MAX_RUN_FRAMES
from mossnano_stdio.errors import BundleError, DecodeError, UsageError
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.weights import Bundle, Graph
from mossnano_stdio.weights.checked_json import Entry

NAME = "encodec"  # as `mossnano.json` calls the family, too
STEPPING_GRAPHS = {"decode_step": None, "decode_segment": None}  # a bundle has one of them
INT64 = np.dtype(np.int64)
LEAST_SCALE = 1e-8  # what silence is divided by


def recognises(bundle: Bundle) -> bool:
    return bundle.sidecar.maybe_codec is not None and bundle.sidecar.maybe_codec.family == NAME


def load_runtime(
    bundle: Bundle, engine: Engine, graph: str | None, precision: str | None
) -> EncodecRuntime | SegmentRuntime:
    """There is one graph of each, so `precision` must be what it has."""
    if graph is not None:
        raise UsageError(f"graph {graph!r} is not known, {NAME} has one graph that decodes; leave the choice out")
    if (maybe_graph := bundle.graphs.get("decode_segment")) is not None:
        return (FrameGraphRuntime if _is_frame_graph(maybe_graph) else SegmentRuntime)(bundle, engine)
    return EncodecRuntime(bundle, engine)


def load_segment_encoder(bundle: Bundle, engine: Engine) -> SegmentEncoder | FrameGraphEncoder:
    graph = bundle.graph("encode_segment")
    return (FrameGraphEncoder if _is_frame_graph(graph) else SegmentEncoder)(bundle, engine)


def load_encoder_runtime(bundle: Bundle, engine: Engine) -> EncodecEncoderRuntime:
    refuse_segments(bundle)
    return EncodecEncoderRuntime(bundle, engine)


def refuse_segments(bundle: Bundle) -> None:
    """For whoever knows frames of codes only."""
    if bundle.graphs.keys() & {"decode_segment", "encode_segment"}:
        raise BundleError(
            f"{bundle.folder}: this codec knows segments of a second, each with a scale, which codes alone do not "
            "hold; `mossnano encode` and `mossnano decode` write and read them in .ecdc files"
        )


def maybe_look_back_frames(runtime: Any) -> int | None:
    return None


# --- frame by frame ----------------------------------------------------------------------------------------------


class EncodecRuntime(DecodeRowsRuntime):
    """The graph that decodes."""

    graph_name = "decode_step"
    rounded_frames = 0  # it has no transformers

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        super().__init__(bundle, engine)
        self.first_chunk_frames = _first_chunk_frames(self)

    def new_decoder(self) -> EncodecDecoder:
        return EncodecDecoder(self)


class EncodecEncoderRuntime(StreamEncoderRuntime):
    """The graph that encodes."""

    rounded_frames = 0

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        super().__init__(bundle, engine)
        self.first_chunk_frames = _first_chunk_frames(self)

    def new_encoder(self) -> EncodecEncoder:
        return EncodecEncoder(self)


def _first_chunk_frames(runtime: OwnGraphRuntime) -> int:
    graph = runtime.bundle.graphs[runtime.graph_name]
    # Not more than one run takes: the first run mirrors what it is given.
    return Entry(dict(graph.facts), f"{graph.path}: facts").at("first_chunk_frames").whole(1, MAX_RUN_FRAMES)


class EncodecDecoder(FastDecoder):
    """Frames in, samples out."""

    def __init__(self, runtime: EncodecRuntime) -> None:
        super().__init__(runtime)
        self.first_chunk_frames = runtime.first_chunk_frames

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]. The first quantizers may come alone."""
        _check_goes_on(self._stream.seen_frames, self.first_chunk_frames)
        return super().step(codes)


class EncodecEncoder(StreamEncoder):
    """Samples in, frames out."""

    completes_frames = True

    def __init__(self, runtime: EncodecEncoderRuntime) -> None:
        super().__init__(runtime)
        self.first_chunk_frames = runtime.first_chunk_frames
        self._has_ended = False

    def step(self, audio: NDArray[np.float32]) -> Codes:
        """[samples, channels] -> [frames, quantizers]. Samples that are no whole frames are a stream's last."""
        check_audio_in(audio, self.format)
        if self._has_ended:
            raise UsageError("this stream has ended inside a frame, so nothing can follow; reset it to begin another")
        _check_goes_on(self._stream.seen_frames, self.first_chunk_frames)
        codes = self._encoded(audio, -(-len(audio) // self.format.frame_samples))
        self._has_ended = len(audio) % self.format.frame_samples > 0
        return codes

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        super().reset(start_frame)
        self._has_ended = False

    def restore(self, state: Any) -> None:
        super().restore(state)
        self._has_ended = False


def _check_goes_on(seen_frames: int, first_chunk_frames: int) -> None:
    if 0 < seen_frames < first_chunk_frames:
        raise UsageError(
            f"this stream began with {seen_frames} frames, as if they were all; one that goes on begins with "
            f"{first_chunk_frames} or more"
        )


# --- a segment at a time -----------------------------------------------------------------------------------------


class _SegmentGraph:
    """A loaded graph over whole segments. It has no state: any number of threads may share it."""

    graph_name: str

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format: CodecFormat = bundle.format
        graph = bundle.graph(self.graph_name)
        self.precision = graph.precision
        self.session = open_session(graph, engine)
        facts = Entry(dict(graph.facts), f"{graph.path}: facts")
        self.segment_samples = facts.at("segment_samples").whole(least=1)
        self.segment_stride = facts.at("segment_stride").whole(1, self.segment_samples)
        check_contract(self.session, *self._contract(), ())

    def _contract(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Inputs and outputs."""
        audio = {"audio": TensorSpec((None, self.format.channels), FLOAT32)}
        rows, codes = ({name: TensorSpec((None, self.format.quantizers), INT32)} for name in ("rows", "codes"))
        return (rows, audio) if self.graph_name == "decode_segment" else (audio, codes)

    def _frames_of(self, samples: int) -> int:
        return -(-samples // self.format.frame_samples)

    def _checked(self, made: NDArray[Any], due: tuple[int, ...], given: str) -> NDArray[Any]:
        if made.shape != due:
            raise DecodeError(f"{self.session.graph.path}: {given} gave {list(made.shape)}, {list(due)} was due")
        return made

    @property
    def segment_frames(self) -> int:
        return -(-self.segment_samples // self.format.frame_samples)


class SegmentRuntime(_SegmentGraph):
    """The graph that decodes."""

    graph_name = "decode_segment"
    decodes_prefix = True
    takes_longer = True  # segments than EnCodec's own, as other tools cut them
    layer_context_frames: tuple[int, ...] = ()

    def new_decoder(self) -> SegmentDecoder:
        return SegmentDecoder(self)

    def decode(self, codes: Codes, scale: float) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]."""
        (audio,) = self.session.run(["audio"], {"rows": table_rows(codes, self.format)})
        due = (len(codes) * self.format.frame_samples, self.format.channels)
        scaled: NDArray[np.float32] = self._checked(audio, due, f"{len(codes)} frames") * np.float32(scale)
        return scaled


class SegmentDecoder:
    """Segments in, their sound out. Whoever overlaps them knows in which order they come."""

    next_frame = 0

    def __init__(self, runtime: SegmentRuntime) -> None:
        self.runtime = runtime
        self.format = runtime.format
        self.decodes_prefix = runtime.decodes_prefix
        self.segment_stride = runtime.segment_stride
        self.first_chunk_frames = self.segment_frames = runtime.segment_frames

    def decode_segment(self, codes: Codes, scale: float) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]. The first quantizers may come alone."""
        check_codes(codes, self.format, least_quantizers=1 if self.decodes_prefix else None)
        if len(codes) > self.segment_frames and not self.runtime.takes_longer:
            raise UsageError(f"a segment of {len(codes)} frames, allowed are up to {self.segment_frames}")
        return self.runtime.decode(codes, scale)

    def step(self, codes: Codes) -> NoReturn:
        raise UsageError(
            "this codec decodes whole segments with their scales, as an .ecdc has them; frames of codes alone have none"
        )

    def reset(self, start_frame: int = 0) -> None:
        """Does nothing: no segment leaves anything to the next one."""

    def snapshot(self) -> None:
        """Nothing is left behind."""

    def restore(self, state: Any) -> None:
        """Does nothing, as `reset`."""


class SegmentEncoder(_SegmentGraph):
    """The graph that encodes."""

    graph_name = "encode_segment"

    def encode_segment(self, audio: NDArray[np.float32]) -> tuple[Codes, float]:
        """[samples, channels] -> [frames, quantizers], one frame for each that is begun, and the segment's scale."""
        check_audio_in(audio, self.format)
        mono = audio.mean(axis=1, dtype=np.float32)
        scale = np.float32(np.sqrt(np.mean(np.square(mono), dtype=np.float32)) + np.float32(LEAST_SCALE))
        levelled = np.ascontiguousarray(audio / scale, np.float32)
        (codes,) = self.session.run(["codes"], {"audio": levelled})
        self._checked(codes, (self._frames_of(len(audio)), self.format.quantizers), f"{len(audio)} samples")
        check_codes_out(self.session.graph.path, codes, self.format)
        return codes.astype(np.uint16), float(scale)


# --- somebody else's graphs over segments of one length ----------------------------------------------------------

FRAME_GRAPH = "frame graph"  # as `contract` in a graph's facts says


def _is_frame_graph(graph: Graph) -> bool:
    return Entry(dict(graph.facts), f"{graph.path}: facts").text_at("contract", default="") == FRAME_GRAPH


class FrameGraphRuntime(SegmentRuntime):
    """encodec-rs's graph that decodes: int64 codes [1, quantizers, frames] and a scale -> audio [1, channels, samples].

    Its length is fixed. Codes 0 fill up a shorter segment, and as a norm sees all of it, that sounds a little otherwise
    than what EnCodec's own tool makes of it.
    """

    decodes_prefix = False
    takes_longer = False

    def _contract(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        codes, scale = _names(self, self.session.inputs, 2)
        (audio,) = _names(self, self.session.outputs, 1)
        wide = TensorSpec((None, self.format.quantizers, self.segment_frames), INT64)
        sound = TensorSpec((None, self.format.channels, self.segment_samples), FLOAT32)
        return {codes: wide, scale: TensorSpec((None, 1), FLOAT32)}, {audio: sound}

    def decode(self, codes: Codes, scale: float) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]."""
        wide = np.zeros((1, self.format.quantizers, self.segment_frames), np.int64)
        wide[0, :, : len(codes)] = codes.T
        arrays: tuple[Array, ...] = (wide, np.full((1, 1), scale, np.float32))
        feed = dict(zip(self.session.inputs, arrays, strict=True))
        (audio,) = self.session.run([*self.session.outputs], feed)
        due = (1, self.format.channels, self.segment_samples)
        sound: NDArray[np.float32] = self._checked(audio, due, f"{self.segment_frames} frames")[0].T
        return sound[: len(codes) * self.format.frame_samples]


class FrameGraphEncoder(_SegmentGraph):
    """encodec-rs's graph that encodes: audio [1, channels, samples] -> codes [1, quantizers, frames] and the scale.

    Silence fills up a shorter segment, its scale included, so that its codes are not those of EnCodec's own tool.
    """

    graph_name = "encode_segment"

    def _contract(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        (audio,) = _names(self, self.session.inputs, 1)
        codes, scale = _names(self, self.session.outputs, 2)
        sound = TensorSpec((None, self.format.channels, self.segment_samples), FLOAT32)
        wide = TensorSpec((None, self.format.quantizers, self.segment_frames), INT64)
        return {audio: sound}, {codes: wide, scale: TensorSpec((None, 1), FLOAT32)}

    def encode_segment(self, audio: NDArray[np.float32]) -> tuple[Codes, float]:
        """[samples, channels] -> [frames, quantizers], one frame for each that is begun, and the segment's scale."""
        check_audio_in(audio, self.format)
        whole = np.zeros((1, self.format.channels, self.segment_samples), np.float32)
        whole[0, :, : len(audio)] = audio.T
        codes, scale = self.session.run([*self.session.outputs], dict.fromkeys(self.session.inputs, whole))
        self._checked(codes, (1, self.format.quantizers, self.segment_frames), f"{self.segment_samples} samples")
        check_codes_out(self.session.graph.path, codes, self.format)
        frames = codes[0].T[: self._frames_of(len(audio))]
        return np.ascontiguousarray(frames, np.uint16), float(self._checked(scale, (1, 1), "a segment")[0, 0])


def _names(graph: _SegmentGraph, found: Mapping[str, TensorSpec], count: int) -> tuple[str, ...]:
    """They are told by their places, as their maker tells them."""
    if len(found) != count:
        raise BundleError(f"{graph.session.graph.path}: has {len(found)} inputs or outputs where {count} are needed")
    return tuple(found)
