"""One stream of a conversation: what came of it so far, how far it is, and what it still owes its peer.

Rules of this room:

- Whatever belongs to one stream lies in its `Stream`, which knows of no other: input that is not whole yet, chunks to
  be computed, counts, and when it was opened. Whoever has a clock says when; none is read here.
- decoding.py and encoding.py have the two kinds of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum
from typing import Any, Protocol

from mossnano_stdio.chunks import Chunks
from mossnano_stdio.errors import MossnanoError
from mossnano_stdio.protocol.messages import Message
from mossnano_stdio.tokens import CodecFormat

Answers = Iterator[Message]


class State(Enum):
    """Where the input stands."""

    IDLE = "between streams"
    TOKENS = "in a token stream"
    ARTIFACT = "in an unfinished artifact"
    AUDIO = "in an audio stream"
    SKIP = "in a stream that went bad"


class Owner(Protocol):
    """What a stream asks of the connection that it belongs to."""

    format: CodecFormat
    quantizers: int

    @property
    def max_audio_bytes(self) -> int: ...

    def error(self, error: MossnanoError, *, fatal: bool = False) -> Message:
        """What is told of an error. It counts, for the stream that is open too."""


class Stream(ABC):
    def __init__(self, number: int, state: State, chunks: Chunks[Any], opened_seconds: float) -> None:
        self.number = number
        self.state = state
        self.chunks = chunks
        self.opened_seconds = opened_seconds
        self.has_answered = False
        self.is_dropped = False  # a CANCEL waits further back: what stands before it is counted and not done
        self.frames = 0
        self.samples = 0
        self.errors = 0
        chunks.reset()

    @abstractmethod
    def step(self, owner: Owner) -> Answers:
        """Compute the one chunk that is due."""

    @abstractmethod
    def finish_input(self) -> None:
        """No more will come: what is left is due."""

    @abstractmethod
    def forget_input(self) -> None:
        """Drop what was received and is not in the chunks."""

    def maybe_cut(self) -> MossnanoError | None:
        """What is wrong if the input ends here."""
        return None

    def maybe_rest(self) -> MossnanoError | None:
        """What is wrong with the input that is left when the stream is finished."""
        return None

    def before_end(self) -> Answers:
        """What the peer must have had before it reads this stream's END, cancelled or not."""
        yield from ()

    def end_extras(self) -> dict[str, Any]:
        """What an END that was not forced says beyond the usual."""
        return {}
