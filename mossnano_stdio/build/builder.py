"""Adds nodes to an ONNX graph, and writes graphs as files with their weights beside them.

Rules of this room:

- Nodes are added in the order in which they run. `op` adds one and returns the name of its result, so that a model
  reads like the arithmetic it does.
- Weights have names. A weight that several graphs share lies in their data file once.
- A tensor of less than EXTERNAL_BYTES lies in the graph itself. The others follow each other in the data file, into
  which each is written when it is added to a graph: no graph holds more than one of them in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
    >>> [node.op_type for node in graph.model().graph.node]
    ['Add']
    """

    def __init__(self, name: str, maybe_data: DataFile | None = None) -> None:
        """Without a data file all weights lie in the graph itself."""
        self.name = name
        self._maybe_data = maybe_data
        self._weights: dict[str, onnx.TensorProto] = {}
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
        """Name the nodes and values added inside name/..., for profiles to show."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def op(self, op_type: str, *inputs: str, result: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node with one result, which `result` names where its name matters. Returns the result's name."""
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
        """Add a node with `count` results. Returns their names."""
        if domain:
            self._domains[domain] = 1
        name = "/".join([*self._scopes, f"{op_type}_{len(self._nodes)}"])
        outputs = results or [f"{name}:{index}" for index in range(count)]
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain or None, **attributes))
        return outputs

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """A learned tensor. The same name always means the same tensor."""
        if name not in self._weights:
            is_external = self._maybe_data is not None and array.nbytes >= EXTERNAL_BYTES
            keep = self._maybe_data.add if self._maybe_data and is_external else _inside
            self._weights[name] = keep(name, np.ascontiguousarray(array))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small tensor that follows from the model's shape. Equal ones are kept once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self._constant_tensors.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def model(self) -> onnx.ModelProto:
        """The graph as ONNX."""
        tensors = [*self._weights.values(), *self._constant_tensors]
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializer=tensors)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._domains.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)

    def save(self, path: Path) -> None:
        with open_named(path) as file:
            file.write(self.model().SerializeToString(deterministic=True))


class DataFile:
    """The weights of one or several graphs, one after the other, each once."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._bytes = 0

    def add(self, name: str, array: NDArray[Any]) -> onnx.TensorProto:
        """Write the tensor where no graph has it yet, and return what stands for it in a graph."""
        if name not in self._tensors:
            tensor = onnx.TensorProto(
                name=name,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                dims=array.shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            place = (("location", self._name), ("offset", str(self._bytes)), ("length", str(array.nbytes)))
            for key, value in place:
                tensor.external_data.add(key=key, value=value)
            self._bytes += self._file.write(array.data)
            self._tensors[name] = tensor
        return self._tensors[name]

    def flush(self) -> None:
        """For who reads what was written so far."""
        self._file.flush()


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[DataFile]:
    """A new data file for graphs in the same folder."""
    with open_named(path) as file:
        yield DataFile(file, path.name)


def _inside(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def _value(name: str, dtype: Any, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
