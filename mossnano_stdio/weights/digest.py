"""The SHA-256 of a file, computed once and remembered for as long as the file stays as it is.

Rules of this room:

- Hashing 44 MB takes longer than everything else at start. So what was hashed is remembered in the user's cache
  folder, under the file's size, inode and both its times; when any of them moved, it is hashed again. Small files
  are hashed each time, which takes no longer than remembering.
- A file that changed within the last seconds is not remembered: clocks are coarse, and a second change within the
  same tick would go unseen.
- Where what was remembered cannot be read or written, files are hashed each time, without an error. So they are by a
  frozen program, which writes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from mossnano_stdio.frozen import maybe_frozen_folder

MEMORY_NAME = "verified.json"
MEMORY_VERSION = 1
REMEMBERED_FILES = 64  # the oldest are forgotten first
SMALL_BYTES = 1 << 20
SETTLED_NS = 2_000_000_000  # no clock of a file system is coarser

Marks = list[int]  # size, mtime_ns, ctime_ns, inode


def cache_folder() -> Path:
    """Where we keep what could be made again: $MOSSNANO_CACHE, or the platform's place for such things."""
    if chosen := os.environ.get("MOSSNANO_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        parent = "~/Library/Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser() / "mossnano-stdio"


def sha256_of(path: Path, *, afresh: bool = False) -> str:
    """The SHA-256 of the file's content, in hexadecimal; `afresh`: whatever is remembered."""
    target = path.resolve()  # the hub's cache has several links to one file
    with target.open("rb") as file:
        marks = _marks_of(file.fileno())
        is_small = marks[0] < SMALL_BYTES
        if not (afresh or is_small) and (remembered := _load_memory().get(str(target))) and remembered[:-1] == marks:
            return str(remembered[-1])
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        marks_after = _marks_of(file.fileno())
    is_settled = max(marks[1:3]) + SETTLED_NS < time.time_ns()  # both its times
    if not is_small and marks_after == marks and is_settled and maybe_frozen_folder() is None:
        _remember(str(target), [*marks, sha256])
    return sha256


def _marks_of(fd: int) -> Marks:
    """What changes with the content. Its time of change nobody can set back, as he can its time of modification."""
    status = os.fstat(fd)
    changed_ns = status.st_ctime_ns
    if sys.platform == "win32":
        changed_ns = _changed_ns(fd)
    return [status.st_size, status.st_mtime_ns, changed_ns, status.st_ino]


if sys.platform == "win32":

    def _changed_ns(fd: int) -> int:
        """What st_ctime is elsewhere; on Windows that is the time of creation."""
        import ctypes
        import msvcrt
        from ctypes import wintypes

        kernel = ctypes.WinDLL("kernel32")
        kernel.GetFileInformationByHandleEx.argtypes = [wintypes.HANDLE, ctypes.c_int, wintypes.LPVOID, wintypes.DWORD]
        basic = (ctypes.c_int64 * 5)()  # created, accessed, written, changed, in 100 ns since 1601; attributes
        is_told = kernel.GetFileInformationByHandleEx(msvcrt.get_osfhandle(fd), 0, basic, ctypes.sizeof(basic))
        return 100 * (basic[3] - 116_444_736_000_000_000) if is_told else time.time_ns()  # now: never remembered


def _load_memory() -> dict[str, list[int | str]]:
    """File name -> marks and SHA-256; whatever does not look like that is as good as forgotten."""
    try:
        document = json.loads((cache_folder() / MEMORY_NAME).read_bytes())
        if document["version"] != MEMORY_VERSION:
            return {}
        return {
            str(key): entry
            for key, entry in document["files"].items()
            if isinstance(entry, list) and len(entry) == 5 and isinstance(entry[-1], str)
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        return {}


def _remember(key: str, entry: list[int | str]) -> None:
    """Replace the memory as a whole: a reader sees the old one or the new one, never half of one."""
    memory = _load_memory()  # again: another process may have written while this one was hashing
    memory.pop(key, None)
    memory[key] = entry
    newest = dict(list(memory.items())[-REMEMBERED_FILES:])
    document = json.dumps({"version": MEMORY_VERSION, "files": newest}, indent=1)
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{MEMORY_NAME}.{os.getpid()}.part"
        try:
            unfinished.write_text(document, encoding="utf-8", newline="\n")
            unfinished.replace(folder / MEMORY_NAME)
        finally:
            unfinished.unlink(missing_ok=True)
