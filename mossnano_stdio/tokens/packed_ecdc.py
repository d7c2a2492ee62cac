"""Reads the `.ecdc` files of encodec-rs, whose codes a language model packed (acv 2).

    The start and the metadata as in ecdc.py, with more keys; then chunks until the file ends. A chunk: u32 big-endian
    length of its payload; u32 big-endian CRC-32 of it; the payload, which is the scale, float32 big-endian, where the
    model scales, and the codes in [frame, quantizer] order as interval_coder.py takes them.

Keys: fp, mr and tau are the numbers of a Tabulation; lmh names the language model by the SHA-256 of its file; cs, cst
and fl, where all chunks are alike, say the samples of a chunk, from its start to that of the next, and its frames.

Rules of this room:

- The files do not say what they need: a file is read with the bundle that wrote it, a folder with bundle.json and the
  language model. Its lmh must be that of the bundle.
- Two layouts bear the number 2. Chunks that overlap and fade into each other are those of May 2026; bundles whose
  stride is one of CONTEXT_STRIDES are of July, with CONTEXT_SAMPLES more on both sides of what a chunk is for. Where
  the number of chunks does not fit, no other layout is tried: a file that is cut would look like one.
- A chunk needs all the work of its frames, however few its bytes are. So the number of chunks must fit before any is
  unpacked, and what they unpack to has the limit that files without a language model have.
- Every chunk stands for itself. Where damage is to be survived, a chunk is its codes or a LostChunk; what follows a
  broken length is lost.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from mossnano_stdio.errors import ArtifactError, BundleError, UsageError
from mossnano_stdio.tokens.artifact import MAX_ARTIFACT_BYTES, PIECE_BYTES
from mossnano_stdio.tokens.ecdc import (
    BITS_PER_CODE,
    CODEBOOK_SIZE,
    ECDC_MAGIC,
    ECDC_MODELS,
    ECDC_SCALE,
    ECDC_START,
    MAX_METADATA_BYTES,
    Ecdc,
    EcdcHeader,
    EcdcModel,
    EcdcSegment,
    check_ecdc_magic,
    checked_scale,
    parse_ecdc_object,
    parse_ecdc_start,
    shown,
)
from mossnano_stdio.tokens.interval_coder import (
    COUNTS_LIMITS,
    SMALLEST_SHARE_LIMITS,
    IntervalDecoder,
    Tabulation,
    most_packed_bytes,
)
from mossnano_stdio.tokens.language_model import MAX_LM_BYTES, LanguageModel, LmWeights, parse_lm_weights

PACKED_ACV: Final = 2
MAX_CHUNKS: Final = 1 << 16
MAX_BUNDLE_JSON_BYTES: Final = 1 << 20
BUNDLE_FILE: Final = "bundle.json"
LM_FILE: Final = "lm_weights_q8.bin"  # unless the bundle says another
CONTEXT_STRIDES: Final = (64_000, 86_400)
CONTEXT_SAMPLES: Final = 480
TEMPERATURE_LIMITS: Final = (0.001, 1000.0)
LARGEST_COUNT: Final = (1 << 32) - 1  # of samples, frames or codes

_CHUNK_START: Final = struct.Struct(">II")


@dataclass(frozen=True)
class PackedEcdcHeader:
    """What the metadata say. What may be None is the bundle's where it is."""

    model_name: str
    original_samples: int  # per channel
    quantizers: int
    lm_sha256: str
    counts: int
    smallest_share: int
    temperature: float
    maybe_chunk_samples: int | None
    maybe_stride: int | None
    maybe_chunk_frames: int | None

    @property
    def model(self) -> EcdcModel:
        return ECDC_MODELS[self.model_name]

    @property
    def duration_seconds(self) -> float:
        return self.original_samples / self.model.sample_rate


class PackedChunk(NamedTuple):
    """The payload of a chunk, and what is wrong with it."""

    payload: bytes
    maybe_fault: str | None


