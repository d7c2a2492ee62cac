"""Mimi frame by frame: decode_step and encode_step, with contracts of our own.

    decode_step
    rows       int32 [frames, quantizers]   row of each code in one table of all codebooks; the last row is all zeros
    audio      float32 [samples, 1]

    encode_step
    audio      float32 [samples, 1]         whole frames
    codes      int32 [frames, quantizers]

    Both have what the transformers have (see transformers.py), and states beside them: each convolution remembers the
    last columns of its input. `mossnano.json` has their names and shapes.

Rules of this room:

- Columns lie as [columns, channels], so that a token that becomes several is a row that is read as several, and no
  node ever transposes.
- The kernel of a layer that changes the rate is two strides long. So a transposed convolution is one matrix product
  over each column and the one before it, and a strided one is one over each block of columns and the block before it.
- What is remembered is input, never a sum: what a stream begins with is zeros, and a bias is added once.
- The runtime loads these graphs with its own optimisations off, and runs these nodes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mossnano_stdio.build.blocks import INT32, elu
from mossnano_stdio.build.builder import open_data
from mossnano_stdio.build.convolutions import Conv, TransposedConv
from mossnano_stdio.build.mimi_model import RESAMPLED_BY, CodebookChain, ConvModule, MimiWeights, Residual
from mossnano_stdio.build.model import Array, TransformerWeights
from mossnano_stdio.build.step_graph import ALL, StepGraph
from mossnano_stdio.build.transformers import Stack, linear, stack_facts
from mossnano_stdio.weights import GraphSpec

DECODE_STEP_FILE = "mimi_decode_step.onnx"
DECODE_STEP_DATA = "mimi_decode_step.data"
ENCODE_STEP_FILE = "mimi_encode_step.onnx"
ENCODE_STEP_DATA = "mimi_encode_step.data"


def save_mimi_decode_step(folder: Path, weights: MimiWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / DECODE_STEP_DATA) as data:
        graph = StepGraph("mimi_decode_step", data)
        rows = graph.input("rows", np.int32, ["frames", weights.format.quantizers])
        x = _look_up(graph, rows, weights.semantic, weights.acoustic)
        x = _upsampled(graph, x, weights.upsample)
        x = _transformed(graph, x, "decoder_transformer", weights.decoder_transformer)
        x = _convolved(graph, x, "decoder", weights.decoder)
        graph.op("Identity", x, result="audio")
        graph.output("audio", np.float32, ["samples", weights.format.channels])
        graph.save(folder / DECODE_STEP_FILE)
    facts = stack_facts([weights.decoder_transformer]) | {"look_back_frames": weights.look_back_frames}
    return GraphSpec(file=DECODE_STEP_FILE, data=(DECODE_STEP_DATA,), states=tuple(graph.states), facts=facts)


def save_mimi_encode_step(folder: Path, weights: MimiWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / ENCODE_STEP_DATA) as data:
        graph = StepGraph("mimi_encode_step", data)
        x = graph.input("audio", np.float32, ["samples", weights.format.channels])
        x = _convolved(graph, x, "encoder", weights.encoder)
        x = _transformed(graph, x, "encoder_transformer", weights.encoder_transformer)
        x = _downsampled(graph, x, weights.downsample)
        codes = [*_searched(graph, x, "semantic", weights.semantic), *_searched(graph, x, "acoustic", weights.acoustic)]
        graph.op("Cast", graph.op("Concat", *codes, axis=1), to=INT32, result="codes")
        graph.output("codes", np.int32, ["frames", weights.format.quantizers])
        graph.save(folder / ENCODE_STEP_FILE)
    facts = stack_facts([weights.encoder_transformer])
    return GraphSpec(file=ENCODE_STEP_FILE, data=(ENCODE_STEP_DATA,), states=tuple(graph.states), facts=facts)


# --- codes and latents -------------------------------------------------------------------------------------------


def _look_up(graph: StepGraph, rows: str, semantic: CodebookChain, acoustic: CodebookChain) -> str:
    """The sum of each half's rows, through its own projection: [frames, features]."""
    width = semantic.codebooks.shape[2]
    halves = [len(semantic.codebooks), len(acoustic.codebooks)]
    found = graph.looked_up(rows, np.concatenate([semantic.codebooks, acoustic.codebooks]))
    summing = np.repeat(np.eye(2, dtype=np.float32), halves, axis=1)  # [2, quantizers]
    sums = graph.op("MatMul", graph.weight("halves", summing), found)
    side_by_side = graph.op("Reshape", sums, graph.constant([-1, 2 * width]))
    return linear(graph, side_by_side, "output_proj", np.concatenate([semantic.output_proj, acoustic.output_proj], 1))


