"""The decoder's side: tokens and artifacts in, audio out.

Rules of this room:

- `DECODING` is the whole protocol: for every state and every inbound kind, the one action that is taken. It is
  printed in protocol.md, and a test compares the two.
- Each AUDIO message is at most one chunk, and what is before its end in the stream stands before it: MARKs and LEVELS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any, Final

from mossnano_stdio.chunks import SCALES_NEEDED, Chunks, DecodedChunk, Decoder, DecodingChunks, SegmentChunks
from mossnano_stdio.errors import ArtifactError, BacklogError, MossnanoError, PayloadError, SettingsError, TokenError
from mossnano_stdio.pcm import ShapedSound, Shaper
from mossnano_stdio.protocol.connection import (
    MAX_ARTIFACTS_BYTES,
    MAX_BACKLOG_BYTES,
    Action,
    Connection,
    Direction,
    max_audio_bytes,
)
from mossnano_stdio.protocol.messages import MAX_MARK_BYTES, MESSAGE_COST_BYTES, Kind, Message
from mossnano_stdio.protocol.settings import Settings
from mossnano_stdio.protocol.stream import Answers, Lane, Owner, State, Stream
from mossnano_stdio.tokens import ArtifactReader, CodecFormat, frame_bytes, unpack_frames
from mossnano_stdio.tokens.ecdc import RECORDING_MAGICS, EcdcReader, reader_for


class DecodingStream(Stream):
    """Tokens, or an artifact, on their way to sound."""

    chunks: DecodingChunks

    def __init__(self, number: int, lane: Lane, chunks: Chunks[Any], codec: CodecFormat) -> None:
        self._codec = codec
        super().__init__(number, lane, chunks)
        self.artifact: ArtifactReader | EcdcReader = ArtifactReader()  # until its first byte says what it is
        self._ecdc_bytes = 0
        self._pushed_frames = 0
        self._marks: list[tuple[int, int, bytes]] = []  # a heap: before which frame, the how-manieth, and its text
        self._marks_pushed = 0
        self.marks_bytes = 0
        self._clipped_samples = 0

    def settle(self, settings: Settings, chunks: Chunks[Any]) -> None:
        super().settle(settings, chunks)
        self._shaper = Shaper(self._codec, settings.form)

    @property
    def samples_per_second(self) -> int:
        return self.settings.form.sample_rate

    @property
    def backlog_bytes(self) -> int:
        # What an artifact holds is counted by itself.
        waiting_frames = 0 if self.state is State.ARTIFACT else self._pushed_frames - self.frames
        return waiting_frames * frame_bytes(self.settings.quantizers, self._codec.codebook_size) + self.marks_bytes

    @property
    def artifact_bytes(self) -> int:
        if isinstance(self.artifact, EcdcReader):
            return self._ecdc_bytes
        header = self.artifact.maybe_header
        return header.file_bytes - self.artifact.missing_bytes if header else 0

    def fits(self, frames: int) -> bool:
        codec_samples, maybe_left = frames * self._codec.frame_samples, self.chunks.samples_left
        if maybe_left is not None:
            codec_samples = min(codec_samples, maybe_left)
        return self._may_have_sent(self._shaper.samples_after(self._shaper.codec_samples + codec_samples))

    def can_end(self) -> bool:
        samples = self._shaper.output_position(self._shaper.codec_samples)
        has_sent_all = samples == self.samples  # which may be more than a first CREDIT grants that came late
        return self.is_dropped or has_sent_all or self._may_have_sent(samples)

    def _may_have_sent(self, samples: int) -> bool:
        return self.maybe_granted_samples is None or samples <= self.maybe_granted_samples

    def push(self, codes: Any) -> None:
        self._pushed_frames += self.chunks.push(codes)

    def push_ecdc(self, reader: EcdcReader, data: bytes, connection: Connection) -> bool:
        """Take the next bytes of an .ecdc: each segment goes to the codec as soon as it is there. Is it whole?"""
        self._ecdc_bytes += len(data)
        try:
            for segment in reader.push(data):
                self._check_ecdc_fits(reader, connection)
                if not self.is_dropped:
                    self._pushed_frames += self.chunks.push_segment(segment)
        finally:  # what does not fit is refused for that, whatever else is wrong, and before its body takes memory
            self._check_ecdc_fits(reader, connection)
        if reader.is_complete and not self.is_dropped:
            self.chunks.finish(reader.finish().original_samples)
        return reader.is_complete

    def _check_ecdc_fits(self, reader: EcdcReader, connection: Connection) -> None:
        if reader.maybe_header is not None:
            reader.maybe_header.check_fits(connection.format, self.lane.codec.decodes_prefix)

    def push_mark(self, text: bytes, frame: int | None = None) -> None:
        heappush(self._marks, (self._pushed_frames if frame is None else frame, self._marks_pushed, text))
        self._marks_pushed += 1
        self.marks_bytes += len(text) + MESSAGE_COST_BYTES

    def checked_marks(self, value: Any) -> Sequence[tuple[int, bytes]]:
        if not isinstance(value, list):
            raise SettingsError(f"marks is {value!r}; a list of [frame, text] is allowed")
        marks = []
        for entry in value:
            match entry:
                case [int() as frame, str() as text] if type(frame) is int and frame >= 0:
                    try:
                        marks.append((frame, _checked_mark(text.encode())))
                    except (PayloadError, UnicodeEncodeError) as error:
                        raise SettingsError(f"marks has a text that no MARK holds: {error}") from None
                case _:
                    raise SettingsError(f"marks has {entry!r}; [frame, text] is allowed, frames counted from 0")
        return marks

    def compute(self, most_frames: int) -> DecodedChunk:
        chunk = self.chunks.step(most_frames)
        assert chunk is not None, "a turn is of a stream that has a chunk due"
        return chunk

    def deliver(self, owner: Owner, chunk: DecodedChunk) -> Answers:
        self.frames += chunk.frames
        if chunk.error is not None:
            yield owner.error(chunk.error, self.lane)
        yield from self._sound(self._shaper.push(chunk.audio))

    def last_sound(self) -> Answers:
        yield from self._sound(self._shaper.finish())
        yield from self._marks_before(None)

    def _sound(self, shaped: ShapedSound) -> Answers:
        self._clipped_samples += shaped.clipped_samples
        sample_bytes = self.settings.form.sample_bytes
        most_bytes = max_audio_bytes(self.lane, self._codec)
        if shaped.levels:
            yield Message(Kind.LEVELS, shaped.levels)
        for start in range(0, len(shaped.sound), most_bytes):
            piece = shaped.sound[start : start + most_bytes]
            yield from self._marks_before(self.samples + len(piece) // sample_bytes)
            self.samples += len(piece) // sample_bytes
            yield Message(Kind.AUDIO, piece)

    def _marks_before(self, maybe_sample: int | None) -> Answers:
        """Those that stand before a sample of the sound; at its end, all that are left."""
        while self._marks:
            frame, _, text = self._marks[0]
            position = self._shaper.output_position(frame * self._codec.frame_samples)
            if maybe_sample is None:
                position = min(position, self.samples)
            elif position >= maybe_sample:
                return
            heappop(self._marks)
            self.marks_bytes -= len(text) + MESSAGE_COST_BYTES
            yield Message(Kind.MARK, position.to_bytes(8, "little") + text)

    def complete_input(self) -> None:
        if self.state is not State.ARTIFACT:  # its chunks were finished when its last byte came
            self.chunks.finish()

    def forget_input(self) -> None:
        self.artifact = ArtifactReader()
        self._ecdc_bytes = 0
        self._marks.clear()
        self.marks_bytes = 0
        self._pushed_frames = self.frames

    def maybe_cut(self) -> MossnanoError | None:
        is_cut = self.state is State.ARTIFACT and not self.artifact.is_complete
        return self.artifact_cut() if is_cut else None

    def artifact_cut(self) -> ArtifactError:
        if isinstance(self.artifact, EcdcReader):
            return ArtifactError(f"{self.artifact.maybe_cut()}: send all of it, then no END")
        return ArtifactError(
            f"the artifact ended {self.artifact.missing_bytes} bytes before its end: send all of it, then no END"
        )

    def counts(self) -> dict[str, Any]:
        return {"clipped_samples": self._clipped_samples}


def _checked_mark(text: bytes) -> bytes:
    if len(text) > MAX_MARK_BYTES:
        raise PayloadError(f"a MARK of {len(text)} bytes; up to {MAX_MARK_BYTES} are allowed")
    return text


def open_tokens(connection: Connection, lane: Lane, message: Message) -> Answers:
    connection.open_stream(lane)
    yield from begin_tokens(connection, lane, message)


def begin_tokens(connection: Connection, lane: Lane, message: Message) -> Answers:
    stream = _decoding(lane)
    stream.state = State.TOKENS
    if lane.maybe_misfit is not None:
        yield from connection.fail(lane, TokenError(f"{lane.maybe_misfit}; send one that fits, then the tokens"))
        return
    yield from push_tokens(connection, lane, message)


def push_tokens(connection: Connection, lane: Lane, message: Message) -> Answers:
    stream = _decoding(lane)
    if stream.is_dropped or stream.chunks.met_zeros:  # after a frame of zeros, whatever came is not looked at
        return
    try:
        codes = unpack_frames(message.payload, stream.settings.quantizers, connection.format.codebook_size)
    except TokenError as error:
        connection.fail_after_chunks(lane, error)
    else:
        stream.push(codes)
    yield from ()


def refuse_tokens(connection: Connection, lane: Lane, message: Message) -> Answers:
    """Frames of codes, for a codec that decodes segments with their scales."""
    connection.open_stream(lane)
    yield from refuse_first_tokens(connection, lane, message)


def refuse_first_tokens(connection: Connection, lane: Lane, message: Message) -> Answers:
    yield from connection.fail(lane, TokenError(SCALES_NEEDED))


def open_mark(connection: Connection, lane: Lane, message: Message) -> Answers:
    connection.open_stream(lane)
    yield from mark(connection, lane, message)


def mark(connection: Connection, lane: Lane, message: Message) -> Answers:
    stream = _decoding(lane)
    if stream.is_dropped:
        return
    try:
        stream.push_mark(_checked_mark(message.payload))
    except PayloadError as error:
        yield connection.error(error, lane)
    if lane.maybe_number is None and stream.marks_bytes > MAX_BACKLOG_BYTES:  # no inbox counts them any more
        yield from connection.fail(
            lane, BacklogError(f"MARKs of more than {MAX_BACKLOG_BYTES} bytes wait for their place in the sound")
        )


def open_artifact(connection: Connection, lane: Lane, message: Message) -> Answers:
    connection.open_stream(lane)
    yield from begin_artifact(connection, lane, message)


def begin_artifact(connection: Connection, lane: Lane, message: Message) -> Answers:
    _decoding(lane).state = State.ARTIFACT
    yield from grow_artifact(connection, lane, message)


def grow_artifact(connection: Connection, lane: Lane, message: Message) -> Answers:
    stream = _decoding(lane)
    reader = stream.artifact = reader_for(message.payload, stream.artifact)
    if isinstance(reader, EcdcReader):
        yield from _grow_ecdc(connection, lane, stream, reader, message)
        return
    try:
        missing_bytes = reader.push(message.payload)
        if reader.maybe_header is not None:  # what does not fit is refused before its body takes memory
            reader.maybe_header.check_fits(connection.format, lane.codec.decodes_prefix)
        _check_artifacts_fit(connection, lane)
        if missing_bytes:
            return
        artifact = reader.artifact()
        if not stream.is_dropped:
            stream.push(artifact.codes)
    except PayloadError as error:
        yield from connection.fail(lane, error)
        return
    if not stream.is_dropped:
        stream.chunks.finish(artifact.original_samples)
    yield from connection.finish(lane, Message(Kind.END))


def _grow_ecdc(
    connection: Connection, lane: Lane, stream: DecodingStream, reader: EcdcReader, message: Message
) -> Answers:
    try:
        is_whole = stream.push_ecdc(reader, message.payload, connection)
        _check_artifacts_fit(connection, lane)
    except PayloadError as error:
        if reader.is_complete and not stream.is_dropped:  # there are bytes beyond its end, where its sound ends, too
            stream.chunks.finish(reader.finish().original_samples)
        connection.fail_after_chunks(lane, error)
        return
    if is_whole:
        yield from connection.finish(lane, Message(Kind.END))


def _check_artifacts_fit(connection: Connection, lane: Lane) -> None:
    if lane.maybe_number is not None and connection.artifacts_bytes() > MAX_ARTIFACTS_BYTES:
        raise BacklogError(
            f"artifacts of more than {MAX_ARTIFACTS_BYTES} bytes in all wait in numbered streams: "
            "send this one when others are over"
        )


def cut_artifact(connection: Connection, lane: Lane, message: Message) -> Answers:
    yield from connection.cut(lane, _decoding(lane).artifact_cut())


def skip_artifact(connection: Connection, lane: Lane, message: Message) -> Answers:
    """The rest of a bad stream, unless it begins like a new artifact. A numbered stream is one artifact at most."""
    if lane.maybe_number is None and message.payload.startswith(RECORDING_MAGICS):
        yield from connection.finish(lane, Message(Kind.END))
        connection.put_back(lane, message)


def check_quantizers(decoder: Decoder, quantizers: int) -> None:
    most = decoder.format.quantizers
    if quantizers < most and not decoder.decodes_prefix:
        raise SettingsError(
            f"quantizers is {quantizers}, but this graph decodes all {most} only: "
            "`mossnano build --from-bundle` makes one that decodes any number of them"
        )


def _decoding(lane: Lane) -> DecodingStream:
    assert isinstance(lane.stream, DecodingStream), "the table has this action only where such a stream is open"
    return lane.stream


DECODING: Final[Mapping[tuple[State, Kind], Action]] = {
    (State.IDLE, Kind.HANDSHAKE): Connection.compare_formats,
    (State.IDLE, Kind.ARTIFACT): open_artifact,
    (State.IDLE, Kind.TOKENS): open_tokens,
    (State.IDLE, Kind.ERROR): Connection.report_peer_error,
    (State.IDLE, Kind.PING): Connection.echo,
    (State.IDLE, Kind.END): Connection.refuse_no_stream,
    (State.IDLE, Kind.CANCEL): Connection.cancel,
    (State.IDLE, Kind.SETTINGS): Connection.settle,
    (State.IDLE, Kind.MARK): open_mark,
    (State.OPEN, Kind.HANDSHAKE): Connection.compare_formats,
    (State.OPEN, Kind.ARTIFACT): begin_artifact,
    (State.OPEN, Kind.TOKENS): begin_tokens,
    (State.OPEN, Kind.ERROR): Connection.report_peer_error,
    (State.OPEN, Kind.PING): Connection.echo,
    (State.OPEN, Kind.END): Connection.finish,
    (State.OPEN, Kind.CANCEL): Connection.cancel,
    (State.OPEN, Kind.SETTINGS): Connection.settle_stream,
    (State.OPEN, Kind.MARK): mark,
    (State.TOKENS, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.TOKENS, Kind.ARTIFACT): Connection.refuse_out_of_place,
    (State.TOKENS, Kind.TOKENS): push_tokens,
    (State.TOKENS, Kind.ERROR): Connection.report_peer_error,
    (State.TOKENS, Kind.PING): Connection.echo,
    (State.TOKENS, Kind.END): Connection.finish,
    (State.TOKENS, Kind.CANCEL): Connection.cancel,
    (State.TOKENS, Kind.SETTINGS): Connection.refuse_out_of_place,
    (State.TOKENS, Kind.MARK): mark,
    (State.ARTIFACT, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.ARTIFACT, Kind.ARTIFACT): grow_artifact,
    (State.ARTIFACT, Kind.TOKENS): Connection.refuse_out_of_place,
    (State.ARTIFACT, Kind.ERROR): Connection.report_peer_error,
    (State.ARTIFACT, Kind.PING): Connection.echo,
    (State.ARTIFACT, Kind.END): cut_artifact,
    (State.ARTIFACT, Kind.CANCEL): Connection.cancel,
    (State.ARTIFACT, Kind.SETTINGS): Connection.refuse_out_of_place,
    (State.ARTIFACT, Kind.MARK): Connection.refuse_out_of_place,
    (State.SKIP, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.SKIP, Kind.ARTIFACT): skip_artifact,
    (State.SKIP, Kind.TOKENS): Connection.ignore,
    (State.SKIP, Kind.ERROR): Connection.report_peer_error,
    (State.SKIP, Kind.PING): Connection.echo,
    (State.SKIP, Kind.END): Connection.finish,
    (State.SKIP, Kind.CANCEL): Connection.cancel,
    (State.SKIP, Kind.SETTINGS): Connection.refuse_out_of_place,
    (State.SKIP, Kind.MARK): Connection.ignore,
}

DECODE: Final = Direction(
    "decode",
    "TOKENS or ARTIFACT",
    DECODING,
    frozenset({Kind.TOKENS, Kind.MARK}),
    frozenset({Kind.TOKENS, Kind.ARTIFACT, Kind.SETTINGS, Kind.MARK}),
    False,
    DecodingStream,
    DecodingChunks,
    check_quantizers,
)
DECODE_SEGMENTS: Final = DECODE._replace(
    opened_by="ARTIFACT",
    transitions={
        **DECODING,
        (State.IDLE, Kind.TOKENS): refuse_tokens,
        (State.OPEN, Kind.TOKENS): refuse_first_tokens,
    },
    adding=DECODE.adding | {Kind.ARTIFACT},
    new_chunks=SegmentChunks,
)
DECODE_TO_ZEROS: Final = DECODE._replace(new_chunks=partial(DecodingChunks, stops_on_zero_frame=True))
