"""Converts float samples to PCM16 and back.

Rules of this room:

- Audio is float32 [samples, channels] in memory, whatever its strides. PCM is bytes: 16 bits, little-endian,
  channels interleaved.
- A float becomes the integer nearest to x * 32767 after clipping to [-1, 1], ties to even, computed exactly. An
  integer becomes v / 32767, and converts back to itself. -32768 is never written; read, it counts as -32767.
- NaN and infinity are never converted: the error names the place of the first.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, NonFiniteError, UsageError
from mossnano_stdio.tokens import SAMPLE_BYTES

FULL_SCALE: Final = 32767
BLOCK_SAMPLES: Final = 1 << 15  # converted at a time, so that an hour needs no float64 copy of itself


def to_pcm16(audio: NDArray[np.float32]) -> bytes:
    """[samples, channels] -> interleaved PCM16LE. Planar audio comes as `planar.T`.

    >>> to_pcm16(np.array([[0.0, 1.0], [-1.0, 2.0]], dtype=np.float32)).hex(" ", 2)
    '0000 ff7f 0180 ff7f'
    """
    if audio.ndim != 2:
        raise UsageError(f"audio has {audio.ndim} axes, allowed are 2: [samples, channels]")
    samples, channels = audio.shape
    pcm = np.empty((samples, channels), dtype="<i2")
    for start in range(0, samples, BLOCK_SAMPLES):
        block = audio[start : start + BLOCK_SAMPLES]
        check_finite(block, start)
        steps = np.multiply(block, float(FULL_SCALE), dtype=np.float64)  # in float32 the product would round
        np.rint(steps, out=steps)
        np.clip(steps, -FULL_SCALE, FULL_SCALE, out=steps)
        for channel in range(channels):  # one by one is fast for planar audio as well as interleaved
            pcm[start : start + len(block), channel] = steps[:, channel]
    return pcm.tobytes()


def from_pcm16(pcm: bytes | bytearray | memoryview, channels: int) -> NDArray[np.float32]:
    """Interleaved PCM16LE -> [samples, channels].

    >>> from_pcm16(bytes.fromhex("0000 ff7f 0180 ff7f"), channels=2).tolist()
    [[0.0, 1.0], [-1.0, 1.0]]
    """
    return as_float(pcm16_samples(pcm, channels))


def pcm16_samples(pcm: bytes | bytearray | memoryview, channels: int) -> NDArray[np.int16]:
    """Interleaved PCM16LE as integers, [samples, channels].

    >>> pcm16_samples(bytes.fromhex("0000 ff7f 0180 ff7f"), channels=2).tolist()
    [[0, 32767], [-32767, 32767]]
    """
    sample_bytes = SAMPLE_BYTES * channels
    if len(pcm) % sample_bytes:
        raise InputError(
            f"{len(pcm)} bytes of PCM are no whole number of samples: "
            f"{channels} channels of 16 bits make {sample_bytes} bytes each"
        )
    return np.frombuffer(pcm, dtype="<i2").astype(np.int16, copy=False).reshape(-1, channels)


def as_float(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    return np.maximum(samples / np.float32(FULL_SCALE), np.float32(-1))


def check_finite(block: NDArray[np.float32], start: int) -> None:
    """A NonFiniteError where NaN or infinity is in the block, whose first sample is number `start` of the whole."""
    bad = ~np.isfinite(block)
    if not bad.any():
        return
    sample, channel = map(int, np.unravel_index(bad.argmax(), bad.shape))
    raise NonFiniteError(
        f"sample {start + sample} of channel {channel} is {block[sample, channel]}, "
        f"one of {int(bad.sum())} that are not finite: PCM holds finite numbers only"
    )
