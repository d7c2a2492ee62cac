"""Keys and values of one stream, kept where attention finds them: nothing is moved but by a pointer, nearly always.

Rules of this room:

- A token's keys and values are written once, by the graph, into the slot behind those of the token before. What the
  graph sees is a view of the memory, [heads, slots], that begins with the oldest token still needed. So nothing that
  was not written in this stream is ever read, and a reset has nothing to clear.
- The view slides on through the memory as tokens are forgotten. Heads lie `slots` rows apart and slide together, each
  into what the next one has left behind: for all heads together, only `spare_rows` more rows than one view are kept.
  At the end of the memory, the window is copied back to its beginning, once in half a context.
- Memory is taken from the system zeroed, and becomes resident only as it is written: short streams stay small. Heads
  lie no further apart than the largest run so far needs.
- How many frames a stream has seen is the caller's to remember. Told the same number again after a run that failed,
  everything is as it was before that run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.engine import native_value
from mossnano_stdio.weights import Graph
from mossnano_stdio.weights.checked_json import Entry

Floats = NDArray[np.float32]

MAX_RUN_FRAMES = 8  # more frames in one run cost more per frame, and more memory
LAZINESS = 32  # 1/32 of a context may lie unneeded in front of the window before the view slides: binding costs, too
CACHE_WAY_VALUES = 1024  # rows of scores that lie so many float32 apart push each other out of the first-level cache
CACHE_LINE_VALUES = 16


@dataclass(frozen=True)
class RingSpec:
    """One transformer, as far as its keys and values go."""

    number: int
    first_layer: int
    layers: int
    heads: int
    ring_dim: int
    context_tokens: int
    tokens_per_frame: int
    angles: tuple[float, ...]  # by which the pairs of a token turn further than those of the token before
    rounded_frames: int  # so many at a stream's start turn by angles that are computed in float32

    @property
    def needed_tokens(self) -> int:
        """How many tokens before its own a query can see."""
        return self.context_tokens - 1

    @property
    def lazy_tokens(self) -> int:
        return self.context_tokens // LAZINESS

    def slots(self, frames: int) -> int:
        """The longest that a view gets in runs of so many frames."""
        slots = self.needed_tokens + self.lazy_tokens + frames * self.tokens_per_frame
        return slots + CACHE_LINE_VALUES if slots % CACHE_WAY_VALUES == 0 else slots

    @property
    def max_slots(self) -> int:
        return max(map(self.slots, range(1, MAX_RUN_FRAMES + 1)))

    @property
    def spare_rows(self) -> int:
        """How far the view slides through the memory."""
        return self.context_tokens // 2

    @cached_property
    def _angles(self) -> NDArray[np.float64]:
        return np.array(self.angles)

    def angles_at(self, position: int, tokens: int) -> Floats:
        """By how much RoPE turns the pairs of `tokens` tokens from `position` on. [tokens, ring_dim / 2]

        Where an official graph computes angles in float32, that is followed while it costs no more than a 16-bit step
        in the sound, so that both sound alike. Later, where it costs more and more (a fiftieth of full scale after
        eight hours), and where there is no such graph, whole turns are taken off before anything is rounded.
        """
        angles = np.arange(position, position + tokens)[:, np.newaxis] * self._angles
        if position >= self.rounded_frames * self.tokens_per_frame:
            angles -= np.rint(angles / math.tau) * math.tau
        return angles.astype(np.float32)


def ring_specs(graph: Graph, rounded_frames: int) -> Iterator[RingSpec]:
    """What `mossnano.json` says of the graph's transformers."""
    first_layer = 0
    for number, entry in enumerate(Entry(dict(graph.facts), f"{graph.path}: facts").at("transformers").items()):
        ring_dim = entry.at("ring_dim").whole(least=2)
        spec = RingSpec(
            number=number,
            first_layer=first_layer,
            layers=entry.at("layers").whole(least=1),
            heads=entry.at("heads").whole(least=1),
            ring_dim=ring_dim,
            context_tokens=entry.at("context_tokens").whole(least=1),
            tokens_per_frame=entry.at("tokens_per_frame").whole(least=1),
            angles=_angles(entry.at("angles"), ring_dim // 2),
            rounded_frames=rounded_frames,
        )
        yield spec
        first_layer += spec.layers


def _angles(entry: Entry, pairs: int) -> tuple[float, ...]:
    angles = entry.value
    if not isinstance(angles, list) or len(angles) != pairs or not all(isinstance(angle, float) for angle in angles):
        raise entry.wrong(f"a list of {pairs} numbers")
    return tuple(angles)


def context_frames(specs: Sequence[RingSpec]) -> tuple[int, ...]:
    """How far each layer looks back."""
    return tuple(
        frames for spec in specs for frames in [math.ceil(spec.context_tokens / spec.tokens_per_frame)] * spec.layers
    )


class Rings:
    """Keys and values of one transformer's layers. `binding` is told where they are."""

    def __init__(self, spec: RingSpec, binding: Any, *, in_place: bool) -> None:
        self._spec = spec
        self._binding = binding
        layers = range(spec.first_layer, spec.first_layer + spec.layers)
        self._names = [(f"{kind}_{layer}", f"{kind}_out_{layer}") for layer in layers for kind in ("keys", "values")]
        self._slots = spec.slots(frames=1)
        rows = (spec.heads * spec.max_slots + spec.spare_rows, spec.ring_dim)
        # Where the graph cannot write in place, it reads one memory and writes the other, by turns.
        self._memories = [[np.zeros(rows, np.float32) for _ in self._names] for _ in range(1 if in_place else 2)]
        self._in_place = in_place
        self._first_row = 0  # of the memory, where the view begins
        self._first_token = 0  # of the stream, which lies there
        self._cosines, self._sines = np.zeros((2, spec.max_slots, spec.ring_dim // 2), dtype=np.float32)
        self._last, self._total = np.zeros((2, 1), dtype=np.int32)
        for name in ("cosines", "sines", "last", "total"):
            binding.bind_ortvalue_input(f"{name}_{spec.number}", native_value(getattr(self, f"_{name}")))
        self._bind()

    def reset(self) -> None:
        """The next token is a stream's first."""
        self._first_token = 0
        self._move_view(0)

    def prepare(self, seen_frames: int, frames: int, position_frames: int) -> None:
        """Make room for more frames behind those seen. The first of them stands at `position_frames`."""
        per_frame = self._spec.tokens_per_frame
        seen, tokens, position = seen_frames * per_frame, frames * per_frame, position_frames * per_frame
        if (slots := self._spec.slots(frames)) > self._slots:
            self._spread(seen_frames, slots)
        self._slide(seen)
        held = seen - self._first_token
        self._last[0], self._total[0] = held + tokens - 1, held + tokens
        angles = self._spec.angles_at(position, tokens)
        np.cos(angles, out=self._cosines[held : held + tokens])
        np.sin(angles, out=self._sines[held : held + tokens])

    def commit(self) -> None:
        """The run succeeded."""
        if not self._in_place:
            self._memories.reverse()
            self._first_row = 0
            self._bind()

    def window(self, seen_frames: int) -> Floats:
        """A copy of what the next token can see, [2 * layers, heads, tokens, ring_dim]."""
        seen = seen_frames * self._spec.tokens_per_frame
        return self._copied(max(0, seen - self._spec.needed_tokens), seen)

    def passing(self, seen_frames: int, frames: int) -> Floats:
        """A copy of that part of the window that can be out of sight `frames` later."""
        seen = seen_frames * self._spec.tokens_per_frame
        start = max(0, seen - self._spec.needed_tokens)
        return self._copied(start, min(start + frames * self._spec.tokens_per_frame, seen))

    def restore(self, seen_frames: int, window: Floats) -> None:
        """Go back to when `window` was taken, after `seen_frames`."""
        tokens = window.shape[2]
        self._first_token = seen_frames * self._spec.tokens_per_frame - tokens
        self._move_view(0)
        for rows, values in zip(self._memories[0], window, strict=True):
            self._view(rows, 0)[:, :tokens] = values

    def go_back(self, seen_frames: int, passing: Floats) -> None:
        """Go back to when `passing` was taken. What was not out of sight by now is still here."""
        seen = seen_frames * self._spec.tokens_per_frame
        start = max(0, seen - self._spec.needed_tokens) + passing.shape[2]
        self.restore(seen_frames, np.concatenate([passing, self._copied(start, seen)], axis=2))

    def _copied(self, start: int, end: int) -> Floats:
        """From one token of the stream to another."""
        views = [self._view(rows, self._first_row) for rows in self._memories[0]]
        return np.stack([view[:, start - self._first_token : end - self._first_token] for view in views])

    def _slide(self, seen: int) -> None:
        """Leave behind what no token sees any more, if it is enough to be worth it."""
        unneeded = seen - self._spec.needed_tokens - self._first_token
        if unneeded <= self._spec.lazy_tokens:
            return
        self._first_token += unneeded
        row = self._first_row + unneeded
        if row <= self._spec.spare_rows:
            self._move_view(row)
        else:
            self._copy_back(row)

    def _copy_back(self, row: int) -> None:
        """Copy the window, which begins at `row`, to the beginning of the memory.

        Head by head, the first one first: what is written over was copied before, or is needed no more. One head
        is copied forwards, as numpy does with flat arrays that overlap.
        """
        spec = self._spec
        for rows in self._memories[0]:
            values = rows.reshape(-1)
            for target_row in range(0, spec.heads * self._slots, self._slots):
                target, source = target_row * spec.ring_dim, (target_row + row) * spec.ring_dim
                count = spec.needed_tokens * spec.ring_dim
                values[target : target + count] = values[source : source + count]
        self._move_view(0)

    def _spread(self, seen_frames: int, slots: int) -> None:
        """Move the heads further apart."""
        window = self.window(seen_frames)
        self._slots = slots
        self._first_row = -1  # nowhere: what is bound is of another shape
        self.restore(seen_frames, window)

    def _move_view(self, row: int) -> None:
        if row != self._first_row:
            self._first_row = row
            self._bind()

    def _bind(self) -> None:
        """Tell the binding where the view lies. The outputs lie there too, or else in the other memory."""
        inputs = self._natives(self._memories[0], self._first_row)
        outputs = inputs if self._in_place else self._natives(self._memories[1], 0)
        for (name, name_out), source, target in zip(self._names, inputs, outputs, strict=True):
            self._binding.bind_ortvalue_input(name, source)
            self._binding.bind_ortvalue_output(name_out, target)

    def _natives(self, memory: Sequence[Floats], row: int) -> list[Any]:
        return [native_value(self._view(rows, row)[np.newaxis]) for rows in memory]

    def _view(self, rows: Floats, row: int) -> Floats:
        """[heads, slots, ring_dim] of a ring's memory, from a row on."""
        heads = self._spec.heads
        return rows[row : row + heads * self._slots].reshape(heads, self._slots, self._spec.ring_dim)
