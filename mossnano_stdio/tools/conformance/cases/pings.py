"""PING: echoed in order, in every state."""

from __future__ import annotations

import numpy as np

from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tools.conformance.talk import END, Talk, describe, expect


def are_echoed(talk: Talk) -> None:
    """PING comes back with its payload, whatever that is."""
    for payload in (b"", b"hi", bytes(range(256)), b"\x00" * 500):
        talk.say(Message(Kind.PING, payload))
        talk.expect_ping(payload)


def come_after_the_audio_before_them(talk: Talk) -> None:
    """The echo comes after all audio that was due before the PING, and before any of later frames."""
    talk.use_ramp()
    early = max(5, talk.first_frames)
    before, after = np.split(talk.frames(early + 4), [early])
    talk.say(talk.tokens(before), Message(Kind.PING, b"1"), talk.tokens(after), Message(Kind.PING, b"2"), END)
    talk.expect_audio(early * talk.format.frame_samples, f"{early} frames before the first PING")
    talk.expect_ping(b"1")
    talk.expect_audio(4 * talk.format.frame_samples, "4 frames before the second PING")
    talk.expect_ping(b"2")
    talk.expect_end(f"END of {early + 4} frames")


def come_after_the_end_before_them(talk: Talk) -> None:
    """The echo of a PING that follows an END comes after the stream's last sample and its END."""
    talk.say(talk.tokens(talk.frames(6)), END, Message(Kind.PING, b"after"))
    talk.expect_stream(6)
    talk.expect_ping(b"after")


def are_echoed_in_every_state(talk: Talk) -> None:
    """PING is echoed in an open stream, in an unfinished artifact and in a stream that went bad."""
    data = talk.artifact(talk.frames(1))
    talk.say(talk.tokens(talk.frames(1)), Message(Kind.PING, b"tokens"), END)
    _, echo = talk.audio_until(Kind.PING, "the echo of a PING in a token stream")
    expect(echo.payload == b"tokens", "the echo of a PING in a token stream", describe(echo))
    talk.expect_end()
    talk.say(Message(Kind.ARTIFACT, data[:30]), Message(Kind.PING, b"artifact"), Message(Kind.ARTIFACT, data[30:]))
    talk.expect_ping(b"artifact")
    talk.expect_end()
    talk.say(talk.bad_tokens(), Message(Kind.PING, b"bad"), END)
    talk.expect_error("bad_tokens")
    talk.expect_ping(b"bad")
    talk.expect_end()
