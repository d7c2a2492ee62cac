"""The language model with which encodec-rs packs codes: it says how likely each next code is.

    lm_weights_q8.bin, little-endian: "ELMQ0001"; u32 dim, layers, heads, codebooks, cardinality, positions and past
    context; then the tensors in the order of LmWeights. A matrix: float32 scale of each row, int8 [rows, columns],
    float32 bias of each row.

Rules of this room:

- What comes out must be what came out where the file was written, to the last bit: a probability that differs moves
  the bounds of all codes after it. So sums are taken in the order of their index, in float64 or float32 as the writer
  takes them; only sums of whole numbers, which are exact, are taken in any order.
- The length of the file follows from its seven numbers and is checked before anything is allocated.
- A model has the state of one chunk, and the weights have none: any number of models share them.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ArtifactError

LM_MAGIC: Final = b"ELMQ0001"
CARDINALITY: Final = 1024  # codes of a codebook
LM_LIMITS: Final = {  # in the order of the file
    "dim": (1, 256),  # of rows of 4 dim: the sums of bytes stay below 2^24, up to where float32 has all whole numbers
    "layers": (1, 16),
    "heads": (1, 256),
    "codebooks": (1, 32),
    "cardinality": (CARDINALITY, CARDINALITY),
    "positions": (1, 1024),
    "past_context": (1, 65_536),
}
MAX_LM_BYTES: Final = 64 << 20

_NUMBERS: Final = struct.Struct("<8s7I")
_NORM_EPSILON: Final = 1e-5
_LARGEST_I16: Final = 32767
_PIECE_NUMBERS: Final = 8192  # OpenBLAS puts more of them on all cores, which wait for each other longer than they work
_SMALLEST_TOP: Final = 1e-30  # its inverse, and that of its steps, are numbers still

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class NormWeights(NamedTuple):
    gain: F64
    bias: F64


class Matrix(NamedTuple):
    """Rows of bytes, each with its scale and bias."""

    columns: F32  # [pieces, columns, rows of a piece] of whole numbers, -128 to 127
    scales: F32
    bias: F32


class Layer(NamedTuple):
    in_proj: Matrix  # to query, key and value
    out_proj: Matrix
    linear1: Matrix
    linear2: Matrix
    norm1: NormWeights
    norm2: NormWeights


@dataclass(frozen=True, eq=False)
class LmWeights:
    """What lm_weights_q8.bin holds."""

    sha256: str  # of the file: files of codes name the model by it
    dim: int
    heads: int
    codebooks: int
    past_context: int
    norm_in: NormWeights
    positions: F32  # [positions, dim]
    layers: tuple[Layer, ...]
    embeddings: F32  # [codebooks, cardinality + 1, dim]; row 0 is "no code yet"
    heads_out: Matrix  # of all codebooks, one below the other


def parse_lm_weights(data: bytes) -> LmWeights:
    """Raise ArtifactError if `data` are no such weights."""
    if len(data) < _NUMBERS.size or not data.startswith(LM_MAGIC):
        found = data[: len(LM_MAGIC)]
        raise ArtifactError(
            f"a language model of {len(data)} bytes begins with {found!r}, allowed are {LM_MAGIC!r} and "
            f"{_NUMBERS.size} bytes or more"
        )
    numbers = dict(zip(LM_LIMITS, _NUMBERS.unpack_from(data)[1:], strict=True))
    for name, (least, most) in LM_LIMITS.items():
        if not least <= numbers[name] <= most:
            raise ArtifactError(f"the language model's {name} is {numbers[name]}, allowed are {least} to {most}")
    dim, layers, heads, codebooks, _, positions, past_context = numbers.values()
    if dim % heads:
        raise ArtifactError(f"the language model's dim is {dim}, allowed are multiples of its {heads} heads")
    if len(data) != (file_bytes := _file_bytes(dim, layers, codebooks, positions)):
        raise ArtifactError(f"the language model is {len(data)} bytes, its numbers make it {file_bytes}")
    tensors = _Tensors(data, _NUMBERS.size)
    norm_in = tensors.norm(dim)
    position_rows = tensors.floats(positions, dim)
    return LmWeights(
        hashlib.sha256(data).hexdigest(),
        dim,
        heads,
        codebooks,
        past_context,
        norm_in,
        position_rows,
        tuple(tensors.layer(dim) for _ in range(layers)),
        tensors.floats(codebooks, CARDINALITY + 1, dim),
        _stacked([tensors.matrix(CARDINALITY, dim) for _ in range(codebooks)]),
    )


def _file_bytes(dim: int, layers: int, codebooks: int, positions: int) -> int:
    def matrix(rows: int, columns: int) -> int:
        return rows * (4 + columns + 4)

    norm = 8 * dim
    matrices = matrix(3 * dim, dim) + matrix(dim, dim) + matrix(4 * dim, dim) + matrix(dim, 4 * dim)
    embeddings = 4 * codebooks * (CARDINALITY + 1) * dim
    start = _NUMBERS.size + norm + 4 * positions * dim
    return start + layers * (matrices + 2 * norm) + embeddings + codebooks * matrix(CARDINALITY, dim)


class _Tensors:
    """Takes one tensor of the file after the other."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data = data
        self._place = place

    def floats(self, *shape: int) -> F32:
        values = self._taken("<f4", shape).astype(np.float32)
        if not np.isfinite(values).all():
            raise ArtifactError("the language model has a weight that is not finite, allowed are finite numbers")
        return values

    def norm(self, size: int) -> NormWeights:
        return NormWeights(self.floats(size).astype(np.float64), self.floats(size).astype(np.float64))

    def matrix(self, rows: int, columns: int) -> Matrix:
        scales = self.floats(rows)
        piece_rows = max(size for size in range(1, rows + 1) if rows % size == 0 and size * columns <= _PIECE_NUMBERS)
        pieces = self._taken("i1", (rows, columns)).reshape(-1, piece_rows, columns).transpose(0, 2, 1)
        return Matrix(pieces.astype(np.float32, order="C"), scales, self.floats(rows))

    def layer(self, dim: int) -> Layer:
        in_proj, out_proj = self.matrix(3 * dim, dim), self.matrix(dim, dim)
        linear1, linear2 = self.matrix(4 * dim, dim), self.matrix(dim, 4 * dim)
        return Layer(in_proj, out_proj, linear1, linear2, self.norm(dim), self.norm(dim))

    def _taken(self, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        values = np.frombuffer(self._data, dtype, math.prod(shape), self._place)
        self._place += values.nbytes
        return values.reshape(shape)


def _stacked(matrices: list[Matrix]) -> Matrix:
    return Matrix(*(np.concatenate(parts, axis=0) for parts in zip(*matrices, strict=True)))


class LanguageModel:
    """Goes through the frames of one chunk."""

    def __init__(self, weights: LmWeights) -> None:
        self._weights = weights
        self._head_size = weights.dim // weights.heads
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        weights = self._weights
        self._frames = 0
        # The frames that a frame looks back at, one entry more, as before the first frame there is one whose input was
        # zero: its key and value are the biases. Entries lie so that each sum goes along the first axis.
        entries = min(weights.past_context, len(weights.positions)) + 1
        self._keys = np.zeros((len(weights.layers), self._head_size, entries, weights.heads))
        self._values = np.zeros((len(weights.layers), entries, weights.heads, self._head_size))
        for number, layer in enumerate(weights.layers):
            _, key, value = layer.in_proj.bias.reshape(3, weights.heads, self._head_size)
            self._keys[number, :, 0] = key.T
            self._values[number, 0] = value
        self._entries = 1

    def step(self, symbols: NDArray[np.intp]) -> F32:
        """How likely each code of the next frame is, as logits [codebooks, cardinality]. `symbols` are the codes of the
        frame before, plus one; zeros before the first frame. What the model has learnt goes on over so many frames as
        it has positions; then it starts anew, and so do the symbols.
        """
        weights = self._weights
        if self._frames == len(weights.positions):
            self.reset()
            symbols = np.zeros_like(symbols)
        x = np.zeros(weights.dim, np.float32)
        for embedding, symbol in zip(weights.embeddings, symbols, strict=True):
            x = x + embedding[symbol]
        x = _normalised(x, weights.norm_in) + weights.positions[self._frames]
        if self._entries == self._values.shape[1]:  # the oldest goes
            self._keys[:, :, :-1] = self._keys[:, :, 1:]
            self._values[:, :-1] = self._values[:, 1:]
            self._entries -= 1
        for number, layer in enumerate(weights.layers):
            attended = self._attend(number, _product(layer.in_proj, x))
            x = _normalised(_product(layer.out_proj, attended) + x, layer.norm1)
            hidden = _gelu(_product(layer.linear1, x))
            x = _normalised(_product(layer.linear2, hidden) + x, layer.norm2)
        self._frames += 1
        self._entries += 1
        return _product(weights.heads_out, x).reshape(weights.codebooks, CARDINALITY)

    def _attend(self, number: int, projected: F32) -> F32:
        entries = self._entries + 1
        query, key, value = projected.reshape(3, self._weights.heads, self._head_size)
        self._keys[number, :, entries - 1] = key.T
        self._values[number, entries - 1] = value
        keys, values = self._keys[number, :, :entries], self._values[number, :entries]
        scores = sum_in_order(keys * query.T.astype(np.float64)[:, None]) * (1.0 / math.sqrt(self._head_size))
        weights = np.exp(scores - scores.max(axis=0))  # [entries, heads]
        shares = weights / sum_in_order(weights)
        return sum_in_order((shares[:, :, None] * values).astype(np.float32)).reshape(-1)


def sum_in_order(values: NDArray[Any]) -> NDArray[Any]:
    """Over the first axis, from its first entry on, each sum rounded before the next entry is added.

    numpy adds whole rows of more than one number in this order; numbers that lie beside each other it adds in pairs.

    >>> float(sum_in_order(np.array([1e16, 1.0, 1.0, -1e16])))
    0.0
    """
    if values[0].size > 1 and values.flags.c_contiguous:
        return np.add.reduce(values, axis=0)  # type: ignore[no-any-return]
    return np.cumsum(values, axis=0)[-1]  # type: ignore[no-any-return]


def _product(matrix: Matrix, x: F32) -> F32:
    """The input becomes 16-bit numbers, whose product with the matrix is a whole number: exact in float32 and in any
    order, as long as each half of the 16 bits goes alone.
    """
    top = np.abs(x).max()
    if top == 0:
        return matrix.bias
    if not _SMALLEST_TOP < top < np.inf:
        raise ArtifactError(f"the language model comes to {top}: these weights, or their scales, are not real ones")
    scale = np.float32(top / np.float32(_LARGEST_I16))
    steps = (x * (np.float32(1) / scale)).astype(np.float64)
    whole = (steps + np.copysign(0.5, steps)).astype(np.int32)  # halves are rounded away from zero
    high = (whole + 128) >> 8
    halves = np.stack([high, whole - (high << 8)]).astype(np.float32)  # -128 to 128, and -128 to 127
    # One half at a time, and these with the columns in rows: BLAS is faster so than with both at once.
    sums = (np.float32(256) * (halves[0] @ matrix.columns) + halves[1] @ matrix.columns).reshape(-1)
    return matrix.bias + sums * scale * matrix.scales  # type: ignore[no-any-return]


def _normalised(x: F32, norm: NormWeights) -> F32:
    values = x.astype(np.float64)
    centred = values - np.cumsum(values)[-1] / len(values)
    variance = np.cumsum(centred * centred)[-1] / len(values)
    normalised: F64 = centred * (1.0 / math.sqrt(variance + _NORM_EPSILON)) * norm.gain + norm.bias
    return normalised.astype(np.float32)


def _gelu(x: F32) -> F32:
    values = x.astype(np.float64)
    errors = np.fromiter(map(math.erf, (values / 1.4142135623730951).tolist()), np.float64, len(values))
    activated: F64 = 0.5 * values * (1.0 + errors)
    return activated.astype(np.float32)
