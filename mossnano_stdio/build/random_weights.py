"""Writes stand-ins: checkpoints of seeded random weights in the published model's topology, for tests and measurements.

Rules of this room:

- What is built from a stand-in is built as from any other checkpoint.
- Attention is pointed enough that a lost, repeated or swapped piece of state changes the output by many 16-bit steps,
  and flat enough that float rounding does not. The output is as loud as music and does not clip.
- The same size and seed give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mossnano_stdio.build.checkpoint import NEWER, OLDER, Layout, save_checkpoint
from mossnano_stdio.build.model import Array

QUERY_KEY_GAIN = 1.4  # scores with a deviation of 2: some thirty of 1,600 keys share most of the weight
LAYER_SCALE = 0.4
CODEBOOK_FALL = 0.8  # how loud each codebook is beside the one before it
OUTPUT_LEVEL = 0.07  # of the last projection: about 0.1 RMS after all layers have added their part
INPUT_GAIN = 6.0  # of the encoder's first projection: recordings of 0.15 RMS become about 1


@dataclass(frozen=True)
class Stage:
    """One transformer."""

    layers: int
    model: int
    hidden: int
    heads: int
    context_seconds: float


@dataclass(frozen=True)
class Size:
    """The dimensions of a codec's decoder. Its encoder has the same modules in the opposite order."""

    features: int
    rvq: int
    stages: tuple[Stage, ...]
    patches: tuple[int, ...]  # one before each stage (1: there is none) and one behind the last
    sample_rate: int = 48_000
    channels: int = 2
    frame_samples: int = 3_840
    quantizers: int = 16
    codebook_size: int = 1_024
    codebook_dim: int = 8
    older: bool = False  # the first layout of checkpoints: other names, projections left out where widths are equal


NANO_PATCHES, PATCHES_24K, V2_PATCHES = (4, 2, 2, 2, 240), (1, 2, 2, 2, 240), (1, 2, 2, 2, 2, 2, 240)

SIZES = {  # model -> size
    "nano": {
        "true": Size(
            768, 512, tuple(Stage(layers, 256, 1024, 4, s) for layers, s in ((4, 10), (2, 8), (2, 6), (4, 4))),
            NANO_PATCHES,
        ),
        "tiny": Size(
            64, 32, tuple(Stage(layers, 32, 64, 4, s) for layers, s in ((2, 0.8), (1, 0.64), (1, 0.48), (2, 0.32))),
            NANO_PATCHES,
        ),
    },
    "24k": {
        "true": Size(
            768, 512, (Stage(32, 1280, 5120, 20, 10), *[Stage(12, 768, 3072, 12, 10)] * 3), PATCHES_24K,
            sample_rate=24_000, channels=1, frame_samples=1_920, quantizers=32, older=True,
        ),
        "tiny": Size(
            48, 32, (Stage(2, 80, 320, 5, 0.64), *(Stage(layers, 48, 192, 3, 0.64) for layers in (1, 1, 2))),
            PATCHES_24K,
            sample_rate=24_000, channels=1, frame_samples=1_920, quantizers=32, older=True,
        ),
    },
    "v2": {
        "true": Size(
            768, 512, (Stage(32, 1280, 5120, 20, 10), *(Stage(12, 768, 3072, 12, s) for s in (10, 8, 4, 2, 1))),
            V2_PATCHES, quantizers=32,
        ),
        "tiny": Size(
            48, 32,
            (
                Stage(1, 80, 320, 5, 0.8),
                *(Stage(1, 48, 192, 3, s) for s in (0.8, 0.64, 0.32, 0.16)),
                Stage(2, 48, 192, 3, 0.08),
            ),
            V2_PATCHES, quantizers=32,
        ),
    },
}  # fmt: skip


def save_standin(folder: Path, size: Size, seed: int) -> None:
    """Write the checkpoint of a stand-in into `folder`."""
    save_checkpoint(folder, config(size), _tensors(size, np.random.default_rng(seed)))


def config(size: Size) -> dict[str, Any]:
    """config.json as the published model has it, in these dimensions."""
    decoder = _decoder_modules(size)
    encoder = [
        module | {"input_dimension": module["output_dimension"], "output_dimension": module["input_dimension"]}
        if module["module_type"] == "Transformer"
        else module
        for module in reversed(decoder)
    ]
    numbers: dict[str, Any]
    if size.older:
        (seconds,) = {stage.context_seconds for stage in size.stages}
        numbers = {
            "sample_rate": size.sample_rate,
            "downsample_rate": size.frame_samples,
            "causal_transformer_context_duration": seconds,
        }
    else:
        numbers = {
            "sampling_rate": size.sample_rate,
            "downsample_rate": size.frame_samples,
            "number_channels": size.channels,
            "enable_channel_interleave": True,
        }
    return {
        "architectures": ["MossAudioTokenizerModel"],
        "model_type": "moss-audio-tokenizer",
        **numbers,
        "dtype": "float32",
        "encoder_kwargs": encoder,
        "decoder_kwargs": decoder,
        "quantizer_type": "rlfq",
        "quantizer_kwargs": {
            "quantizer_type": "rlfq",
            "input_dim": size.features,
            "output_dim": size.features,
            "rvq_dim": size.rvq,
            "num_quantizers": size.quantizers,
            "codebook_size": size.codebook_size,
            "codebook_dim": size.codebook_dim,
        },
    }


