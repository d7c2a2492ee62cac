"""EnCodec at 48 kHz, and `.ecdc` files of both models through the tools and the wire: what EnCodec's own tool gives."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio import Codec, codecs
from mossnano_stdio.build.bundle import build_from_checkpoint, build_standin
from mossnano_stdio.chunks import (
    DecodingChunks,
    Ramp,
    SegmentChunks,
    encode_segments,
    new_decoding_chunks,
    push_recording,
)
from mossnano_stdio.errors import ArtifactError, BundleError, ExitStatus, SettingsError, UsageError
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.protocol import Kind, Message, MessageReader, json_message, parse_json
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE, DECODE_SEGMENTS
from mossnano_stdio.protocol.messages import NUMBERED, in_stream
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcHeader, EcdcSegment, build_ecdc, load_recording
from mossnano_stdio.tools.play.sources import Decoding, Pcm, open_source
from mossnano_stdio.weights import load_bundle
from tests.child import PROCESS, run
from tests.doubles import advance, handle
from tests.oracle import Sound, furthest
from tests.test_encodec import GOLDENS, REFERENCE, SHARED
from tests.tool import call_tool

TOLERANCE = 2e-6
STRIDE, LENGTH = 47_520, 48_000
GOLDENS_48K = dict(np.load(REFERENCE / "goldens48.npz"))


def path_of(name: str) -> Path:
    return REFERENCE / f"{name}.raw.ecdc"


def loaded(path: Path) -> Ecdc:
    with path.open("rb") as file:
        recording = load_recording(file, path.name)
    assert isinstance(recording, Ecdc)
    return recording


@pytest.fixture(scope="module")
def decoder(encodec48_bundle: Path) -> codecs.SegmentDecoder:
    found = codecs.load_decoder(load_bundle(encodec48_bundle), threads=1)
    assert isinstance(found, codecs.SegmentDecoder)
    return found


@pytest.fixture(scope="module")
def encoder(encodec48_bundle: Path) -> codecs.SegmentEncoder:
    found = codecs.load_segment_encoder(load_bundle(encodec48_bundle), threads=1)
    assert isinstance(found, codecs.SegmentEncoder)
    return found


def sound_of(decoder: codecs.SegmentDecoder, recording: Ecdc) -> Sound:
    chunks = SegmentChunks(decoder, Ramp())
    push_recording(chunks, recording)
    pieces = []
    while (audio := chunks._step(1000)) is not None:  # before it becomes PCM16
        pieces.append(audio)
    return np.concatenate(pieces)[: recording.original_samples]


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 12])
def test_segments(decoder: codecs.SegmentDecoder, frames: int) -> None:
    """The first ones are too short to be mirrored without zeros."""
    codes = GOLDENS_48K[f"frame{frames}.codes"].T
    assert furthest(decoder.decode_segment(codes, 0.25), GOLDENS_48K[f"frame{frames}.audio"].T) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "start"),
    [("one", 0), ("few", 0), ("silence", 0), ("second", 46_000), ("long", 46_000), ("long", 94_000)],
)
def test_the_sound_of_files(decoder: codecs.SegmentDecoder, name: str, start: int) -> None:
    """Around the joins, of what is longer than a segment."""
    expected = GOLDENS_48K[f"{name}.audio.{start}" if start else f"{name}.audio"].T
    found = sound_of(decoder, loaded(path_of(name)))
    assert furthest(found[start : start + len(expected)], expected) < TOLERANCE


@pytest.mark.parametrize("block_samples", [999, LENGTH, 1 << 20])
@pytest.mark.parametrize("name", ["one", "few", "second", "silence"])
def test_recordings_become_the_same_files(encoder: codecs.SegmentEncoder, name: str, block_samples: int) -> None:
    """Codes and scales, byte for byte."""
    wave, expected = GOLDENS_48K[f"{name}.wav"].T, loaded(path_of(name))
    blocks = [wave[start : start + block_samples] for start in range(0, len(wave), block_samples)]
    pairs = [*encode_segments(encoder, blocks)]
    assert sum(samples for _, samples in pairs) == len(wave)
    segments = [replace(segment, codes=segment.codes[:, : expected.header.quantizers]) for segment, _ in pairs]
    assert build_ecdc(Ecdc(expected.header, segments)) == path_of(name).read_bytes()


@pytest.mark.parametrize("samples", [47_681, 47_720, 47_840, 95_290])
def test_lengths_that_fail_elsewhere(decoder: codecs.SegmentDecoder, samples: int) -> None:
    """EnCodec's own tool ends with an error, as the last segment ends before the one before it does."""
    header = EcdcHeader("encodec_48khz", samples, 4)
    random = np.random.default_rng(samples)
    segments = [
        EcdcSegment(random.integers(0, 1024, (frames, 4)).astype(np.uint16), 0.1) for frames in header.segment_frames
    ]
    found = sound_of(decoder, Ecdc(header, segments))
    assert len(found) == samples
    # By its definition: all weighted, added, and divided by the sum of the weights.
    sounds = [decoder.decode_segment(segment.codes, 0.1) for segment in segments]
    places = np.arange(1, len(sounds[0]) + 1) / (len(sounds[0]) + 1)
    weights = 0.5 - np.abs(places - 0.5)
    total, weight = np.zeros((200_000, 2)), np.zeros((200_000, 1))
    for number, sound in enumerate(sounds):
        start, end = number * STRIDE, number * STRIDE + len(sound)
        total[start:end] += weights[: len(sound), np.newaxis] * sound
        weight[start:end] += weights[: len(sound), np.newaxis]
    assert furthest(found, total[:samples] / weight[:samples]) < TOLERANCE


