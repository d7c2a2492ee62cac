"""The larger members of the MOSS family: what the published classes make of two stand-ins, against our graphs.

Sound and codes are those of whole recordings. The published streaming of the 24 kHz member departs from them as soon as
the first context is full; ours does not.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mossnano_stdio import Codec, codecs
from mossnano_stdio.build import trial
from mossnano_stdio.build.bundle import build_standin, save_bundle
from mossnano_stdio.build.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, load_checkpoint, parse_config
from mossnano_stdio.build.decode_step import FAST_DATA
from mossnano_stdio.build.model import TransformerWeights, transformers
from mossnano_stdio.build.random_weights import SIZES, Stage, save_standin
from mossnano_stdio.client import AsyncDecoder, Decoder
from mossnano_stdio.codecs import (
    EncoderRuntime,
    Runtime,
    load_encoder,
    load_encoder_runtime,
    load_full_decoder,
    load_full_encoder,
    load_runtime,
    maybe_warm_up_frames,
    ramp_second_frames,
    seek,
)
from mossnano_stdio.errors import BundleError, CheckFailedError
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.process.loop import load_codec
from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tokens import CodecFormat, Codes, load_artifact, pack_frames, unpack_frames
from mossnano_stdio.weights import Bundle, load_bundle, load_sidecar, save_sidecar
from tests.child import PROCESS, decoded, encoded, fields, pcm_of, run
from tests.conftest import skip_if_nothing_can_be_built
from tests.oracle import Sound, furthest, in_chunks
from tests.test_clients import needs
from tests.tool import call_tool

TOLERANCE = 2e-6
PCM16_STEP = 1 / 32768
REFERENCES = Path(__file__).parent / "reference"


@dataclass(frozen=True)
class Member:
    reference: Path
    bundle: Bundle

    def golden(self, name: str) -> NDArray[Any]:
        loaded: NDArray[Any] = np.load(self.reference / f"{name}.npy")
        return loaded

    @property
    def codes(self) -> Codes:
        return self.golden("codes").astype(np.uint16)

    @property
    def audio(self) -> Sound:
        return np.ascontiguousarray(self.golden("audio").T)

    @property
    def wave(self) -> Sound:
        """Its whole frames: those that the published encoder counts."""
        wave = self.golden("wave").T
        frame_samples = self.bundle.format.frame_samples
        return np.ascontiguousarray(wave[: len(wave) // frame_samples * frame_samples])


@pytest.fixture(scope="module", params=["moss-24k", "moss-v2"])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    skip_if_nothing_can_be_built()
    folder = tmp_path_factory.mktemp(request.param)
    outcome = call_tool("build", REFERENCES / request.param, folder)
    assert outcome.status == 0, outcome.err
    return Member(REFERENCES / request.param, load_bundle(folder))


# --- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 3, 8, 100])
@pytest.mark.parametrize("graph", ["official", "fast"])
def test_goldens(member: Member, graph: str, chunk_frames: int) -> None:
    decoder = load_runtime(member.bundle, graph=graph).new_decoder()
    assert furthest(in_chunks(decoder, member.codes, chunk_frames), member.audio) < TOLERANCE


def test_goldens_as_a_whole(member: Member) -> None:
    assert furthest(load_full_decoder(member.bundle).decode(member.codes), member.audio) < TOLERANCE


@pytest.mark.parametrize("quantizers", [1, 8])
@pytest.mark.parametrize("chunk_frames", [1, 3, 8])
def test_goldens_of_a_prefix(member: Member, quantizers: int, chunk_frames: int) -> None:
    decoder = load_runtime(member.bundle, graph="fast").new_decoder()
    found = in_chunks(decoder, member.codes[:8, :quantizers], chunk_frames)
    assert furthest(found, np.ascontiguousarray(member.golden(f"audio_q{quantizers}").T)) < TOLERANCE


def test_every_state_of_the_official_graph_is_heard(member: Member) -> None:
    decoder = load_runtime(member.bundle, graph="official").new_decoder()
    decoder.step(member.codes[:10])
    snapshot = decoder.snapshot()
    expected = decoder.step(member.codes[10:14])
    names = [name for name in snapshot.tensors if name.startswith("attn_")]
    assert len(names) == 4 * len(member.bundle.caches)
    for name in names:
        lost = np.full_like(snapshot.tensors[name], -1 if "positions" in name else 0)
        decoder.restore(type(snapshot)({**snapshot.tensors, name: lost}, snapshot.next_frame))
        assert furthest(decoder.step(member.codes[10:14]), expected) > 4 * PCM16_STEP, name


def test_every_ring_is_heard(member: Member) -> None:
    decoder = load_runtime(member.bundle, graph="fast").new_decoder()
    decoder.step(member.codes[:10])
    snapshot = decoder.snapshot()
    expected = decoder.step(member.codes[10:14])
    for transformer, window in enumerate(snapshot.windows):
        for ring in range(len(window)):
            windows = list(snapshot.windows)
            windows[transformer] = window.copy()
            windows[transformer][ring] = 0
            decoder.restore(replace(snapshot, windows=tuple(windows)))
            assert furthest(decoder.step(member.codes[10:14]), expected) > 4 * PCM16_STEP, (transformer, ring)


def test_a_start_in_the_middle_is_within_half_a_step(tmp_path: Path) -> None:
    """As many layers as the 24 kHz member has, but narrow ones with short contexts."""
    tiny = SIZES["24k"]["tiny"]
    stages = (Stage(32, 32, 64, 2, 0.32), *[Stage(12, 32, 64, 2, 0.32)] * 3)
    save_standin(tmp_path / "checkpoint", replace(tiny, features=32, stages=stages), seed=1)
    weights = load_checkpoint(tmp_path / "checkpoint", "decode")
    save_bundle(tmp_path, weights, name="deep", checkpoint_name="deep", graphs="fast", trial=False)
    runtime = load_runtime(load_bundle(tmp_path), threads=1)
    assert sum(runtime.layer_context_frames) == 68 * 4
    warm_up = maybe_warm_up_frames(runtime)
    assert warm_up == 16 * 4
    start = 68 * 4 + 10
    codes = np.random.default_rng(2).integers(0, 1024, (start + 20, 32)).astype(np.uint16)
    decoder = runtime.new_decoder()
    seek(decoder, codes, start, None)
    expected = decoder.step(codes[start:])
    assert expected.std() > 0.02
    seek(decoder, codes, start, warm_up)
    assert furthest(decoder.step(codes[start:]), expected) < PCM16_STEP / 2
    seek(decoder, codes, start, 8)
    assert furthest(decoder.step(codes[start:]), expected) > PCM16_STEP  # less would not do


@pytest.mark.parametrize(
    ("step_ms", "second_frames"),
    [
        ({1: 10, 2: 20, 4: 40, 8: 80}, 2),  # any step is quicker than its sound: 80 ms a frame
        ({1: 90, 2: 100, 4: 150, 8: 300}, 2),
        ({1: 240, 2: 250, 4: 300, 8: 500}, 4),
        ({1: 350, 2: 383, 4: 399, 8: 825}, 8),
        ({1: 350, 2: 383, 4: 599, 8: 825}, 8),  # too slow whatever is done: as few gaps as can be
    ],
)
@pytest.mark.parametrize("encodes", [False, True])
def test_the_ramp_begins_where_a_step_is_quicker_than_its_sound(
    member: Member, monkeypatch: pytest.MonkeyPatch, step_ms: dict[int, int], second_frames: int, encodes: bool
) -> None:
    runtime = load_encoder_runtime(member.bundle) if encodes else load_runtime(member.bundle)
    assert ramp_second_frames(runtime) == 2  # of small weights nothing is measured
    clock_ms = 0

    class Slow:
        def step(self, rows: Codes | Sound) -> None:
            nonlocal clock_ms
            clock_ms += step_ms[len(rows) // (member.bundle.format.frame_samples if encodes else 1)]

    monkeypatch.setattr(codecs, "LARGE_BYTES", 0)
    monkeypatch.setattr(runtime, "new_encoder" if encodes else "new_decoder", Slow)
    monkeypatch.setattr("mossnano_stdio.codecs.time.perf_counter", lambda: clock_ms / 1000)
    assert ramp_second_frames(runtime) == second_frames


@pytest.mark.parametrize(("encodes", "graph"), [(False, "fast"), (True, "encode_step")])
def test_the_process_measures_its_ramp_once_and_when_it_is_asked_for(
    member: Member, monkeypatch: pytest.MonkeyPatch, encodes: bool, graph: str
) -> None:
    measured = []

    def measure(runtime: Runtime | EncoderRuntime) -> int:
        measured.append(runtime.graph_name)
        return 8

    monkeypatch.setattr(codecs, "ramp_second_frames", measure)
    engine = {"provider": "cpu", "threads": 1}
    options = {"weights": str(member.bundle.folder), "encode": encodes, "graph": None, "precision": None}
    loaded = load_codec(argparse.Namespace(**options, **engine))
    assert measured == []
    assert loaded.ramp_second_frames() == loaded.ramp_second_frames() == 8
    assert measured == [graph]


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 3, 8, 100])
def test_encoded_goldens(member: Member, chunk_frames: int) -> None:
    encoder = load_encoder_runtime(member.bundle).new_encoder()
    samples = chunk_frames * member.bundle.format.frame_samples
    pieces = [encoder.step(member.wave[start : start + samples]) for start in range(0, len(member.wave), samples)]
    codes = np.concatenate(pieces)
    assert len(codes) == 12
    assert np.array_equal(codes, member.golden("encoded")[:12])


def test_encoded_goldens_as_a_whole(member: Member) -> None:
    codes = load_full_encoder(member.bundle).encode(np.ascontiguousarray(member.golden("wave").T))
    assert len(codes) == 13  # the frame that was begun is kept, but the published encoder does not count it
    assert np.array_equal(codes[:12], member.golden("encoded")[:12])


# --- tools -----------------------------------------------------------------------------------------------------------


def test_check_finds_nothing_wrong(member: Member) -> None:
    outcome = call_tool("check", member.bundle.folder)
    assert outcome.status == 0, outcome.out
    assert b"all is well" in outcome.out


@pytest.mark.parametrize("inside", ["audio_tokenizer", "moss_audio_tokenizer", "codec"])
def test_the_codec_inside_a_text_to_speech_model_is_built(tmp_path: Path, inside: str) -> None:
    (tmp_path / "tts").mkdir()
    (tmp_path / "tts" / CONFIG_NAME).write_text('{"model_type": "moss_tts"}')
    shutil.copytree(REFERENCES / "moss-24k", tmp_path / "tts" / inside)
    outcome = call_tool("build", tmp_path / "tts", tmp_path / "out", "--what", "decode", "--graphs", "fast")
    assert outcome.status == 0, outcome.err
    assert load_bundle(tmp_path / "out").format.sample_rate == 24_000


GRAPHS = {
    ("decode", "fast"): {"fast"},
    ("decode", "official"): {"decode_step", "decode_full"},
    ("decode", "all"): {"decode_step", "decode_full", "fast"},
    ("encode", "fast"): {"encode_step"},
    ("encode", "official"): {"encode"},
    ("encode", "all"): {"encode", "encode_step"},
    ("all", "fast"): {"fast", "encode_step"},
    ("all", "official"): {"decode_step", "decode_full", "encode"},
}


@pytest.mark.parametrize(("what", "graphs"), GRAPHS)
def test_a_part_of_the_graphs(tmp_path: Path, what: str, graphs: str) -> None:
    reference = REFERENCES / "moss-24k"
    outcome = call_tool("build", reference, tmp_path, "--what", what, "--graphs", graphs)
    assert outcome.status == 0, outcome.err
    bundle = load_bundle(tmp_path)
    assert set(bundle.graphs) == GRAPHS[what, graphs]
    assert call_tool("check", tmp_path).status == call_tool("info", tmp_path).status == 0
    if what == "encode":
        wave = np.repeat(np.load(reference / "wave.npy").T, 3, axis=0)  # past what always fits
        assert load_encoder(bundle).format.quantizers == 32
        if "encode" in bundle.graphs:
            assert len(load_full_encoder(bundle).encode(wave)) == 37
        with pytest.raises(BundleError, match="has no decoder; `mossnano build` makes one"):
            load_runtime(bundle)
    else:
        found = load_runtime(bundle).new_decoder().step(np.load(reference / "codes.npy").astype(np.uint16))
        assert furthest(found, np.ascontiguousarray(np.load(reference / "audio.npy").T)) < TOLERANCE


def test_our_graphs_come_out_of_the_official_ones_as_out_of_the_checkpoint(member: Member, tmp_path: Path) -> None:
    outcome = call_tool("build", "--from-bundle", member.bundle.folder, tmp_path)
    assert outcome.status == 0, outcome.err
    for graph in ("fast", "encode_step"):
        for file in member.bundle.graph(graph).files:
            assert (tmp_path / file.path.name).read_bytes() == file.path.read_bytes(), file.path.name


def test_a_folder_without_official_graphs_has_no_weights_to_take_out(tmp_path: Path) -> None:
    build_standin(tmp_path / "mimi", "tiny", 0, model="mimi", trial=False)
    weights = load_checkpoint(REFERENCES / "moss-24k", "decode")
    save_bundle(tmp_path / "24k", weights, name="f", checkpoint_name="f", graphs="fast", trial=False)
    for folder in (tmp_path / "mimi", tmp_path / "24k"):
        outcome = call_tool("build", "--from-bundle", folder, tmp_path / "out")
        assert outcome.status == 66
        assert f"{folder}: has no official graphs that decode" in outcome.error_line
        assert f"`mossnano build CHECKPOINT_DIR {tmp_path / 'out'}` builds graphs" in outcome.error_line


def test_an_official_graph_that_is_not_there_is_missed(tmp_path: Path) -> None:
    assert call_tool("build", REFERENCES / "moss-24k", tmp_path, "--what", "decode", "--graphs", "fast").status == 0
    with pytest.raises(BundleError, match="has no official graph; `mossnano build` makes one of a checkpoint"):
        load_runtime(load_bundle(tmp_path), graph="official")


def test_a_shard_of_the_other_side_may_be_missing(tmp_path: Path) -> None:
    reference = REFERENCES / "moss-v2"
    tensors = load_file(reference / SINGLE_NAME)
    placed = {name: "1.safetensors" if name.startswith("encoder.") else "2.safetensors" for name in tensors}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": placed}))
    save_file({name: tensors[name] for name in tensors if placed[name] == "2.safetensors"}, tmp_path / "2.safetensors")
    shutil.copyfile(reference / CONFIG_NAME, tmp_path / CONFIG_NAME)
    outcome = call_tool("build", tmp_path, tmp_path, "--what", "decode", "--graphs", "fast")
    assert outcome.status == 0, outcome.err
    outcome = call_tool("build", tmp_path, tmp_path)
    assert outcome.status == 66
    assert "1.safetensors" in outcome.err


def test_large_graphs_are_tried_in_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LARGE_BYTES", 0)
    monkeypatch.setattr(trial, "try_graphs", None)  # here
    outcome = call_tool("build", REFERENCES / "moss-24k", tmp_path, "--what", "decode")
    assert outcome.status == 0, outcome.err
    with (tmp_path / FAST_DATA).open("r+b") as file:  # as if it had been built wrong
        file.seek(-4000, 2)
        file.write(bytes(2000))
    save_sidecar(tmp_path, replace(load_sidecar(tmp_path), files={}))
    with pytest.raises(CheckFailedError, match=r"the fast graph departs from .* at frame 0 by .* so it is not kept$"):
        trial.try_folders(tmp_path, tmp_path)
    (tmp_path / FAST_DATA).unlink()
    with pytest.raises(BundleError, match=rf"{FAST_DATA}: is not there"):
        trial.try_folders(tmp_path, tmp_path)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((REFERENCES / name / CONFIG_NAME).read_text())
    return config


def contexts(config: dict[str, Any]) -> list[int]:
    return [module.context for module in parse_config(config).decoder if not hasattr(module, "patch")]


def test_one_context_for_all_transformers() -> None:
    config = config_of("moss-24k")
    assert contexts(config) == [8, 16, 32, 64]
    config["causal_transformer_context_duration"] = 0.63  # 7.875 tokens at the least: the first member rounds down
    assert contexts(config) == [7, 15, 31, 63]
    for module in config["decoder_kwargs"][:1]:
        module["context_duration"] = 0.63  # the later ones have their own, or the common one, and round
    assert contexts(config) == [8, 16, 32, 63]


def test_no_context_at_all() -> None:
    config = config_of("moss-24k")
    del config["causal_transformer_context_duration"]
    with pytest.raises(BundleError, match=r"decoder_kwargs\[0\]: the key context_duration is missing"):
        parse_config(config)


def test_a_decoder_that_is_listed_from_its_end() -> None:
    config = config_of("moss-24k")
    expected = parse_config(config)
    backwards = config.pop("decoder_kwargs")[::-1]
    for module in backwards:
        if module["module_type"] == "Transformer":
            ends = module["output_dimension"], module["input_dimension"]
            module["input_dimension"], module["output_dimension"] = ends
    config["reversed_decoder_kwargs"] = backwards
    assert parse_config(config) == expected


@pytest.mark.parametrize("key", ["number_channels", "channels_numbers"])
def test_both_names_of_the_number_of_channels(key: str) -> None:
    config = config_of("moss-v2")
    config[key] = config.pop("number_channels")
    assert parse_config(config).format.channels == 2


@pytest.mark.parametrize("kind", ["rvq", "spec_rvq"])
def test_other_quantizers_are_refused_by_name(kind: str) -> None:
    config = config_of("moss-24k")
    config["quantizer_kwargs"]["quantizer_type"] = kind
    with pytest.raises(BundleError, match=rf"quantizer_type is '{kind}'; graphs can be built for 'rlfq'"):
        parse_config(config)


def test_the_older_layout_leaves_out_what_would_change_nothing() -> None:
    found = transformers(load_checkpoint(REFERENCES / "moss-24k").decoder.modules)
    left_out = [module.maybe_output_proj is None for _, module in found]
    assert left_out == [True, True, True, False]
    assert all(isinstance(module, TransformerWeights) and module.maybe_input_proj is not None for _, module in found)


@pytest.mark.parametrize(
    ("name", "square"),
    [("moss-24k", "decoder.0.output_proj.weight"), ("moss-24k", "encoder.3.input_proj.weight")],
)
def test_a_projection_that_the_layout_does_not_have(tmp_path: Path, name: str, square: str) -> None:
    """The layout is the whole checkpoint's: one tensor more does not make it the other."""
    tensors = load_file(REFERENCES / name / SINGLE_NAME)
    tensors[square] = np.eye(80 if "decoder" in square else 48, dtype=np.float32)
    shutil.copyfile(REFERENCES / name / CONFIG_NAME, tmp_path / CONFIG_NAME)
    save_file(tensors, tmp_path / SINGLE_NAME)
    with pytest.raises(BundleError, match=f"unexpected tensor {square}"):
        load_checkpoint(tmp_path)


