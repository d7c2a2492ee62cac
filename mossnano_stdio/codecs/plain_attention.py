"""A graph of ours with its attention in plain nodes, for providers that have no such node as the CPU has.

    per transformer t, in the place of last_t and total_t:
    cosines_t  float32 [tokens, ring_dim/2]         RoPE of each new token
    sines_t    float32 [tokens, ring_dim/2]
    mask_t     float32 [tokens, past + tokens]      what is added to each score: 0, or HIDDEN
    per layer n:
    keys_n, values_n -> keys_out_n, values_out_n   float32 [1, heads, past, ring_dim]   the last so many tokens

Rules of this room:

- GroupQueryAttention computes in float32 on CPUs only; on GPUs it takes 16 bits, which are not ours to take. Run there
  by turns with a CPU, nano would not be quicker than on the CPU alone.
- So each such node becomes products, a sum and a softmax, which every provider has, as the graph is loaded. All other
  nodes, and the file of the weights, stay what they are. What was built for the CPU needs nothing built beside it.
- Nothing is written in place: the past goes in, and comes out with the new tokens behind it and the oldest cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mossnano_stdio.codecs.engine import UnfitRuntimeError
from mossnano_stdio.codecs.rings import RingSpec
from mossnano_stdio.errors import BundleError
from mossnano_stdio.weights import Graph

ATTENTION = "GroupQueryAttention"
MICROSOFT = "com.microsoft"
HIDDEN = -1e30  # added to a score: its share of the softmax is 0


def with_plain_attention(graph: Graph, specs: Sequence[RingSpec]) -> bytes:
    """The graph as ONNX. Its weights stay where they are."""
    try:
        import onnx
    except ImportError:
        raise UnfitRuntimeError(
            f"{graph.path}: on other providers than 'cpu' its attention is rewritten as it is loaded, "
            "which takes onnx, and that is not installed: pip install onnx"
        ) from None
    graph.model.check_content()
    try:
        model = onnx.load_model_from_string(graph.path.read_bytes())
    except Exception as error:  # noqa: BLE001 - protobuf's own, which is of no class that could be named
        raise BundleError(f"{graph.path}: is no ONNX graph ({error})") from None
    body = model.graph
    spec_of_layer = [spec for spec in specs for _ in range(spec.layers)]
    nodes = list(body.node)
    del body.node[:]
    for node in nodes:
        if node.op_type == ATTENTION and spec_of_layer:
            body.node.extend(_plain(onnx.helper, node, spec_of_layer.pop(0)))
        else:
            body.node.append(node)
    if spec_of_layer:
        raise BundleError(f"{graph.path}: has {len(spec_of_layer)} layers less than its facts say")
    body.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value, np.int64), name) for name, value in _constants(specs).items()
    )
    gone = {f"{kind}_{spec.number}" for spec in specs for kind in ("last", "total", "cosines", "sines")}
    for values in (body.input, body.output):
        kept = [value for value in values if value.name not in gone and not _is_ring(value.name)]
        del values[:]
        values.extend(kept)
    describe = onnx.helper.make_tensor_value_info
    for spec in specs:
        for name, shape in (*turns_shapes(spec), *past_shapes(spec)):
            body.input.append(describe(name, onnx.TensorProto.FLOAT, shape))
        for name, shape in past_shapes(spec, "_out"):
            body.output.append(describe(name, onnx.TensorProto.FLOAT, shape))
    plain: bytes = model.SerializeToString()
    return plain


def turns_shapes(spec: RingSpec) -> list[tuple[str, tuple[int | None, ...]]]:
    """The inputs of a transformer."""
    turns = (None, spec.ring_dim // 2)
    return [
        (f"cosines_{spec.number}", turns),
        (f"sines_{spec.number}", turns),
        (f"mask_{spec.number}", (None, None)),
    ]


def past_tokens(spec: RingSpec) -> int:
    """How many its layers remember. Where a token sees only itself it is one all the same, which the mask hides: not
    every provider takes a tensor of nothing.
    """
    return max(1, spec.needed_tokens)


def past_shapes(spec: RingSpec, suffix: str = "") -> list[tuple[str, tuple[int, ...]]]:
    """What its layers remember."""
    shape = (1, spec.heads, past_tokens(spec), spec.ring_dim)
    layers = range(spec.first_layer, spec.first_layer + spec.layers)
    return [(f"{kind}{suffix}_{layer}", shape) for layer in layers for kind in ("keys", "values")]


def _is_ring(name: str) -> bool:
    kind, _, layer = name.rpartition("_")
    return kind in ("keys", "values", "keys_out", "values_out") and layer.isdecimal()


def _constants(specs: Sequence[RingSpec]) -> dict[str, list[int]]:
    """What the nodes below are told by name."""
    constants = {"plain.turned_and_not": [2, 1], "plain.each": [1, 1], "plain.first_turn": [0]}
    constants |= {"plain.tokens_axis": [2], "plain.end": [np.iinfo(np.int64).max]}
    for spec in specs:
        constants[f"plain.apart_{spec.number}"] = [-1, 3, spec.heads, spec.ring_dim]
        constants[f"plain.together_{spec.number}"] = [1, -1, spec.heads * spec.ring_dim]
        constants[f"plain.past_{spec.number}"] = [-past_tokens(spec)]
    return constants


def _plain(helper: Any, attention: Any, spec: RingSpec) -> Iterator[Any]:
    """The nodes that do what `attention` does."""
    projected, _, _, keys, values, *_ = attention.input
    attended, keys_out, values_out = attention.output
    (scale,) = (attribute.f for attribute in attention.attribute if attribute.name == "scale")
    cosines, sines, mask = (name for name, _ in turns_shapes(spec))

    def named(result: str) -> str:
        return f"{attention.name}:{result}"

    def node(op_type: str, inputs: list[str], *results: str, domain: str = "", **attributes: Any) -> Any:
        name = named(f"{op_type}.{results[0]}")
        return helper.make_node(op_type, inputs, results, name=name, domain=domain or None, **attributes)

    apart, by_part, turning, turned = map(named, ("apart", "by_part", "turning", "turned"))
    queries, new_keys, new_values = map(named, ("queries", "new_keys", "new_values"))
    all_keys, all_values = map(named, ("all_keys", "all_values"))
    scores, masked, shares, sums, by_token = map(named, ("scores", "masked", "shares", "sums", "by_token"))

    yield node("Reshape", [projected, f"plain.apart_{spec.number}"], apart)
    yield node("Transpose", [apart], by_part, perm=[1, 2, 0, 3])  # [3, heads, tokens, ring_dim]
    yield node("Split", [by_part, "plain.turned_and_not"], turning, new_values, axis=0)
    turn = [turning, "plain.first_turn", cosines, sines]  # queries and keys as a batch of two
    yield node("RotaryEmbedding", turn, turned, domain=MICROSOFT)
    yield node("Split", [turned, "plain.each"], queries, new_keys, axis=0)
    for past, new, joined, out in (
        (keys, new_keys, all_keys, keys_out),
        (values, new_values, all_values, values_out),
    ):
        yield node("Concat", [past, new], joined, axis=2)
        yield node("Slice", [joined, f"plain.past_{spec.number}", "plain.end", "plain.tokens_axis"], out)
    yield node("FusedMatMul", [queries, all_keys], scores, domain=MICROSOFT, transB=1, alpha=scale)
    yield node("Add", [scores, mask], masked)
    yield node("Softmax", [masked], shares, axis=-1)
    yield node("MatMul", [shares, all_values], sums)
    yield node("Transpose", [sums], by_token, perm=[0, 2, 1, 3])
    yield node("Reshape", [by_token, f"plain.together_{spec.number}"], attended)
