"""HANDSHAKE: who we are, and whether the peer's numbers are ours."""

from __future__ import annotations

from typing import Final

from mossnano_stdio.protocol import Kind, Message, json_message
from mossnano_stdio.tokens import frame_bytes
from mossnano_stdio.tools.conformance.talk import END, Talk, expect

_TEXT: Final = ("name", "version", "direction", "codec", "weights", "graph", "precision", "provider", "sample_format")
_NUMBERS: Final = (
    "protocol", "threads", "sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes",
    "max_message_bytes", "max_audio_bytes", "max_chunk_frames",
)  # fmt: skip
_AGREED: Final = ("sample_rate", "channels", "frame_samples", "quantizers", "codebook_size")
_LARGEST_AUDIO_BYTES: Final = 1 << 20


def has_every_key(talk: Talk) -> None:
    """HANDSHAKE has every documented key with its documented type."""
    handshake = talk.handshake
    for name in _TEXT:
        value = handshake.get(name)
        expect(isinstance(value, str) and value != "", f"{name} with a text", value)
    for name in _NUMBERS:
        value = handshake.get(name)
        expect(type(value) is int and value > 0, f"{name} with a number above 0", value)
    expect(type(handshake.get("demo")) is bool, "demo with true or false", handshake.get("demo"))
    chunk_frames = handshake.get("chunk_frames", "none")
    expect(chunk_frames is None or type(chunk_frames) is int, "chunk_frames with a number or null", chunk_frames)


def agrees_with_itself(talk: Talk) -> None:
    """The values of HANDSHAKE are those of protocol 1, and follow from each other where they must."""
    handshake, weights = talk.handshake, talk.format
    for name, value in {
        "protocol": 1,
        "direction": "decode",
        "sample_format": "s16le",
        "frame_bytes": frame_bytes(weights.quantizers, weights.codebook_size),
    }.items():
        expect(handshake.get(name) == value, f"{name} {value}", handshake.get(name))
    most = min(handshake["max_chunk_frames"] * weights.frame_pcm_bytes, _LARGEST_AUDIO_BYTES)
    expect(handshake["max_audio_bytes"] <= most, f"max_audio_bytes of at most {most}", handshake["max_audio_bytes"])
    chunk_frames = handshake["chunk_frames"] or 1
    expect(chunk_frames <= handshake["max_chunk_frames"], "max_chunk_frames not below chunk_frames", chunk_frames)


def that_fits_is_taken_in_silence(talk: Talk) -> None:
    """A peer's HANDSHAKE with our numbers, or without any, gets no answer; keys of its own are ignored."""
    for fields in (talk.handshake, {}, {"sample_rate": talk.format.sample_rate, "of its own": [1, None]}):
        talk.say(json_message(Kind.HANDSHAKE, fields))
        talk.expect_nothing("the peer's HANDSHAKE fits")
    talk.decode(talk.frames(1))


def that_does_not_fit_closes_token_streams(talk: Talk) -> None:
    """A peer's HANDSHAKE with another number is a handshake_mismatch; token streams are refused until one fits."""
    for name in _AGREED:
        talk.say(json_message(Kind.HANDSHAKE, {name: talk.handshake[name] + 1}))
        talk.expect_error("handshake_mismatch")
    talk.say(talk.tokens(talk.frames(1)))
    talk.expect_error("handshake_mismatch", "bad_tokens")
    talk.say(END)
    pcm, _ = talk.expect_end("END of the refused stream", samples=0)
    expect(pcm == b"", "no AUDIO of a refused stream", f"{len(pcm)} bytes")
    talk.say(json_message(Kind.HANDSHAKE, {}))
    talk.expect_nothing("the peer's HANDSHAKE fits")
    talk.decode(talk.frames(1))


def without_json_is_a_bad_payload(talk: Talk) -> None:
    """A peer's HANDSHAKE that is no JSON object is a bad_payload, and nothing changes."""
    for payload in (b"", b"{", b"[1]", b"\xff\xfe"):
        talk.say(Message(Kind.HANDSHAKE, payload))
        talk.expect_error("bad_payload")
    talk.decode(talk.frames(1))


def inside_a_stream_is_out_of_place(talk: Talk) -> None:
    """HANDSHAKE inside a token stream, an artifact or a bad stream is out_of_place, and the stream goes on."""
    message = json_message(Kind.HANDSHAKE, {"sample_rate": talk.format.sample_rate + 1})
    talk.expect_out_of_place(message, "the HANDSHAKE")
