"""Shards: how rows lie in files, in each form, and how they are read again.

    parquet      shard-000000.parquet: a row each, `codes` as list<list<uint16>>, [quantizers, frames]
    webdataset   shard-000000.tar: KEY.codes.npy, uint16 [quantizers, frames], and KEY.json, all else
    npy          shard-000000.npy: uint16 [quantizers, frames], all rows one after the other, which can be mapped into
                 memory, and shard-000000.jsonl: a line for each row, with the `start_frame` of its codes
    mossnano     shard-000000.tar: KEY.mossnano and KEY.json

A row has `id`, `codes`, `frames`, `quantizers`, `original_samples`, `sample_rate`, `codec`, `weights_sha256`, and what
its source said of it. What is called there like one of these is called `source_...` here. KEY is the row's number, as
an id may hold dots and slashes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from mossnano_stdio.errors import InputError
from mossnano_stdio.tokens import Artifact, Codes, build_artifact, load_artifact
from mossnano_stdio.tools.datasets.inputs import import_parquet

FORMS: Final = ("parquet", "webdataset", "npy", "mossnano")
SUFFIXES: Final = {
    "parquet": (".parquet",),
    "webdataset": (".tar",),
    "npy": (".npy", ".jsonl"),  # the second counts the rows of the first
    "mossnano": (".tar",),
}
OWN_FIELDS: Final = (
    "id", "codes", "frames", "quantizers", "original_samples", "sample_rate", "codec", "weights_sha256",
)  # fmt: skip
RENAMED: Final = "source_"
LEAST_INT64, MOST_INT64 = -(1 << 63), (1 << 63) - 1


class Origin(NamedTuple):
    """What all rows of a job have in common."""

    codec: str
    weights_sha256: str
    sample_rate: int
    channels: int
    codebook_size: int


@dataclass(frozen=True, eq=False)
class CodedRow:
    """One row, as it is written. `number` counts the job's items, those in quarantine too."""

    number: int
    id: str
    codes: Codes  # [quantizers, frames]
    original_samples: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def facts(self, origin: Origin) -> dict[str, Any]:
        """All but the codes, as JSON has it."""
        quantizers, frames = self.codes.shape
        own = {
            "id": self.id,
            "frames": frames,
            "quantizers": quantizers,
            "original_samples": self.original_samples,
            "sample_rate": origin.sample_rate,
            "codec": origin.codec,
            "weights_sha256": origin.weights_sha256,
        }
        return own | {carried_name(name): value for name, value in self.extra.items()}

    @property
    def key(self) -> str:
        return f"{self.number:09d}"


def carried_name(name: str) -> str:
    """What a column of the source is called in a row of ours.

    >>> carried_name("text"), carried_name("sample_rate")
    ('text', 'source_sample_rate')
    """
    return RENAMED + name if name in OWN_FIELDS or name == "start_frame" else name


# --- columns of Parquet -------------------------------------------------------------------------------------------


class Columns:
    """Of which kind each carried column is: the same in all shards, so that they are one table.

    What is text, numbers or true and false throughout stays that; anything else becomes a text of JSON.

    >>> columns = Columns()
    >>> columns.notice({"text": "a", "snr": 3, "words": ["a"]}); columns.notice({"snr": 2.5, "text": None})
    >>> columns.kinds()
    {'snr': 'float64', 'text': 'string', 'words': 'json'}
    """

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def notice(self, extra: Mapping[str, Any]) -> None:
        for name, value in extra.items():
            self._seen.setdefault(carried_name(name), set()).add(_kind_of(value))

    def kinds(self) -> dict[str, str]:
        kinds = {}
        for name, seen in sorted(self._seen.items()):
            match sorted(seen - {"null"}):
                case ["float64", "int64"]:
                    kinds[name] = "float64"
                case [only]:
                    kinds[name] = only
                case []:
                    kinds[name] = "string"
                case _:
                    kinds[name] = "json"
        return kinds


def _kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int() if LEAST_INT64 <= value <= MOST_INT64:
            return "int64"
        case float():
            return "float64"
        case str():
            return "string"
        case _:
            return "json"


