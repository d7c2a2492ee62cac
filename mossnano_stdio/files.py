"""Files in and out of the tools: `-` is stdin or stdout, and no half file is ever left.

Rules of this room:

- Output goes to a new file beside its destination and is renamed over it once all of it was written. A run that
  fails leaves what was there before.
- What is no regular file (a device, a named pipe) cannot be renamed over and is written as it is.
- That output cannot be opened is an OutputError, with its errno. That input cannot be, is left to speak for itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

from mossnano_stdio.errors import OutputError, UsageError, reason_of

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
    if destination.exists() and not destination.is_file():
        with _opened_for_writing(destination, destination) as file:
            yield file
        return
    unfinished = destination.with_name(f".{destination.name[:NAMED_CHARACTERS]}.{os.getpid()}.part")
    try:  # from before the file is there: a signal may come at any moment
        with _opened_for_writing(unfinished, destination) as file:
            yield file
        if destination.exists():
            shutil.copymode(destination, unfinished)
        _rename(unfinished, destination)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


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


def _opened_for_writing(path: Path, destination: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise _cannot_write(destination, error) from None


def _rename(unfinished: Path, destination: Path) -> None:
    try:
        unfinished.replace(destination)
    except OSError as error:
        raise _cannot_write(destination, error) from None


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path.parent}: cannot write {path.name} there: {reason_of(error)}")
