"""Builds and parses `.ecdc` files, in which EnCodec's own tool keeps a recording as codes.

    "ECDC", u8 version 0, u32 big-endian length of the metadata; the metadata, JSON in UTF-8: m the model, al samples
    per channel, nc codes in a frame, lm whether a language model packed the codes; then segments until the file ends.
    A segment: its scale, float32 big-endian, where the model scales; then its codes in [frame, quantizer] order, packed
    without gaps, least significant bit first.

Rules of this room:

- Nothing in the file says how many segments there are, nor how long one is: it follows from al. So the file must end
  with its last segment. There is no checksum: a flipped bit in a code is another code.
- Sizes are computed before anything is allocated, and memory is taken only for bytes that came.
- What is read writes back byte for byte, if its metadata are spaced as EnCodec's own tool spaces them.
- Every fault raises one ArtifactError that says what was found and what is allowed, however the input is split.
- Codes that a language model packed are refused: unpacking them takes the model's very bits. A probability that is
  rounded otherwise moves the bounds of all codes after it, and what comes out is noise without an error.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from mossnano_stdio.errors import ArtifactError, TokenError
from mossnano_stdio.tokens.artifact import (
    MAGIC,
    MAX_ARTIFACT_BYTES,
    PIECE_BYTES,
    Artifact,
    ArtifactReader,
    load_artifact,
)
from mossnano_stdio.tokens.format import CodecFormat, Codes
from mossnano_stdio.tokens.packing import first_outside, pack_codes, unpack_codes

ECDC_MAGIC: Final = b"ECDC"
RECORDING_MAGICS: Final = (MAGIC, ECDC_MAGIC)  # what recordings of either kind begin with
ECDC_VERSION: Final = 0
MAX_METADATA_BYTES: Final = 1 << 16
CODEBOOK_SIZE: Final = 1024
BITS_PER_CODE: Final = 10

ECDC_START: Final = struct.Struct(">4sBI")
ECDC_SCALE: Final = struct.Struct(">f")
_KEYS: Final = ("m", "al", "nc", "lm")  # in the order of the file


class EcdcModel(NamedTuple):
    """What the name of a model stands for."""

    sample_rate: int
    channels: int
    frame_samples: int
    quantizers: int  # at most
    maybe_segment: tuple[int, int] | None  # samples of a segment, and from its start to that of the next; None: one

    @property
    def scale_bytes(self) -> int:
        """The model that cuts recordings into segments is the one that scales them."""
        return ECDC_SCALE.size if self.maybe_segment else 0


ECDC_MODELS: Final = {
    "encodec_24khz": EcdcModel(24_000, 1, 320, 32, maybe_segment=None),
    "encodec_48khz": EcdcModel(48_000, 2, 320, 16, maybe_segment=(48_000, 47_520)),
}


@dataclass(frozen=True)
class EcdcHeader:
    """What the metadata say.

    >>> header = EcdcHeader("encodec_48khz", 101_567, quantizers=4)
    >>> header.segment_frames, header.frames, header.body_bytes
    ([150, 150, 21], 321, 1617)
    """

    model_name: str
    original_samples: int  # per channel
    quantizers: int

    def __post_init__(self) -> None:
        if self.model_name not in ECDC_MODELS:
            raise ArtifactError(f"the .ecdc's model is {self.model_name!r}, allowed are {' and '.join(ECDC_MODELS)}")
        if self.original_samples < 1:
            raise ArtifactError(f"the .ecdc's samples (al) are {self.original_samples}, allowed is 1 or more")
        if not 1 <= self.quantizers <= self.model.quantizers:
            raise ArtifactError(
                f"the .ecdc's codes in a frame (nc) are {self.quantizers}, "
                f"{self.model_name} has 1 to {self.model.quantizers}"
            )

    @property
    def model(self) -> EcdcModel:
        return ECDC_MODELS[self.model_name]

    @property
    def segment_frames(self) -> list[int]:
        """How many frames each segment has."""
        length, stride = self.model.maybe_segment or (self.original_samples, self.original_samples)
        starts = range(0, self.original_samples, stride)
        return [-(-min(self.original_samples - start, length) // self.model.frame_samples) for start in starts]

    @property
    def frames(self) -> int:
        return sum(self.segment_frames)

    @property
    def body_bytes(self) -> int:
        return sum(self.segment_bytes(frames) for frames in self.segment_frames)

    @property
    def duration_seconds(self) -> float:
        return self.original_samples / self.model.sample_rate

    def segment_bytes(self, frames: int) -> int:
        return self.model.scale_bytes + (frames * self.quantizers * BITS_PER_CODE + 7) // 8

    def check_fits(self, weights: CodecFormat, prefix_allowed: bool) -> None:
        """Raise ArtifactError unless these weights decode it: all numbers are those of its model, but for codebooks."""
        for name in ("sample_rate", "channels", "frame_samples"):
            found, needed = getattr(self.model, name), getattr(weights, name)
            if found != needed:
                raise ArtifactError(
                    f"the .ecdc is of {self.model_name}, whose {name} is {found}; these weights decode {needed} only"
                )
        if weights.codebook_size != CODEBOOK_SIZE:
            raise ArtifactError(
                f"the .ecdc's codebooks have {CODEBOOK_SIZE} entries, those of these weights {weights.codebook_size}"
            )
        if self.quantizers != weights.quantizers and not (prefix_allowed and self.quantizers < weights.quantizers):
            allowed = f"1 to {weights.quantizers}" if prefix_allowed else f"{weights.quantizers} only"
            raise ArtifactError(
                f"the .ecdc's codes in a frame (nc) are {self.quantizers}, these weights decode {allowed}"
            )

    def check_size(self, max_bytes: int) -> None:
        # The least that so many samples take comes first: it needs no list of segments, which al alone makes long.
        least_bytes = self.original_samples * self.quantizers * BITS_PER_CODE // (8 * self.model.frame_samples)
        if least_bytes > max_bytes or self.body_bytes > max_bytes:
            raise ArtifactError(
                f"an .ecdc of {self.original_samples} samples with {self.quantizers} codes a frame is "
                f"{max(least_bytes, 1)} bytes or more, allowed are {max_bytes}"
            )


@dataclass(frozen=True, eq=False)
class EcdcSegment:
    """Codes that are decoded together, [frames, quantizers], and by how much their sound is multiplied."""

    codes: Codes
    maybe_scale: float | None


@dataclass(frozen=True, eq=False)
class Ecdc:
    """One recording."""

    header: EcdcHeader
    segments: Sequence[EcdcSegment]

    @property
    def codes(self) -> Codes:
        """[frames, quantizers] of all segments, one after the other."""
        return np.concatenate([segment.codes for segment in self.segments])

    @property
    def sample_rate(self) -> int:
        return self.header.model.sample_rate

    @property
    def channels(self) -> int:
        return self.header.model.channels

    @property
    def original_samples(self) -> int:
        return self.header.original_samples

    def check_fits(self, weights: CodecFormat, prefix_allowed: bool) -> None:
        """As an artifact's."""
        self.header.check_fits(weights, prefix_allowed)

    def as_artifact(self) -> Artifact:
        """The same recording without what an artifact cannot hold; of a model without segments nothing is lost."""
        header, codes = self.header, self.codes
        numbers = (self.sample_rate, self.channels, header.original_samples, header.quantizers)
        return Artifact(*numbers, frames=len(codes), codebook_size=CODEBOOK_SIZE, codes=codes)


