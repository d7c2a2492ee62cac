"""build/encode_step.py: the codes of a whole recording, whatever the steps, by the contract as it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mossnano_stdio.build.bundle import save_bundle
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.encode_step import ENCODE_STEP_FILE
from mossnano_stdio.build.model import CodecWeights, DecoderWeights, EncoderWeights, Module, PatchStep
from mossnano_stdio.build.random_weights import save_standin
from mossnano_stdio.codecs import load_decoder, load_encoder_runtime, load_full_encoder
from mossnano_stdio.weights import load_bundle
from tests import oracle
from tests.oracle import ODD

Array = NDArray[Any]


class Runner:
    """Runs the graph with as many slots as the recording has tokens, so that nothing ever has to move."""

    def __init__(self, graph_path: Path, facts: Mapping[str, Any], frames: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
        self._transformers = facts["transformers"]
        self._frames = 0
        self._feed: dict[str, Array] = {}
        layer = 0
        for number, transformer in enumerate(self._transformers):
            slots = frames * transformer["tokens_per_frame"]
            angles = np.outer(np.arange(slots), transformer["angles"])
            self._feed[f"cosines_{number}"] = np.cos(angles).astype(np.float32)
            self._feed[f"sines_{number}"] = np.sin(angles).astype(np.float32)
            for _ in range(transformer["layers"]):
                shape = (1, transformer["heads"], slots, transformer["ring_dim"])
                self._feed |= {f"{kind}_{layer}": np.zeros(shape, np.float32) for kind in ("keys", "values")}
                layer += 1

    def step(self, audio: Array, frames: int) -> Array:
        self._frames += frames
        for number, transformer in enumerate(self._transformers):
            total = self._frames * transformer["tokens_per_frame"]
            self._feed |= {f"last_{number}": np.array([total - 1], np.int32)}
            self._feed |= {f"total_{number}": np.array([total], np.int32)}
        names = [output.name for output in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(None, {"audio": audio, **self._feed}), strict=True))
        codes: Array = outputs.pop("codes")
        self._feed |= {name.replace("_out", ""): value for name, value in outputs.items()}
        return codes


def encoded(folder: Path, audio: Array, frame_samples: int, chunk_frames: int) -> Array:
    graph = load_bundle(folder).sidecar.graphs["encode_step"]
    frames = len(audio) // frame_samples
    runner = Runner(folder / graph.file, graph.facts, frames)
    pieces = []
    for start in range(0, frames, chunk_frames):
        count = min(chunk_frames, frames - start)
        pieces.append(runner.step(audio[start * frame_samples : (start + count) * frame_samples], count))
    return np.concatenate(pieces)


def music(seconds: float, sample_rate: int, channels: int, seed: int = 0) -> Array:
    """Gliding partials and noise, [samples, channels]."""
    random = np.random.default_rng(seed)
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    audio = 0.03 * random.standard_normal((len(times), channels))
    for pitch in random.uniform(0.002, 0.08, 8) * sample_rate:
        glide = 1 + 0.1 * np.sin(2 * np.pi * random.uniform(0.5, 3) * times)
        partial = np.sin(2 * np.pi * np.cumsum(pitch * glide) / sample_rate)
        audio += 0.06 * partial[:, np.newaxis] * random.uniform(0.5, 1, channels)
    return audio.astype(np.float32)


@pytest.fixture(scope="module")
def tiny_built(tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_bundle(folder, load_checkpoint(tiny_reference), name="tiny", checkpoint_name="tiny", trial=False)
    return folder


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 12])
def test_golden(tiny_built: Path, tiny_reference: Path, chunk_frames: int) -> None:
    audio = np.ascontiguousarray(np.load(tiny_reference / "wave.npy").T)[: 12 * 3840]
    codes = encoded(tiny_built, audio, 3840, chunk_frames)
    assert np.array_equal(codes, np.load(tiny_reference / "encoded.npy")[:12])


def test_past_every_context_against_numpy(tiny_built: Path, tiny_reference: Path) -> None:
    encoder = load_checkpoint(tiny_reference).maybe_encoder
    assert encoder is not None
    assert oracle.frames_of_context(encoder.modules) == 10
    audio = music(30 * 0.08, 48000, 2)
    expected = oracle.encode(encoder, audio)
    for chunk_frames in (1, 3, 25):
        assert np.array_equal(encoded(tiny_built, audio, 3840, chunk_frames), expected)


@pytest.mark.parametrize("chunk_frames", [1, 4, 40])
def test_any_dimensions_against_numpy(tmp_path: Path, chunk_frames: int) -> None:
    save_standin(tmp_path / "checkpoint", ODD, seed=3)
    weights = load_checkpoint(tmp_path / "checkpoint")
    assert weights.maybe_encoder is not None
    save_bundle(tmp_path, weights, name="odd", checkpoint_name="odd", trial=False)
    audio = music(4, 700, 1)
    assert np.array_equal(encoded(tmp_path, audio, 70, chunk_frames), oracle.encode(weights.maybe_encoder, audio))


def test_two_patches_in_a_row_keep_their_order(tmp_path: Path) -> None:
    """The published model has none, but a config may."""
    save_standin(tmp_path / "checkpoint", ODD, seed=5)
    weights = load_checkpoint(tmp_path / "checkpoint")
    encoder, decoder = weights.maybe_encoder, weights.decoder
    assert encoder is not None
    assert [module.patch for module in encoder.modules if isinstance(module, PatchStep)] == [7, 2, 5]
    codec = replace(decoder.format, frame_samples=210)
    *most, last = encoder.modules
    more = replace(encoder.quantizer, input_proj_w=np.tile(encoder.quantizer.input_proj_w, 3) / np.float32(3))
    longer = EncoderWeights(codec, tuple(_slowed(module) for module in [*most, last, PatchStep(3)]), more)
    wide = replace(
        decoder.dequantizer,
        output_proj_w=np.tile(decoder.dequantizer.output_proj_w, (3, 1)),
        output_proj_b=np.tile(decoder.dequantizer.output_proj_b, 3),
    )
    slow = DecoderWeights(codec, wide, tuple(_slowed(module) for module in [PatchStep(3), *decoder.modules]))
    save_bundle(tmp_path, CodecWeights(slow, longer), name="odd", checkpoint_name="odd", trial=False)
    audio = music(6, 700, 1)
    assert np.array_equal(encoded(tmp_path, audio, 210, 4), oracle.encode(longer, audio))
    codes = np.random.default_rng(0).integers(0, 13, (12, 3)).astype(np.uint16)
    for graph in ("official", "fast"):
        found = load_decoder(load_bundle(tmp_path), graph=graph).step(codes)
        assert np.abs(found - oracle.decode(slow, codes)).max() < 1e-6


def _slowed(module: Module) -> Module:
    """The same in frames three times as long."""
    if isinstance(module, PatchStep):
        return module
    return replace(module, tokens_per_frame=3 * module.tokens_per_frame)


@pytest.fixture(scope="module")
def nano_whole(nano_bundle: Path) -> tuple[Array, Array]:
    """12 s, past every context, and their codes by the whole-file graph."""
    audio = music(12, 48000, 2)
    return audio, load_full_encoder(load_bundle(nano_bundle)).encode(audio)


@pytest.mark.parametrize("chunk_frames", [1, 3, 25])
def test_nano_equals_encoding_as_a_whole(nano_bundle: Path, nano_whole: tuple[Array, Array], chunk_frames: int) -> None:
    audio, whole = nano_whole
    assert (stepped(nano_bundle, audio, chunk_frames) == whole).mean() >= 0.999
    assert len({tuple(frame) for frame in whole}) > 140  # of 150: the codes say something


@pytest.mark.slow
def test_nano_over_two_minutes(nano_bundle: Path) -> None:
    audio = music(120, 48000, 2)
    expected = stepped(nano_bundle, audio, 8)
    for chunk_frames in (1, 3, 25):
        assert (stepped(nano_bundle, audio, chunk_frames) == expected).mean() >= 0.999


def stepped(folder: Path, audio: Array, chunk_frames: int) -> Array:
    """As codecs/ runs it."""
    encoder, samples = load_encoder_runtime(load_bundle(folder)).new_encoder(), chunk_frames * 3840
    return np.concatenate([encoder.step(audio[start : start + samples]) for start in range(0, len(audio), samples)])


def test_its_nodes_are_few_and_known_to_the_runtime(tiny_built: Path) -> None:
    model = onnx.load(tiny_built / ENCODE_STEP_FILE, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17, "com.microsoft": 1}
    assert len(model.graph.node) < 250
