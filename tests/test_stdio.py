"""process/stdio.py: whatever stands behind the descriptors, and whenever a signal comes, no byte is lost or torn."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("leans on Linux's pipes, signals and terminals", allow_module_level=True)

from mossnano_stdio.errors import OutOfMemoryError
from mossnano_stdio.process.inbox import Inbox
from mossnano_stdio.process.stdio import InputThread
from mossnano_stdio.protocol.messages import Kind, Message, MessageReader
from tests.child import (
    DEMO,
    LONG,
    ROOT,
    TIMEOUT_SECONDS,
    Child,
    decoded,
    double,
    encoded,
    outline,
    pcm_of,
    random_tokens,
    run,
)
from tests.conftest import repeated
from tests.doubles import NANO, SMALL, expected_pcm, some_frames, tokens_payload

FRAMES = some_frames(20)
STREAM = encoded(Message(Kind.TOKENS, tokens_payload(FRAMES)), Message(Kind.END))
PCM = expected_pcm(FRAMES, SMALL)


@pytest.mark.parametrize("output", ["framed", "raw", "wav"])
@pytest.mark.parametrize("bytes_read", [0, 1, 5, 44, 100_000])
def test_a_reader_who_leaves_anywhere(output: str, bytes_read: int) -> None:
    with Child([*DEMO, "--output", output]) as child:
        child.say(random_tokens(100))  # and stdin stays open
        assert child.process.stdout
        left = bytes_read
        while left:
            left -= len(child.process.stdout.read(left) or b"")
        child.process.stdout.close()
        assert child.process.wait(TIMEOUT_SECONDS) == 141
        assert [line for line in child.stderr.read().splitlines() if b"demo" not in line] == []


def test_nothing_but_messages_reaches_stdout() -> None:
    done = run(double({"noise": True}), STREAM)
    assert pcm_of(decoded(done.stdout)) == PCM
    for stray in (b"a stray print", b"a stray write", b"a stray puts", b"a stray warning"):
        assert stray in done.stderr


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_a_standard_descriptor_that_the_parent_closed(fd: int) -> None:
    done = run(["sh", "-c", f'exec "$@" {fd}{"<" if fd == 0 else ">"}&-', "sh", *double()], STREAM)
    if fd == 0:
        assert (done.returncode, outline(decoded(done.stdout))) == (0, ["HANDSHAKE"])
    if fd == 1:
        assert (done.returncode, done.stdout) == (74, b"")
        assert b"EBADF" in done.stderr
    if fd == 2:
        assert pcm_of(decoded(done.stdout)) == PCM


@pytest.mark.parametrize("output", ["framed", "raw", "wav"])
def test_a_full_disk_is_named(output: str) -> None:
    command = double({}, "--output", output)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, input=STREAM, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert done.returncode == 74
    assert b"ENOSPC" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_who_leaves_an_idle_process_ends_it_quietly() -> None:
    with Child(double()) as child:
        child.next()
        assert child.process.stdout is not None
        child.process.stdout.close()
        assert child.process.wait(5) == 141
        assert child.stderr.read() == b""


@pytest.mark.parametrize("most", [1, 7, 4095])
def test_short_writes_lose_nothing(most: int) -> None:
    for output in ("raw", "framed"):
        done = run(double({"short_writes": most}, "--output", output, "--chunk-frames", "20"), STREAM)
        assert done.returncode == 0
        assert (done.stdout if output == "raw" else pcm_of(decoded(done.stdout))) == PCM


def test_unbuffered_python(in_peace: bytes) -> None:
    command = [sys.executable, "-u", *DEMO[1:], "--output", "raw"]
    assert run(command, LONG).stdout == in_peace


def read_slowly(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 50_000):
        pieces.append(piece)
        time.sleep(0.005)
    return b"".join(pieces)


def start_raw(**descriptors: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*DEMO, "--output", "raw"], stderr=subprocess.DEVNULL, cwd=ROOT, **descriptors)


def test_a_stdout_that_does_not_block(in_peace: bytes) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    child = start_raw(stdin=subprocess.PIPE, stdout=writing)
    os.close(writing)
    assert child.stdin
    child.stdin.write(LONG)
    child.stdin.close()
    assert read_slowly(reading) == in_peace
    os.close(reading)
    assert child.wait(TIMEOUT_SECONDS) == 0


def test_a_stdin_that_does_not_block(in_peace: bytes) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    child = start_raw(stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    for start in range(0, len(LONG), 100):
        os.write(writing, LONG[start : start + 100])
        time.sleep(0.002)
    os.close(writing)
    assert child.communicate(timeout=TIMEOUT_SECONDS)[0] == in_peace
    assert child.returncode == 0


@pytest.mark.parametrize("blocking", [True, False])
def test_a_socket_for_both(blocking: bool, in_peace: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(blocking)
        child = start_raw(stdin=theirs, stdout=theirs)
        theirs.close()
        ours.sendall(LONG)
        ours.shutdown(socket.SHUT_WR)
        assert read_slowly(ours.fileno()) == in_peace
        assert child.wait(TIMEOUT_SECONDS) == 0


def test_a_socket_whose_other_end_stalls_leaves_us_stoppable() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_raw(stdin=theirs, stdout=theirs)
        theirs.close()
        ours.sendall(LONG)
        time.sleep(1.5)
        child.terminate()
        sent = time.monotonic()
        assert child.wait(TIMEOUT_SECONDS) == 143
        assert time.monotonic() - sent < 1


def test_a_named_pipe_and_a_file(in_peace: bytes, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    (tmp_path / "out").write_bytes(b"before")
    command = 'exec "$@" < in >> out'
    child = subprocess.Popen(
        ["sh", "-c", command, "sh", *DEMO, "--output", "raw"],
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    (tmp_path / "in").write_bytes(LONG)
    assert child.wait(TIMEOUT_SECONDS) == 0
    assert (tmp_path / "out").read_bytes() == b"before" + in_peace


@pytest.mark.parametrize(
    ("seconds", "rain"),
    [(0.01, [signal.SIGUSR1]), (0.05, [signal.SIGSTOP, signal.SIGCONT])],
    ids=["SIGUSR1 at 100 Hz", "stopped and continued"],
)
def test_a_rain_of_signals_changes_no_byte(seconds: float, rain: list[int], in_peace: bytes) -> None:
    with Child(DEMO, stderr=subprocess.DEVNULL) as child:
        child.next()

        is_over = threading.Event()

        def strike() -> None:
            while not is_over.wait(seconds):
                for number in rain:
                    child.process.send_signal(number)
                    time.sleep(seconds / 4)

        striker = threading.Thread(target=strike)
        striker.start()
        try:
            for _ in range(3):
                for start in range(0, len(LONG), 500):
                    child.write(LONG[start : start + 500])
                    time.sleep(0.01)
                heard = b""
                while (message := child.next()).kind == Kind.AUDIO:
                    heard += message.payload
                    time.sleep(0.01)
                assert heard == in_peace
        finally:
            is_over.set()
            striker.join()


@contextlib.contextmanager
def stderr_that_nobody_reads() -> Iterator[int]:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    try:
        yield writing
    finally:
        os.close(reading)
        os.close(writing)


def test_a_stderr_that_nobody_reads_stops_nothing(in_peace: bytes) -> None:
    with stderr_that_nobody_reads() as stderr, Child([*DEMO, "--stats"], stderr=stderr) as child:
        child.next()
        child.say(*[Message(0x42)] * 3000)
        child.process.send_signal(signal.SIGUSR1)
        child.write(LONG)
        answers = child.until(Kind.END)
        assert sum(answer.kind == Kind.ERROR for answer in answers) == 3000
        assert pcm_of(answers) == in_peace
        assert child.finish()[0] == 0


@pytest.mark.parametrize(("raised", "status"), [("ZeroDivisionError", 70), ("MemoryError", 71)])
def test_a_stderr_that_nobody_reads_does_not_keep_us_from_dying(raised: str, status: int) -> None:
    with stderr_that_nobody_reads() as stderr, Child(double({"raising": {"1": raised}}), stderr=stderr) as child:
        child.next()
        child.say(Message(Kind.TOKENS, tokens_payload(some_frames(1))))
        assert child.process.wait(5) == status


@pytest.mark.parametrize("where", ["/dev/full", "closed pipe"])
def test_a_stderr_that_fails_stops_nothing(where: str, in_peace: bytes) -> None:
    if where == "closed pipe":
        reading, stderr = os.pipe()
        os.close(reading)
    else:
        stderr = os.open(where, os.O_WRONLY)
    try:
        with Child([*DEMO, "--stats"], stderr=stderr) as child:
            child.next()
            child.say(*[Message(0x42)] * 100)
            child.write(LONG)
            assert pcm_of(child.until(Kind.END)) == in_peace
            assert child.finish()[0] == 0
    finally:
        os.close(stderr)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("plan", [{"load_seconds": 30}, {}, {"nano": True}], ids=["loading", "idle", "blocked write"])
def test_signals_end_us_soon_and_with_their_status(number: int, plan: dict[str, Any]) -> None:
    with Child(double(plan)) as child:
        if "load_seconds" in plan:
            child.stderr.readline()
        else:
            child.next()
        if "nano" in plan:
            child.say(Message(Kind.TOKENS, tokens_payload(some_frames(100, NANO))))
            time.sleep(0.3)
        sent = time.monotonic()
        child.process.send_signal(number)
        assert child.process.wait(5) == 128 + number
        assert time.monotonic() - sent < 0.2 + 0.3  # the grace, and what a busy machine adds


@repeated(few=6, many=200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_tears_no_message(times: int, number: int) -> None:
    for attempt in range(times):
        with Child(double({"nano": True, "step_seconds": 0.001}), stderr=subprocess.DEVNULL) as child:
            child.next()
            child.say(Message(Kind.TOKENS, tokens_payload(some_frames(2000, NANO))))
            child.next()
            timer = threading.Timer(random.Random(attempt).uniform(0, 0.05), child.process.send_signal, [number])
            timer.start()
            with contextlib.suppress(AssertionError):  # the output has ended
                while True:
                    child.next()
            assert child.process.wait(TIMEOUT_SECONDS) == 128 + number
            assert child.torn_bytes == 0
            timer.join()


@repeated(few=4, many=100)
def test_two_signals_at_once_are_not_lost_on_each_other(times: int) -> None:
    """The system may hand both to a thread that does not care for them."""
    for _ in range(times):
        with Child(double({"nano": True})) as child:
            child.next()
            child.say(Message(Kind.TOKENS, tokens_payload(some_frames(100, NANO))))
            time.sleep(0.2)
            child.process.send_signal(signal.SIGTERM)
            child.process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            assert child.process.wait(5) in (130, 143)  # which of the two is seen first is the system's affair
            assert time.monotonic() - sent < 1
            assert child.stderr.read() == b""


@repeated(few=5, many=100)
def test_a_signal_while_the_weights_are_loaded(times: int) -> None:
    """From the first moment at which the interpreter is ours; before that no program can do anything."""
    program = (
        "import os, mossnano_stdio.process.stdio as stdio\n"
        "install = stdio.StopSignals.install\n"
        "stdio.StopSignals.install = lambda self: (install(self), os.write(2, b'!'))\n"
        "from mossnano_stdio.__main__ import run\n"
        "run()\n"
    )
    for attempt in range(times):
        chosen = random.Random(attempt)
        with Child([sys.executable, "-c", program, "--weights", "demo"]) as child:
            assert child.stderr.read(1) == b"!"
            time.sleep(chosen.uniform(0, 0.3))
            number = chosen.choice([signal.SIGTERM, signal.SIGINT])
            child.process.send_signal(number)
            status, _, said = child.finish()
        assert (status, child.torn_bytes) == (128 + number, 0)
        assert "Traceback" not in said


def test_a_thread_that_is_not_to_be_had_is_memory_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OutOfMemoryError, match="no thread can be started"):
        InputThread(Inbox(), MessageReader(), None).start()