class LostChunk(NamedTuple):
    """A chunk whose codes did not come through: how many frames it has, and why."""

    frames: int
    fault: str


@dataclass(frozen=True, eq=False)
class EcdcBundle:
    """The numbers of a bundle that a file is read with, and its language model."""

    model_name: str
    segment_samples: int
    segment_stride: int
    frame_length: int  # frames of a whole segment
    quantizers: int
    is_scaled: bool
    logit_step: float
    weights: LmWeights


@dataclass(frozen=True)
class PackedLayout:
    """How a recording is cut into chunks."""

    original_samples: int
    chunk_samples: int  # at most; the last chunk has what is left
    stride: int  # from the start of a chunk to that of the next
    context_samples: int  # of a chunk that are for its decoding only, on each side; 0: chunks fade into each other
    chunk_frames: tuple[int, ...]

    def samples_of(self, number: int) -> int:
        """How many samples of the recording a chunk stands for, without its context."""
        most_samples = self.stride if self.context_samples else self.chunk_samples
        return min(most_samples, self.original_samples - number * self.stride)


@dataclass(frozen=True, eq=False)
class PackedEcdc:
    """One recording, its codes still packed. A chunk that is lost has a fault."""

    header: PackedEcdcHeader
    bundle: EcdcBundle
    layout: PackedLayout
    chunks: Sequence[PackedChunk]

    def segments(self, *, salvage: bool = False) -> Iterator[EcdcSegment | LostChunk]:
        """Unpack one chunk after the other, as they are asked for. With `salvage` damage raises nothing."""
        for number, (chunk, frames) in enumerate(zip(self.chunks, self.layout.chunk_frames, strict=True)):
            try:
                yield _unpack_chunk(self.header, self.bundle, number, chunk, frames)
            except ArtifactError as error:
                if not salvage:
                    raise
                yield LostChunk(frames, str(error))

    def unpacked(self, *, salvage: bool) -> tuple[Ecdc, dict[int, LostChunk]]:
        """The recording, and by their numbers the chunks that are lost, whose codes are 0 in it."""
        header, segments, lost = self.header, list[EcdcSegment](), dict[int, LostChunk]()
        for number, segment in enumerate(self.segments(salvage=salvage)):
            if isinstance(segment, LostChunk):
                lost[number] = segment
                segments.append(EcdcSegment(np.zeros((segment.frames, header.quantizers), np.uint16), None))
            else:
                segments.append(segment)
        return Ecdc(EcdcHeader(header.model_name, header.original_samples, header.quantizers), segments), lost


def starts_packed(file: BinaryIO, start: bytes) -> tuple[bytes, bool]:
    """Read up to the end of the metadata: all that was read, and whether encodec-rs wrote the file. `start` was read
    before.
    """
    start += file.read(ECDC_START.size - len(start))
    metadata_bytes = int.from_bytes(start[-4:], "big")
    if len(start) < ECDC_START.size or metadata_bytes > MAX_METADATA_BYTES:
        return start, False
    metadata = file.read(metadata_bytes)
    try:
        return start + metadata, "acv" in parse_ecdc_object(metadata)
    except ArtifactError:
        return start + metadata, False


def open_packed_ecdc(file: BinaryIO, name: str, folder: Path, *, salvage: bool) -> PackedEcdc:
    """Read a file that encodec-rs wrote with the bundle in `folder`."""
    bundle = load_ecdc_bundle(folder)
    start, is_packed = starts_packed(file, b"")
    if not is_packed:
        raise UsageError(f"--bundle is for an .ecdc of encodec-rs, {name} is none; leave it out")
    return load_packed_ecdc(file, name, bundle, start, salvage=salvage)


