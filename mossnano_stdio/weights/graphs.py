"""The graphs of a weights folder: the tensors that they carry from step to step, and the files that they lie in.

Nothing here opens a graph.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import BundleError
from mossnano_stdio.weights.digest import sha256_of

EMPTY_POSITION = -1  # of a cache entry that holds nothing yet: masked in every attention


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a streaming graph gives as `output_name` and takes as `input_name` in the next run."""

    input_name: str
    output_name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    initial: int

    def initial_value(self) -> NDArray[Any]:
        return np.full(self.shape, self.initial, dtype=self.dtype)


@dataclass(frozen=True)
class CacheSpec:
    """One layer's attention cache: how many tokens it looks back, and which state tensor counts its tokens."""

    decoder_index: int
    layer_index: int
    heads: int
    context_tokens: int
    offset_input_name: str


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph as metadata describes it, its files by their names."""

    file: str
    data: tuple[str, ...] = ()  # its external data
    precision: str = "float32"
    states: tuple[StateSpec, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # whatever the code that runs this graph has to know
    input_names: tuple[str, ...] = ()  # those that are no state, in order; empty where the metadata does not say
    output_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """What a file must be, to the byte."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class WeightFile:
    """A file of a bundle, and what it must be where that is known."""

    path: Path
    record: FileRecord | None
    origin: Literal["published", "recorded", "unknown"]

    def check_size(self) -> None:
        """Is it there, a regular file (through any symlinks), and as large as it must be?"""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise BundleError(
                f"{self.path}: is not there; `mossnano fetch` gets the official files, `mossnano build` makes ours"
            ) from None
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{self.path}: is no regular file")
        if self.record and status.st_size != self.record.size_bytes:
            raise BundleError(
                f"{self.path}: has {status.st_size} bytes, the {self.origin} size is {self.record.size_bytes}; "
                f"it is cut short or another file: get it again"
            )

    def sha256(self) -> str:
        """What is recorded of it, or else what it is."""
        return sha256_of(self.path) if self.record is None else self.record.sha256

    def check_content(self, *, afresh: bool = False) -> None:
        """Is its SHA-256 what it must be? Takes its time with a file not seen before, or `afresh` (see digest.py)."""
        if self.record is None:
            return
        try:
            found = sha256_of(self.path, afresh=afresh)
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read ({error.strerror})") from None
        if found != self.record.sha256:
            raise BundleError(
                f"{self.path}: has SHA-256 {found}, the {self.origin} one is {self.record.sha256}; "
                f"it was damaged or changed: get it again"
            )


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a weights folder: what its metadata says, and its files with what is known of them."""

    name: str
    model: WeightFile
    data: tuple[WeightFile, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    states: tuple[StateSpec, ...]
    precision: str
    facts: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.model.path

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return (self.model, *self.data)
