"""Starts the process, decides when it is restarted, and splits its log into lines, for both clients."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

from mossnano_stdio.client.exchange import Exchange
from mossnano_stdio.client.state import DecoderError
from mossnano_stdio.errors import UsageError

START_SECONDS: Final = 60.0  # the longest that it may take until its HANDSHAKE
STOP_SECONDS: Final = 2.0  # the longest that it may take to end by itself
READ_BYTES: Final = 1 << 16
FIRST_PAUSE_SECONDS: Final = 0.25  # before a process that crashed is started again
LONGEST_PAUSE_SECONDS: Final = 8.0
LONGEST_LINE_BYTES: Final = 1 << 14  # a longer line of the log is cut into several

# The child has its own process group, so that Ctrl-C reaches only our program, and it opens no window.
CHILD_OPTIONS: Final[Mapping[str, Any]] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


def command_line(weights: str | None, arguments: Sequence[str], command: Sequence[str] | None) -> list[str]:
    """The command that starts mossnano_stdio with this Python, or `command` in its place, with its arguments."""
    program = [sys.executable, "-m", "mossnano_stdio"] if command is None else list(command)
    return [*program, *(() if weights is None else ("--weights", weights)), *arguments]


@dataclass(frozen=True)
class Launch:
    """The options of a process and of every one that replaces it."""

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
        """Begin a new conversation. The numbers of its streams go on from those before it."""
        return Exchange(self.buffer_bytes, self.queue_bytes, self.stream_numbers)

    def process_options(self) -> dict[str, Any]:
        return {**CHILD_OPTIONS, "stderr": self.stderr if self.maybe_log is None else subprocess.PIPE}

    def not_started(self, error: OSError) -> DecoderError:
        """The error to raise when the program cannot be run."""
        return DecoderError("not_started", f"{self.command[0]} cannot be started: {error.strerror}", fatal=True)


@dataclass
class Restarts:
    """Counts restarts after crashes, up to `most` in a row. Each pause is twice as long as the one before.

    >>> restarts = Restarts(3)
    >>> [restarts.maybe_pause_seconds() for _ in range(4)]
    [0.25, 0.5, 1.0, None]
    """

    most: int
    in_a_row: int = 0

    def begin_a_row(self) -> None:
        """Begin to count anew: a stream came to its end, or a caller asked for a process."""
        self.in_a_row = 0

    def maybe_pause_seconds(self) -> float | None:
        """How long to wait before the next start. None: do not start again."""
        if self.in_a_row >= self.most:
            return None
        self.in_a_row += 1
        return min(FIRST_PAUSE_SECONDS * (1 << self.in_a_row - 1), LONGEST_PAUSE_SECONDS)


@contextlib.contextmanager
def standard_descriptors_taken() -> Iterator[None]:
    """Inside, new pipes get other numbers than 0, 1 and 2, even if the host has closed these."""
    # Else what the host or a library writes to its closed stderr, descriptor 2, could reach the decoder.
    with contextlib.ExitStack() as placeholders:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            placeholders.callback(os.close, fd)
        os.close(fd)
        yield


class LogLines:
    """Splits the bytes of a log, in any pieces, into lines. Bytes that are not UTF-8 are replaced.

    >>> lines = LogLines()
    >>> list(lines.feed(b"one\\ntw")), list(lines.feed(b"o\\r\\nthree")), list(lines.rest())
    (['one'], ['two'], ['three'])
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Take more bytes, and yield the lines that they complete."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            yield from _texts(line)
        if len(self._rest) > LONGEST_LINE_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[str]:
        """Yield what follows the last line break."""
        line, self._rest = self._rest, b""
        if line:
            yield from _texts(line)


def _texts(line: bytes) -> Iterator[str]:
    for start in range(0, max(1, len(line)), LONGEST_LINE_BYTES):
        yield line[start : start + LONGEST_LINE_BYTES].decode("utf-8", "replace").removesuffix("\r")
