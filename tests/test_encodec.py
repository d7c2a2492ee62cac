"""build/encodec_*.py and codecs/encodec.py: the sound and codes of EnCodec's own tool, whatever the chunks."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mossnano_stdio import Codec, codecs
from mossnano_stdio.build.bundle import build_from_checkpoint, build_standin
from mossnano_stdio.build.encodec_checkpoint import load_encodec, maybe_encodec_file, transformers_name
from mossnano_stdio.build.step_graph import StepGraph
from mossnano_stdio.chunks import DecodingChunks, EncodingChunks, Fixed, Ramp, Schedule, plan
from mossnano_stdio.codecs import encodec
from mossnano_stdio.errors import BundleError, SettingsError, UsageError
from mossnano_stdio.protocol import Kind, Message, parse_json
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE
from mossnano_stdio.protocol.messages import NUMBERED, in_stream
from mossnano_stdio.tokens import Codes, pack_frames
from mossnano_stdio.weights import load_bundle
from tests.conftest import save_encodec_checkpoint, skip_if_nothing_can_be_built
from tests.doubles import advance, handle
from tests.oracle import Sound, furthest
from tests.test_mimi import assert_equal

REFERENCE = Path(__file__).parent / "reference" / "encodec"
SHARED = Path(__file__).parents[2] / "shared" / "reference" / "encodec"
TOLERANCE = 2e-6  # of the goldens
PCM16_STEP = 1 / 32767
FIRST, FRAME_SAMPLES, QUANTIZERS = 7, 320, 8
GOLDENS = dict(np.load(REFERENCE / "goldens24.npz"))

CODES: Codes = np.ascontiguousarray(GOLDENS["v60.codes"].T)
AUDIO: Sound = GOLDENS["v60.audio"].T  # 60,000 samples: the last frame is cut
WAVE: Sound = np.ascontiguousarray(GOLDENS["v60.wav"].T)
FRAMES = len(CODES)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trial that every build has compares all graphs with each other."""
    skip_if_nothing_can_be_built()
    built = tmp_path_factory.mktemp("standin")
    build_standin(built, "tiny", 3, model="encodec-24k")
    return built


@pytest.fixture(scope="module")
def runtime(encodec24_bundle: Path) -> encodec.EncodecRuntime:
    found = codecs.load_runtime(load_bundle(encodec24_bundle), threads=1)
    assert isinstance(found, encodec.EncodecRuntime)
    return found


@pytest.fixture(scope="module")
def encoder_runtime(encodec24_bundle: Path) -> encodec.EncodecEncoderRuntime:
    found = codecs.load_encoder_runtime(load_bundle(encodec24_bundle), threads=1)
    assert isinstance(found, encodec.EncodecEncoderRuntime)
    return found


def in_chunks(decoder: codecs.SeekingDecoder, codes: Codes, chunk_frames: int) -> Sound:
    chunks = plan(len(codes), Fixed(chunk_frames), FIRST)
    return np.concatenate([decoder.step(codes[start : start + count]) for start, count in chunks])


def encoded_in_chunks(runtime: encodec.EncodecEncoderRuntime, wave: Sound, schedule: Schedule) -> Codes:
    chunks = EncodingChunks(runtime.new_encoder(), schedule)
    chunks.push(wave)
    chunks.finish()
    pieces = []
    while (codes := chunks.step()) is not None:
        pieces.append(codes)
    return np.concatenate(pieces)


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 3, 8, FRAMES])
def test_sound_in_chunks(runtime: encodec.EncodecRuntime, chunk_frames: int) -> None:
    assert furthest(in_chunks(runtime.new_decoder(), CODES, chunk_frames)[: len(AUDIO)], AUDIO) < TOLERANCE


@pytest.mark.parametrize("schedule", [Ramp(), Fixed(1), Fixed(25)])
def test_codes_in_chunks(encoder_runtime: encodec.EncodecEncoderRuntime, schedule: Schedule) -> None:
    assert np.array_equal(encoded_in_chunks(encoder_runtime, WAVE, schedule), CODES)


def test_a_recording_that_is_too_short_to_be_mirrored(
    runtime: encodec.EncodecRuntime, encoder_runtime: encodec.EncodecEncoderRuntime
) -> None:
    """1,501 samples in 5 frames, of 2 codebooks."""
    codes = GOLDENS["v1501.codes"].T
    assert furthest(runtime.new_decoder().step(codes)[:1501], GOLDENS["v1501.audio"].T) < TOLERANCE
    encoded = encoded_in_chunks(encoder_runtime, GOLDENS["v1501.wav"].T, Ramp())
    assert np.array_equal(encoded[:, :2], codes)


