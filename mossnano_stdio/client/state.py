"""What is known of one stream, and the errors that those who feed or read it get."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mossnano_stdio.errors import MossnanoError
from mossnano_stdio.pcm import SoundForm
from mossnano_stdio.tokens import CodecFormat


class DecoderError(MossnanoError):
    """The process sent an ERROR: `code` is that of the wire."""

    def __init__(self, code: str, text: str, *, stream: int | None = None, fatal: bool = False) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.stream = stream
        self.fatal = fatal


class DecoderDiedError(DecoderError):
    """The process ended although nobody told it to. `lost` are the numbers of the streams that it did not finish, and
    `lost_frames` is how many frames of them were fed and did not come back."""

    def __init__(
        self, code: str, text: str, *, status: int | None, lost: Sequence[int] = (), lost_frames: int = 0
    ) -> None:
        super().__init__(code, text, fatal=True)
        self.status = status
        self.lost = tuple(lost)
        self.lost_streams = len(lost)
        self.lost_frames = lost_frames


class NotReadyError(DecoderError):
    """The process that could take this is still being started."""

    def __init__(self, maybe_why: Exception | None) -> None:
        why = f", because {maybe_why}" if maybe_why else ""
        super().__init__("not_ready", f"the decoder is being started{why}: wait until its state is ready")


class QueueFullError(DecoderError):
    """More than `queue_bytes` would wait to be sent to the process, so this was refused as a whole."""


class StreamOverError(DecoderError):
    """This stream was cancelled or finished, and takes no more frames."""


@dataclass(frozen=True)
class StreamEnd:
    """The counts of a stream that ended, as its END gave them."""

    stream: int
    frames: int
    samples: int
    errors: int


class Played(NamedTuple):
    """How much of a stream the caller has taken."""

    stream: int  # counted here, from 0, as they are opened; a process that was replaced counts from 0 again
    samples: int  # per channel


class Mark(NamedTuple):
    """A place in the sound of a voice."""

    sample: int  # per channel, from the beginning of the voice
    text: str


class StreamState:
    """One stream: what was sent of it, and what came back and waits to be taken.

    A voice is a numbered stream: the process sends no more of it than `maybe_window_samples` ahead of who takes it.
    """

    def __init__(
        self, number: int, codec: CodecFormat, form: SoundForm, maybe_window_samples: int | None = None
    ) -> None:
        self.number = number
        self.codec = codec  # of the frames that it takes
        self.form = form  # of its sound
        self.maybe_window_samples = maybe_window_samples
        self.takes_frames = True
        self.ends_by_itself = False  # it is an artifact, which has no END
        self.was_cancelled = False
        self.is_queued = False  # a message of it was put into the outbox
        self.is_sent = False  # its first message was taken out of the outbox
        self.is_over = False  # no more will come of it
        self.owes_credit = False  # more of it was taken than the process was told
        self.maybe_end: StreamEnd | None = None
        self.maybe_fault: DecoderError | None = None  # why the process skips what is still fed
        self.fed_frames = 0
        self.received_bytes = 0
        self.taken_bytes = 0
        self.waiting_bytes = 0
        self.marks_in_process_bytes = 0
        self._waiting: deque[bytes | DecoderError | Mark] = deque()
        self._passed_marks: list[Mark] = []

    @property
    def is_voice(self) -> bool:
        return self.maybe_window_samples is not None

    @property
    def taken_samples(self) -> int:
        return self.taken_bytes // self.form.sample_bytes

    @property
    def frames_in_process(self) -> int:
        """How many frames were fed and did not come back."""
        samples = self.received_bytes // self.form.sample_bytes
        return self.fed_frames - samples * self.codec.sample_rate // (self.form.sample_rate * self.codec.frame_samples)

    def put(self, piece: bytes | DecoderError | Mark) -> None:
        """Keep PCM, an ERROR or a MARK that came back, until it is taken."""
        if self.is_over:
            return  # it was cancelled
        self._waiting.append(piece)
        if isinstance(piece, bytes):
            self.received_bytes += len(piece)
            self.waiting_bytes += len(piece)

    def maybe_take(self) -> bytes | None:
        """Return the next PCM, b"" after the last, or None while there is none. Raise an ERROR where it came."""
        if not self.is_over and all(isinstance(piece, Mark) for piece in self._waiting):
            return None  # a mark is passed when the sound behind it is taken
        while self._waiting:
            piece = self._waiting.popleft()
            if isinstance(piece, Mark):
                self._passed_marks.append(piece)
                continue
            if isinstance(piece, DecoderError):
                raise piece
            self.waiting_bytes -= len(piece)
            self.taken_bytes += len(piece)
            return piece
        return b""

    def take_marks(self) -> list[Mark]:
        """Return the marks of what was taken since the last call."""
        marks, self._passed_marks = self._passed_marks, []
        return marks

    def cancel(self) -> None:
        """End the stream and drop what was not taken, unless it was read to its end."""
        if self.is_over and not self._waiting:
            return
        self.was_cancelled = self.is_over = True
        self.takes_frames = False
        self._waiting.clear()
        self.waiting_bytes = 0
