"""Reads a graph of ours into numpy: its nodes in the order in which they run, its weights, what is said of it.

This is for who wants to run a decoder otherwise than it should be. Of a bundle that has official graphs only, the fast
graph is built in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mossnano_stdio.build.decode_step import fast_decode_step
from mossnano_stdio.build.extract import extract_weights
from mossnano_stdio.build.transformers import stack_facts
from mossnano_stdio.errors import BundleError
from mossnano_stdio.weights import Bundle, Graph, StateSpec


@dataclass(frozen=True)
class PlainNode:
    """What a node does, to which values, and which it gives."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class PlainGraph:
    """A graph of ours that decodes."""

    nodes: tuple[PlainNode, ...]
    constants: Mapping[str, NDArray[Any]]
    states: tuple[StateSpec, ...]  # what it remembers beside keys and values
    facts: Mapping[str, Any]  # of its transformers, as `mossnano.json` has them


def read_decoder(bundle: Bundle) -> PlainGraph:
    """Read the graph of ours by which a bundle decodes in steps."""
    if bundle.has_graph("fast"):
        return _from_file(bundle.graph("fast"))
    if bundle.sidecar.maybe_codec is not None:
        return _from_file(bundle.graph("decode_step"))
    decoder = extract_weights(bundle).decoder
    return _plain(fast_decode_step(decoder).model(), (), stack_facts(decoder.modules))


def _from_file(graph: Graph) -> PlainGraph:
    try:
        model = onnx.load(graph.path)
    except (OSError, ValueError, DecodeError) as error:
        raise BundleError(f"{graph.path}: cannot be read as an ONNX model: {error}") from error
    return _plain(model, graph.states, graph.facts)


def _plain(model: onnx.ModelProto, states: tuple[StateSpec, ...], facts: Mapping[str, Any]) -> PlainGraph:
    nodes = tuple(
        PlainNode(
            node.op_type,
            tuple(node.input),
            tuple(node.output),
            {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
        )
        for node in model.graph.node
    )
    constants = {tensor.name: np.asarray(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    return PlainGraph(nodes, constants, states, facts)
