"""The Godot client's logic, run against the real process by tests/gdscript.py. Godot itself is not to be had here."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from mossnano_stdio.protocol import Kind, encode_message
from tests.child import DEMO, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload
from tests.gdscript import PackedByteArray, PackedInt32Array, Script

CLIENT = ROOT / "mossnano_stdio" / "clients" / "godot" / "mossnano.gd"
CHUNKED = [*DEMO, "--chunk-frames", "4"]

Start = Callable[..., Any]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a voice around a command, with variables of it set before, and notes down in `said` what it signals."""
    voices = []

    def start(command: Sequence[str] = CHUNKED, **variables: Any) -> Any:
        voice: Any = Script(CLIENT, ROOT)
        voices.append(voice)
        said: list[tuple[Any, ...]] = []
        vars(voice)["said"] = said
        voice.ready_to_feed.connect(lambda: said.append(("ready",)))
        voice.failed.connect(lambda *what: said.append(("failed", *what)))
        for name, value in variables.items():
            setattr(voice, name, value)
        assert voice.start(command[0], list(command[1:]))
        return voice

    yield start
    for voice in voices:
        voice.stop()


def until(voice: Any, condition: Callable[[], object]) -> None:
    for _ in range(30_000):  # a minute is far more than anything here takes
        voice.run_deferred()
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError(f"never; it said {voice.said}, and printed {voice.engine.printed}")


@contextmanager
def at_most_a_minute(voice: Any) -> Iterator[None]:
    """Then the process is killed, so that a call that waits for it fails the test, and does not hang it."""
    killer = threading.Timer(60, os.kill, [voice._pid, signal.SIGKILL])
    killer.start()
    yield
    killer.cancel()


def until_ready(voice: Any) -> None:
    until(voice, lambda: ("ready",) in voice.said)


def pulled(voice: Any, samples: int) -> bytes:
    return b"".join(
        round(value * 32767).to_bytes(2, "little", signed=True)
        for sample in voice.pull(samples)
        for value in (sample.x, sample.y)
    )


def heard(voice: Any) -> bytes:
    """All that it has to say, with what was silence in between left out: pulled sample by sample where it runs dry."""
    pcm = b""
    while voice.is_speaking():
        voice.run_deferred()
        there = voice._pcm_bytes // 4
        if there:
            pcm += pulled(voice, min(there, 4800))
        else:
            time.sleep(0.002)
    return pcm


def frames_and_pcm(count: int) -> tuple[PackedByteArray, bytes]:
    """Packed frames, and what the process itself makes of them."""
    packed = tokens_payload(some_frames(count, NANO))
    wire = encode_message(Kind.TOKENS, packed) + encode_message(Kind.END)
    return PackedByteArray(packed), run([*CHUNKED, "--output", "raw"], wire).stdout


def test_a_stream_sounds_as_the_process_says(start: Start) -> None:
    packed, pcm = frames_and_pcm(21)
    voice = start()
    until_ready(voice)
    assert voice.feed(packed)
    assert voice.finish()
    assert heard(voice) == pcm
    assert voice.said == [("ready",)]


def test_codes_are_packed_as_the_process_wants_them(start: Start) -> None:
    _, pcm = frames_and_pcm(5)
    voice = start()
    until_ready(voice)
    codes = [code for frame in some_frames(5, NANO) for code in frame]
    assert voice.feed_codes(PackedInt32Array(codes))
    voice.finish()
    assert heard(voice) == pcm
    assert not voice.feed_codes(PackedInt32Array([*codes[:15], 1024]))
    assert "1023 are allowed" in voice.engine.pushed_errors[-1]


def test_a_stream_to_which_nothing_was_fed_ends(start: Start) -> None:
    voice = start()
    until_ready(voice)
    voice.feed(PackedByteArray())
    assert voice.is_speaking()
    voice.finish()
    until(voice, lambda: not voice.is_speaking())
    assert voice.said == [("ready",)]


def test_a_program_that_is_not_there_or_has_no_weights_is_said(start: Start) -> None:
    voice = start(["no-such-decoder"])
    until(voice, lambda: voice.said)
    assert voice.said[0][:2] == ("failed", "process_ended")
    voice = start([*DEMO, "--weights", "nowhere"])
    until(voice, lambda: voice.said)
    assert voice.said[0][:2] == ("failed", "bad_weights")
    assert voice.said[0][3] is True


def test_a_process_that_hangs_holds_nobody_up(start: Start) -> None:
    """Nothing waits for it, 4 MiB are kept for it, more are refused, and when it goes on, all is as it should be."""
    packed, pcm = frames_and_pcm(30)
    voice = start()
    until_ready(voice)
    os.kill(voice._pid, signal.SIGSTOP)
    many = PackedByteArray(8000 * 20)
    with at_most_a_minute(voice):
        assert voice.feed(many)
        assert voice.finish()
        assert voice.cancel()
        fed = 0
        while fed < 100 and voice.feed(many):
            fed += 1
        assert fed in (26, 27), "of 160,200 bytes into 4 MiB, and what the pipe took"
        assert "4194304 (4 MiB) are allowed" in voice.engine.pushed_errors[-1]
        assert voice.finish()
        for _ in range(1000):
            assert voice.cancel()
        assert voice.feed(packed)
        assert voice.finish()
        assert voice.is_speaking()
    os.kill(voice._pid, signal.SIGCONT)
    assert heard(voice) == pcm


def test_a_process_that_hangs_is_ended_by_stop(start: Start) -> None:
    voice = start()
    until_ready(voice)
    os.kill(voice._pid, signal.SIGSTOP)
    assert voice.feed(PackedByteArray(8000 * 20))
    pid = voice._pid
    voice.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
