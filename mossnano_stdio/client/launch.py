"""How the process is started and what it logs, the same for both clients."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

from mossnano_stdio.client.exchange import DecoderError, Exchange
from mossnano_stdio.errors import UsageError

START_SECONDS: Final = 60.0  # how long it may take to say its HANDSHAKE
STOP_SECONDS: Final = 2.0  # how long it may take to end by itself
READ_BYTES: Final = 1 << 16
FIRST_PAUSE_SECONDS: Final = 0.25  # before a process that crashed is started again
LONGEST_PAUSE_SECONDS: Final = 8.0
LONGEST_LINE_BYTES: Final = 1 << 14  # of the log; what is longer comes as several

# A child of its own group, so that Ctrl-C is ours to deal with, and without a window.
CHILD_OPTIONS: Final[Mapping[str, Any]] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


def command_line(weights: str | None, arguments: Sequence[str], command: Sequence[str] | None) -> list[str]:
    """Our own process, with this Python, unless another command is given."""
    program = [sys.executable, "-m", "mossnano_stdio"] if command is None else list(command)
    return [*program, *(() if weights is None else ("--weights", weights)), *arguments]


@dataclass(frozen=True)
class Launch:
    """What a process is started with, and each one that replaces it."""

    command: Sequence[str]
    start_seconds: float
    buffer_bytes: int
    queue_bytes: int
    maybe_log: Callable[[str], None] | None
    stderr: int | IO[bytes] | None
    stream_numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if self.maybe_log is not None and self.stderr is not None:
            raise UsageError("both log and stderr were given, and the log goes to one of them: leave the other out")

    def exchange(self) -> Exchange:
        """A new conversation, which numbers its streams on."""
        return Exchange(self.buffer_bytes, self.queue_bytes, self.stream_numbers)

    def process_options(self) -> dict[str, Any]:
        return {**CHILD_OPTIONS, "stderr": self.stderr if self.maybe_log is None else subprocess.PIPE}

    def not_started(self, error: OSError) -> DecoderError:
        """What to raise when there is no such program."""
        return DecoderError("not_started", f"{self.command[0]} cannot be started: {error.strerror}", fatal=True)


@dataclass
class Restarts:
    """When a process that crashed is started again: up to `most` times in a row. Each pause is twice the one before.

    >>> restarts = Restarts(3)
    >>> [restarts.maybe_pause_seconds() for _ in range(4)]
    [0.25, 0.5, 1.0, None]
    """

    most: int
    in_a_row: int = 0

    def begin_a_row(self) -> None:
        """All is well again: a stream came to its end, or somebody asked for a process."""
        self.in_a_row = 0

    def maybe_pause_seconds(self) -> float | None:
        """How long to wait before the next start; None: that is it."""
        if self.in_a_row >= self.most:
            return None
        self.in_a_row += 1
        return min(FIRST_PAUSE_SECONDS * (1 << self.in_a_row - 1), LONGEST_PAUSE_SECONDS)


@contextlib.contextmanager
def standard_descriptors_taken() -> Iterator[None]:
    """Inside, pipes that are made get other numbers than 0, 1 and 2, also where the host has closed these.

    What it, or a library in it, writes to a descriptor that it takes for its stderr must not reach the decoder.
    """
    with contextlib.ExitStack() as placeholders:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            placeholders.callback(os.close, fd)
        os.close(fd)
        yield


class LogLines:
    """The bytes of a log in any pieces -> its lines. What is no UTF-8 is replaced.

    >>> lines = LogLines()
    >>> list(lines.feed(b"one\\ntw")), list(lines.feed(b"o\\r\\nthree")), list(lines.rest())
    (['one'], ['two'], ['three'])
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that this makes whole."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            yield from _texts(line)
        if len(self._rest) > LONGEST_LINE_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[str]:
        """The last line, which nobody ended."""
        line, self._rest = self._rest, b""
        if line:
            yield from _texts(line)


def _texts(line: bytes) -> Iterator[str]:
    for start in range(0, max(1, len(line)), LONGEST_LINE_BYTES):
        yield line[start : start + LONGEST_LINE_BYTES].decode("utf-8", "replace").removesuffix("\r")
