"""Make a framed stream of artifacts, ready for mossnano-stdio's stdin.

  --as artifact   each one as it is, in ARTIFACT messages: trimmed to its true length, its END follows by itself
  --as tokens     its codes in TOKENS messages, closed by END, as a live encoder would send them; before the first,
                  and wherever the numbers change, a HANDSHAKE says what they are, so that a decoder with other
                  weights refuses them instead of making noise. One whose weights have more codebooks takes them after
                  --set quantizers=N

An .ecdc of EnCodec is framed as an artifact is; as tokens only where it has no scales, at 24 kHz.

`mossnano frame a.mossnano b.mossnano | mossnano-stdio --output wav > both.wav`

With --number-from N the artifacts are the numbered streams N, N + 1 and so on, all at once: their messages take turns,
as those of several voices over one pipe do. A decoder takes as many as its HANDSHAKE says in max_streams.

`mossnano frame --number-from 1 a.mossnano b.mossnano | mossnano-stdio | mossnano play -`

--set writes SETTINGS before all streams: --set sample_rate=16000 --set levels_ms=20. --mark 12=word puts a MARK before
the artifact's frame 12. --credit N grants each numbered stream N samples; once its input has ended, a decoder grants
the rest by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from mossnano_stdio.errors import ArtifactError, ExitStatus, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.protocol import (
    MAX_MARK_BYTES,
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
from mossnano_stdio.tokens import Artifact, build_artifact, frame_bytes, pack_frames
from mossnano_stdio.tokens.ecdc import Ecdc, build_ecdc, load_recording

ARTIFACT_PIECE_BYTES = 1 << 16
MAX_CREDIT = (1 << 64) - 1
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
    parser.add_argument(
        "--set",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of all streams, as protocol.md has them under SETTINGS; may be given several times",
    )
    parser.add_argument(
        "--mark",
        dest="marks",
        type=_mark,
        action="append",
        default=[],
        metavar="FRAME=TEXT",
        help="a MARK before this frame of the one artifact; may be given several times",
    )
    parser.add_argument(
        "--credit", type=int, metavar="N", help="samples that each numbered stream may have sent (without it: all)"
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
    elif args.credit is not None:
        raise UsageError("--credit is for numbered streams: add --number-from N")
    if args.credit is not None and not 1 <= args.credit <= MAX_CREDIT:
        raise UsageError(f"--credit is {args.credit}, allowed is 1 to {MAX_CREDIT}")
    if args.marks and len(args.artifacts) > 1:
        raise UsageError(f"--mark is for one artifact, not {len(args.artifacts)}: frame each by itself, and join them")
    if args.marks and args.form == "artifact" and args.number_from is None:
        raise UsageError("--mark is for --as tokens or for numbered streams: add one of --as tokens, --number-from N")
    with open_output(args.output) as output:
        if args.settings:
            _write(output, iter([json_message(Kind.SETTINGS, dict(args.settings))]))
        if args.number_from is None:
            _write(output, _one_after_the_other(args))
        else:
            _write(output, _in_turns(args))
    return ExitStatus.DONE


def _one_after_the_other(args: argparse.Namespace) -> Iterator[Message]:
    maybe_said: Message | None = None
    for path in args.artifacts:
        recording = _load(path)
        marks = _checked(args.marks, recording)
        if args.form == "artifact":
            yield from _as_artifact(recording)
            continue
        artifact = _without_scales(recording, path)
        handshake = _handshake(artifact, recording)
        if handshake != maybe_said:
            yield handshake
            maybe_said = handshake
        yield from _as_tokens(artifact, args.message_frames or 1, LONGEST_PAYLOAD_BYTES, marks)


def _in_turns(args: argparse.Namespace) -> Iterator[Message]:
    streams: dict[int, Iterator[Message]] = {}
    for number, path in enumerate(args.artifacts, start=args.number_from):
        recording = _load(path)
        marks = _checked(args.marks, recording)
        before: list[Message] = []
        if args.form == "artifact":
            if marks:
                before.append(json_message(Kind.SETTINGS, {"marks": marks}))
            rest = _as_artifact(recording)
        else:
            artifact = _without_scales(recording, path)
            before.append(_handshake(artifact, recording))
            rest = _as_tokens(artifact, args.message_frames or 1, LONGEST_PAYLOAD_BYTES - NUMBER_BYTES, marks)
        if args.credit is not None:
            before.append(next(rest))  # CREDIT opens no stream
            before.append(Message(Kind.CREDIT, args.credit.to_bytes(8, "little")))
        streams[number] = itertools.chain(before, rest)
    while streams:
        for number, messages in list(streams.items()):
            maybe_message = next(messages, None)
            if maybe_message is None:
                del streams[number]
            else:
                yield in_stream(number, maybe_message)


def _checked(marks: Sequence[tuple[int, str]], recording: Artifact | Ecdc) -> Sequence[tuple[int, str]]:
    """In the order of their frames. A mark at the artifact's end stands behind its last frame."""
    in_order = sorted(marks, key=lambda mark: mark[0])
    frames = recording.frames if isinstance(recording, Artifact) else recording.header.frames
    if in_order and in_order[-1][0] > frames:
        raise UsageError(f"--mark is at frame {in_order[-1][0]}, allowed is 0 to {frames}, the artifact's end")
    return in_order


