"""The ways in which decoders were got wrong: each has a name, what to look for in the code, and how it decodes.

Those of `after_a_while` need something to be remembered: sound made by them is right up to a certain frame, and the
frame where another's sound departs says how large their chunks or windows would have to be. Those of `from_the_start`
are wrong at once. Simpler ones come first: of two that explain a sound equally well, the first is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.tools.diagnose.network import (
    RIGHT,
    Array,
    Attending,
    AttendingOf,
    Manner,
    Network,
    Numbers,
    Rounding,
    Transformer,
    attend_rightly,
)

RING_CHUNK_FRAMES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 16)
CHUNK_FRAMES = (1, 2, 4, 8)
ROPE_BASES = (1e3, 5e3, 2e4, 5e4, 1e5, 5e5, 1e6)
TOKENS_BEFORE = 3  # a window's first error may be too small to be found at its first token

CodesOf = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Hypothesis:
    name: str
    how: str  # with which numbers
    look_for: str
    manner: Manner = RIGHT
    codes_of: CodesOf = lambda codes: codes


def after_a_while(network: Network, frame: int, sample: int, frame_samples: int, frames: int) -> Iterator[Hypothesis]:
    """`frame` and `sample` (from 1 on): where the other's sound departs. `frames`: how long the recording is."""
    yield from _windows(network, sample, frame_samples)
    yield from _rings(network, frames)
    yield from _resets(network, frame)
    yield from _lost_caches(network, frame)
    yield from _positions(network, frame)
    if network.has_convolutions:
        yield from _tails(frame)


def from_the_start(network: Network, codes: NDArray[Any], codebook_size: int) -> Iterator[Hypothesis]:
    yield from _rotations(network)
    yield from _orders_of_codes(codes)
    yield from _wrong_codes(codebook_size)
    yield from _prefixes(network, codes.shape[1])
    yield from _uncaused(network)
    if network.has_convolutions:
        yield from _biases()


# --- what is remembered --------------------------------------------------------------------------------------------


