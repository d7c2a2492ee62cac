"""weights/digest.py: right every time, computed once, silent where it cannot remember."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mossnano_stdio.weights import digest
from mossnano_stdio.weights.digest import MEMORY_NAME, SMALL_BYTES, cache_folder, sha256_of
from tests.conftest import needs_symlinks

LONG_AGO_NS = 1_600_000_000_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOSSNANO_CACHE", str(folder))
    monkeypatch.setattr(digest, "SETTLED_NS", -1)  # files of a test are always fresh
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really hashed."""
    names = []
    genuine = hashlib.file_digest

    def counting(file, algorithm):  # type: ignore[no-untyped-def]
        names.append(Path(file.name).name)
        return genuine(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def large_file(folder: Path, filling: bytes = b"a", name: str = "large") -> Path:
    path = folder / name
    path.write_bytes(filling * SMALL_BYTES)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_known_answer(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hashes_once(tmp_path: Path, hashed: list[str]) -> None:
    path = large_file(tmp_path)
    assert sha256_of(path) == sha256_of(path) == sha256(path)
    assert hashed == ["large"]


def test_hashes_again_when_asked_to(tmp_path: Path, hashed: list[str]) -> None:
    path = large_file(tmp_path)
    sha256_of(path)
    assert sha256_of(path, afresh=True) == sha256(path)
    assert hashed == ["large", "large"]


def test_small_files_are_hashed_each_time(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"abc")
    sha256_of(path)
    assert not cache.exists()


def write(path: Path) -> None:
    large_file(path.parent, b"b")


def write_and_hide_it_in_the_mtime(path: Path) -> None:
    write(path)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def swap(path: Path) -> None:
    large_file(path.parent, b"b", name="other").replace(path)


@pytest.mark.parametrize("change", [write, write_and_hide_it_in_the_mtime, swap])
def test_a_changed_file_is_hashed_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = large_file(tmp_path, b"a")
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    before = sha256_of(path)
    change(path)
    assert sha256_of(path) == sha256(path) != before


def test_a_file_that_is_still_fresh_is_not_remembered(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "SETTLED_NS", 3600 * 10**9)
    path = large_file(tmp_path)
    sha256_of(path)
    sha256_of(path)
    assert hashed == ["large", "large"]


@needs_symlinks
def test_links_to_one_file_share_one_memory(tmp_path: Path, hashed: list[str]) -> None:
    path = large_file(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert sha256_of(link) == sha256_of(path)
    assert hashed == ["large"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b'{"version": 2, "files": {}}',
        b'{"version": 1, "files": []}',
        b'{"version": 1}',
        b'{"version": 1, "files": {"a": 1}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_memory_is_no_memory(tmp_path: Path, cache: Path, content: bytes, hashed: list[str]) -> None:
    cache.mkdir()
    (cache / MEMORY_NAME).write_bytes(content)
    path = large_file(tmp_path)
    assert sha256_of(path) == sha256(path)
    assert sha256_of(path) == sha256(path)
    assert hashed == ["large"]


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    cache.write_text("a file where the folder should be")
    path = large_file(tmp_path)
    assert sha256_of(path) == sha256_of(path) == sha256(path)
    assert hashed == ["large", "large"]


def test_a_frozen_program_remembers_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.frozen", True, raising=False)
    path = large_file(tmp_path)
    assert sha256_of(path) == sha256(path)
    assert not cache.exists()


def test_leaves_no_unfinished_file(tmp_path: Path, cache: Path) -> None:
    sha256_of(large_file(tmp_path))
    assert [path.name for path in cache.iterdir()] == [MEMORY_NAME]


def test_forgets_the_oldest(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "REMEMBERED_FILES", 2)
    paths = [large_file(tmp_path, name=name) for name in ("a", "b", "c")]
    for path in paths:
        sha256_of(path)
    memory = json.loads((cache / MEMORY_NAME).read_text())
    assert list(memory["files"]) == [str(path) for path in paths[1:]]


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MOSSNANO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "mossnano-stdio"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path("~/Library/Caches/mossnano-stdio").expanduser()
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "mossnano-stdio"
