"""The fast graph: the decoder of `decode_step` in fewer and larger nodes, with a contract of its own.

    rows       int32 [frames, quantizers]   row of each code in one table of all codebooks; the last row is all zeros
    what the transformers have: see transformers.py
    audio      float32 [samples, channels]

Rules of this room:

- Linear parts that follow each other are multiplied out here, in float64, and are one matrix in the graph: codebook
  projections, output_proj, patch and input_proj; then each output_proj, patch and the next input_proj.
- Each codebook row ends with a 1, by which its bias is multiplied. The row of zeros stands for a codebook that is
  left out and adds nothing, not even a bias. So the graph serves any prefix of the quantizers.
- The runtime loads this graph with its own optimisations off, and runs these nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mossnano_stdio.build.builder import DataFile, GraphBuilder, open_data
from mossnano_stdio.build.model import (
    DecoderWeights,
    DequantizerWeights,
    Module,
    TransformerWeights,
    transformers,
)
from mossnano_stdio.build.transformers import Exact, Stack, linear, output_matrix, stack_facts
from mossnano_stdio.weights import GraphSpec

FAST_FILE = "mossnano_fast.onnx"
FAST_DATA = "mossnano_fast.data"


def fast_decode_step(decoder: DecoderWeights, maybe_data: DataFile | None = None) -> GraphBuilder:
    graph = GraphBuilder("decode_step_fast", maybe_data)
    stack = Stack(graph)
    *joints, last_joint = _joints(decoder)
    x = _look_up(graph, decoder.dequantizer)
    for joint, (index, module) in zip(joints, transformers(decoder.modules), strict=True):
        name = f"decoder.{index}"
        with graph.scope(name):
            x = linear(graph, x, f"{name}.in.weight", joint.matrix)
            if joint.maybe_bias is not None:
                x = graph.op("Add", x, graph.weight(f"{name}.in.bias", joint.maybe_bias.astype(np.float32)))
            x = graph.op("Reshape", x, graph.constant([1, -1, module.model]))
            x = stack.run(x, name, module)
    samples = linear(graph, x, "audio.weight", last_joint.matrix)
    graph.op("Reshape", samples, graph.constant([-1, decoder.format.channels]), result="audio")
    graph.output("audio", np.float32, ["samples", decoder.format.channels])
    return graph


def save_fast_graph(folder: Path, decoder: DecoderWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / FAST_DATA) as data:
        fast_decode_step(decoder, data).save(folder / FAST_FILE)
    return GraphSpec(file=FAST_FILE, data=(FAST_DATA,), facts=stack_facts(decoder.modules))


class _Joint(NamedTuple):
    """One matrix for all linear parts in a row: tokens -> `patch` times as many tokens, flattened."""

    matrix: Exact  # [patch * out, in]
    maybe_bias: Exact | None  # [patch * out]


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
    quantizer = decoder.dequantizer
    weights, biases = (tensor.astype(np.float64) for tensor in (quantizer.out_proj_w, quantizer.out_proj_b))
    values = np.concatenate([weights, biases[:, :, np.newaxis]], axis=2)  # [quantizers, rvq_dim, codebook_dim + 1]
    basis: Exact = values.transpose(0, 2, 1) @ quantizer.output_proj_w.T.astype(np.float64)
    basis = basis.reshape(-1, 1, basis.shape[-1])  # what each looked-up value becomes, [values, 1, features]
    maybe_bias: Exact | None = quantizer.output_proj_b.astype(np.float64)[np.newaxis, np.newaxis]
    for module in decoder.modules:
        basis = _carried(basis, module)
        maybe_bias = None if maybe_bias is None else _carried(maybe_bias, module)
        if isinstance(module, TransformerWeights):
            yield _Joint(basis.reshape(len(basis), -1).T, None if maybe_bias is None else maybe_bias.reshape(-1))
            basis, maybe_bias = output_matrix(module).T[:, np.newaxis], None
    yield _Joint(basis.reshape(len(basis), -1).T, None)


def _carried(basis: Exact, module: Module) -> Exact:
    """What vectors become, [vectors, tokens, features], in a patch or in a transformer's input_proj."""
    if isinstance(module, TransformerWeights):
        if module.maybe_input_proj is None:
            return basis
        projected: Exact = basis @ module.maybe_input_proj.T.astype(np.float64)
        return projected
    vectors, tokens, features = basis.shape
    width = features // module.patch
    apart = basis.reshape(vectors, tokens, width, module.patch).transpose(0, 1, 3, 2)
    return apart.reshape(vectors, tokens * module.patch, width)
