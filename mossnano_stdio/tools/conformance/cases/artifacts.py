"""ARTIFACT: a `.mossnano` in any pieces, trimmed, judged by its header."""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tokens import bits_per_code
from mossnano_stdio.tools.conformance.talk import END, Talk, expect, expect_equal_pcm, not_applicable

_HEADER_BYTES: Final = 32
_FIELDS_AT: Final = {
    "sample_rate": 8,
    "channels": 12,
    "original_samples": 16,
    "quantizers": 20,
    "frames": 24,
    "codebook_size": 28,
}


def sound_like_their_tokens(talk: Talk) -> None:
    """An artifact sounds like the same codes in TOKENS, and its END follows by itself."""
    frames = talk.frames(7)
    pcm = talk.decode(frames)
    talk.say(Message(Kind.ARTIFACT, talk.artifact(frames)))
    expect_equal_pcm(talk.expect_stream(7), pcm, "an artifact as the same codes in TOKENS")
    talk.expect_nothing("the artifact's END came")


def may_be_split_over_messages(talk: Talk) -> None:
    """An artifact may be split over any number of messages, anywhere, empty ones included."""
    frames = talk.frames(4)
    pcm = talk.decode(frames)
    data = talk.artifact(frames)
    talk.say(*(Message(Kind.ARTIFACT, data[at : at + 1]) for at in range(len(data))))
    expect_equal_pcm(talk.expect_stream(4), pcm, "an artifact in messages of one byte as in one message")
    pieces = [data[:5], b"", data[5:32], data[32:-1], data[-1:]]
    talk.say(*(Message(Kind.ARTIFACT, piece) for piece in pieces))
    expect_equal_pcm(talk.expect_stream(4), pcm, "an artifact in five messages as in one")


def are_trimmed(talk: Talk) -> None:
    """The PCM of an artifact ends with its original_samples."""
    frames = talk.frames(3)
    pcm = talk.decode(frames)
    room = 3 * talk.format.frame_samples
    for samples in (room - 1, talk.format.frame_samples + 1, 1, 0):
        talk.say(Message(Kind.ARTIFACT, talk.artifact(frames, samples)))
        expected = f"END of an artifact of {samples} samples"
        trimmed, _ = talk.expect_end(expected, samples=samples, cancelled=False)
        expect_equal_pcm(trimmed, pcm[: samples * talk.sample_bytes], f"the first {samples} samples of {room}")


def of_no_frames_end_at_once(talk: Talk) -> None:
    """An artifact of no frames is a stream of no samples."""
    talk.say(Message(Kind.ARTIFACT, talk.artifact(talk.frames(0))))
    talk.expect_end("END of an artifact of no frames", samples=0)


def with_bytes_after_their_end_are_bad(talk: Talk) -> None:
    """Bytes beyond the end that the header tells are a bad_artifact."""
    _expect_bad(talk, talk.artifact(talk.frames(2)) + b"\x00")


def that_do_not_begin_as_such_are_bad(talk: Talk) -> None:
    """What does not begin with MOSSNANO is a bad_artifact."""
    _expect_bad(talk, b"MOSSNANA" + talk.artifact(talk.frames(2))[8:])


def of_other_makes_are_bad(talk: Talk) -> None:
    """A rate, channels, quantizers or codebook_size that the weights do not have is a bad_artifact."""
    right = talk.artifact(talk.frames(2))
    for name, value in {
        "sample_rate": talk.format.sample_rate + 1,
        "channels": talk.format.channels + 1,
        "quantizers": talk.format.quantizers + 1,
        "codebook_size": talk.format.codebook_size + 1,
    }.items():
        wrong = _with_field(right, name, value)
        if name in ("quantizers", "codebook_size"):  # their bodies have another length
            wrong += bytes(_body_bytes(wrong) - len(wrong) + _HEADER_BYTES)
        _expect_bad(talk, wrong)


def longer_than_their_frames_are_bad(talk: Talk) -> None:
    """More original_samples than the frames hold are a bad_artifact."""
    right = talk.artifact(talk.frames(2))
    _expect_bad(talk, _with_field(right, "original_samples", 2 * talk.format.frame_samples + 1))


