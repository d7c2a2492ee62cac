"""The fast graph (graph/fast.py has its contract): one session for all streams, keys and values written in place.

Rules of this room:

- The state of a stream is its position, `next_frame`, and the rings behind it. Advancing the position is what makes a
  run count: a step that fails leaves the decoder where it was.
- A step of more frames than one run takes is run after run. For that, the state is put aside first.
- Nothing of the graph's contract is assumed: the dimensions come from `mossnano.json`, and the graph is checked
  against them.
- Many decoders share one FastRuntime. Each belongs to one thread at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.bundle import Bundle, Graph
from mossnano_stdio.codec.contract import FLOAT32, INT32, check_codes
from mossnano_stdio.codec.probe import attention_support
from mossnano_stdio.codec.rings import MAX_RUN_FRAMES, Floats, Rings, RingSpec
from mossnano_stdio.codec.runtime import Engine, TensorSpec, check_contract, open_session, translated_errors
from mossnano_stdio.entry import Entry
from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.layout import CodecFormat, Codes

log = logging.getLogger("mossnano")


@dataclass(frozen=True)
class FastState:
    """Everything a stream has left behind."""

    first_frame: int  # where the stream began
    next_frame: int
    windows: tuple[Floats, ...]  # per transformer: keys and values that the next token can see


class FastRuntime:
    """A loaded fast graph, shared by the decoders that it makes."""

    graph_name: Literal["fast"] = "fast"
    decodes_prefix = True

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        graph = bundle.graph("fast")
        if engine.provider != "cpu":
            raise UsageError(
                f"{graph.path}: runs on provider 'cpu' only; `--graph official` runs on {engine.provider!r}"
            )
        support = attention_support()
        if support == "none":
            raise UnfitRuntimeError(f"{graph.path}: {_unfit_runtime()}")
        if support == "by copies":
            log.warning("this onnxruntime does not write in place: keys and values are copied in every run")
        self.in_place = support == "in place"
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.specs = tuple(_ring_specs(graph))
        self.session = open_session(graph, engine, optimise=False)
        self.precision = graph.precision
        check_contract(self.session, *_contract(self.specs, self.format), states=())

    @property
    def layer_context_frames(self) -> tuple[int, ...]:
        """How far each layer looks back."""
        return tuple(
            frames
            for spec in self.specs
            for frames in [math.ceil(spec.context_tokens / spec.tokens_per_frame)] * spec.layers
        )

    def new_decoder(self) -> FastDecoder:
        return FastDecoder(self)


class UnfitRuntimeError(BundleError):
    """This onnxruntime cannot run the fast graph, whatever the weights."""


class FastDecoder:
    """Frames in, samples out, chunk after chunk as if they came at once."""

    def __init__(self, runtime: FastRuntime) -> None:
        self.runtime = runtime
        self._binding = runtime.session.native.io_binding()
        self._rings = [Rings(spec, self._binding, in_place=runtime.in_place) for spec in runtime.specs]
        self._first_frame = 0
        self._next_frame = 0

    @property
    def format(self) -> CodecFormat:
        return self.runtime.format

    @property
    def decodes_prefix(self) -> bool:
        return self.runtime.decodes_prefix

    @property
    def next_frame(self) -> int:
        return self._next_frame

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]. The first quantizers may come alone."""
        check_codes(codes, self.format, least_quantizers=1)
        frames, frame_samples = len(codes), self.format.frame_samples
        rows = _rows(codes, self.format)
        audio = np.empty((frames * frame_samples, self.format.channels), dtype=np.float32)
        state = self.snapshot() if frames > MAX_RUN_FRAMES else None
        try:
            for start in range(0, frames, MAX_RUN_FRAMES):
                end = min(start + MAX_RUN_FRAMES, frames)
                self._run(rows[start:end], audio[start * frame_samples : end * frame_samples])
        except BaseException:
            if state:
                self.restore(state)
            raise
        return audio

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        self._first_frame = self._next_frame = start_frame
        for rings in self._rings:
            rings.reset()

    def snapshot(self) -> FastState:
        seen_frames = self._next_frame - self._first_frame
        windows = tuple(rings.window(seen_frames) for rings in self._rings)
        return FastState(self._first_frame, self._next_frame, windows)

    def restore(self, state: FastState) -> None:
        self._first_frame, self._next_frame = state.first_frame, state.next_frame
        for rings, window in zip(self._rings, state.windows, strict=True):
            rings.restore(state.next_frame - state.first_frame, window)

    def _run(self, rows: NDArray[np.int32], audio: NDArray[np.float32]) -> None:
        """Decode at most MAX_RUN_FRAMES into `audio`."""
        frames = len(rows)
        session = self.runtime.session
        for rings in self._rings:
            rings.prepare(self._next_frame - self._first_frame, frames, self._next_frame)
        with translated_errors(session.graph):
            _bind_run(self._binding, rows, audio)
            session.native.run_with_iobinding(self._binding)
        self._next_frame += frames
        for rings in self._rings:
            rings.commit()


def _rows(codes: Codes, codec: CodecFormat) -> NDArray[np.int32]:
    """Which row of the one table of all codebooks each code means; the last row for quantizers that are left out."""
    rows = np.full((len(codes), codec.quantizers), codec.quantizers * codec.codebook_size, dtype=np.int32)
    present = codes.shape[1]
    rows[:, :present] = codes + np.arange(present, dtype=np.int32) * codec.codebook_size
    return rows


def _bind_run(binding: Any, rows: NDArray[np.int32], audio: NDArray[np.float32]) -> None:
    from onnxruntime import OrtValue

    binding.bind_ortvalue_input("rows", OrtValue.ortvalue_from_numpy(rows))
    binding.bind_ortvalue_output("audio", OrtValue.ortvalue_from_numpy(audio))


def _ring_specs(graph: Graph) -> Iterator[RingSpec]:
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
        )
        yield spec
        first_layer += spec.layers


def _angles(entry: Entry, pairs: int) -> tuple[float, ...]:
    angles = entry.value
    if not isinstance(angles, list) or len(angles) != pairs or not all(isinstance(angle, float) for angle in angles):
        raise entry.wrong(f"a list of {pairs} numbers")
    return tuple(angles)


def _contract(specs: tuple[RingSpec, ...], codec: CodecFormat) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    inputs = {"rows": TensorSpec((None, codec.quantizers), INT32)}
    outputs = {"audio": TensorSpec((None, codec.channels), FLOAT32)}
    for spec in specs:
        inputs |= {f"{name}_{spec.number}": TensorSpec((1,), INT32) for name in ("last", "total")}
        turns = TensorSpec((None, spec.ring_dim // 2), FLOAT32)
        inputs |= {f"{name}_{spec.number}": turns for name in ("cosines", "sines")}
        ring = TensorSpec((1, spec.heads, None, spec.ring_dim), FLOAT32)
        for layer in range(spec.first_layer, spec.first_layer + spec.layers):
            inputs |= {f"{kind}_{layer}": ring for kind in ("keys", "values")}
            outputs |= {f"{kind}_out_{layer}": ring for kind in ("keys", "values")}
    return inputs, outputs


def _unfit_runtime() -> str:
    import onnxruntime

    return (
        f"onnxruntime {onnxruntime.__version__} does not attend as this graph needs it; "
        f"1.24 and later do, `--graph official` runs with any"
    )
