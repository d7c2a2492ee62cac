"""ERROR: what it says, and what a peer's ERROR becomes."""

from __future__ import annotations

from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tools.conformance.talk import END, Talk, expect, expect_equal_pcm


def say_what_they_must(talk: Talk) -> None:
    """ERROR has a code, a message for people, the stream or null, and whether it is fatal."""
    talk.say(Message(0x77), talk.bad_tokens(), END)
    for code, stream in (("unknown_kind", None), ("bad_tokens", 0)):
        fields = talk.expect_error(code)
        text = fields.get("message")
        expect(isinstance(text, str) and text != "", "a message for people", fields)
        expect("stream" in fields and fields["stream"] == stream, f"an ERROR whose stream is {stream}", fields)


def of_peers_are_reported(talk: Talk) -> None:
    """A peer's ERROR comes back as peer_error, between streams and inside one, which goes on."""
    frames = talk.frames(2)
    pcm = talk.decode(frames)
    theirs = Message(Kind.ERROR, b'{"code":"theirs","message":"no more tape","stream":null,"fatal":true}')
    talk.say(theirs)
    talk.expect_error("peer_error")
    talk.say(Message(Kind.ERROR, b"no JSON \xff"))
    talk.expect_error("peer_error")
    talk.say(talk.tokens(frames), theirs, END)
    expect_equal_pcm(
        talk.expect_stream(2, error="peer_error"), pcm, "a stream with a peer's ERROR in it as one without"
    )
