"""Builds and parses `.mossnano` files: one recording as codes, with what is needed to play it.

    "MOSSNANO", then u32 little-endian: sample_rate, channels, original_samples, quantizers, frames, codebook_size;
    then the codes in [quantizer, frame] order, packed without gaps, least significant bit first.

Rules of this room:

- `ArtifactHeader` checks its fields when it is made, so parsing and building refuse the same values.
- The body must be exactly as long as the header says. Sizes are computed before anything is allocated, and memory is
  taken only for bytes that came.
- Every fault raises one ArtifactError that names the field, the value found and what is allowed, however the input
  is split.
- `check_fits` checks apart whether weights can decode an artifact: a valid file may be made for other weights.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np

from mossnano_stdio.errors import ArtifactError, TokenError
from mossnano_stdio.tokens.format import CodecFormat, Codes, bits_per_code, to_quantizer_major
from mossnano_stdio.tokens.packing import first_outside, meaning_of, pack_codes, unpack_codes

MAGIC: Final = b"MOSSNANO"
MAX_ARTIFACT_BYTES: Final = 32 << 20  # the longest artifact, over all its messages
LARGEST_CODEBOOK: Final = 1 << 16  # codes are 16 bits at most
LARGEST_U32: Final = (1 << 32) - 1
PIECE_BYTES: Final = 1 << 16  # read from a file at a time

FIELD_LIMITS: Final = {  # in the order of the file
    "sample_rate": (1, LARGEST_U32),
    "channels": (1, LARGEST_U32),
    "original_samples": (0, LARGEST_U32),
    "quantizers": (1, LARGEST_U32),
    "frames": (0, LARGEST_U32),
    "codebook_size": (2, LARGEST_CODEBOOK),
}
_FIELDS: Final = struct.Struct("<6I")
HEADER_BYTES: Final = len(MAGIC) + _FIELDS.size


@dataclass(frozen=True, eq=False)
class ArtifactHeader:
    """The fields before the codes, in the order of the file.

    >>> header = ArtifactHeader(48000, 2, 5000, quantizers=16, frames=2, codebook_size=1024)
    >>> header.bits_per_code, header.body_bytes, header.file_bytes
    (10, 40, 72)
    """

    sample_rate: int
    channels: int
    original_samples: int  # per channel, before the encoder padded to whole frames
    quantizers: int
    frames: int
    codebook_size: int

    def __post_init__(self) -> None:
        for name, (least, most) in FIELD_LIMITS.items():
            found = getattr(self, name)
            if not least <= found <= most:
                raise ArtifactError(f"the artifact's {name} is {found}, allowed are {least} to {most}")

    @property
    def bits_per_code(self) -> int:
        return bits_per_code(self.codebook_size)

    @property
    def body_bytes(self) -> int:
        return (self.quantizers * self.frames * self.bits_per_code + 7) // 8

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.body_bytes

    @property
    def duration_seconds(self) -> float:
        return self.original_samples / self.sample_rate

    def check_fits(self, weights: CodecFormat, prefix_allowed: bool) -> None:
        """Raise ArtifactError unless these weights decode it. `prefix_allowed`: with fewer quantizers, too."""
        for name in ("sample_rate", "channels", "codebook_size"):
            found, needed = getattr(self, name), getattr(weights, name)
            if found != needed:
                raise ArtifactError(f"the artifact's {name} is {found}, these weights decode {needed} only")
        if self.quantizers != weights.quantizers and not (prefix_allowed and self.quantizers < weights.quantizers):
            allowed = f"1 to {weights.quantizers}" if prefix_allowed else f"{weights.quantizers} only"
            raise ArtifactError(f"the artifact's quantizers are {self.quantizers}, these weights decode {allowed}")
        room_samples = self.frames * weights.frame_samples
        if self.original_samples > room_samples:
            raise ArtifactError(
                f"the artifact's original_samples are {self.original_samples}, "
                f"but its {self.frames} frames of {weights.frame_samples} samples hold {room_samples} only"
            )


@dataclass(frozen=True, eq=False)
class Artifact(ArtifactHeader):
    """One recording as codes, frame-major: [frames, quantizers]."""

    codes: Codes

    def __post_init__(self) -> None:
        super().__post_init__()
        codes, shape = self.codes, (self.frames, self.quantizers)
        if codes.shape != shape or not np.issubdtype(codes.dtype, np.integer):
            raise ArtifactError(f"codes are {codes.dtype} {list(codes.shape)}, allowed are integers {list(shape)}")
        if place := first_outside(codes, self.codebook_size):
            frame, quantizer = place
            raise ArtifactError(
                f"code {quantizer} of frame {frame} is {codes[place]}, allowed are "
                f"0 to {self.codebook_size - 1} (the artifact's codebook_size is {self.codebook_size})"
                f"{meaning_of(int(codes[place]), self.codebook_size)}"
            )


def build_artifact(artifact: Artifact, max_bytes: int = MAX_ARTIFACT_BYTES) -> bytes:
    """The bytes of the file."""
    _check_size(artifact, max_bytes)
    header = MAGIC + _FIELDS.pack(*(getattr(artifact, name) for name in FIELD_LIMITS))
    return header + pack_codes(to_quantizer_major(artifact.codes).reshape(-1), artifact.bits_per_code)


def parse_artifact(data: bytes | bytearray | memoryview, max_bytes: int = MAX_ARTIFACT_BYTES) -> Artifact:
    """A whole file.

    >>> codes = unpack_codes(bytes.fromhex("2143"), bits=4, count=4).reshape(2, 2)
    >>> data = build_artifact(Artifact(48000, 2, 5000, quantizers=2, frames=2, codebook_size=16, codes=codes))
    >>> data[HEADER_BYTES:].hex(), parse_artifact(data).codes.tolist()
    ('3142', [[1, 2], [3, 4]])
    """
    reader = ArtifactReader(max_bytes)
    reader.push(data)
    return reader.artifact()


def load_artifact(file: BinaryIO, name: str, start: bytes = b"") -> Artifact:
    """Read an artifact from an open file, of which `start` was read before, and refuse it at the first byte too many.
    `name` is for the errors.
    """
    reader = ArtifactReader()
    try:
        reader.push(start)
        while piece := file.read(PIECE_BYTES):
            reader.push(piece)
        return reader.artifact()
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from None


class ArtifactReader:
    """Parses a file that comes in pieces.

    >>> reader = ArtifactReader()
    >>> reader.push(b"MOSS")
    28
    >>> reader.push(b"NANO" + struct.pack("<6I", 48000, 2, 5000, 16, 2, 1024))
    40
    >>> reader.push(bytes(40))
    0
    >>> reader.artifact().codes.shape
    (2, 16)
    """

    def __init__(self, max_bytes: int = MAX_ARTIFACT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._received = bytearray()
        self.maybe_header: ArtifactHeader | None = None  # None until its 32 bytes have come and were checked

    @property
    def is_empty(self) -> bool:
        """Has nothing of it come yet?"""
        return not self._received

    @property
    def missing_bytes(self) -> int:
        """How many bytes are still to come; before the header is complete, how many of the header."""
        expected_bytes = HEADER_BYTES if self.maybe_header is None else self.maybe_header.file_bytes
        return expected_bytes - len(self._received)

    @property
    def is_complete(self) -> bool:
        """Has its last byte come?"""
        return not self.missing_bytes

    def push(self, data: bytes | bytearray | memoryview) -> int:
        """Take the next bytes and return `missing_bytes`."""
        data = memoryview(data)
        if self.maybe_header is None:
            rest_of_header = data[: self.missing_bytes]
            self._received += rest_of_header
            if self.missing_bytes:
                return self.missing_bytes
            _check_magic(self._received)
            header = ArtifactHeader(*_FIELDS.unpack_from(self._received, len(MAGIC)))
            _check_size(header, self._max_bytes)
            self.maybe_header = header
            data = data[len(rest_of_header) :]
        if len(data) > self.missing_bytes:
            raise ArtifactError(
                f"there are bytes beyond the artifact's end: by its header it has {self.maybe_header.file_bytes} bytes"
            )
        self._received += data
        return self.missing_bytes

    def artifact(self) -> Artifact:
        """Return the artifact; raise ArtifactError while bytes of it are missing."""
        header, found_bytes = self.maybe_header, len(self._received)
        if header is None:
            _check_magic(self._received)
            raise ArtifactError(
                f"the artifact is cut inside its header: {found_bytes} of {HEADER_BYTES} bytes are there"
            )
        if self.missing_bytes:
            raise ArtifactError(f"the artifact is cut: {found_bytes} of {header.file_bytes} bytes are there")
        body = memoryview(self._received)[HEADER_BYTES:]
        try:
            codes = unpack_codes(body, header.bits_per_code, header.quantizers * header.frames)
        except TokenError as error:
            raise ArtifactError(f"the artifact's body: {error}") from None
        # A frame-major view of the order in the file, so that the codes of a long artifact are held once only.
        return Artifact(**vars(header), codes=codes.reshape(header.quantizers, header.frames).T)


def _check_magic(start: bytearray) -> None:
    found = bytes(start[: len(MAGIC)])
    if not MAGIC.startswith(found):
        raise ArtifactError(f"the first bytes are {found!r}, allowed is {MAGIC!r}: this is no .mossnano artifact")


def _check_size(header: ArtifactHeader, max_bytes: int) -> None:
    if header.file_bytes > max_bytes:
        raise ArtifactError(
            f"an artifact of {header.quantizers} quantizers x {header.frames} frames x {header.bits_per_code} bits "
            f"is {header.file_bytes} bytes, allowed are {max_bytes}"
        )
