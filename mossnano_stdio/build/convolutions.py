"""Convolutions as the codecs of this family of networks have them, and stacks of such modules.

Rules of this room:

- Plain numpy, float32, nothing about files and nothing about onnx.
- Convolutions lie as torch has them: [out, in, kernel], transposed ones [in, out, kernel]. The kernel of a layer that
  changes the rate is twice its stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mossnano_stdio.build.model import Array
from mossnano_stdio.errors import BundleError


class Module(Protocol):
    """One of a stack, each of which takes the channels that the one before it gives."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution: each column of its output sees `past_columns` more of the input than its stride."""

    weight: Array  # [out, in, kernel]
    bias: Array  # [out]
    stride: int

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1])

    @property
    def past_columns(self) -> int:
        return int(self.weight.shape[2]) - self.stride


@dataclass(frozen=True, eq=False)
class TransposedConv:
    """The opposite of a strided Conv: each column becomes `stride` columns, and adds to the `stride` after them."""

    weight: Array  # [in, out, 2 * stride]
    bias: Array  # [out]

    @property
    def stride(self) -> int:
        return int(self.weight.shape[2]) // 2

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[0])


def check_stack(modules: Sequence[Module], inputs: int, outputs: int, name: str) -> None:
    """Raises a BundleError unless each module takes what reaches it, and the last one gives so many channels."""
    columns = inputs
    for index, module in enumerate(modules):
        if module.inputs != columns:
            raise BundleError(f"{name} {index}: takes {module.inputs} channels, but {columns} reach it")
        columns = module.outputs
    if columns != outputs:
        raise BundleError(f"{name}: ends with {columns} channels, {outputs} are needed")
