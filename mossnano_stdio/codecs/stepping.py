"""Any graph with named states, run step after step.

Rules of this room:

- A state is born in `GraphState.initial` and nowhere else. Each tensor goes by its name from the output that gave it to
  the input that takes it.
- Its arrays are never written to, and a new state replaces an old one as a whole: a snapshot is the state itself, and a
  step that fails leaves the stream where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from mossnano_stdio.codecs.engine import Array, Session
from mossnano_stdio.weights import StateSpec


@dataclass(frozen=True)
class GraphState:
    """Each state tensor, by the name of the input that takes it."""

    tensors: Mapping[str, Array]
    next_frame: int  # counted from where the stream began

    @classmethod
    def initial(cls, specs: Sequence[StateSpec]) -> Self:
        return cls({spec.input_name: spec.initial_value() for spec in specs}, next_frame=0)

    def after(self, outputs: Sequence[Array], specs: Sequence[StateSpec], frames: int) -> GraphState:
        """The state after a run over `frames` frames that gave `outputs`, one for each of `specs`."""
        names = [spec.input_name for spec in specs]
        return GraphState(dict(zip(names, outputs, strict=True)), self.next_frame + frames)

    def starting_at(self, frame: int, tokens_per_frame: Mapping[str, int]) -> GraphState:
        """The same, with the counters of tokens as they are after `frame` frames."""
        counters = {name: np.full_like(self.tensors[name], frame * tokens) for name, tokens in tokens_per_frame.items()}
        return GraphState({**self.tensors, **counters}, next_frame=frame)


def run_step(
    session: Session, feed: Mapping[str, Array], state: GraphState, frames: int
) -> tuple[list[Array], GraphState]:
    """One run over `frames` frames: the outputs that are no state, and the state that it leaves behind."""
    graph = session.graph
    names = [*graph.output_names, *(spec.output_name for spec in graph.states)]
    found = session.run(names, {**feed, **state.tensors})
    outputs = len(graph.output_names)
    return list(found[:outputs]), state.after(found[outputs:], graph.states, frames)
