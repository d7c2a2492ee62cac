"""Log lines on stderr: one line each, never in the way of audio.

Rules of this room:

- A line that stderr does not take at once is dropped and counted; the next one that gets through says how many.
  A stderr that is closed, full or slow therefore costs nothing but log lines.
- Everything of ours logs to the logger `mossnano`. Nothing here is called by a room below the process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import select
import sys
import time
from functools import cache
from typing import Final

from mossnano_stdio.process.writing import WriteThread

LEVELS: Final = ("debug", "info", "warning", "error")
_STDERR: Final = 2
_FLUSH_SECONDS: Final = 0.2
_MAX_WAITING_BYTES: Final = 1 << 14  # of lines that a thread has still to write
MAX_LINE_BYTES: Final = 4096  # what a pipe that is writable takes without making us wait (PIPE_BUF)

log = logging.getLogger("mossnano")


def start_logging(program: str, level: str, *, as_json: bool) -> None:
    """Send the log to stderr from now on."""
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter() if as_json else _LineFormatter(program))
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers[:] = [handler]


class _StderrHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._dropped:
            line = f"{line} [{self._dropped} log lines before this one were dropped: stderr did not take them]"
        self._dropped = 0 if write_stderr(line) else self._dropped + 1


class _LineFormatter(logging.Formatter):
    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        return f"{self._program}: {record.levelname.lower()}: {_one_line(record)}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(time.time(), 3), "level": record.levelname.lower(), "message": _one_line(record)}
        return json.dumps(fields)


def _one_line(record: logging.LogRecord) -> str:
    return " ".join(record.getMessage().split())


def write_stderr(line: str) -> bool:
    """Write one line if stderr takes it at once. False: it was dropped."""
    data = line.encode("utf-8", "replace")[: MAX_LINE_BYTES - 1] + b"\n"
    try:
        if sys.platform == "win32":
            writer = _stderr_writer()
            if writer.left_bytes > _MAX_WAITING_BYTES:
                return False
            writer.put(data)
            return True
        poller = select.poll()
        poller.register(_STDERR, select.POLLOUT)
        is_writable = any(events & select.POLLOUT for _, events in poller.poll(0))
        return is_writable and os.write(_STDERR, data) == len(data)
    except OSError:
        return False


@cache
def _stderr_writer() -> WriteThread:
    """Windows cannot poll a pipe: there a thread writes, and what it has not got rid of was not taken at once."""
    writer = WriteThread(_STDERR)
    atexit.register(flush_stderr)
    return writer


def flush_stderr() -> None:
    """The last lines get a moment to be read, where a thread writes them."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            _stderr_writer().wait(_FLUSH_SECONDS)
