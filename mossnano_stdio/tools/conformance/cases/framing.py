"""Framing: messages in any pieces, of any allowed length, and what happens when framing is lost."""

from __future__ import annotations

import struct
import time
from typing import Final

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.protocol import MAX_MESSAGE_BYTES, Kind, Message, encode_message
from mossnano_stdio.tools.conformance.peer import DepartureError
from mossnano_stdio.tools.conformance.talk import END, Talk, expect_equal_pcm, not_applicable

_BETWEEN_BYTES_SECONDS: Final = 0.001  # so that the peer reads them one by one
_LARGEST_TRIED_BYTES: Final = 1 << 26
_LARGEST_LENGTH: Final = (1 << 32) - 1
_UNKNOWN_KINDS: Final = (0x77, 0x0A, Kind.AUDIO, Kind.TEXT, 0x80 + Kind.TEXT, 0xFF)


def byte_by_byte(talk: Talk) -> None:
    """Messages that come byte by byte are answered as if they had come whole."""
    frames = talk.frames(3)
    pcm = talk.decode(frames)
    for message in (talk.tokens(frames), END):
        for byte in encode_message(*message):
            talk.write(bytes([byte]))
            time.sleep(_BETWEEN_BYTES_SECONDS)
    expect_equal_pcm(talk.expect_stream(3), pcm, "a stream that came byte by byte as one that came whole")


def many_messages_at_once(talk: Talk) -> None:
    """Messages that come in one piece are all answered, in order."""
    talk.say(*(Message(Kind.PING, bytes([number])) for number in range(100)))
    for number in range(100):
        talk.expect_ping(bytes([number]), f"the echo of PING number {number}")


def answers_before_more_input_comes(talk: Talk) -> None:
    """A message is answered as soon as its last byte is there, though the next one has begun to come."""
    talk.write(encode_message(Kind.PING, b"now") + b"\x02")
    talk.expect_ping(b"now")
    talk.write(b"\x00\x00\x00" + bytes([Kind.PING]) + b"!")
    talk.expect_ping(b"!")


def longest_message(talk: Talk) -> None:
    """A message of max_message_bytes is taken; a PING whose echo would be above 1 MiB is a bad_payload."""
    longest = _max_message_bytes(talk)
    payload = bytes(index % 251 for index in range(longest - 1))
    talk.say(Message(Kind.PING, payload))
    if longest > MAX_MESSAGE_BYTES:
        talk.expect_error("bad_payload")
        talk.expect_nothing("a PING that is too long to be echoed")
    else:
        talk.expect_ping(payload, f"the echo of a PING of {longest} bytes, kind and payload")


def length_above_the_longest(talk: Talk) -> None:
    """A length above max_message_bytes is fatal as soon as it is there: framing_lost, exit status 76."""
    longest = _max_message_bytes(talk)
    talk.write(struct.pack("<I", longest + 1))
    talk.expect_error("framing_lost", fatal=True)
    talk.expect_exit(ExitStatus.FRAMING_LOST)


def length_zero(talk: Talk) -> None:
    """A length of 0 is fatal as soon as it is there: framing_lost, exit status 76."""
    talk.write(struct.pack("<I", 0))
    talk.expect_error("framing_lost", fatal=True)
    talk.expect_exit(ExitStatus.FRAMING_LOST)


def lost_after_a_stream(talk: Talk) -> None:
    """Messages before an impossible length are still answered, and the open stream gets its END after the ERROR."""
    talk.use_ramp()
    count = max(2, talk.first_frames)
    talk.write(encode_message(*talk.tokens(talk.frames(count))) + encode_message(Kind.PING, b"x") + b"\xff" * 4)
    talk.expect_audio(count * talk.format.frame_samples, "frames before framing was lost")
    talk.expect_ping(b"x", "the echo of the PING before framing was lost")
    talk.expect_error("framing_lost", fatal=True)
    talk.expect_end("END of the stream that was open", cancelled=False)
    talk.expect_exit(ExitStatus.FRAMING_LOST)


def unknown_kinds_between_streams(talk: Talk) -> None:
    """A kind that is not for the decoder is an unknown_kind, and is ignored."""
    for kind in _UNKNOWN_KINDS:
        talk.say(Message(kind, b"whatever"))
        talk.expect_error("unknown_kind")
    talk.decode(talk.frames(1))


def unknown_kinds_in_a_stream(talk: Talk) -> None:
    """An unknown kind inside a stream is an unknown_kind, and the stream goes on."""
    frames = talk.frames(4)
    pcm = talk.decode(frames)
    data = talk.artifact(frames)
    talk.say(talk.tokens(frames), Message(_UNKNOWN_KINDS[0]), END)
    expect_equal_pcm(talk.expect_stream(4, error="unknown_kind"), pcm, "a stream with an unknown kind in it")
    talk.say(Message(Kind.ARTIFACT, data[:9]), Message(_UNKNOWN_KINDS[0]), Message(Kind.ARTIFACT, data[9:]))
    expect_equal_pcm(talk.expect_stream(4, error="unknown_kind"), pcm, "an artifact with an unknown kind in it")


def _max_message_bytes(talk: Talk) -> int:
    longest = talk.handshake.get("max_message_bytes")
    if type(longest) is not int or not 1 <= longest <= _LARGEST_LENGTH:
        raise DepartureError("max_message_bytes in the HANDSHAKE", repr(longest))
    if longest > _LARGEST_TRIED_BYTES:
        not_applicable(f"max_message_bytes is {longest}, more than the {_LARGEST_TRIED_BYTES} that are tried")
    return longest
