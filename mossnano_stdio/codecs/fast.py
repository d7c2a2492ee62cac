"""The fast graph (graph/fast.py has its contract): the same decoder as `decode_step`, stepped in place.

Rules of this room:

- A code becomes a row of one table of all codebooks. Quantizers that are left out become its row of zeros, so a
  prefix needs no other graph.
- Many decoders share one FastRuntime. Each belongs to one thread at a time.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import FLOAT32, INT32, check_codes
from mossnano_stdio.codecs.engine import Engine, TensorSpec
from mossnano_stdio.codecs.in_place import Stack, StackState
from mossnano_stdio.tokens.format import CodecFormat, Codes
from mossnano_stdio.weights.folder import Bundle


class FastRuntime:
    """A loaded fast graph, shared by the decoders that it makes."""

    graph_name: Literal["fast"] = "fast"
    decodes_prefix = True

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        graph = bundle.graph("fast")
        self.precision = graph.precision
        self.stack = Stack(
            graph,
            engine,
            inputs={"rows": TensorSpec((None, self.format.quantizers), INT32)},
            outputs={"audio": TensorSpec((None, self.format.channels), FLOAT32)},
        )

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""
        return self.stack.layer_context_frames

    def new_decoder(self) -> FastDecoder:
        return FastDecoder(self)


class FastDecoder:
    """Frames in, samples out, chunk after chunk as if they came at once."""

    def __init__(self, runtime: FastRuntime) -> None:
        self.runtime = runtime
        self._stream = runtime.stack.open_stream()

    @property
    def format(self) -> CodecFormat:
        return self.runtime.format

    @property
    def decodes_prefix(self) -> bool:
        return self.runtime.decodes_prefix

    @property
    def next_frame(self) -> int:
        return self._stream.next_frame

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]. The first quantizers may come alone."""
        check_codes(codes, self.format, least_quantizers=1)
        frames, frame_samples = len(codes), self.format.frame_samples
        rows = _rows(codes, self.format)
        audio = np.empty((frames * frame_samples, self.format.channels), dtype=np.float32)
        self._stream.step(
            frames,
            lambda start, end: {"rows": rows[start:end]},
            lambda start, end: {"audio": audio[start * frame_samples : end * frame_samples]},
        )
        return audio

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        self._stream.reset(start_frame)

    def snapshot(self) -> StackState:
        return self._stream.snapshot()

    def restore(self, state: StackState) -> None:
        self._stream.restore(state)


def _rows(codes: Codes, codec: CodecFormat) -> NDArray[np.int32]:
    """Which row of the one table of all codebooks each code means; the last row for quantizers that are left out."""
    rows = np.full((len(codes), codec.quantizers), codec.quantizers * codec.codebook_size, dtype=np.int32)
    present = codes.shape[1]
    rows[:, :present] = codes + np.arange(present, dtype=np.int32) * codec.codebook_size
    return rows
