"""EnCodec frame by frame, of a causal model: decode_step and encode_step, with contracts of our own.

    decode_step
    rows       int32 [frames, quantizers]   row of each code in one table of all codebooks; the last row is all zeros
    audio      float32 [samples, channels]

    encode_step
    audio      float32 [samples, channels]  whole frames, but at a stream's end
    codes      int32 [frames, quantizers]   one frame for each that is begun

    States: each convolution remembers the last columns of its input, an LSTM its two vectors, and `began` is 0 in a
    stream's first run. `mossnano.json` has their names and shapes.

Rules of this room:

- What lies before a stream are its first columns, mirrored. So the first run must have `first_chunk_frames`, or be the
  only one: then zeros stand for the columns that never come, as they do in whole recordings.
- An end inside a frame is completed at every stride by mirrored columns, not by silence. Where all columns so far fit
  into one stride there is nothing to mirror, and zeros complete it.
- The kernel of a layer that changes the rate is two strides long. So a transposed convolution is one matrix product
  over each column and the one before it, and a strided one is one over each block of columns and the block before it.
- The runtime loads these graphs with its own optimisations off, and runs these nodes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mossnano_stdio.build.blocks import INT32, elu, lstm_weights
from mossnano_stdio.build.builder import DataFile, open_data
from mossnano_stdio.build.encodec_model import (
    EncodecModule,
    EncodecWeights,
    LstmStack,
    MirroredConv,
    ShortcutBlock,
    SpreadingConv,
)
from mossnano_stdio.build.step_graph import ALL, StepGraph
from mossnano_stdio.weights import GraphSpec

DECODE_STEP_FILE = "encodec_decode_step.onnx"
DECODE_STEP_DATA = "encodec_decode_step.data"
ENCODE_STEP_FILE = "encodec_encode_step.onnx"
ENCODE_STEP_DATA = "encodec_encode_step.data"


def save_encodec_decode_step(folder: Path, weights: EncodecWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / DECODE_STEP_DATA) as data:
        graph = _MirroringGraph("encodec_decode_step", data)
        rows = graph.input("rows", np.int32, ["frames", weights.format.quantizers])
        x = graph.op("ReduceSum", graph.looked_up(rows, weights.codebooks), graph.constant([1]), keepdims=0)
        graph.op("Identity", graph.convolved(x, "decoder", weights.decoder), result="audio")
        graph.output("audio", np.float32, ["samples", weights.format.channels])
        graph.save(folder / DECODE_STEP_FILE)
    return GraphSpec(DECODE_STEP_FILE, (DECODE_STEP_DATA,), states=tuple(graph.states), facts=_facts(weights))


def save_encodec_encode_step(folder: Path, weights: EncodecWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / ENCODE_STEP_DATA) as data:
        graph = _MirroringGraph("encodec_encode_step", data)
        x = graph.input("audio", np.float32, ["samples", weights.format.channels])
        codes = graph.searched(graph.convolved(x, "encoder", weights.encoder), "codebook", weights.codebooks)
        graph.op("Cast", graph.op("Concat", *codes, axis=1), to=INT32, result="codes")
        graph.output("codes", np.int32, ["frames", weights.format.quantizers])
        graph.save(folder / ENCODE_STEP_FILE)
    return GraphSpec(ENCODE_STEP_FILE, (ENCODE_STEP_DATA,), states=tuple(graph.states), facts=_facts(weights))


def _facts(weights: EncodecWeights) -> dict[str, object]:
    return {"transformers": [], "first_chunk_frames": weights.first_chunk_frames}


class _MirroringGraph(StepGraph):
    """A graph that knows whether a stream began before this run."""

    def __init__(self, name: str, data: DataFile) -> None:
        super().__init__(name, data)
        began, began_out = self.state("began", (1,))
        self.op("Identity", self.constant([1], np.float32), result=began_out)
        self.leave(began_out)
        self._has_begun = self.op("Greater", began, self.constant([0], np.float32))

    # --- convolutions -----------------------------------------------------------------------------------------------

    def convolved(self, x: str, stack: str, modules: tuple[EncodecModule, ...]) -> str:
        for index, module in enumerate(modules):
            name = f"{stack}.{index}"
            with self.scope(name):
                match module:
                    case ShortcutBlock():
                        x = self._block(x, name, module)
                    case MirroredConv():
                        x = self._conv(elu(self, x) if index else x, name, module)
                    case SpreadingConv():
                        x = self.transposed(elu(self, x), name, module)
                    case LstmStack():
                        x = self._remembered(x, name, module)
        return x

    def _block(self, x: str, name: str, block: ShortcutBlock) -> str:
        narrow = self._conv(elu(self, x), f"{name}.narrow", block.narrow)
        short = self.product(
            x, f"{name}.shortcut", block.shortcut.weight[:, :, 0], block.shortcut.bias + block.widen.bias
        )
        widen = self.weight(f"{name}.widen.weight", block.widen.weight[:, :, 0])
        return self.op("Gemm", elu(self, narrow), widen, short, transB=1)

    def _conv(self, x: str, name: str, conv: MirroredConv) -> str:
        together = self._after_mirror(x, conv.past_columns, conv.inputs, f"{name}.past")
        if conv.stride == 1:
            return self.product_of_windows(together, name, conv)
        completed = self._completed(x, together, conv.stride, conv.inputs)
        blocks = self.op("Reshape", completed, self.constant([-1, conv.stride * conv.inputs]))
        return self.product_of_blocks(blocks, name, conv)

    def _after_mirror(self, x: str, columns: int, channels: int, name: str) -> str:
        """x behind the `columns` columns before it: what the run before has left, or x itself, mirrored."""
        past, past_out = self.state(name, (columns, channels))
        nothing = self.constant(np.zeros((columns, channels)), np.float32)
        first = self.op("Concat", self.columns(x, 0, columns + 1), nothing, axis=0)
        mirrored = self.op("Gather", first, self.constant(np.arange(columns, 0, -1)), axis=0)
        together = self.op("Concat", self.op("Where", self._has_begun, past, mirrored), x, axis=0)
        self.columns(together, -columns, ALL, result=past_out)
        self.leave(past_out)
        return together

    def _completed(self, x: str, together: str, stride: int, channels: int) -> str:
        """The columns, mirrored at their end up to a whole stride."""
        columns = self.op("Slice", self.op("Shape", x), self.constant([0]), self.constant([1]), self.constant([0]))
        missing = self.op("Mod", self.op("Neg", columns), self.constant([stride]))
        end = self.op("Add", missing, self.constant([1]))
        before_last = self.op("Slice", together, self.op("Neg", end), self.constant([-1]), self.constant([0]))
        behind = self.op(
            "Slice", before_last, self.constant([ALL]), self.constant([-ALL]), self.constant([0]), self.constant([-1])
        )
        is_longer = self.op("Greater", columns, self.constant([stride]))
        can_mirror = self.op("Cast", self.op("Or", self._has_begun, is_longer), to=1)
        return self.op("Concat", together, self.op("Mul", behind, can_mirror), axis=0)

    def _remembered(self, x: str, name: str, lstm: LstmStack) -> str:
        y = self.op("Unsqueeze", x, self.constant([1]))
        for index, layer in enumerate(lstm.layers):
            states = [self.state(f"{name}.{index}.{kind}", (1, 1, layer.hidden)) for kind in ("hidden", "cell")]
            (hidden, hidden_out), (cell, cell_out) = states
            weights = lstm_weights(self, f"{name}.{index}", layer)
            inputs = (y, *weights, "", hidden, cell)
            given = f"{name}.{index}.given"
            self.ops("LSTM", *inputs, count=3, results=[given, hidden_out, cell_out], hidden_size=layer.hidden)
            for state_out in (hidden_out, cell_out):
                self.leave(state_out)
            y = self.op("Squeeze", given, self.constant([1]))
        return self.op("Add", x, self.op("Squeeze", y, self.constant([1])))
