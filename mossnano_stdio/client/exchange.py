"""Builds the messages for a decoder process and reads its answers, for both clients and without IO.

A client sends what `next_outgoing` returns, passes the bytes that come to `receive`, and calls `end` when no more will
come. To wait for something, it repeats a call that returns None until that is there.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import MossnanoError, TokenError, UsageError
from mossnano_stdio.protocol import (
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
LONGEST_PAYLOAD_BYTES: Final = 1 << 16  # longer frames are cut, so that a CANCEL never waits behind a long message
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


class StreamState:
    """One stream: what was sent of it, and what came back and waits to be taken."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.takes_frames = True
        self.ends_by_itself = False  # it is an artifact, which has no END
        self.was_cancelled = False
        self.is_queued = False  # a message of it was put into the outbox
        self.is_sent = False  # its first message was taken out of the outbox
        self.is_over = False  # no more will come of it
        self.maybe_end: StreamEnd | None = None
        self.maybe_fault: DecoderError | None = None  # why the process skips what is still fed
        self.fed_frames = 0
        self.received_bytes = 0
        self.taken_bytes = 0
        self.waiting_bytes = 0
        self._waiting: deque[bytes | DecoderError] = deque()

    def put(self, piece: bytes | DecoderError) -> None:
        """Keep PCM or an ERROR that came back, until it is taken."""
        if self.is_over:
            return  # it was cancelled
        self._waiting.append(piece)
        if isinstance(piece, bytes):
            self.received_bytes += len(piece)
            self.waiting_bytes += len(piece)

    def maybe_take(self) -> bytes | None:
        """Return the next PCM, b"" after the last, or None while there is none. Raise an ERROR where it came."""
        if not self._waiting:
            return b"" if self.is_over else None
        piece = self._waiting.popleft()
        if isinstance(piece, DecoderError):
            raise piece
        self.waiting_bytes -= len(piece)
        self.taken_bytes += len(piece)
        return piece

    def cancel(self) -> None:
        """End the stream and drop what was not taken, unless it was read to its end."""
        if self.is_over and not self._waiting:
            return
        self.was_cancelled = self.is_over = True
        self.takes_frames = False
        self._waiting.clear()
        self.waiting_bytes = 0


class Answer:
    """The answer to a PING or SETTINGS, which may still be to come."""

    def __init__(self) -> None:
        self.is_there = False
        self.maybe_error: DecoderError | None = None

    def maybe_take(self) -> bool | None:
        """Return None until it is there, then True. Raise an ERROR that came in its place."""
        if self.maybe_error is not None:
            raise self.maybe_error
        return True if self.is_there else None


@dataclass(frozen=True)
class _Cancel:
    """A CANCEL that was sent. Its END has the same echo."""

    echo: str


