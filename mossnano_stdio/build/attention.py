"""The probe: one attention node of the fast graph. Running it shows whether a runtime does what that graph needs.

    python -m mossnano_stdio.build.attention     writes mossnano_stdio/codecs/attention_probe.onnx anew

Rules of this room:

- The file has the same bytes wherever it is written; a test compares them.
- The node is made by the function that makes the fast graph's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import mossnano_stdio
from mossnano_stdio.build.builder import Dimension, GraphBuilder
from mossnano_stdio.build.transformers import Slots, attend

PROBE_PATH = Path(mossnano_stdio.__file__).parent / "codecs" / "attention_probe.onnx"

HEADS = 2
HEAD_DIM = 16
CONTEXT = 3


def attention_probe() -> bytes:
    graph = GraphBuilder("attention_probe")
    ring: list[Dimension] = [1, HEADS, "slots", HEAD_DIM]
    projected = graph.input("projected", np.float32, [1, "tokens", 3 * HEADS * HEAD_DIM])
    slots = Slots(
        last=graph.input("last", np.int32, [1]),
        total=graph.input("total", np.int32, [1]),
        cosines=graph.input("cosines", np.float32, ["slots", HEAD_DIM // 2]),
        sines=graph.input("sines", np.float32, ["slots", HEAD_DIM // 2]),
        keys=graph.input("keys", np.float32, ring),
        values=graph.input("values", np.float32, ring),
    )
    outputs = ["keys_out", "values_out"]
    attended = attend(graph, projected, slots, outputs, heads=HEADS, head_dim=HEAD_DIM, context=CONTEXT)
    graph.op("Identity", attended, result="attended")
    graph.output("attended", np.float32, [1, "tokens", HEADS * HEAD_DIM])
    for output in outputs:
        graph.output(output, np.float32, ring)
    content: bytes = graph.model().SerializeToString(deterministic=True)
    return content


if __name__ == "__main__":
    PROBE_PATH.write_bytes(attention_probe())
