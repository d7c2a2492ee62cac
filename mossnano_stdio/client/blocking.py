"""The client for threads: one writes to the process, one reads from it, one reads its log; callers wait."""

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
    FedStream,
    FedVoice,
    Frames,
    Setting,
    State,
)
from mossnano_stdio.client.launch import (
    READ_BYTES,
    START_SECONDS,
    STOP_SECONDS,
    Launch,
    LogLines,
    Restarts,
    command_line,
    standard_descriptors_taken,
)
from mossnano_stdio.client.state import NotReadyError, StreamState
from mossnano_stdio.errors import UsageError

WAKE_SECONDS: Final = 0.2 if sys.platform == "win32" else None  # on Windows, Ctrl-C does not wake a thread that sleeps
INTERRUPT_SECONDS: Final = 0.05  # between two tries to end a read or write that nothing else ends

Found = TypeVar("Found")


class Stream(FedStream):
    """A stream to feed: iterate it for its PCM, piece by piece, as it comes.

    The iteration raises an ERROR at the place where it came. If the stream goes on after it, so does the iteration.
    """

    _link: _Link

    def __init__(self, decoder: Decoder, link: _Link, state: StreamState) -> None:
        super().__init__(link, state)
        self._decoder = decoder  # held, because a Decoder that nobody holds ends its process

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        pcm = self._link.wait_for(lambda: self._link.exchange.maybe_take(self._state))
        if not pcm:
            raise StopIteration
        return pcm

    def read(self) -> bytes:
        """Read to the end, and return all PCM that was not taken yet."""
        return b"".join(self)


class Voice(FedVoice, Stream):
    """A stream that goes on beside others, each at the pace of its reader, who is taken for its player.

    The process sends `window_samples` ahead of who iterates it, and decodes first what has least ahead. `take_marks`
    returns the marks of what was read, `cancel` ends this voice alone and says how much of it was read. A voice that
    nobody holds any more is cancelled.
    """


