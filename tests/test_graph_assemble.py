"""graph/assemble.py, tools/standin.py, tools/build.py: a build is whole or it is not there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mossnano_stdio.bundle import SIDECAR_NAME, load_bundle
from mossnano_stdio.errors import BundleError, ExitStatus, OutputError
from mossnano_stdio.graph import assemble, contract
from mossnano_stdio.graph.assemble import staged
from tests.tool import call_tool


@pytest.fixture(scope="module")
def built(tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build") / "made" / "on" / "the" / "way"
    outcome = call_tool("build", tiny_reference, folder)
    assert outcome.status == 0, outcome.err
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_build_makes_a_bundle(built: Path) -> None:
    bundle = load_bundle(built)
    assert bundle.name == "tiny"
    assert bundle.format.codebook_size == 1024
    assert not bundle.demo
    for name in ("decode_step", "decode_full", "encode"):
        for file in bundle.graph(name).files:
            assert file.origin == "recorded"
            file.check_content()


def test_building_again_gives_the_same_files(built: Path, tiny_reference: Path) -> None:
    before = contents(built)
    assert call_tool("build", tiny_reference, built).status == 0
    assert contents(built) == before
    assert not [path for path in built.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    outcome = call_tool("build", tmp_path / "nowhere", tmp_path / "out")
    assert outcome.status == ExitStatus.NO_WEIGHTS
    assert "config.json" in outcome.error_line
    assert not (tmp_path / "out").exists()


def test_a_failed_build_leaves_what_was_there(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "copy"))
    before = contents(folder)
    with pytest.raises(BundleError), staged(folder) as stage:
        (stage / SIDECAR_NAME).write_text("half")
        raise BundleError("something was wrong")
    assert contents(folder) == before
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_the_sidecar_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    move = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (moved.append(path.name), move(path, target))[1])
    with staged(tmp_path) as stage:
        for name in (SIDECAR_NAME, "a.onnx", "z.data"):
            (stage / name).touch()
    assert moved == ["a.onnx", "z.data", SIDECAR_NAME]


def test_a_full_disk_is_an_output_error(tmp_path: Path, tiny_reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "graph.onnx")

    monkeypatch.setattr(assemble, "save_graphs", full)
    outcome = call_tool("build", tiny_reference, tmp_path)
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert "No space left on device" in outcome.error_line
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="out"), staged(tmp_path / "out"):
        pass


def test_standin_tool(tmp_path: Path) -> None:
    outcome = call_tool("standin", tmp_path / "tiny", "--size", "tiny", "--seed", 7)
    assert outcome.status == 0
    assert load_bundle(tmp_path / "tiny").name == "tiny stand-in, seed 7"
    assert call_tool("build", tmp_path / "tiny" / "checkpoint", tmp_path / "again").status == 0
    for name in (contract.DECODE_DATA, contract.ENCODE_DATA, contract.DECODE_STEP_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()


@pytest.mark.parametrize("seed", ["-1", "x", "1.5"])
def test_wrong_seeds(tmp_path: Path, seed: str) -> None:
    outcome = call_tool("standin", tmp_path, "--seed", seed)
    assert outcome.status == ExitStatus.USAGE
    assert "whole number from 0" in outcome.err


@pytest.mark.parametrize("words", [[], ["a"], ["--from-bundle", "a", "b", "c"]])
def test_build_needs_one_source_and_one_target(tmp_path: Path, words: list[str]) -> None:
    assert call_tool("build", *words).status == ExitStatus.USAGE
