"""One peer: its handshake and settings, its streams, and what each of its messages leads to.

Rules of this room:

- `receive`, `advance` and `close` are generators. Each message leaves before the next chunk is computed, so there is no
  output queue, and who does not take a message stops the work.
- A message is dealt with at once, or when the chunks before it in its own stream are computed: until then it waits in
  its lane. `on_handled` is told when a message waits no more, or waits where it is bounded by its own stream.
- A plain stream is numbered when it opens, from 0, also when it is bad. Each one that opens is answered by exactly one
  END, but for those that a CANCEL drops: the answer to the CANCEL stands for all of them. A numbered stream has the
  number that its peer gave it.
- One bad payload ends nothing but its own stream. The next one finds a state that was reset.
- What a direction does its own way is in its `Direction`: decoding.py and encoding.py have one each.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

from mossnano_stdio.chunks import Chunks, Ramp, Schedule
from mossnano_stdio.errors import (
    BacklogError,
    HandshakeError,
    LateStreamError,
    MossnanoError,
    NoStreamError,
    OutOfPlaceError,
    PayloadError,
    PeerError,
    TooManyStreamsError,
    UnknownKindError,
)
from mossnano_stdio.protocol.messages import (
    MAX_MESSAGE_BYTES,
    NUMBER_BYTES,
    NUMBERED,
    Kind,
    Message,
    in_stream,
    json_message,
    kind_name,
    out_of_stream,
    parse_json,
)
from mossnano_stdio.protocol.settings import Rules, Settings
from mossnano_stdio.protocol.stream import Answers, Lane, Received, State, Stream
from mossnano_stdio.tokens import CodecFormat, frame_bytes

CODEC_KINDS: Final = ("mimi", "encodec")  # as names of weights begin; all others are of one more kind
MAX_SENT_BYTES: Final = MAX_MESSAGE_BYTES - 1  # of any payload of ours: a reader like ours takes it
ERROR_CHARACTERS: Final = 2000  # of what is said of an error: a peer's text in it could be as long as a message
REPEATED_CHARACTERS: Final = 1000  # of a peer's text that goes back to it
MAX_BACKLOG_BYTES: Final = 1 << 20  # that may wait in one numbered stream
MAX_ARTIFACTS_BYTES: Final = 32 << 20  # of all artifacts of numbered streams that are not decoded yet
SETTLING: Final = (Kind.SETTINGS, Kind.HANDSHAKE)  # what numbered streams that open later go by
MAX_REMEMBERED: Final = 4096  # numbers of late streams, and of handshakes for streams that are not open

# What a message makes us do in the lane that it came along.
Action = Callable[["Connection", Lane, Message], Answers]


class Direction(NamedTuple):
    """What differs between a peer who sends tokens and one who sends audio."""

    name: str
    opened_by: str  # what opens a stream, for people
    transitions: Mapping[tuple[State, Kind], Action]
    adding: frozenset[Kind]  # what only adds to a stream, and so waits for none of its chunks
    opening: frozenset[Kind]  # what opens a numbered stream
    encodes: bool  # then there is no credit: a numbered stream that is full stops the reading, and does not go bad
    new_stream: Callable[[int, Lane, Chunks[Any], CodecFormat], Stream]
    new_chunks: Callable[[Any, Schedule, Callable[[int, float], object]], Chunks[Any]]  # over a decoder, or an encoder
    check_quantizers: Callable[[Any, int], None]  # a SettingsError where this codec does not do with so few


class Turn(NamedTuple):
    """A lane, and how many frames it computes."""

    lane: Lane
    frames: int


class Connection:
    """One peer's conversation with one codec.

    `new_codec` makes a decoder, or an encoder, for each stream that is open at the same time. `identity` is what a
    HANDSHAKE says beyond the numbers that are known here. `new_ramp` makes the live ramp when SETTINGS asks for it.
    `cancel_waiting` says whether a plain CANCEL was read and is not handled yet. Where `maybe_no_numbers` says why,
    there are no numbered streams; where `maybe_fixed_form` does, SETTINGS do not change the form of the sound.
    """

    def __init__(
        self,
        direction: Direction,
        new_codec: Callable[[], Any],
        schedule: Schedule,
        identity: Mapping[str, Any],
        *,
        settings: Mapping[str, Any] | None = None,
        new_ramp: Callable[[], Schedule] = Ramp,
        max_streams: int = 0,
        maybe_no_numbers: str | None = None,
        maybe_fixed_form: str | None = None,
        cancel_waiting: Callable[[], bool] = lambda: False,
        on_handled: Callable[[Message], object] = lambda message: None,
        on_step: Callable[[int, float], object] = lambda frames, seconds: None,
    ) -> None:
        codec = new_codec()
        self.direction = direction
        self.format: CodecFormat = codec.format
        self.streams_opened = 0  # plain ones
        self.numbered_opened = 0
        self.error_count = 0
        self._rules = Rules(
            self.format, new_ramp, partial(direction.check_quantizers, codec), encodes=direction.encodes
        )
        # What few codecs say of themselves: how a stream of theirs begins, and whether it comes in segments.
        facts = {name: getattr(codec, name, 1) for name in ("first_chunk_frames", "segment_frames")}
        self._codec_facts = {name: frames for name, frames in facts.items() if frames > 1}
        nothing_set = Settings.of_codec(self.format, schedule, facts["first_chunk_frames"])
        asked_for = self._rules.changed(nothing_set, settings or {})
        self._rules = replace(self._rules, maybe_fixed_form=maybe_fixed_form)
        self.plain = Lane(None, asked_for, codec)
        self.numbered: dict[int, Lane] = {}
        self.max_streams = 0 if maybe_no_numbers else max_streams
        self._maybe_no_numbers = maybe_no_numbers
        self._highest_number = -1
        self._late_numbers: dict[int, None] = {}  # that were told so
        self._misfits: dict[int, str] = {}  # of streams that are not open yet
        # Plain messages that change what numbered streams open with, and messages that would open one behind them, each
        # with how many of the former came before it.
        self._settings_received = self._settings_handled = 0
        self._behind_settings: deque[tuple[int, Received]] = deque()
        self._new_codec = new_codec
        self._spare_codecs: list[Any] = []
        self._identity = identity
        self._cancel_waiting = cancel_waiting
        self._on_handled = on_handled
        self._on_step = on_step
        self._maybe_first_dropped: Stream | None = None  # by the CANCEL that waits
        self._input_ended = False
        self._was_cut = False  # inside an artifact of a numbered stream
        self._received_seconds = 0.0  # when the message that is handled was there

    # --- what whoever drives it asks ------------------------------------------------------------------

    @property
    def lanes(self) -> Iterator[Lane]:
        yield self.plain
        yield from self.numbered.values()

    def due_lanes(self) -> list[Lane]:
        """Where a chunk can be computed now."""
        self._look_for_cancel(self.plain)
        return [lane for lane in self.lanes if lane.stream is not None and lane.stream.allowed_frames]

    @property
    def is_full(self) -> bool:
        """Must reading stop until something is computed?"""
        return self.direction.encodes and any(
            lane.is_due and lane.backlog_bytes > MAX_BACKLOG_BYTES for lane in self.numbered.values()
        )

    @property
    def is_cut(self) -> bool:
        """Did the input end inside an artifact?"""
        return self._was_cut or (self.plain.stream is not None and self.plain.stream.maybe_cut() is not None)

    def maybe_stream_of(self, answer: Message) -> Stream | None:
        """The stream that an answer of ours belongs to, while it is open."""
        if not answer.kind & NUMBERED:
            return self.plain.stream
        lane = self.numbered.get(int.from_bytes(answer.payload[:NUMBER_BYTES], "little"))
        return lane.stream if lane else None

    def handshake(self, lane: Lane | None = None) -> Message:
        """Who we are and what holds now."""
        lane, codec = lane or self.plain, self.format
        settings = lane.settings
        schedule, form = settings.schedule, settings.form
        of_decoding = {
            "gain_db": form.gain_db,
            "levels_ms": form.levels_ms,
            "window_samples": settings.window_samples,
        }
        return json_message(
            Kind.HANDSHAKE,
            {
                **self._identity,
                "direction": self.direction.name,
                "sample_rate": form.sample_rate,
                "channels": form.channels,
                "sample_format": form.sample_format,
                "frame_samples": codec.frame_samples,
                "quantizers": settings.quantizers,
                "codebook_size": codec.codebook_size,
                "frame_bytes": frame_bytes(settings.quantizers, codec.codebook_size),
                "max_audio_bytes": max_audio_bytes(lane, codec),
                "chunk_frames": schedule.maybe_chunk_frames,
                "max_chunk_frames": schedule.max_frames,
                **self._codec_facts,
                "codec_sample_rate": codec.sample_rate,
                "codec_channels": codec.channels,
                "max_streams": self.max_streams,
                "urgency": settings.urgency,
                **({} if self.direction.encodes else of_decoding),
            },
        )

    def receive(self, message: Message, seconds: float = 0.0) -> Answers:
        """Deal with one message, which was there at `seconds` of the caller's clock, or let it wait in its lane."""
        if not message.kind & NUMBERED or not self._knows(message.kind & ~NUMBERED):
            self._settings_received += message.kind in SETTLING
            self.plain.wait(message, seconds)
            yield from self._progress(self.plain)
            return
        try:
            number, inner = self._numbered(message)
        except PayloadError as error:
            self._on_handled(message)
            yield self.error(error, None)
            return
        is_new = number not in self.numbered and number > self._highest_number
        if is_new and self._settings_handled < self._settings_received:
            self._behind_settings.append((self._settings_received, Received(message, seconds)))
        else:
            yield from self._receive_numbered(number, inner, Received(message, seconds))

    def _receive_numbered(self, number: int, inner: Message, received: Received) -> Answers:
        self._on_handled(received.message)
        self._received_seconds = received.seconds
        lane = self.numbered.get(number)
        if lane is None:
            lane = yield from self._receive_unopened(number, inner)
        if lane is not None:
            yield from self._receive_in(lane, inner, received.seconds)

    def _receive_behind_settings(self) -> Answers:
        """Open the streams whose settings are settled now, as their peer wrote them: none goes by later SETTINGS."""
        if not self._behind_settings or self._behind_settings[0][0] > self._settings_handled:
            return
        waiting, self._behind_settings = self._behind_settings, deque()
        for place, received in waiting:
            number, inner = out_of_stream(received.message)
            if place > self._settings_handled and number > self._highest_number:
                self._behind_settings.append((place, received))
            else:
                yield from self._receive_numbered(number, inner, received)

    def advance(
        self,
        turns: Sequence[Turn],
        run: Callable[[Callable[[Turn], Any], Iterable[Turn]], Iterable[Any]] = map,
    ) -> Answers:
        """Compute one chunk in each of some lanes that are due. `run` is `map`, or one that does several at once."""
        self._look_for_cancel(self.plain)
        turns = [turn for turn in turns if turn.lane.is_due]
        for (lane, frames), chunk in zip(turns, run(_computed, turns), strict=True):
            assert lane.stream is not None
            lane.stream.chunk_counts[frames] += 1
            if isinstance(chunk, MossnanoError):
                yield from lane.addressed(self.fail(lane, chunk))
            else:
                yield from lane.addressed(lane.stream.deliver(self, chunk))
            yield from self._progress(lane)

    def end_input(self, *, is_faulty: bool = False) -> Answers:
        """No more messages will come: nobody can grant or add anything any more. Compute what is due, then `close`."""
        self._input_ended = True
        for lane in [*self.numbered.values(), self.plain]:
            if lane.stream is not None:
                lane.stream.grant_all()
            if lane.maybe_number is not None and not is_faulty and not lane.has_all_input:
                lane.wait(Message(Kind.END), self._received_seconds)
            yield from self._progress(lane)

    def close(self, maybe_fault: MossnanoError | None = None) -> Answers:
        """All that was due is computed: tell the fault, and end the streams that are open."""
        if maybe_fault is None and self.plain.stream is not None:
            maybe_fault = self.plain.stream.maybe_cut()
        if maybe_fault is not None:
            yield self.error(maybe_fault, self.plain, fatal=True)
        for lane in list(self.lanes):
            if lane.stream is not None:
                yield from lane.addressed(self.finish(lane, Message(Kind.END)))
                yield from self._progress(lane)

    # --- lanes ----------------------------------------------------------------------------------------

    def _progress(self, lane: Lane) -> Answers:
        """Deal with what waits in a lane, as far as it waits for no chunk."""
        while (maybe_answers := self._maybe_next(lane)) is not None:
            yield from lane.addressed(maybe_answers)
            if lane is self.plain:
                yield from self._receive_behind_settings()
        if lane.stream is not None:
            lane.stream.note_due(self._received_seconds)

    def _maybe_next(self, lane: Lane) -> Answers | None:
        """What the next thing that can be dealt with leads to."""
        self._look_for_cancel(lane)
        if lane.after_chunks is not None:
            if lane.is_due or (lane.stream is not None and not lane.stream.can_end()):
                return None
            then, lane.after_chunks = lane.after_chunks, None
            return then()
        if lane.waiting:
            message, seconds = lane.waiting[0]
            if lane.is_due and (
                message.kind not in self.direction.adding
                or (lane is self.plain and _open(lane).chunks.is_sated)  # what waits there is bounded by the inbox
            ):
                return None
            lane.waiting.popleft()
            lane.waiting_bytes -= message.cost_bytes
            if lane is self.plain:
                self._on_handled(message)
                self._settings_handled += message.kind in SETTLING
            return self._handle(lane, message, seconds)
        if self._input_ended and lane.stream is not None:
            lane.stream.complete_input()  # no chunk fills up any more
        return None

    def _handle(self, lane: Lane, message: Message, seconds: float) -> Answers:
        self._received_seconds = seconds
        try:
            act = self.direction.transitions[lane.state, Kind(message.kind)]
        except (ValueError, KeyError):
            known = dict.fromkeys(kind for _, kind in self.direction.transitions)
            names = ", ".join(f"{kind.name} 0x{kind:02x}" for kind in known)
            yield self.error(
                UnknownKindError(
                    f"{kind_name(message.kind)} means nothing while we {self.direction.name}; known are {names}"
                ),
                lane,
            )
            return
        yield from act(self, lane, message)

    def _knows(self, kind: int) -> bool:
        """Is it a kind that may have a number?"""
        known = {known for _, known in self.direction.transitions}
        return kind in known or (kind == Kind.CREDIT and not self.direction.encodes)

    def _numbered(self, message: Message) -> tuple[int, Message]:
        """The number of a message's stream, and the message without it."""
        if self._maybe_no_numbers is not None or not self.max_streams:
            why = self._maybe_no_numbers or "--max-streams is 0"
            raise UnknownKindError(f"there are no numbered streams here: {why}")
        return out_of_stream(message)

    def _receive_unopened(self, number: int, message: Message) -> Generator[Message, None, Lane | None]:
        """A message for a number that is not open. Returns the lane where it opens one."""
        lane = Lane(number, self.plain.settings, None)
        kind = message.kind
        maybe_refusal: PayloadError | None = None
        if kind in AT_ANY_TIME:
            yield from lane.addressed(AT_ANY_TIME[Kind(kind)](self, lane, message))
            if kind == Kind.HANDSHAKE and number > self._highest_number:
                _remember(self._misfits, number, lane.maybe_misfit)
            return None
        if number <= self._highest_number:
            maybe_refusal = self._maybe_too_late(number, kind)
        elif kind not in self.direction.opening:
            opened_by = f"{self.direction.opened_by}, SETTINGS or MARK".replace(" or ", ", ", 1)
            maybe_refusal = NoStreamError(
                f"{kind_name(kind)} came for stream {number}, which is not open: {opened_by} opens one"
            )
        else:
            self._highest_number = number
            if len(self.numbered) < self.max_streams:
                lane.codec = self._spare_codecs.pop() if self._spare_codecs else self._new_codec()
                lane.maybe_misfit = self._misfits.pop(number, self.plain.maybe_misfit)
                self.numbered[number] = lane
                self.numbered_opened += 1
                self.open_stream(lane)
                return lane
            maybe_refusal = TooManyStreamsError(
                f"stream {number} is not opened: {self.max_streams} streams are open, and --max-streams allows no "
                "more; wait for an END"
            )
        if maybe_refusal is not None:
            yield in_stream(number, self.error(maybe_refusal, lane))
        return None

    def _maybe_too_late(self, number: int, kind: int) -> LateStreamError | None:
        """What is said, once, to input for a stream that has all of it. What may always cross an END on its way is
        dropped without a word."""
        if kind in (Kind.CREDIT, Kind.CANCEL, Kind.END, Kind.MARK) or number in self._late_numbers:
            return None
        _remember(self._late_numbers, number, None)
        return LateStreamError(
            f"{kind_name(kind)} came for stream {number}, which is over or was passed over: a new stream takes a "
            f"number above {self._highest_number}"
        )

    def _receive_in(self, lane: Lane, message: Message, seconds: float) -> Answers:
        """A message for a numbered stream that is open."""
        assert lane.maybe_number is not None
        if message.kind == Kind.CREDIT:
            yield from lane.addressed(self.grant(lane, message))
        elif message.kind == Kind.CANCEL:
            yield from lane.addressed(self.cancel_numbered(lane, message))
        elif lane.has_all_input and message.kind not in AT_ANY_TIME:
            maybe_refusal = self._maybe_too_late(lane.maybe_number, message.kind)
            if maybe_refusal is not None:
                yield from lane.addressed(iter([self.error(maybe_refusal, lane)]))
        else:
            if message.kind == Kind.END:
                lane.has_all_input = True
            elif not self.direction.encodes and lane.backlog_bytes > MAX_BACKLOG_BYTES:
                error = BacklogError(
                    f"more than {MAX_BACKLOG_BYTES} bytes wait in stream {lane.maybe_number}: send no more than is "
                    "played, or grant more CREDIT"
                )
                yield from lane.addressed(self.fail(lane, error))
            lane.wait(message, seconds)
        yield from self._progress(lane)

    # --- what a message leads to, in both directions --------------------------------------------------

    def compare_formats(self, lane: Lane, message: Message) -> Answers:
        ours = {
            "sample_rate": self.format.sample_rate,
            "channels": self.format.channels,
            "frame_samples": self.format.frame_samples,
            "quantizers": lane.settings.quantizers,
            "codebook_size": self.format.codebook_size,
        }
        try:
            theirs = parse_json(message)
        except PayloadError as error:
            yield self.error(error, lane)
            return
        differences = [
            f"{name} is {repr(theirs[name])[:REPEATED_CHARACTERS]} there and {value} here"
            for name, value in ours.items()
            if name in theirs and theirs[name] != value
        ]
        # Codes of two codecs can have all these numbers in common and mean other sounds.
        their_codec, our_codec = theirs.get("codec"), self._identity.get("codec")
        if isinstance(their_codec, str) and isinstance(our_codec, str) and _kind(their_codec) != _kind(our_codec):
            differences.append(f"codec is {their_codec[:REPEATED_CHARACTERS]!r} there and {our_codec!r} here")
        lane.maybe_misfit = None
        if differences:
            lane.maybe_misfit = "the peer's HANDSHAKE does not fit these weights: " + ", ".join(differences)
            yield self.error(HandshakeError(lane.maybe_misfit), lane)

    def ignore(self, lane: Lane, message: Message) -> Answers:
        yield from ()

    def echo(self, lane: Lane, message: Message) -> Answers:
        most_bytes = _most_bytes(lane)
        if len(message.payload) > most_bytes:  # whatever --max-message-bytes lets in
            yield self.error(
                PayloadError(
                    f"a PING of {len(message.payload)} bytes is too long to be echoed: "
                    f"{most_bytes} bytes of payload are allowed"
                ),
                lane,
            )
            return
        yield Message(Kind.PING, message.payload)

    def finish(self, lane: Lane, message: Message) -> Answers:
        stream = _open(lane)
        lane.has_all_input = lane.maybe_number is not None
        if not stream.is_dropped:
            maybe_rest = stream.maybe_rest()
            if maybe_rest is not None:
                yield self.error(maybe_rest, lane)
            stream.complete_input()
        lane.after_chunks = partial(self._finish_computed, lane, stream)

    def _finish_computed(self, lane: Lane, stream: Stream) -> Answers:
        if not stream.is_dropped:  # a CANCEL may have come while the rest was computed
            yield from stream.last_sound()
            yield from self._end(stream, lane, cancelled=False, **stream.end_extras())
        yield from self._close(lane)

    def cancel(self, lane: Lane, message: Message) -> Answers:
        yield from self._end(self._maybe_first_dropped or lane.stream, lane, cancelled=True, echo=_repeated(message))
        self._maybe_first_dropped = None
        yield from self._close(lane)

    def cancel_numbered(self, lane: Lane, message: Message) -> Answers:
        """At once, whatever waits in it."""
        yield from self._deal_with_the_rest(lane)
        yield from self._end(lane.stream, lane, cancelled=True, echo=_repeated(message))
        yield from self._close(lane)

    def settle(self, lane: Lane, message: Message) -> Answers:
        try:
            lane.settings = self._rules.changed(lane.settings, parse_json(message))
        except PayloadError as error:
            yield self.error(error, lane)
            return
        yield self.handshake(lane)

    def settle_stream(self, lane: Lane, message: Message) -> Answers:
        """A numbered stream has settings of its own until its first input comes."""
        if lane.maybe_number is None:
            yield from self.refuse_out_of_place(lane, message)
            return
        stream = _open(lane)
        try:
            fields = parse_json(message)
            marks = stream.checked_marks(fields.pop("marks")) if "marks" in fields else ()
            settings = self._rules.changed(lane.settings, fields)
            stream.check_window(settings.least_window_samples(self.format))
        except PayloadError as error:
            yield self.error(error, lane)
            return
        lane.settings = settings
        stream.settle(lane.settings, self._new_chunks(lane))
        for frame, text in marks:
            stream.push_mark(text, frame)
        yield self.handshake(lane)

    def grant(self, lane: Lane, message: Message) -> Answers:
        stream = _open(lane)
        least = stream.settings.least_window_samples(self.format)
        samples = int.from_bytes(message.payload, "little")
        if len(message.payload) != 8:
            yield self.error(
                PayloadError(f"a CREDIT of {len(message.payload)} bytes; 8 are allowed, a u64, little-endian"), lane
            )
        elif stream.maybe_window_samples is None and samples < least:
            yield self.error(
                PayloadError(
                    f"the first CREDIT grants {samples} samples; {least} may have to be sent at once and would never "
                    f"fit: allowed is {least} or more"
                ),
                lane,
            )
        elif not self._input_ended:
            stream.grant(samples)

    def report_peer_error(self, lane: Lane, message: Message) -> Answers:
        yield self.error(PeerError(f"the peer sent an ERROR of its own: {_repeated(message)}"), lane)

    def refuse_no_stream(self, lane: Lane, message: Message) -> Answers:
        try:
            if parse_json(message).get("stream", 0) is None:
                return  # what an encoder answers to a CANCEL while nothing is open: it ends nothing
        except PayloadError:
            pass
        yield self.error(
            NoStreamError(f"END came while no stream was open: {self.direction.opened_by} opens one"), lane
        )

    def refuse_out_of_place(self, lane: Lane, message: Message) -> Answers:
        yield self.error(
            OutOfPlaceError(
                f"{kind_name(message.kind)} came {lane.state.value}, where it has no place: "
                "send END or CANCEL first (the message is ignored, the stream goes on)"
            ),
            lane,
        )

    # --- streams --------------------------------------------------------------------------------------

    def open_stream(self, lane: Lane) -> Stream:
        number = lane.maybe_number
        if number is None:
            number = self.streams_opened
            self.streams_opened += 1
        lane.stream = self.direction.new_stream(number, lane, self._new_chunks(lane), self.format)
        if self._input_ended:
            lane.stream.grant_all()
        self._look_for_cancel(lane)
        return lane.stream

    def _new_chunks(self, lane: Lane) -> Chunks[Any]:
        return self.direction.new_chunks(lane.codec, copy.copy(lane.settings.schedule), self._on_step)

    def cut(self, lane: Lane, error: MossnanoError) -> Answers:
        """The stream's input ended inside what is to be whole."""
        self._was_cut = self._was_cut or self._input_ended
        _open(lane).state = State.SKIP
        yield self.error(error, lane)
        yield from self.finish(lane, Message(Kind.END))

    def put_back(self, lane: Lane, message: Message) -> None:
        """The lane's next message is this one again."""
        lane.waiting.appendleft(Received(message, self._received_seconds))
        lane.waiting_bytes += message.cost_bytes

    def fail_after_chunks(self, lane: Lane, error: MossnanoError) -> None:
        """This stream is lost, but what came before is whole."""
        lane.after_chunks = partial(self.fail, lane, error)

    def fail(self, lane: Lane, error: MossnanoError) -> Answers:
        """This stream is lost; the input of it that is still to come is skipped."""
        stream = _open(lane)
        if not stream.is_dropped:
            yield self.error(error, lane)
        stream.state = State.SKIP
        stream.forget_input()
        stream.chunks.reset()

    def error(self, error: MossnanoError, lane: Lane | None, *, fatal: bool = False) -> Message:
        """What the peer is told of it. It counts, for the stream that is open in `lane` too."""
        self.error_count += 1
        maybe_number = lane.maybe_number if lane is not None else None
        if lane is not None and lane.stream is not None:
            maybe_number = lane.stream.number
            lane.stream.errors += 1
        return error_message(error, stream=maybe_number, fatal=fatal)

    def artifacts_bytes(self) -> int:
        """What artifacts of numbered streams hold."""
        return sum(lane.stream.artifact_bytes for lane in self.numbered.values() if lane.stream is not None)

    def _look_for_cancel(self, lane: Lane) -> None:
        if lane.maybe_number is None and lane.stream is not None:
            if self._cancel_waiting():
                lane.stream.is_dropped = True
                self._maybe_first_dropped = self._maybe_first_dropped or lane.stream
            if lane.stream.is_dropped and lane.is_due:
                lane.stream.chunks.reset()

    def _close(self, lane: Lane) -> Answers:
        if lane.stream is not None:
            lane.stream.chunks.reset()
        lane.stream = lane.after_chunks = None
        if lane.maybe_number is None:
            return
        del self.numbered[lane.maybe_number]
        self._spare_codecs.append(lane.codec)
        yield from self._deal_with_the_rest(lane)

    def _deal_with_the_rest(self, lane: Lane) -> Answers:
        """What waits in a numbered stream at its end is dropped, but for what is answered at any time."""
        rest, lane.waiting = lane.waiting, deque()
        for message, _ in rest:
            if message.kind in AT_ANY_TIME:
                yield from AT_ANY_TIME[Kind(message.kind)](self, lane, message)

    def _end(self, stream: Stream | None, lane: Lane, *, cancelled: bool, **extra: Any) -> Answers:
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
                **({"next_stream": self.streams_opened} if lane.maybe_number is None else {}),
                **(stream.counts() if stream else {}),
                **extra,
            },
        )


