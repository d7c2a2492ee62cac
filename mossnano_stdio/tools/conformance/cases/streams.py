"""Streams: opened, numbered, ended and counted; one leaves no trace in the next."""

from __future__ import annotations

from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tools.conformance.talk import END, Talk, expect, expect_equal_pcm


def end_counts_what_was_sent(talk: Talk) -> None:
    """END says the frames that were decoded, the samples that were sent, and that it was not cancelled."""
    samples = 5 * talk.format.frame_samples
    talk.say(talk.tokens(talk.frames(5)), END)
    pcm, _ = talk.expect_end("END of 5 frames", frames=5, samples=samples, cancelled=False, errors=0)
    talk.expect_samples(pcm, samples, "END of 5 frames")


def are_numbered_from_0(talk: Talk) -> None:
    """Streams are numbered from 0 as they open: full and empty ones, artifacts, and bad ones."""
    streams = [
        [talk.tokens(talk.frames(2)), END],
        [Message(Kind.TOKENS), END],
        [Message(Kind.ARTIFACT, talk.artifact(talk.frames(2)))],
        [Message(Kind.ARTIFACT, b"no artifact"), END],
        [talk.tokens(talk.frames(1)), END],
    ]
    for number, messages in enumerate(streams):
        talk.say(*messages)
        if number == 3:
            talk.expect_error("bad_artifact")
        talk.expect_end(f"END of stream {number}", stream=number, next_stream=number + 1)


def leave_no_trace_in_the_next(talk: Talk) -> None:
    """A stream sounds the same, bit by bit, whatever came before it."""
    frames = talk.frames(6)
    pcm = talk.decode(frames)
    talk.decode(talk.frames(9, seed=1))
    expect_equal_pcm(talk.decode(frames), pcm, "the third stream as the first, which has the same codes")


def may_be_sent_ahead(talk: Talk) -> None:
    """Streams that are sent ahead are decoded one after the other, each with its END."""
    many = [talk.frames(count, seed=count) for count in (3, 1, 2)]
    apart = [talk.decode(frames) for frames in many]
    talk.say(*(message for frames in many for message in (talk.tokens(frames), END)))
    for frames, pcm in zip(many, apart, strict=True):
        expect_equal_pcm(talk.expect_stream(len(frames)), pcm, "a stream sent ahead as one sent alone")


def end_without_one_is_refused(talk: Talk) -> None:
    """END while no stream is open is a no_stream, and nothing else."""
    for _ in range(2):
        talk.say(END)
        fields = talk.expect_error("no_stream")
        expect(fields.get("stream") is None, "an ERROR that names no stream", fields)
    talk.expect_nothing("a refused END is answered by one ERROR")
    talk.decode(talk.frames(1))
    talk.say(END)
    talk.expect_error("no_stream")


def end_may_hold_json(talk: Talk) -> None:
    """The payload of END is ignored."""
    frames = talk.frames(2)
    for payload in (b'{"frames": 7, "cancelled": true}', b"no JSON"):
        talk.say(talk.tokens(frames), Message(Kind.END, payload))
        talk.expect_stream(2)
