"""The Godot client's logic, run against the real process by tests/gdscript.py. Godot itself is not to be had here."""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.platform == "win32":
    pytest.skip("tests/gdscript.py starts and ends processes as POSIX does", allow_module_level=True)

from mossnano_stdio.protocol.messages import Kind, encode_message
from mossnano_stdio.tokens import pack_frames
from tests.child import DEMO, PROCESS, ROOT, run, stop
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
        voice.lost.connect(lambda streams: said.append(("lost", list(streams))))
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
    killer = threading.Timer(60, os.kill, [voice.pid, signal.SIGKILL])
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
        there = voice._ring.bytes // voice._ring.sample_bytes
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


def test_mimi_is_mono_and_sounds_on_both_sides(start: Start, mimi_standin: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 2048, (11, 32))
    command = [*PROCESS, "--weights", str(mimi_standin), "--threads", "1", "--chunk-frames", "4"]
    wire = encode_message(Kind.TOKENS, pack_frames(codes, 2048)) + encode_message(Kind.END)
    mono = np.frombuffer(run([*command, "--output", "raw"], wire).stdout, "<i2")
    voice = start(command)
    until_ready(voice)
    assert voice.feed_codes(PackedInt32Array(codes.ravel().tolist()))
    voice.finish()
    assert np.array_equal(np.frombuffer(heard(voice), "<i2").reshape(-1, 2), np.stack([mono, mono], axis=1))


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
    stop(voice.pid)
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
    os.kill(voice.pid, signal.SIGCONT)
    assert heard(voice) == pcm


def test_a_process_that_hangs_is_ended_by_stop(start: Start) -> None:
    voice = start()
    until_ready(voice)
    stop(voice.pid)
    assert voice.feed(PackedByteArray(8000 * 20))
    pid = voice.pid
    voice.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --- what is heard, of a decoder that says 10,000 all the time -------------------------------------------------------

STEADY = [sys.executable, str(ROOT / "tests" / "steady.py")]
LOUD = 10_000
FADE = 240  # samples in 5 ms
STEP = LOUD / FADE + 1  # between neighbours in a fade


class Steady:
    """A voice of steady.py, and the left channel of all that was pulled of it."""

    def __init__(self, voice: Any) -> None:
        self.voice = voice
        self.pulled: list[int] = []
        until_ready(voice)

    def pull(self, samples: int) -> int:
        """How many of them are not silent."""
        given = list(struct.iter_unpack("<2h", pulled(self.voice, samples)))
        assert len(given) == samples
        assert all(left == -right for left, right in given)
        self.pulled += [left for left, _ in given]
        return sum(1 for left, _ in given if left)

    def feed(self, samples: int) -> None:
        assert self.voice.feed(PackedByteArray(struct.pack("<I", samples)))

    def feed_and_wait(self, samples: int) -> None:
        """Until the first of them is there."""
        self.feed(samples)
        before = self.voice._ring.bytes
        until(self.voice, lambda: self.voice._ring.bytes > before)

    def largest_step(self) -> int:
        return max(abs(after - before) for before, after in pairwise(self.pulled))


def test_an_underrun_fades_out_and_what_follows_fades_in(start: Start) -> None:
    steady = Steady(start(STEADY))
    steady.feed_and_wait(1000)
    assert steady.pull(900) == 900
    assert steady.pull(480) == 100 + FADE - 1, "the last sample of a fade is silent"
    assert steady.voice.underruns == 1
    assert steady.pull(480) == 0
    steady.feed_and_wait(1000)
    steady.pull(1000)
    assert steady.pulled[:1000] == [LOUD] * 1000
    assert steady.pulled[1000 + FADE : 1860] == [0] * (860 - FADE)
    assert steady.pulled[1860 + FADE :] == [LOUD] * (1000 - FADE), "no sample is lost"
    assert steady.largest_step() <= STEP


