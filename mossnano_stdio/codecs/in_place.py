"""Graphs of our own on the CPU: one session for all streams, keys and values written in place.

build/transformers.py has the contract of the part that all of them have: transformers in a row. What else a graph
remembers are its states, small tensors that `mossnano.json` names.

Rules of this room:

- The state of a stream is its position, `next_frame`, and the rings behind it. Advancing the position is what makes a
  run count: a step that fails leaves the stream where it was.
- A state has two places. A run reads the one and writes the other, which is copied into the first once it succeeded.
- A step of more frames than one run takes is run after run. What these write over is put aside first.
- Nothing of the graph's contract is assumed: the dimensions come from `mossnano.json`, and the graph is checked
  against them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import FLOAT32, INT32
from mossnano_stdio.codecs.engine import (
    Array,
    BindRun,
    Engine,
    Session,
    TensorSpec,
    UnfitRuntimeError,
    check_contract,
    import_onnxruntime,
    native_value,
    official_instead,
    open_session,
    translated_errors,
)
from mossnano_stdio.codecs.probe import attention_support
from mossnano_stdio.codecs.rings import MAX_RUN_FRAMES, Floats, Rings, RingSpec, ring_specs
from mossnano_stdio.weights import Graph, StateSpec

log = logging.getLogger("mossnano")


@dataclass(frozen=True)
class InPlaceState:
    """Everything a stream has left behind."""

    first_frame: int  # where the stream began
    next_frame: int
    windows: tuple[Floats, ...]  # per transformer: keys and values that the next token can see
    states: tuple[Array, ...]  # what the graph remembers beside them


class InPlaceGraph:
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
        support = attention_support() if self.specs else "in place"
        if support == "none":
            raise UnfitRuntimeError(
                f"{graph.path}: onnxruntime {import_onnxruntime().__version__} does not attend as this graph needs it; "
                f"1.24 and later do{official_instead(graph)}"
            )
        if support == "by copies":
            log.warning("this onnxruntime does not write in place: keys and values are copied in every run")
        self.in_place = support == "in place"
        self.session: Session = open_session(graph, engine, optimise=False)
        ring_inputs, ring_outputs = _contract(self.specs)
        check_contract(self.session, {**inputs, **ring_inputs}, {**outputs, **ring_outputs}, graph.states)

    def open_stream(self) -> InPlaceStream:
        return InPlaceStream(self)


class InPlaceStream:
    """A stream through a stack, frame after frame. It belongs to one thread at a time."""

    def __init__(self, stack: InPlaceGraph) -> None:
        self._session = stack.session
        self._binding = stack.session.native.io_binding()
        self._rings = [Rings(spec, self._binding, in_place=stack.in_place) for spec in stack.specs]
        self._states = _States(stack.session.graph.states, self._binding)
        self._first_frame = 0
        self.next_frame = 0

    @property
    def seen_frames(self) -> int:
        """How many frames this stream had since it began."""
        return self.next_frame - self._first_frame

    def step(self, frames: int, inputs_of: BindRun, outputs_of: BindRun) -> None:
        """Run over the next `frames` frames. Each run takes its inputs from arrays, and writes into arrays, as told."""
        before, seen_frames = self.next_frame, self.seen_frames
        is_one_run = frames <= MAX_RUN_FRAMES
        passing = [] if is_one_run else [rings.passing(seen_frames, frames) for rings in self._rings]
        states = () if is_one_run else self._states.copied()
        try:
            for start in range(0, frames, MAX_RUN_FRAMES):
                end = min(start + MAX_RUN_FRAMES, frames)
                self._run(end - start, inputs_of(start, end), outputs_of(start, end))
        except BaseException:
            self.next_frame = before
            if passing:
                for rings, part in zip(self._rings, passing, strict=True):
                    rings.go_back(seen_frames, part)
                self._states.restore(states)
            raise

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        self._first_frame = self.next_frame = start_frame
        for rings in self._rings:
            rings.reset()
        self._states.reset()

    def snapshot(self) -> InPlaceState:
        windows = tuple(rings.window(self.seen_frames) for rings in self._rings)
        return InPlaceState(self._first_frame, self.next_frame, windows, self._states.copied())

    def restore(self, state: InPlaceState) -> None:
        self._first_frame, self.next_frame = state.first_frame, state.next_frame
        for rings, window in zip(self._rings, state.windows, strict=True):
            rings.restore(state.next_frame - state.first_frame, window)
        self._states.restore(state.states)

    def _run(self, frames: int, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """At most MAX_RUN_FRAMES at once."""
        for rings in self._rings:
            rings.prepare(self.seen_frames, frames, self.next_frame)
        with translated_errors(self._session.graph):
            for name, array in inputs.items():
                self._binding.bind_ortvalue_input(name, native_value(array))
            for name, array in outputs.items():
                self._binding.bind_ortvalue_output(name, native_value(array))
            self._session.native.run_with_iobinding(self._binding)
        self.next_frame += frames
        for rings in self._rings:
            rings.commit()
        self._states.commit()


class _States:
    """The small tensors that a run leaves to the next one. `binding` is told where they are."""

    def __init__(self, specs: Sequence[StateSpec], binding: Any) -> None:
        self._specs = specs
        self._now, self._next = ([spec.initial_value() for spec in specs] for _ in range(2))
        for spec, now, left in zip(specs, self._now, self._next, strict=True):
            binding.bind_ortvalue_input(spec.input_name, native_value(now))
            binding.bind_ortvalue_output(spec.output_name, native_value(left))

    def commit(self) -> None:
        """The run succeeded."""
        self.restore(self._next)

    def reset(self) -> None:
        for spec, array in zip(self._specs, self._now, strict=True):
            array[...] = spec.initial

    def copied(self) -> tuple[Array, ...]:
        return tuple(array.copy() for array in self._now)

    def restore(self, copies: Sequence[Array]) -> None:
        for array, copy in zip(self._now, copies, strict=True):
            array[...] = copy


def _contract(specs: tuple[RingSpec, ...]) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of the transformers."""
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for spec in specs:
        inputs |= {f"{name}_{spec.number}": TensorSpec((1,), INT32) for name in ("last", "total")}
        turns = TensorSpec((None, spec.ring_dim // 2), FLOAT32)
        inputs |= {f"{name}_{spec.number}": turns for name in ("cosines", "sines")}
        ring = TensorSpec((1, spec.heads, None, spec.ring_dim), FLOAT32)
        for layer in range(spec.first_layer, spec.first_layer + spec.layers):
            inputs |= {f"{kind}_{layer}": ring for kind in ("keys", "values")}
            outputs |= {f"{kind}_out_{layer}": ring for kind in ("keys", "values")}
    return inputs, outputs
