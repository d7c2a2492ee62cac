"""The two jobs, from the first look at the inputs to the last shard: `tokenize_all` and `detokenize_all`."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mossnano_stdio.codecs import load_encoder_runtime
from mossnano_stdio.errors import InputError, UsageError
from mossnano_stdio.files import cannot_write, told_as
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.tools.datasets.census import Census
from mossnano_stdio.tools.datasets.inputs import find_references
from mossnano_stdio.tools.datasets.journal import MARKS, QUARANTINE_NAME, Journal
from mossnano_stdio.tools.datasets.progress import Progress
from mossnano_stdio.tools.datasets.shards import CodedRow, Origin, StoredRow, stored_rows, write_shard
from mossnano_stdio.tools.datasets.survey import hashes_of, refuse_doubles, surveyed
from mossnano_stdio.tools.datasets.work import Outcome
from mossnano_stdio.weights import Bundle, find_weights, load_bundle

NEEDED: Final = ("soundfile", "soxr")
SHARD_NAME: Final = re.compile(r"shard-\d{6,}\.(parquet|tar|npy)")
UNFINISHED_FILE: Final = re.compile(r"\..*\.\d+\.part")  # as files.py calls them
STORED_SUFFIXES: Final = (".parquet", ".tar", ".npy", ".mossnano")

Engine = Callable[[Iterable[str], Mapping[str, Any]], Generator[Outcome, None, None]]


@dataclass(frozen=True)
class Report:
    """How a job ended."""

    census: Census | None
    facts: Mapping[str, Any]
    quarantined: int
    quarantine: Path


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_packages() -> None:
    """Before anything is looked at: is there what reads recordings?"""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"data sets need {' and '.join(missing)}, not installed here: {how_to_get('datasets')}")


def find_bundle(maybe_weights: str | None) -> Bundle:
    return load_bundle(find_weights(maybe_weights))


# --- tokenize -----------------------------------------------------------------------------------------------------


def tokenize_all(
    inputs: Sequence[str],
    folder: Path,
    bundle: Bundle,
    engine: Engine,
    *,
    form: str,
    quantizers: int,
    shard_rows: int,
    audio_column: str,
    fail_fast: bool,
    log_json: bool,
) -> Report:
    """Encode all recordings of the inputs into shards in `folder`, behind those that are there."""
    refuse_folder_within(inputs, folder)
    if not bundle.has_graph("encode_step"):
        load_encoder_runtime(bundle)  # says why: each family has its own reason
    codec = bundle.format
    find = partial(find_references, inputs, audio_column)
    survey = surveyed(find, shard_rows)
    origin = Origin(
        bundle.name, weights_sha256(bundle, "encode_step"), codec.sample_rate, codec.channels, codec.codebook_size
    )
    settings = {
        "mossnano": "tokenize",
        "form": form,
        "shard_rows": shard_rows,
        "quantizers": quantizers,
        **origin._asdict(),
        "columns": survey.columns,
        "rows": survey.rows,
        "inputs_sha256": survey.sha256,
        MARKS: survey.shard_marks,
    }
    with Journal(folder, settings, say) as journal:
        census = Census(quantizers, codec.codebook_size, codec.sample_rate)
        journal.restore(census)
        first = min(journal.shards_done * shard_rows, survey.rows)
        progress = Progress(survey.rows, first, log_json=log_json)
        work = {"verb": "tokenize", "weights": str(bundle.folder.absolute()), "quantizers": quantizers}
        items = (reference.to_json() for reference in islice(find(), first, None))
        references = islice(find(), first, None)
        with progress.shown(), closing(engine(items, work)) as outcomes:
            for start in range(first, survey.rows, shard_rows):
                end = min(start + shard_rows, survey.rows)
                rows, bad = _shard_of(range(start, end), references, outcomes, census, progress, fail_fast=fail_fast)
                write = partial(write_shard, form=form, rows=rows, origin=origin, columns=survey.columns)
                line = journal.finish_shard(len(rows), write, bad, census)
                progress.log("shard", **line)
    facts = {**progress.facts(), **census.facts()}
    progress.log("end", **census.facts())
    return Report(census, facts, census.quarantined, folder / QUARANTINE_NAME)


def _shard_of(
    numbers: range,
    references: Iterator[Any],
    outcomes: Iterator[Outcome],
    census: Census,
    progress: Progress,
    *,
    fail_fast: bool,
) -> tuple[list[CodedRow], list[dict[str, Any]]]:
    """The next shard: what was encoded of it, and what goes into quarantine."""
    rows: list[CodedRow] = []
    bad: list[dict[str, Any]] = []
    for number in numbers:
        reference, outcome = next(references), next(outcomes)
        if outcome.maybe_fault is not None:
            if fail_fast:
                raise InputError(outcome.maybe_fault)
            bad.append({"row": number, "id": reference.id, "reason": outcome.maybe_fault})
            census.quarantined += 1
            progress.advance(0.0, failed=True)
            continue
        assert outcome.maybe_codes is not None
        row = CodedRow(number, reference.id, outcome.maybe_codes, outcome.facts["original_samples"], reference.extra)
        rows.append(row)
        census.add(row.codes, row.original_samples)
        progress.advance(row.original_samples / census.sample_rate)
    return rows, bad


def weights_sha256(bundle: Bundle, graph_name: str) -> str:
    """What tells one graph's weights from others: the SHA-256 over its files' names and theirs."""
    graph = bundle.graph(graph_name)
    files = sorted((file.path.name, file.sha256()) for file in graph.files)
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def refuse_folder_within(inputs: Sequence[str], folder: Path) -> None:
    """What a job writes must not be found by its next run."""
    inner = folder.absolute()
    for name in inputs:
        outer = Path(name).absolute()
        if outer.is_dir() and inner.is_relative_to(outer):
            raise UsageError(f"--to is {folder}, which lies in the input {name}; name a folder outside of it")


# --- detokenize ---------------------------------------------------------------------------------------------------


def detokenize_all(
    inputs: Sequence[str],
    folder: Path,
    bundle: Bundle,
    engine: Engine,
    *,
    form: str,
    fail_fast: bool,
    log_json: bool,
) -> Report:
    """Decode all rows of the inputs into a file each, below `folder`; those that are there stay."""
    refuse_folder_within(inputs, folder)
    shards = list(_found_shards(inputs))
    hashes = hashes_of(_target_name(row.id, form) for row in _rows_of(shards))
    if not hashes:
        raise UsageError("the inputs hold no row")
    refuse_doubles(hashes, lambda: (_target_name(row.id, form) for row in _rows_of(shards)))
    marks = [[path.name, path.stat().st_size] for path in shards]
    graph_name = "fast" if bundle.has_graph("fast") else "decode_step"
    settings = {
        "mossnano": "detokenize",
        "form": form,
        "weights_sha256": weights_sha256(bundle, graph_name),
        "rows": len(hashes),
        "inputs_sha256": hashlib.sha256(json.dumps(marks).encode()).hexdigest(),
    }
    with Journal(folder, settings, say) as journal:
        progress = Progress(len(hashes), 0, log_json=log_json)
        work = {"verb": "detokenize", "weights": str(bundle.folder.absolute()), "form": form}
        bad: list[dict[str, Any]] = []
        _remove_unfinished(folder)
        is_there = bytes((folder / _target_name(row.id, form)).exists() for row in _rows_of(shards))
        missing = partial(_missing_rows, shards, is_there)
        progress.skip(sum(is_there))
        items = (json.dumps(_order_of(row, folder, form)) for row in missing())
        with progress.shown(), closing(engine(items, work)) as outcomes:
            for row, outcome in zip(missing(), outcomes, strict=True):
                if outcome.maybe_fault is not None:
                    if fail_fast:
                        raise InputError(outcome.maybe_fault)
                    bad.append({"id": row.id, "reason": outcome.maybe_fault})
                progress.advance(row.original_samples / row.sample_rate, failed=outcome.maybe_fault is not None)
        journal.set_quarantine(bad)
    progress.log("end")
    return Report(None, progress.facts(), len(bad), folder / QUARANTINE_NAME)


def _found_shards(inputs: Sequence[str]) -> Iterator[Path]:
    """Shards are named themselves, or by their folder; so are lone `.mossnano` files."""
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(each for each in path.iterdir() if SHARD_NAME.fullmatch(each.name))
            found = found or sorted(path.rglob("*.mossnano"))
            if not found:
                raise UsageError(f"{path}: has neither shards of `mossnano tokenize` nor .mossnano files in it")
            yield from found
        elif path.suffix in STORED_SUFFIXES:
            yield path
        else:
            raise UsageError(f"{path}: is no shard; allowed are folders of them, and {', '.join(STORED_SUFFIXES)}")


def _rows_of(shards: Iterable[Path]) -> Iterator[StoredRow]:
    for path in shards:
        yield from stored_rows(path)


def _missing_rows(shards: Iterable[Path], is_there: bytes) -> Iterator[StoredRow]:
    return (row for row, there in zip(_rows_of(shards), is_there, strict=True) if not there)


def _remove_unfinished(folder: Path) -> None:
    """What workers that were killed left of their files."""
    for path in folder.rglob(".*.part"):
        if UNFINISHED_FILE.fullmatch(path.name):
            with told_as(cannot_write(path)):
                path.unlink(missing_ok=True)


def _order_of(row: StoredRow, folder: Path, form: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "place": row.place,
        "original_samples": row.original_samples,
        "sample_rate": row.sample_rate,
        "target": str((folder / _target_name(row.id, form)).absolute()),
    }


def _target_name(row_id: str, form: str) -> str:
    """A path below the folder, whatever an id holds.

    >>> _target_name("a/b.flac", "flac"), _target_name("a/b.wav", "flac"), _target_name("/../x", "wav")
    ('a/b.flac', 'a/b.wav.flac', '_/x.wav')
    """
    parts = [re.sub(r'[\x00-\x1f:*?"<>|\\]', "_", part) for part in PurePosixPath(row_id).parts if part != "/"]
    name = "/".join("_" if part == ".." else part for part in parts) or "_"
    return name if name.endswith(f".{form}") else f"{name}.{form}"
