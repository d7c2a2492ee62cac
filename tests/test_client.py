"""The Python clients: what goes in comes out, nobody deadlocks, barge-in is at once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
    NotReadyError,
    Played,
    QueueFullError,
    StreamEnd,
    StreamOverError,
)
from mossnano_stdio.client.exchange import Exchange, State
from mossnano_stdio.errors import ArtifactError, TokenError, UsageError
from mossnano_stdio.protocol.messages import Kind, Message, MessageReader, encode_message, json_message
from tests.child import DEMO, KILLED, ROOT, double, go_on, is_there, kill, pcm_of, run, stop
from tests.clients import CLIENTS, Face, start, wait_until
from tests.doubles import NANO, SMALL, artifact_bytes, expected_pcm, some_frames, tokens_payload

OTHER_PEER = [sys.executable, "-I", "-S", str(ROOT / "tests" / "other_peer.py")]  # starts in no time
SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
KILLED_BY_ITS_CLIENT = 1 if sys.platform == "win32" else -9
FRAMES = some_frames(20)
PCM = expected_pcm(FRAMES, SMALL)
HANDSHAKE = {
    "sample_rate": 48000, "channels": 2, "frame_samples": 4, "quantizers": 4, "codebook_size": 1000, "frame_bytes": 5,
    "max_message_bytes": 1 << 20,
}  # fmt: skip

both = pytest.mark.parametrize("client", CLIENTS)


@pytest.fixture(scope="module", params=CLIENTS)
def decoder(request: pytest.FixtureRequest) -> Iterator[Face]:
    """A client around the double, shared by all tests that leave it well."""
    face = start(request.param, double())
    yield face
    face.close()


# --- what goes in comes out ------------------------------------------------------------------------


def test_a_stream(decoder: Face) -> None:
    stream = decoder.feed(np.array(FRAMES[:7]))
    decoder.feed(np.array(FRAMES[7:]))
    assert stream.maybe_end is None
    decoder.finish()
    assert b"".join(stream) == PCM
    end = stream.maybe_end
    assert end is not None
    assert end == StreamEnd(end.stream, frames=20, samples=80, errors=0)


@pytest.mark.parametrize(
    "form", [np.array, np.uint16, tokens_payload, lambda frames: memoryview(tokens_payload(frames)), list]
)
def test_frames_come_in_many_forms(decoder: Face, form: Callable[[Any], Any]) -> None:
    assert decoder.decode(form(FRAMES)) == PCM


def test_pcm_comes_as_it_is_decoded(decoder: Face) -> None:
    stream = decoder.open()
    for frame in FRAMES[:5]:
        stream.feed([frame])
        assert len(next(stream)) == SMALL.frame_pcm_bytes
    stream.finish()
    assert stream.read() == b""


def test_streams_are_read_in_any_order(decoder: Face) -> None:
    many = [some_frames(count, seed=count) for count in (3, 8, 1)]
    streams = []
    for frames in many:
        streams.append(decoder.feed(frames))
        decoder.finish()
    for frames, stream in reversed(list(zip(many, streams, strict=True))):
        assert stream.read() == expected_pcm(frames, SMALL)


def test_a_stream_without_frames(decoder: Face) -> None:
    stream = decoder.open()
    stream.finish()
    assert stream.read() == b""
    assert stream.maybe_end is not None
    assert stream.maybe_end.frames == 0
    assert decoder.decode([]) == b""


@pytest.mark.parametrize("nothing", [[], b"", np.zeros((0, 4), np.uint16)], ids=["list", "bytes", "array"])
def test_a_stream_that_is_fed_with_nothing_and_finished_has_its_end(decoder: Face, nothing: Any) -> None:
    stream = decoder.feed(nothing)
    decoder.finish()
    assert stream.read() == b""
    end = stream.maybe_end
    assert end is not None
    assert end == StreamEnd(end.stream, frames=0, samples=0, errors=0)
    assert decoder.decode(FRAMES) == PCM


def test_an_artifact(decoder: Face) -> None:
    assert decoder.feed_artifact(artifact_bytes(FRAMES, SMALL)).read() == PCM
    assert decoder.feed_artifact(artifact_bytes(FRAMES, SMALL, maybe_samples=33)).read() == PCM[: 33 * 4]


def test_facts(decoder: Face) -> None:
    with Decoder(command=OTHER_PEER) as other:
        assert (other.sample_rate, other.channels, other.frame_samples) == (8000, 1, 5)
        assert (other.version, other.demo) == ("0", True)
        assert (other.quantizers, other.codebook_size, other.format.frame_bytes) == (3, 300, 4)
    assert decoder.handshake["direction"] == "decode"


@both
def test_what_was_played_is_counted_for_each_stream(client: str) -> None:
    face = start(client, double({}, "--chunk-frames", "5"))
    first = face.feed(FRAMES)
    assert first.played == Played(stream=0, samples=0)
    next(first)
    assert first.played == Played(stream=0, samples=5 * 4)
    face.cancel()
    assert first.read() == b""
    second = face.feed(FRAMES)
    face.finish()
    second.read()
    assert [first.played, second.played] == [Played(0, 20), Played(1, 80)]
    kill(face.pid)
    with pytest.raises(DecoderDiedError):
        face.ping()
    assert face.feed(FRAMES).played == Played(2, 0)  # another process, and they are numbered on
    face.close()


# --- the log ---------------------------------------------------------------------------------------


def program_that_logs(text: str) -> list[str]:
    """A decoder that says this, a Python expression, on stderr, and then is like any other."""
    return before_other_peer(f"os.write(2, {text})")


def before_other_peer(program: str, *arguments: str) -> list[str]:
    """A process that runs these lines, and then is that one."""
    is_that_one = f"sys.argv[1:] = []; runpy.run_path({OTHER_PEER[-1]!r}, run_name='__main__')"
    return [*OTHER_PEER[:-1], "-c", f"import os, runpy, sys\n{program}\n{is_that_one}", *arguments]


@both
def test_the_log_comes_line_by_line(client: str) -> None:
    lines: list[str] = []
    face = start(client, program_that_logs(r'b"one\ntwo\r\n\nno \xff UTF-8\nunended"'), log=lines.append)
    face.decode([[1, 2, 3]])
    face.close()
    assert lines == ["one", "two", "", "no \ufffd UTF-8", "unended"]


@both
def test_a_line_of_the_log_that_does_not_end_is_cut(client: str) -> None:
    lines: list[str] = []
    face = start(client, program_that_logs(r'b"x" * 100_000 + b"\nshort\n"'), log=lines.append)
    face.close()
    assert "".join(lines) == "x" * 100_000 + "short"
    assert lines[-1] == "short"
    assert max(map(len, lines)) < 40_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@both
def test_a_log_that_raises_harms_nothing(client: str) -> None:
    before = what_there_is()
    heard = []

    def log(line: str) -> None:
        heard.append(line)
        raise ZeroDivisionError

    face = start(client, double({"noise": True}, "--chunk-frames", "1"), log=log)
    assert face.decode(FRAMES) == PCM
    face.close()
    assert heard
    assert what_there_is() == before


def test_who_logs_may_close() -> None:
    before = what_there_is()
    decoders: list[Decoder] = []
    done = threading.Event()

    def log(line: str) -> None:
        if decoders:
            decoders[0].close()
            done.set()

    decoders.append(Decoder(command=double({"noise": True}), log=log))
    decoders[0].feed(FRAMES)
    assert done.wait(20)
    deadline = time.monotonic() + 20
    while what_there_is() != before:  # the log's own thread ends when it comes back from there
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_log_goes_to_one_place() -> None:
    for client in (Decoder, AsyncDecoder):
        with pytest.raises(UsageError, match="both log and stderr"):
            client(log=print, stderr=subprocess.DEVNULL)


def test_the_demo_by_its_name() -> None:
    melody = (ROOT / "mossnano_stdio" / "demo" / "melody.bin").read_bytes()
    tokens = b"".join(message.payload for message in MessageReader().feed(melody) if message.kind == Kind.TOKENS)
    expected = pcm_of(list(MessageReader(1 << 24).feed(run([*DEMO, "--chunk-frames", "8"], melody).stdout)))
    with Decoder("demo", ["--chunk-frames", "8"], stderr=subprocess.DEVNULL) as decoder:
        assert decoder.handshake["demo"] is True
        assert decoder.decode(tokens) == expected


def test_a_ping_takes_its_time(decoder: Face) -> None:
    assert 0 < decoder.ping() < 30


def test_settings_hold_for_the_streams_to_come(decoder: Face) -> None:
    assert decoder.settle(chunk_frames=4)["chunk_frames"] == 4
    stream = decoder.feed(FRAMES[:6])
    assert len(next(stream)) == 4 * SMALL.frame_pcm_bytes
    decoder.finish()
    assert len(stream.read()) == 2 * SMALL.frame_pcm_bytes
    assert decoder.settle(quantizers=2)["frame_bytes"] == 3
    assert len(decoder.decode([[1, 2]])) == SMALL.frame_pcm_bytes
    assert decoder.settle(chunk_frames=None, quantizers=4)["quantizers"] == 4
    assert decoder.decode(FRAMES) == PCM


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (np.zeros((2, 5), int), UsageError),
        (np.zeros(4, int), UsageError),
        (np.zeros((1, 4)), UsageError),
        ([[0, 0, 0, 1000]], TokenError),
        ([[0, 0, 0, -1]], TokenError),
        (bytes(6), TokenError),
    ],
)
def test_what_are_no_frames_is_refused_before_it_is_sent(decoder: Face, frames: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        decoder.decode(frames)
    decoder.cancel()
    assert decoder.decode(FRAMES) == PCM


def test_what_makes_no_sense_is_refused(decoder: Face) -> None:
    with pytest.raises(UsageError, match="no stream is open"):
        decoder.finish()
    with pytest.raises(ArtifactError, match=r"no \.mossnano"):
        decoder.feed_artifact(b"no artifact")
    stream = decoder.open()
    with pytest.raises(UsageError, match="a stream is open already"):
        decoder.open()
    with pytest.raises(UsageError, match="between streams only"):
        decoder.settle(chunk_frames=1)
    stream.finish()
    with pytest.raises(StreamOverError, match="this stream is finished"):
        stream.feed(FRAMES)
    stream.finish()  # once more changes nothing
    assert stream.read() == b""


def test_refused_settings_carry_the_code_of_the_wire(decoder: Face) -> None:
    with pytest.raises(DecoderError, match="chunk_frames is 0") as caught:
        decoder.settle(chunk_frames=0)
    assert (caught.value.code, caught.value.fatal) == ("bad_settings", False)
    assert decoder.decode(FRAMES) == PCM


# --- errors of the process -------------------------------------------------------------------------


def test_a_bad_stream_is_told_where_it_went_bad_and_the_next_one_is_right(decoder: Face) -> None:
    stream = decoder.feed(FRAMES[:3])
    heard = b"".join(next(stream) for _ in range(2))
    stream.feed(tokens_payload([[1001, 0, 0, 0]]))
    with pytest.raises(DecoderError) as caught:
        next(stream)
    assert caught.value.code == "bad_tokens"
    assert heard == expected_pcm(FRAMES[:3], SMALL)
    with pytest.raises(DecoderError) as again:  # who feeds it is told as well
        stream.feed(FRAMES)
    assert again.value is caught.value
    assert stream.read() == b""
    assert stream.maybe_end is not None
    assert stream.maybe_end.errors == 1
    assert decoder.decode(FRAMES) == PCM


def test_an_artifact_of_another_make(decoder: Face) -> None:
    stream = decoder.feed_artifact(artifact_bytes(some_frames(2, NANO), NANO))
    with pytest.raises(DecoderError) as caught:
        stream.read()
    assert caught.value.code == "bad_artifact"
    assert decoder.decode(FRAMES) == PCM


@both
def test_an_error_that_the_stream_survives(client: str) -> None:
    face = start(client, double({"not_finite_steps": [2]}, "--chunk-frames", "10"))
    stream = face.feed(FRAMES)
    face.finish()
    heard = next(stream)
    with pytest.raises(DecoderError) as caught:
        next(stream)
    assert (caught.value.code, caught.value.fatal) == ("not_finite", False)
    assert heard + stream.read() == PCM[: len(PCM) // 2] + bytes(len(PCM) // 2)
    face.close()


@both
def test_a_step_that_fails(client: str) -> None:
    face = start(client, double({"failing_steps": [1]}))
    stream = face.feed(FRAMES)
    with pytest.raises(DecoderError) as caught:
        stream.read()
    assert caught.value.code == "decode_failed"
    with pytest.raises(DecoderError):
        stream.feed(FRAMES)
    assert face.decode(FRAMES) == PCM
    face.close()


# --- nobody deadlocks ------------------------------------------------------------------------------


@both
def test_everything_may_be_written_before_anything_is_read(client: str) -> None:
    face = start(client, double({"nano": True}), buffer_bytes=1 << 20)
    many = [some_frames(count, NANO, seed=count) for count in (200, 1, 300)]
    streams = []
    for frames in many:
        streams.append(face.feed(frames))
        face.finish()
    assert face.ping() > 0  # this too, though it stands behind 7 MB that nobody has read
    for frames, stream in zip(many, streams, strict=True):
        assert stream.read() == expected_pcm(frames, NANO)
    face.close()


@contextlib.contextmanager
def hung(pid: int) -> Iterator[None]:
    """Inside, this process does nothing, for 20 s at the most: who waits for it fails then, and does not hang."""
    stop(pid)
    waker = threading.Timer(20, go_on, [pid])
    waker.start()
    try:
        yield
        assert waker.is_alive(), "somebody waited for a process that is hung"
    finally:
        waker.cancel()
        waker.join()
        go_on(pid)


@both
def test_a_hung_process_holds_up_neither_feed_nor_cancel(client: str) -> None:
    face = start(client, double({"nano": True}))
    with hung(face.pid):
        stream = face.feed(some_frames(8000, NANO))  # 160 kB: more than a pipe holds
        face.cancel()
        assert stream.read() == b""
        assert stream.was_cancelled
        assert face.queued_bytes < 100  # the CANCEL at the most
        frames = some_frames(3, NANO, seed=1)
        again = face.feed(frames)
        face.finish()
    assert again.read() == expected_pcm(frames, NANO)
    face.close()


@both
def test_what_does_not_fit_into_the_queue_is_refused_whole(client: str) -> None:
    face = start(client, double(), queue_bytes=10_000)
    fed: list[list[int]] = []
    with hung(face.pid):
        stream = face.open()
        with pytest.raises(QueueFullError, match="queue_bytes allows 10000") as caught:
            for seed in range(9**9):
                frames = some_frames(100, seed=seed)
                stream.feed(frames)
                fed += frames
        assert (caught.value.code, caught.value.fatal) == ("queue_full", False)
        assert face.queued_bytes <= 10_000
    stream.finish()
    assert stream.read() == expected_pcm(fed, SMALL)
    assert face.decode(FRAMES) == PCM  # there is room again
    face.close()


def test_one_thread_feeds_while_another_reads() -> None:
    frames = some_frames(400, NANO)
    face = start("Decoder", double({"nano": True}), buffer_bytes=1 << 18)
    stream = face.open()

    def feed() -> None:
        for frame in frames:
            stream.feed([frame])
        stream.finish()

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert stream.read() == expected_pcm(frames, NANO)
    feeder.join()
    face.close()


def test_two_tasks_feed_and_read() -> None:
    frames = some_frames(300, NANO)

    async def feed(decoder: AsyncDecoder) -> bytes:
        stream = await decoder.open()
        reading = asyncio.create_task(stream.read())
        for frame in frames:
            stream.feed([frame])
            await asyncio.sleep(0)
        stream.finish()
        return await reading

    async def main() -> bytes:
        async with AsyncDecoder(command=double({"nano": True})) as decoder:
            return await feed(decoder)

    assert asyncio.run(main()) == expected_pcm(frames, NANO)


def conversation(*messages: Message, **options: Any) -> Exchange:
    """An exchange that has heard a HANDSHAKE and these messages."""
    exchange = Exchange(**({"buffer_bytes": 100} | options))
    assert exchange.receive(encode_message(*json_message(Kind.HANDSHAKE, HANDSHAKE)))
    for message in messages:
        assert exchange.receive(encode_message(*message))
    return exchange


def sent_by(exchange: Exchange) -> list[Message]:
    wire = b"".join(iter(lambda: exchange.next_outgoing() or b"", b""))
    return list(MessageReader().feed(wire))


def test_an_end_that_a_fatal_error_brings_is_no_end() -> None:
    """It says how much was sent, which is less than all. So it ends no row of crashes either."""
    exchange = conversation()
    stream = exchange.open()
    exchange.feed(stream, FRAMES)
    sent_by(exchange)
    fatal = {"code": "framing_lost", "message": "no more", "stream": None, "fatal": True}
    end = {"stream": 0, "frames": 0, "samples": 0, "errors": 0, "cancelled": False}
    for message in (json_message(Kind.ERROR, fatal), json_message(Kind.END, end)):
        exchange.receive(encode_message(*message))
    assert exchange.maybe_take(stream) is None
    exchange.end(76)
    with pytest.raises(DecoderDiedError, match="framing_lost") as caught:
        exchange.maybe_take(stream)
    assert (caught.value.lost, caught.value.lost_frames, exchange.ended_streams) == ((0,), 20, 0)


def test_all_that_is_queued_counts_until_it_is_sent_or_dropped() -> None:
    exchange = conversation(queue_bytes=1000)
    stream = exchange.open()
    exchange.feed(stream, FRAMES)
    exchange.ping()
    assert exchange.queued_bytes == 100 + 64 + 64
    with pytest.raises(QueueFullError, match="228 bytes wait to be sent and 1064 more were refused"):
        exchange.feed(stream, bytes(1000))
    sent_by(exchange)
    assert exchange.queued_bytes == 0
    exchange.feed(stream, bytes(900))
    exchange.finish(stream)  # is never refused, nor is a CANCEL
    assert exchange.queued_bytes == 1028
    with pytest.raises(QueueFullError):
        exchange.ping()
    with pytest.raises(QueueFullError):
        exchange.open()
    with pytest.raises(QueueFullError):
        exchange.feed_artifact(artifact_bytes(FRAMES, SMALL))
    exchange.cancel()
    assert exchange.queued_bytes == 64 + 1
    exchange.end(0)
    assert exchange.queued_bytes == 0


def test_reading_pauses_while_much_waits_and_goes_on_for_who_waits_for_what_comes_after() -> None:
    exchange = conversation()
    stream = exchange.open()
    exchange.feed(stream, FRAMES)
    sent_by(exchange)
    assert exchange.wants_input
    exchange.receive(encode_message(Kind.AUDIO, bytes(101)))
    assert not exchange.wants_input
    exchange.waiting += 1
    assert exchange.wants_input
    exchange.waiting -= 1
    assert not exchange.wants_input
    assert exchange.maybe_take(stream) == bytes(101)
    assert exchange.wants_input


def test_what_nobody_can_read_any_more_holds_nothing_up() -> None:
    exchange = conversation()
    stream = exchange.open()
    exchange.feed(stream, FRAMES)
    exchange.finish(stream)
    sent_by(exchange)
    exchange.receive(encode_message(Kind.AUDIO, bytes(101)))
    end = {"stream": 0, "frames": 20, "samples": 80, "errors": 0, "cancelled": False}
    exchange.receive(encode_message(*json_message(Kind.END, end)))
    assert not exchange.wants_input
    del stream
    gc.collect()
    exchange.open()
    assert exchange.wants_input


def test_what_no_decoder_says_ends_it() -> None:
    for nonsense in (b"\0\0\0\0", encode_message(Kind.END, b"no JSON"), encode_message(Kind.END, b"{}")):
        assert not conversation().receive(nonsense)
    assert conversation().receive(encode_message(0x66, b"a kind of a later version"))


# --- barge-in --------------------------------------------------------------------------------------


@both
def test_a_cancelled_stream_ends_at_once_and_the_next_one_is_right(client: str) -> None:
    face = start(client, double({"nano": True, "step_seconds": 0.3}))
    stream = face.feed(some_frames(500, NANO))
    next(stream)
    started = time.monotonic()
    face.cancel()
    assert list(stream) == []
    assert time.monotonic() - started < 0.15  # before the process is out of its step
    assert stream.was_cancelled
    with pytest.raises(StreamOverError, match="was cancelled"):
        stream.feed(some_frames(1, NANO))
    frames = some_frames(3, NANO, seed=1)
    assert face.decode(frames) == expected_pcm(frames, NANO)
    face.close()


def test_who_waits_for_a_cancelled_stream_is_woken() -> None:
    with Decoder(command=OTHER_PEER) as decoder:
        stream = decoder.open()
        heard: list[bytes] = []
        reader = threading.Thread(target=lambda: heard.append(stream.read()))
        reader.start()
        time.sleep(0.05)
        decoder.cancel()
        reader.join(10)
        assert heard == [b""]


def test_what_was_not_sent_yet_is_never_sent() -> None:
    exchange = conversation()
    first = exchange.open()
    exchange.feed(first, FRAMES[:1])
    assert [message.kind for message in sent_by(exchange)] == [Kind.TOKENS]
    exchange.finish(first)
    ping = exchange.ping()
    second = exchange.open()
    exchange.feed(second, FRAMES)
    exchange.cancel()
    exchange.cancel()
    third = exchange.open()
    exchange.feed(third, FRAMES[:2])
    assert [message.kind for message in sent_by(exchange)] == [Kind.CANCEL, Kind.PING, Kind.TOKENS]
    for kind, payload in [
        (Kind.AUDIO, b"old!"),
        (Kind.END, b'{"stream": 0, "frames": 1, "samples": 1, "cancelled": true, "errors": 0, "echo": "2"}'),
        (Kind.PING, b""),
        (Kind.AUDIO, b"new!"),
    ]:
        exchange.receive(encode_message(kind, payload))
    assert ping.maybe_take()
    assert [exchange.maybe_take(stream) for stream in (first, second, third)] == [b"", b"", b"new!"]


SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["feed", "feed", "feed", "finish", "take", "take", "cancel", "ping"]), st.integers(1, 30)
    ),
    max_size=40,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS)
def test_whatever_is_done_what_is_heard_is_right(decoder: Face, script: list[tuple[str, int]]) -> None:
    """Each stream gives all of its PCM, or if it was cancelled a beginning of it, and never anything else."""
    streams: list[tuple[Any, list[list[int]], bytearray]] = []
    open_frames: list[list[int]] | None = None
    for seed, (action, count) in enumerate(script):
        match action:
            case "feed":
                frames = some_frames(count, seed=seed)
                stream = decoder.feed(frames)
                if open_frames is None:
                    open_frames = []
                    streams.append((stream, open_frames, bytearray()))
                open_frames.extend(frames)
            case "finish" if open_frames is not None:
                decoder.finish()
                open_frames = None
            case "take" if open_frames is None and streams:
                stream, _, heard = streams[count % len(streams)]
                heard += next(stream, b"")
            case "cancel":
                decoder.cancel()
                open_frames = None
            case "ping":
                decoder.ping()
    if open_frames is not None:
        decoder.finish()
    for stream, frames, heard in streams:
        heard += stream.read()
        expected = expected_pcm(frames, SMALL)
        assert expected.startswith(heard) if stream.was_cancelled else heard == expected


@pytest.mark.slow
def test_barge_in_latency(capsys: pytest.CaptureFixture[str]) -> None:
    """The next stream's first sample comes within the time of one step of one frame, and 5 ms."""
    frames = np.random.default_rng(0).integers(0, 1024, (400, 16))

    def first_ms(decoder: Decoder) -> float:
        started = time.perf_counter()
        stream = decoder.feed(frames[:1])
        next(stream)
        elapsed_ms = 1000 * (time.perf_counter() - started)
        decoder.finish()
        stream.read()
        return elapsed_ms

    def barge_in(decoder: Decoder) -> tuple[float, float, float]:
        stream = decoder.feed(frames)
        for _ in range(4):
            next(stream)
        started = time.perf_counter()
        decoder.cancel()
        stream.read()
        quiet_ms = 1000 * (time.perf_counter() - started)
        decoder.ping()  # the rest of a chunk of 8 frames
        rest_ms = 1000 * (time.perf_counter() - started)
        return quiet_ms, rest_ms, first_ms(decoder)

    with Decoder("demo", stderr=subprocess.DEVNULL) as decoder:
        rounds = [(first_ms(decoder), *barge_in(decoder)) for _ in range(50)]
    idle, quiet, rest, first = (statistics.median(column) for column in zip(*rounds, strict=True))
    with capsys.disabled():
        print(
            f"\nbarge-in, medians: quiet after {quiet:.2f} ms, the process free after {rest:.2f} ms, "
            f"then the first sample after {first:.2f} ms ({idle:.2f} ms without a barge-in)"
        )
    assert quiet < 5
    assert first < idle + 5


