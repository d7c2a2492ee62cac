"""tokens/packing.py: against a bit loop too plain to be wrong, and against vectors written out by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio.errors import TokenError, UsageError
from mossnano_stdio.tokens import bits_per_code, pack_frames, unpack_frames
from mossnano_stdio.tokens import packing as room
from mossnano_stdio.tokens.packing import pack_codes, unpack_codes

widths = st.integers(1, 16)


def pack_by_loop(codes: list[int], bits: int) -> bytes:
    """The oracle: one bit at a time into one integer."""
    value = 0
    for index, code in enumerate(codes):
        value |= code << (index * bits)
    return value.to_bytes((len(codes) * bits + 7) // 8, "little")


# Written out by hand: each code's bits from the lowest up, one after the other, cut into bytes from the right.
HAND_VECTORS = [
    # 1 bit: 1 0 1 1 0 0 0 1 | 1 -> 1000 1101, 0000 0001
    (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01"),
    # 3 bits: 7=111 0=000 5=101 -> 1 0100 0111: 0x47, 0x01
    (3, [7, 0, 5], "4701"),
    # 10 bits: 1 -> 01 00; 2 -> bit 11 -> 08; 3 -> bits 20, 21 -> 30; 1023 -> bits 30..39 -> c0 ff
    (10, [1, 2, 3, 1023], "010830c0ff"),
    # 10 bits, one code with 6 bits of padding
    (10, [0x2AB], "ab02"),
    # 12 bits: 0xABC then 0xDEF: bc, fa, de
    (12, [0xABC, 0xDEF], "bcfade"),
    (16, [0x1234, 0xFFFE], "3412feff"),
    (8, [0, 255, 16], "00ff10"),
    (10, [], ""),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), HAND_VECTORS)
def test_hand_written_vectors(bits: int, codes: list[int], expected: str) -> None:
    assert pack_codes(np.array(codes, dtype=np.uint16), bits).hex() == expected
    unpacked = unpack_codes(bytes.fromhex(expected), bits, len(codes))
    assert unpacked.dtype == np.uint16
    assert unpacked.tolist() == codes


def test_hand_written_frames_are_padded_each() -> None:
    # 3 codes of 10 bits are 30 bits, 4 bytes; the second frame starts with a byte of its own.
    frames = np.array([[1, 2, 3], [1023, 0, 512]], dtype=np.uint16)
    assert pack_frames(frames, 1024).hex() == "01083000" + "ff030020"
    assert unpack_frames(bytes.fromhex("01083000ff030020"), 3, 1024).tolist() == frames.tolist()


@given(st.data(), widths)
def test_packing_equals_the_loop(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack_codes(np.array(codes, dtype=np.uint16), bits)
    assert packed == pack_by_loop(codes, bits)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@given(st.data(), st.integers(2, 65536), st.integers(1, 20), st.integers(0, 12))
def test_frames_equal_the_loop(data: st.DataObject, codebook_size: int, quantizers: int, frames: int) -> None:
    row = st.lists(st.integers(0, codebook_size - 1), min_size=quantizers, max_size=quantizers)
    rows = data.draw(st.lists(row, min_size=frames, max_size=frames))
    codes = np.array(rows, dtype=np.uint16).reshape(frames, quantizers)
    payload = pack_frames(codes, codebook_size)
    assert payload == b"".join(pack_by_loop(row, bits_per_code(codebook_size)) for row in rows)
    unpacked = unpack_frames(payload, quantizers, codebook_size)
    assert unpacked.shape == codes.shape
    assert unpacked.dtype == np.uint16
    assert unpacked.tolist() == rows


@given(widths, st.binary(max_size=40))
def test_unpacking_any_bytes_is_the_inverse_or_a_refusal(bits: int, packed: bytes) -> None:
    count = len(packed) * 8 // bits
    try:
        codes = unpack_codes(packed, bits, count)
    except TokenError:
        spare_bits = len(packed) * 8 - count * bits
        assert spare_bits >= 8 or packed[-1] >> (8 - spare_bits)
    else:
        assert pack_codes(codes, bits) == packed


def random_codes(count: int, bits: int) -> NDArray[np.uint16]:
    return np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint16)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [63, 64, 65, 128, 133])
def test_block_borders_leave_no_seam(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK_CODES", 64)
    codes = random_codes(count, bits)
    packed = pack_codes(codes, bits)
    assert packed == pack_by_loop_fast(codes, bits)
    assert np.array_equal(unpack_codes(packed, bits, count), codes)


def test_rows_of_many_blocks() -> None:
    codes = random_codes(3 * room.BLOCK_CODES + 5, 10)
    packed = pack_codes(codes, 10)
    assert packed == pack_by_loop_fast(codes, 10)
    assert np.array_equal(unpack_codes(packed, 10, len(codes)), codes)


def pack_by_loop_fast(codes: NDArray[np.uint16], bits: int) -> bytes:
    """The oracle for long rows: bits as text, which is linear where the big integer is not."""
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes.tolist())
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8][::-1], 2) for start in range(0, len(text), 8))


@pytest.mark.parametrize(("quantizers", "codebook_size"), [(16, 1024), (3, 1024), (7, 1000), (1, 2), (200, 3)])
def test_frames_across_blocks(quantizers: int, codebook_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK_CODES", 64)
    frames = 128 // quantizers + 3
    codes = np.random.default_rng(3).integers(0, codebook_size, (frames, quantizers)).astype(np.uint16)
    payload = pack_frames(codes, codebook_size)
    assert payload == b"".join(pack_by_loop_fast(row, bits_per_code(codebook_size)) for row in codes)
    assert np.array_equal(unpack_frames(payload, quantizers, codebook_size), codes)


def test_the_first_bad_padding_is_named() -> None:
    payload = bytearray(pack_frames(np.zeros((9, 3), dtype=np.uint16), 1024))
    payload[4 * 5 + 3] |= 0x40
    payload[4 * 7 + 3] |= 0xC0
    with pytest.raises(TokenError, match="the 2 padding bits after the last code of frame 5 are 0x1, allowed is 0"):
        unpack_frames(payload, 3, 1024)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integers_any_strides(dtype: type) -> None:
    codes: NDArray[np.integer] = np.arange(48, dtype=dtype).reshape(3, 16)
    expected = pack_by_loop(list(range(48)), 10)
    assert pack_frames(codes, 1024) == expected
    assert pack_frames(np.asfortranarray(codes), 1024) == expected
    assert pack_codes(codes.ravel()[::-1], 10) == pack_by_loop(list(range(47, -1, -1)), 10)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_and_the_result_is_a_copy(wrap: type) -> None:
    packed = wrap(bytes.fromhex("3412feff"))
    codes = unpack_codes(packed, 16, 2)
    codes[0] = 0
    assert bytes(packed).hex() == "3412feff"


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        ([0, 1024], 10, ["code 1", "1024", "0 to 1023"]),
        ([-1], 10, ["code 0", "-1", "0 to 1023"]),
        ([0, 0, 2], 1, ["code 2", "0 to 1"]),
    ],
)
def test_codes_that_do_not_fit(codes: list[int], bits: int, words: list[str]) -> None:
    with pytest.raises(TokenError) as caught:
        pack_codes(np.array(codes), bits)
    assert all(word in str(caught.value) for word in words)


def test_a_code_beyond_the_codebook_is_named_by_frame() -> None:
    payload = pack_frames(np.array([[1, 2], [3, 1000]]), 1024)
    with pytest.raises(TokenError, match=r"code 1 of frame 1 is 1000, allowed are 0 to 999"):
        unpack_frames(payload, 2, 1000)
    with pytest.raises(TokenError, match=r"code 0 of frame 0 is 1001, allowed are 0 to 999"):
        pack_frames(np.array([[1001, 1000]]), 1000)


@pytest.mark.parametrize("bit", range(2, 8))
def test_every_padding_bit_must_be_zero(bit: int) -> None:
    with pytest.raises(TokenError, match="the 6 padding bits after the last code are "):
        unpack_codes(bytes([0, 1 << bit]), 10, 1)
    with pytest.raises(TokenError, match=r"the 6 padding bits after the last code of frame 1 are "):
        unpack_frames(bytes([0, 0, 0, 1 << bit]), 1, 1024)


@pytest.mark.parametrize("size", [0, 1, 18, 19, 21, 39, 41])
def test_sizes_are_exact(size: int) -> None:
    with pytest.raises(TokenError, match="20 bytes"):
        unpack_codes(bytes(size), 10, 16)
    if size:
        with pytest.raises(TokenError, match=f"{size} bytes are no whole number of frames"):
            unpack_frames(bytes(size), 16, 1024)


def test_nothing_is_legal() -> None:
    assert unpack_frames(b"", 16, 1024).shape == (0, 16)
    assert pack_frames(np.empty((0, 16), dtype=np.uint16), 1024) == b""
    assert unpack_codes(b"", 7, 0).tolist() == []


def test_misuse_is_told_apart_from_bad_data() -> None:
    for bits in (0, 17, -1):
        with pytest.raises(UsageError, match="1 to 16"):
            pack_codes(np.array([0]), bits)
        with pytest.raises(UsageError, match="1 to 16"):
            unpack_codes(b"", bits, 0)
    for quantizers, codebook_size in ((0, 1024), (3, 1), (3, 65537), (8, 65537)):
        with pytest.raises(UsageError):
            pack_frames(np.zeros((2, quantizers), dtype=np.uint16), codebook_size)
        with pytest.raises(UsageError):
            unpack_frames(bytes(64), quantizers, codebook_size)
    with pytest.raises(UsageError, match="axes"):
        pack_codes(np.zeros((2, 2), dtype=np.uint16), 4)
    with pytest.raises(UsageError, match="axes"):
        pack_frames(np.zeros(2, dtype=np.uint16), 4)
    with pytest.raises(UsageError, match="float64"):
        pack_codes(np.array([0.5]), 4)


def test_what_is_needed_beside_input_and_output_is_small() -> None:
    codes = random_codes(1 << 22, 10)
    packed = pack_codes(codes, 10)
    tracemalloc.start()
    try:
        unpack_codes(packed, 10, len(codes))
        unpack_beside = tracemalloc.get_traced_memory()[1] - codes.nbytes
        tracemalloc.reset_peak()
        pack_codes(codes, 10)
        pack_beside = tracemalloc.get_traced_memory()[1] - 2 * len(packed)  # the array, and the bytes made of it
    finally:
        tracemalloc.stop()
    assert unpack_beside < 1 << 20
    assert pack_beside < 1 << 20
