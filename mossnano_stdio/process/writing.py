"""A thread that writes, so that whoever has something to write is never held up by who does not read.

Rules of this room:

- One thread for one descriptor. It writes all that it was given, in order, and keeps the first error that it met.
- It is a daemon: a process that ends while it waits for a reader leaves it behind.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

PIECE_BYTES = 1 << 16


class WriteThread:
    def __init__(self, fd: int, write: Callable[[int, memoryview], int] = os.write) -> None:
        self._fd = fd
        self._write = write
        self._waiting: deque[memoryview] = deque()
        self._maybe_error: OSError | None = None
        self._changed = threading.Condition()
        self._left_bytes = 0
        threading.Thread(target=self._run, name="mossnano-write", daemon=True).start()

    @property
    def left_bytes(self) -> int:
        """What was given and is not written yet."""
        return self._left_bytes

    def put(self, data: bytes) -> None:
        with self._changed:
            self._waiting.append(memoryview(data))
            self._left_bytes += len(data)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Is all written, at most so many seconds from now? An error that writing met is raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left_bytes or self._maybe_error, seconds)
            if self._maybe_error is not None:
                raise self._maybe_error
            return not self._left_bytes

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = self._waiting.popleft()
            while data:
                try:
                    written = self._write(self._fd, data[:PIECE_BYTES])
                except BlockingIOError:
                    continue
                except OSError as error:
                    with self._changed:
                        self._maybe_error = error
                        self._changed.notify_all()
                    return
                data = data[written:]
                with self._changed:
                    self._left_bytes -= written
                    self._changed.notify_all()
