"""tokens/plain.py: three forms there and back, and nothing believed that a file only claims."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.errors import InputError, UsageError
from mossnano_stdio.tokens.plain import FORMS, form_of, load_codes, save_codes

CODES = np.array([[1, 2], [3, 4], [515, 65535]], dtype=np.uint16)


def test_the_forms_by_hand() -> None:
    assert save_codes(CODES, "u16le").hex(" ", 2) == "0100 0300 0302 0200 0400 ffff"
    assert json.loads(save_codes(CODES, "json")) == [[1, 2], [3, 4], [515, 65535]]
    loaded = np.load(io.BytesIO(save_codes(CODES, "npy")), allow_pickle=False)
    assert loaded.dtype == np.dtype("<u2")
    assert loaded.flags.c_contiguous
    assert loaded.tolist() == CODES.tolist()


@given(st.sampled_from(FORMS), st.integers(0, 5), st.integers(1, 5), st.data())
def test_every_form_comes_back(form: str, frames: int, quantizers: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 65535), min_size=frames * quantizers, max_size=frames * quantizers))
    codes = np.array(values, dtype=np.uint16).reshape(quantizers, frames).T  # a view, as an artifact gives it
    loaded = load_codes(save_codes(codes, form), form, quantizers, 1024)
    assert loaded.dtype == np.uint16
    assert loaded.shape == codes.shape
    assert np.array_equal(loaded, codes)


@pytest.mark.parametrize("dtype", ["<u1", "<i2", "<i4", ">i8", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_of_any_integers(dtype: str, order: Any) -> None:
    file = io.BytesIO()
    np.save(file, np.array([[1, 2], [3, 4], [5, 6]]).astype(dtype, order=order))
    assert load_codes(file.getvalue(), "npy", 16, 1024).tolist() == [[1, 2], [3, 4], [5, 6]]


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(value))
    return file.getvalue()


NEGATIVE_NPY = npy([[1]]).replace(b"(1, 1), }  ", b"(-1, -1), }")
EMPTY_NPY = npy([[1]]).replace(b"(1, 1), }" + b" " * 19, b"(0, 99999999999999999999), }")[:-8]
HUGE_NPY = npy([[1]]).replace(b"(1, 1), }            ", b"(99999999999, 999), }")


@pytest.mark.parametrize(
    ("form", "data", "words"),
    [
        ("u16le", bytes(33), "33 bytes of codes are no whole number of frames: 16 codes of 16 bits make 32 bytes"),
        ("npy", b"", "no header that can be read"),
        ("npy", b"\x93NUMPY\x09\x00" + bytes(10), "no header that can be read"),
        ("npy", npy([[1]])[:50], "no header that can be read"),
        ("npy", npy([[1, 2]])[:-1], "has 15 bytes behind its header, but int64 [1, 2] are 16"),
        ("npy", npy([[1, 2]]) + b"x", "has 17 bytes behind its header"),
        ("npy", npy([[1]]).replace(b"'<i8'", b"(<i8'"), "no header that can be read"),
        ("npy", npy([[1]]).replace(b"'<i8'", b"'<i9'"), "no header that can be read"),
        ("npy", NEGATIVE_NPY, "holds int64 [-1, -1]"),
        ("npy", EMPTY_NPY, "[0, 99999999999999999999], which are no codes"),
        ("npy", HUGE_NPY, "has 8 bytes behind its header"),
        ("npy", npy([1, 2]), "holds int64 [2], allowed are integers [frames, quantizers]"),
        ("npy", npy([[1.0]]), "holds float64 [1, 1]"),
        ("npy", npy([[{"pickle": 1}]]), "holds object [1, 1]"),
        ("npy", npy([[-1]]), "code 0 of frame 0 is -1, codes are 0 to 65535"),
        ("json", b"", "is no list of frames"),
        ("json", b"[[1, 2], [3]]", "is no list of frames of equal length"),
        ("json", b"[" * 100_000, "is no list of frames"),
        ("json", b"\xff", "is no list of frames"),
        ("json", b'{"codes": [[1]]}', "allowed is a list of frames"),
        ("json", b"{}", "allowed is a list of frames"),
        ("json", b"null", "allowed is a list of frames"),
        ("json", b"[1, 2]", "holds int64 [2]"),
        ("json", b"[[1.5]]", "holds float64 [1, 1]"),
        ("json", b"[[true]]", "holds bool [1, 1]"),
        ("json", b'[["1"]]', "allowed is a list of frames"),
        ("json", b"[[[1]]]", "holds int64 [1, 1, 1]"),
        ("json", b"[[1, 2], [3, 65536]]", "code 1 of frame 1 is 65536, codes are 0 to 65535"),
        ("json", b"[[1, 99999999999999999999]]", "the .json file"),
        ("json", b"[[1, " + b"9" * 5000 + b"]]", "the .json file"),
    ],
)
def test_what_is_wrong_is_one_error(form: str, data: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_codes(data, form, 16, 1024)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_json_is_one_list() -> None:
    codes = np.arange(40_000, dtype=np.uint16).reshape(-1, 2)
    assert json.loads(save_codes(codes, "json")) == codes.tolist()


def test_the_huge_claim_is_one() -> None:
    assert b"99999999999, 999" in HUGE_NPY
    assert b"(-1, -1)" in NEGATIVE_NPY
    assert b"(0, 9999" in EMPTY_NPY
    assert len(HUGE_NPY) == len(NEGATIVE_NPY) == len(EMPTY_NPY) + 8 == len(npy([[1]]))


def test_the_form_is_in_the_name_or_said() -> None:
    assert [form_of(f"a.b.{form}", None) for form in FORMS] == list(FORMS)
    assert form_of("x.npy", "json") == "json"
    for path in ("-", "codes.txt", "npy", ".npy"):
        with pytest.raises(UsageError, match=r"\.u16le, \.npy or \.json"):
            form_of(path, None)