class _Outgoing(NamedTuple):
    message: Message
    maybe_stream: StreamState | None = None

    @property
    def cost_bytes(self) -> int:
        """How much of `queue_bytes` it takes; the inbox of the process counts alike."""
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
        self._sent: deque[StreamState | _Cancel] = deque()  # those whose END is still to come, oldest first
        self._answers: deque[tuple[Kind, Answer]] = deque()
        self._unread: weakref.WeakSet[StreamState] = weakref.WeakSet()
        self._maybe_open: StreamState | None = None  # opened last, unless it was cancelled or given up
        self._maybe_fatal: DecoderError | None = None
        self._maybe_stray: DecoderError | None = None
        self._cancels = 0
        self.ended_streams = 0  # how many came to their end
        self.handshake: Mapping[str, Any] = {}
        self.waiting = 0  # how many callers wait for something to come
        self.maybe_death: DecoderDiedError | None = None

    # --- speaking --------------------------------------------------------------------------------

    def open(self) -> StreamState:
        """Open a stream to feed. Its first frames tell the process of it."""
        return self._begin([])

    @property
    def takes_frames(self) -> bool:
        """Whether a stream is open; in a process that died, whether the caller who feeds one was not told yet."""
        return self._maybe_open is not None and self._maybe_open.takes_frames

    def forget_open(self) -> None:
        """Give up the open stream, which nobody will feed any more."""
        self._maybe_open = None

    @property
    def has_unread(self) -> bool:
        """Whether there is a stream that the caller may still read or feed."""
        return len(self._unread) > 0

    def feed(self, stream: StreamState, frames: Frames) -> None:
        """Queue frames for this stream: all of them or, raising QueueFullError, none."""
        payload = self._packed(frames)
        self._check_feedable(stream)
        frame_bytes: int = self.handshake["frame_bytes"]
        most = max(1, self._longest_payload_bytes // frame_bytes) * frame_bytes
        messages = _cut(Kind.TOKENS, payload, most)
        self._check_room(messages)
        for message in messages:
            self._send(message, stream)
        stream.fed_frames += len(payload) // frame_bytes

    def feed_open(self, frames: Frames) -> StreamState:
        """Queue frames for the open stream, or for a new one."""
        stream = self._maybe_open
        if stream is None or not stream.takes_frames:
            stream = self.open()
        self.feed(stream, frames)
        return stream

    def finish_open(self) -> None:
        if self._maybe_open is not None:
            self.finish(self._maybe_open)

    def finish(self, stream: StreamState) -> None:
        """End this stream behind its last frames."""
        if not stream.takes_frames:
            return
        stream.takes_frames = False
        if not stream.is_queued:
            self._send(Message(Kind.TOKENS), stream)
        self._send(Message(Kind.END), stream)

    def feed_artifact(self, artifact: bytes) -> StreamState:
        """Queue a whole `.mossnano` as a stream of its own."""
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
        """Drop every stream that was not read to its end, and send a CANCEL for those that the process knows of."""
        for stream in list(self._unread):
            stream.cancel()
        self._maybe_open = None
        if self.maybe_death is not None:
            return
        others = [  # which are PINGs and SETTINGS
            outgoing
            for outgoing in self._outbox
            if outgoing.maybe_stream is None and outgoing.message.kind != Kind.CANCEL
        ]
        self._cancels += 1
        cancel = _Outgoing(Message(Kind.CANCEL, str(self._cancels).encode()))
        self._put_into_outbox([cancel, *others])

    def ping(self) -> Answer:
        """Send a PING. Its answer comes when the process has worked off all messages before it."""
        return self._ask(Message(Kind.PING))

    def settle(self, settings: Mapping[str, int | None]) -> Answer:
        """Change the settings of the streams to come."""
        if self.takes_frames:
            raise UsageError("settings change between streams only: finish or cancel the open one first")
        return self._ask(json_message(Kind.SETTINGS, settings))

    # --- for the client that carries bytes ---------------------------------------------------------

    def next_outgoing(self) -> bytes | None:
        """Take the next message to send out of the outbox; None while there is none to send now."""
        # The process skips all that follows a bad artifact, so the rest waits until an artifact has ended.
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
        """Whether to read on: less than `buffer_bytes` wait to be taken, or a caller waits for what comes after."""
        if self.waiting or self.maybe_death is not None:
            return True
        return sum(stream.waiting_bytes for stream in self._unread) < self._buffer_bytes

    @property
    def is_alive(self) -> bool:
        """Whether the process has said its HANDSHAKE and has not died."""
        return self.maybe_death is None and bool(self.handshake)

    @property
    def is_at_rest(self) -> bool:
        """Whether the process has loaded and answered everything, and nothing waits to be sent."""
        return bool(self.handshake) and not (self._outbox or self._sent or self._answers)

    def maybe_handshake(self) -> Mapping[str, Any] | None:
        """Return the HANDSHAKE, or None until it is there. Raise an ERROR in its place, or the death of the process."""
        self._check_alive()
        return self.handshake or None

    def maybe_take(self, stream: StreamState) -> bytes | None:
        """Call the stream's `maybe_take`, and forget a stream that was read to its end."""
        maybe_pcm = stream.maybe_take()
        if maybe_pcm == b"":
            self._unread.discard(stream)
        return maybe_pcm

    def played(self, stream: StreamState) -> Played:
        """How much of this stream was taken."""
        channels: int = self.handshake["channels"]
        return Played(stream.number, stream.taken_bytes // (channels * SAMPLE_BYTES))

    def receive(self, data: bytes) -> bool:
        """Take bytes from the process. Return False if they break the protocol: none after them can be read either."""
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except (MossnanoError, LookupError, TypeError) as error:
            self._maybe_fatal = DecoderError("bad_answer", f"the process said what no decoder says: {error}")
            return False
        return True

    def end(self, maybe_status: int | None) -> None:
        """Take note that the process ended, and give its death as the answer to every open stream and question."""
        lost = [stream for stream in self._unread if not stream.is_over]
        code = self._maybe_fatal.code if self._maybe_fatal else "process_died"
        lost_frames = 0
        for stream in lost:
            lost_frames += stream.fed_frames - stream.received_bytes // format_of(self.handshake).frame_pcm_bytes
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
        """Open a stream, unless its messages do not fit the queue."""
        self._check_alive()
        if self.takes_frames:
            raise UsageError("a stream is open already: finish or cancel it first")
        self._check_room(messages)
        stream = self._maybe_open = StreamState(next(self._numbers))
        self._unread.add(stream)
        return stream

    @property
    def _longest_payload_bytes(self) -> int:
        return min(LONGEST_PAYLOAD_BYTES, int(self.handshake["max_message_bytes"]) - 1)

    def _check_room(self, messages: Sequence[Message]) -> None:
        """Raise QueueFullError if these do not fit the queue; if it is over its bound already, even for no messages."""
        more_bytes = sum(_Outgoing(message).cost_bytes for message in messages)
        if self.queued_bytes + more_bytes <= self._queue_bytes:
            return
        raise QueueFullError(
            "queue_full",
            f"{self.queued_bytes} bytes wait to be sent and {more_bytes} more were refused: queue_bytes allows "
            f"{self._queue_bytes}. Read what was decoded, so that the process reads on, and feed again; or cancel",
        )

    def _put_into_outbox(self, outgoing: Sequence[_Outgoing]) -> None:
        """Replace what waits to be sent."""
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
        """Answer the oldest question of this kind. Return False if there is none."""
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
            self._maybe_fatal = error  # `end` reports it, when the output ends
        elif error.stream is not None and isinstance(stream, StreamState):
            if error.code in _STREAM_LOST:
                stream.maybe_fault = error
                # The process skips the rest of the stream until its END, and an artifact has none: it is sent one.
                if stream.ends_by_itself and not stream.was_cancelled:
                    others = (outgoing for outgoing in self._outbox if outgoing.maybe_stream is not stream)
                    self._put_into_outbox([_Outgoing(Message(Kind.END), stream), *others])
            stream.put(error)
        elif error.stream is None and error.code in _SETTINGS_REFUSED and self._resolve(Kind.SETTINGS, error):
            pass
        elif error.stream is None:
            self._maybe_stray = error

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


def _cut(kind: Kind, payload: bytes, most: int) -> list[Message]:
    """Cut a payload into messages with at most so many bytes of it each."""
    return [Message(kind, payload[start : start + most]) for start in range(0, len(payload), most)]


class Link(Protocol):
    """One process as a client holds it."""

    exchange: Exchange

    def changing(self) -> AbstractContextManager[Exchange]:
        """Give the exchange to speak through, and wake those who wait once that is done."""


class FedStream:
    """A stream, as far as both clients offer it alike: feeding it, and what is known of it."""

    def __init__(self, link: Link, state: StreamState) -> None:
        self._link = link
        self._state = state

    def feed(self, frames: Frames) -> None:
        """Feed more frames: [frames, quantizers], or packed bytes. Never waits; QueueFullError if too much waits."""
        with self._link.changing() as exchange:
            exchange.feed(self._state, frames)

    def finish(self) -> None:
        """End the stream behind the frames that were fed."""
        with self._link.changing() as exchange:
            exchange.finish(self._state)

    @property
    def was_cancelled(self) -> bool:
        return self._state.was_cancelled

    @property
    def played(self) -> Played:
        """Its number, and how many samples of it were taken."""
        return self._link.exchange.played(self._state)

    @property
    def maybe_end(self) -> StreamEnd | None:
        """The counts of its END, once that has come."""
        return self._state.maybe_end


class Facts(ABC):
    """Gives the fields of the present HANDSHAKE as attributes."""

    @property
    @abstractmethod
    def handshake(self) -> Mapping[str, Any]:
        """All fields of the HANDSHAKE."""

    @property
    def format(self) -> CodecFormat:
        return format_of(self.handshake)

    @property
    def version(self) -> str:
        """The version of the program."""
        return str(self.handshake["version"])

    @property
    def demo(self) -> bool:
        """Whether the process runs the built-in demo instead of a real codec."""
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
    """Read the codec's numbers from a HANDSHAKE."""
    return CodecFormat(
        sample_rate=handshake["sample_rate"],
        channels=handshake["channels"],
        frame_samples=handshake["frame_samples"],
        quantizers=handshake["quantizers"],
        codebook_size=handshake["codebook_size"],
    )
