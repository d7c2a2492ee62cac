"""Packs codes of 1 to 16 bits without gaps, least significant bit first, and unpacks them.

Rules of this room:

- Bit k of the packed bytes is bit `k % 8` of byte `k // 8`; a code's lowest bit comes first.
- A row of codes is padded with zero bits to a whole byte. `pack_codes` packs one row of any length, an artifact's
  body; `pack_frames` packs every frame as a row of its own, as TOKENS carries them.
- Unpacking rejects bytes that packing cannot produce: another size, padding that is not zero, or a code without an
  entry in the codebook is a TokenError.
- Packing and unpacking run over the columns of many equal rows at once, and shift bits through one number per row. A
  row without padding is cut into the shortest rows that fill whole bytes: 4 codes of 10 bits fill 5 bytes.
- Rows are worked on in blocks, so that memory beside input and output stays below a MiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import TokenError, UsageError
from mossnano_stdio.tokens.format import Codes, bits_per_code, frame_bytes

Bytes = bytes | bytearray | memoryview

WIDEST_BITS = 16
MIMI_CODEBOOK_SIZE = 2048  # of the codec whose language models have codes of their own
BLOCK_CODES = 1 << 16  # measured best for speed


def pack_codes(codes: NDArray[np.integer], bits: int) -> bytes:
    """Pack one row of codes, `bits` bits each.

    >>> pack_codes(np.array([1, 2, 3]), bits=4).hex()
    '2103'
    """
    _check_width(bits)
    if codes.ndim != 1:
        raise UsageError(f"codes to pack have {codes.ndim} axes, allowed is 1: pass one row, or use pack_frames")
    _check_codes(codes, 1 << bits)
    packed = np.empty(_packed_bytes(len(codes), bits), dtype=np.uint8)
    for row_codes, row_bytes in _equal_rows(codes, packed, bits):
        _pack_rows(row_codes, row_bytes, bits)
    return packed.tobytes()


def unpack_codes(packed: Bytes, bits: int, count: int) -> NDArray[np.uint16]:
    """Unpack `count` codes of `bits` bits each from exactly the bytes that they fill.

    >>> unpack_codes(bytes.fromhex("2103"), bits=4, count=3).tolist()
    [1, 2, 3]
    """
    _check_width(bits)
    source = np.frombuffer(packed, dtype=np.uint8)
    expected_bytes = _packed_bytes(count, bits)
    if len(source) != expected_bytes:
        raise TokenError(f"{len(source)} bytes of codes, but {count} codes of {bits} bits are {expected_bytes} bytes")
    codes = np.empty(count, dtype=np.uint16)
    for row_codes, row_bytes in _equal_rows(codes, source, bits):
        _unpack_rows(row_bytes, row_codes, bits)
    return codes


def pack_frames(codes: NDArray[np.integer], codebook_size: int) -> bytes:
    """[frames, quantizers] -> the payload of TOKENS.

    >>> pack_frames(np.array([[1, 2, 3], [4, 5, 6]]), codebook_size=16).hex()
    '21035406'
    """
    if codes.ndim != 2:
        raise UsageError(f"frames to pack have {codes.ndim} axes, allowed are 2: [frames, quantizers]")
    frames, quantizers = codes.shape
    bits = _checked_bits(quantizers, codebook_size)
    _check_codes(codes, codebook_size)
    if quantizers * bits % 8 == 0:  # no frame has padding, so all of them are one row
        return pack_codes(codes.reshape(-1), bits)
    packed = np.empty((frames, frame_bytes(quantizers, codebook_size)), dtype=np.uint8)
    _pack_rows(codes, packed, bits)
    return packed.tobytes()


def unpack_frames(payload: Bytes, quantizers: int, codebook_size: int) -> Codes:
    """The payload of TOKENS -> [frames, quantizers]. An empty payload is no frames.

    >>> unpack_frames(bytes.fromhex("21035406"), quantizers=3, codebook_size=16).tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    bits = _checked_bits(quantizers, codebook_size)
    whole_frame_bytes = frame_bytes(quantizers, codebook_size)
    source = np.frombuffer(payload, dtype=np.uint8)
    frames, rest_bytes = divmod(len(source), whole_frame_bytes)
    if rest_bytes:
        raise TokenError(
            f"{len(source)} bytes are no whole number of frames: "
            f"{quantizers} codes of {bits} bits make {whole_frame_bytes} bytes a frame"
        )
    if quantizers * bits % 8 == 0:
        codes = unpack_codes(payload, bits, frames * quantizers).reshape(frames, quantizers)
    else:
        codes = np.empty((frames, quantizers), dtype=np.uint16)
        _unpack_rows(source.reshape(frames, whole_frame_bytes), codes, bits)
    if codebook_size < 1 << bits:  # else every code of that width has an entry
        _check_codes(codes, codebook_size)
    return codes