def _windows(network: Network, sample: int, frame_samples: int) -> Iterator[Hypothesis]:
    look_for = "the attention mask: a query sees the keys k with 0 <= q - k < context, its own included"
    right = [transformer.context for transformer in network.transformers]
    named = [(transformer, f"transformer {transformer.number}") for transformer in network.transformers]
    several = len(right) > 1

    def at(number: int, context: int) -> list[int]:
        return [context if index == number else old for index, old in enumerate(right)]

    def windows(name: str, how: str, contexts: Sequence[int]) -> Iterator[Hypothesis]:
        if list(contexts) != right and min(contexts) > 0:
            yield Hypothesis(name, how, look_for, Manner(_within(contexts)))

    endless = 1 << 40
    yield from windows("window missing", "in all transformers: full attention", [endless] * len(right))
    for more, what in ((1, "one key too many"), (-1, "one key too few")):
        yield from windows("window off by one", f"{what}, in all transformers", [old + more for old in right])
    for transformer, name in named if several else ():
        number, context = transformer.number, transformer.context
        yield from windows("window missing", f"in {name} alone: full attention", at(number, endless))
        for more, what in ((1, "one key too many"), (-1, "one key too few")):
            yield from windows("window off by one", f"{what}, in {name} alone", at(number, context + more))
    yield from windows("windows in the encoder's order", f"{right[::-1]} tokens", right[::-1])
    yield from windows("window too long", "twice as long, in all transformers", [2 * old for old in right])
    shortest = min(network.transformers, key=lambda transformer: transformer.context_frames)
    for transformer, name in named:
        tokens = sample * transformer.tokens_per_frame // frame_samples
        for context in range(tokens, max(0, tokens - TOKENS_BEFORE), -1):
            how = f"{context} tokens instead of {transformer.context}, in {name}{' alone' * several}"
            if context < transformer.context - 1:
                yield from windows("window too short", how, at(transformer.number, context))
            if several and transformer is shortest and context < transformer.context:
                contexts = [round(old * context / transformer.context) for old in right]
                yield from windows("window too short", f"{contexts} tokens instead of {right}", contexts)
    if several:
        for transformer, name in named:  # one number of seconds, or of tokens, where each has its own
            equal = [
                max(1, round(transformer.context_frames * other.tokens_per_frame)) for other in network.transformers
            ]
            yield from windows("one window for all", f"that of {name}: {equal} tokens instead of {right}", equal)
            same = [transformer.context] * len(right)
            yield from windows("one window for all", f"{transformer.context} tokens instead of {right}", same)
        frames = [max(1, sample * other.tokens_per_frame // frame_samples) for other in network.transformers]
        yield from windows("window too short", f"{frames} tokens instead of {right}", frames)


def _within(contexts: Sequence[int]) -> AttendingOf:
    def attending(transformer: Transformer, layer: int) -> Attending:
        context = contexts[transformer.number]
        return Attending(oldest=lambda queries: queries - context + 1)

    return attending


def _rings(network: Network, frames: int) -> Iterator[Hypothesis]:
    look_for = (
        "a key-value ring of exactly `context` slots into which all new tokens are written before attention: the last "
        "of them overwrite keys that the first ones have to see; append, attend, then drop"
    )

    def ring(chunk_frames: int) -> AttendingOf:
        def attending(transformer: Transformer, layer: int) -> Attending:
            chunk, last = chunk_frames * transformer.tokens_per_frame, frames * transformer.tokens_per_frame

            def oldest(queries: Numbers) -> Numbers:
                ends = np.minimum((queries // chunk + 1) * chunk, last)
                kept: Numbers = np.maximum(queries - transformer.context + 1, ends - transformer.context)
                return kept

            return Attending(oldest)

        return attending

    for chunk_frames in RING_CHUNK_FRAMES:
        if all(chunk_frames <= transformer.context_frames for transformer in network.transformers):
            how = _chunks(chunk_frames)
            yield Hypothesis("ring overwritten before it is attended to", how, look_for, Manner(ring(chunk_frames)))


def _in_chunks(chunk_frames: int, is_lost: Callable[[Transformer, int], bool]) -> AttendingOf:
    """Where `is_lost`, a query sees nothing before its chunk."""

    def attending(transformer: Transformer, layer: int) -> Attending:
        if not is_lost(transformer, layer):
            return attend_rightly(transformer, layer)
        chunk = chunk_frames * transformer.tokens_per_frame
        return Attending(lambda queries: np.maximum(queries - transformer.context + 1, queries // chunk * chunk))

    return attending


def _resets(network: Network, frame: int) -> Iterator[Hypothesis]:
    fresh = _in_chunks(frame, lambda transformer, layer: True)
    manner = Manner(fresh, frame, forgets=True) if network.has_convolutions else Manner(fresh)
    look_for = "state that is made anew for each chunk instead of once for each stream"
    yield Hypothesis("state reset at every chunk", _chunks(frame), look_for, manner)
    if network.has_convolutions:
        look_for = "the transformer's caches, which go to the next call as convolutions' tails do"
        yield Hypothesis("all caches lost at every chunk", _chunks(frame), look_for, Manner(fresh))


def _lost_caches(network: Network, frame: int) -> Iterator[Hypothesis]:
    look_for = "the pairs of state outputs and inputs: one is not fed back, or is fed back from before"

    def lost(of: Transformer, layers: range) -> Manner:
        return Manner(_in_chunks(frame, lambda transformer, layer: transformer is of and layer in layers))

    number = 0
    for transformer in network.transformers:
        every = range(transformer.layers)
        if len(network.transformers) > 1 and transformer.layers > 1:
            how = f"all {transformer.layers} of transformer {transformer.number}, {_chunks(frame)}"
            yield Hypothesis("one transformer's caches lost", how, look_for, lost(transformer, every))
        for layer in every:
            how = f"cache {number} (transformer {transformer.number}, layer {layer}), {_chunks(frame)}"
            one = lost(transformer, range(layer, layer + 1))
            yield Hypothesis("one layer's cache lost", how, look_for, one)
            number += 1


def _positions(network: Network, frame: int) -> Iterator[Hypothesis]:
    def moved(position_of: Callable[[Transformer, Numbers], Numbers]) -> Manner:
        def attending(transformer: Transformer, layer: int) -> Attending:
            right = attend_rightly(transformer, layer)
            return replace(right, position=lambda tokens: position_of(transformer, tokens))

        return Manner(attending)

    def restarted(transformer: Transformer, tokens: Numbers) -> Numbers:
        return tokens % (frame * transformer.tokens_per_frame)

    def by_frames(transformer: Transformer, tokens: Numbers) -> Numbers:
        chunk = frame * transformer.tokens_per_frame
        return tokens // chunk * frame + tokens % chunk

    look_for = "the offset that is added to positions before RoPE: it counts tokens from the stream's start"
    yield Hypothesis("positions restarted per chunk", _chunks(frame), look_for, moved(restarted))
    look_for = "how far the offset goes on after a chunk: by its tokens, of which a frame has several"
    yield Hypothesis("positions counted in frames, not in tokens", _chunks(frame), look_for, moved(by_frames))


def _tails(frame: int) -> Iterator[Hypothesis]:
    look_for = "what convolutions keep between calls: the last columns that went in, or the tail that came out"
    manner = Manner(chunk_frames=frame, forgets=True)
    yield Hypothesis("convolutions' tails lost at every chunk", _chunks(frame), look_for, manner)
    look_for = "the bias of transposed convolutions: it is in the tail that is kept, and added again in the next call"

    def at_joins(columns: Numbers, per_frame: int) -> NDArray[np.bool_]:
        joins: NDArray[np.bool_] = (columns % (frame * per_frame) == 0) & (columns > 0)
        return joins

    for factor, name in ((1.0, "biases of transposed tails doubled"), (-1.0, "biases of transposed tails missing")):
        yield Hypothesis(name, _chunks(frame), look_for, Manner(extra_bias=at_joins, bias_factor=factor))


# --- what is wrong at once -----------------------------------------------------------------------------------------


def _rotations(network: Network) -> Iterator[Hypothesis]:
    def turned(**how: Any) -> Manner:
        return Manner(lambda transformer, layer: replace(attend_rightly(transformer, layer), **how))

    def based(base: float) -> Manner:
        def attending(transformer: Transformer, layer: int) -> Attending:
            pairs = len(transformer.angles)
            angles = tuple(base ** (-pair / pairs) for pair in range(pairs))
            return replace(attend_rightly(transformer, layer), angles=angles)

        return Manner(attending)

    look_for = "which features RoPE turns together: 2j with 2j + 1, in the order of the published projections"
    yield Hypothesis("RoPE half-split for interleaved", "j with j + half", look_for, turned(pairing="halves"))
    look_for = "rows of q_proj and k_proj that were put into the order of halves, which go with a half-split RoPE"
    how = "2j with 2j + 1, of rows in the order of halves"
    yield Hypothesis("RoPE interleaved for half-split", how, look_for, turned(pairing="pairs of halves"))
    yield Hypothesis("RoPE missing", "nothing is turned", "RoPE of queries and keys", turned(pairing="none"))
    for base in ROPE_BASES:
        how = f"{base:g} instead of {_max_period(network):g}"
        yield Hypothesis("RoPE with a wrong base", how, "rope_theta, or max_period", based(base))
    look_for = "the exponent of RoPE's base: -2j / head_dim for pair j"
    twice = Manner(
        lambda transformer, layer: replace(
            attend_rightly(transformer, layer), angles=tuple(angle**2 for angle in transformer.angles)
        )
    )
    yield Hypothesis("RoPE with a wrong base", "its exponent is doubled", look_for, twice)


def _max_period(network: Network) -> float:
    angles = network.transformers[0].angles
    return round(angles[1] ** -len(angles)) if len(angles) > 1 else 1.0


def _orders_of_codes(codes: NDArray[Any]) -> Iterator[Hypothesis]:
    frames, quantizers = codes.shape
    look_for = "the axes of the codes: [frames, quantizers] or [quantizers, frames], and what reads one as the other"
    for name, codes_of in (
        ("frame-major codes read as codebook-major", lambda codes: codes.reshape(quantizers, frames).T),
        ("codebook-major codes read as frame-major", lambda codes: codes.T.reshape(frames, quantizers)),
    ):
        yield Hypothesis("codes transposed", name, look_for, codes_of=codes_of)
    if quantizers == 1:
        return
    look_for = "the order in which codebooks are loaded, by number and not by name, and in which codes come"
    orders = {
        "the last one first": np.arange(quantizers)[::-1],
        "each one later by one, the last one first": np.roll(np.arange(quantizers), 1),
        "each one earlier by one, the first one last": np.roll(np.arange(quantizers), -1),
        "by name, as text (0, 1, 10, 11, ..., 2, 20, ...)": np.array(sorted(range(quantizers), key=str)),
        "by name, as text, the other way round": np.argsort(np.array(sorted(range(quantizers), key=str))),
        "neighbours exchanged": np.arange(quantizers // 2 * 2).reshape(-1, 2)[:, ::-1].reshape(-1),
        "the first two exchanged": np.array([1, 0, *range(2, quantizers)]),
        "both halves exchanged": np.roll(np.arange(quantizers), quantizers // 2),
    }
    for how, order in orders.items():
        full = np.append(order, np.arange(len(order), quantizers))
        if not np.array_equal(full, np.arange(quantizers)):
            order_of = partial(_reordered, full)
            yield Hypothesis("codebooks in another order", how, look_for, codes_of=order_of)
    look_for = (
        "the delay pattern of the language model: codebook i comes i frames later, and is put back before decoding"
    )
    for sign, how in ((1, "codebook i comes i frames late"), (-1, "codebook i comes i frames early")):
        yield Hypothesis("codes delayed", how, look_for, codes_of=partial(_delayed, sign))


def _reordered(order: Numbers, codes: NDArray[Any]) -> NDArray[Any]:
    return codes[:, order]


def _delayed(sign: int, codes: NDArray[Any]) -> NDArray[Any]:
    frames, quantizers = codes.shape
    place = np.arange(frames)[:, np.newaxis] - sign * np.arange(quantizers)
    delayed: NDArray[Any] = np.where(
        (place >= 0) & (place < frames), np.take_along_axis(codes, np.clip(place, 0, frames - 1), axis=0), 0
    )
    return delayed


def _wrong_codes(codebook_size: int) -> Iterator[Hypothesis]:
    look_for = "special tokens in front of the codes in the language model's vocabulary, and how codes come out of it"
    for more, how in ((1, "each is one too high"), (-1, "each is one too low")):
        yield Hypothesis("codes shifted", how, look_for, codes_of=partial(_shifted, more, codebook_size))


def _shifted(more: int, codebook_size: int, codes: NDArray[Any]) -> NDArray[Any]:
    shifted: NDArray[Any] = np.clip(codes.astype(np.int64) + more, 0, codebook_size - 1)
    return shifted


def _prefixes(network: Network, given: int) -> Iterator[Hypothesis]:
    has_biases = not network.has_convolutions  # of codebooks
    biases = "the sum over codebooks: the biases of those that are left out are added all the same"
    look_for = "how many codebooks are summed, and by which argument"
    for books in range(given - 1, 0, -1):
        how, first = f"the first {books} of {given}", partial(_first_books, books)
        yield Hypothesis("fewer codebooks", how, look_for, codes_of=first)
        if has_biases and given == network.quantizers:
            manner = Manner(missing_books="biases")
            yield Hypothesis("a prefix with all biases", f"{how}, and the biases of all", biases, manner, first)
    if missing := network.quantizers - given:
        look_for = (
            f"what becomes of the {missing} codebooks without codes: they add nothing, and 0 is a code like others"
        )
        padded = partial(_filled_up, missing)
        yield Hypothesis("a prefix filled up with code 0", f"{missing} codebooks", look_for, codes_of=padded)
        if has_biases:
            how = f"of {missing} codebooks that are left out"
            yield Hypothesis("a prefix with all biases", how, biases, Manner(missing_books="biases"))


def _first_books(books: int, codes: NDArray[Any]) -> NDArray[Any]:
    return codes[:, :books]


def _filled_up(missing: int, codes: NDArray[Any]) -> NDArray[Any]:
    return np.pad(codes, ((0, 0), (0, missing)))


def _uncaused(network: Network) -> Iterator[Hypothesis]:
    def seeing(chunk_frames: int) -> AttendingOf:
        def attending(transformer: Transformer, layer: int) -> Attending:
            chunk = chunk_frames * transformer.tokens_per_frame
            right = attend_rightly(transformer, layer)
            return replace(right, newest=lambda queries: (queries // chunk + 1) * chunk - 1)

        return attending

    look_for = "the causal mask: within a chunk, too, no query sees a later key"
    for frames in (*CHUNK_FRAMES, 1 << 30):
        how = _chunks(frames) if frames < 1 << 30 else "in the whole recording"
        yield Hypothesis("not causal", how, look_for, Manner(seeing(frames), at_once=True))


def _biases() -> Iterator[Hypothesis]:
    look_for = "the bias of transposed convolutions: it is added once, to what is put out"

    def everywhere(columns: Numbers, per_frame: int) -> NDArray[np.bool_]:
        return np.ones(len(columns), bool)

    def at_first(columns: Numbers, per_frame: int) -> NDArray[np.bool_]:
        first: NDArray[np.bool_] = columns == 0
        return first

    for where, how in ((everywhere, "everywhere"), (at_first, "in the first columns of a stream")):
        for factor, name in ((1.0, "doubled"), (-1.0, "missing")):
            manner = Manner(extra_bias=where, bias_factor=factor)
            yield Hypothesis(f"biases of transposed convolutions {name}", how, look_for, manner)
    look_for = "what stands before the first column of a stream: zeros for every convolution that decodes"
    manner = Manner(begins_replicated=True)
    yield Hypothesis("padded by repetition", "the first column instead of zeros", look_for, manner)


# --- fewer bits ----------------------------------------------------------------------------------------------------


def to_float16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def to_bfloat16(x: Array) -> Array:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def to_int8(x: Array) -> Array:
    """Each row with a scale of its own."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded: Array = (np.rint(x / np.where(scale > 0, scale, 1)) * scale).astype(np.float32)
    return rounded


def coarser() -> Iterator[Hypothesis]:
    """Those that add noise."""
    kinds: tuple[tuple[str, Rounding], ...] = (("float16", to_float16), ("bfloat16", to_bfloat16))
    for name, rounding in kinds:
        look_for = f"{name}: of checkpoints, of sessions, of an autocast around the decoder"
        yield Hypothesis(name, "weights", look_for, Manner(round_weights=rounding))
        both = Manner(round_weights=rounding, round_values=rounding, round_caches=rounding)
        yield Hypothesis(name, "weights and everything between", look_for, both)
        yield Hypothesis(name, "keys and values", look_for, Manner(round_caches=rounding))
    yield Hypothesis("int8", "weights", "weights of 8 bits", Manner(round_weights=to_int8))


def _chunks(frames: int) -> str:
    return f"chunks of {frames} frame{'s' * (frames != 1)}"
