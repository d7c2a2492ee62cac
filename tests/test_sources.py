"""tools/play/sources.py: whatever can be played, by its first bytes: each kind whole, byte by byte, cut, and wrong."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mossnano_stdio.errors import ArtifactError, InputError, MossnanoError, UsageError
from mossnano_stdio.pcm import wav_header
from mossnano_stdio.protocol.messages import Kind, Message, encode_message, in_stream, json_message
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.tools.play.sources import Decoding, EndOfStream, Pcm, Source, open_raw, open_source
from tests.sound import loud_noise

GREETING = {"protocol": 1, "direction": "decode", "sample_rate": 48000, "channels": 2, "sample_format": "s16le"}
NOISE = loud_noise(1000).tobytes()


class Trickle(io.RawIOBase):
    """Gives a few bytes at a time, as a slow pipe does."""

    def __init__(self, data: bytes, step_bytes: int) -> None:
        self._data = io.BytesIO(data)
        self._step_bytes = step_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._data.read(min(self._step_bytes, len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)


def source_of(
    data: bytes,
    step_bytes: int = 1 << 20,
    decoding: Decoding = Decoding(),  # noqa: B008 - frozen
    maybe_number: int | None = None,
) -> Source:
    return open_source(io.BufferedReader(Trickle(data, step_bytes)), "the input", decoding, maybe_number)


def pcm_and_faults(source: Source) -> tuple[bytes, list[str]]:
    events = list(source.events)
    faults = [f"{type(event).__name__}: {event}" for event in events if isinstance(event, MossnanoError)]
    return b"".join(event.pcm for event in events if isinstance(event, Pcm)), faults


def wire(*messages: Message) -> bytes:
    return b"".join(encode_message(*message) for message in messages)


def audio(pcm: bytes) -> Message:
    return Message(Kind.AUDIO, pcm)


def end(**fields: Any) -> Message:
    return json_message(Kind.END, {"stream": 0, "cancelled": False, **fields})


HELLO = json_message(Kind.HANDSHAKE, GREETING)


# --- what mossnano-stdio answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step_bytes", [1, 7, 1 << 20])
def test_an_answer_is_played_whatever_the_pieces_it_comes_in(step_bytes: int) -> None:
    answer = wire(
        HELLO, audio(NOISE[:400]), Message(Kind.PING, b"x"), Message(0x42, b"new"), audio(NOISE[400:]), end(),
        audio(NOISE), end(cancelled=True), audio(NOISE),
    )  # fmt: skip
    source = source_of(answer, step_bytes)
    assert (source.sample_rate, source.channels) == (48000, 2)
    kept = [event.pcm if isinstance(event, Pcm) else event for event in source.events]
    assert kept == [
        NOISE[:400], NOISE[400:], EndOfStream(is_cancelled=False), NOISE, EndOfStream(is_cancelled=True), NOISE,
    ]  # fmt: skip


def test_an_answer_is_played_while_it_comes() -> None:
    reader, writer = connected_pipe()
    writer.write(wire(HELLO))
    source = open_source(reader, "the pipe", Decoding())
    threading.Timer(0.2, writer.write, [wire(audio(NOISE))]).start()
    begun = time.monotonic()
    event = next(source.events)
    assert isinstance(event, Pcm)
    assert 0.15 < event.since - begun < 5
    writer.close()
    assert list(source.events) == []
    reader.close()


def connected_pipe() -> tuple[io.BufferedReader, io.FileIO]:
    read_fd, write_fd = os.pipe()
    return io.BufferedReader(io.FileIO(read_fd)), io.FileIO(write_fd, "w")


def test_an_error_among_the_answers_is_told_and_what_follows_is_played() -> None:
    bad = json_message(Kind.ERROR, {"code": "bad_tokens", "message": "no whole frames", "stream": 0, "fatal": False})
    pcm, faults = pcm_and_faults(source_of(wire(HELLO, audio(NOISE), bad, audio(NOISE))))
    assert pcm == NOISE * 2
    assert faults == ["InputError: mossnano-stdio says bad_tokens: no whole frames"]


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (wire(audio(NOISE))[:-1], "InputError: the input is cut inside a message"),
        (bytes(4), "ProtocolError: a message claims a length of 0 bytes"),
        (wire(audio(b"abc"), audio(NOISE)), "PayloadError: AUDIO of 3 bytes is not whole samples of 4 bytes"),
        (wire(Message(Kind.END, b"{"), audio(NOISE)), "PayloadError: the payload of END is no JSON"),
    ],
)
def test_what_is_broken_comes_after_what_is_whole(broken: bytes, fault: str) -> None:
    pcm, faults = pcm_and_faults(source_of(wire(HELLO, audio(NOISE)) + broken))
    assert pcm.startswith(NOISE)
    assert len(faults) == 1
    assert faults[0].startswith(fault)


# --- numbered streams, and every form ----------------------------------------------------------------------------


def in_order(source: Source) -> list[Any]:
    return [event.pcm if isinstance(event, Pcm) else event for event in source.events]


def steps(pcm: bytes) -> NDArray[np.int64]:
    return np.frombuffer(pcm, "<i2").astype(np.int64)


QUIET = [(loud_noise(1000) // (number + 2)).astype("<i2").tobytes() for number in range(2)]
WHOLE = EndOfStream(is_cancelled=False)


def test_numbered_streams_that_follow_one_another_are_played_as_they_came() -> None:
    answer = wire(
        HELLO, in_stream(3, audio(NOISE)), in_stream(3, end()), in_stream(4, audio(NOISE)),
        in_stream(4, end(cancelled=True)), audio(NOISE), end(),
    )  # fmt: skip
    cancelled = EndOfStream(is_cancelled=True, keeps_ended=True)  # the stream before it is another voice
    assert in_order(source_of(answer)) == [NOISE, WHOLE, NOISE, cancelled, NOISE, WHOLE]


def test_numbered_streams_that_sound_at_once_are_mixed() -> None:
    first, second = QUIET
    answer = wire(
        HELLO, in_stream(3, audio(first[:400])), in_stream(4, audio(second)), in_stream(3, audio(first[400:])),
        in_stream(3, end()), in_stream(4, end()),
    )  # fmt: skip
    events = in_order(source_of(answer))
    assert events[-1] == WHOLE
    expected = np.concatenate([steps(first), np.zeros(200, np.int64)])
    expected[200:] += steps(second)
    assert np.array_equal(steps(b"".join(events[:-1])), expected)


def test_what_is_cancelled_takes_nothing_of_others_with_it() -> None:
    first, second = QUIET
    answer = wire(
        HELLO, in_stream(3, audio(first)), in_stream(4, audio(second)), in_stream(4, end(cancelled=True)),
        in_stream(3, audio(first)), in_stream(3, end(cancelled=True)), in_stream(5, audio(NOISE)),
    )  # fmt: skip
    assert in_order(source_of(answer)) == [first, first, WHOLE, NOISE]


@pytest.mark.parametrize("number", [3, 4])
def test_one_stream_of_several(number: int) -> None:
    bad = json_message(Kind.ERROR, {"code": "bad_tokens", "message": "no", "stream": 3})
    answer = wire(
        HELLO, in_stream(3, audio(QUIET[0])), audio(NOISE), in_stream(4, audio(QUIET[1])), in_stream(3, bad),
        end(), in_stream(3, end()), in_stream(4, end()),
    )  # fmt: skip
    events = in_order(source_of(answer, maybe_number=number))
    errors = [str(event) for event in events if isinstance(event, MossnanoError)]
    assert [event for event in events if not isinstance(event, MossnanoError)] == [QUIET[number - 3], WHOLE]
    assert errors == (["mossnano-stdio says of stream 3 bad_tokens: no"] if number == 3 else [])


def test_a_stream_that_is_not_there_is_an_error() -> None:
    (event,) = in_order(source_of(wire(HELLO, audio(NOISE)), maybe_number=9))
    assert str(event) == "no stream 9 is in the input"
    with pytest.raises(UsageError, match="has no numbered streams: leave --stream out"):
        source_of(wav_header(48000, 2, 0), maybe_number=9)


def test_floats_are_played() -> None:
    hello = json_message(Kind.HANDSHAKE, {**GREETING, "sample_format": "f32le"})
    floats = (steps(NOISE) / 32767).astype("<f4").tobytes()
    assert in_order(source_of(wire(hello, audio(floats), end()))) == [NOISE, WHOLE]
    bad = np.array([[0.5, np.nan]], "<f4").tobytes()
    pcm, (fault,) = pcm_and_faults(source_of(wire(hello, audio(bad), audio(floats))))
    assert pcm == NOISE
    assert fault.startswith("NonFiniteError: sample 0 of channel 1 is nan, one of 1 that are not finite")


def test_a_stream_of_another_form_is_played_in_that_of_the_first_handshake() -> None:
    said = json_message(Kind.HANDSHAKE, {**GREETING, "sample_rate": 24000, "channels": 1})
    pcm, faults = pcm_and_faults(source_of(wire(HELLO, in_stream(3, said), in_stream(3, audio(NOISE)))))
    assert (len(pcm), faults) == (2 * 2 * len(NOISE), [])


def test_a_stream_that_cannot_be_played_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    said = json_message(Kind.HANDSHAKE, {**GREETING, "sample_rate": 24000})
    answer = wire(HELLO, in_stream(3, said), *[in_stream(3, audio(NOISE))] * 3, audio(NOISE))
    pcm, (fault,) = pcm_and_faults(source_of(answer))
    assert pcm == NOISE
    assert "soxr is not installed" in fault


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (Message(Kind.TOKENS, bytes(20)), "begins with TOKENS, not with a HANDSHAKE.*goes through it first"),
        (json_message(Kind.ERROR, {"code": "bad_weights", "message": "x: is not there"}), "bad_weights: x: is not"),
        (json_message(Kind.HANDSHAKE, {**GREETING, "direction": "encode"}), "an encoder's answer"),
        (
            json_message(Kind.HANDSHAKE, {**GREETING, "sample_format": "u8"}),
            "the PCM is 'u8', only s16le and f32le can",
        ),
        (json_message(Kind.HANDSHAKE, {**GREETING, "channels": 0}), "0 channels at 48000 Hz"),
        (json_message(Kind.HANDSHAKE, {"sample_rate": "high"}), "None channels at 'high' Hz"),
        (Message(Kind.HANDSHAKE, b"[1, 2, 3]"), "a list where an object belongs"),
    ],
)
def test_an_answer_without_a_greeting_that_can_be_played_is_refused(first: Message, message: str) -> None:
    with pytest.raises(InputError, match=message):
        source_of(wire(first, audio(NOISE)))


def test_a_greeting_that_is_cut_is_refused() -> None:
    with pytest.raises(InputError, match="cut inside a message"):
        source_of(wire(HELLO)[:-1])


# --- artifacts ---------------------------------------------------------------------------------------------------


def artifact_of(frames: int, **changes: Any) -> Artifact:
    codes = np.random.default_rng(5).integers(0, 1024, (frames, 16), dtype=np.uint16)
    fields = {"sample_rate": 48000, "channels": 2, "original_samples": frames * 3840 - 100, "quantizers": 16}
    return Artifact(**{**fields, "frames": frames, "codebook_size": 1024, "codes": codes, **changes})


@pytest.mark.parametrize("step_bytes", [11, 1 << 20])
def test_an_artifact_is_decoded_chunk_by_chunk(tiny_bundle: Path, step_bytes: int) -> None:
    from mossnano_stdio.codecs import load_decoder
    from mossnano_stdio.pcm import to_pcm16
    from mossnano_stdio.weights import load_bundle

    artifact = artifact_of(6)
    source = source_of(build_artifact(artifact), step_bytes, Decoding(weights=str(tiny_bundle), threads=1))
    assert (source.sample_rate, source.channels) == (48000, 2)
    chunks = [event.pcm for event in source.events if isinstance(event, Pcm)]
    assert [len(chunk) // 4 for chunk in chunks] == [3840, 2 * 3840, 3 * 3840 - 100]
    decoder = load_decoder(load_bundle(tiny_bundle), threads=1)
    steps = (artifact.codes[0:1], artifact.codes[1:3], artifact.codes[3:6])
    expected = b"".join(to_pcm16(decoder.step(codes)) for codes in steps)
    assert b"".join(chunks) == expected[: artifact.original_samples * 4]


def test_an_artifact_that_does_not_fit_the_weights_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ArtifactError, match="sample_rate is 44100"):
        source_of(build_artifact(artifact_of(2, sample_rate=44100)), decoding=Decoding(weights=str(tiny_bundle)))


def test_an_artifact_that_is_cut_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^the input: "):
        source_of(build_artifact(artifact_of(2))[:-1])


# --- audio files -------------------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def wav_of(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


PCM16 = struct.pack("<HHIIHH", 1, 2, 44100, 176400, 4, 16)
EXTENSIBLE = struct.pack("<HHIIHHHHI", 0xFFFE, 2, 44100, 176400, 4, 16, 22, 16, 3) + bytes.fromhex(
    "0100000000001000800000aa00389b71"
)


@pytest.mark.parametrize("step_bytes", [1, 1 << 20])
@pytest.mark.parametrize("fmt", [PCM16, PCM16 + bytes(2), EXTENSIBLE])
def test_a_wav_of_16_bits_is_played_as_it_is_and_what_surrounds_its_pcm_is_not(fmt: bytes, step_bytes: int) -> None:
    wav = wav_of(chunk(b"odd ", b"abc"), chunk(b"fmt ", fmt), chunk(b"data", NOISE), chunk(b"LIST", b"tail"))
    source = source_of(wav, step_bytes)
    assert (source.sample_rate, source.channels) == (44100, 2)
    assert pcm_and_faults(source) == (NOISE, [])


def test_a_wav_from_a_pipe_has_no_length_and_is_played_while_it_comes() -> None:
    source = source_of(wav_header(48000, 2, None) + NOISE, step_bytes=100)
    pieces = [len(event.pcm) for event in source.events if isinstance(event, Pcm)]
    assert sum(pieces) == len(NOISE)
    assert max(pieces) <= 100


def test_a_wav_that_is_cut_is_played_as_far_as_it_goes() -> None:
    pcm, faults = pcm_and_faults(source_of(wav_header(48000, 2, len(NOISE)) + NOISE[:-10]))
    assert pcm == NOISE[: len(NOISE) - 12]
    assert "InputError: the WAV is cut: 10 bytes of its 4000 bytes of PCM are missing" in faults


def test_a_wav_of_other_bits_is_read_as_a_whole() -> None:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(3)
        sound.setframerate(8000)
        sound.writeframes(b"\x00\x00\x40" * 10)
    source = source_of(file.getvalue())
    assert (source.sample_rate, source.channels) == (8000, 1)
    assert pcm_and_faults(source) == (struct.pack("<h", 16384) * 10, [])


def test_other_audio_files_are_read_where_soundfile_is_there() -> None:
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, loud_noise(500), 48000, format="FLAC", subtype="PCM_16")
    assert pcm_and_faults(source_of(file.getvalue())) == (loud_noise(500).tobytes(), [])


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is a text and no sound",
        b"RIFF",
        wav_of(chunk(b"data", NOISE)),
        wav_of(chunk(b"fmt ", PCM16)),
        wav_of(chunk(b"fmt ", b"short")),
        b"\x00" * 100,
        b"\x09\x00\x00\x00\x42unknown",
    ],
)
def test_what_cannot_be_played_is_refused_with_what_can(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^the input is nothing that can be played"):
        source_of(data)


def test_an_empty_input_is_refused() -> None:
    with pytest.raises(InputError, match="the input is empty"):
        source_of(b"")


# --- raw PCM -----------------------------------------------------------------------------------------------------


def raw_of(data: bytes, step_bytes: int, **options: Any) -> Source:
    options = {"sample_rate": 48000, "channels": 2, **options}
    return open_raw(io.BufferedReader(Trickle(data, step_bytes)), "the input", **options)


@pytest.mark.parametrize("step_bytes", [1, 3, 1 << 20])
def test_raw_pcm_comes_in_whole_samples(step_bytes: int) -> None:
    source = raw_of(b"MOSSNANO" + NOISE, step_bytes, sample_rate=16000, channels=1)
    assert (source.sample_rate, source.channels) == (16000, 1)
    events: Iterator[Any] = source.events
    pieces = [event.pcm for event in events]
    assert all(len(piece) % 2 == 0 for piece in pieces)
    assert b"".join(pieces) == b"MOSSNANO" + NOISE


def test_raw_pcm_that_ends_inside_a_sample_says_so() -> None:
    pcm, faults = pcm_and_faults(raw_of(NOISE + b"abc", 1 << 20))
    assert (pcm, faults) == (NOISE, ["InputError: the PCM ends inside a sample: 3 bytes of 4 are there"])


def test_no_channels_are_no_sound() -> None:
    with pytest.raises(UsageError, match="0 channels at 48000 Hz"):
        raw_of(NOISE, 1, channels=0)