def _decoder_modules(size: Size) -> list[dict[str, Any]]:
    modules: list[dict[str, Any]] = []
    *before, last = size.patches
    features = size.features
    for number, (patch, stage) in enumerate(zip(before, size.stages, strict=True), start=1):
        if patch > 1:
            modules.append({"module_type": "PatchedPretransform", "patch_size": patch})
        # What follows splits each feature vector into tokens. Between two stages the widths are as published: as wide
        # as the codec in nano, as wide as the stage in the larger models.
        if number == len(size.stages):
            outputs = last
        elif before[0] > 1:
            outputs = size.features
        else:
            outputs = stage.model
        module = {
            "module_type": "Transformer",
            "input_dimension": features // patch,
            "output_dimension": outputs,
            "d_model": stage.model,
            "dim_feedforward": stage.hidden,
            "num_heads": stage.heads,
            "num_layers": stage.layers,
            "context_duration": stage.context_seconds,
            "causal": True,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "max_period": 10_000,
        }
        if size.older:
            del module["context_duration"]
        modules.append(module)
        features = outputs
    return [*modules, {"module_type": "PatchedPretransform", "patch_size": last}]


def _tensors(size: Size, random: np.random.Generator) -> Iterator[tuple[str, Array]]:
    described = config(size)
    for side in ("encoder", "decoder"):
        modules = described[f"{side}_kwargs"]
        for index, module in enumerate(modules):
            if module["module_type"] == "Transformer":
                gains = {"encoder1": (INPUT_GAIN, 1.0), f"decoder{len(modules) - 2}": (1.0, OUTPUT_LEVEL)}
                own = gains.get(f"{side}{index}", (1.0, 1.0))
                yield from _transformer(f"{side}.{index}", module, own, OLDER if size.older else NEWER, random)
    yield from _quantizer(size, random)


def _transformer(
    prefix: str, module: dict[str, Any], gains: tuple[float, float], names: Layout, random: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    model, hidden = module["d_model"], module["dim_feedforward"]
    inputs, outputs = module["input_dimension"], module["output_dimension"]
    if not (names.leaves_out_equal and inputs == model):
        yield f"{prefix}.input_proj.weight", _matrix(model, inputs, random) * np.float32(gains[0])
    for number in range(module["num_layers"]):
        layer = f"{prefix}.transformer.layers.{number}"
        in_proj = _matrix(3 * model, model, random)
        in_proj[: 2 * model] *= np.float32(QUERY_KEY_GAIN)
        yield f"{layer}.{names.in_proj}", in_proj
        yield f"{layer}.{names.out_proj}", _matrix(model, model, random)
        yield f"{layer}.{names.ffn_up}", _matrix(hidden, model, random)
        yield f"{layer}.{names.ffn_down}", _matrix(model, hidden, random)
        for part in ("1", "2"):
            yield f"{layer}.norm{part}.weight", _around(1.0, 0.1, (model,), random)
            yield f"{layer}.norm{part}.bias", _around(0.0, 0.05, (model,), random)
            yield f"{layer}.layer_scale_{part}.scale", _around(LAYER_SCALE, 0.2 * LAYER_SCALE, (model,), random)
    if not (names.leaves_out_equal and outputs == model):
        yield f"{prefix}.output_proj.weight", _matrix(outputs, model, random) * np.float32(gains[1])


def _quantizer(size: Size, random: np.random.Generator) -> Iterator[tuple[str, Array]]:
    loudness = math.sqrt(sum(CODEBOOK_FALL ** (2 * index) for index in range(size.quantizers)))
    yield from _projection("quantizer.input_proj", size.rvq, size.features, loudness, random)
    yield from _projection("quantizer.output_proj", size.features, size.rvq, 1 / loudness, random)
    for index in range(size.quantizers):
        prefix = f"quantizer.quantizers.{index}"
        yield f"{prefix}.codebook.weight", _around(0.0, 1.0, (size.codebook_size, size.codebook_dim), random)
        yield from _projection(f"{prefix}.in_proj", size.codebook_dim, size.rvq, 1.0, random)
        yield from _projection(f"{prefix}.out_proj", size.rvq, size.codebook_dim, CODEBOOK_FALL**index, random)


def _projection(
    prefix: str, outputs: int, inputs: int, gain: float, random: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    """A 1x1 convolution under weight norm that turns inputs of deviation 1 into outputs of deviation `gain`."""
    yield f"{prefix}.parametrizations.weight.original0", _around(gain, 0.2 * gain, (outputs, 1, 1), random)
    yield f"{prefix}.parametrizations.weight.original1", _around(0.0, 0.1, (outputs, inputs, 1), random)
    yield f"{prefix}.bias", _around(0.0, 0.02 * gain, (outputs,), random)


def _matrix(outputs: int, inputs: int, random: np.random.Generator) -> Array:
    """A matrix whose outputs deviate as its inputs do."""
    return _around(0.0, inputs**-0.5, (outputs, inputs), random)


def _around(centre: float, deviation: float, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    noise: Array = random.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(deviation)
    noise += np.float32(centre)
    return noise
