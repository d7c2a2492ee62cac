"""Builds the messages for a decoder process and reads its answers, for both clients and without IO.

A client sends what `next_outgoing` returns, passes the bytes that come to `receive`, and calls `end` when no more will
come. To wait for something, it repeats a call that returns None until that is there.

Plain streams are worked off one after the other, and share what may wait unread. Voices are streams with a number on
the wire: any number of them go on side by side, and each is sent so much ahead of its reader as it was granted.
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

from mossnano_stdio.client.state import (
    DecoderDiedError,
    DecoderError,
    Mark,
    Played,
    QueueFullError,
    StreamEnd,
    StreamOverError,
    StreamState,
)
from mossnano_stdio.errors import MossnanoError, TokenError, UsageError
from mossnano_stdio.pcm import SoundForm, form_said_by
from mossnano_stdio.protocol import (
    MESSAGE_COST_BYTES,
    NUMBERED,
    Kind,
    Message,
    MessageReader,
    encode_message,
    in_stream,
    json_message,
    out_of_stream,
    parse_json,
)
from mossnano_stdio.tokens import CodecFormat, pack_frames, parse_artifact

State = Literal["starting", "ready", "failed", "closed"]
Setting = int | float | str | None
Frames = NDArray[np.integer] | Sequence[Sequence[int]] | bytes | bytearray | memoryview

BUFFER_BYTES: Final = 4 << 20  # 20 s of nano
QUEUE_BYTES: Final = 33 << 20  # of what waits to be sent: the longest artifact fits, and 9 hours of live speech
LONGEST_PAYLOAD_BYTES: Final = 1 << 16  # longer frames are cut, so that a CANCEL never waits behind a long message
LONGEST_ANSWER_BYTES: Final = 1 << 28  # PINGs come back as long as they were sent
VOICE_SECONDS: Final = 2  # of a voice's sound that the process sends ahead of who takes it
VOICE_BACKLOG_BYTES: Final = 15 << 16  # of a voice's frames that may wait in the process, which ends it at 1 MiB
MOST_MARK_BYTES: Final = 1000
_STREAM_LOST: Final = (
    "bad_tokens",
    "bad_artifact",
    "decode_failed",
    "backlog_full",
)  # the rest of the stream is skipped
_VOICE_REFUSED: Final = ("bad_settings", "too_many_streams", "late_stream")  # it did not begin
_SETTINGS_REFUSED: Final = ("bad_settings", "bad_payload", "out_of_place", "unknown_kind")


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
        self._voice_outbox: deque[_Outgoing] = deque()  # is sent first: what the process makes of it holds up nobody
        self.queued_bytes = 0  # what the outboxes cost
        self._sent: deque[StreamState | _Cancel] = deque()  # those whose END is still to come, oldest first
        self._answers: deque[tuple[Kind, Answer]] = deque()
        self._unread: weakref.WeakSet[StreamState] = weakref.WeakSet()
        # Voices whose END is still to come. None: nobody holds that one any more, or it was cancelled.
        self._voices: dict[int, weakref.ref[StreamState] | None] = {}
        self._debtors: deque[StreamState] = deque()  # voices that owe credit
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
        frame_bytes = stream.codec.frame_bytes
        payload = _packed(frames, stream.codec)
        self._check_feedable(stream)
        if stream.is_voice:
            self._check_voice_has_room(stream, len(payload))
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

    def open_voice(self, settings: Mapping[str, Setting]) -> StreamState:
        """Open a stream beside all others. If its settings are refused, who feeds or takes it is told."""
        self._check_alive()
        self._cancel_voices_without_holder()
        most = self.handshake.get("max_streams", 0)
        if not most:
            raise DecoderError(
                "no_voices",
                "this decoder has no voices, as its HANDSHAKE says no max_streams: it is an older one, or was started "
                "with --max-streams 0, or with --output raw or wav",
            )
        if len(self._voices) >= most:
            raise DecoderError(
                "too_many_streams",
                f"{len(self._voices)} voices are not over, and this decoder's max_streams allows no more: read one to "
                "its end or cancel one, or start it with a larger --max-streams",
            )
        settings = {name: value for name, value in settings.items() if value is not None or name == "chunk_frames"}
        codec, form, window_samples = _numbers_of_voice(self.handshake, settings)
        message = json_message(Kind.SETTINGS, {**settings, "window_samples": window_samples})
        self._check_room([message])
        stream = StreamState(next(self._numbers), codec, form, window_samples)
        self._voices[stream.number] = weakref.ref(stream)
        self._unread.add(stream)
        self._send(message, stream)
        return stream

    def mark(self, stream: StreamState, text: str) -> None:
        """Mark the place behind what was fed to this voice."""
        payload = text.encode()
        if len(payload) > MOST_MARK_BYTES:
            raise UsageError(f"a mark has {len(payload)} bytes; up to {MOST_MARK_BYTES} are allowed")
        self._check_feedable(stream)
        message = Message(Kind.MARK, payload)
        self._check_voice_has_room(stream, message.cost_bytes)
        self._check_room([message])
        self._send(message, stream)
        stream.marks_in_process_bytes += message.cost_bytes

    def cancel_voice(self, stream: StreamState) -> Played:
        """Drop what this voice has not said. Return how much of it was taken."""
        stream.cancel()
        if self._voices.get(stream.number) is not None:
            others = [outgoing for outgoing in self._voice_outbox if outgoing.maybe_stream is not stream]
            self._put_into_voice_outbox(others)
            self._send_cancel_of_voice(stream.number, is_known=stream.is_sent)
        return self.played(stream)

    def cancel(self) -> None:
        """Drop every stream that was not read to its end, and send a CANCEL for those that the process knows of."""
        for stream in list(self._unread):
            if stream.is_voice:
                self.cancel_voice(stream)
            else:
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

    def settle(self, settings: Mapping[str, Setting]) -> Answer:
        """Change the settings of the streams to come."""
        if self.takes_frames:
            raise UsageError("settings change between streams only: finish or cancel the open one first")
        return self._ask(json_message(Kind.SETTINGS, settings))

    # --- for the client that carries bytes ---------------------------------------------------------

    def next_outgoing(self) -> bytes | None:
        """Take the next message to send out of the outbox; None while there is none to send now."""
        while self._debtors:
            voice = self._debtors.popleft()
            voice.owes_credit = False
            if not voice.is_over:
                return encode_message(*in_stream(voice.number, _credit(voice)))
        if self._voice_outbox:
            outgoing = self._voice_outbox.popleft()
            self.queued_bytes -= outgoing.cost_bytes
            if outgoing.maybe_stream is not None:
                outgoing.maybe_stream.is_sent = True
            return encode_message(*outgoing.message)
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
        # A voice is sent no more than its window, so one that nobody reads holds up no other.
        return sum(stream.waiting_bytes for stream in self._unread if not stream.is_voice) < self._buffer_bytes

    @property
    def is_alive(self) -> bool:
        """Whether the process has said its HANDSHAKE and has not died."""
        return self.maybe_death is None and bool(self.handshake)

    @property
    def is_at_rest(self) -> bool:
        """Whether the process has loaded and answered everything, and nothing waits to be sent."""
        waiting = (self._outbox, self._voice_outbox, self._sent, self._voices, self._answers)
        return bool(self.handshake) and not any(waiting)

    def maybe_handshake(self) -> Mapping[str, Any] | None:
        """Return the HANDSHAKE, or None until it is there. Raise an ERROR in its place, or the death of the process."""
        self._check_alive()
        return self.handshake or None

    def maybe_take(self, stream: StreamState) -> bytes | None:
        """Call the stream's `maybe_take`, grant the process as much again, and forget a stream that was read to its
        end."""
        maybe_pcm = stream.maybe_take()
        if maybe_pcm and stream.is_voice and not (stream.is_over or stream.owes_credit):
            stream.owes_credit = True
            self._debtors.append(stream)
        if maybe_pcm == b"":
            self._unread.discard(stream)
        return maybe_pcm

    def played(self, stream: StreamState) -> Played:
        """How much of this stream was taken."""
        return Played(stream.number, stream.taken_samples)

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
        lost_frames = sum(stream.frames_in_process for stream in lost)
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
        self._put_into_voice_outbox([])
        self._sent.clear()
        self._voices.clear()

    # --- inside ------------------------------------------------------------------------------------

    def _begin(self, messages: Sequence[Message]) -> StreamState:
        """Open a stream, unless its messages do not fit the queue."""
        self._check_alive()
        if self.takes_frames:
            raise UsageError("a stream is open already: finish or cancel it first")
        self._check_room(messages)
        handshake = self.handshake
        stream = StreamState(next(self._numbers), format_of(handshake), form_said_by(handshake))
        self._maybe_open = stream
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
        """Replace what waits to be sent of plain streams."""
        self._outbox = deque(outgoing)
        self._count_queued_bytes()

    def _put_into_voice_outbox(self, outgoing: Sequence[_Outgoing]) -> None:
        self._voice_outbox = deque(outgoing)
        self._count_queued_bytes()

    def _count_queued_bytes(self) -> None:
        self.queued_bytes = sum(outgoing.cost_bytes for outgoing in (*self._outbox, *self._voice_outbox))

    def _send(self, message: Message, maybe_stream: StreamState | None = None) -> None:
        if self.maybe_death is not None:
            return
        if maybe_stream is not None and maybe_stream.is_voice:
            if self._voices.get(maybe_stream.number) is None:
                return  # it was refused
            outgoing = _Outgoing(in_stream(maybe_stream.number, message), maybe_stream)
            self._voice_outbox.append(outgoing)
        else:
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
        if message.kind & ~NUMBERED == Kind.END and self._maybe_fatal is not None:
            return  # it says what was sent, which is not all: the process dies, and its streams get its death
        if message.kind & NUMBERED:
            self._take_of_voice(*out_of_stream(message))
            return
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

    # --- voices ------------------------------------------------------------------------------------

    def _take_of_voice(self, number: int, message: Message) -> None:
        if number not in self._voices:
            return
        maybe_voice = self._maybe_held_voice(number)
        match message.kind:
            case Kind.AUDIO if maybe_voice is not None:
                maybe_voice.put(message.payload)
            case Kind.MARK if maybe_voice is not None:
                mark = Mark(
                    int.from_bytes(message.payload[:8], "little"), message.payload[8:].decode("utf-8", "replace")
                )
                maybe_voice.put(mark)
                maybe_voice.marks_in_process_bytes -= message.cost_bytes - 8
            case Kind.ERROR:
                self._take_error_of_voice(number, maybe_voice, parse_json(message))
            case Kind.END:
                fields = parse_json(message)
                del self._voices[number]
                if maybe_voice is not None and not fields["cancelled"]:
                    self.ended_streams += 1
                    maybe_voice.maybe_end = StreamEnd(number, fields["frames"], fields["samples"], fields["errors"])
                    maybe_voice.is_over = True

    def _take_error_of_voice(self, number: int, maybe_voice: StreamState | None, fields: Mapping[str, Any]) -> None:
        error = DecoderError(str(fields.get("code")), str(fields.get("message")), stream=number)
        if maybe_voice is not None:
            maybe_voice.put(error)
            if error.code in (*_STREAM_LOST, *_VOICE_REFUSED):
                maybe_voice.maybe_fault = error
        if error.code in _VOICE_REFUSED:
            if maybe_voice is not None:
                maybe_voice.is_over = True
            if error.code == "bad_settings":  # it is open all the same, and sounds otherwise than was asked for
                self._send_cancel_of_voice(number, is_known=True)
            else:  # no END will come
                del self._voices[number]

    def _maybe_held_voice(self, number: int) -> StreamState | None:
        """The voice of this number, unless it was cancelled. One that nobody holds any more is cancelled now."""
        maybe_reference = self._voices[number]
        maybe_voice = maybe_reference() if maybe_reference is not None else None
        if maybe_reference is not None and maybe_voice is None:
            self._send_cancel_of_voice(number, is_known=True)
        return maybe_voice

    def _cancel_voices_without_holder(self) -> None:
        """Nobody will take their sound, so they would never end by themselves."""
        for number in list(self._voices):
            self._maybe_held_voice(number)

    def _send_cancel_of_voice(self, number: int, *, is_known: bool) -> None:
        if not is_known:
            del self._voices[number]
            return
        self._voices[number] = None
        outgoing = _Outgoing(in_stream(number, Message(Kind.CANCEL)))
        self._voice_outbox.appendleft(outgoing)
        self.queued_bytes += outgoing.cost_bytes

    def _check_voice_has_room(self, stream: StreamState, more_bytes: int) -> None:
        """Raise QueueFullError if the process would have to end the voice, because too much of it waits there."""
        waiting_bytes = stream.frames_in_process * stream.codec.frame_bytes + stream.marks_in_process_bytes
        if waiting_bytes + more_bytes > VOICE_BACKLOG_BYTES:
            raise QueueFullError(
                "queue_full",
                f"{waiting_bytes} bytes of this voice wait to be decoded and {more_bytes} more were refused: "
                f"{VOICE_BACKLOG_BYTES} are allowed. Read what was decoded, and feed again",
            )

    # --- checks ------------------------------------------------------------------------------------

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

    def _how_it_died(self, maybe_status: int | None, lost_streams: int, lost_frames: int) -> str:
        how = "the decoder process ended" + (f" with status {maybe_status}" if maybe_status is not None else "")
        why = f": {self._maybe_fatal}" if self._maybe_fatal else ""
        if not lost_streams:
            return f"{how}{why}"
        streams = "1 stream is" if lost_streams == 1 else f"{lost_streams} streams are"
        return f"{how}{why}; {streams} lost, {lost_frames} frames were fed and did not come back"


def _packed(frames: Frames, codec: CodecFormat) -> bytes:
    if isinstance(frames, bytes | bytearray | memoryview):
        if len(frames) % codec.frame_bytes:
            raise TokenError(f"{len(frames)} bytes are no whole number of frames of {codec.frame_bytes} bytes")
        return bytes(frames)
    codes = np.asarray(frames)
    if codes.size == 0:
        return b""
    if codes.ndim != 2 or codes.shape[1] != codec.quantizers:
        raise UsageError(f"frames have the shape {codes.shape}, allowed is (frames, {codec.quantizers})")
    return pack_frames(codes, codec.codebook_size)


def _numbers_of_voice(
    handshake: Mapping[str, Any], settings: Mapping[str, Setting]
) -> tuple[CodecFormat, SoundForm, int]:
    """What a voice with these settings is fed with, how it sounds, and how much of it comes ahead of its reader."""
    for name in ("quantizers", "chunk_frames", "window_samples"):
        value = settings.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name} is {value!r}; a whole number above 0 is allowed")
    asked: Mapping[str, Any] = {**handshake, "window_samples": None, **settings}
    codec, form = format_of(asked), form_said_by(asked)
    chunk_samples = -(-(asked["chunk_frames"] or 1) * codec.frame_samples * form.sample_rate // codec.sample_rate)
    return codec, form, asked["window_samples"] or max(VOICE_SECONDS * form.sample_rate, 2 * chunk_samples)


def _credit(voice: StreamState) -> Message:
    """How much may have been sent of a voice in all: its window, beyond what was taken."""
    assert voice.maybe_window_samples is not None
    return Message(Kind.CREDIT, (voice.taken_samples + voice.maybe_window_samples).to_bytes(8, "little"))


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
    def sample_rate(self) -> int:
        return self._state.form.sample_rate

    @property
    def channels(self) -> int:
        return self._state.form.channels

    @property
    def played(self) -> Played:
        """Its number, and how many samples of it were taken."""
        return self._link.exchange.played(self._state)

    @property
    def maybe_end(self) -> StreamEnd | None:
        """The counts of its END, once that has come."""
        return self._state.maybe_end


class FedVoice(FedStream):
    """A voice, as far as both clients offer it alike."""

    def mark(self, text: str) -> None:
        """Mark the place behind what was fed: `take_marks` returns it when the sound there was taken."""
        with self._link.changing() as exchange:
            exchange.mark(self._state, text)

    def take_marks(self) -> list[Mark]:
        """Return the marks of the sound that was taken since the last call, in order."""
        with self._link.changing():
            return self._state.take_marks()

    def cancel(self) -> Played:
        """End this voice, at once, and no other. Return how much of it was taken. Never waits."""
        with self._link.changing() as exchange:
            return exchange.cancel_voice(self._state)


class Facts(ABC):
    """Gives the fields of the present HANDSHAKE as attributes."""

    @property
    @abstractmethod
    def handshake(self) -> Mapping[str, Any]:
        """All fields of the HANDSHAKE."""

    @property
    def format(self) -> CodecFormat:
        """The numbers of the codec."""
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
        """Of the PCM."""
        return form_said_by(self.handshake).sample_rate

    @property
    def channels(self) -> int:
        """Of the PCM."""
        return form_said_by(self.handshake).channels

    @property
    def frame_samples(self) -> int:
        """Samples per channel in a frame, of the codec's rate."""
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
        sample_rate=handshake.get("codec_sample_rate", handshake["sample_rate"]),  # an older one has one rate
        channels=handshake.get("codec_channels", handshake["channels"]),
        frame_samples=handshake["frame_samples"],
        quantizers=handshake["quantizers"],
        codebook_size=handshake["codebook_size"],
    )