def test_whole_files(encodec24_bundle: Path) -> None:
    bundle = load_bundle(encodec24_bundle)
    assert furthest(codecs.load_full_decoder(bundle, threads=1).decode(CODES)[: len(AUDIO)], AUDIO) < TOLERANCE
    encoder = codecs.load_full_encoder(bundle, threads=1)
    assert np.array_equal(encoder.encode(WAVE), CODES)
    assert np.array_equal(encoder.encode(GOLDENS["v1501.wav"].T)[:, :2], GOLDENS["v1501.codes"].T)


@pytest.mark.parametrize("frames", range(1, 10))
def test_short_streams_are_as_they_are_whole(
    encodec24_bundle: Path, runtime: encodec.EncodecRuntime, frames: int
) -> None:
    whole = codecs.load_full_decoder(load_bundle(encodec24_bundle), threads=1).decode(CODES[:frames])
    assert furthest(in_chunks(runtime.new_decoder(), CODES[:frames], 1), whole) < TOLERANCE


def test_every_end_is_completed_as_in_a_whole_recording(
    encodec24_bundle: Path, encoder_runtime: encodec.EncodecEncoderRuntime
) -> None:
    """At each of four strides by mirroring, or by zeros where there is too little to mirror."""
    full = codecs.load_full_encoder(load_bundle(encodec24_bundle), threads=1)
    lengths = [*range(1, 24), 39, 40, 41, 79, 81, 159, 319, 320, 321, 2239, 2240, 2241, 2243, 3201, 5119]
    for samples in lengths:
        whole = full.encode(WAVE[:samples])
        assert len(whole) == math.ceil(samples / FRAME_SAMPLES)
        assert np.array_equal(encoded_in_chunks(encoder_runtime, WAVE[:samples], Fixed(2)), whole), samples


def test_codebooks_that_are_left_out_add_nothing(
    runtime: encodec.EncodecRuntime, encodec24_bundle: Path, tmp_path: Path
) -> None:
    """As if all their rows were zeros."""
    tensors = load_file(encodec24_bundle / "checkpoint" / "model.safetensors")
    for index in range(3, QUANTIZERS):
        tensors[f"quantizer.vq.layers.{index}._codebook.embed"][:] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    build_from_checkpoint(tmp_path, tmp_path / "built", "decode", "fast")
    expected = codecs.load_decoder(load_bundle(tmp_path / "built"), threads=1).step(CODES[:40])
    assert furthest(runtime.new_decoder().step(CODES[:40, :3]), expected) < TOLERANCE


