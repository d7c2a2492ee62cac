"""The client for asyncio: one task writes to the process, one reads from it, one reads its log; callers await."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import IO, Any, TypeVar

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
from mossnano_stdio.client.state import NotReadyError
from mossnano_stdio.errors import UsageError

UNKNOWN_STATUS = 255  # of a process that somebody else has waited for, or of one that ended so

Found = TypeVar("Found")


class AsyncStream(FedStream):
    """A stream to feed: `async for` gives its PCM, piece by piece, as it comes.

    The iteration raises an ERROR at the place where it came. If the stream goes on after it, so does the iteration.
    """

    _link: _AsyncLink

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        pcm = await self._link.wait_for(lambda: self._link.exchange.maybe_take(self._state))
        if not pcm:
            raise StopAsyncIteration
        return pcm

    async def read(self) -> bytes:
        """Read to the end, and return all PCM that was not taken yet."""
        return b"".join([pcm async for pcm in self])


class AsyncVoice(FedVoice, AsyncStream):
    """A stream that goes on beside others, as a Voice does."""


class AsyncDecoder(Facts):
    """A decoder process that is fed with frames and returns PCM. `async with` or start and close start and end it.

    Methods that are awaited may start a process or wait for an answer; the others never wait. The log of the process
    goes line by line to `log`, or to `stderr`, or else to our own stderr. `restart` does the same as for Decoder.
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
    ) -> None:
        program = command_line(None if weights is None else os.fspath(weights), arguments, command)
        self._launch = Launch(program, start_seconds, buffer_bytes, queue_bytes, log, stderr)
        self._restarts = Restarts(restart)
        self._links: list[_AsyncLink] = []  # the newest is the last; the others died, but may still be read
        self._maybe_starter: asyncio.Task[None] | None = None
        self._settings: dict[str, Setting] = {}
        self._earlier_handshake: Mapping[str, Any] = {}
        self._starts = 0  # that ended well
        self._maybe_failure: Exception | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Start the process and wait for its HANDSHAKE."""
        await self._alive()

    @property
    def state(self) -> State:
        """`starting`, `ready`, `failed` (`maybe_failure` says why), or `closed`, which it is before the start too."""
        if self._maybe_starter is not None and not self._is_closed:
            return "starting"
        if self._is_closed or not (self._links or self._maybe_failure):
            return "closed"
        return "ready" if self._links and self._links[-1].exchange.is_alive else "failed"

    @property
    def maybe_failure(self) -> Exception | None:
        """Why the process that failed last did not start, or died."""
        return self._maybe_failure

    @property
    def restarts(self) -> int:
        """How many processes replaced one that died."""
        return max(0, self._starts - 1)

    @property
    def handshake(self) -> Mapping[str, Any]:
        """The HANDSHAKE of the newest process; until that has come, of the one before."""
        said = self._link.exchange.handshake or self._earlier_handshake
        if not said:
            raise self._not_started()
        return said

    @property
    def queued_bytes(self) -> int:
        """How much of `queue_bytes` waits to be sent: payloads, and 64 bytes for each message."""
        return self._link.exchange.queued_bytes

    @property
    def pid(self) -> int:
        return self._link.process.pid

    # --- streams ---------------------------------------------------------------------------------

    async def open(self) -> AsyncStream:
        """Open a stream to feed."""
        link = await self._link_for_a_new_stream()
        with link.changing() as exchange:
            return AsyncStream(link, exchange.open())

    async def feed(self, frames: Frames) -> AsyncStream:
        """Feed the open stream, or a new one: [frames, quantizers], or packed bytes."""
        link = self._maybe_link_with_open_stream() or await self._link_for_a_new_stream()
        with link.changing() as exchange:
            return AsyncStream(link, exchange.feed_open(frames))

    def finish(self) -> None:
        """End the open stream behind the frames that were fed."""
        maybe_link = self._maybe_link_with_open_stream()
        if maybe_link is None:
            raise UsageError("no stream is open: feed opens one") if self._links else self._not_started()
        with maybe_link.changing() as exchange:
            exchange.finish_open()

    async def feed_artifact(self, artifact: bytes) -> AsyncStream:
        """Feed a whole `.mossnano` as a stream of its own."""
        link = await self._link_for_a_new_stream()
        with link.changing() as exchange:
            return AsyncStream(link, exchange.feed_artifact(artifact))

    async def open_voice(self, **settings: Setting) -> AsyncVoice:
        """Open a stream to feed that goes on beside all others. Its `settings` are those of Decoder.open_voice."""
        link = await self._alive()
        with link.changing() as exchange:
            return AsyncVoice(link, exchange.open_voice(settings))

    async def decode(self, frames: Frames) -> bytes:
        """Decode one whole stream, and return its PCM."""
        stream = await self.open()
        stream.feed(frames)
        stream.finish()
        return await stream.read()

    def cancel(self) -> None:
        """End every stream that was not read to its end, at once: barge-in."""
        if not self._links:
            raise self._not_started()
        for link in self._links:
            link.cancel()

    # --- beside streams --------------------------------------------------------------------------

    async def ping(self) -> float:
        """Measure the seconds until the process has worked off all messages before this one."""
        started = time.monotonic()
        link = await self._alive()
        with link.changing() as exchange:
            answer = exchange.ping()
        await link.wait_for(answer.maybe_take)
        return time.monotonic() - started

    async def settle(self, **settings: Setting) -> Mapping[str, Any]:
        """Change `chunk_frames` or `quantizers` for the streams to come, and return the new HANDSHAKE."""
        link = await self._alive()
        await link.settle(settings)
        self._settings |= settings
        return self.handshake

    async def close(self) -> None:
        """End the process. PCM that was not read is lost."""
        self._is_closed = True
        if self._maybe_starter is not None:
            self._maybe_starter.cancel()
            await asyncio.wait([self._maybe_starter])
        for link in self._links:
            link.cancel()
            await link.close()

    async def __aenter__(self) -> AsyncDecoder:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- processes -------------------------------------------------------------------------------

    @property
    def _link(self) -> _AsyncLink:
        if not self._links:
            raise self._not_started()
        return self._links[-1]

    def _not_started(self) -> Exception:
        if self.state == "closed":
            return UsageError("this decoder was not started: use `async with`, or await start()")
        return NotReadyError(self._maybe_failure)

    async def _alive(self) -> _AsyncLink:
        """The link to a process that lives. If there is none, start one."""
        if self._is_closed:
            raise UsageError("this decoder is closed")
        if self.state in ("closed", "failed"):
            self._restarts.begin_a_row()
            self._begin()
        while self._maybe_starter is not None and not self._maybe_starter.done():
            await asyncio.wait([self._maybe_starter])
        if self._is_closed:
            raise UsageError("this decoder is closed")
        if self.state != "ready":
            assert self._maybe_failure is not None
            raise self._maybe_failure.with_traceback(None)
        return self._link

    async def _link_for_a_new_stream(self) -> _AsyncLink:
        """The link to a process that lives. Streams that are open in dead processes are given up."""
        alive = await self._alive()
        for link in self._links:
            if link is not alive:
                link.exchange.forget_open()
        return alive

    def _maybe_link_with_open_stream(self) -> _AsyncLink | None:
        """The link with the open stream. Its process may have died: feeding then raises its death."""
        return next((link for link in self._links if link.exchange.takes_frames), None)

    def _begin(self, maybe_pause_seconds: float | None = None) -> None:
        """Start a process in the background; in place of one that crashed, after this pause."""
        self._maybe_starter = asyncio.create_task(self._start(maybe_pause_seconds), name="mossnano-client-starter")

    async def _start(self, maybe_pause_seconds: float | None) -> None:
        is_restart = maybe_pause_seconds is not None
        try:
            while not await self._starts_well(maybe_pause_seconds or 0) and is_restart:
                maybe_pause_seconds = self._restarts.maybe_pause_seconds()
                if maybe_pause_seconds is None:
                    break
        finally:
            self._maybe_starter = None

    async def _starts_well(self, pause_seconds: float) -> bool:
        """Start a process with the settings of the one before. If that fails, keep the reason in `maybe_failure`."""
        await asyncio.sleep(pause_seconds)
        for dead in self._links[-1:]:
            await dead.close()
        try:
            link = await _AsyncLink.start(self._launch, self._bury)
            if self._links:
                self._earlier_handshake = self._links[-1].exchange.handshake or self._earlier_handshake
            self._links = [*(dead for dead in self._links if dead.exchange.has_unread), link]
            await link.get_ready(self._launch.start_seconds, self._settings)
        except Exception as error:  # noqa: BLE001 - raised again for the callers who wait
            self._maybe_failure = error
            return False
        self._starts += 1
        return True

    def _bury(self, dead: _AsyncLink) -> None:
        """Take note that a process ended. If nobody closed it, start another one, as far as `restart` allows."""
        if self._is_closed or self._maybe_starter is not None or dead is not self._links[-1]:
            return  # whoever is starting a process sees its death itself
        self._maybe_failure = dead.exchange.maybe_death
        if dead.exchange.ended_streams:
            self._restarts.begin_a_row()
        maybe_pause_seconds = self._restarts.maybe_pause_seconds()
        if maybe_pause_seconds is not None:
            self._begin(maybe_pause_seconds)


class _Bell:
    """Wakes all tasks that wait for it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()
        self._rung = asyncio.Event()

    async def wait(self) -> None:
        await self._rung.wait()