def _searched(graph: StepGraph, x: str, name: str, chain: CodebookChain) -> list[str]:
    return graph.searched(linear(graph, x, f"{name}.input_proj", chain.input_proj), name, chain.codebooks)


def _upsampled(graph: StepGraph, x: str, weight: Array) -> str:
    """A transposed convolution of each feature by itself: [frames, features] -> [tokens, features]."""
    features = len(weight)
    together = graph.after_past(x, 1, features, "upsample.past")
    taps = np.ascontiguousarray(weight[:, 0].T).reshape(2, RESAMPLED_BY, features)  # for a frame, and the one before it
    parts: list[str] = []
    for tap, frames in zip(taps, (graph.columns(together, 1, ALL), graph.columns(together, 0, -1)), strict=True):
        apart = graph.op("Reshape", frames, graph.constant([-1, 1, features]))
        parts.append(graph.op("Mul", apart, graph.weight(f"upsample.{len(parts)}", tap)))
    return graph.op("Reshape", graph.op("Add", *parts), graph.constant([-1, features]))


def _downsampled(graph: StepGraph, x: str, weight: Array) -> str:
    """[tokens, features] -> [frames, features]. A stream's first token stands for those before it."""
    features, _, _ = weight.shape
    joined = graph.op("Reshape", x, graph.constant([-1, RESAMPLED_BY * features]))
    began, began_out = graph.state("downsample.began", (1,))  # 0 until a stream's first run is over
    graph.op("Identity", graph.constant([1], np.float32), result=began_out)
    graph.leave(began_out)
    past, past_out = graph.state("downsample.past", (1, RESAMPLED_BY * features))
    first = graph.op("Tile", graph.columns(x, 0, 1), graph.constant([1, RESAMPLED_BY]))
    before = graph.op("Where", graph.op("Greater", began, graph.constant([0], np.float32)), past, first)
    together = graph.op("Concat", before, joined, axis=0)
    graph.columns(together, -1, ALL, result=past_out)
    graph.leave(past_out)
    matrix = weight.transpose(0, 2, 1).reshape(features, -1)
    return linear(graph, graph.windows(together, 2), "downsample", matrix)


def _transformed(graph: StepGraph, x: str, name: str, module: TransformerWeights) -> str:
    batch = graph.op("Unsqueeze", x, graph.constant([0]))
    with graph.scope(name):
        return graph.op("Squeeze", Stack(graph).run(batch, name, module), graph.constant([0]))


# --- convolutions ------------------------------------------------------------------------------------------------


def _convolved(graph: StepGraph, x: str, stack: str, modules: tuple[ConvModule, ...]) -> str:
    for index, module in enumerate(modules):
        name = f"{stack}.{index}"
        with graph.scope(name):
            match module:
                case Residual():
                    narrow = _conv(graph, elu(graph, x), f"{name}.narrow", module.narrow)
                    x = graph.op("Add", x, _conv(graph, elu(graph, narrow), f"{name}.widen", module.widen))
                case Conv():
                    x = _conv(graph, elu(graph, x) if index else x, name, module)
                case TransposedConv():
                    x = graph.transposed(elu(graph, x), name, module)
    return x


def _conv(graph: StepGraph, x: str, name: str, conv: Conv) -> str:
    if conv.stride > 1:
        block = conv.stride * conv.inputs
        blocks = graph.op("Reshape", x, graph.constant([-1, block]))
        return graph.product_of_blocks(graph.after_past(blocks, 1, block, f"{name}.past"), name, conv)
    if conv.past_columns:
        x = graph.after_past(x, conv.past_columns, conv.inputs, f"{name}.past")
    return graph.product_of_windows(x, name, conv)
