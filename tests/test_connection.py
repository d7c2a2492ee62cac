"""A connection asked when there is nothing to say: between chunks, and with a CANCEL behind what is due."""

from __future__ import annotations

from mossnano_stdio.chunks import Fixed, Ramp
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE
from mossnano_stdio.protocol.encoding import ENCODE
from mossnano_stdio.protocol.messages import Kind, Message
from tests.doubles import (
    SMALL,
    CountingDecoder,
    CountingEncoder,
    advance,
    artifact_bytes,
    expected_codes,
    handle,
    some_frames,
    tokens_payload,
)

AUDIO = Message(Kind.AUDIO, bytes(SMALL.frame_pcm_bytes * 3))
TOKENS = Message(Kind.TOKENS, tokens_payload(some_frames(3)))


def test_a_decoder_with_nothing_due_says_nothing() -> None:
    connection = Connection(DECODE, lambda: CountingDecoder(), Fixed(4), {})
    assert list(advance(connection)) == []
    assert list(handle(connection, TOKENS)) == []
    assert not connection.due_lanes()
    assert list(advance(connection)) == []
    assert connection.streams_opened == 1
    assert connection.format == SMALL


def test_an_encoder_with_nothing_due_says_nothing() -> None:
    connection = Connection(ENCODE, lambda: CountingEncoder(), Fixed(4), {})
    assert list(advance(connection)) == []
    assert list(handle(connection, AUDIO)) == []
    assert list(advance(connection)) == []
    assert connection.streams_opened == 1


def test_an_artifact_that_does_not_fit_is_refused_by_its_header() -> None:
    connection = Connection(DECODE, lambda: CountingDecoder(), Ramp(), {})
    data = artifact_bytes(some_frames(3), SMALL)
    other_rate = data[:8] + (44100).to_bytes(4, "little") + data[12:]
    assert list(handle(connection, Message(Kind.ARTIFACT, other_rate[:31]))) == []
    (error,) = handle(connection, Message(Kind.ARTIFACT, other_rate[31:32]))
    assert error.kind == Kind.ERROR
    assert b"sample_rate is 44100, these weights decode 48000 only" in error.payload
    assert list(handle(connection, Message(Kind.ARTIFACT, other_rate[32:]))) == []
    kinds = [answer.kind for answer in handle(connection, Message(Kind.ARTIFACT, data))]
    assert kinds[0] == kinds[-1] == Kind.END


def test_what_is_due_is_dropped_when_a_cancel_waits_behind_it() -> None:
    waiting: list[bool] = []
    connection = Connection(ENCODE, lambda: CountingEncoder(), Ramp(), {}, cancel_waiting=lambda: bool(waiting))
    assert list(handle(connection, AUDIO)) == []
    assert connection.due_lanes()
    waiting.append(True)
    assert list(advance(connection)) == []
    assert not connection.due_lanes()
    waiting.clear()
    nothing, end = handle(connection, Message(Kind.CANCEL))
    assert nothing == Message(Kind.TOKENS)
    assert end.kind == Kind.END
    answers = [*handle(connection, AUDIO), *handle(connection, Message(Kind.END))]
    tokens = b"".join(answer.payload for answer in answers if answer.kind == Kind.TOKENS)
    assert tokens == tokens_payload(expected_codes(AUDIO.payload))
