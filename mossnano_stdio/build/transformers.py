"""The transformers of our own streaming graphs, in fewer and larger nodes than the official ones.

    per transformer t:
    cosines_t  float32 [slots, ring_dim/2]  RoPE of the token that goes into each slot; only those of new tokens count
    sines_t    float32 [slots, ring_dim/2]
    last_t     int32 [1]                    the slot of the last new token
    total_t    int32 [1]                    slots in use, last_t + 1
    per layer n, counted through all transformers:
    keys_n, values_n -> keys_out_n, values_out_n   float32 [1, heads, slots, ring_dim]

Rules of this room:

- Attention is one GroupQueryAttention node: it rotates, puts the new keys and values into their slots, masks by the
  sliding window and attends. Where inputs and outputs are bound to the same memory, it copies nothing.
- Layer scales are multiplied into the matrices before them, in float64.
- `stack_facts`, which goes into `mossnano.json`, says what the graph's inputs do not say about its transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.build.blocks import norm
from mossnano_stdio.build.builder import Dimension, GraphBuilder
from mossnano_stdio.build.model import (
    Array,
    LayerWeights,
    Module,
    TransformerWeights,
    rope_exponents,
    transformers,
)

MICROSOFT = "com.microsoft"
ROTARY_MULTIPLE = 16  # GroupQueryAttention rotates heads of a multiple of this size
CACHE_WAY_VALUES = 1024  # rows that lie so many float32 apart (4 KiB) push each other out of the first-level cache
PADDING_VALUES = 16  # one cache line
NO_SINK = np.finfo(np.float32).min  # exp(NO_SINK - score) is 0

Exact = NDArray[np.float64]


class Stack:
    """Adds transformers to one graph, and counts them."""

    def __init__(self, graph: GraphBuilder) -> None:
        self._graph = graph
        self._transformers = 0
        self._layers = 0

    def run(self, x: str, name: str, module: TransformerWeights) -> str:
        """Add the layers of a transformer on [1, tokens, model], without its input_proj and output_proj."""
        graph, number, ring_dim = self._graph, self._transformers, _ring_dim(module)
        turns: list[Dimension] = [f"slots_{number}", ring_dim // 2]
        ring: list[Dimension] = [1, module.heads, f"slots_{number}", ring_dim]
        last, total = (graph.input(f"{kind}_{number}", np.int32, [1]) for kind in ("last", "total"))
        cosines, sines = (graph.input(f"{kind}_{number}", np.float32, turns) for kind in ("cosines", "sines"))
        for index, layer in enumerate(module.layers):
            keys, values = (graph.input(f"{kind}_{self._layers}", np.float32, ring) for kind in ("keys", "values"))
            outputs = [f"{kind}_out_{self._layers}" for kind in ("keys", "values")]
            slots = Slots(last, total, cosines, sines, keys, values)
            with graph.scope(f"layers.{index}"):
                x = _layer(graph, x, f"{name}.layers.{index}", module, layer, slots, outputs)
            for output in outputs:
                graph.output(output, np.float32, ring)
            self._layers += 1
        self._transformers += 1
        return x


def stack_facts(modules: Sequence[Module]) -> dict[str, Any]:
    """What `mossnano.json` says about the transformers, for the code that runs the graph."""
    return {
        "transformers": [
            {
                "layers": len(module.layers),
                "heads": module.heads,
                "ring_dim": _ring_dim(module),
                "context_tokens": module.context,
                "tokens_per_frame": module.tokens_per_frame,
                "angles": _angles(module),
            }
            for _, module in transformers(modules)
        ]
    }


def output_matrix(module: TransformerWeights) -> Exact:
    """What is multiplied with the tokens behind the last layer."""
    if module.maybe_output_proj is None:
        return np.eye(module.model)
    return module.maybe_output_proj.astype(np.float64)


def linear(graph: GraphBuilder, x: str, name: str, matrix: Array | Exact) -> str:
    """W x of every token."""
    # The matrix lies as [out, in], which the runtime packs faster when it loads the graph.
    weight = graph.weight(name, matrix.astype(np.float32))
    return graph.op("FusedMatMul", x, weight, transB=1, domain=MICROSOFT)


class Slots(NamedTuple):
    """The inputs of an attention node that hold its slots. The last two are outputs of the graph too."""

    last: str
    total: str
    cosines: str
    sines: str
    keys: str
    values: str


def attend(
    graph: GraphBuilder, projected: str, slots: Slots, outputs: list[str], *, heads: int, head_dim: int, context: int
) -> str:
    """Rotate and append new tokens, attend from them to at most `context` tokens. `outputs` names keys and values."""
    # The sink adds nothing to the softmax, but with one the runtime takes the plain kernel on CPUs. The tiled kernel
    # that it takes otherwise needs twice the time here.
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
    graph: GraphBuilder,
    x: str,
    name: str,
    module: TransformerWeights,
    layer: LayerWeights,
    slots: Slots,
    outputs: list[str],
) -> str:
    heads, head_dim = module.heads, module.head_dim
    normed = norm(graph, x, f"{name}.norm1", layer.norm1_w, layer.norm1_b)
    projected = linear(graph, normed, f"{name}.in_proj", _ring_rows(layer.in_proj, module))
    attended = attend(graph, projected, slots, outputs, heads=heads, head_dim=head_dim, context=module.context)
    by_head = _scaled(layer.out_proj, layer.scale1).reshape(-1, heads, head_dim)
    padded = np.pad(by_head, ((0, 0), (0, 0), (0, _ring_dim(module) - head_dim)))
    x = graph.op("Add", x, linear(graph, attended, f"{name}.out_proj", padded.reshape(len(padded), -1)))

    normed = norm(graph, x, f"{name}.norm2", layer.norm2_w, layer.norm2_b)
    padding = (0, PADDING_VALUES if len(layer.ffn_up) % CACHE_WAY_VALUES == 0 else 0)
    wide = linear(graph, normed, f"{name}.ffn_up", np.pad(layer.ffn_up, (padding, (0, 0))))
    gated = graph.op("Gelu", wide, domain=MICROSOFT)
    ffn_down = np.pad(_scaled(layer.ffn_down, layer.scale2), ((0, 0), padding))
    return graph.op("Add", x, linear(graph, gated, f"{name}.ffn_down", ffn_down))


def _ring_rows(in_proj: Array, module: TransformerWeights) -> Exact:
    """The rows of in_proj for queries, keys and values, their heads padded to the ring's size."""
    ring_dim = _ring_dim(module)
    queries, keys, values = in_proj.reshape(3, module.heads, module.head_dim, -1)
    padded = np.zeros((3, module.heads, ring_dim, in_proj.shape[1]))
    # The node rotates pairs that lie half a head apart, the model's lie side by side. Queries and keys are reordered
    # alike, so their products stay what they are.
    for part, turned in ((0, queries), (1, keys)):
        for half in (0, 1):
            rows = turned[:, half::2]
            padded[part, :, half * ring_dim // 2 :][:, : rows.shape[1]] = rows
    padded[2, :, : values.shape[1]] = values
    return padded.reshape(3 * module.heads * ring_dim, -1)


def _scaled(matrix: Array, scale: Array) -> Exact:
    scaled: Exact = scale.astype(np.float64)[:, np.newaxis] * matrix
    return scaled


def _ring_dim(module: TransformerWeights) -> int:
    return -(-module.head_dim // ROTARY_MULTIPLE) * ROTARY_MULTIPLE


def _angles(module: TransformerWeights) -> list[float]:
    """How far each pair turns from one token to the next; 0 for the pairs that pad a head."""
    # float32, as the model was trained. Who runs the graph multiplies them by positions in float64.
    angles = np.exp(rope_exponents(module.head_dim, module.max_period).astype(np.float64)).astype(np.float32)
    return [*map(float, angles), *[0.0] * (_ring_dim(module) // 2 - len(angles))]
