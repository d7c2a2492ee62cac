"""The official weights, fetched from the model hub at their pinned revision, and verified.

Rules of this room:

- Only huggingface_hub speaks to the network. Its cache, its resuming of cut downloads and its variables hold:
  HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE. It is imported when something has to be fetched.
- A file counts when its size and its SHA-256 are the pinned ones. One that is wrong is removed from the hub's cache,
  so that the next run gets it anew.
- The weights folder gets copies of what the cache holds: they outlive it, and the onnx package refuses data that is a
  link, symbolic or hard. A file appears under its name only when it is whole and right.
- The metadata comes last: a folder that has it has all the files that were asked for.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mossnano_stdio.errors import BundleError, DeviceError, MossnanoError, OutputError, UsageError, reason_of
from mossnano_stdio.files import cannot_write, told_as
from mossnano_stdio.weights import published
from mossnano_stdio.weights.digest import cache_folder, sha256_of
from mossnano_stdio.weights.folder import WEIGHTS_NAME
from mossnano_stdio.weights.graphs import FileRecord
from mossnano_stdio.weights.metadata import METADATA_NAME
from mossnano_stdio.weights.published import PinnedRepository

CHECKPOINT_NAME: Final = "MOSS-Audio-Tokenizer-Nano"
DISK_ERRNOS: Final = {  # none of them comes from a socket
    number
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EMFILE", "ENFILE")
    if (number := getattr(errno, name, None))
}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Selection:
    """Files of one repository that serve one purpose, and the folder that they are looked for in."""

    repository: PinnedRepository
    folder_name: str
    file_names: tuple[str, ...]

    @property
    def default_folder(self) -> Path:
        """./weights/... where somebody made a ./weights; else the user's cache."""
        parent = Path("weights")
        return (parent if parent.is_dir() else cache_folder()) / self.folder_name


def selections() -> dict[str, Selection]:
    """What can be fetched, by name.

    >>> list(selections())
    ['decode', 'encode', 'checkpoint']
    >>> selections()["decode"].file_names[-1]
    'codec_browser_onnx_meta.json'
    """
    return {
        "decode": _part_of_bundle("decode"),
        "encode": _part_of_bundle("encode"),
        "checkpoint": Selection(published.CHECKPOINT, CHECKPOINT_NAME, tuple(published.CHECKPOINT.files)),
    }


def _part_of_bundle(direction: str) -> Selection:
    names = [name for name in published.BUNDLE.files if f"_{direction}" in name]
    return Selection(published.BUNDLE, WEIGHTS_NAME, (*names, METADATA_NAME))


def fetch(selection: Selection, folder: Path, report: Report) -> list[str]:
    """Have every file of `selection` in `folder`, right to the byte; the names of those that were not so before."""
    placed = []
    with told_as(cannot_write(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    for name in selection.file_names:
        record = selection.repository.files[name]
        destination = folder / name
        if _maybe_fault(destination, record) is None:
            report(f"{name}: {record.size_bytes:,} bytes, already there and right")
            continue
        cached = _cached_file(selection.repository, name, record)
        unfinished = folder / f".{name}.{os.getpid()}.part"
        with told_as(cannot_write(destination)):
            try:
                shutil.copyfile(cached, unfinished)
                unfinished.replace(destination)
            finally:
                unfinished.unlink(missing_ok=True)
        placed.append(name)
        report(f"{name}: {record.size_bytes:,} bytes, verified")
    return placed


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
