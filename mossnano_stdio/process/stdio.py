"""The only room that touches file descriptors 0 and 1, threads and signals.

Rules of this room:

- fd 1 is taken at the start: our answers go to a duplicate of it, and fd 1 itself becomes stderr. A stray print, ours
  or a native library's, can then not reach the stream.
- Reading is a thread's work, with os.read: it returns what is there, and it does not keep the interpreter from ending.
  Decoding and writing are the main thread's.
- No write may block for good: a pipe is polled, then given no more than it takes at once. Windows cannot poll pipes:
  there a thread writes, and who waits for it looks up WAKE_SECONDS apart. All of a message is written, or an error says
  why not. A broken pipe is a reader who left; every other failure is an OutputError with its errno.
- A signal wakes the thread that the kernel chose, which need not be the main one: so a pipe is polled beside the
  output that every signal writes to.
- SIGINT and SIGTERM are noted whenever they come and raised (`Stopped`) only where nothing can be torn: while waiting
  for input, between two messages. A message that is being written gets STOP_GRACE_SECONDS to finish. While loading
  they end the process on the spot: native libraries turn what is raised in the middle of their import into errors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from mossnano_stdio.errors import ExitStatus, InputCutError, OutOfMemoryError, OutputError, reason_of
from mossnano_stdio.process.inbox import WAKE_SECONDS, Ending, Inbox
from mossnano_stdio.process.writing import WriteThread
from mossnano_stdio.protocol import MessageReader

if sys.platform == "win32":
    from mossnano_stdio.process.windows import is_pipe_without_reader

READ_BYTES: Final = 1 << 16
STOP_GRACE_SECONDS: Final = 0.2
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_ERRNO_OF_A_PIPE_LEFT: Final = errno.EINVAL if sys.platform == "win32" else errno.EPIPE
_READER_GONE: Final = (_ERRNO_OF_A_PIPE_LEFT, errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN)

# --- standard file descriptors ------------------------------------------------------------------


def take_stdout() -> int:
    """Keep stdout for ourselves: our own descriptor of it is returned, and fd 1 leads to stderr from now on."""
    _fill_closed_descriptors()
    fd = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    _set_binary(_STDIN)
    _set_binary(fd)
    return fd


def _fill_closed_descriptors() -> None:
    """A standard descriptor that the parent closed would be given to the next file we open: put something there.

    A closed stdin reads as empty, a closed stderr swallows, a closed stdout fails when it is written to.
    """
    for fd, flags in ((_STDIN, os.O_RDONLY), (_STDOUT, os.O_RDONLY), (_STDERR, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)


def _set_binary(fd: int) -> None:
    """Windows would turn every 0x0A into two bytes."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(fd, os.O_BINARY)


# --- signals ------------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM came. No error, and no `except Exception` may swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        interrupted = signal_number == signal.SIGINT
        self.exit_status = ExitStatus.INTERRUPTED if interrupted else ExitStatus.TERMINATED


class StopSignals:
    """Notes SIGINT and SIGTERM, and raises them where that is safe."""

    def __init__(self) -> None:
        self._maybe_received: int | None = None
        self._received_seconds = 0.0
        self._may_raise = False
        self._may_end = False
        self.maybe_wake_fd: int | None = None  # readable when a signal came, until `woken` is called

    def install(self) -> None:
        _fill_closed_descriptors()  # else the pipe would take their places
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)
        if sys.platform == "win32":
            signal.signal(signal.SIGBREAK, self._note)  # Ctrl-Break, and what a console that closes sends
        else:
            self.maybe_wake_fd, wake_writer = os.pipe()
            for fd in (self.maybe_wake_fd, wake_writer):
                os.set_blocking(fd, False)
            signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
            # A host that blocks signals in its threads has us start with them blocked.
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def woken(self) -> None:
        """Forget the wake-up calls of signals that came."""
        if self.maybe_wake_fd is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(self.maybe_wake_fd, READ_BYTES)

    def report_with(self, report: Callable[[], None]) -> None:
        """From now on SIGUSR1, where there is such a signal, asks for a report."""
        if sys.platform != "win32":
            signal.signal(signal.SIGUSR1, lambda *_: report())

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Inside, a signal ends the process at once. Nothing must have been written yet."""
        self._may_end = True
        try:
            self.check()
            yield
        finally:
            self._may_end = False

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises Stopped at once, in the middle of whatever is slept in."""
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False

    def check(self) -> None:
        if self._maybe_received is not None:
            raise Stopped(self._maybe_received)

    def grace_seconds(self) -> float | None:
        """How long the message that is being written may still take; None = no signal came."""
        if self._maybe_received is None:
            return None
        return max(0.0, self._received_seconds + STOP_GRACE_SECONDS - time.perf_counter())

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        if self._maybe_received is None:
            self._maybe_received = signal_number
            self._received_seconds = time.perf_counter()
        if self._may_end:
            os._exit(Stopped(signal_number).exit_status)
        if self._may_raise:
            self._may_raise = False
            raise Stopped(signal_number)


# --- output -------------------------------------------------------------------------------------


