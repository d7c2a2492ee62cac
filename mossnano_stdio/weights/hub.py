"""The official weights, fetched from the model hub at their pinned revision, and verified.

Rules of this room:

- Only huggingface_hub speaks to the network. Its cache, its resuming of cut downloads and its variables hold:
  HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE. It is imported when something has to be fetched.
- A file counts when its size and its SHA-256 are the pinned ones. One that is wrong is removed from the hub's cache,
  so that the next run gets it anew.
- The weights folder gets copies of what the cache holds: they outlive it, and the onnx package refuses data that is a
  link, symbolic or hard. A checkpoint's tensors are hard links where that is possible: they are large. A file appears
  under its name only when it is whole and right.
- Nothing is fetched that the disks have no room for.
- The metadata comes last: a folder that has it has all the files that were asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mossnano_stdio.errors import BundleError, DeviceError, MossnanoError, OutputError, UsageError, reason_of
from mossnano_stdio.files import cannot_write, told_as
from mossnano_stdio.weights import published
from mossnano_stdio.weights.checked_json import load_json
from mossnano_stdio.weights.digest import cache_folder, sha256_of
from mossnano_stdio.weights.graphs import FileRecord
from mossnano_stdio.weights.metadata import METADATA_NAME
from mossnano_stdio.weights.published import PinnedRepository, PublishedModel

DISK_ERRNOS: Final = {  # none of them comes from a socket
    number
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EMFILE", "ENFILE")
    if (number := getattr(errno, name, None))
}

TENSORS_SUFFIX: Final = ".safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
ALL_TENSORS: Final = ("",)  # what every tensor's name begins with

Report = Callable[[str], None]


@dataclass(frozen=True)
class Selection:
    """Files of one repository that serve one purpose, and the folder that they are looked for in.

    Of a checkpoint in several files only those are taken that hold tensors with one of `tensor_prefixes`. Which they
    are says its index, which comes first.
    """

    repository: PinnedRepository
    folder_name: str
    file_names: tuple[str, ...]
    tensor_prefixes: tuple[str, ...] = ALL_TENSORS

    @property
    def default_folder(self) -> Path:
        """./weights/... where somebody made a ./weights; else the user's cache."""
        parent = Path("weights")
        return (parent if parent.is_dir() else cache_folder()) / self.folder_name


def selections(model: str = "nano") -> dict[str, Selection]:
    """What can be fetched, by name.

    >>> list(selections())
    ['decode', 'encode', 'checkpoint']
    >>> selections()["decode"].file_names[-1]
    'codec_browser_onnx_meta.json'
    >>> selections("24k")["decode"].tensor_prefixes
    ('decoder.', 'quantizer.')
    """
    chosen = published.MODELS[model]
    pinned = chosen.checkpoint
    checkpoint = Selection(pinned, chosen.maybe_folder_name or pinned.name, tuple(pinned.files))
    if chosen.maybe_bundle:
        decode, encode = (_part_of_bundle(chosen, direction) for direction in ("decode", "encode"))
    else:  # its graphs are built here, beside the checkpoint
        decode = replace(checkpoint, tensor_prefixes=chosen.decode_prefixes)
        encode = replace(checkpoint, tensor_prefixes=chosen.encode_prefixes)
    return {"decode": decode, "encode": encode, "checkpoint": checkpoint}


def _part_of_bundle(model: PublishedModel, direction: str) -> Selection:
    assert model.maybe_bundle is not None
    names = [name for name in model.maybe_bundle.files if f"_{direction}" in name]
    return Selection(model.maybe_bundle, model.folder_name, (*names, METADATA_NAME))


