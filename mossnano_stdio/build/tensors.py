"""The tensors of safetensors files, each asked for by name and shape.

Rules of this room:

- Every tensor that is asked for must be there, in its shape, finite and float32, and no other may be there. Anything
  else is a BundleError that names the tensor.
- A tensor is read when it is needed, and each time anew: the largest checkpoints have more of them than many a machine
  has memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mossnano_stdio.build.model import Array
from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named


class TensorPlace(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class Tensors:
    """The tensors of one or many files. `source` is what errors call them together, `caller` what calls for shapes."""

    def __init__(self, source: Path, places: Mapping[str, TensorPlace], caller: str) -> None:
        self.source = source
        self.places = places
        self._caller = caller
        self._expected: set[str] = set()

    def expect(self, name: str, *shape: int) -> None:
        """Is it there, in this shape?"""
        if name not in self.places:
            raise BundleError(f"{self.source}: the tensor {name} {list(shape)} is missing")
        place = self.places[name]
        if place.shape != shape:
            raise BundleError(
                f"{place.path}: {name} has shape {list(place.shape)}, {self._caller} calls for {list(shape)}"
            )
        if place.dtype != "F32":
            raise BundleError(f"{place.path}: {name} is {place.dtype}; F32 is needed")
        self._expected.add(name)

    def read(self, name: str) -> Array:
        """One tensor as it lies in the file. It may be read more than once."""
        path = self.places[name].path
        with _opened(path) as file:  # each time anew: what is mapped of a file counts as our memory until it is closed
            tensor: Array = file.get_tensor(name)
        if not np.isfinite(tensor).all():
            raise BundleError(f"{path}: {name} holds NaN or infinity")
        return tensor

    def take(self, name: str, *shape: int) -> Array:
        self.expect(name, *shape)
        return self.read(name)

    def pass_over(self, name: str) -> None:
        """It may be there, and decides nothing."""
        self._expected.add(name)

    def refuse_leftovers(self, but: tuple[str, ...] = ()) -> None:
        """Raise for tensors that nobody asked for, unless their names begin with one of `but`."""
        leftovers = sorted(name for name in self.places.keys() - self._expected if not name.startswith(but))
        if leftovers:
            more = f" and {len(leftovers) - 1} more" if len(leftovers) > 1 else ""
            raise BundleError(f"{self.places[leftovers[0]].path}: unexpected tensor {leftovers[0]}{more}")


class RenamedTensors(Tensors):
    """The tensors of one file by the names of one layout, whether it has these or those of another.

    A file of that layout holds the tensor `mark`. `rename` says what the other calls a tensor.
    """

    def __init__(self, path: Path, caller: str, mark: str, rename: Callable[[str], str]) -> None:
        super().__init__(path, places_in(path), caller)
        self.is_renamed = mark not in self.places
        self._rename = rename

    def in_file(self, name: str) -> str:
        return self._rename(name) if self.is_renamed else name

    def take(self, name: str, *shape: int) -> Array:
        return super().take(self.in_file(name), *shape)

    def pass_over(self, name: str) -> None:
        super().pass_over(self.in_file(name))


def replaced(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """A name in which everything that fits one of the patterns was replaced, one pattern after the other."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def places_in(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of one file."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return {name: TensorPlace(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def maybe_marked_file(checkpoint: Path, patterns: Sequence[str], marks: Sequence[str], several: str) -> Path | None:
    """The file that `checkpoint`, a file or a folder, stands for: one that holds a tensor of `marks`.

    None where there is none. `several` is what an error calls more than one.
    """
    if checkpoint.is_file():
        return checkpoint if _is_marked(checkpoint, marks) else None
    found = [path for pattern in patterns for path in sorted(checkpoint.glob(pattern)) if _is_marked(path, marks)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BundleError(f"{checkpoint}: holds several {several} ({names}); name one of these files instead")
    return found[0] if found else None


def save_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    with open_named(path) as file:
        file.write(save(dict(tensors)))


def _is_marked(path: Path, marks: Sequence[str]) -> bool:
    try:
        return not places_in(path).keys().isdisjoint(marks)
    except BundleError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: cannot be read as safetensors: {error}") from error
    with opened as file:
        yield file
