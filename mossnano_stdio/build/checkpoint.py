"""Reads a checkpoint, config.json and safetensors, as weights, and writes checkpoints.

Rules of this room:

- config.json is read before any tensor. A key that decides how the model works and has a value unknown here is a
  BundleError that names the key, the value and what is allowed. Keys that only matter in training are not read.
- Every tensor that the config calls for must be there, in its shape, finite and float32, and no other tensor may be
  there. Anything else is a BundleError that names the tensor.
- `save_checkpoint` writes what `load_checkpoint` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
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
from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named
from mossnano_stdio.tokens import CodecFormat

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = "model-00001-of-00001.safetensors"

QUANTIZERS_OF_THIS_MAKE = ("rlfq", "random_prefix_rlfq")  # residual, each codebook searched by angle
TRANSFORMERS_OF_THIS_MAKE = {
    "causal": (True,),
    "gating": ("none",),
    "norm": ("layer_norm",),
    "positional_embedding": ("rope",),
}


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


def load_checkpoint(folder: Path) -> CodecWeights:
    """Read the weights of the decoder and the encoder from a checkpoint's folder."""
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; a checkpoint has its config.json beside its tensors") from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error})") from error
    config = parse_config(raw, where=str(path))
    with ExitStack() as files:
        tensors = _Tensors(folder, files)
        weights = CodecWeights(_decoder(config, tensors), _encoder(config, tensors))
        tensors.refuse_leftovers()
    return weights


def save_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Write config.json, one shard and its index, as the published checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), SHARD_NAME),
    }
    with open_named(folder / SHARD_NAME) as file:
        file.write(save(dict(tensors), metadata={"format": "pt"}))
    for name, document in ((INDEX_NAME, index), (CONFIG_NAME, config)):
        with open_named(folder / name) as file:
            file.write(json.dumps(document, indent=2).encode() + b"\n")


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
        channels=top.count("number_channels"),
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
        decoder=_module_configs(top, "decoder", codec),
        encoder=_module_configs(top, "encoder", codec),
    )


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


def _module_configs(top: _Section, side: str, codec: CodecFormat) -> tuple[ModuleConfig, ...]:
    tokens = 1 if side == "decoder" else frame_values(codec)
    modules: list[ModuleConfig] = []
    for section in top.sections(f"{side}_kwargs"):
        module = _module_config(section, tokens, codec)
        modules.append(module)
        if isinstance(module, PatchStep):
            if side == "decoder":
                tokens *= module.patch
            elif tokens % module.patch:
                raise BundleError(f"{section.where}: patch_size {module.patch} does not divide {tokens} tokens a frame")
            else:
                tokens //= module.patch
    return tuple(modules)


def _module_config(section: _Section, tokens_per_frame: int, codec: CodecFormat) -> ModuleConfig:
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
        context=round(section.positive("context_duration") * tokens_per_frame * codec.frames_per_second),
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


def _decoder(config: CodecConfig, tensors: _Tensors) -> DecoderWeights:
    sizes, count = config.quantizer, config.format.quantizers
    out_proj_w, out_proj_b = _projections("out_proj", count, sizes.rvq, sizes.codebook_dim, tensors)
    output_proj_w, output_proj_b = tensors.projection("quantizer.output_proj", sizes.outputs, sizes.rvq)
    codebooks = _codebooks(config, tensors)
    dequantizer = DequantizerWeights(codebooks, out_proj_w, out_proj_b, output_proj_w, output_proj_b)
    return DecoderWeights(config.format, dequantizer, _modules("decoder", config.decoder, tensors))


def _encoder(config: CodecConfig, tensors: _Tensors) -> EncoderWeights:
    sizes, count = config.quantizer, config.format.quantizers
    input_proj_w, input_proj_b = tensors.projection("quantizer.input_proj", sizes.rvq, sizes.inputs)
    in_proj_w, in_proj_b = _projections("in_proj", count, sizes.codebook_dim, sizes.rvq, tensors)
    out_proj_w, out_proj_b = _projections("out_proj", count - 1, sizes.rvq, sizes.codebook_dim, tensors)
    codebooks = _codebooks(config, tensors)
    quantizer = QuantizerWeights(input_proj_w, input_proj_b, codebooks, in_proj_w, in_proj_b, out_proj_w, out_proj_b)
    return EncoderWeights(config.format, _modules("encoder", config.encoder, tensors), quantizer)


def _projections(name: str, count: int, outputs: int, inputs: int, tensors: _Tensors) -> tuple[Array, Array]:
    """The projections of the first `count` codebooks: weights [count, outputs, inputs], biases [count, outputs]."""
    pairs = [tensors.projection(f"quantizer.quantizers.{i}.{name}", outputs, inputs) for i in range(count)]
    weights, biases = [weight for weight, _ in pairs], [bias for _, bias in pairs]
    return np.reshape(weights, (-1, outputs, inputs)), np.reshape(biases, (-1, outputs))


def _codebooks(config: CodecConfig, tensors: _Tensors) -> Array:
    shape = (config.format.codebook_size, config.quantizer.codebook_dim)
    names = [f"quantizer.quantizers.{i}.codebook.weight" for i in range(config.format.quantizers)]
    return np.stack([tensors.take(name, *shape) for name in names])


