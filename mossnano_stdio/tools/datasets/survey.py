"""The first look at all inputs: how many recordings there are, what marks them, and whether their ids are unique.

It reads no sound. For each recording 8 bytes stay in memory, and for each shard a mark.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mossnano_stdio.errors import InputError, UsageError
from mossnano_stdio.tools.datasets.references import Reference
from mossnano_stdio.tools.datasets.shards import Columns

MARK_DIGITS = 16


@dataclass(frozen=True)
class Survey:
    """What was found."""

    rows: int
    sha256: str
    shard_marks: list[str]
    columns: dict[str, str]


def surveyed(find: Callable[[], Iterator[Reference]], shard_rows: int) -> Survey:
    """Look at all references; `find` gives them anew each time."""
    whole = hashlib.sha256()
    marks: list[str] = []
    columns = Columns()
    hashes = array("Q")
    shard = hashlib.sha256()
    for number, reference in enumerate(find()):
        if number and number % shard_rows == 0:
            marks.append(shard.hexdigest()[:MARK_DIGITS])
            shard = hashlib.sha256()
        mark = reference.fingerprint()
        whole.update(mark + b"\n")
        shard.update(mark + b"\n")
        columns.notice(reference.extra)
        hashes.append(_hash_of(reference.id))
    if not hashes:
        raise UsageError("the inputs name no recording")
    marks.append(shard.hexdigest()[:MARK_DIGITS])
    refuse_doubles(hashes, lambda: (reference.id for reference in find()))
    return Survey(len(hashes), whole.hexdigest(), marks, columns.kinds())


def hashes_of(names: Iterable[str]) -> array[int]:
    return array("Q", map(_hash_of, names))


def refuse_doubles(hashes: array[int], names: Callable[[], Iterable[str]]) -> None:
    """An InputError where two of the names, whose hashes these are, are the same."""
    ordered = np.sort(np.frombuffer(hashes, np.uint64))
    doubles = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not doubles:
        return
    seen: dict[str, int] = {}
    for number, name in enumerate(names()):
        if _hash_of(name) not in doubles:
            continue
        if name in seen:
            raise InputError(
                f"recordings {seen[name]} and {number} are both called {name!r}; give each an `id` of its own "
                "in a manifest"
            )
        seen[name] = number


def _hash_of(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
