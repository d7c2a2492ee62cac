"""An adversary: the real process under parents that die, readers that stall, failing calls and bad weights.

Whatever happens, it must end with a documented status, or go on and give the same bytes as in peace. Tests that repeat
something many times do so a few times here, and as often as it takes under `pytest -m slow`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.errors import OutOfMemoryError
from mossnano_stdio.process.inbox import Inbox
from mossnano_stdio.process.stdio import InputThread
from mossnano_stdio.protocol.messages import MAX_MESSAGE_BYTES, Kind, Message, MessageReader
from mossnano_stdio.tokens.packing import pack_frames
from mossnano_stdio.weights.folder import DEMO_FOLDER
from tests.child import DEMO, PROCESS, ROOT, TIMEOUT_SECONDS, Child, decoded, double, encoded, fields, pcm_of, run
from tests.doubles import NANO, SMALL, artifact_bytes, expected_pcm, some_frames, tokens_payload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and leans on Linux's pipes")

END = Message(Kind.END)
FRAME_PCM_BYTES = NANO.frame_pcm_bytes
MIB = 1 << 20


def repeated(few: int, many: int) -> pytest.MarkDecorator:
    """A test that is run `few` times in the gate and `many` times when there is time for it."""
    return pytest.mark.parametrize("times", [few, pytest.param(many, marks=pytest.mark.slow)])


def random_tokens(frames: int, seed: int = 0) -> Message:
    codes = np.random.default_rng(seed).integers(0, 1024, (frames, 16))
    return Message(Kind.TOKENS, pack_frames(codes, 1024))


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} of process {pid}")


def cpu_seconds(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def is_running(pid: int) -> bool:
    """A process that has ended may wait for somebody to ask for its status: that is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fd_count(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def in_peace() -> bytes:
    """What the demo makes of LONG when nobody disturbs it. Its sound does not depend on how it is cut into chunks."""
    done = run([*DEMO, "--output", "raw"], LONG)
    assert len(done.stdout) == LONG_FRAMES * FRAME_PCM_BYTES
    return done.stdout


LONG_FRAMES = 60
LONG = encoded(random_tokens(LONG_FRAMES), END)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.TOKENS, Kind.ARTIFACT, Kind.PING, 0x42])
def test_a_length_that_is_only_claimed_takes_no_memory(kind: int) -> None:
    with Child(double()) as child:
        child.next()
        before = memory_bytes(child.process.pid)
        child.write(MAX_MESSAGE_BYTES.to_bytes(4, "little") + bytes([kind]))
        time.sleep(0.2)
        assert memory_bytes(child.process.pid) - before < MIB
        assert child.finish()[0] == 65


