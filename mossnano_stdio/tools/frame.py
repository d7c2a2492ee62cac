"""Make a framed stream of artifacts, ready for mossnano-stdio's stdin.

  --as artifact   each one as it is, in ARTIFACT messages: trimmed to its true length, its END follows by itself
  --as tokens     its codes in TOKENS messages, closed by END, as a live encoder would send them; before the first,
                  and wherever the numbers change, a HANDSHAKE says what they are, so that a decoder with other
                  weights refuses them instead of making noise

`mossnano frame a.mossnano b.mossnano | mossnano-stdio --output wav > both.wav`

With --number-from N the artifacts are the numbered streams N, N + 1 and so on, all at once: their messages take turns,
as those of several voices over one pipe do. A decoder takes as many as its HANDSHAKE says in max_streams.

`mossnano frame --number-from 1 a.mossnano b.mossnano | mossnano-stdio | mossnano play -`
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import BinaryIO

from mossnano_stdio.errors import ArtifactError, ExitStatus, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.protocol import (
    MAX_MESSAGE_BYTES,
    MAX_NUMBER,
    NUMBER_BYTES,
    VERSION,
    Kind,
    Message,
    encode_message,
    in_stream,
    json_message,
)
from mossnano_stdio.tokens import Artifact, build_artifact, frame_bytes, load_artifact, pack_frames

ARTIFACT_PIECE_BYTES = 1 << 16
LONGEST_PAYLOAD_BYTES = MAX_MESSAGE_BYTES - 1  # the kind counts too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifacts", nargs="+", metavar="PATH", help="artifacts, one stream each; `-` is stdin")
    parser.add_argument(
        "--as", dest="form", choices=("artifact", "tokens"), default="artifact", help="default: artifact"
    )
    parser.add_argument("--message-frames", type=int, metavar="N", help="frames in one TOKENS message (default: 1)")
    parser.add_argument(
        "--number-from", type=int, metavar="N", help="numbered streams that take turns, N the first one's number"
    )
    parser.add_argument("--output", "-o", default="-", metavar="OUT", help="where it goes (default: stdout)")


def run(args: argparse.Namespace) -> int:
    if args.message_frames is not None and args.form != "tokens":
        raise UsageError("--message-frames is for --as tokens: an artifact's frames lie apart in its file")
    if args.message_frames is not None and args.message_frames < 1:
        raise UsageError(f"--message-frames is {args.message_frames}, allowed is 1 or more")
    if args.number_from is not None:
        most = MAX_NUMBER - len(args.artifacts) + 1
        if not 0 <= args.number_from <= most:
            raise UsageError(f"--number-from is {args.number_from}, allowed is 0 to {most} for so many artifacts")
    with open_output(args.output) as output:
        if args.number_from is None:
            _write(output, _one_after_the_other(args))
        else:
            _write(output, _in_turns(args))
    return ExitStatus.DONE


def _one_after_the_other(args: argparse.Namespace) -> Iterator[Message]:
    maybe_said: Message | None = None
    for path in args.artifacts:
        artifact = _load(path)
        if args.form == "artifact":
            yield from _as_artifact(artifact)
            continue
        handshake = _handshake(artifact)
        if handshake != maybe_said:
            yield handshake
            maybe_said = handshake
        yield from _as_tokens(artifact, args.message_frames or 1, LONGEST_PAYLOAD_BYTES)


def _in_turns(args: argparse.Namespace) -> Iterator[Message]:
    streams: dict[int, Iterator[Message]] = {}
    for number, path in enumerate(args.artifacts, start=args.number_from):
        artifact = _load(path)
        if args.form == "artifact":
            streams[number] = _as_artifact(artifact)
        else:
            tokens = _as_tokens(artifact, args.message_frames or 1, LONGEST_PAYLOAD_BYTES - NUMBER_BYTES)
            streams[number] = itertools.chain([_handshake(artifact)], tokens)
    while streams:
        for number, messages in list(streams.items()):
            maybe_message = next(messages, None)
            if maybe_message is None:
                del streams[number]
            else:
                yield in_stream(number, maybe_message)


def _load(path: str) -> Artifact:
    with open_input(path) as file:
        return load_artifact(file, path)


def _write(output: BinaryIO, messages: Iterator[Message]) -> None:
    for message in messages:
        output.write(encode_message(*message))


def _as_artifact(artifact: Artifact) -> Iterator[Message]:
    data = build_artifact(artifact)
    for start in range(0, len(data), ARTIFACT_PIECE_BYTES):
        yield Message(Kind.ARTIFACT, data[start : start + ARTIFACT_PIECE_BYTES])


def _as_tokens(artifact: Artifact, message_frames: int, longest_payload_bytes: int) -> Iterator[Message]:
    one_frame_bytes = frame_bytes(artifact.quantizers, artifact.codebook_size)
    if one_frame_bytes > longest_payload_bytes:
        raise ArtifactError(
            f"a frame of {artifact.quantizers} codes is {one_frame_bytes} bytes, "
            f"allowed are {longest_payload_bytes} in one message"
        )
    payload_bytes = message_frames * one_frame_bytes
    if payload_bytes > longest_payload_bytes:
        raise UsageError(
            f"{message_frames} frames of {one_frame_bytes} bytes are {payload_bytes} bytes, "
            f"allowed are {longest_payload_bytes} in one message: choose a smaller --message-frames"
        )
    payload = pack_frames(artifact.codes, artifact.codebook_size)
    for start in range(0, len(payload) or 1, payload_bytes):  # no frames are still a stream: one empty message opens it
        yield Message(Kind.TOKENS, payload[start : start + payload_bytes])
    yield Message(Kind.END)


def _handshake(artifact: Artifact) -> Message:
    numbers = ("sample_rate", "channels", "quantizers", "codebook_size")
    said = {"protocol": VERSION, "name": "mossnano frame"} | {name: getattr(artifact, name) for name in numbers}
    return json_message(Kind.HANDSHAKE, said)
