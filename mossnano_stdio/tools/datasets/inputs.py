"""Finds the recordings: files, folders, globs, manifests, Lhotse cuts, WebDataset tars, Parquet files.

The order is that of the command line, within a folder that of the names, within a file that of its lines or rows. It is
the same in every run, and nothing is kept in memory but where we are.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from mossnano_stdio.errors import InputError, UsageError, reason_of
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.pcm.recordings import AUDIO_SUFFIXES
from mossnano_stdio.tools.datasets.references import Reference

MANIFEST_SUFFIXES = (".jsonl", ".jsonl.gz")
TAR_SUFFIX, PARQUET_SUFFIX = ".tar", ".parquet"
GLOB_SIGNS = frozenset("*?[")
PATH_KEYS = ("path", "audio_filepath")  # the second is NeMo's name
PLACE_KEYS = ("offset", "duration", "start", "end")
LONGEST_SECONDS = 1e9


def find_references(inputs: Sequence[str], audio_column: str) -> Iterator[Reference]:
    """Every recording of the inputs, in their order."""
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            yield from _in_folder(path, audio_column)
        elif not path.exists() and GLOB_SIGNS & set(name):
            names = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - Path's takes none that is absolute
            if not names:
                raise UsageError(f"{name}: no file is called like that")
            for found in names:
                if Path(found).is_file():
                    yield from _in_file(Path(found), PurePosixPath(found).as_posix(), audio_column)
        else:
            yield from _in_file(path, path.as_posix(), audio_column)


def _in_folder(folder: Path, audio_column: str) -> Iterator[Reference]:
    found = 0
    for path in _files_below(folder):
        if path.suffix.lower() in (*AUDIO_SUFFIXES, TAR_SUFFIX, PARQUET_SUFFIX):
            found += 1
            yield from _in_file(path, path.relative_to(folder).as_posix(), audio_column)
    if not found:
        raise UsageError(f"{folder}: has no recordings, tars or Parquet files in it; manifests are named themselves")


def _files_below(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _in_file(path: Path, name: str, audio_column: str) -> Iterator[Reference]:
    """`name` is what its id comes from."""
    if path.name.endswith(MANIFEST_SUFFIXES):
        yield from _in_manifest(path)
    elif path.suffix == TAR_SUFFIX:
        yield from _in_tar(path)
    elif path.suffix == PARQUET_SUFFIX:
        yield from _in_parquet(path, audio_column)
    elif path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UsageError(f"{path}: is compressed, so nothing in it can be found without reading all of it; unpack it")
    else:
        yield _of_file(path, name)


def _of_file(path: Path, row_id: str, **fields: Any) -> Reference:
    """A reference to a file, with a fault where there is none."""
    place = str(path.absolute())
    try:
        status = path.stat()
    except OSError as error:
        return Reference(row_id, place, maybe_fault=f"{path}: {error.strerror}", **fields)
    if not stat.S_ISREG(status.st_mode):
        return Reference(row_id, place, maybe_fault=f"{path}: is no regular file", **fields)
    return Reference(row_id, place, status.st_size, status.st_mtime_ns, **fields)


# --- manifests ----------------------------------------------------------------------------------------------------


def _in_manifest(path: Path) -> Iterator[Reference]:
    """Lines with `path`, and what else they have: `id`, `offset`, `duration`, `start`, `end`; or Lhotse's cuts."""
    with _read_errors(path), gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: is no JSON ({error})") from None
            if not isinstance(entry, dict):
                raise InputError(f"{where}: is no object, but a manifest has one on each line")
            if "recording" in entry or str(entry.get("type", "")).endswith("Cut"):
                yield _of_cut(entry, path.parent, where)
            else:
                yield _of_line(entry, path.parent, where)


def _of_line(entry: dict[str, Any], folder: Path, where: str) -> Reference:
    key = next((key for key in PATH_KEYS if key in entry), None)
    if key is None or not isinstance(entry[key], str):
        raise InputError(f"{where}: has no text `path`; its keys are {', '.join(entry)}")
    place = {name: _seconds(entry, name, where) for name in PLACE_KEYS if entry.get(name) is not None}
    if {"offset", "start"} <= place.keys() or {"duration", "end"} <= place.keys():
        raise InputError(f"{where}: says twice where it starts or ends: offset and duration, or start and end")
    start = place.get("offset", place.get("start", 0.0))
    maybe_end = place.get("end")
    if "duration" in place:
        maybe_end = start + place["duration"]
    if maybe_end is not None and maybe_end <= start:
        raise InputError(f"{where}: ends at {maybe_end:g} s, which is not behind its start at {start:g} s")
    part = "" if not start and "end" not in place else f"@{start:g}"
    return _of_file(
        folder / entry[key],
        _text_id(entry, where, entry[key] + part),
        start_seconds=start,
        maybe_end_seconds=maybe_end,
        extra={name: value for name, value in entry.items() if name not in (key, "id", *PLACE_KEYS)},
    )


