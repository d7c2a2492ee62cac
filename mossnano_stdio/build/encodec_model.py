"""EnCodec's weights, whichever of the published layouts they came from. Its graphs are built from these.

Rules of this room:

- Plain numpy, float32, nothing about files and nothing about onnx. encodec_checkpoint.py makes these; encodec_steps.py
  and encodec_whole.py build from them.
- An ELU stands in front of every convolution of a stack but the first, and of both that lie behind each other in a
  block. None stands in front of a shortcut or an LSTM.
- A causal model has no norms. One that is not causal has one behind every convolution, over a whole segment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mossnano_stdio.build.convolutions import Conv, TransposedConv, check_stack
from mossnano_stdio.build.model import Array
from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat


@dataclass(frozen=True, eq=False)
class SegmentNorm:
    """All channels and columns together to mean 0 and variance 1, then a gain and an offset for each channel."""

    gain: Array
    offset: Array


@dataclass(frozen=True, eq=False)
class MirroredConv(Conv):
    """Its input is mirrored at both ends, or in a causal model at its start."""

    maybe_norm: SegmentNorm | None


@dataclass(frozen=True, eq=False)
class SpreadingConv(TransposedConv):
    """A transposed one, with a norm of its own."""

    maybe_norm: SegmentNorm | None  # over what is cut off at the ends, too


@dataclass(frozen=True, eq=False)
class ShortcutBlock:
    """shortcut(x) + widen(elu(narrow(elu(x))))."""

    narrow: MirroredConv
    widen: MirroredConv  # of kernel 1, as the shortcut
    shortcut: MirroredConv

    @property
    def inputs(self) -> int:
        return self.narrow.inputs

    @property
    def outputs(self) -> int:
        return self.widen.outputs


@dataclass(frozen=True, eq=False)
class LstmLayer:
    """The rows of each tensor are those of the gates input, forget, cell, output, in this order."""

    input_weight: Array  # [4 * hidden, in]
    hidden_weight: Array  # [4 * hidden, hidden]
    input_bias: Array
    hidden_bias: Array

    @property
    def hidden(self) -> int:
        return int(self.hidden_weight.shape[1])


@dataclass(frozen=True, eq=False)
class LstmStack:
    """x + the last layer's output."""

    layers: tuple[LstmLayer, ...]

    @property
    def inputs(self) -> int:
        return self.layers[0].hidden

    @property
    def outputs(self) -> int:
        return self.inputs


EncodecModule = MirroredConv | SpreadingConv | ShortcutBlock | LstmStack


@dataclass(frozen=True)
class Segments:
    """How a recording is cut by a model that is not causal, in samples."""

    length: int
    stride: int  # from the start of one to the start of the next


@dataclass(frozen=True, eq=False)
class EncodecWeights:
    """All that a checkpoint holds."""

    format: CodecFormat
    encoder: tuple[EncodecModule, ...]
    codebooks: Array  # [quantizers, codebook_size, features]
    decoder: tuple[EncodecModule, ...]
    maybe_segments: Segments | None  # None: the model is causal, and a recording of any length is one piece

    def __post_init__(self) -> None:
        features = int(self.codebooks.shape[2])
        check_stack(self.encoder, self.format.channels, features, "encoder")
        check_stack(self.decoder, features, self.format.channels, "decoder")
        for name, modules in (("encoder", self.encoder), ("decoder", self.decoder)):
            samples = math.prod(module.stride for module in modules if isinstance(module, MirroredConv | SpreadingConv))
            if samples != self.format.frame_samples:
                raise BundleError(
                    f"{name}: its strides make {samples} samples a frame, {self.format.frame_samples} were expected"
                )

    @property
    def widest_values(self) -> int:
        """Of a frame in the longest row of columns, which is what both stacks begin or end with."""
        return self.format.frame_samples * self.encoder[0].outputs

    @property
    def first_chunk_frames(self) -> int:
        """How many frames a stream's first chunk needs, unless they are all: so many that its start can be mirrored.

        Only the convolutions at the rate of frames see further than a frame.
        """
        first, last = self.decoder[0], self.encoder[-1]
        assert isinstance(first, MirroredConv)
        assert isinstance(last, MirroredConv)
        return 1 + max(first.past_columns, last.past_columns)