def fetch(selection: Selection, folder: Path, report: Report) -> list[str]:
    """Have every file of `selection` in `folder`, right to the byte; the names of those that were not so before."""
    with told_as(cannot_write(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in selection.file_names if not name.endswith(TENSORS_SUFFIX)]
    placed = _fetch_files(selection.repository, others, folder, report)
    return placed + _fetch_files(selection.repository, tensor_files(selection, folder), folder, report)


def tensor_files(selection: Selection, folder: Path) -> list[str]:
    """The files of a checkpoint whose tensors are needed, once its index, if it has any, is in `folder`."""
    names = [name for name in selection.file_names if name.endswith(TENSORS_SUFFIX)]
    if INDEX_NAME not in selection.file_names or selection.tensor_prefixes == ALL_TENSORS:
        return names
    index, _ = load_json(folder / INDEX_NAME)
    holders = index.entries_at("weight_map")
    needed = {entry.text() for name, entry in holders if name.startswith(selection.tensor_prefixes)}
    return [name for name in names if name in needed]


def _fetch_files(repository: PinnedRepository, names: Sequence[str], folder: Path, report: Report) -> list[str]:
    """Fetch those that are not there yet, and return their names."""
    missing = [name for name in names if _maybe_fault(folder / name, repository.files[name])]
    _check_room(repository, missing, folder)
    for name in names:
        record = repository.files[name]
        if name not in missing:
            report(f"{name}: {record.size_bytes:,} bytes, already there and right")
            continue
        cached = _cached_file(repository, name, record)
        destination = folder / name
        unfinished = folder / f".{name}.{os.getpid()}.part"
        with told_as(cannot_write(destination)):
            try:
                _place(cached, unfinished)
                unfinished.replace(destination)
            finally:
                unfinished.unlink(missing_ok=True)
        report(f"{name}: {record.size_bytes:,} bytes, verified")
    return missing


def _place(cached: Path, path: Path) -> None:
    """Copy a file out of the cache. Tensors, which are large, and which nobody refuses behind a link, are not copied
    where the folder lies on the same disk.
    """
    if cached.name.endswith(TENSORS_SUFFIX):
        with contextlib.suppress(OSError):
            path.hardlink_to(cached.resolve())
            return
    shutil.copyfile(cached, path)


def _check_room(repository: PinnedRepository, missing: Sequence[str], folder: Path) -> None:
    """Refuse, before the first byte comes, what the disks of the hub's cache and of `folder` have no room for."""
    if not missing:
        return
    hub = _import_hub()
    cache = Path(hub.constants.HF_HUB_CACHE)
    needed: dict[int, int] = {}  # bytes by disk
    places: dict[int, Path] = {}
    for name in missing:
        size_bytes = repository.files[name].size_bytes
        is_cached = isinstance(
            hub.try_to_load_from_cache(repository.repository, name, revision=repository.revision), str
        )
        on_disks = [_existing(cache)] if not is_cached else []
        is_linked = name.endswith(TENSORS_SUFFIX) and _existing(cache).stat().st_dev == folder.stat().st_dev
        on_disks += [] if is_linked else [folder]
        for place in on_disks:
            disk = place.stat().st_dev
            places.setdefault(disk, place)
            needed[disk] = needed.get(disk, 0) + size_bytes
    for disk, needed_bytes in needed.items():
        free_bytes = shutil.disk_usage(places[disk]).free
        if free_bytes < needed_bytes:
            raise OutputError(
                f"{places[disk]}: {needed_bytes:,} bytes of {repository.repository} are still to come, and "
                f"{free_bytes:,} are free: {reason_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))}; "
                "--to and HF_HUB_CACHE can name other disks"
            )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _cached_file(repository: PinnedRepository, name: str, record: FileRecord) -> Path:
    """The file in the hub's cache, verified. What was in the cache and is wrong is fetched anew, once."""
    hub = _import_hub()
    was_cached = isinstance(hub.try_to_load_from_cache(repository.repository, name, revision=repository.revision), str)
    path = _download(hub, repository, name)
    maybe_fault = _maybe_fault(path, record)
    if maybe_fault and was_cached:
        _remove_from_cache(path)
        path = _download(hub, repository, name)
        maybe_fault = _maybe_fault(path, record)
    if maybe_fault:
        _remove_from_cache(path)
        raise BundleError(
            f"{path}: {maybe_fault}; what {hub.constants.ENDPOINT} sent is not the published file. "
            "It was removed: run this again, or use another HF_ENDPOINT"
        )
    return path


def _download(hub: Any, repository: PinnedRepository, name: str) -> Path:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a disk that is too small is an error of ours, in one line
            return Path(hub.hf_hub_download(repository.repository, name, revision=repository.revision))
    except Exception as error:  # three HTTP libraries, by the hub client's version, share no narrower ancestor
        raise _explained(error, hub, f"{repository.repository}/{name}") from error


def _explained(error: Exception, hub: Any, what: str) -> MossnanoError:
    """What the hub's client ran into, as one of our errors."""
    where = hub.constants.ENDPOINT
    causes = list(_chain(error))
    if maybe_errno := next(filter(None, map(_maybe_disk_errno, causes)), None):
        reason = reason_of(OSError(maybe_errno, os.strerror(maybe_errno)))
        return OutputError(
            f"{what}: cannot be written to {hub.constants.HF_HUB_CACHE}: {reason}; HF_HUB_CACHE can name another place"
        )
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
    match next(filter(None, statuses), None):
        case 404:
            return BundleError(f"{what}: {where} has no such file at the pinned revision (404); is HF_ENDPOINT right?")
        case 401 | 403 as status:
            return DeviceError(f"{what}: {where} refuses access ({status}); HF_TOKEN can name a token that has it")
    if hub.constants.HF_HUB_OFFLINE:
        return DeviceError(f"{what}: is not in {hub.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it")
    said = str(causes[-1]).strip().splitlines() or [""]
    return DeviceError(
        f"{what}: cannot be fetched from {where}: {type(causes[-1]).__name__}: {said[0]} "
        "(is there a network? HF_ENDPOINT can name a mirror)"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    maybe_error: BaseException | None = error
    seen: set[int] = set()
    while maybe_error is not None and id(maybe_error) not in seen:
        seen.add(id(maybe_error))
        yield maybe_error
        maybe_error = maybe_error.__cause__ or maybe_error.__context__


def _maybe_disk_errno(error: BaseException) -> int | None:
    """The errno that says why a file could not be written; hf_xet has it in its text only."""
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in DISK_ERRNOS):
        return error.errno
    maybe_match = re.search(r"\(os error (\d+)\)", str(error))
    number = int(maybe_match[1]) if maybe_match else None
    return number if number in DISK_ERRNOS else None


def _maybe_fault(path: Path, record: FileRecord) -> str | None:
    """Why the file is not the one of the record; None where it is."""
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return "is not there"
    if size_bytes != record.size_bytes:
        return f"has {size_bytes} bytes, {record.size_bytes} were published"
    if (found := sha256_of(path)) != record.sha256:
        return f"has SHA-256 {found}, {record.sha256} was published"
    return None


def _remove_from_cache(path: Path) -> None:
    """The entry of the snapshot, and what it links to."""
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            "fetching needs huggingface_hub, which is not installed: pip install 'mossnano-stdio[fetch]'"
        ) from None
    return huggingface_hub
