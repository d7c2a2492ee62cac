"""build/official.py, with weights/metadata.py: our official graphs, against goldens, torch's and numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mossnano_stdio.build.bundle import save_bundle
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.model import CodecWeights
from mossnano_stdio.build.random_weights import save_standin
from mossnano_stdio.weights import (
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
)
from tests import oracle
from tests.oracle import ODD

Array = NDArray[Any]
State = dict[str, Array]

PUBLISHED_METADATA = Path(__file__).parents[2] / "shared" / "reference" / "official" / METADATA_NAME


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CodecWeights]:
    """A codec with dimensions of its own."""
    folder = tmp_path_factory.mktemp("odd")
    save_standin(folder / "checkpoint", ODD, seed=3)
    weights = load_checkpoint(folder / "checkpoint")
    save_bundle(folder, weights, name="odd", checkpoint_name="odd", trial=False)
    return folder, weights


class Graphs:
    """The graphs of a bundle, run bare: nothing of codecs/ between them and the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = json.loads((folder / METADATA_NAME).read_text())

    def run(self, name: str, feed: Mapping[str, Array]) -> dict[str, Array]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_reuse = False
        if name not in self.__dict__:
            path = str(self.folder / self.metadata["files"][name])
            self.__dict__[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = self.__dict__[name]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed)), strict=True))

    def full(self, codes: Array) -> Array:
        outputs = self.run("decode_full", feed_of(codes))
        samples = self.metadata["codec_config"]["downsample_rate"]
        assert outputs["audio_lengths"].tolist() == [len(codes) * samples]
        audio: Array = outputs["audio"][0]
        return audio

    def step(self, codes: Array, state: State) -> tuple[Array, State]:
        outputs = self.run("decode_step", {**feed_of(codes), **state})
        onnx_names = self.metadata["onnx"]
        pairs = zip(onnx_names["decode_step_input_names"], onnx_names["decode_step_output_names"], strict=True)
        return outputs["audio"][0], {given: outputs[taken] for given, taken in list(pairs)[2:]}

    def initial(self) -> State:
        streaming = self.metadata["streaming_decode"]
        state = {counter["input_name"]: np.zeros(1, np.int32) for counter in streaming["transformer_offsets"]}
        for cache in streaming["attention_caches"]:
            state[cache["offset_input_name"]] = np.zeros(1, np.int32)
            state[cache["cached_keys_input_name"]] = np.zeros(cache["cache_shape"], np.float32)
            state[cache["cached_values_input_name"]] = np.zeros(cache["cache_shape"], np.float32)
            state[cache["cached_positions_input_name"]] = np.full(cache["positions_shape"], -1, np.int32)
        return state

    def stepped(self, codes: Array, chunk_frames: int) -> Array:
        state, pieces = self.initial(), []
        for start in range(0, len(codes), chunk_frames):
            audio, state = self.step(codes[start : start + chunk_frames], state)
            pieces.append(audio)
        return np.concatenate(pieces, axis=1)

    def encode(self, wave: Array, length: int) -> tuple[Array, int]:
        outputs = self.run("encode", {"waveform": wave[None], "input_lengths": np.array([length], np.int32)})
        return outputs["audio_codes"][0], int(outputs["audio_code_lengths"][0])


def feed_of(codes: Array) -> dict[str, Array]:
    return {"audio_codes": codes[None].astype(np.int32), "audio_code_lengths": np.array([len(codes)], np.int32)}


def test_decode_full_golden(built_bundle: Path, codes: Array, audio: Array) -> None:
    assert np.abs(Graphs(built_bundle).full(codes) - audio.T).max() < 1e-6


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 7, 12, 24])
def test_decode_step_golden(built_bundle: Path, codes: Array, audio: Array, chunk_frames: int) -> None:
    assert np.abs(Graphs(built_bundle).stepped(codes, chunk_frames) - audio.T).max() < 1e-6


def test_encode_golden(built_bundle: Path, tiny_reference: Path) -> None:
    wave, expected = np.load(tiny_reference / "wave.npy"), np.load(tiny_reference / "encoded.npy")
    codes, count = Graphs(built_bundle).encode(wave, wave.shape[1])
    assert count == 12
    assert np.array_equal(codes, expected)


def test_every_state_is_the_one_that_torch_gives(built_bundle: Path, tiny_bundle: Path, codes: Array) -> None:
    ours, torch = Graphs(built_bundle), Graphs(tiny_bundle)
    our_state, torch_state = ours.initial(), torch.initial()
    for start, stop in ((0, 1), (1, 4), (4, 16), (16, 17), (17, 24)):  # past every context
        _, our_state = ours.step(codes[start:stop], our_state)
        _, torch_state = torch.step(codes[start:stop], torch_state)
        assert our_state.keys() == torch_state.keys()
        for name, value in our_state.items():
            assert value.shape == torch_state[name].shape
            assert value.dtype == torch_state[name].dtype
            assert np.abs(value - torch_state[name]).max() < 2e-5, name


