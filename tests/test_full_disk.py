"""Where a disk is full, the error names the file that could not be written, whichever tool was writing it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.weights.folder import DEMO_FOLDER
from mossnano_stdio.weights.metadata import DECODE_DATA, METADATA_NAME
from tests.child import DEMO, run
from tests.tool import call_tool

resource = pytest.importorskip("resource")
MELODY = DEMO_FOLDER.parent / "melody.mossnano"
FULL = Path("/dev/full")
needs_a_full_device = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@contextlib.contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file can be written beyond this size: the write fails as on a full disk, with EFBIG in place of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["decode", "--weights", "demo", MELODY], "out.wav"),
        (["decode", "--weights", "demo", MELODY], "out.pcm"),
        (["unpack", MELODY], "codes.npy"),
        (["unpack", MELODY], "codes.u16le"),
        (["frame", MELODY, "--output"], "out.bin"),
        (["clients", "c"], "example.c"),
    ],
)
def test_a_tool_names_its_file(tmp_path: Path, words: list[object], name: str) -> None:
    target = tmp_path if words[0] == "clients" else tmp_path / name
    with room_for(512):
        outcome = call_tool(*words, target)
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert f"{tmp_path}: cannot write {name} there: File too large (EFBIG)\n" in outcome.err
    assert name not in [path.name for path in tmp_path.iterdir()]


def test_pack_names_its_file(tmp_path: Path) -> None:
    call_tool("unpack", MELODY, tmp_path / "codes.npy")
    with room_for(512):
        outcome = call_tool("pack", tmp_path / "codes.npy", tmp_path / "out.mossnano")
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert f"{tmp_path}: cannot write out.mossnano there: File too large (EFBIG)" in outcome.error_line


@pytest.mark.parametrize("name", ["out.wav", "out.pcm"])
def test_unframe_names_its_file(tmp_path: Path, name: str) -> None:
    framed = call_tool("frame", MELODY).out
    (tmp_path / "answer.bin").write_bytes(run(DEMO, framed).stdout)
    with room_for(512):
        outcome = call_tool("unframe", tmp_path / "answer.bin", tmp_path / name)
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert f"{tmp_path}: cannot write {name} there: File too large (EFBIG)" in outcome.error_line


@needs_a_full_device
@pytest.mark.parametrize("words", [["unpack", MELODY], ["pack", "{codes}"]])
def test_a_full_device_is_named(tmp_path: Path, words: list[str | Path]) -> None:
    codes = tmp_path / "codes.npy"
    call_tool("unpack", MELODY, codes)
    form = ["--form", "npy"] if words[0] == "unpack" else []
    outcome = call_tool(*(codes if word == "{codes}" else word for word in words), FULL, *form)
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert "/dev: cannot write full there: No space left on device (ENOSPC)" in outcome.error_line


@needs_a_full_device
@pytest.mark.parametrize("flags", [[], ["-u"]])
@pytest.mark.parametrize(
    "words",
    [["clients"], ["info", MELODY], ["info", "--help"], ["protocol"], ["frame", MELODY]],
)
def test_stdout_is_named(flags: list[str], words: list[object]) -> None:
    command = [sys.executable, *flags, "-m", "mossnano_stdio.cli", *map(str, words)]
    with FULL.open("wb") as full:
        outcome = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert outcome.returncode == ExitStatus.OUTPUT_FAILED
    says = f"mossnano {words[0]}: error: stdout cannot be written: No space left on device (ENOSPC)\n"
    assert outcome.stderr == says


def test_build_names_the_file_that_it_writes(tiny_reference: Path, tmp_path: Path) -> None:
    with room_for(4096):
        outcome = call_tool("build", tiny_reference, tmp_path / "out")
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert f"{tmp_path / 'out'}/.building-" in outcome.error_line
    assert f"/{DECODE_DATA}: cannot be written: File too large (EFBIG)" in outcome.error_line
    assert not (tmp_path / "out").exists()


def test_build_names_the_copy_and_not_the_source(tiny_bundle: Path, tmp_path: Path) -> None:
    metadata_bytes = (tiny_bundle / METADATA_NAME).stat().st_size
    with room_for(metadata_bytes):
        outcome = call_tool("build", "--from-bundle", tiny_bundle, tmp_path / "out")
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert f"error: {tmp_path / 'out'}/.building-" in outcome.error_line
    assert "cannot be written: File too large (EFBIG)" in outcome.error_line
    assert str(tiny_bundle) not in outcome.error_line
    assert not (tmp_path / "out").exists()


def test_standin_names_the_file_that_it_writes(tmp_path: Path) -> None:
    with room_for(4096):
        outcome = call_tool("standin", tmp_path / "out", "--size", "tiny")
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert ".safetensors: cannot be written: File too large (EFBIG)" in outcome.error_line
    assert not (tmp_path / "out").exists()
