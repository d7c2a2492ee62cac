"""codecs/rings.py: a ring always holds what the next token can see, whatever fails, is given up or restored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio.codecs import rings
from mossnano_stdio.codecs.rings import MAX_RUN_FRAMES, Rings, RingSpec


def a_spec(**changes: Any) -> RingSpec:
    spec = {
        "number": 0,
        "first_layer": 0,
        "layers": 2,
        "heads": 3,
        "ring_dim": 2 * len(changes.get("angles", (0.5, 0.25))),
        "context_tokens": 5,
        "tokens_per_frame": 2,
        "angles": (0.5, 0.25),
        "rounded_frames": 0,
    }
    return RingSpec(**{**spec, **changes})


class Memory:
    """A binding that keeps the arrays themselves, and writes tokens into them as the graph would."""

    def __init__(self) -> None:
        self.inputs: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, NDArray[Any]] = {}

    def bind_ortvalue_input(self, name: str, array: NDArray[Any]) -> None:
        self.inputs[name] = array

    def bind_ortvalue_output(self, name: str, array: NDArray[Any]) -> None:
        self.outputs[name] = array

    def ring_names(self) -> Iterator[tuple[str, str]]:
        for name in self.inputs:
            kind, _, layer = name.partition("_")
            if kind in ("keys", "values"):
                yield name, f"{kind}_out_{layer}"

    def run(self, tokens: NDArray[Any]) -> None:
        """Each token is marked with its number, its head, and the number of its ring."""
        end = int(self.inputs["total_0"][0])
        start = end - len(tokens)
        assert self.inputs["last_0"][0] == end - 1
        for ring, (name, out_name) in enumerate(self.ring_names()):
            source, target = self.inputs[name][0], self.outputs[out_name][0]
            past = source[:, :start].copy()
            if target.ctypes.data != source.ctypes.data:
                target[...] = np.nan
            target[:, :start] = past
            for head in range(len(target)):
                target[head, start:end] = (tokens + head / 10 + ring / 100)[:, np.newaxis]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("context_tokens", "tokens_per_frame"), [(1, 1), (5, 2), (64, 1), (70, 3)])
@settings(max_examples=40)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["run", "run", "run", "fail", "abandon", "reset", "restore"]),
            st.integers(1, MAX_RUN_FRAMES),
        ),
        max_size=60,
    )
)
def test_the_window_is_always_what_the_next_token_can_see(
    in_place: bool, context_tokens: int, tokens_per_frame: int, steps: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "native_value", lambda array: array)
        memory = Memory()
        spec = a_spec(context_tokens=context_tokens, tokens_per_frame=tokens_per_frame)
        ring = Rings(spec, memory, in_place=in_place)
        frames, snapshot = 0, (0, ring.window(0))

        def run(start: int, count: int, mark: float = 0.0) -> None:
            ring.prepare(start, count, start)
            memory.run(np.arange(start * tokens_per_frame, (start + count) * tokens_per_frame) + mark)

        for what, count in steps:
            match what:
                case "run":
                    run(frames, count)
                    ring.commit()
                    frames += count
                case "fail":
                    run(frames, count, mark=0.5)
                case "abandon":
                    passing = ring.passing(frames, 4 * count)
                    for number in range(3):
                        run(frames + number * count, count, mark=0.5)
                        ring.commit()
                    run(frames + 3 * count, count, mark=0.5)
                    ring.go_back(frames, passing)
                case "reset":
                    ring.reset()
                    frames = 0
                case "restore":
                    frames = snapshot[0]
                    ring.restore(*snapshot)
            window = ring.window(frames)
            if count % 3 == 0:
                snapshot = (frames, window)
            assert_window(window, frames * tokens_per_frame, spec)


def assert_window(window: NDArray[np.float32], seen: int, spec: RingSpec) -> None:
    tokens = np.arange(max(0, seen - spec.needed_tokens), seen)
    assert window.shape == (2 * spec.layers, spec.heads, len(tokens), spec.ring_dim)
    marks = tokens + np.arange(spec.heads)[:, np.newaxis] / 10
    for number, ring in enumerate(window):
        np.testing.assert_allclose(ring, (marks + number / 100)[..., np.newaxis].repeat(spec.ring_dim, -1), rtol=1e-6)


def test_angles_are_rounded_first_and_exact_later() -> None:
    angles = tuple(map(float, np.exp(-np.arange(8)).astype(np.float32)))
    spec = a_spec(angles=angles, tokens_per_frame=2, rounded_frames=1000)
    for position in (1997, 1_440_000, 100_000_007):
        for token, row in enumerate(spec.angles_at(position, 3), start=position):
            for angle, found in zip(angles, row, strict=True):
                if token < 2000:
                    assert found == np.float32(token) * np.float32(angle)
                else:
                    assert abs(math.remainder(token * angle - float(found), math.tau)) < 5e-7
