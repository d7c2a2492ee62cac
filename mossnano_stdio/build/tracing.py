"""Finds where somebody else's ONNX graph uses its weights, and what flows from one such place to the next.

Rules of this room:

- No name of a node or a tensor is relied on. A node that multiplies, adds, looks up or normalises with a learned
  tensor is a *site*; the nodes between two sites (shapes, masks, softmax, rotation) are the *way*.
- `only`, `linear`, `affine` and `norm` ask for a site where it must be. Anything else there is a BundleError that
  names the file and the node found.
- Matrices come out as [out, in] whichever way the exporter turned them, float32 and of the shape asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from mossnano_stdio.build.model import NORM_EPSILON, Array
from mossnano_stdio.errors import BundleError


@dataclass(frozen=True, eq=False)
class Site:
    """A node that uses learned tensors."""

    node: onnx.NodeProto
    tensors: tuple[Array, ...]  # in the order of the node's inputs, as the node has them

    @property
    def kind(self) -> str:
        return str(self.node.op_type)


Sites = frozenset[Site]


class TracedGraph:
    """An ONNX file in memory, with its sites and what flows into each value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._graph = onnx.load(path, load_external_data=False).graph
        except (OSError, ValueError, DecodeError) as error:
            raise BundleError(f"{path}: cannot be read as an ONNX model: {error}") from error
        self._producers = {output: node for node in self._graph.node for output in node.output}
        self._constants = self._read_constants()
        self._sources: dict[str, Sites] = {}
        for node in self._graph.node:
            self._trace(node)

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if node.op_type == op_type]

    def sources(self, value: str) -> Sites:
        """The sites whose result reaches `value` without passing another site."""
        return self._sources.get(value, frozenset())

    def sources_of(self, site: Site) -> Sites:
        """The sites whose results reach a site's own input."""
        return frozenset().union(*(self.sources(value) for value in site.node.input))

    def maybe_constant(self, value: str) -> NDArray[Any] | None:
        return self._constants.get(value)

    def way_into(self, value: str) -> Iterator[onnx.NodeProto]:
        """All nodes on the ways to `value`, nearest first. A way ends at a site, or where a shape is asked for."""
        seen: set[str] = set()
        front = [value]
        while front:
            value = front.pop(0)
            node = self._producers.get(value)
            if node is None or value in seen:
                continue
            seen.update(node.output)
            if any(site.node is node for site in self.sources(value)):
                continue
            yield node
            if node.op_type != "Shape":
                front += _used_by(node)

    def wrong(self, site: Site | None, what: str) -> BundleError:
        at = f" at {site.node.op_type} {site.node.name}" if site else ""
        return BundleError(f"{self.path}: departs from the official graph{at}: {what}")

    def _read_constants(self) -> dict[str, NDArray[Any]]:
        known: dict[str, NDArray[Any]] = {}
        for tensor in self._graph.initializer:
            is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
            known[tensor.name] = self._external(tensor) if is_external else numpy_helper.to_array(tensor)
        for node in self._graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Identity" and node.input[0] in known:
                known[node.output[0]] = known[node.input[0]]
        return known

    def _external(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        # The onnx package refuses external data behind symlinks, and a download's cache is made of them.
        place = {entry.key: entry.value for entry in tensor.external_data}
        name = place.get("location", "")
        if not name or Path(name).name != name:
            raise BundleError(f"{self.path}: {tensor.name} lies in {name!r}; a file beside the graph is needed")
        data_path = self.path.with_name(name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        try:
            with data_path.open("rb") as file:
                offset = int(place.get("offset", 0))
                found = np.fromfile(file, dtype, count=math.prod(tensor.dims), offset=offset)
            return found.reshape(tensor.dims)
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path}: {tensor.name} cannot be read from {data_path} ({error})") from error

    def _trace(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Shape":
            return  # data flows through values, not through their shapes
        found = frozenset().union(*(self.sources(value) for value in _used_by(node)))
        constants = [self._constants[value] for value in node.input if value in self._constants]
        learned = [tensor for tensor in constants if tensor.dtype.kind == "f" and tensor.size > 1]
        if learned and _is_site(node, learned, fed=bool(found)):
            found = frozenset([Site(node, tuple(learned))])
        for output in node.output:
            self._sources[output] = found


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
    """Return the one site in `sources`, which must be of one of `kinds`. Errors name `after` as what follows it."""
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
    """Return the tensor, which must be finite float32 of that shape. None stands for any length."""
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
    """The shape that a Reshape gives, with None for each length that is computed while the graph runs."""
    name = reshape.input[1]
    if (constant := graph.maybe_constant(name)) is not None:
        return [int(length) for length in constant.reshape(-1)]
    for node in way:
        if name in node.output and node.op_type == "Concat":
            parts = [graph.maybe_constant(part) for part in node.input]
            return [int(part.item()) if part is not None and part.size == 1 else None for part in parts]
    return []


def scalars(graph: TracedGraph, node: onnx.NodeProto) -> list[float]:
    """The constants of one number among a node's inputs."""
    constants = [graph.maybe_constant(name) for name in node.input]
    return [constant.item() for constant in constants if constant is not None and constant.size == 1]


def kinds_of(sites: Iterable[Site]) -> str:
    return ", ".join(sorted(f"{site.kind} {site.node.name}" for site in sites)) or "none"


def _is_site(node: onnx.NodeProto, learned: list[NDArray[Any]], fed: bool) -> bool:
    """Does a node use learned tensors? Adding or multiplying a vector counts only where something learned flows in."""
    match node.op_type:
        case "MatMul" | "Gemm" | "Gather" | "Conv" | "LayerNormalization":
            return True
        case "Mul" | "Add":
            return fed and max(learned[0].shape) == learned[0].size
    return False


def _used_by(node: onnx.NodeProto) -> list[str]:
    """The inputs of a node, and what its branches take from outside."""
    inside = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return [*node.input, *(value for graph in inside for inner in graph.node for value in _used_by(inner))]
