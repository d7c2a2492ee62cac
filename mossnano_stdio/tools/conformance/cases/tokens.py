"""TOKENS: whole frames in, their PCM out, and payloads that are none."""

from __future__ import annotations

import numpy as np

from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tools.conformance.talk import END, Talk, describe, expect, expect_equal_pcm, not_applicable


def lone_frame_is_answered(talk: Talk) -> None:
    """With the ramp, a lone frame gets its PCM at once, while the input stays open; but the first ones wait for as many
    as HANDSHAKE has as first_chunk_frames."""
    talk.use_ramp()
    *waiting, last = talk.frames(talk.first_frames)
    for frame in waiting:
        talk.say(talk.tokens(frame[np.newaxis]))
        talk.expect_nothing("the first frames wait for each other")
    talk.say(talk.tokens(last[np.newaxis]))
    talk.expect_audio(talk.first_frames * talk.format.frame_samples, "the first chunk, and no more input")
    for frame in talk.frames(2, seed=1):
        talk.say(talk.tokens(frame[np.newaxis]))
        talk.expect_audio(talk.format.frame_samples, "one frame, and no more input")


def come_back_as_whole_frames(talk: Talk) -> None:
    """AUDIO is never empty, holds whole samples, and is at most one chunk and max_audio_bytes long."""
    talk.say(talk.tokens(talk.frames(20)), END)
    most = min(talk.handshake["max_audio_bytes"], talk.handshake["max_chunk_frames"] * talk.format.frame_pcm_bytes)
    total_bytes = 0
    while (message := talk.next("AUDIO or END")).kind == Kind.AUDIO:
        size = len(message.payload)
        expect(0 < size <= most and size % talk.sample_bytes == 0, f"AUDIO of whole samples, 1 to {most} bytes", size)
        total_bytes += size
    expect(total_bytes == 20 * talk.format.frame_pcm_bytes, "20 frames of AUDIO", f"{total_bytes} bytes")


