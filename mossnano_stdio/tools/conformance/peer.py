"""Runs the implementation under test as a child, through its stdin and stdout, and kills it when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Final

from mossnano_stdio.errors import ProtocolError, UsageError
from mossnano_stdio.protocol import MAX_MESSAGE_BYTES, Message, MessageReader

READ_BYTES: Final = 1 << 16
PIPE_BYTES: Final = 1 << 16  # what a pipe holds, where the system does not say
_LAST_WORDS_BYTES: Final = 300
HAS_SIGNALS: Final = sys.platform != "win32"


class DepartureError(Exception):
    """The peer does not do what the protocol says."""

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected {expected}, seen {seen}")
        self.expected = expected
        self.seen = seen


class NotApplicableError(Exception):
    """With this peer's numbers there is nothing to try."""


if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    class _Job:
        """A process and all that it will start, to be ended as one: what its process group is elsewhere."""

        def __init__(self, pid: int) -> None:
            self._kernel = ctypes.WinDLL("kernel32")
            self._kernel.CreateJobObjectW.restype = self._kernel.OpenProcess.restype = wintypes.HANDLE
            self._kernel.AssignProcessToJobObject.argtypes = [wintypes.HANDLE, wintypes.HANDLE]
            self._kernel.TerminateJobObject.argtypes = [wintypes.HANDLE, wintypes.UINT]
            self._kernel.CloseHandle.argtypes = [wintypes.HANDLE]
            self._handle = self._kernel.CreateJobObjectW(None, None)
            set_quota_and_terminate = 0x0101
            process = self._kernel.OpenProcess(set_quota_and_terminate, False, pid)
            self._kernel.AssignProcessToJobObject(self._handle, process)
            self._kernel.CloseHandle(process)

        def end(self) -> None:
            self._kernel.TerminateJobObject(self._handle, 1)

        def close(self) -> None:
            self._kernel.CloseHandle(self._handle)


class Peer:
    """A running child, which is killed once the time that `allow` gave is over."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed in __exit__; "a": we both move its position
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                bufsize=0,
                start_new_session=True,  # so that what it starts can be killed with it
            )
        except OSError as error:
            self._log.close()
            raise UsageError(f"{command[0]} cannot be started: {error.strerror}") from None
        if sys.platform == "win32":
            self._job = _Job(self._process.pid)  # before it has had the time to start anything
        self._messages = MessageReader(MAX_MESSAGE_BYTES + 1)
        self._read: list[Message] = []
        self._maybe_watchdog: threading.Timer | None = None
        self._allowed_seconds = 0.0
        self._out_of_time = False

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_watchdog()
        self._kill()
        self._process.wait()
        self.close_input()
        self.close_output()
        self._log.close()
        if sys.platform == "win32":
            self._job.close()

    def allow(self, seconds: float) -> None:
        """Kill the child in so many seconds, unless this is called again."""
        self._stop_watchdog()
        self._allowed_seconds = seconds
        self._maybe_watchdog = threading.Timer(seconds, self._run_out_of_time)
        self._maybe_watchdog.daemon = True
        self._maybe_watchdog.start()

    # --- what goes in and comes out --------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Bytes for its stdin. A child that is gone shows when its output is read."""
        assert self._process.stdin is not None
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[self._process.stdin.write(left) :]

    def maybe_read(self) -> Message | None:
        """The next message; None at the end of the output."""
        while not self._read:
            assert self._process.stdout is not None
            try:
                data = self._process.stdout.read(READ_BYTES)
            except OSError:
                data = b""
            if not data:
                return None
            try:
                self._read.extend(self._messages.feed(data))
            except ProtocolError as error:
                raise DepartureError("messages on stdout and nothing else", f"bytes that are none: {error}") from None
        return self._read.pop(0)

    @property
    def torn_bytes(self) -> int:
        """How many bytes of a message that is not whole have come."""
        return self._messages.incomplete_bytes

    @property
    def pipe_bytes(self) -> int:
        """How much the child can write that nobody reads."""
        assert self._process.stdout is not None
        if sys.platform == "linux":
            import fcntl

            return fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_GETPIPE_SZ)
        return PIPE_BYTES

    def close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close_output(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()

    # --- how it ends -----------------------------------------------------------------------------

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        status = self._process.wait()
        if self._out_of_time:
            raise DepartureError("an end of the process", f"none within {self._allowed_seconds:g} s")
        return status

    def describe_end(self) -> str:
        """Why there is nothing more to read, in words."""
        if self._out_of_time:
            return f"nothing more within {self._allowed_seconds:g} s"
        self._log.seek(0)
        last_words = " ".join(self._log.read().decode("utf-8", "replace").split())[-_LAST_WORDS_BYTES:]
        return f"the end of the output, status {self._process.wait()}" + (f", stderr: {last_words}" * bool(last_words))

    def _run_out_of_time(self) -> None:
        self._out_of_time = True
        self._kill()

    def _stop_watchdog(self) -> None:
        if self._maybe_watchdog is not None:
            self._maybe_watchdog.cancel()
            self._maybe_watchdog.join()

    def _kill(self) -> None:
        if sys.platform == "win32":
            self._job.end()
        elif self._process.returncode is None:  # else its number may be somebody else's by now
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
