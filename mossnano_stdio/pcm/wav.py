"""Writes WAVs, of 16 bits or of floats.

Rules of this room:

- A WAV whose length is not known when it begins holds the largest size instead, which readers take as "to the end of
  the file". Where the file can seek, the true size is written at the end.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Final

from mossnano_stdio.errors import InputError
from mossnano_stdio.pcm.form import VALUE_BYTES, SampleFormat

UNKNOWN_BYTES: Final = 0xFFFFFFFF
_RIFF: Final = struct.Struct("<4sI4s")
_CHUNK: Final = struct.Struct("<4sI")
_FORMAT: Final = struct.Struct("<HHIIHH")
_FORMAT_TAGS: Final = {"s16le": 1, "f32le": 3}


def wav_header(
    sample_rate: int, channels: int, maybe_pcm_bytes: int | None = None, sample_format: SampleFormat = "s16le"
) -> bytes:
    """The bytes before the samples: 44, and 58 before floats. For None, or for more than a WAV can count, the size says
    "to the end of the file".

    >>> wav_header(48000, 2, 8).hex()[:16], wav_header(48000, 2, 8, "f32le").hex()[:16]
    ('524946462c000000', '524946463a000000')
    """
    value_bytes = VALUE_BYTES[sample_format]
    sample_bytes = value_bytes * channels
    if not (1 <= channels <= 0xFFFF // value_bytes and 1 <= sample_rate <= 0xFFFFFFFF // sample_bytes):
        raise InputError(f"{channels} channels at {sample_rate} Hz are more, or less, than a WAV can hold")
    fields = _FORMAT.pack(
        _FORMAT_TAGS[sample_format], channels, sample_rate, sample_rate * sample_bytes, sample_bytes, 8 * value_bytes
    )
    if sample_format != "s16le":
        fields += bytes(2)  # what is not PCM says that no more fields follow, and in "fact" how many samples there are
    fact_bytes = 0 if sample_format == "s16le" else _CHUNK.size + 4
    header_bytes = _RIFF.size + _CHUNK.size + len(fields) + fact_bytes + _CHUNK.size
    riff_size = data_size = samples = UNKNOWN_BYTES
    if maybe_pcm_bytes is not None and maybe_pcm_bytes + header_bytes - _CHUNK.size <= UNKNOWN_BYTES:
        riff_size, data_size = maybe_pcm_bytes + header_bytes - _CHUNK.size, maybe_pcm_bytes
        samples = maybe_pcm_bytes // sample_bytes
    fact = _CHUNK.pack(b"fact", 4) + struct.pack("<I", samples) if fact_bytes else b""
    return (
        _RIFF.pack(b"RIFF", riff_size, b"WAVE")
        + _CHUNK.pack(b"fmt ", len(fields))
        + fields
        + fact
        + _CHUNK.pack(b"data", data_size)
    )


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

    def __init__(
        self,
        file: BinaryIO,
        sample_rate: int,
        channels: int,
        maybe_samples: int | None = None,
        sample_format: SampleFormat = "s16le",
    ) -> None:
        """`maybe_samples`: how many samples will come, if that is known. Then a pipe gets the true size too."""
        self._file = file
        self._numbers = sample_rate, channels
        self._sample_format = sample_format
        self._announced_bytes = None if maybe_samples is None else maybe_samples * VALUE_BYTES[sample_format] * channels
        self._pcm_bytes = 0
        self._seekable = file.seekable()
        self._starts_at = file.tell() if self._seekable else 0
        file.write(wav_header(sample_rate, channels, self._announced_bytes, sample_format))

    def write(self, pcm: bytes | memoryview) -> None:
        self._file.write(pcm)
        self._pcm_bytes += len(pcm)

    def finish(self) -> None:
        """Write the true size into the header, if the file can seek and the header does not hold it yet."""
        if not self._seekable or self._pcm_bytes == self._announced_bytes:
            return
        ends_at = self._file.tell()
        self._file.seek(self._starts_at)
        self._file.write(wav_header(*self._numbers, self._pcm_bytes, self._sample_format))
        self._file.seek(ends_at)
