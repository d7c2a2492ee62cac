"""The decoder's side: tokens and artifacts in, audio out.

Rules of this room:

- `DECODING` is the whole protocol: for every state and every inbound kind, the one action that is taken. It is
  printed in protocol.md, and a test compares the two.
- Each AUDIO message is at most one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from mossnano_stdio.chunks import SCALES_NEEDED, Chunks, Decoder, DecodingChunks, SegmentChunks
from mossnano_stdio.errors import ArtifactError, MossnanoError, SettingsError, TokenError
from mossnano_stdio.protocol.connection import Action, Connection, Direction
from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.protocol.stream import Answers, Owner, State, Stream
from mossnano_stdio.tokens import MAGIC, ArtifactReader, unpack_frames
from mossnano_stdio.tokens.ecdc import ECDC_MAGIC, EcdcReader


class DecodingStream(Stream):
    """Tokens, or an artifact, on their way to sound."""

    chunks: DecodingChunks

    def __init__(self, number: int, state: State, chunks: Chunks[Any], opened_seconds: float) -> None:
        super().__init__(number, state, chunks, opened_seconds)
        self.artifact: ArtifactReader | EcdcReader = ArtifactReader()  # until its first byte says what it is

    def step(self, owner: Owner) -> Answers:
        chunk = self.chunks.step()
        if chunk is None:
            return
        self.frames += chunk.frames
        self.samples += len(chunk.pcm) // owner.format.sample_bytes
        if chunk.error is not None:
            yield owner.error(chunk.error)
        most_bytes = owner.max_audio_bytes
        for start in range(0, len(chunk.pcm), most_bytes):
            yield Message(Kind.AUDIO, chunk.pcm[start : start + most_bytes])

    def finish_input(self) -> None:
        if self.state is State.TOKENS:  # an artifact's chunks were finished when its last byte came
            self.chunks.finish()

    def forget_input(self) -> None:
        self.artifact = ArtifactReader()

    def maybe_cut(self) -> MossnanoError | None:
        return self.artifact_cut() if self.state is State.ARTIFACT else None

    def artifact_cut(self) -> ArtifactError:
        if isinstance(self.artifact, EcdcReader):
            try:
                self.artifact.finish()
            except ArtifactError as error:
                return ArtifactError(f"{error}: send all of it, then no END")
        assert isinstance(self.artifact, ArtifactReader)
        return ArtifactError(
            f"the artifact ended {self.artifact.missing_bytes} bytes before its end: send all of it, then no END"
        )


def open_tokens(connection: Connection, stream: None, message: Message) -> Answers:
    opened = connection.open_stream(State.TOKENS)
    if connection.maybe_misfit is not None:
        yield from connection.fail(
            opened, TokenError(f"{connection.maybe_misfit}; send one that fits, then the tokens")
        )
        return
    yield from push_tokens(connection, opened, message)


def push_tokens(connection: Connection, stream: Stream, message: Message) -> Answers:
    if stream.is_dropped or stream.chunks.is_complete:  # after a frame of zeros, whatever came is not looked at
        return
    try:
        codes = unpack_frames(message.payload, connection.quantizers, connection.format.codebook_size)
    except TokenError as error:
        yield from connection.compute_due()  # what came before it is whole
        yield from connection.fail(stream, error)
    else:
        stream.chunks.push(codes)


def refuse_tokens(connection: Connection, stream: None, message: Message) -> Answers:
    """Frames of codes, for a codec that decodes segments with their scales."""
    yield from connection.fail(connection.open_stream(State.TOKENS), TokenError(SCALES_NEEDED))


def open_artifact(connection: Connection, stream: None, message: Message) -> Answers:
    yield from grow_artifact(connection, connection.open_stream(State.ARTIFACT), message)


def grow_artifact(connection: Connection, stream: Any, message: Message) -> Answers:
    if (
        isinstance(stream.artifact, ArtifactReader)
        and stream.artifact.is_empty
        and message.payload[:1] == ECDC_MAGIC[:1]
    ):
        stream.artifact = EcdcReader()
    if isinstance(stream.artifact, EcdcReader):
        yield from _grow_ecdc(connection, stream, stream.artifact, message)
        return
    try:
        missing_bytes = stream.artifact.push(message.payload)
        if stream.artifact.maybe_header is not None:  # what does not fit is refused before its body takes memory
            stream.artifact.maybe_header.check_fits(connection.format, connection.codec.decodes_prefix)
        if missing_bytes:
            return
        artifact = stream.artifact.artifact()
        if not stream.is_dropped:
            stream.chunks.push(artifact.codes)
    except ArtifactError as error:
        yield from connection.fail(stream, error)
        return
    if not stream.is_dropped:
        stream.chunks.finish(artifact.original_samples)
        yield from connection.compute_due()
    yield from connection.finish(stream, Message(Kind.END))


def _grow_ecdc(connection: Connection, stream: DecodingStream, reader: EcdcReader, message: Message) -> Answers:
    """Each segment goes through the codec as soon as it is there."""
    try:
        for segment in reader.push(message.payload):
            if reader.maybe_header is not None:
                reader.maybe_header.check_fits(connection.format)
            if not stream.is_dropped:
                stream.chunks.push_segment(segment)
        if reader.maybe_header is not None:  # what does not fit is refused before its body takes memory
            reader.maybe_header.check_fits(connection.format)
        if not reader.is_complete:
            return
    except ArtifactError as error:
        yield from connection.compute_due()  # what came before it is whole
        yield from connection.fail(stream, error)
        return
    if not stream.is_dropped:
        stream.chunks.finish(reader.finish().original_samples)
        yield from connection.compute_due()
    yield from connection.finish(stream, Message(Kind.END))


def cut_artifact(connection: Connection, stream: DecodingStream, message: Message) -> Answers:
    stream.state = State.SKIP
    yield connection.error(stream.artifact_cut())
    yield from connection.finish(stream, message)


def skip_artifact(connection: Connection, stream: DecodingStream, message: Message) -> Answers:
    """The rest of a bad stream, unless it begins like a new artifact."""
    if message.payload.startswith((MAGIC, ECDC_MAGIC)):
        yield from connection.finish(stream, Message(Kind.END))
        yield from open_artifact(connection, None, message)


def check_quantizers(decoder: Decoder, quantizers: int) -> None:
    most = decoder.format.quantizers
    if quantizers < most and not decoder.decodes_prefix:
        raise SettingsError(
            f"quantizers is {quantizers}, but this graph decodes all {most} only: "
            "`mossnano build --from-bundle` makes one that decodes any number of them"
        )


DECODING: Final[Mapping[tuple[State, Kind], Action]] = {
    (State.IDLE, Kind.HANDSHAKE): Connection.compare_formats,
    (State.IDLE, Kind.ARTIFACT): open_artifact,
    (State.IDLE, Kind.TOKENS): open_tokens,
    (State.IDLE, Kind.ERROR): Connection.report_peer_error,
    (State.IDLE, Kind.PING): Connection.echo,
    (State.IDLE, Kind.END): Connection.refuse_no_stream,
    (State.IDLE, Kind.CANCEL): Connection.cancel,
    (State.IDLE, Kind.SETTINGS): Connection.settle,
    (State.TOKENS, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.TOKENS, Kind.ARTIFACT): Connection.refuse_out_of_place,
    (State.TOKENS, Kind.TOKENS): push_tokens,
    (State.TOKENS, Kind.ERROR): Connection.report_peer_error,
    (State.TOKENS, Kind.PING): Connection.echo,
    (State.TOKENS, Kind.END): Connection.finish,
    (State.TOKENS, Kind.CANCEL): Connection.cancel,
    (State.TOKENS, Kind.SETTINGS): Connection.refuse_out_of_place,
    (State.ARTIFACT, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.ARTIFACT, Kind.ARTIFACT): grow_artifact,
    (State.ARTIFACT, Kind.TOKENS): Connection.refuse_out_of_place,
    (State.ARTIFACT, Kind.ERROR): Connection.report_peer_error,
    (State.ARTIFACT, Kind.PING): Connection.echo,
    (State.ARTIFACT, Kind.END): cut_artifact,
    (State.ARTIFACT, Kind.CANCEL): Connection.cancel,
    (State.ARTIFACT, Kind.SETTINGS): Connection.refuse_out_of_place,
    (State.SKIP, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.SKIP, Kind.ARTIFACT): skip_artifact,
    (State.SKIP, Kind.TOKENS): Connection.ignore,
    (State.SKIP, Kind.ERROR): Connection.report_peer_error,
    (State.SKIP, Kind.PING): Connection.echo,
    (State.SKIP, Kind.END): Connection.finish,
    (State.SKIP, Kind.CANCEL): Connection.cancel,
    (State.SKIP, Kind.SETTINGS): Connection.refuse_out_of_place,
}

DECODE: Final = Direction("decode", "TOKENS or ARTIFACT", DECODING, DecodingStream, DecodingChunks, check_quantizers)
DECODE_SEGMENTS: Final = DECODE._replace(
    opened_by="ARTIFACT",
    transitions={**DECODING, (State.IDLE, Kind.TOKENS): refuse_tokens},
    new_chunks=SegmentChunks,
)
DECODE_TO_ZEROS: Final = DECODE._replace(new_chunks=partial(DecodingChunks, stops_on_zero_frame=True))
