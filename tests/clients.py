"""Both Python clients behind one face, so that every test is run with each.

Rules of this room:

- `Face` is what the blocking client offers. The other one is driven through an event loop of its own, which runs
  only while it is called: what must go on in between is not tested through it.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mossnano_stdio.client import AsyncDecoder, AsyncStream, AsyncVoice, Decoder, Mark, Played, StreamEnd
from mossnano_stdio.client.exchange import State


class FaceOfStream(Protocol):
    def feed(self, frames: Any) -> None: ...

    def finish(self) -> None: ...

    def __next__(self) -> bytes: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def read(self) -> bytes: ...

    @property
    def was_cancelled(self) -> bool: ...

    @property
    def played(self) -> Played: ...

    @property
    def maybe_end(self) -> StreamEnd | None: ...


class FaceOfVoice(FaceOfStream, Protocol):
    def mark(self, text: str) -> None: ...

    def take_marks(self) -> list[Mark]: ...

    def cancel(self) -> Played: ...

    @property
    def sample_rate(self) -> int: ...

    @property
    def channels(self) -> int: ...


class Face(Protocol):
    @property
    def restarts(self) -> int: ...

    @property
    def state(self) -> State: ...

    @property
    def maybe_failure(self) -> Exception | None: ...

    @property
    def handshake(self) -> Mapping[str, Any]: ...

    @property
    def pid(self) -> int: ...

    @property
    def queued_bytes(self) -> int: ...

    def open(self) -> FaceOfStream: ...

    def feed(self, frames: Any) -> FaceOfStream: ...

    def finish(self) -> None: ...

    def feed_artifact(self, artifact: bytes) -> FaceOfStream: ...

    def open_voice(self, **settings: Any) -> FaceOfVoice: ...

    def decode(self, frames: Any) -> bytes: ...

    def cancel(self) -> None: ...

    def ping(self) -> float: ...

    def settle(self, **settings: Any) -> Mapping[str, Any]: ...

    def close(self) -> None: ...


class SteppedStream:
    """An AsyncStream, one step at a time."""

    def __init__(self, runner: asyncio.Runner, stream: AsyncStream) -> None:
        self._runner = runner
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        async def take() -> bytes | None:
            async for pcm in self._stream:
                return pcm
            return None

        maybe_pcm = self._runner.run(take())
        if maybe_pcm is None:
            raise StopIteration
        return maybe_pcm

    def read(self) -> bytes:
        return self._runner.run(self._stream.read())

    def feed(self, frames: Any) -> None:
        self._stream.feed(frames)

    def finish(self) -> None:
        self._stream.finish()

    @property
    def was_cancelled(self) -> bool:
        return self._stream.was_cancelled

    @property
    def played(self) -> Played:
        return self._stream.played

    @property
    def maybe_end(self) -> StreamEnd | None:
        return self._stream.maybe_end


class SteppedVoice(SteppedStream):
    """An AsyncVoice, one step at a time."""

    def __init__(self, runner: asyncio.Runner, voice: AsyncVoice) -> None:
        super().__init__(runner, voice)
        self._voice = voice

    def mark(self, text: str) -> None:
        self._voice.mark(text)

    def take_marks(self) -> list[Mark]:
        return self._voice.take_marks()

    def cancel(self) -> Played:
        return self._voice.cancel()

    @property
    def sample_rate(self) -> int:
        return self._voice.sample_rate

    @property
    def channels(self) -> int:
        return self._voice.channels


class SteppedDecoder:
    """An AsyncDecoder, one step at a time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._is_closed = False
        self._decoder = AsyncDecoder(*arguments, **options)
        try:
            self._runner.run(self._decoder.start())
        except BaseException:
            self.close()
            raise

    @property
    def restarts(self) -> int:
        return self._decoder.restarts

    @property
    def state(self) -> State:
        return self._decoder.state

    @property
    def maybe_failure(self) -> Exception | None:
        return self._decoder.maybe_failure

    def pass_time(self, seconds: float) -> None:
        self._runner.run(asyncio.sleep(seconds))

    @property
    def handshake(self) -> Mapping[str, Any]:
        return self._decoder.handshake

    @property
    def pid(self) -> int:
        return self._decoder.pid

    @property
    def queued_bytes(self) -> int:
        return self._decoder.queued_bytes

    def open(self) -> FaceOfStream:
        return SteppedStream(self._runner, self._runner.run(self._decoder.open()))

    def feed(self, frames: Any) -> FaceOfStream:
        return SteppedStream(self._runner, self._runner.run(self._decoder.feed(frames)))

    def finish(self) -> None:
        self._decoder.finish()

    def feed_artifact(self, artifact: bytes) -> FaceOfStream:
        return SteppedStream(self._runner, self._runner.run(self._decoder.feed_artifact(artifact)))

    def open_voice(self, **settings: Any) -> FaceOfVoice:
        return SteppedVoice(self._runner, self._runner.run(self._decoder.open_voice(**settings)))

    def decode(self, frames: Any) -> bytes:
        return self._runner.run(self._decoder.decode(frames))

    def cancel(self) -> None:
        self._decoder.cancel()

    def ping(self) -> float:
        return self._runner.run(self._decoder.ping())

    def settle(self, **settings: Any) -> Mapping[str, Any]:
        return self._runner.run(self._decoder.settle(**settings))

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._runner.run(self._decoder.close())
            self._runner.close()


CLIENTS = {"Decoder": Decoder, "AsyncDecoder": SteppedDecoder}


def wait_until(face: Face, is_so: Callable[[], bool]) -> None:
    """Let time pass."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, f"it is {face.state}: {face.maybe_failure}"
        if isinstance(face, SteppedDecoder):
            face.pass_time(0.02)
        else:
            time.sleep(0.02)


def start(client: str, command: Sequence[str], **options: Any) -> Face:
    """One of CLIENTS around a command of the tests."""
    if "log" not in options:
        options["stderr"] = subprocess.DEVNULL
    face: Face = CLIENTS[client](command=command, **options)
    return face