def test_a_square_projection_that_the_newer_layout_must_have(tmp_path: Path) -> None:
    square = "decoder.0.output_proj.weight"
    tensors = load_file(REFERENCES / "moss-v2" / SINGLE_NAME)
    assert tensors.pop(square).shape == (80, 80)
    shutil.copyfile(REFERENCES / "moss-v2" / CONFIG_NAME, tmp_path / CONFIG_NAME)
    save_file(tensors, tmp_path / SINGLE_NAME)
    with pytest.raises(BundleError, match=f"the tensor {square} .* is missing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["24k", "v2"])
def test_stand_ins_have_the_shape_of_the_references(tmp_path: Path, model: str) -> None:
    outcome = call_tool("standin", tmp_path, "--model", model)
    assert outcome.status == 0, outcome.err
    assert load_bundle(tmp_path).name == f"{model} tiny stand-in, seed 0"
    reference = load_checkpoint(REFERENCES / f"moss-{model}").decoder
    ours = load_checkpoint(tmp_path / "checkpoint").decoder
    assert ours.format == reference.format
    for (index, one), (other_index, other) in zip(
        transformers(ours.modules), transformers(reference.modules), strict=True
    ):
        assert (index, one.model, one.heads, one.context) == (other_index, other.model, other.heads, other.context)
        assert (one.inputs, one.outputs, len(one.layers)) == (other.inputs, other.outputs, len(other.layers))


def test_the_size_of_nano_is_no_size_of_others(tmp_path: Path) -> None:
    outcome = call_tool("standin", tmp_path, "--model", "24k", "--size", "nano")
    assert outcome.status == 2
    assert "--size nano is a size of --model nano" in outcome.err


# --- as a user has it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(member: Member) -> list[Message]:
    """What the process answers to the golden codes, in chunks of 8 frames."""
    tokens = Message(Kind.TOKENS, pack_frames(member.codes, 1024))
    command = [*PROCESS, "--weights", str(member.bundle.folder), "--chunk-frames", "8"]
    done = run(command, encoded(tokens, Message(Kind.END)))
    assert (done.returncode, done.stderr) == (0, b"")
    return decoded(done.stdout)


def test_the_process_decodes(member: Member, told: list[Message]) -> None:
    said = fields(told[0])
    assert CodecFormat(*(said[field.name] for field in dataclasses.fields(CodecFormat))) == member.bundle.format
    assert said["frame_bytes"] == 40
    assert steps_apart(pcm_of(told), member) <= 1
    assert fields(told[-1])["samples"] == len(member.audio)


def test_the_process_encodes(member: Member) -> None:
    pcm = to_pcm16(member.wave)
    command = [*PROCESS, "--weights", str(member.bundle.folder), "--encode"]
    done = run(command, encoded(*(Message(Kind.AUDIO, pcm[at : at + 9999]) for at in range(0, len(pcm), 9999))))
    messages = decoded(done.stdout)
    codes = unpack_frames(b"".join(message.payload for message in messages if message.kind == Kind.TOKENS), 32, 1024)
    values = np.frombuffer(pcm, "<i2").reshape(-1, member.bundle.format.channels).astype(np.float32)
    assert np.array_equal(codes, load_encoder_runtime(member.bundle).new_encoder().step(values / np.float32(32767)))
    assert (codes == member.golden("encoded")[:12]).mean() > 0.9  # 16 bits are not the float that was encoded there


def test_the_python_clients_hear_what_the_process_says(member: Member, told: list[Message]) -> None:
    arguments = member.bundle.folder, ["--chunk-frames", "8"]
    with Decoder(*arguments) as decoder:
        assert decoder.decode(member.codes) == pcm_of(told)

    async def hear() -> bytes:
        async with AsyncDecoder(*arguments) as decoder:
            return await decoder.decode(member.codes)

    assert asyncio.run(hear()) == pcm_of(told)


def test_the_c_client_hears_what_the_process_says(member: Member, told: list[Message], tmp_path: Path) -> None:
    needs("gcc")
    sources = Path(__file__).parents[1] / "mossnano_stdio" / "clients" / "c"
    subprocess.run(["gcc", "-std=c11", "-pthread", sources / "example.c", "-o", tmp_path / "example"], check=True)
    (tmp_path / "frames").write_bytes(pack_frames(member.codes, 1024))
    command = [*PROCESS, "--weights", str(member.bundle.folder), "--chunk-frames", "8"]
    heard = subprocess.run([tmp_path / "example", tmp_path / "frames", *command], stdout=subprocess.PIPE, check=True)
    assert heard.stdout == pcm_of(told)


def test_the_library_decodes_and_encodes(member: Member) -> None:
    with Codec.load(member.bundle.folder) as codec:
        expected = member.golden("audio")
        assert furthest(codec.decode(member.codes.T), expected) < TOLERANCE
        pieces = list(codec.streaming_decode(iter(member.codes), chunk_frames=3))
        assert furthest(np.concatenate(pieces, axis=1), expected) < TOLERANCE
        samples = member.bundle.format.frame_samples
        part = codec.decode_range(member.codes.T, 4 / 12.5, 5 / 12.5)
        assert furthest(part, expected[:, 4 * samples : 9 * samples]) < PCM16_STEP / 2
        prefix = codec.decode(member.codes.T[:, :8], num_quantizers=8)
        assert furthest(prefix, member.golden("audio_q8")) < TOLERANCE
        codes = codec.encode(member.golden("wave")).codes.T
        assert np.array_equal(codes[:12], member.golden("encoded")[:12])


def test_the_tools_pack_decode_and_encode(member: Member, tmp_path: Path) -> None:
    model = member.reference.name.removeprefix("moss-")
    artifact, wav, part, again = (tmp_path / name for name in ("a.mossnano", "a.wav", "part.wav", "again.mossnano"))
    folder, samples = member.bundle.folder, member.bundle.format.frame_samples
    for arguments in (
        ("pack", member.reference / "codes.npy", artifact, "--model", model),
        ("decode", "--weights", folder, artifact, wav),
        ("decode", "--weights", folder, artifact, part, "--start", 0.32, "--duration", 0.4),
        ("encode", "--weights", folder, wav, again),
    ):
        outcome = call_tool(*arguments)
        assert outcome.status == 0, outcome.err
    assert steps_apart(wav.read_bytes()[44:], member) <= 1
    assert steps_apart(part.read_bytes()[44:], member, 4 * samples, 9 * samples) <= 1
    with again.open("rb") as file:
        assert len(load_artifact(file, "again").codes) == len(member.codes)


def steps_apart(pcm: bytes, member: Member, start: int = 0, end: int | None = None) -> int:
    """How far PCM is from the golden sound, in steps of 16 bits."""
    expected = np.rint(member.audio[start:end] * 32767)
    found = np.frombuffer(pcm, "<i2").reshape(-1, member.bundle.format.channels)
    assert found.shape == expected.shape
    return int(np.abs(found - expected).max())


@pytest.mark.slow
def test_the_process_conforms(member: Member) -> None:
    command = [*PROCESS, "--weights", member.bundle.folder]
    outcome = call_tool("conformance", "--", *command)
    assert outcome.status == 0, outcome.out