def test_an_artifact_that_only_claims_to_be_large_takes_no_memory() -> None:
    header = artifact_bytes(some_frames(1), SMALL)[:32]
    largest = header[:24] + (32 * MIB * 8 // 40 - 8).to_bytes(4, "little") + header[28:]
    with Child(double()) as child:
        child.next()
        before = memory_bytes(child.process.pid, "VmHWM")
        child.say(Message(Kind.ARTIFACT, largest), Message(Kind.PING))
        assert child.next().kind == Kind.PING  # so it was taken for the beginning of one
        assert memory_bytes(child.process.pid, "VmHWM") - before < MIB
        assert child.finish()[0] == 65


def test_seventy_minutes_in_one_message_take_no_memory_that_grows_with_them() -> None:
    with Child(DEMO) as child:
        child.next()
        child.say(random_tokens(50), END)
        child.until(Kind.END)
        before = memory_bytes(child.process.pid, "VmHWM")
        message = random_tokens((MAX_MESSAGE_BYTES - 1) // 20)
        child.say(message)
        for _ in range(60):
            child.next()
        assert memory_bytes(child.process.pid, "VmHWM") - before < 32 * MIB
        child.say(Message(Kind.CANCEL))
        assert fields(child.until(Kind.END)[-1])["cancelled"] is True


@pytest.mark.slow
def test_seventy_minutes_in_one_message_to_their_end() -> None:
    frames = (MAX_MESSAGE_BYTES - 1) // 20
    with Child(DEMO, stderr=subprocess.DEVNULL) as child:
        child.next()
        child.say(random_tokens(50), END)
        child.until(Kind.END)
        before = memory_bytes(child.process.pid, "VmHWM")
        child.say(random_tokens(frames), END)
        pcm_bytes = 0
        while (message := child.next()).kind == Kind.AUDIO:
            pcm_bytes += len(message.payload)
        assert pcm_bytes == frames * FRAME_PCM_BYTES
        assert memory_bytes(child.process.pid, "VmHWM") - before < 32 * MIB


@pytest.mark.parametrize("extra_mib", [0, 4, 16, 40])
def test_memory_that_is_not_to_be_had_is_said_and_ends_us(extra_mib: int) -> None:
    """1,000 frames are 30 MB as floats, twice that while they are joined, and 15 MB as PCM."""
    resource = pytest.importorskip("resource")
    with Child([*DEMO, "--threads", "1", "--chunk-frames", "1000"]) as child:
        child.next()
        child.say(random_tokens(2), END)
        child.until(Kind.END)
        limit = memory_bytes(child.process.pid, "VmSize") + extra_mib * MIB
        resource.prlimit(child.process.pid, resource.RLIMIT_AS, (limit, limit))
        child.say(random_tokens(1000))
        error = child.next()
        assert (fields(error)["code"], fields(error)["fatal"]) == ("out_of_memory", True)
        status, rest, said = child.finish()
    assert (status, rest) == (71, [])
    assert "Traceback" not in said


def test_a_thread_that_is_not_to_be_had_is_memory_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OutOfMemoryError, match="no thread can be started"):
        InputThread(Inbox(), MessageReader(), None).start()


@repeated(few=3_000, many=100_000)
def test_neither_memory_nor_descriptors_grow_with_the_age_of_a_stream(times: int) -> None:
    with Child([*DEMO, "--chunk-frames", "1", "--threads", "1"], stderr=subprocess.DEVNULL) as child:
        pid = child.process.pid
        child.next()
        sizes, descriptors = [], []
        for burst in range(10):
            child.say(random_tokens(times // 10, seed=burst), Message(Kind.PING))
            child.until(Kind.PING)
            sizes.append(memory_bytes(pid))
            descriptors.append(fd_count(pid))
    assert max(sizes[3:]) - min(sizes[3:]) < MIB
    assert len(set(descriptors)) == 1


@repeated(few=300, many=20_000)
def test_neither_memory_nor_descriptors_grow_with_the_number_of_streams(times: int) -> None:
    """Good streams, bad ones, cut ones, cancelled ones."""
    artifact = artifact_bytes(some_frames(3), SMALL)
    round_of_streams = encoded(
        Message(Kind.TOKENS, tokens_payload(some_frames(3))),
        END,
        Message(Kind.TOKENS, b"\xff"),
        END,
        Message(Kind.ARTIFACT, artifact),
        Message(Kind.ARTIFACT, artifact[:-3]),
        Message(Kind.CANCEL),
        Message(Kind.ARTIFACT, b"MOSSNANO" + bytes(50)),
        Message(Kind.CANCEL),
        Message(0x42, bytes(1000)),
        Message(Kind.SETTINGS, b'{"chunk_frames": null}'),
        Message(Kind.PING),
    )
    with Child(double(), stderr=subprocess.DEVNULL) as child:
        pid = child.process.pid
        sizes, descriptors = [], []
        for _ in range(10):
            for _ in range(times // 10):
                child.write(round_of_streams)
                child.until(Kind.PING)
            sizes.append(memory_bytes(pid))
            descriptors.append(fd_count(pid))
    assert max(sizes[3:]) - min(sizes[3:]) < MIB
    assert len(set(descriptors)) == 1


# --- parents and readers ---------------------------------------------------------------------------------------------

# Starts the process, brings it into some state, says its id, and sleeps until it is killed.
PARENT = """
import json, sys, time
from tests.child import Child
from tests.test_abuse import random_tokens
state, command = sys.argv[1], json.loads(sys.argv[2])
child = Child(command)
if state != "loading":
    child.next()
if state in ("decoding", "blocked"):
    child.say(random_tokens(20_000))
print(child.process.pid, flush=True)
while state == "decoding":
    child.next()
time.sleep(60)
"""


@repeated(few=1, many=25)
@pytest.mark.parametrize("state", ["loading", "idle", "decoding", "blocked"])
def test_who_loses_their_parent_is_gone_soon(times: int, state: str) -> None:
    for attempt in range(times):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, state, json.dumps(DEMO)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(random.Random(attempt).uniform(0, 0.3))
        parent.kill()
        parent.wait()
        parent.stdout.close()
        killed = time.monotonic()
        while is_running(pid):
            assert time.monotonic() - killed < 2, state
            time.sleep(0.02)


@repeated(few=2, many=10)
def test_a_reader_that_stalls_costs_nothing_and_loses_nothing(times: int, in_peace: bytes) -> None:
    """`times` is how many seconds it stalls."""
    with Child(DEMO) as child:
        child.next()
        child.write(LONG)
        time.sleep(1)
        before_bytes, before_cpu = memory_bytes(child.process.pid), cpu_seconds(child.process.pid)
        time.sleep(times)
        assert memory_bytes(child.process.pid) - before_bytes < MIB
        assert cpu_seconds(child.process.pid) - before_cpu <= max(0.01 * times, 0.02)
        assert pcm_of(child.until(Kind.END)) == in_peace


def test_an_idle_process_costs_nothing() -> None:
    with Child(DEMO) as child:
        child.next()
        before_cpu = cpu_seconds(child.process.pid)
        time.sleep(2)
        assert cpu_seconds(child.process.pid) - before_cpu <= 0.02


@pytest.mark.parametrize("output", ["framed", "raw", "wav"])
@pytest.mark.parametrize("bytes_read", [0, 1, 5, 44, 100_000])
def test_a_reader_who_leaves_anywhere(output: str, bytes_read: int) -> None:
    child = subprocess.Popen(
        [*DEMO, "--output", output],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        bufsize=0,
    )
    assert child.stdin
    assert child.stdout
    child.stdin.write(encoded(random_tokens(100)))  # and stdin stays open
    left = bytes_read
    while left:
        left -= len(child.stdout.read(left) or b"")
    child.stdout.close()
    assert child.wait(TIMEOUT_SECONDS) == 141
    assert child.stderr
    lines = child.stderr.read().splitlines()
    child.stdin.close()
    child.stderr.close()
    assert [line for line in lines if b"demo" not in line] == []


@pytest.mark.parametrize("output", ["framed", "raw", "wav"])
def test_a_full_disk_is_named_every_time(output: str) -> None:
    with Path("/dev/full").open("wb") as full:
        for _ in range(3):
            done = subprocess.run(
                [*DEMO, "--output", output], input=LONG, stdout=full, stderr=subprocess.PIPE, cwd=ROOT
            )
            assert done.returncode == 74
            assert b"ENOSPC" in done.stderr
            assert b"Traceback" not in done.stderr


# --- descriptors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 7, 4095])
def test_short_writes_lose_nothing(most: int) -> None:
    frames = some_frames(30)
    wire = encoded(Message(Kind.TOKENS, tokens_payload(frames)), END)
    for output, expected in (("raw", expected_pcm(frames, SMALL)), ("framed", None)):
        done = run(double({"short_writes": most}, "--output", output, "--chunk-frames", "30"), wire)
        assert done.returncode == 0
        assert (done.stdout if expected else pcm_of(decoded(done.stdout))) == expected_pcm(frames, SMALL)


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


@contextlib.contextmanager
def every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Do something again and again, from a thread, for as long as the block lasts."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("seconds", "rain"),
    [(0.01, [signal.SIGUSR1]), (0.05, [signal.SIGSTOP, signal.SIGCONT])],
    ids=["SIGUSR1 at 100 Hz", "stopped and continued"],
)
def test_a_rain_of_signals_changes_no_byte(seconds: float, rain: list[int], in_peace: bytes) -> None:
    with Child(DEMO, stderr=subprocess.DEVNULL) as child:
        child.next()

        def strike() -> None:
            for number in rain:
                child.process.send_signal(number)
                time.sleep(seconds / 4)

        with every(seconds, strike):
            for _ in range(3):
                for start in range(0, len(LONG), 500):
                    child.write(LONG[start : start + 500])
                    time.sleep(0.01)
                heard = b""
                while (message := child.next()).kind == Kind.AUDIO:
                    heard += message.payload
                    time.sleep(0.01)
                assert heard == in_peace


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


@repeated(few=6, many=200)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_at_any_time_tears_no_message(times: int, number: int, status: int) -> None:
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
            assert child.process.wait(TIMEOUT_SECONDS) == status
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
            assert child.process.stderr
            assert child.process.stderr.read() == b""


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
        child = subprocess.Popen(
            [sys.executable, "-c", program, "--weights", "demo"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        assert child.stderr
        assert child.stderr.read(1) == b"!"
        time.sleep(random.Random(attempt).uniform(0, 0.3))
        number = random.Random(attempt).choice([signal.SIGTERM, signal.SIGINT])
        child.send_signal(number)
        out, err = child.communicate(timeout=TIMEOUT_SECONDS)
        assert child.returncode == (143 if number == signal.SIGTERM else 130)
        decoded(out)
        assert b"Traceback" not in err


# --- calls that fail -------------------------------------------------------------------------------------------------

STREAMS = [some_frames(3, seed=seed) for seed in range(3)]
SCRIPT = [
    message
    for frames in STREAMS
    for message in (*(Message(Kind.TOKENS, tokens_payload([frame])) for frame in frames), END)
]


def play_script(plan: dict[str, Any]) -> tuple[int, list[Message]]:
    """Message by message, each waiting for its answer where one comes: so many reads, so many writes, so many steps."""
    with Child(double(plan), stderr=subprocess.DEVNULL) as child:
        answers: list[Message] = []
        with contextlib.suppress(AssertionError, BrokenPipeError):  # it has ended
            answers.append(child.next())
            for message in SCRIPT:
                child.say(message)
                answers.append(child.next())
        status, rest, _ = child.finish()
        return status, answers + rest


def test_the_script_in_peace() -> None:
    status, answers = play_script({})
    assert status == 0
    assert pcm_of(answers) == b"".join(expected_pcm(frames, SMALL) for frames in STREAMS)
    assert len(answers) == 1 + len(SCRIPT)


@pytest.mark.parametrize("nth", range(len(SCRIPT) + 1))
def test_the_nth_read_fails(nth: int) -> None:
    status, answers = play_script({"failing_reads": [nth]})
    assert status == 65
    assert [fields(answer)["code"] for answer in answers if answer.kind == Kind.ERROR] == ["input_cut"]
    whole = b"".join(expected_pcm(frames, SMALL) for frames in STREAMS)
    assert whole.startswith(pcm_of(answers))


@pytest.mark.parametrize("nth", range(len(SCRIPT) + 1))
def test_the_nth_write_fails(nth: int) -> None:
    status, answers = play_script({"failing_writes": [nth]})
    assert status == 74
    assert len(answers) == nth


def split_streams(answers: Sequence[Message]) -> list[list[Message]]:
    """The answers to each stream, its END the last."""
    streams: list[list[Message]] = [[]]
    for answer in answers:
        streams[-1].append(answer)
        if answer.kind == Kind.END:
            streams.append([])
    return streams[:-1]


@pytest.mark.parametrize("nth", range(1, 10))
def test_the_nth_step_fails(nth: int) -> None:
    """Step 0 is the warm-up. The stream it was in is lost, the others are as ever."""
    wire = encoded(*SCRIPT)
    done = run(double({"failing_steps": [nth]}, "--chunk-frames", "1"), wire)
    assert done.returncode == 0
    streams = split_streams(decoded(done.stdout)[1:])
    hit = (nth - 1) // 3
    for index, frames in enumerate(STREAMS):
        errors = [fields(message)["code"] for message in streams[index] if message.kind == Kind.ERROR]
        pcm = pcm_of(streams[index])
        assert errors == (["decode_failed"] if index == hit else [])
        assert fields(streams[index][-1])["errors"] == (index == hit)
        assert expected_pcm(frames, SMALL).startswith(pcm)
        if index != hit:
            assert pcm == expected_pcm(frames, SMALL)


# --- what is sent back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.CANCEL, bytes(1_000_000)),
        Message(Kind.SETTINGS, b'{"' + b"\\\\" * 400_000 + b'": 1}'),
        Message(Kind.SETTINGS, b'{"quantizers": "' + b"\\u0001" * 170_000 + b'"}'),
        Message(Kind.HANDSHAKE, b'{"sample_rate": "' + b"\\u0001" * 170_000 + b'"}'),
        Message(Kind.ERROR, b"\xff" * 1_000_000),
        Message(Kind.PING, bytes(MAX_MESSAGE_BYTES - 1)),
        Message(Kind.END, bytes(1_000_000)),
        Message(0x42, bytes(1_000_000)),
    ],
    ids=["CANCEL", "SETTINGS key", "SETTINGS value", "HANDSHAKE", "ERROR", "PING", "END", "unknown kind"],
)
def test_no_answer_is_longer_than_the_protocol_promises(message: Message) -> None:
    done = run(double(), encoded(message))
    assert done.returncode == 0
    assert max(len(answer.payload) + 1 for answer in decoded(done.stdout)) <= MIB


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_as_deep_as_it_gets(opening: bytes) -> None:
    closing = {b"[": b"]", b'{"a":': b"}"}[opening]
    depths = [*range(900, 1000), 100_000]
    wire = encoded(
        *(
            Message(kind, b'{"%s":' % key + opening * depth + b"1" + closing * depth + b"}")
            for kind, key in ((Kind.SETTINGS, b"quantizers"), (Kind.HANDSHAKE, b"sample_rate"))
            for depth in depths
        )
    )
    done = run(double(), wire)
    assert done.returncode == 0
    assert [message.kind for message in decoded(done.stdout)] == [Kind.HANDSHAKE] + [Kind.ERROR] * 2 * len(depths)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"chunk_frames": %s}' % value
        for value in (
            b"9" * 4299,
            b"9" * 5000,
            b"-1",
            b"0",
            b"-0",
            b"1e999",
            b"NaN",
            b"Infinity",
            b"4.0",
            b"true",
            b'"4"',
            b"[4]",
            b"1001",
        )
    ]
    + [
        b'{"\\ud800": 1}',
        b'{"chunk_frames": "\\udfff"}',
        b"\xff",
        b"",
        b"null",
        b"4",
        b'{"chunk_frames": 4}x',
        b'{"chunk_frames": 4, "x": 1}',
    ],
    ids=lambda payload: payload[:40].decode("ascii", "replace"),
)
def test_settings_that_make_no_sense(payload: bytes, double_that_stays: Child) -> None:
    double_that_stays.say(Message(Kind.SETTINGS, payload), Message(Kind.PING))
    error, ping = double_that_stays.next(), double_that_stays.next()
    assert (error.kind, ping.kind) == (Kind.ERROR, Kind.PING)
    assert fields(error)["code"] in ("bad_settings", "bad_payload")


