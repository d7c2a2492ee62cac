"""weights/onnx_shapes.py: the shapes that the onnx package reads, without it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from mossnano_stdio.weights.onnx_shapes import initializer_shapes


@pytest.mark.parametrize("name", ["decode_step", "decode_full", "encode"])
def test_reads_what_onnx_reads(tiny_bundle: Path, name: str) -> None:
    content = (tiny_bundle / f"moss_audio_tokenizer_{name}.onnx").read_bytes()
    model = onnx.load_from_string(content)
    expected = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert len(expected) > 100
    assert initializer_shapes(content) == expected


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 2**62), max_size=5), max_size=5))
def test_any_names_and_shapes(shapes: dict[str, list[int]]) -> None:
    tensors = [onnx.TensorProto(name=name, dims=dims) for name, dims in shapes.items()]
    content = helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString()
    assert initializer_shapes(content) == {name: tuple(dims) for name, dims in shapes.items()}


def test_packed_dimensions() -> None:
    """protobuf 3 writers put repeated numbers into one field."""
    tensor = bytes([0x0A, 3, 2, 0x80, 1, 0x42, 1]) + b"w"
    graph = bytes([0x2A, len(tensor)]) + tensor
    assert initializer_shapes(bytes([0x3A, len(graph)]) + graph) == {"w": (2, 128)}


@given(st.binary(max_size=60))
def test_other_bytes_are_a_value_error_at_most(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        initializer_shapes(content)


def test_a_file_cut_anywhere_is_a_value_error_or_has_fewer_constants() -> None:
    tensors = [numpy_helper.from_array(np.zeros((2, 3)), name) for name in "abc"]
    content = helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString()
    assert len(initializer_shapes(content)) == 3
    for length in range(len(content)):
        try:
            assert len(initializer_shapes(content[:length])) <= 3
        except ValueError:
            continue
