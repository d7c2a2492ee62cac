"""JSON files of a weights folder, read so that an error can name the place in the file.

Rules of this room:

- A value is used only through the method that says what it must be. What is missing or of another kind is a
  BundleError that names the file, the place in it, what was found there and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mossnano_stdio.errors import BundleError

MAX_JSON_BYTES = 4 << 20


def load_json(path: Path) -> tuple[Entry, bytes]:
    """The outermost entry of the file, and the file's bytes."""
    if path.exists() and not path.is_file():
        raise BundleError(f"{path}: is no regular file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(f"{path}: is not there") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_JSON_BYTES:
        raise BundleError(f"{path}: has more than {MAX_JSON_BYTES} bytes, so it is no metadata")
    try:
        return Entry(json.loads(content), str(path)), content
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is no JSON ({error})") from None


class Entry:
    """A place in a JSON document that knows how it is called in errors."""

    def __init__(self, value: object, where: str) -> None:
        self.value = value
        self.where = where

    def at(self, key: str) -> Entry:
        entry = self.maybe_at(key)
        if entry is None:
            raise BundleError(f"{self.where}: {key!r} is missing")
        return entry

    def maybe_at(self, key: str) -> Entry | None:
        value = self.object()
        return Entry(value[key], f"{self.where}: {key}") if key in value else None

    def text_at(self, key: str, default: str) -> str:
        entry = self.maybe_at(key)
        return entry.text() if entry else default

    def entries_at(self, key: str) -> Iterator[tuple[str, Entry]]:
        """Name and entry of each item of the object at `key`, if there is one."""
        if entry := self.maybe_at(key):
            for name, value in entry.object().items():
                yield name, Entry(value, f"{entry.where}: {name}")

    def items_at(self, key: str) -> list[Entry]:
        """The items of the list at `key`, if there is one."""
        entry = self.maybe_at(key)
        return entry.items() if entry else []

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def items(self) -> list[Entry]:
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Entry(value, f"{self.where}[{index}]") for index, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            raise self.wrong("text")
        return self.value

    def texts(self) -> tuple[str, ...]:
        return tuple(item.text() for item in self.items())

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def whole(self, least: int = 0, most: int = 2**31 - 1) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not least <= self.value <= most:
            raise self.wrong(f"a whole number from {least} to {most}")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.wrong("a number")
        return float(self.value)

    def shape(self) -> tuple[int, ...]:
        return tuple(item.whole(least=1) for item in self.items())

    def one_of(self, *allowed: str) -> str:
        if self.value not in allowed:
            raise self.wrong(" or ".join(map(repr, allowed)))
        return str(self.value)

    def file_name(self) -> str:
        """A name without a folder: a bundle is one folder, and its metadata cannot point out of it."""
        name = self.text()
        if name in (".", "..") or any(character in name for character in "/\\:\0"):
            raise self.wrong("the name of a file in the same folder")
        return name

    def wrong(self, allowed: str) -> BundleError:
        found = json.dumps(self.value)
        found = found if len(found) <= 60 else found[:57] + "..."
        return BundleError(f"{self.where} is {found}, allowed is {allowed}")