@pytest.fixture(scope="module")
def double_that_stays() -> Iterator[Child]:
    with Child(double(), stderr=subprocess.DEVNULL) as child:
        child.next()
        yield child


# --- the same bytes --------------------------------------------------------------------------------------------------


@repeated(few=3, many=100)
def test_the_same_chunks_give_the_same_bytes(times: int, tiny_bundle: Path) -> None:
    codes = np.load(tiny_bundle.parent / "codes.npy")
    wire = encoded(Message(Kind.TOKENS, pack_frames(codes, 1024)), END)
    command = [
        *PROCESS,
        "--weights",
        str(tiny_bundle),
        "--threads",
        "1",
        "--chunk-frames",
        "5",
        "--output",
        "raw",
    ]
    heard = {run(command, wire).stdout for _ in range(times)}
    assert len(heard) == 1
    assert len(heard.pop()) == len(codes) * FRAME_PCM_BYTES


def test_after_a_cancel_the_next_stream_is_that_of_a_fresh_process(tiny_bundle: Path) -> None:
    codes = np.load(tiny_bundle.parent / "codes.npy")
    tokens = Message(Kind.TOKENS, pack_frames(codes, 1024))
    command = [*PROCESS, "--weights", str(tiny_bundle), "--threads", "1", "--chunk-frames", "3"]
    fresh = pcm_of(decoded(run(command, encoded(tokens, END)).stdout))
    with Child(command) as child:
        child.next()
        for _ in range(3):
            child.say(tokens)
            child.next()
            child.say(Message(Kind.CANCEL), tokens, END)
            assert fields(child.until(Kind.END)[-1])["cancelled"] is True
            assert pcm_of(child.until(Kind.END)) == fresh


