"""A graph whose columns lie as [columns, channels], with states: what steps of convolutional codecs are built of.

Rules of this room:

- A state begins as zeros. It is input that is remembered, never a sum.
- Between parts there are columns, so that a token that becomes several is a row that is read as several, and no node
  ever transposes.
"""

from __future__ import annotations

import numpy as np

from mossnano_stdio.build.builder import DataFile, GraphBuilder
from mossnano_stdio.build.convolutions import Conv, TransposedConv
from mossnano_stdio.build.model import Array
from mossnano_stdio.weights import StateSpec

ALL = np.iinfo(np.int64).max  # the end of a Slice that has none


class StepGraph(GraphBuilder):
    """A graph with states, each of which begins as zeros."""

    def __init__(self, name: str, data: DataFile) -> None:
        super().__init__(name, data)
        self.states: list[StateSpec] = []

    def state(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """The names of what the run before has left, and of what this one leaves."""
        spec = StateSpec(name, f"{name}_out", shape, np.dtype(np.float32), initial=0)
        self.states.append(spec)
        self.input(spec.input_name, np.float32, list(shape))
        return spec.input_name, spec.output_name

    def leave(self, output_name: str) -> None:
        (spec,) = (spec for spec in self.states if spec.output_name == output_name)
        self.output(output_name, np.float32, list(spec.shape))

    def after_past(self, x: str, columns: int, channels: int, name: str) -> str:
        """x behind the `columns` columns before it, which the state keeps."""
        past, past_out = self.state(name, (columns, channels))
        together = self.op("Concat", past, x, axis=0)
        self.columns(together, -columns, ALL, result=past_out)
        self.leave(past_out)
        return together

    def columns(self, x: str, start: int, end: int, result: str | None = None) -> str:
        return self.op("Slice", x, self.constant([start]), self.constant([end]), self.constant([0]), result=result)

    def windows(self, x: str, width: int) -> str:
        """Each column with the width - 1 behind it, side by side: [columns - width + 1, width * channels]."""
        if width == 1:
            return x
        pieces = [self.columns(x, shift, shift + 1 - width or ALL) for shift in range(width)]
        return self.op("Concat", *pieces, axis=1)

    def product(self, x: str, name: str, matrix: Array, bias: Array) -> str:
        """W x + b of every column, W lying as [out, in]."""
        weight = self.weight(f"{name}.weight", matrix.astype(np.float32))
        return self.op("Gemm", x, weight, self.weight(f"{name}.bias", bias.astype(np.float32)), transB=1)

    def product_of_windows(self, x: str, name: str, conv: Conv) -> str:
        """A convolution of stride 1: its product with each column and those behind it that the kernel covers."""
        outputs, inputs, width = conv.weight.shape
        if width == 1 or outputs >= inputs:
            matrix = conv.weight.transpose(0, 2, 1).reshape(outputs, width * inputs)
            return self.product(self.windows(x, width), name, matrix, conv.bias)
        # Windows would write more than the output is. So each column of the kernel is multiplied by itself, and what
        # comes of it is added up: behind one product of all where that is small, or else by products that add.
        taps = conv.weight.transpose(2, 0, 1)
        if width * outputs < inputs:
            bias_once = np.pad(conv.bias, (0, (width - 1) * outputs))
            side_by_side = self.product(x, name, taps.reshape(width * outputs, inputs), bias_once)
            parts = []
            for tap in range(width):
                place = [tap, tap * outputs], [tap + 1 - width or ALL, (tap + 1) * outputs]
                parts.append(self.op("Slice", side_by_side, *map(self.constant, place), self.constant([0, 1])))
            return self.op("Sum", *parts)
        total = self.weight(f"{name}.bias", conv.bias)
        for tap, matrix in enumerate(taps):
            columns = self.columns(x, tap, tap + 1 - width or ALL)
            total = self.op("Gemm", columns, self.weight(f"{name}.tap_{tap}", matrix), total, transB=1)
        return total

    def product_of_blocks(self, blocks: str, name: str, conv: Conv) -> str:
        """A convolution that strides: one product over each stride's columns, side by side, and those behind them."""
        matrix = conv.weight.transpose(0, 2, 1).reshape(conv.outputs, -1)
        return self.product(self.windows(blocks, 2), name, matrix, conv.bias)

    def transposed(self, x: str, name: str, conv: TransposedConv) -> str:
        """One product over each column and the one before it, as the kernel is two strides long."""
        inputs, outputs, _ = conv.weight.shape
        windows = self.windows(self.after_past(x, 1, inputs, f"{name}.past"), 2)
        now, before = np.split(conv.weight, 2, axis=2)  # what a column adds to its own place, and to the one after it
        both = np.concatenate([before, now])  # [2 * in, out, stride]
        matrix = both.transpose(2, 1, 0).reshape(conv.stride * outputs, 2 * inputs)
        spread = self.product(windows, name, matrix, np.tile(conv.bias, conv.stride))
        return self.op("Reshape", spread, self.constant([-1, outputs]))

    def looked_up(self, rows: str, codebooks: Array) -> str:
        """Rows of one table of all codebooks, in which a row of zeros is the last: [frames, quantizers, width]."""
        table = np.pad(codebooks.reshape(-1, codebooks.shape[-1]), ((0, 1), (0, 0)))
        return self.op("Gather", self.weight("codebooks", table), rows, axis=0)

    def searched(self, x: str, name: str, codebooks: Array) -> list[str]:
        """A column of codes for each codebook: the nearest row, then the next codebook's to what that leaves over.

        The nearest row has the largest x . row - |row|^2 / 2.
        """
        codes, rest = [], x
        for index, rows in enumerate(codebooks):
            half_squares = np.square(rows.astype(np.float64)).sum(axis=1) / 2
            nearness = self.product(rest, f"{name}.{index}", rows, -half_squares)
            found = self.op("ArgMax", nearness, axis=1, keepdims=0)
            if index + 1 < len(codebooks):
                rest = self.op("Sub", rest, self.op("Gather", f"{name}.{index}.weight", found, axis=0))
            codes.append(self.op("Unsqueeze", found, self.constant([1])))
        return codes
