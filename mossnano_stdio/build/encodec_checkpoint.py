"""Reads EnCodec's weights from a safetensors file, in the names of EnCodec's own tool or in Hugging Face's.

Rules of this room:

- The layout is recognised by the names of the tensors, and their shapes say how large the network is. A config.json
  beside them says what they cannot (rates, segments), and whatever both say must agree. Without one, the rates are
  those of the published model of the same kind: 24 kHz mono with weight norm, or 48 kHz stereo with a norm over time.
- A value of a config that decides how the network works and is unknown here is a BundleError that names it.
- Every tensor that the network needs must be there and no other (see tensors.py), but for what only training needs.
- A pickle is refused, as reading one can run whatever it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mossnano_stdio.build.encodec_model import (
    EncodecModule,
    EncodecWeights,
    LstmLayer,
    LstmStack,
    MirroredConv,
    SegmentNorm,
    Segments,
    ShortcutBlock,
    SpreadingConv,
)
from mossnano_stdio.build.model import Array
from mossnano_stdio.build.tensors import RenamedTensors, maybe_marked_file, replaced
from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights.checked_json import Entry, load_json

OWN_MARK = "quantizer.vq.layers.0._codebook.embed"  # a tensor that only this layout has
HUGGING_FACE_MARK = "quantizer.layers.0.codebook.embed"
CONFIG_NAME = "config.json"
ENCODEC_FILES = ("model.safetensors", "encodec*.safetensors")
PICKLES = ("encodec*.th", "encodec*.pt", "pytorch_model.bin")

COMPRESS = 2  # a block's inner channels are so many times fewer


@dataclass(frozen=True)
class EncodecNumbers:
    """What the tensors do not say, and how large they are. The network's sizes are read off the tensors."""

    sample_rate: int
    channels: int
    features: int
    filters: int
    ratios: tuple[int, ...]  # of the decoder, in its order
    kernel: int
    last_kernel: int
    residual_kernel: int
    lstm_layers: int
    quantizers: int
    codebook_size: int
    maybe_segments: Segments | None

    @property
    def format(self) -> CodecFormat:
        frame_samples = int(np.prod(self.ratios))
        return CodecFormat(self.sample_rate, self.channels, frame_samples, self.quantizers, self.codebook_size)


def maybe_encodec_file(checkpoint: Path) -> Path | None:
    """The file with EnCodec's tensors that `checkpoint`, a file or a folder, stands for; None where it holds none."""
    if checkpoint.is_file():
        _refuse_pickle(checkpoint)
    marks = OWN_MARK, HUGGING_FACE_MARK
    maybe_file = maybe_marked_file(checkpoint, ENCODEC_FILES, marks, several="EnCodecs")
    if maybe_file is None and not any(checkpoint.glob("*.safetensors")):
        for pattern in PICKLES:
            for path in checkpoint.glob(pattern):
                _refuse_pickle(path)
    return maybe_file


def load_encodec(path: Path) -> EncodecWeights:
    tensors = _EncodecTensors(path)
    weights = _weights(tensors, _numbers(tensors, path.with_name(CONFIG_NAME)))
    tensors.refuse_leftovers()
    return weights


def _refuse_pickle(path: Path) -> None:
    """PyTorch's files, old and new: a pickle, and a ZIP with one inside."""
    with path.open("rb") as file:
        start = file.read(4)
    # A safetensors file can begin with any byte, as its first eight are a length, but the last of these are zeros.
    if start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[2:] != b"\0\0"):
        raise BundleError(
            f"{path}: is a pickle, which can run any program when it is read, so it is not; where you trust it, "
            'convert it: python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in '
            f"torch.load('{path.name}', weights_only=True).items()}}, '{path.stem}.safetensors')\""
        )


# --- names -------------------------------------------------------------------------------------------------------

HUGGING_FACE_NAMES = (  # of EnCodec's own tool, as a pattern -> theirs; all that fit are replaced, in this order
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv|convtr)\.norm\.", ".norm."),
    (r"\.conv\.conv\.|\.convtr\.convtr\.", ".conv."),
    (r"\.vq\.layers\.", ".layers."),
    (r"\._codebook\.", ".codebook."),
)


def transformers_name(name: str) -> str:
    """What the `transformers` package calls a tensor.

    >>> transformers_name("decoder.model.3.convtr.convtr.weight"), transformers_name("decoder.model.3.convtr.norm.bias")
    ('decoder.layers.3.conv.weight', 'decoder.layers.3.norm.bias')
    """
    return replaced(name, HUGGING_FACE_NAMES)