def _as_kind(value: Any, kind: str) -> Any:
    if value is None or kind != "json":
        return value
    return json.dumps(value, ensure_ascii=False)


# --- writing ------------------------------------------------------------------------------------------------------


def write_shard(
    files: Sequence[BinaryIO], form: str, rows: Sequence[CodedRow], origin: Origin, columns: Mapping[str, str]
) -> None:
    """Write the rows into the files of the form, in the order of SUFFIXES."""
    match form:
        case "parquet":
            _write_parquet(files[0], rows, origin, columns)
        case "npy":
            _write_npy(files[0], files[1], rows, origin)
        case _:
            _write_tar(files[0], form, rows, origin)


def _write_parquet(file: BinaryIO, rows: Sequence[CodedRow], origin: Origin, columns: Mapping[str, str]) -> None:
    parquet = import_parquet()
    import pyarrow as arrow

    facts = [row.facts(origin) for row in rows]
    own = {
        "id": arrow.string(),
        "frames": arrow.int32(),
        "quantizers": arrow.int32(),
        "original_samples": arrow.int64(),
        "sample_rate": arrow.int32(),
        "codec": arrow.string(),
        "weights_sha256": arrow.string(),
    }
    table = {name: arrow.array([each[name] for each in facts], kind) for name, kind in own.items()}
    table["codes"] = _nested(arrow, [row.codes for row in rows])
    for name, kind in columns.items():
        values = [_as_kind(each.get(name), kind) for each in facts]
        table[name] = arrow.array(values, arrow.type_for_alias("string" if kind == "json" else kind))
    ordered = {name: table[name] for name in (*OWN_FIELDS, *columns)}
    parquet.write_table(arrow.table(ordered), file, compression="zstd")


def _nested(arrow: Any, codes: Sequence[Codes]) -> Any:
    """list<list<uint16>>, without a Python number for each code."""
    lengths = [frames for quantizers, frames in (each.shape for each in codes) for _ in range(quantizers)]
    inner_offsets = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int32)
    outer_offsets = np.concatenate([[0], np.cumsum([len(each) for each in codes])]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, np.uint16), *(each.reshape(-1) for each in codes)])
    inner = arrow.ListArray.from_arrays(arrow.array(inner_offsets), arrow.array(flat.astype(np.uint16)))
    return arrow.ListArray.from_arrays(arrow.array(outer_offsets), inner)


def _write_npy(file: BinaryIO, lines: BinaryIO, rows: Sequence[CodedRow], origin: Origin) -> None:
    np.save(file, np.concatenate([row.codes for row in rows], axis=1).astype("<u2"))
    start_frame = 0
    for row in rows:
        lines.write(_json_line(row.facts(origin) | {"start_frame": start_frame}))
        start_frame += row.codes.shape[1]


def _write_tar(file: BinaryIO, form: str, rows: Sequence[CodedRow], origin: Origin) -> None:
    # "w|" never seeks. A TarInfo that is made by its name has no time, owner or rights of this machine in it.
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            if form == "webdataset":
                codes = io.BytesIO()
                np.save(codes, np.ascontiguousarray(row.codes, dtype="<u2"))
                _add(tar, f"{row.key}.codes.npy", codes.getvalue())
            else:
                _add(tar, f"{row.key}.mossnano", build_artifact(_artifact_of(row, origin)))
            _add(tar, f"{row.key}.json", _json_line(row.facts(origin)))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _artifact_of(row: CodedRow, origin: Origin) -> Artifact:
    quantizers, frames = row.codes.shape
    return Artifact(
        origin.sample_rate,
        origin.channels,
        row.original_samples,
        quantizers,
        frames,
        origin.codebook_size,
        codes=row.codes.T,
    )


