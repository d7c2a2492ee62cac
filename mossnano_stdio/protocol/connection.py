"""What decoding and encoding have in common: streams that open, end, fail and are cancelled, pings and settings.

Rules of this room:

- `handle` and `advance` are generators. Each message leaves before the next chunk is computed, so there is no output
  queue, and who does not take a message stops the work.
- A stream is numbered when it opens, from 0, also when it is bad. Each one that opens is answered by exactly one END,
  but for those that a CANCEL drops: the answer to the CANCEL stands for all of them.
- One bad payload ends nothing but its own stream. The next one finds a state that was reset.
- That a CANCEL waits in the inbox is asked through `cancel_waiting`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Final, Protocol

from mossnano_stdio.chunks.schedule import MAX_CHUNK_FRAMES, RAMP_MAX_FRAMES, Fixed, Ramp, Schedule
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
from mossnano_stdio.tokens.format import SAMPLE_BYTES, CodecFormat, frame_bytes

MAX_SENT_BYTES: Final = MAX_MESSAGE_BYTES - 1  # of any payload of ours: a reader like ours takes it
MAX_AUDIO_BYTES: Final = MAX_SENT_BYTES  # of one AUDIO payload, whatever the chunk
ERROR_CHARACTERS: Final = 2000  # of what is said of an error: a peer's text in it could be as long as a message
REPEATED_CHARACTERS: Final = 1000  # of a peer's text that goes back to it

Answers = Iterator[Message]


class State(Enum):
    """Where the input stands."""

    IDLE = "between streams"
    TOKENS = "in a token stream"
    ARTIFACT = "in an unfinished artifact"
    AUDIO = "in an audio stream"
    SKIP = "in a stream that went bad"


class Action(Enum):
    """What a message makes us do. The value is the name of the method that does it."""

    COMPARE_FORMATS = "_compare_formats"
    OPEN_ARTIFACT = "_open_artifact"
    GROW_ARTIFACT = "_grow_artifact"
    OPEN_TOKENS = "_open_tokens"
    PUSH_TOKENS = "_push_tokens"
    OPEN_AUDIO = "_open_audio"
    PUSH_AUDIO = "_push_audio"
    CUT_ARTIFACT = "_cut_artifact"
    SKIP_ARTIFACT = "_skip_artifact"
    IGNORE = "_ignore"
    ECHO = "_echo"
    FINISH = "_finish"
    CANCEL = "_cancel"
    SETTLE = "_settle"
    REPORT_PEER_ERROR = "_report_peer_error"
    REFUSE_NO_STREAM = "_refuse_no_stream"
    REFUSE_OUT_OF_PLACE = "_refuse_out_of_place"


class ChunkLoop(Protocol):
    """What a Renderer and a Recorder have in common."""

    schedule: Schedule

    @property
    def due_frames(self) -> int: ...

    @property
    def is_sated(self) -> bool: ...

    def reset(self) -> None: ...


@dataclass
class StreamTally:
    """What one stream has come to, as its END will say."""

    stream: int
    frames: int = 0
    samples: int = 0
    errors: int = 0


class Conversation(ABC):
    """One peer's conversation with one codec.

    `identity` is what a HANDSHAKE says beyond the numbers that are known here; `ramp_max_frames` is where the live
    ramp stops when SETTINGS asks for it.
    """

    DIRECTION: ClassVar[str]
    OPENED_BY: ClassVar[str]  # what opens a stream, for people
    TRANSITIONS: ClassVar[Mapping[tuple[State, Kind], Action]]

    def __init__(
        self,
        loop: ChunkLoop,
        weights: CodecFormat,
        identity: Mapping[str, Any],
        *,
        ramp_max_frames: int = RAMP_MAX_FRAMES,
        cancel_waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        self._loop = loop
        self._weights = weights
        self._identity = identity
        self._ramp_max_frames = ramp_max_frames
        self._cancel_waiting = cancel_waiting
        self._quantizers = weights.quantizers
        self._next_stream = 0
        self._maybe_open: StreamTally | None = None
        self._maybe_first_dropped: StreamTally | None = None  # by the CANCEL that waits
        self._maybe_misfit: str | None = None  # why the peer's last HANDSHAKE does not fit
        self.state = State.IDLE
        self.error_count = 0

    # --- what each direction does its own way ---------------------------------------------------

    @abstractmethod
    def advance(self) -> Answers:
        """Compute the one chunk that is due."""

    @abstractmethod
    def _finish_loop(self) -> None:
        """No more will come of the stream that is open: what is left of it is due."""

    @abstractmethod
    def _check_quantizers(self, quantizers: int) -> None:
        """A PayloadError where so few cannot be had."""

    def _end_extras(self) -> dict[str, Any]:
        """What an END says beyond the usual."""
        return {}

    @abstractmethod
    def _forget_input(self) -> None:
        """Drop what was received of a stream and is not in the loop."""

    def _maybe_cut(self) -> MossnanoError | None:
        """What is wrong if the input ends here."""
        return None

    # --- what the process asks ------------------------------------------------------------------

    @property
    def stream(self) -> int | None:
        """The number of the stream that is open."""
        return None if self._maybe_open is None else self._maybe_open.stream

    @property
    def format(self) -> CodecFormat:
        return self._weights

    @property
    def streams_opened(self) -> int:
        return self._next_stream

    @property
    def is_due(self) -> bool:
        """Is there a chunk to compute, if no message comes?"""
        return self._loop.due_frames > 0

    @property
    def is_sated(self) -> bool:
        """Would more input leave the next chunk as it is?"""
        return self._loop.is_sated

    def handshake(self) -> Message:
        """Who we are and what holds now."""
        weights, schedule = self._weights, self._loop.schedule
        return json_message(
            Kind.HANDSHAKE,
            {
                **self._identity,
                "direction": self.DIRECTION,
                "sample_rate": weights.sample_rate,
                "channels": weights.channels,
                "sample_format": "s16le",
                "frame_samples": weights.frame_samples,
                "quantizers": self._quantizers,
                "codebook_size": weights.codebook_size,
                "frame_bytes": frame_bytes(self._quantizers, weights.codebook_size),
                "max_audio_bytes": self._max_audio_bytes,
                "chunk_frames": schedule.maybe_chunk_frames,
                "max_chunk_frames": schedule.max_frames,
            },
        )

    def handle(self, message: Message) -> Answers:
        """Deal with one message. Whatever was due before it is computed first, unless it only adds to a stream."""
        if message.kind not in (Kind.TOKENS, Kind.AUDIO):
            yield from self._compute_due()
        try:
            action = self.TRANSITIONS[self.state, Kind(message.kind)]
        except (ValueError, KeyError):
            yield self._error(self._unknown_kind(message.kind))
            return
        perform: Callable[[Message], Answers] = getattr(self, action.value)
        yield from perform(message)

    def close(self, maybe_fault: MossnanoError | None = None) -> Answers:
        """End of input, or of what can be read of it: drain, tell the fault, and end the stream that is open."""
        if self.state not in (State.IDLE, State.SKIP):
            self._finish_loop()  # no chunk fills up any more
        yield from self._compute_due()
        maybe_fault = maybe_fault or self._maybe_cut()
        if maybe_fault is not None:
            yield self._error(maybe_fault, fatal=True)
        if self.state is not State.IDLE:
            yield from self._finish(Message(Kind.END))

    # --- actions --------------------------------------------------------------------------------

    def _compare_formats(self, message: Message) -> Answers:
        ours = {
            "sample_rate": self._weights.sample_rate,
            "channels": self._weights.channels,
            "quantizers": self._quantizers,
            "codebook_size": self._weights.codebook_size,
        }
        try:
            theirs = parse_json(message)
        except PayloadError as error:
            yield self._error(error)
            return
        differences = [
            f"{name} is {theirs[name]!r} there and {value} here"
            for name, value in ours.items()
            if name in theirs and theirs[name] != value
        ]
        self._maybe_misfit = None
        if differences:
            self._maybe_misfit = "the peer's HANDSHAKE does not fit these weights: " + ", ".join(differences)
            yield self._error(HandshakeError(self._maybe_misfit))

    def _ignore(self, message: Message) -> Answers:
        yield from ()

    def _echo(self, message: Message) -> Answers:
        if len(message.payload) > MAX_SENT_BYTES:  # whatever --max-message-bytes lets in
            yield self._error(
                PayloadError(
                    f"a PING of {len(message.payload)} bytes is too long to be echoed: "
                    f"{MAX_SENT_BYTES} bytes of payload are allowed"
                )
            )
            return
        yield Message(Kind.PING, message.payload)

    def _finish(self, message: Message) -> Answers:
        if self.state is not State.SKIP and not self._drops():
            self._finish_loop()
            yield from self._compute_due()
        if not self._drops():
            yield from self._end(self._maybe_open, cancelled=False, **self._end_extras())
        self._close()

    def _cancel(self, message: Message) -> Answers:
        maybe_tally = self._maybe_first_dropped or self._maybe_open
        yield from self._end(maybe_tally, cancelled=True, echo=_repeated(message))
        self._maybe_first_dropped = None
        self._close()

    def _settle(self, message: Message) -> Answers:
        try:
            quantizers, schedule = self._checked_settings(parse_json(message))
        except PayloadError as error:
            yield self._error(error)
            return
        self._quantizers = quantizers
        self._loop.schedule = schedule
        yield self.handshake()

    def _report_peer_error(self, message: Message) -> Answers:
        yield self._error(PeerError(f"the peer sent an ERROR of its own: {_repeated(message)}"))

    def _refuse_no_stream(self, message: Message) -> Answers:
        if not _ends_nothing(message):
            yield self._error(NoStreamError(f"END came while no stream was open: {self.OPENED_BY} opens one"))

    def _refuse_out_of_place(self, message: Message) -> Answers:
        yield self._error(
            OutOfPlaceError(
                f"{kind_name(message.kind)} came {self.state.value}, where it has no place: "
                "send END or CANCEL first (the message is ignored, the stream goes on)"
            )
        )

    # --- streams --------------------------------------------------------------------------------

    def _drops(self) -> bool:
        """Does a CANCEL wait further back? Then what stands before it is counted and not done."""
        if not self._cancel_waiting():
            return False
        self._maybe_first_dropped = self._maybe_first_dropped or self._maybe_open
        return True

    def _open(self, state: State) -> None:
        self.state = state
        self._maybe_open = StreamTally(self._next_stream)
        self._next_stream += 1
        self._loop.reset()

    def _close(self) -> None:
        self.state = State.IDLE
        self._maybe_open = None
        self._forget_input()
        self._loop.reset()

    def _fail_stream(self, error: MossnanoError) -> Answers:
        """This stream is lost; the input of it that is still to come is skipped."""
        if not self._drops():
            yield self._error(error)
        self.state = State.SKIP
        self._forget_input()
        self._loop.reset()

    def _compute_due(self) -> Answers:
        while self.is_due:
            yield from self.advance()

    def _count(self, frames: int, samples: int) -> None:
        """The open stream has come so much further."""
        assert self._maybe_open is not None, "a chunk came of no stream"
        self._maybe_open.frames += frames
        self._maybe_open.samples += samples

    def _end(self, maybe_tally: StreamTally | None, *, cancelled: bool, **extra: Any) -> Answers:
        yield json_message(
            Kind.END,
            {
                "stream": maybe_tally.stream if maybe_tally else None,
                "frames": maybe_tally.frames if maybe_tally else 0,
                "samples": maybe_tally.samples if maybe_tally else 0,
                "cancelled": cancelled,
                "errors": maybe_tally.errors if maybe_tally else 0,
                "next_stream": self._next_stream,
                **extra,
            },
        )

    def _error(self, error: MossnanoError, *, fatal: bool = False) -> Message:
        self.error_count += 1
        if self._maybe_open is not None:
            self._maybe_open.errors += 1
        return error_message(error, stream=self.stream, fatal=fatal)

    # --- settings -------------------------------------------------------------------------------

    @property
    def _sample_bytes(self) -> int:
        return self._weights.channels * SAMPLE_BYTES

    @property
    def _max_audio_bytes(self) -> int:
        chunk_bytes = self._loop.schedule.max_frames * self._weights.frame_pcm_bytes
        return min(chunk_bytes, MAX_AUDIO_BYTES // self._sample_bytes * self._sample_bytes)

    def _checked_settings(self, wanted: dict[str, Any]) -> tuple[int, Schedule]:
        quantizers, schedule = self._quantizers, self._loop.schedule
        for name, value in wanted.items():
            match name:
                case "quantizers":
                    quantizers = self._checked_quantizers(value)
                case "chunk_frames":
                    schedule = self._checked_schedule(value)
                case _:
                    raise SettingsError(f"SETTINGS has no {name!r}: only 'quantizers' and 'chunk_frames' can be set")
        return quantizers, schedule

    def _checked_quantizers(self, value: Any) -> int:
        most = self._weights.quantizers
        if type(value) is not int or not 1 <= value <= most:
            raise SettingsError(f"quantizers is {value!r}; a whole number from 1 to {most} is allowed")
        self._check_quantizers(value)
        return value

    def _checked_schedule(self, value: Any) -> Schedule:
        if value is None:
            return Ramp(self._ramp_max_frames)
        if type(value) is not int or not 1 <= value <= MAX_CHUNK_FRAMES:
            raise SettingsError(
                f"chunk_frames is {value!r}; a whole number from 1 to {MAX_CHUNK_FRAMES} is allowed, "
                "or null for the ramp"
            )
        return Fixed(value)

    def _unknown_kind(self, kind: int) -> PayloadError:
        known = dict.fromkeys(kind for _, kind in self.TRANSITIONS)
        names = ", ".join(f"{kind.name} 0x{kind:02x}" for kind in known)
        return UnknownKindError(f"{kind_name(kind)} means nothing while we {self.DIRECTION}; known are {names}")


def error_message(error: MossnanoError, *, stream: int | None = None, fatal: bool = False) -> Message:
    """What a peer is told of an error."""
    said = str(error)[:ERROR_CHARACTERS]
    return json_message(Kind.ERROR, {"code": error.code, "message": said, "stream": stream, "fatal": fatal})


def _ends_nothing(message: Message) -> bool:
    """Is this END what an encoder answers to a CANCEL while nothing is open?"""
    try:
        return parse_json(message).get("stream", 0) is None
    except PayloadError:
        return False


def _repeated(message: Message) -> str:
    """The beginning of a peer's text."""
    return message.payload.decode("utf-8", "replace")[:REPEATED_CHARACTERS]