def test_states_can_change_hands(built_bundle: Path, tiny_bundle: Path, codes: Array, audio: Array) -> None:
    ours, torch = Graphs(built_bundle), Graphs(tiny_bundle)
    _, state = torch.step(codes[:15], torch.initial())
    found, state = ours.step(codes[15:20], state)
    assert np.abs(found.T - audio[15 * 3840 : 20 * 3840]).max() < 2e-6
    found, _ = torch.step(codes[20:], state)
    assert np.abs(found.T - audio[20 * 3840 :]).max() < 2e-6


@pytest.mark.parametrize(("samples", "length"), [(3840, 3840), (7679, 7679), (11520, 5000), (100, 100), (8000, 0)])
def test_encode_counts_and_pads_as_torch_does(built_bundle: Path, tiny_bundle: Path, samples: int, length: int) -> None:
    wave = np.random.default_rng(samples).standard_normal((2, samples)).astype(np.float32) * np.float32(0.2)
    codes, count = Graphs(built_bundle).encode(wave, length)
    torch_codes, torch_count = Graphs(tiny_bundle).encode(wave, length)
    assert count == torch_count == length // 3840
    assert np.array_equal(codes, torch_codes)


@pytest.mark.parametrize("chunk_frames", [1, 3, 8, 40])
def test_any_dimensions_against_numpy(odd: tuple[Path, CodecWeights], chunk_frames: int) -> None:
    folder, weights = odd
    assert oracle.frames_of_context(weights.decoder.modules) < 8
    codes = np.random.default_rng(1).integers(0, 13, (40, 3)).astype(np.int32)
    expected = oracle.decode(weights.decoder, codes)
    assert np.abs(Graphs(folder).stepped(codes, chunk_frames) - expected.T).max() < 1e-6
    assert np.abs(Graphs(folder).full(codes) - expected.T).max() < 1e-6


def test_any_dimensions_encode_against_numpy(odd: tuple[Path, CodecWeights]) -> None:
    folder, weights = odd
    assert weights.maybe_encoder is not None
    wave = np.random.default_rng(2).standard_normal((1, 70 * 40)).astype(np.float32) * np.float32(0.2)
    codes, count = Graphs(folder).encode(wave, wave.shape[1])
    assert count == 40
    assert np.array_equal(codes, oracle.encode(weights.maybe_encoder, wave.T))
    assert len({tuple(row) for row in codes}) > 20  # the codes say something


def test_metadata_is_the_published_one(nano_bundle: Path) -> None:
    if not PUBLISHED_METADATA.exists():
        pytest.skip(f"{PUBLISHED_METADATA.name} lies outside the repository and is not there")
    ours = json.loads((nano_bundle / METADATA_NAME).read_text())
    assert ours == json.loads(PUBLISHED_METADATA.read_text())


def test_metadata_lists_what_torch_exported(built_bundle: Path, tiny_bundle: Path) -> None:
    ours, torch = Graphs(built_bundle).metadata, Graphs(tiny_bundle).metadata
    assert ours.pop("checkpoint_path") == "tiny"
    assert ours == torch


def test_data_files_have_the_published_sizes(nano_bundle: Path) -> None:
    assert (nano_bundle / DECODE_DATA).stat().st_size == 44_198_912
    assert (nano_bundle / ENCODE_DATA).stat().st_size == 44_507_136


def test_decode_graphs_share_every_weight(built_bundle: Path, tiny_bundle: Path) -> None:
    assert (built_bundle / DECODE_DATA).stat().st_size == (tiny_bundle / DECODE_DATA).stat().st_size
    places = []
    for name in (DECODE_STEP_FILE, DECODE_FULL_FILE):
        model = onnx.load(built_bundle / name, load_external_data=False)
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        places.append({tensor.name: str(tensor.external_data) for tensor in external})
    assert places[0] == places[1]
    assert len(places[0]) > 40


@pytest.mark.parametrize("name", [DECODE_STEP_FILE, DECODE_FULL_FILE, ENCODE_FILE])
def test_graphs_are_valid_onnx_of_opset_17(built_bundle: Path, name: str) -> None:
    onnx.checker.check_model(built_bundle / name, full_check=True)
    model = onnx.load(built_bundle / name, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert model.ir_version == 8


def test_graphs_are_smaller_than_what_torch_exports(built_bundle: Path, tiny_bundle: Path) -> None:
    """Fewer nodes are what makes them faster; `mossnano bench` measures by how much."""
    for name in (DECODE_STEP_FILE, DECODE_FULL_FILE, ENCODE_FILE):
        ours, torch = (onnx.load(folder / name, load_external_data=False) for folder in (built_bundle, tiny_bundle))
        assert len(ours.graph.node) * 2 < len(torch.graph.node)
