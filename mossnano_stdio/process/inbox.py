"""What was read and waits to be dealt with, between the thread that reads and the one that decodes.

Rules of this room:

- First in, first out. A CANCEL does not jump the queue: that one waits is known at once (`cancel_waits`), and whatever
  stands before it is then passed over quickly.
- Every message counts as its bytes + 64. A full inbox makes the reader wait, so that the peer's writes wait.
- The last thing in it is an `Ending`: why nothing more will come.
- It knows no file descriptors. Both sides may sleep here; the clock is monotonic seconds.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mossnano_stdio.protocol import INBOX_BYTES, Kind, Message

WAKE_SECONDS: Final = 0.2  # how long a sleeper sleeps at most: on Windows a signal does not wake it


@dataclass(frozen=True)
class Arrival:
    """A message, and when it was whole."""

    message: Message
    seconds: float


@dataclass(frozen=True)
class Ending:
    """Why no more messages will come: the input ended, with a fault or without, or nobody reads our answers."""

    maybe_fault: Exception | None = None
    is_reader_gone: bool = False


class Inbox:
    """A bounded queue for one reader and one decoder.

    What was taken out counts until `release` is told that it was dealt with.
    """

    def __init__(self, limit_bytes: int = INBOX_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._waiting: deque[Arrival] = deque()
        self._waiting_bytes = 0
        self._waiting_cancels = 0
        self._maybe_ending: Ending | None = None
        self._changed = threading.Condition()

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    def cancel_waits(self) -> bool:
        return self._waiting_cancels > 0

    def put(self, message: Message) -> None:
        """Add a message, as soon as there is room for it. A message larger than the inbox has it to itself."""
        with self._changed:
            while self._waiting_bytes and self._waiting_bytes + message.cost_bytes > self._limit_bytes:
                self._changed.wait(WAKE_SECONDS)
            self._waiting.append(Arrival(message, time.perf_counter()))
            self._waiting_bytes += message.cost_bytes
            self._waiting_cancels += message.kind == Kind.CANCEL
            self._changed.notify_all()

    def release(self, message: Message) -> None:
        """The message was dealt with."""
        with self._changed:
            self._waiting_bytes -= message.cost_bytes
            self._waiting_cancels -= message.kind == Kind.CANCEL
            self._changed.notify_all()

    def end(self, ending: Ending) -> None:
        """Nothing more will be put."""
        with self._changed:
            self._maybe_ending = ending
            self._changed.notify_all()

    def maybe_next(self) -> Arrival | Ending | None:
        """The next message, or the ending once all messages are gone, or None for now."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else self._maybe_ending

    def wait(self, look_round: Callable[[], object] = lambda: None, until_seconds: float = math.inf) -> None:
        """Sleep until there is a next one, or the clock says `until_seconds`. Looks round WAKE_SECONDS apart."""
        with self._changed:
            while not self._waiting and self._maybe_ending is None:
                left_seconds = until_seconds - time.perf_counter()
                if left_seconds <= 0:
                    return
                if not self._changed.wait(min(left_seconds, WAKE_SECONDS)):
                    look_round()
