"""A codec's weights, whichever file they came from. Every graph is built from these.

Rules of this room:

- Plain numpy, float32, nothing about files and nothing about onnx. checkpoint.py and extract.py make these,
  official.py, decode_step.py and encode_step.py build from them.
- Matrices lie as torch has them, [out, in]: y = W x. Weight norm is folded, a 1x1 convolution is a matrix.
- `DecoderWeights` and `EncoderWeights` check as they are made that each module takes what the one before it gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat

Array = NDArray[np.float32]

NORM_EPSILON = 1e-5  # of every LayerNorm
ROW_EPSILON = 1e-12  # the least length by which a row is divided when codes are chosen


@dataclass(frozen=True)
class PatchStep:
    """Tokens into `patch` times as many of 1/patch the features (a decoder), or back (an encoder)."""

    patch: int


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """x += scale1 * out_proj(attention(in_proj(norm1(x)))); x += scale2 * ffn_down(gelu(ffn_up(norm2(x))))."""

    norm1_w: Array  # [model]
    norm1_b: Array  # [model]
    in_proj: Array  # [3 model, model]: rows of q, then k, then v; head h is rows h * head_dim .. of each
    out_proj: Array  # [model, model]
    scale1: Array  # [model]
    norm2_w: Array  # [model]
    norm2_b: Array  # [model]
    ffn_up: Array  # [hidden, model]
    ffn_down: Array  # [model, hidden]
    scale2: Array  # [model]


@dataclass(frozen=True, eq=False)
class TransformerWeights:
    maybe_input_proj: Array | None  # [model, in]; None: what comes in goes on as it is
    layers: Sequence[LayerWeights]  # which may be read one by one, when they are asked for
    maybe_output_proj: Array | None  # [out, model]
    model: int
    heads: int
    context: int  # a query sees the keys of this many tokens, its own included
    tokens_per_frame: int
    max_period: float  # of RoPE, interleaved pairs

    @property
    def inputs(self) -> int:
        return self.model if self.maybe_input_proj is None else int(self.maybe_input_proj.shape[1])

    @property
    def outputs(self) -> int:
        return self.model if self.maybe_output_proj is None else int(self.maybe_output_proj.shape[0])

    @property
    def head_dim(self) -> int:
        return self.model // self.heads


Module = PatchStep | TransformerWeights


@dataclass(frozen=True, eq=False)
class DequantizerWeights:
    """y = output_proj(sum over codebooks i of out_proj_w[i] . codebooks[i, code_i] + out_proj_b[i])."""

    codebooks: Array  # [quantizers, codebook_size, codebook_dim], rows as they are, not normalised
    out_proj_w: Array  # [quantizers, rvq_dim, codebook_dim]
    out_proj_b: Array  # [quantizers, rvq_dim]
    output_proj_w: Array  # [features, rvq_dim]
    output_proj_b: Array  # [features]


@dataclass(frozen=True, eq=False)
class QuantizerWeights:
    """r = input_proj(x); per codebook: the row nearest to in_proj(r) by angle is the code, then r -= out_proj(row).

    The last codebook's out_proj is not here: nothing follows it.
    """

    input_proj_w: Array  # [rvq_dim, features]
    input_proj_b: Array  # [rvq_dim]
    codebooks: Array  # [quantizers, codebook_size, codebook_dim], rows as they are, not normalised
    in_proj_w: Array  # [quantizers, codebook_dim, rvq_dim]
    in_proj_b: Array  # [quantizers, codebook_dim]
    out_proj_w: Array  # [quantizers - 1, rvq_dim, codebook_dim]
    out_proj_b: Array  # [quantizers - 1, rvq_dim]


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    format: CodecFormat
    dequantizer: DequantizerWeights
    modules: tuple[Module, ...]  # patches are steps up; the last leaves one feature: interleaved samples

    def __post_init__(self) -> None:
        features, tokens = self.dequantizer.output_proj_w.shape[0], 1
        for index, module in enumerate(self.modules):
            if isinstance(module, PatchStep):
                if features % module.patch:
                    raise BundleError(f"decoder {index}: a patch of {module.patch} does not divide {features} features")
                features, tokens = features // module.patch, tokens * module.patch
            else:
                _check_inputs(module, features, tokens, f"decoder {index}")
                features = module.outputs
        if (tokens, features) != (frame_values(self.format), 1):
            raise BundleError(
                f"decoder: the modules end at {tokens} tokens of {features} features a frame; "
                f"channels and samples per frame need {frame_values(self.format)} of 1"
            )


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    format: CodecFormat
    modules: tuple[Module, ...]  # patches are steps down; the first takes one feature: interleaved samples
    quantizer: QuantizerWeights

    def __post_init__(self) -> None:
        features, tokens = 1, frame_values(self.format)
        for index, module in enumerate(self.modules):
            if isinstance(module, PatchStep):
                if tokens % module.patch:
                    raise BundleError(f"encoder {index}: a patch of {module.patch} does not divide {tokens} tokens")
                features, tokens = features * module.patch, tokens // module.patch
            else:
                _check_inputs(module, features, tokens, f"encoder {index}")
                features = module.outputs
        needed = self.quantizer.input_proj_w.shape[1]
        if (tokens, features) != (1, needed):
            raise BundleError(
                f"encoder: the modules end at {tokens} tokens of {features} features a frame; "
                f"the quantizer takes 1 of {needed}"
            )


@dataclass(frozen=True, eq=False)
class CodecWeights:
    """What was read of a checkpoint, or could be taken out of a bundle: at least one of both."""

    maybe_decoder: DecoderWeights | None
    maybe_encoder: EncoderWeights | None

    @property
    def decoder(self) -> DecoderWeights:
        """For whoever has asked for it."""
        assert self.maybe_decoder is not None
        return self.maybe_decoder

    @property
    def format(self) -> CodecFormat:
        side = self.maybe_decoder or self.maybe_encoder
        assert side is not None
        return side.format


def frame_values(codec: CodecFormat) -> int:
    """Values in one frame of interleaved samples: the model works on a single channel."""
    return codec.frame_samples * codec.channels


def transformers(modules: Sequence[Module]) -> list[tuple[int, TransformerWeights]]:
    """The transformers among the modules, each with its index among all of them."""
    return [(index, module) for index, module in enumerate(modules) if isinstance(module, TransformerWeights)]


def rope_exponents(head_dim: int, max_period: float) -> Array:
    """e_j with theta_j = exp(e_j), rounded as the official graph rounds them. [head_dim / 2]

    exp is not taken here: the official graph leaves it to the runtime, and how it rounds is audible after minutes.

    >>> rope_exponents(8, 10000.0).tolist()
    [-0.0, -2.3025851249694824, -4.605170249938965, -6.907755374908447]
    """
    step = np.float32(-2 * math.log(max_period)) * (np.float32(1) / np.float32(head_dim))
    return np.arange(head_dim // 2, dtype=np.float32) * step


def _check_inputs(module: TransformerWeights, features: int, tokens: int, where: str) -> None:
    if module.inputs != features:
        raise BundleError(f"{where}: the transformer takes {module.inputs} features, but {features} reach it")
    if module.tokens_per_frame != tokens:
        raise BundleError(f"{where}: {module.tokens_per_frame} tokens a frame were expected, but {tokens} reach it")
