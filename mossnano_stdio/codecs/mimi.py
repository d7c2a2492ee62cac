"""Mimi: a transformer between two convolutional stacks, at 12.5 frames/s.

Both graphs are our own (build/mimi_steps.py has their contracts), and what differs from MOSS's graphs of ours are only
the names, and that convolutions remember columns, too. Those are states of the graph.

Rules of this room:

- A query sees exactly the keys of the context, its own included, at every age of a stream and in chunks of every size.
  The published programs differ there from each other, and some from themselves.
- A frame may have any number of codes from 1 on: the first so many codebooks are decoded.
"""

from __future__ import annotations

from mossnano_stdio.codecs.engine import Engine
from mossnano_stdio.codecs.moss import DecodeRowsRuntime, StreamEncoderRuntime
from mossnano_stdio.codecs.precisions import INT8, check_has_int8
from mossnano_stdio.errors import UsageError
from mossnano_stdio.weights import Bundle
from mossnano_stdio.weights.checked_json import Entry

NAME = "mimi"  # as `mossnano.json` calls the family, too
STEPPING_GRAPHS = {"decode_step": None}


def recognises(bundle: Bundle) -> bool:
    return bundle.sidecar.maybe_codec is not None and bundle.sidecar.maybe_codec.family == NAME


def load_runtime(bundle: Bundle, engine: Engine, graph: str | None, precision: str | None) -> MimiRuntime:
    if graph not in (None, MimiRuntime.graph_name):
        raise UsageError(f"graph {graph!r} is not known, {NAME} has one graph that decodes; leave the choice out")
    if precision == INT8:
        check_has_int8(bundle, MimiRuntime.graph_name)
        return MimiRuntime(bundle, engine, INT8)
    return MimiRuntime(bundle, engine)


def load_encoder_runtime(bundle: Bundle, engine: Engine) -> MimiEncoderRuntime:
    return MimiEncoderRuntime(bundle, engine)


def maybe_look_back_frames(runtime: MimiRuntime) -> int | None:
    """Each layer looks back from where the one after it does, and the convolutions behind them in turn."""
    return sum(runtime.layer_context_frames) + runtime.convolution_frames


class MimiRuntime(DecodeRowsRuntime):
    """The graph that decodes."""

    graph_name = "decode_step"
    rounded_frames = 0  # there is no other graph to sound like

    @property
    def convolution_frames(self) -> int:
        """How far the convolutions look back."""
        graph = self.bundle.graphs[self.graph_name]
        return Entry(dict(graph.facts), f"{graph.path}: facts").at("look_back_frames").whole()


class MimiEncoderRuntime(StreamEncoderRuntime):
    """The graph that encodes."""

    rounded_frames = 0
