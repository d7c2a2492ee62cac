"""Writes what tokens/packed_ecdc.py reads: small language models, bundles, and files whose codes they packed."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.tokens import Codes
from mossnano_stdio.tokens.interval_coder import RANGE, RANGE_BITS, Tabulation
from mossnano_stdio.tokens.language_model import CARDINALITY, LanguageModel, LmWeights

TABULATION = Tabulation()


def lm_file(
    dim: int = 4, layers: int = 1, heads: int = 2, codebooks: int = 2, positions: int = 5, past_context: int = 3
) -> bytes:
    """A language model of random weights, the same ones each time."""
    chance = np.random.default_rng(7)

    def floats(*shape: int) -> bytes:
        return chance.standard_normal(shape).astype("<f4").tobytes()

    def matrix(rows: int, columns: int) -> bytes:
        scales = (np.abs(chance.standard_normal(rows)) / 64).astype("<f4").tobytes()
        return scales + chance.integers(-127, 128, (rows, columns)).astype(np.int8).tobytes() + floats(rows)

    start = struct.pack("<8s7I", b"ELMQ0001", dim, layers, heads, codebooks, CARDINALITY, positions, past_context)
    shapes = ((3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim))
    body = [b"".join(matrix(*shape) for shape in shapes) + floats(4, dim) for _ in range(layers)]
    embeddings = floats(codebooks, CARDINALITY + 1, dim)
    heads_out = [matrix(CARDINALITY, dim) for _ in range(codebooks)]
    return b"".join([start, floats(2, dim), floats(positions, dim), *body, embeddings, *heads_out])


def bundle_values(**changed: Any) -> dict[str, Any]:
    """A bundle.json that goes with lm_file(), of chunks of two frames. A value that is None is left out."""
    values = {
        "schema_version": 1,
        "model_name": "encodec_48khz",
        "sample_rate": 48_000,
        "channels": 2,
        "segment_samples": 640,
        "segment_stride": 600,
        "normalize": True,
        "num_codebooks": 2,
        "frame_length": 2,
        "lm_quant_weight_model": "lm.bin",
        **changed,
    }
    return {key: value for key, value in values.items() if value is not None}


def metadata_of(lm: bytes, original_samples: int, **changed: Any) -> dict[str, Any]:
    values = {
        "m": "encodec_48khz",
        "al": original_samples,
        "nc": 2,
        "lm": True,
        "fp": 8192,
        "mr": 2,
        "acv": 2,
        "tau": 1.0,
        "lmh": hashlib.sha256(lm).hexdigest(),
        **changed,
    }
    return {key: value for key, value in values.items() if value is not None}


def packed_file(metadata: object, payloads: Sequence[bytes]) -> bytes:
    text = json.dumps(metadata, separators=(",", ":")).encode()
    chunks = [struct.pack(">II", len(payload), zlib.crc32(payload)) + payload for payload in payloads]
    return b"".join([b"ECDC", struct.pack(">BI", 0, len(text)), text, *chunks])


def packed_payload(
    weights: LmWeights, codes: Codes, tabulation: Tabulation = TABULATION, maybe_scale: float | None = 0.5
) -> bytes:
    """The payload of a chunk of these codes, [frames, quantizers]."""
    model, encoder = LanguageModel(weights), IntervalEncoder()
    symbols = np.zeros(codes.shape[1], np.intp)
    for frame in codes:
        for code, table in zip(frame, tabulation.tables(model.step(symbols)), strict=True):
            encoder.push(int(code), table)
        symbols = frame.astype(np.intp) + 1
    return (b"" if maybe_scale is None else struct.pack(">f", maybe_scale)) + encoder.finish()


class IntervalEncoder:
    """The other half of IntervalDecoder."""

    def __init__(self) -> None:
        self._low = self._high = self._open_bits = 0
        self._bits: list[int] = []

    def push(self, code: int, table: NDArray[np.int64]) -> None:
        while self._high - self._low + 1 < RANGE:
            self._low, self._high, self._open_bits = 2 * self._low, 2 * self._high + 1, self._open_bits + 1
        width = self._high - self._low + 1
        start, end = (int(table[code - 1]) if code else 0), int(table[code])
        self._high = self._low + (end * width >> RANGE_BITS) - 1
        self._low += start * width >> RANGE_BITS
        while self._open_bits and self._low >> (self._open_bits - 1) == self._high >> (self._open_bits - 1):
            self._open_bits -= 1
            bit = self._low >> self._open_bits
            self._bits.append(bit)
            self._low -= bit << self._open_bits
            self._high -= bit << self._open_bits

    def finish(self) -> bytes:
        rest = [self._low >> place & 1 for place in reversed(range(self._open_bits))]
        return np.packbits(np.array(self._bits + rest, np.uint8), bitorder="little").tobytes()
