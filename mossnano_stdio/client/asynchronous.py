"""The client for asyncio: one task that writes, one that reads, and whoever awaits."""

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

Found = TypeVar("Found")


class AsyncStream:
    """What comes back of the frames that were fed to it: `async for` gives its PCM, piece by piece, as it comes.

    An ERROR of the process is raised where it came. If the stream goes on after it, so does the iteration.
    """

    def __init__(self, link: _AsyncLink, state: StreamState) -> None:
        self._link = link
        self._state = state

    def feed(self, frames: Frames) -> None:
        """More of it: [frames, quantizers], or packed bytes. QueueFullError if too much waits."""
        with self._link.changing() as exchange:
            exchange.feed(self._state, frames)

    def finish(self) -> None:
        """That was all of it."""
        with self._link.changing() as exchange:
            exchange.finish(self._state)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        pcm = await self._link.wait_for(lambda: self._link.exchange.maybe_take(self._state))
        if not pcm:
            raise StopAsyncIteration
        return pcm

    async def read(self) -> bytes:
        """All the rest of it."""
        return b"".join([pcm async for pcm in self])

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


class AsyncDecoder(Facts):
    """A decoder process: fed with frames, heard as PCM. `async with` starts it and ends it; so do start and close.

    What is awaited may have to start a process, or waits for an answer; the rest never waits. The log of the process
    goes line by line to `log`, or where `stderr` says, or else to our own stderr.
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
        self._starting = asyncio.Lock()
        self._settings: dict[str, int | None] = {}
        self._maybe_link: _AsyncLink | None = None
        self._is_closed = False
        self.restarts = 0

    async def start(self) -> None:
        """Start the process, and wait for its HANDSHAKE."""
        await self._alive()

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

    async def open(self) -> AsyncStream:
        """A stream to feed."""
        link = await self._alive()
        with link.changing() as exchange:
            return AsyncStream(link, exchange.open())

    async def feed(self, frames: Frames) -> AsyncStream:
        """Frames for the open stream, or for a new one: [frames, quantizers], or packed bytes."""
        maybe_open = self._link.exchange.maybe_open if self._maybe_link else None
        link = self._link if maybe_open is not None and maybe_open.takes_frames else await self._alive()
        with link.changing() as exchange:
            state = exchange.maybe_open
            if state is None or not state.takes_frames:
                state = exchange.open()
            exchange.feed(state, frames)
            return AsyncStream(link, state)

    def finish(self) -> None:
        """The open stream has all its frames."""
        with self._link.changing() as exchange:
            if exchange.maybe_open is None or not exchange.maybe_open.takes_frames:
                raise UsageError("no stream is open: feed opens one")
            exchange.finish(exchange.maybe_open)

    async def feed_artifact(self, artifact: bytes) -> AsyncStream:
        """A whole `.mossnano`, as a stream of its own."""
        link = await self._alive()
        with link.changing() as exchange:
            return AsyncStream(link, exchange.feed_artifact(artifact))

    async def decode(self, frames: Frames) -> bytes:
        """The PCM of one whole stream."""
        stream = await self.open()
        stream.feed(frames)
        stream.finish()
        return await stream.read()

    def cancel(self) -> None:
        """Barge-in: every stream that was not read to its end is over now."""
        with self._link.changing() as exchange:
            exchange.cancel()

    # --- beside streams --------------------------------------------------------------------------

    async def ping(self) -> float:
        """The seconds until the process had dealt with all that was said before."""
        started = time.monotonic()
        link = await self._alive()
        with link.changing() as exchange:
            answer = exchange.ping()
        await link.wait_for(answer.maybe_take)
        return time.monotonic() - started

    async def settle(self, **settings: int | None) -> Mapping[str, Any]:
        """Change `chunk_frames` or `quantizers` for the streams to come; the HANDSHAKE that says what holds."""
        link = await self._alive()
        await _settle(link, settings)
        self._settings |= settings
        return self.handshake

    async def close(self) -> None:
        """End the process. What was not read is lost."""
        self._is_closed = True
        async with self._starting:
            if self._maybe_link is not None:
                await self._maybe_link.close()

    async def __aenter__(self) -> AsyncDecoder:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _link(self) -> _AsyncLink:
        if self._maybe_link is None:
            raise UsageError("this decoder was not started: use `async with`, or await start()")
        return self._maybe_link

    async def _alive(self) -> _AsyncLink:
        """The link to a process that lives: the first one, or if it has died, a new one."""
        async with self._starting:
            if self._is_closed:
                raise UsageError("this decoder is closed")
            if self._maybe_link is None:
                self._maybe_link = await _AsyncLink.start(self._launch)
            elif self._maybe_link.exchange.maybe_death is not None:
                await self._restart(self._maybe_link)
            return self._maybe_link

    async def _restart(self, dead: _AsyncLink) -> None:
        """Another process, with the settings that held in the one that died."""
        await dead.close()
        link = self._maybe_link = await _AsyncLink.start(self._launch)
        self.restarts += 1
        if self._settings:
            await _settle(link, self._settings)


async def _settle(link: _AsyncLink, settings: Mapping[str, int | None]) -> None:
    with link.changing() as exchange:
        answer = exchange.settle(settings)
    await link.wait_for(answer.maybe_take)


class _Bell:
    """Wakes everybody who waits for it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()
        self._rung = asyncio.Event()

    async def wait(self) -> None:
        await self._rung.wait()


