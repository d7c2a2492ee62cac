"""The session, asked when there is nothing to say: between chunks, and with a CANCEL behind what is due."""

from __future__ import annotations

from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.recorder import Recorder
from mossnano_stdio.renderer import Renderer
from mossnano_stdio.schedule import Fixed, Ramp
from mossnano_stdio.session import DecodeSession, EncodeSession
from tests.doubles import SMALL, CountingDecoder, CountingEncoder, expected_codes, some_frames, tokens_payload

AUDIO = Message(Kind.AUDIO, bytes(SMALL.frame_pcm_bytes * 3))
TOKENS = Message(Kind.TOKENS, tokens_payload(some_frames(3)))


def test_a_decoder_with_nothing_due_says_nothing() -> None:
    session = DecodeSession(Renderer(CountingDecoder(), Fixed(4)), {})
    assert list(session.advance()) == []
    assert list(session.handle(TOKENS)) == []
    assert not session.is_due
    assert list(session.advance()) == []
    assert session.streams_opened == 1
    assert session.format == SMALL


def test_an_encoder_with_nothing_due_says_nothing() -> None:
    session = EncodeSession(Recorder(CountingEncoder(), Fixed(4)), {})
    assert list(session.advance()) == []
    assert list(session.handle(AUDIO)) == []
    assert list(session.advance()) == []
    assert session.streams_opened == 1


def test_what_is_due_is_dropped_when_a_cancel_waits_behind_it() -> None:
    waiting: list[bool] = []
    session = EncodeSession(Recorder(CountingEncoder(), Ramp()), {}, cancel_waiting=lambda: bool(waiting))
    assert list(session.handle(AUDIO)) == []
    assert session.is_due
    waiting.append(True)
    assert list(session.advance()) == []
    assert not session.is_due
    waiting.clear()
    (end,) = session.handle(Message(Kind.CANCEL))
    assert end.kind == Kind.END
    answers = [*session.handle(AUDIO), *session.handle(Message(Kind.END))]
    tokens = b"".join(answer.payload for answer in answers if answer.kind == Kind.TOKENS)
    assert tokens == tokens_payload(expected_codes(AUDIO.payload))
