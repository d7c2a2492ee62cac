"""Holds the numbers of a codec, and orders its codes as the wire, the artifact and the graph need them.

Rules of this room:

- The numbers of a `CodecFormat` come from weights or from a header; none is assumed. What follows from them (bits per
  code, bytes per frame, ...) is computed here.
- Codes lie frame-major, [frames, quantizers], everywhere inside the process and on the wire. Only the artifact
  is quantizer-major, [quantizers, frames], and only the graph has a batch axis, int32 [1, frames, quantizers].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint16]

SAMPLE_BYTES = 2  # PCM16


@dataclass(frozen=True)
class CodecFormat:
    """The numbers that an encoder and a decoder must have in common.

    >>> nano = CodecFormat(sample_rate=48000, channels=2, frame_samples=3840, quantizers=16, codebook_size=1024)
    >>> nano.bits_per_code, nano.frame_bytes, nano.frame_pcm_bytes, nano.frames_per_second
    (10, 20, 15360, 12.5)
    """

    sample_rate: int
    channels: int
    frame_samples: int  # samples per channel in one frame
    quantizers: int
    codebook_size: int

    @property
    def bits_per_code(self) -> int:
        return bits_per_code(self.codebook_size)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one packed frame on the wire, each frame padded to a whole byte."""
        return frame_bytes(self.quantizers, self.codebook_size)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample as PCM16, all channels."""
        return self.channels * SAMPLE_BYTES

    @property
    def frame_pcm_bytes(self) -> int:
        return self.frame_samples * self.sample_bytes

    @property
    def frames_per_second(self) -> float:
        return self.sample_rate / self.frame_samples


def bits_per_code(codebook_size: int) -> int:
    """The least width that holds every code: ceil(log2(codebook_size)).

    >>> [bits_per_code(size) for size in (2, 3, 1000, 1024, 1025, 65536)]
    [1, 2, 10, 10, 11, 16]
    """
    return (codebook_size - 1).bit_length()


def frame_bytes(quantizers: int, codebook_size: int) -> int:
    """Bytes of one packed frame: 16 codes of 10 bits are 20 bytes.

    >>> frame_bytes(16, 1024), frame_bytes(3, 1024)
    (20, 4)
    """
    return (quantizers * bits_per_code(codebook_size) + 7) // 8


def frames_before_zeros(codes: Codes) -> int:
    """How many frames stand before the first one whose codes are all 0; all of them where there is none.

    >>> frames_before_zeros(np.array([[1, 0], [0, 2], [0, 0], [3, 3]], np.uint16))
    2
    """
    is_zero = ~codes.any(axis=1)
    return int(is_zero.argmax()) if is_zero.any() else len(codes)


def to_frame_major(quantizer_major: NDArray[np.integer]) -> Codes:
    """[quantizers, frames] -> [frames, quantizers], as a contiguous copy.

    >>> to_frame_major(np.array([[1, 2, 3], [4, 5, 6]])).tolist()
    [[1, 4], [2, 5], [3, 6]]
    """
    return np.ascontiguousarray(quantizer_major.T, dtype=np.uint16)


def to_quantizer_major(frame_major: NDArray[np.integer]) -> Codes:
    """[frames, quantizers] -> [quantizers, frames], as a contiguous copy.

    >>> to_quantizer_major(np.array([[1, 4], [2, 5], [3, 6]])).tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    return np.ascontiguousarray(frame_major.T, dtype=np.uint16)


def to_graph(frame_major: NDArray[np.integer]) -> NDArray[np.int32]:
    """[frames, quantizers] -> int32 [1, frames, quantizers], the shape that every graph takes.

    >>> to_graph(np.array([[1, 4], [2, 5]], dtype=np.uint16)).shape
    (1, 2, 2)
    """
    return np.ascontiguousarray(frame_major, dtype=np.int32)[np.newaxis]
