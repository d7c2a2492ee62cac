"""Reads a checkpoint, config.json and safetensors, as weights, and writes checkpoints.

Rules of this room:

- config.json is read before any tensor. A key that decides how the model works and has a value unknown here is a
  BundleError that names the key, the value and what is allowed. Keys that only matter in training are not read.
- Every tensor that the config calls for must be there and no other (see tensors.py). Those of a layer are read when
  that layer is asked for; that they are there, and in which shape, is checked before.
- `save_checkpoint` writes what `load_checkpoint` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from safetensors.numpy import save

from mossnano_stdio.build.model import (
    Array,
    CodecWeights,
    DecoderWeights,
    DequantizerWeights,
    EncoderWeights,
    LayerWeights,
    Module,
    PatchStep,
    QuantizerWeights,
    TransformerWeights,
    frame_values,
)
from mossnano_stdio.build.tensors import TensorPlace, Tensors, places_in
from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named
from mossnano_stdio.tokens import CodecFormat

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30  # of tensors in one file that is written here

Sides = Literal["decode", "encode", "all"]

QUANTIZERS_OF_THIS_MAKE = ("rlfq", "random_prefix_rlfq")  # residual, each codebook searched by angle
TRANSFORMERS_OF_THIS_MAKE = {
    "causal": (True,),
    "gating": ("none",),
    "norm": ("layer_norm",),
    "positional_embedding": ("rope",),
}


class Layout(NamedTuple):
    """How a checkpoint calls the tensors of a layer. All of its layers have one layout."""

    in_proj: str
    out_proj: str
    ffn_up: str
    ffn_down: str
    leaves_out_equal: bool  # has a transformer no input_proj, or output_proj, where the widths on both sides are equal?


NEWER = Layout(
    "self_attn.in_proj.weight", "self_attn.out_proj.weight", "ffn.0.weight", "ffn.2.weight", leaves_out_equal=False
)
OLDER = Layout(
    "self_attn.in_projs.0.weight", "self_attn.out_projs.0.weight", "linear1.weight", "linear2.weight",
    leaves_out_equal=True,
)  # fmt: skip


@dataclass(frozen=True)
class TransformerConfig:
    inputs: int
    model: int
    hidden: int
    outputs: int
    layers: int
    heads: int
    context: int
    tokens_per_frame: int
    max_period: float


ModuleConfig = PatchStep | TransformerConfig


@dataclass(frozen=True)
class QuantizerConfig:
    inputs: int  # features that the encoder ends with
    outputs: int  # features that the decoder starts with
    rvq: int
    codebook_dim: int


@dataclass(frozen=True)
class CodecConfig:
    format: CodecFormat
    quantizer: QuantizerConfig
    decoder: tuple[ModuleConfig, ...]
    encoder: tuple[ModuleConfig, ...]


def load_checkpoint(folder: Path, sides: Sides = "all") -> CodecWeights:
    """The weights of the decoder, the encoder, or both, in a checkpoint's folder."""
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; a checkpoint has its config.json beside its tensors") from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error})") from error
    config = parse_config(raw, where=str(path))
    maybe_unneeded = {"decode": "encoder.", "encode": "decoder.", "all": None}[sides]
    tensors = _CheckpointTensors(folder, maybe_unneeded)
    weights = CodecWeights(
        None if sides == "encode" else _decoder(config, tensors),
        None if sides == "decode" else _encoder(config, tensors),
    )
    # Of the quantizer each side needs a part, and what that is the other may not have.
    tensors.refuse_leftovers(but=() if maybe_unneeded is None else (maybe_unneeded, "quantizer."))
    return weights


def is_checkpoint(folder: Path) -> bool:
    """Does the config.json of the folder describe a codec?"""
    try:
        raw = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "quantizer_kwargs" in raw


