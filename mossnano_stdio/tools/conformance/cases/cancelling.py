"""CANCEL: barge-in, whatever is open, waits or is being written."""

from __future__ import annotations

import time
from typing import Any, Final

from mossnano_stdio.protocol import Kind, Message, json_message
from mossnano_stdio.tools.conformance.peer import DepartureError
from mossnano_stdio.tools.conformance.talk import END, Talk, describe, expect, expect_equal_pcm, fields_of

_NOTICED_SECONDS: Final = 0.3  # a CANCEL that waits so long was noticed, on any machine


def between_streams(talk: Talk) -> None:
    """CANCEL while nothing is open is answered by an END with cancelled true and stream null."""
    talk.say(Message(Kind.CANCEL, b"nothing"))
    talk.expect_end("END of CANCEL", cancelled=True, stream=None, samples=0, echo="nothing")
    talk.decode(talk.frames(1))


def echoes_its_payload(talk: Talk) -> None:
    """The END that answers CANCEL holds its payload as text."""
    for text in ("", "barge", 'line 3, "naïve" \N{SPEAKER}'):
        talk.say(Message(Kind.CANCEL, text.encode()))
        talk.expect_end("END of CANCEL", cancelled=True, echo=text)


def is_answered_each_time(talk: Talk) -> None:
    """Every CANCEL gets one END of its own."""
    talk.say(talk.tokens(talk.frames(2)), *(Message(Kind.CANCEL, b"%d" % number) for number in range(3)))
    for number in range(3):
        _expect_cancelled(talk, str(number))
    talk.expect_nothing("every CANCEL was answered")


def drops_an_open_stream(talk: Talk) -> None:
    """CANCEL drops the open stream; the END names it, and the next stream is right, bit by bit."""
    talk.use_ramp()
    frames = talk.frames(6)
    pcm = talk.decode(frames)
    talk.say(talk.tokens(talk.frames(20, seed=1)))
    talk.expect_audio(talk.first_frames * talk.format.frame_samples, "the first chunk")
    talk.say(Message(Kind.CANCEL, b"now"), talk.tokens(frames), END)
    end = _expect_cancelled(talk, "now")
    expect(end.get("stream") == 1, "END with stream 1, the one that was dropped", end)
    expect_equal_pcm(talk.expect_stream(6), pcm, "the stream after CANCEL as in a fresh process")


def stops_the_sound(talk: Talk) -> None:
    """After CANCEL comes at most the rest of one chunk, and what the pipe held; that while nobody reads, too."""
    held_frames = _fill_the_output(talk)
    talk.say(Message(Kind.CANCEL, b"stop"))
    time.sleep(_NOTICED_SECONDS)
    pcm, end = talk.expect_end("END of CANCEL", cancelled=True, echo="stop")
    heard_frames = len(pcm) / talk.format.frame_pcm_bytes
    expect(heard_frames <= held_frames, f"at most {held_frames} frames of AUDIO until END", f"{heard_frames:g}")
    samples = len(pcm) // talk.sample_bytes
    expect(end.get("samples") == samples, f"END with samples {samples}, what was sent", end)
    talk.decode(talk.frames(1))


def overtakes_what_waits(talk: Talk) -> None:
    """CANCEL drops the open stream and those behind it: one END, with the number of the first of them."""
    frames = talk.frames(5)
    pcm = talk.decode(frames)
    held_frames = _fill_the_output(talk)
    talk.say(END)
    for seed in (1, 2):
        talk.say(talk.tokens(talk.frames(8, seed)), END)
    talk.say(Message(Kind.ARTIFACT, talk.artifact(frames)), talk.tokens(frames), Message(Kind.CANCEL, b"all"))
    time.sleep(_NOTICED_SECONDS)
    heard, end = talk.expect_end("END of CANCEL", cancelled=True, echo="all", stream=1)
    heard_frames = len(heard) / talk.format.frame_pcm_bytes
    expect(heard_frames <= held_frames, f"at most {held_frames} frames of AUDIO until END", f"{heard_frames:g}")
    talk.say(talk.tokens(frames), END)
    after, next_end = talk.expect_end("END of the next stream", cancelled=False)
    expect(next_end.get("stream") == end.get("next_stream"), f"the stream number {end.get('next_stream')}", next_end)
    expect_equal_pcm(after, pcm, "the stream after CANCEL as in a fresh process")