def _modules(side: str, configs: tuple[ModuleConfig, ...], tensors: _Tensors) -> tuple[Module, ...]:
    return tuple(
        config if isinstance(config, PatchStep) else _transformer(f"{side}.{index}", config, tensors)
        for index, config in enumerate(configs)
    )


def _transformer(prefix: str, config: TransformerConfig, tensors: _Tensors) -> TransformerWeights:
    return TransformerWeights(
        input_proj=tensors.take(f"{prefix}.input_proj.weight", config.model, config.inputs),
        layers=tuple(_layer(f"{prefix}.transformer.layers.{layer}", config, tensors) for layer in range(config.layers)),
        output_proj=tensors.take(f"{prefix}.output_proj.weight", config.outputs, config.model),
        heads=config.heads,
        context=config.context,
        tokens_per_frame=config.tokens_per_frame,
        max_period=config.max_period,
    )


def _layer(prefix: str, config: TransformerConfig, tensors: _Tensors) -> LayerWeights:
    model, hidden = config.model, config.hidden
    return LayerWeights(
        norm1_w=tensors.take(f"{prefix}.norm1.weight", model),
        norm1_b=tensors.take(f"{prefix}.norm1.bias", model),
        in_proj=tensors.take(f"{prefix}.self_attn.in_proj.weight", 3 * model, model),
        out_proj=tensors.take(f"{prefix}.self_attn.out_proj.weight", model, model),
        scale1=tensors.take(f"{prefix}.layer_scale_1.scale", model),
        norm2_w=tensors.take(f"{prefix}.norm2.weight", model),
        norm2_b=tensors.take(f"{prefix}.norm2.bias", model),
        ffn_up=tensors.take(f"{prefix}.ffn.0.weight", hidden, model),
        ffn_down=tensors.take(f"{prefix}.ffn.2.weight", model, hidden),
        scale2=tensors.take(f"{prefix}.layer_scale_2.scale", model),
    )


class _Tensors:
    """The tensors of one or many safetensors files, each asked for by name and shape."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._folder = folder
        self._opened = opened
        self._files: dict[Path, Any] = {}
        self._holders = self._open()
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int) -> Array:
        """Read one tensor as it lies in the file. It may be read more than once."""
        if name not in self._holders:
            raise BundleError(f"{self._folder}: the tensor {name} {list(shape)} is missing")
        path = self._holders[name]
        entry = self._files[path].get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise BundleError(f"{path}: {name} has shape {entry.get_shape()}, the config calls for {list(shape)}")
        if entry.get_dtype() != "F32":
            raise BundleError(f"{path}: {name} is {entry.get_dtype()}; F32 is needed")
        tensor: Array = self._files[path].get_tensor(name)
        if not np.isfinite(tensor).all():
            raise BundleError(f"{path}: {name} holds NaN or infinity")
        self._taken.add(name)
        return tensor

    def projection(self, prefix: str, outputs: int, inputs: int) -> tuple[Array, Array]:
        """Weight [outputs, inputs] and bias of a 1x1 convolution, its weight norm folded."""
        names = [f"{prefix}.parametrizations.weight.original{half}" for half in (0, 1)]
        missing = [name for name in names if name not in self._holders]
        if len(missing) == 1:
            (found,) = set(names) - set(missing)
            raise BundleError(f"{self._folder}: {found} is half of a weight-norm pair; {missing[0]} is missing")
        length = self.take(names[0], outputs, 1, 1)[:, :, 0].astype(np.float64)
        direction = self.take(names[1], outputs, inputs, 1)[:, :, 0].astype(np.float64)
        norms = np.linalg.norm(direction, axis=1, keepdims=True)
        if not norms.all():
            raise BundleError(f"{self._holders[names[1]]}: {names[1]} has a row of zeros, which has no direction")
        return (length * direction / norms).astype(np.float32), self.take(f"{prefix}.bias", outputs)

    def refuse_leftovers(self) -> None:
        leftovers = sorted(set(self._holders) - self._taken)
        if leftovers:
            more = f" and {len(leftovers) - 1} more" if len(leftovers) > 1 else ""
            raise BundleError(f"{self._holders[leftovers[0]]}: unexpected tensor {leftovers[0]}{more}")

    def _open(self) -> dict[str, Path]:
        if (self._folder / SINGLE_NAME).exists():
            path = self._folder / SINGLE_NAME
            return dict.fromkeys(self._open_file(path), path)
        if (self._folder / INDEX_NAME).exists():
            return self._open_shards(self._folder / INDEX_NAME)
        raise BundleError(f"{self._folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there")

    def _open_shards(self, index_path: Path) -> dict[str, Path]:
        holders: dict[str, Path] = {}
        weight_map = _weight_map(index_path)
        for shard in sorted(set(weight_map.values())):
            path = self._folder / shard
            for name in self._open_file(path):
                if weight_map.get(name) != shard:
                    raise BundleError(f"{path}: holds {name}, which {index_path.name} does not place there")
                holders[name] = path
        for name, shard in weight_map.items():
            if name not in holders:
                raise BundleError(f"{self._folder / shard}: {name} is missing, which {index_path.name} places there")
        return holders

    def _open_file(self, path: Path) -> list[str]:
        try:
            self._files[path] = self._opened.enter_context(safe_open(path, framework="numpy"))
            return list(self._files[path].keys())
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: cannot be read as safetensors: {error}") from error


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
