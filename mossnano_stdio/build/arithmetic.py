"""How much arithmetic a frame costs, and how much memory a step reads, counted from the weights.

Rules of this room:

- A MAC is one multiplication and one addition. Only matrix products count, as the official graph has them, with full
  caches: that is what a faster graph is measured against.
- A step reads every matrix once and all that its caches hold, however few frames it has. What it writes, and what its
  nodes hand to each other, is little beside that and is not counted.
"""

from __future__ import annotations

import numpy as np

from mossnano_stdio.build.model import DecoderWeights, TransformerWeights, transformers


def decoding_macs(decoder: DecoderWeights) -> int:
    """MACs of one frame."""
    macs = _dequantizing_macs(decoder)
    for _, module in transformers(decoder.modules):
        macs += module.tokens_per_frame * (_linear_macs(module) + _attention_macs(module))
    return macs


def bytes_per_step(decoder: DecoderWeights) -> int:
    """What a step reads at the least, with full caches: a token's MACs use every value once."""
    values = _dequantizing_macs(decoder)
    for _, module in transformers(decoder.modules):
        values += _linear_macs(module) + _attention_macs(module)
    return values * np.dtype(np.float32).itemsize


def _dequantizing_macs(decoder: DecoderWeights) -> int:
    return decoder.dequantizer.out_proj_w.size + decoder.dequantizer.output_proj_w.size


def _linear_macs(module: TransformerWeights) -> int:
    """Per token: every entry of every matrix once."""
    layers = sum(
        layer.in_proj.size + layer.out_proj.size + layer.ffn_up.size + layer.ffn_down.size for layer in module.layers
    )
    return module.input_proj.size + layers + module.output_proj.size


def _attention_macs(module: TransformerWeights) -> int:
    """Per token: scores and sums over the whole context, in each layer."""
    return 2 * module.context * module.model * len(module.layers)
