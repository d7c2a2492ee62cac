"""The streaming encoder: `encode`, frame after frame, with a contract of its own. There is no official one.

    audio      float32 [samples, channels]  whole frames
    what the transformers have: see stack.py
    codes      int32 [frames, quantizers]

Its name in `mossnano.json` is `encode_step`, its facts are those of the fast graph. Run in steps of any sizes it gives
the codes of the whole recording, but for rows that are equally near within float rounding.

Rules of this room:

- Whatever is linear and stands side by side is one matrix, multiplied out here in float64: output_proj, patch and the
  next input_proj; at the end output_proj, patch, the quantizer's input_proj and the in_proj of all codebooks.
- So what a codebook is searched for is known from the start, all codebooks side by side, but for what the codebooks
  before it take away. That follows from their codes alone: one row of a table for each code.
- The nearest row by angle is the one with the largest product with the row of length 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mossnano_stdio.build.blocks import INT32
from mossnano_stdio.build.builder import GraphBuilder, save_graphs
from mossnano_stdio.build.model import (
    ROW_EPSILON,
    Array,
    EncoderWeights,
    PatchStep,
    QuantizerWeights,
    transformers,
)
from mossnano_stdio.build.transformers import Exact, Stack, linear, stack_facts
from mossnano_stdio.weights.graphs import GraphSpec

ENCODE_STEP_FILE = "mossnano_encode_step.onnx"
ENCODE_STEP_DATA = "mossnano_encode_step.data"


def encode_step(encoder: EncoderWeights) -> GraphBuilder:
    graph = GraphBuilder("encode_step")
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
        codes = _search(graph, _looked_up(graph, frames, last_joint, encoder.quantizer), encoder.quantizer)
    graph.op("Cast", codes, to=INT32, result="codes")
    graph.output("codes", np.int32, ["frames", encoder.format.quantizers])
    return graph


def save_encode_step(folder: Path, encoder: EncoderWeights) -> GraphSpec:
    """Write the graph and its weights; gives what `mossnano.json` says about them."""
    save_graphs(folder, {ENCODE_STEP_FILE: encode_step(encoder)}, ENCODE_STEP_DATA)
    return GraphSpec(file=ENCODE_STEP_FILE, data=(ENCODE_STEP_DATA,), facts=stack_facts(encoder.modules))


def _joints(encoder: EncoderWeights) -> Iterator[Exact]:
    """All that is linear in front of each transformer, and behind the last: [out, tokens joined * their features]."""
    basis: Exact = np.ones((1, 1))  # a value of the recording, as it comes
    for module in encoder.modules:
        if isinstance(module, PatchStep):
            basis = _patched(basis, module)
        else:
            yield module.input_proj @ basis
            basis = module.output_proj.astype(np.float64)
    yield encoder.quantizer.input_proj_w @ basis


def _patched(basis: Exact, step: PatchStep) -> Exact:
    """The same for each of `patch` tokens side by side; their features are interleaved."""
    features, inputs = basis.shape
    apart = np.zeros((features, step.patch, step.patch, inputs))
    for token in range(step.patch):
        apart[:, token, token] = basis
    return apart.reshape(features * step.patch, step.patch * inputs)


def _looked_up(graph: GraphBuilder, x: str, joint: Exact, quantizer: QuantizerWeights) -> str:
    """What every codebook is searched for, before any code is known: [frames, quantizers * codebook_dim]."""
    in_proj = _side_by_side(quantizer.in_proj_w)
    bias = in_proj @ quantizer.input_proj_b + quantizer.in_proj_b.reshape(-1)
    projected = linear(graph, x, "quantizer.in_proj.weight", in_proj @ joint)
    return graph.op("Add", projected, graph.weight("quantizer.in_proj.bias", bias.astype(np.float32)))


def _search(graph: GraphBuilder, looked_up: str, quantizer: QuantizerWeights) -> str:
    """One codebook after the other; each code takes its part away from what is left for the codebooks after it."""
    quantizers, _, size = quantizer.codebooks.shape
    rest, codes = looked_up, []
    for index, codebook in enumerate(quantizer.codebooks):
        left = (quantizers - 1 - index) * size
        own = rest
        if left:
            own, rest = graph.ops("Split", rest, graph.constant([size, left]), axis=1, count=2)
        likeness = linear(graph, own, f"quantizer.{index}.unit_rows", _unit_rows(codebook))
        codes.append(graph.op("ArgMax", likeness, axis=1, keepdims=0))
        if left:
            taken = graph.weight(f"quantizer.{index}.taken", _taken(quantizer, index).astype(np.float32))
            rest = graph.op("Sub", rest, graph.op("Gather", taken, codes[-1], axis=0))
    quantizer_major = graph.op("Reshape", graph.op("Concat", *codes, axis=0), graph.constant([quantizers, -1]))
    return graph.op("Transpose", quantizer_major, perm=[1, 0])


def _taken(quantizer: QuantizerWeights, index: int) -> Exact:
    """What each row of a codebook takes away from what later codebooks are searched for: [rows, later * dim]."""
    rows = quantizer.codebooks[index].astype(np.float64)
    parts = rows @ quantizer.out_proj_w[index].T.astype(np.float64) + quantizer.out_proj_b[index]
    taken: Exact = parts @ _side_by_side(quantizer.in_proj_w[index + 1 :]).T
    return taken


def _side_by_side(in_proj: Array) -> Exact:
    """[codebooks, dim, rvq_dim] -> [codebooks * dim, rvq_dim]."""
    stacked: Exact = in_proj.astype(np.float64).reshape(-1, in_proj.shape[2])
    return stacked


def _unit_rows(codebook: Array) -> Exact:
    rows = codebook.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Exact = rows / np.maximum(lengths, ROW_EPSILON)
    return unit
