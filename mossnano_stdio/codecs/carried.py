"""Graphs of our own elsewhere than on the CPU: what a stream remembers stays where the graph runs.

Rules of this room:

- The state of a stream is never written to: each run leaves a new one. So a snapshot is the state itself, and a step
  that fails leaves the stream where it was.
- Only codes, turns and masks go to the device, and only audio, or codes, come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import FLOAT32
from mossnano_stdio.codecs.engine import (
    BindRun,
    Engine,
    TensorSpec,
    check_contract,
    device_value,
    native_value,
    open_session,
    translated_errors,
)
from mossnano_stdio.codecs.plain_attention import HIDDEN, past_shapes, past_tokens, turns_shapes, with_plain_attention
from mossnano_stdio.codecs.rings import MAX_RUN_FRAMES, Floats, RingSpec, ring_specs
from mossnano_stdio.weights import Graph, StateSpec


@dataclass(frozen=True)
class CarriedState:
    """Everything a stream has left behind."""

    first_frame: int  # where the stream began
    next_frame: int
    tensors: tuple[Any, ...]  # OrtValues, in the order of the graph's states


class CarriedGraph:
    """A loaded graph, shared by the streams that are opened over it."""

    def __init__(
        self,
        graph: Graph,
        engine: Engine,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        rounded_frames: int,
    ) -> None:
        """`inputs` and `outputs`: what the graph has beside its transformers and its states; `rounded_frames`: see
        RingSpec.
        """
        self.specs = tuple(ring_specs(graph, rounded_frames))
        maybe_model = with_plain_attention(graph, self.specs) if self.specs else None
        self.session = open_session(graph, engine, optimise=False, maybe_model=maybe_model)
        turns = {name: TensorSpec(shape, FLOAT32) for spec in self.specs for name, shape in turns_shapes(spec)}
        self.states = (*graph.states, *_pasts(self.specs))
        check_contract(self.session, {**inputs, **turns}, outputs, self.states)
        # One for all streams, as nothing writes to it: the 24 kHz model would upload 170 MB at each reset.
        with translated_errors(graph):  # a device may have no room left for it
            self.initial = tuple(device_value(state.initial_value(), engine.device) for state in self.states)

    def open_stream(self) -> CarriedStream:
        return CarriedStream(self)


class CarriedStream:
    """A stream through such a graph, frame after frame. It belongs to one thread at a time."""

    def __init__(self, stack: CarriedGraph) -> None:
        self._stack = stack
        self.reset()

    @property
    def seen_frames(self) -> int:
        """How many frames this stream had since it began."""
        return self.next_frame - self._first_frame

    def step(self, frames: int, inputs_of: BindRun, outputs_of: BindRun) -> None:
        """Run over the next `frames` frames. Each run takes its inputs from arrays, and writes into arrays, as told."""
        before = self.snapshot()
        try:
            for start in range(0, frames, MAX_RUN_FRAMES):
                end = min(start + MAX_RUN_FRAMES, frames)
                self._run(end - start, inputs_of(start, end), outputs_of(start, end))
        except BaseException:
            self.restore(before)
            raise

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        self._first_frame = self.next_frame = start_frame
        self._tensors = self._stack.initial

    def snapshot(self) -> CarriedState:
        return CarriedState(self._first_frame, self.next_frame, self._tensors)

    def restore(self, state: CarriedState) -> None:
        self._first_frame, self.next_frame, self._tensors = state.first_frame, state.next_frame, state.tensors

    def _run(self, frames: int, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """At most MAX_RUN_FRAMES at once."""
        session, states = self._stack.session, self._stack.states
        turns = {name: array for spec in self._stack.specs for name, array in self._turns(spec, frames)}
        with translated_errors(session.graph):
            binding = session.native.io_binding()
            for name, array in {**inputs, **turns}.items():
                binding.bind_ortvalue_input(name, native_value(array))
            for state, tensor in zip(states, self._tensors, strict=True):
                binding.bind_ortvalue_input(state.input_name, tensor)
                binding.bind_output(state.output_name, session.engine.device)  # which gives it new memory
            for name, array in outputs.items():
                binding.bind_ortvalue_output(name, native_value(array))
            session.native.run_with_iobinding(binding)
            self._tensors = tuple(binding.get_outputs()[: len(states)])
        self.next_frame += frames

    def _turns(self, spec: RingSpec, frames: int) -> Iterator[tuple[str, Floats]]:
        """What a transformer is told of new tokens."""
        position, seen, tokens = (n * spec.tokens_per_frame for n in (self.next_frame, self.seen_frames, frames))
        angles = spec.angles_at(position, tokens)
        names = [name for name, _ in turns_shapes(spec)]
        seen_past = min(seen, spec.needed_tokens)
        mask = _mask(past_tokens(spec), seen_past, tokens, spec.context_tokens)
        yield from zip(names, (np.cos(angles), np.sin(angles), mask), strict=True)


@lru_cache(maxsize=64)  # once a context is full, it stays the same
def _mask(slots: int, past: int, tokens: int, context_tokens: int) -> Floats:
    """[tokens, slots + tokens]: 0 where a token sees another. Of the slots before the new tokens, the last `past` have
    been written.
    """
    token, other = np.arange(slots, slots + tokens)[:, np.newaxis], np.arange(slots + tokens)
    is_seen = (other <= token) & (other > token - context_tokens) & (other >= slots - past)
    return np.where(is_seen, 0, HIDDEN).astype(np.float32)


def _pasts(specs: Sequence[RingSpec]) -> Iterator[StateSpec]:
    for spec in specs:
        for (name, shape), (name_out, _) in zip(past_shapes(spec), past_shapes(spec, "_out"), strict=True):
            yield StateSpec(name, name_out, shape, FLOAT32, initial=0)
