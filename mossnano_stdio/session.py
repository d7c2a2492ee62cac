"""What a message means: one transition table, and a generator that answers.

Rules of this room:

- `TRANSITIONS` is the whole protocol: for every state and every inbound kind, the one action that is taken. It is
  printed in protocol.md, and a test compares the two.
- `handle` and `advance` are generators. Each AUDIO message leaves before the next chunk is decoded, so there is no
  output queue, and who does not take a message stops the decoder.
- A stream is numbered when it opens, from 0, also when it is bad. Each one that opens is answered by exactly one END,
  but for those that a CANCEL drops: the answer to the CANCEL stands for all of them.
- One bad payload ends nothing but its own stream. The next one finds a decoder that was reset.
- Time, threads, file descriptors and weights are not known here. That a CANCEL waits in the inbox is asked through
  `cancel_waiting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from mossnano_stdio.bits import unpack_frames
from mossnano_stdio.container import MAGIC, Artifact, ArtifactReader
from mossnano_stdio.errors import ArtifactError, MossnanoError, PayloadError, TokenError
from mossnano_stdio.layout import CodecFormat, frame_bytes
from mossnano_stdio.protocol import MAX_ARTIFACT_BYTES, Kind, Message, json_message, kind_name, parse_json
from mossnano_stdio.renderer import Chunk, Renderer
from mossnano_stdio.schedule import RAMP_MAX_FRAMES, Fixed, Ramp, Schedule

MAX_CHUNK_FRAMES: Final = 1000  # 80 s of nano: what a fixed chunk may ask for
MAX_AUDIO_BYTES: Final = 1 << 20  # the longest payload of one AUDIO message, whatever the chunk

Answers = Iterator[Message]


class State(Enum):
    """Where the input stands."""

    IDLE = "between streams"
    TOKENS = "in a token stream"
    ARTIFACT = "in an unfinished artifact"
    SKIP = "in a stream that went bad"


class Action(Enum):
    """What a message makes us do. The value is the name of the method that does it."""

    COMPARE_FORMATS = "_compare_formats"
    OPEN_ARTIFACT = "_open_artifact"
    GROW_ARTIFACT = "_grow_artifact"
    OPEN_TOKENS = "_open_tokens"
    PUSH_TOKENS = "_push_tokens"
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


TRANSITIONS: Final[Mapping[tuple[State, Kind], Action]] = {
    (State.IDLE, Kind.HANDSHAKE): Action.COMPARE_FORMATS,
    (State.IDLE, Kind.ARTIFACT): Action.OPEN_ARTIFACT,
    (State.IDLE, Kind.TOKENS): Action.OPEN_TOKENS,
    (State.IDLE, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.IDLE, Kind.PING): Action.ECHO,
    (State.IDLE, Kind.END): Action.REFUSE_NO_STREAM,
    (State.IDLE, Kind.CANCEL): Action.CANCEL,
    (State.IDLE, Kind.SETTINGS): Action.SETTLE,
    (State.TOKENS, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.TOKENS, Kind.ARTIFACT): Action.REFUSE_OUT_OF_PLACE,
    (State.TOKENS, Kind.TOKENS): Action.PUSH_TOKENS,
    (State.TOKENS, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.TOKENS, Kind.PING): Action.ECHO,
    (State.TOKENS, Kind.END): Action.FINISH,
    (State.TOKENS, Kind.CANCEL): Action.CANCEL,
    (State.TOKENS, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
    (State.ARTIFACT, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.ARTIFACT, Kind.ARTIFACT): Action.GROW_ARTIFACT,
    (State.ARTIFACT, Kind.TOKENS): Action.REFUSE_OUT_OF_PLACE,
    (State.ARTIFACT, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.ARTIFACT, Kind.PING): Action.ECHO,
    (State.ARTIFACT, Kind.END): Action.CUT_ARTIFACT,
    (State.ARTIFACT, Kind.CANCEL): Action.CANCEL,
    (State.ARTIFACT, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
    (State.SKIP, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.SKIP, Kind.ARTIFACT): Action.SKIP_ARTIFACT,
    (State.SKIP, Kind.TOKENS): Action.IGNORE,
    (State.SKIP, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.SKIP, Kind.PING): Action.ECHO,
    (State.SKIP, Kind.END): Action.FINISH,
    (State.SKIP, Kind.CANCEL): Action.CANCEL,
    (State.SKIP, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
}


@dataclass
class StreamTally:
    """What one stream has come to, as its END will say."""

    stream: int
    frames: int = 0
    samples: int = 0
    errors: int = 0


class Session:
    """One peer's conversation with one decoder.

    `identity` is what a HANDSHAKE says beyond the numbers that are known here; `ramp_max_frames` is where the live
    ramp stops when SETTINGS asks for it.
    """

    def __init__(
        self,
        renderer: Renderer,
        identity: Mapping[str, Any],
        *,
        ramp_max_frames: int = RAMP_MAX_FRAMES,
        cancel_waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        self._renderer = renderer
        self._identity = identity
        self._ramp_max_frames = ramp_max_frames
        self._cancel_waiting = cancel_waiting
        self._weights: CodecFormat = renderer.decoder.format
        self._quantizers = self._weights.quantizers
        self._maybe_misfit: str | None = None  # why the peer's last HANDSHAKE does not fit
        self._artifact = ArtifactReader(MAX_ARTIFACT_BYTES)
        self._next_stream = 0
        self._maybe_open: StreamTally | None = None
        self._maybe_first_dropped: StreamTally | None = None  # by the CANCEL that waits
        self.state = State.IDLE
        self.error_count = 0

    # --- what the process asks -------------------------------------------------------------------

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
        """Is there a chunk to decode, if no message comes?"""
        return self._renderer.due_frames > 0

    @property
    def is_sated(self) -> bool:
        """Would one more TOKENS message leave the next chunk as it is?"""
        return self._renderer.is_sated

    def handshake(self) -> Message:
        """Who we are and what holds now."""
        weights = self._weights
        return json_message(
            Kind.HANDSHAKE,
            {
                **self._identity,
                "sample_rate": weights.sample_rate,
                "channels": weights.channels,
                "sample_format": "s16le",
                "frame_samples": weights.frame_samples,
                "quantizers": self._quantizers,
                "codebook_size": weights.codebook_size,
                "frame_bytes": frame_bytes(self._quantizers, weights.codebook_size),
                "max_audio_bytes": self._max_audio_bytes,
                "chunk_frames": self._renderer.schedule.maybe_chunk_frames,
                "max_chunk_frames": self._renderer.schedule.max_frames,
            },
        )

    def handle(self, message: Message) -> Answers:
        """Deal with one message. Whatever was due before it is rendered first, unless it only adds to a stream."""
        if message.kind != Kind.TOKENS:
            yield from self._render_due()
        try:
            kind = Kind(message.kind)
            action = TRANSITIONS[self.state, kind]
        except (ValueError, KeyError):
            yield self._error(_unknown_kind(message.kind))
            return
        perform: Callable[[Message], Answers] = getattr(self, action.value)
        yield from perform(message)

    def advance(self) -> Answers:
        """Decode the one chunk that is due."""
        if self._drops():
            self._renderer.reset()
            return
        try:
            chunk = self._renderer.render()
        except MossnanoError as error:
            yield from self._fail_stream(error)
            return
        if chunk is not None:
            yield from self._audio(chunk)

    def close(self, maybe_fault: MossnanoError | None = None) -> Answers:
        """End of input, or of what can be read of it: drain, and end the stream that is open."""
        yield from self._render_due()
        if self.state is State.ARTIFACT:
            maybe_fault = maybe_fault or self._artifact_cut()
        if maybe_fault is not None:
            yield self._error(maybe_fault, fatal=True)
        if self.state is not State.IDLE:
            yield from self._finish(Message(Kind.END))

    # --- actions ---------------------------------------------------------------------------------

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
            yield self._error(_HandshakeError(self._maybe_misfit))

    def _open_tokens(self, message: Message) -> Answers:
        self._open(State.TOKENS)
        if self._maybe_misfit is not None:
            yield from self._fail_stream(TokenError(f"{self._maybe_misfit}; send one that fits, then the tokens"))
            return
        yield from self._push_tokens(message)

    def _push_tokens(self, message: Message) -> Answers:
        if self._drops():
            return
        try:
            self._renderer.push(unpack_frames(message.payload, self._quantizers, self._weights.codebook_size))
        except TokenError as error:
            yield from self._render_due()  # what came before it is whole
            yield from self._fail_stream(error)

    def _open_artifact(self, message: Message) -> Answers:
        self._open(State.ARTIFACT)
        self._artifact = ArtifactReader(MAX_ARTIFACT_BYTES)
        yield from self._grow_artifact(message)

    def _grow_artifact(self, message: Message) -> Answers:
        try:
            if self._artifact.push(message.payload):
                return
            artifact = self._artifact.artifact()
            artifact.check_fits(self._weights, prefix_allowed=self._renderer.decoder.decodes_prefix)
        except ArtifactError as error:
            yield from self._fail_stream(error)
            return
        yield from self._play_artifact(artifact)

    def _play_artifact(self, artifact: Artifact) -> Answers:
        if not self._drops():
            self._renderer.push(artifact.codes)
            self._renderer.finish(artifact.original_samples)
            yield from self._render_due()
        yield from self._finish(Message(Kind.END))

    def _cut_artifact(self, message: Message) -> Answers:
        yield self._error(self._artifact_cut())
        yield from self._finish(message)

    def _skip_artifact(self, message: Message) -> Answers:
        """The rest of a bad stream, unless it begins like a new artifact."""
        if message.payload.startswith(MAGIC):
            yield from self._finish(Message(Kind.END))
            yield from self._open_artifact(message)

    def _ignore(self, message: Message) -> Answers:
        yield from ()

    def _echo(self, message: Message) -> Answers:
        yield Message(Kind.PING, message.payload)

    def _finish(self, message: Message) -> Answers:
        if self.state is State.TOKENS and not self._drops():
            self._renderer.finish()
            yield from self._render_due()
        if not self._drops():
            yield self._end(self._maybe_open, cancelled=False)
        self._close()

    def _cancel(self, message: Message) -> Answers:
        maybe_tally = self._maybe_first_dropped or self._maybe_open
        yield self._end(maybe_tally, cancelled=True, echo=message.payload.decode("utf-8", "replace"))
        self._maybe_first_dropped = None
        self._close()

    def _settle(self, message: Message) -> Answers:
        try:
            quantizers, schedule = self._checked_settings(parse_json(message))
        except PayloadError as error:
            yield self._error(error)
            return
        self._quantizers = quantizers
        self._renderer.schedule = schedule
        yield self.handshake()

    def _report_peer_error(self, message: Message) -> Answers:
        said = message.payload.decode("utf-8", "replace")[:1000]
        yield self._error(_PeerError(f"the peer sent an ERROR of its own: {said}"))

    def _refuse_no_stream(self, message: Message) -> Answers:
        yield self._error(_NoStreamError("END came while no stream was open: TOKENS or ARTIFACT opens one"))

    def _refuse_out_of_place(self, message: Message) -> Answers:
        yield self._error(
            _OutOfPlaceError(
                f"{kind_name(message.kind)} came {self.state.value}, where it has no place: "
                "send END or CANCEL first (the message is ignored, the stream goes on)"
            )
        )

    # --- streams ---------------------------------------------------------------------------------

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
        self._renderer.reset()

    def _close(self) -> None:
        self.state = State.IDLE
        self._maybe_open = None
        self._artifact = ArtifactReader(MAX_ARTIFACT_BYTES)
        self._renderer.reset()

    def _fail_stream(self, error: MossnanoError) -> Answers:
        """This stream is lost; the input of it that is still to come is skipped."""
        if not self._drops():
            yield self._error(error)
        self.state = State.SKIP
        self._artifact = ArtifactReader(MAX_ARTIFACT_BYTES)
        self._renderer.reset()

    def _render_due(self) -> Answers:
        while self.is_due:
            yield from self.advance()

    def _audio(self, chunk: Chunk) -> Answers:
        if self._maybe_open is not None:
            self._maybe_open.frames += chunk.frames
            self._maybe_open.samples += len(chunk.pcm) // self._sample_bytes
        if chunk.error is not None:
            yield self._error(chunk.error)
        step = self._max_audio_bytes
        for start in range(0, len(chunk.pcm), step):
            yield Message(Kind.AUDIO, chunk.pcm[start : start + step])

    def _end(self, maybe_tally: StreamTally | None, *, cancelled: bool, **extra: str) -> Message:
        return json_message(
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

    def _artifact_cut(self) -> ArtifactError:
        return ArtifactError(
            f"the artifact ended {self._artifact.missing_bytes} bytes before its end: send all of it, then no END"
        )

    # --- settings --------------------------------------------------------------------------------

    @property
    def _sample_bytes(self) -> int:
        return self._weights.frame_pcm_bytes // self._weights.frame_samples

    @property
    def _max_audio_bytes(self) -> int:
        chunk_bytes = self._renderer.schedule.max_frames * self._weights.frame_pcm_bytes
        return min(chunk_bytes, MAX_AUDIO_BYTES // self._sample_bytes * self._sample_bytes)

    def _checked_settings(self, wanted: dict[str, Any]) -> tuple[int, Schedule]:
        quantizers, schedule = self._quantizers, self._renderer.schedule
        for name, value in wanted.items():
            match name:
                case "quantizers":
                    quantizers = self._checked_quantizers(value)
                case "chunk_frames":
                    schedule = self._checked_schedule(value)
                case _:
                    raise _SettingsError(f"SETTINGS has no {name!r}: only 'quantizers' and 'chunk_frames' can be set")
        return quantizers, schedule

    def _checked_quantizers(self, value: Any) -> int:
        most = self._weights.quantizers
        if type(value) is not int or not 1 <= value <= most:
            raise _SettingsError(f"quantizers is {value!r}; a whole number from 1 to {most} is allowed")
        if value < most and not self._renderer.decoder.decodes_prefix:
            raise _SettingsError(
                f"quantizers is {value}, but this graph decodes all {most} only: "
                "`mossnano build --from-bundle` makes one that decodes any number of them"
            )
        return value

    def _checked_schedule(self, value: Any) -> Schedule:
        if value is None:
            return Ramp(self._ramp_max_frames)
        if type(value) is not int or not 1 <= value <= MAX_CHUNK_FRAMES:
            raise _SettingsError(
                f"chunk_frames is {value!r}; a whole number from 1 to {MAX_CHUNK_FRAMES} is allowed, "
                "or null for the ramp"
            )
        return Fixed(value)


def error_message(error: MossnanoError, *, stream: int | None = None, fatal: bool = False) -> Message:
    """What a peer is told of an error."""
    return json_message(Kind.ERROR, {"code": error.code, "message": str(error), "stream": stream, "fatal": fatal})


def _unknown_kind(kind: int) -> PayloadError:
    known = ", ".join(f"{known.name} 0x{known:02x}" for known in dict.fromkeys(kind for _, kind in TRANSITIONS))
    return _UnknownKindError(f"{kind_name(kind)} is not for the decoder; it takes {known}")


class _HandshakeError(PayloadError):
    code = "handshake_mismatch"


class _NoStreamError(PayloadError):
    code = "no_stream"


class _OutOfPlaceError(PayloadError):
    code = "out_of_place"


class _PeerError(PayloadError):
    code = "peer_error"


class _SettingsError(PayloadError):
    code = "bad_settings"


class _UnknownKindError(PayloadError):
    code = "unknown_kind"