# What is dealt with whatever is open.
AT_ANY_TIME: Final[Mapping[Kind, Action]] = {
    Kind.PING: Connection.echo,
    Kind.ERROR: Connection.report_peer_error,
    Kind.HANDSHAKE: Connection.compare_formats,
}


def _most_bytes(lane: Lane) -> int:
    """What a payload of ours may hold, beside the number."""
    return MAX_SENT_BYTES - (NUMBER_BYTES if lane.maybe_number is not None else 0)


def _kind(codec: str) -> str:
    """Which kind of codec a name of weights begins with.

    >>> _kind("mimi of Hibiki"), _kind("nano stand-in, seed 0")
    ('mimi', '')
    """
    return next((kind for kind in CODEC_KINDS if codec.startswith(kind)), "")


def max_audio_bytes(lane: Lane, codec: CodecFormat) -> int:
    """The longest payload of AUDIO, whole samples."""
    form = lane.settings.form
    samples = form.most_samples(lane.settings.schedule.max_frames * codec.frame_samples, codec)
    return min(samples, _most_bytes(lane) // form.sample_bytes) * form.sample_bytes


def error_message(error: MossnanoError, *, stream: int | None = None, fatal: bool = False) -> Message:
    """What a peer is told of an error."""
    said = str(error)[:ERROR_CHARACTERS]
    return json_message(Kind.ERROR, {"code": error.code, "message": said, "stream": stream, "fatal": fatal})


def _computed(turn: Turn) -> Any:
    """What comes of a chunk, or why nothing does."""
    assert turn.lane.stream is not None
    try:
        return turn.lane.stream.compute(turn.frames)
    except MossnanoError as error:
        return error


def _open(lane: Lane) -> Stream:
    assert lane.stream is not None, "the table has this action only where a stream is open"
    return lane.stream


def _remember(known: dict[int, Any], number: int, value: Any) -> None:
    """The oldest of too many is forgotten."""
    known[number] = value
    if len(known) > MAX_REMEMBERED:
        del known[next(iter(known))]


def _repeated(message: Message) -> str:
    """The beginning of a peer's text."""
    return message.payload.decode("utf-8", "replace")[:REPEATED_CHARACTERS]
