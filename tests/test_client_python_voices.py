"""Voices of the Python clients: many at once over one process, each as it would be alone."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mossnano_stdio.client import (
    AsyncDecoder,
    Decoder,
    DecoderDiedError,
    DecoderError,
    Mark,
    Played,
    QueueFullError,
    StreamEnd,
    StreamOverError,
    Voice,
)
from mossnano_stdio.client.exchange import VOICE_BACKLOG_BYTES, Exchange
from mossnano_stdio.client.state import StreamState
from mossnano_stdio.errors import InputError, TokenError, UsageError
from mossnano_stdio.protocol.messages import (
    NUMBERED,
    Kind,
    Message,
    MessageReader,
    encode_message,
    in_stream,
    json_message,
    out_of_stream,
)
from tests.child import ROOT, double, kill, stop
from tests.clients import CLIENTS, Face, FaceOfVoice, SteppedVoice, start, wait_until
from tests.doubles import NANO, SMALL, artifact_bytes, expected_pcm, some_frames, tokens_payload

both = pytest.mark.parametrize("client", CLIENTS)

VOICES = 16
FRAME_SAMPLES, FRAME_BYTES = NANO.frame_samples, NANO.frame_pcm_bytes
FRAMES = some_frames(20)
PCM = expected_pcm(FRAMES, SMALL)
OTHER_PEER = [sys.executable, "-I", "-S", str(ROOT / "tests" / "other_peer.py")]  # it knows no numbered streams


@pytest.fixture(scope="module", params=CLIENTS)
def demo(request: pytest.FixtureRequest) -> Iterator[Face]:
    """A client around the real process, shared by all tests that leave it well. Equal chunks give equal PCM."""
    face = CLIENTS[request.param]("demo", ["--chunk-frames", "4"], stderr=subprocess.DEVNULL)
    yield face
    face.close()


@pytest.fixture(scope="module", params=CLIENTS)
def decoder(request: pytest.FixtureRequest) -> Iterator[Face]:
    """The same around the double, whose PCM tells every frame that it was ever fed."""
    face = start(request.param, double())
    yield face
    face.close()


# --- each as it would be alone ---------------------------------------------------------------------


def some_voices(face: Face) -> list[tuple[list[list[int]], bytes]]:
    """The frames of each voice, and what a plain stream makes of them."""
    frames = [some_frames(20 + 3 * number, NANO, seed=number) for number in range(VOICES)]
    return [(those, face.decode(those)) for those in frames]


def test_sixteen_voices_at_once_each_byte_for_byte_as_it_is_alone(demo: Face) -> None:
    alone = some_voices(demo)
    voices = [demo.open_voice() for _ in alone]
    heard = [bytearray() for _ in alone]
    for start_frame in range(0, 80, 7):  # a few frames of each in turn
        for voice, (frames, _) in zip(voices, alone, strict=True):
            voice.feed(frames[start_frame : start_frame + 7])
    for voice in voices:
        voice.finish()
    left = list(range(VOICES))
    while left:  # and a piece of each in turn
        for number in list(left):
            piece = next(voices[number], b"")
            heard[number] += piece
            if not piece:
                left.remove(number)
    for voice, (frames, pcm), pieces in zip(voices, alone, heard, strict=True):
        assert pieces == pcm
        end = voice.maybe_end
        assert end is not None
        assert end == StreamEnd(end.stream, len(frames), len(frames) * FRAME_SAMPLES, errors=0)
        assert voice.played == Played(end.stream, end.samples)


def test_sixteen_threads_read_a_voice_each() -> None:
    with Decoder("demo", ["--chunk-frames", "4"], stderr=subprocess.DEVNULL) as decoder:
        alone = some_voices(decoder)
        heard: dict[int, bytes] = {}

        def speak(number: int) -> None:
            voice = decoder.open_voice()
            for frame in alone[number][0]:
                voice.feed([frame])
            voice.finish()
            heard[number] = voice.read()

        threads = [threading.Thread(target=speak, args=[number]) for number in range(VOICES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [heard[number] for number in range(VOICES)] == [pcm for _, pcm in alone]


def test_sixteen_tasks_read_a_voice_each() -> None:
    async def main() -> None:
        async with AsyncDecoder("demo", ["--chunk-frames", "4"], stderr=subprocess.DEVNULL) as decoder:
            frames = [some_frames(20 + number, NANO, seed=number) for number in range(VOICES)]
            alone = [await decoder.decode(those) for those in frames]

            async def speak(those: list[list[int]]) -> bytes:
                voice = await decoder.open_voice()
                for frame in those:
                    voice.feed([frame])
                    await asyncio.sleep(0)
                voice.finish()
                return await voice.read()

            assert await asyncio.gather(*map(speak, frames)) == alone

    asyncio.run(main())


def test_a_plain_stream_goes_on_beside_voices(decoder: Face) -> None:
    plain = decoder.feed(FRAMES[:10])
    voice = decoder.open_voice()
    voice.feed(FRAMES)
    artifact = decoder.open_voice()
    decoder.feed(FRAMES[10:])
    decoder.finish()
    other = decoder.feed_artifact(artifact_bytes(FRAMES, SMALL))
    artifact.feed(FRAMES)
    for stream in (voice, artifact):
        stream.finish()
        assert stream.read() == PCM
    assert plain.read() == PCM
    assert other.read() == PCM


def test_a_voice_of_nothing_has_its_end(decoder: Face) -> None:
    voice = decoder.open_voice()
    voice.finish()
    voice.finish()  # once more changes nothing
    assert voice.read() == b""
    assert voice.maybe_end is not None
    assert voice.maybe_end.frames == 0
    with pytest.raises(StreamOverError, match="is finished"):
        voice.feed(FRAMES)


def test_voices_are_numbered_on_with_the_streams_beside_them(decoder: Face) -> None:
    numbers = [decoder.open_voice().played.stream, decoder.feed(FRAMES).played.stream]
    decoder.finish()
    numbers.append(decoder.open_voice().played.stream)
    assert numbers == list(range(numbers[0], numbers[0] + 3))


# --- a window each ---------------------------------------------------------------------------------


def test_a_voice_that_nobody_reads_stops_alone(demo: Face) -> None:
    unread = demo.open_voice()
    unread.feed(some_frames(600, NANO))  # 48 s
    unread.finish()
    frames = some_frames(120, NANO, seed=1)
    pcm = demo.decode(frames)
    voice = demo.open_voice()
    voice.feed(frames)
    voice.finish()
    assert voice.read() == pcm
    demo.ping()
    assert 0 < state_of(unread).waiting_bytes <= 2 * NANO.sample_rate * NANO.sample_bytes
    assert len(unread.read()) == 600 * FRAME_BYTES


def state_of(voice: FaceOfVoice) -> StreamState:
    inner: Any = voice._voice if isinstance(voice, SteppedVoice) else voice
    state: StreamState = inner._state
    return state


@pytest.mark.parametrize("chunk_frames", [1, 7, None])
def test_the_smallest_window_that_can_be_suffices(decoder: Face, chunk_frames: int | None) -> None:
    voice = decoder.open_voice(window_samples=SMALL.frame_samples * (chunk_frames or 1), chunk_frames=chunk_frames)
    voice.feed(FRAMES)
    voice.finish()
    assert voice.read() == PCM


def test_a_chunk_that_is_longer_than_the_usual_window_widens_it(demo: Face) -> None:
    frames = some_frames(120, NANO)
    voice = demo.open_voice(chunk_frames=50)  # 4 s
    voice.feed(frames)
    voice.finish()
    assert len(voice.read()) == 120 * FRAME_BYTES


def test_more_than_the_process_lets_wait_in_one_voice_is_refused_here(decoder: Face) -> None:
    voice = decoder.open_voice()
    frames = bytes(VOICE_BACKLOG_BYTES // SMALL.frame_bytes * SMALL.frame_bytes)
    with pytest.raises(QueueFullError, match="of this voice wait to be decoded"):
        voice.feed(frames + bytes(2 * SMALL.frame_bytes))
    voice.feed(frames)
    decoder.ping()
    assert state_of(voice).maybe_fault is None  # the process has all of it, and takes it
    pieces = [next(voice) for _ in range(5)]
    voice.feed(bytes(SMALL.frame_bytes))  # there is room again
    assert all(pieces)
    voice.cancel()


# --- marks -----------------------------------------------------------------------------------------


def test_marks_come_in_order_with_the_sound_that_they_are_in(demo: Face) -> None:
    places = random.Random(0)
    frames = some_frames(60, NANO)
    voice = demo.open_voice()
    expected = []
    for number, frame in enumerate(frames):
        for again in range(places.choice([0, 0, 1, 2])):
            expected.append(Mark(number * FRAME_SAMPLES, f"wörd {number} {again}"))
            voice.mark(expected[-1].text)
        voice.feed([frame])
    expected.append(Mark(len(frames) * FRAME_SAMPLES, "at the end"))
    voice.mark("at the end")
    voice.finish()
    taken, said = 0, []
    assert voice.take_marks() == []
    for piece in voice:
        before, taken = taken, voice.played.samples
        assert taken == before + len(piece) // NANO.sample_bytes
        marks = voice.take_marks()
        assert all(before <= mark.sample < taken for mark in marks)
        said += marks
    said += voice.take_marks()
    assert said == expected


def test_a_mark_that_was_not_heard_is_not_said(decoder: Face) -> None:
    voice = decoder.open_voice(chunk_frames=1)
    for number, frame in enumerate(FRAMES):
        voice.mark(str(number))
        voice.feed([frame])
    heard = b"".join(next(voice) for _ in range(3))
    assert voice.cancel().samples == 3 * SMALL.frame_samples
    assert [mark.text for mark in voice.take_marks()] == ["0", "1", "2"]
    assert list(voice) == []
    assert voice.take_marks() == []
    assert PCM.startswith(heard)


def test_a_mark_that_is_too_long_is_refused(decoder: Face) -> None:
    voice = decoder.open_voice()
    with pytest.raises(UsageError, match="a mark has 1002 bytes; up to 1000 are allowed"):
        voice.mark("ö" * 501)
    voice.mark("ö" * 500)
    voice.finish()
    assert voice.read() == b""
    assert voice.take_marks() == [Mark(0, "ö" * 500)]


def test_marks_fill_a_voice_too(decoder: Face) -> None:
    voice = decoder.open_voice()
    with pytest.raises(QueueFullError, match="of this voice wait to be decoded"):
        for _ in range(2000):
            voice.mark("x" * 1000)
    voice.feed(FRAMES)
    voice.finish()
    assert voice.read() == PCM
    assert len(voice.take_marks()) == VOICE_BACKLOG_BYTES // 1064


# --- barge-in --------------------------------------------------------------------------------------


def test_cancel_ends_one_voice_and_no_other(demo: Face) -> None:
    frames = some_frames(40, NANO)
    pcm = demo.decode(frames)
    voices = [demo.open_voice() for _ in range(3)]
    for voice in voices:
        voice.feed(frames)
    heard = next(voices[1])
    played = voices[1].cancel()
    assert played.samples == len(heard) // NANO.sample_bytes
    assert pcm.startswith(heard)
    assert voices[1].was_cancelled
    assert voices[1].read() == b""
    assert voices[1].cancel() == played  # once more changes nothing
    with pytest.raises(StreamOverError, match="was cancelled"):
        voices[1].feed(frames)
    for voice in (voices[0], voices[2]):
        voice.finish()
        assert voice.read() == pcm
        assert voice.cancel().samples == len(pcm) // NANO.sample_bytes
        assert not voice.was_cancelled, "it was read to its end"


def test_cancel_of_the_decoder_ends_all(decoder: Face) -> None:
    plain = decoder.feed(FRAMES)
    voices = [decoder.open_voice() for _ in range(3)]
    for voice in voices:
        voice.feed(FRAMES)
    decoder.cancel()
    assert all(stream.was_cancelled for stream in (plain, *voices))
    assert decoder.decode(FRAMES) == PCM
    voice = decoder.open_voice()
    voice.feed(FRAMES)
    voice.finish()
    assert voice.read() == PCM


@both
def test_a_storm_of_cancels_leaves_every_place_free(client: str) -> None:
    face = start(client, double({}, "--max-streams", "4"))
    for number in range(300):
        try:
            voice = face.open_voice()
        except DecoderError as error:
            assert error.code == "too_many_streams"
            face.ping()  # the ENDs of cancelled ones are still to come
            continue
        voice.feed(FRAMES)
        if number % 3:
            voice.cancel()
        else:
            voice.finish()
            assert voice.read() == PCM
    face.close()


@both
def test_voices_that_nobody_holds_are_cancelled(client: str) -> None:
    face = start(client, double({}, "--max-streams", "4"))
    for number in range(20):
        voice = face.open_voice()
        if number % 2:
            voice.feed(some_frames(100))
        else:
            face.ping()  # nothing more will come of it
        del voice
        face.ping()  # so that its END has come, if there was one
    voices = [face.open_voice() for _ in range(3)]
    assert len(voices) == 3
    face.close()


SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["open", "feed", "feed", "feed", "mark", "finish", "take", "take", "cancel", "plain"]),
        st.integers(0, 30),
    ),
    max_size=50,
)


@dataclass
class Told:
    """A voice, what it was fed with, and what came back."""

    voice: FaceOfVoice
    is_open: bool = True
    frames: list[list[int]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    heard: bytes = b""
    said: list[Mark] = field(default_factory=list)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS)
def test_whatever_is_done_what_is_heard_is_right(decoder: Face, script: list[tuple[str, int]]) -> None:
    """Each voice gives all of its PCM and marks, or a beginning of them if it was cancelled, and nothing else."""
    voices: list[Told] = []
    for seed, (action, count) in enumerate([("open", 0), *script]):
        if action == "open" and len(voices) < 12:
            voices.append(Told(decoder.open_voice(window_samples=SMALL.frame_samples * (1 + count % 7))))
        told = voices[count % len(voices)]
        match action:
            case "plain":
                assert decoder.decode(FRAMES) == PCM
            case "feed" if told.is_open:
                frames = some_frames(count, seed=seed)
                told.voice.feed(frames)
                told.frames += frames
            case "mark" if told.is_open:
                told.voice.mark(str(seed))
                told.marks.append(Mark(len(told.frames) * SMALL.frame_samples, str(seed)))
            case "finish":
                told.voice.finish()
                told.is_open = False
            case "take" if not told.is_open:
                told.heard += next(told.voice, b"")
                told.said += told.voice.take_marks()
            case "cancel":
                told.voice.cancel()
                told.is_open = False
    for told in reversed(voices):
        told.voice.finish()
        told.heard += told.voice.read()
        told.said += told.voice.take_marks()
        pcm = expected_pcm(told.frames, SMALL)
        if told.voice.was_cancelled:
            assert pcm.startswith(told.heard)
            assert told.marks[: len(told.said)] == told.said
        else:
            assert told.heard == pcm
            assert told.said == told.marks


# --- settings of one voice -------------------------------------------------------------------------


def test_each_voice_has_its_own_form(demo: Face) -> None:
    frames = some_frames(30, NANO)
    plain = np.frombuffer(demo.decode(frames), "<i2").reshape(-1, 2).astype(np.float64) / 32768
    quiet = demo.open_voice(channels=1, sample_format="f32le", gain_db=-6.0)
    same = demo.open_voice(urgency=0)
    for voice in (quiet, same):
        voice.feed(frames)
        voice.finish()
    assert (quiet.channels, quiet.sample_rate, same.channels) == (1, 48000, 2)
    heard = np.frombuffer(quiet.read(), "<f4")
    assert len(heard) == len(plain)
    assert quiet.played.samples == len(plain)
    assert np.abs(heard - plain.mean(axis=1) * 10 ** (-6 / 20)).max() < 1 / 32768
    assert np.frombuffer(same.read(), "<i2").tobytes() == demo.decode(frames)


def test_marks_lie_where_they_are_at_another_rate(demo: Face) -> None:
    pytest.importorskip("soxr")
    voice = demo.open_voice(sample_rate=22050)
    for number, frame in enumerate(some_frames(25, NANO)):
        voice.mark(str(number))
        voice.feed([frame])
    voice.finish()
    assert len(voice.read()) == 22050 * 2 * 4
    marks = voice.take_marks()
    assert [mark.text for mark in marks] == [str(number) for number in range(25)]
    assert all(abs(mark.sample - number * 22050 * 0.08) <= 1 for number, mark in enumerate(marks))


def test_settings_that_are_refused_are_told_to_who_feeds_and_who_reads(decoder: Face) -> None:
    for refused in ({"channels": 7}, {"gain_db": 40}, {"wobble": 1}, {"window_samples": 1}):
        voice = decoder.open_voice(**refused)
        with pytest.raises(DecoderError) as caught:
            next(voice)
        assert (caught.value.code, caught.value.stream) == ("bad_settings", voice.played.stream)
        with pytest.raises(DecoderError) as again:
            voice.feed(FRAMES)
        assert again.value is caught.value
        assert voice.read() == b""
    assert decoder.decode(FRAMES) == PCM


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        ({"quantizers": 0}, UsageError),
        ({"quantizers": "all"}, UsageError),
        ({"chunk_frames": 1.5}, UsageError),
        ({"window_samples": -1}, UsageError),
        ({"sample_format": "s24le"}, InputError),
        ({"sample_rate": "high"}, InputError),
    ],
)
def test_settings_that_make_no_sense_are_refused_here(decoder: Face, refused: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        decoder.open_voice(**refused)


def test_what_are_no_frames_is_refused_before_it_is_sent(decoder: Face) -> None:
    voice = decoder.open_voice(quantizers=3)
    with pytest.raises(UsageError, match=r"allowed is \(frames, 3\)"):
        voice.feed(FRAMES)
    with pytest.raises(TokenError):
        voice.feed(bytes(5))
    voice.feed([[1, 2, 3]])
    voice.finish()
    assert len(voice.read()) == SMALL.frame_pcm_bytes


def test_a_bad_voice_is_told_where_it_went_bad_and_the_others_go_on(decoder: Face) -> None:
    other = decoder.open_voice()
    other.feed(FRAMES[:10])
    voice = decoder.open_voice()
    voice.feed(FRAMES[:3])
    heard = b""
    while len(heard) < 3 * SMALL.frame_pcm_bytes:
        heard += next(voice)
    voice.feed(tokens_payload([[1001, 0, 0, 0]]))
    with pytest.raises(DecoderError) as caught:
        next(voice)
    assert caught.value.code == "bad_tokens"
    with pytest.raises(DecoderError) as again:
        voice.feed(FRAMES)
    assert again.value is caught.value
    assert voice.read() == b""
    assert voice.maybe_end is not None
    assert voice.maybe_end.errors == 1
    assert heard == expected_pcm(FRAMES[:3], SMALL)
    other.feed(FRAMES[10:])
    other.finish()
    assert other.read() == PCM


@both
def test_a_decoder_without_voices_is_said_to_be_one(client: str) -> None:
    for command in (OTHER_PEER, double({}, "--max-streams", "0")):
        face = start(client, command)
        with pytest.raises(DecoderError, match="its HANDSHAKE says no max_streams") as caught:
            face.open_voice()
        assert caught.value.code == "no_voices"
        face.close()


@both
def test_more_voices_than_there_may_be_are_refused_and_a_place_is_free_after_an_end(client: str) -> None:
    face = start(client, double({}, "--max-streams", "2"))
    voices = [face.open_voice(), face.open_voice()]
    with pytest.raises(DecoderError, match="2 voices are not over") as caught:
        face.open_voice()
    assert caught.value.code == "too_many_streams"
    voices[0].feed(FRAMES)
    voices[0].finish()
    assert voices[0].read() == PCM
    again = face.open_voice()
    for voice in (voices[1], again):
        voice.feed(FRAMES)
        voice.finish()
        assert voice.read() == PCM
    face.close()


# --- death and the end -----------------------------------------------------------------------------


@both
def test_a_process_that_dies_ends_every_voice_with_the_reason(client: str) -> None:
    face = start(client, double({}, "--chunk-frames", "5"))
    voices = [face.open_voice() for _ in range(VOICES)]
    for voice in voices:
        voice.feed(FRAMES[:17])
        assert next(voice) == PCM[: 5 * SMALL.frame_pcm_bytes]
    over = face.open_voice()
    over.feed(FRAMES)
    over.finish()
    assert over.read() == PCM
    wait_until(face, lambda: all(state_of(voice).frames_in_process == 2 for voice in voices))
    kill(face.pid)
    numbers = tuple(voice.played.stream for voice in voices)
    for voice in voices:
        rest = bytearray()
        with pytest.raises(DecoderDiedError) as caught:
            for pcm in voice:
                rest += pcm
        assert PCM[5 * SMALL.frame_pcm_bytes :].startswith(rest)
        assert caught.value.lost == numbers
        with pytest.raises(DecoderDiedError):
            voice.feed(FRAMES)
    assert caught.value.lost_frames == VOICES * 2  # of 17 fed, three chunks came back
    again = face.open_voice()  # by another process
    again.feed(FRAMES)
    again.finish()
    assert again.read() == PCM
    assert again.played.stream > max(numbers)
    assert voices[0].cancel().samples >= 5 * SMALL.frame_samples  # nobody is left to tell
    face.close()


def test_who_waits_for_a_voice_is_woken_by_its_cancel_and_by_a_death() -> None:
    with Decoder(command=double(), stderr=subprocess.DEVNULL) as decoder:
        voices = [decoder.open_voice() for _ in range(2)]
        ends: list[object] = []

        def read(voice: Voice) -> None:
            try:
                ends.append(voice.read())
            except DecoderDiedError as death:
                ends.append(death.code)

        readers = [threading.Thread(target=read, args=[voice]) for voice in voices]
        for reader in readers:
            reader.start()
        voices[0].cancel()
        readers[0].join(20)
        kill(decoder.pid)
        readers[1].join(20)
        assert ends == [b"", "process_died"]


@both
@pytest.mark.parametrize("is_hung", [False, True], ids=["that works", "that hangs"])
def test_closing_with_voices_open_ends_them(client: str, is_hung: bool) -> None:
    face = start(client, double())
    voices = [face.open_voice() for _ in range(VOICES)]
    if is_hung:
        stop(face.pid)
    for voice in voices:
        voice.feed(some_frames(1000))
    face.close()
    assert all(voice.was_cancelled for voice in voices)


@both
def test_a_process_that_is_started_again_takes_voices(client: str) -> None:
    face = start(client, double(), restart=1)
    first = face.pid
    voice = face.open_voice()
    voice.feed(FRAMES)
    kill(first)
    wait_until(face, lambda: face.state == "ready" and face.pid != first)
    with pytest.raises(DecoderDiedError):
        voice.read()
    again = face.open_voice()
    again.feed(FRAMES)
    again.finish()
    assert again.read() == PCM
    face.close()


# --- the exchange, without a process ---------------------------------------------------------------

HANDSHAKE = {
    "sample_rate": 48000, "channels": 2, "frame_samples": 4, "quantizers": 4, "codebook_size": 1000, "frame_bytes": 5,
    "max_message_bytes": 1 << 20, "chunk_frames": None, "max_streams": 32,
}  # fmt: skip


def conversation(**options: Any) -> Exchange:
    exchange = Exchange(**options)
    assert exchange.receive(encode_message(*json_message(Kind.HANDSHAKE, HANDSHAKE)))
    return exchange


def sent_by(exchange: Exchange) -> list[tuple[int | None, Message]]:
    """The number of the stream and the message, for all that waits."""
    wire = b"".join(iter(lambda: exchange.next_outgoing() or b"", b""))
    messages = MessageReader().feed(wire)
    return [out_of_stream(message) if message.kind & NUMBERED else (None, message) for message in messages]


def hear(exchange: Exchange, number: int, *messages: Message) -> None:
    for message in messages:
        assert exchange.receive(encode_message(*in_stream(number, message)))


def credit(samples: int) -> Message:
    return Message(Kind.CREDIT, samples.to_bytes(8, "little"))


def test_what_was_read_is_granted_again_once_however_much_it_was() -> None:
    exchange = conversation()
    voice = exchange.open_voice({"window_samples": 100})
    assert sent_by(exchange) == [(0, json_message(Kind.SETTINGS, {"window_samples": 100}))]
    hear(exchange, 0, *(Message(Kind.AUDIO, bytes(16)) for _ in range(5)))
    assert sent_by(exchange) == []
    for _ in range(3):
        exchange.maybe_take(voice)
    assert sent_by(exchange) == [(0, credit(100 + 12))]
    exchange.maybe_take(voice)
    assert sent_by(exchange) == [(0, credit(100 + 16))]
    end = {"stream": 0, "frames": 5, "samples": 20, "errors": 0, "cancelled": False}
    hear(exchange, 0, json_message(Kind.END, end))
    exchange.maybe_take(voice)
    assert sent_by(exchange) == [], "who has all that there is needs no more"


def test_voices_do_not_wait_behind_plain_streams() -> None:
    exchange = conversation()
    exchange.feed_artifact(artifact_bytes(FRAMES, SMALL))
    voice = exchange.open_voice({})
    assert [message.kind for _, message in sent_by(exchange)] == [Kind.SETTINGS, Kind.ARTIFACT]
    exchange.feed_open(FRAMES)  # waits for the END of the artifact
    exchange.feed(voice, FRAMES)
    exchange.receive(encode_message(Kind.AUDIO, bytes(100)))
    hear(exchange, 1, Message(Kind.AUDIO, bytes(16)))
    exchange.maybe_take(voice)
    assert [message.kind for _, message in sent_by(exchange)] == [Kind.CREDIT, Kind.TOKENS]


def test_a_voice_that_waits_does_not_stop_the_reading() -> None:
    exchange = conversation(buffer_bytes=100)
    voice = exchange.open_voice({})
    sent_by(exchange)
    hear(exchange, 0, Message(Kind.AUDIO, bytes(1000)))
    assert exchange.wants_input
    assert exchange.maybe_take(voice) == bytes(1000)


def test_of_a_voice_that_is_cancelled_nothing_more_is_sent() -> None:
    exchange = conversation()
    first, second = exchange.open_voice({}), exchange.open_voice({})
    sent_by(exchange)
    unsent = exchange.open_voice({})
    for voice in (first, second, unsent):
        exchange.feed(voice, FRAMES)
    exchange.mark(first, "never")
    queued_bytes = exchange.queued_bytes
    exchange.cancel_voice(first)
    exchange.cancel_voice(unsent)
    assert exchange.queued_bytes < queued_bytes
    assert sent_by(exchange) == [(0, Message(Kind.CANCEL)), (1, Message(Kind.TOKENS, tokens_payload(FRAMES)))]
    assert exchange.queued_bytes == 0
    hear(exchange, 0, Message(Kind.AUDIO, bytes(16)), Message(Kind.MARK, bytes(8) + b"never"))
    end = {"stream": 0, "frames": 1, "samples": 4, "errors": 0, "cancelled": True}
    hear(exchange, 0, json_message(Kind.END, end), json_message(Kind.END, end | {"stream": 99}))
    assert (exchange.maybe_take(first), exchange.maybe_take(unsent)) == (b"", b"")
    assert not exchange.is_at_rest
    exchange.cancel()
    hear(exchange, 1, json_message(Kind.END, end | {"stream": 1}))
    assert [number for number, _ in sent_by(exchange)] == [1, None]


def test_an_end_that_a_fatal_error_brings_is_no_end() -> None:
    """It says how much was sent, which is less than all."""
    exchange = conversation()
    voice = exchange.open_voice({})
    exchange.feed(voice, FRAMES)
    sent_by(exchange)
    fatal = {"code": "out_of_memory", "message": "no more", "stream": None, "fatal": True}
    exchange.receive(encode_message(*json_message(Kind.ERROR, fatal)))
    hear(exchange, 0, json_message(Kind.END, {"frames": 0, "samples": 0, "errors": 0, "cancelled": False}))
    assert exchange.maybe_take(voice) is None
    exchange.end(71)
    with pytest.raises(DecoderDiedError, match="out_of_memory") as caught:
        exchange.maybe_take(voice)
    assert (caught.value.lost, caught.value.lost_frames) == ((0,), 20)


@pytest.mark.parametrize("code", ["too_many_streams", "late_stream"])
def test_a_voice_that_the_process_did_not_open_is_over(code: str) -> None:
    exchange = conversation()
    voice = exchange.open_voice({})
    sent_by(exchange)
    exchange.feed(voice, FRAMES)
    hear(exchange, 0, json_message(Kind.ERROR, {"code": code, "message": "no", "stream": 0, "fatal": False}))
    with pytest.raises(DecoderError, match=code):
        exchange.maybe_take(voice)
    assert exchange.maybe_take(voice) == b""
    sent_by(exchange)
    assert exchange.is_at_rest
    assert [exchange.open_voice({}).number for _ in range(2)] == [1, 2]


def test_a_voice_whose_settings_were_refused_is_open_in_the_process_and_cancelled_there() -> None:
    exchange = conversation()
    voice = exchange.open_voice({"gain_db": 99})
    sent_by(exchange)
    hear(exchange, 0, json_message(Kind.ERROR, {"code": "bad_settings", "message": "no", "stream": 0, "fatal": False}))
    with pytest.raises(DecoderError, match="bad_settings"):
        exchange.maybe_take(voice)
    assert exchange.maybe_take(voice) == b""
    assert sent_by(exchange) == [(0, Message(Kind.CANCEL))]
    hear(exchange, 0, json_message(Kind.END, {"frames": 0, "samples": 0, "errors": 1, "cancelled": True}))
    assert exchange.is_at_rest
