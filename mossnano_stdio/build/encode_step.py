"""The streaming encoder: `encode` frame by frame, with a contract of its own, as the official one has none.

    audio      float32 [samples, channels]  whole frames
    what the transformers have: see transformers.py
    codes      int32 [frames, quantizers]

`mossnano.json` calls it `encode_step` and has the same facts about it as about the fast graph. Run in steps of any
sizes it gives the codes of the whole recording, except where two rows are equally near within float rounding.

Rules of this room:

- Linear parts that follow each other are multiplied out here, in float64, and are one matrix in the graph: each
  output_proj, patch and the next input_proj; at the end output_proj, patch, the quantizer's input_proj and the in_proj
  of all codebooks.
- So one product gives what all codebooks are searched for. What the codebooks before take away from that follows from
  their codes alone, and is looked up in a table that has one row for each code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mossnano_stdio.build.blocks import INT32
from mossnano_stdio.build.builder import DataFile, GraphBuilder, open_data
from mossnano_stdio.build.model import (
    ROW_EPSILON,
    EncoderWeights,
    PatchStep,
    QuantizerWeights,
    transformers,
)
from mossnano_stdio.build.transformers import Exact, Stack, linear, output_matrix, stack_facts
from mossnano_stdio.weights import GraphSpec

ENCODE_STEP_FILE = "mossnano_encode_step.onnx"
ENCODE_STEP_DATA = "mossnano_encode_step.data"


def encode_step(encoder: EncoderWeights, maybe_data: DataFile | None = None) -> GraphBuilder:
    graph = GraphBuilder("encode_step", maybe_data)
    stack = Stack(graph)
    *joints, last_joint = _joints(encoder)
    x = graph.input("audio", np.float32, ["samples", encoder.format.channels])
    for joint, (index, module) in zip(joints, transformers(encoder.modules), strict=True):
        name = f"encoder.{index}"
        with graph.scope(name):
            joined = graph.op("Reshape", x, graph.constant([1, -1, joint.shape[1]]))
            x = stack.run(linear(graph, joined, f"{name}.in.weight", joint), name, module)
    with graph.scope("quantizer"):
        frames = graph.op("Reshape", x, graph.constant([-1, last_joint.shape[1]]))
        codes = _search(graph, frames, last_joint, encoder.quantizer)
    graph.op("Cast", codes, to=INT32, result="codes")
    graph.output("codes", np.int32, ["frames", encoder.format.quantizers])
    return graph


def save_encode_step(folder: Path, encoder: EncoderWeights) -> GraphSpec:
    """Write the graph and its weights, and return what `mossnano.json` says about them."""
    with open_data(folder / ENCODE_STEP_DATA) as data:
        encode_step(encoder, data).save(folder / ENCODE_STEP_FILE)
    return GraphSpec(file=ENCODE_STEP_FILE, data=(ENCODE_STEP_DATA,), facts=stack_facts(encoder.modules))


def _joints(encoder: EncoderWeights) -> Iterator[Exact]:
    """The matrix in front of each transformer, and the one behind the last: [out, tokens joined * their features]."""
    basis: Exact = np.ones((1, 1))  # a value of the recording, as it comes
    for module in encoder.modules:
        if isinstance(module, PatchStep):
            # The same for each of `patch` tokens side by side, whose features are interleaved.
            features, inputs = basis.shape
            apart = np.zeros((features, module.patch, module.patch, inputs))
            for token in range(module.patch):
                apart[:, token, token] = basis
            basis = apart.reshape(features * module.patch, module.patch * inputs)
        else:
            yield basis if module.maybe_input_proj is None else module.maybe_input_proj @ basis
            basis = output_matrix(module)
    yield encoder.quantizer.input_proj_w @ basis


def _search(graph: GraphBuilder, x: str, joint: Exact, quantizer: QuantizerWeights) -> str:
    """One codebook after the other; each code takes its part away from what the codebooks after it are searched for."""
    quantizers, _, size = quantizer.codebooks.shape
    in_proj = quantizer.in_proj_w.astype(np.float64).reshape(quantizers * size, -1)  # all codebooks side by side
    bias = in_proj @ quantizer.input_proj_b + quantizer.in_proj_b.reshape(-1)
    projected = linear(graph, x, "quantizer.in_proj.weight", in_proj @ joint)
    rest = graph.op("Add", projected, graph.weight("quantizer.in_proj.bias", bias.astype(np.float32)))
    codes = []
    for index, codebook in enumerate(quantizer.codebooks):
        rows = codebook.astype(np.float64)
        later = in_proj[(index + 1) * size :]
        own = rest
        if len(later):
            own, rest = graph.ops("Split", rest, graph.constant([size, len(later)]), axis=1, count=2)
        # The nearest row by angle has the largest product once all rows have length 1.
        unit_rows: Exact = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), ROW_EPSILON)
        likeness = linear(graph, own, f"quantizer.{index}.unit_rows", unit_rows)
        codes.append(graph.op("ArgMax", likeness, axis=1, keepdims=0))
        if len(later):
            parts = rows @ quantizer.out_proj_w[index].T.astype(np.float64) + quantizer.out_proj_b[index]
            taken = graph.weight(f"quantizer.{index}.taken", (parts @ later.T).astype(np.float32))
            rest = graph.op("Sub", rest, graph.op("Gather", taken, codes[-1], axis=0))
    quantizer_major = graph.op("Reshape", graph.op("Concat", *codes, axis=0), graph.constant([quantizers, -1]))
    return graph.op("Transpose", quantizer_major, perm=[1, 0])
