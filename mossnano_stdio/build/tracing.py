"""Where the weights of somebody else's ONNX graph are used, and how data flows from one such place to the next.

Rules of this room:

- Names mean nothing here. A node that multiplies, adds, looks up or normalises with a learned tensor is a *site*;
  what lies between two sites (shapes, masks, softmax, rotation) is the *way*.
- Data flows through values, not through their shapes: a Shape node starts nothing.
- What is not understood is a BundleError that names file and node.
- External data is read here: behind symlinks, as a download's cache has them, the onnx package would refuse it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from mossnano_stdio.build.model import Array
from mossnano_stdio.errors import BundleError


@dataclass(frozen=True, eq=False)
class Site:
    """A node that uses learned tensors."""

    node: onnx.NodeProto
    tensors: tuple[Array, ...]  # in the order of the node's inputs, as the node has them

    @property
    def kind(self) -> str:
        return str(self.node.op_type)


class TracedGraph:
    """An ONNX file in memory, with its sites and what flows into each value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._graph = _load(path).graph
        self._producers = {output: node for node in self._graph.node for output in node.output}
        self._constants = dict(self._find_constants())
        self._sources: dict[str, frozenset[Site]] = {}
        for node in self._graph.node:
            self._trace(node)

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if node.op_type == op_type]

    def sources(self, value: str) -> frozenset[Site]:
        """The sites whose result reaches `value` on a way without another site."""
        return self._sources.get(value, frozenset())

    def sources_of(self, site: Site) -> frozenset[Site]:
        """The sites whose results reach a site's own input."""
        return frozenset().union(*(self.sources(value) for value in site.node.input))

    def maybe_constant(self, value: str) -> NDArray[Any] | None:
        return self._constants.get(value)

    def way_into(self, value: str) -> Iterator[onnx.NodeProto]:
        """All nodes on the ways to `value`, nearest first, up to sites and to what only asks for a shape."""
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

    def _find_constants(self) -> Iterator[tuple[str, NDArray[Any]]]:
        known: dict[str, NDArray[Any]] = {}
        for tensor in self._graph.initializer:
            is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
            known[tensor.name] = self._external(tensor) if is_external else numpy_helper.to_array(tensor)
        for node in self._graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Identity" and node.input[0] in known:
                known[node.output[0]] = known[node.input[0]]
        yield from known.items()

    def _external(self, tensor: onnx.TensorProto) -> NDArray[Any]:
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
            return
        found = frozenset().union(*(self.sources(value) for value in _used_by(node)))
        constants = [self._constants[value] for value in node.input if value in self._constants]
        learned = [tensor for tensor in constants if tensor.dtype.kind == "f" and tensor.size > 1]
        if learned and _is_site(node, learned, fed=bool(found)):
            found = frozenset([Site(node, tuple(learned))])
        for output in node.output:
            self._sources[output] = found


def _is_site(node: onnx.NodeProto, learned: list[NDArray[Any]], fed: bool) -> bool:
    """Does a node use learned tensors? A vector that is added or multiplied does where something learned flows in."""
    match node.op_type:
        case "MatMul" | "Gemm" | "Gather" | "Conv" | "LayerNormalization":
            return True
        case "Mul" | "Add":
            return fed and max(learned[0].shape) == learned[0].size
    return False


def _used_by(node: onnx.NodeProto) -> list[str]:
    """A node's inputs, those that its branches take from outside included."""
    inside = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return [*node.input, *(value for graph in inside for inner in graph.node for value in _used_by(inner))]


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(f"{path}: cannot be read as an ONNX model: {error}") from error
