"""Unpacks codes out of the bits in which encodec-rs's arithmetic coder packs them.

    The coder holds an interval, low to high, of whole numbers. A table divides 2^24 among the 1024 codes, more for the
    likelier ones; a code is the part of the interval that is its own, which becomes the next interval. Leading bits
    in which low and high agree are the file's next bits.

Rules of this room:

- Tables are of whole numbers and computed in the order in which the writer computes them (language_model.py says why).
- What packing cannot produce is refused: bits that are missing or left over, padding that is not zero.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ArtifactError
from mossnano_stdio.tokens.language_model import CARDINALITY, F32, sum_in_order

RANGE_BITS: Final = 24
RANGE: Final = 1 << RANGE_BITS
MOST_OPEN_BITS: Final = 61  # the writer's numbers have 64 bits
SMALLEST_SHARE_LIMITS: Final = (1, RANGE // CARDINALITY - 1)
COUNTS_LIMITS: Final = (1, (1 << 32) - 1)

_NUDGE: Final = 2.0**-40  # a logit this close below the middle of two steps is the lower one


class Tabulation(NamedTuple):
    """How logits become a table."""

    logit_step: float = float(np.float32(2.1))  # logits are rounded to multiples of it
    temperature: float = 1.0
    counts: int = 8192  # what the probabilities are multiplied with
    smallest_share: int = 2  # of the range, that the least likely code has

    def tables(self, logits: F32) -> NDArray[np.int64]:
        """Where the share of each code ends, [codebooks, cardinality], of logits of that shape."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = logits.T.astype(np.float64) / self.temperature / self.logit_step
            rounded = np.floor(scaled + 0.5 - _NUDGE) * self.logit_step  # [cardinality, codebooks]
        if not np.isfinite(rounded).all():
            raise ArtifactError("the language model's logits overflow: its weights, or tau, are not real ones")
        top = rounded.max(axis=0)
        weights = np.exp(rounded - top)
        shares = weights / sum_in_order(weights)
        is_flat = (top - rounded.min(axis=0) <= 2 * self.logit_step) | (
            shares.max(axis=0) - shares.min(axis=0) <= 0.25 / self.counts
        )
        shares[:, is_flat] = 1.0 / CARDINALITY
        counts = np.floor(shares * self.counts).astype(np.int64).T
        counts[~counts.any(axis=1)] = 1
        totals = counts.sum(axis=1, keepdims=True)
        room = RANGE - self.smallest_share * CARDINALITY
        parts, remainders = np.divmod(room * counts, totals)
        left = room - parts.sum(axis=1)
        # What is left goes to the largest remainders, one each, the lower code first where they are equal.
        order = np.argsort(-remainders, axis=1, kind="stable")
        for part, codes, count in zip(parts, order, left, strict=True):
            part[codes[:count]] += 1
        return np.cumsum(parts + self.smallest_share, axis=1)


class IntervalDecoder:
    """Takes one code after the other out of `packed`."""

    def __init__(self, packed: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").tobytes()
        self._place = 0
        self._low = self._high = self._value = 0
        self._open_bits = 0

    def pull(self, table: NDArray[np.int64]) -> int:
        """The next code, packed with this table."""
        low, high, value, open_bits = self._low, self._high, self._value, self._open_bits
        while high - low + 1 < RANGE:
            if self._place == len(self._bits):
                raise ArtifactError("its bits end before its codes do")
            low, high, value = 2 * low, 2 * high + 1, 2 * value + self._bits[self._place]
            self._place += 1
            open_bits += 1
        if open_bits > MOST_OPEN_BITS + 1:
            raise ArtifactError(f"it holds {open_bits} bits open, allowed are {MOST_OPEN_BITS + 1}")
        width = high - low + 1
        code = int(table.searchsorted(((value - low + 1) * RANGE - 1) // width, side="right"))
        start = int(table[code - 1]) if code else 0
        low, high = low + (start * width >> RANGE_BITS), low + (int(table[code]) * width >> RANGE_BITS) - 1
        while open_bits and (low ^ high) >> (open_bits - 1) == 0:
            open_bits -= 1
            top = low >> open_bits << open_bits
            low, high, value = low - top, high - top, value - top
        self._low, self._high, self._value, self._open_bits = low, high, value, open_bits
        return code

    def finish(self) -> None:
        """Raise ArtifactError unless all bits were taken, but for the zeros that fill the last byte."""
        left = self._bits[self._place :]
        if len(left) >= 8 or any(left):
            raise ArtifactError(f"{len(left)} bits are left over behind its codes, allowed are up to 7 that are zero")


def most_packed_bytes(codes: int, smallest_share: int) -> int:
    """What so many codes take, if each is the least likely one. No table gives a code less than the smallest share."""
    bits_per_code = RANGE_BITS - math.log2(smallest_share)
    return math.ceil((codes * (bits_per_code + 1) + MOST_OPEN_BITS + 1) / 8)
