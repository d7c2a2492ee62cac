"""config.json of a checkpoint: what is built, in numbers, before any tensor is read.

Rules of this room:

- Read what is there, refuse what the graphs here cannot do, assume nothing: a key that decides how the model
  works and has a value unknown to us is an error that names key, value and what is allowed.
- Keys that only matter in training are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mossnano_stdio.build.model import PatchStep, context_tokens
from mossnano_stdio.errors import BundleError
from mossnano_stdio.tokens.format import CodecFormat

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


def load_config(path: Path) -> CodecConfig:
    """Read config.json, or say which key of it cannot be built from."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; a checkpoint has its config.json beside its tensors") from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error})") from error
    return parse_config(raw, where=str(path))


def parse_config(raw: object, where: str = "config.json") -> CodecConfig:
    """What `load_config` does once the file is read."""
    top = _Section(raw, where)
    quantizer = top.section("quantizer_kwargs")
    kind = quantizer if "quantizer_type" in quantizer.values else top
    kind.one_of("quantizer_type", QUANTIZERS_OF_THIS_MAKE)
    codec = CodecFormat(
        sample_rate=_sample_rate(top),
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
        decoder=_decoder_modules(top, codec),
        encoder=_encoder_modules(top, codec),
    )


class _Section:
    """One JSON object, which knows where it lies when a key of it is wrong."""

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


def _sample_rate(top: _Section) -> int:
    keys = [key for key in ("sampling_rate", "sample_rate") if key in top.values] or ["sampling_rate"]
    rates = {top.count(key) for key in keys}
    if len(rates) > 1:
        raise BundleError(f"{top.where}: sampling_rate and sample_rate differ: {sorted(rates)}")
    return rates.pop()


def _decoder_modules(top: _Section, codec: CodecFormat) -> tuple[ModuleConfig, ...]:
    tokens = 1
    modules: list[ModuleConfig] = []
    for section in top.sections("decoder_kwargs"):
        module = _module(section, tokens, codec)
        if isinstance(module, PatchStep):
            tokens *= module.patch
        modules.append(module)
    return tuple(modules)


def _encoder_modules(top: _Section, codec: CodecFormat) -> tuple[ModuleConfig, ...]:
    tokens = codec.frame_samples * codec.channels
    modules: list[ModuleConfig] = []
    for section in top.sections("encoder_kwargs"):
        module = _module(section, tokens, codec)
        if isinstance(module, PatchStep):
            if tokens % module.patch:
                raise BundleError(f"{section.where}: patch_size {module.patch} does not divide {tokens} tokens a frame")
            tokens //= module.patch
        modules.append(module)
    return tuple(modules)


def _module(section: _Section, tokens_per_frame: int, codec: CodecFormat) -> ModuleConfig:
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
        context=context_tokens(section.positive("context_duration"), tokens_per_frame, codec.frames_per_second),
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
