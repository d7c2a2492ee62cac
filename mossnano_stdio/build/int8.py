"""The int8 graph: a graph of ours in which chosen matrix products multiply 8 bits by 8 bits.

    many tokens   y = scale_of_x * scale_of_column * (x in 8 bits . column in 8 bits)
    few tokens    the same, with a scale for each BLOCK of a column and of a token: nearer, and as quick for few only

The scales of x are found by the runtime in each run, those of columns and blocks here.

Rules of this room:

- A graph is made of the float32 one, node by node: what is not chosen stays as it is. Codebooks, joints, norms and
  attention cannot be chosen, as most of the error would come from them and next to none of the time.
- CPUs without VNNI add the products of two neighbours in a column, unsigned by signed, in 16 bits, and saturate. So no
  two neighbours of one sign add up to more than MAX_PAIR: 255 * 128 fits. Neighbours of two signs cannot get there. In
  blocks no CPU does that.
- The same weights give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mossnano_stdio.build.builder import EXTERNAL_BYTES, DataFile
from mossnano_stdio.build.model import Array
from mossnano_stdio.build.transformers import MICROSOFT
from mossnano_stdio.files import open_named

FEW_TOKENS = 8  # of a product in a step of one frame
BLOCK = 32
ZERO = 128  # of values in blocks, which are unsigned

MAX_VALUE = 127
NEXT_TO_NOTHING = 1e-30  # what divides this by 127 may give 0
MAX_PAIR = 128  # times 255 is 32,640, below 2 ** 15
# Of the scale by which the largest value of a column becomes MAX_VALUE. Less cuts off the largest to have finer steps
# for all others, more cuts off fewer pairs, the last one none. For each column the one with the least error is taken.
TRIED_SCALES = (0.8, 0.88, 0.94, 1.0, 1.06, 1.14, 1.24, 1.36, 1.5, 2 * MAX_VALUE / MAX_PAIR)

# What is saved by a product in a step of one frame, as measured on one thread with VNNI: float32 weights wait for the
# memory, and products are done 2.6 times as fast.
SAVED_MS_PER_VALUE = 230e-9
SAVED_MS_PER_MAC = 10e-9

IN_LAYER = re.compile(r"(?P<transformer>.+)\.layers\.(?P<layer>\d+)\.(?P<kind>\w+)")


class QuantizedColumns(NamedTuple):
    """y = scales * (values . x)"""

    values: NDArray[np.int8]  # [out, in]
    scales: Array  # [out]


class QuantizedBlocks(NamedTuple):
    """y = sum over blocks: scales * ((values - ZERO) . x)"""

    values: NDArray[np.uint8]  # [out, blocks, BLOCK]
    scales: Array  # [out, blocks]


class Product(NamedTuple):
    """One that can be chosen."""

    part: str
    tokens: int  # of a frame


@dataclass(frozen=True)
class Part:
    """Products that are chosen together: those of one kind in one transformer, or a single one elsewhere."""

    name: str
    weights: tuple[str, ...]  # their names in the graph
    saved_ms: float  # in a step of one frame


def in_blocks(matrix: Array) -> QuantizedBlocks:
    """The nearest in 8 bits, block by block. [out, in]"""
    rows, columns = matrix.shape
    blocks = np.pad(matrix, ((0, 0), (0, -columns % BLOCK))).reshape(rows, -1, BLOCK)
    scales = _scales(blocks)
    values = np.rint(blocks / scales[..., np.newaxis]) + ZERO
    return QuantizedBlocks(values.astype(np.uint8), scales)


def in_columns(matrix: Array) -> QuantizedColumns:
    """The nearest in 8 bits that no CPU saturates on. [out, in]"""
    whole = _scales(matrix)
    best = QuantizedColumns(np.zeros(matrix.shape, np.int8), whole.copy())
    least = np.full(len(matrix), np.inf)
    for tried in TRIED_SCALES:
        scales = whole * np.float32(tried)
        values = _without_loud_pairs(np.clip(np.rint(matrix / scales[:, np.newaxis]), -MAX_VALUE, MAX_VALUE))
        errors = np.square(values * scales[:, np.newaxis] - matrix).sum(axis=1, dtype=np.float64)
        better = errors < least
        least[better] = errors[better]
        best.values[better] = values[better].astype(np.int8)
        best.scales[better] = scales[better]
    return best


def _scales(values: Array) -> Array:
    """By which the largest of each row becomes MAX_VALUE; any where all are as good as 0."""
    largest = np.abs(values).max(axis=-1)
    return np.where(largest > NEXT_TO_NOTHING, largest, 1).astype(np.float32) / np.float32(MAX_VALUE)


def _without_loud_pairs(values: Array) -> Array:
    """Brings neighbours of one sign closer to zero, both by as much, until they add up to MAX_PAIR at most."""
    even = values.shape[1] // 2 * 2  # the last of an odd number has no neighbour
    first, second = values[:, 0:even:2], values[:, 1:even:2]
    excess = np.where(first * second > 0, np.maximum(np.abs(first + second) - MAX_PAIR, 0), 0)
    of_first = np.ceil(excess / 2)
    signs = np.sign(first)
    first -= signs * of_first
    second -= signs * (excess - of_first)
    return values


class FloatGraph:
    """A float32 graph of ours, as it lies in a folder, of which int8 graphs are made."""

    def __init__(self, path: Path, transformer_tokens: Sequence[int]) -> None:
        """`transformer_tokens`: how many a frame has in each transformer."""
        self._folder = path.parent
        self._model = onnx.load(path, load_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._products = dict(self._found_products(transformer_tokens))  # by the names of their weights
        self._quantized: dict[str, QuantizedColumns | QuantizedBlocks] = {}

    def parts(self) -> list[Part]:
        """All that can be chosen."""
        weights: dict[str, list[str]] = {}
        saved_ms: dict[str, float] = {}
        for weight, (name, tokens) in self._products.items():
            values = math.prod(self._tensors[weight].dims)
            weights.setdefault(name, []).append(weight)
            saved_ms[name] = saved_ms.get(name, 0.0) + values * (SAVED_MS_PER_VALUE + tokens * SAVED_MS_PER_MAC)
        return [Part(name, tuple(found), saved_ms[name]) for name, found in weights.items()]

    def _found_products(self, transformer_tokens: Sequence[int]) -> Iterator[tuple[str, Product]]:
        transformers: list[str] = []
        widths: dict[str, int] = {}  # of what the products outside of transformers give
        tokens = 1
        for node in self._model.graph.node:
            match node.op_type:
                case "FusedMatMul":
                    if place := IN_LAYER.fullmatch(node.input[1]):
                        if place["transformer"] not in transformers:
                            transformers.append(place["transformer"])
                        tokens = transformer_tokens[len(transformers) - 1]
                        yield node.input[1], Product(f"{place['transformer']}.{place['kind']}", tokens)
                # A convolution that is done column by column of its kernel is not chosen: there are several products of
                # small weights, and what they read and write takes the time.
                case "Gemm" if node.input[1].endswith(".weight"):
                    yield node.input[1], Product(node.input[1].removesuffix(".weight"), tokens)
                    widths[node.output[0]] = self._tensors[node.input[1]].dims[0]
                case "Reshape" if node.input[0] in widths:  # each column becomes several
                    tokens *= widths[node.input[0]] // int(self._array(node.input[1])[-1])

    def save(self, path: Path, data: DataFile, weights: Collection[str], *, whole: bool = True) -> None:
        """Write the graph that does the products with these weights in 8 bits, and these into `data`; where it is to be
        whole, all other weights too. Otherwise those stay in the file of this graph.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.initializer[:]
        if not any(opset.domain == MICROSOFT for opset in model.opset_import):
            model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        kept: dict[str, onnx.TensorProto] = {}
        for node in model.graph.node:
            if node.op_type in ("FusedMatMul", "Gemm") and node.input[1] in weights:
                kept |= self._quantize(node, data)
            for name in node.input:
                if name in self._tensors and name not in kept:
                    tensor = self._tensors[name]
                    lies_outside = tensor.data_location == onnx.TensorProto.EXTERNAL
                    kept[name] = data.add(name, self._array(name)) if whole and lies_outside else tensor
        model.graph.initializer.extend(kept.values())
        with open_named(path) as file:
            file.write(model.SerializeToString(deterministic=True))

    def _quantize(self, node: onnx.NodeProto, data: DataFile) -> dict[str, onnx.TensorProto]:
        """Turn a product into one of 8 bits. Returns its new weights."""
        x, weight, *biases = node.input
        if weight not in self._quantized:
            has_few = self._products[weight].tokens <= FEW_TOKENS
            self._quantized[weight] = (in_blocks if has_few else in_columns)(self._array(weight))
        match self._quantized[weight]:
            case QuantizedColumns(values, scales):
                kind, left_out, attributes = "DynamicQuantizeMatMul", [""], {}  # zero stands for 0
                stored: NDArray[Any] = np.ascontiguousarray(values.T)
            case QuantizedBlocks(values, scales):
                kind, left_out = "MatMulNBits", ["", ""]  # zero stands for ZERO, and blocks lie in order
                rows, columns = self._tensors[weight].dims
                attributes = {"K": columns, "N": rows, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
                stored = values
        arrays: dict[str, NDArray[Any]] = {f"{weight}.values": stored, f"{weight}.scales": scales}
        inputs = [x, *arrays, *([*left_out, *biases] if biases else [])]
        node.CopyFrom(helper.make_node(kind, inputs, node.output, node.name, domain=MICROSOFT, **attributes))
        return {
            name: data.add(name, array) if array.nbytes >= EXTERNAL_BYTES else numpy_helper.from_array(array, name)
            for name, array in arrays.items()
        }

    def _array(self, name: str) -> NDArray[Any]:
        return np.asarray(numpy_helper.to_array(self._tensors[name], base_dir=str(self._folder)))