# --- odd hosts -------------------------------------------------------------------------------------

HOSTS = {
    "Decoder": "decoder = Decoder(command=COMMAND)\nlook()\nprint(len(decoder.decode(FRAMES)))\ndecoder.close()",
    "AsyncDecoder": """
async def main():
    async with AsyncDecoder(command=COMMAND) as decoder:
        look()
        print(len(await decoder.decode(FRAMES)))
asyncio.run(main())
""",
}


@pytest.mark.parametrize("client", HOSTS)
def test_a_host_that_closed_its_standard_descriptors_does_not_talk_to_the_decoder_by_mistake(client: str) -> None:
    program = f"""
import asyncio, contextlib, os
from mossnano_stdio.client import AsyncDecoder, Decoder
COMMAND, FRAMES = {OTHER_PEER!r}, [[1, 2, 3]] * 10
def look():
    for fd in (0, 2):
        print("pipe" in os.path.realpath(f"/proc/self/fd/{{fd}}"))
    if {client!r} == "Decoder":  # in the other one it is something of the event loop's
        with contextlib.suppress(OSError):
            os.write(2, b"what a library has to say")
{HOSTS[client]}
"""
    if sys.platform == "win32":
        pytest.skip("a shell there cannot start a program with closed streams")
    shell = ["bash", "-c", 'exec "$@" <&- 2>&-', "bash", sys.executable, "-c", program]
    done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.stdout.split() == ["False", "False", "100"]
    assert done.returncode == 0


