"""The tool clients: lists what there is, copies one, and overwrites nothing that somebody changed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.tools.clients import CLIENTS, MELODY
from tests.tool import call_tool

NAMES = sorted(path.name for path in CLIENTS.iterdir() if path.is_dir() and path.name != "__pycache__")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_every_client_is_listed_with_what_it_is() -> None:
    outcome = call_tool("clients")
    lines = outcome.out.decode().splitlines()
    assert (outcome.status, sorted(line.split()[0] for line in lines)) == (ExitStatus.DONE, NAMES)
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_is_copied_as_it_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "new" / "folder"
    outcome = call_tool("clients", name, folder)
    assert outcome.status == ExitStatus.DONE
    with_it = {MELODY.name: MELODY.read_bytes()} if name == "web" else {}
    files = [*sorted(files_in(CLIENTS / name)), *with_it]
    assert outcome.out.decode().splitlines() == [str(folder / file) for file in files]
    assert files_in(folder) == files_in(CLIENTS / name) | with_it
    assert call_tool("clients", name, folder).status == ExitStatus.DONE  # the same over the same


def test_what_somebody_changed_is_not_overwritten(tmp_path: Path) -> None:
    call_tool("clients", "c", tmp_path)
    changed = next(tmp_path.iterdir())
    changed.write_text("mine")
    refused = call_tool("clients", "c", tmp_path)
    assert refused.status == ExitStatus.USAGE
    assert f"{changed} is there already and differs" in refused.error_line
    assert changed.read_text() == "mine"
    assert call_tool("clients", "c", tmp_path, "--force").status == ExitStatus.DONE
    assert files_in(tmp_path) == files_in(CLIENTS / "c")


@contextlib.contextmanager
def without_roots_rights() -> Iterator[None]:
    """Whoever runs the tests, permissions hold for him."""
    if sys.platform == "win32":
        pytest.skip("there are no such permissions here")
    was = os.geteuid()
    if not was:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    is_file = "EEXIST" if sys.platform == "win32" else "ENOTDIR"
    for folder, code in ((tmp_path / "file" / "x", is_file), (tmp_path / "file", "EEXIST")):
        refused = call_tool("clients", "c", folder)
        assert refused.status == ExitStatus.OUTPUT_FAILED
        assert f"{folder}: cannot be written: " in refused.error_line
        assert refused.error_line.endswith(f"({code})")


@pytest.mark.parametrize("where", ["there", "there/new"])
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "there").mkdir(0o000)
    with without_roots_rights():
        refused = call_tool("clients", "c", tmp_path / where)
    assert refused.status == ExitStatus.OUTPUT_FAILED
    assert f"{tmp_path / where}: cannot " in refused.error_line  # be written, or write the first file there
    assert refused.error_line.endswith("Permission denied (EACCES)")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["cobol", "there"], "there is no client 'cobol', but c, "), (["c"], "where to? mossnano clients c DIR")],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], says: str) -> None:
    outcome = call_tool("clients", *arguments)
    assert outcome.status == ExitStatus.USAGE
    assert says in outcome.error_line