def first_outside(codes: NDArray[np.integer], codebook_size: int) -> tuple[int, ...] | None:
    """The place of the first code that is below 0 or that no entry of the codebook has.

    >>> first_outside(np.array([[1, 2], [16, 3]]), codebook_size=16)
    (1, 0)
    """
    if codes.size == 0 or (int(codes.max()) < codebook_size and int(codes.min()) >= 0):
        return None
    wrong = (codes < 0) | (codes >= codebook_size)
    return tuple(map(int, np.unravel_index(wrong.argmax(), wrong.shape)))


def meaning_of(code: int, codebook_size: int) -> str:
    """What a code that no codebook holds usually stands for, as the end of a sentence; "" where nothing is known.

    >>> meaning_of(2048, codebook_size=2048)
    ' (language models put 2048 where no code is yet, at the start of delayed codebooks: leave such frames out)'
    """
    if codebook_size != MIMI_CODEBOOK_SIZE:
        return ""
    match code:
        case 2048:
            what = "2048 where no code is yet, at the start of delayed codebooks"
        case -1 | -2:
            what = f"{code} where they generated nothing"
        case _:
            return ""
    return f" (language models put {what}: leave such frames out)"


def _equal_rows(
    codes: NDArray[np.integer], packed: NDArray[np.uint8], bits: int
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.uint8]]]:
    """Cut one long row into short ones that end with a byte, then what is left over: codes, and the bytes they fill."""
    together = 8 // math.gcd(bits, 8)
    rows = len(codes) // together
    whole, whole_bytes = rows * together, rows * together * bits // 8
    if rows:
        yield codes[:whole].reshape(rows, -1), packed[:whole_bytes].reshape(rows, -1)
    if whole < len(codes):
        yield codes[whole:].reshape(1, -1), packed[whole_bytes:].reshape(1, -1)


def _pack_rows(codes: NDArray[np.integer], packed: NDArray[np.uint8], bits: int) -> None:
    """Pack [rows, columns] codes into [rows, bytes]."""
    block_rows = max(1, BLOCK_CODES // codes.shape[1])
    for start in range(0, len(codes), block_rows):
        block, out = codes[start : start + block_rows], packed[start : start + block_rows]
        held = np.zeros(len(block), dtype=np.uint32)  # bits on their way, at most 7 + 16
        held_bits = byte = 0
        for column in range(codes.shape[1]):
            held |= block[:, column].astype(np.uint32) << held_bits
            held_bits += bits
            while held_bits >= 8:
                out[:, byte] = held.astype(np.uint8)
                held >>= 8
                held_bits -= 8
                byte += 1
        if held_bits:
            out[:, byte] = held


def _unpack_rows(packed: NDArray[np.uint8], codes: NDArray[np.integer], bits: int) -> None:
    """Unpack [rows, bytes] into [rows, columns] codes. The bits left over in a row are its padding: they must be 0."""
    block_rows = max(1, BLOCK_CODES // codes.shape[1])
    for start in range(0, len(codes), block_rows):
        block, out = packed[start : start + block_rows], codes[start : start + block_rows]
        held = np.zeros(len(block), dtype=np.uint32)
        held_bits = byte = 0
        for column in range(codes.shape[1]):
            while held_bits < bits:
                held |= block[:, byte].astype(np.uint32) << held_bits
                held_bits += 8
                byte += 1
            out[:, column] = held & ((1 << bits) - 1)
            held >>= bits
            held_bits -= bits
        if held_bits and held.any():
            row = int((held != 0).argmax())
            where = f" of frame {start + row}" if len(codes) > 1 else ""
            raise TokenError(
                f"the {held_bits} padding bits after the last code{where} are {held[row]:#x}, allowed is 0"
            )


def _packed_bytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _checked_bits(quantizers: int, codebook_size: int) -> int:
    if quantizers < 1:
        raise UsageError(f"frames of {quantizers} codes, allowed is 1 or more")
    bits = bits_per_code(codebook_size)
    _check_width(bits)
    return bits


def _check_width(bits: int) -> None:
    if not 1 <= bits <= WIDEST_BITS:
        raise UsageError(f"a code of {bits} bits, allowed are 1 to {WIDEST_BITS}")


def _check_codes(codes: NDArray[np.integer], codebook_size: int) -> None:
    """Raise TokenError for the first code below 0 or without an entry in the codebook, and name its place."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise UsageError(f"codes are {codes.dtype} numbers, allowed are integers")
    if place := first_outside(codes, codebook_size):
        *frame, index = place
        where = f"code {index} of frame {frame[0]}" if frame else f"code {index}"
        meaning = meaning_of(int(codes[place]), codebook_size)
        raise TokenError(f"{where} is {codes[place]}, allowed are 0 to {codebook_size - 1}{meaning}")
