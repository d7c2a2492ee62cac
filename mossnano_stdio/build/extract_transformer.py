"""One transformer out of a traced graph, from its output_proj back to its input_proj.

Rules of this room:

- What flows into output_proj is a sum: of input_proj and of two scaled changes per layer. Each norm sees the sum up
  to its layer, which puts the changes in order and checks that none is missing.
- Heads, context and period are read from the way between in_proj and out_proj, and must be the same in all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx

from mossnano_stdio.build.model import LayerWeights, TransformerWeights
from mossnano_stdio.build.tracing import (
    Linear,
    Site,
    Sites,
    TracedGraph,
    kinds_of,
    linear,
    norm,
    scalars,
    shaped,
    target_shape,
)

# The ways to compare an age with a limit, and what is to be added to that limit for the context. It is the same for
# a mask of what is seen and for its opposite: age < 5 is seen, age >= 5 is hidden, a context of 5 tokens either way.
COMPARISONS = {"Less": 0, "GreaterOrEqual": 0, "LessOrEqual": 1, "Greater": 1}


class _AttentionSite(NamedTuple):
    heads: int
    context: int
    max_period: float


def extract_transformer(graph: TracedGraph, ends: Sites) -> tuple[TransformerWeights, Sites]:
    """The transformer that `ends` come out of, and what flows into it. Its tokens per frame are left at 0.

    They are the sum of all its changes where it has no output_proj.
    """
    maybe_output_proj = None if any(site.kind == "Mul" for site in ends) else linear(graph, None, ends)
    sums = ends if maybe_output_proj is None else maybe_output_proj.sources
    changes = [site for site in sums if site.kind == "Mul"]
    start = sums - set(changes)
    end = changes[0] if maybe_output_proj is None else maybe_output_proj.site  # for errors
    if not changes or len(changes) % 2:
        raise graph.wrong(end, f"a sum of input_proj and two changes per layer is needed, found {kinds_of(sums)}")
    first_proj = linear(graph, end, start)
    changes.sort(key=lambda change: len(_sum_before(graph, change)))
    layers: list[LayerWeights] = []
    attentions: set[_AttentionSite] = set()
    so_far = start
    for first, second in zip(changes[::2], changes[1::2], strict=True):
        out_proj = linear(graph, first, graph.sources_of(first))
        layers.append(_layer(graph, out_proj, first, second, so_far))
        attentions.add(_attention(graph, out_proj, layers[-1].in_proj.shape[1]))
        so_far |= {first, second}
    if len(attentions) != 1:
        raise graph.wrong(end, f"the layers before it attend differently: {sorted(attentions)}")
    heads, context, max_period = attentions.pop()
    model = layers[0].in_proj.shape[1]
    # Without an input_proj, what is found there is the output_proj before it, whose features a patch has put together.
    has_input_proj = first_proj.matrix.shape[0] == model
    weights = TransformerWeights(
        maybe_input_proj=first_proj.matrix if has_input_proj else None,
        layers=tuple(layers),
        maybe_output_proj=(
            None
            if maybe_output_proj is None
            else shaped(graph, maybe_output_proj.site, maybe_output_proj.matrix, None, model)
        ),
        model=model,
        heads=heads,
        context=context,
        tokens_per_frame=0,
        max_period=max_period,
    )
    return weights, first_proj.sources if has_input_proj else start


def _sum_before(graph: TracedGraph, change: Site) -> Sites:
    """The sum that the norm before a change sees: change <- matrix <- matrix <- norm <- sum."""
    second = linear(graph, change, graph.sources_of(change))
    first = linear(graph, second.site, second.sources)
    return norm(graph, first.site, first.sources).sources


def _layer(graph: TracedGraph, out_proj: Linear, first: Site, second: Site, so_far: Sites) -> LayerWeights:
    in_proj = linear(graph, out_proj.site, out_proj.sources)
    norm1 = norm(graph, in_proj.site, in_proj.sources)
    ffn_down = linear(graph, second, graph.sources_of(second))
    ffn_up = linear(graph, ffn_down.site, ffn_down.sources)
    norm2 = norm(graph, ffn_up.site, ffn_up.sources)
    for found, needed in ((norm1, so_far), (norm2, so_far | {first})):
        if found.sources != needed:
            raise graph.wrong(found.site, f"it must see {kinds_of(needed)}, found {kinds_of(found.sources)}")
    model, hidden = in_proj.matrix.shape[1], ffn_up.matrix.shape[0]
    return LayerWeights(
        norm1_w=shaped(graph, norm1.site, norm1.weight, model),
        norm1_b=shaped(graph, norm1.site, norm1.bias, model),
        in_proj=shaped(graph, in_proj.site, in_proj.matrix, 3 * model, model),
        out_proj=shaped(graph, out_proj.site, out_proj.matrix, model, model),
        scale1=shaped(graph, first, first.tensors[0].reshape(-1), model),
        norm2_w=shaped(graph, norm2.site, norm2.weight, model),
        norm2_b=shaped(graph, norm2.site, norm2.bias, model),
        ffn_up=shaped(graph, ffn_up.site, ffn_up.matrix, hidden, model),
        ffn_down=shaped(graph, ffn_down.site, ffn_down.matrix, model, hidden),
        scale2=shaped(graph, second, second.tensors[0].reshape(-1), model),
    )


def _attention(graph: TracedGraph, out_proj: Linear, model: int) -> _AttentionSite:
    way = list(graph.way_into(out_proj.site.node.input[0]))
    heads, head_dim = _heads(graph, out_proj.site, model, way)
    contexts = {
        int(limit) + COMPARISONS[node.op_type]
        for node in way
        if node.op_type in COMPARISONS
        for limit in scalars(graph, node)
        if limit > 0
    }
    if len(contexts) != 1:
        found = sorted(contexts) or "none"
        raise graph.wrong(out_proj.site, f"one context that ages are compared with is needed, found {found}")
    return _AttentionSite(heads, contexts.pop(), _max_period(graph, out_proj.site, head_dim, way))


def _heads(graph: TracedGraph, site: Site, model: int, way: Sequence[onnx.NodeProto]) -> tuple[int, int]:
    """Count and size of the heads: how a Reshape splits the model's features in its last two dimensions."""
    shapes = [target_shape(graph, node, way) for node in way if node.op_type == "Reshape"]
    splits = [(shape[-2] or 0, shape[-1] or 0) for shape in shapes if len(shape) > 2]
    whole = [(count, size) for count, size in splits if count > 0 and size > 0 and count * size == model]
    # Where the size is computed while the graph runs, it follows from the count.
    half = [(count, model // count) for count, size in splits if count > 0 >= size and model % count == 0]
    if not whole and not half:
        raise graph.wrong(site, f"no Reshape before it splits {model} features into heads")
    return max(whole or half, key=lambda split: split[1])


def _max_period(graph: TracedGraph, site: Site, head_dim: int, way: Sequence[onnx.NodeProto]) -> float:
    """From theta_j = period ** (-2 j / head_dim), written as thetas, as their logarithms, or as the factor in those."""
    if head_dim == 2:
        return 1.0  # a single pair turns by its position, whatever the period
    cosines = [node for node in way if node.op_type == "Cos"]
    nodes = [node for cosine in cosines[:1] for node in graph.way_into(cosine.input[0])]
    for values in (graph.maybe_constant(name) for node in nodes for name in node.input):
        if values is None or values.dtype.kind != "f":
            continue
        flat = values.astype(np.float64).reshape(-1)
        if flat.size == head_dim // 2 > 1:
            logarithm = flat[1] if flat[0] == 0 else math.log(flat[1])
            return _rounded(math.exp(-logarithm * head_dim / 2))
        if flat.size == 1 and flat[0] < -1:
            return _rounded(math.exp(-flat[0] / 2))
    raise graph.wrong(site, "the period of the rotation (Cos) before it cannot be read")


def _rounded(period: float) -> float:
    """A period as it was before float32 made it nearly that."""
    whole = round(period)
    return float(whole) if math.isclose(period, whole, rel_tol=1e-5) else period
