"""What is said to a decoder process and what its answers mean: sans-IO, one for both clients.

Messages to send are taken from `next_outgoing`, bytes that came are given to `receive`, and `end` says that no more
will. Whatever can be waited for is asked for by a call that answers None as long as it is not there.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import MossnanoError, TokenError, UsageError
from mossnano_stdio.protocol.messages import (
    MESSAGE_COST_BYTES,
    Kind,
    Message,
    MessageReader,
    encode_message,
    json_message,
    parse_json,
)
from mossnano_stdio.tokens import SAMPLE_BYTES, CodecFormat, pack_frames, parse_artifact

State = Literal["starting", "ready", "failed", "closed"]
Frames = NDArray[np.integer] | Sequence[Sequence[int]] | bytes | bytearray | memoryview

BUFFER_BYTES: Final = 4 << 20  # 20 s of nano
QUEUE_BYTES: Final = 33 << 20  # of what waits to be sent: the longest artifact fits, and 9 hours of live speech
LONGEST_PAYLOAD_BYTES: Final = 1 << 16  # of what is fed, so that a CANCEL never waits behind a long message
LONGEST_ANSWER_BYTES: Final = 1 << 28  # PINGs come back as long as they were sent
_STREAM_LOST: Final = ("bad_tokens", "bad_artifact", "decode_failed")  # the rest of the stream is skipped
_SETTINGS_REFUSED: Final = ("bad_settings", "bad_payload", "out_of_place", "unknown_kind")


class DecoderError(MossnanoError):
    """The process sent an ERROR: `code` is that of the wire."""

    def __init__(self, code: str, text: str, *, stream: int | None = None, fatal: bool = False) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.stream = stream
        self.fatal = fatal


class DecoderDiedError(DecoderError):
    """The process ended although nobody told it to. `lost` are the numbers of the streams that will not come to their
    end; so many frames of them will never be heard."""

    def __init__(
        self, code: str, text: str, *, status: int | None, lost: Sequence[int] = (), lost_frames: int = 0
    ) -> None:
        super().__init__(code, text, fatal=True)
        self.status = status
        self.lost = tuple(lost)
        self.lost_streams = len(lost)
        self.lost_frames = lost_frames


class NotReadyError(DecoderError):
    """There is no process yet that could take this."""

    def __init__(self, maybe_why: Exception | None) -> None:
        why = f", because {maybe_why}" if maybe_why else ""
        super().__init__("not_ready", f"the decoder is being started{why}: wait until its state is ready")


class QueueFullError(DecoderError):
    """The process does not read on, and so much waits to be sent to it that this was refused, all of it."""


class StreamOverError(DecoderError):
    """This stream takes no more frames: it was cancelled, or finished."""


@dataclass(frozen=True)
class StreamEnd:
    """What a stream came to, as the process said."""

    stream: int
    frames: int
    samples: int
    errors: int


class Played(NamedTuple):
    """How far a stream was handed out."""

    stream: int  # counted here, from 0, as they are opened; a process that was replaced counts from 0 again
    samples: int  # per channel


class StreamState:
    """One stream, as far as it has come back."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.takes_frames = True
        self.ends_by_itself = False  # it is an artifact
        self.was_cancelled = False
        self.is_queued = False  # a message of it is in the outbox, or was
        self.is_sent = False  # its first message was taken out of there
        self.is_over = False  # nothing more will come
        self.maybe_end: StreamEnd | None = None
        self.maybe_fault: DecoderError | None = None  # why the process skips what is still fed
        self.fed_frames = 0
        self.received_bytes = 0
        self.taken_bytes = 0
        self.waiting_bytes = 0
        self._waiting: deque[bytes | DecoderError] = deque()

    def put(self, piece: bytes | DecoderError) -> None:
        """Something came back of it."""
        if self.is_over:
            return  # it was cancelled
        self._waiting.append(piece)
        if isinstance(piece, bytes):
            self.received_bytes += len(piece)
            self.waiting_bytes += len(piece)

    def maybe_take(self) -> bytes | None:
        """The next PCM; b"" after the last of it; None while there is none. An ERROR is raised where it came."""
        if not self._waiting:
            return b"" if self.is_over else None
        piece = self._waiting.popleft()
        if isinstance(piece, DecoderError):
            raise piece
        self.waiting_bytes -= len(piece)
        self.taken_bytes += len(piece)
        return piece

    def cancel(self) -> None:
        """End it here and now."""
        if self.is_over and not self._waiting:
            return  # it was read to its end
        self.was_cancelled = self.is_over = True
        self.takes_frames = False
        self._waiting.clear()
        self.waiting_bytes = 0