@both
def test_a_host_that_blocks_signals_has_a_decoder_that_can_be_ended_by_them(client: str) -> None:
    if sys.platform == "win32":
        pytest.skip("there is no mask of signals to inherit")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    try:
        face = start(client, double())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    blocked = [line for line in Path(f"/proc/{face.pid}/status").read_text().splitlines() if "SigBlk" in line]
    assert [int(line.split()[1], 16) for line in blocked] == [0]
    os.kill(face.pid, signal.SIGTERM)
    with pytest.raises(DecoderDiedError) as caught:
        face.ping()
    assert caught.value.status == 143
    face.close()


# --- a process that dies ---------------------------------------------------------------------------


@both
def test_a_process_that_is_killed_is_told_and_replaced(client: str) -> None:
    face = start(client, double({"step_seconds": 0.01}, "--chunk-frames", "5"))
    face.settle(chunk_frames=2)
    stream = face.feed(FRAMES)
    assert next(stream) == PCM[: 2 * SMALL.frame_pcm_bytes]
    first_pid = face.pid
    kill(first_pid)
    with pytest.raises(DecoderDiedError, match=f"ended with status {KILLED}; 1 stream is lost") as caught:
        stream.read()
    error = caught.value
    assert (error.code, error.status, error.lost_streams, error.fatal) == ("process_died", KILLED, 1, True)
    assert 0 < error.lost_frames <= 18
    with pytest.raises(DecoderDiedError):  # who feeds it is told as well
        face.feed(FRAMES)
    assert stream.read() == b""
    assert face.restarts == 0
    again = face.feed(FRAMES)
    face.finish()
    assert len(next(again)) == 2 * SMALL.frame_pcm_bytes  # the settings are those of before
    assert again.read() == PCM[2 * SMALL.frame_pcm_bytes :]
    assert (face.restarts, face.pid != first_pid) == (1, True)
    face.close()