class Decoder(Facts):
    """A decoder process that is fed with frames and returns PCM. It is ready when the constructor returns.

    `command` replaces the program, `arguments` are added to it. Its log goes line by line to `log`, which is called on
    a thread of its own, or to `stderr`, or else to our own stderr.

    If the process dies, the next stream starts another. With `restart`, its death does, up to so many times in a row,
    after pauses that grow from 0.25 s to 8 s; a stream that comes to its end ends the row. What the process had not
    answered is lost, and reading or feeding that raises DecoderDiedError.

    Calls that need a process wait until it is ready. If `wait_for_start` is False, neither they nor the constructor
    wait, and a call that comes too early raises NotReadyError. Ask `state`, or call `wait_until_ready`.
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
        restart: int = 0,
        wait_for_start: bool = True,
    ) -> None:
        program = command_line(None if weights is None else os.fspath(weights), arguments, command)
        launch = Launch(program, start_seconds, buffer_bytes, queue_bytes, log, stderr)
        self._household = _Household(launch, Restarts(restart), wait_for_start)
        self._finalizer = weakref.finalize(self, _warn_and_close, self._household)
        self._household.begin()
        if wait_for_start:
            try:
                self.wait_until_ready()
            except BaseException:
                self.close()
                raise

    @property
    def state(self) -> State:
        """`starting`, `ready`, `failed` (`maybe_failure` says why) or `closed`."""
        return self._household.state

    @property
    def maybe_failure(self) -> Exception | None:
        """Why the process that failed last did not start, or died."""
        return self._household.maybe_failure

    @property
    def restarts(self) -> int:
        """How many processes replaced one that died."""
        return max(0, self._household.starts - 1)

    def wait_until_ready(self, timeout_seconds: float | None = None) -> None:
        """Wait until the process is ready. Raise why it failed, or TimeoutError if it takes longer."""
        self._household.wait_until_ready(timeout_seconds)

    @property
    def handshake(self) -> Mapping[str, Any]:
        return self._household.handshake

    @property
    def queued_bytes(self) -> int:
        """How much of `queue_bytes` waits to be sent: payloads, and 64 bytes for each message."""
        return self._household.newest.exchange.queued_bytes

    @property
    def pid(self) -> int:
        return self._household.newest.process.pid

    # --- streams ---------------------------------------------------------------------------------

    def open(self) -> Stream:
        """Open a stream to feed."""
        link = self._household.link_for_a_new_stream()
        with link.changing() as exchange:
            return Stream(self, link, exchange.open())

    def feed(self, frames: Frames) -> Stream:
        """Feed the open stream, or a new one: [frames, quantizers], or packed bytes. Waits only for the start of a new
        process, unless `wait_for_start` is False."""
        link = self._household.maybe_link_with_open_stream() or self._household.link_for_a_new_stream()
        with link.changing() as exchange:
            return Stream(self, link, exchange.feed_open(frames))

    def finish(self) -> None:
        """End the open stream behind the frames that were fed. Never waits."""
        maybe_link = self._household.maybe_link_with_open_stream()
        if maybe_link is None:
            raise UsageError("no stream is open: feed opens one")
        with maybe_link.changing() as exchange:
            exchange.finish_open()

    def feed_artifact(self, artifact: bytes) -> Stream:
        """Feed a whole `.mossnano` as a stream of its own."""
        link = self._household.link_for_a_new_stream()
        with link.changing() as exchange:
            return Stream(self, link, exchange.feed_artifact(artifact))

    def open_voice(self, **settings: Setting) -> Voice:
        """Open a stream to feed that goes on beside all others.

        Its `settings` are those of SETTINGS: `sample_rate`, `channels`, `sample_format`, `gain_db`, `quantizers`,
        `chunk_frames`, `urgency`, and `window_samples`, which may be read less than so far ahead (2 s of it).
        """
        link = self._household.ready_link()
        with link.changing() as exchange:
            return Voice(self, link, exchange.open_voice(settings))

    def decode(self, frames: Frames) -> bytes:
        """Decode one whole stream, and return its PCM."""
        stream = self.open()
        stream.feed(frames)
        stream.finish()
        return stream.read()

    def cancel(self) -> None:
        """End every stream that was not read to its end, at once: barge-in. Never waits."""
        self._household.cancel()

    # --- beside streams --------------------------------------------------------------------------

    def ping(self, timeout_seconds: float | None = None) -> float:
        """Measure the seconds until the process has worked off all messages before this one. Raise TimeoutError if it
        takes longer."""
        started = time.monotonic()
        link = self._household.ready_link()
        with link.changing() as exchange:
            answer = exchange.ping()
        link.wait_for(answer.maybe_take, timeout_seconds)
        return time.monotonic() - started

    def settle(self, **settings: Setting) -> Mapping[str, Any]:
        """Change `chunk_frames` or `quantizers` for the streams to come, and return the new HANDSHAKE."""
        link = self._household.ready_link()
        link.settle(settings)
        self._household.settings |= settings
        return self.handshake

    def close(self) -> None:
        """End the process. PCM that was not read is lost."""
        self._finalizer.detach()
        self._household.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _warn_and_close(household: _Household) -> None:
    household.close()
    warnings.warn("a Decoder was not closed: use it in a `with`, or call close()", ResourceWarning, stacklevel=2)


class _Household:
    """The newest process, dead ones whose streams may still be read, and the thread that starts the next.

    One lock guards all of their state, the exchanges too. A thread that waits releases it.
    """

    def __init__(self, launch: Launch, restarts: Restarts, waits: bool) -> None:
        self._launch = launch
        self._restarts = restarts
        self._waits = waits
        self._changed = threading.Condition()
        self._links: list[_Link] = []  # the newest is the last
        self._maybe_starter: threading.Thread | None = None
        self._is_starting = False
        self._is_closed = False
        self._earlier_handshake: Mapping[str, Any] = {}
        self.settings: dict[str, Setting] = {}
        self.starts = 0  # that ended well
        self.maybe_failure: Exception | None = None

    @property
    def state(self) -> State:
        with self._changed:
            if self._is_closed:
                return "closed"
            if self._is_starting:
                return "starting"
            return "ready" if self._links and self._links[-1].exchange.is_alive else "failed"

    @property
    def newest(self) -> _Link:
        """The process that was started last."""
        with self._changed:
            if not self._links:
                raise NotReadyError(self.maybe_failure)
            return self._links[-1]

    @property
    def handshake(self) -> Mapping[str, Any]:
        """The HANDSHAKE of the newest process; until that has come, of the one before."""
        with self._changed:
            said = (self._links[-1].exchange.handshake if self._links else None) or self._earlier_handshake
            if not said:
                raise NotReadyError(self.maybe_failure)
            return said

    def ready_link(self) -> _Link:
        """The link to a process that lives. If it has died, start another."""
        with self._changed:
            if self.state == "failed":
                self._restarts.begin_a_row()
                self.begin()
            if self.state == "starting" and not self._waits:
                raise NotReadyError(self.maybe_failure)
        return self.wait_until_ready()

    def link_for_a_new_stream(self) -> _Link:
        """The link to a process that lives. Streams that are open in dead processes are given up."""
        link = self.ready_link()
        with self._changed:
            for dead in self._links:
                if dead is not link:
                    dead.exchange.forget_open()
        return link

    def maybe_link_with_open_stream(self) -> _Link | None:
        """The link with the open stream. Its process may have died: feeding then raises its death."""
        with self._changed:
            return next((link for link in self._links if link.exchange.takes_frames), None)

    def wait_until_ready(self, timeout_seconds: float | None = None) -> _Link:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            while self.state == "starting":
                self._changed.wait(_nap_seconds(deadline))
            if self._is_closed:
                raise UsageError("this decoder is closed")
            if self.state == "failed":
                assert self.maybe_failure is not None
                raise self.maybe_failure.with_traceback(None)
            return self._links[-1]

    def cancel(self) -> None:
        with self._changed:
            for link in self._links:
                link.exchange.cancel()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self.cancel()
            maybe_starter = self._maybe_starter
            links = list(self._links)
        for link in links:
            link.close()
        if maybe_starter is not None:
            maybe_starter.join()

    def begin(self, maybe_pause_seconds: float | None = None) -> None:
        """Start a process in the background; in place of one that crashed, after this pause."""
        with self._changed:
            self._is_starting = True
            self._maybe_starter = threading.Thread(
                target=self._start, args=[maybe_pause_seconds], name="mossnano-client-starter", daemon=True
            )
            self._maybe_starter.start()

    def _start(self, maybe_pause_seconds: float | None) -> None:
        is_restart = maybe_pause_seconds is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, maybe_pause_seconds or 0)
                dead = self._links[-1:]
                if self._is_closed:
                    return
            for link in dead:
                link.close()
            maybe_failure = self._maybe_fail_to_start()
            with self._changed:
                if self._links:
                    maybe_failure = maybe_failure or self._links[-1].exchange.maybe_death
                maybe_pause_seconds = self._restarts.maybe_pause_seconds() if maybe_failure and is_restart else None
                self.maybe_failure = maybe_failure or self.maybe_failure
                if self._is_closed or maybe_pause_seconds is None:
                    self.starts += maybe_failure is None
                    self._is_starting = False
                    self._changed.notify_all()
                    return

    def _maybe_fail_to_start(self) -> Exception | None:
        """Start a process with the settings of the one before. If that fails, return the reason."""
        try:
            link = _Link(self._launch, self._changed, self._bury)
        except Exception as error:  # noqa: BLE001 - raised again for who waits
            return error
        with self._changed:
            if self._links:
                self._earlier_handshake = self._links[-1].exchange.handshake or self._earlier_handshake
            self._links = [*(dead for dead in self._links if dead.exchange.has_unread), link]
            is_closed = self._is_closed
        if is_closed:  # while this one was being made, so `close` did not see it
            link.close()
        try:
            link.wait_for(link.exchange.maybe_handshake, self._launch.start_seconds)
            if self.settings:
                link.settle(self.settings, self._launch.start_seconds)
        except Exception as error:  # noqa: BLE001 - raised again for who waits
            link.close()
            return error
        return None

    def _bury(self, dead: _Link) -> None:
        """Take note that a process ended. If nobody closed it, start another one, as far as `restart` allows."""
        if self._is_closed or self._is_starting or dead is not self._links[-1]:
            return  # whoever is starting a process sees its death itself
        self.maybe_failure = dead.exchange.maybe_death
        if dead.exchange.ended_streams:
            self._restarts.begin_a_row()
        maybe_pause_seconds = self._restarts.maybe_pause_seconds()
        if maybe_pause_seconds is not None:
            self.begin(maybe_pause_seconds)


class _Link:
    """One process, its exchange, and the threads that carry its bytes."""

    def __init__(self, launch: Launch, changed: threading.Condition, on_end: Callable[[_Link], None]) -> None:
        self.exchange = launch.exchange()
        try:
            with standard_descriptors_taken():
                self.process: subprocess.Popen[bytes] = subprocess.Popen(
                    launch.command, bufsize=0, **launch.process_options()
                )
        except OSError as error:
            raise launch.not_started(error) from None
        self._changed = changed
        self._on_end = on_end
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

    def settle(self, settings: Mapping[str, Setting], timeout_seconds: float | None = None) -> None:
        with self.changing() as exchange:
            answer = exchange.settle(settings)
        self.wait_for(answer.maybe_take, timeout_seconds)

    @contextlib.contextmanager
    def changing(self) -> Iterator[Exchange]:
        """Give the exchange to speak through, and wake those who wait once that is done."""
        with self._changed:
            try:
                yield self.exchange
            finally:
                self._changed.notify_all()

    def wait_for(self, maybe_find: Callable[[], Found | None], timeout_seconds: float | None = None) -> Found:
        """Sleep until `maybe_find` returns something, and return that."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            self.exchange.waiting += 1
            self._changed.notify_all()  # so that the reader goes on
            try:
                while (maybe_found := maybe_find()) is None:
                    self._changed.wait(_nap_seconds(deadline))
                return maybe_found
            finally:
                self.exchange.waiting -= 1
                self._changed.notify_all()  # there may be room again to read on

    def close(self) -> None:
        """End the process, its threads and its pipes."""
        with self._changed:
            is_at_rest = self.exchange.is_at_rest
            self._is_closing = True
            if self.exchange.maybe_death is None:  # else its streams keep its death, and raise it
                self.exchange.cancel()
            self._changed.notify_all()
        if not is_at_rest:
            self.process.terminate()  # else it would first work off all that waits
        self._writer.join(STOP_SECONDS)
        if self._writer.is_alive():
            self.process.kill()  # its input is full and it does not read, so the writer would hang
        self._wait_or_kill()
        _end(self._writer)
        _end(self._reader)
        if self._maybe_logger is not None and self._maybe_logger is not threading.current_thread():
            self._maybe_logger.join(STOP_SECONDS)

    # Each thread closes its own pipe. Another that closes it meanwhile would wait on Windows until the read or write
    # has returned; elsewhere, the next read or write would reach whatever has got the same number since.

    def _write_all(self) -> None:
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            while (maybe_data := self._next_outgoing()) is not None:
                left = memoryview(maybe_data)
                try:
                    while left:
                        left = left[os.write(pipe.fileno(), left) :]
                except OSError:
                    return  # the process is gone; the reader sees that too, and reports it

    def _next_outgoing(self) -> bytes | None:
        """Wait for the next message to send. Return None when the link closes or the process has died."""
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
        assert self.process.stdout is not None
        try:
            with self.process.stdout as pipe:
                self._read_to_the_end(pipe)
        finally:  # after any error too, so that nobody waits forever
            status = self._wait_or_kill()
            with self._changed:
                self.exchange.end(status)
                self._on_end(self)
                self._changed.notify_all()

    def _read_to_the_end(self, pipe: IO[bytes]) -> None:
        while data := _read(pipe.fileno()):
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
        """Return the exit status of the process; kill it if it does not end in time."""
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _log_line(log: Callable[[str], None], line: str) -> None:
    try:
        log(line)
    except Exception as bug:  # noqa: BLE001 - shown like any thread's; reading goes on, as a full pipe stops the process
        threading.excepthook(threading.ExceptHookArgs([type(bug), bug, bug.__traceback__, threading.current_thread()]))


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, READ_BYTES)
    except OSError:
        return b""