class Answer:
    """What a PING or SETTINGS is waiting for."""

    def __init__(self) -> None:
        self.is_there = False
        self.maybe_error: DecoderError | None = None

    def maybe_take(self) -> bool | None:
        """True once it is there; None before; an ERROR in its place is raised."""
        if self.maybe_error is not None:
            raise self.maybe_error
        return True if self.is_there else None


@dataclass(frozen=True)
class _Cancel:
    """A CANCEL on its way; it is told from others by its echo."""

    echo: str


class _Outgoing(NamedTuple):
    message: Message
    maybe_stream: StreamState | None = None

    @property
    def cost_bytes(self) -> int:
        """What it counts in the queue, as in the inbox of the process."""
        return len(self.message.payload) + MESSAGE_COST_BYTES


class Exchange:
    """The conversation with one process, from its HANDSHAKE to its end."""

    def __init__(
        self,
        buffer_bytes: int = BUFFER_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self._numbers = itertools.count() if numbers is None else numbers  # of streams
        self._buffer_bytes = buffer_bytes
        self._queue_bytes = queue_bytes
        self._reader = MessageReader(LONGEST_ANSWER_BYTES)
        self._outbox: deque[_Outgoing] = deque()
        self.queued_bytes = 0  # what the outbox costs
        self._sent: deque[StreamState | _Cancel] = deque()  # what an END is still due for, oldest first
        self._answers: deque[tuple[Kind, Answer]] = deque()
        self._unread: weakref.WeakSet[StreamState] = weakref.WeakSet()
        self._maybe_open: StreamState | None = None
        self._maybe_fatal: DecoderError | None = None
        self._maybe_stray: DecoderError | None = None
        self._cancels = 0
        self.ended_streams = 0  # which came to their end
        self.handshake: Mapping[str, Any] = {}
        self.waiting = 0  # how many callers wait for something to come
        self.maybe_death: DecoderDiedError | None = None

    # --- what the caller says --------------------------------------------------------------------

    def open(self) -> StreamState:
        """A stream to feed. The process learns of it with its first frames."""
        return self._begin([])

    @property
    def maybe_open(self) -> StreamState | None:
        """The stream that takes frames."""
        return self._maybe_open

    @property
    def takes_frames(self) -> bool:
        """Is a stream open? In a process that died: is there one whose feeder was not told yet?"""
        return self._maybe_open is not None and self._maybe_open.takes_frames

    def forget_open(self) -> None:
        """Nobody will feed the open stream any more."""
        self._maybe_open = None

    @property
    def has_unread(self) -> bool:
        """Is there a stream that somebody may still read or feed?"""
        return len(self._unread) > 0

    def feed(self, stream: StreamState, frames: Frames) -> None:
        """Frames for this stream: all of them or, with QueueFullError, none."""
        payload = self._packed(frames)
        self._check_feedable(stream)
        frame_bytes: int = self.handshake["frame_bytes"]
        most = max(1, self._longest_payload_bytes // frame_bytes) * frame_bytes
        messages = _cut(Kind.TOKENS, payload, most)
        self._check_room(messages)
        for message in messages:
            self._send(message, stream)
        stream.fed_frames += len(payload) // frame_bytes

    def finish(self, stream: StreamState) -> None:
        """No more frames for this stream."""
        if not stream.takes_frames:
            return
        stream.takes_frames = False
        if not stream.is_queued:
            self._send(Message(Kind.TOKENS), stream)
        self._send(Message(Kind.END), stream)

    def feed_artifact(self, artifact: bytes) -> StreamState:
        """A whole `.mossnano`, as a stream of its own."""
        frames = parse_artifact(artifact).frames
        messages = _cut(Kind.ARTIFACT, artifact, self._longest_payload_bytes)
        stream = self._begin(messages)
        stream.takes_frames = False
        stream.ends_by_itself = True
        stream.fed_frames = frames
        for message in messages:
            self._send(message, stream)
        return stream

    def cancel(self) -> None:
        """Drop every stream that was not read to its end: those that are sent, by a CANCEL."""
        for stream in list(self._unread):
            stream.cancel()
        self._maybe_open = None
        if self.maybe_death is not None:
            return
        others = [
            outgoing
            for outgoing in self._outbox
            if outgoing.maybe_stream is None and outgoing.message.kind != Kind.CANCEL
        ]
        self._cancels += 1
        cancel = _Outgoing(Message(Kind.CANCEL, str(self._cancels).encode()))
        self._put_into_outbox([cancel, *others])

    def ping(self) -> Answer:
        """An answer that comes when all that was said before it was dealt with."""
        return self._ask(Message(Kind.PING))

    def settle(self, settings: Mapping[str, int | None]) -> Answer:
        """Change how the streams to come are decoded."""
        if self._maybe_open is not None and self._maybe_open.takes_frames:
            raise UsageError("settings change between streams only: finish or cancel the open one first")
        return self._ask(json_message(Kind.SETTINGS, settings))

    # --- what is asked by who carries bytes --------------------------------------------------------

    def next_outgoing(self) -> bytes | None:
        """The next message to send, which counts as sent from now on.

        What follows an artifact is held back until that has ended: a bad one would swallow it.
        """
        if not self._outbox or self._is_held_back(self._outbox[0]):
            return None
        outgoing = self._outbox.popleft()
        self.queued_bytes -= outgoing.cost_bytes
        message, maybe_stream = outgoing
        if maybe_stream is not None and not maybe_stream.is_sent:
            maybe_stream.is_sent = True
            self._sent.append(maybe_stream)
        if message.kind == Kind.CANCEL:
            self._sent.append(_Cancel(message.payload.decode()))
        return encode_message(*message)

    def _is_held_back(self, outgoing: _Outgoing) -> bool:
        artifact = self._sent[-1] if self._sent else None
        if not isinstance(artifact, StreamState) or not artifact.ends_by_itself:
            return False
        return outgoing.maybe_stream is not artifact and outgoing.message.kind != Kind.CANCEL

    @property
    def wants_input(self) -> bool:
        """Should more be read? Not if much waits here to be taken, and nobody waits for what comes behind it."""
        if self.waiting or self.maybe_death is not None:
            return True
        return sum(stream.waiting_bytes for stream in self._unread) < self._buffer_bytes

    @property
    def is_at_rest(self) -> bool:
        """Is the process idle, with nothing on its way? While it loads, it is not."""
        return bool(self.handshake) and not (self._outbox or self._sent or self._answers)

    def maybe_handshake(self) -> Mapping[str, Any] | None:
        """What the process said of itself; an ERROR in its place, or its death, is raised."""
        self._check_alive()
        return self.handshake or None

    def maybe_take(self, stream: StreamState) -> bytes | None:
        """What `StreamState.maybe_take` says of it. A stream that was read to its end is forgotten here."""
        maybe_pcm = stream.maybe_take()
        if maybe_pcm == b"":
            self._unread.discard(stream)
        return maybe_pcm

    def played(self, stream: StreamState) -> Played:
        """How much of it was taken."""
        channels: int = self.handshake["channels"]
        return Played(stream.number, stream.taken_bytes // (channels * SAMPLE_BYTES))

    def receive(self, data: bytes) -> bool:
        """Bytes came from the process. False: they make no sense, and nothing after them can."""
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except (MossnanoError, LookupError, TypeError) as error:
            self._maybe_fatal = DecoderError("bad_answer", f"the process said what no decoder says: {error}")
            return False
        return True

    def end(self, maybe_status: int | None) -> None:
        """The process is gone; what is known of its exit status."""
        lost = [stream for stream in self._unread if not stream.is_over]
        code = self._maybe_fatal.code if self._maybe_fatal else "process_died"
        lost_frames = self._lost_frames(lost)
        text = self._how_it_died(maybe_status, len(lost), lost_frames)
        self.maybe_death = DecoderDiedError(
            code,
            text,
            status=maybe_status,
            lost=sorted(stream.number for stream in lost),
            lost_frames=lost_frames,
        )
        for stream in lost:
            stream.put(self.maybe_death)
            stream.is_over = True
            stream.maybe_fault = self.maybe_death
        for _, answer in self._answers:
            answer.maybe_error = self.maybe_death
        self._answers.clear()
        self._put_into_outbox([])
        self._sent.clear()

    # --- inside ------------------------------------------------------------------------------------

    def _begin(self, messages: Sequence[Message]) -> StreamState:
        """A new stream, if these can be sent for it."""
        self._check_alive()
        if self._maybe_open is not None and self._maybe_open.takes_frames:
            raise UsageError("a stream is open already: finish or cancel it first")
        self._check_room(messages)
        stream = self._maybe_open = StreamState(next(self._numbers))
        self._unread.add(stream)
        return stream

    @property
    def _longest_payload_bytes(self) -> int:
        return min(LONGEST_PAYLOAD_BYTES, int(self.handshake["max_message_bytes"]) - 1)

    def _check_room(self, messages: Sequence[Message]) -> None:
        """May these be queued? Who has none to send is refused as well, once the queue is over its bound."""
        more_bytes = sum(_Outgoing(message).cost_bytes for message in messages)
        if self.queued_bytes + more_bytes <= self._queue_bytes:
            return
        raise QueueFullError(
            "queue_full",
            f"{self.queued_bytes} bytes wait to be sent and {more_bytes} more were refused: queue_bytes allows "
            f"{self._queue_bytes}. Read what was decoded, so that the process reads on, and feed again; or cancel",
        )

    def _put_into_outbox(self, outgoing: Sequence[_Outgoing]) -> None:
        """This in place of what waited there."""
        self._outbox = deque(outgoing)
        self.queued_bytes = sum(message.cost_bytes for message in outgoing)

    def _send(self, message: Message, maybe_stream: StreamState | None = None) -> None:
        if self.maybe_death is not None:
            return
        outgoing = _Outgoing(message, maybe_stream)
        self._outbox.append(outgoing)
        self.queued_bytes += outgoing.cost_bytes
        if maybe_stream is not None:
            maybe_stream.is_queued = True

    def _ask(self, message: Message) -> Answer:
        self._check_alive()
        self._check_room([message])
        answer = Answer()
        self._answers.append((Kind(message.kind), answer))
        self._send(message)
        return answer

    def _resolve(self, kind: Kind, maybe_error: DecoderError | None = None) -> bool:
        """The oldest question of this kind has its answer."""
        for index, (asked, answer) in enumerate(self._answers):
            if asked == kind:
                del self._answers[index]
                answer.is_there = True
                answer.maybe_error = maybe_error
                return True
        return False

    def _take(self, message: Message) -> None:
        match message.kind:
            case Kind.HANDSHAKE:
                self.handshake = parse_json(message)
                format_of(self.handshake)
                self._resolve(Kind.SETTINGS)
            case Kind.AUDIO:
                if isinstance(stream := self._current(), StreamState):
                    stream.put(message.payload)
            case Kind.PING:
                self._resolve(Kind.PING)
            case Kind.ERROR:
                self._take_error(parse_json(message))
            case Kind.END:
                self._take_end(parse_json(message))

    def _current(self) -> StreamState | _Cancel | None:
        return self._sent[0] if self._sent else None

    def _take_error(self, fields: Mapping[str, Any]) -> None:
        error = DecoderError(
            str(fields.get("code")),
            str(fields.get("message")),
            stream=fields.get("stream"),
            fatal=fields.get("fatal") is True,
        )
        stream = self._current()
        if error.fatal:
            self._maybe_fatal = error  # told when the output ends
        elif error.stream is not None and isinstance(stream, StreamState):
            if error.code in _STREAM_LOST:
                self._lose(stream, error)
            stream.put(error)
        elif error.stream is None and error.code in _SETTINGS_REFUSED and self._resolve(Kind.SETTINGS, error):
            pass
        elif error.stream is None:
            self._maybe_stray = error

    def _lose(self, stream: StreamState, error: DecoderError) -> None:
        """The process skips the rest of this stream until its END, which an artifact has not got."""
        stream.maybe_fault = error
        if stream.ends_by_itself and not stream.was_cancelled:
            others = (outgoing for outgoing in self._outbox if outgoing.maybe_stream is not stream)
            self._put_into_outbox([_Outgoing(Message(Kind.END), stream), *others])

    def _take_end(self, fields: Mapping[str, Any]) -> None:
        if not fields["cancelled"]:
            if isinstance(stream := self._current(), StreamState):
                self._sent.popleft()
                self.ended_streams += 1
                stream.maybe_end = StreamEnd(fields["stream"], fields["frames"], fields["samples"], fields["errors"])
                stream.is_over = True
            return
        while self._sent and self._sent[0] != _Cancel(fields["echo"]):
            self._sent.popleft()
        if self._sent:
            self._sent.popleft()

    def _check_feedable(self, stream: StreamState) -> None:
        if stream.maybe_fault is not None and stream.takes_frames:
            self.finish(stream)
            raise stream.maybe_fault.with_traceback(None)
        self._check_alive()
        if not stream.takes_frames:
            what = "was cancelled" if stream.was_cancelled else "is finished"
            raise StreamOverError("stream_over", f"this stream {what}: what is fed now belongs to a new one")

    def _check_alive(self) -> None:
        if self.maybe_death is not None:
            raise self.maybe_death.with_traceback(None)
        if self._maybe_stray is not None:
            error, self._maybe_stray = self._maybe_stray, None
            raise error

    def _packed(self, frames: Frames) -> bytes:
        quantizers, frame_bytes = self.handshake["quantizers"], self.handshake["frame_bytes"]
        if isinstance(frames, bytes | bytearray | memoryview):
            if len(frames) % frame_bytes:
                raise TokenError(f"{len(frames)} bytes are no whole number of frames of {frame_bytes} bytes")
            return bytes(frames)
        codes = np.asarray(frames)
        if codes.size == 0:
            return b""
        if codes.ndim != 2 or codes.shape[1] != quantizers:
            raise UsageError(f"frames have the shape {codes.shape}, allowed is (frames, {quantizers})")
        return pack_frames(codes, self.handshake["codebook_size"])

    def _how_it_died(self, maybe_status: int | None, lost_streams: int, lost_frames: int) -> str:
        how = "the decoder process ended" + (f" with status {maybe_status}" if maybe_status is not None else "")
        why = f": {self._maybe_fatal}" if self._maybe_fatal else ""
        if not lost_streams:
            return f"{how}{why}"
        streams = "1 stream is" if lost_streams == 1 else f"{lost_streams} streams are"
        return f"{how}{why}; {streams} lost, {lost_frames} frames were fed and did not come back"

    def _lost_frames(self, lost: Sequence[StreamState]) -> int:
        if not lost:
            return 0
        frame_pcm_bytes = format_of(self.handshake).frame_pcm_bytes
        return sum(stream.fed_frames - stream.received_bytes // frame_pcm_bytes for stream in lost)


def _cut(kind: Kind, payload: bytes, most: int) -> list[Message]:
    """A payload in messages of at most so many bytes of it."""
    return [Message(kind, payload[start : start + most]) for start in range(0, len(payload), most)]


class Facts(ABC):
    """The numbers of a HANDSHAKE as attributes, as they are now."""

    @property
    @abstractmethod
    def handshake(self) -> Mapping[str, Any]:
        """All that the process says of itself."""

    @property
    def format(self) -> CodecFormat:
        return format_of(self.handshake)

    @property
    def version(self) -> str:
        """Of the program."""
        return str(self.handshake["version"])

    @property
    def demo(self) -> bool:
        """Is it the built-in demo, and no real codec?"""
        return self.handshake["demo"] is True

    @property
    def sample_rate(self) -> int:
        return self.format.sample_rate

    @property
    def channels(self) -> int:
        return self.format.channels

    @property
    def frame_samples(self) -> int:
        """Samples per channel in a frame."""
        return self.format.frame_samples

    @property
    def quantizers(self) -> int:
        """Codes in a frame."""
        return self.format.quantizers

    @property
    def codebook_size(self) -> int:
        return self.format.codebook_size


def format_of(handshake: Mapping[str, Any]) -> CodecFormat:
    """The numbers of a HANDSHAKE, as they are now."""
    return CodecFormat(
        sample_rate=handshake["sample_rate"],
        channels=handshake["channels"],
        frame_samples=handshake["frame_samples"],
        quantizers=handshake["quantizers"],
        codebook_size=handshake["codebook_size"],
    )