class _AsyncLink:
    """One process, its exchange, and the three tasks that carry its bytes."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        transport: asyncio.SubprocessTransport,
        launch: Launch,
        on_end: Callable[[_AsyncLink], None],
    ) -> None:
        self.exchange = launch.exchange()
        self._on_end = on_end
        self.process = process
        self._transport = transport
        self._changed = _Bell()
        self._is_closing = False
        self._writer = asyncio.create_task(self._write_all(), name="mossnano-client-writer")
        self._reader = asyncio.create_task(self._read_all(), name="mossnano-client-reader")
        self._logger = asyncio.create_task(self._log_all(launch.maybe_log), name="mossnano-client-log")

    @classmethod
    async def start(cls, launch: Launch, on_end: Callable[[_AsyncLink], None]) -> _AsyncLink:
        """Start a process, without waiting for its HANDSHAKE."""
        loop = asyncio.get_running_loop()
        try:
            with standard_descriptors_taken():
                transport, protocol = await loop.subprocess_exec(
                    lambda: asyncio.subprocess.SubprocessStreamProtocol(READ_BYTES, loop),
                    *launch.command,
                    **launch.process_options(),
                )
        except OSError as error:
            raise launch.not_started(error) from None
        # As create_subprocess_exec does, which keeps the transport to itself.
        return cls(asyncio.subprocess.Process(transport, protocol, loop), transport, launch, on_end)

    async def get_ready(self, start_seconds: float, settings: Mapping[str, Setting]) -> None:
        """Wait for its HANDSHAKE, then settle. End the process if either fails."""
        try:
            await asyncio.wait_for(self.wait_for(self.exchange.maybe_handshake), start_seconds)
            if settings:
                await asyncio.wait_for(self.settle(settings), start_seconds)
            self.exchange.maybe_handshake()  # if it died in the meantime, this raises why
        except BaseException:
            await self.close()
            raise

    async def settle(self, settings: Mapping[str, Setting]) -> None:
        with self.changing() as exchange:
            answer = exchange.settle(settings)
        await self.wait_for(answer.maybe_take)

    @contextlib.contextmanager
    def changing(self) -> Iterator[Exchange]:
        """Give the exchange to speak through, and wake those who wait once that is done."""
        try:
            yield self.exchange
        finally:
            self._changed.ring()

    async def wait_for(self, maybe_find: Callable[[], Found | None]) -> Found:
        """Wait until `maybe_find` returns something, and return that."""
        self.exchange.waiting += 1
        self._changed.ring()  # so that the reader goes on
        try:
            while (maybe_found := maybe_find()) is None:
                await self._changed.wait()
            return maybe_found
        finally:
            self.exchange.waiting -= 1
            self._changed.ring()  # there may be room again to read on

    def cancel(self) -> None:
        with self.changing() as exchange:
            exchange.cancel()

    async def close(self) -> None:
        """End the process, its tasks and its pipes."""
        is_at_rest = self.exchange.is_at_rest
        self._is_closing = True
        if self.exchange.maybe_death is None:  # else its streams keep its death, and raise it
            self.cancel()
        assert self.process.stdin is not None
        if not is_at_rest:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()  # else it would first work off all that waits
        self.process.stdin.close()
        await self._wait_or_kill()
        tasks = [self._writer, self._reader, self._logger]
        _, unfinished = await asyncio.wait(tasks, timeout=STOP_SECONDS)
        if unfinished:
            self._close_pipes()
        await asyncio.gather(*tasks)
        with contextlib.suppress(OSError):
            await self.process.stdin.wait_closed()

    async def _wait_or_kill(self) -> int:
        try:
            status = await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self._close_pipes()
            status = await self.process.wait()
        # A signal of ours that finds the process at its end takes the status with it. Then asyncio says UNKNOWN_STATUS,
        # and the Popen beneath it knows.
        maybe_popen = self._transport.get_extra_info("subprocess") if status == UNKNOWN_STATUS else None
        return status if maybe_popen is None else int(maybe_popen.returncode)

    def _close_pipes(self) -> None:
        """End what waits for them. Without this it waits for whoever was started by the process, holds their other ends
        and lives on; so does `wait`, in some versions of Python."""
        assert self.process.stdin is not None
        if self.process.stdin.transport.get_write_buffer_size():
            self.process.stdin.transport.abort()  # else it would first be written
        self._transport.close()

    async def _write_all(self) -> None:
        assert self.process.stdin is not None
        while not self._is_closing and self.exchange.maybe_death is None:
            maybe_data = self.exchange.next_outgoing()
            if maybe_data is None:
                await self._changed.wait()
                continue
            try:
                self.process.stdin.write(maybe_data)
                await self.process.stdin.drain()
            except OSError:
                return  # the process is gone; the reader sees that too, and reports it

    async def _log_all(self, maybe_log: Callable[[str], None] | None) -> None:
        if maybe_log is None:
            return
        assert self.process.stderr is not None
        loop = asyncio.get_running_loop()  # calls `log`, so that what it raises goes to the loop's handler
        lines = LogLines()
        while data := await self.process.stderr.read(READ_BYTES):
            for line in lines.feed(data):
                loop.call_soon(maybe_log, line)
        for line in lines.rest():
            loop.call_soon(maybe_log, line)

    async def _read_all(self) -> None:
        try:
            await self._read_to_the_end()
        finally:  # after any error too, so that nobody waits forever
            self.exchange.end(await self._wait_or_kill())
            self._on_end(self)
            self._changed.ring()

    async def _read_to_the_end(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(READ_BYTES):
            makes_sense = self.exchange.receive(data)
            self._changed.ring()
            while not (self.exchange.wants_input or self._is_closing):
                await self._changed.wait()
            if not makes_sense:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                return