class _EncodecTensors(RenamedTensors):
    """Tensors by the names of EnCodec's own tool, whatever the file calls them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "EnCodec", OWN_MARK, transformers_name)

    def has(self, name: str) -> bool:
        return self.in_file(name) in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, or of the weight that its parts make."""
        names = (name, f"{name}_v", _new_spelling(name, 1))
        found = [self.places[place] for place in map(self.in_file, names) if place in self.places]
        if not found:
            raise BundleError(f"{self.source}: the tensor {self.in_file(name)} is missing")
        return found[0].shape

    def weight(self, name: str, *shape: int) -> Array:
        """A weight that may lie apart, as a direction and its length (weight norm), in either spelling."""
        for length, direction in (
            (f"{name}_g", f"{name}_v"),
            (_new_spelling(name, 0), _new_spelling(name, 1)),
        ):
            if self.has(direction):
                return _joined_weight(self.take(length, shape[0], 1, 1), self.take(direction, *shape))
        return self.take(name, *shape)


def _new_spelling(name: str, part: int) -> str:
    return f"{name.removesuffix('weight')}parametrizations.weight.original{part}"


def _joined_weight(length: Array, direction: Array) -> Array:
    norms = np.sqrt(np.square(direction.astype(np.float64)).sum(axis=(1, 2), keepdims=True))
    if not norms.all():
        raise BundleError("a weight's direction is all zeros, so it has none; this checkpoint is damaged")
    joined: Array = (direction * (length / norms)).astype(np.float32)
    return joined


# --- numbers -----------------------------------------------------------------------------------------------------


def _numbers(tensors: _EncodecTensors, config_path: Path) -> EncodecNumbers:
    """What the tensors say, and what a config beside them adds."""
    filters, channels, kernel = tensors.shape("encoder.model.0.conv.conv.weight")
    codebook_size, features = tensors.shape(_codebook_name(0))
    ratios = tuple(_ratios(tensors))
    lstm = range(1, 100)
    last = 3 * (len(ratios) + 1)
    published = _published(tensors)
    maybe_config = _maybe_config(config_path)
    sample_rate, maybe_segments = _rates(maybe_config) if maybe_config else published
    numbers = EncodecNumbers(
        sample_rate=sample_rate,
        channels=channels,
        features=features,
        filters=filters,
        ratios=ratios,
        kernel=kernel,
        last_kernel=tensors.shape(f"decoder.model.{last}.conv.conv.weight")[2],
        residual_kernel=tensors.shape("encoder.model.1.block.1.conv.conv.weight")[2],
        lstm_layers=next(layer for layer in lstm if not tensors.has(f"decoder.model.1.lstm.weight_ih_l{layer}")),
        quantizers=next(index for index in range(1, 1000) if not tensors.has(_codebook_name(index))),
        codebook_size=codebook_size,
        maybe_segments=maybe_segments,
    )
    if maybe_config:
        _check_config(maybe_config, numbers)
    if (numbers.maybe_segments is None) != (published[1] is None):
        raise BundleError(f"{config_path}: says otherwise than the tensors whether there is a norm over time")
    return numbers


def _codebook_name(index: int) -> str:
    return f"quantizer.vq.layers.{index}._codebook.embed"


def _ratios(tensors: _EncodecTensors) -> Iterator[int]:
    place = 3
    while tensors.has(f"decoder.model.{place}.convtr.convtr.bias") and tensors.has(
        f"decoder.model.{place + 1}.block.1.conv.conv.bias"
    ):
        yield tensors.shape(f"decoder.model.{place}.convtr.convtr.weight")[2] // 2
        place += 3


def _published(tensors: _EncodecTensors) -> tuple[int, Segments | None]:
    """The sample rate and the segments of the published model that has such norms."""
    if tensors.has("decoder.model.0.conv.norm.weight"):
        return 48_000, Segments(48_000, 47_520)
    return 24_000, None


def _maybe_config(path: Path) -> Entry | None:
    """None also where it is that of something else, which came with this file beside it."""
    if not path.exists():
        return None
    config, _ = load_json(path)
    return config if config.text_at("model_type", default="") == "encodec" else None


def _rates(config: Entry) -> tuple[int, Segments | None]:
    sample_rate = config.at("sampling_rate").whole(least=1)
    length = config.maybe_at("chunk_length_s")
    if length is None or length.value is None:
        return sample_rate, None
    samples = int(_fraction(length, most=3600) * sample_rate)
    stride = int((1 - _fraction(config.at("overlap"), most=0.5)) * samples)
    return sample_rate, Segments(samples, max(1, stride))


def _fraction(entry: Entry, most: float) -> float:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float) or not 0 < entry.value <= most:
        raise entry.wrong(f"a number above 0 and up to {most:g}")
    return float(entry.value)


def _check_config(config: Entry, numbers: EncodecNumbers) -> None:
    """The only values that graphs can be built for, and those that the tensors have."""
    is_causal = numbers.maybe_segments is None
    kind = {
        "use_causal_conv": is_causal,
        "norm_type": "weight_norm" if is_causal else "time_group_norm",
        "normalize": not is_causal,
        "trim_right_ratio": 1.0,
    }
    sizes = {
        "audio_channels": numbers.channels,
        "codebook_dim": numbers.features,
        "codebook_size": numbers.codebook_size,
        "hidden_size": numbers.features,
        "kernel_size": numbers.kernel,
        "last_kernel_size": numbers.last_kernel,
        "num_filters": numbers.filters,
        "num_lstm_layers": numbers.lstm_layers,
        "residual_kernel_size": numbers.residual_kernel,
        "upsampling_ratios": list(numbers.ratios),
    }
    fixed = {"compress": COMPRESS, "num_residual_layers": 1, "pad_mode": "reflect", "use_conv_shortcut": True}
    for key, needed in (kind | sizes | fixed).items():
        found = config.maybe_at(key)
        # An old config leaves out what is as it always was.
        if found is not None and found.value is not None and found.value != needed:
            raise found.wrong(json.dumps(needed))