class OutputFd:
    """Writes all of what it is given, waiting for the reader where it must, and stays stoppable."""

    def __init__(self, fd: int, signals: StopSignals, write: Callable[[int, memoryview], int] = os.write) -> None:
        self.fd = fd
        self._signals = signals
        self._left = memoryview(b"")  # of the message that is being written
        if sys.platform == "win32":
            self._thread = WriteThread(fd, write)
        else:
            self._write = write
            self._maybe_poller: select.poll | None = None
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # a regular file makes nobody wait
                self._maybe_poller = select.poll()
                self._maybe_poller.register(fd, select.POLLOUT)
                if signals.maybe_wake_fd is not None:
                    self._maybe_poller.register(signals.maybe_wake_fd, select.POLLIN)

    def write(self, data: bytes) -> None:
        self._left = memoryview(data)
        try:
            self._write_left()
        except OSError as error:
            if error.errno in _READER_GONE:
                raise BrokenPipeError(error.errno, "the reader of our output is gone") from None
            raise OutputError(
                f"the output cannot be written: {reason_of(error)}, with {len(self._left)} bytes of a message to go"
            ) from None

    def check_reader(self) -> None:
        """BrokenPipeError where nobody can read any more what will be written. POSIX's input thread sees it itself."""
        if sys.platform == "win32" and is_pipe_without_reader(self.fd):
            raise BrokenPipeError(errno.EPIPE, "the reader of our output is gone")

    def rewrite_start(self, data: bytes) -> bool:
        """Replace the first bytes of the output, where that is possible: False for pipes and the like."""
        try:
            end = os.lseek(self.fd, 0, os.SEEK_CUR)
            os.lseek(self.fd, 0, os.SEEK_SET)
        except OSError:
            return False
        self.write(data)
        os.lseek(self.fd, end, os.SEEK_SET)
        return True

    if sys.platform == "win32":

        def _write_left(self) -> None:
            self._thread.put(bytes(self._left))
            while not self._thread.wait(WAKE_SECONDS):
                self._left = self._left[len(self._left) - self._thread.left_bytes :]
                if self._signals.grace_seconds() == 0:
                    self._signals.check()

    else:

        def _write_left(self) -> None:
            while self._left:
                most_bytes = len(self._left)
                if self._maybe_poller is not None:
                    self._wait_until_writable(self._maybe_poller)
                    most_bytes = select.PIPE_BUF  # so much fits into a pipe that polls as writable
                with contextlib.suppress(BlockingIOError):  # whoever shares a non-blocking pipe with us was quicker
                    self._left = self._left[self._write(self.fd, self._left[:most_bytes]) :]

        def _wait_until_writable(self, poller: select.poll) -> None:
            while True:
                grace_seconds = self._signals.grace_seconds()
                events = poller.poll(None if grace_seconds is None else grace_seconds * 1000)
                if any(fd == self.fd for fd, _ in events):
                    return
                if events:
                    self._signals.woken()
                else:
                    self._signals.check()


# --- input --------------------------------------------------------------------------------------


class InputThread(threading.Thread):
    """Reads messages into the inbox until there are no more, and then says why.

    While it waits for input it watches `maybe_output_fd`: a reader who left is noticed although nothing is written.
    """

    def __init__(
        self,
        inbox: Inbox,
        messages: MessageReader,
        maybe_output_fd: int | None,
        read: Callable[[int, int], bytes] = os.read,
    ) -> None:
        super().__init__(name="mossnano-input", daemon=True)
        self._inbox = inbox
        self._messages = messages
        self._maybe_output_fd = maybe_output_fd
        self._read = read

    def start(self) -> None:
        try:
            super().start()
        except RuntimeError as error:
            raise OutOfMemoryError(f"no thread can be started: {error}") from None

    def run(self) -> None:
        try:
            ending = self._read_all()
        except OSError as error:
            ending = Ending(InputCutError(f"the input cannot be read: {reason_of(error)}"))
        except Exception as error:  # noqa: BLE001 - whatever it is, the main thread must hear of it or wait for ever
            ending = Ending(error)
        self._inbox.end(ending)

    def _read_all(self) -> Ending:
        if sys.platform != "win32":
            poller = select.poll()
            poller.register(_STDIN, select.POLLIN)
            if self._maybe_output_fd is not None:
                poller.register(self._maybe_output_fd, 0)  # errors and hang-ups are told unasked
        while True:
            if sys.platform != "win32" and any(fd == self._maybe_output_fd for fd, _ in poller.poll()):
                return Ending(is_reader_gone=True)
            try:
                data = self._read(_STDIN, READ_BYTES)
            except BlockingIOError:
                continue  # a non-blocking stdin, on which somebody else was quicker
            if not data:
                return Ending(self._maybe_cut())
            for message in self._messages.feed(data):
                self._inbox.put(message)

    def _maybe_cut(self) -> InputCutError | None:
        incomplete_bytes = self._messages.incomplete_bytes
        if not incomplete_bytes:
            return None
        return InputCutError(f"the input ended inside a message, {incomplete_bytes} bytes into it")
