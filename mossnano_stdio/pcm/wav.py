"""Writes WAVs of 16 bits.

Rules of this room:

- A WAV whose length is not known when it begins holds the largest size instead, which readers take as "to the end of
  the file". Where the file can seek, the true size is written at the end.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Final

from mossnano_stdio.errors import InputError
from mossnano_stdio.tokens import SAMPLE_BYTES

UNKNOWN_BYTES: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("<4sI4s4sIHHIIHH4sI")
_RIFF_SIZE_AT: Final = 4
_DATA_SIZE_AT: Final = 40
_PCM: Final = 1


def wav_header(sample_rate: int, channels: int, maybe_pcm_bytes: int | None = None) -> bytes:
    """The 44 bytes before the PCM. For None, or for more than a WAV can count, the size says "to the end of the file".

    >>> wav_header(48000, 2, 8).hex()[:16]
    '524946462c000000'
    """
    sample_bytes = SAMPLE_BYTES * channels
    if not (1 <= channels <= 0xFFFF // SAMPLE_BYTES and 1 <= sample_rate <= 0xFFFFFFFF // sample_bytes):
        raise InputError(f"{channels} channels at {sample_rate} Hz are more, or less, than a WAV can hold")
    riff_size, data_size = _sizes(maybe_pcm_bytes)
    return _HEADER.pack(
        b"RIFF", riff_size, b"WAVE",
        b"fmt ", 16, _PCM, channels, sample_rate, sample_rate * sample_bytes, sample_bytes, 8 * SAMPLE_BYTES,
        b"data", data_size,
    )  # fmt: skip


def _sizes(maybe_pcm_bytes: int | None) -> tuple[int, int]:
    """The sizes of the RIFF chunk and of the data chunk."""
    before_pcm_bytes = _HEADER.size - _RIFF_SIZE_AT - 4
    if maybe_pcm_bytes is None or maybe_pcm_bytes + before_pcm_bytes > UNKNOWN_BYTES:
        return UNKNOWN_BYTES, UNKNOWN_BYTES
    return maybe_pcm_bytes + before_pcm_bytes, maybe_pcm_bytes


class WavWriter:
    """Writes a WAV to a file or a pipe while its PCM comes.

    >>> import io
    >>> file = io.BytesIO()
    >>> writer = WavWriter(file, sample_rate=48000, channels=2)
    >>> writer.write(bytes(8))
    >>> writer.finish()
    >>> file.getvalue() == wav_header(48000, 2, 8) + bytes(8)
    True
    """

    def __init__(self, file: BinaryIO, sample_rate: int, channels: int, maybe_samples: int | None = None) -> None:
        """`maybe_samples`: how many samples will come, if that is known. Then a pipe gets the true size too."""
        self._file = file
        self._announced_bytes = None if maybe_samples is None else maybe_samples * SAMPLE_BYTES * channels
        self._pcm_bytes = 0
        self._seekable = file.seekable()
        self._starts_at = file.tell() if self._seekable else 0
        file.write(wav_header(sample_rate, channels, self._announced_bytes))

    def write(self, pcm: bytes | memoryview) -> None:
        self._file.write(pcm)
        self._pcm_bytes += len(pcm)

    def finish(self) -> None:
        """Write the true size into the header, if the file can seek and the header does not hold it yet."""
        if not self._seekable or self._pcm_bytes == self._announced_bytes:
            return
        riff_size, data_size = _sizes(self._pcm_bytes)
        ends_at = self._file.tell()
        for place, size in ((_RIFF_SIZE_AT, riff_size), (_DATA_SIZE_AT, data_size)):
            self._file.seek(self._starts_at + place)
            self._file.write(struct.pack("<I", size))
        self._file.seek(ends_at)
