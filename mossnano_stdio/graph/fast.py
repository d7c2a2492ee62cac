"""The fast graph: the same decoder as `decode_step`, in fewer and larger nodes, with a contract of its own.

    rows       int32 [frames, quantizers]   row of each code in one table of all codebooks; the last row is all zeros
    per transformer t:
    cosines_t  float32 [slots, ring_dim/2]  RoPE of the token that goes into each slot; only those of new tokens count
    sines_t    float32 [slots, ring_dim/2]
    last_t     int32 [1]                    the slot of the last new token
    total_t    int32 [1]                    slots in use, last_t + 1
    per layer n, counted through all transformers:
    keys_n, values_n -> keys_out_n, values_out_n   float32 [1, heads, slots, ring_dim]
    audio      float32 [samples, channels]

Rules of this room:

- Whatever is linear and stands side by side is one matrix, multiplied out here in float64: codebook projections,
  output_proj, patch and input_proj; output_proj, patch and the next input_proj; layer scales and what they scale.
- Each codebook row carries a 1, by which its bias is multiplied. The row of zeros, for a codebook that is left out,
  therefore adds nothing, not even a bias: a prefix of the quantizers needs no other graph.
- Attention is one GroupQueryAttention node: it rotates, appends keys and values to what lies in their slots, masks
  by the sliding window and attends. Where inputs and outputs are bound to the same memory, nothing is copied.
- The nodes are what is to be run: the runtime loads this graph with its own optimisations off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.bundle import SidecarGraph
from mossnano_stdio.graph.builder import Dimension, GraphBuilder, save_graphs
from mossnano_stdio.graph.weights import (
    NORM_EPSILON,
    Array,
    DecoderWeights,
    DequantizerWeights,
    LayerWeights,
    Module,
    PatchStep,
    TransformerWeights,
    rope_exponents,
    transformers,
)

FAST_FILE = "mossnano_fast.onnx"
FAST_DATA = "mossnano_fast.data"

MICROSOFT = "com.microsoft"
ROTARY_MULTIPLE = 16  # GroupQueryAttention rotates heads of a multiple of this size
CACHE_WAY_VALUES = 1024  # rows that lie so many float32 apart (4 KiB) push each other out of the first-level cache
PADDING_VALUES = 16  # one cache line
NO_SINK = np.finfo(np.float32).min  # exp(NO_SINK - score) is 0

Exact = NDArray[np.float64]


def fast_decode_step(decoder: DecoderWeights) -> GraphBuilder:
    graph = GraphBuilder("decode_step_fast")
    joints = list(_joints(decoder))
    x = _look_up(graph, decoder.dequantizer)
    layer_number = 0
    for number, (index, module) in enumerate(transformers(decoder.modules)):
        name = f"decoder.{index}"
        with graph.scope(name):
            x = _through(graph, x, f"{name}.in", joints[number], module.model)
            attention = _Attention(graph, number, module)
            for layer_index, layer in enumerate(module.layers):
                with graph.scope(f"layers.{layer_index}"):
                    x = _layer(graph, x, f"{name}.layers.{layer_index}", layer, attention, layer_number)
                layer_number += 1
    channels = decoder.format.channels
    samples = _linear(graph, x, "audio.weight", joints[-1].matrix)
    graph.op("Reshape", samples, graph.constant([-1, channels]), result="audio")
    graph.output("audio", np.float32, ["samples", channels])
    return graph


def save_fast_graph(folder: Path, decoder: DecoderWeights) -> SidecarGraph:
    """Write the graph and its weights; gives what `mossnano.json` says about them."""
    save_graphs(folder, {FAST_FILE: fast_decode_step(decoder)}, FAST_DATA)
    contexts = [
        {
            "layers": len(module.layers),
            "heads": module.heads,
            "ring_dim": _ring_dim(module),
            "context_tokens": module.context,
            "tokens_per_frame": module.tokens_per_frame,
            "angles": _angles(module),
        }
        for _, module in transformers(decoder.modules)
    ]
    return SidecarGraph(file=FAST_FILE, data=(FAST_DATA,), facts={"transformers": contexts})


class _Joint(NamedTuple):
    """All that is linear between one place and the next: tokens -> `patch` times as many tokens, flattened."""

    matrix: Exact  # [patch * out, in]
    maybe_bias: Exact | None  # [patch * out]


class Slots(NamedTuple):
    """What attention finds in its slots, and where the new tokens go: inputs of the graph, the last two outputs too."""

    last: str
    total: str
    cosines: str
    sines: str
    keys: str
    values: str


class _Attention:
    """Attention in one transformer. What its layers share are inputs of the graph."""

    def __init__(self, graph: GraphBuilder, number: int, module: TransformerWeights) -> None:
        self._module = module
        self._ring_dim = _ring_dim(module)
        self._slots = f"slots_{number}"
        turns: list[Dimension] = [self._slots, self._ring_dim // 2]
        self._last, self._total = (graph.input(f"{name}_{number}", np.int32, [1]) for name in ("last", "total"))
        self._cosines, self._sines = (
            graph.input(f"{name}_{number}", np.float32, turns) for name in ("cosines", "sines")
        )

    def __call__(self, graph: GraphBuilder, x: str, name: str, layer: LayerWeights, layer_number: int) -> str:
        module = self._module
        shape: list[Dimension] = [1, module.heads, self._slots, self._ring_dim]
        keys, values = (graph.input(f"{kind}_{layer_number}", np.float32, shape) for kind in ("keys", "values"))
        outputs = [f"{kind}_out_{layer_number}" for kind in ("keys", "values")]
        projected = _linear(graph, x, f"{name}.in_proj", self._in_proj(layer))
        slots = Slots(self._last, self._total, self._cosines, self._sines, keys, values)
        attended = attend(
            graph, projected, slots, outputs, heads=module.heads, head_dim=module.head_dim, context=module.context
        )
        for output in outputs:
            graph.output(output, np.float32, shape)
        return _linear(graph, attended, f"{name}.out_proj", self._out_proj(layer))

    def _in_proj(self, layer: LayerWeights) -> Exact:
        """Rows for queries, keys and values, their heads padded to the ring's size.

        A pair that RoPE turns is apart by half a head, not side by side: queries and keys are reordered alike, so
        their products stay what they are.
        """
        heads, ring_dim = self._module.heads, self._ring_dim
        queries, keys, values = layer.in_proj.reshape(3, heads, self._module.head_dim, -1)
        padded = np.zeros((3, heads, ring_dim, layer.in_proj.shape[1]))
        for part, turned in ((0, queries), (1, keys)):
            for half in (0, 1):
                rows = turned[:, half::2]
                padded[part, :, half * ring_dim // 2 :][:, : rows.shape[1]] = rows
        padded[2, :, : values.shape[1]] = values
        return padded.reshape(3 * heads * ring_dim, -1)

    def _out_proj(self, layer: LayerWeights) -> Exact:
        scaled = _scaled(layer.out_proj, layer.scale1).reshape(-1, self._module.heads, self._module.head_dim)
        missing = self._ring_dim - self._module.head_dim
        return np.pad(scaled, ((0, 0), (0, 0), (0, missing))).reshape(len(scaled), -1)


def attend(
    graph: GraphBuilder, projected: str, slots: Slots, outputs: list[str], *, heads: int, head_dim: int, context: int
) -> str:
    """Rotate and append new tokens, attend from them to at most `context` tokens. `outputs` names keys and values."""
    # A sink that nothing falls into: with one, CPUs take the plain kernel. The tiled one needs twice the time here.
    sink = graph.constant(np.full(heads, NO_SINK), np.float32)
    optional = ["", ""]
    attended, *_ = graph.ops(
        "GroupQueryAttention",
        *[projected, *optional, slots.keys, slots.values, slots.last, slots.total, slots.cosines, slots.sines],
        *[*optional, sink],
        count=3,
        results=[f"{outputs[0]}.attended", *outputs],
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=heads,
        scale=1 / math.sqrt(head_dim),
        do_rotary=1,
        local_window_size=context,
    )
    return attended


def _layer(
    graph: GraphBuilder, x: str, name: str, layer: LayerWeights, attention: _Attention, layer_number: int
) -> str:
    normed = _norm(graph, x, f"{name}.norm1", layer.norm1_w, layer.norm1_b)
    x = graph.op("Add", x, attention(graph, normed, name, layer, layer_number))
    normed = _norm(graph, x, f"{name}.norm2", layer.norm2_w, layer.norm2_b)
    return graph.op("Add", x, _feed_forward(graph, normed, name, layer))


def _feed_forward(graph: GraphBuilder, x: str, name: str, layer: LayerWeights) -> str:
    hidden = len(layer.ffn_up)
    padding = (0, PADDING_VALUES if hidden % CACHE_WAY_VALUES == 0 else 0)
    wide = _linear(graph, x, f"{name}.ffn_up", np.pad(layer.ffn_up, (padding, (0, 0))))
    gated = graph.op("Gelu", wide, domain=MICROSOFT)
    return _linear(graph, gated, f"{name}.ffn_down", np.pad(_scaled(layer.ffn_down, layer.scale2), ((0, 0), padding)))


def _norm(graph: GraphBuilder, x: str, name: str, weight: Array, bias: Array) -> str:
    names = graph.weight(f"{name}.weight", weight), graph.weight(f"{name}.bias", bias)
    return graph.op("LayerNormalization", x, *names, axis=-1, epsilon=NORM_EPSILON)


def _linear(graph: GraphBuilder, x: str, name: str, matrix: Array | Exact) -> str:
    """W x of every token. The matrix is kept as [out, in]: so the runtime packs it faster when it loads the graph."""
    weight = graph.weight(name, matrix.astype(np.float32))
    return graph.op("FusedMatMul", x, weight, transB=1, domain=MICROSOFT)


def _through(graph: GraphBuilder, x: str, name: str, joint: _Joint, model: int) -> str:
    """Tokens into `patch` times as many, [1, tokens, model]."""
    x = _linear(graph, x, f"{name}.weight", joint.matrix)
    if joint.maybe_bias is not None:
        x = graph.op("Add", x, graph.weight(f"{name}.bias", joint.maybe_bias.astype(np.float32)))
    return graph.op("Reshape", x, graph.constant([1, -1, model]))


def _look_up(graph: GraphBuilder, dequantizer: DequantizerWeights) -> str:
    """The codebook rows of each frame side by side, [frames, quantizers * (codebook_dim + 1)]."""
    quantizers, _, codebook_dim = dequantizer.codebooks.shape
    rows = dequantizer.codebooks.reshape(-1, codebook_dim)
    with_one = np.pad(rows, ((0, 0), (0, 1)), constant_values=1)
    table = graph.weight("codebooks", np.pad(with_one, ((0, 1), (0, 0))))
    found = graph.op("Gather", table, graph.input("rows", np.int32, ["frames", quantizers]), axis=0)
    return graph.op("Reshape", found, graph.constant([-1, quantizers * (codebook_dim + 1)]))


def _joints(decoder: DecoderWeights) -> Iterator[_Joint]:
    """One joint in front of each transformer, and one behind the last."""
    dequantizer = decoder.dequantizer
    basis = _dequantizer_basis(dequantizer)
    maybe_bias: Exact | None = dequantizer.output_proj_b.astype(np.float64)[np.newaxis, np.newaxis]
    for module in decoder.modules:
        basis = _carried(basis, module)
        maybe_bias = None if maybe_bias is None else _carried(maybe_bias, module)
        if isinstance(module, TransformerWeights):
            yield _Joint(_flat(basis).T, None if maybe_bias is None else _flat(maybe_bias)[0])
            basis, maybe_bias = module.output_proj.T.astype(np.float64)[:, np.newaxis], None
    yield _Joint(_flat(basis).T, None)


def _dequantizer_basis(dequantizer: DequantizerWeights) -> Exact:
    """What each value of the looked-up rows, and each of their ones, becomes: [values, 1, features]."""
    weights, biases = (tensor.astype(np.float64) for tensor in (dequantizer.out_proj_w, dequantizer.out_proj_b))
    values = np.concatenate([weights, biases[:, :, np.newaxis]], axis=2)  # [quantizers, rvq_dim, codebook_dim + 1]
    basis: Exact = values.transpose(0, 2, 1) @ dequantizer.output_proj_w.T.astype(np.float64)
    return basis.reshape(-1, 1, basis.shape[-1])


def _carried(basis: Exact, module: Module) -> Exact:
    """What vectors become, [vectors, tokens, features], in a patch or in a transformer's input_proj."""
    if isinstance(module, PatchStep):
        return _patched(basis, module)
    projected: Exact = basis @ module.input_proj.T.astype(np.float64)
    return projected


def _patched(x: Exact, step: PatchStep) -> Exact:
    vectors, tokens, features = x.shape
    apart = x.reshape(vectors, tokens, features // step.patch, step.patch)
    return apart.transpose(0, 1, 3, 2).reshape(vectors, tokens * step.patch, features // step.patch)


def _flat(basis: Exact) -> Exact:
    flat: Exact = basis.reshape(len(basis), -1)
    return flat


def _scaled(matrix: Array, scale: Array) -> Exact:
    scaled: Exact = scale.astype(np.float64)[:, np.newaxis] * matrix
    return scaled


def _ring_dim(module: TransformerWeights) -> int:
    return -(-module.head_dim // ROTARY_MULTIPLE) * ROTARY_MULTIPLE


def _angles(module: TransformerWeights) -> list[float]:
    """By how much a token's pairs turn further than those of the token before; 0 for pairs that only fill up.

    float32, as the model was trained; what comes of them is computed in float64 by whoever runs the graph.
    """
    angles = np.exp(rope_exponents(module.head_dim, module.max_period).astype(np.float64)).astype(np.float32)
    return [*map(float, angles), *[0.0] * (_ring_dim(module) // 2 - len(angles))]