@pytest.mark.skipif(not SHARED.exists(), reason="the larger goldens lie beside a checkout only")
def test_what_transformers_saves(tmp_path: Path) -> None:
    build_from_checkpoint(SHARED / "hf-48k", tmp_path)
    goldens = np.load(SHARED / "hf-48k" / "goldens.npz")
    found = codecs.load_decoder(load_bundle(tmp_path), threads=1)
    assert isinstance(found, codecs.SegmentDecoder)
    codes = goldens["codes"].T
    assert furthest(found.decode_segment(codes, 1.0), goldens["audio"].T) < 2e-5
    assert furthest(found.decode_segment(codes[:, : codes.shape[1] // 2], 1.0), goldens["audio_half"].T) < 2e-5


# --- what is refused ----------------------------------------------------------------------------------------------


def test_codes_without_scales_are_refused(encodec48_bundle: Path, decoder: codecs.SegmentDecoder) -> None:
    with pytest.raises(UsageError, match="frames of codes alone have none"):
        decoder.step(np.zeros((150, 4), np.uint16))
    with pytest.raises(ArtifactError, match="each with a scale"):
        SegmentChunks(decoder, Ramp()).push(np.zeros((150, 4), np.uint16))
    for load in (Codec.load, lambda weights: codecs.load_encoder_runtime(load_bundle(weights))):
        with pytest.raises(BundleError, match="segments of a second"):
            load(encodec48_bundle)


@pytest.mark.parametrize(
    ("name", "error"),
    [("v60.raw.24k", "is of encodec_24khz, whose sample_rate is 24000; these weights decode 48000 only")],
)
def test_files_of_the_other_model(encodec48_bundle: Path, name: str, error: str) -> None:
    code, _, said = call_tool("decode", REFERENCE / f"{name}.ecdc", "-", "--weights", encodec48_bundle)
    assert (code, error in said) == (ExitStatus.BAD_INPUT, True)


def test_more_quantizers_than_the_weights_have(encodec48_bundle: Path, tmp_path: Path) -> None:
    codes = np.zeros((1, 5), np.uint16)
    header = EcdcHeader("encodec_48khz", 320, 5)
    (tmp_path / "five.ecdc").write_bytes(build_ecdc(Ecdc(header, [EcdcSegment(codes, 1.0)])))
    code, _, said = call_tool("decode", tmp_path / "five.ecdc", "-", "--weights", encodec48_bundle)
    assert (code, "are 5, these weights decode 1 to 4" in said) == (ExitStatus.BAD_INPUT, True)


# --- the wire -----------------------------------------------------------------------------------------------------


def answers_to(connection: Connection, messages: Iterable[Message]) -> Iterator[Message]:
    for message in messages:
        yield from handle(connection, message)
        while connection.due_lanes():
            yield from advance(connection)


def pieces_of(data: bytes, size: int) -> list[Message]:
    return [Message(Kind.ARTIFACT, data[start : start + size]) for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_artifact_messages(decoder: codecs.SegmentDecoder, size: int) -> None:
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    handshake = parse_json(connection.handshake())
    assert (handshake["first_chunk_frames"], handshake["segment_frames"]) == (150, 150)
    data = path_of("long").read_bytes()
    *audio, end = answers_to(connection, pieces_of(data, size))
    assert b"".join(answer.payload for answer in audio) == to_pcm16(sound_of(decoder, loaded(path_of("long"))))
    said = parse_json(end)
    assert (said["frames"], said["samples"], said["errors"]) == (321, 101_567, 0)


def test_sound_comes_a_segment_at_a_time(decoder: codecs.SegmentDecoder) -> None:
    """What the next segment fades in over waits for it."""
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    data = path_of("long").read_bytes()
    header_bytes = 9 + int.from_bytes(data[5:9], "big")
    came = [*answers_to(connection, pieces_of(data[: header_bytes + 4 + 749], 1 << 20))]
    assert came == []
    came = [*answers_to(connection, pieces_of(data[header_bytes + 753 : header_bytes + 754], 1 << 20))]
    assert sum(len(answer.payload) for answer in came) == STRIDE * 4


def test_tokens_are_refused_with_the_reason(decoder: codecs.SegmentDecoder) -> None:
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    tokens = Message(Kind.TOKENS, bytes(5))
    error, end = answers_to(connection, [tokens, tokens, Message(Kind.END)])
    assert "each with a scale, which codes alone do not hold" in parse_json(error)["message"]
    assert parse_json(error)["code"] == "bad_tokens"
    assert parse_json(end)["errors"] == 1
    *audio, _ = answers_to(connection, pieces_of(path_of("few").read_bytes(), 50))
    assert sum(len(answer.payload) for answer in audio) == 700 * 4


def test_a_file_that_is_cut(decoder: codecs.SegmentDecoder) -> None:
    """The segments that came are heard."""
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    data = path_of("long").read_bytes()
    *audio, error, end = answers_to(connection, [*pieces_of(data[:900], 300), Message(Kind.END)])
    assert len(audio) > 0
    assert "cut inside segment 1: " in parse_json(error)["message"]
    assert parse_json(end)["samples"] == STRIDE


def test_what_comes_before_a_cancel_is_not_decoded(decoder: codecs.SegmentDecoder) -> None:
    cancels = [False]
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {}, cancel_waiting=lambda: cancels[0])
    data = path_of("long").read_bytes()
    assert [*answers_to(connection, pieces_of(data[:500], 500))] == []
    cancels[0] = True
    assert [*answers_to(connection, pieces_of(data[500:1500], 500))] == []
    cancels[0] = False
    (end,) = answers_to(connection, [Message(Kind.CANCEL)])
    said = parse_json(end)
    assert (said["cancelled"], said["frames"], said["samples"]) == (True, 0, 0)


def test_a_bad_segment_ends_its_stream_after_those_before_it(decoder: codecs.SegmentDecoder) -> None:
    data = bytearray(path_of("long").read_bytes())
    scale_place = len(data) - 2 * 4 - 750 - 105  # of the second segment
    data[scale_place : scale_place + 4] = b"\x7f\xc0\x00\x00"
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    *audio, error, end, first = answers_to(connection, pieces_of(bytes(data), 1 << 20) + [Message(Kind.END)] * 2)
    assert "the scale of segment 1 is nan" in parse_json(error)["message"]
    assert (len(audio) > 0, parse_json(end)["errors"], first.kind) == (True, 1, Kind.ERROR)


def test_an_ecdc_after_a_bad_one_is_a_stream_of_its_own(decoder: codecs.SegmentDecoder) -> None:
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    bad, good = b"ECDC\x01" + bytes(20), path_of("few").read_bytes()
    kinds = [answer.kind for answer in answers_to(connection, [*pieces_of(bad, 100), *pieces_of(good, 100)])]
    assert kinds == [Kind.ERROR, Kind.END, Kind.AUDIO, Kind.END]


def test_a_causal_file_is_one_segment(encodec24_bundle: Path) -> None:
    runtime = codecs.load_runtime(load_bundle(encodec24_bundle), threads=1)
    connection = Connection(DECODE, runtime.new_decoder, Ramp(), {})
    data = (REFERENCE / "v60.raw.24k.ecdc").read_bytes()
    *audio, end = answers_to(connection, pieces_of(data, 512))
    pcm = b"".join(answer.payload for answer in audio)
    chunks = new_decoding_chunks(runtime.new_decoder(), Ramp())
    assert type(chunks) is DecodingChunks
    push_recording(chunks, loaded(REFERENCE / "v60.raw.24k.ecdc"))
    assert pcm == b"".join(chunk.pcm for chunk in iter(chunks.step, None))
    assert parse_json(end)["samples"] == 60_000 == len(pcm) // 2


def test_a_numbered_stream_sends_no_segment_that_its_credit_does_not_hold(decoder: codecs.SegmentDecoder) -> None:
    def new_connection(window_samples: int) -> Connection:
        settings = {"window_samples": window_samples}
        return Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {}, settings=settings, max_streams=1)

    with pytest.raises(SettingsError, match="48000 samples may have to be sent at once"):
        new_connection(LENGTH - 1)
    connection = new_connection(LENGTH)
    pcm = b""
    samples = []
    granted = [Message(Kind.CREDIT, samples.to_bytes(8, "little")) for samples in (STRIDE + LENGTH, 1 << 40)]
    for message in [*pieces_of(path_of("long").read_bytes(), 700), *granted]:
        for answer in answers_to(connection, [in_stream(1, message)]):
            if answer.kind == Kind.AUDIO | NUMBERED:
                pcm += answer.payload[4:]
        samples.append(len(pcm) // 4)
    assert samples == [0, STRIDE, STRIDE, 2 * STRIDE, 101_567]
    assert pcm == to_pcm16(sound_of(decoder, loaded(path_of("long"))))
    assert not connection.numbered


def test_play_reads_it(encodec48_bundle: Path, decoder: codecs.SegmentDecoder) -> None:
    with path_of("long").open("rb") as file:
        source = open_source(file, "long", Decoding(weights=str(encodec48_bundle), threads=1))
        pcm = b"".join(event.pcm for event in source.events if isinstance(event, Pcm))
    assert (source.sample_rate, source.channels) == (48_000, 2)
    assert pcm == to_pcm16(sound_of(decoder, loaded(path_of("long"))))


def test_not_a_number_is_silence_for_one_segment(encodec48_bundle: Path, decoder: codecs.SegmentDecoder) -> None:
    chunks = SegmentChunks(decoder, Ramp())
    recording = loaded(path_of("long"))
    loud = replace(recording.segments[0], maybe_scale=float("inf"))
    push_recording(chunks, replace(recording, segments=[loud, *recording.segments[1:]]))
    first, second, third = iter(chunks.step, None)
    assert first.error
    assert not any(first.pcm)
    assert (len(first.pcm), second.error, third.error) == (STRIDE * 4, None, None)
    assert any(second.pcm)


# --- tools --------------------------------------------------------------------------------------------------------


def test_the_process_and_the_tools_agree(encodec48_bundle: Path, tmp_path: Path) -> None:
    sound = tmp_path / "long.raw"
    assert call_tool("decode", path_of("long"), sound, "--weights", encodec48_bundle)[0] == ExitStatus.DONE
    framed = tmp_path / "framed"
    assert call_tool("frame", path_of("long"), "--output", framed)[0] == ExitStatus.DONE
    piped = run([*PROCESS, "--weights", str(encodec48_bundle), "--output", "raw"], framed.read_bytes())
    assert piped.stdout == sound.read_bytes()
    part = tmp_path / "part.raw"
    words = ("--start", "0.9", "--duration", "0.25")
    assert call_tool("decode", path_of("long"), part, "--weights", encodec48_bundle, *words)[0] == ExitStatus.DONE
    assert part.read_bytes() == sound.read_bytes()[43_200 * 4 : 55_200 * 4]


def test_encode_writes_files_of_both_models(encodec48_bundle: Path, encodec24_bundle: Path, tmp_path: Path) -> None:
    for weights, name, wave in (
        (encodec48_bundle, "second", GOLDENS_48K["second.wav"]),
        (encodec24_bundle, "v60", GOLDENS["v60.wav"]),
    ):
        rate = 48_000 if weights == encodec48_bundle else 24_000
        _save_float_wav(tmp_path / "in.wav", wave.T, rate)
        golden = path_of(name) if weights == encodec48_bundle else REFERENCE / "v60.raw.24k.ecdc"
        code, out, said = call_tool(
            "encode", tmp_path / "in.wav", tmp_path / "out.ecdc", "--weights", weights, "--json"
        )
        assert code == ExitStatus.DONE, said
        assert (tmp_path / "out.ecdc").read_bytes() == golden.read_bytes()
        assert json.loads(out)["file_bytes"] == golden.stat().st_size
    code, _, said = call_tool("encode", tmp_path / "in.wav", tmp_path / "out.mossnano", "--weights", encodec48_bundle)
    assert (code, "an .ecdc alone holds" in said) == (ExitStatus.USAGE, True)


def _save_float_wav(path: Path, audio: Sound, sample_rate: int) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(path, audio, sample_rate, subtype="FLOAT")


def test_tools_that_know_frames_or_transformers_only(
    encodec48_bundle: Path, encodec24_bundle: Path, tmp_path: Path
) -> None:
    code, out, _ = call_tool("info", encodec48_bundle, "--json")
    assert (code, json.loads(out)["caches"]) == (ExitStatus.DONE, 0)
    code, _, said = call_tool("bench", "--weights", encodec48_bundle, "--steps")
    assert (code, "segments of a second" in said) == (ExitStatus.NO_WEIGHTS, True)
    np.save(tmp_path / "codes.npy", np.zeros((9, 8), np.uint16))
    _save_float_wav(tmp_path / "other.wav", np.zeros((9 * 320, 1), np.float32), 24_000)
    code, _, said = call_tool("diagnose", "--weights", encodec24_bundle, tmp_path / "codes.npy", tmp_path / "other.wav")
    assert (code, "is known here of those with transformers" in said) == (ExitStatus.USAGE, True)


def test_bytes_beyond_the_end_are_told_after_the_sound(decoder: codecs.SegmentDecoder) -> None:
    connection = Connection(DECODE_SEGMENTS, lambda: decoder, Ramp(), {})
    message = Message(Kind.ARTIFACT, path_of("few").read_bytes() + b"x")
    *audio, error, end = answers_to(connection, [message, Message(Kind.END)])
    assert b"".join(answer.payload for answer in audio) == to_pcm16(sound_of(decoder, loaded(path_of("few"))))
    assert "beyond" in parse_json(error)["message"]
    assert parse_json(end)["samples"] == 700


def test_other_codecs_write_no_ecdc(tmp_path: Path) -> None:
    _save_float_wav(tmp_path / "in.wav", np.zeros((480, 2), np.float32), 48_000)
    code, _, said = call_tool("encode", tmp_path / "in.wav", tmp_path / "out.ecdc", "--weights", "demo")
    assert code != ExitStatus.DONE
    assert not (tmp_path / "out.ecdc").exists()
    assert said


def test_frame_as_tokens(tmp_path: Path) -> None:
    code, _, said = call_tool("frame", "--as", "tokens", path_of("few"), "--output", tmp_path / "no")
    assert (code, "TOKENS do not hold" in said) == (ExitStatus.BAD_INPUT, True)
    code, _, _ = call_tool("frame", "--as", "tokens", REFERENCE / "v60.raw.24k.ecdc", "--output", tmp_path / "yes")
    assert code == ExitStatus.DONE


def test_flags_that_mean_nothing_to_segments(encodec48_bundle: Path) -> None:
    for words in (["--chunk-frames", "8"], ["--stop-on-zero-frame"]):
        code, _, said = call_tool("decode", path_of("few"), "-", "--weights", encodec48_bundle, *words)
        assert (code, "means nothing to a codec with segments" in said) == (ExitStatus.USAGE, True)
    ended = run([*PROCESS, "--weights", str(encodec48_bundle), "--stop-on-zero-frame"])
    assert ended.returncode == ExitStatus.USAGE


def test_check_and_stand_in(tmp_path: Path) -> None:
    build_standin(tmp_path, "tiny", 5, model="encodec-48k")
    code, out, _ = call_tool("check", tmp_path)
    assert code == ExitStatus.DONE
    assert b"encode_segment" in out
    assert b"frames of codes, their scale" in out


def test_artifacts_have_no_scales_either(encodec48_bundle: Path, tmp_path: Path) -> None:
    recording = loaded(path_of("few")).as_artifact()
    from mossnano_stdio.tokens import build_artifact

    (tmp_path / "few.mossnano").write_bytes(build_artifact(recording))
    code, _, said = call_tool("decode", tmp_path / "few.mossnano", "-", "--weights", encodec48_bundle)
    assert (code, "each with a scale" in said) == (ExitStatus.BAD_INPUT, True)
    data: Any = io.BytesIO(build_artifact(recording))
    assert load_recording(data, "few").original_samples == 700


@pytest.mark.parametrize(
    ("model", "quantizers"), [("encodec-24k", None), ("encodec-48k", 2), ("mimi", None), ("nano", 3)]
)
def test_a_round_trip_is_encode_and_decode(
    encodec48_bundle: Path, encodec24_bundle: Path, tmp_path: Path, model: str, quantizers: int | None
) -> None:
    weights = {"encodec-24k": encodec24_bundle, "encodec-48k": encodec48_bundle}.get(model, tmp_path / "weights")
    if model in ("mimi", "nano"):
        build_standin(weights, "tiny", 1, model=model, trial=False)
    codec = load_bundle(weights).format
    noise = np.random.default_rng(0).standard_normal((9_001, codec.channels)) / 10
    _save_float_wav(tmp_path / "in.wav", noise.astype(np.float32), codec.sample_rate)
    words = ["--quantizers", quantizers] if quantizers else []
    flags = ("--weights", weights)
    code, out, said = call_tool("roundtrip", tmp_path / "in.wav", tmp_path / "one.wav", *flags, *words, "--json")
    assert code == ExitStatus.DONE, said
    file = tmp_path / ("x.ecdc" if model == "encodec-48k" else "x.mossnano")
    assert call_tool("encode", tmp_path / "in.wav", file, *flags, *words)[0] == ExitStatus.DONE
    chunks = [] if model == "encodec-48k" else ["--chunk-frames", "8"]
    assert call_tool("decode", file, tmp_path / "two.wav", *flags, *chunks)[0] == ExitStatus.DONE
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "two.wav").read_bytes()
    facts = json.loads(out)
    assert (facts["samples"], facts["samples_again"]) == (9_001, 9_001)
    assert facts["quantizers"] == (quantizers or codec.quantizers)
    assert facts["bitrate_bps"] == facts["frames"] * facts["quantizers"] * codec.bits_per_code / facts["seconds"]
    assert facts["encode_seconds"] > 0 < facts["decode_seconds"]
    # The SNR by its definition, of what was written.
    soundfile = pytest.importorskip("soundfile")
    before, after = (soundfile.read(tmp_path / name, always_2d=True)[0] for name in ("in.wav", "one.wav"))
    after = after * 32768 / 32767
    snr = 10 * np.log10(np.square(before).sum() / np.square(after - before).sum())
    assert abs(facts["snr_db"] - snr) < 0.01


def test_a_round_trip_of_nothing(encodec48_bundle: Path, tmp_path: Path) -> None:
    _save_float_wav(tmp_path / "in.wav", np.zeros((0, 2), np.float32), 48_000)
    code, _, said = call_tool("roundtrip", tmp_path / "in.wav", tmp_path / "out.wav", "--weights", encodec48_bundle)
    assert (code, "is empty" in said) == (ExitStatus.BAD_INPUT, True)
    code, _, said = call_tool("roundtrip", tmp_path / "in.wav", "-", "--weights", encodec48_bundle, "--json")
    assert (code, "both want stdout" in said) == (ExitStatus.USAGE, True)


@pytest.mark.parametrize(("rate", "channels", "error"), [(999, 2, "has 999 Hz"), (48_000, 3, "has 3 channels")])
def test_a_round_trip_of_what_no_codec_hears(
    rate: int, channels: int, error: str, encodec48_bundle: Path, tmp_path: Path
) -> None:
    _save_float_wav(tmp_path / "in.wav", np.zeros((9, channels), np.float32), rate)
    code, _, said = call_tool("roundtrip", tmp_path / "in.wav", "-", "--weights", encodec48_bundle)
    assert (code, error in said) == (ExitStatus.BAD_INPUT, True)


@pytest.mark.parametrize("model", ["encodec-24k", "encodec-48k"])
def test_fetch_says_why_it_does_not(model: str) -> None:
    code, _, said = call_tool("fetch", "--model", model)
    assert code == ExitStatus.NO_WEIGHTS
    assert "neither size nor SHA-256 of its files is known" in said
    assert "`mossnano build DIR OUT_DIR`" in said


# --- whose codes they are -----------------------------------------------------------------------------------------


def test_codecs_with_the_same_numbers_are_told_apart(encodec24_bundle: Path) -> None:
    runtime = codecs.load_runtime(load_bundle(encodec24_bundle), threads=1)
    connection = Connection(DECODE, runtime.new_decoder, Ramp(), {"codec": "encodec, tiny"})
    same: dict[str, Any] = {"sample_rate": 24_000, "channels": 1, "quantizers": 8, "codebook_size": 1024}
    misfits: list[tuple[dict[str, Any], str]] = [
        ({"frame_samples": 1_920}, "frame_samples is 1920 there and 320 here"),
        ({"codec": "mimi"}, "codec is 'mimi' there and 'encodec, tiny' here"),
        ({"codec": "MOSS-Audio-Tokenizer"}, "codec is 'MOSS-Audio-Tokenizer' there"),
    ]
    for more, said in misfits:
        (error,) = answers_to(connection, [json_message(Kind.HANDSHAKE, same | more)])
        assert said in parse_json(error)["message"]
    fitting: list[dict[str, Any]] = [{}, {"frame_samples": 320}, {"codec": "encodec of somebody else"}, {"codec": 3}]
    for fits in fitting:
        assert [*answers_to(connection, [json_message(Kind.HANDSHAKE, same | fits)])] == []


def test_an_ecdc_as_tokens_says_whose_codes_it_holds(tmp_path: Path) -> None:
    framed = tmp_path / "framed"
    call_tool("frame", "--as", "tokens", REFERENCE / "v60.raw.24k.ecdc", "--output", framed)
    handshake = next(iter(MessageReader().feed(framed.read_bytes())))
    said = parse_json(handshake)
    assert (said["codec"], said["frame_samples"]) == ("encodec_24khz", 320)


# --- encodec-rs's graphs ------------------------------------------------------------------------------------------

BUNDLE = {
    "schema_version": 1, "model_name": "encodec_48khz", "bandwidth_kbps": 6.0, "sample_rate": 48_000, "channels": 2,
    "segment_samples": LENGTH, "segment_stride": STRIDE, "normalize": True, "num_codebooks": 4, "frame_length": 150,
    "encode_model": "encode_frame.onnx", "decode_model": "decode_frame.onnx", "opset_version": 17,
    "codebook_cardinality": 1024, "a key of its own": {},
}  # fmt: skip


def save_frame_graphs(folder: Path, built: Path) -> Path:
    """Graphs in the contract of encodec-rs's exporter, around those that we build."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def save(
        name: str, source: str, before: list[Any], after: list[Any], inputs: list[Any], outputs: list[Any]
    ) -> None:
        model = onnx.load(built / source)
        graph = model.graph
        for tensor, value in (("firsts", np.arange(4) * 1024), ("axis", [0])):
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"wrapped.{tensor}"))
        nodes = [*before, *graph.node, *after]
        for fields, values in ((graph.node, nodes), (graph.input, inputs), (graph.output, outputs)):
            del fields[:]
            fields.extend(values)
        onnx.save(model, folder / name)

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    long, single = TensorProto.INT64, TensorProto.FLOAT
    codes, scale = value("codes", long, "batch", 4, 150), value("scale", single, "batch", 1)
    save(
        "decode_frame.onnx",
        "encodec_decode_segment.onnx",
        [
            helper.make_node("Squeeze", ["codes", "wrapped.axis"], ["wrapped.narrow"]),
            helper.make_node("Transpose", ["wrapped.narrow"], ["wrapped.turned"], perm=[1, 0]),
            helper.make_node("Add", ["wrapped.turned", "wrapped.firsts"], ["wrapped.rows"]),
            helper.make_node("Cast", ["wrapped.rows"], ["rows"], to=TensorProto.INT32),
        ],
        [
            helper.make_node("Mul", ["audio", "scale"], ["wrapped.scaled"]),
            helper.make_node("Transpose", ["wrapped.scaled"], ["wrapped.sound"], perm=[1, 0]),
            helper.make_node("Unsqueeze", ["wrapped.sound", "wrapped.axis"], ["sound"]),
        ],
        [codes, scale],
        [value("sound", single, "batch", 2, LENGTH)],
    )
    mono = [
        helper.make_node("ReduceMean", ["wave"], ["wrapped.mono"], axes=[1]),
        helper.make_node("Mul", ["wrapped.mono", "wrapped.mono"], ["wrapped.squares"]),
        helper.make_node("ReduceMean", ["wrapped.squares"], ["wrapped.power"], axes=[1, 2], keepdims=0),
        helper.make_node("Sqrt", ["wrapped.power"], ["wrapped.level"]),
        helper.make_node("Unsqueeze", ["wrapped.level", "wrapped.axis"], ["scale"]),
        helper.make_node("Squeeze", ["wave", "wrapped.axis"], ["wrapped.one"]),
        helper.make_node("Transpose", ["wrapped.one"], ["wrapped.turned"], perm=[1, 0]),
        helper.make_node("Div", ["wrapped.turned", "scale"], ["audio"]),
    ]
    after = [
        helper.make_node("Transpose", ["codes"], ["wrapped.codes"], perm=[1, 0]),
        helper.make_node("Unsqueeze", ["wrapped.codes", "wrapped.axis"], ["wrapped.wide"]),
        helper.make_node("Cast", ["wrapped.wide"], ["found"], to=TensorProto.INT64),
    ]
    outputs = [value("found", long, "batch", 4, 150), scale]
    waves = [value("wave", single, "batch", 2, LENGTH)]
    save("encode_frame.onnx", "encodec_encode_segment.onnx", mono, after, waves, outputs)
    (folder / "bundle.json").write_text(json.dumps(BUNDLE))
    return folder


@pytest.fixture(scope="module")
def frame_graphs(tmp_path_factory: pytest.TempPathFactory, encodec48_bundle: Path) -> Path:
    source = save_frame_graphs(tmp_path_factory.mktemp("wrapped"), encodec48_bundle)
    build_from_checkpoint(source, source / "built")
    for name in ("decode_frame.onnx", "encode_frame.onnx"):
        assert (source / "built" / name).read_bytes() == (source / name).read_bytes()
    return source / "built"


def test_frame_graphs_as_they_are(frame_graphs: Path, decoder: codecs.SegmentDecoder) -> None:
    bundle = load_bundle(frame_graphs)
    framed = codecs.load_decoder(bundle, threads=1)
    assert isinstance(framed, codecs.SegmentDecoder)
    second = loaded(path_of("second"))
    whole, tail = second.segments
    assert furthest(framed.decode_segment(whole.codes, 0.5), decoder.decode_segment(whole.codes, 0.5)) < TOLERANCE
    padded = np.concatenate([tail.codes, np.zeros((148, 4), np.uint16)])
    expected = decoder.decode_segment(padded, 0.5)[:640]
    assert furthest(framed.decode_segment(tail.codes, 0.5), expected) < TOLERANCE
    encoder = codecs.load_segment_encoder(bundle, threads=1)
    wave = GOLDENS_48K["second.wav"].T
    codes, scale = encoder.encode_segment(wave)
    assert np.array_equal(codes, whole.codes)
    assert abs(scale - (whole.maybe_scale or 0)) < 1e-7
    assert [len(encoder.encode_segment(wave[:samples])[0]) for samples in (1, 320, 321)] == [1, 1, 2]


def test_frame_graphs_take_all_codebooks_only(frame_graphs: Path, tmp_path: Path) -> None:
    assert call_tool("decode", path_of("long"), tmp_path / "x.wav", "--weights", frame_graphs)[0] == ExitStatus.DONE
    assert call_tool("check", frame_graphs)[0] == ExitStatus.DONE
    code, _, said = call_tool("decode", path_of("long3k"), "-", "--weights", frame_graphs)
    assert (code, "(nc) are 2, these weights decode 4 only" in said) == (ExitStatus.BAD_INPUT, True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"segment_samples": 64_000}, "segment_samples is 64000, allowed is 48000"),
        ({"schema_version": 2}, "schema_version is 2, allowed is 1"),
        ({"model_name": "encodec_24khz"}, "model_name is"),
        ({"normalize": False}, "normalize is false, allowed is true"),
        ({"num_codebooks": 17}, "num_codebooks is 17"),
        ({"num_codebooks": 8}, "the metadata says"),
        ({"decode_model": "../decode_frame.onnx"}, "a file in the same folder"),
        ({"decode_model": "other.onnx"}, "is not there, but"),
    ],
)
def test_bundles_that_are_not_taken(frame_graphs: Path, tmp_path: Path, change: dict[str, Any], error: str) -> None:
    for name in ("decode_frame.onnx", "encode_frame.onnx"):
        (tmp_path / name).write_bytes((frame_graphs / name).read_bytes())
    (tmp_path / "bundle.json").write_text(json.dumps(BUNDLE | change))
    with pytest.raises(BundleError, match=error):
        build_from_checkpoint(tmp_path, tmp_path / "built")
    assert not (tmp_path / "built").exists()