@both
def test_a_process_that_dies_of_a_bug_says_so(client: str) -> None:
    face = start(client, double({"raising": {"3": "ZeroDivisionError"}}))
    stream = face.feed(FRAMES)
    face.finish()
    behind = face.feed(FRAMES)
    with pytest.raises(DecoderDiedError) as caught:
        stream.read()
    assert (caught.value.code, caught.value.status, caught.value.lost_streams) == ("bug", 70, 2)
    assert caught.value.lost_frames == 40 - 3
    with pytest.raises(DecoderDiedError):
        behind.read()
    face.close()


@both
def test_a_process_that_dies_in_silence_is_replaced_in_silence(client: str) -> None:
    face = start(client, OTHER_PEER)
    for restart in range(1, 4):
        kill(face.pid)
        time.sleep(0.05)
        try:
            assert len(face.decode([[1, 2, 3]])) == 10
        except DecoderDiedError:  # we were quicker than the news of its death
            assert len(face.decode([[1, 2, 3]])) == 10
        assert face.restarts == restart
    face.close()


@both
def test_who_pings_hears_of_the_death(client: str) -> None:
    face = start(client, double({"step_seconds": 1}))
    face.feed(FRAMES)
    killer = threading.Timer(0.2, kill, [face.pid])
    killer.start()
    with pytest.raises(DecoderDiedError):
        face.ping()
    killer.join()
    face.close()