@pytest.mark.parametrize("frames", [1, 2, 4, 8, 17, 23, 1000])
def test_any_chunks_give_the_same_sound(frames: int, in_peace: bytes) -> None:
    done = run([*DEMO, "--output", "raw", "--chunk-frames", str(frames)], LONG)
    difference = np.frombuffer(done.stdout, "<i2").astype(int) - np.frombuffer(in_peace, "<i2")
    assert np.abs(difference).max() <= 1


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_verdict(folder: Path, *arguments: str, wire: bytes = LONG) -> tuple[int, str, bytes]:
    """Exit status, what was said, and the PCM."""
    done = run([*PROCESS, "--weights", str(folder), *arguments], wire)
    messages = decoded(done.stdout)
    said = " ".join(fields(message)["message"] for message in messages if message.kind == Kind.ERROR)
    assert b"Traceback" not in done.stderr
    return done.returncode, said, pcm_of(messages)


def writable_copy(bundle: Path, to: Path) -> Path:
    shutil.copytree(bundle, to)
    for path in to.iterdir():
        path.chmod(0o644)
    return to


STEP = "moss_audio_tokenizer_decode_step.onnx"
SHARED = "moss_audio_tokenizer_decode_shared.data"
META = "codec_browser_onnx_meta.json"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_named_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        truncate,
        empty,
        replace_by_folder,
        replace_by_named_pipe,
        replace_by_device,
        replace_by_dangling_link,
    ],
    ids=lambda spoil: spoil.__name__,
)
@pytest.mark.parametrize("name", [META, STEP, SHARED])
def test_a_file_that_is_no_file(name: str, spoil: Callable[[Path], None], tiny_bundle: Path, tmp_path: Path) -> None:
    folder = writable_copy(tiny_bundle, tmp_path / "weights")
    spoil(folder / name)
    status, said, pcm = weights_verdict(folder)
    assert (status, pcm) == (66, b"")
    assert str(folder) in said