def test_cancel_fades_out_and_what_follows_fades_in(start: Start) -> None:
    steady = Steady(start(STEADY))
    steady.feed_and_wait(200)
    steady.pull(101)
    steady.voice.cancel()  # 99 wait: the rest of the fade holds the last one
    assert steady.voice.is_speaking()
    assert steady.pull(480) == FADE - 1
    until(steady.voice, lambda: not steady.voice.is_speaking())
    steady.feed_and_wait(1000)
    steady.pull(1000)
    steady.voice.cancel()
    steady.pull(100)
    steady.pull(140)
    steady.feed_and_wait(1000)
    steady.pull(100)
    steady.voice.cancel()  # while it fades in
    steady.pull(480)
    assert steady.pulled[:101] == [LOUD] * 101
    assert steady.pulled[581 + FADE : 1581] == [LOUD] * (1000 - FADE)
    assert steady.pulled[1820] == 0
    assert steady.pulled[1920] > LOUD / 3
    assert steady.pulled[1921 + FADE :] == [0] * (480 - FADE)
    assert steady.largest_step() <= STEP


def test_a_fade_of_nothing_leaves_every_sample_as_it_came(start: Start) -> None:
    steady = Steady(start(STEADY, fade_ms=0))
    steady.feed_and_wait(1000)
    steady.pull(1200)
    steady.feed_and_wait(1000)
    steady.pull(500)
    steady.voice.cancel()
    steady.pull(100)
    assert steady.pulled == [LOUD] * 1000 + [0] * 200 + [LOUD] * 500 + [0] * 100


def test_a_stream_that_ends_by_itself_is_not_faded(start: Start) -> None:
    steady = Steady(start(STEADY))
    steady.feed_and_wait(1000)
    steady.pull(1000)
    steady.voice.finish()
    until(steady.voice, lambda: not steady.voice.is_speaking())
    steady.pull(480)
    assert steady.pulled == [LOUD] * 1000 + [0] * 480
    assert steady.voice.underruns == 0


def test_a_prebuffer_is_filled_before_a_stream_sounds_and_after_an_underrun(start: Start) -> None:
    steady = Steady(start(STEADY, prebuffer_ms=20, fade_ms=0))  # 960 samples
    steady.feed_and_wait(500)
    assert steady.pull(480) == 0
    steady.feed_and_wait(500)
    assert steady.pull(1000) == 1000
    assert steady.pull(10) == 0
    assert steady.voice.underruns == 1
    steady.feed_and_wait(500)
    assert steady.pull(480) == 0
    assert steady.voice.underruns == 1
    steady.voice.finish()  # no more comes: what there is, is the rest
    until(steady.voice, lambda: steady.pull(480) == 480)
    assert steady.pull(480) == 20
    assert not steady.voice.is_speaking()


# --- starting, dying, starting again ---------------------------------------------------------------------------------

STARTING, READY, FAILED, STOPPED = range(4)


def test_a_start_tells_how_far_it_is(start: Start) -> None:
    voice = Script(CLIENT, ROOT)
    assert (voice.state, voice.pid, voice.stream, voice.version) == (STOPPED, -1, -1, "")
    voice = start(STEADY)
    lines: list[str] = []
    voice.log_line.connect(lines.append)
    if voice.state == STARTING:  # it may be quick
        assert not voice.feed(PackedByteArray(4))
        assert "while the state is READY" in voice.engine.pushed_errors[-1]
        assert not voice.cancel()
        assert pulled(voice, 2) == bytes(8)
    until_ready(voice)
    assert (voice.state, voice.version, voice.demo, voice.format["name"]) == (READY, "1.2", True, "steady")
    os.kill(voice.pid, 0)
    assert voice.feed(PackedByteArray(4))  # of which it dies
    until(voice, lambda: voice.said[-1][0] == "failed")
    assert voice.said[1:] == [("lost", [0]), ("failed", "process_ended", voice.reason["message"], True)]
    assert (voice.state, voice.reason["code"], voice.stream) == (FAILED, "process_ended", 0)
    until(voice, lambda: len(lines) == 3)
    assert lines == ["loading", "dying: gr\u00fcn", "without a last line"]
    assert voice.engine.printed == []
    voice.stop()
    assert voice.state == STOPPED


