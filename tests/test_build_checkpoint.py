"""build/checkpoint.py: everything that can be wrong with a checkpoint is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mossnano_stdio.build.checkpoint import INDEX_NAME, SINGLE_NAME, load_checkpoint, parse_config
from mossnano_stdio.build.model import LayerWeights, TransformerWeights, transformers
from mossnano_stdio.errors import BundleError

Tensors = dict[str, NDArray[Any]]

LAYER = "decoder.3.transformer.layers.0"
PAIR = "quantizer.quantizers.5.in_proj.parametrizations.weight"


@pytest.fixture(scope="module")
def tensors(tiny_reference: Path) -> Tensors:
    loaded: Tensors = load_file(tiny_reference / SINGLE_NAME)
    return loaded


@pytest.fixture
def save(tiny_reference: Path, tmp_path: Path, tensors: Tensors) -> Callable[[Tensors], Path]:
    """Write the tiny checkpoint with some tensors replaced, or left out where they are empty."""

    def save_changed(changes: Tensors) -> Path:
        shutil.copy(tiny_reference / "config.json", tmp_path)
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor.size}
        save_file(changed, tmp_path / SINGLE_NAME)
        return tmp_path

    return save_changed


GONE = np.zeros(0, np.float32)


def read_all(folder: Path) -> list[LayerWeights]:
    """The layers of a checkpoint, which are read no sooner than they are asked for."""
    weights = load_checkpoint(folder)
    assert weights.maybe_encoder is not None
    found = transformers([*weights.decoder.modules, *weights.maybe_encoder.modules])
    return [layer for _, module in found for layer in module.layers]


def test_every_tensor_finds_its_place(tiny_reference: Path, tensors: Tensors) -> None:
    weights = load_checkpoint(tiny_reference)
    index, module = transformers(weights.decoder.modules)[1]
    assert index == 3
    assert isinstance(module, TransformerWeights)
    assert (module.context, module.heads, module.tokens_per_frame, module.max_period) == (64, 4, 8, 10_000.0)
    assert np.array_equal(module.layers[0].in_proj, tensors[f"{LAYER}.self_attn.in_proj.weight"])
    assert np.array_equal(module.layers[0].scale2, tensors[f"{LAYER}.layer_scale_2.scale"])
    assert weights.format.codebook_size == 1024
    assert weights.maybe_encoder is not None
    assert weights.maybe_encoder.quantizer.out_proj_w.shape == (15, 32, 8)  # the last is never needed


def test_weight_norm_is_folded(tiny_reference: Path, tensors: Tensors) -> None:
    weights = load_checkpoint(tiny_reference)
    length, direction = (tensors[f"{PAIR}.original{half}"].astype(np.float64) for half in (0, 1))
    folded = length * direction / np.sqrt((direction**2).sum(axis=1, keepdims=True))
    assert weights.maybe_encoder is not None
    assert np.abs(weights.maybe_encoder.quantizer.in_proj_w[5] - folded[:, :, 0]).max() < 1e-7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{LAYER}.norm1.bias": GONE}, [f"{LAYER}.norm1.bias", "[32]", "missing"]),
        ({f"{LAYER}.norm3.bias": np.ones(3, np.float32)}, [f"unexpected tensor {LAYER}.norm3.bias"]),
        ({"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}, ["unexpected tensor a and 1 more"]),
        ({f"{LAYER}.ffn.0.weight": np.ones((64, 31), np.float32)}, [f"{LAYER}.ffn.0.weight", "[64, 31]", "[64, 32]"]),
        ({f"{LAYER}.ffn.0.weight": np.ones((64, 32), np.float16)}, [f"{LAYER}.ffn.0.weight", "F16", "F32"]),
        ({f"{LAYER}.norm1.bias": np.full(32, np.nan, np.float32)}, [f"{LAYER}.norm1.bias", "NaN"]),
        ({f"{PAIR}.original0": GONE}, [f"{PAIR}.original1 is half", f"{PAIR}.original0 is missing"]),
        ({f"{PAIR}.original1": GONE}, [f"{PAIR}.original0 is half", f"{PAIR}.original1 is missing"]),
        ({f"{PAIR}.original1": np.zeros((8, 32, 1), np.float32)}, [f"{PAIR}.original1", "row of zeros"]),
    ],
)
def test_a_wrong_tensor_is_named(save: Callable[[Tensors], Path], changes: Tensors, words: list[str]) -> None:
    with pytest.raises(BundleError) as caught:
        read_all(save(changes))
    for word in words:
        assert word in str(caught.value)


def test_every_single_tensor_is_needed(tensors: Tensors, save: Callable[[Tensors], Path]) -> None:
    parts = ("decoder.3.", "encoder.5.", "quantizer.quantizers.15.", "quantizer.input", "quantizer.output")
    for name in (name for name in tensors if name.startswith(parts)):
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            load_checkpoint(save({name: GONE}))


def test_truncated_file(tiny_reference: Path, save: Callable[[Tensors], Path]) -> None:
    folder = save({})
    whole = (folder / SINGLE_NAME).read_bytes()
    for length in (0, 4, 1000, len(whole) - 1):
        (folder / SINGLE_NAME).write_bytes(whole[:length])
        with pytest.raises(BundleError, match=SINGLE_NAME):
            load_checkpoint(folder)


def shard(folder: Path, tiny_reference: Path, tensors: Tensors, parts: int) -> dict[str, Any]:
    shutil.copy(tiny_reference / "config.json", folder)
    names = [f"model-{part + 1:05}-of-{parts:05}.safetensors" for part in range(parts)]
    placed = {name: names[number % parts] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("parts", [1, 3])
def test_shards_are_the_same_checkpoint(tiny_reference: Path, tmp_path: Path, tensors: Tensors, parts: int) -> None:
    shard(tmp_path, tiny_reference, tensors, parts)
    whole, sharded = load_checkpoint(tiny_reference), load_checkpoint(tmp_path)
    assert np.array_equal(whole.decoder.dequantizer.out_proj_w, sharded.decoder.dequantizer.out_proj_w)
    for (_, one), (_, other) in zip(
        transformers(whole.decoder.modules), transformers(sharded.decoder.modules), strict=True
    ):
        assert np.array_equal(one.layers[-1].ffn_down, other.layers[-1].ffn_down)


def test_wrong_index(tiny_reference: Path, tmp_path: Path, tensors: Tensors) -> None:
    index = shard(tmp_path, tiny_reference, tensors, 2)
    path = tmp_path / INDEX_NAME
    first, second = sorted(set(index["weight_map"].values()))
    name = f"{LAYER}.norm1.bias"
    holder = index["weight_map"][name]
    other = first if holder == second else second
    for placed, words in (
        ({name: other}, [name, "does not place there"]),
        ({name: "../outside.safetensors"}, [name, "outside", "same folder"]),
        ({name: 3}, [name, "same folder"]),
        ({"extra": first}, ["extra is missing", first]),
        ({"extra": "nowhere.safetensors"}, ["nowhere.safetensors"]),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | placed}))
        with pytest.raises(BundleError) as caught:
            load_checkpoint(tmp_path)
        assert all(word in str(caught.value) for word in words), caught.value
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        path.write_text(content)
        with pytest.raises(BundleError, match=INDEX_NAME):
            load_checkpoint(tmp_path)


def test_no_tensors_and_no_config(tiny_reference: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    shutil.copy(tiny_reference / "config.json", tmp_path)
    with pytest.raises(BundleError, match=f"neither {SINGLE_NAME} nor {INDEX_NAME}"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        load_checkpoint(tmp_path)


def changed(config: Any, path: list[str | int], value: object) -> Any:
    copy = json.loads(json.dumps(config))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["downsample_rate"], GONE, ["downsample_rate is missing"]),
        (["downsample_rate"], 0, ["downsample_rate is 0"]),
        (["downsample_rate"], 3840.0, ["downsample_rate is 3840.0", "whole number"]),
        (["number_channels"], True, ["number_channels is True"]),
        (["sampling_rate"], 44100, ["sampling_rate and sample_rate differ", "44100, 48000"]),
        (["enable_channel_interleave"], False, ["enable_channel_interleave is False", "True"]),
        (["quantizer_kwargs", "quantizer_type"], "rvq", ["quantizer_type is 'rvq'", "'rlfq'"]),
        (["quantizer_kwargs", "codebook_size"], 65_537, ["codebook_size is 65537", "2 .. 65536"]),
        (["quantizer_kwargs"], [], ["quantizer_kwargs", "JSON object", "list"]),
        (["decoder_kwargs"], [], ["decoder_kwargs", "list of modules"]),
        (["decoder_kwargs", 1, "module_type"], "LSTM", ["decoder_kwargs[1]", "module_type is 'LSTM'", "'Transformer'"]),
        (["decoder_kwargs", 1, "gating"], "silu", ["decoder_kwargs[1]", "gating is 'silu'", "'none'"]),
        (["decoder_kwargs", 1, "norm"], "rms_norm", ["norm is 'rms_norm'"]),
        (["decoder_kwargs", 1, "positional_embedding"], "sin", ["positional_embedding is 'sin'", "'rope'"]),
        (["encoder_kwargs", 1, "causal"], False, ["encoder_kwargs[1]", "causal is False"]),
        (["decoder_kwargs", 1, "num_heads"], 3, ["d_model 32 over num_heads 3"]),
        (["decoder_kwargs", 1, "num_heads"], 32, ["d_model 32 over num_heads 32"]),
        (["decoder_kwargs", 1, "context_duration"], 0.001, ["less than one token"]),
        (["decoder_kwargs", 1, "context_duration"], float("inf"), ["context_duration is inf"]),
        (["decoder_kwargs", 1, "max_period"], "10000", ["max_period is '10000'"]),
        (["encoder_kwargs", 0, "patch_size"], 241, ["patch_size 241 does not divide 7680"]),
    ],
)
def test_a_wrong_key_is_named(tiny_reference: Path, path: list[str | int], value: object, words: list[str]) -> None:
    config = json.loads((tiny_reference / "config.json").read_text())
    with pytest.raises(BundleError) as caught:
        parse_config(changed(config, path, value))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["decoder_kwargs", 0, "patch_size"], 5, ["decoder 0", "does not divide 64 features"]),
        (["decoder_kwargs", 0, "patch_size"], 8, ["decoder 1", "takes 16 features, but 8 reach it"]),
        (["decoder_kwargs", 8, "patch_size"], 120, ["decoder: the modules end at 3840 tokens of 2 features"]),
        (["encoder_kwargs", 8, "patch_size"], 2, ["encoder: the modules end at 2 tokens of 32 features"]),
        (["downsample_rate"], 1920, ["encoder_kwargs[8]: patch_size 4 does not divide 2 tokens"]),
    ],
)
def test_modules_that_do_not_fit_together(
    tiny_reference: Path, tmp_path: Path, path: list[str | int], value: object, words: list[str]
) -> None:
    config = json.loads((tiny_reference / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(changed(config, path, value)))
    shutil.copyfile(tiny_reference / SINGLE_NAME, tmp_path / SINGLE_NAME)
    with pytest.raises(BundleError) as caught:
        load_checkpoint(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
