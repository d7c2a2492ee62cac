"""One peer: its handshake and settings, the numbers of its streams, and what each of its messages leads to.

Rules of this room:

- `handle` and `advance` are generators. Each message leaves before the next chunk is computed, so there is no output
  queue, and who does not take a message stops the work.
- A stream is numbered when it opens, from 0, also when it is bad. Each one that opens is answered by exactly one END,
  but for those that a CANCEL drops: the answer to the CANCEL stands for all of them.
- One bad payload ends nothing but its own stream. The next one finds a state that was reset.
- What a direction does its own way is in its `Direction`: decoding.py and encoding.py have one each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from mossnano_stdio.chunks import MAX_CHUNK_FRAMES, Chunks, Fixed, Ramp, Schedule
from mossnano_stdio.errors import (
    HandshakeError,
    MossnanoError,
    NoStreamError,
    OutOfPlaceError,
    PayloadError,
    PeerError,
    SettingsError,
    UnknownKindError,
)
from mossnano_stdio.protocol.messages import MAX_MESSAGE_BYTES, Kind, Message, json_message, kind_name, parse_json
from mossnano_stdio.protocol.stream import Answers, State, Stream
from mossnano_stdio.tokens import CodecFormat, frame_bytes

MAX_SENT_BYTES: Final = MAX_MESSAGE_BYTES - 1  # of any payload of ours: a reader like ours takes it
MAX_AUDIO_BYTES: Final = MAX_SENT_BYTES  # of one AUDIO payload, whatever the chunk
ERROR_CHARACTERS: Final = 2000  # of what is said of an error: a peer's text in it could be as long as a message
REPEATED_CHARACTERS: Final = 1000  # of a peer's text that goes back to it

# What a message makes us do. The stream is the one that is open, if any.
Action = Callable[["Connection", Any, Message], Answers]


class Direction(NamedTuple):
    """What differs between a peer who sends tokens and one who sends audio."""

    name: str
    opened_by: str  # what opens a stream, for people
    transitions: Mapping[tuple[State, Kind], Action]
    new_stream: type[Stream]
    new_chunks: Callable[[Any, Schedule, Callable[[int, float], object]], Chunks[Any]]  # over a decoder, or an encoder
    check_quantizers: Callable[[Any, int], None]  # a PayloadError where this codec does not do with so few


class Connection:
    """One peer's conversation with one codec.

    `identity` is what a HANDSHAKE says beyond the numbers that are known here; `new_ramp` makes the live ramp when
    SETTINGS asks for it; `cancel_waiting` says whether a CANCEL was read and is not handled yet.
    """

    def __init__(
        self,
        direction: Direction,
        codec: Any,
        schedule: Schedule,
        identity: Mapping[str, Any],
        *,
        new_ramp: Callable[[], Schedule] = Ramp,
        cancel_waiting: Callable[[], bool] = lambda: False,
        on_step: Callable[[int, float], object] = lambda frames, seconds: None,
    ) -> None:
        self.direction = direction
        self.codec = codec
        self.format: CodecFormat = codec.format
        self.quantizers = self.format.quantizers
        self.open: Stream | None = None
        self.streams_opened = 0
        self.error_count = 0
        self.maybe_misfit: str | None = None  # why the peer's last HANDSHAKE does not fit
        self._message_seconds = 0.0  # when the message that is handled was there
        self._chunks = direction.new_chunks(codec, schedule, on_step)
        self._identity = identity
        self._new_ramp = new_ramp
        self._cancel_waiting = cancel_waiting
        self._maybe_first_dropped: Stream | None = None  # by the CANCEL that waits

    @property
    def state(self) -> State:
        return State.IDLE if self.open is None else self.open.state

    @property
    def is_due(self) -> bool:
        """Is there a chunk to compute, if no message comes?"""
        return self._chunks.due_frames > 0

    @property
    def is_sated(self) -> bool:
        """Would more input leave the next chunk as it is?"""
        return self._chunks.is_sated

    @property
    def max_audio_bytes(self) -> int:
        chunk_bytes = self._chunks.schedule.max_frames * self.format.frame_pcm_bytes
        return min(chunk_bytes, MAX_AUDIO_BYTES // self.format.sample_bytes * self.format.sample_bytes)

    def handshake(self) -> Message:
        """Who we are and what holds now."""
        codec, schedule = self.format, self._chunks.schedule
        return json_message(
            Kind.HANDSHAKE,
            {
                **self._identity,
                "direction": self.direction.name,
                "sample_rate": codec.sample_rate,
                "channels": codec.channels,
                "sample_format": "s16le",
                "frame_samples": codec.frame_samples,
                "quantizers": self.quantizers,
                "codebook_size": codec.codebook_size,
                "frame_bytes": frame_bytes(self.quantizers, codec.codebook_size),
                "max_audio_bytes": self.max_audio_bytes,
                "chunk_frames": schedule.maybe_chunk_frames,
                "max_chunk_frames": schedule.max_frames,
                **({"first_chunk_frames": first} if (first := self._chunks.first_chunk_frames) > 1 else {}),
                **({"segment_frames": self.codec.segment_frames} if hasattr(self.codec, "segment_frames") else {}),
            },
        )

    def handle(self, message: Message, seconds: float = 0.0) -> Answers:
        """Deal with one message, which was there at `seconds` of the caller's clock.

        Whatever was due before it is computed first, unless it only adds to a stream.
        """
        self._look_for_cancel()
        self._message_seconds = seconds
        if message.kind not in (Kind.TOKENS, Kind.AUDIO):
            yield from self.compute_due()
        try:
            act = self.direction.transitions[self.state, Kind(message.kind)]
        except (ValueError, KeyError):
            known = dict.fromkeys(kind for _, kind in self.direction.transitions)
            names = ", ".join(f"{kind.name} 0x{kind:02x}" for kind in known)
            yield self.error(
                UnknownKindError(
                    f"{kind_name(message.kind)} means nothing while we {self.direction.name}; known are {names}"
                )
            )
            return
        yield from act(self, self.open, message)

    def advance(self) -> Answers:
        """Compute the one chunk that is due."""
        if self.open is None:
            return
        self._look_for_cancel()
        if self.open.is_dropped:
            self.open.chunks.reset()
            return
        try:
            yield from self.open.step(self)
        except MossnanoError as error:
            yield from self.fail(self.open, error)

    def compute_due(self) -> Answers:
        while self.is_due:
            yield from self.advance()

    def close(self, maybe_fault: MossnanoError | None = None) -> Answers:
        """End of input, or of what can be read of it: drain, tell the fault, and end the stream that is open."""
        self._look_for_cancel()
        if self.open is not None and self.open.state is not State.SKIP:
            self.open.finish_input()  # no chunk fills up any more
        yield from self.compute_due()
        if self.open is not None:
            maybe_fault = maybe_fault or self.open.maybe_cut()
        if maybe_fault is not None:
            yield self.error(maybe_fault, fatal=True)
        if self.open is not None:
            yield from self.finish(self.open, Message(Kind.END))

    # --- what a message leads to, in both directions --------------------------------------------

    def compare_formats(self, stream: Stream | None, message: Message) -> Answers:
        ours = {
            "sample_rate": self.format.sample_rate,
            "channels": self.format.channels,
            "quantizers": self.quantizers,
            "codebook_size": self.format.codebook_size,
        }
        try:
            theirs = parse_json(message)
        except PayloadError as error:
            yield self.error(error)
            return
        differences = [
            f"{name} is {theirs[name]!r} there and {value} here"
            for name, value in ours.items()
            if name in theirs and theirs[name] != value
        ]
        self.maybe_misfit = None
        if differences:
            self.maybe_misfit = "the peer's HANDSHAKE does not fit these weights: " + ", ".join(differences)
            yield self.error(HandshakeError(self.maybe_misfit))

    def ignore(self, stream: Stream, message: Message) -> Answers:
        yield from ()

    def echo(self, stream: Stream | None, message: Message) -> Answers:
        if len(message.payload) > MAX_SENT_BYTES:  # whatever --max-message-bytes lets in
            yield self.error(
                PayloadError(
                    f"a PING of {len(message.payload)} bytes is too long to be echoed: "
                    f"{MAX_SENT_BYTES} bytes of payload are allowed"
                )
            )
            return
        yield Message(Kind.PING, message.payload)

    def finish(self, stream: Stream, message: Message) -> Answers:
        if not stream.is_dropped:
            maybe_rest = stream.maybe_rest()
            if maybe_rest is not None:
                yield self.error(maybe_rest)
            if stream.state is not State.SKIP:
                stream.finish_input()
                yield from self.compute_due()
        if not stream.is_dropped:  # a CANCEL may have come while the rest was computed
            yield from self._end(stream, cancelled=False, **stream.end_extras())
        self._close()

    def cancel(self, stream: Stream | None, message: Message) -> Answers:
        yield from self._end(self._maybe_first_dropped or stream, cancelled=True, echo=_repeated(message))
        self._maybe_first_dropped = None
        self._close()

    def settle(self, stream: Stream | None, message: Message) -> Answers:
        quantizers, schedule = self.quantizers, self._chunks.schedule
        try:
            for name, value in parse_json(message).items():
                match name:
                    case "quantizers":
                        quantizers = self._checked_quantizers(value)
                    case "chunk_frames":
                        schedule = self._checked_schedule(value)
                    case _:
                        raise SettingsError(
                            f"SETTINGS has no {name!r}: only 'quantizers' and 'chunk_frames' can be set"
                        )
        except PayloadError as error:
            yield self.error(error)
            return
        self.quantizers, self._chunks.schedule = quantizers, schedule
        yield self.handshake()

    def report_peer_error(self, stream: Stream | None, message: Message) -> Answers:
        yield self.error(PeerError(f"the peer sent an ERROR of its own: {_repeated(message)}"))

    def refuse_no_stream(self, stream: None, message: Message) -> Answers:
        try:
            if parse_json(message).get("stream", 0) is None:
                return  # what an encoder answers to a CANCEL while nothing is open: it ends nothing
        except PayloadError:
            pass
        yield self.error(NoStreamError(f"END came while no stream was open: {self.direction.opened_by} opens one"))

    def refuse_out_of_place(self, stream: Stream, message: Message) -> Answers:
        yield self.error(
            OutOfPlaceError(
                f"{kind_name(message.kind)} came {stream.state.value}, where it has no place: "
                "send END or CANCEL first (the message is ignored, the stream goes on)"
            )
        )

    # --- streams --------------------------------------------------------------------------------

    def open_stream(self, state: State) -> Stream:
        self.open = self.direction.new_stream(self.streams_opened, state, self._chunks, self._message_seconds)
        self.streams_opened += 1
        self._look_for_cancel()
        return self.open

    def fail(self, stream: Stream, error: MossnanoError) -> Answers:
        """This stream is lost; the input of it that is still to come is skipped."""
        if not stream.is_dropped:
            yield self.error(error)
        stream.state = State.SKIP
        stream.forget_input()
        stream.chunks.reset()

    def error(self, error: MossnanoError, *, fatal: bool = False) -> Message:
        """What the peer is told of it. It counts, for the stream that is open too."""
        self.error_count += 1
        if self.open is not None:
            self.open.errors += 1
        return error_message(error, stream=self.open.number if self.open else None, fatal=fatal)

    def _look_for_cancel(self) -> None:
        if self.open is not None and self._cancel_waiting():
            self.open.is_dropped = True
            self._maybe_first_dropped = self._maybe_first_dropped or self.open

    def _close(self) -> None:
        self.open = None
        self._chunks.reset()

    def _end(self, stream: Stream | None, *, cancelled: bool, **extra: Any) -> Answers:
        if stream is not None:
            yield from stream.before_end()
        yield json_message(
            Kind.END,
            {
                "stream": stream.number if stream else None,
                "frames": stream.frames if stream else 0,
                "samples": stream.samples if stream else 0,
                "cancelled": cancelled,
                "errors": stream.errors if stream else 0,
                "next_stream": self.streams_opened,
                **extra,
            },
        )

    # --- settings -------------------------------------------------------------------------------

    def _checked_quantizers(self, value: Any) -> int:
        most = self.format.quantizers
        if type(value) is not int or not 1 <= value <= most:
            raise SettingsError(f"quantizers is {value!r}; a whole number from 1 to {most} is allowed")
        self.direction.check_quantizers(self.codec, value)
        return value

    def _checked_schedule(self, value: Any) -> Schedule:
        if value is None:
            return self._new_ramp()
        if type(value) is not int or not 1 <= value <= MAX_CHUNK_FRAMES:
            raise SettingsError(
                f"chunk_frames is {value!r}; a whole number from 1 to {MAX_CHUNK_FRAMES} is allowed, "
                "or null for the ramp"
            )
        return Fixed(value)


def error_message(error: MossnanoError, *, stream: int | None = None, fatal: bool = False) -> Message:
    """What a peer is told of an error."""
    said = str(error)[:ERROR_CHARACTERS]
    return json_message(Kind.ERROR, {"code": error.code, "message": said, "stream": stream, "fatal": fatal})


def _repeated(message: Message) -> str:
    """The beginning of a peer's text."""
    return message.payload.decode("utf-8", "replace")[:REPEATED_CHARACTERS]