def ramp_up(talk: Talk) -> None:
    """With the ramp, chunks of what waits have 1 frame, then 2 or more, then twice as many, up to max_chunk_frames; the
    first one has at least first_chunk_frames."""
    now = talk.settle(chunk_frames=None)
    after_first = 10
    count = talk.first_frames + after_first
    talk.say(talk.tokens(talk.frames(count)), END)
    left, chunk = count, talk.first_frames
    while left:
        chunk = chunk if left == count else min(chunk, now["max_chunk_frames"], left)
        message = talk.next(f"AUDIO of a chunk of {chunk} frames")
        if left == after_first:  # the second chunk, which of large weights may be any longer one
            chunk = max(chunk, min(len(message.payload) // talk.format.frame_pcm_bytes, now["max_chunk_frames"]))
        chunk_bytes = chunk * talk.format.frame_pcm_bytes
        first_bytes = min(chunk_bytes, now["max_audio_bytes"])
        expect(len(message.payload) == first_bytes, f"AUDIO of a chunk of {chunk} frames", describe(message))
        talk.expect_audio((chunk_bytes - first_bytes) // talk.sample_bytes, f"the rest of a chunk of {chunk} frames")
        left, chunk = left - chunk, 2 if left == count else 2 * chunk
    talk.expect_end(f"END of {count} frames", samples=count * talk.format.frame_samples)


def may_be_split_over_messages(talk: Talk) -> None:
    """With equal chunks, frames sound the same in one message or in many."""
    talk.settle(chunk_frames=2)
    frames = talk.frames(5)
    pcm = talk.decode(frames)
    pieces = [frames[:1], frames[1:1], frames[1:4], frames[4:]]
    talk.say(*map(talk.tokens, pieces), END)
    expect_equal_pcm(talk.expect_stream(5), pcm, "frames in four messages as in one")


def are_what_is_heard(talk: Talk) -> None:
    """Other codes sound different, in every quantizer that is tried."""
    frames = talk.frames(2)
    pcm = talk.decode(frames)
    other = talk.frames(2, seed=1)
    expect(talk.decode(other) != pcm, "other PCM for other codes", "the same PCM")


def that_are_empty_open_a_stream(talk: Talk) -> None:
    """An empty TOKENS is legal: it opens a stream of no frames."""
    talk.say(talk.tokens(talk.frames(0)), END)
    pcm, _ = talk.expect_end("END of a stream of no frames", samples=0, cancelled=False)
    expect(pcm == b"", "no AUDIO", f"{len(pcm)} bytes")


def with_part_of_a_frame_are_bad(talk: Talk) -> None:
    """A partial frame is a bad_tokens."""
    if talk.format.frame_bytes == 1:
        not_applicable("a frame is one byte")
    _expect_bad(talk, talk.tokens(talk.frames(2)).payload + b"\x00")


def with_a_code_out_of_range_are_bad(talk: Talk) -> None:
    """A code that is not smaller than codebook_size is a bad_tokens."""
    weights = talk.format
    if weights.codebook_size == 1 << weights.bits_per_code:
        not_applicable(f"codes of {weights.bits_per_code} bits are all below {weights.codebook_size}")
    number = weights.codebook_size << (weights.bits_per_code * (weights.quantizers - 1))  # the last code alone
    _expect_bad(talk, number.to_bytes(weights.frame_bytes, "little"))


def with_bits_in_the_padding_are_bad(talk: Talk) -> None:
    """A padding bit that is not zero is a bad_tokens."""
    if talk.format.quantizers * talk.format.bits_per_code % 8 == 0:
        not_applicable("a frame has no padding")
    _expect_bad(talk, bytes(talk.format.frame_bytes - 1) + b"\x80")


def after_bad_ones_are_skipped(talk: Talk) -> None:
    """After a bad payload the rest of its stream is skipped until END, which is answered; the next stream is right."""
    frames = talk.frames(2)
    pcm = talk.decode(frames)
    talk.say(talk.bad_tokens(), talk.tokens(frames), talk.tokens(frames), END)
    talk.expect_error("bad_tokens")
    skipped, _ = talk.expect_end("END of the bad stream", cancelled=False, samples=0)
    expect(skipped == b"", "no AUDIO after the ERROR", f"{len(skipped)} bytes")
    expect_equal_pcm(talk.decode(frames), pcm, "the stream after a bad one as in a fresh process")


def before_bad_ones_are_heard(talk: Talk) -> None:
    """What was decoded before a bad payload counts, and the ERROR and the END name the stream."""
    talk.use_ramp()
    samples = max(2, talk.first_frames) * talk.format.frame_samples
    talk.say(talk.tokens(talk.frames(max(2, talk.first_frames))))
    talk.expect_audio(samples, "the frames before")
    talk.say(talk.bad_tokens(), END)
    error = talk.expect_error("bad_tokens")
    _, end = talk.expect_end("END of the bad stream", samples=samples, errors=1)
    expect(error.get("stream") == end.get("stream"), f"an ERROR of stream {end.get('stream')}", error)


def inside_an_artifact_are_out_of_place(talk: Talk) -> None:
    """TOKENS inside an unfinished artifact are out_of_place, and the artifact goes on."""
    frames = talk.frames(3)
    pcm = talk.decode(frames)
    data = talk.artifact(frames)
    talk.say(Message(Kind.ARTIFACT, data[:20]), talk.tokens(frames), Message(Kind.ARTIFACT, data[20:]))
    expect_equal_pcm(talk.expect_stream(3, error="out_of_place"), pcm, "an artifact with TOKENS in it as one without")


def _expect_bad(talk: Talk, payload: bytes) -> None:
    talk.say(Message(Kind.TOKENS, payload))
    talk.expect_error("bad_tokens")
    talk.say(END)
    talk.expect_end("END of the bad stream", samples=0, errors=1, cancelled=False)
    talk.decode(talk.frames(1))
