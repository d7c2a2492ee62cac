"""The codec once more, in numpy and float64, as plainly as it can be written: what graphs are held against.

It shares no arithmetic with the graphs: no caches, no chunks, whole recordings only, one token after the other where
that is plainer. It shares their weights, which the goldens check.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.build.model import (
    DecoderWeights,
    EncoderWeights,
    LayerWeights,
    Module,
    PatchStep,
    TransformerWeights,
)
from mossnano_stdio.build.random_weights import Size, Stage
from mossnano_stdio.codecs import SeekingDecoder
from mossnano_stdio.tokens import Codes

Array = NDArray[np.float64]
Sound = NDArray[np.float32]

# No dimension twice, nothing that divides another by chance, one channel, a last frame shorter than a context, heads
# smaller than what the runtime rotates at once.
ODD = Size(
    features=30, rvq=11, stages=(Stage(1, 18, 22, 3, 0.5), Stage(2, 18, 22, 3, 0.3)), patches=(5, 2, 7),
    sample_rate=700, channels=1, frame_samples=70, quantizers=3, codebook_size=13, codebook_dim=5,
)  # fmt: skip

erf = np.vectorize(math.erf, otypes=[np.float64])


def furthest(here: Sound, there: NDArray[Any]) -> float:
    """How far two sounds are apart where they are furthest."""
    assert here.shape == there.shape
    assert here.dtype == np.float32
    return float(np.abs(here - there).max())


def in_chunks(decoder: SeekingDecoder, codes: Codes, chunk_frames: int) -> Sound:
    starts = range(0, len(codes), chunk_frames)
    return np.concatenate([decoder.step(codes[start : start + chunk_frames]) for start in starts])


def decode(weights: DecoderWeights, codes: NDArray[Any], quantizers: int | None = None) -> Array:
    """[frames, quantizers] -> [samples, channels]; `quantizers` decodes only the first so many."""
    parts = weights.dequantizer
    rows = np.zeros((len(codes), parts.output_proj_w.shape[1]))
    for index in range(codes.shape[1] if quantizers is None else quantizers):
        found = parts.codebooks[index][codes[:, index]].astype(np.float64)
        rows += found @ parts.out_proj_w[index].T.astype(np.float64) + parts.out_proj_b[index]
    x = rows @ parts.output_proj_w.T.astype(np.float64) + parts.output_proj_b
    for module in weights.modules:
        x = _patch_up(x, module.patch) if isinstance(module, PatchStep) else transform(module, x)
    return x.reshape(-1, weights.format.channels)


def encode(weights: EncoderWeights, wave: NDArray[Any]) -> NDArray[np.int64]:
    """[samples, channels], whole frames -> [frames, quantizers]."""
    x: Array = wave.astype(np.float64).reshape(-1, 1)
    for module in weights.modules:
        x = _patch_down(x, module.patch) if isinstance(module, PatchStep) else transform(module, x)
    parts = weights.quantizer
    rest = x @ parts.input_proj_w.T.astype(np.float64) + parts.input_proj_b
    codes = []
    for index, codebook in enumerate(parts.codebooks.astype(np.float64)):
        looked_up = _unit(rest @ parts.in_proj_w[index].T.astype(np.float64) + parts.in_proj_b[index])
        distances = ((looked_up[:, None, :] - _unit(codebook)[None]) ** 2).sum(axis=-1)
        codes.append(distances.argmin(axis=1))
        if index < len(parts.out_proj_w):
            rest = rest - (codebook[codes[-1]] @ parts.out_proj_w[index].T.astype(np.float64) + parts.out_proj_b[index])
    return np.stack(codes, axis=1)


def transform(module: TransformerWeights, x: Array) -> Array:
    """[tokens, in] -> [tokens, out]."""
    if module.maybe_input_proj is not None:
        x = x @ module.maybe_input_proj.T.astype(np.float64)
    for layer in module.layers:
        x = x + layer.scale1 * _attention(module, layer, _norm(x, layer.norm1_w, layer.norm1_b))
        wide = _norm(x, layer.norm2_w, layer.norm2_b) @ layer.ffn_up.T.astype(np.float64)
        x = x + layer.scale2 * ((0.5 * wide * (1 + erf(wide / math.sqrt(2)))) @ layer.ffn_down.T.astype(np.float64))
    return x if module.maybe_output_proj is None else x @ module.maybe_output_proj.T.astype(np.float64)


def frames_of_context(modules: tuple[Module, ...]) -> float:
    """The longest context, in frames."""
    found = [module for module in modules if isinstance(module, TransformerWeights)]
    return max(module.context / module.tokens_per_frame for module in found)


def _attention(module: TransformerWeights, layer: LayerWeights, x: Array) -> Array:
    tokens, model = x.shape
    size = model // module.heads
    queries, keys, values = np.split(x @ layer.in_proj.T.astype(np.float64), 3, axis=1)
    positions = np.arange(tokens)
    age = positions[:, None] - positions[None, :]
    hidden = (age < 0) | (age >= module.context)
    mixed = np.empty_like(x)
    for head in range(module.heads):
        own = slice(head * size, (head + 1) * size)
        turned_queries = _rotate(queries[:, own], positions, module.max_period)
        turned_keys = _rotate(keys[:, own], positions, module.max_period)
        scores = turned_queries @ turned_keys.T / math.sqrt(size)
        scores[hidden] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, own] = (shares / shares.sum(axis=1, keepdims=True)) @ values[:, own]
    result: Array = mixed @ layer.out_proj.T.astype(np.float64)
    return result


def _rotate(x: Array, positions: NDArray[Any], period: float) -> Array:
    """Each pair (2j, 2j + 1) as a complex number, turned by its own angle."""
    size = x.shape[1]
    angles = positions[:, None] * period ** (-2 * np.arange(size // 2) / size)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * (np.cos(angles) + 1j * np.sin(angles))
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _norm(x: Array, weight: NDArray[Any], bias: NDArray[Any]) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    normed: Array = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias
    return normed


def _patch_up(x: Array, patch: int) -> Array:
    """y[c, l * patch + h] = x[c * patch + h, l], features first; here tokens come first."""
    tokens, features = x.shape
    y = np.empty((tokens * patch, features // patch))
    for token in range(tokens):
        for step in range(patch):
            y[token * patch + step] = x[token, step::patch]
    return y


def _patch_down(x: Array, patch: int) -> Array:
    tokens, features = x.shape
    y = np.empty((tokens // patch, features * patch))
    for token in range(tokens // patch):
        for step in range(patch):
            y[token, step::patch] = x[token * patch + step]
    return y


def _unit(rows: Array) -> Array:
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return unit
