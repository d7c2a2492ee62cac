"""An ONNX graph as it grows, and how it becomes a file with its weights beside it.

Rules of this room:

- A graph is written down in the order in which it runs. `op` adds one node and gives the name of its result, so
  that a model reads like the arithmetic it does.
- Weights are named and may be shared by several graphs; what several graphs share lies in one data file once.
- A tensor of less than EXTERNAL_BYTES lies in the graph itself. Offsets follow each other without a gap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mossnano_stdio.files import open_named

OPSET = 17
IR_VERSION = 8  # the one that goes with opset 17: old runtimes read it
EXTERNAL_BYTES = 1024
PRODUCER = "mossnano-stdio"

Dimension = int | str  # a number, or the name of a length that may vary


class GraphBuilder:
    """One graph being written.

    >>> graph = GraphBuilder("double")
    >>> graph.input("x", np.float32, [1, "length"])
    'x'
    >>> _ = graph.op("Add", "x", "x", result="y")
    >>> graph.output("y", np.float32, [1, "length"])
    >>> [node.op_type for node in graph.model({}).graph.node]
    ['Add']
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: dict[str, NDArray[Any]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._constant_tensors: list[onnx.TensorProto] = []
        self._scopes: list[str] = []
        self._domains = {"": OPSET}

    def input(self, name: str, dtype: Any, shape: Sequence[Dimension]) -> str:
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Sequence[Dimension]) -> None:
        self._outputs.append(_value(name, dtype, shape))

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes and values added inside are named name/..., which is what a profile shows."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def op(self, op_type: str, *inputs: str, result: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one result; `result` names it where its name matters."""
        results = None if result is None else [result]
        return self.ops(op_type, *inputs, count=1, results=results, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: str,
        count: int,
        results: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with `count` results."""
        if domain:
            self._domains[domain] = 1
        name = "/".join([*self._scopes, f"{op_type}_{len(self._nodes)}"])
        outputs = results or [f"{name}:{index}" for index in range(count)]
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain or None, **attributes))
        return outputs

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """A tensor that is learned; the same name always means the same tensor."""
        if name not in self.weights:
            self.weights[name] = np.ascontiguousarray(array)
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small tensor that follows from the model's shape. Equal ones are kept once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self._constant_tensors.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def model(self, places: Mapping[str, tuple[str, int]]) -> onnx.ModelProto:
        """The graph as ONNX; `places` says for external weights in which file they lie and at which offset."""
        tensors = [_tensor(name, array, places.get(name)) for name, array in self.weights.items()]
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=[*tensors, *self._constant_tensors]
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._domains.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)


def save_graphs(folder: Path, graphs: Mapping[str, GraphBuilder], data_name: str) -> list[str]:
    """Write the graphs, keyed by file name, and one data file with their weights. Gives the names of the files."""
    weights: dict[str, NDArray[Any]] = {}
    for graph in graphs.values():
        weights |= graph.weights
    external = {name: array for name, array in weights.items() if array.nbytes >= EXTERNAL_BYTES}
    places: dict[str, tuple[str, int]] = {}
    offset = 0
    with open_named(folder / data_name) as data:
        for name, array in external.items():
            places[name] = (data_name, offset)
            offset += data.write(array.data)
    for file_name, graph in graphs.items():
        with open_named(folder / file_name) as file:
            file.write(graph.model(places).SerializeToString(deterministic=True))
    return [*graphs, data_name]


def _value(name: str, dtype: Any, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _tensor(name: str, array: NDArray[Any], maybe_place: tuple[str, int] | None) -> onnx.TensorProto:
    if maybe_place is None:
        return numpy_helper.from_array(array, name)
    location, offset = maybe_place
    tensor = onnx.TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
