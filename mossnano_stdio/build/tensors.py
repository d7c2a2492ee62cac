"""The tensors of safetensors files, each asked for by name and shape.

Rules of this room:

- Every tensor that is asked for must be there, in its shape, finite and float32, and no other may be there. Anything
  else is a BundleError that names the tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mossnano_stdio.build.model import Array
from mossnano_stdio.errors import BundleError


class TensorFile:
    """One file, open until `opened` is closed."""

    def __init__(self, path: Path, opened: ExitStack) -> None:
        self.path = path
        try:
            self._file: Any = opened.enter_context(safe_open(path, framework="numpy"))
            self.names: Collection[str] = frozenset(self._file.keys())
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{path}: cannot be read as safetensors: {error}") from error
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int) -> Array:
        """Read one tensor as it lies in the file. It may be read more than once."""
        if name not in self.names:
            raise BundleError(f"{self.path}: the tensor {name} {list(shape)} is missing")
        entry = self._file.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise BundleError(f"{self.path}: {name} has shape {entry.get_shape()}, {list(shape)} is called for")
        if entry.get_dtype() != "F32":
            raise BundleError(f"{self.path}: {name} is {entry.get_dtype()}; F32 is needed")
        tensor: Array = self._file.get_tensor(name)
        if not np.isfinite(tensor).all():
            raise BundleError(f"{self.path}: {name} holds NaN or infinity")
        self._taken.add(name)
        return tensor

    def pass_over(self, name: str) -> None:
        """It may be there, and decides nothing."""
        self._taken.add(name)

    def refuse_leftovers(self) -> None:
        leftovers = sorted(set(self.names) - self._taken)
        if leftovers:
            more = f" and {len(leftovers) - 1} more" if len(leftovers) > 1 else ""
            raise BundleError(f"{self.path}: unexpected tensor {leftovers[0]}{more}")
