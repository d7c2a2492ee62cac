"""The decoder in numpy, whole recordings at once, with every way in which it may go wrong open to the caller.

A graph of ours is run node by node. Where it attends, a `Manner` says which keys a query sees, and at which positions
it and they stand; that is all by which windows, rings, resets and lost caches differ from each other. So a decoder that
works in chunks is imitated on whole recordings, but for convolutions, whose memory is changed between chunks.

Positions and indices of tokens count from the recording's start, wherever a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.build.nodes import PlainGraph, PlainNode
from mossnano_stdio.errors import BundleError

Array = NDArray[np.float32]
Numbers = NDArray[np.int64]  # of tokens, of frames

PIECE_FRAMES = 48  # of a long recording at a time: what convolutions widen takes much memory
QUERY_BLOCK = 256  # so many queries at a time: their scores of one head stay in the cache
VALUE_BLOCK = 1 << 16


@dataclass(frozen=True)
class Transformer:
    """One of the transformers, as far as it can be got wrong."""

    number: int
    layers: int
    heads: int
    ring_dim: int
    context: int  # tokens
    tokens_per_frame: int
    angles: tuple[float, ...]  # of its pairs, without those that pad a head

    @property
    def context_frames(self) -> float:
        return self.context / self.tokens_per_frame


@dataclass(frozen=True)
class Attending:
    """What tokens see, and how far they are turned. Each function takes indices of tokens, and gives one for each."""

    oldest: Callable[[Numbers], Numbers]  # the first key that a query sees
    newest: Callable[[Numbers], Numbers] = lambda queries: queries
    position: Callable[[Numbers], Numbers] = lambda tokens: tokens
    angles: tuple[float, ...] | None = None  # other than the model's
    pairing: str = "pairs"  # which features are turned together; see `_turned`


AttendingOf = Callable[[Transformer, int], Attending]  # a transformer, and which of its layers, counted from 0


def attend_rightly(transformer: Transformer, layer: int) -> Attending:
    return Attending(oldest=lambda queries: queries - transformer.context + 1)


Rounding = Callable[[Array], Array]


@dataclass(frozen=True)
class Manner:
    """How a decoder works. By itself: rightly."""

    attending: AttendingOf = attend_rightly
    chunk_frames: int | None = None  # convolutions run chunk by chunk
    at_once: bool = False  # later tokens are seen, so a recording is not cut into pieces
    forgets: bool = False  # what convolutions remember, between chunks
    begins_replicated: bool = False  # ordinary convolutions, with their first column instead of zeros
    extra_bias: Callable[[Numbers, int], NDArray[np.bool_]] | None = None  # by columns and columns in a frame: where a
    bias_factor: float = 0.0  # ...transposed convolution's bias is added so many times more
    missing_books: str = "nothing"  # what codebooks that are left out add: `nothing`, or their `biases`
    round_weights: Rounding | None = None
    round_values: Rounding | None = None
    round_caches: Rounding | None = None


RIGHT = Manner()


@dataclass
class Memory:
    """What was decoded before: keys, not turned yet, and values of every layer, and what convolutions remember."""

    frames: int
    keys: dict[int, Array] = field(default_factory=dict)  # by the layer; [heads, tokens, ring_dim]
    values: dict[int, Array] = field(default_factory=dict)
    columns: dict[str, Array] = field(default_factory=dict)


class Network:
    """A graph that can be run in any manner."""

    def __init__(self, graph: PlainGraph, codebook_size: int) -> None:
        self._graph = graph
        self._codebook_size = codebook_size
        self.transformers = tuple(_transformers(graph.facts))
        layers = [(transformer, layer) for transformer in self.transformers for layer in range(transformer.layers)]
        self._layers = dict(enumerate(layers))
        self._transposed = frozenset(_transposed_convolutions(graph))
        self.has_convolutions = bool(graph.states)
        self.quantizers = (graph.constants["codebooks"].shape[0] - 1) // codebook_size

    def start(self) -> Memory:
        """Of a stream at its start."""
        columns = {state.input_name: state.initial_value() for state in self._graph.states}
        heads = {
            layer: (transformer.heads, 0, transformer.ring_dim) for layer, (transformer, _) in self._layers.items()
        }
        empty = {layer: np.zeros(shape, np.float32) for layer, shape in heads.items()}
        return Memory(0, dict(empty), dict(empty), columns)

    def decode(self, codes: NDArray[Any], manner: Manner = RIGHT, memory: Memory | None = None) -> Array:
        """[frames, quantizers], of which some may be missing -> [samples, channels]. `memory` moves on."""
        memory = memory or self.start()
        end = memory.frames + len(codes)
        step_frames = manner.chunk_frames or (end if manner.at_once else PIECE_FRAMES)
        constants = self._constants(manner)
        pieces = []
        while memory.frames < end:
            first = memory.frames
            if manner.forgets and first and first % step_frames == 0:
                memory.columns = self.start().columns
            until = min(end, (first // step_frames + 1) * step_frames)
            pieces.append(_Run(self, constants, manner, memory).audio(codes[: until - first]))
            codes = codes[until - first :]
        return np.concatenate(pieces)

    def _constants(self, manner: Manner) -> Mapping[str, NDArray[Any]]:
        round_weights = manner.round_weights
        if round_weights is None:
            return self._graph.constants
        return {
            name: round_weights(value) if value.dtype == np.float32 and value.ndim > 1 else value
            for name, value in self._graph.constants.items()
        }


class _Run:
    """One run over the graph, from what a memory holds."""

    def __init__(self, network: Network, constants: Mapping[str, NDArray[Any]], manner: Manner, memory: Memory) -> None:
        self._network = network
        self._manner = manner
        self._memory = memory
        self._values: dict[str, Any] = {**constants, **memory.columns}
        self._frames = 0
        self._books = 0

    def audio(self, codes: NDArray[Any]) -> Array:
        self._frames, self._books = codes.shape
        self._values["rows"] = _rows(codes, self._network)
        graph = self._network._graph
        last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
        for index, node in enumerate(graph.nodes):
            self._values[node.outputs[0]] = self._result(node)
            for name in node.inputs:
                if last_use[name] == index and name in self._values:
                    del self._values[name]  # whole recordings are long
        self._memory.columns = {state.input_name: self._values[state.output_name] for state in graph.states}
        self._memory.frames += self._frames
        audio: Array = self._values["audio"]
        return audio

    def _result(self, node: PlainNode) -> Any:
        rounding = self._manner.round_values
        result = self._run(node)
        is_computed = rounding is not None and result.dtype == np.float32 and node.outputs[0] != "audio"
        return rounding(result) if rounding is not None and is_computed else result

    def _run(self, node: PlainNode) -> Any:
        if node.kind == "GroupQueryAttention":
            return self._attended(node)
        values = [self._values[name] for name in node.inputs if name]
        match node.kind:
            case "Gather":
                return self._looked_up(*values)
            case "Concat":
                return self._joined(node, values)
            case "Gemm":
                return self._convolved(node, *values)
            case "FusedMatMul":
                return values[0] @ values[1].T
            case kind if kind in _PLAIN:
                return _PLAIN[kind](*values, **node.attributes)
            case kind:
                raise BundleError(
                    f"the graph that decodes has nodes that are not known here ({kind}), so another version built it; "
                    "build it anew with `mossnano build`"
                )

    def _looked_up(self, table: Array, rows: NDArray[Any]) -> Array:
        found: Array = table[rows]
        if self._manner.missing_books == "biases":
            found[:, self._books :, -1] = 1  # by which the bias of a codebook is multiplied
        return found

    def _joined(self, node: PlainNode, values: list[Array]) -> Array:
        past, *rest = values
        is_memory = node.inputs[0] in self._memory.columns
        is_ordinary = node.inputs[0].removesuffix(".past") not in {*self._network._transposed, "upsample"}
        if self._manner.begins_replicated and is_memory and is_ordinary and not self._memory.frames:
            past = np.repeat(rest[0][:1], len(past), axis=0)
        return np.concatenate([past, *rest], axis=node.attributes["axis"])

    def _convolved(self, node: PlainNode, x: Array, weight: Array, bias: Array) -> Array:
        name = node.inputs[1].removesuffix(".weight")
        result: Array = x @ weight.T + bias
        extra_bias = self._manner.extra_bias
        if extra_bias is not None and name in self._network._transposed:
            columns_per_frame = len(result) // self._frames
            columns = self._memory.frames * columns_per_frame + np.arange(len(result))
            result[extra_bias(columns, columns_per_frame)] += np.float32(self._manner.bias_factor) * bias
        return result

    def _attended(self, node: PlainNode) -> Array:
        layer = int(node.inputs[3].removeprefix("keys_"))
        transformer, own = self._network._layers[layer]
        projected = self._values[node.inputs[0]][0]
        apart = projected.reshape(len(projected), 3, transformer.heads, transformer.ring_dim).transpose(1, 2, 0, 3)
        queries, keys, values = apart
        rounding = self._manner.round_caches
        if rounding is not None:
            keys, values = rounding(keys), rounding(values)
        attending = self._manner.attending(transformer, own)
        before = self._memory.frames * transformer.tokens_per_frame
        tokens = before + np.arange(len(projected))
        first = max(0, int(attending.oldest(tokens).min()))  # nothing before it is seen
        held = [memory[layer] for memory in (self._memory.keys, self._memory.values)]
        self._memory.keys[layer], self._memory.values[layer] = (
            np.concatenate(both, axis=1) for both in zip(held, (keys, values), strict=True)
        )
        seen_keys, seen_values = (memory[layer][:, first:] for memory in (self._memory.keys, self._memory.values))
        queries = _turned(queries, tokens, transformer, attending)
        key_tokens = np.arange(first, first + seen_keys.shape[1])
        seen_keys = _turned(seen_keys, key_tokens, transformer, attending)
        scale = np.float32(node.attributes["scale"])
        mixed = _attend(queries * scale, seen_keys, seen_values, tokens, first, attending)
        return mixed.transpose(1, 0, 2).reshape(1, len(projected), -1)


def _attend(queries: Array, keys: Array, values: Array, tokens: Numbers, first: int, attending: Attending) -> Array:
    """[heads, tokens, ring_dim] each. `first` is the token of the first key."""
    mixed = np.empty_like(queries)
    last = first + keys.shape[1] - 1
    for start in range(0, len(tokens), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        oldest = np.maximum(attending.oldest(tokens[block]), 0)[:, np.newaxis]
        newest = np.minimum(attending.newest(tokens[block]), last)[:, np.newaxis]
        seen = np.arange(oldest.min(), newest.max() + 1)
        hidden = (seen < oldest) | (seen > newest)
        columns = slice(int(seen[0]) - first, int(seen[-1]) - first + 1)
        for head in range(len(queries)):
            scores = queries[head, block] @ keys[head, columns].T
            np.copyto(scores, -np.inf, where=hidden)
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            shares = scores.sum(axis=1, keepdims=True)
            mixed[head, block] = scores @ values[head, columns] / shares
    return mixed


def _turned(x: Array, tokens: Numbers, transformer: Transformer, attending: Attending) -> Array:
    """RoPE of [heads, tokens, ring_dim].

    Our graphs have the first features of all pairs, padded, and then the second ones. `pairing` is what is taken for a
    pair in a model that was trained with features 2j and 2j + 1:
    `pairs`: those; `halves`: j and j + half, of features in the model's order; `pairs of halves`: 2j and 2j + 1, of
    features that were put into the order of halves; `none`: nothing is turned.
    """
    if attending.pairing == "none":
        return x
    pairs, half = len(transformer.angles), x.shape[2] // 2
    first, second = x[..., :pairs], x[..., half : half + pairs]
    if attending.pairing == "halves":
        features = np.stack([first, second], axis=-1).reshape(*x.shape[:2], 2 * pairs)
        first, second = features[..., :pairs], features[..., pairs:]
    elif attending.pairing == "pairs of halves":
        features = np.concatenate([first, second], axis=-1)
        first, second = features[..., 0::2], features[..., 1::2]
    angles = np.array(attending.angles or transformer.angles)
    turns = (attending.position(tokens)[:, np.newaxis] * angles).astype(np.float32)
    cosines, sines = np.cos(turns), np.sin(turns)
    # Queries and keys come out in the same order, and only their products count.
    return np.concatenate([first * cosines - second * sines, first * sines + second * cosines, *_padding(x, pairs)], -1)


def _padding(x: Array, pairs: int) -> list[Array]:
    return [np.zeros((*x.shape[:2], x.shape[2] - 2 * pairs), np.float32)] if x.shape[2] > 2 * pairs else []


# --- plain nodes ---------------------------------------------------------------------------------------------------


def _normed(x: Array, weight: Array, bias: Array, *, epsilon: float, axis: int) -> Array:
    centred = x - x.mean(axis=axis, keepdims=True)
    normed: Array = centred / np.sqrt(np.square(centred).mean(axis=axis, keepdims=True) + np.float32(epsilon))
    return normed * weight + bias


def _gelu(x: Array) -> Array:
    """x (1 + erf(x / sqrt 2)) / 2, with erf by Abramowitz and Stegun's formula 7.1.26, which is within 1.5e-7."""
    result = np.empty_like(x)
    flat, out = x.reshape(-1), result.reshape(-1)
    for start in range(0, len(flat), VALUE_BLOCK):
        part = flat[start : start + VALUE_BLOCK]
        size = np.abs(part) * np.float32(np.sqrt(0.5))
        t = 1 / (1 + np.float32(0.3275911) * size)
        tail = np.full_like(t, 1.061405429)
        for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            tail *= t
            tail += np.float32(factor)
        tail *= t
        tail *= np.exp(-size * size)
        out[start : start + VALUE_BLOCK] = np.where(part < 0, tail, 2 - tail) * part * np.float32(0.5)
    return result


