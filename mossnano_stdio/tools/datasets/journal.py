"""What a job has done so far, in its folder, so that the next run of the same command goes on behind it.

    job.json           what the job is: options, weights, and marks of its inputs, shard by shard
    manifest.jsonl     a line for each shard that is done: its number, its rows, its files with bytes and SHA-256
    quarantine.jsonl   a line for each recording that could not be encoded: its number, its id, and the reason
    statistics.json    durations, and how often each code was used, up to the last shard that is done

A shard is done in this order, each step on the disk before the next: its files, its lines in quarantine.jsonl,
statistics.json, its line in manifest.jsonl. What stands behind the last line of manifest.jsonl is undone at the start
of the next run. A last line that is cut, as after a loss of power, counts as not written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final

from mossnano_stdio.errors import InputError, OutputError, UsageError
from mossnano_stdio.files import cannot_write, open_named, told_as
from mossnano_stdio.tools.datasets.census import Census
from mossnano_stdio.tools.datasets.shards import SUFFIXES, read_rows

JOB_NAME: Final = "job.json"
MANIFEST_NAME: Final = "manifest.jsonl"
QUARANTINE_NAME: Final = "quarantine.jsonl"
STATISTICS_NAME: Final = "statistics.json"
LOCK_NAME: Final = ".locked"  # on Windows, where folders cannot be locked
UNFINISHED: Final = ".unfinished-"
MARKS: Final = "shards"  # in job.json: what each shard's references look like

Settings = Mapping[str, Any]


class Journal:
    """The folder of one job, which nobody else writes to until `close`."""

    def __init__(self, folder: Path, settings: Settings, say: Callable[[str], object]) -> None:
        self.folder = folder
        self.settings = settings
        with told_as(cannot_write(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        self._undo = ExitStack()
        try:
            _lock(folder, self._undo)
            self._begin_or_compare()
            self.shards_done = self._resume(say)
        except BaseException:
            self._undo.close()
            raise

    def close(self) -> None:
        self._undo.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    # --- what was done --------------------------------------------------------------------------------------------

    def _begin_or_compare(self) -> None:
        path = self.folder / JOB_NAME
        if not path.exists():
            others = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")]
            if others:
                raise UsageError(f"{self.folder}: has no job in it, but {sorted(others)[0]}; name an empty folder")
            self._replace(JOB_NAME, self.settings)
            return
        try:
            begun = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: is no JSON ({error})") from None
        if maybe_difference := difference_between(begun, self.settings):
            raise UsageError(
                f"{self.folder}: {maybe_difference}; give what the job began with, or another folder for --to"
            )

    def _resume(self, say: Callable[[str], object]) -> int:
        for path in self.folder.glob(f"{UNFINISHED}*"):
            with told_as(cannot_write(path)):
                path.unlink()
        lines = self._whole_lines(MANIFEST_NAME, say)
        for number, line in enumerate(lines):
            if line.get("shard") != number:
                raise InputError(f"{self.folder / MANIFEST_NAME}: line {number + 1} is of shard {line.get('shard')!r}")
            for file in line["files"]:
                self._check_file(file)
        kept = [line for line in self._whole_lines(QUARANTINE_NAME, say) if line.get("shard", 0) < len(lines)]
        self._truncate(QUARANTINE_NAME, kept)
        return len(lines)

    def _check_file(self, file: Mapping[str, Any]) -> None:
        path = self.folder / file["name"]
        try:
            size = path.stat().st_size
        except OSError:
            size = -1
        if size != file["bytes"]:
            found = "is not there" if size < 0 else f"has {size} bytes"
            raise InputError(
                f"{path}: {found}, but {MANIFEST_NAME} says that it was done, with {file['bytes']} bytes; "
                f"bring it back, or take its line and all after it out of {MANIFEST_NAME}"
            )

    def _whole_lines(self, name: str, say: Callable[[str], object]) -> list[dict[str, Any]]:
        """The lines of a file of ours. A last one that is cut is taken off."""
        path = self.folder / name
        data = path.read_bytes() if path.exists() else b""
        lines = []
        end = 0
        for text in data.splitlines(keepends=True):
            try:
                if not text.endswith(b"\n"):
                    break
                lines.append(json.loads(text))
            except ValueError:
                if end + len(text) < len(data):
                    raise InputError(f"{path}: line {len(lines) + 1} is no JSON: it was damaged or changed") from None
                break
            end += len(text)
        if end < len(data):
            say(f"{path}: its last line is cut, and done again")
            with told_as(cannot_write(path)):
                os.truncate(path, end)
        return lines

    def _truncate(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        path = self.folder / name
        size_bytes = sum(len(_line(line)) for line in lines)
        if path.exists() and path.stat().st_size != size_bytes:
            with told_as(cannot_write(path)):
                os.truncate(path, size_bytes)
        if path.exists() and not size_bytes:
            path.unlink()

    def restore(self, census: Census) -> None:
        """What the shards that are done hold; counted again where it was not kept for just these."""
        if not self.shards_done:
            return
        with contextlib.suppress(OSError, ValueError, KeyError):
            document = json.loads((self.folder / STATISTICS_NAME).read_bytes())
            if document["shards"] == self.shards_done:
                census.restore(document)
                return
        for row, codes in read_rows(self.shard_paths()):
            census.add(codes, row.original_samples)
        census.quarantined = len((self.folder / QUARANTINE_NAME).read_bytes().splitlines()) if self._has_bad() else 0

    def _has_bad(self) -> bool:
        return (self.folder / QUARANTINE_NAME).exists()

    def shard_paths(self) -> list[Path]:
        """The shards that are done and have rows, by their first files."""
        with (self.folder / MANIFEST_NAME).open("rb") as file:
            manifest = [json.loads(line) for line in file]
        return [self.folder / line["files"][0]["name"] for line in manifest if line["files"]]

    # --- what is done now -----------------------------------------------------------------------------------------

    def finish_shard(
        self,
        rows: int,
        write: Callable[[Sequence[BinaryIO]], None],
        quarantined: Sequence[Mapping[str, Any]],
        census: Census,
    ) -> Mapping[str, Any]:
        """Write the next shard; `write` puts its rows into the files. Returns its line of the manifest."""
        number = self.shards_done
        names = [f"shard-{number:06d}{suffix}" for suffix in SUFFIXES[self.settings["form"]]] if rows else []
        line = {"shard": number, "rows": rows, "quarantined": len(quarantined), "files": self._written(names, write)}
        if quarantined:
            self._append(QUARANTINE_NAME, b"".join(_line({"shard": number, **entry}) for entry in quarantined))
        self._replace(STATISTICS_NAME, {"shards": number + 1, **census.to_json()})
        self._append(MANIFEST_NAME, _line(line))
        self.shards_done += 1
        return line

    def set_quarantine(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """All that could not be done, for a job that has no shards and tries those again in each run."""
        path = self.folder / QUARANTINE_NAME
        if entries:
            with _synced(self.folder / f"{UNFINISHED}{QUARANTINE_NAME}") as file:
                file.writelines(map(_line, entries))
            with told_as(cannot_write(path)):
                (self.folder / f"{UNFINISHED}{QUARANTINE_NAME}").replace(path)
        elif path.exists():
            path.unlink()

    def _written(self, names: Sequence[str], write: Callable[[Sequence[BinaryIO]], None]) -> list[dict[str, Any]]:
        if not names:
            return []
        unfinished = [self.folder / f"{UNFINISHED}{name}" for name in names]
        try:
            with ExitStack() as files:
                opened = [files.enter_context(_synced(path)) for path in unfinished]
                write(opened)
            facts = []
            for path, name in zip(unfinished, names, strict=True):
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                facts.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256})
            for path, name in zip(unfinished, names, strict=True):
                with told_as(cannot_write(self.folder / name)):
                    path.replace(self.folder / name)
            self._sync_folder()
        except BaseException:
            for path in unfinished:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        return facts

    def _append(self, name: str, data: bytes) -> None:
        path = self.folder / name
        with told_as(cannot_write(path)), path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, name: str, document: Mapping[str, Any]) -> None:
        unfinished = self.folder / f"{UNFINISHED}{name}"
        with _synced(unfinished) as file:
            file.write(_line(document))
        with told_as(cannot_write(self.folder / name)):
            unfinished.replace(self.folder / name)
        self._sync_folder()

    def _sync_folder(self) -> None:
        """A rename is on the disk once its folder is."""
        if sys.platform == "win32":  # which keeps no folder back
            return
        with told_as(cannot_write(self.folder)):
            opened = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)


def difference_between(begun: Settings, now: Settings) -> str | None:
    """What the job that began and this one do not have in common; None where they are the same.

    >>> difference_between({"form": "npy", "rows": 3}, {"form": "parquet", "rows": 3})
    'the job there began with form npy, and now it is parquet'
    """
    for name in [*begun, *(name for name in now if name not in begun)]:
        before, after = begun.get(name), now.get(name)
        if before == after or name == MARKS:
            continue
        if name in ("rows", "inputs_sha256"):
            return _different_inputs(begun, now)
        return f"the job there began with {name} {_shown(before)}, and now it is {_shown(after)}"
    return None


def _different_inputs(begun: Settings, now: Settings) -> str:
    size = now.get("shard_rows", 1)
    pairs = zip(begun.get(MARKS, ()), now.get(MARKS, ()), strict=False)
    same = next((number for number, (before, after) in enumerate(pairs) if before != after), None)
    where = "at their end" if same is None else f"first among rows {same * size} to {(same + 1) * size - 1}"
    if MARKS not in begun:
        where = "in what their files hold"
    return (
        f"the inputs of the job there were {begun['rows']} recordings, now they are {now['rows']}, and they differ "
        f"{where}: something was added, taken away, renamed or changed"
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block is left."""
    with open_named(path) as file:
        yield file
        file.flush()
        with told_as(cannot_write(path)):
            os.fsync(file.fileno())


def _lock(folder: Path, undo: ExitStack) -> None:
    """Lock it until `undo`; the system does so when we die."""
    try:
        if sys.platform == "win32":
            import msvcrt

            opened = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)
            undo.callback(os.close, opened)
            msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            opened = os.open(folder, os.O_RDONLY)
            undo.callback(os.close, opened)
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OutputError(f"{folder}: another job is at work in it; wait for its end, or name another folder") from None
    except OSError:
        return  # this file system locks nothing, so nobody can be kept out