@repeated(few=8, many=300)
def test_a_flipped_bit_is_found_where_a_sha256_is_known(times: int, tmp_path: Path) -> None:
    for attempt in range(times):
        folder = writable_copy(DEMO_FOLDER, tmp_path / str(attempt))
        chosen = random.Random(attempt)
        name = chosen.choice([META, "demo_decode_step.onnx"])
        content = bytearray((folder / name).read_bytes())
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        (folder / name).write_bytes(content)
        status, said, pcm = weights_verdict(folder)
        assert (status, pcm) == (66, b""), (name, attempt)
        assert str(folder / name) in said
        shutil.rmtree(folder)


@repeated(few=8, many=300)
def test_damage_that_no_sha256_could_find_kills_nobody(times: int, tiny_bundle: Path, tmp_path: Path) -> None:
    """Wherever the native library is handed nonsense, it is refused, or decoded for what it is: never a crash."""
    for attempt in range(times):
        folder = writable_copy(tiny_bundle, tmp_path / str(attempt))
        chosen = random.Random(attempt)
        content = bytearray((folder / STEP).read_bytes())
        for _ in range(chosen.choice([1, 10, 1000])):
            content[chosen.randrange(len(content))] = chosen.randrange(256)
        (folder / STEP).write_bytes(content)
        status, said, pcm = weights_verdict(folder, wire=encoded(random_tokens(3), END))
        assert status in (0, 66), (attempt, said)
        assert (status == 66) == (pcm == b""), (attempt, said)
        shutil.rmtree(folder)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    import onnx

    model = onnx.load(folder / STEP, load_external_data=False)
    change(model)
    (folder / STEP).write_bytes(model.SerializeToString())


