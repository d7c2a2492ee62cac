"""`mossnano play`, on a file that keeps what was played and on a sound server that plays in real time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.protocol.messages import Kind, Message, encode_message, json_message
from tests.child import DEMO, ROOT
from tests.sound import FileDevice, SoundServer, loud_noise, missing_portaudio, missing_sound_server, without_silence
from tests.tool import COMMAND

needs_portaudio = pytest.mark.skipif(missing_portaudio() is not None, reason=str(missing_portaudio()))
needs_sound_server = pytest.mark.skipif(missing_sound_server() is not None, reason=str(missing_sound_server()))

PLAY = [*COMMAND, "play"]
MELODY = Path(str(files("mossnano_stdio") / "demo" / "melody.mossnano"))
MELODY_WIRE = MELODY.with_suffix(".bin")
HELLO = json_message(Kind.HANDSHAKE, {"sample_rate": 48000, "channels": 2})
END = json_message(Kind.END, {"stream": 0, "cancelled": False})
CANCELLED = json_message(Kind.END, {"stream": 0, "cancelled": True})


def play(
    environment: dict[str, str], *arguments: object, stdin: bytes = b"", timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    command = [*PLAY, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, input=stdin, capture_output=True, cwd=ROOT, timeout=timeout, check=False
    )


def wire(*messages: Message) -> bytes:
    return b"".join(encode_message(*message) for message in messages)


def stats_of(done: subprocess.CompletedProcess[bytes]) -> Any:
    return json.loads(done.stderr.splitlines()[-1])


# --- to the sample -----------------------------------------------------------------------------------------------


@needs_portaudio
def test_raw_pcm_is_played_to_the_sample(file_device: FileDevice) -> None:
    done = play(file_device.environment, "--raw", "--prebuffer-ms", "all", stdin=loud_noise(30_000).tobytes())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert np.array_equal(without_silence(file_device.played()), loud_noise(30_000))


@needs_portaudio
def test_an_artifact_is_played_as_it_is_decoded(file_device: FileDevice, tmp_path: Path) -> None:
    decoded = tmp_path / "melody.raw"
    subprocess.run([*COMMAND, "decode", "--weights", "demo", MELODY, decoded], check=True, capture_output=True)
    done = play(file_device.environment, "--weights", "demo", "--prebuffer-ms", "all", "--stats", MELODY)
    assert done.returncode == 0, done.stderr
    assert b"demo weights" in done.stderr
    expected = np.fromfile(decoded, "<i2").reshape(-1, 2)
    assert_is_what_was_played(expected, file_device)
    stats = stats_of(done)
    assert stats["played_seconds"] == round(len(expected) / 48000, 3)
    assert stats["first_sound_ms"] > 0


@needs_portaudio
def test_the_process_is_played_through_a_pipe(file_device: FileDevice) -> None:
    wire_in = MELODY_WIRE.read_bytes()
    raw = subprocess.run([*DEMO, "--output", "raw"], input=wire_in, capture_output=True, cwd=ROOT, check=True).stdout
    answer = subprocess.run(DEMO, input=wire_in, capture_output=True, cwd=ROOT, check=True).stdout
    done = play(file_device.environment, "--prebuffer-ms", "all", "-", stdin=answer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert_is_what_was_played(np.frombuffer(raw, "<i2").reshape(-1, 2), file_device)


@needs_portaudio
def test_mimi_is_played_in_mono(file_device: FileDevice, mimi_standin: Path, tmp_path: Path) -> None:
    codes, artifact, decoded = (tmp_path / name for name in ("a.npy", "a.mossnano", "a.raw"))
    np.save(codes, np.random.default_rng(0).integers(0, 2048, (11, 32)))
    weights = ["--weights", mimi_standin, "--threads", "1"]
    for verb in (["pack", "--model", "mimi", codes, artifact], ["decode", *weights, artifact, decoded]):
        subprocess.run([*COMMAND, *map(str, verb)], check=True, capture_output=True)
    done = play(file_device.environment, *weights, "--prebuffer-ms", "all", "--stats", artifact)
    assert done.returncode == 0, done.stderr
    assert_is_what_was_played(np.fromfile(decoded, "<i2").reshape(-1, 1), file_device)
    assert stats_of(done)["played_seconds"] == 11 * 0.08


def assert_is_what_was_played(expected: Any, file_device: FileDevice) -> None:
    """This, between silences: real sound has zeros of its own, so its place is found by its first loud sample."""
    played = file_device.played(expected.shape[1])
    start = int(np.flatnonzero(played.any(axis=1))[0]) - int(np.flatnonzero(expected.any(axis=1))[0])
    assert np.array_equal(played[start : start + len(expected)], expected)
    assert not played[start + len(expected) :].any()


@needs_portaudio
def test_a_cancelled_stream_is_dropped_and_the_next_one_played(file_device: FileDevice) -> None:
    stale, wanted = (Message(Kind.AUDIO, loud_noise(9000, seed=seed).tobytes()) for seed in (1, 2))
    answer = wire(HELLO, stale, CANCELLED, wanted, END)
    done = play(file_device.environment, "--prebuffer-ms", "all", "--stats", stdin=answer)
    assert done.returncode == 0
    assert stats_of(done)["dropped_seconds"] == round(9000 / 48000, 3)
    assert np.array_equal(without_silence(file_device.played()), loud_noise(9000, seed=2))


@needs_portaudio
def test_an_error_is_told_and_what_could_be_played_was(file_device: FileDevice) -> None:
    audio = Message(Kind.AUDIO, loud_noise(9000).tobytes())
    fault = json_message(Kind.ERROR, {"code": "bad_tokens", "message": "no whole frames"})
    done = play(file_device.environment, "--prebuffer-ms", "all", stdin=wire(HELLO, audio, fault, END))
    assert done.returncode == ExitStatus.BAD_INPUT
    assert done.stderr == b"mossnano play: error: mossnano-stdio says bad_tokens: no whole frames\n"
    assert np.array_equal(without_silence(file_device.played()), loud_noise(9000))


# --- devices and flags -------------------------------------------------------------------------------------------


@needs_portaudio
def test_devices_are_listed(file_device: FileDevice) -> None:
    table = play(file_device.environment, "--list-devices")
    assert table.stdout.decode().splitlines()[0] == "    0  tofile  (ALSA, 128 channels, 44100 Hz)"
    listed = json.loads(play(file_device.environment, "--list-devices", "--json").stdout)["devices"]
    assert listed[0] == {
        "index": 0, "name": "tofile", "host_api": "ALSA", "channels": 128, "sample_rate": 44100, "is_default": False,
    }  # fmt: skip
    assert [device["name"] for device in listed if device["is_default"]] == ["default"]
    assert sum(line.startswith("*") for line in table.stdout.decode().splitlines()) == 1


@needs_portaudio
@pytest.mark.parametrize("device", ["0", "tofile"])
def test_a_device_is_chosen_by_its_index_or_its_name(file_device: FileDevice, device: str) -> None:
    done = play(file_device.environment, "--raw", "--device", device, "--stats", stdin=bytes(4))
    assert stats_of(done)["device"] == "tofile"


@needs_portaudio
def test_an_unknown_device_is_69(file_device: FileDevice) -> None:
    done = play(file_device.environment, "--raw", "--device", "nosuch", stdin=bytes(4))
    assert done.returncode == ExitStatus.NO_DEVICE
    assert done.stderr.count(b"\n") == 1
    assert b"--device takes one of: 0 tofile, 1 nothing, 2 default" in done.stderr


@needs_portaudio
@pytest.mark.parametrize(("latency", "told"), [("low", 8.7), ("high", 34.8), ("50", 50.0)])
def test_latency_is_what_was_asked_for(file_device: FileDevice, latency: str, told: float) -> None:
    done = play(file_device.environment, "--raw", "--latency", latency, "--stats", stdin=bytes(4))
    assert stats_of(done)["device_latency_ms"] == pytest.approx(told, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prebuffer-ms", "soon"], "'soon': milliseconds are allowed, 0 to 60000"),
        (["--prebuffer-ms", "-1"], "'-1': milliseconds"),
        (["--latency", "tiny"], "'tiny': milliseconds"),
        (["--volume", "loud"], "'loud': a volume from 0 (silence) to 4"),
        (["--volume", "5"], "'5': a volume from 0 (silence) to 4"),
        (["--json"], "--json says in which form to --list-devices"),
        (["--raw", "--latency", "0"], "a latency of 0.0 ms cannot be"),
        (["--raw", "--channels", "0"], "0 channels at 48000 Hz"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: list[str], message: str) -> None:
    done = play(dict(os.environ), *arguments, stdin=bytes(4))
    assert done.returncode == ExitStatus.USAGE
    assert message in done.stderr.decode()


def test_a_terminal_is_not_played() -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals to make and read")
    import pty

    leader, follower = pty.openpty()
    done = subprocess.run(PLAY, stdin=follower, capture_output=True, timeout=60, check=False)
    os.close(leader)
    os.close(follower)
    assert done.returncode == ExitStatus.USAGE
    assert b"stdin is a terminal: name a PATH, or pipe something in" in done.stderr


# --- real time ---------------------------------------------------------------------------------------------------


@needs_sound_server
def test_ctrl_c_stops_the_sound_within_100_ms(sound_server: SoundServer) -> None:
    with sound_server.recording() as recording:
        player = subprocess.Popen(
            [*PLAY, "--raw", "--stats"], env=sound_server.environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert player.stdin is not None
        feeder = threading.Thread(target=feed_until_broken, args=(player.stdin, loud_noise(480_000).tobytes()))
        feeder.start()
        before = recording.bytes_so_far
        recording.wait_for_bytes(before + 4 * 96_000)
        player.send_signal(signal.SIGINT)
        interrupted = time.time()
        _, err = player.communicate()
        ended_after_seconds = time.time() - interrupted
        feeder.join()
    assert player.returncode == ExitStatus.INTERRUPTED
    *_, stats, last = err.decode().splitlines()
    assert last == "mossnano play: interrupted"
    heard = without_silence(recording.samples())
    assert np.array_equal(heard, loud_noise(480_000)[: len(heard)])
    silent_at = json.loads(stats)["first_sound_unix_seconds"] + len(heard) / 48_000
    assert silent_at - interrupted < 0.1
    assert ended_after_seconds < 0.5


def feed_until_broken(pipe: Any, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write(data)
        pipe.close()


@needs_sound_server
def test_a_terminal_shows_where_playing_is(sound_server: SoundServer) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals to make and read")
    import pty

    leader, follower = pty.openpty()
    player = subprocess.Popen([*PLAY, "--raw"], env=sound_server.environment, stdin=subprocess.PIPE, stderr=follower)
    os.close(follower)
    assert player.stdin is not None
    player.stdin.write(loud_noise(24_000).tobytes())
    player.stdin.flush()
    time.sleep(1.5)  # an underrun
    player.stdin.write(loud_noise(24_000).tobytes())
    player.stdin.close()
    shown = read_terminal(leader)
    assert player.wait() == 0
    assert "\r\x1b[K0:00.3  buffer" in shown
    assert "\r\x1b[Kmossnano play: warning: underrun 1: PCM came late" in shown
    assert shown.endswith("\r\x1b[K0:01.0  buffer    0 ms  underruns 1\r\n")
    positions = [float(match) for match in re.findall(r"K0:(\d\d\.\d)", shown)]
    assert positions == sorted(positions)
    assert len(positions) > 15


def read_terminal(leader: int) -> str:
    shown = b""
    while True:
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:  # Linux's word for the end of a terminal
            piece = b""
        if not piece:
            os.close(leader)
            return shown.decode()
        shown += piece


@needs_sound_server
def test_a_device_that_is_lost_ends_us_with_69_and_whoever_feeds_us_learns_of_it(tmp_path: Path) -> None:
    server = SoundServer(tmp_path, is_recorded=False)
    try:
        with subprocess.Popen(
            [*PLAY, "--raw"], env=server.environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as player:
            assert player.stdin is not None
            assert player.stderr is not None
            feeder = threading.Thread(target=feed_until_broken, args=(player.stdin, loud_noise(480_000).tobytes()))
            feeder.start()
            time.sleep(1.5)
            server.kill_server()
            killed = time.monotonic()
            err = player.stderr.read().decode()
            assert player.wait() == ExitStatus.NO_DEVICE
            assert time.monotonic() - killed < 2
            assert "stopped in the middle" in err.splitlines()[-1]
            feeder.join(5)
            assert not feeder.is_alive()
            with contextlib.suppress(BrokenPipeError):
                player.stdin.close()
    finally:
        server.stop()


@needs_sound_server
@pytest.mark.slow
def test_a_minute_live_on_a_busy_machine_without_an_underrun(sound_server: SoundServer) -> None:
    """Tokens at real time -> the process -> play -> speaker, while somebody else keeps a core busy."""
    frames = 750
    random = np.random.default_rng(3)
    tokens = [encode_message(Kind.TOKENS, random.bytes(20)) for _ in range(frames)]
    command = [*DEMO, "--chunk-frames", "1", "--threads", "1"]
    at_once = subprocess.run(
        [*command, "--output", "raw"], input=b"".join(tokens), capture_output=True, cwd=ROOT, check=True
    )
    with (
        busy_core(),
        sound_server.recording() as recording,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process,
        subprocess.Popen(
            [*PLAY, "--stats"], env=sound_server.environment, stdin=process.stdout, stderr=subprocess.PIPE, cwd=ROOT
        ) as player,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        time.sleep(4)  # until the weights are loaded
        begun, begun_unix = time.monotonic(), time.time()
        for number, message in enumerate(tokens):
            time.sleep(max(0.0, begun + 0.08 * number - time.monotonic()))
            process.stdin.write(message)
            process.stdin.flush()
        process.stdin.close()
        _, err = player.communicate()
    stats = json.loads(err.decode().splitlines()[-1])
    print(f"token to speaker: {1000 * (stats['first_sound_unix_seconds'] - begun_unix):.0f} ms; {stats}")
    assert (process.returncode, player.returncode) == (0, 0)
    assert (stats["underruns"], stats["device_underflows"]) == (0, 0), err.decode()
    expected = np.frombuffer(at_once.stdout, "<i2").reshape(-1, 2)
    heard = recording.samples()
    start = int(np.flatnonzero(heard.any(axis=1))[0]) - int(np.flatnonzero(expected.any(axis=1))[0])
    assert np.array_equal(heard[start : start + len(expected)], expected)


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            yield
        finally:
            busy.kill()
