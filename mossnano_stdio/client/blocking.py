"""The client for threads: one that writes, one that reads, and whoever calls."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Final, TypeVar

from mossnano_stdio.client.exchange import (
    BUFFER_BYTES,
    QUEUE_BYTES,
    Exchange,
    Facts,
    Frames,
    Played,
    StreamEnd,
    StreamState,
)
from mossnano_stdio.client.launch import (
    READ_BYTES,
    START_SECONDS,
    STOP_SECONDS,
    Launch,
    LogLines,
    command_line,
    standard_descriptors_taken,
)
from mossnano_stdio.errors import UsageError

WAKE_SECONDS: Final = 0.2 if sys.platform == "win32" else None  # there Ctrl-C does not wake who sleeps

Found = TypeVar("Found")


class Stream:
    """What comes back of the frames that were fed to it: iterate it for its PCM, piece by piece, as it comes.

    An ERROR of the process is raised where it came. If the stream goes on after it, so does the iteration.
    """

    def __init__(self, decoder: Decoder, link: _Link, state: StreamState) -> None:
        self._decoder = decoder  # it ends its process when nobody holds it any more
        self._link = link
        self._state = state

    def feed(self, frames: Frames) -> None:
        """More of it: [frames, quantizers], or packed bytes. Never waits; QueueFullError if too much waits."""
        with self._link.changing() as exchange:
            exchange.feed(self._state, frames)

    def finish(self) -> None:
        """That was all of it."""
        with self._link.changing() as exchange:
            exchange.finish(self._state)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        pcm = self._link.wait_for(lambda: self._link.exchange.maybe_take(self._state))
        if not pcm:
            raise StopIteration
        return pcm

    def read(self) -> bytes:
        """All the rest of it."""
        return b"".join(self)

    @property
    def was_cancelled(self) -> bool:
        return self._state.was_cancelled

    @property
    def played(self) -> Played:
        """Its number, and how many samples of it were handed out."""
        return self._link.exchange.played(self._state)

    @property
    def maybe_end(self) -> StreamEnd | None:
        """What it came to, once the process has said so."""
        return self._state.maybe_end


class Decoder(Facts):
    """A decoder process: fed with frames, heard as PCM. It is there when the constructor returns.

    `command` replaces the program, `arguments` are added to it. Its log goes line by line to `log`, which is called on
    a thread of its own, or where `stderr` says, or else to our own stderr. If it dies, the next stream starts another.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        arguments: Sequence[str] = (),
        *,
        command: Sequence[str] | None = None,
        start_seconds: float = START_SECONDS,
        buffer_bytes: int = BUFFER_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        stderr: int | IO[bytes] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        program = command_line(None if weights is None else os.fspath(weights), arguments, command)
        self._launch = Launch(program, start_seconds, buffer_bytes, queue_bytes, log, stderr)
        self._lock = threading.Lock()
        self._is_closed = False
        self._settings: dict[str, int | None] = {}
        self._link = _Link(self._launch)
        self._finalizer = weakref.finalize(self, _warn_and_close, self._link)
        self.restarts = 0

    @property
    def handshake(self) -> Mapping[str, Any]:
        return self._link.exchange.handshake

    @property
    def queued_bytes(self) -> int:
        """What waits here to be sent, of the `queue_bytes` that may: payloads, and 64 bytes for each message."""
        return self._link.exchange.queued_bytes

    @property
    def pid(self) -> int:
        return self._link.process.pid

    # --- streams ---------------------------------------------------------------------------------

    def open(self) -> Stream:
        """A stream to feed."""
        link = self._alive()
        with link.changing() as exchange:
            return Stream(self, link, exchange.open())

    def feed(self, frames: Frames) -> Stream:
        """Frames for the open stream, or for a new one: [frames, quantizers], or packed bytes. Never waits."""
        link = self._link
        maybe_open = link.exchange.maybe_open
        if maybe_open is None or not maybe_open.takes_frames:
            link = self._alive()
        with link.changing() as exchange:
            state = exchange.maybe_open
            if state is None or not state.takes_frames:
                state = exchange.open()
            exchange.feed(state, frames)
            return Stream(self, link, state)

    def finish(self) -> None:
        """The open stream has all its frames."""
        with self._link.changing() as exchange:
            if exchange.maybe_open is None or not exchange.maybe_open.takes_frames:
                raise UsageError("no stream is open: feed opens one")
            exchange.finish(exchange.maybe_open)

    def feed_artifact(self, artifact: bytes) -> Stream:
        """A whole `.mossnano`, as a stream of its own."""
        link = self._alive()
        with link.changing() as exchange:
            return Stream(self, link, exchange.feed_artifact(artifact))

    def decode(self, frames: Frames) -> bytes:
        """The PCM of one whole stream."""
        stream = self.open()
        stream.feed(frames)
        stream.finish()
        return stream.read()

    def cancel(self) -> None:
        """Barge-in: every stream that was not read to its end is over now. Never waits."""
        with self._link.changing() as exchange:
            exchange.cancel()

    # --- beside streams --------------------------------------------------------------------------

    def ping(self, timeout_seconds: float | None = None) -> float:
        """The seconds until the process had dealt with all that was said before. TimeoutError where it takes longer."""
        started = time.monotonic()
        link = self._alive()
        with link.changing() as exchange:
            answer = exchange.ping()
        link.wait_for(answer.maybe_take, timeout_seconds)
        return time.monotonic() - started

    def settle(self, **settings: int | None) -> Mapping[str, Any]:
        """Change `chunk_frames` or `quantizers` for the streams to come; the HANDSHAKE that says what holds."""
        link = self._alive()
        with link.changing() as exchange:
            answer = exchange.settle(settings)
        link.wait_for(answer.maybe_take)
        self._settings |= settings
        return self.handshake

    def close(self) -> None:
        """End the process. What was not read is lost."""
        with self._lock:
            self._is_closed = True
            self._finalizer.detach()
            self._link.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _alive(self) -> _Link:
        """The link to a process that lives: if it has died, a new one."""
        with self._lock:
            if self._is_closed:
                raise UsageError("this decoder is closed")
            if self._link.exchange.maybe_death is not None:
                self._restart()
            return self._link

    def _restart(self) -> None:
        """Another process, with the settings that held in the one that died."""
        self._finalizer.detach()
        self._link.close()
        self._link = _Link(self._launch)
        self._finalizer = weakref.finalize(self, _warn_and_close, self._link)
        self.restarts += 1
        if self._settings:
            with self._link.changing() as exchange:
                answer = exchange.settle(self._settings)
            self._link.wait_for(answer.maybe_take)


