"""EnCodec: convolutions around an LSTM, at 75 or 150 frames/s.

The model of 24 kHz is causal and runs frame by frame (build/encodec_steps.py has its graphs' contracts). What differs
from other graphs that step is how a stream begins and ends.

Rules of this room:

- A stream begins with its own first columns, mirrored. So its first chunk has `first_chunk_frames`, or is all of it,
  and whoever steps otherwise is told so when it goes on.
- A recording that ends inside a frame is encoded as it is: it is completed by mirroring, not by silence.
- A frame may have any number of codes from 1 on: the first so many codebooks are decoded.
- An LSTM looks back as far as its stream goes. So to begin in the middle, all of what lies before is decoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import check_audio_in
from mossnano_stdio.codecs.engine import Engine
from mossnano_stdio.codecs.moss import (
    DecodeRowsRuntime,
    FastDecoder,
    InPlaceRuntime,
    StreamEncoder,
    StreamEncoderRuntime,
)
from mossnano_stdio.codecs.rings import MAX_RUN_FRAMES
from mossnano_stdio.errors import UsageError
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import Bundle
from mossnano_stdio.weights.checked_json import Entry

NAME = "encodec"  # as `mossnano.json` calls the family, too
STEPPING_GRAPHS = {"decode_step": None}


def recognises(bundle: Bundle) -> bool:
    return bundle.sidecar.maybe_codec is not None and bundle.sidecar.maybe_codec.family == NAME


def load_runtime(bundle: Bundle, engine: Engine, graph: str | None) -> EncodecRuntime:
    if graph not in (None, EncodecRuntime.graph_name):
        raise UsageError(f"graph {graph!r} is not known, {NAME} has one graph that decodes; leave the choice out")
    return EncodecRuntime(bundle, engine)


def load_encoder_runtime(bundle: Bundle, engine: Engine) -> EncodecEncoderRuntime:
    return EncodecEncoderRuntime(bundle, engine)


def maybe_look_back_frames(runtime: EncodecRuntime) -> int | None:
    return None


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


def _first_chunk_frames(runtime: InPlaceRuntime) -> int:
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
