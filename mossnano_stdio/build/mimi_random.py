"""Writes stand-ins of Mimi: checkpoints of seeded random weights in the published topology, in Kyutai's layout.

Rules of this room:

- What is built from a stand-in is built as from any other checkpoint.
- Every state changes the output by many 16-bit steps, and float rounding does not. The output is as loud as speech.
- The same numbers and seed give the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mossnano_stdio.build.mimi_checkpoint import PUBLISHED_NUMBERS, MimiNumbers, kyutai_config
from mossnano_stdio.build.mimi_model import RESAMPLED_BY
from mossnano_stdio.build.model import Array
from mossnano_stdio.build.tensors import save_tensors
from mossnano_stdio.files import open_named

FILE_NAME, CONFIG_NAME = "tokenizer-standin.safetensors", "mimi_config.json"

MIMI_SIZES = {
    "true": PUBLISHED_NUMBERS,
    "tiny": replace(
        PUBLISHED_NUMBERS, features=32, filters=4, layers=2, heads=4, hidden=64, context=11, rvq=16, codebook_size=2_048
    ),
}

QUERY_KEY_GAIN = 1.4  # as pointed as attention is in random_weights.py
LAYER_SCALE = 0.4
CODEBOOK_FALL = (
    0.93  # how loud each codebook is beside the one before it: steeper, the last would search in rounding noise
)
CONV_GAIN = 1.3  # what an ELU takes from the deviation of its input, about
OUTPUT_LEVEL = 0.1
INPUT_GAIN = 6.0  # recordings of 0.15 RMS become about 1


def save_mimi_standin(folder: Path, numbers: MimiNumbers, seed: int) -> Path:
    """Write the checkpoint of a stand-in into `folder`. Returns the file with its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / FILE_NAME, dict(_tensors(numbers, np.random.default_rng(seed))))
    with open_named(folder / CONFIG_NAME) as file:
        file.write(json.dumps(kyutai_config(numbers), indent=2).encode() + b"\n")
    return folder / FILE_NAME


def _tensors(numbers: MimiNumbers, random: np.random.Generator) -> Iterator[tuple[str, Array]]:
    features, channels = numbers.features, numbers.filters
    yield from _conv("encoder.model.0", (channels, 1, numbers.kernel), random, INPUT_GAIN)
    place = 1
    for stride in reversed(numbers.ratios):
        yield from _residual(f"encoder.model.{place}", channels, numbers, random)
        yield from _conv(f"encoder.model.{place + 2}", (2 * channels, channels, 2 * stride), random)
        channels, place = 2 * channels, place + 3
    yield from _conv(f"encoder.model.{place + 1}", (features, channels, numbers.last_kernel), random)
    for side in ("encoder", "decoder"):
        yield from _transformer(f"{side}_transformer", numbers, random)
    kernel = 2 * RESAMPLED_BY
    yield (
        "downsample.conv.conv.conv.weight",
        _around(0, (features * kernel) ** -0.5, (features, features, kernel), random),
    )
    yield "upsample.convtr.convtr.convtr.weight", _around(0, 0.7, (features, 1, kernel), random)
    yield from _chain("quantizer.rvq_first", numbers.semantic, numbers, random)
    yield from _chain("quantizer.rvq_rest", numbers.quantizers - numbers.semantic, numbers, random)
    yield from _conv("decoder.model.0", (channels, features, numbers.kernel), random)
    place = 1
    for stride in numbers.ratios:
        prefix, channels = f"decoder.model.{place + 1}.convtr.convtr", channels // 2
        deviation = CONV_GAIN * (2 * 2 * channels) ** -0.5  # each column hears two columns of 2 * channels
        yield f"{prefix}.weight", _around(0, deviation, (2 * channels, channels, 2 * stride), random)
        yield f"{prefix}.bias", _around(0, 0.05, (channels,), random)
        yield from _residual(f"decoder.model.{place + 2}", channels, numbers, random)
        place += 3
    yield from _conv(f"decoder.model.{place + 1}", (1, channels, numbers.last_kernel), random, OUTPUT_LEVEL)


def _residual(
    prefix: str, channels: int, numbers: MimiNumbers, random: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    inner = channels // numbers.compress
    yield from _conv(f"{prefix}.block.1", (inner, channels, numbers.residual_kernel), random)
    yield from _conv(f"{prefix}.block.3", (channels, inner, 1), random, 0.5)


def _conv(
    prefix: str, shape: tuple[int, int, int], random: np.random.Generator, gain: float = CONV_GAIN
) -> Iterator[tuple[str, Array]]:
    outputs, inputs, kernel = shape
    yield f"{prefix}.conv.conv.weight", _around(0, gain * (inputs * kernel) ** -0.5, shape, random)
    yield f"{prefix}.conv.conv.bias", _around(0, 0.05 * min(gain, 1), (outputs,), random)


def _transformer(name: str, numbers: MimiNumbers, random: np.random.Generator) -> Iterator[tuple[str, Array]]:
    model, hidden = numbers.features, numbers.hidden
    for number in range(numbers.layers):
        layer = f"{name}.transformer.layers.{number}"
        in_proj = _around(0, model**-0.5, (3 * model, model), random)
        in_proj[: 2 * model] *= np.float32(QUERY_KEY_GAIN)
        yield f"{layer}.self_attn.in_proj_weight", in_proj
        yield f"{layer}.self_attn.out_proj.weight", _around(0, model**-0.5, (model, model), random)
        yield f"{layer}.linear1.weight", _around(0, model**-0.5, (hidden, model), random)
        yield f"{layer}.linear2.weight", _around(0, hidden**-0.5, (model, hidden), random)
        for part in ("1", "2"):
            yield f"{layer}.norm{part}.weight", _around(1, 0.1, (model,), random)
            yield f"{layer}.norm{part}.bias", _around(0, 0.05, (model,), random)
            yield f"{layer}.layer_scale_{part}.scale", _around(LAYER_SCALE, 0.2 * LAYER_SCALE, (model,), random)


def _chain(
    prefix: str, quantizers: int, numbers: MimiNumbers, random: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    features, rvq, size = numbers.features, numbers.rvq, numbers.codebook_size
    yield f"{prefix}.input_proj.weight", _around(0, features**-0.5, (rvq, features, 1), random)
    yield f"{prefix}.output_proj.weight", _around(0, rvq**-0.5, (features, rvq, 1), random)
    for index in range(quantizers):
        codebook = f"{prefix}.vq.layers.{index}._codebook"
        usage = random.uniform(0.5, 2, size).astype(np.float32)
        rows = _around(0, CODEBOOK_FALL**index, (size, rvq), random)
        yield f"{codebook}.embedding_sum", rows * usage[:, np.newaxis]
        yield f"{codebook}.cluster_usage", usage
        yield f"{codebook}._initialized", np.ones(1, np.float32)


def _around(centre: float, deviation: float, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    noise: Array = random.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(deviation)
    noise += np.float32(centre)
    return noise
