"""The parts of the official contract's graphs, and what several graphs share, as ONNX nodes in standard operators.

Rules of this room:

- Tokens lie as [1, tokens, features] between parts, heads as [1, heads, tokens, head_dim] inside attention.
- A part is given its weights and the names of the values it works on. It reads no file and keeps no state.
- A Reshape has a constant shape: 0 keeps a dimension, -1 takes what is left.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mossnano_stdio.build.builder import GraphBuilder
from mossnano_stdio.build.encodec_model import LstmLayer
from mossnano_stdio.build.model import (
    NORM_EPSILON,
    ROW_EPSILON,
    Array,
    DequantizerWeights,
    LayerWeights,
    PatchStep,
    QuantizerWeights,
    TransformerWeights,
    rope_exponents,
)

INT32, INT64, FLOAT = 6, 7, 1  # as ONNX numbers them


class Heads(NamedTuple):
    """Queries, keys and values of some tokens, queries and keys rotated. Each [1, heads, tokens, head_dim]."""

    queries: str
    keys: str
    values: str


def linear(graph: GraphBuilder, x: str, name: str, weight: Array) -> str:
    """W x of every token, W lying as [out, in]."""
    return graph.op("MatMul", x, graph.weight(name, weight.T))


def affine(graph: GraphBuilder, x: str, name: str, weight: Array, bias: Array) -> str:
    """W x + b of every token."""
    return graph.op("Add", linear(graph, x, f"{name}.weight", weight), graph.weight(f"{name}.bias", bias))


def patch_up(graph: GraphBuilder, x: str, step: PatchStep, features: int) -> str:
    """[1, tokens, features] -> [1, tokens * patch, features / patch]."""
    width = features // step.patch
    apart = graph.op("Reshape", x, graph.constant([1, -1, width, step.patch]))
    turned = graph.op("Transpose", apart, perm=[0, 1, 3, 2])
    return graph.op("Reshape", turned, graph.constant([1, -1, width]))


def patch_down(graph: GraphBuilder, x: str, step: PatchStep, features: int) -> str:
    """[1, tokens, features] -> [1, tokens / patch, features * patch]."""
    apart = graph.op("Reshape", x, graph.constant([1, -1, step.patch, features]))
    turned = graph.op("Transpose", apart, perm=[0, 1, 3, 2])
    return graph.op("Reshape", turned, graph.constant([1, -1, features * step.patch]))


def lstm_weights(graph: GraphBuilder, name: str, layer: LstmLayer) -> tuple[str, str, str]:
    """Of one layer, as the operator takes them: its gates are input, output, forget, cell, in this order."""

    def in_order(tensor: Array) -> Array:
        taken, forgotten, cell, given = np.split(tensor, 4)
        return np.concatenate([taken, given, forgotten, cell])

    biases = np.concatenate([in_order(layer.input_bias), in_order(layer.hidden_bias)])
    return (
        graph.weight(f"{name}.input_weight", in_order(layer.input_weight)[np.newaxis]),
        graph.weight(f"{name}.hidden_weight", in_order(layer.hidden_weight)[np.newaxis]),
        graph.weight(f"{name}.biases", biases[np.newaxis]),
    )


def elu(graph: GraphBuilder, x: str) -> str:
    """x where that is positive, else exp(x) - 1."""
    # The runtime's node of this name computes value by value, and takes three times as long as these four.
    exp = graph.op("Exp", graph.op("Min", x, graph.constant(0, np.float32)))
    return graph.op("Max", x, graph.op("Sub", exp, graph.constant(1, np.float32)))


def count_along(graph: GraphBuilder, x: str, axis: int) -> str:
    """The length of an axis, as int32 [1]."""
    length = graph.op("Gather", graph.op("Shape", x), graph.constant([axis]), axis=0)
    return graph.op("Cast", length, to=INT32)


def new_positions(graph: GraphBuilder, offset: str, count: str) -> str:
    """offset .. offset + count - 1, as int32 [count]; both are int32 [1]."""
    scalar = graph.op("Squeeze", count, graph.constant([0]))
    steps = graph.op("Range", graph.constant(0, np.int32), scalar, graph.constant(1, np.int32))
    return graph.op("Add", steps, offset)


def visibility(graph: GraphBuilder, query_positions: str, key_positions: str, context: int) -> str:
    """What is added to scores, [queries, keys]: 0 where 0 <= query - key < context and key >= 0, else -infinity."""
    # An entry of a cache that is not filled yet has position -1. It is moved to the far future, which nothing sees.
    empty = graph.op("Less", key_positions, graph.constant(0, np.int32))
    far_ahead = graph.constant(np.iinfo(np.int32).max, np.int32)
    keys = graph.op("Where", empty, far_ahead, key_positions)
    age = graph.op("Sub", graph.op("Unsqueeze", query_positions, graph.constant([1])), keys)
    not_later = graph.op("GreaterOrEqual", age, graph.constant(0, np.int32))
    visible = graph.op("And", not_later, graph.op("Less", age, graph.constant(context, np.int32)))
    return graph.op("Where", visible, graph.constant(0, np.float32), graph.constant(-np.inf, np.float32))


def rotation(graph: GraphBuilder, positions: str, weights: TransformerWeights) -> tuple[str, str]:
    """Cosines and sines of RoPE, each [tokens, 1, head_dim / 2, 1], in float32 as the model was trained."""
    exponents = rope_exponents(weights.head_dim, weights.max_period).reshape(1, 1, -1, 1)
    theta = graph.op("Exp", graph.constant(exponents, np.float32))
    as_float = graph.op("Cast", positions, to=FLOAT)
    angles = graph.op("Mul", graph.op("Reshape", as_float, graph.constant([-1, 1, 1, 1])), theta)
    return graph.op("Cos", angles), graph.op("Sin", angles)


def project_heads(
    graph: GraphBuilder, x: str, name: str, layer: LayerWeights, heads: int, turn: tuple[str, str]
) -> Heads:
    """in_proj and RoPE. Queries and keys are rotated as one tensor of 2 x heads."""
    model = layer.in_proj.shape[1]
    head_dim = model // heads
    projected = linear(graph, x, f"{name}.self_attn.in_proj.weight", layer.in_proj)
    turning, values = graph.ops("Split", projected, graph.constant([2 * model, model]), axis=-1, count=2)
    pairs = graph.op("Reshape", turning, graph.constant([1, -1, 2 * heads, head_dim // 2, 2]))
    even, odd = graph.ops("Split", pairs, graph.constant([1, 1]), axis=-1, count=2)
    cosine, sine = turn
    turned_even = graph.op("Sub", graph.op("Mul", even, cosine), graph.op("Mul", odd, sine))
    turned_odd = graph.op("Add", graph.op("Mul", even, sine), graph.op("Mul", odd, cosine))
    turned = graph.op("Concat", turned_even, turned_odd, axis=-1)
    turned_heads = _by_heads(graph, turned, 2 * heads, head_dim)
    queries, keys = graph.ops("Split", turned_heads, graph.constant([heads, heads]), axis=1, count=2)
    return Heads(queries, keys, _by_heads(graph, values, heads, head_dim))


def attend(graph: GraphBuilder, heads: Heads, visible: str, head_dim: int) -> str:
    """softmax(q . k / sqrt(head_dim) + visible) . v, as [1, queries, heads * head_dim]."""
    scale = graph.constant(1 / math.sqrt(head_dim), np.float32)
    keys = graph.op("Transpose", heads.keys, perm=[0, 1, 3, 2])
    scores = graph.op("MatMul", graph.op("Mul", heads.queries, scale), keys)
    shares = graph.op("Softmax", graph.op("Add", scores, visible), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", shares, heads.values), perm=[0, 2, 1, 3])
    return graph.op("Reshape", mixed, graph.constant([0, 0, -1]))


def norm(graph: GraphBuilder, x: str, name: str, weight: Array, bias: Array) -> str:
    return graph.op(
        "LayerNormalization",
        x,
        graph.weight(f"{name}.weight", weight),
        graph.weight(f"{name}.bias", bias),
        axis=-1,
        epsilon=NORM_EPSILON,
    )


def add_scaled(graph: GraphBuilder, x: str, change: str, name: str, scale: Array) -> str:
    """x + scale * change."""
    return graph.op("Add", x, graph.op("Mul", change, graph.weight(f"{name}.scale", scale)))


def feed_forward(graph: GraphBuilder, x: str, name: str, layer: LayerWeights) -> str:
    """W2 gelu(W1 x), with the exact gelu."""
    wide = linear(graph, x, f"{name}.ffn.0.weight", layer.ffn_up)
    erf = graph.op("Erf", graph.op("Div", wide, graph.constant(math.sqrt(2), np.float32)))
    gate = graph.op("Mul", wide, graph.op("Add", erf, graph.constant(1, np.float32)))
    halved = graph.op("Mul", gate, graph.constant(0.5, np.float32))
    return linear(graph, halved, f"{name}.ffn.2.weight", layer.ffn_down)


def dequantize(graph: GraphBuilder, codes: str, weights: DequantizerWeights) -> str:
    """int32 [1, frames, quantizers] -> [1, frames, features]."""
    total = ""
    for index, codebook in enumerate(weights.codebooks):
        name = f"quantizer.quantizers.{index}"
        column = graph.op("Gather", codes, graph.constant(index), axis=2)
        row = graph.op("Gather", graph.weight(f"{name}.codebook.weight", codebook), column, axis=0)
        part = affine(graph, row, f"{name}.out_proj", weights.out_proj_w[index], weights.out_proj_b[index])
        total = graph.op("Add", total, part) if total else part
    return affine(graph, total, "quantizer.output_proj", weights.output_proj_w, weights.output_proj_b)


def quantize(graph: GraphBuilder, x: str, counted: str, weights: QuantizerWeights) -> str:
    """[1, frames, features] -> int32 [1, frames, quantizers].

    `counted`, [frames, 1], is 1 for each frame that counts and 0 for the others, which are searched for as zeros.
    """
    rest = affine(graph, x, "quantizer.input_proj", weights.input_proj_w, weights.input_proj_b)
    rest = graph.op("Mul", rest, counted)
    codes = []
    for index, codebook in enumerate(weights.codebooks):
        name = f"quantizer.quantizers.{index}"
        looked_up = affine(graph, rest, f"{name}.in_proj", weights.in_proj_w[index], weights.in_proj_b[index])
        rows = graph.weight(f"{name}.codebook.weight", codebook)
        # The nearest row by angle has the largest product once all rows have length 1; the length of what is looked up
        # does not matter. The runtime divides the rows once, when it loads the graph.
        lengths = np.maximum(np.linalg.norm(codebook.astype(np.float64), axis=1, keepdims=True), ROW_EPSILON)
        divisor = graph.weight(f"{name}.codebook.lengths", lengths.astype(np.float32))
        unit_columns = graph.op("Transpose", graph.op("Div", rows, divisor), perm=[1, 0])
        likeness = graph.op("MatMul", looked_up, unit_columns)
        codes.append(graph.op("ArgMax", likeness, axis=-1, keepdims=1))
        if index + 1 < len(weights.codebooks):
            row = graph.op("Gather", rows, graph.op("Squeeze", codes[-1], graph.constant([2])), axis=0)
            part = affine(graph, row, f"{name}.out_proj", weights.out_proj_w[index], weights.out_proj_b[index])
            rest = graph.op("Sub", rest, graph.op("Mul", part, counted))
    return graph.op("Cast", graph.op("Concat", *codes, axis=2), to=INT32)


def _by_heads(graph: GraphBuilder, x: str, heads: int, head_dim: int) -> str:
    """[1, tokens, ...] -> [1, heads, tokens, head_dim]."""
    apart = graph.op("Reshape", x, graph.constant([1, -1, heads, head_dim]))
    return graph.op("Transpose", apart, perm=[0, 2, 1, 3])
