"""Sound cards for tests, on a real PortAudio: a file that keeps what was played, and a server whose sink is recorded.

Rules of this room:

- PortAudio reads its devices once, when sounddevice is imported. So whatever plays is a process of its own, with a
  home of its own whose `.asoundrc` names the device.
- The file has no clock: it takes sound as fast as it is given. The server plays in real time.
- Test sound holds no zero, so that whatever is zero in a recording is silence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int16]

ALSA_PLUGIN_FOLDERS = ("/usr/lib/*/alsa-lib", "/usr/lib/alsa-lib", "/usr/lib64/alsa-lib")
SERVER_PATIENCE_SECONDS = 20


def loud_noise(samples: int, channels: int = 2, seed: int = 0) -> Samples:
    """Noise without a zero in it."""
    random = np.random.default_rng(seed)
    signs: Samples = random.choice(np.array([-1, 1], np.int16), (samples, channels))
    noise: Samples = random.integers(1, 32768, (samples, channels), dtype=np.int16) * signs
    return noise


def without_silence(heard: Samples) -> Samples:
    """What is left of a recording when every silent sample is taken out."""
    return heard[heard.any(axis=1)]


def silent_runs(heard: Samples) -> list[int]:
    """The lengths of the silences inside a recording, those at its ends left out."""
    loud = np.flatnonzero(heard.any(axis=1))
    gaps = np.diff(loud) - 1
    return [int(gap) for gap in gaps if gap]


def missing_portaudio() -> str | None:
    if sys.platform != "linux":
        return "these devices are ALSA's"
    if find_library("portaudio") is None:
        return "PortAudio is not installed (libportaudio2)"
    return None


def missing_sound_server() -> str | None:
    for program in ("pulseaudio", "pacat", "parec"):
        if shutil.which(program) is None:
            return f"{program} is not installed (pulseaudio, pulseaudio-utils)"
    root = Path("/")
    if not any(list(root.glob(f"{folder[1:]}/libasound_module_pcm_pulse.so")) for folder in ALSA_PLUGIN_FOLDERS):
        return "ALSA's way to PulseAudio is not installed (libasound2-plugins)"
    return missing_portaudio()


class FileDevice:
    """An ALSA device called `tofile`, which writes what was played."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._played = folder / "played.raw"
        (folder / ".asoundrc").write_text(
            f"""
            pcm.tofile {{ type file slave.pcm "nothing" file "{self._played}" format "raw" }}
            pcm.nothing {{ type null }}
            pcm.!default tofile
            """
        )
        self.environment = {**os.environ, "HOME": str(folder), "JACK_NO_START_SERVER": "1"}

    def played(self, channels: int = 2) -> Samples:
        """What the last one who opened the device has played, all of it."""
        return np.fromfile(self._played, "<i2").reshape(-1, channels)


class SoundServer:
    """A PulseAudio of our own with one sink, `heard`, which leads nowhere but can be recorded."""

    def __init__(self, folder: Path, *, is_recorded: bool) -> None:
        self.folder = folder
        self._socket = folder / "socket"
        folder.chmod(0o700)
        (folder / ".asoundrc").write_text(
            f"""
            pcm.heard {{ type pulse server "unix:{self._socket}" device "heard" }}
            pcm.!default {{ type pulse server "unix:{self._socket}" device "heard" }}
            """
        )
        (folder / "server.pa").write_text(
            f"load-module module-native-protocol-unix auth-anonymous=1 socket={self._socket}\n"
            "load-module module-null-sink sink_name=heard rate=48000 channels=2 format=s16le\n"
            "set-default-sink heard\n"
        )
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "PULSE_RUNTIME_PATH": str(folder),
            "PULSE_SERVER": f"unix:{self._socket}",
            "JACK_NO_START_SERVER": "1",
        }
        self._server = self._start_server()
        self._others = [self._start_silence()] if is_recorded else []

    def stop(self) -> None:
        for process in (*self._others, self._server):
            if sys.platform != "win32":
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def kill_server(self) -> None:
        self._server.kill()
        self._server.wait()

    def pause_server(self) -> None:
        if sys.platform != "win32":
            self._server.send_signal(signal.SIGSTOP)

    def resume_server(self) -> None:
        if sys.platform != "win32":
            self._server.send_signal(signal.SIGCONT)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Records the sink from before the block until the last of it was heard."""
        recording = Recording(self._start("parec", self.folder / "recording.raw"), self.folder / "recording.raw")
        try:
            recording.wait_for_bytes(1)
            yield recording
            recording.wait_for_bytes(recording.bytes_so_far + 48_000)  # a quarter of a second of silence behind it
        finally:
            recording.stop()

    def _start_server(self) -> subprocess.Popen[bytes]:
        command = [
            "pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1", "--disable-shm=yes",
            "--realtime=yes", "--high-priority=yes", "-F", str(self.folder / "server.pa"),
        ]  # fmt: skip
        with (self.folder / "server.log").open("wb") as log:
            server = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + SERVER_PATIENCE_SECONDS
        while not self._socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"PulseAudio did not start: {(self.folder / 'server.log').read_text()}")
            time.sleep(0.02)
        return server

    def _start_silence(self) -> subprocess.Popen[bytes]:
        """Somebody who always plays silence: an idle sink runs two seconds ahead of those who come to it later."""
        silence = self._start("pacat", Path("/dev/zero"), "--playback")
        time.sleep(2.5)
        return silence

    def _start(self, program: str, path: Path, *options: str) -> subprocess.Popen[bytes]:
        device = "heard" if options else "heard.monitor"
        command = [
            program, *options, "--raw", "--format=s16le", "--rate=48000", "--channels=2", "--latency-msec=50",
            f"--device={device}", str(path),
        ]  # fmt: skip
        return subprocess.Popen(command, env=self.environment)


class Recording:
    """What a recorder has written, while and after it does."""

    def __init__(self, recorder: subprocess.Popen[bytes], path: Path) -> None:
        self._recorder = recorder
        self._path = path

    @property
    def bytes_so_far(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def wait_for_bytes(self, count: int) -> None:
        deadline = time.monotonic() + SERVER_PATIENCE_SECONDS
        while self.bytes_so_far < count:
            if time.monotonic() > deadline or self._recorder.poll() is not None:
                raise RuntimeError("the recorder of the sink does not record")
            time.sleep(0.01)

    def stop(self) -> None:
        self._recorder.terminate()
        self._recorder.wait()

    def samples(self) -> Samples:
        recorded = self._path.read_bytes()
        return np.frombuffer(recorded[: len(recorded) // 4 * 4], "<i2").reshape(-1, 2)


def run_player(environment: dict[str, str], code: str, *arguments: object, timeout_seconds: float = 60) -> Any:
    """Run a few lines that play, in a process with the devices of `environment`; they print a JSON value."""
    command = [sys.executable, "-W", "error", "-c", _PLAYER_PRELUDE + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=timeout_seconds, check=False)
    if done.returncode:
        raise AssertionError(f"the player ended with {done.returncode}: {done.stderr.decode()}")
    return json.loads(done.stdout)


_PLAYER_PRELUDE = """
import json, logging, sys, time
import numpy as np
from mossnano_stdio.errors import DeviceError
from mossnano_stdio.playback import ALL, Player
from tests.sound import loud_noise
log = []
keeper = logging.Handler()
keeper.emit = lambda record: log.append(record.getMessage())
logging.getLogger("mossnano").addHandler(keeper)
"""