@both
@pytest.mark.parametrize(
    ("command", "code", "status", "says"),
    [
        ([sys.executable, "-c", "raise SystemExit(127)"], "process_died", 127, "status 127"),
        ([sys.executable, "-m", "mossnano_stdio", "--weights", "/nowhere"], "bad_weights", 66, "nowhere"),
        ([sys.executable, "-m", "mossnano_stdio", "--no-such-option"], "process_died", 2, "status 2"),
        ([sys.executable, "-c", "print('hello, world')"], "bad_answer", KILLED_BY_ITS_CLIENT, "what no decoder says"),
        ([sys.executable, "-c", ""], "process_died", 0, "status 0"),
    ],
)
def test_a_process_that_does_not_start_says_why(
    client: str, command: list[str], code: str, status: int, says: str
) -> None:
    with pytest.raises(DecoderDiedError, match=says) as caught:
        start(client, command)
    assert caught.value.code == code
    assert caught.value.status in (status, 0)  # who talks nonsense may have ended by itself


def test_a_status_that_a_signal_has_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio says 255 where a signal that it sent found the process at its end, on a busy machine only."""
    wait = asyncio.subprocess.Process.wait

    async def wait_in_vain(process: asyncio.subprocess.Process) -> int:
        await wait(process)
        return 255

    monkeypatch.setattr(asyncio.subprocess.Process, "wait", wait_in_vain)
    for status in (127, 255):
        with pytest.raises(DecoderDiedError, match=f"status {status}") as caught:
            start("AsyncDecoder", [sys.executable, "-c", f"raise SystemExit({status})"])
        assert caught.value.status == status


@both
def test_a_program_that_is_not_there(client: str) -> None:
    with pytest.raises(DecoderError, match="/nowhere/at/all cannot be started") as caught:
        CLIENTS[client](command=["/nowhere/at/all"])
    assert caught.value.code == "not_started"


@both
def test_a_process_that_takes_too_long_to_start(client: str) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        start(client, SLEEPER, start_seconds=0.2)
    assert time.monotonic() - started < 5


def test_a_ping_may_be_given_a_time() -> None:
    decoder = start("Decoder", double({"step_seconds": 0.5}))
    assert isinstance(decoder, Decoder)
    decoder.feed(FRAMES)
    with pytest.raises(TimeoutError):
        decoder.ping(timeout_seconds=0.05)
    decoder.close()


# --- states, and restarts --------------------------------------------------------------------------


def wait_for_state(face: Face, state: State) -> None:
    wait_until(face, lambda: face.state == state)


@both
def test_a_process_that_crashes_is_restarted_and_who_fed_it_is_told_what_is_lost(client: str) -> None:
    face = start(client, double(), restart=3)
    face.settle(chunk_frames=2)
    face.decode(FRAMES)
    unread = face.feed(FRAMES)
    face.finish()
    face.ping()
    lost = face.feed(FRAMES)
    first_pid = face.pid
    kill(first_pid)
    wait_until(face, lambda: face.restarts == 1)
    assert face.pid != first_pid
    assert face.handshake["chunk_frames"] == 2
    failure = face.maybe_failure
    assert isinstance(failure, DecoderDiedError)
    assert (failure.status, failure.lost, failure.lost_streams) == (KILLED, (lost.played.stream,), 1)
    with pytest.raises(DecoderDiedError):  # and does not go on in the middle, in the new process
        face.feed(FRAMES)
    with pytest.raises(DecoderDiedError):
        lost.read()
    assert unread.read() == PCM  # it was here already
    assert face.decode(FRAMES) == PCM
    face.close()
    assert face.state == "closed"


@both
def test_a_lost_stream_may_be_finished_or_given_up(client: str) -> None:
    face = start(client, double(), restart=5)
    lost = face.feed(FRAMES)
    kill(face.pid)
    wait_until(face, lambda: face.restarts == 1)
    face.finish()
    with pytest.raises(DecoderDiedError):
        lost.read()
    face.feed(FRAMES)
    kill(face.pid)
    wait_until(face, lambda: face.restarts == 2)
    again = face.open()
    assert face.feed(FRAMES).played == again.played
    face.finish()
    assert again.read() == PCM
    face.close()


def program_that_starts(times: int, log: Path) -> list[str]:
    """A decoder that can be started so often, and then ends with 3. Each start is a dot in `log`."""
    program = f"with open(sys.argv[1], 'ab') as log:\n    if log.write(b'.') and log.tell() > {times}: sys.exit(3)"
    return before_other_peer(program, str(log))


@both
def test_restarts_end_where_they_lead_nowhere(client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossnano_stdio.client.launch.FIRST_PAUSE_SECONDS", 0.01)
    log = tmp_path / "starts"
    face = start(client, program_that_starts(1, log), restart=2)
    kill(face.pid)
    wait_for_state(face, "failed")
    failure = face.maybe_failure
    assert isinstance(failure, DecoderDiedError)
    assert failure.status == 3
    assert len(log.read_text()) == 1 + 2
    with pytest.raises(DecoderDiedError, match="status 3"):  # who needs one has it tried once more
        face.feed([[1, 2, 3]])
    assert len(log.read_text()) == 1 + 2 + 1
    face.close()


@both
def test_a_stream_that_comes_to_its_end_ends_a_row_of_crashes(client: str) -> None:
    face = start(client, double(), restart=1)
    killed = []
    for _ in range(3):
        assert face.decode(FRAMES) == PCM
        killed.append(face.pid)
        kill(face.pid)
        wait_until(face, lambda: face.restarts == len(killed))
    kill(face.pid)
    wait_for_state(face, "failed")
    face.close()


@both
def test_a_cancel_ends_the_unread_streams_of_a_dead_process_too(client: str) -> None:
    face = start(client, double())
    unread = face.feed(FRAMES)
    face.finish()
    face.ping()
    kill(face.pid)
    wait_for_state(face, "failed")
    face.feed(FRAMES)
    face.cancel()
    assert unread.was_cancelled
    assert unread.read() == b""
    face.close()


def test_nothing_waits_where_nobody_wants_to_wait() -> None:
    command = double({"load_seconds": 2})
    with Decoder(command=command, stderr=subprocess.DEVNULL, wait_for_start=False) as decoder:
        assert str(decoder.state) == "starting"
        assert decoder.maybe_failure is None
        with pytest.raises(NotReadyError, match="is being started: wait until its state is ready") as caught:
            decoder.feed(FRAMES)
        assert caught.value.code == "not_ready"
        decoder.cancel()
        with pytest.raises(NotReadyError):
            print(decoder.sample_rate)
        with pytest.raises(UsageError, match="no stream is open"):
            decoder.finish()
        with pytest.raises(TimeoutError):
            decoder.wait_until_ready(0.01)
        decoder.wait_until_ready()
        assert str(decoder.state) == "ready"
        assert decoder.decode(FRAMES) == PCM
        first_pid = decoder.pid
        kill(first_pid)
        wait_for_state(decoder, "failed")
        with pytest.raises(NotReadyError, match=f"because the decoder process ended with status {KILLED}"):
            decoder.feed(FRAMES)
        wait_until(decoder, lambda: decoder.pid != first_pid)
        assert str(decoder.state) == "starting"
        assert decoder.sample_rate == 48000  # as it was in the one that died
        wait_for_state(decoder, "ready")
        assert decoder.decode(FRAMES) == PCM
    assert str(decoder.state) == "closed"


@pytest.mark.parametrize(
    ("command", "code"),
    [(["/nowhere/at/all"], "not_started"), ([sys.executable, "-c", "1 / 0"], "process_died")],
    ids=["no file", "ends"],
)
def test_a_start_that_fails_has_a_reason(command: list[str], code: str) -> None:
    with Decoder(command=command, wait_for_start=False, restart=3) as decoder:
        wait_for_state(decoder, "failed")
        assert isinstance(decoder.maybe_failure, DecoderError)
        assert decoder.maybe_failure.code == code
        with pytest.raises(DecoderError) as caught:
            decoder.wait_until_ready()
        assert caught.value is decoder.maybe_failure


@pytest.mark.parametrize("seconds", [0, 0.05, 0.3])
def test_a_start_may_be_given_up(seconds: float) -> None:
    before = what_there_is()
    decoder = Decoder(command=SLEEPER, wait_for_start=False, restart=3)
    time.sleep(seconds)
    started = time.monotonic()
    decoder.close()
    assert time.monotonic() - started < 20  # and not 60
    assert decoder.state == "closed"
    with pytest.raises(UsageError, match="closed"):
        decoder.feed(FRAMES)
    assert what_there_is() == before


@pytest.mark.skipif(sys.platform == "win32", reason="terminate() ends a process there at once, unheard")
def test_a_process_that_still_loads_is_told_to_end(tmp_path: Path) -> None:
    told = tmp_path / "told"
    script = 'trap "echo > $0; exit" TERM; echo > "$0.loading"; while :; do sleep 0.05; done'
    decoder = Decoder(command=["bash", "-c", script, str(told)], wait_for_start=False)
    wait_until(decoder, (tmp_path / "told.loading").exists)
    decoder.close()
    assert told.exists()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 10, 100])
def test_a_start_in_a_loop_may_be_given_up_at_any_time(turns: int) -> None:
    async def main() -> None:
        decoder = AsyncDecoder(command=SLEEPER)
        starting = asyncio.create_task(decoder.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await decoder.close()
        with pytest.raises(UsageError, match="closed"):
            await starting

    before = what_there_is()
    asyncio.run(asyncio.wait_for(main(), 30))
    assert what_there_is() == before


def test_a_restart_may_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossnano_stdio.client.launch.FIRST_PAUSE_SECONDS", 60)
    monkeypatch.setattr("mossnano_stdio.client.launch.LONGEST_PAUSE_SECONDS", 60)
    for client in CLIENTS:
        before = what_there_is()
        face = start(client, OTHER_PEER, restart=1)
        kill(face.pid)
        wait_for_state(face, "starting")
        face.close()
        assert what_there_is() == before


def test_states_in_a_loop() -> None:
    async def main() -> None:
        decoder = AsyncDecoder(command=double(), stderr=subprocess.DEVNULL)
        assert str(decoder.state) == "closed"
        starting = asyncio.create_task(decoder.start())
        while str(decoder.state) != "starting":
            await asyncio.sleep(0)
        with pytest.raises(NotReadyError):
            decoder.cancel()
        assert await decoder.decode(FRAMES) == PCM  # waits too
        await starting
        assert str(decoder.state) == "ready"
        await decoder.close()
        assert str(decoder.state) == "closed"

    asyncio.run(main())


def test_a_start_that_is_cancelled_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with AsyncDecoder(command=SLEEPER):
            raise AssertionError("it never says its HANDSHAKE")

    before = what_there_is()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(main(), 0.2))
    assert what_there_is() == before


# --- nothing is left behind --------------------------------------------------------------------------


def what_there_is() -> tuple[int, list[str], list[str]]:
    """Open descriptors, threads, and children of this process. (Of these, Windows tells the threads only.)"""
    names = (thread.name for thread in threading.enumerate())
    threads = sorted(name for name in names if "waitpid-" not in name)  # asyncio's, which end a moment later
    if sys.platform == "win32":
        return 0, threads, []
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(list(Path("/proc/self/fd").iterdir())), threads, children


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def cycle(client: str, number: int) -> None:
    """Start, and stop in one of the states that a client can be in."""
    face = start(client, OTHER_PEER)
    match number % 5:
        case 1:
            face.decode([[1, 2, 3]] * 30)
        case 2:
            face.feed([[1, 2, 3]] * 20_000)  # the pipes are full
        case 3:
            next(face.feed([[1, 2, 3]] * 20_000))
            face.cancel()
        case 4:
            random.choice([kill, terminate])(face.pid)
    face.close()
    face.close()  # once more changes nothing


@both
def test_starting_and_stopping_leaves_nothing_behind(client: str) -> None:
    before = what_there_is()
    for number in range(20):
        cycle(client, number)
    assert what_there_is() == before


@pytest.mark.slow
@both
def test_starting_and_stopping_a_thousand_times_leaves_nothing_behind(client: str) -> None:
    before = what_there_is()
    for number in range(1000):
        cycle(client, number)
    assert what_there_is() == before


@both
@pytest.mark.parametrize(
    "stubborn",
    [
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); say(); [sys.stdin.buffer.read1() for _ in range(9**9)]",
        "say(); time.sleep(60)",
    ],
    ids=["ignores everything", "does not read"],
)
def test_a_process_that_does_not_want_to_end_is_ended(client: str, stubborn: str) -> None:
    before = what_there_is()
    said = encode_message(*json_message(Kind.HANDSHAKE, HANDSHAKE))
    program = f"import os, signal, sys, time\ndef say(): os.write(1, {said!r})\n{stubborn}"
    face = start(client, [sys.executable, "-I", "-S", "-c", program])
    face.feed([[1, 2, 3, 4]] * 200_000)
    started = time.monotonic()
    face.close()
    assert time.monotonic() - started < 8
    assert what_there_is() == before


def program_that_leaves_somebody(note: Path) -> list[str]:
    """A decoder with a child that inherits its pipes and outlives it. The child's number goes to `note`."""
    sleeper = f"subprocess.Popen({SLEEPER!r}).pid"
    return before_other_peer(
        f"import subprocess\nwith open(sys.argv[1], 'w') as note: note.write(str({sleeper}))", str(note)
    )


