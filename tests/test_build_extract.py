"""build/extract.py: the same weights out of any official graph; one of another make is refused where it departs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mossnano_stdio.build.bundle import save_bundle
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.extract import extract_weights
from mossnano_stdio.build.model import CodecWeights
from mossnano_stdio.build.random_weights import SIZES, save_standin
from mossnano_stdio.errors import BundleError
from mossnano_stdio.weights import (
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
    SIDECAR_NAME,
    load_bundle,
)
from tests.oracle import ODD

STEP, FULL, ENCODE = DECODE_STEP_FILE, DECODE_FULL_FILE, ENCODE_FILE


def assert_same(found: Any, expected: Any, where: str = "weights") -> None:
    """Equal in every field; tensors to the last rounding of a folded weight norm, layers however they come."""
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name), f"{where}.{field.name}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert expected.size == 0 or np.abs(found - expected).max() <= 1.2e-7, where
    else:
        assert found == expected, where


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """torch's bundle of the tiny checkpoint, to be damaged."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (folder / SIDECAR_NAME).write_text('{"mossnano": 1, "codebook_size": 1024}')
    return folder


def test_what_torch_exported(tiny_bundle: Path, tiny_reference: Path) -> None:
    assert_same(extract_weights(load_bundle(tiny_bundle)), load_checkpoint(tiny_reference))


def test_what_we_built(nano_bundle: Path) -> None:
    assert_same(extract_weights(load_bundle(nano_bundle)), load_checkpoint(nano_bundle / "checkpoint"))


@pytest.mark.parametrize("model", ["24k", "v2"])
def test_what_we_built_of_the_larger_members(tmp_path: Path, model: str) -> None:
    """Transformers before the first patch and after the last, and in the older layout without some projections."""
    weights = load_checkpoint(Path(__file__).parent / "reference" / f"moss-{model}")
    save_bundle(tmp_path, weights, name=model, checkpoint_name=model, graphs="official", trial=False)
    assert_same(extract_weights(load_bundle(tmp_path)), weights)


def test_decode_full_alone(copy: Path, tiny_reference: Path) -> None:
    (copy / STEP).unlink()
    (copy / ENCODE).unlink()
    expected = load_checkpoint(tiny_reference)
    assert_same(extract_weights(load_bundle(copy)), CodecWeights(expected.decoder, None))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_any_number_of_heads(tmp_path: Path, heads: int) -> None:
    tiny = SIZES["nano"]["tiny"]
    stages = zip(tiny.stages, (1, 2, 1, 3), strict=True)
    own = tuple(dataclasses.replace(stage, heads=heads, layers=layers) for stage, layers in stages)
    size = dataclasses.replace(tiny, stages=own)
    save_standin(tmp_path / "checkpoint", size, seed=4)
    weights = load_checkpoint(tmp_path / "checkpoint")
    save_bundle(tmp_path / "bundle", weights, name="heads", checkpoint_name="heads", trial=False)
    assert_same(extract_weights(load_bundle(tmp_path / "bundle")), weights)


@pytest.mark.parametrize(("op_type", "more"), [("LessOrEqual", -1), ("GreaterOrEqual", 0), ("Greater", -1)])
def test_contexts_however_they_are_compared(copy: Path, tiny_reference: Path, op_type: str, more: int) -> None:
    def compare_otherwise(graph: onnx.GraphProto) -> None:
        constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
        for node in graph.node:
            if node.op_type == "Less" and node.input[1] in constants:
                node.op_type = op_type
                tensor = constants[node.input[1]].attribute[0].t
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + more))

    edit(copy / STEP, compare_otherwise)
    assert_same(extract_weights(load_bundle(copy)), load_checkpoint(tiny_reference))


def test_names_mean_nothing(copy: Path, tiny_reference: Path) -> None:
    for file in (STEP, ENCODE):
        model = onnx.load(copy / file, load_external_data=False)
        kept = {value.name for value in [*model.graph.input, *model.graph.output]}

        def renamed(name: str, kept: set[str] = kept) -> str:
            return name if name in kept or not name else f"v{hash(name) & 0xFFFFFFFFFF:x}"

        for node in model.graph.node:
            node.name = ""
            rename_values(node, renamed)
        for tensor in model.graph.initializer:
            tensor.name = renamed(tensor.name)
        onnx.save(model, copy / file)
    assert_same(extract_weights(load_bundle(copy)), load_checkpoint(tiny_reference))


def rename_values(node: onnx.NodeProto, renamed: Callable[[str], str]) -> None:
    node.input[:] = map(renamed, node.input)
    node.output[:] = map(renamed, node.output)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            rename_values(inner, renamed)
        for value in attribute.g.output:
            value.name = renamed(value.name)