def _json_line(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


# --- reading ------------------------------------------------------------------------------------------------------


class StoredRow(NamedTuple):
    """A row of a shard: what is known of it, and where its codes lie. `read_codes` gets them."""

    id: str
    original_samples: int
    sample_rate: int
    maybe_weights_sha256: str | None
    place: dict[str, Any]


def stored_rows(path: Path) -> Iterator[StoredRow]:
    """The rows of a shard, in their order, of whatever form its name says; a lone `.mossnano` is one row."""
    match path.suffix:
        case ".parquet":
            yield from _rows_of_parquet(path)
        case ".tar":
            yield from _rows_of_tar(path)
        case ".npy":
            yield from _rows_of_npy(path)
        case ".mossnano":
            with path.open("rb") as file:
                header = load_artifact(file, str(path))
            place = {"path": str(path.absolute()), "kind": "mossnano"}
            yield StoredRow(path.stem, header.original_samples, header.sample_rate, None, place)
        case _:
            raise InputError(f"{path}: is no shard; allowed are .parquet, .tar, .npy and .mossnano")


def _rows_of_parquet(path: Path) -> Iterator[StoredRow]:
    parquet = import_parquet()
    wanted = ["id", "original_samples", "sample_rate", "weights_sha256"]
    with parquet.ParquetFile(path) as file:
        missing = {*wanted, "codes"} - set(file.schema_arrow.names)
        if missing:
            raise InputError(f"{path}: has no column {sorted(missing)[0]!r}, so it is no shard of `mossnano tokenize`")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted, use_threads=False):
            for entry in batch.to_pylist():
                place = {"path": str(path.absolute()), "kind": "parquet", "row": number}
                yield _stored(entry, place, path)
                number += 1


def _rows_of_tar(path: Path) -> Iterator[StoredRow]:
    maybe_place: dict[str, Any] | None = None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which would grow with the archive
            if member.name.endswith((".codes.npy", ".mossnano")):
                kind = "npy-member" if member.name.endswith(".npy") else "mossnano"
                maybe_place = {
                    "path": str(path.absolute()),
                    "kind": kind,
                    "offset": member.offset_data,
                    "size": member.size,
                }
            elif member.name.endswith(".json") and maybe_place is not None:
                reader = tar.extractfile(member)
                yield _stored(json.loads(reader.read() if reader else b"{}"), maybe_place, path)
                maybe_place = None


def _rows_of_npy(path: Path) -> Iterator[StoredRow]:
    lines = path.with_suffix(".jsonl")
    with lines.open("rb") as file:
        for line in file:
            entry = json.loads(line)
            place = {"path": str(path.absolute()), "kind": "npy"}
            place |= {"start_frame": entry["start_frame"], "frames": entry["frames"]}
            yield _stored(entry, place, lines)


def _stored(entry: Mapping[str, Any], place: dict[str, Any], path: Path) -> StoredRow:
    try:
        return StoredRow(
            str(entry["id"]),
            int(entry["original_samples"]),
            int(entry["sample_rate"]),
            str(entry["weights_sha256"]),
            place,
        )
    except KeyError as error:
        raise InputError(f"{path}: a row has no {error}, so it is no shard of `mossnano tokenize`") from None


class CodesReader:
    """Reads the codes of stored rows; best in their order."""

    def __init__(self) -> None:
        from mossnano_stdio.tools.datasets.references import ParquetRows

        self._parquet_rows = ParquetRows()

    def read(self, place: Mapping[str, Any]) -> Codes:
        """[quantizers, frames], which is not yet checked against any codebook."""
        path = Path(place["path"])
        match place["kind"]:
            case "parquet":
                rows = self._parquet_rows.value(place["path"], "codes", place["row"])
                return np.array(rows, dtype=np.uint16).reshape(len(rows), -1)
            case "npy":
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
                start_frame = place["start_frame"]
                return np.array(mapped[:, start_frame : start_frame + place["frames"]], dtype=np.uint16)
        with path.open("rb") as file:
            file.seek(place.get("offset", 0))
            data = file.read(place.get("size", -1))
        if place["kind"] == "npy-member":
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), dtype=np.uint16)
        return np.ascontiguousarray(load_artifact(io.BytesIO(data), str(path)).codes.T)


def read_rows(paths: Iterable[Path]) -> Iterator[tuple[StoredRow, Codes]]:
    """All rows of all shards, with their codes."""
    reader = CodesReader()
    for path in paths:
        for row in stored_rows(path):
            yield row, reader.read(row.place)
