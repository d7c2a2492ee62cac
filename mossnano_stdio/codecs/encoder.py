"""Encoders: our own `encode_step`, frame after frame, and the official `encode`, a whole recording at once.

Rules of this room:

- Audio comes as float32 [samples, channels], codes leave as [frames, quantizers].
- A streaming encoder takes whole frames. A whole recording may end inside a frame, which is filled up with silence, so
  that nothing is lost; how long it was is the caller's to remember.
- A graph is trusted no further than it was checked, as in contract.py.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import FLOAT32, INT32
from mossnano_stdio.codecs.engine import Array, Engine, TensorSpec, check_contract, open_session
from mossnano_stdio.codecs.in_place import Stack
from mossnano_stdio.codecs.memory import attention_bytes, check_fits
from mossnano_stdio.codecs.stepping import ALWAYS_FITTING_FRAMES, OfficialRuntime
from mossnano_stdio.errors import BundleError, DecodeError, UsageError
from mossnano_stdio.tokens.format import CodecFormat, Codes
from mossnano_stdio.weights.folder import Bundle


class StreamEncoderRuntime:
    """A loaded `encode_step` (graph/encode_step.py has its contract), shared by the encoders that it makes."""

    graph_name: Literal["encode_step"] = "encode_step"

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        if not bundle.has_graph("encode_step"):
            raise BundleError(f"{bundle.folder}: has no streaming encoder; `mossnano build` makes one")
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        graph = bundle.graph("encode_step")
        self.path = graph.path
        self.precision = graph.precision
        self.stack = Stack(
            graph,
            engine,
            inputs={"audio": TensorSpec((None, self.format.channels), FLOAT32)},
            outputs={"codes": TensorSpec((None, self.format.quantizers), INT32)},
        )

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""
        return self.stack.layer_context_frames

    def new_encoder(self) -> StreamEncoder:
        return StreamEncoder(self)


class StreamEncoder:
    """Samples in, frames out, chunk after chunk as if they came at once."""

    def __init__(self, runtime: StreamEncoderRuntime) -> None:
        self.runtime = runtime
        self._stream = runtime.stack.open_stream()

    @property
    def format(self) -> CodecFormat:
        return self.runtime.format

    @property
    def next_frame(self) -> int:
        return self._stream.next_frame

    def step(self, audio: NDArray[np.float32]) -> Codes:
        """Whole frames of [samples, channels] -> [frames, quantizers]."""
        check_audio_in(audio, self.format)
        frame_samples = self.format.frame_samples
        frames, rest = divmod(len(audio), frame_samples)
        if rest:
            raise UsageError(f"{len(audio)} samples, allowed are whole frames of {frame_samples}")
        audio = np.ascontiguousarray(audio, dtype=np.float32)
        codes = np.empty((frames, self.format.quantizers), dtype=np.int32)
        self._stream.step(
            frames,
            lambda start, end: {"audio": audio[start * frame_samples : end * frame_samples]},
            lambda start, end: {"codes": codes[start:end]},
        )
        check_codes_out(self.runtime.path, codes, self.format)
        return codes.astype(np.uint16)

    def reset(self) -> None:
        """Forget everything: the next frame is the first of a stream."""
        self._stream.reset()


class FullEncoder:
    """A loaded `encode`. It has no state: any number of threads may share it."""

    graph_name: Literal["encode"] = "encode"

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.session = open_session(bundle.graph("encode"), engine)
        self._wave_name, self._wave_lengths_name = self.session.graph.input_names
        codes_name, code_lengths_name = self.session.graph.output_names
        check_contract(
            self.session,
            inputs={
                self._wave_name: TensorSpec((1, self.format.channels, None), FLOAT32),
                self._wave_lengths_name: TensorSpec((1,), INT32),
            },
            outputs={
                codes_name: TensorSpec((1, None, self.format.quantizers), INT32),
                code_lengths_name: TensorSpec((1,), INT32),
            },
            states=(),
        )

    def encode(self, audio: NDArray[np.float32]) -> Codes:
        """[samples, channels] -> [frames, quantizers], one frame for each that was begun."""
        check_audio_in(audio, self.format)
        whole = filled_up(audio, self.format)
        frames = len(whole) // self.format.frame_samples
        if not frames:
            return np.zeros((0, self.format.quantizers), dtype=np.uint16)
        if frames > ALWAYS_FITTING_FRAMES:
            check_fits(
                f"encoding {frames} frames as a whole",
                # The encoder mirrors the decoder, layer by layer.
                attention_bytes(self.bundle, self._tokens_per_frame, frames),
                "build a streaming encoder with `mossnano build`, which takes the same memory for every length",
            )
        feed = {
            self._wave_name: np.ascontiguousarray(whole.T, dtype=np.float32)[np.newaxis],
            self._wave_lengths_name: np.array([len(whole)], dtype=np.int32),
        }
        codes, lengths = self.session.run(self.session.graph.output_names, feed)
        self._check_codes(codes, lengths, frames)
        frame_major: Codes = codes[0].astype(np.uint16)
        return frame_major

    def _check_codes(self, codes: Array, lengths: Array, frames: int) -> None:
        shape = (1, frames, self.format.quantizers)
        if codes.shape != shape or lengths.tolist() != [frames]:
            raise DecodeError(
                f"{self.session.graph.path}: {frames} frames of audio gave codes {list(codes.shape)} "
                f"of length {lengths.tolist()}, {list(shape)} of length {[frames]} was due"
            )
        check_codes_out(self.session.graph.path, codes, self.format)

    @cached_property
    def _tokens_per_frame(self) -> dict[str, int]:
        return OfficialRuntime(self.bundle, self.engine).tokens_per_frame


def check_audio_in(audio: NDArray[np.float32], codec: CodecFormat) -> None:
    if audio.ndim != 2 or audio.shape[1] != codec.channels:
        raise UsageError(f"audio is {list(audio.shape)}, allowed is [samples, {codec.channels}]")
    if not np.isfinite(audio).all():
        raise UsageError("audio holds NaN or infinity; allowed are finite numbers")


def check_codes_out(path: Path, codes: Array, codec: CodecFormat) -> None:
    if codes.size and (codes.min() < 0 or codes.max() >= codec.codebook_size):
        raise DecodeError(
            f"{path}: gave codes from {codes.min()} to {codes.max()}, allowed are 0 to {codec.codebook_size - 1}"
        )


def filled_up(audio: NDArray[np.float32], codec: CodecFormat) -> NDArray[np.float32]:
    """The audio with silence up to the next whole frame."""
    missing = -len(audio) % codec.frame_samples
    return np.pad(audio, ((0, missing), (0, 0))) if missing else audio
