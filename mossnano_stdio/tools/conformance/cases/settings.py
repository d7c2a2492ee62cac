"""SETTINGS: between streams, all or nothing."""

from __future__ import annotations

from typing import Any, Final

from mossnano_stdio.protocol import Kind, Message, json_message
from mossnano_stdio.tokens import frame_bytes
from mossnano_stdio.tools.conformance.talk import END, Talk, describe, expect, fields_of, not_applicable

_MOST_CHUNK_FRAMES: Final = 1000


def fix_the_chunk(talk: Talk) -> None:
    """With chunk_frames, frames wait until so many are there, or END; PING does not hurry them."""
    chunk = max(3, talk.first_frames)
    settled = talk.settle(chunk_frames=chunk)
    expect(settled.get("chunk_frames") == chunk, f"HANDSHAKE with chunk_frames {chunk}", settled)
    expect(settled.get("max_chunk_frames") == chunk, f"HANDSHAKE with max_chunk_frames {chunk}", settled)
    count = 2 * chunk + 1
    frames = talk.frames(count)
    talk.say(talk.tokens(frames[: chunk - 1]))
    talk.expect_nothing("frames wait for one more")
    talk.say(talk.tokens(frames[chunk - 1 :]))
    talk.expect_audio(2 * chunk * talk.format.frame_samples, f"two chunks of {chunk} frames")
    talk.expect_nothing("the last frame waits")
    talk.say(END)
    talk.expect_audio(talk.format.frame_samples, "what is left at END")
    talk.expect_end(f"END of {count} frames", samples=count * talk.format.frame_samples)


def give_the_ramp_back(talk: Talk) -> None:
    """With chunk_frames null, frames are decoded as they come."""
    talk.settle(chunk_frames=4)
    settled = talk.settle(chunk_frames=None)
    expect(settled.get("chunk_frames", 0) is None, "HANDSHAKE with chunk_frames null", settled)
    talk.say(talk.tokens(talk.frames(talk.first_frames)))
    talk.expect_audio(talk.first_frames * talk.format.frame_samples, "the first chunk, and no more input")


def stay_for_later_streams(talk: Talk) -> None:
    """What is set holds for every stream to come, also after a CANCEL."""
    talk.settle(chunk_frames=2)
    for _ in range(2):
        talk.say(talk.tokens(talk.frames(1)))
        talk.expect_nothing("one frame waits for a second")
        talk.say(Message(Kind.CANCEL))
        talk.expect_end("END of CANCEL", cancelled=True, samples=0)


def without_keys_change_nothing(talk: Talk) -> None:
    """SETTINGS without keys is answered by a HANDSHAKE that says what holds."""
    _expect_unchanged(talk)
    settled = talk.settle(chunk_frames=4)
    again = talk.settle()
    expect(again == settled, "the HANDSHAKE as it was with chunk_frames 4", again)


def with_bad_values_change_nothing(talk: Talk) -> None:
    """A value that is not allowed is a bad_settings, and nothing changes, not even the good value beside it."""
    most = talk.format.quantizers
    wrong: object
    for wrong in (0, -1, _MOST_CHUNK_FRAMES + 1, 1.5, "4", True, [4], {}):
        _expect_refused(talk, {"chunk_frames": wrong})
    for wrong in (0, -1, most + 1, 1.5, "1", True, None):
        _expect_refused(talk, {"quantizers": wrong})
        _expect_refused(talk, {"chunk_frames": 5, "quantizers": wrong})


def with_unknown_keys_change_nothing(talk: Talk) -> None:
    """A key that is not known is a bad_settings, and nothing changes."""
    _expect_refused(talk, {"volume": 11})
    _expect_refused(talk, {"chunk_frames": 5, "volume": 11})


def without_json_are_a_bad_payload(talk: Talk) -> None:
    """SETTINGS that is no JSON object is a bad_payload, and nothing changes."""
    for payload in (b"", b"{", b"3", b"\xff"):
        talk.say(Message(Kind.SETTINGS, payload))
        talk.expect_error("bad_payload")
    _expect_unchanged(talk)


def choose_the_quantizers(talk: Talk) -> None:
    """Fewer quantizers make smaller frames, where the graph can decode them; else they are a bad_settings."""
    fewer = talk.format.quantizers - 1
    if fewer == 0:
        not_applicable("there is only one quantizer")
    talk.say(json_message(Kind.SETTINGS, {"quantizers": fewer}))
    message = talk.next("HANDSHAKE, or ERROR bad_settings")
    fields = fields_of(message)
    if message.kind == Kind.ERROR:
        expect(fields.get("code") == "bad_settings", "ERROR bad_settings", describe(message))
        _expect_unchanged(talk)
        return
    now_bytes = frame_bytes(fewer, talk.format.codebook_size)
    for name, value in {"quantizers": fewer, "frame_bytes": now_bytes}.items():
        expect(fields.get(name) == value, f"HANDSHAKE with {name} {value}", describe(message))
    talk.say(talk.tokens(talk.frames(3)[:, :fewer]), END)
    talk.expect_stream(3)
    talk.settle(quantizers=fewer + 1)
    talk.decode(talk.frames(3))


def inside_a_stream_are_out_of_place(talk: Talk) -> None:
    """SETTINGS inside a token stream, an artifact or a bad stream is out_of_place, and the stream goes on."""
    message = json_message(Kind.SETTINGS, {"chunk_frames": 5})
    talk.expect_out_of_place(message, "SETTINGS")
    _expect_unchanged(talk)


def _expect_refused(talk: Talk, settings: dict[str, Any]) -> None:
    talk.say(json_message(Kind.SETTINGS, settings))
    talk.expect_error("bad_settings")
    _expect_unchanged(talk)


def _expect_unchanged(talk: Talk) -> None:
    settled = talk.settle()
    expect(settled == talk.handshake, "settings as they were", settled)
