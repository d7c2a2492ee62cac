"""How much arithmetic a frame costs, and how much memory a step reads, counted from the weights.

Rules of this room:

- A MAC is one multiplication and one addition. Only the matrix products of the official graph count, with full caches.
  Faster graphs are measured against them.
- A step reads every matrix once and all that its caches hold, however few frames it has. What it writes, and what its
  nodes give to each other, is little beside that and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mossnano_stdio.build.model import DecoderWeights, transformers


def decoding_macs(decoder: DecoderWeights) -> int:
    """MACs of one frame."""
    return sum(tokens * macs for tokens, macs in _macs_of_tokens(decoder))


def bytes_per_step(decoder: DecoderWeights) -> int:
    """What a step reads at the least, with full caches: a token's MACs use every value once."""
    return sum(macs for _, macs in _macs_of_tokens(decoder)) * np.dtype(np.float32).itemsize


def _macs_of_tokens(decoder: DecoderWeights) -> Iterator[tuple[int, int]]:
    """For the dequantizer and each transformer: its tokens in a frame, the MACs of one token."""
    yield 1, decoder.dequantizer.out_proj_w.size + decoder.dequantizer.output_proj_w.size
    for _, module in transformers(decoder.modules):
        maybe_matrices = [module.maybe_input_proj, module.maybe_output_proj]
        matrices = [matrix for matrix in maybe_matrices if matrix is not None]
        for layer in module.layers:
            matrices += [layer.in_proj, layer.out_proj, layer.ffn_up, layer.ffn_down]
        attention = 2 * module.context * module.model * len(module.layers)  # scores and sums over the whole context
        yield module.tokens_per_frame, sum(matrix.size for matrix in matrices) + attention
