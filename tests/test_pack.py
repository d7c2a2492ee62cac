"""The tools pack and unpack: an artifact there and back, in every form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.tokens import Artifact, build_artifact, parse_artifact
from tests.tool import call_tool, run_tool

REAL_CODES = Path(__file__).parents[2] / "shared" / "data" / "real_codes.jsonl"
CODES = np.random.default_rng(5).integers(0, 1024, (7, 16)).astype(np.uint16)
ARTIFACT = build_artifact(Artifact(48000, 2, 7 * 3840, 16, 7, 1024, CODES))
FORMS = ("u16le", "npy", "json")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "in.mossnano"
    path.write_bytes(ARTIFACT)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(artifact: Path, tmp_path: Path, form: str) -> None:
    codes, back = tmp_path / f"codes.{form}", tmp_path / "back.mossnano"
    assert call_tool("unpack", artifact, codes) == (0, b"", "")
    assert call_tool("pack", codes, back) == (0, b"", "")
    assert back.read_bytes() == ARTIFACT


def test_the_forms_hold_what_they_say(artifact: Path, tmp_path: Path) -> None:
    for form in FORMS:
        call_tool("unpack", artifact, tmp_path / f"x.{form}")
    assert (tmp_path / "x.u16le").read_bytes() == CODES.T.astype("<u2").tobytes()
    assert np.array_equal(np.load(tmp_path / "x.npy"), CODES)
    assert json.loads((tmp_path / "x.json").read_text()) == CODES.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_through_pipes(form: str) -> None:
    codes = run_tool("unpack", "-", "-", "--form", form, stdin=ARTIFACT)
    assert codes.status == 0
    assert run_tool("pack", "-", "-", "--form", form, stdin=codes.out) == (0, ARTIFACT, "")


def test_the_numbers_of_a_model(tmp_path: Path) -> None:
    codes = np.random.default_rng(6).integers(0, 1024, (3, 32)).astype(np.uint16)
    np.save(tmp_path / "codes.npy", codes)
    assert call_tool("pack", tmp_path / "codes.npy", tmp_path / "out", "--model", "24k").status == 0
    expected = build_artifact(Artifact(24000, 1, 3 * 1920, 32, 3, 1024, codes))
    assert (tmp_path / "out").read_bytes() == expected
    (tmp_path / "codes.u16le").write_bytes(codes.T.astype("<u2").tobytes())
    assert call_tool("pack", tmp_path / "codes.u16le", tmp_path / "out", "--model", "24k").status == 0
    assert (tmp_path / "out").read_bytes() == expected


def test_every_number_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "x.u16le").write_bytes(np.array([[0, 1, 2], [299, 4, 5]], dtype="<u2").tobytes())
    numbers = ["--original-samples", 123, "--sample-rate", 24000, "--channels", 1, "--codebook-size", 300]
    outcome = call_tool("pack", tmp_path / "x.u16le", "-", "--quantizers", 2, *numbers)
    parsed = parse_artifact(outcome.out)
    assert (parsed.sample_rate, parsed.channels, parsed.original_samples, parsed.codebook_size) == (24000, 1, 123, 300)
    assert parsed.codes.tolist() == [[0, 299], [1, 4], [2, 5]]


@pytest.mark.skipif(not REAL_CODES.exists(), reason="the real codes are not here")
@pytest.mark.parametrize("form", FORMS)
def test_real_codes_survive_pack_info_and_unpack(tmp_path: Path, form: str) -> None:
    for line in REAL_CODES.read_text("utf-8").splitlines():
        codes = json.loads(line)["audio_codes"]
        packed = call_tool("pack", "-", "-", "--form", "json", stdin=json.dumps(codes).encode())
        (tmp_path / "x.mossnano").write_bytes(packed.out)
        facts = json.loads(call_tool("info", tmp_path / "x.mossnano", "--json").out)
        assert (facts["frames"], facts["quantizers"]) == (len(codes), 16)
        assert facts["file_bytes"] == len(packed.out) == 32 + 20 * len(codes)
        unpacked = call_tool("unpack", tmp_path / "x.mossnano", "-", "--form", form)
        assert call_tool("pack", "-", "-", "--form", form, stdin=unpacked.out).out == packed.out
        assert json.loads(call_tool("unpack", tmp_path / "x.mossnano", "-", "--form", "json").out) == codes


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "words"),
    [
        (["unpack", "-", "OUT.npy"], ARTIFACT[:-1], ExitStatus.BAD_INPUT, "cut: 171 of 172 bytes"),
        (["unpack", "-", "OUT.npy"], ARTIFACT + b"x", ExitStatus.BAD_INPUT, "bytes beyond the artifact's end"),
        (["unpack", "-", "OUT.npy"], b"", ExitStatus.BAD_INPUT, "0 of 32 bytes"),
        (["unpack", "-", "OUT.txt"], ARTIFACT, ExitStatus.USAGE, ".u16le, .npy or .json"),
        (["unpack", "missing.mossnano", "OUT.npy"], b"", ExitStatus.NO_WEIGHTS, "missing.mossnano"),
        (["pack", "-", "OUT.mossnano", "--form", "u16le"], bytes(31), ExitStatus.BAD_INPUT, "31 bytes of codes"),
        (["pack", "-", "OUT.mossnano", "--form", "json"], b"[[1024]]", ExitStatus.BAD_INPUT, "allowed are 0 to 1023"),
        (["pack", "-", "OUT.mossnano", "--form", "json"], b"[[]]", ExitStatus.BAD_INPUT, "allowed"),
        (["pack", "-", "OUT.mossnano", "--codebook-size", "1"], b"", ExitStatus.USAGE, "allowed are 2 to 65536"),
        (["pack", "x.json", "OUT.mossnano", "--channels", "0"], b"", ExitStatus.USAGE, "--channels is 0"),
        (["pack", "-", "OUT.mossnano", "--form", "json", "--quantizers", "3"], b"[[1, 2]]", ExitStatus.USAGE, "has 2"),
    ],
)
def test_a_failed_run_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdin: bytes, status: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[1:2] == ["-"] and "--form" not in arguments and arguments[0] == "pack":
        arguments = [*arguments, "--form", "json"]
    outcome = call_tool(*arguments, stdin=stdin)
    assert outcome.status == status
    assert words in outcome.error_line
    assert outcome.out == b""
    assert list(tmp_path.iterdir()) == []
