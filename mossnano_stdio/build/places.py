"""Places in a traced graph: matrix, matrix with bias, norm. Each is found through what flows out of it.

Rules of this room:

- A place is asked for where it must be; anything else there is a BundleError that names the node found.
- Matrices come out as [out, in] whichever way the exporter turned them, float32 and of the shape called for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx

from mossnano_stdio.build.model import NORM_EPSILON, Array
from mossnano_stdio.build.tracing import Site, TracedGraph

Sites = frozenset[Site]


class Linear(NamedTuple):
    """A matrix, and what flows into it."""

    site: Site
    matrix: Array  # [out, in]
    sources: Sites


class Affine(NamedTuple):
    """A matrix and a bias, and what flows into the matrix."""

    site: Site
    matrix: Array  # [out, in]
    bias: Array  # [out]
    sources: Sites


class Norm(NamedTuple):
    """A LayerNormalization, and what flows into it."""

    site: Site
    weight: Array
    bias: Array
    sources: Sites


def only(graph: TracedGraph, after: Site | None, sources: Iterable[Site], *kinds: str) -> Site:
    """The one site among `sources`, of one of `kinds`; it is looked for before `after`."""
    found = list(sources)
    if len(found) != 1 or found[0].kind not in kinds:
        raise graph.wrong(after, f"one {' or '.join(kinds)} is needed before it, found {kinds_of(found)}")
    return found[0]


def linear(graph: TracedGraph, after: Site | None, sources: Iterable[Site]) -> Linear:
    site = only(graph, after, sources, "MatMul")
    matrix = shaped(graph, site, site.tensors[0], None, None)
    if graph.maybe_constant(site.node.input[1]) is None:
        raise graph.wrong(site, "its weights are the first factor; the second is needed")
    return Linear(site, matrix.T, graph.sources_of(site))


def affine(graph: TracedGraph, after: Site | None, sources: Iterable[Site]) -> Affine:
    """A 1x1 convolution, or a matrix and the bias added to it."""
    site = only(graph, after, sources, "Conv", "Add")
    if site.kind == "Add":
        matrix = linear(graph, site, graph.sources_of(site))
        bias = shaped(graph, site, site.tensors[0].reshape(-1), matrix.matrix.shape[0])
        return Affine(site, matrix.matrix, bias, matrix.sources)
    if len(site.tensors) != 2:
        raise graph.wrong(site, f"weights and bias are needed, found {len(site.tensors)} tensors")
    weight = shaped(graph, site, site.tensors[0], None, None, 1)[:, :, 0]
    return Affine(site, weight, shaped(graph, site, site.tensors[1], weight.shape[0]), graph.sources_of(site))


def norm(graph: TracedGraph, after: Site, sources: Iterable[Site]) -> Norm:
    site = only(graph, after, sources, "LayerNormalization")
    epsilon = next((attribute.f for attribute in site.node.attribute if attribute.name == "epsilon"), NORM_EPSILON)
    if not math.isclose(epsilon, NORM_EPSILON, rel_tol=1e-6):
        raise graph.wrong(site, f"epsilon is {epsilon:g}; the codec has {NORM_EPSILON:g}")
    if len(site.tensors) != 2:
        raise graph.wrong(site, f"scale and bias are needed, found {len(site.tensors)} tensors")
    return Norm(site, *site.tensors, graph.sources_of(site))


def shaped(graph: TracedGraph, site: Site, tensor: Array, *shape: int | None) -> Array:
    """The tensor, if it is finite float32 of that shape; None is any length."""
    fits = len(tensor.shape) == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise graph.wrong(site, f"its tensor has shape {list(tensor.shape)}, needed is [{wanted}]")
    if tensor.dtype != np.float32:
        raise graph.wrong(site, f"its tensor is {tensor.dtype}; float32 is needed")
    if not np.isfinite(tensor).all():
        raise graph.wrong(site, "its tensor holds NaN or infinity")
    return tensor


def target_shape(graph: TracedGraph, reshape: onnx.NodeProto, way: Iterable[onnx.NodeProto]) -> list[int | None]:
    """The shape that a Reshape gives, None where it is computed while the graph runs."""
    name = reshape.input[1]
    if (constant := graph.maybe_constant(name)) is not None:
        return [int(length) for length in constant.reshape(-1)]
    for node in way:
        if name in node.output and node.op_type == "Concat":
            parts = [graph.maybe_constant(part) for part in node.input]
            return [int(part.item()) if part is not None and part.size == 1 else None for part in parts]
    return []


def scalars(graph: TracedGraph, node: onnx.NodeProto) -> list[float]:
    """The single numbers among a node's inputs that are written in the graph."""
    constants = [graph.maybe_constant(name) for name in node.input]
    return [constant.item() for constant in constants if constant is not None and constant.size == 1]


def kinds_of(sites: Iterable[Site]) -> str:
    return ", ".join(sorted(f"{site.kind} {site.node.name}" for site in sites)) or "none"
