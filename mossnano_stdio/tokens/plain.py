"""Saves codes as plain files and loads them, for programs that cannot read `.mossnano`.

Rules of this room:

- Three forms: `.u16le` is little-endian 16-bit codes in [quantizer, frame] order and nothing else, `.npy` is numpy's
  own, [frames, quantizers], and `.json` is a list of frames, each a list of codes.
- Loading executes nothing that a file holds, and checks a `.npy`'s size against its header before it allocates.
- Codes are 16 bits. Whether they fit a codebook is checked later, when an artifact is made of them.
"""

from __future__ import annotations

import io
import json
import math
import tokenize
from pathlib import PurePath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, UsageError
from mossnano_stdio.tokens.format import Codes, to_quantizer_major
from mossnano_stdio.tokens.packing import first_outside, meaning_of

FORMS: Final = ("u16le", "npy", "json")
LARGEST_CODE: Final = 0xFFFF
JSON_BLOCK_FRAMES: Final = 1 << 12  # converted at a time, as Python's numbers need much memory

_NPY_HEADER_READERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def form_of(path: str, maybe_form: str | None) -> str:
    """Return the form that was asked for, or else the one that the name ends with.

    >>> form_of("speech.npy", None), form_of("-", "json")
    ('npy', 'json')
    """
    form = maybe_form or PurePath(path).suffix.removeprefix(".")
    if form not in FORMS:
        raise UsageError(f"{path} does not end with .u16le, .npy or .json: name it so, or say --form")
    return form


def save_codes(codes: Codes, form: str) -> bytes:
    """[frames, quantizers] -> the bytes of a file.

    >>> save_codes(np.array([[1, 2], [3, 4]], dtype=np.uint16), "json")
    b'[[1, 2], [3, 4]]\\n'
    """
    match form:
        case "u16le":
            return to_quantizer_major(codes).astype("<u2", copy=False).tobytes()
        case "npy":
            file = io.BytesIO()
            np.save(file, np.ascontiguousarray(codes, dtype="<u2"))
            return file.getvalue()
        case _:
            blocks = (codes[start : start + JSON_BLOCK_FRAMES] for start in range(0, len(codes), JSON_BLOCK_FRAMES))
            return b"[" + b", ".join(json.dumps(block.tolist())[1:-1].encode("ascii") for block in blocks) + b"]\n"


def load_codes(data: bytes, form: str, quantizers: int, codebook_size: int) -> Codes:
    """The bytes of a file -> [frames, quantizers]. `quantizers` is for the forms that do not hold it, `codebook_size`
    only tells whose codes they are, so that an error can say what one below 0 means.

    >>> load_codes(b"[[1, 2], [3, 4]]", "json", quantizers=16, codebook_size=1024).tolist()
    [[1, 2], [3, 4]]
    """
    match form:
        case "u16le":
            return _from_u16le(data, quantizers)
        case "npy":
            return _checked(_from_npy(data), codebook_size)
        case _:
            return _checked(_from_json(data, quantizers), codebook_size)


def _checked(codes: NDArray[np.integer], codebook_size: int) -> Codes:
    if place := first_outside(codes, LARGEST_CODE + 1):
        frame, quantizer = place
        raise InputError(
            f"code {quantizer} of frame {frame} is {codes[place]}, codes are 0 to {LARGEST_CODE}"
            f"{meaning_of(int(codes[place]), codebook_size)}"
        )
    return codes.astype(np.uint16, copy=False)


def _from_u16le(data: bytes, quantizers: int) -> Codes:
    if len(data) % (2 * quantizers):
        raise InputError(
            f"{len(data)} bytes of codes are no whole number of frames: "
            f"{quantizers} codes of 16 bits make {2 * quantizers} bytes a frame; is --quantizers right?"
        )
    return np.frombuffer(data, dtype="<u2").astype(np.uint16, copy=False).reshape(quantizers, -1).T


def _from_npy(data: bytes) -> NDArray[np.integer]:
    file = io.BytesIO(data)
    try:
        shape, is_fortran, dtype = _NPY_HEADER_READERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise InputError(f"the .npy file has no header that can be read: {error}") from None
    if len(shape) != 2 or min(shape) < 0 or not np.issubdtype(dtype, np.integer):
        raise InputError(f"the .npy file holds {dtype} {list(shape)}, allowed are integers [frames, quantizers]")
    body = memoryview(data)[file.tell() :]
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"the .npy file has {len(body)} bytes behind its header, but {dtype} {list(shape)} are "
            f"{math.prod(shape) * dtype.itemsize}"
        )
    if not len(body) and max(shape) > LARGEST_CODE:
        raise InputError(f"the .npy file holds {list(shape)}, which are no codes at all")
    return np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")


def _from_json(data: bytes, quantizers: int) -> NDArray[np.integer]:
    try:
        value: Any = json.loads(data)
        frames = np.array(value) if value else np.empty((0, quantizers), dtype=np.uint16)
    except (ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"the .json file is no list of frames of equal length: {error}") from None
    if not isinstance(value, list) or frames.ndim != 2 or not np.issubdtype(frames.dtype, np.integer):
        raise InputError(
            f"the .json file holds {frames.dtype} {list(frames.shape)}, allowed is a list of frames, "
            "each a list of whole numbers"
        )
    return frames
