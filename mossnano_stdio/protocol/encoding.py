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
from mossnano_stdio.protocol.stream import Answers, Owner, State, Stream
from mossnano_stdio.tokens import pack_frames


class EncodingStream(Stream):
    """Sound on its way to tokens."""

    chunks: EncodingChunks

    def __init__(self, number: int, state: State, chunks: Chunks[Any], opened_seconds: float) -> None:
        super().__init__(number, state, chunks, opened_seconds)
        self.partial_sample = b""

    def step(self, owner: Owner) -> Answers:
        codes = self.chunks.step()
        if codes is not None:
            self.frames += len(codes)
            self.samples += len(codes) * owner.format.frame_samples
            packed = pack_frames(codes[:, : owner.quantizers], owner.format.codebook_size)
            yield Message(Kind.TOKENS, packed)

    def finish_input(self) -> None:
        self.chunks.finish()

    def forget_input(self) -> None:
        self.partial_sample = b""

    def maybe_rest(self) -> MossnanoError | None:
        if not self.partial_sample:
            return None
        sample_bytes = self.chunks.encoder.format.sample_bytes
        return AudioError(
            f"the audio ended {len(self.partial_sample)} bytes into a sample of {sample_bytes}: "
            "send whole samples; the part is dropped"
        )

    def before_end(self) -> Answers:
        if not self.frames:
            yield Message(Kind.TOKENS, b"")

    def end_extras(self) -> dict[str, Any]:
        return {"original_samples": self.chunks.original_samples}


def open_audio(connection: Connection, stream: None, message: Message) -> Answers:
    opened = connection.open_stream(State.AUDIO)
    if connection.maybe_misfit is not None:
        yield from connection.fail(opened, AudioError(f"{connection.maybe_misfit}; send one that fits, then the audio"))
        return
    yield from push_audio(connection, opened, message)


def push_audio(connection: Connection, stream: Any, message: Message) -> Answers:
    if not stream.is_dropped:
        pcm = stream.partial_sample + message.payload
        whole_bytes = len(pcm) // connection.format.sample_bytes * connection.format.sample_bytes
        stream.partial_sample = pcm[whole_bytes:]
        stream.chunks.push(from_pcm16(pcm[:whole_bytes], connection.format.channels))
    yield from ()


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

ENCODE: Final = Direction("encode", "AUDIO", ENCODING, EncodingStream, EncodingChunks, check_quantizers)