def test_lines_of_the_process_are_printed_where_nobody_takes_them(start: Start) -> None:
    voice = start(STEADY)
    until(voice, lambda: voice.engine.printed)
    assert voice.engine.printed == ["loading"]


def test_a_start_that_fails_is_not_tried_again(start: Start) -> None:
    voice = start(["true"], restart=5)
    until(voice, lambda: voice.said)
    assert [word for word, *_ in voice.said] == ["failed"]
    assert (voice.state, voice.restarts, voice.said[0][3]) == (FAILED, 0, True)


def test_an_end_that_a_fatal_error_brings_is_no_end(start: Start) -> None:
    """It says how much was sent, which is less than all. So it ends no row of restarts either."""
    voice = start([*CHUNKED, "--max-message-bytes", "300"], restart=1)
    for restarts in (1, 2):
        until_ready(voice)
        voice.said.clear()
        voice.feed(PackedByteArray(bytes(20)))
        voice.feed(PackedByteArray(bytes(400)))
        until(voice, lambda: ("ready",) in voice.said or voice.state == FAILED)
        until(voice, partial(voice.said.count, ("lost", [restarts - 1])))
        fatal = [what[3] for what in voice.said if what[0] == "failed"]
        assert (voice.said[0][:2], fatal[0], voice.restarts) == (("failed", "framing_lost"), restarts == 2, 1)


def test_a_crash_is_survived_and_what_was_fed_is_reported_lost(start: Start) -> None:
    steady = Steady(start(STEADY, restart=1))
    voice = steady.voice
    before = voice.pid
    steady.feed_and_wait(100)  # stream 0 is heard to its end
    voice.finish()
    steady.pull(100)
    until(voice, lambda: not voice.is_speaking())
    steady.feed_and_wait(500)  # stream 1 is cut
    steady.pull(1)
    steady.feed(0)
    voice.finish()
    steady.feed(7)  # stream 2 is not even begun
    until(voice, lambda: voice.restarts == 1)
    until(voice, lambda: len(voice.said) == 4)
    assert voice.said[1:] == [("lost", [1, 2]), ("failed", "process_ended", voice.said[2][2], False), ("ready",)]
    assert (voice.state, voice.pid != before, voice.is_speaking()) == (READY, True, True)
    steady.feed_and_wait(300)  # stream 3
    voice.finish()
    steady.pull(499 + FADE)
    assert voice.played == {"stream": 1, "samples": 500}
    steady.pull(300)
    assert voice.played == {"stream": 3, "samples": 300}
    assert voice.stream == 3
    assert steady.pulled[:600] == [LOUD] * 600
    assert steady.pulled[600 + FADE - 1] == 0
    assert steady.pulled[-60:] == [LOUD] * 60
    assert steady.largest_step() <= STEP
    until(voice, lambda: not voice.is_speaking())
    voice.said.clear()
    steady.feed(0)  # a stream came to its end: it may be started again
    until(voice, lambda: ("ready",) in voice.said)
    steady.feed(0)  # none did
    until(voice, lambda: voice.state == FAILED)
    until(voice, lambda: len(voice.said) == 5)
    assert [voice.said[2], voice.said[3], voice.said[4][3]] == [("ready",), ("lost", [5]), True]


def test_stop_ends_the_pause_before_a_restart(start: Start) -> None:
    steady = Steady(start(STEADY, restart=1))
    steady.feed(0)
    until(steady.voice, lambda: steady.voice.state == STARTING)
    steady.voice.stop()
    assert (steady.voice.state, steady.voice.restarts) == (STOPPED, 0)


def test_played_says_how_much_of_which_stream_was_given_out(start: Start) -> None:
    steady = Steady(start(STEADY))
    assert steady.voice.played == {"stream": -1, "samples": 0}
    steady.feed_and_wait(1000)
    steady.pull(300)
    steady.voice.cancel()
    steady.pull(480)
    assert steady.voice.played == {"stream": 0, "samples": 300}
    until(steady.voice, lambda: not steady.voice.is_speaking())
    steady.feed_and_wait(10)
    steady.pull(1)
    assert steady.voice.played == {"stream": 1, "samples": 1}
