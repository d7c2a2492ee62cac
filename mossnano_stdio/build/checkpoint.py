"""A checkpoint, config.json and safetensors, as weights.

Rules of this room:

- Every tensor that the config calls for is there, in its shape, finite and float32, and none besides. Anything
  else is a BundleError that names the tensor: a wrong guess here would run, and sound wrong.
- `save_checkpoint` writes what `load_checkpoint` reads: stand-ins are checkpoints like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mossnano_stdio.build.config import CodecConfig, ModuleConfig, TransformerConfig, load_config
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
)
from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = "model-00001-of-00001.safetensors"


def load_checkpoint(folder: Path) -> CodecWeights:
    """Read the weights of the decoder and the encoder from a checkpoint's folder."""
    config = load_config(folder / CONFIG_NAME)
    with _Tensors(folder) as tensors:
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


def _decoder(config: CodecConfig, tensors: _Tensors) -> DecoderWeights:
    codec, sizes = config.format, config.quantizer
    out_proj = [
        tensors.projection(f"quantizer.quantizers.{i}.out_proj", sizes.rvq, sizes.codebook_dim)
        for i in range(codec.quantizers)
    ]
    output_w, output_b = tensors.projection("quantizer.output_proj", sizes.outputs, sizes.rvq)
    dequantizer = DequantizerWeights(
        codebooks=_codebooks(config, tensors),
        out_proj_w=np.stack([weight for weight, _ in out_proj]),
        out_proj_b=np.stack([bias for _, bias in out_proj]),
        output_proj_w=output_w,
        output_proj_b=output_b,
    )
    return DecoderWeights(codec, dequantizer, _modules("decoder", config.decoder, tensors))


def _encoder(config: CodecConfig, tensors: _Tensors) -> EncoderWeights:
    codec, sizes = config.format, config.quantizer
    input_w, input_b = tensors.projection("quantizer.input_proj", sizes.rvq, sizes.inputs)
    in_proj = [
        tensors.projection(f"quantizer.quantizers.{i}.in_proj", sizes.codebook_dim, sizes.rvq)
        for i in range(codec.quantizers)
    ]
    out_proj = [
        tensors.projection(f"quantizer.quantizers.{i}.out_proj", sizes.rvq, sizes.codebook_dim)
        for i in range(codec.quantizers - 1)
    ]
    quantizer = QuantizerWeights(
        input_proj_w=input_w,
        input_proj_b=input_b,
        codebooks=_codebooks(config, tensors),
        in_proj_w=np.stack([weight for weight, _ in in_proj]),
        in_proj_b=np.stack([bias for _, bias in in_proj]),
        out_proj_w=np.reshape([weight for weight, _ in out_proj], (-1, sizes.rvq, sizes.codebook_dim)),
        out_proj_b=np.reshape([bias for _, bias in out_proj], (-1, sizes.rvq)),
    )
    return EncoderWeights(codec, _modules("encoder", config.encoder, tensors), quantizer)


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

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, Any] = {}
        self._holders = self._open()
        self._taken: set[str] = set()

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    def take(self, name: str, *shape: int) -> Array:
        """One tensor as it lies in the file. Asking twice is fine."""
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
            file: Any = safe_open(path, framework="numpy")
            self._files[path] = file
            return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: cannot be read as safetensors: {error}") from error


def _weight_map(index_path: Path) -> dict[str, str]:
    """Which file each tensor lies in; the files lie beside the index."""
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
