"""Make a framed stream of artifacts, ready for mossnano-stdio's stdin.

  --as artifact   each one as it is, in ARTIFACT messages: trimmed to its true length, its END follows by itself
  --as tokens     its codes in TOKENS messages, closed by END, as a live encoder would send them; before the first,
                  and wherever the numbers change, a HANDSHAKE says what they are, so that a decoder with other
                  weights refuses them instead of making noise

An .ecdc of EnCodec is framed as an artifact is; as tokens only where it has no scales, at 24 kHz.

`mossnano frame a.mossnano b.mossnano | mossnano-stdio --output wav > both.wav`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import BinaryIO

from mossnano_stdio.errors import ArtifactError, ExitStatus, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.protocol import MAX_MESSAGE_BYTES, VERSION, Kind, Message, encode_message, json_message
from mossnano_stdio.tokens import Artifact, build_artifact, frame_bytes, pack_frames
from mossnano_stdio.tokens.ecdc import Ecdc, build_ecdc, load_recording

ARTIFACT_PIECE_BYTES = 1 << 16
LONGEST_PAYLOAD_BYTES = MAX_MESSAGE_BYTES - 1  # the kind counts too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifacts", nargs="+", metavar="PATH", help="artifacts or .ecdc files, one stream each; `-` is stdin"
    )
    parser.add_argument(
        "--as", dest="form", choices=("artifact", "tokens"), default="artifact", help="default: artifact"
    )
    parser.add_argument("--message-frames", type=int, metavar="N", help="frames in one TOKENS message (default: 1)")
    parser.add_argument("--output", "-o", default="-", metavar="OUT", help="where it goes (default: stdout)")


def run(args: argparse.Namespace) -> int:
    if args.message_frames is not None and args.form != "tokens":
        raise UsageError("--message-frames is for --as tokens: an artifact's frames lie apart in its file")
    if args.message_frames is not None and args.message_frames < 1:
        raise UsageError(f"--message-frames is {args.message_frames}, allowed is 1 or more")
    maybe_said: Message | None = None
    with open_output(args.output) as output:
        for path in args.artifacts:
            with open_input(path) as file:
                recording = load_recording(file, path)
            if args.form == "artifact":
                _write(output, _as_artifact(recording))
                continue
            artifact = _without_scales(recording, path)
            handshake = _handshake(artifact)
            if handshake != maybe_said:
                _write(output, iter([handshake]))
                maybe_said = handshake
            _write(output, _as_tokens(artifact, args.message_frames or 1))
    return ExitStatus.DONE


def _write(output: BinaryIO, messages: Iterator[Message]) -> None:
    for message in messages:
        output.write(encode_message(*message))


def _without_scales(recording: Artifact | Ecdc, path: str) -> Artifact:
    if isinstance(recording, Artifact):
        return recording
    if recording.header.model.scale_bytes:
        raise ArtifactError(f"{path}: has segments with scales, which TOKENS do not hold; frame it --as artifact")
    return recording.as_artifact()


def _as_artifact(recording: Artifact | Ecdc) -> Iterator[Message]:
    data = build_artifact(recording) if isinstance(recording, Artifact) else build_ecdc(recording)
    for start in range(0, len(data), ARTIFACT_PIECE_BYTES):
        yield Message(Kind.ARTIFACT, data[start : start + ARTIFACT_PIECE_BYTES])


def _as_tokens(artifact: Artifact, message_frames: int) -> Iterator[Message]:
    one_frame_bytes = frame_bytes(artifact.quantizers, artifact.codebook_size)
    if one_frame_bytes > LONGEST_PAYLOAD_BYTES:
        raise ArtifactError(
            f"a frame of {artifact.quantizers} codes is {one_frame_bytes} bytes, "
            f"allowed are {LONGEST_PAYLOAD_BYTES} in one message"
        )
    payload_bytes = message_frames * one_frame_bytes
    if payload_bytes > LONGEST_PAYLOAD_BYTES:
        raise UsageError(
            f"{message_frames} frames of {one_frame_bytes} bytes are {payload_bytes} bytes, "
            f"allowed are {LONGEST_PAYLOAD_BYTES} in one message: choose a smaller --message-frames"
        )
    payload = pack_frames(artifact.codes, artifact.codebook_size)
    for start in range(0, len(payload) or 1, payload_bytes):  # no frames are still a stream: one empty message opens it
        yield Message(Kind.TOKENS, payload[start : start + payload_bytes])
    yield Message(Kind.END)


def _handshake(artifact: Artifact) -> Message:
    numbers = ("sample_rate", "channels", "quantizers", "codebook_size")
    said = {"protocol": VERSION, "name": "mossnano frame"} | {name: getattr(artifact, name) for name in numbers}
    return json_message(Kind.HANDSHAKE, said)
