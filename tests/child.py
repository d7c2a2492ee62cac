"""A real `mossnano-stdio` as a child process, and the messages that go there and come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mossnano_stdio.protocol.messages import Kind, Message, MessageReader, encode_message
from mossnano_stdio.tokens import pack_frames

ROOT = Path(__file__).parent.parent
PROCESS = [sys.executable, "-m", "mossnano_stdio"]
DEMO = [*PROCESS, "--weights", "demo"]
TIMEOUT_SECONDS = 60


def double(plan: Mapping[str, Any] | None = None, *arguments: str) -> list[str]:
    """The command line of the process around the decoder double; see double_process.py. It runs in any folder."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.double_process import main; main()"
    return [sys.executable, "-c", program, json.dumps(plan or {}), *arguments]


if sys.platform == "win32":
    import ctypes

    def _asked(call: str, pid: int) -> int:
        """What one of Windows' calls answers that take a process; there is none any more: 0."""
        kernel = ctypes.WinDLL("kernel32")
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel.OpenProcess(0x1F0FFF, False, pid))
        try:
            if call == "WaitForSingleObject":
                return int(kernel.WaitForSingleObject(handle, 0)) if handle else 0
            return int(ctypes.WinDLL("ntdll")[call](handle))
        finally:
            kernel.CloseHandle(handle)

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    def stop(pid: int) -> None:
        _asked("NtSuspendProcess", pid)

    def go_on(pid: int) -> None:
        _asked("NtResumeProcess", pid)

    def is_there(pid: int) -> bool:
        return _asked("WaitForSingleObject", pid) == 258  # it would have to be waited for

else:

    def kill(pid: int) -> None:
        """End it at once, without a word from it."""
        os.kill(pid, signal.SIGKILL)

    def stop(pid: int) -> None:
        """It does nothing any more, and is not gone."""
        os.kill(pid, signal.SIGSTOP)
        while any(") T " not in (task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()):
            time.sleep(0.001)

    def go_on(pid: int) -> None:
        os.kill(pid, signal.SIGCONT)

    def is_there(pid: int) -> bool:
        return Path(f"/proc/{pid}/stat").exists()


KILLED = 15 if sys.platform == "win32" else -9  # the status of who was


def run(command: Sequence[str], wire: bytes = b"", **more: Any) -> subprocess.CompletedProcess[bytes]:
    """All of the input at once, all of the output at the end."""
    return subprocess.run(
        command, input=wire, capture_output=True, cwd=ROOT, timeout=TIMEOUT_SECONDS, check=False, **more
    )


def encoded(*messages: Message) -> bytes:
    return b"".join(encode_message(*message) for message in messages)


def decoded(wire: bytes) -> list[Message]:
    """Messages, of which the last must be whole."""
    reader = MessageReader(1 << 24)
    messages = list(reader.feed(wire))
    assert reader.incomplete_bytes == 0, f"torn message: {reader.incomplete_bytes} bytes of it"
    return messages


def pcm_of(messages: Sequence[Message]) -> bytes:
    return b"".join(message.payload for message in messages if message.kind == Kind.AUDIO)


def fields(message: Message) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(message.payload)
    return parsed


def random_tokens(frames: int, seed: int = 0) -> Message:
    """As the demo and the published weights take them."""
    codes = np.random.default_rng(seed).integers(0, 1024, (frames, 16))
    return Message(Kind.TOKENS, pack_frames(codes, 1024))


LONG_FRAMES = 60
LONG = encoded(random_tokens(LONG_FRAMES), Message(Kind.END))


def outline(messages: Sequence[Message]) -> list[str]:
    """Kinds, with runs of AUDIO as one word, and ERRORs by their code."""
    words: list[str] = []
    for message in messages:
        word = fields(message)["code"] if message.kind == Kind.ERROR else Kind(message.kind).name
        if word != "AUDIO" or words[-1:] != ["AUDIO"]:
            words.append(word)
    return words


class Child:
    """A process that is talked to, message by message."""

    def __init__(self, command: Sequence[str], **more: Any) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, bufsize=0, **{**pipes, **more})
        self._reader = MessageReader(1 << 24)
        self._read: list[Message] = []

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def stdin_fd(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def stdout_fd(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def stderr(self) -> IO[bytes]:
        assert self.process.stderr is not None
        return self.process.stderr

    @property
    def torn_bytes(self) -> int:
        """How much of a message that is not whole has come out."""
        return self._reader.incomplete_bytes

    @property
    def has_read(self) -> bool:
        """Is a next message there already?"""
        return bool(self._read)

    def write(self, wire: bytes) -> None:
        left = memoryview(wire)
        while left:
            left = left[os.write(self.stdin_fd, left) :]

    def say(self, *messages: Message) -> None:
        self.write(encoded(*messages))

    def next(self) -> Message:
        """The next message; an AssertionError at the end of the output."""
        while not self._read:
            data = os.read(self.stdout_fd, 1 << 16)
            assert data, f"the output ended: {self.finish()}"
            self._read.extend(self._reader.feed(data))
        return self._read.pop(0)

    def until(self, kind: int) -> list[Message]:
        """All messages up to the next one of this kind, which is the last."""
        messages = [self.next()]
        while messages[-1].kind != kind:
            messages.append(self.next())
        return messages

    def finish(self) -> tuple[int, list[Message], str]:
        """Close stdin: the exit status, the messages that were left, and stderr."""
        out, err = self.process.communicate(timeout=TIMEOUT_SECONDS)
        rest = [*self._read, *self._reader.feed(out)]
        return self.process.returncode, rest, (err or b"").decode()
