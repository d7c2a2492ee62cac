"""Where the sound of one row lies, and what else is known of it: small enough to be sent about by the million."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mossnano_stdio.errors import InputError


@dataclass(frozen=True)
class Reference:
    """One row that shall be: a file, or a part of one, a member of a tar, or a row of a Parquet file."""

    id: str
    path: str  # absolute, as a worker may have another working folder
    file_bytes: int = 0
    mtime_ns: int = 0
    maybe_member: tuple[int, int] | None = None  # in a tar: offset and size of its bytes
    maybe_row: int | None = None  # in a Parquet file
    column: str = ""  # there, the one with the sound
    start_seconds: float = 0.0
    maybe_end_seconds: float | None = None
    maybe_channels: tuple[int, ...] | None = None  # which of the file's; None: all
    extra: Mapping[str, Any] = field(default_factory=dict)  # of the source, and carried through
    maybe_fault: str | None = None  # found before anything was read: it goes into quarantine with this

    @property
    def name(self) -> str:
        """What errors call it."""
        if self.maybe_row is not None:
            return f"{self.path}, row {self.maybe_row}"
        return self.path if self.maybe_member is None else f"{self.path}, {self.id}"

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value not in (None, "", {})})

    @classmethod
    def from_json(cls, text: str | bytes) -> Reference:
        fields = json.loads(text)
        for name in ("maybe_member", "maybe_channels"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def fingerprint(self) -> bytes:
        """What must stay as it is while a job lasts. Not the folder: a corpus may be moved."""
        facts = asdict(self)
        del facts["path"]
        return json.dumps(facts, sort_keys=True).encode()

    def check_unchanged(self) -> None:
        """An InputError, which ends the job, where the file is no longer the one that was found at its start."""
        try:
            status = Path(self.path).stat()
        except OSError as error:
            raise InputError(f"{self.path} was there when the job began, and now it is not: {error.strerror}") from None
        if (status.st_size, status.st_mtime_ns) != (self.file_bytes, self.mtime_ns):
            raise InputError(f"{self.path} was changed while the job ran; run it again, into another folder")


class ParquetRows:
    """Values of one column of one Parquet file, row by row. The last place is kept: rows are mostly asked for in order.

    Only a part of a row group is in memory at a time.
    """

    def __init__(self) -> None:
        self._place: tuple[str, str, int] = ("", "", 0)
        self._values: Iterator[Any] = iter(())

    def value(self, path: str, column: str, row: int) -> Any:
        if self._place[:2] != (path, column) or self._place[2] > row:
            self._place, self._values = (path, column, 0), _column_values(path, column)
        here = self._place[2]
        for value in self._values:
            here += 1
            if here > row:
                self._place = (path, column, here)
                return value
        raise InputError(f"{path}: has no row {row}")


def _column_values(path: str, column: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=1, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()


@contextmanager
def opened(reference: Reference, parquet_rows: ParquetRows) -> Iterator[BinaryIO]:
    """The bytes of the audio file that it refers to."""
    if reference.maybe_row is not None:
        value = parquet_rows.value(reference.path, reference.column, reference.maybe_row)
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            raise InputError(f"{reference.name}: holds no bytes of a sound in {reference.column!r}")
        yield io.BytesIO(data)
        return
    with Path(reference.path).open("rb") as file:
        if reference.maybe_member is None:
            yield file
        else:
            yield io.BufferedReader(_Window(file, *reference.maybe_member))


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if place < 0:
            raise ValueError(f"a place of {place}, before the start")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._place))
        self._file.seek(self._offset + self._place)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