def edit(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def node_of(graph: onnx.GraphProto, op_type: str, number: int) -> onnx.NodeProto:
    return [node for node in graph.node if node.op_type == op_type][number]


def other_epsilon(graph: onnx.GraphProto) -> None:
    next(entry for entry in node_of(graph, "LayerNormalization", 3).attribute if entry.name == "epsilon").f = 1e-6


def norm_of_something_else(graph: onnx.GraphProto) -> None:
    node_of(graph, "LayerNormalization", 3).input[0] = node_of(graph, "LayerNormalization", 0).input[0]


def no_layer_scale(graph: onnx.GraphProto) -> None:
    scale = next(node for node in graph.node if "layer_scale_1" in node.name)
    scale.op_type = "Identity"
    scale.input[:] = [scale.input[1]]


def first_norm(change: Callable[[Any], Any]) -> Callable[[onnx.GraphProto], None]:
    def change_graph(graph: onnx.GraphProto) -> None:
        name = node_of(graph, "LayerNormalization", 0).input[1]
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))

    return change_graph


def other_operator(old: str, new: str) -> Callable[[onnx.GraphProto], None]:
    def change_graph(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.op_type = new if node.op_type == old else node.op_type

    return change_graph


def same_column_twice(graph: onnx.GraphProto) -> None:
    node_of(graph, "Conv", 1).input[0] = node_of(graph, "Conv", 0).input[0]


def codes_in_another_order(graph: onnx.GraphProto) -> None:
    concat = [node for node in graph.node if node.op_type == "Concat"][-1]
    concat.input[:] = reversed(concat.input)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (STEP, other_epsilon, ["LayerNormalization", "epsilon is 1e-06"]),
        (STEP, norm_of_something_else, ["LayerNormalization", "it must see"]),
        (STEP, no_layer_scale, ["two changes per layer"]),
        (STEP, first_norm(np.float16), ["LayerNormalization", "float16", "float32 is needed"]),
        (STEP, first_norm(lambda norm: norm * np.float32(np.nan)), ["LayerNormalization", "NaN"]),
        (STEP, first_norm(lambda norm: norm[1:]), ["LayerNormalization", "[31]", "[32]"]),
        (STEP, same_column_twice, ["16 codebooks read the columns"]),
        (STEP, other_operator("Cos", "Relu"), ["out_proj", "rotation (Cos)"]),
        (STEP, other_operator("Less", "Equal"), ["out_proj", "one context", "none"]),
        (ENCODE, other_epsilon, ["LayerNormalization", "epsilon is 1e-06"]),
        (ENCODE, codes_in_another_order, ["order of their codebooks"]),
    ],
)
def test_a_graph_of_another_make_is_refused_where_it_departs(
    copy: Path, file: str, change: Callable[[onnx.GraphProto], None], words: list[str]
) -> None:
    edit(copy / file, change)
    with pytest.raises(BundleError) as caught:
        extract_weights(load_bundle(copy))
    for word in [file, *words]:
        assert word in str(caught.value)


def test_metadata_that_says_something_else(copy: Path) -> None:
    path = copy / METADATA_NAME
    metadata = json.loads(path.read_text())
    cache = metadata["streaming_decode"]["attention_caches"][3]
    cache |= {"context": 97, "cache_shape": [1, 4, 97, 8], "positions_shape": [1, 97]}
    path.write_text(json.dumps(metadata))
    with pytest.raises(BundleError, match=r"\(5, 0, 96\).*metadata says.*\(5, 0, 97\)"):
        extract_weights(load_bundle(copy))


def test_encoder_of_another_model(copy: Path, tmp_path: Path) -> None:
    save_standin(tmp_path / "other", SIZES["nano"]["tiny"], seed=5)
    other = load_checkpoint(tmp_path / "other")
    save_bundle(tmp_path / "built", other, name="other", checkpoint_name="other", trial=False)
    for name in (ENCODE, ENCODE_DATA):
        shutil.copy(tmp_path / "built" / name, copy / name)
    with pytest.raises(BundleError, match="different codebooks"):
        extract_weights(load_bundle(copy))


def test_files_that_are_no_graphs(copy: Path) -> None:
    whole = (copy / STEP).read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 1000):
        (copy / STEP).write_bytes(content)
        with pytest.raises(BundleError, match=STEP):
            extract_weights(load_bundle(copy))
    (copy / STEP).write_bytes(whole)
    data = copy / DECODE_DATA
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=STEP):
        extract_weights(load_bundle(copy))
    data.unlink()
    with pytest.raises(BundleError, match=DECODE_DATA):
        extract_weights(load_bundle(copy))


@pytest.mark.parametrize("location", ["", "../outside.data", "/etc/passwd"])
def test_data_lies_beside_the_graph(copy: Path, location: str) -> None:
    model = onnx.load(copy / STEP, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    onnx.save(model, copy / STEP)
    with pytest.raises(BundleError, match="a file beside the graph is needed"):
        extract_weights(load_bundle(copy))


def test_dimensions_of_any_kind(tmp_path: Path) -> None:
    save_standin(tmp_path / "checkpoint", ODD, seed=6)
    weights = load_checkpoint(tmp_path / "checkpoint")
    save_bundle(tmp_path / "bundle", weights, name="odd", checkpoint_name="odd", trial=False)
    assert_same(extract_weights(load_bundle(tmp_path / "bundle")), weights)