def keeps_pings_and_settings(talk: Talk) -> None:
    """PINGs before CANCEL are echoed and SETTINGS before it take effect, then comes the END."""
    _fill_the_output(talk)
    chunk = max(3, talk.first_frames)
    talk.say(Message(Kind.PING, b"1"), END, json_message(Kind.SETTINGS, {"chunk_frames": chunk}))
    talk.say(talk.tokens(talk.frames(8)), Message(Kind.PING, b"2"), Message(Kind.CANCEL, b"c"))
    time.sleep(_NOTICED_SECONDS)
    talk.audio_until(Kind.PING, "the echo of the PING before END")
    settled = talk.expect_handshake()
    expect(settled.get("chunk_frames") == chunk, f"HANDSHAKE with chunk_frames {chunk}", settled)
    talk.expect_ping(b"2", "the echo of the PING in a stream that is dropped")
    talk.expect_end("END of CANCEL", cancelled=True, echo="c")
    talk.say(talk.tokens(talk.frames(chunk)))
    talk.expect_audio(chunk * talk.format.frame_samples, f"one chunk of {chunk} frames")


def inside_an_artifact(talk: Talk) -> None:
    """CANCEL inside an unfinished artifact drops it; what follows is a new stream."""
    frames = talk.frames(2)
    data = talk.artifact(frames)
    talk.say(Message(Kind.ARTIFACT, data[:-1]), Message(Kind.CANCEL))
    talk.expect_end("END of CANCEL", cancelled=True, stream=0, samples=0)
    talk.decode(frames)


def inside_a_bad_stream(talk: Talk) -> None:
    """CANCEL inside a stream that went bad ends the skipping, without an END of that stream."""
    talk.say(talk.bad_tokens())
    talk.expect_error("bad_tokens")
    talk.say(Message(Kind.CANCEL))
    talk.expect_end("END of CANCEL", cancelled=True, stream=0, errors=1)
    talk.decode(talk.frames(2))


def is_not_answered_by_the_stream(talk: Talk) -> None:
    """A stream that a CANCEL drops gets no END of its own, and nothing of it comes after that of the CANCEL."""
    talk.say(talk.tokens(talk.frames(30)), Message(Kind.CANCEL, b"x"))
    _expect_cancelled(talk, "x")
    talk.expect_nothing("the stream was dropped")
    talk.say(END)
    talk.expect_error("no_stream")


def _expect_cancelled(talk: Talk, echo: str) -> dict[str, Any]:
    """AUDIO that was under way, then the END of a CANCEL."""
    expected = f"AUDIO, then END with cancelled true and echo {echo!r}"
    _, message = talk.audio_until(Kind.END, expected)
    end = fields_of(message)
    if end.get("cancelled") is not True or end.get("echo") != echo:
        raise DepartureError(expected, describe(message))
    return end


def _fill_the_output(talk: Talk) -> int:
    """Send more frames than the pipe and four chunks hold; how many of them can have been sent once that is full."""
    now = talk.settle(chunk_frames=None)
    frame_pcm_bytes = talk.format.frame_pcm_bytes
    chunk_frames = int(now["max_chunk_frames"])
    held_frames = -(-talk.peer.pipe_bytes // frame_pcm_bytes) + chunk_frames
    frames = talk.frames(held_frames + 4 * chunk_frames, seed=3)
    most = max(1, int(now["max_message_bytes"]) // talk.format.frame_bytes // 2)
    for at in range(0, len(frames), most):
        talk.say(talk.tokens(frames[at : at + most]))
    time.sleep(_NOTICED_SECONDS)
    return held_frames
