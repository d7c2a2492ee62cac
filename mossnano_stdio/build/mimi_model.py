"""Mimi's weights, whichever of the two published layouts they came from. Its graphs are built from these.

Rules of this room:

- Plain numpy, float32, nothing about files and nothing about onnx. mimi_checkpoint.py makes these; mimi_steps.py and
  mimi_whole.py build from them.
- Convolutions are causal: what they see before a stream begins are zeros.
- An ELU stands in front of every module of a stack but the first, and of both convolutions of a residual block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mossnano_stdio.build.convolutions import Conv, TransposedConv, check_stack
from mossnano_stdio.build.model import Array, TransformerWeights
from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat

RESAMPLED_BY = 2  # tokens of the transformers in a frame of codes


@dataclass(frozen=True, eq=False)
class Residual:
    """x + widen(elu(narrow(elu(x))))."""

    narrow: Conv
    widen: Conv  # of kernel 1

    @property
    def inputs(self) -> int:
        return self.narrow.inputs

    @property
    def outputs(self) -> int:
        return self.widen.outputs


ConvModule = Conv | TransposedConv | Residual


@dataclass(frozen=True, eq=False)
class CodebookChain:
    """A residual quantizer: r = input_proj(x); per codebook the nearest row is the code, then r -= row.

    Back again: output_proj(sum of the rows).
    """

    input_proj: Array  # [rvq_dim, features]
    output_proj: Array  # [features, rvq_dim]
    codebooks: Array  # [quantizers, codebook_size, rvq_dim]


@dataclass(frozen=True, eq=False)
class MimiWeights:
    """All that a checkpoint holds. `semantic` codes come first in a frame; `acoustic` ones start from x anew."""

    format: CodecFormat
    encoder: tuple[ConvModule, ...]
    encoder_transformer: TransformerWeights
    downsample: Array  # [features, features, 4], with replicated columns before a stream begins
    semantic: CodebookChain
    acoustic: CodebookChain
    upsample: Array  # [features, 1, 4], each feature by itself
    decoder_transformer: TransformerWeights
    decoder: tuple[ConvModule, ...]

    def __post_init__(self) -> None:
        features = self.encoder_transformer.model
        check_stack(self.encoder, self.format.channels, features, "encoder")
        check_stack(self.decoder, features, self.format.channels, "decoder")
        for name, modules in (("encoder", self.encoder), ("decoder", self.decoder)):
            token_samples = math.prod(module.stride for module in modules if not isinstance(module, Residual))
            if token_samples * RESAMPLED_BY != self.format.frame_samples:
                raise BundleError(
                    f"{name}: its strides make {token_samples} samples a token; "
                    f"{self.format.frame_samples} samples a frame of {RESAMPLED_BY} tokens were expected"
                )

    @property
    def widest_values(self) -> int:
        """Of a frame in the longest row of columns, which is what both stacks begin or end with."""
        return self.format.frame_samples * self.encoder[0].outputs

    @property
    def features(self) -> int:
        return self.decoder_transformer.model

    @property
    def look_back_frames(self) -> int:
        """How many frames before its own the decoder's convolutions see, upsampling included, rounded up."""
        tokens, columns_per_token = 0.0, 1
        for module in self.decoder:
            match module:
                case Conv():
                    tokens += module.past_columns / columns_per_token
                case Residual():
                    tokens += module.narrow.past_columns / columns_per_token
                case TransposedConv():
                    tokens += 1 / columns_per_token
                    columns_per_token *= module.stride
        return 1 + math.ceil(tokens / RESAMPLED_BY)
