"""`mossnano encode`: what the library encodes, from files of any kind and length."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from mossnano_stdio import Codec, EncodedAudio
from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.pcm import from_pcm16, to_pcm16, wav_header
from tests.tool import COMMAND, call_tool, run_tool

Audio = NDArray[np.float32]


@pytest.fixture(scope="module")
def pcm(tiny_reference: Path) -> bytes:
    return to_pcm16(np.load(tiny_reference / "wave.npy").T)


@pytest.fixture(scope="module")
def wav(pcm: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wav") / "wave.wav"
    path.write_bytes(wav_header(48000, 2, len(pcm)) + pcm)
    return path


@pytest.fixture(scope="module")
def codec(built_bundle: Path) -> Codec:
    return Codec.load(built_bundle, threads=1)


@pytest.mark.parametrize("weights", ["built_bundle", "tiny_bundle"])
def test_is_what_the_library_encodes(
    wav: Path, pcm: bytes, tmp_path: Path, weights: str, codec: Codec, request: pytest.FixtureRequest
) -> None:
    """By the streaming graph and by the one for whole files."""
    out = tmp_path / "x.mossnano"
    outcome = call_tool("encode", wav, out, "--weights", request.getfixturevalue(weights))
    assert outcome.status == 0
    encoded = EncodedAudio.load(out)
    assert encoded.original_samples == 47080
    assert np.array_equal(encoded.codes, codec.encode(from_pcm16(pcm, 2).T).codes)
    assert re.fullmatch(r"mossnano encode: .*x\.mossnano: 0\.98 s, encoded .* x real time", outcome.error_line)


def test_through_pipes(wav: Path, tmp_path: Path, built_bundle: Path) -> None:
    out = tmp_path / "x.mossnano"
    assert call_tool("encode", wav, out, "--weights", built_bundle).status == 0
    piped = run_tool("encode", "-", "-", "--weights", built_bundle, stdin=wav.read_bytes())
    assert piped.out == out.read_bytes()


def test_decode_gives_the_very_length(wav: Path, tmp_path: Path, built_bundle: Path) -> None:
    assert call_tool("encode", wav, tmp_path / "x.mossnano", "--weights", built_bundle).status == 0
    assert call_tool("decode", tmp_path / "x.mossnano", tmp_path / "y.wav", "--weights", built_bundle).status == 0
    assert (tmp_path / "y.wav").stat().st_size == wav.stat().st_size


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize(("rate", "channels"), [(48000, 2), (44100, 1), (16000, 2)])
def test_files_of_every_kind(
    tmp_path: Path, built_bundle: Path, codec: Codec, kind: str, rate: int, channels: int
) -> None:
    times = np.arange(rate // 2) / rate
    tone = 0.3 * np.sin(2 * np.pi * 330 * times)[:, np.newaxis] * np.ones(channels)
    source, out = tmp_path / f"tone.{kind.lower()}", tmp_path / "x.mossnano"
    soundfile.write(source, tone, rate, format=kind)
    assert call_tool("encode", source, out, "--weights", built_bundle).status == 0
    audio, read_rate = soundfile.read(source, dtype="float32", always_2d=True)
    expected = codec.encode(audio.T, sample_rate=read_rate)
    encoded = EncodedAudio.load(out)
    assert encoded.original_samples == expected.original_samples == pytest.approx(24000, abs=3000)
    agreeing = (encoded.codes == expected.codes).mean()  # 16 bits are read as v / 32767 here, as v / 32768 there
    assert agreeing > 0.97


def test_the_summary(wav: Path, tmp_path: Path, built_bundle: Path) -> None:
    outcome = call_tool("encode", wav, tmp_path / "x.mossnano", "--weights", built_bundle, "--json", "--threads", 1)
    summary = json.loads(outcome.out)
    assert outcome.err == ""
    assert summary["frames"] == 13
    assert summary["original_samples"] == 47080
    assert summary["seconds"] == 47080 / 48000
    assert summary["quantizers"] == 16
    assert summary["file_bytes"] == (tmp_path / "x.mossnano").stat().st_size
    assert summary["graph"] == "encode_step"
    assert summary["threads"] == 1
    assert summary["real_time_factor"] == pytest.approx(summary["seconds"] / summary["encode_seconds"], rel=0.01)


def test_fewer_quantizers(wav: Path, tmp_path: Path, built_bundle: Path) -> None:
    for name, flags in (("all", []), ("some", ["--quantizers", 3])):
        assert call_tool("encode", wav, tmp_path / name, "--weights", built_bundle, *flags).status == 0
    some, everything = EncodedAudio.load(tmp_path / "some"), EncodedAudio.load(tmp_path / "all")
    assert some.quantizers == 3
    assert np.array_equal(some.codes, everything.codes[:3])


def test_a_recording_of_nothing(tmp_path: Path, built_bundle: Path) -> None:
    outcome = call_tool(
        "encode", "-", tmp_path / "x", "--weights", built_bundle, "--json", stdin=wav_header(48000, 2, 0)
    )
    assert outcome.status == 0
    assert json.loads(outcome.out)["real_time_factor"] is None
    assert EncodedAudio.load(tmp_path / "x").frames == 0


def wav_bytes(audio: NDArray[np.float64], rate: int = 48000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="WAV", subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "words"),
    [
        (["-", "OUT"], b"", ExitStatus.BAD_INPUT, "stdin is no audio file"),
        (["-", "OUT"], b"MOSSNANO" * 20, ExitStatus.BAD_INPUT, "stdin is no audio file"),
        (["-", "OUT"], wav_bytes(np.zeros((10, 3))), ExitStatus.BAD_INPUT, "3 channels, allowed are 1 and 2"),
        (["-", "OUT"], wav_bytes(np.full((9, 1), np.nan), 48000, "FLOAT"), ExitStatus.BAD_INPUT, "is nan"),
        (["-", "OUT"], wav_bytes(np.zeros((9, 2)), 999), ExitStatus.BAD_INPUT, "999 Hz, allowed are 1000 to 1048576"),
        (["missing.wav", "OUT"], b"", ExitStatus.NO_WEIGHTS, "missing.wav"),
        (["-", "-", "--json"], wav_bytes(np.zeros((10, 2))), ExitStatus.USAGE, "both want stdout"),
        (["-", "OUT", "--quantizers", "17"], wav_bytes(np.zeros((10, 2))), ExitStatus.USAGE, "these weights have 16"),
        (["-", "OUT", "--weights", "demo"], wav_bytes(np.zeros((10, 2))), ExitStatus.NO_WEIGHTS, "has no encoder"),
        (["-", "OUT", "--weights", "nowhere"], wav_bytes(np.zeros((10, 2))), ExitStatus.NO_WEIGHTS, "is not there"),
    ],
)
def test_a_failed_run_says_why_and_leaves_nothing(
    built_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    stdin: bytes,
    status: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--weights" not in arguments:
        arguments = [*arguments, "--weights", str(built_bundle)]
    outcome = call_tool("encode", *arguments, stdin=stdin)
    assert outcome.status == status
    assert words in outcome.error_line
    assert outcome.out == b""
    assert list(tmp_path.iterdir()) == []


def test_a_bar_on_a_terminal_and_nowhere_else(wav: Path, tmp_path: Path, built_bundle: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals to make and read")
    import pty
    import termios

    arguments = ["encode", wav, tmp_path / "x.mossnano", "--weights", built_bundle]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    try:
        subprocess.run([*COMMAND, *map(str, arguments)], stderr=theirs, check=True, timeout=60)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "/1.0" in shown
    assert "/1.0" not in run_tool(*arguments).err


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "minutes"), [("built_bundle", 60), ("nano_bundle", 5)])
def test_long_recordings_take_little_memory(
    tmp_path: Path, weights: str, minutes: int, request: pytest.FixtureRequest
) -> None:
    """Peak resident memory of the whole process. (An hour with nano takes as little, and many minutes.)

    Not as `resource` has it: that starts from what the process had that started this one.
    """
    source = tmp_path / "long.wav"
    noise = (0.1 * np.random.default_rng(0).standard_normal((44_100, 2))).astype(np.float32)
    with soundfile.SoundFile(source, "w", 44_100, 2, subtype="PCM_16") as sound:
        for second in range(60 * minutes):
            sound.write(np.roll(noise, 7 * second, axis=0))
    program = (
        "import re, sys; from mossnano_stdio.cli import main; status = main(sys.argv[1:]);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    arguments = ["encode", source, tmp_path / "x.mossnano", "--weights", request.getfixturevalue(weights)]
    run = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, check=True)
    assert int(run.stdout) * 1024 < 400e6
    assert EncodedAudio.load(tmp_path / "x.mossnano").original_samples == minutes * 60 * 48000
