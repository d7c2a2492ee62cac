"""Decoders as others write them, in numpy and float64, and one fault planted in each: `mossnano diagnose` must find it.

They work chunk by chunk, with caches, rings and tails that are really kept.

It shares no arithmetic with the tool, which imitates chunks on whole recordings by what a query may see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.build.convolutions import Conv, TransposedConv
from mossnano_stdio.build.mimi_model import CodebookChain, MimiWeights, Residual
from mossnano_stdio.build.model import DecoderWeights, LayerWeights, PatchStep, TransformerWeights
from tests.oracle import erf

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Wrong:
    """What a decoder does otherwise. By itself: nothing."""

    chunk_frames: int = 3
    context: Callable[[int, int], int] = lambda number, context: context  # by a transformer's number
    ring: bool = False  # as long as the context, written before it is read
    reset: bool = False  # everything, before each chunk
    caches_lost: Callable[[int, int], bool] = lambda number, layer: False  # before each chunk
    tails_lost: bool = False
    offset: str = "tokens"  # how positions go on after a chunk: by its `tokens`, its `frames`, or not at all: `none`
    pairing: str = "pairs"  # `pairs` (2j, 2j + 1), `halves` (j, j + half), `none`
    rows: str = "pairs"  # the order of query and key features
    base: float | None = None
    causal: bool = True
    bias: str = "once"  # of transposed convolutions: `once`, `none`, or `tail`: the tail keeps it, and it comes twice;
    # or `subtracted`: it is taken off again, but from the zeros of a stream's start as well
    replicates: bool = False
    quantizers: int | None = None
    all_biases: bool = False


class Cache:
    """One layer's keys and values, each with the number of its token and the position that it was turned by."""

    def __init__(self, context: int, is_ring: bool) -> None:
        self.context = context
        self.is_ring = is_ring
        self.tokens: list[int] = []
        self.keys: list[Array] = []  # [heads, head_dim] each
        self.values: list[Array] = []

    def seen_after(self, tokens: range, keys: Array, values: Array) -> tuple[NDArray[np.int64], Array, Array]:
        """Append [tokens, heads, head_dim]. In a ring, they take the places of others first."""
        if self.is_ring:
            slots = {token % self.context: index for index, token in enumerate(self.tokens)}
            for index, token in enumerate(tokens):
                if token % self.context in slots:
                    place = slots[token % self.context]
                    self.tokens[place], self.keys[place], self.values[place] = token, keys[index], values[index]
                else:
                    slots[token % self.context] = len(self.tokens)
                    self.tokens.append(token)
                    self.keys.append(keys[index])
                    self.values.append(values[index])
        else:
            self.tokens += list(tokens)
            self.keys += list(keys)
            self.values += list(values)
        found = np.array(self.tokens), np.array(self.keys), np.array(self.values)
        if not self.is_ring:
            for held in (self.tokens, self.keys, self.values):
                del held[: max(0, len(held) - self.context)]
        return found