def _load(path: str) -> Artifact | Ecdc:
    with open_input(path) as file:
        return load_recording(file, path)


def _without_scales(recording: Artifact | Ecdc, path: str) -> Artifact:
    if isinstance(recording, Artifact):
        return recording
    if recording.header.model.scale_bytes:
        raise ArtifactError(f"{path}: has segments with scales, which TOKENS do not hold; frame it --as artifact")
    return recording.as_artifact()


def _write(output: BinaryIO, messages: Iterator[Message]) -> None:
    for message in messages:
        output.write(encode_message(*message))


def _as_artifact(recording: Artifact | Ecdc) -> Iterator[Message]:
    data = build_artifact(recording) if isinstance(recording, Artifact) else build_ecdc(recording)
    for start in range(0, len(data), ARTIFACT_PIECE_BYTES):
        yield Message(Kind.ARTIFACT, data[start : start + ARTIFACT_PIECE_BYTES])


def _as_tokens(
    artifact: Artifact, message_frames: int, longest_payload_bytes: int, marks: Sequence[tuple[int, str]]
) -> Iterator[Message]:
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
    waiting = deque(marks)
    cuts = {0, *range(0, artifact.frames, message_frames), *(frame for frame, _ in marks if frame < artifact.frames)}
    # No frames are still a stream: one empty message opens it.
    for start, end in itertools.pairwise([*sorted(cuts), artifact.frames]):
        while waiting and waiting[0][0] == start:
            yield Message(Kind.MARK, waiting.popleft()[1].encode())
        yield Message(Kind.TOKENS, payload[start * one_frame_bytes : end * one_frame_bytes])
    for _, text in waiting:
        yield Message(Kind.MARK, text.encode())
    yield Message(Kind.END)


def _handshake(artifact: Artifact, recording: Artifact | Ecdc) -> Message:
    """What a .mossnano says of itself. An .ecdc also says whose codes it holds: others have the same numbers."""
    numbers = ("sample_rate", "channels", "quantizers", "codebook_size")
    said = {"protocol": VERSION, "name": "mossnano frame"} | {name: getattr(artifact, name) for name in numbers}
    if isinstance(recording, Ecdc):
        said |= {"codec": recording.header.model_name, "frame_samples": recording.header.model.frame_samples}
    return json_message(Kind.HANDSHAKE, said)


def _setting(text: str) -> tuple[str, Any]:
    """
    >>> _setting("sample_rate=16000"), _setting("sample_format=f32le"), _setting("chunk_frames=null")
    (('sample_rate', 16000), ('sample_format', 'f32le'), ('chunk_frames', None))
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE is allowed")
    try:
        read = json.loads(value)
        json.dumps(read, allow_nan=False)
    except (ValueError, RecursionError):
        return name, value
    return name, read


def _mark(text: str) -> tuple[int, str]:
    """
    >>> _mark("12=word")
    (12, 'word')
    """
    frame, equals, said = text.partition("=")
    if not (equals and frame.isascii() and frame.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: FRAME=TEXT is allowed, frames counted from 0")
    try:
        length = len(said.encode())
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r}: the text is no UTF-8, as it has to be") from None
    if length > MAX_MARK_BYTES:
        raise argparse.ArgumentTypeError(f"a text of {length} bytes: up to {MAX_MARK_BYTES} are allowed in a MARK")
    return int(frame), said
