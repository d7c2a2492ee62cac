"""`mossnano decode`: the process's PCM in a file, byte for byte, and nothing where it could not be made."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.pcm import from_pcm16
from mossnano_stdio.pcm.recordings import read_audio
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.weights import DEMO_FOLDER
from tests.child import PROCESS
from tests.tool import COMMAND, call_tool, run_tool

MELODY = DEMO_FOLDER.parent / "melody.mossnano"
ORIGINAL_SAMPLES = 24 * 3840 - 1234


@pytest.fixture(scope="module")
def artifact(tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny goldens' codes, of a recording that ended inside its last frame."""
    codes = np.load(tiny_reference / "codes.npy")
    path = tmp_path_factory.mktemp("artifact") / "golden.mossnano"
    path.write_bytes(build_artifact(Artifact(48000, 2, ORIGINAL_SAMPLES, 16, 24, 1024, codes)))
    return path


@pytest.mark.parametrize("chunking", [[], ["--chunk-frames", 5], ["--chunk-seconds", 1.333], ["--chunk-frames", 1]])
def test_is_what_the_process_says(artifact: Path, tiny_bundle: Path, chunking: list[object]) -> None:
    weights = ["--weights", tiny_bundle, "--threads", 1]
    framed = run_tool("frame", artifact).out
    arguments = [*PROCESS, "--output", "raw", *weights, *chunking]
    said = subprocess.run([*map(str, arguments)], input=framed, capture_output=True, timeout=60, check=True).stdout
    assert len(said) == ORIGINAL_SAMPLES * 4
    assert call_tool("decode", artifact, "-", *weights, *chunking).out == said


@pytest.mark.parametrize("decoder", ["step", "full"])
def test_goldens(artifact: Path, tiny_reference: Path, tiny_bundle: Path, tmp_path: Path, decoder: str) -> None:
    raw, wav = tmp_path / "out.pcm", tmp_path / "out.WAV"
    arguments = ["--weights", tiny_bundle, "--decoder", decoder]
    assert call_tool("decode", artifact, raw, *arguments).status == 0
    assert call_tool("decode", artifact, wav, *arguments).status == 0
    golden = np.load(tiny_reference / "audio.npy").T[:ORIGINAL_SAMPLES]
    assert np.abs(from_pcm16(raw.read_bytes(), 2) - golden).max() <= 1.01 / 32767
    recording = read_audio(io.BytesIO(wav.read_bytes()), "out.WAV")
    assert recording.sample_rate == 48000
    assert np.array_equal(recording.audio, from_pcm16(raw.read_bytes(), 2))
    assert wav.read_bytes()[44:] == raw.read_bytes()