def _of_cut(entry: dict[str, Any], folder: Path, where: str) -> Reference:
    """A MonoCut or a MultiCut of Lhotse. One that is mixed of several is no part of any file."""
    row_id = _text_id(entry, where, "")
    supervisions = [each for each in entry.get("supervisions") or [] if isinstance(each, dict)]
    extra: dict[str, Any] = dict(entry.get("custom") or {})
    if texts := [str(each["text"]) for each in supervisions if each.get("text") is not None]:
        extra["text"] = " ".join(texts)
    for name in ("speaker", "language"):
        values = {str(each[name]) for each in supervisions if each.get(name) is not None}
        if len(values) == 1:
            extra[name] = values.pop()
    if supervisions:
        extra["supervisions"] = supervisions
    channels = entry.get("channel")
    wanted = [channels] if isinstance(channels, int) else channels
    recording = entry.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    source = next(
        (
            source
            for source in sources or []
            if isinstance(source, dict) and (wanted is None or set(wanted) <= set(source.get("channels", [])))
        ),
        None,
    )
    if source is None or source.get("type") != "file":
        kind = source.get("type") if source else entry.get("type")
        fault = f"{where}: a cut out of one file is allowed, this is {kind!r}"
        return Reference(row_id, str(folder.absolute()), extra=extra, maybe_fault=fault)
    start = _seconds(entry, "start", where)
    path = folder / source["source"]
    file_channels = source.get("channels", [])
    return _of_file(
        path if path.exists() else Path(source["source"]),
        row_id,
        start_seconds=start,
        maybe_end_seconds=start + _seconds(entry, "duration", where),
        maybe_channels=None if wanted is None else tuple(file_channels.index(channel) for channel in wanted),
        extra=extra,
    )


def _text_id(entry: Mapping[str, Any], where: str, otherwise: str) -> str:
    found = entry.get("id")
    row_id = otherwise if found is None else str(found)
    if not row_id or not isinstance(found, str | int | None):
        raise InputError(f"{where}: its id is {found!r}, a text is allowed")
    return row_id


def _seconds(entry: Mapping[str, Any], name: str, where: str) -> float:
    value = entry.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST_SECONDS:
        return float(value)
    raise InputError(f"{where}: {name} is {value!r}, allowed are seconds from 0")


# --- tars ---------------------------------------------------------------------------------------------------------


def _in_tar(path: Path) -> Iterator[Reference]:
    """WebDataset's: members of one name, up to its first dot, are one row: a sound, `.json` and `.txt` beside it."""
    status = path.stat()
    with _read_errors(path), tarfile.open(path, "r:") as tar:
        key, members = "", dict[str, tarfile.TarInfo]()
        for member in tar:
            if not member.isreg():
                continue
            folder, _, file_name = member.name.rpartition("/")
            stem, _, suffix = file_name.partition(".")
            if (next_key := f"{folder}/{stem}" if folder else stem) != key:
                yield from _of_members(path, status, tar, key, members)
                key, members = next_key, {}
            members[f".{suffix}".lower()] = member
            tar.members = []  # type: ignore[attr-defined]  # which would grow with the archive
        yield from _of_members(path, status, tar, key, members)


def _of_members(
    path: Path, status: os.stat_result, tar: tarfile.TarFile, key: str, members: Mapping[str, tarfile.TarInfo]
) -> Iterator[Reference]:
    sounds = [member for suffix, member in members.items() if suffix.endswith(AUDIO_SUFFIXES)]
    if not sounds:
        return
    extra: dict[str, Any] = {}
    maybe_fault = None if len(sounds) == 1 else f"{path}: {key} has {len(sounds)} sounds, one is allowed"
    for suffix, member in members.items():
        if suffix not in (".json", ".txt"):
            continue
        reader = tar.extractfile(member)
        data = reader.read() if reader else b""
        if suffix == ".txt":
            extra["text"] = data.decode("utf-8", "replace").strip()
            continue
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            maybe_fault = f"{path}: {member.name} is no JSON ({error})"
            continue
        extra |= document if isinstance(document, dict) else {"json": document}
    yield Reference(
        f"{path.name.removesuffix(TAR_SUFFIX)}/{key}",  # keys often begin anew in each shard of a set
        str(path.absolute()),
        status.st_size,
        status.st_mtime_ns,
        maybe_member=(sounds[0].offset_data, sounds[0].size),
        extra={name: value for name, value in extra.items() if name != "id"},
        maybe_fault=maybe_fault,
    )


# --- Parquet ------------------------------------------------------------------------------------------------------


def _in_parquet(path: Path, audio_column: str) -> Iterator[Reference]:
    """A row for each of its rows. The sound is a struct of `bytes` and `path`, as `datasets` has it, bytes, or a path.

    Every other column is carried through but those of bytes.
    """
    with _read_errors(path):
        parquet = import_parquet()
        status = path.stat()
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if audio_column not in schema.names:
                raise InputError(f"{path}: has no column {audio_column!r}, but {', '.join(schema.names)}")
            kind = str(schema.field(audio_column).type)
            carried = [
                name for name in schema.names if name != audio_column and "binary" not in str(schema.field(name).type)
            ]
            read = [*carried, *([audio_column] if kind in ("string", "large_string") else [])]
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=read, use_threads=False):
                for entry in batch.to_pylist() if read else [{}] * batch.num_rows:
                    yield _of_row(path, status, row, entry, audio_column)
                    row += 1


def _of_row(path: Path, status: os.stat_result, row: int, entry: dict[str, Any], audio_column: str) -> Reference:
    row_id = str(entry["id"]) if entry.get("id") is not None else f"{path.stem}/{row}"
    extra = {name: _plain(value) for name, value in entry.items() if name not in ("id", audio_column)}
    if audio_column in entry:
        return _of_file(path.parent / str(entry[audio_column]), row_id, extra=extra)
    place = str(path.absolute())
    return Reference(row_id, place, status.st_size, status.st_mtime_ns, maybe_row=row, column=audio_column, extra=extra)


def _plain(value: Any) -> Any:
    """As JSON has it: of dates and the like, their text."""
    match value:
        case Mapping():
            return {str(name): _plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


def import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"Parquet needs pyarrow, which is not installed: {how_to_get('datasets')}") from None
    return pyarrow.parquet


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """What goes wrong while a file of many recordings is looked through: the job cannot know what it is about."""
    try:
        yield
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:  # pyarrow's own are of this kind
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is None:  # gzip's, and pyarrow's
            raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from None
