"""Writes stand-ins of EnCodec: checkpoints of seeded random weights in both published topologies.

Their tensors have the names that EnCodec's own tool gives them.

Rules of this room:

- What is built from a stand-in is built as from any other checkpoint.
- Every state changes the output by many 16-bit steps, and float rounding does not. The output is as loud as speech.
- The same numbers and seed give the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mossnano_stdio.build.encodec_checkpoint import COMPRESS, EncodecNumbers
from mossnano_stdio.build.encodec_model import Segments
from mossnano_stdio.build.model import Array
from mossnano_stdio.build.tensors import save_tensors

ENCODEC_STANDIN_FILE = "encodec-standin.safetensors"

_TRUE_24K = EncodecNumbers(
    sample_rate=24_000,
    channels=1,
    features=128,
    filters=32,
    ratios=(8, 5, 4, 2),
    kernel=7,
    last_kernel=7,
    residual_kernel=3,
    lstm_layers=2,
    quantizers=32,
    codebook_size=1_024,
    maybe_segments=None,
)
_TRUE_48K = replace(_TRUE_24K, sample_rate=48_000, channels=2, quantizers=16, maybe_segments=Segments(48_000, 47_520))

ENCODEC_SIZES = {
    "encodec-24k": {"true": _TRUE_24K, "tiny": replace(_TRUE_24K, features=16, filters=4, quantizers=8)},
    "encodec-48k": {"true": _TRUE_48K, "tiny": replace(_TRUE_48K, features=16, filters=4, quantizers=4)},
}

CONV_GAIN = 1.3  # what an ELU takes from the deviation of its input, about
RECURRENT_GAIN = 1.5  # so that what an LSTM remembers is heard
OUTPUT_LEVEL = 0.1
INPUT_GAIN = 6.0  # recordings of 0.15 RMS become about 1
CODEBOOK_FALL = 0.93  # how loud each codebook is beside the one before it: steeper, the last would search in rounding


def save_encodec_standin(folder: Path, numbers: EncodecNumbers, seed: int) -> Path:
    """Write the checkpoint of a stand-in into `folder`. Returns the file with its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _Drawn(numbers.maybe_segments is not None, np.random.default_rng(seed))
    save_tensors(folder / ENCODEC_STANDIN_FILE, dict(_tensors(numbers, drawn)))
    return folder / ENCODEC_STANDIN_FILE


@dataclass(frozen=True)
class _Drawn:
    """Draws tensors, in the way in which one of the two models keeps them."""

    is_normed: bool
    random: np.random.Generator

    def around(self, centre: float, deviation: float, shape: tuple[int, ...]) -> Array:
        noise: Array = self.random.standard_normal(shape, dtype=np.float32)
        noise *= np.float32(deviation)
        noise += np.float32(centre)
        return noise

    def conv(
        self, prefix: str, shape: tuple[int, int, int], gain: float = CONV_GAIN, kind: str = "conv"
    ) -> Iterator[tuple[str, Array]]:
        """`kind` convtr: [in, out, kernel], where each column hears two columns."""
        outputs, inputs, kernel = shape
        heard = inputs * kernel
        if kind == "convtr":
            outputs, heard = shape[1], 2 * shape[0]
        weight = self.around(0, (1.0 if self.is_normed else gain) * heard**-0.5, shape)
        bias = self.around(0, 0.05 * min(gain, 1), (outputs,))
        if self.is_normed:
            yield f"{prefix}.{kind}.{kind}.weight", weight
            yield f"{prefix}.{kind}.norm.weight", self.around(gain, 0.1 * gain, (outputs,))
            yield f"{prefix}.{kind}.norm.bias", self.around(0, 0.05 * gain, (outputs,))
        else:
            yield f"{prefix}.{kind}.{kind}.weight_g", np.sqrt(np.square(weight).sum(axis=(1, 2), keepdims=True))
            yield f"{prefix}.{kind}.{kind}.weight_v", weight
        yield f"{prefix}.{kind}.{kind}.bias", bias


def _tensors(numbers: EncodecNumbers, drawn: _Drawn) -> Iterator[tuple[str, Array]]:
    channels = numbers.filters
    # A norm makes any input as loud as any other.
    input_gain = CONV_GAIN if drawn.is_normed else INPUT_GAIN
    yield from drawn.conv("encoder.model.0", (channels, numbers.channels, numbers.kernel), input_gain)
    place = 1
    for stride in reversed(numbers.ratios):
        yield from _block(f"encoder.model.{place}", channels, numbers, drawn)
        yield from drawn.conv(f"encoder.model.{place + 2}", (2 * channels, channels, 2 * stride))
        channels, place = 2 * channels, place + 3
    yield from _lstm(f"encoder.model.{place}.lstm", channels, numbers, drawn)
    yield from drawn.conv(f"encoder.model.{place + 2}", (numbers.features, channels, numbers.last_kernel))
    for index in range(numbers.quantizers):
        shape = (numbers.codebook_size, numbers.features)
        yield f"quantizer.vq.layers.{index}._codebook.embed", drawn.around(0, 0.5 * CODEBOOK_FALL**index, shape)
    yield from drawn.conv("decoder.model.0", (channels, numbers.features, numbers.kernel), 0.7)
    yield from _lstm("decoder.model.1.lstm", channels, numbers, drawn)
    place = 3
    for stride in numbers.ratios:
        channels //= 2
        yield from drawn.conv(f"decoder.model.{place}", (2 * channels, channels, 2 * stride), kind="convtr")
        yield from _block(f"decoder.model.{place + 1}", channels, numbers, drawn)
        place += 3
    last = (numbers.channels, channels, numbers.last_kernel)
    yield from drawn.conv(f"decoder.model.{place}", last, OUTPUT_LEVEL)


def _block(prefix: str, channels: int, numbers: EncodecNumbers, drawn: _Drawn) -> Iterator[tuple[str, Array]]:
    inner = channels // COMPRESS
    yield from drawn.conv(f"{prefix}.block.1", (inner, channels, numbers.residual_kernel))
    yield from drawn.conv(f"{prefix}.block.3", (channels, inner, 1), 0.5)
    yield from drawn.conv(f"{prefix}.shortcut", (channels, channels, 1), 0.9)


def _lstm(prefix: str, hidden: int, numbers: EncodecNumbers, drawn: _Drawn) -> Iterator[tuple[str, Array]]:
    for layer in range(numbers.lstm_layers):
        for kind in ("ih", "hh"):
            weight = drawn.around(0, RECURRENT_GAIN * hidden**-0.5, (4 * hidden, hidden))
            yield f"{prefix}.weight_{kind}_l{layer}", weight
            yield f"{prefix}.bias_{kind}_l{layer}", drawn.around(0, 0.1, (4 * hidden,))