@both
@pytest.mark.parametrize("frames", [1, 2_000_000], ids=["at rest", "pipes full"])
def test_nobody_waits_for_what_the_process_leaves_behind(client: str, frames: int, tmp_path: Path) -> None:
    before = what_there_is()
    face = start(client, program_that_leaves_somebody(tmp_path / "note"))
    try:
        face.feed(bytes(4 * frames))
        started = time.monotonic()
        face.close()
        assert time.monotonic() - started < 12  # and not 60
    finally:
        kill(int((tmp_path / "note").read_text()))
    deadline = time.monotonic() + 10
    while what_there_is() != before:  # a thread that reads ends with the last who can write to it
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_closed_stays_closed() -> None:
    decoder = Decoder(command=OTHER_PEER)
    stream = decoder.feed([[1, 2, 3]] * 1000)
    decoder.close()
    assert stream.was_cancelled
    with pytest.raises(UsageError, match="closed"):
        decoder.feed([[1, 2, 3]])


def test_what_is_closed_stays_closed_in_a_loop_too() -> None:
    async def main() -> None:
        decoder = AsyncDecoder(command=OTHER_PEER)
        with pytest.raises(UsageError, match="not started"):
            decoder.finish()
        stream = await decoder.feed([[1, 2, 3]] * 1000)  # starts it
        await decoder.close()
        await decoder.close()
        assert stream.was_cancelled
        with pytest.raises(UsageError, match="closed"):
            await decoder.feed([[1, 2, 3]])

    asyncio.run(main())


