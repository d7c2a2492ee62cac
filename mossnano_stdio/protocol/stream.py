"""One stream of a conversation: what came of it so far, how far it is, and what it still owes its peer.

Rules of this room:

- Whatever belongs to one stream lies in its `Stream`, which knows of no other: input that is not whole yet, chunks to
  be computed, counts, and what it may send. Whoever has a clock says when; none is read here.
- `compute` touches nothing but the stream's own chunks, so several streams may compute at once, a thread for each.
  What came of it is counted and sent by `deliver`.
- A `Lane` is where streams come along: the plain ones one after the other, or a numbered one alone.
- decoding.py and encoding.py have the two kinds of stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

from mossnano_stdio.chunks import Chunks
from mossnano_stdio.errors import MossnanoError, SettingsError
from mossnano_stdio.protocol.messages import Message, in_stream
from mossnano_stdio.protocol.settings import Settings
from mossnano_stdio.tokens import CodecFormat

Answers = Iterator[Message]


class State(Enum):
    """Where the input stands."""

    IDLE = "between streams"
    OPEN = "in a stream without input"
    TOKENS = "in a token stream"
    ARTIFACT = "in an unfinished artifact"
    AUDIO = "in an audio stream"
    SKIP = "in a stream that went bad"


class Received(NamedTuple):
    """A message that waits, and when it was whole."""

    message: Message
    seconds: float


class Lane:
    """The plain streams, one after the other (`maybe_number` is None), or one numbered stream."""

    def __init__(self, maybe_number: int | None, settings: Settings, codec: Any) -> None:
        self.maybe_number = maybe_number
        self.settings = settings
        self.codec = codec
        self.stream: Stream | None = None
        self.waiting: deque[Received] = deque()
        self.waiting_bytes = 0  # of messages
        self.after_chunks: Callable[[], Answers] | None = None  # what follows when no chunk is due any more
        self.maybe_misfit: str | None = None  # why the peer's last HANDSHAKE does not fit
        self.has_all_input = False  # of a numbered stream: what comes now is late

    def wait(self, message: Message, seconds: float) -> None:
        self.waiting.append(Received(message, seconds))
        self.waiting_bytes += message.cost_bytes

    @property
    def state(self) -> State:
        return State.IDLE if self.stream is None else self.stream.state

    @property
    def is_due(self) -> bool:
        """Does it have a chunk to compute, as far as its input goes?"""
        return self.stream is not None and self.stream.chunks.due_frames > 0

    @property
    def backlog_bytes(self) -> int:
        """What was received and not dealt with, as bytes on the wire."""
        return self.waiting_bytes + (self.stream.backlog_bytes if self.stream else 0)

    def addressed(self, answers: Answers) -> Answers:
        """What is answered here, as its peer reads it."""
        if self.maybe_number is None:
            return answers
        number = self.maybe_number
        return (in_stream(number, answer) for answer in answers)


class Owner(Protocol):
    """What a stream asks of the connection that it belongs to."""

    format: CodecFormat

    def error(self, error: MossnanoError, lane: Lane, *, fatal: bool = False) -> Message:
        """What is told of an error. It counts, for the stream that is open there too."""


class Stream(ABC):
    """`number` is what its answers call it."""

    def __init__(self, number: int, lane: Lane, chunks: Chunks[Any]) -> None:
        self.number = number
        self.lane = lane
        self.state = State.OPEN
        self.due_seconds: float | None = None  # since when it has a chunk that may be computed
        self.is_dropped = False  # a CANCEL waits further back: what stands before it is counted and not done
        self.frames = 0
        self.samples = 0  # that were sent
        self.errors = 0
        self.chunk_counts: Counter[int] = Counter()  # of those that were computed, by their frames
        # Credit, in samples that may have been sent in all. None: everything.
        self.maybe_window_samples: int | None = None
        self.maybe_granted_samples: int | None = None
        self._was_granted = False  # by more than its settings
        # Who listens at once and without a pause has sound until then.
        self.heard_until_seconds: float | None = None
        self._heard_samples = 0
        self.settle(lane.settings, chunks)

    def settle(self, settings: Settings, chunks: Chunks[Any]) -> None:
        """How it will be computed. It may change until the first input comes."""
        self.settings = settings
        self.chunks = chunks
        chunks.reset()
        if self.lane.maybe_number is not None and not self._was_granted:
            self.maybe_window_samples = self.maybe_granted_samples = settings.window_samples

    # --- what it may send, and how urgent that is ---------------------------------------------------

    @property
    @abstractmethod
    def samples_per_second(self) -> int:
        """Of what it counts."""

    @property
    @abstractmethod
    def backlog_bytes(self) -> int:
        """What was received and waits to be computed, as bytes on the wire."""

    @abstractmethod
    def fits(self, frames: int) -> bool:
        """May all that a chunk of so many frames gives be sent?"""

    @property
    def allowed_frames(self) -> int:
        """How many frames the next chunk may have: as many as are due, or as fit into what is granted."""
        frames = self.chunks.due_frames
        if not frames or self.fits(frames):
            return frames
        if self.chunks.schedule.maybe_chunk_frames is not None:
            return 0  # a fixed size is never cut
        return next((fewer for fewer in smaller_chunks(frames, self.chunks.least_frames) if self.fits(fewer)), 0)

    def grant(self, samples: int) -> None:
        """So many samples may have been sent in all. The first grant is the window."""
        self._was_granted = True
        if self.maybe_window_samples is None:
            self.maybe_window_samples = samples
        self.maybe_granted_samples = max(samples, self.maybe_granted_samples or 0)

    def check_window(self, least_samples: int) -> None:
        """Would settings do that may make it send so many samples at once? A window that was granted stays."""
        window = self.maybe_window_samples
        if self._was_granted and window is not None and window < least_samples:
            raise SettingsError(
                f"{window} samples are the window that CREDIT gave this stream; with these settings {least_samples} "
                "may have to be sent at once and would never fit"
            )

    def grant_all(self) -> None:
        self._was_granted = True
        self.maybe_granted_samples = None

    @property
    def is_played(self) -> bool:
        """Did its listener grant more than the window, as it goes on to do while it plays?"""
        return (self.maybe_granted_samples or 0) > (self.maybe_window_samples or 0)

    def held_seconds(self, seconds: float) -> float:
        """How much sound its listener has not played yet."""
        if self.maybe_granted_samples is not None and self.maybe_window_samples is not None:
            played = self.maybe_granted_samples - self.maybe_window_samples
            return max(0, self.samples - played) / self.samples_per_second
        return max(0.0, (self.heard_until_seconds or 0.0) - seconds)

    def note_due(self, seconds: float) -> None:
        """If a chunk may be computed now, it is due since then, or since earlier."""
        if not self.allowed_frames:
            self.due_seconds = None
        elif self.due_seconds is None:
            self.due_seconds = seconds

    def late_seconds(self, seconds: float) -> float:
        """How long its listener has had nothing to hear although a chunk was due."""
        if self.heard_until_seconds is None or self.due_seconds is None:
            return 0.0
        return max(0.0, seconds - max(self.heard_until_seconds, self.due_seconds))

    def note_sent(self, seconds: float) -> None:
        """What was counted as sent has left by now."""
        new_seconds = (self.samples - self._heard_samples) / self.samples_per_second
        self.heard_until_seconds = max(self.heard_until_seconds or 0.0, seconds) + new_seconds
        self._heard_samples = self.samples

    # --- its work -------------------------------------------------------------------------------------

    @abstractmethod
    def compute(self, most_frames: int) -> Any:
        """Put the chunk that is due through the codec. What comes of it, for `deliver`."""

    @abstractmethod
    def deliver(self, owner: Owner, chunk: Any) -> Answers:
        """Count and send what came of a chunk."""

    @property
    def artifact_bytes(self) -> int:
        """What an artifact takes that is not decoded yet."""
        return 0

    def checked_marks(self, value: Any) -> Sequence[tuple[int, bytes]]:
        """The places and texts of `marks` in SETTINGS."""
        raise SettingsError("marks are of decoding: an encoder's sound has none")

    def push_mark(self, text: bytes, frame: int | None = None) -> None:
        """Mark a place: before a frame of the stream, or behind all that came so far."""
        raise AssertionError("the table has no MARK in this direction")

    @abstractmethod
    def complete_input(self) -> None:
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

    def can_end(self) -> bool:
        """May what is sent between the last chunk and the END be sent?"""
        return True

    def last_sound(self) -> Answers:
        """What follows the last chunk of a stream that was not dropped."""
        yield from ()

    def before_end(self) -> Answers:
        """What the peer must have had before it reads this stream's END, cancelled or not."""
        yield from ()

    def counts(self) -> dict[str, Any]:
        """What every END says of this kind of stream beyond the usual."""
        return {}

    def end_extras(self) -> dict[str, Any]:
        """What an END that was not forced says beyond that."""
        return {}


def smaller_chunks(frames: int, least_frames: int) -> Iterator[int]:
    """
    >>> list(smaller_chunks(8, 1)), list(smaller_chunks(7, 1)), list(smaller_chunks(1, 1)), list(smaller_chunks(20, 7))
    ([4, 2, 1], [4, 2, 1], [], [16, 8, 7])
    """
    fewer = 1 << max(0, frames - 1).bit_length()
    while (fewer := fewer // 2) > least_frames:
        yield fewer
    if least_frames < frames:
        yield least_frames