def test_the_summary(artifact: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    outcome = call_tool("decode", artifact, tmp_path / "x.wav", "--weights", tiny_bundle, "--threads", 2, "--json")
    summary = json.loads(outcome.out)
    assert outcome.err == ""
    assert summary["frames"] == 24
    assert summary["seconds"] == ORIGINAL_SAMPLES / 48000
    assert summary["chunks"] == 6  # 1, 2, 4, 8, 8, 1
    assert summary["threads"] == 2
    assert summary["provider"] == "cpu"
    assert summary["graph"] == "official"
    assert summary["weights"] == str(tiny_bundle)
    assert summary["demo"] is False
    assert 0 < summary["first_audio_ms"] <= 1000 * summary["decode_seconds"]
    assert summary["real_time_factor"] == pytest.approx(24 * 0.08 / summary["decode_seconds"], rel=0.01)


def test_the_demo_is_labelled(tmp_path: Path) -> None:
    outcome = call_tool("decode", MELODY, tmp_path / "x.wav", "--weights", "demo", "--json")
    assert "demo" in outcome.error_line
    assert json.loads(outcome.out)["demo"] is True


def test_an_artifact_of_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    empty = build_artifact(Artifact(48000, 2, 0, 16, 0, 1024, np.zeros((0, 16), np.uint16)))
    for decoder in ("step", "full"):
        outcome = call_tool("decode", "-", "-", "--weights", tiny_bundle, "--decoder", decoder, stdin=empty)
        assert (outcome.status, outcome.out) == (0, b"")
    outcome = call_tool("decode", "-", tmp_path / "x.wav", "--weights", tiny_bundle, "--json", stdin=empty)
    assert json.loads(outcome.out)["real_time_factor"] is None
    assert len((tmp_path / "x.wav").read_bytes()) == 44


@pytest.mark.parametrize("decoder", ["step", "full"])
def test_a_frame_of_zeros_ends_a_recording_where_that_is_wanted(
    tiny_reference: Path, tiny_bundle: Path, tmp_path: Path, decoder: str
) -> None:
    codes = np.load(tiny_reference / "codes.npy")
    whole, cut = tmp_path / "whole.mossnano", tmp_path / "cut.mossnano"
    cut.write_bytes(build_artifact(Artifact(48000, 2, 9 * 3840, 16, 9, 1024, codes[:9])))
    codes[9] = 0
    whole.write_bytes(build_artifact(Artifact(48000, 2, ORIGINAL_SAMPLES, 16, 24, 1024, codes)))
    arguments = ["--weights", tiny_bundle, "--decoder", decoder]
    assert call_tool("decode", cut, tmp_path / "a.wav", *arguments).status == 0
    outcome = call_tool("decode", whole, tmp_path / "b.wav", *arguments, "--stop-on-zero-frame", "--json")
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()
    assert json.loads(outcome.out)["frames"] == 9


def artifact_bytes(
    sample_rate: int = 48000, channels: int = 2, quantizers: int = 16, codebook_size: int = 1024
) -> bytes:
    codes = np.zeros((2, quantizers), np.uint16)
    return build_artifact(Artifact(sample_rate, channels, 2 * 3840, quantizers, 2, codebook_size, codes))


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "words"),
    [
        (["-", "x.wav"], artifact_bytes(sample_rate=44100), ExitStatus.BAD_INPUT, "44100, these weights decode 48000"),
        (["-", "x.wav"], artifact_bytes(channels=1), ExitStatus.BAD_INPUT, "channels is 1"),
        (["-", "x.wav"], artifact_bytes(quantizers=8), ExitStatus.BAD_INPUT, "these weights decode 16 only"),
        (["-", "x.wav"], artifact_bytes(codebook_size=512), ExitStatus.BAD_INPUT, "codebook_size is 512"),
        (["-", "x.wav"], artifact_bytes()[:-1], ExitStatus.BAD_INPUT, "stdin: the artifact is cut"),
        (["missing", "x.wav"], b"", ExitStatus.NO_WEIGHTS, "missing"),
        (["-", "x.wav", "--weights", "nowhere"], artifact_bytes(), ExitStatus.NO_WEIGHTS, "nowhere: is not there"),
        (["-", "no/folder/x.wav"], artifact_bytes(), ExitStatus.OUTPUT_FAILED, "ENOENT"),
        (["-", "-", "--json"], artifact_bytes(), ExitStatus.USAGE, "both want stdout"),
        (["-", "x.wav", "--provider", "gpu"], artifact_bytes(), ExitStatus.USAGE, "allowed are cpu, cuda"),
        (["-", "x.wav", "--provider", "cuda"], artifact_bytes(), ExitStatus.NO_WEIGHTS, "here there are cpu"),
        (["-", "x.wav", "--graph", "fast"], artifact_bytes(), ExitStatus.NO_WEIGHTS, "has no fast graph"),
        (
            ["-", "x.wav", "--decoder", "full", "--chunk-frames", "3"],
            artifact_bytes(),
            ExitStatus.USAGE,
            "--decoder full has no chunks",
        ),
    ],
)
def test_a_failed_run_says_why_and_leaves_nothing(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    stdin: bytes,
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--weights" not in arguments:
        arguments = [*arguments, "--weights", str(tiny_bundle)]
    outcome = call_tool("decode", *arguments, stdin=stdin)
    assert outcome.status == status
    assert words in outcome.error_line
    assert outcome.out == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--chunk-frames", "0"], ["--chunk-seconds", "nan"], ["--threads", "0"]])
def test_flags_out_of_range(flags: list[str]) -> None:
    outcome = call_tool("decode", "-", "x.wav", *flags, stdin=artifact_bytes())
    assert outcome.status == ExitStatus.USAGE
    assert f"argument {flags[0]}" in outcome.err


# --- parts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds: more than all contexts of the tiny model together."""
    codes = np.random.default_rng(7).integers(0, 1024, (100, 16)).astype(np.uint16)
    path = tmp_path_factory.mktemp("long") / "long.mossnano"
    path.write_bytes(build_artifact(Artifact(48000, 2, 100 * 3840 - 500, 16, 100, 1024, codes)))
    return path


@pytest.mark.parametrize("graph", ["official", "fast"])
@pytest.mark.parametrize(("start", "duration"), [(5.013, 1.5), (0.0, 0.001), (7.9, 60.0), (4.0, None), (None, 2.0)])
def test_a_part_is_what_the_whole_has_there(
    long_artifact: Path, built_bundle: Path, graph: str, start: float | None, duration: float | None
) -> None:
    weights = ["--weights", built_bundle, "--graph", graph]
    flags = [*(["--start", start] if start is not None else []), *(["--duration", duration] if duration else [])]
    whole = from_pcm16(call_tool("decode", long_artifact, "-", *weights).out, 2)
    part = from_pcm16(call_tool("decode", long_artifact, "-", *weights, *flags).out, 2)
    first = round((start or 0) * 48000)
    end = len(whole) if duration is None else min(len(whole), round(((start or 0) + duration) * 48000))
    assert len(part) == end - first
    assert np.abs(part - whole[first:end]).max() <= 1.01 / 32767


def test_less_warm_up_is_further_off(long_artifact: Path, built_bundle: Path, tmp_path: Path) -> None:
    weights = ["--weights", built_bundle]
    whole = from_pcm16(call_tool("decode", long_artifact, "-", *weights).out, 2)[5 * 48000 : 6 * 48000]

    def error_steps(*flags: object) -> float:
        part = call_tool("decode", long_artifact, "-", *weights, "--start", 5, "--duration", 1, *flags).out
        return float(np.abs(from_pcm16(part, 2) - whole).max() * 32767)

    curve = [error_steps("--warm-up", seconds) for seconds in (0, 0.8, 2)]
    assert curve[0] > curve[1] > curve[2]
    assert curve[1] > 10
    assert error_steps() <= 1.01


def test_the_summary_of_a_part(long_artifact: Path, built_bundle: Path, tmp_path: Path) -> None:
    flags = ["--weights", built_bundle, "--start", 1, "--duration", 0.5, "--json"]
    summary = json.loads(call_tool("decode", long_artifact, tmp_path / "x.wav", *flags).out)
    assert summary["seconds"] == 0.5
    assert summary["frames"] == 7  # from inside frame 12 to inside frame 18
    assert len((tmp_path / "x.wav").read_bytes()) == 44 + 24000 * 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--start", "8"], "start is 8.0, allowed is 0 up to the end, at 7.98"),
        (["--start", "-1"], "'-1': a number of seconds from 0 is allowed"),
        (["--start", "nan"], "'nan': a number of seconds from 0 is allowed"),
        (["--duration", "0"], "duration is 0.0"),
        (["--warm-up", "1"], "--warm-up is for what lies before --start"),
        (["--start", "1", "--decoder", "full"], "leave --start, --duration and --warm-up out"),
    ],
)
def test_parts_that_are_none(long_artifact: Path, built_bundle: Path, flags: list[str], words: str) -> None:
    outcome = call_tool("decode", long_artifact, "-", "--weights", built_bundle, *flags)
    assert outcome.status == ExitStatus.USAGE
    assert words in outcome.err
    assert outcome.out == b""


def test_sound_that_is_none_is_an_error(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file must not hold silence where the graph failed."""
    from mossnano_stdio.codecs.moss import OfficialDecoder

    genuine = OfficialDecoder.step

    def spoilt(self, codes):  # type: ignore[no-untyped-def]
        audio = genuine(self, codes).copy()
        audio[7, 1] = np.nan
        return audio

    monkeypatch.setattr(OfficialDecoder, "step", spoilt)
    outcome = call_tool("decode", MELODY, tmp_path / "x.wav", "--weights", "demo")
    assert outcome.status == ExitStatus.BUG
    assert "sample 7 of channel 1 is nan" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_bar_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals to make and read")
    import pty
    import termios

    arguments = ["decode", MELODY, tmp_path / "x.wav", "--weights", "demo"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    try:
        subprocess.run([*COMMAND, *map(str, arguments)], stderr=theirs, check=True, timeout=60)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "/91" in shown
    assert "/91" not in run_tool(*arguments).err


def test_a_reader_who_leaves_is_no_error() -> None:
    command = [*COMMAND, "decode", str(MELODY), "-", "--weights", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(100)) == 100
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == ExitStatus.READER_GONE
    assert b"Traceback" not in err