# --- weights -----------------------------------------------------------------------------------------------------


def _weights(tensors: _EncodecTensors, numbers: EncodecNumbers) -> EncodecWeights:
    codebooks = []
    for index in range(numbers.quantizers):
        codebooks.append(tensors.take(_codebook_name(index), numbers.codebook_size, numbers.features))
        for training in ("inited", "cluster_size", "embed_avg"):
            tensors.pass_over(_codebook_name(index).replace(".embed", f".{training}"))
    return EncodecWeights(
        format=numbers.format,
        encoder=tuple(_encoder(tensors, numbers)),
        codebooks=np.stack(codebooks),
        decoder=tuple(_decoder(tensors, numbers)),
        maybe_segments=numbers.maybe_segments,
    )


def _encoder(tensors: _EncodecTensors, numbers: EncodecNumbers) -> Iterator[EncodecModule]:
    """Modules with weights only: an ELU takes a place in the file's numbering, too."""
    channels = numbers.filters
    yield _conv(tensors, "encoder.model.0", (channels, numbers.channels, numbers.kernel))
    place = 1
    for stride in reversed(numbers.ratios):
        yield _block(tensors, f"encoder.model.{place}", channels, numbers)
        yield _conv(tensors, f"encoder.model.{place + 2}", (2 * channels, channels, 2 * stride), stride)
        channels, place = 2 * channels, place + 3
    yield _lstm(tensors, f"encoder.model.{place}.lstm", channels, numbers.lstm_layers)
    yield _conv(tensors, f"encoder.model.{place + 2}", (numbers.features, channels, numbers.last_kernel))


def _decoder(tensors: _EncodecTensors, numbers: EncodecNumbers) -> Iterator[EncodecModule]:
    channels = numbers.filters << len(numbers.ratios)
    yield _conv(tensors, "decoder.model.0", (channels, numbers.features, numbers.kernel))
    yield _lstm(tensors, "decoder.model.1.lstm", channels, numbers.lstm_layers)
    place = 3
    for stride in numbers.ratios:
        prefix = f"decoder.model.{place}.convtr"
        weight = tensors.weight(f"{prefix}.convtr.weight", channels, channels // 2, 2 * stride)
        channels //= 2
        bias = tensors.take(f"{prefix}.convtr.bias", channels)
        yield SpreadingConv(weight, bias, _maybe_norm(tensors, f"{prefix}.norm", channels))
        yield _block(tensors, f"decoder.model.{place + 1}", channels, numbers)
        place += 3
    yield _conv(tensors, f"decoder.model.{place}", (numbers.channels, channels, numbers.last_kernel))


def _block(tensors: _EncodecTensors, prefix: str, channels: int, numbers: EncodecNumbers) -> ShortcutBlock:
    inner = channels // COMPRESS
    return ShortcutBlock(
        _conv(tensors, f"{prefix}.block.1", (inner, channels, numbers.residual_kernel)),
        _conv(tensors, f"{prefix}.block.3", (channels, inner, 1)),
        _conv(tensors, f"{prefix}.shortcut", (channels, channels, 1)),
    )


def _conv(tensors: _EncodecTensors, prefix: str, shape: tuple[int, int, int], stride: int = 1) -> MirroredConv:
    weight = tensors.weight(f"{prefix}.conv.conv.weight", *shape)
    bias = tensors.take(f"{prefix}.conv.conv.bias", shape[0])
    return MirroredConv(weight, bias, stride, _maybe_norm(tensors, f"{prefix}.conv.norm", shape[0]))


def _maybe_norm(tensors: _EncodecTensors, prefix: str, channels: int) -> SegmentNorm | None:
    if not tensors.has(f"{prefix}.weight"):
        return None
    return SegmentNorm(tensors.take(f"{prefix}.weight", channels), tensors.take(f"{prefix}.bias", channels))


def _lstm(tensors: _EncodecTensors, prefix: str, hidden: int, layers: int) -> LstmStack:
    rows = 4 * hidden
    return LstmStack(
        tuple(
            LstmLayer(
                tensors.take(f"{prefix}.weight_ih_l{layer}", rows, hidden),
                tensors.take(f"{prefix}.weight_hh_l{layer}", rows, hidden),
                tensors.take(f"{prefix}.bias_ih_l{layer}", rows),
                tensors.take(f"{prefix}.bias_hh_l{layer}", rows),
            )
            for layer in range(layers)
        )
    )