def rename_input(model: Any) -> None:
    model.graph.input[5].name += "_renamed"


def rename_output(model: Any) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == model.graph.output[5].name:
                node.output[index] += "_renamed"
    model.graph.output[5].name += "_renamed"


def widen_codes(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 15


def drop_output(model: Any) -> None:
    del model.graph.output[-1]


def lengthen_cache(model: Any) -> None:
    cache = next(value for value in model.graph.input if value.name.startswith("attn_cached_keys"))
    cache.type.tensor_type.shape.dim[2].dim_value += 1


def point_data_elsewhere(model: Any) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../../../etc/passwd"


@pytest.mark.parametrize(
    "change",
    [rename_input, rename_output, widen_codes, drop_output, lengthen_cache, point_data_elsewhere],
    ids=lambda change: change.__name__,
)
def test_a_graph_that_is_not_what_its_metadata_says(
    change: Callable[[Any], None], tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnx", reason="the extra `build` is not installed")
    folder = writable_copy(tiny_bundle, tmp_path / "weights")
    edit(folder, change)
    status, said, pcm = weights_verdict(folder)
    assert (status, pcm) == (66, b"")
    assert str(folder / STEP) in said


def test_a_graph_whose_names_are_no_text(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = writable_copy(tiny_bundle, tmp_path / "weights")
    content = (folder / STEP).read_bytes()
    (folder / STEP).write_bytes(content.replace(b"transformer_offset_2", b"transformer_offset\xc62"))
    status, said, pcm = weights_verdict(folder)
    assert (status, pcm) == (66, b"")
    assert str(folder / STEP) in said


def test_numbers_that_are_none_become_silence_and_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = writable_copy(tiny_bundle, tmp_path / "weights")
    data = np.fromfile(folder / SHARED, dtype=np.float32)
    data[len(data) // 2 :] = np.nan
    data.tofile(folder / SHARED)
    wire = encoded(random_tokens(5), END)
    done = run([*PROCESS, "--weights", str(folder), "--chunk-frames", "5"], wire)
    messages = decoded(done.stdout)
    assert [message.kind for message in messages] == [Kind.HANDSHAKE, Kind.ERROR, Kind.AUDIO, Kind.END]
    assert fields(messages[1])["code"] == "not_finite"
    assert messages[2].payload == bytes(5 * FRAME_PCM_BYTES)
    assert fields(messages[3])["errors"] == 1
    assert done.returncode == 0


POISON = 7  # a code of the first quantizer


def poisoned(folder: Path, graph: str, tensor_name: str) -> Path:
    """Make one row of a table of codes NaN, and forget every SHA-256."""
    import onnx

    model = onnx.load(folder / graph, load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == tensor_name]
    where = {entry.key: entry.value for entry in tensor.external_data}
    table = np.memmap(
        folder / where["location"], np.float32, "r+", offset=int(where["offset"]), shape=tuple(tensor.dims)
    )
    table[POISON] = np.nan
    table.flush()
    sidecar = folder / "mossnano.json"
    if sidecar.exists():
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "files": {}}))
    return folder


@pytest.fixture(scope="module", params=["official", "fast"])
def poisoned_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx", reason="the extra `build` is not installed")
    from mossnano_stdio.build.bundle import build_from_bundle

    folder = writable_copy(request.getfixturevalue("tiny_bundle"), tmp_path_factory.mktemp("poison") / "weights")
    if request.param == "official":
        return poisoned(folder, STEP, "m.quantizer.quantizers.0.codebook.weight")
    build_from_bundle(folder, folder)
    return poisoned(folder, "mossnano_fast.onnx", "codebooks")


def test_a_poisoned_chunk_poisons_nothing_after_it(poisoned_bundle: Path) -> None:
    """NaN stays NaN in keys and values that are only masked: a reset has to take them away."""
    codes = np.random.default_rng(0).integers(POISON + 1, 1024, (12, 16))
    bad_codes = codes.copy()
    bad_codes[5, 0] = POISON
    clean, bad, tail = (Message(Kind.TOKENS, pack_frames(part, 1024)) for part in (codes, bad_codes, codes[8:]))
    command = [*PROCESS, "--weights", str(poisoned_bundle), "--threads", "1", "--chunk-frames", "4"]
    fresh = pcm_of(decoded(run(command, encoded(clean, END)).stdout))
    fresh_tail = pcm_of(decoded(run(command, encoded(tail, END)).stdout))
    chunk_bytes = 4 * FRAME_PCM_BYTES
    assert len(fresh) == 3 * chunk_bytes
    assert any(fresh)
    streams = split_streams(decoded(run(command, encoded(clean, END, bad, END, clean, END)).stdout)[1:])
    assert [fields(stream[-1])["errors"] for stream in streams] == [0, 1, 0]
    assert pcm_of(streams[0]) == pcm_of(streams[2]) == fresh
    assert pcm_of(streams[1]) == fresh[:chunk_bytes] + bytes(chunk_bytes) + fresh_tail


def test_the_layout_of_the_hub_cache_loads(tiny_bundle: Path, tmp_path: Path) -> None:
    """A snapshot is a folder of links to files that are called by their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(tiny_bundle.iterdir())):
        shutil.copyfile(path, blobs / f"{index:064x}")
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / f"{index:064x}")
    wire = encoded(random_tokens(5), END)
    linked = weights_verdict(snapshot, "--threads", "1", "--chunk-frames", "5", wire=wire)
    plain = weights_verdict(tiny_bundle, "--threads", "1", "--chunk-frames", "5", wire=wire)
    assert linked == plain
    assert linked[0] == 0
    assert len(linked[2]) == 5 * FRAME_PCM_BYTES


def test_a_provider_that_is_not_there_is_no_silent_cpu() -> None:
    import onnxruntime

    providers = {
        "cuda": "CUDAExecutionProvider",
        "tensorrt": "TensorrtExecutionProvider",
        "coreml": "CoreMLExecutionProvider",
        "directml": "DmlExecutionProvider",
        "openvino": "OpenVINOExecutionProvider",
    }
    missing = [name for name, provider in providers.items() if provider not in onnxruntime.get_available_providers()]
    assert missing
    for name in missing:
        status, said, pcm = weights_verdict(DEMO_FOLDER, "--provider", name)
        assert (status, pcm) == (66, b"")
        assert name in said


# --- anything at all -------------------------------------------------------------------------------------------------

PROBE = some_frames(6, seed=99)


def any_message(chosen: random.Random) -> Message:
    frames = some_frames(chosen.randrange(5), seed=chosen.randrange(100))
    artifact = bytearray(artifact_bytes(frames or some_frames(1), SMALL))
    if chosen.random() < 0.3:
        artifact[chosen.randrange(len(artifact))] ^= 1 << chosen.randrange(8)
    payloads: list[tuple[int, bytes]] = [
        (Kind.TOKENS, tokens_payload(frames)),
        (Kind.TOKENS, chosen.randbytes(chosen.randrange(20))),
        (Kind.ARTIFACT, bytes(artifact)),
        (Kind.ARTIFACT, bytes(artifact[: chosen.randrange(len(artifact))])),
        (Kind.END, b""),
        (Kind.END, b"{}"),
        (Kind.CANCEL, chosen.randbytes(3)),
        (Kind.PING, chosen.randbytes(chosen.randrange(100))),
        (Kind.SETTINGS, chosen.choice([b'{"chunk_frames": 3}', b'{"quantizers": 2}', b'{"quantizers": 4}', b"{", b""])),
        (Kind.HANDSHAKE, chosen.choice([b'{"channels": 2}', b'{"channels": 1}', b"{}", b"[]"])),
        (Kind.ERROR, b'{"code": "x"}'),
        (chosen.randrange(256), chosen.randbytes(5)),
    ]
    return Message(*chosen.choice(payloads))


@repeated(few=10, many=300)
def test_after_anything_at_all_the_next_stream_is_as_ever(times: int) -> None:
    for attempt in range(times):
        chosen = random.Random(attempt)
        messages = [any_message(chosen) for _ in range(chosen.randrange(60))]
        settled = [
            Message(Kind.CANCEL, b"enough"),
            Message(Kind.HANDSHAKE, b'{"channels": 2}'),
            Message(Kind.SETTINGS, b'{"quantizers": 4, "chunk_frames": null}'),
            Message(Kind.TOKENS, tokens_payload(PROBE)),
            END,
        ]
        done = run(double(), encoded(*messages, *settled))
        assert done.returncode == 0, attempt
        answers = decoded(done.stdout)
        ends = [fields(answer) for answer in answers if answer.kind == Kind.END]
        assert not ends[-1]["cancelled"], attempt
        numbers = [end["stream"] for end in ends if end["stream"] is not None]
        assert numbers == sorted(set(numbers)), attempt
        last_settings = max(index for index, answer in enumerate(answers) if answer.kind == Kind.HANDSHAKE)
        assert pcm_of(answers[last_settings:]) == expected_pcm(PROBE, SMALL), attempt
        assert b"Traceback" not in done.stderr


@repeated(few=10, many=300)
def test_any_bytes_end_as_documented(times: int) -> None:
    for attempt in range(times):
        chosen = random.Random(attempt)
        wire = bytearray(encoded(*(any_message(chosen) for _ in range(chosen.randrange(20)))))
        for _ in range(chosen.randrange(3)):
            if wire:
                wire[chosen.randrange(len(wire))] = chosen.randrange(256)
        del wire[len(wire) - chosen.randrange(len(wire) + 1) // 4 :]
        done = run(double(), bytes(wire))
        assert done.returncode in (0, 65, 76), attempt
        decoded(done.stdout)
        assert b"Traceback" not in done.stderr