class CachedTransformer:
    def __init__(self, number: int, module: TransformerWeights, wrong: Wrong) -> None:
        self.number = number
        self.module = module
        self.wrong = wrong
        self.seen = 0  # tokens
        self.offset = 0  # of positions
        self.caches = [self.new_cache() for _ in module.layers]

    def new_cache(self) -> Cache:
        return Cache(self.wrong.context(self.number, self.module.context), self.wrong.ring)

    def step(self, x: Array, frames: int) -> Array:
        module, wrong = self.module, self.wrong
        for index in range(len(self.caches)):
            if wrong.caches_lost(self.number, index):
                self.caches[index] = self.new_cache()
        if module.maybe_input_proj is not None:
            x = x @ module.maybe_input_proj.T.astype(np.float64)
        positions = self.offset + np.arange(len(x))
        for layer, cache in zip(module.layers, self.caches, strict=True):
            x = x + layer.scale1 * self.attention(layer, cache, _norm(x, layer.norm1_w, layer.norm1_b), positions)
            wide = _norm(x, layer.norm2_w, layer.norm2_b) @ layer.ffn_up.T.astype(np.float64)
            gated = 0.5 * wide * (1 + erf(wide / math.sqrt(2)))
            x = x + layer.scale2 * (gated @ layer.ffn_down.T.astype(np.float64))
        self.seen += len(x)
        self.offset += {"tokens": len(x), "frames": frames, "none": 0}[wrong.offset]
        return x if module.maybe_output_proj is None else x @ module.maybe_output_proj.T.astype(np.float64)

    def attention(self, layer: LayerWeights, cache: Cache, x: Array, positions: NDArray[np.int64]) -> Array:
        heads, head_dim = self.module.heads, self.module.head_dim
        projected = (x @ layer.in_proj.T.astype(np.float64)).reshape(len(x), 3, heads, head_dim)
        queries, keys = (self.turned(projected[:, part], positions) for part in (0, 1))
        own = np.arange(self.seen, self.seen + len(x))
        tokens, all_keys, all_values = cache.seen_after(range(self.seen, self.seen + len(x)), keys, projected[:, 2])
        age = own[:, np.newaxis] - tokens
        hidden = age >= cache.context
        if self.wrong.causal:
            hidden |= age < 0
        scores = np.einsum("qhd,khd->hqk", queries, all_keys) / math.sqrt(head_dim)
        scores[:, hidden] = -np.inf
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, all_values).reshape(len(x), -1)
        result: Array = mixed @ layer.out_proj.T.astype(np.float64)
        return result

    def turned(self, x: Array, positions: NDArray[np.int64]) -> Array:
        size = x.shape[-1]
        base = self.wrong.base or self.module.max_period
        angles = positions[:, np.newaxis] * base ** (-2 * np.arange(size // 2) / size)
        if self.wrong.rows == "halves":
            x = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        if self.wrong.pairing == "none":
            return x
        first = slice(0, size // 2) if self.wrong.pairing == "halves" else slice(0, None, 2)
        second = slice(size // 2, None) if self.wrong.pairing == "halves" else slice(1, None, 2)
        turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, np.newaxis]
        result = np.empty_like(x)
        result[..., first], result[..., second] = turned.real, turned.imag
        return result


def decode_moss(weights: DecoderWeights, codes: NDArray[Any], wrong: Wrong) -> Array:
    """[frames, quantizers] -> [samples, channels]."""

    def fresh() -> list[CachedTransformer | PatchStep]:
        modules: list[CachedTransformer | PatchStep] = []
        number = 0
        for module in weights.modules:
            if isinstance(module, PatchStep):
                modules.append(module)
            else:
                modules.append(CachedTransformer(number, module, wrong))
                number += 1
        return modules

    modules, pieces = fresh(), []
    for start in range(0, len(codes), wrong.chunk_frames):
        chunk = codes[start : start + wrong.chunk_frames]
        modules = fresh() if wrong.reset else modules
        x = _dequantized(weights, chunk, wrong)
        for module in modules:
            x = _patched_up(x, module.patch) if isinstance(module, PatchStep) else module.step(x, len(chunk))
        pieces.append(x.reshape(-1, weights.format.channels))
    return np.concatenate(pieces)


def _dequantized(weights: DecoderWeights, codes: NDArray[Any], wrong: Wrong) -> Array:
    parts = weights.dequantizer
    total = np.zeros((len(codes), parts.output_proj_w.shape[1]))
    used = min(codes.shape[1], wrong.quantizers or codes.shape[1])
    for index in range(len(parts.codebooks)):
        if index < used:
            rows = parts.codebooks[index][codes[:, index]].astype(np.float64)
            total += rows @ parts.out_proj_w[index].T.astype(np.float64)
        if index < used or wrong.all_biases:
            total += parts.out_proj_b[index]
    return total @ parts.output_proj_w.T.astype(np.float64) + parts.output_proj_b


def _patched_up(x: Array, patch: int) -> Array:
    return x.reshape(len(x), -1, patch).transpose(0, 2, 1).reshape(len(x) * patch, -1)


def _norm(x: Array, weight: NDArray[Any], bias: NDArray[Any]) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    normed: Array = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias
    return normed


# --- Mimi ------------------------------------------------------------------------------------------------------------


class Tails:
    """What convolutions keep between calls: the last columns that went in, or the tail that came out. Columns first."""

    def __init__(self, wrong: Wrong) -> None:
        self.wrong = wrong
        self.kept: dict[str, Array] = {}

    def conv(self, name: str, x: Array, conv: Conv) -> Array:
        weight = conv.weight.astype(np.float64)
        pad = weight.shape[2] - conv.stride
        start = np.repeat(x[:1], pad, axis=0) if self.wrong.replicates else np.zeros((pad, x.shape[1]))
        together = np.concatenate([self.kept.get(name, start), x])
        self.kept[name] = together[len(together) - pad :]
        columns = np.stack([together[at : at + weight.shape[2]] for at in range(len(x))])
        result: Array = np.einsum("tki,oik->to", columns, weight) + conv.bias
        return result

    def transposed(self, name: str, x: Array, weight: Array, bias: Array | float, stride: int) -> Array:
        """`weight`: [in, out, kernel]."""
        kernel = weight.shape[2]
        raw = np.zeros(((len(x) - 1) * stride + kernel, weight.shape[1]))
        for at, column in enumerate(x):
            raw[at * stride : at * stride + kernel] += np.einsum("i,iok->ko", column, weight)
        if self.wrong.bias in ("tail", "subtracted"):
            raw += bias
        if name in self.kept:
            raw[: kernel - stride] += self.kept[name]
        if self.wrong.bias == "subtracted":
            raw[: kernel - stride] -= bias
        self.kept[name] = raw[len(x) * stride :].copy()
        out = raw[: len(x) * stride]
        return out + bias if self.wrong.bias == "once" else out

    def run(self, x: Array, weights: MimiWeights) -> Array:
        for index, module in enumerate(weights.decoder):
            name = str(index)
            match module:
                case Residual():
                    narrow = self.conv(f"{name}.narrow", _elu(x), module.narrow)
                    x = x + self.conv(f"{name}.widen", _elu(narrow), module.widen)
                case Conv():
                    x = self.conv(name, _elu(x) if index else x, module)
                case TransposedConv():
                    x = self.transposed(
                        name, _elu(x), module.weight.astype(np.float64), module.bias.astype(np.float64), module.stride
                    )
        return x


def decode_mimi(weights: MimiWeights, codes: NDArray[Any], wrong: Wrong) -> Array:
    """[frames, quantizers] -> [samples, 1]."""
    up = weights.upsample[:, 0].astype(np.float64)  # [features, kernel]
    depthwise = np.zeros((len(up), len(up), up.shape[1]))
    depthwise[np.arange(len(up)), np.arange(len(up))] = up

    def fresh() -> tuple[CachedTransformer, Tails]:
        return CachedTransformer(0, weights.decoder_transformer, wrong), Tails(wrong)

    (transformer, tails), pieces = fresh(), []
    for start in range(0, len(codes), wrong.chunk_frames):
        chunk = codes[start : start + wrong.chunk_frames, : wrong.quantizers or codes.shape[1]]
        if wrong.reset:
            transformer, tails = fresh()
        if wrong.tails_lost:
            tails = Tails(wrong)
        z = _summed(weights.semantic, chunk[:, :1]) + _summed(weights.acoustic, chunk[:, 1:])
        x = tails.transposed("upsample", z, depthwise, 0.0, 2)
        pieces.append(tails.run(transformer.step(x, len(chunk)), weights))
    return np.concatenate(pieces)


def _summed(chain: CodebookChain, codes: NDArray[Any]) -> Array:
    total = np.zeros((len(codes), chain.codebooks.shape[2]))
    for index in range(codes.shape[1]):
        total += chain.codebooks[index][codes[:, index]]
    return total @ chain.output_proj.T.astype(np.float64)


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
