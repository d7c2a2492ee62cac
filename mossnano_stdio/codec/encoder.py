"""The official `encode` graph: a whole recording at once.

Rules of this room:

- Audio comes as float32 [samples, channels], codes leave as [frames, quantizers]. A last frame that is not full is
  filled up with silence, so that nothing of the recording is lost; how long it was is the caller's to remember.
- A graph is trusted no further than it was checked, as in contract.py.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.bundle import Bundle
from mossnano_stdio.codec.contract import FLOAT32, INT32
from mossnano_stdio.codec.memory import attention_bytes, check_fits
from mossnano_stdio.codec.official import ALWAYS_FITTING_FRAMES, OfficialRuntime
from mossnano_stdio.codec.runtime import Array, Engine, TensorSpec, check_contract, open_session
from mossnano_stdio.errors import DecodeError, UsageError
from mossnano_stdio.layout import CodecFormat, Codes


class FullEncoder:
    """A loaded `encode`. It has no state: any number of threads may share it."""

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
        shape, codec = (1, frames, self.format.quantizers), self.format
        if codes.shape != shape or lengths.tolist() != [frames]:
            raise DecodeError(
                f"{self.session.graph.path}: {frames} frames of audio gave codes {list(codes.shape)} "
                f"of length {lengths.tolist()}, {list(shape)} of length {[frames]} was due"
            )
        if codes.min() < 0 or codes.max() >= codec.codebook_size:
            raise DecodeError(
                f"{self.session.graph.path}: gave codes from {codes.min()} to {codes.max()}, "
                f"allowed are 0 to {codec.codebook_size - 1}"
            )

    @cached_property
    def _tokens_per_frame(self) -> dict[str, int]:
        return OfficialRuntime(self.bundle, self.engine).tokens_per_frame


def check_audio_in(audio: NDArray[np.float32], codec: CodecFormat) -> None:
    if audio.ndim != 2 or audio.shape[1] != codec.channels:
        raise UsageError(f"audio is {list(audio.shape)}, allowed is [samples, {codec.channels}]")
    if not np.isfinite(audio).all():
        raise UsageError("audio holds NaN or infinity; allowed are finite numbers")


def filled_up(audio: NDArray[np.float32], codec: CodecFormat) -> NDArray[np.float32]:
    """The audio with silence up to the next whole frame."""
    missing = -len(audio) % codec.frame_samples
    return np.pad(audio, ((0, missing), (0, 0))) if missing else audio
