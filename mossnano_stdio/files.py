"""Files in and out of the tools: `-` is stdin or stdout, and no half file is ever left.

Rules of this room:

- Output goes to a new file beside its destination and is renamed over it once all of it was written. A run that
  fails leaves what was there before.
- What is no regular file (a device, a named pipe) cannot be renamed over and is written as it is.
- That output cannot be opened or written is an OutputError that names it, with its errno. That input cannot be, is
  left to speak for itself.
- A reader that went away is no failure to write: its BrokenPipeError stays one.
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
NAMED_CHARACTERS: Final = 40  # of a file, in the name of what is not yet it: a name has at most 255 bytes


@contextlib.contextmanager
def open_input(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader]:
    """The file at `path`, or stdin for `-`, which stays open. `read1` takes what is there, `read` waits for more."""
    if path != STANDARD_STREAM:
        with Path(path).open("rb") as file:
            yield file
        return
    if sys.stdin is None:
        raise UsageError("stdin is closed, so `-` cannot be read")
    yield cast(io.BufferedReader, sys.stdin.buffer)


@contextlib.contextmanager
def open_output(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block is left without an error; or stdout for `-`."""
    if path == STANDARD_STREAM:
        with _standard_output() as file:
            yield file
        return
    destination = Path(os.path.realpath(path))  # a symlink stays one, and what it points to is replaced
    failure = f"{destination.parent}: cannot write {destination.name} there"
    with told_as(failure):
        is_special = destination.exists() and not destination.is_file()
    if is_special:
        with io.BufferedWriter(_NamedFile(destination, failure)) as file:
            yield file
        return
    unfinished = destination.with_name(f".{destination.name[:NAMED_CHARACTERS]}.{os.getpid()}.part")
    try:  # from before the file is there: a signal may come at any moment
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
    """A new file at `path`, for who puts files into a folder that is renamed or given up as a whole."""
    return io.BufferedWriter(_NamedFile(path, cannot_write(path)))


@contextlib.contextmanager
def named_stdout() -> Iterator[None]:
    """In the block, what is printed and cannot be written is an OutputError too."""
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
    """An OSError of the block as an OutputError that begins with `failure`."""
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
    """A file that says which it is when it cannot be written: an OSError of a write does not."""

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
