"""The process as a whole: started for real, fed through a pipe, judged by what comes out and by how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio import codecs
from mossnano_stdio.protocol.connection import Action
from mossnano_stdio.protocol.decoding import DECODING
from mossnano_stdio.protocol.encoding import ENCODING
from mossnano_stdio.protocol.messages import (
    INBOX_BYTES,
    NUMBERED,
    Kind,
    Message,
    encode_message,
    in_stream,
    json_message,
    out_of_stream,
)
from mossnano_stdio.protocol.stream import State
from mossnano_stdio.tokens import pack_frames
from mossnano_stdio.weights import MODELS
from tests.child import DEMO, PROCESS, ROOT, Child, decoded, double, encoded, fields, outline, pcm_of, run
from tests.doubles import NANO, SMALL, artifact_bytes, expected_codes, expected_pcm, some_frames, tokens_payload

END = Message(Kind.END)
FRAMES = some_frames(20)
TOKENS = Message(Kind.TOKENS, tokens_payload(FRAMES))
STREAM = encoded(TOKENS, END)
PCM = expected_pcm(FRAMES, SMALL)
NANO_TOKENS = Message(Kind.TOKENS, bytes(20) + bytes.fromhex("010830000105187000020928b000030d38f00004") * 9)
MELODY = ROOT / "mossnano_stdio" / "demo" / "melody.bin"


# --- what goes in comes out ------------------------------------------------------------------------


def test_a_stream_in_framed_messages() -> None:
    done = run(double(), STREAM)
    messages = decoded(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert outline(messages) == ["HANDSHAKE", "AUDIO", "END"]
    assert pcm_of(messages) == PCM


@pytest.mark.parametrize(
    "arguments", [[], ["--chunk-frames", "3"], ["--chunk-seconds", "1"], ["--max-chunk-frames", "2"]]
)
def test_chunking_changes_nothing_for_a_decoder_that_counts(arguments: list[str]) -> None:
    done = run(double({}, "--output", "raw", *arguments), STREAM + encoded(TOKENS))
    assert (done.returncode, done.stdout) == (0, PCM + PCM)


def test_wav_to_a_pipe_is_read_to_its_end() -> None:
    done = run(double({}, "--output", "wav"), STREAM)
    assert done.stdout[:4] == b"RIFF"
    assert done.stdout[44:] == PCM


def test_wav_to_a_file_has_its_true_size(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    with path.open("wb") as file:
        subprocess.run(double({}, "--output", "wav"), input=STREAM, stdout=file, cwd=ROOT, check=True)
    with wave.open(BytesIO(path.read_bytes())) as wav:
        assert (wav.getframerate(), wav.getnchannels(), wav.getnframes()) == (48000, 2, len(PCM) // 4)
        assert wav.readframes(wav.getnframes()) == PCM


def test_a_lone_frame_is_answered_while_the_input_stays_open() -> None:
    with Child(double()) as child:
        assert child.next().kind == Kind.HANDSHAKE
        child.say(Message(Kind.TOKENS, tokens_payload(FRAMES[:1])))
        assert child.next() == Message(Kind.AUDIO, expected_pcm(FRAMES[:1], SMALL))
        assert child.finish()[0] == 0


def test_input_byte_by_byte() -> None:
    with Child(double()) as child:
        for byte in STREAM:
            child.write(bytes([byte]))
        assert pcm_of(child.until(Kind.END)) == PCM


def test_frames_that_come_while_a_chunk_is_decoded_go_into_one_chunk() -> None:
    with Child(double({"step_seconds": 0.3})) as child:
        child.next()
        for frame in FRAMES[:7]:
            child.say(Message(Kind.TOKENS, tokens_payload([frame])))
        child.say(END)
        chunks = [len(message.payload) // SMALL.frame_pcm_bytes for message in child.until(Kind.END)[:-1]]
    assert chunks == [1, 2, 4]


@pytest.mark.parametrize("arguments", [[], ["--chunk-frames", "4"]])
def test_settings_go_back_to_the_ramp_that_was_measured(arguments: list[str]) -> None:
    fixed, ramp = (json_message(Kind.SETTINGS, {"chunk_frames": frames}) for frames in (5, None))
    done = run(double({"ramp_second_frames": 8}, *arguments), encoded(fixed, TOKENS, END, ramp, TOKENS, END))
    sizes = [
        len(message.payload) // SMALL.frame_pcm_bytes for message in decoded(done.stdout) if message.kind == Kind.AUDIO
    ]
    assert sizes == [5, 5, 5, 5, 1, 8, 8, 3]
    assert done.stderr.count(b"measuring") == 1


def test_a_ramp_that_nobody_asks_for_is_not_measured() -> None:
    assert run(double({"ramp_second_frames": 8}, "--chunk-frames", "4"), STREAM).stderr == b""


@pytest.mark.skipif(codecs.default_threads() < 2, reason="needs two CPUs")
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_numpy_starts_no_threads_unless_the_user_wants_them() -> None:
    def threads(**wish: str) -> int:
        environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        with Child([*DEMO, "--threads", "1"], env={**environment, **wish}) as child:
            child.next()
            return len(list(Path(f"/proc/{child.process.pid}/task").iterdir()))

    assert threads() == threads(OPENBLAS_NUM_THREADS="1") == threads(OPENBLAS_NUM_THREADS="2") - 1


def test_a_frame_of_zeros_ends_a_stream_where_that_is_wanted() -> None:
    zeros = Message(Kind.TOKENS, tokens_payload([[0] * 4]))
    wire = encoded(TOKENS, zeros, TOKENS, END) + STREAM
    done = run(double({}, "--stop-on-zero-frame", "--chunk-frames", "3"), wire)
    assert (done.returncode, done.stderr) == (0, b"")
    assert outline(decoded(done.stdout)) == ["HANDSHAKE", "AUDIO", "END", "AUDIO", "END"]
    assert pcm_of(decoded(done.stdout)) == PCM + PCM
    refused = run(double({}, "--stop-on-zero-frame", "--encode"))
    assert (refused.returncode, b"leave it out with --encode" in refused.stderr) == (2, True)


def test_nothing_in_is_a_handshake_out() -> None:
    done = run(double())
    assert (done.returncode, outline(decoded(done.stdout))) == (0, ["HANDSHAKE"])


def test_the_demo_stream_gives_what_the_python_module_and_the_console_script_both_promise(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    with MELODY.open("rb") as stdin:
        script = [*PROCESS] if sys.platform == "win32" else [scripts / "mossnano-stdio"]  # no scripts under wine
        raw = subprocess.run([*script, "--weights", "demo", "--output", "raw"], stdin=stdin, capture_output=True,
                             check=True)  # fmt: skip
    framed = run(DEMO, MELODY.read_bytes())
    assert pcm_of(decoded(framed.stdout)) == raw.stdout
    assert len(raw.stdout) > 5 * 48000 * 4
    assert fields(decoded(framed.stdout)[0])["demo"] is True
    assert b"demo" in raw.stderr


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "status", "words"),
    [
        (STREAM + b"\x05", 65, ["HANDSHAKE", "AUDIO", "END", "input_cut"]),
        (encoded(TOKENS) + STREAM[:-1], 65, ["HANDSHAKE", "AUDIO", "input_cut", "END"]),
        (encoded(TOKENS) + bytes(4), 76, ["HANDSHAKE", "AUDIO", "framing_lost", "END"]),
        (STREAM + b"\xff\xff\xff\xff", 76, ["HANDSHAKE", "AUDIO", "END", "framing_lost"]),
        (artifact_bytes(FRAMES, SMALL), 76, ["HANDSHAKE", "framing_lost"]),
        (encoded(Message(Kind.ARTIFACT, artifact_bytes(FRAMES, SMALL)[:-1])), 65, ["HANDSHAKE", "bad_artifact", "END"]),
        (encoded(Message(Kind.TOKENS, b"\xff"), END) + STREAM, 0,
         ["HANDSHAKE", "bad_tokens", "END", "AUDIO", "END"]),
    ],
)  # fmt: skip
def test_bad_input_drains_what_is_whole_and_ends_as_documented(wire: bytes, status: int, words: list[str]) -> None:
    done = run(double({}, "--chunk-frames", "20"), wire)
    assert outline(decoded(done.stdout)) == words
    assert done.returncode == status
    assert (len(done.stderr.splitlines()) > 0) == any("_" in word for word in words)


def test_a_bare_artifact_is_told_how_to_be_framed() -> None:
    done = run(double(), artifact_bytes(FRAMES, SMALL))
    assert b"mossnano frame FILE | mossnano-stdio" in done.stderr


@pytest.mark.parametrize("output", ["raw", "wav"])
def test_without_messages_an_error_shows_in_the_status(output: str) -> None:
    done = run(double({}, "--output", output), encoded(Message(Kind.TOKENS, b"\xff"), END) + STREAM)
    assert done.returncode == 65
    assert done.stdout.endswith(PCM)
    assert b"mossnano-stdio: error: " in done.stderr


@pytest.mark.parametrize("output", ["framed", "raw"])
def test_on_error_stop_ends_at_the_first_error(output: str) -> None:
    done = run(double({}, "--on-error", "stop", "--output", output), STREAM + encoded(Message(0x77)) + STREAM)
    assert done.returncode == 65
    if output == "framed":
        assert outline(decoded(done.stdout)) == ["HANDSHAKE", "AUDIO", "END", "unknown_kind"]
    else:
        assert done.stdout == PCM


def test_a_silenced_chunk_counts_as_an_error_where_only_pcm_goes_out() -> None:
    done = run(double({"not_finite_steps": [2]}, "--output", "raw", "--chunk-frames", "10"), STREAM)
    assert done.returncode == 65
    assert done.stdout == expected_pcm(FRAMES[:10], SMALL) + bytes(10 * SMALL.frame_pcm_bytes)


@pytest.mark.parametrize(
    ("raised", "status", "code"), [("MemoryError", 71, "out_of_memory"), ("ZeroDivisionError", 70, "bug")]
)
@pytest.mark.parametrize("step", ["0", "2"])
def test_what_cannot_go_on_says_so_and_ends(raised: str, status: int, code: str, step: str) -> None:
    done = run(double({"raising": {step: raised}}), STREAM)
    messages = decoded(done.stdout)
    assert done.returncode == status
    assert fields(messages[-1])["code"] == code
    assert fields(messages[-1])["fatal"] is True
    assert (b"Traceback" in done.stderr) == (status == 70)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--weights", "/no/where"], str(Path("/no/where"))), (["--weights", "demo", "--provider", "coreml"], "coreml")],
)
def test_weights_that_do_not_load_are_an_error_in_place_of_the_handshake(arguments: list[str], named: str) -> None:
    done = run([*PROCESS, *arguments])
    assert done.returncode == 66
    (message,) = decoded(done.stdout)
    assert fields(message) | {"message": ""} == {"code": "bad_weights", "message": "", "stream": None, "fatal": True}
    assert named in fields(message)["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="only here are names any bytes")
def test_a_path_that_is_no_text_is_shown_as_text(tmp_path: Path) -> None:
    """A lone surrogate in JSON is refused by half of all readers."""
    folder = Path(shutil.copytree(MELODY.parent / "weights", tmp_path / os.fsdecode(b"gew\xf6hnlich")))
    whole = run([*PROCESS, "--weights", str(folder)], MELODY.read_bytes())
    assert whole.returncode == 0
    assert fields(decoded(whole.stdout)[0])["weights"] == str(tmp_path / "gew?hnlich")
    assert pcm_of(decoded(whole.stdout)) == pcm_of(decoded(run(DEMO, MELODY.read_bytes()).stdout))
    (folder / "demo_decode_step.onnx").write_bytes(b"none")
    damaged = run([*PROCESS, "--weights", str(folder)])
    assert damaged.returncode == 66
    assert str(tmp_path / "gew?hnlich") in fields(decoded(damaged.stdout)[0])["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="files that are in use are neither renamed nor removed there")
@pytest.mark.parametrize("graph", ["official", "fast"])
def test_weights_are_replaced_by_renaming_as_the_page_says(built_bundle: Path, tmp_path: Path, graph: str) -> None:
    folder, other = tmp_path / "weights", tmp_path / "new"
    shutil.copytree(built_bundle, folder)
    shutil.copytree(built_bundle, other)
    for path in other.glob("*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    command = [*PROCESS, "--weights", str(folder), "--graph", graph, "--chunk-frames", "1", "--threads", "1"]
    expected = pcm_of(decoded(run(command, encoded(NANO_TOKENS, END)).stdout))
    with Child(command) as child:
        child.next()
        folder.rename(tmp_path / "old")
        other.rename(folder)
        shutil.rmtree(tmp_path / "old")
        child.say(NANO_TOKENS, END)
        assert pcm_of(child.until(Kind.END)) == expected
    assert "Weights stay mapped from their files while it runs" in (ROOT / "protocol.md").read_text("utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--chunk-frames", "0"],
        ["--chunk-frames", "1001"],
        ["--chunk-frames", "+5"],
        ["--chunk-seconds", "nan"],
        ["--chunk-seconds", "0"],
        ["--chunk-frames", "1", "--chunk-seconds", "1"],
        ["--max-message-bytes", "4294967296"],
        ["--threads", "0"],
        ["--output", "mp3"],
        ["--no-such-flag"],
        ["--chunk-f", "1"],  # what is short today may mean two things tomorrow
        ["--volume", "nan", "--play"],
    ],
)
def test_a_wrong_command_line_is_refused_with_nothing_on_stdout(arguments: list[str]) -> None:
    done = run([*PROCESS, *arguments])
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize(
    "arguments", [["--device", "x"], ["--prebuffer-ms", "160"], ["--latency", "low"], ["--volume", "1"]]
)
@pytest.mark.parametrize("other", [[], ["--encode"]])
def test_a_flag_for_the_sound_card_needs_play(arguments: list[str], other: list[str]) -> None:
    """Its default too: who gives it wants to hear something."""
    done = run([*PROCESS, "--weights", "demo", *arguments, *other])
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"{arguments[0]} is for the sound card, which is used with --play only: add that".encode() in done.stderr


def test_messages_longer_than_max_message_bytes_are_refused() -> None:
    assert run(double({}, "--max-message-bytes", str(len(TOKENS.payload))), STREAM).returncode == 76
    assert run(double({}, "--max-message-bytes", str(len(TOKENS.payload) + 1)), STREAM).returncode == 0


# --- the inbox and statistics ------------------------------------------------------------------------


def test_a_full_inbox_stops_reading_and_nothing_is_lost() -> None:
    if sys.platform == "win32":
        pytest.skip("what a pipe has taken, and no more, is not known there")
    frames = some_frames(3000, NANO)
    with Child(double({"nano": True})) as child:
        child.next()
        os.set_blocking(child.stdin_fd, False)
        wire = encoded(*(Message(Kind.TOKENS, tokens_payload(frames[at : at + 1000])) for at in (0, 1000, 2000)))
        wire += encoded(*[Message(Kind.PING, bytes(10_000))] * 1000)
        taken_bytes, deadline = 0, time.monotonic() + 2
        while time.monotonic() < deadline:
            try:
                taken_bytes += os.write(child.stdin_fd, wire[taken_bytes:])
            except BlockingIOError:
                time.sleep(0.05)
        assert INBOX_BYTES <= taken_bytes <= INBOX_BYTES + 400_000
        os.set_blocking(child.stdin_fd, True)
        pid = os.fork()
        if pid == 0:
            child.write(wire[taken_bytes:])
            os._exit(0)
        heard = b"".join(pcm_of(child.until(Kind.PING)) for _ in range(1000))
        os.waitpid(pid, 0)
    assert heard == expected_pcm(frames, NANO)


def test_statistics_at_the_end_and_on_request() -> None:
    with Child(double({}, "--stats")) as child:
        child.next()
        child.write(STREAM)
        child.until(Kind.END)
        asked: list[dict[str, Any]] = []
        if sys.platform != "win32":
            child.process.send_signal(signal.SIGUSR1)
            asked = [json.loads(child.stderr.readline())]
        _, _, err = child.finish()
    final = json.loads(err)
    for stats in (*asked, final):
        assert (stats["streams"], stats["frames"], stats["errors"]) == (1, 20, 0)
        assert stats["peak_resident_bytes"] > 10_000_000
        assert stats["step_p50_ms"] <= stats["step_p95_ms"]
        assert stats["first_audio_p50_ms"] > 0
        assert stats["chunks"] == {"1": 1, "2": 1, "4": 1, "8": 1, "5": 1}
        (stream,) = stats["latest_streams"]
        assert (stream["stream"], stream["is_numbered"], stream["chunks"]) == (0, False, stats["chunks"])
        assert stream["lateness_p50_ms"] <= stream["lateness_p99_ms"]
        assert stream["held_p50_ms"] >= 0


# --- numbered streams and the form of the sound ------------------------------------------------------


@pytest.mark.parametrize("threads", [[], ["--threads", "1"]], ids=["in turn", "side by side"])
def test_voices_speak_through_one_pipe(threads: list[str]) -> None:
    voices = {number: some_frames(30, seed=number) for number in range(16)}
    with Child(double({}, "--stats", *threads)) as child:
        assert fields(child.next())["max_streams"] == 32
        for number, frames in voices.items():
            child.say(in_stream(number, Message(Kind.TOKENS, tokens_payload(frames[:10]))))
        for number, frames in voices.items():
            child.say(in_stream(number, Message(Kind.TOKENS, tokens_payload(frames[10:]))), in_stream(number, END))
        child.say(TOKENS)
        status, answers, err = child.finish()
    assert status == 0
    heard: dict[int, bytes] = dict.fromkeys(voices, b"")
    for answer in answers:
        if answer.kind & 0x80:
            number, inner = out_of_stream(answer)
            heard[number] += inner.payload if inner.kind == Kind.AUDIO else b""
    assert heard == {number: expected_pcm(frames, SMALL) for number, frames in voices.items()}
    assert pcm_of(answers) == PCM
    stats = json.loads(err)
    assert (stats["streams"], stats["numbered_streams"]) == (1, 16)
    assert 8 <= len(stats["latest_streams"]) <= 17  # as many as one line holds


def test_a_voice_without_credit_waits_alone() -> None:
    with Child(double({}, "--window-samples", "16")) as child:
        child.next()
        child.say(in_stream(1, TOKENS), in_stream(1, END), in_stream(2, TOKENS), TOKENS, END)
        answers, heard = child.until(Kind.END), {1: b"", 2: b""}
        assert pcm_of(answers) == PCM
        while answers or min(map(len, heard.values())) < 4 * SMALL.frame_pcm_bytes:
            answer = answers.pop(0) if answers else child.next()
            if answer.kind == Kind.AUDIO | NUMBERED:
                number, audio = out_of_stream(answer)
                heard[number] += audio.payload
        assert heard == dict.fromkeys((1, 2), PCM[: 4 * SMALL.frame_pcm_bytes])  # 16 samples, in chunks of any size
        child.say(in_stream(1, Message(Kind.CREDIT, (1 << 40).to_bytes(8, "little"))))
        assert fields(out_of_stream(child.until(Kind.END | NUMBERED)[-1])[1])["frames"] == len(FRAMES)
        child.say(in_stream(2, Message(Kind.CANCEL)))
        assert fields(out_of_stream(child.until(Kind.END | NUMBERED)[-1])[1])["frames"] == 4


@pytest.mark.parametrize("output", ["raw", "wav"])
def test_where_only_sound_goes_out_there_are_no_voices_and_one_form(output: str) -> None:
    settings = json_message(Kind.SETTINGS, {"channels": 1})
    done = run(double({}, "--output", output), encoded(in_stream(1, TOKENS), settings) + STREAM)
    assert f"there are no numbered streams here: --output {output} has no place for them".encode() in done.stderr
    assert (
        f"the form of the sound cannot be set: --output {output} has one form for the whole run".encode() in done.stderr
    )
    assert done.stdout.endswith(PCM)


def test_flags_set_the_form_and_settings_override_them() -> None:
    flags = ["--channels", "1", "--sample-format", "f32le", "--gain-db", "-6", "--levels-ms", "10"]
    back = {"channels": 2, "sample_format": "s16le", "gain_db": 0, "levels_ms": 0}
    hello, levels, *_ = decoded(run(double({}, *flags), STREAM).stdout)
    said = fields(hello)
    assert {name: said[name] for name in back} == {
        "channels": 1,
        "sample_format": "f32le",
        "gain_db": -6.0,
        "levels_ms": 10,
    }
    assert levels.kind in (Kind.LEVELS, Kind.AUDIO)
    done = run(double({}, *flags), encoded(json_message(Kind.SETTINGS, back)) + STREAM)
    assert pcm_of(decoded(done.stdout)) == PCM


@pytest.mark.parametrize("output", ["raw", "wav"])
def test_the_form_of_bare_sound_is_set_by_flags(output: str) -> None:
    done = run(double({}, "--output", output, "--channels", "1", "--sample-format", "f32le"), STREAM)
    samples = np.frombuffer(PCM, "<i2").reshape(-1, 2) / np.float32(32767)
    assert done.returncode == 0
    np.testing.assert_allclose(
        np.frombuffer(done.stdout[-len(samples) * 4 :], "<f4"), samples.mean(axis=1), rtol=0, atol=1e-6
    )
    assert done.stdout.startswith(b"RIFF") == (output == "wav")


def test_a_rate_of_ones_own() -> None:
    done = run(double({"nano": True}, "--sample-rate", "16000", "--output", "raw"), encoded(TOKENS_NANO, END))
    assert len(done.stdout) == len(FRAMES_NANO) * 1280 * 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sample-rate", "7999"], b"a whole number from 8000 to 192000"),
        (["--channels", "3"], b"a whole number from 1 to 2"),
        (["--sample-format", "mp3"], b"s16le"),
        (["--gain-db", "nan"], b"a number from -60 to 20"),
        (["--levels-ms", "15"], b"--levels-ms"),
        (["--window-samples", "3"], b"allowed is 4 or more"),
        (["--encode", "--gain-db", "1"], b"--gain-db is for decoding"),
    ],
)
def test_a_form_that_cannot_be_is_a_wrong_command_line(arguments: list[str], says: bytes) -> None:
    done = run(double({}, *arguments))
    assert done.returncode == 2
    assert says in done.stderr


def test_log_lines_as_json() -> None:
    done = run(double({}, "--log-json"), encoded(Message(0x77)))
    line = json.loads(done.stderr)
    assert (line["level"], "kind 0x77" in line["message"]) == ("error", True)


# --- cancel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False], ids=["while decoding", "while the reader stalls"])
def test_a_cancel_overtakes_what_waits(reads: bool) -> None:
    with Child(double({"nano": True, "step_seconds": 0.05})) as child:
        child.next()
        child.say(Message(Kind.TOKENS, tokens_payload(some_frames(1000, NANO))), END)
        if reads:
            child.next()
        else:
            time.sleep(0.6)
        child.say(Message(Kind.CANCEL, b"stop"), TOKENS_NANO, END)
        answers = child.until(Kind.END)
        end = fields(answers[-1])
        assert (end["cancelled"], end["stream"], end["next_stream"], end["echo"]) == (True, 0, 1, "stop")
        assert end["frames"] < 60
        assert pcm_of(child.until(Kind.END)) == expected_pcm(FRAMES_NANO, NANO)


FRAMES_NANO = some_frames(5, NANO, seed=1)
TOKENS_NANO = Message(Kind.TOKENS, tokens_payload(FRAMES_NANO))


# --- protocol.md -----------------------------------------------------------------------------------

PROTOCOL = (ROOT / "protocol.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("marker", "table"), [("<!-- transitions -->", DECODING), ("<!-- transitions encode -->", ENCODING)]
)
def test_the_transition_tables_of_the_document_are_those_of_the_program(
    marker: str, table: Mapping[tuple[State, Kind], Action]
) -> None:
    text = PROTOCOL.split(marker)[1].split("Everything else")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    states = [State(name) for name in rows[0][1:]]
    documented = {(state, Kind[row[0]]): cell for row in rows[2:] for state, cell in zip(states, row[1:], strict=True)}
    assert documented == {cell: action.__name__.replace("_", " ") for cell, action in table.items()}


def test_the_table_of_codecs_has_the_published_ones() -> None:
    text = PROTOCOL.split("<!-- codecs -->")[1].split("What we stream")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    names = [name for name in rows[0] if name not in ("`--model`", "codec, as fetched", "frame_bytes")]
    for (model, folder, *numbers), published in zip(rows[2:], MODELS.values(), strict=True):
        assert MODELS[model] is published
        assert folder == (published.maybe_folder_name or published.checkpoint.name)  # what is built is called so
        *said, frame_bytes = map(int, numbers)
        assert said == [getattr(published.format, name) for name in names]
        one_frame = np.zeros((1, published.format.quantizers), np.uint16)
        assert frame_bytes == len(pack_frames(one_frame, published.format.codebook_size))


def test_the_hex_dump_of_the_encoder_is_audio() -> None:
    (dump,) = re.findall(r"^```hex in encode$(.*?)^```$", PROTOCOL, re.M | re.S)
    wire = bytes.fromhex(re.sub(r"#.*", "", dump))
    done = run(double({}, "--encode"), wire)
    (_, tokens, end) = decoded(done.stdout)
    assert tokens.payload == tokens_payload(expected_codes(wire[5:]))
    assert fields(end)["original_samples"] == 3


@pytest.mark.parametrize(
    ("name", "direction", "dump"),
    re.findall(r"^### 0x.. (\w+)$(?:(?!^###).)*?^```hex (in|out)$(.*?)^```$", PROTOCOL, re.M | re.S),
)
def test_the_hex_dumps_of_the_document_are_messages_that_do_what_they_say(name: str, direction: str, dump: str) -> None:
    wire = bytes.fromhex(re.sub(r"#.*", "", dump))
    (message,) = decoded(wire)
    assert Kind(message.kind & ~NUMBERED).name == name
    assert encode_message(*message) == wire
    if direction == "in":
        expected = {"END": ["no_stream"], "ARTIFACT": ["bad_artifact"], "CREDIT": ["no_stream"]}.get(name, [])
        done = run(DEMO if expected else [*DEMO, "--on-error", "stop"], wire)
        answers = [(answer.kind & ~NUMBERED, answer) for answer in decoded(done.stdout)]
        errors = [answer.payload for kind, answer in answers if kind == Kind.ERROR]
        assert len(errors) == len(expected)
        assert all(code.encode() in error for code, error in zip(expected, errors, strict=True))


def test_the_document_shows_every_kind() -> None:
    shown = set(re.findall(r"^### 0x.. (\w+)$", PROTOCOL, re.M))
    assert shown == {kind.name for kind in Kind} - {"TEXT"}


CONVERSATIONS = re.findall(r"```conversation\n(.*?)```", PROTOCOL, re.S)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one voice", "two voices"])
def test_the_conversations_of_the_document(conversation: str) -> None:
    with Child([*DEMO, "--chunk-frames", "1"]) as child:
        for line in conversation.splitlines():
            direction, _, said = line.partition(" ")
            if direction == ">":
                child.write(bytes.fromhex(said))
                continue
            kind, name, what = said.split(" ", 2)
            message = child.next()
            assert f"{message.kind:02x}" == kind
            if message.kind & NUMBERED:
                number, message = out_of_stream(message)
                assert what.startswith(f"of {number} ")
                what = what.removeprefix(f"of {number} ")
            assert Kind(message.kind).name == name
            if what.endswith(" bytes"):
                assert f"{len(message.payload)} bytes" == what
            elif what.startswith("{"):
                expected = json.loads(what)
                assert {key: value for key, value in fields(message).items() if key in expected} == expected
            else:
                assert message.payload.hex(" ") == what
        assert child.finish()[:2] == (0, [])


# --- the other direction ---------------------------------------------------------------------------


def noise_pcm(samples: int) -> bytes:
    return np.random.default_rng(0).integers(-32767, 32768, samples * 2).astype("<i2").tobytes()


def test_encoding_answers_each_frame_as_it_fills() -> None:
    pcm = noise_pcm(10)
    with Child(double({}, "--encode")) as child:
        assert fields(child.next())["direction"] == "encode"
        child.say(Message(Kind.AUDIO, pcm[:17]))
        assert child.next() == Message(Kind.TOKENS, tokens_payload(expected_codes(pcm[:16])))
        child.say(Message(Kind.AUDIO, pcm[17:]), END)
        answers = child.until(Kind.END)
    assert b"".join(answer.payload for answer in answers[:-1]) == tokens_payload(expected_codes(pcm)[1:])
    assert fields(answers[-1])["original_samples"] == 10


def test_an_encoder_piped_into_a_decoder_is_understood() -> None:
    pcm = noise_pcm(50)
    encoder = run(double({}, "--encode"), encoded(Message(Kind.AUDIO, pcm)))
    decoder = run(double({}, "--output", "raw"), encoder.stdout)
    assert (encoder.returncode, decoder.returncode, decoder.stderr) == (0, 0, b"")
    assert decoder.stdout == expected_pcm(expected_codes(pcm), SMALL)


@pytest.mark.parametrize("arguments", [["--output", "raw"], ["--output", "wav"], ["--play"], ["--graph", "fast"]])
def test_what_only_decoding_knows_is_refused_when_encoding(arguments: list[str]) -> None:
    assert run([*PROCESS, "--encode", *arguments]).returncode == 2