@pytest.mark.skipif(not SHARED.exists(), reason="the larger goldens lie beside a checkout only")
def test_what_transformers_saves(tmp_path: Path) -> None:
    build_from_checkpoint(SHARED / "hf-24k", tmp_path)
    bundle, goldens = load_bundle(tmp_path), np.load(SHARED / "hf-24k" / "goldens.npz")
    decoder, codes = codecs.load_decoder(bundle, threads=1), goldens["codes"].T
    assert furthest(in_chunks(decoder, codes, 3), goldens["audio"].T) < TOLERANCE
    decoder.reset()
    assert furthest(decoder.step(codes[:, : codes.shape[1] // 2]), goldens["audio_half"].T) < TOLERANCE
    encoder = codecs.load_encoder_runtime(bundle, threads=1)
    assert isinstance(encoder, encodec.EncodecEncoderRuntime)
    assert np.array_equal(encoded_in_chunks(encoder, goldens["wave"].T, Ramp()), goldens["encoded"][0, 0].T)


# --- the state ----------------------------------------------------------------------------------------------------


def test_every_lost_state_is_heard(standin: Path) -> None:
    decoder = codecs.load_decoder(load_bundle(standin), threads=1)
    decoder.step(CODES[:12])
    snapshot = decoder.snapshot()
    expected = decoder.step(CODES[12:16])
    assert len(snapshot.states) == 1 + 6 + 4 + 4  # whether it began; convolutions, transposed ones, LSTM
    for index, state in enumerate(snapshot.states):
        states = [*snapshot.states]
        states[index] = np.zeros_like(state)
        decoder.restore(replace(snapshot, states=tuple(states)))
        assert furthest(decoder.step(CODES[12:16]), expected) > 20 * PCM16_STEP, index
    decoder.restore(snapshot)
    assert np.array_equal(decoder.step(CODES[12:16]), expected)


def test_a_reset_resets_everything(
    runtime: encodec.EncodecRuntime, encoder_runtime: encodec.EncodecEncoderRuntime
) -> None:
    decoder, encoder = runtime.new_decoder(), encoder_runtime.new_encoder()
    decoder.step(CODES[::-1])
    decoder.reset()
    assert furthest(decoder.step(CODES)[: len(AUDIO)], AUDIO) < TOLERANCE
    encoder.step(WAVE[::-1][:1234].copy())
    with pytest.raises(UsageError, match="has ended inside a frame"):
        encoder.step(WAVE[:FRAME_SAMPLES])
    encoder.reset()
    assert np.array_equal(encoder.step(WAVE), CODES)


def test_a_stream_that_goes_on_begins_with_enough_frames(
    runtime: encodec.EncodecRuntime, encoder_runtime: encodec.EncodecEncoderRuntime
) -> None:
    decoder, encoder = runtime.new_decoder(), encoder_runtime.new_encoder()
    decoder.step(CODES[:6])
    with pytest.raises(UsageError, match=r"began with 6 frames, as if they were all; .* begins with 7 or more"):
        decoder.step(CODES[6:])
    encoder.step(WAVE[:FRAME_SAMPLES])
    with pytest.raises(UsageError, match="began with 1 frames"):
        encoder.step(WAVE[FRAME_SAMPLES:])


@pytest.mark.parametrize("first", [0, 2, 6, 7, 20])
def test_a_part_sounds_as_in_the_whole(encodec24_bundle: Path, first: int) -> None:
    with Codec.load(encodec24_bundle, threads=1) as codec:
        assert codec.context_seconds == codec.warm_up_seconds == math.inf
        rate = codec.sample_rate
        part = codec.decode_range(CODES, start=first * FRAME_SAMPLES / rate, duration=2.5 * FRAME_SAMPLES / rate)
    start = first * FRAME_SAMPLES
    assert furthest(part.T, AUDIO[start : start + 800]) < TOLERANCE


def test_the_library_gives_the_first_frames_together(encodec24_bundle: Path) -> None:
    with Codec.load(encodec24_bundle, threads=1) as codec:
        pieces = [*codec.streaming_decode(CODES[:12], chunk_frames=2)]
        assert [piece.shape[1] // FRAME_SAMPLES for piece in pieces] == [7, 2, 2, 1]
        assert furthest(np.concatenate(pieces, axis=1).T[: 5 * FRAME_SAMPLES], AUDIO[: 5 * FRAME_SAMPLES]) < TOLERANCE
        assert furthest(codec.decode(CODES, chunk_duration=1 / 75).T[: len(AUDIO)], AUDIO) < TOLERANCE
        encoded = codec.encode(WAVE[:60_000].T)
        assert (encoded.original_samples, encoded.frames) == (60_000, FRAMES)
        assert np.array_equal(encoded.artifact.codes, CODES)


# --- chunks and the wire ------------------------------------------------------------------------------------------


def test_frames_that_wait_for_the_first_chunk_are_not_due(runtime: encodec.EncodecRuntime) -> None:
    chunks = DecodingChunks(runtime.new_decoder(), Ramp())
    chunks.push(CODES[:6])
    assert (chunks.due_frames, chunks.is_sated) == (0, False)
    chunks.push(CODES[6:8])
    assert (chunks.due_frames, chunks.is_sated) == (7, True)
    assert chunks.step()
    assert chunks.due_frames == 1
    chunks.reset()
    chunks.push(CODES[:2])
    assert chunks.due_frames == 0
    chunks.finish()
    assert chunks.due_frames == 2
    fixed = DecodingChunks(runtime.new_decoder(), Fixed(10))
    fixed.push(CODES[:8])
    assert (fixed.due_frames, fixed.is_sated) == (0, False)


def answers_to(connection: Connection, message: Message) -> Iterator[Message]:
    yield from handle(connection, message)
    while connection.due_lanes():
        yield from advance(connection)


def test_the_handshake_says_how_many_frames_come_first(runtime: encodec.EncodecRuntime) -> None:
    connection = Connection(DECODE, runtime.new_decoder, Ramp(), {})
    assert parse_json(connection.handshake())["first_chunk_frames"] == FIRST
    pcm = b""
    for start in range(0, FRAMES, 5):
        tokens = Message(Kind.TOKENS, pack_frames(CODES[start : start + 5], 1024))
        for answer in answers_to(connection, tokens):
            assert answer.kind == Kind.AUDIO
            pcm += answer.payload
        assert bool(pcm) == (start > 0)
    answers = [*answers_to(connection, Message(Kind.END))]
    pcm += b"".join(answer.payload for answer in answers[:-1])
    sound = np.frombuffer(pcm, "<i2").astype(np.float32)[:, np.newaxis] * np.float32(PCM16_STEP)
    assert furthest(sound[: len(AUDIO)], AUDIO.clip(-1, 1)) < PCM16_STEP  # as loud as it can be, here and there


def test_credit_never_cuts_the_first_chunk(runtime: encodec.EncodecRuntime) -> None:
    """Nor is the window smaller than it; later chunks are cut as usual."""
    connection = Connection(DECODE, runtime.new_decoder, Ramp(), {}, settings={"window_samples": 2_300}, max_streams=1)
    tokens = Message(Kind.TOKENS, pack_frames(CODES[:20], 1024))
    sent = []
    for message in (tokens, Message(Kind.CREDIT, (2_240 + 320).to_bytes(8, "little")), Message(Kind.END)):
        answers = [*answers_to(connection, in_stream(1, message))]
        sent.append([(len(answer.payload) - 4) // 640 for answer in answers if answer.kind == Kind.AUDIO | NUMBERED])
    assert sent == [[7], [1], []]
    with pytest.raises(SettingsError, match="2240 samples may have to be sent at once"):
        Connection(DECODE, runtime.new_decoder, Ramp(), {}, settings={"window_samples": 2_239}, max_streams=1)


# --- checkpoints --------------------------------------------------------------------------------------------------


def _new_spelling(name: str) -> str:
    name = transformers_name(name)
    for part, suffix in enumerate(("weight_g", "weight_v")):
        name = name.replace(suffix, f"parametrizations.weight.original{part}")
    return name


CONFIG = {
    "model_type": "encodec",
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "chunk_length_s": None,
    "overlap": None,
    "norm_type": "weight_norm",
    "normalize": False,
    "num_filters": 2,
    "upsampling_ratios": [8, 5, 4, 2],
    "use_causal_conv": True,
    "pad_mode": "reflect",
}


@pytest.mark.parametrize("rename", [transformers_name, _new_spelling])
def test_all_names_hold_the_same(encodec24_bundle: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    own = encodec24_bundle / "checkpoint" / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(own).items()}
    assert not tensors.keys() & load_file(own).keys() - {name for name in tensors if "lstm" in name}
    tensors |= {"quantizer.layers.0.codebook.inited": np.ones(1, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = maybe_encodec_file(tmp_path)
    assert found
    assert_equal(load_encodec(found), load_encodec(own), "weights")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_filters": 3}, r"config\.json: num_filters is 3, allowed is 2"),
        ({"use_causal_conv": False}, "use_causal_conv is false, allowed is true"),
        ({"pad_mode": "constant"}, 'pad_mode is "constant", allowed is "reflect"'),
        ({"upsampling_ratios": [8, 5, 2, 4]}, r"upsampling_ratios is \[8, 5, 2, 4\]"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"chunk_length_s": -1}, "chunk_length_s is -1, allowed is a number above 0"),
        ({"num_residual_layers": 2}, "num_residual_layers is 2, allowed is 1"),
    ],
)
def test_configs_that_say_otherwise(encodec24_bundle: Path, tmp_path: Path, change: dict[str, Any], error: str) -> None:
    save_encodec_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(BundleError, match=error):
        build_from_checkpoint(tmp_path, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_tensors_that_are_missing_or_too_many(encodec24_bundle: Path, tmp_path: Path) -> None:
    own = load_file(encodec24_bundle / "checkpoint" / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in own.items() if name != "decoder.model.1.lstm.bias_hh_l1"}, path)
    with pytest.raises(BundleError, match=r"decoder\.model\.1\.lstm\.bias_hh_l1 \[128\] is missing"):
        load_encodec(path)
    save_file(own | {"decoder.model.1.lstm.more": np.zeros(1, np.float32)}, path)
    with pytest.raises(BundleError, match=r"unexpected tensor decoder\.model\.1\.lstm\.more"):
        load_encodec(path)
    save_file(own | {"decoder.model.0.conv.conv.weight_v": np.zeros((32, 16, 7), np.float32)}, path)
    with pytest.raises(BundleError, match="direction is all zeros"):
        load_encodec(path)


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "encodec_24khz-d7cc33bc.th").write_bytes(pickle.dumps({}))
    for checkpoint in (tmp_path, tmp_path / "encodec_24khz-d7cc33bc.th"):
        with pytest.raises(BundleError, match=r"is a pickle, .*save_file\(.*'encodec_24khz-d7cc33bc.safetensors'"):
            build_from_checkpoint(checkpoint, tmp_path / "built")


def test_stand_ins(standin: Path, tmp_path: Path) -> None:
    bundle = load_bundle(standin)
    assert (bundle.name, bundle.format.quantizers) == ("encodec-24k tiny stand-in, seed 3", 8)
    build_standin(tmp_path, "tiny", 3, model="encodec-24k", trial=False)
    assert (tmp_path / "encodec_encode.data").read_bytes() == (standin / "encodec_encode.data").read_bytes()


def test_a_decoder_that_mirrors_nothing_is_found(
    encodec24_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mossnano_stdio.build import encodec_steps
    from mossnano_stdio.errors import CheckFailedError

    monkeypatch.setattr(encodec_steps._MirroringGraph, "_after_mirror", StepGraph.after_past)
    with pytest.raises(CheckFailedError, match=r"departs from .* at frame 0"):
        build_from_checkpoint(encodec24_bundle / "checkpoint", tmp_path)
