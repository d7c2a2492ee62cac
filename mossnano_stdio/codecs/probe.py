"""Does this onnxruntime do what the fast graph rests on? Shown on this machine, by one node of that graph.

Rules of this room:

- The probe is `attention_probe.onnx`, which build/attention.py writes. What it must answer is computed here, in numpy.
- Two questions. Is attention what it should be: rotation, window, and nothing read that was not written? Where not,
  the fast graph cannot be used. And are keys and values written in place where input and output are bound to the
  same memory, leaving all else alone? Where not, it can, at the price of copies.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.engine import import_onnxruntime, native_value

Support = Literal["in place", "by copies", "none"]
Array = NDArray[Any]

PROBE_PATH = Path(__file__).with_name("attention_probe.onnx")
HEADS, HEAD_DIM, CONTEXT = 2, 16, 3
PAST, NEW, SLOTS = 4, 2, 9
TOLERANCE = 1e-5


@cache
def attention_support() -> Support:
    """What onnxruntime makes of the probe. Asked once in a process."""
    try:
        session = _probe_session()
        return judge(session)
    except Exception:  # noqa: BLE001 - whatever it raises (a node or an input that it does not know), it is no
        return "none"


def judge(session: Any) -> Support:
    """Run the probe in both ways of binding."""
    keys, values = _rings()
    if _answers_right(session, (keys, values), (keys, values)) and _is_written(keys, values):
        return "in place"
    if _answers_right(session, _rings(), outputs := _rings()) and _is_written(*outputs):
        return "by copies"
    return "none"


def _probe_session() -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(PROBE_PATH), options, providers=["CPUExecutionProvider"])


def _answers_right(session: Any, rings: tuple[Array, Array], rings_out: tuple[Array, Array]) -> bool:
    attended = np.zeros((1, NEW, HEADS * HEAD_DIM), dtype=np.float32)
    inputs = {
        "projected": _projected(),
        "last": np.array([PAST + NEW - 1], dtype=np.int32),
        "total": np.array([PAST + NEW], dtype=np.int32),
        "cosines": np.cos(_angles()).astype(np.float32),
        "sines": np.sin(_angles()).astype(np.float32),
    }
    binding = session.io_binding()
    for name, array in {**inputs, "keys": rings[0], "values": rings[1]}.items():
        binding.bind_ortvalue_input(name, native_value(array))
    for name, array in {"attended": attended, "keys_out": rings_out[0], "values_out": rings_out[1]}.items():
        binding.bind_ortvalue_output(name, native_value(array))
    session.run_with_iobinding(binding)
    return bool(np.allclose(attended[0], _expected_attended(), rtol=0, atol=TOLERANCE))


def _is_written(keys: Array, values: Array) -> bool:
    """The past is as it was, and the new tokens' keys, rotated, and values follow."""
    _, new_keys, new_values = _heads()
    past_keys, past_values = _past()
    return all(
        np.allclose(ring[0, :, : PAST + NEW], np.concatenate([past, new], axis=1), rtol=0, atol=TOLERANCE)
        for ring, past, new in ((keys, past_keys, new_keys), (values, past_values, new_values))
    )


def _rings() -> tuple[Array, Array]:
    """[1, heads, slots, head_dim] with the past, and with NaN where nothing was written, which must not be read."""
    keys, values = np.full((2, 1, HEADS, SLOTS, HEAD_DIM), np.nan, dtype=np.float32)
    keys[0, :, :PAST], values[0, :, :PAST] = _past()
    return keys, values


def _past() -> Array:
    return _scattered(1.0, (2, HEADS, PAST, HEAD_DIM)).astype(np.float32)


def _projected() -> Array:
    return _scattered(2.0, (1, NEW, 3 * HEADS * HEAD_DIM)).astype(np.float32)


def _angles() -> Array:
    return _scattered(3.0, (SLOTS, HEAD_DIM // 2))


def _scattered(seed: float, shape: tuple[int, ...]) -> Array:
    """Values between -2 and 2 without a pattern. numpy.random would cost every process a megabyte."""
    scattered: Array = 2 * np.sin(seed + np.arange(np.prod(shape)) ** 2.0)
    return scattered.reshape(shape)


def _heads() -> tuple[Array, Array, Array]:
    """Queries, keys and values of the new tokens, queries and keys rotated: each [heads, tokens, head_dim]."""
    queries, keys, values = _projected().reshape(NEW, 3, HEADS, HEAD_DIM).transpose(1, 2, 0, 3)
    return _rotated(queries), _rotated(keys), values


def _rotated(x: Array) -> Array:
    cosines, sines = (turn(_angles()[PAST : PAST + NEW]) for turn in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


def _expected_attended() -> Array:
    """[tokens, heads * head_dim]"""
    queries, new_keys, new_values = _heads()
    past_keys, past_values = _past()
    keys = np.concatenate([past_keys, new_keys], axis=1)
    values = np.concatenate([past_values, new_values], axis=1)
    age = PAST + np.arange(NEW)[:, np.newaxis] - np.arange(PAST + NEW)
    scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
    shares = np.exp(np.where((age >= 0) & (age < CONTEXT), scores, -np.inf))
    attended: Array = (shares / shares.sum(axis=-1, keepdims=True)) @ values
    return attended.transpose(1, 0, 2).reshape(NEW, -1)
