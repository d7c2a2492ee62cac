"""build/bundle.py and the tools standin and build: a build is whole or it is not there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.build import bundle
from mossnano_stdio.build.bundle import staged
from mossnano_stdio.build.decode_step import FAST_DATA, FAST_FILE, save_fast_graph
from mossnano_stdio.build.encode_step import ENCODE_STEP_DATA, ENCODE_STEP_FILE, save_encode_step
from mossnano_stdio.build.model import DecoderWeights, EncoderWeights, LayerWeights, TransformerWeights
from mossnano_stdio.codecs import load_decoder, load_encoder_runtime, load_runtime
from mossnano_stdio.errors import BundleError, ExitStatus, OutputError, Terminated
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import (
    DECODE_DATA,
    DECODE_STEP_FILE,
    DEMO_FOLDER,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
    SIDECAR_NAME,
    GraphSpec,
    load_bundle,
)
from tests.conftest import needs_symlinks
from tests.oracle import Sound, furthest
from tests.tool import COMMAND, call_tool


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
    for name in ("decode_step", "decode_full", "encode", "fast", "encode_step"):
        for file in bundle.graph(name).files:
            assert file.origin == "recorded"
            file.check_content()


def test_building_again_gives_the_same_files(built: Path, tiny_reference: Path) -> None:
    before = contents(built)
    assert call_tool("build", tiny_reference, built).status == 0
    assert contents(built) == before
    assert not [path for path in built.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("source", "words"),
    [(["nowhere"], "config.json"), (["--from-bundle", "nowhere"], METADATA_NAME),
     (["--from-bundle", DEMO_FOLDER], "is the demo")],
    ids=["no checkpoint", "no bundle", "the demo"],
)  # fmt: skip
def test_a_source_that_is_none_leaves_nothing(
    tmp_path: Path, source: list[Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_tool("build", *source, "out")
    assert outcome.status == ExitStatus.NO_WEIGHTS
    assert words in outcome.error_line
    assert not Path("out").exists()


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

    def noted(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return move(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    with staged(tmp_path) as stage:
        for name in (SIDECAR_NAME, "a.onnx", "z.data"):
            (stage / name).touch()
    assert moved == ["a.onnx", "z.data", SIDECAR_NAME]


def stages_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".building-")]


def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    arguments = [*COMMAND, "standin", str(tmp_path), "--size", "nano"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        while not (tmp_path / "checkpoint").is_dir() or not stages_in(tmp_path):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    assert stages_in(tmp_path)
    outcome = call_tool("standin", tmp_path, "--size", "tiny")
    assert outcome.status == 0, outcome.err
    assert stages_in(tmp_path) == stages_in(tmp_path / "checkpoint") == []


def test_a_build_removes_nothing_of_one_that_runs(tmp_path: Path) -> None:
    abandoned = tmp_path / ".building-0_abcxyz"
    own = tmp_path / ".building-site"
    with staged(tmp_path) as running:
        (running / "half").touch()
        for folder in (abandoned, own):
            folder.mkdir()
            (folder / "half").touch()
        with staged(tmp_path) as stage:
            (stage / "file").touch()
        assert (running / "half").exists()
        assert not abandoned.exists()
        assert (own / "half").exists()
    assert {path.name for path in tmp_path.iterdir()} == {own.name, "file", "half"}


def test_a_stage_that_another_build_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its lock it looks abandoned."""
    made: list[str] = []
    make = tempfile.mkdtemp

    def make_and_lose(prefix: str, dir: Path) -> str:
        made.append(make(prefix=prefix, dir=dir))
        if len(made) == 1:
            bundle._remove_abandoned(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    with staged(tmp_path) as stage:
        assert [str(stage)] == made[1:]
        assert stage.is_dir()


def test_a_folder_that_cannot_be_locked_is_built_in_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some network file systems. What lies there may belong to anybody, so it is left."""
    left = tmp_path / ".building-abcdefgh"
    left.mkdir()

    def unsupported(opened: int, operation: int, size: int = 0) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("msvcrt.locking" if sys.platform == "win32" else "fcntl.flock", unsupported)
    with staged(tmp_path) as stage:
        (stage / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {left.name, "file"}


@pytest.mark.parametrize("ending", [Terminated, KeyboardInterrupt])
def test_a_standin_that_is_stopped_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    def stop(*_: object) -> None:
        raise ending

    monkeypatch.setattr(bundle, "try_folders", stop)
    outcome = call_tool("standin", tmp_path / "out", "--size", "tiny")
    assert outcome.status in (ExitStatus.TERMINATED, ExitStatus.INTERRUPTED)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="terminate() ends a process there at once, unheard")
def test_sigterm_in_standin_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with subprocess.Popen([*COMMAND, "standin", folder, "--size", "nano"], stderr=subprocess.DEVNULL) as stopped:
        while not (folder / "checkpoint").is_dir() or not stages_in(folder):
            assert stopped.poll() is None
            time.sleep(0.01)
        stopped.terminate()
    assert stopped.returncode == ExitStatus.TERMINATED
    assert not folder.exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="out"), staged(tmp_path / "out"):
        pass


def test_from_bundle_beside_the_official_files(folder: Path, tiny_reference: Path, codes: Codes, audio: Sound) -> None:
    before = contents(folder)
    outcome = call_tool("build", "--from-bundle", folder, folder)
    assert outcome.status == 0, outcome.err
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {
        SIDECAR_NAME, FAST_FILE, FAST_DATA, ENCODE_STEP_FILE, ENCODE_STEP_DATA
    }  # fmt: skip
    bundle = load_bundle(folder)
    assert load_runtime(bundle).graph_name == "fast"  # without being asked for
    assert furthest(load_decoder(bundle).step(codes), audio) < 1e-5
    wave = np.ascontiguousarray(np.load(tiny_reference / "wave.npy").T)[: 12 * 3840]
    encoded = load_encoder_runtime(bundle).new_encoder().step(wave)
    assert np.array_equal(encoded, np.load(tiny_reference / "encoded.npy")[:12])


def test_from_bundle_beside_copies(tiny_bundle: Path, codes: Codes, audio: Sound, tmp_path: Path) -> None:
    outcome = call_tool("build", "--from-bundle", tiny_bundle, tmp_path / "out")
    assert outcome.status == 0, outcome.err
    copied = contents(tmp_path / "out")
    for name, content in contents(tiny_bundle).items():
        assert copied[name] == content
    for graph in ("official", "fast"):
        found = load_decoder(load_bundle(tmp_path / "out"), graph=graph).step(codes)
        assert furthest(found, audio) < 1e-5


def test_from_bundle_without_an_encoder(folder: Path) -> None:
    (folder / ENCODE_FILE).unlink()
    (folder / ENCODE_DATA).unlink()
    assert call_tool("build", "--from-bundle", folder, folder).status == 0
    assert set(load_bundle(folder).sidecar.graphs) == {"fast"}


def test_from_bundle_again(folder: Path) -> None:
    assert call_tool("build", "--from-bundle", folder, folder).status == 0
    before = contents(folder)
    assert call_tool("build", "--from-bundle", folder, folder).status == 0
    assert contents(folder) == before


@needs_symlinks
def test_symlinked_official_files_stay_symlinks(tiny_bundle: Path, tmp_path: Path) -> None:
    """As in the hub's cache."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in tiny_bundle.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    assert call_tool("build", "--from-bundle", folder, folder).status == 0
    assert all((folder / path.name).is_symlink() for path in tiny_bundle.iterdir())
    assert load_runtime(load_bundle(folder)).graph_name == "fast"


def wrong_by(decoder: DecoderWeights, **changes: Any) -> DecoderWeights:
    """The decoder with something else in its last transformer, or in the first layer of it."""
    *modules, last, patch = decoder.modules
    assert isinstance(last, TransformerWeights)
    layers = {name: value for name, value in changes.items() if name in LayerWeights.__dataclass_fields__}
    first = replace(last.layers[0], **layers)
    rest = {name: value for name, value in changes.items() if name not in layers}
    return replace(decoder, modules=(*modules, replace(last, layers=(first, *last.layers[1:]), **rest), patch))


@pytest.mark.parametrize(
    "changes", [{"max_period": 5_000.0}, {"context": 127}, {"context": 129}, {"scale1": np.full(32, 0.3, np.float32)}]
)
def test_a_decoder_that_departs_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    before = contents(folder)
    monkeypatch.setattr(
        bundle, "save_fast_graph", lambda stage, decoder: save_fast_graph(stage, wrong_by(decoder, **changes))
    )
    outcome = call_tool("build", "--from-bundle", folder, folder)
    assert outcome.status == ExitStatus.CHECK_FAILED
    assert DECODE_STEP_FILE in outcome.error_line
    assert "departs" in outcome.error_line
    assert "at frame " in outcome.error_line
    assert contents(folder) == before
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_an_encoder_that_departs_is_not_kept(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_wrong(stage: Path, encoder: EncoderWeights) -> GraphSpec:
        quantizer = replace(encoder.quantizer, in_proj_b=encoder.quantizer.in_proj_b + np.float32(0.01))
        return save_encode_step(stage, replace(encoder, quantizer=quantizer))

    monkeypatch.setattr(bundle, "save_encode_step", save_wrong)
    outcome = call_tool("build", "--from-bundle", tiny_bundle, tmp_path / "out")
    assert outcome.status == ExitStatus.CHECK_FAILED
    assert ENCODE_FILE in outcome.error_line
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_way_of_a_file(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / SIDECAR_NAME).mkdir(parents=True)
    outcome = call_tool("build", "--from-bundle", tiny_bundle, tmp_path / "out")
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert f"{tmp_path / 'out' / SIDECAR_NAME}: cannot be written: Is a directory (EISDIR)" in outcome.error_line
    assert [path.name for path in (tmp_path / "out").iterdir()] == [SIDECAR_NAME]


def test_standin_tool(tmp_path: Path) -> None:
    outcome = call_tool("standin", tmp_path / "tiny", "--size", "tiny", "--seed", 7)
    assert outcome.status == 0
    assert load_bundle(tmp_path / "tiny").name == "tiny stand-in, seed 7"
    assert call_tool("build", tmp_path / "tiny" / "checkpoint", tmp_path / "again").status == 0
    for name in (DECODE_DATA, ENCODE_DATA, DECODE_STEP_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()


@pytest.mark.parametrize("seed", ["-1", "x", "1.5"])
def test_wrong_seeds(tmp_path: Path, seed: str) -> None:
    outcome = call_tool("standin", tmp_path, "--seed", seed)
    assert outcome.status == ExitStatus.USAGE
    assert "whole number from 0" in outcome.err


@pytest.mark.parametrize("words", [[], ["a"], ["--from-bundle", "a", "b", "c"]])
def test_build_needs_one_source_and_one_target(tmp_path: Path, words: list[str]) -> None:
    assert call_tool("build", *words).status == ExitStatus.USAGE