def with_a_code_out_of_range_are_bad(talk: Talk) -> None:
    """A code that is not smaller than codebook_size is a bad_artifact."""
    weights = talk.format
    if weights.codebook_size == 1 << weights.bits_per_code:
        not_applicable(f"codes of {weights.bits_per_code} bits are all below {weights.codebook_size}")
    right = talk.artifact(np.zeros((8, weights.quantizers), np.uint16))  # 8 frames leave no padding
    _expect_bad(talk, right[:-2] + b"\xff\xff")


def with_bits_in_the_padding_are_bad(talk: Talk) -> None:
    """A padding bit that is not zero is a bad_artifact."""
    row_bits = talk.format.quantizers * talk.format.bits_per_code
    if row_bits % 8 == 0:
        not_applicable("a body has no padding")
    right = talk.artifact(np.zeros((1, talk.format.quantizers), np.uint16))
    _expect_bad(talk, right[:-1] + bytes([right[-1] | 0x80]))


def that_are_cut_by_end_are_bad(talk: Talk) -> None:
    """END inside an unfinished artifact is a bad_artifact, and the END is answered."""
    frames = talk.frames(2)
    data = talk.artifact(frames)
    pcm = talk.decode(frames)
    for cut in (len(data) - 1, 20):
        talk.say(Message(Kind.ARTIFACT, data[:cut]), END)
        talk.expect_error("bad_artifact")
        heard, _ = talk.expect_end("END of the cut artifact", samples=0, errors=1)
        expect(heard == b"", "no AUDIO of a cut artifact", f"{len(heard)} bytes")
    expect_equal_pcm(talk.decode(frames), pcm, "the stream after a cut artifact as in a fresh process")


def after_bad_ones_are_new(talk: Talk) -> None:
    """The rest of a bad artifact is skipped; a message that begins with MOSSNANO is a new artifact."""
    frames = talk.frames(3)
    pcm = talk.decode(frames)
    data = talk.artifact(frames)
    talk.say(Message(Kind.ARTIFACT, b"no artifact"), Message(Kind.ARTIFACT, data[9:]), Message(Kind.ARTIFACT, data))
    error = talk.expect_error("bad_artifact")
    _, end = talk.expect_end("END of the bad artifact", samples=0, errors=1)
    expect(error.get("stream") == end.get("stream"), f"an ERROR of stream {end.get('stream')}", error)
    expect_equal_pcm(talk.expect_stream(3), pcm, "the artifact after a bad one")


def inside_a_token_stream_are_out_of_place(talk: Talk) -> None:
    """ARTIFACT inside a token stream is out_of_place, and the stream goes on."""
    chunk = max(2, talk.first_frames)
    talk.settle(chunk_frames=chunk)
    frames = talk.frames(2 * chunk)
    pcm = talk.decode(frames)
    artifact = Message(Kind.ARTIFACT, talk.artifact(frames))
    talk.say(talk.tokens(frames[: chunk + 1]), artifact, talk.tokens(frames[chunk + 1 :]), END)
    first = talk.expect_audio(chunk * talk.format.frame_samples, f"a chunk of {chunk} frames")
    talk.expect_error("out_of_place")
    rest, _ = talk.expect_end(f"END of {2 * chunk} frames", samples=2 * chunk * talk.format.frame_samples)
    expect_equal_pcm(first + rest, pcm, "a stream with an ARTIFACT in it as one without")


def _with_field(artifact: bytes, name: str, value: int) -> bytes:
    at = _FIELDS_AT[name]
    return artifact[:at] + struct.pack("<I", value) + artifact[at + 4 :]


def _body_bytes(artifact: bytes) -> int:
    """How long the codes are by the header."""
    quantizers, frames, codebook_size = struct.unpack_from("<3I", artifact, _FIELDS_AT["quantizers"])
    codes: int = quantizers * frames
    return (codes * bits_per_code(codebook_size) + 7) // 8


def _expect_bad(talk: Talk, artifact: bytes) -> None:
    talk.say(Message(Kind.ARTIFACT, artifact))
    talk.expect_error("bad_artifact")
    talk.say(END)
    heard, _ = talk.expect_end("END of the bad artifact", samples=0, errors=1, cancelled=False)
    expect(heard == b"", "no AUDIO of a bad artifact", f"{len(heard)} bytes")
    talk.decode(talk.frames(1))