def _end(thread: threading.Thread) -> None:
    """Wait for a thread that reads or writes a pipe of a process that has ended. It ends too, unless somebody who was
    started by the process lives on and holds the other end: then it ends with him, and on Windows now."""
    deadline = time.monotonic() + STOP_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        if sys.platform == "win32":
            thread.join(INTERRUPT_SECONDS)
            _interrupt(thread)  # again and again: it may be between two reads or writes at just that moment
        else:
            thread.join(STOP_SECONDS)


if sys.platform == "win32":

    def _interrupt(thread: threading.Thread) -> None:
        """Let the read or write that this thread waits in fail, if it waits in one."""
        import ctypes
        from ctypes import wintypes

        kernel = ctypes.WinDLL("kernel32")
        kernel.OpenThread.restype = wintypes.HANDLE
        kernel.CancelSynchronousIo.argtypes = kernel.CloseHandle.argtypes = [wintypes.HANDLE]
        right_to_interrupt = 1  # THREAD_TERMINATE
        maybe_handle = kernel.OpenThread(right_to_interrupt, False, thread.native_id)
        if maybe_handle is not None:
            kernel.CancelSynchronousIo(maybe_handle)
            kernel.CloseHandle(maybe_handle)


def _nap_seconds(deadline: float | None) -> float | None:
    """How long to sleep before looking again. Raises TimeoutError at the deadline."""
    if deadline is None:
        return WAKE_SECONDS
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the decoder process did not answer in time")
    return left if WAKE_SECONDS is None else min(left, WAKE_SECONDS)