def build_ecdc(ecdc: Ecdc) -> bytes:
    """The bytes of the file, as EnCodec's own tool writes them."""
    header = ecdc.header
    values = (header.model_name, header.original_samples, header.quantizers, False)
    metadata = json.dumps(dict(zip(_KEYS, values, strict=True))).encode()
    pieces = [ECDC_START.pack(ECDC_MAGIC, ECDC_VERSION, len(metadata)), metadata]
    header.check_size(MAX_ARTIFACT_BYTES)
    if len(ecdc.segments) != len(header.segment_frames):
        raise ArtifactError(
            f"there are {len(ecdc.segments)} segments, {header.original_samples} samples make "
            f"{len(header.segment_frames)}"
        )
    for number, (segment, frames) in enumerate(zip(ecdc.segments, header.segment_frames, strict=True)):
        _check_codes(segment.codes, (frames, header.quantizers), number)
        if header.model.scale_bytes:
            pieces.append(ECDC_SCALE.pack(checked_scale(segment.maybe_scale, number)))
        pieces.append(pack_codes(segment.codes.reshape(-1), BITS_PER_CODE))
    return b"".join(pieces)


def load_ecdc(file: BinaryIO, name: str, start: bytes = b"") -> Ecdc:
    """Read an open file, of which `start` was read before, and refuse it at the first byte too many. `name` is for the
    errors.
    """
    reader = EcdcReader()
    pieces = itertools.chain([start], iter(lambda: file.read(PIECE_BYTES), b""))
    try:
        segments = [segment for piece in pieces for segment in reader.push(piece)]
        return Ecdc(reader.finish(), segments)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from None