def save_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Array]]) -> None:
    """Write config.json, shards and their index, as the published checkpoints have them."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, int] = {}  # of the shard that each tensor lies in
    total_bytes = 0
    for number, shard in enumerate(_shards(tensors), start=1):
        numbers |= dict.fromkeys(shard, number)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        with open_named(folder / shard_name(number, 0)) as file:
            file.write(save(shard, metadata={"format": "pt"}))
    count = max(numbers.values())
    for number in range(1, count + 1):  # now that it is known of how many
        (folder / shard_name(number, 0)).replace(folder / shard_name(number, count))
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: shard_name(numbers[name], count) for name in sorted(numbers)},
    }
    for name, document in ((INDEX_NAME, index), (CONFIG_NAME, config)):
        with open_named(folder / name) as file:
            file.write(json.dumps(document, indent=2).encode() + b"\n")


def shard_name(number: int, count: int) -> str:
    """
    >>> shard_name(1, 2)
    'model-00001-of-00002.safetensors'
    """
    return f"model-{number:05}-of-{count:05}.safetensors"


def _shards(tensors: Iterable[tuple[str, Array]]) -> Iterator[dict[str, Array]]:
    shard: dict[str, Array] = {}
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def parse_config(raw: object, where: str = "config.json") -> CodecConfig:
    """Check what stands in config.json, or say which key of it no graph can be built from."""
    top = _Section(raw, where)
    quantizer = top.section("quantizer_kwargs")
    # The published config names the type in both places; what stands nearer to the quantizer counts.
    kind = quantizer if "quantizer_type" in quantizer.values else top
    kind.one_of("quantizer_type", QUANTIZERS_OF_THIS_MAKE)
    keys = [key for key in ("sampling_rate", "sample_rate") if key in top.values] or ["sampling_rate"]
    rates = {top.count(key) for key in keys}
    if len(rates) > 1:
        raise BundleError(f"{top.where}: sampling_rate and sample_rate differ: {sorted(rates)}")
    codec = CodecFormat(
        sample_rate=rates.pop(),
        channels=_channels(top),
        frame_samples=top.count("downsample_rate"),
        quantizers=quantizer.count("num_quantizers"),
        codebook_size=quantizer.count("codebook_size"),
    )
    if codec.channels > 1:
        top.one_of("enable_channel_interleave", (True,))
    if not 2 <= codec.codebook_size <= 1 << 16:
        raise BundleError(f"{quantizer.where}: codebook_size is {codec.codebook_size}; allowed are 2 .. 65536")
    return CodecConfig(
        format=codec,
        quantizer=QuantizerConfig(
            inputs=quantizer.count("input_dim"),
            outputs=quantizer.count("output_dim"),
            rvq=quantizer.count("rvq_dim"),
            codebook_dim=quantizer.count("codebook_dim"),
        ),
        decoder=_module_configs(top, "decoder", _sections_of_decoder(top), codec),
        encoder=_module_configs(top, "encoder", top.sections("encoder_kwargs"), codec),
    )


def _channels(top: _Section) -> int:
    """The first member says nothing about channels: it has one. The number has had two names since."""
    for key in ("number_channels", "channels_numbers"):
        if key in top.values:
            return top.count(key)
    return 1


def _sections_of_decoder(top: _Section) -> list[_Section]:
    """First to last. Old files list the decoder as the encoder that it undoes: from its end, ins and outs exchanged."""
    backwards = "reversed_decoder_kwargs"
    if backwards not in top.values or "decoder_kwargs" in top.values:
        return top.sections("decoder_kwargs")
    exchanged = {"input_dimension": "output_dimension", "output_dimension": "input_dimension"}
    return [
        _Section({exchanged.get(key, key): value for key, value in section.values.items()}, section.where)
        for section in reversed(top.sections(backwards))
    ]


class _Section:
    """One JSON object of config.json. Its errors say where it lies."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise BundleError(f"{where}: a JSON object is needed, found {type(values).__name__}")
        self.values: Mapping[str, Any] = values
        self.where = where

    def get(self, key: str) -> Any:
        if key not in self.values:
            raise BundleError(f"{self.where}: the key {key} is missing")
        return self.values[key]

    def section(self, key: str) -> _Section:
        return _Section(self.get(key), f"{self.where}: {key}")

    def sections(self, key: str) -> list[_Section]:
        values = self.get(key)
        if not isinstance(values, list) or not values:
            raise BundleError(f"{self.where}: {key} must be a list of modules")
        return [_Section(value, f"{self.where}: {key}[{index}]") for index, value in enumerate(values)]

    def count(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BundleError(f"{self.where}: {key} is {value!r}; a whole number from 1 is needed")
        return value

    def positive(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise BundleError(f"{self.where}: {key} is {value!r}; a number above 0 is needed")
        return float(value)

    def one_of(self, key: str, allowed: tuple[object, ...]) -> None:
        value = self.get(key)
        if value not in allowed:
            known = " or ".join(repr(choice) for choice in allowed)
            raise BundleError(f"{self.where}: {key} is {value!r}; graphs can be built for {known} only")


def _module_configs(top: _Section, side: str, sections: list[_Section], codec: CodecFormat) -> tuple[ModuleConfig, ...]:
    tokens = 1 if side == "decoder" else frame_values(codec)
    modules: list[ModuleConfig] = []
    # Without a context of its own any transformer has the common one. Where none has its own, it is the first member,
    # which rounds down.
    round_tokens = round if any("context_duration" in section.values for section in sections) else int
    for section in sections:
        module = _module_config(section, top, tokens, codec, round_tokens)
        modules.append(module)
        if isinstance(module, PatchStep):
            if side == "decoder":
                tokens *= module.patch
            elif tokens % module.patch:
                raise BundleError(f"{section.where}: patch_size {module.patch} does not divide {tokens} tokens a frame")
            else:
                tokens //= module.patch
    return tuple(modules)


def _module_config(
    section: _Section, top: _Section, tokens_per_frame: int, codec: CodecFormat, rounded: Callable[[float], int]
) -> ModuleConfig:
    section.one_of("module_type", ("PatchedPretransform", "Transformer"))
    if section.get("module_type") == "PatchedPretransform":
        return PatchStep(section.count("patch_size"))
    for key, allowed in TRANSFORMERS_OF_THIS_MAKE.items():
        section.one_of(key, allowed)
    transformer = TransformerConfig(
        inputs=section.count("input_dimension"),
        model=section.count("d_model"),
        hidden=section.count("dim_feedforward"),
        outputs=section.count("output_dimension"),
        layers=section.count("num_layers"),
        heads=section.count("num_heads"),
        context=rounded(codec.frames_per_second * tokens_per_frame * _context_seconds(section, top)),
        tokens_per_frame=tokens_per_frame,
        max_period=section.positive("max_period"),
    )
    if transformer.model % (2 * transformer.heads):
        raise BundleError(
            f"{section.where}: d_model {transformer.model} over num_heads {transformer.heads} gives no even head size"
        )
    if transformer.context < 1:
        raise BundleError(f"{section.where}: context_duration is less than one token")
    return transformer


def _context_seconds(section: _Section, top: _Section) -> float:
    own, of_all = "context_duration", "causal_transformer_context_duration"
    if own in section.values or of_all not in top.values:
        return section.positive(own)
    return top.positive(of_all)


def _decoder(config: CodecConfig, tensors: _CheckpointTensors) -> DecoderWeights:
    sizes, count = config.quantizer, config.format.quantizers
    out_proj_w, out_proj_b = _projections("out_proj", count, sizes.rvq, sizes.codebook_dim, tensors)
    output_proj_w, output_proj_b = tensors.projection("quantizer.output_proj", sizes.outputs, sizes.rvq)
    codebooks = _codebooks(config, tensors)
    dequantizer = DequantizerWeights(codebooks, out_proj_w, out_proj_b, output_proj_w, output_proj_b)
    return DecoderWeights(config.format, dequantizer, _modules("decoder", config.decoder, tensors))


def _encoder(config: CodecConfig, tensors: _CheckpointTensors) -> EncoderWeights:
    sizes, count = config.quantizer, config.format.quantizers
    input_proj_w, input_proj_b = tensors.projection("quantizer.input_proj", sizes.rvq, sizes.inputs)
    in_proj_w, in_proj_b = _projections("in_proj", count, sizes.codebook_dim, sizes.rvq, tensors)
    out_proj_w, out_proj_b = _projections("out_proj", count - 1, sizes.rvq, sizes.codebook_dim, tensors)
    codebooks = _codebooks(config, tensors)
    quantizer = QuantizerWeights(input_proj_w, input_proj_b, codebooks, in_proj_w, in_proj_b, out_proj_w, out_proj_b)
    return EncoderWeights(config.format, _modules("encoder", config.encoder, tensors), quantizer)


def _projections(name: str, count: int, outputs: int, inputs: int, tensors: _CheckpointTensors) -> tuple[Array, Array]:
    """The projections of the first `count` codebooks: weights [count, outputs, inputs], biases [count, outputs]."""
    pairs = [tensors.projection(f"quantizer.quantizers.{i}.{name}", outputs, inputs) for i in range(count)]
    weights, biases = [weight for weight, _ in pairs], [bias for _, bias in pairs]
    return np.reshape(weights, (-1, outputs, inputs)), np.reshape(biases, (-1, outputs))


def _codebooks(config: CodecConfig, tensors: _CheckpointTensors) -> Array:
    shape = (config.format.codebook_size, config.quantizer.codebook_dim)
    names = [f"quantizer.quantizers.{i}.codebook.weight" for i in range(config.format.quantizers)]
    return np.stack([tensors.take(name, *shape) for name in names])


def _modules(side: str, configs: tuple[ModuleConfig, ...], tensors: _CheckpointTensors) -> tuple[Module, ...]:
    return tuple(
        config if isinstance(config, PatchStep) else _transformer(f"{side}.{index}", config, tensors)
        for index, config in enumerate(configs)
    )


def _transformer(prefix: str, config: TransformerConfig, tensors: _CheckpointTensors) -> TransformerWeights:
    def maybe_projection(name: str, outputs: int, inputs: int) -> Array | None:
        if tensors.layout.leaves_out_equal and outputs == inputs:
            return None
        return tensors.take(f"{prefix}.{name}.weight", outputs, inputs)

    return TransformerWeights(
        maybe_input_proj=maybe_projection("input_proj", config.model, config.inputs),
        layers=_Layers(f"{prefix}.transformer.layers", config, tensors),
        maybe_output_proj=maybe_projection("output_proj", config.outputs, config.model),
        model=config.model,
        heads=config.heads,
        context=config.context,
        tokens_per_frame=config.tokens_per_frame,
        max_period=config.max_period,
    )


class _Layers(Sequence[LayerWeights]):
    """The layers of a transformer, each read when it is asked for."""

    def __init__(self, prefix: str, config: TransformerConfig, tensors: _CheckpointTensors) -> None:
        model, hidden, layout = config.model, config.hidden, tensors.layout
        self._prefix = prefix
        self._count = config.layers
        self._tensors = tensors
        self._names = {
            "norm1_w": "norm1.weight",
            "norm1_b": "norm1.bias",
            "in_proj": layout.in_proj,
            "out_proj": layout.out_proj,
            "scale1": "layer_scale_1.scale",
            "norm2_w": "norm2.weight",
            "norm2_b": "norm2.bias",
            "ffn_up": layout.ffn_up,
            "ffn_down": layout.ffn_down,
            "scale2": "layer_scale_2.scale",
        }
        matrices = {
            "in_proj": (3 * model, model),
            "out_proj": (model, model),
            "ffn_up": (hidden, model),
            "ffn_down": (model, hidden),
        }
        for number in range(self._count):
            for field, name in self._names.items():
                tensors.expect(f"{prefix}.{number}.{name}", *matrices.get(field, (model,)))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self[number] for number in range(self._count)[index]]
        number = range(self._count)[index]
        read = self._tensors.read
        return LayerWeights(**{field: read(f"{self._prefix}.{number}.{name}") for field, name in self._names.items()})


class _CheckpointTensors(Tensors):
    """Those of a folder, in one file or in many."""

    def __init__(self, folder: Path, maybe_unneeded: str | None) -> None:
        """Those whose names begin with `maybe_unneeded` are left alone, and so are shards that hold no others: they may
        be missing.
        """
        super().__init__(folder, _find(folder, maybe_unneeded), caller="the config")
        is_older = any(f".{OLDER.in_proj}" in name for name in self.places)
        self.layout = OLDER if is_older else NEWER

    def projection(self, prefix: str, outputs: int, inputs: int) -> tuple[Array, Array]:
        """Weight [outputs, inputs] and bias of a 1x1 convolution, its weight norm folded."""
        names = [f"{prefix}.parametrizations.weight.original{half}" for half in (0, 1)]
        missing = [name for name in names if name not in self.places]
        if len(missing) == 1:
            (found,) = set(names) - set(missing)
            raise BundleError(f"{self.source}: {found} is half of a weight-norm pair; {missing[0]} is missing")
        length = self.take(names[0], outputs, 1, 1)[:, :, 0].astype(np.float64)
        direction = self.take(names[1], outputs, inputs, 1)[:, :, 0].astype(np.float64)
        norms = np.linalg.norm(direction, axis=1, keepdims=True)
        if not norms.all():
            raise BundleError(f"{self.places[names[1]].path}: {names[1]} has a row of zeros, which has no direction")
        return (length * direction / norms).astype(np.float32), self.take(f"{prefix}.bias", outputs)


def _find(folder: Path, maybe_unneeded: str | None) -> dict[str, TensorPlace]:
    if (folder / SINGLE_NAME).exists():
        return places_in(folder / SINGLE_NAME)
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        raise BundleError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there")
    places: dict[str, TensorPlace] = {}
    weight_map = _weight_map(index_path)
    needed = {
        name: shard
        for name, shard in weight_map.items()
        if maybe_unneeded is None or not name.startswith(maybe_unneeded)
    }
    for shard in sorted(set(needed.values())):
        path = folder / shard
        for name, place in places_in(path).items():
            if weight_map.get(name) != shard:
                raise BundleError(f"{path}: holds {name}, which {index_path.name} does not place there")
            places[name] = place
    for name, shard in needed.items():
        if name not in places:
            raise BundleError(f"{folder / shard}: {name} is missing, which {index_path.name} places there")
    return places


def _weight_map(index_path: Path) -> dict[str, str]:
    """Read from the index which file each tensor lies in. The files lie beside the index."""
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{index_path}: no index of shards ({error!r})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise BundleError(f"{index_path}: weight_map must be an object that gives each tensor's file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BundleError(f"{index_path}: {name} is placed in {shard!r}; a file name in the same folder is needed")
    return weight_map