class _AsyncLink:
    """One process, the two tasks that carry its bytes, and its exchange."""

    def __init__(
        self, process: asyncio.subprocess.Process, exchange: Exchange, maybe_log: Callable[[str], None] | None
    ) -> None:
        self.exchange = exchange
        self.process = process
        self._changed = _Bell()
        self._is_closing = False
        self._writer = asyncio.create_task(self._write_all(), name="mossnano-client-writer")
        self._reader = asyncio.create_task(self._read_all(), name="mossnano-client-reader")
        self._logger = asyncio.create_task(self._log_all(maybe_log), name="mossnano-client-log")

    @classmethod
    async def start(cls, launch: Launch) -> _AsyncLink:
        """A process that has said its HANDSHAKE."""
        try:
            with standard_descriptors_taken():
                process = await asyncio.create_subprocess_exec(*launch.command, **launch.process_options())
        except OSError as error:
            raise launch.not_started(error) from None
        link = cls(process, launch.exchange(), launch.maybe_log)
        try:
            await asyncio.wait_for(link.wait_for(link.exchange.maybe_handshake), launch.start_seconds)
        except BaseException:
            await link.close()
            raise
        return link

    @contextlib.contextmanager
    def changing(self) -> Iterator[Exchange]:
        """The exchange, for whoever says something."""
        try:
            yield self.exchange
        finally:
            self._changed.ring()

    async def wait_for(self, maybe_find: Callable[[], Found | None]) -> Found:
        """Wait until there is something to find."""
        self.exchange.waiting += 1
        self._changed.ring()  # the reader goes on for us
        try:
            while (maybe_found := maybe_find()) is None:
                await self._changed.wait()
            return maybe_found
        finally:
            self.exchange.waiting -= 1
            self._changed.ring()  # there may be room to read on

    async def close(self) -> None:
        """End the process, and leave nothing behind."""
        is_at_rest = self.exchange.is_at_rest
        self._is_closing = True
        with self.changing() as exchange:
            exchange.cancel()
        assert self.process.stdin is not None
        if not is_at_rest:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()  # it may be busy for as long as what waits takes
        self.process.stdin.close()
        await self._wait_or_kill()
        await asyncio.gather(self._writer, self._reader, self._logger)
        with contextlib.suppress(OSError):
            await self.process.stdin.wait_closed()

    async def _wait_or_kill(self) -> int:
        try:
            return await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            return await self.process.wait()

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
                return  # it is gone, as the reader finds out

    async def _log_all(self, maybe_log: Callable[[str], None] | None) -> None:
        if maybe_log is None:
            return
        assert self.process.stderr is not None
        loop = asyncio.get_running_loop()  # what `log` raises is for its exception handler, and not for us
        lines = LogLines()
        while data := await self.process.stderr.read(READ_BYTES):
            for line in lines.feed(data):
                loop.call_soon(maybe_log, line)
        for line in lines.rest():
            loop.call_soon(maybe_log, line)

    async def _read_all(self) -> None:
        try:
            await self._read_to_the_end()
        finally:  # whatever went wrong, those who wait hear of it
            self.exchange.end(await self._wait_or_kill())
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
