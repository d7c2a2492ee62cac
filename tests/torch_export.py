"""A checkpoint as an official bundle, written by torch's TorchScript exporter as the published one was.

    pip install torch && python -m tests.torch_export CHECKPOINT_DIR OUT_DIR

Our own builder writes graphs of the same contract, but tidier ones: half the nodes, and quicker. What is to hold for
the published files, how their weights are found and how much faster than they we are, is tried on graphs from here.
torch is large, and no test of the usual run needs it.

Rules of this room:

- Modules are written the way models of this family are, shapes asked for at every turn: that is what makes such graphs
  what they are. Weights come from the checkpoint, through build/checkpoint.py.
- Large tensors of decode_step and decode_full lie in one data file, each content once.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn import functional

from mossnano_stdio.build.builder import EXTERNAL_BYTES, OPSET
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.model import (
    NORM_EPSILON,
    ROW_EPSILON,
    CodecWeights,
    DecoderWeights,
    EncoderWeights,
    LayerWeights,
    Module,
    PatchStep,
    TransformerWeights,
)
from mossnano_stdio.build.official import streaming_decode
from mossnano_stdio.weights import (
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
    OFFICIAL_FILES,
    build_metadata,
)
from mossnano_stdio.weights.metadata import DECODE_INPUTS, DECODE_OUTPUTS, ENCODE_INPUTS, ENCODE_OUTPUTS

TRACED_FRAMES = 3

Tensors = tuple[torch.Tensor, ...]


def export_bundle(checkpoint: Path, folder: Path) -> None:
    """Write decode_step, decode_full, encode and their metadata into `folder`."""
    weights = load_checkpoint(checkpoint)
    assert weights.maybe_encoder is not None
    folder.mkdir(parents=True, exist_ok=True)
    metadata = build_metadata(checkpoint.name, weights.format, OFFICIAL_FILES, streaming_decode(weights.decoder), OPSET)
    decode_step = _exported(folder, *_step_to_trace(weights, metadata))
    decode_full = _exported(folder, *_full_to_trace(weights))
    encode = _exported(folder, *_encode_to_trace(weights, weights.maybe_encoder))
    decode = {DECODE_STEP_FILE: decode_step, DECODE_FULL_FILE: decode_full}
    _save(folder, decode, DECODE_DATA)
    _save(folder, {ENCODE_FILE: encode}, ENCODE_DATA)
    (folder / METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


# --- the codec in torch ---------------------------------------------------------------------------


class Decoder(nn.Module):
    """audio_codes [1, frames, quantizers], lengths, states -> audio, lengths, states. Without states: all at once."""

    def __init__(self, weights: DecoderWeights) -> None:
        super().__init__()
        dequantizer = weights.dequantizer
        self.codec = weights.format
        self.codebooks = nn.ModuleList(_embedding(rows) for rows in dequantizer.codebooks)
        parts = zip(dequantizer.out_proj_w, dequantizer.out_proj_b, strict=True)
        self.out_projs = nn.ModuleList(_conv(weight, bias) for weight, bias in parts)
        self.output_proj = _conv(dequantizer.output_proj_w, dequantizer.output_proj_b)
        self.stages = nn.ModuleList(_stage(module, up=True) for module in weights.modules)

    def forward(self, audio_codes: torch.Tensor, lengths: torch.Tensor, *states: torch.Tensor) -> Tensors:
        codes, lengths = audio_codes.permute(2, 0, 1).long(), lengths.long()
        x: Any = 0
        for index, (codebook, out_proj) in enumerate(zip(self.codebooks, self.out_projs, strict=True)):
            x = x + out_proj(codebook(codes[index]).transpose(1, 2))
        x = self.output_proj(x)
        counters, caches = list(states[: self._transformers]), list(states[self._transformers :])
        counters_out: list[torch.Tensor] = []
        caches_out: list[torch.Tensor] = []
        for stage in self.stages:
            if isinstance(stage, Transformer):
                if states:
                    counters_out.append((counters.pop(0).long() + x.shape[2]).int())
                x, after = stage(x, [tuple(caches.pop(0) for _ in range(4)) for _ in stage.layers] if states else None)
                caches_out += after
            else:
                x = stage(x)
        samples = x.reshape(x.shape[0], -1, self.codec.channels).transpose(1, 2)
        return samples.float(), (lengths * self.codec.frame_samples).int(), *counters_out, *caches_out

    @property
    def _transformers(self) -> int:
        return sum(isinstance(stage, Transformer) for stage in self.stages)


class Encoder(nn.Module):
    """waveform [1, channels, samples], lengths -> audio_codes, lengths."""

    def __init__(self, weights: EncoderWeights) -> None:
        super().__init__()
        quantizer = weights.quantizer
        self.codec = weights.format
        self.stages = nn.ModuleList(_stage(module, up=False) for module in weights.modules)
        self.input_proj = _conv(quantizer.input_proj_w, quantizer.input_proj_b)
        self.codebooks = nn.ModuleList(_embedding(rows) for rows in quantizer.codebooks)
        for name in ("in_proj", "out_proj"):
            parts = zip(getattr(quantizer, f"{name}_w"), getattr(quantizer, f"{name}_b"), strict=True)
            setattr(self, f"{name}s", nn.ModuleList(_conv(weight, bias) for weight, bias in parts))

    def forward(self, waveform: torch.Tensor, input_lengths: torch.Tensor) -> Tensors:
        frame = self.codec.frame_samples
        waveform = functional.pad(waveform, (0, (frame - waveform.shape[2] % frame) % frame))
        x = waveform.transpose(1, 2).reshape(waveform.shape[0], 1, -1)
        for stage in self.stages:
            x = stage(x, None)[0] if isinstance(stage, Transformer) else stage(x)
        counted = torch.div(input_lengths.long(), frame, rounding_mode="floor")
        mask = (torch.arange(x.shape[2]) < counted.view(-1, 1)).unsqueeze(1).float()
        rest = self.input_proj(x) * mask
        codes = []
        for index, codebook in enumerate(self.codebooks):
            looked_up = self.in_projs[index](rest * mask).transpose(1, 2)
            found = functional.normalize(looked_up.reshape(-1, looked_up.shape[2]), dim=1, eps=ROW_EPSILON)
            rows = functional.normalize(codebook.weight, dim=1, eps=ROW_EPSILON)
            distances = found.pow(2).sum(1, keepdim=True) - 2 * found @ rows.t() + rows.pow(2).sum(1, keepdim=True).t()
            codes.append((-distances).argmax(1).reshape(rest.shape[0], -1))
            if index < len(self.out_projs):
                rest = rest - self.out_projs[index](codebook(codes[-1]).transpose(1, 2)) * mask
        return torch.stack(codes, dim=2).int(), counted.int()


class Patch(nn.Module):
    def __init__(self, patch: int, up: bool) -> None:
        super().__init__()
        self.patch, self.up = patch, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, features, tokens = x.shape
        if self.up:
            apart = x.reshape(batch, features // self.patch, self.patch, tokens)
            return apart.permute(0, 1, 3, 2).reshape(batch, features // self.patch, tokens * self.patch)
        apart = x.reshape(batch, features, -1, self.patch)
        return apart.permute(0, 1, 3, 2).reshape(batch, features * self.patch, -1)


class Transformer(nn.Module):
    def __init__(self, weights: TransformerWeights) -> None:
        super().__init__()
        self.input_proj, self.output_proj = _linear(weights.maybe_input_proj), _linear(weights.maybe_output_proj)
        self.layers = nn.ModuleList(Layer(layer, weights) for layer in weights.layers)

    def forward(self, x: torch.Tensor, caches: Sequence[Tensors] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.input_proj(x.transpose(1, 2))
        after: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            x, cache = layer(x, caches[index] if caches else None)
            after += cache
        return self.output_proj(x).transpose(1, 2), after


class Layer(nn.Module):
    def __init__(self, weights: LayerWeights, module: TransformerWeights) -> None:
        super().__init__()
        self.heads, self.context, self.max_period = module.heads, module.context, module.max_period
        self.norm1, self.norm2 = (_norm(*pair) for pair in _norms(weights))
        self.in_proj, self.out_proj = _linear(weights.in_proj), _linear(weights.out_proj)
        self.scale1, self.scale2 = (nn.Parameter(_tensor(scale)) for scale in (weights.scale1, weights.scale2))
        self.ffn = nn.Sequential(_linear(weights.ffn_up), nn.GELU(), _linear(weights.ffn_down))

    def forward(self, x: torch.Tensor, cache: Tensors | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        change, after = self._attended(self.norm1(x), cache)
        x = x + self.scale1 * change
        return x + self.scale2 * self.ffn(self.norm2(x)), after

    def _attended(self, x: torch.Tensor, cache: Tensors | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch, tokens = x.shape[0], x.shape[1]
        projected = self.in_proj(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        offset = cache[0].long() if cache else torch.zeros(batch, dtype=torch.long)
        queries, keys = (_rotated(part, offset, self.max_period) for part in (projected[0], projected[1]))
        values = projected[2]
        new = offset.view(-1, 1) + torch.arange(tokens).view(1, -1)
        positions, after = new, []
        if cache:
            keys, values = torch.cat([cache[1], keys], dim=2), torch.cat([cache[2], values], dim=2)
            positions = torch.cat([cache[3].long(), new], dim=1)
            kept = slice(-self.context, None)
            after = [(offset + tokens).int(), keys[:, :, kept], values[:, :, kept], positions[:, kept].int()]
        age = new[:, :, None] - positions[:, None]
        visible = (positions[:, None] >= 0) & (age >= 0) & (age < self.context)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible.unsqueeze(1))
        model = int(self.out_proj.weight.shape[1])
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, model)), after


def _rotated(x: torch.Tensor, offset: torch.Tensor, max_period: float) -> torch.Tensor:
    batch, heads, tokens, size = x.shape
    numbers = torch.arange(size // 2, dtype=torch.float32)
    thetas = torch.exp(numbers * (-math.log(max_period) * 2 / size))
    positions = (offset.float().view(-1, 1) + torch.arange(tokens, dtype=torch.float32)).view(batch, 1, -1, 1)
    angles = thetas * positions
    pairs = x.reshape(batch, heads, tokens, size // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cosines, sines = angles.cos(), angles.sin()
    turned = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1)
    return turned.reshape(batch, heads, tokens, size)


def _stage(module: Module, up: bool) -> nn.Module:
    return Patch(module.patch, up) if isinstance(module, PatchStep) else Transformer(module)


def _norms(weights: LayerWeights) -> list[tuple[Any, Any]]:
    return [(weights.norm1_w, weights.norm1_b), (weights.norm2_w, weights.norm2_b)]


def _norm(weight: Any, bias: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weight), eps=NORM_EPSILON)
    norm.load_state_dict({"weight": _tensor(weight), "bias": _tensor(bias)})
    return norm


def _linear(matrix: Any) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.load_state_dict({"weight": _tensor(matrix)})
    return linear


def _conv(matrix: Any, bias: Any) -> nn.Conv1d:
    conv = nn.Conv1d(matrix.shape[1], matrix.shape[0], 1)
    conv.load_state_dict({"weight": _tensor(matrix).unsqueeze(2), "bias": _tensor(bias)})
    return conv


def _embedding(rows: Any) -> nn.Embedding:
    return nn.Embedding.from_pretrained(_tensor(rows), freeze=False)


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


# --- exporting ------------------------------------------------------------------------------------


def _step_to_trace(weights: CodecWeights, metadata: dict[str, Any]) -> tuple[Any, ...]:
    states = []
    for counter in metadata["streaming_decode"]["transformer_offsets"]:
        states.append(torch.zeros(counter["shape"], dtype=torch.int32))
    for cache in metadata["streaming_decode"]["attention_caches"]:
        states.append(torch.zeros(cache["offset_shape"], dtype=torch.int32))
        states += [torch.zeros(cache["cache_shape"]) for _ in "kv"]
        states.append(torch.full(cache["positions_shape"], -1, dtype=torch.int32))
    names = [metadata["onnx"][f"decode_step_{side}_names"] for side in ("input", "output")]
    return Decoder(weights.decoder), (*_codes(weights), *states), *names, _DECODE_AXES


def _full_to_trace(weights: CodecWeights) -> tuple[Any, ...]:
    return Decoder(weights.decoder), _codes(weights), DECODE_INPUTS, DECODE_OUTPUTS, _DECODE_AXES


def _encode_to_trace(weights: CodecWeights, encoder: EncoderWeights) -> tuple[Any, ...]:
    samples = TRACED_FRAMES * weights.format.frame_samples - 7
    wave = torch.zeros(1, weights.format.channels, samples), torch.tensor([samples], dtype=torch.int32)
    axes = {"waveform": {2: "waveform_length"}, "audio_codes": {1: "code_length"}}
    return Encoder(encoder), wave, ENCODE_INPUTS, ENCODE_OUTPUTS, axes


_DECODE_AXES = {"audio_codes": {1: "code_length"}, "audio": {2: "audio_length"}}


def _codes(weights: CodecWeights) -> Tensors:
    codes = torch.zeros(1, TRACED_FRAMES, weights.format.quantizers, dtype=torch.int32)
    return codes, torch.tensor([TRACED_FRAMES], dtype=torch.int32)


def _exported(
    folder: Path, module: nn.Module, example: Tensors, inputs: list[str], outputs: list[str], axes: dict[str, Any]
) -> onnx.ModelProto:
    path = folder / "traced.onnx"
    export: Callable[..., None] = torch.onnx.export
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it warns of shapes that become constants, as is meant
        export(
            module.eval(),
            example,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(path))
    path.unlink()
    return model


def _save(folder: Path, models: dict[str, onnx.ModelProto], data_name: str) -> None:
    places: dict[bytes, int] = {}
    with (folder / data_name).open("wb") as data:
        for name, model in models.items():
            for tensor in model.graph.initializer:
                content = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(content) < EXTERNAL_BYTES:
                    continue
                if content not in places:
                    places[content] = data.tell()
                    data.write(content)
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                entries = {"location": data_name, "offset": places[content], "length": len(content)}
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=str(value))
            (folder / name).write_bytes(model.SerializeToString())


if __name__ == "__main__":
    export_bundle(Path(sys.argv[1]), Path(sys.argv[2]))
