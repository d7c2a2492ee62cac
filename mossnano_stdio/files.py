"""Opens the files that the tools read and write: `-` is stdin or stdout, and no half-written file is left.

Rules of this room:

- Output goes to a new file beside its destination, which is renamed over it once all was written. A run that fails
  leaves what was there before.
- A destination that is no regular file (a device, a named pipe) is written directly, as nothing can be renamed over it.
- Failing to open or write an output raises an OutputError that names it, with its errno. Failing to open or read an
  input raises the plain OSError.
- A reader that went away is no failure to write, so its BrokenPipeError is passed on.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from mossnano_stdio.errors import OutputError, UsageError, reason_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STANDARD_STREAM: Final = "-"
NAMED_CHARACTERS: Final = 40  # of the destination's name, in that of the unfinished file: a name has at most 255 bytes


@contextlib.contextmanager
def open_input(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """Open the file at `path`, or stdin for `-`, which stays open. `read1` reads what is there; `read` may wait."""
    if path != STANDARD_STREAM:
        with Path(path).open("rb") as file:
            yield file
        return
    if sys.stdin is None:
        raise UsageError("stdin is closed, so `-` cannot be read")
    yield cast(io.BufferedReader, sys.stdin.buffer)


@contextlib.contextmanager
def open_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block is left without an error; or stdout for `-`."""
    if path == STANDARD_STREAM:
        with _standard_output() as file:
            yield file
        return
    destination = Path(os.path.realpath(path))  # a symlink stays, and the file that it points to is replaced
    failure = f"{destination.parent}: cannot write {destination.name} there"
    with told_as(failure):
        is_special = destination.exists() and not destination.is_file()
    if is_special:
        with io.BufferedWriter(_NamedFile(destination, failure)) as file:
            yield file
        return
    unfinished = destination.with_name(f".{destination.name[:NAMED_CHARACTERS]}.{os.getpid()}.part")
    try:  # before the file is made, because a signal may come at any moment
        with io.BufferedWriter(_NamedFile(unfinished, failure)) as file:
            yield file
        with told_as(failure):
            if destination.exists():
                unfinished.chmod(stat.S_IMODE(destination.stat().st_mode))
            unfinished.replace(destination)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def open_named(path: Path) -> BinaryIO:
    """Open a new file at `path` in a folder that the caller renames, or removes, as a whole."""
    return io.BufferedWriter(_NamedFile(path, cannot_write(path)))


@contextlib.contextmanager
def named_stdout() -> Iterator[None]:
    """In the block, printing to a stdout that cannot be written raises an OutputError too."""
    plain = sys.stdout
    buffer = plain.buffer if isinstance(plain, io.TextIOWrapper) else None
    raw = getattr(buffer, "raw", buffer)  # `python -u` leaves the buffer out
    if not isinstance(plain, io.TextIOWrapper) or not isinstance(raw, io.FileIO):  # closed, replaced, Windows' console
        yield
        return
    plain.flush()
    file = io.BufferedWriter(_NamedFile(raw.fileno(), "stdout cannot be written", closefd=False))
    by_line = plain.line_buffering or plain.write_through
    with (
        io.TextIOWrapper(file, plain.encoding, plain.errors, line_buffering=by_line) as named,
        contextlib.redirect_stdout(named),
    ):
        yield


@contextlib.contextmanager
def told_as(failure: str) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that begins with `failure`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{failure}: {reason_of(error)}") from None


def cannot_write(path: Path) -> str:
    return f"{path}: cannot be written"


@contextlib.contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    if sys.stdout is None:
        raise UsageError("stdout is closed, so `-` cannot be written")
    stdout = sys.stdout.buffer
    if not isinstance(stdout, io.RawIOBase):
        yield stdout
        stdout.flush()
        return
    buffered = io.BufferedWriter(stdout)  # under `python -u`, where a write may be cut short
    try:
        yield buffered
    finally:
        buffered.detach()


class _NamedFile(io.FileIO):
    """A file whose failures to write name it. The OSError of a plain file's write does not."""

    def __init__(self, file: Path | int, failure: str, *, closefd: bool = True) -> None:
        self._failure = failure
        with told_as(failure):
            super().__init__(file, "wb", closefd=closefd)

    def write(self, data: ReadableBuffer) -> int:
        with told_as(self._failure):
            return super().write(data)

    def close(self) -> None:
        with told_as(self._failure):
            super().close()
