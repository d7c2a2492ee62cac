"""Codes of any width from 1 to 16 bits, packed without gaps, least significant bit first.

Rules of this room:

- Bit k of the packed bytes is bit `k % 8` of byte `k // 8`; a code's lowest bit comes first.
- A row of codes is padded with zero bits to a whole byte. `pack_codes` packs one row of any length, an artifact's
  body; `pack_frames` packs every frame as a row of its own, as TOKENS carries them.
- What does not come out of packing does not go into unpacking: another size, padding that is not zero, or a code
  that no codebook entry has is a TokenError.
- Work goes by blocks, so that what is needed beside input and output stays below a MiB whatever their size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import TokenError, UsageError
from mossnano_stdio.layout import Codes, bits_per_code, frame_bytes

Bytes = bytes | bytearray | memoryview

WIDEST_BITS = 16
BLOCK_CODES = 1 << 14  # a multiple of 8, so that every block but the last ends with a byte; measured best for speed


def pack_codes(codes: NDArray[np.integer], bits: int) -> bytes:
    """One row of codes, `bits` bits each.

    >>> pack_codes(np.array([1, 2, 3]), bits=4).hex()
    '2103'
    """
    _check_width(bits)
    if codes.ndim != 1:
        raise UsageError(f"codes to pack have {codes.ndim} axes, allowed is 1: pass one row, or use pack_frames")
    _check_codes(codes, 1 << bits)
    packed = np.empty(_packed_bytes(len(codes), bits), dtype=np.uint8)
    for start in range(0, len(codes), BLOCK_CODES):
        block = _pack_block(codes[start : start + BLOCK_CODES], bits)
        first_byte = start * bits // 8
        packed[first_byte : first_byte + len(block)] = block
    return packed.tobytes()


def unpack_codes(packed: Bytes, bits: int, count: int) -> NDArray[np.uint16]:
    """`count` codes of `bits` bits each, out of exactly the bytes that they fill.

    >>> unpack_codes(bytes.fromhex("2103"), bits=4, count=3).tolist()
    [1, 2, 3]
    """
    _check_width(bits)
    source = np.frombuffer(packed, dtype=np.uint8)
    expected_bytes = _packed_bytes(count, bits)
    if len(source) != expected_bytes:
        raise TokenError(f"{len(source)} bytes of codes, but {count} codes of {bits} bits are {expected_bytes} bytes")
    _check_padding(source[-1:], count * bits)
    codes = np.empty(count, dtype=np.uint16)
    for start in range(0, count, BLOCK_CODES):
        block = codes[start : start + BLOCK_CODES]
        block[:] = _unpack_block(source[start * bits // 8 :], bits, len(block))
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
    block_frames = max(1, BLOCK_CODES // quantizers)
    for start in range(0, frames, block_frames):
        block = codes[start : start + block_frames]
        ones = _bits_of(block.reshape(-1), bits).reshape(len(block), -1)
        packed[start : start + block_frames] = np.packbits(ones, axis=1, bitorder="little")
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
        codes = _unpack_padded_frames(source.reshape(frames, whole_frame_bytes), quantizers, bits)
    if codebook_size < 1 << bits:  # else every code of that width has an entry
        _check_codes(codes, codebook_size)
    return codes


def _unpack_padded_frames(rows: NDArray[np.uint8], quantizers: int, bits: int) -> Codes:
    frames = len(rows)
    _check_padding(rows[:, -1], quantizers * bits)
    codes = np.empty((frames, quantizers), dtype=np.uint16)
    block_frames = max(1, BLOCK_CODES // quantizers)
    for start in range(0, frames, block_frames):
        block = rows[start : start + block_frames]
        ones = np.unpackbits(block, axis=1, count=quantizers * bits, bitorder="little")
        codes[start : start + block_frames] = _codes_of(ones, bits).reshape(-1, quantizers)
    return codes


def _pack_block(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    return np.packbits(_bits_of(codes, bits), axis=None, bitorder="little")


def _unpack_block(source: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    source = source[: _packed_bytes(count, bits)]
    return _codes_of(np.unpackbits(source, count=count * bits, bitorder="little"), bits)


def _bits_of(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """[count] -> [count, bits], one byte per bit."""
    pairs_of_bytes = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.unpackbits(pairs_of_bytes, axis=1, count=bits, bitorder="little")


def _codes_of(ones: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
    """One byte per bit -> the codes that `bits` of them make, each widened to 16 bits on the way."""
    ones = ones.reshape(-1, bits)
    wide = np.zeros((len(ones), WIDEST_BITS), dtype=np.uint8)
    wide[:, :bits] = ones
    return np.packbits(wide, axis=None, bitorder="little").view("<u2").astype(np.uint16, copy=False)


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
    """A code below 0, or that no entry of the codebook has: the first is named by its place."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise UsageError(f"codes are {codes.dtype} numbers, allowed are integers")
    if codes.size == 0 or (int(codes.max()) < codebook_size and int(codes.min()) >= 0):
        return
    wrong = (codes < 0) | (codes >= codebook_size)
    *frame, index = map(int, np.unravel_index(wrong.argmax(), wrong.shape))
    where = f"code {index} of frame {frame[0]}" if frame else f"code {index}"
    raise TokenError(f"{where} is {codes[*frame, index]}, allowed are 0 to {codebook_size - 1}")


def _check_padding(last_bytes: NDArray[np.uint8], row_bits: int) -> None:
    """The bits after a row's last code, in the row's last byte, are zero."""
    padding_bits = -row_bits % 8
    if not padding_bits:
        return
    padding = last_bytes >> (8 - padding_bits)
    if padding.any():
        row = int(np.flatnonzero(padding)[0])
        where = "the last byte" if len(padding) == 1 else f"the last byte of frame {row}"
        raise TokenError(f"the upper {padding_bits} bits of {where} are {padding[row]:#x}, allowed is 0 (padding)")
