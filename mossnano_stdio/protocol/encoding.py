"""The encoder's side: audio in, tokens out.

Rules of this room:

- `ENCODING` is the whole protocol of this direction, printed in protocol.md and compared by a test, as DECODING is.
- Audio may be cut anywhere, inside a sample too. What is left of a sample at the end of its stream is an error.
- An END says `original_samples`, how long the stream was before its last frame was filled up.
- A stream that was too short for a frame, or dropped before it gave one, gives an empty TOKENS before its END: to the
  decoder behind us, there is no stream without TOKENS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mossnano_stdio.chunks import Chunks, Encoder, EncodingChunks
from mossnano_stdio.errors import AudioError, MossnanoError
from mossnano_stdio.pcm import from_pcm16
from mossnano_stdio.protocol.connection import Action, Connection, Direction
from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.protocol.stream import Answers, Lane, Owner, State, Stream
from mossnano_stdio.tokens import CodecFormat, Codes, pack_frames


class EncodingStream(Stream):
    """Sound on its way to tokens."""

    chunks: EncodingChunks

    def __init__(self, number: int, lane: Lane, chunks: Chunks[Any], codec: CodecFormat) -> None:
        super().__init__(number, lane, chunks)
        self._codec = codec
        self.partial_sample = b""

    @property
    def samples_per_second(self) -> int:
        return self._codec.sample_rate

    @property
    def backlog_bytes(self) -> int:
        return (self.chunks.original_samples - self.samples) * self._codec.sample_bytes + len(self.partial_sample)

    def fits(self, frames: int) -> bool:
        return True  # there is no credit in this direction

    def push(self, pcm: bytes) -> None:
        pcm = self.partial_sample + pcm
        whole_bytes = len(pcm) // self._codec.sample_bytes * self._codec.sample_bytes
        self.partial_sample = pcm[whole_bytes:]
        self.chunks.push(from_pcm16(pcm[:whole_bytes], self._codec.channels))

    def compute(self, most_frames: int) -> Codes:
        codes = self.chunks.step(most_frames)
        assert codes is not None, "a turn is of a stream that has a chunk due"
        return codes

    def deliver(self, owner: Owner, codes: Codes) -> Answers:
        self.frames += len(codes)
        self.samples += len(codes) * self._codec.frame_samples
        packed = pack_frames(codes[:, : self.settings.quantizers], self._codec.codebook_size)
        yield Message(Kind.TOKENS, packed)

    def complete_input(self) -> None:
        self.chunks.finish()

    def forget_input(self) -> None:
        self.partial_sample = b""

    def maybe_rest(self) -> MossnanoError | None:
        if not self.partial_sample:
            return None
        return AudioError(
            f"the audio ended {len(self.partial_sample)} bytes into a sample of {self._codec.sample_bytes}: "
            "send whole samples; the part is dropped"
        )

    def before_end(self) -> Answers:
        if not self.frames:
            yield Message(Kind.TOKENS, b"")

    def end_extras(self) -> dict[str, Any]:
        return {"original_samples": self.chunks.original_samples}


def open_audio(connection: Connection, lane: Lane, message: Message) -> Answers:
    connection.open_stream(lane)
    yield from begin_audio(connection, lane, message)


def begin_audio(connection: Connection, lane: Lane, message: Message) -> Answers:
    stream = _encoding(lane)
    stream.state = State.AUDIO
    if lane.maybe_misfit is not None:
        yield from connection.fail(lane, AudioError(f"{lane.maybe_misfit}; send one that fits, then the audio"))
        return
    yield from push_audio(connection, lane, message)


def push_audio(connection: Connection, lane: Lane, message: Message) -> Answers:
    stream = _encoding(lane)
    if not stream.is_dropped:
        stream.push(message.payload)
    yield from ()


def _encoding(lane: Lane) -> EncodingStream:
    assert isinstance(lane.stream, EncodingStream), "the table has this action only where such a stream is open"
    return lane.stream


def check_quantizers(encoder: Encoder, quantizers: int) -> None:
    """Any number can be had: the first codes of a frame do not depend on the later ones."""


ENCODING: Final[Mapping[tuple[State, Kind], Action]] = {
    (State.IDLE, Kind.HANDSHAKE): Connection.compare_formats,
    (State.IDLE, Kind.AUDIO): open_audio,
    (State.IDLE, Kind.ERROR): Connection.report_peer_error,
    (State.IDLE, Kind.PING): Connection.echo,
    (State.IDLE, Kind.END): Connection.refuse_no_stream,
    (State.IDLE, Kind.CANCEL): Connection.cancel,
    (State.IDLE, Kind.SETTINGS): Connection.settle,
    (State.OPEN, Kind.HANDSHAKE): Connection.compare_formats,
    (State.OPEN, Kind.AUDIO): begin_audio,
    (State.OPEN, Kind.ERROR): Connection.report_peer_error,
    (State.OPEN, Kind.PING): Connection.echo,
    (State.OPEN, Kind.END): Connection.finish,
    (State.OPEN, Kind.CANCEL): Connection.cancel,
    (State.OPEN, Kind.SETTINGS): Connection.settle_stream,
    (State.AUDIO, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.AUDIO, Kind.AUDIO): push_audio,
    (State.AUDIO, Kind.ERROR): Connection.report_peer_error,
    (State.AUDIO, Kind.PING): Connection.echo,
    (State.AUDIO, Kind.END): Connection.finish,
    (State.AUDIO, Kind.CANCEL): Connection.cancel,
    (State.AUDIO, Kind.SETTINGS): Connection.refuse_out_of_place,
    (State.SKIP, Kind.HANDSHAKE): Connection.refuse_out_of_place,
    (State.SKIP, Kind.AUDIO): Connection.ignore,
    (State.SKIP, Kind.ERROR): Connection.report_peer_error,
    (State.SKIP, Kind.PING): Connection.echo,
    (State.SKIP, Kind.END): Connection.finish,
    (State.SKIP, Kind.CANCEL): Connection.cancel,
    (State.SKIP, Kind.SETTINGS): Connection.refuse_out_of_place,
}

ENCODE: Final = Direction(
    "encode",
    "AUDIO",
    ENCODING,
    frozenset({Kind.AUDIO}),
    frozenset({Kind.AUDIO, Kind.SETTINGS}),
    True,
    EncodingStream,
    EncodingChunks,
    check_quantizers,
)
