"""The tools frame and unframe: artifacts into the process, its answers out of it."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.pcm import wav_header
from mossnano_stdio.protocol.messages import (
    Kind,
    Message,
    MessageReader,
    encode_message,
    in_stream,
    out_of_stream,
)
from mossnano_stdio.tokens import Artifact, build_artifact, pack_frames
from tests.child import DEMO, PROCESS
from tests.tool import COMMAND, call_tool, run_tool

CODES = np.random.default_rng(9).integers(0, 1024, (7, 16)).astype(np.uint16)
ARTIFACT = build_artifact(Artifact(48000, 2, 7 * 3840 - 100, 16, 7, 1024, CODES))
PCM = bytes(range(200))
HANDSHAKE = {"protocol": 1, "sample_rate": 48000, "channels": 2}


def messages_in(data: bytes) -> list[Message]:
    reader = MessageReader()
    messages = list(reader.feed(data))
    assert reader.incomplete_bytes == 0
    return messages


def stream_of(*messages: tuple[int, bytes | dict[str, Any]]) -> bytes:
    return b"".join(
        encode_message(kind, json.dumps(payload).encode() if isinstance(payload, dict) else payload)
        for kind, payload in messages
    )


# --- frame -------------------------------------------------------------------------------------------------------


def test_an_artifact_goes_as_it_is() -> None:
    outcome = call_tool("frame", "-", stdin=ARTIFACT)
    assert (outcome.status, outcome.err) == (0, "")
    assert messages_in(outcome.out) == [Message(Kind.ARTIFACT, ARTIFACT)]


def test_a_long_artifact_is_split() -> None:
    codes = np.zeros((10_000, 16), dtype=np.uint16)
    long = build_artifact(Artifact(48000, 2, 0, 16, 10_000, 1024, codes))
    messages = messages_in(call_tool("frame", "-", stdin=long).out)
    assert len(messages) == 4
    assert {message.kind for message in messages} == {Kind.ARTIFACT}
    assert b"".join(message.payload for message in messages) == long


@pytest.mark.parametrize(("flags", "sizes"), [([], [1] * 7), (["--message-frames", 3], [3, 3, 1])])
def test_tokens_are_closed_by_end(flags: list[Any], sizes: list[int]) -> None:
    handshake, *tokens, end = messages_in(call_tool("frame", "-", "--as", "tokens", *flags, stdin=ARTIFACT).out)
    assert handshake.kind == Kind.HANDSHAKE
    said = json.loads(handshake.payload)
    assert said == said | {"sample_rate": 48000, "channels": 2, "quantizers": 16, "codebook_size": 1024}
    assert {message.kind for message in tokens} == {Kind.TOKENS}
    assert [len(message.payload) // 20 for message in tokens] == sizes
    assert b"".join(message.payload for message in tokens) == pack_frames(CODES, 1024)
    assert end == Message(Kind.END)


def test_several_artifacts_are_several_streams(tmp_path: Path) -> None:
    other = build_artifact(Artifact(48000, 2, 3840, 8, 1, 1024, CODES[:1, :8]))
    empty = build_artifact(Artifact(48000, 2, 0, 8, 0, 1024, CODES[:0, :8]))
    paths = []
    for name, data in (("a", ARTIFACT), ("b", ARTIFACT), ("c", other), ("d", empty)):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    tokens = call_tool("frame", *paths, "--as", "tokens", "--message-frames", 100).out
    kinds = [Kind(message.kind).name for message in messages_in(tokens)]
    assert " ".join(kinds) == "HANDSHAKE TOKENS END TOKENS END HANDSHAKE TOKENS END TOKENS END"
    assert messages_in(tokens)[-2].payload == b""
    call_tool("frame", *paths, "-o", tmp_path / "out.bin")
    assert [message.payload for message in messages_in((tmp_path / "out.bin").read_bytes())] == [
        ARTIFACT,
        ARTIFACT,
        other,
        empty,
    ]


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "words"),
    [
        (["-"], ARTIFACT[:-1], ExitStatus.BAD_INPUT, "-: the artifact is cut: 171 of 172 bytes"),
        (["-", "--message-frames", "2"], ARTIFACT, ExitStatus.USAGE, "--as tokens"),
        (["-", "--as", "tokens", "--message-frames", "0"], ARTIFACT, ExitStatus.USAGE, "allowed is 1 or more"),
        (["-", "--as", "tokens", "--message-frames", "52429"], ARTIFACT, ExitStatus.USAGE, "allowed are 1048575"),
        (["missing"], b"", ExitStatus.NO_WEIGHTS, "missing"),
    ],
)
def test_frame_says_what_is_wrong(arguments: list[str], stdin: bytes, status: int, words: str, tmp_path: Path) -> None:
    outcome = call_tool("frame", *arguments, "-o", tmp_path / "out.bin", stdin=stdin)
    assert outcome.status == status
    assert words in outcome.error_line
    assert list(tmp_path.iterdir()) == []


def test_frames_that_no_message_holds() -> None:
    wide = build_artifact(Artifact(48000, 2, 0, 600_000, 1, 65536, np.zeros((1, 600_000), dtype=np.uint16)))
    outcome = call_tool("frame", "-", "--as", "tokens", stdin=wide)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert "a frame of 600000 codes is 1200000 bytes, allowed are 1048575" in outcome.error_line


def test_the_longest_message_is_allowed() -> None:
    arguments = ["frame", "-", "--as", "tokens", "--message-frames", 52428]
    assert call_tool(*arguments, stdin=ARTIFACT).status == 0


def by_stream(messages: list[Message]) -> dict[int, list[Message]]:
    """The messages of each numbered stream, as plain ones, in order."""
    streams: dict[int, list[Message]] = {}
    for message in messages:
        number, inner = out_of_stream(message)
        streams.setdefault(number, []).append(inner)
    return streams


@pytest.mark.parametrize("form", ["artifact", "tokens"])
def test_numbered_streams_hold_what_plain_ones_do_and_take_turns(form: str, tmp_path: Path) -> None:
    short = build_artifact(Artifact(48000, 2, 2 * 3840, 16, 2, 1024, CODES[:2]))
    for name, data in (("a", short), ("b", ARTIFACT)):
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / "a", tmp_path / "b"]
    messages = messages_in(call_tool("frame", *paths, "--as", form, "--number-from", 5).out)
    plain = [messages_in(call_tool("frame", path, "--as", form).out) for path in paths]
    assert by_stream(messages) == {5: plain[0], 6: plain[1]}
    numbers = [out_of_stream(message)[0] for message in messages]
    assert numbers == ([5, 6] if form == "artifact" else [5, 6] * 4 + [6] * 5)


@pytest.mark.parametrize(
    ("number", "words"),
    [(-1, "allowed is 0 to 4294967294 for so many"), (0xFFFFFFFF, "allowed is 0 to 4294967294 for so many")],
)
def test_numbers_that_no_stream_has(number: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(ARTIFACT)
    outcome = call_tool("frame", tmp_path / "a", tmp_path / "a", "--number-from", number)
    assert (outcome.status, outcome.out) == (ExitStatus.USAGE, b"")
    assert words in outcome.error_line
    last = call_tool("frame", tmp_path / "a", "--number-from", 0xFFFFFFFF).out
    assert list(by_stream(messages_in(last))) == [0xFFFFFFFF]


def test_the_longest_message_of_a_numbered_stream_is_four_bytes_shorter() -> None:
    wide = build_artifact(Artifact(48000, 2, 0, 524_288, 1, 65536, np.zeros((1, 524_288), dtype=np.uint16)))
    assert call_tool("frame", "-", "--as", "tokens", stdin=wide).status == ExitStatus.BAD_INPUT
    fits = build_artifact(Artifact(48000, 2, 0, 524_286, 1, 65536, np.zeros((1, 524_286), dtype=np.uint16)))
    assert call_tool("frame", "-", "--as", "tokens", stdin=fits).status == 0
    outcome = call_tool("frame", "-", "--as", "tokens", "--number-from", 1, stdin=fits)
    assert "a frame of 524286 codes is 1048572 bytes, allowed are 1048571" in outcome.error_line


# --- frame: settings, marks and credit ----------------------------------------------------------------------------


def test_settings_stand_before_all_streams() -> None:
    sets = ["sample_rate=16000", "sample_format=f32le", "chunk_frames=null", "gain_db=-3.5", "odd=NaN", "far=1e999"]
    arguments = [word for setting in sets for word in ("--set", setting)]
    for numbering in ([], ["--number-from", 3]):
        first, *rest = messages_in(call_tool("frame", "-", *arguments, *numbering, stdin=ARTIFACT).out)
        assert first.kind == Kind.SETTINGS
        assert json.loads(first.payload) == {
            "sample_rate": 16000,
            "sample_format": "f32le",
            "chunk_frames": None,
            "gain_db": -3.5,
            "odd": "NaN",
            "far": "1e999",
        }
        assert rest == messages_in(call_tool("frame", "-", *numbering, stdin=ARTIFACT).out)


MARKS = ["--mark", "5=five", "--mark", "0=\N{SNOWMAN}", "--mark", "7=end", "--mark", "5=again="]


@pytest.mark.parametrize("numbering", [[], ["--number-from", 3]])
def test_marks_stand_among_tokens(numbering: list[Any]) -> None:
    arguments = ["frame", "-", "--as", "tokens", "--message-frames", 3, *numbering]
    messages = messages_in(call_tool(*arguments, *MARKS, stdin=ARTIFACT).out)
    if numbering:
        ((number, messages),) = by_stream(messages).items()
        assert number == 3
    told = [
        len(message.payload) // 20 if message.kind == Kind.TOKENS else message.payload.decode()
        for message in messages[1:-1]
    ]
    assert told == ["\N{SNOWMAN}", 3, 2, "five", "again=", 1, 1, "end"]
    assert {message.kind for message in messages[1:-1]} == {Kind.TOKENS, Kind.MARK}
    assert b"".join(message.payload for message in messages if message.kind == Kind.TOKENS) == pack_frames(CODES, 1024)


def test_marks_of_no_frames() -> None:
    empty = build_artifact(Artifact(48000, 2, 0, 8, 0, 1024, CODES[:0, :8]))
    messages = messages_in(call_tool("frame", "-", "--as", "tokens", "--mark", "0=x", stdin=empty).out)
    assert messages[1:] == [Message(Kind.MARK, b"x"), Message(Kind.TOKENS), Message(Kind.END)]


def test_marks_of_an_artifact_are_settings_of_its_stream() -> None:
    messages = messages_in(call_tool("frame", "-", "--number-from", 3, *MARKS, stdin=ARTIFACT).out)
    settings, artifact = by_stream(messages)[3]
    assert settings.kind == Kind.SETTINGS
    assert json.loads(settings.payload) == {"marks": [[0, "\N{SNOWMAN}"], [5, "five"], [5, "again="], [7, "end"]]}
    assert artifact == Message(Kind.ARTIFACT, ARTIFACT)


@pytest.mark.parametrize(
    ("form", "first"), [(["artifact"], Kind.ARTIFACT), (["artifact", *MARKS], Kind.SETTINGS), (["tokens"], Kind.TOKENS)]
)
def test_credit_follows_what_opens_its_stream(form: list[str], first: Kind, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(ARTIFACT)
    paths = [tmp_path / "a"] * (1 if MARKS[0] in form else 2)
    messages = messages_in(call_tool("frame", *paths, "--as", *form, "--number-from", 0, "--credit", 96000).out)
    for stream in by_stream(messages).values():
        kinds = [message.kind for message in stream if message.kind != Kind.HANDSHAKE]
        assert kinds[0] == first
        (credit,) = (message for message in stream if message.kind == Kind.CREDIT)
        assert credit.payload == struct.pack("<Q", 96000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--credit", "1"], "--credit is for numbered streams: add --number-from N"),
        (["--credit", "0", "--number-from", "1"], "--credit is 0, allowed is 1 to 18446744073709551615"),
        (["--mark", "1=x"], "add one of --as tokens, --number-from N"),
        (["-", "--mark", "1=x", "--as", "tokens"], "--mark is for one artifact, not 2"),
        (["--mark", "8=x", "--as", "tokens"], "--mark is at frame 8, allowed is 0 to 7, the artifact's end"),
        (["--mark", "x"], "'x': FRAME=TEXT is allowed, frames counted from 0"),
        (["--mark=-1=x"], "'-1=x': FRAME=TEXT is allowed"),
        (["--mark", "1=" + "x" * 1001], "a text of 1001 bytes: up to 1000 are allowed in a MARK"),
        (["--mark", "1=\udcff"], "the text is no UTF-8"),
        (["--set", "x"], "'x': NAME=VALUE is allowed"),
        (["--set", "=1"], "'=1': NAME=VALUE is allowed"),
    ],
)
def test_what_frame_does_not_write(arguments: list[str], words: str) -> None:
    outcome = call_tool("frame", "-", *arguments, stdin=ARTIFACT)
    assert (outcome.status, outcome.out) == (ExitStatus.USAGE, b"")
    assert words in outcome.err


# --- unframe -----------------------------------------------------------------------------------------------------


def test_raw_pcm_and_wav_by_name(tmp_path: Path) -> None:
    stream = stream_of((0, HANDSHAKE), (1, PCM[:100]), (0x70, b"?"), (1, PCM[100:]), (7, {"stream": 0}))
    assert call_tool("unframe", stdin=stream) == (0, PCM, "")
    (tmp_path / "in.bin").write_bytes(stream)
    for name in ("out.wav", "OUT.WAV"):
        assert call_tool("unframe", tmp_path / "in.bin", tmp_path / name) == (0, b"", "")
        assert (tmp_path / name).read_bytes() == wav_header(48000, 2, 200) + PCM
    assert call_tool("unframe", tmp_path / "in.bin", tmp_path / "out.pcm") == (0, b"", "")
    assert (tmp_path / "out.pcm").read_bytes() == PCM
    assert run_tool("unframe", "--wav", stdin=stream) == (0, wav_header(48000, 2) + PCM, "")


def test_the_wav_has_the_numbers_of_the_handshake() -> None:
    stream = stream_of((0, HANDSHAKE | {"sample_rate": 24000, "channels": 1}), (1, b"\x01\x02"), (7, {}))
    assert call_tool("unframe", "-", "-", "--wav", stdin=stream).out[20:28].hex() == "01000100c05d0000"


def test_no_sound_is_an_empty_wav(tmp_path: Path) -> None:
    call_tool("unframe", "-", tmp_path / "x.wav", stdin=stream_of((0, HANDSHAKE)))
    assert (tmp_path / "x.wav").read_bytes() == wav_header(48000, 2, 0)


def test_without_a_handshake_nano_is_assumed_aloud() -> None:
    outcome = call_tool("unframe", "--wav", stdin=stream_of((1, PCM)))
    assert outcome.status == 0
    assert outcome.out[24:28] == struct.pack("<I", 48000)
    assert "no HANDSHAKE came" in outcome.error_line


def test_errors_are_told_and_counted(tmp_path: Path) -> None:
    stream = stream_of(
        (0, HANDSHAKE),
        (5, {"code": "bad_tokens", "message": "two\nlines\x1b[2J", "stream": 3, "fatal": False}),
        (1, PCM),
        (5, {"code": "framing_lost", "message": "why", "stream": None, "fatal": True}),
    )
    outcome = call_tool("unframe", "-", tmp_path / "x.pcm", stdin=stream)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert outcome.err.splitlines() == [
        "mossnano unframe: ERROR in stream 3: bad_tokens: two lines [2J",
        "mossnano unframe: ERROR: framing_lost: why",
    ]
    assert (tmp_path / "x.pcm").read_bytes() == PCM


@pytest.mark.parametrize(
    ("stream", "status", "words"),
    [
        (stream_of((0, HANDSHAKE), (1, PCM))[:-1], ExitStatus.BAD_INPUT, "cut inside a message: 204 bytes"),
        (stream_of((0, HANDSHAKE), (1, PCM)) + bytes(4), ExitStatus.FRAMING_LOST, "length of 0 bytes"),
        (ARTIFACT, ExitStatus.FRAMING_LOST, "bare .mossnano artifact"),
        (stream_of((0, HANDSHAKE), (1, b"abc")), ExitStatus.BAD_INPUT, "AUDIO of 3 bytes"),
        (stream_of((0, HANDSHAKE | {"channels": 0})), ExitStatus.BAD_INPUT, "channels 0"),
        (stream_of((0, {"protocol": 1})), ExitStatus.BAD_INPUT, "sample_rate None"),
        (stream_of((0, b"{")), ExitStatus.BAD_INPUT, "no JSON"),
        (stream_of((0, HANDSHAKE), (0, HANDSHAKE | {"channels": 1})), ExitStatus.BAD_INPUT, "(48000, 2) to (48000, 1)"),
        (stream_of((0, HANDSHAKE | {"sample_rate": 1 << 31}), (1, PCM)), ExitStatus.BAD_INPUT, "2147483648 Hz"),
    ],
)
def test_a_failed_run_leaves_no_file(stream: bytes, status: int, words: str, tmp_path: Path) -> None:
    outcome = call_tool("unframe", "-", tmp_path / "x.wav", stdin=stream)
    assert outcome.status == status
    assert words in outcome.error_line
    assert list(tmp_path.iterdir()) == []


def test_the_longest_audio_message_passes() -> None:
    pcm = bytes((1 << 20) - 4)
    assert call_tool("unframe", stdin=stream_of((0, HANDSHAKE), (1, pcm))) == (0, pcm, "")


def test_sound_is_passed_on_as_it_comes() -> None:
    process = subprocess.Popen([*COMMAND, "unframe"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for piece in (PCM, PCM[::-1]):
            process.stdin.write(stream_of((1, piece)))
            process.stdin.flush()
            assert process.stdout.read(len(PCM)) == piece  # would wait for ever if it were kept back
        process.stdin.close()
    assert process.returncode == 0


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, "unframe"], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(stream_of((1, bytes(1 << 16))))
        process.stdin.flush()
        assert process.stdout.read(10) == bytes(10)
        process.stdout.close()
        with contextlib.suppress(OSError):  # it is gone before it has read all of this
            process.stdin.write(stream_of(*[(1, bytes(1 << 16))] * 64))
        with contextlib.suppress(OSError):
            process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == ExitStatus.READER_GONE


# --- unframe: numbered streams, and every form --------------------------------------------------------------------

FLOATS = np.linspace(-2, 2, 100, dtype="<f4").tobytes()


def numbered(number: int, kind: int, payload: bytes | dict[str, Any]) -> tuple[int, bytes]:
    data = json.dumps(payload).encode() if isinstance(payload, dict) else payload
    message = in_stream(number, Message(kind, data))
    return message.kind, message.payload


SEVERAL = stream_of(
    (0, HANDSHAKE),
    numbered(7, 1, PCM[:100]),
    (1, PCM),
    numbered(8, 0, {"sample_rate": 16000, "channels": 1, "sample_format": "f32le"}),
    numbered(8, 1, FLOATS),
    numbered(7, 1, PCM[100:]),
    numbered(8, 7, {}),
    numbered(9, 7, {"cancelled": True}),
    numbered(7, 7, {}),
)


def test_a_wav_of_each_stream(tmp_path: Path) -> None:
    assert call_tool("unframe", "--each", tmp_path / "new" / "folder", stdin=SEVERAL) == (0, b"", "")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {
        "plain.wav": wav_header(48000, 2, 200) + PCM,
        "7.wav": wav_header(48000, 2, 200) + PCM,
        "8.wav": wav_header(16000, 1, 400, "f32le") + FLOATS,
        "9.wav": wav_header(48000, 2, 0),
    }


@pytest.mark.parametrize(("number", "sound"), [(7, PCM), (8, FLOATS), (9, b"")])
def test_one_stream_of_several(number: int, sound: bytes, tmp_path: Path) -> None:
    assert call_tool("unframe", "--stream", number, stdin=SEVERAL) == (0, sound, "")
    assert call_tool("unframe", "-", tmp_path / "x.wav", "--stream", number, stdin=SEVERAL).status == 0
    assert (tmp_path / "x.wav").read_bytes().endswith(sound)
    assert (tmp_path / "x.wav").read_bytes()[22] == (1 if number == 8 else 2)


def test_floats_are_a_wav_of_floats(tmp_path: Path) -> None:
    said = HANDSHAKE | {"sample_format": "f32le"}
    call_tool("unframe", "-", tmp_path / "x.wav", stdin=stream_of((0, said), (1, FLOATS), (7, {})))
    read, rate = soundfile.read(tmp_path / "x.wav", dtype="float32")
    assert rate == 48000
    assert read.tobytes() == FLOATS


def test_numbered_streams_do_not_become_one_file(tmp_path: Path) -> None:
    outcome = call_tool("unframe", "-", tmp_path / "x.wav", stdin=SEVERAL)
    assert outcome.status == ExitStatus.USAGE
    assert "numbered streams, 7 among them: choose one with --stream N, or --each DIR" in outcome.error_line
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_is_not_there(tmp_path: Path) -> None:
    outcome = call_tool("unframe", "-", tmp_path / "x", "--stream", 1, stdin=SEVERAL)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert "no stream 1 is in the input; of numbered ones there are 7, 8" in outcome.error_line
    assert list(tmp_path.iterdir()) == []
    outcome = call_tool("unframe", "--stream", 1, stdin=stream_of((0, HANDSHAKE), (1, PCM)))
    assert "of numbered ones none is" in outcome.error_line


def test_a_stream_that_is_cut_leaves_those_that_are_whole(tmp_path: Path) -> None:
    outcome = call_tool("unframe", "--each", tmp_path, stdin=SEVERAL[:-1])
    assert outcome.status == ExitStatus.BAD_INPUT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8.wav", "9.wav"]


def test_errors_of_other_streams_are_not_this_ones() -> None:
    error = {"code": "bad_tokens", "message": "why", "stream": 8}
    stream = SEVERAL + stream_of(numbered(8, 5, error))
    assert call_tool("unframe", "--stream", 7, stdin=stream) == (0, PCM, "")
    outcome = call_tool("unframe", "--stream", 8, stdin=stream)
    assert (outcome.status, outcome.out) == (ExitStatus.BAD_INPUT, FLOATS)
    assert outcome.error_line == "mossnano unframe: ERROR in stream 8: bad_tokens: why"


@pytest.mark.parametrize(
    ("arguments", "stream", "status", "words"),
    [
        (["--stream", "-1"], SEVERAL, ExitStatus.USAGE, "allowed is 0 to 4294967295"),
        (["--each", "x", "--wav"], SEVERAL, ExitStatus.USAGE, "leave OUT and --wav out"),
        (["-", "x.wav", "--each", "x"], SEVERAL, ExitStatus.USAGE, "leave OUT and --wav out"),
        ([], stream_of((0x81, b"abc")), ExitStatus.BAD_INPUT, "payload of 3 bytes: it begins with the 4 bytes"),
        (
            ["--stream", "8"],
            stream_of(numbered(8, 0, HANDSHAKE | {"sample_format": "u8"})),
            ExitStatus.BAD_INPUT,
            "sample_format 'u8', allowed is 's16le' or 'f32le'",
        ),
        (
            [],
            stream_of((0, HANDSHAKE), (0, HANDSHAKE | {"sample_format": "f32le"})),
            ExitStatus.BAD_INPUT,
            "from (48000, 2, 's16le') to (48000, 2, 'f32le') (sample_rate, channels, sample_format)",
        ),
    ],
)
def test_unframe_says_what_is_wrong(arguments: list[str], stream: bytes, status: int, words: str) -> None:
    outcome = call_tool("unframe", *arguments, stdin=stream)
    assert (outcome.status, outcome.out) == (status, b"")
    assert words in outcome.error_line


# --- unframe: marks and levels ------------------------------------------------------------------------------------


def mark(sample: int, text: bytes) -> bytes:
    return struct.pack("<Q", sample) + text


def levels(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


EVENTFUL = stream_of(
    (0, HANDSHAKE | {"levels_ms": 20}),
    numbered(7, 11, mark(0, b"so")),
    (12, levels(1, 2)),
    (1, PCM),
    numbered(7, 12, levels(65535)),
    numbered(7, 1, PCM),
    (11, mark(24000, "\N{SNOWMAN}".encode())),
    (12, levels(3)),
    (7, {"stream": 0, "next_stream": 4}),
    numbered(7, 12, levels(0, 9)),
    numbered(7, 11, mark(1 << 40, b"\xff")),
    numbered(8, 0, HANDSHAKE | {"sample_rate": 8000, "levels_ms": 10}),
    numbered(8, 11, mark(1000, b"")),
    numbered(8, 7, {}),
    numbered(7, 7, {}),
    (12, levels(5)),
    (7, {"stream": 4, "next_stream": 5}),
)
PLAIN_EVENTS = [
    {"stream": 0, "numbered": False, "seconds": 0.0, "levels_ms": 20, "levels": [1, 2]},
    {"stream": 0, "numbered": False, "seconds": 0.5, "sample": 24000, "mark": "\N{SNOWMAN}"},
    {"stream": 0, "numbered": False, "seconds": 0.04, "levels_ms": 20, "levels": [3]},
    {"stream": 4, "numbered": False, "seconds": 0.0, "levels_ms": 20, "levels": [5]},
]
EVENTS_OF_7 = [
    {"stream": 7, "numbered": True, "seconds": 0.0, "sample": 0, "mark": "so"},
    {"stream": 7, "numbered": True, "seconds": 0.0, "levels_ms": 20, "levels": [65535]},
    {"stream": 7, "numbered": True, "seconds": 0.02, "levels_ms": 20, "levels": [0, 9]},
    {"stream": 7, "numbered": True, "seconds": 22906492.245333, "sample": 1 << 40, "mark_hex": "ff"},
]
EVENTS_OF_8 = [{"stream": 8, "numbered": True, "seconds": 0.125, "sample": 1000, "mark": ""}]


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_marks_and_levels_of_one_stream(tmp_path: Path) -> None:
    files = ["-", tmp_path / "x.pcm", "--events"]
    assert lines(call_tool("unframe", *files, "-", "--stream", 7, stdin=EVENTFUL).out) == EVENTS_OF_7
    assert (tmp_path / "x.pcm").read_bytes() == PCM
    plain = EVENTFUL.replace(stream_of(numbered(7, 1, PCM)), b"")  # with a numbered stream's sound we would be asked
    assert call_tool("unframe", *files, tmp_path / "x.jsonl", stdin=plain).status == 0
    assert lines((tmp_path / "x.jsonl").read_bytes()) == PLAIN_EVENTS


def test_marks_and_levels_of_each_stream(tmp_path: Path) -> None:
    assert call_tool("unframe", "--each", tmp_path, stdin=EVENTFUL) == (0, b"", "")
    found = {path.name: lines(path.read_bytes()) for path in tmp_path.glob("*.jsonl")}
    assert found == {"plain.jsonl": PLAIN_EVENTS, "7.jsonl": EVENTS_OF_7, "8.jsonl": EVENTS_OF_8}
    assert {path.stem for path in tmp_path.glob("*.wav")} == {"plain", "7", "8"}


@pytest.mark.parametrize(
    ("arguments", "stream", "status", "words"),
    [
        (["--events", "-"], EVENTFUL, ExitStatus.USAGE, "stdout has the sound: give --events a file, or OUT"),
        (["--each", "x", "--events", "y"], EVENTFUL, ExitStatus.USAGE, "leave --events out"),
        (["--events", "y"], stream_of((11, bytes(7))), ExitStatus.BAD_INPUT, "a MARK of 7 bytes"),
        (["--events", "y"], stream_of((0, HANDSHAKE | {"levels_ms": 10}), (12, b"abc")), 65, "LEVELS of 3 bytes"),
        (["--events", "y"], stream_of((0, HANDSHAKE), (12, b"ab")), 65, "the HANDSHAKE says levels_ms None"),
    ],
)
def test_what_unframe_cannot_write(
    arguments: list[str], stream: bytes, status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_tool("unframe", *arguments, stdin=stream)
    assert (outcome.status, outcome.out) == (status, b"")
    assert words in outcome.error_line
    assert list(tmp_path.iterdir()) == []


def test_marks_and_levels_through_the_process(tmp_path: Path) -> None:
    """From --mark and --set to the lines, at another rate, for tokens and an artifact."""
    arguments = ["--set", "sample_rate=16000", "--set", "channels=1", "--set", "levels_ms=40", *MARKS]
    lengths = {"tokens": 7 * 1280, "artifact": round((7 * 3840 - 100) / 3)}
    for number, form in enumerate(lengths, start=1):
        stream = call_tool("frame", "-", "--as", form, "--number-from", number, *arguments, stdin=ARTIFACT).out
        framed = subprocess.run(DEMO, input=stream, stdout=subprocess.PIPE, timeout=60, check=True)
        assert call_tool("unframe", "--each", tmp_path, stdin=framed.stdout) == (0, b"", "")
        events = lines((tmp_path / f"{number}.jsonl").read_bytes())
        marks = [(event["sample"], event["mark"]) for event in events if "mark" in event]
        places = [0, 5 * 1280, 5 * 1280, lengths[form]]
        assert marks == list(zip(places, ["\N{SNOWMAN}", "five", "again=", "end"], strict=True))
        found = [level for event in events if "mark" not in event for level in event["levels"]]
        sound, rate = soundfile.read(tmp_path / f"{number}.wav", dtype="int16")
        assert (rate, sound.shape) == (16000, (lengths[form],))
        windows = [sound[start : start + 640] / 32767 for start in range(0, len(sound), 640)]
        expected = [np.sqrt(np.mean(np.square(window))) * 65535 for window in windows]
        np.testing.assert_allclose(found, expected, atol=4)


# --- unframe: through the process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["artifact", "tokens"])
def test_through_the_process(form: str) -> None:
    stdio = [*DEMO, "--chunk-frames", "4"]
    stream = call_tool("frame", "-", "--as", form, stdin=ARTIFACT).out
    framed = subprocess.run(stdio, input=stream, stdout=subprocess.PIPE, timeout=60, check=True)
    raw = subprocess.run([*stdio, "--output", "raw"], input=stream, stdout=subprocess.PIPE, timeout=60, check=True)
    outcome = call_tool("unframe", stdin=framed.stdout)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == raw.stdout
    samples = 7 * 3840 - 100 if form == "artifact" else 7 * 3840
    assert len(raw.stdout) == 4 * samples
    assert np.any(np.frombuffer(raw.stdout, dtype="<i2"))


def test_tokens_of_fewer_codebooks_need_their_number_set(mimi_standin: Path) -> None:
    few = build_artifact(Artifact(24000, 1, 7 * 1920, 8, 7, 2048, CODES[:, :8]))
    raw = [*PROCESS, "--weights", str(mimi_standin), "--chunk-frames", "4", "--output", "raw"]
    whole = subprocess.run(raw, input=call_tool("frame", "-", stdin=few).out, capture_output=True, check=True)
    tokens = ["frame", "-", "--as", "tokens"]
    refused = subprocess.run(raw, input=call_tool(*tokens, stdin=few).out, capture_output=True, check=False)
    assert (refused.returncode, refused.stdout) == (ExitStatus.BAD_INPUT, b"")
    assert b"quantizers is 8 there and 32 here" in refused.stderr
    stream = call_tool(*tokens, "--set", "quantizers=8", stdin=few).out
    assert subprocess.run(raw, input=stream, stdout=subprocess.PIPE, check=True).stdout == whole.stdout


@pytest.mark.parametrize("form", ["artifact", "tokens"])
def test_numbered_streams_through_the_process(form: str, tmp_path: Path) -> None:
    """Two voices over one pipe sound as each does alone."""
    short = build_artifact(Artifact(48000, 2, 3 * 3840, 16, 3, 1024, CODES[2:5]))
    for name, data in (("a", ARTIFACT), ("b", short)):
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / "a", tmp_path / "b"]
    stream = call_tool("frame", *paths, "--as", form, "--number-from", 1).out
    framed = subprocess.run(DEMO, input=stream, stdout=subprocess.PIPE, timeout=60, check=True)
    assert call_tool("unframe", "--each", tmp_path / "out", stdin=framed.stdout) == (0, b"", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.wav", "2.wav"]
    for number, path in enumerate(paths, start=1):
        alone = call_tool("frame", path, "--as", form).out
        wav = subprocess.run([*DEMO, "--output", "raw"], input=alone, stdout=subprocess.PIPE, timeout=60, check=True)
        written = (tmp_path / "out" / f"{number}.wav").read_bytes()
        assert written == wav_header(48000, 2, len(wav.stdout)) + wav.stdout
    facts = json.loads(call_tool("info", "-", "--json", stdin=framed.stdout).out)
    assert (facts["numbered_streams"], facts["frames"], facts["error_count"]) == (2, 10, 0)
    assert [facts["streams"][number]["end"] for number in "12"] == ["whole", "whole"]