def _warn_and_close(link: _Link) -> None:
    link.close()
    warnings.warn("a Decoder was not closed: use it in a `with`, or call close()", ResourceWarning, stacklevel=2)


class _Link:
    """One process, the two threads that carry its bytes, and the lock around its exchange."""

    def __init__(self, launch: Launch) -> None:
        self.exchange = launch.exchange()
        try:
            with standard_descriptors_taken():
                self.process: subprocess.Popen[bytes] = subprocess.Popen(
                    launch.command, bufsize=0, **launch.process_options()
                )
        except OSError as error:
            raise launch.not_started(error) from None
        self._changed = threading.Condition()
        self._is_closing = False
        self._writer = threading.Thread(target=self._write_all, name="mossnano-client-writer", daemon=True)
        self._reader = threading.Thread(target=self._read_all, name="mossnano-client-reader", daemon=True)
        self._writer.start()
        self._reader.start()
        self._maybe_logger: threading.Thread | None = None
        if launch.maybe_log is not None:
            self._maybe_logger = threading.Thread(
                target=self._log_all, args=[launch.maybe_log], name="mossnano-client-log", daemon=True
            )
            self._maybe_logger.start()
        try:
            self.wait_for(self.exchange.maybe_handshake, launch.start_seconds)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def changing(self) -> Iterator[Exchange]:
        """The exchange, for whoever says something."""
        with self._changed:
            try:
                yield self.exchange
            finally:
                self._changed.notify_all()

    def wait_for(self, maybe_find: Callable[[], Found | None], timeout_seconds: float | None = None) -> Found:
        """Sleep until there is something to find."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            self.exchange.waiting += 1
            self._changed.notify_all()  # the reader goes on for us
            try:
                while (maybe_found := maybe_find()) is None:
                    self._changed.wait(_nap_seconds(deadline))
                return maybe_found
            finally:
                self.exchange.waiting -= 1
                self._changed.notify_all()  # there may be room to read on

    def close(self) -> None:
        """End the process, and leave nothing behind."""
        with self._changed:
            is_at_rest = self.exchange.is_at_rest
            self._is_closing = True
            self.exchange.cancel()
            self._changed.notify_all()
        if not is_at_rest:
            self.process.terminate()  # it may be busy for as long as what waits takes
        self._writer.join(STOP_SECONDS)
        if self._writer.is_alive():
            self.process.kill()  # its input is full, and it does not read on
            self._writer.join()
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self._wait_or_kill()
        self._reader.join(STOP_SECONDS)
        self.process.stdout.close()
        if self._maybe_logger is not None and self._maybe_logger is not threading.current_thread():
            self._maybe_logger.join(STOP_SECONDS)

    def _write_all(self) -> None:
        assert self.process.stdin is not None
        fd = self.process.stdin.fileno()
        while (maybe_data := self._next_outgoing()) is not None:
            left = memoryview(maybe_data)
            try:
                while left:
                    left = left[os.write(fd, left) :]
            except OSError:
                return  # it is gone, as the reader finds out

    def _next_outgoing(self) -> bytes | None:
        """The next message; None when we close."""
        with self._changed:
            while not self._is_closing:
                maybe_data = self.exchange.next_outgoing()
                if maybe_data is not None:
                    return maybe_data
                if self.exchange.maybe_death is not None:
                    return None
                self._changed.wait()
            return None

    def _read_all(self) -> None:
        try:
            self._read_to_the_end()
        finally:  # whatever went wrong, those who wait hear of it
            status = self._wait_or_kill()
            with self._changed:
                self.exchange.end(status)
                self._changed.notify_all()

    def _read_to_the_end(self) -> None:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while data := _read(fd):
            with self._changed:
                makes_sense = self.exchange.receive(data)
                self._changed.notify_all()
                while not (self.exchange.wants_input or self._is_closing):
                    self._changed.wait()
            if not makes_sense:
                self.process.kill()
                return

    def _log_all(self, log: Callable[[str], None]) -> None:
        assert self.process.stderr is not None
        lines = LogLines()
        with self.process.stderr as pipe:
            while data := _read(pipe.fileno()):
                for line in lines.feed(data):
                    _log_line(log, line)
        for line in lines.rest():
            _log_line(log, line)

    def _wait_or_kill(self) -> int:
        """The exit status of the process, which should end."""
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _log_line(log: Callable[[str], None], line: str) -> None:
    try:
        log(line)
    except Exception as bug:  # noqa: BLE001 - shown as any thread's, and the process, whose log must flow, lives on
        threading.excepthook(threading.ExceptHookArgs([type(bug), bug, bug.__traceback__, threading.current_thread()]))


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, READ_BYTES)
    except OSError:
        return b""


def _nap_seconds(deadline: float | None) -> float | None:
    """How long to sleep until the next look."""
    if deadline is None:
        return WAKE_SECONDS
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the decoder process did not answer in time")
    return left if WAKE_SECONDS is None else min(left, WAKE_SECONDS)