def load_recording(file: BinaryIO, name: str) -> Artifact | Ecdc:
    """Read an open file of either kind, told by its first bytes. `name` is for the errors."""
    start = file.read(len(ECDC_MAGIC))
    return load_ecdc(file, name, start) if start == ECDC_MAGIC else load_artifact(file, name, start)


def ecdc_model_of(codec: CodecFormat) -> str:
    """What an .ecdc calls the model of these numbers; raise ArtifactError where it has no name for it."""
    for name, model in ECDC_MODELS.items():
        if (*model[:3], CODEBOOK_SIZE) == (codec.sample_rate, codec.channels, codec.frame_samples, codec.codebook_size):
            return name
    raise ArtifactError(
        f"an .ecdc holds codes of {' and '.join(ECDC_MODELS)} only, these weights are of another codec: "
        "write a .mossnano instead"
    )


class EcdcReader:
    """Parses a file that comes in pieces, and holds no more of it than one segment.

    >>> reader = EcdcReader()
    >>> start = b'ECDC' + bytes([0, 0, 0, 0, 57])
    >>> list(reader.push(start + b'{"m": "encodec_24khz", "al": 320, "nc": 2, "lm": false}  '))
    []
    >>> [segment.codes.tolist() for segment in reader.push(bytes([1, 8, 0]))]
    [[[1, 2]]]
    >>> reader.finish().duration_seconds
    0.013333333333333334
    """

    def __init__(self, max_bytes: int = MAX_ARTIFACT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._received = bytearray()
        self._maybe_metadata_bytes: int | None = None
        self._segments_due: Iterator[int] = iter(())
        self._segment_frames = 0  # of the segment that is on its way; 0: there is none
        self._segment_number = 0
        self.maybe_header: EcdcHeader | None = None  # None until the metadata have come and were checked

    def push(self, data: bytes | bytearray | memoryview) -> Iterator[EcdcSegment]:
        """Take the next bytes, and give each segment that they complete. Go through all of them."""
        self._received += data
        while self._maybe_missing_bytes() == 0:
            if self._maybe_metadata_bytes is None:
                self._maybe_metadata_bytes = parse_ecdc_start(self._take(ECDC_START.size))
            elif self.maybe_header is None:
                header = _parse_metadata(self._take(self._maybe_metadata_bytes))
                header.check_size(self._max_bytes)
                self._segments_due = iter(header.segment_frames)
                self._segment_frames = next(self._segments_due)
                self.maybe_header = header
            else:
                segment = self._parse_segment(self.maybe_header)
                self._segment_frames = next(self._segments_due, 0)
                self._segment_number += 1
                yield segment
        if self._maybe_missing_bytes() is None and self._received:
            raise ArtifactError("there are bytes beyond the .ecdc's last segment")

    def finish(self) -> EcdcHeader:
        """The header of the file that has come as a whole; raise ArtifactError while bytes of it are missing."""
        if (maybe_cut := self.maybe_cut()) is not None:
            check_ecdc_magic(self._received if self._maybe_metadata_bytes is None else ECDC_MAGIC)
            raise ArtifactError(maybe_cut)
        assert self.maybe_header is not None
        return self.maybe_header

    def maybe_cut(self) -> str | None:
        """What is missing of the file, if it ends here."""
        maybe_missing_bytes = self._maybe_missing_bytes()
        if maybe_missing_bytes is None:
            return None
        where = "its header" if self.maybe_header is None else f"segment {self._segment_number}"
        return f"the .ecdc is cut inside {where}: {maybe_missing_bytes} bytes are missing"

    @property
    def is_complete(self) -> bool:
        """Has the last segment come?"""
        return self._maybe_missing_bytes() is None

    def _maybe_missing_bytes(self) -> int | None:
        """Of the part that is on its way; None behind the last segment."""
        if self._maybe_metadata_bytes is None:
            part_bytes = ECDC_START.size
        elif self.maybe_header is None:
            part_bytes = self._maybe_metadata_bytes
        elif self._segment_frames:
            part_bytes = self.maybe_header.segment_bytes(self._segment_frames)
        else:
            return None
        return max(0, part_bytes - len(self._received))

    def _parse_segment(self, header: EcdcHeader) -> EcdcSegment:
        number = self._segment_number
        body = self._take(header.segment_bytes(self._segment_frames))
        scale_bytes = header.model.scale_bytes
        maybe_scale = checked_scale(ECDC_SCALE.unpack_from(body)[0], number) if scale_bytes else None
        try:
            codes = unpack_codes(body[scale_bytes:], BITS_PER_CODE, self._segment_frames * header.quantizers)
        except TokenError as error:
            raise ArtifactError(f"segment {number} of the .ecdc: {error}") from None
        return EcdcSegment(codes.reshape(self._segment_frames, header.quantizers), maybe_scale)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken


def reader_for(data: bytes, reader: ArtifactReader | EcdcReader) -> ArtifactReader | EcdcReader:
    """Which reader takes the next bytes of a recording of either kind. Until its first byte tells, that is `reader`.

    >>> type(reader_for(b"", ArtifactReader())).__name__, type(reader_for(b"E", ArtifactReader())).__name__
    ('ArtifactReader', 'EcdcReader')
    """
    if isinstance(reader, ArtifactReader) and reader.is_empty and data[:1] == ECDC_MAGIC[:1]:
        return EcdcReader()
    return reader


def parse_ecdc_start(start: bytes) -> int:
    """The length of the metadata."""
    check_ecdc_magic(start)
    _, version, metadata_bytes = ECDC_START.unpack(start)
    if version != ECDC_VERSION:
        raise ArtifactError(f"the .ecdc's version is {version}, allowed is {ECDC_VERSION}")
    if metadata_bytes > MAX_METADATA_BYTES:
        raise ArtifactError(f"the .ecdc's metadata are {metadata_bytes} bytes, allowed are {MAX_METADATA_BYTES}")
    return int(metadata_bytes)


def check_ecdc_magic(start: bytes | bytearray) -> None:
    found = bytes(start[: len(ECDC_MAGIC)])
    if not ECDC_MAGIC.startswith(found):
        raise ArtifactError(f"the first bytes are {found!r}, allowed is {ECDC_MAGIC!r}: this is no .ecdc")


def parse_ecdc_object(metadata: bytes) -> dict[str, Any]:
    """The metadata as JSON, whatever is in it."""
    try:
        values: Any = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the .ecdc's metadata are no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"the .ecdc's metadata are {type(values).__name__}, allowed is an object")
    return values


def _parse_metadata(metadata: bytes) -> EcdcHeader:
    values = parse_ecdc_object(metadata)
    if "acv" in values:
        raise ArtifactError(
            f"the .ecdc's acv is {shown(values['acv'])}: encodec-rs packed its codes with a language model, which "
            "`decode --bundle` and `unpack --bundle` know; allowed here are files of EnCodec's own tool without a "
            "language model"
        )
    for key, kind in zip(_KEYS, (str, int, int, bool), strict=True):
        if type(values.get(key)) is not kind:  # True is no count
            found = shown(values[key]) if key in values else "missing"
            raise ArtifactError(f"the .ecdc's {key} is {found}, allowed is {kind.__name__}")
    if others := values.keys() - set(_KEYS):
        raise ArtifactError(f"the .ecdc's metadata have {shown(min(others))}, allowed are {', '.join(_KEYS)} only")
    if values["lm"]:
        raise ArtifactError(
            "the .ecdc's lm is true: a language model packed its codes, and only the very program that ran it unpacks "
            "them, as any other rounding gives noise; write the file without (encodec without --lm)"
        )
    return EcdcHeader(values["m"], values["al"], values["nc"])


def shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked_scale(maybe_scale: float | None, number: int) -> float:
    if maybe_scale is None or not math.isfinite(maybe_scale):
        raise ArtifactError(f"the scale of segment {number} is {maybe_scale}, allowed is a finite number")
    return maybe_scale


def _check_codes(codes: Codes, shape: tuple[int, int], number: int) -> None:
    if codes.shape != shape or not np.issubdtype(codes.dtype, np.integer):
        raise ArtifactError(
            f"segment {number} is {codes.dtype} {list(codes.shape)}, allowed are integers {list(shape)}"
        )
    if place := first_outside(codes, CODEBOOK_SIZE):
        frame, quantizer = place
        raise ArtifactError(
            f"code {quantizer} of frame {frame} is {codes[place]}, allowed are 0 to {CODEBOOK_SIZE - 1}"
        )