def _reshaped(x: Array, shape: Numbers) -> Array:
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def _sliced(x: Array, starts: Numbers, ends: Numbers, axes: Numbers) -> Array:
    bounds = dict(zip(axes.tolist(), zip(starts.tolist(), ends.tolist(), strict=True), strict=True))
    return x[tuple(slice(*bounds.get(axis, (None,))) for axis in range(x.ndim))]


_PLAIN: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Mul": np.multiply,
    "MatMul": np.matmul,
    "Reshape": _reshaped,
    "LayerNormalization": _normed,
    "Gelu": _gelu,
    "Min": np.minimum,
    "Max": np.maximum,
    "Exp": np.exp,
    "Sub": np.subtract,
    "Sum": lambda *parts: sum(parts[1:], parts[0]),
    "Slice": _sliced,
    "Identity": lambda x: x,
    "Unsqueeze": lambda x, axes: np.expand_dims(x, int(axes[0])),
    "Squeeze": lambda x, axes: np.squeeze(x, int(axes[0])),
}


# --- what a graph says of itself -----------------------------------------------------------------------------------


def _transformers(facts: Mapping[str, Any]) -> list[Transformer]:
    return [
        Transformer(
            number=number,
            layers=entry["layers"],
            heads=entry["heads"],
            ring_dim=entry["ring_dim"],
            context=entry["context_tokens"],
            tokens_per_frame=entry["tokens_per_frame"],
            angles=tuple(angle for angle in entry["angles"] if angle),
        )
        for number, entry in enumerate(facts["transformers"])
    ]


def _transposed_convolutions(graph: PlainGraph) -> list[str]:
    """Their names. Theirs are the products that are read as several columns each."""
    split = {node.inputs[0] for node in graph.nodes if node.kind == "Reshape"}
    return [
        node.inputs[1].removesuffix(".weight")
        for node in graph.nodes
        if node.kind == "Gemm" and node.outputs[0] in split
    ]


def _rows(codes: NDArray[Any], network: Network) -> NDArray[np.int64]:
    size, quantizers = network._codebook_size, network.quantizers
    rows = np.full((len(codes), quantizers), quantizers * size)
    present = codes.shape[1]
    rows[:, :present] = codes + np.arange(present) * size
    return rows


def copied(memory: Memory) -> Memory:
    """A memory that moves on by itself. The arrays are shared: nothing writes into them."""
    return replace(memory, keys=dict(memory.keys), values=dict(memory.values), columns=dict(memory.columns))
