"""How much arithmetic a frame costs, counted from the weights.

Rules of this room:

- A MAC is one multiplication and one addition. Only matrix products count, as the official graph has them, with full
  caches: that is what a faster graph is measured against.
"""

from __future__ import annotations

from mossnano_stdio.graph.weights import DecoderWeights, TransformerWeights, transformers


def decoding_macs(decoder: DecoderWeights) -> int:
    """MACs of one frame."""
    dequantizer = decoder.dequantizer
    macs = dequantizer.out_proj_w.size + dequantizer.output_proj_w.size
    for _, module in transformers(decoder.modules):
        macs += module.tokens_per_frame * (_linear_macs(module) + _attention_macs(module))
    return macs


def _linear_macs(module: TransformerWeights) -> int:
    """Per token: every entry of every matrix once."""
    layers = sum(
        layer.in_proj.size + layer.out_proj.size + layer.ffn_up.size + layer.ffn_down.size for layer in module.layers
    )
    return module.input_proj.size + layers + module.output_proj.size


def _attention_macs(module: TransformerWeights) -> int:
    """Per token: scores and sums over the whole context, in each layer."""
    return 2 * module.context * module.model * len(module.layers)
