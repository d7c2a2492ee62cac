"""EnCodec over all columns at once, recordings of a causal model and segments of one that is not.

    decode_full, encode     of a causal model, with the official contract's inputs and outputs

    decode_segment
    rows       int32 [frames, quantizers]   row of each code in one table of all codebooks; the last row is all zeros
    audio      float32 [samples, channels]  not yet multiplied by the segment's scale

    encode_segment
    audio      float32 [samples, channels]  divided by the segment's scale
    codes      int32 [frames, quantizers]

Rules of this room:

- Columns lie as [1, channels, columns], and convolutions are the runtime's own. So these graphs share no arithmetic
  with the steps of encodec_steps.py, which are held against them.
- Where columns are too few to be mirrored, zeros are put behind them first, and cut off after it.
- A stride that does not divide the columns is completed by mirrored ones, so a recording may end inside a frame.
- A norm sees what is cut off a transposed convolution, as it did in training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mossnano_stdio.build.blocks import INT32, elu, lstm_weights
from mossnano_stdio.build.builder import DataFile, GraphBuilder, open_data
from mossnano_stdio.build.encodec_model import (
    EncodecModule,
    EncodecWeights,
    LstmStack,
    MirroredConv,
    SegmentNorm,
    ShortcutBlock,
    SpreadingConv,
)
from mossnano_stdio.build.model import Array
from mossnano_stdio.weights import DECODE_INPUTS, DECODE_OUTPUTS, ENCODE_INPUTS, ENCODE_OUTPUTS, GraphSpec

DECODE_WHOLE_FILE = "encodec_decode_full.onnx"
DECODE_WHOLE_DATA = "encodec_decode_full.data"
ENCODE_WHOLE_FILE = "encodec_encode.onnx"
ENCODE_WHOLE_DATA = "encodec_encode.data"
DECODE_SEGMENT_FILE = "encodec_decode_segment.onnx"
DECODE_SEGMENT_DATA = "encodec_decode_segment.data"
ENCODE_SEGMENT_FILE = "encodec_encode_segment.onnx"
ENCODE_SEGMENT_DATA = "encodec_encode_segment.data"
NORM_EPSILON = 1e-5


def save_encodec_whole_decode(folder: Path, weights: EncodecWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / DECODE_WHOLE_DATA) as data:
        graph, codec = _Whole("encodec_decode_full", data, is_causal=True), weights.format
        codes, lengths = DECODE_INPUTS
        graph.input(codes, np.int32, [1, "code_length", codec.quantizers])
        graph.input(lengths, np.int32, [1])
        firsts = graph.constant(np.arange(codec.quantizers) * codec.codebook_size, np.int32)
        rows = graph.op("Add", graph.op("Squeeze", codes, graph.constant([0])), firsts)
        x = graph.looked_up(rows, weights.codebooks)
        graph.op("Identity", graph.convolved(x, "decoder", weights.decoder), result=DECODE_OUTPUTS[0])
        graph.op("Mul", lengths, graph.constant([codec.frame_samples], np.int32), result=DECODE_OUTPUTS[1])
        graph.output(DECODE_OUTPUTS[0], np.float32, [1, codec.channels, "audio_length"])
        graph.output(DECODE_OUTPUTS[1], np.int32, [1])
        graph.save(folder / DECODE_WHOLE_FILE)
    return GraphSpec(
        file=DECODE_WHOLE_FILE,
        data=(DECODE_WHOLE_DATA,),
        facts={"widest_values": weights.widest_values},
        input_names=tuple(DECODE_INPUTS),
        output_names=tuple(DECODE_OUTPUTS),
    )


def save_encodec_whole_encode(folder: Path, weights: EncodecWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / ENCODE_WHOLE_DATA) as data:
        graph, codec = _Whole("encodec_encode", data, is_causal=True), weights.format
        waveform, lengths = ENCODE_INPUTS
        graph.input(waveform, np.float32, [1, codec.channels, "waveform_length"])
        graph.input(lengths, np.int32, [1])
        x = graph.convolved(waveform, "encoder", weights.encoder)
        codes = graph.searched(x, weights.codebooks)
        graph.op("Unsqueeze", codes, graph.constant([0]), result=ENCODE_OUTPUTS[0])
        begun = graph.op("Add", lengths, graph.constant([codec.frame_samples - 1], np.int32))
        graph.op("Div", begun, graph.constant([codec.frame_samples], np.int32), result=ENCODE_OUTPUTS[1])
        graph.output(ENCODE_OUTPUTS[0], np.int32, [1, "code_length", codec.quantizers])
        graph.output(ENCODE_OUTPUTS[1], np.int32, [1])
        graph.save(folder / ENCODE_WHOLE_FILE)
    return GraphSpec(
        file=ENCODE_WHOLE_FILE,
        data=(ENCODE_WHOLE_DATA,),
        facts={"widest_values": weights.widest_values, "completes_frames": True},
        input_names=tuple(ENCODE_INPUTS),
        output_names=tuple(ENCODE_OUTPUTS),
    )


def save_encodec_segment_decode(folder: Path, weights: EncodecWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / DECODE_SEGMENT_DATA) as data:
        graph, codec = _Whole("encodec_decode_segment", data, is_causal=False), weights.format
        rows = graph.input("rows", np.int32, ["frames", codec.quantizers])
        x = graph.convolved(graph.looked_up(rows, weights.codebooks), "decoder", weights.decoder)
        graph.op("Transpose", graph.op("Squeeze", x, graph.constant([0])), perm=[1, 0], result="audio")
        graph.output("audio", np.float32, ["samples", codec.channels])
        graph.save(folder / DECODE_SEGMENT_FILE)
    return GraphSpec(DECODE_SEGMENT_FILE, (DECODE_SEGMENT_DATA,), facts=_segment_facts(weights))


def save_encodec_segment_encode(folder: Path, weights: EncodecWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / ENCODE_SEGMENT_DATA) as data:
        graph, codec = _Whole("encodec_encode_segment", data, is_causal=False), weights.format
        audio = graph.input("audio", np.float32, ["samples", codec.channels])
        x = graph.op("Unsqueeze", graph.op("Transpose", audio, perm=[1, 0]), graph.constant([0]))
        codes = graph.searched(graph.convolved(x, "encoder", weights.encoder), weights.codebooks)
        graph.op("Identity", codes, result="codes")
        graph.output("codes", np.int32, ["frames", codec.quantizers])
        graph.save(folder / ENCODE_SEGMENT_FILE)
    return GraphSpec(ENCODE_SEGMENT_FILE, (ENCODE_SEGMENT_DATA,), facts=_segment_facts(weights))


def _segment_facts(weights: EncodecWeights) -> dict[str, int]:
    assert weights.maybe_segments is not None
    return {"segment_samples": weights.maybe_segments.length, "segment_stride": weights.maybe_segments.stride}


class _Whole(GraphBuilder):
    """A graph over all columns at once."""

    def __init__(self, name: str, data: DataFile, *, is_causal: bool) -> None:
        super().__init__(name, data)
        self._is_causal = is_causal

    # --- codes ------------------------------------------------------------------------------------------------------

    def looked_up(self, rows: str, codebooks: Array) -> str:
        """int32 [frames, quantizers] -> the sum of these rows, [1, features, frames]."""
        table = np.pad(codebooks.reshape(-1, codebooks.shape[2]), ((0, 1), (0, 0)))
        found = self.op("Gather", self.weight("codebooks", table), rows, axis=0)
        summed = self.op("ReduceSum", found, self.constant([1]), keepdims=0)
        return self.op("Unsqueeze", self.op("Transpose", summed, perm=[1, 0]), self.constant([0]))

    def searched(self, x: str, codebooks: Array) -> str:
        """[1, features, frames] -> int32 [frames, quantizers]: the nearest row, then that of what it leaves over."""
        rest = self.op("Transpose", self.op("Squeeze", x, self.constant([0])), perm=[1, 0])
        codes = []
        for index, rows in enumerate(codebooks):
            products = self.op(
                "MatMul",
                self.op("Mul", rest, self.constant(2, np.float32)),
                self.weight(f"codebook.{index}.columns", rows.T),
            )
            lengths = self.weight(f"codebook.{index}.lengths", np.square(rows).sum(axis=1))
            distances = self.op("Sub", lengths, products)  # but for |rest|^2, which is the same for all rows
            codes.append(self.op("ArgMin", distances, axis=1, keepdims=1))
            if index + 1 < len(codebooks):
                row = self.op("Gather", self.weight(f"codebook.{index}", rows), codes[-1], axis=0)
                rest = self.op("Sub", rest, self.op("Squeeze", row, self.constant([1])))
        return self.op("Cast", self.op("Concat", *codes, axis=1), to=INT32)

    # --- convolutions -----------------------------------------------------------------------------------------------

    def convolved(self, x: str, stack: str, modules: tuple[EncodecModule, ...]) -> str:
        for index, module in enumerate(modules):
            name = f"{stack}.{index}"
            match module:
                case ShortcutBlock():
                    narrow = self._conv(elu(self, x), f"{name}.narrow", module.narrow)
                    wide = self._conv(elu(self, narrow), f"{name}.widen", module.widen)
                    x = self.op("Add", self._conv(x, f"{name}.shortcut", module.shortcut), wide)
                case MirroredConv():
                    x = self._conv(elu(self, x) if index else x, name, module)
                case SpreadingConv():
                    x = self._spread(elu(self, x), name, module)
                case LstmStack():
                    x = self._remembered(x, name, module)
        return x

    def _conv(self, x: str, name: str, conv: MirroredConv) -> str:
        if conv.past_columns:
            x = self._mirrored(x, conv)
        weight, bias = self.weight(f"{name}.weight", conv.weight), self.weight(f"{name}.bias", conv.bias)
        return self._normed(self.op("Conv", x, weight, bias, strides=[conv.stride]), name, conv.maybe_norm)

    def _mirrored(self, x: str, conv: MirroredConv) -> str:
        """x with as many columns at its ends as the convolution needs."""
        right = 0 if self._is_causal else conv.past_columns // 2
        left = conv.past_columns - right
        columns = self.op("Slice", self.op("Shape", x), self.constant([2]), self.constant([3]), self.constant([0]))
        # Every stride that is begun is completed.
        past_stride = self.op("Mod", self.op("Neg", columns), self.constant([conv.stride]))
        right_columns = self.op("Add", past_stride, self.constant([right]))
        least = self.op("Add", self.op("Max", right_columns, self.constant([left])), self.constant([1]))
        missing = self.op("Max", self.op("Sub", least, columns), self.constant([0]))
        none = self.constant([0, 0, 0, 0, 0])
        longer = self.op("Pad", x, self.op("Concat", none, missing, axis=0))
        ends = self.op("Concat", self.constant([0, 0, left, 0, 0]), right_columns, axis=0)
        mirrored = self.op("Pad", longer, ends, mode="reflect")
        end = self.op("Add", self.op("Add", columns, right_columns), self.constant([left]))
        return self.op("Slice", mirrored, self.constant([0]), end, self.constant([2]))

    def _spread(self, x: str, name: str, conv: SpreadingConv) -> str:
        weight, bias = self.weight(f"{name}.weight", conv.weight), self.weight(f"{name}.bias", conv.bias)
        raw = self.op("ConvTranspose", x, weight, bias, strides=[conv.stride])
        right = conv.stride if self._is_causal else conv.stride // 2
        start, end = self.constant([conv.stride - right]), self.constant([-right])
        return self.op("Slice", self._normed(raw, name, conv.maybe_norm), start, end, self.constant([2]))

    def _normed(self, x: str, name: str, maybe_norm: SegmentNorm | None) -> str:
        """All channels as one, which a norm of instances takes for one instance."""
        if maybe_norm is None:
            return x
        one, zero = self.constant([1], np.float32), self.constant([0], np.float32)
        flat = self.op("Reshape", x, self.constant([1, 1, -1]))
        level = self.op("InstanceNormalization", flat, one, zero, epsilon=NORM_EPSILON)
        shaped = self.op("Reshape", level, self.constant([1, len(maybe_norm.gain), -1]))
        gain = self.weight(f"{name}.norm.gain", maybe_norm.gain[:, np.newaxis])
        offset = self.weight(f"{name}.norm.offset", maybe_norm.offset[:, np.newaxis])
        return self.op("Add", self.op("Mul", shaped, gain), offset)

    def _remembered(self, x: str, name: str, lstm: LstmStack) -> str:
        y = self.op("Transpose", x, perm=[2, 0, 1])
        for index, layer in enumerate(lstm.layers):
            weights = lstm_weights(self, f"{name}.{index}", layer)
            y = self.op("Squeeze", self.op("LSTM", y, *weights, hidden_size=layer.hidden), self.constant([1]))
        return self.op("Add", x, self.op("Transpose", y, perm=[1, 2, 0]))