def test_a_decoder_that_nobody_closes_is_closed_with_a_warning() -> None:
    gc.collect()  # what earlier tests left is not for this one to count
    before = what_there_is()
    decoder = Decoder(command=OTHER_PEER)
    stream = decoder.feed([[1, 2, 3]])
    del decoder
    gc.collect()
    assert len(next(stream)) == 10  # a stream keeps its decoder
    with pytest.warns(ResourceWarning, match="a Decoder was not closed"):
        del stream
        gc.collect()
    assert what_there_is() == before


@pytest.mark.parametrize("end", ["", "kill(os.getpid())", "raise SystemExit(3)", "1 / 0"])
def test_the_process_ends_with_the_program_that_did_not_close_it(end: str) -> None:
    program = f"""
import os
from mossnano_stdio.client import Decoder
from tests.child import kill
decoder = Decoder(command={OTHER_PEER!r})
decoder.feed([[1, 2, 3]] * 100_000)
print(decoder.pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=20)
    deadline = time.monotonic() + 5
    while is_there(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_is_for_the_program_and_not_for_its_decoder() -> None:
    if sys.platform == "win32":
        pytest.skip("groups of processes there have no numbers")
    with Decoder(command=OTHER_PEER) as decoder:
        assert os.getpgid(decoder.pid) != os.getpgid(0)