def load_packed_ecdc(
    file: BinaryIO, name: str, bundle: EcdcBundle, start: bytes = b"", *, salvage: bool = False
) -> PackedEcdc:
    """Read an open file, of which `start` was read before. `name` is for the errors. With `salvage` what is damaged
    behind the header is lost and raises nothing.
    """
    reader = PackedEcdcReader()
    chunks: list[PackedChunk] = []
    pieces = itertools.chain([start], iter(lambda: file.read(PIECE_BYTES), b""))
    maybe_fault = None
    try:
        try:
            for piece in pieces:
                for chunk in reader.push(piece):
                    if chunk.maybe_fault is not None and not salvage:
                        raise ArtifactError(chunk.maybe_fault)
                    chunks.append(chunk)
            reader.finish()
        except ArtifactError as error:
            if not salvage or reader.maybe_header is None:
                raise
            maybe_fault = str(error)
        assert reader.maybe_header is not None
        layout = layout_of(reader.maybe_header, bundle)
        expected = len(layout.chunk_frames)
        if salvage:
            missing = PackedChunk(b"", maybe_fault or "the .ecdc ends before it")
            chunks = [*chunks[:expected], *itertools.repeat(missing, expected - len(chunks))]
        if len(chunks) != expected:
            raise ArtifactError(
                f"the .ecdc has {len(chunks)} chunks, its {layout.original_samples} samples make {expected} with this "
                f"bundle, one for every {layout.stride}"
            )
        return PackedEcdc(reader.maybe_header, bundle, layout, chunks)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from None


class PackedEcdcReader:
    """Parses a file that comes in pieces, and holds no more of it than one chunk. Codes stay packed.

    >>> reader = PackedEcdcReader()
    >>> metadata = b'{"m":"encodec_24khz","al":320,"nc":2,"lm":true,"acv":2,"lmh":"' + 64 * b'0' + b'"}'
    >>> list(reader.push(b'ECDC' + bytes([0, 0, 0, 0, len(metadata)]) + metadata))
    []
    >>> [chunk.maybe_fault for chunk in reader.push(bytes([0, 0, 0, 1, 0xd2, 2, 0xef, 0x8d, 0]))]
    [None]
    >>> reader.finish().original_samples
    320
    """

    def __init__(self, max_bytes: int = MAX_ARTIFACT_BYTES) -> None:
        self._left_bytes = max_bytes
        self._received = bytearray()
        self._maybe_metadata_bytes: int | None = None
        self._maybe_chunk: tuple[int, int] | None = None  # payload bytes and CRC-32 of the chunk that is on its way
        self._chunk_number = 0
        self.maybe_header: PackedEcdcHeader | None = None  # None until the metadata have come and were checked

    def push(self, data: bytes | bytearray | memoryview) -> Iterator[PackedChunk]:
        """Take the next bytes, and give each chunk that they complete. Go through all of them."""
        self._received += data
        while len(self._received) >= (part_bytes := self._part_bytes()):
            part = bytes(self._received[:part_bytes])
            del self._received[:part_bytes]
            if self._maybe_metadata_bytes is None:
                self._maybe_metadata_bytes = parse_ecdc_start(part)
            elif self.maybe_header is None:
                self.maybe_header = _parse_packed_metadata(part)
            elif self._maybe_chunk is None:
                self._maybe_chunk = self._parse_chunk_start(part)
            else:
                crc, found_crc = self._maybe_chunk[1], zlib.crc32(part)
                fault = (
                    f"chunk {self._chunk_number} of the .ecdc: its CRC-32 is {crc:08x}, its bytes make {found_crc:08x}"
                )
                self._maybe_chunk = None
                self._chunk_number += 1
                yield PackedChunk(part, None if crc == found_crc else fault)

    def finish(self) -> PackedEcdcHeader:
        """The header of the file that has come as a whole; raise ArtifactError where it is cut inside a chunk."""
        if self.maybe_header is not None and self._maybe_chunk is None and not self._received:
            return self.maybe_header
        check_ecdc_magic(self._received if self._maybe_metadata_bytes is None else ECDC_MAGIC)
        where = "its header" if self.maybe_header is None else f"chunk {self._chunk_number}"
        missing_bytes = self._part_bytes() - len(self._received)
        raise ArtifactError(f"the .ecdc is cut inside {where}: {missing_bytes} bytes are missing")

    def _part_bytes(self) -> int:
        """Of the part that is on its way."""
        if self._maybe_metadata_bytes is None:
            return ECDC_START.size
        if self.maybe_header is None:
            return self._maybe_metadata_bytes
        return _CHUNK_START.size if self._maybe_chunk is None else self._maybe_chunk[0]

    def _parse_chunk_start(self, part: bytes) -> tuple[int, int]:
        payload_bytes, crc = _CHUNK_START.unpack(part)
        self._left_bytes -= _CHUNK_START.size + payload_bytes
        if self._left_bytes < 0:
            allowed = max(0, self._left_bytes + payload_bytes)
            raise ArtifactError(
                f"chunk {self._chunk_number} of the .ecdc is {payload_bytes} bytes, allowed are {allowed} more"
            )
        if self._chunk_number == MAX_CHUNKS:
            raise ArtifactError(f"the .ecdc has more chunks than the {MAX_CHUNKS} that are allowed")
        return payload_bytes, crc


