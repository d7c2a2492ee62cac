"""Mimi over whole recordings: decode_full and encode, in the official contract's inputs and outputs.

Rules of this room:

- Columns lie as [1, channels, columns], and convolutions are the runtime's own. So these graphs share no arithmetic
  with the steps of mimi_steps.py, which are held against them.
- A convolution is padded on the left only: with zeros, `downsample` with copies of its first column. Of a transposed
  one, the last columns are cut off, which no column of a whole recording would complete.
- Attention is from every token to every token, so memory grows with the square of the length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mossnano_stdio.build.blocks import INT32, elu
from mossnano_stdio.build.builder import DataFile, GraphBuilder, open_data
from mossnano_stdio.build.convolutions import Conv, TransposedConv
from mossnano_stdio.build.mimi_model import RESAMPLED_BY, CodebookChain, ConvModule, MimiWeights, Residual
from mossnano_stdio.build.model import Array, TransformerWeights
from mossnano_stdio.build.official import WholeAttention, run_modules
from mossnano_stdio.weights import DECODE_INPUTS, DECODE_OUTPUTS, ENCODE_INPUTS, ENCODE_OUTPUTS, GraphSpec

DECODE_WHOLE_FILE = "mimi_decode_full.onnx"
DECODE_WHOLE_DATA = "mimi_decode_full.data"
ENCODE_WHOLE_FILE = "mimi_encode.onnx"
ENCODE_WHOLE_DATA = "mimi_encode.data"


def save_whole_decode(folder: Path, weights: MimiWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / DECODE_WHOLE_DATA) as data:
        _whole_decode(weights, data).save(folder / DECODE_WHOLE_FILE)
    return GraphSpec(
        file=DECODE_WHOLE_FILE,
        data=(DECODE_WHOLE_DATA,),
        facts={"widest_values": weights.widest_values},
        input_names=tuple(DECODE_INPUTS),
        output_names=tuple(DECODE_OUTPUTS),
    )


def _whole_decode(weights: MimiWeights, data: DataFile) -> GraphBuilder:
    graph, codec = GraphBuilder("mimi_decode_full", data), weights.format
    codes, lengths = DECODE_INPUTS
    graph.input(codes, np.int32, [1, "code_length", codec.quantizers])
    graph.input(lengths, np.int32, [1])
    semantic, acoustic = len(weights.semantic.codebooks), len(weights.acoustic.codebooks)
    halves = graph.ops("Split", codes, graph.constant([semantic, acoustic]), axis=2, count=2)
    looked_up = [
        _look_up(graph, half, name, chain)
        for half, name, chain in zip(
            halves, ("semantic", "acoustic"), (weights.semantic, weights.acoustic), strict=True
        )
    ]
    x = graph.op("Add", *looked_up)
    x = _transposed(graph, x, "upsample", weights.upsample, groups=weights.features)
    x = _transformed(graph, x, "decoder_transformer", weights.decoder_transformer)
    x = _convolved(graph, x, "decoder", weights.decoder)
    graph.op("Identity", x, result=DECODE_OUTPUTS[0])
    graph.op("Mul", lengths, graph.constant([codec.frame_samples], np.int32), result=DECODE_OUTPUTS[1])
    graph.output(DECODE_OUTPUTS[0], np.float32, [1, codec.channels, "audio_length"])
    graph.output(DECODE_OUTPUTS[1], np.int32, [1])
    return graph


def save_whole_encode(folder: Path, weights: MimiWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / ENCODE_WHOLE_DATA) as data:
        _whole_encode(weights, data).save(folder / ENCODE_WHOLE_FILE)
    return GraphSpec(
        file=ENCODE_WHOLE_FILE,
        data=(ENCODE_WHOLE_DATA,),
        facts={"widest_values": weights.widest_values},
        input_names=tuple(ENCODE_INPUTS),
        output_names=tuple(ENCODE_OUTPUTS),
    )


def _whole_encode(weights: MimiWeights, data: DataFile) -> GraphBuilder:
    graph, codec = GraphBuilder("mimi_encode", data), weights.format
    waveform, lengths = ENCODE_INPUTS
    x = graph.input(waveform, np.float32, [1, codec.channels, "waveform_length"])
    graph.input(lengths, np.int32, [1])
    x = _convolved(graph, x, "encoder", weights.encoder)
    x = _transformed(graph, x, "encoder_transformer", weights.encoder_transformer)
    x = _conv(graph, x, "downsample", weights.downsample, RESAMPLED_BY, padding="edge")
    columns = graph.op("Transpose", x, perm=[0, 2, 1])
    codes = [
        *_searched(graph, columns, "semantic", weights.semantic),
        *_searched(graph, columns, "acoustic", weights.acoustic),
    ]
    graph.op("Cast", graph.op("Concat", *codes, axis=2), to=INT32, result=ENCODE_OUTPUTS[0])
    graph.op("Div", lengths, graph.constant([codec.frame_samples], np.int32), result=ENCODE_OUTPUTS[1])
    graph.output(ENCODE_OUTPUTS[0], np.int32, [1, "code_length", codec.quantizers])
    graph.output(ENCODE_OUTPUTS[1], np.int32, [1])
    return graph


def _look_up(graph: GraphBuilder, codes: str, name: str, chain: CodebookChain) -> str:
    """int32 [1, frames, quantizers] -> [1, features, frames]."""
    total = ""
    for index, rows in enumerate(chain.codebooks):
        column = graph.op("Gather", codes, graph.constant(index), axis=2)
        row = graph.op("Gather", graph.weight(f"{name}.{index}.codebook", rows), column, axis=0)
        total = graph.op("Add", total, row) if total else row
    projected = graph.op("MatMul", total, graph.weight(f"{name}.output_proj", chain.output_proj.T))
    return graph.op("Transpose", projected, perm=[0, 2, 1])


def _searched(graph: GraphBuilder, columns: str, name: str, chain: CodebookChain) -> list[str]:
    """[1, frames, features] -> one [1, frames, 1] for each codebook: the row at the least distance, then the next
    codebook for what that row leaves over."""
    codes = []
    rest = graph.op("MatMul", columns, graph.weight(f"{name}.input_proj", chain.input_proj.T))
    for index, rows in enumerate(chain.codebooks):
        squares = graph.op("Mul", rest, graph.constant(2, np.float32))
        products = graph.op("MatMul", squares, graph.weight(f"{name}.{index}.columns", rows.T))
        lengths = graph.weight(f"{name}.{index}.lengths", np.square(rows).sum(axis=1))
        distances = graph.op("Sub", lengths, products)  # but for |r|^2, which is the same for all rows
        codes.append(graph.op("ArgMin", distances, axis=2, keepdims=1))
        row = graph.op("Gather", graph.weight(f"{name}.{index}.codebook", rows), codes[-1], axis=0)
        rest = graph.op("Sub", rest, graph.op("Squeeze", row, graph.constant([2])))
    return codes


def _transformed(graph: GraphBuilder, x: str, name: str, module: TransformerWeights) -> str:
    tokens = graph.op("Transpose", x, perm=[0, 2, 1])
    return graph.op(
        "Transpose",
        run_modules(graph, tokens, name, (module,), module.model, WholeAttention),
        perm=[0, 2, 1],
    )


def _convolved(graph: GraphBuilder, x: str, stack: str, modules: tuple[ConvModule, ...]) -> str:
    for index, module in enumerate(modules):
        name = f"{stack}.{index}"
        match module:
            case Residual():
                narrow = _biased(graph, elu(graph, x), f"{name}.narrow", module.narrow)
                x = graph.op("Add", x, _biased(graph, elu(graph, narrow), f"{name}.widen", module.widen))
            case Conv():
                x = _biased(graph, elu(graph, x) if index else x, name, module)
            case TransposedConv():
                x = _transposed(graph, elu(graph, x), name, module.weight, module.bias)
    return x


def _biased(graph: GraphBuilder, x: str, name: str, conv: Conv) -> str:
    return _conv(graph, x, name, conv.weight, conv.stride, conv.bias)


def _conv(
    graph: GraphBuilder,
    x: str,
    name: str,
    weight: Array,
    stride: int,
    maybe_bias: Array | None = None,
    padding: str = "constant",
) -> str:
    past_columns = weight.shape[2] - stride
    padded = graph.op("Pad", x, graph.constant([0, 0, past_columns, 0, 0, 0]), mode=padding)
    inputs = [padded, graph.weight(f"{name}.weight", weight)]
    if maybe_bias is not None:
        inputs.append(graph.weight(f"{name}.bias", maybe_bias))
    return graph.op("Conv", *inputs, strides=[stride])


def _transposed(
    graph: GraphBuilder, x: str, name: str, weight: Array, maybe_bias: Array | None = None, groups: int = 1
) -> str:
    stride = weight.shape[2] // 2
    inputs = [x, graph.weight(f"{name}.weight", weight)]
    if maybe_bias is not None:
        inputs.append(graph.weight(f"{name}.bias", maybe_bias))
    raw = graph.op("ConvTranspose", *inputs, strides=[stride], group=groups)
    return graph.op("Slice", raw, graph.constant([0]), graph.constant([-stride]), graph.constant([2]))