def layout_of(header: PackedEcdcHeader, bundle: EcdcBundle) -> PackedLayout:
    """Raise ArtifactError unless the file is one of the bundle's, and of a size that is allowed."""
    for what, found, allowed in (
        ("model (m)", header.model_name, bundle.model_name),
        ("number of codes in a frame (nc)", header.quantizers, bundle.quantizers),
        ("language model (lmh)", header.lm_sha256, bundle.weights.sha256),
    ):
        if found != allowed:
            raise ArtifactError(
                f"the .ecdc's {what} is {found}, the bundle's is {allowed}: it takes the bundle it was made with"
            )
    chunk_samples = header.maybe_chunk_samples or bundle.segment_samples
    stride = header.maybe_stride or bundle.segment_stride
    context_samples = 0
    if header.maybe_chunk_samples is None and header.maybe_stride is None and stride in CONTEXT_STRIDES:
        context_samples = CONTEXT_SAMPLES
        if chunk_samples != stride + 2 * CONTEXT_SAMPLES or header.maybe_chunk_frames != bundle.frame_length:
            raise ArtifactError(
                f"the bundle's segments are {chunk_samples} samples and the .ecdc's fl is "
                f"{shown(header.maybe_chunk_frames)}; without cs and cst, a stride of {stride} goes with "
                f"{stride + 2 * CONTEXT_SAMPLES} samples and fl {bundle.frame_length}"
            )
    if stride > chunk_samples:
        raise ArtifactError(
            f"the .ecdc's chunks start every {stride} samples (cst), allowed are their {chunk_samples} (cs)"
        )
    count = -(-header.original_samples // stride)
    if count > MAX_CHUNKS:
        raise ArtifactError(f"{header.original_samples} samples make {count} chunks, allowed are {MAX_CHUNKS}")
    most_frames = -(-chunk_samples * bundle.frame_length // bundle.segment_samples)
    if header.maybe_chunk_frames is not None and header.maybe_chunk_frames > most_frames:
        raise ArtifactError(
            f"the .ecdc's chunks have {header.maybe_chunk_frames} frames (fl), {chunk_samples} samples of this bundle "
            f"make up to {most_frames}"
        )
    layout = PackedLayout(header.original_samples, chunk_samples, stride, context_samples, chunk_frames=())
    frames = tuple(
        header.maybe_chunk_frames or -(-layout.samples_of(number) * bundle.frame_length // bundle.segment_samples)
        for number in range(count)
    )
    unpacked_bytes = sum(frames) * header.quantizers * BITS_PER_CODE // 8
    if unpacked_bytes > MAX_ARTIFACT_BYTES:
        raise ArtifactError(
            f"an .ecdc of {header.original_samples} samples has {sum(frames)} frames of {header.quantizers} codes, "
            f"{unpacked_bytes} bytes unpacked, allowed are {MAX_ARTIFACT_BYTES}"
        )
    return replace(layout, chunk_frames=frames)


def _unpack_chunk(
    header: PackedEcdcHeader, bundle: EcdcBundle, number: int, chunk: PackedChunk, frames: int
) -> EcdcSegment:
    if chunk.maybe_fault is not None:
        raise ArtifactError(chunk.maybe_fault)
    scale_bytes = ECDC_SCALE.size if bundle.is_scaled else 0
    most_bytes = scale_bytes + most_packed_bytes(frames * header.quantizers, header.smallest_share)
    try:
        if not scale_bytes < len(chunk.payload) <= most_bytes:
            raise ArtifactError(
                f"its payload is {len(chunk.payload)} bytes, {frames} frames take {scale_bytes + 1} to {most_bytes}"
            )
        maybe_scale = checked_scale(ECDC_SCALE.unpack_from(chunk.payload)[0], number) if scale_bytes else None
        tabulation = Tabulation(bundle.logit_step, header.temperature, header.counts, header.smallest_share)
        model, decoder = LanguageModel(bundle.weights), IntervalDecoder(chunk.payload[scale_bytes:])
        codes = np.zeros((frames, header.quantizers), np.uint16)
        symbols = np.zeros(header.quantizers, np.intp)
        for frame in range(frames):
            tables = tabulation.tables(model.step(symbols))
            codes[frame] = [decoder.pull(table) for table in tables]
            symbols = codes[frame].astype(np.intp) + 1
        decoder.finish()
    except ArtifactError as error:
        raise ArtifactError(f"chunk {number} of the .ecdc: {error}") from None
    return EcdcSegment(codes, maybe_scale)


# --- metadata ---------------------------------------------------------------------------------------------------------


def _parse_packed_metadata(metadata: bytes) -> PackedEcdcHeader:
    values = parse_ecdc_object(metadata)
    if type(values.get("acv")) is not int or values["acv"] != PACKED_ACV:
        found = shown(values["acv"]) if "acv" in values else "missing"
        raise ArtifactError(
            f"the .ecdc's acv is {found}, allowed is {PACKED_ACV}: other numbers stand for other coders of encodec-rs"
        )
    if values.get("lm") is not True:
        raise ArtifactError(f"the .ecdc's lm is {shown(values.get('lm'))}, with acv {PACKED_ACV} it is true")
    for key in ("m", "lmh"):
        if type(values.get(key)) is not str:
            raise ArtifactError(f"the .ecdc's {key} is {shown(values.get(key))}, allowed is text")
    if values["m"] not in ECDC_MODELS:
        raise ArtifactError(f"the .ecdc's model is {shown(values['m'])}, allowed are {' and '.join(ECDC_MODELS)}")
    if len(values["lmh"]) != 64 or set(values["lmh"]) - set("0123456789abcdef"):
        raise ArtifactError(f"the .ecdc's lmh is {shown(values['lmh'])}, allowed is a SHA-256 of 64 lower-case digits")
    temperature = values.get("tau", 1.0)
    least, most = TEMPERATURE_LIMITS
    if type(temperature) not in (int, float) or not least <= temperature <= most:
        raise ArtifactError(f"the .ecdc's tau is {shown(temperature)}, allowed are {least} to {most}")
    return PackedEcdcHeader(
        values["m"],
        _checked_count(values, "al", (1, LARGEST_COUNT)),
        _checked_count(values, "nc", (1, ECDC_MODELS[values["m"]].quantizers)),
        values["lmh"],
        _checked_count({"fp": Tabulation().counts, **values}, "fp", COUNTS_LIMITS),
        _checked_count({"mr": Tabulation().smallest_share, **values}, "mr", SMALLEST_SHARE_LIMITS),
        float(temperature),
        *(_checked_count(values, key, (1, LARGEST_COUNT)) if key in values else None for key in ("cs", "cst", "fl")),
    )


def _checked_count(values: dict[str, Any], key: str, limits: tuple[int, int], whose: str = "the .ecdc") -> int:
    """A whole number; True is none."""
    found = values.get(key)
    if type(found) is not int or not limits[0] <= found <= limits[1]:
        shown_value = shown(found) if key in values else "missing"
        raise ArtifactError(f"{whose}'s {key} is {shown_value}, allowed are {limits[0]} to {limits[1]}")
    return found


# --- bundles ----------------------------------------------------------------------------------------------------------


def load_ecdc_bundle(folder: Path) -> EcdcBundle:
    """Read a bundle's numbers and its language model; its graphs are not looked at."""
    path = folder / BUNDLE_FILE
    try:
        values = json.loads(_read_at_most(path, MAX_BUNDLE_JSON_BYTES))
        if not isinstance(values, dict):
            raise ArtifactError(f"it is {type(values).__name__}, allowed is an object")
        bundle = _parse_bundle(values, folder)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: no JSON ({error})") from None
    except ArtifactError as error:
        raise BundleError(f"{path}: {error}") from None
    return bundle


def _parse_bundle(values: dict[str, Any], folder: Path) -> EcdcBundle:
    whose = "the bundle"
    _checked_count(values, "schema_version", (1, 1), whose)
    if values.get("model_name") not in [*ECDC_MODELS]:
        allowed = " and ".join(ECDC_MODELS)
        raise ArtifactError(f"{whose}'s model_name is {shown(values.get('model_name'))}, allowed are {allowed}")
    model = ECDC_MODELS[values["model_name"]]
    if type(values.get("normalize")) is not bool:
        raise ArtifactError(f"{whose}'s normalize is {shown(values.get('normalize'))}, allowed is true or false")
    for key, wanted in (("sample_rate", model.sample_rate), ("channels", model.channels)):
        _checked_count(values, key, (wanted, wanted), whose)
    for key, wanted in (("bits_per_codebook", BITS_PER_CODE), ("codebook_cardinality", CODEBOOK_SIZE)):
        _checked_count({key: wanted, **values}, key, (wanted, wanted), whose)
    file_name = values.get("lm_quant_weight_model", LM_FILE)
    if type(file_name) is not str or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", file_name):
        found = shown(file_name)
        raise ArtifactError(
            f"{whose}'s lm_quant_weight_model is {found}, allowed is the plain name of a file beside it"
        )
    weights = parse_lm_weights(_read_at_most(folder / file_name, MAX_LM_BYTES))
    for key, count in (
        ("num_codebooks", weights.codebooks),
        ("lm_dim", weights.dim),
        ("lm_num_layers", len(weights.layers)),
        ("lm_past_context", weights.past_context),
    ):
        # What the bundle says of its language model is what the file says, or one of both is another bundle's.
        if key in values or key == "num_codebooks":
            _checked_count(values, key, (count, count), whose)
    return EcdcBundle(
        values["model_name"],
        _checked_count(values, "segment_samples", (1, LARGEST_COUNT), whose),
        _checked_count(values, "segment_stride", (1, LARGEST_COUNT), whose),
        _checked_count(values, "frame_length", (1, LARGEST_COUNT), whose),
        weights.codebooks,
        values["normalize"],
        max(_checked_step(values, "lm_logit_step", 1 / 64), _checked_step(values, "lm_entropy_logit_step", 2.1)),
        weights,
    )


def _checked_step(values: dict[str, Any], key: str, default: float) -> float:
    """As the writer has it, in float32."""
    step = values.get(key, default)
    if type(step) not in (int, float) or not 1e-6 <= step <= 1e6:
        raise ArtifactError(f"the bundle's {key} is {shown(step)}, allowed are 1e-06 to 1e+06")
    return float(np.float32(step))


def _read_at_most(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise BundleError(
            f"{path}: {error.strerror}; a bundle of encodec-rs is a folder with {BUNDLE_FILE} in it"
        ) from None
    if len(data) > max_bytes:
        raise BundleError(f"{path}: more than {max_bytes} bytes, which are allowed")
    return data
