"""tokens/artifact.py: right answers, or one error that names what is wrong, and no memory for what is not there."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.errors import ArtifactError
from mossnano_stdio.tokens import (
    FIELD_LIMITS,
    MAGIC,
    Artifact,
    ArtifactHeader,
    ArtifactReader,
    build_artifact,
    load_artifact,
    parse_artifact,
)
from mossnano_stdio.tokens.artifact import HEADER_BYTES
from tests.doubles import NANO

REAL_CODES = Path(__file__).parents[2] / "shared" / "data" / "real_codes.jsonl"
FIELDS = tuple(FIELD_LIMITS)

# 2 quantizers x 3 frames x 10 bits, written out by hand in [quantizer, frame] order: 1 2 3 | 1023 0 512.
# Bits from the lowest: 1000000000 0100000000 1100000000 1111111111 0000000000 0000000001, then 4 bits of padding.
HAND_CODES = [[1, 1023], [2, 0], [3, 512]]  # frame-major
HAND_ARTIFACT = bytes.fromhex(
    "4d4f53534e414e4f"  # MOSSNANO
    "80bb0000"  # sample_rate 48000
    "02000000"  # channels
    "10270000"  # original_samples 10000
    "02000000"  # quantizers
    "03000000"  # frames
    "00040000"  # codebook_size 1024
    "010830c0ff000008"
)


def artifact_of(codes: Any, **fields: int) -> Artifact:
    codes = np.asarray(codes)
    frames, quantizers = codes.shape
    facts = {"sample_rate": 48000, "channels": 2, "original_samples": frames * 3840, "codebook_size": 1024} | fields
    return Artifact(quantizers=quantizers, frames=frames, codes=codes, **facts)


def with_field(data: bytes, name: str, value: int) -> bytes:
    place = len(MAGIC) + 4 * FIELDS.index(name)
    return data[:place] + struct.pack("<I", value) + data[place + 4 :]


def facts_of(header: ArtifactHeader) -> dict[str, int]:
    return {name: getattr(header, name) for name in FIELDS}


def test_the_hand_written_artifact_both_ways() -> None:
    artifact = parse_artifact(HAND_ARTIFACT)
    assert facts_of(artifact) == dict(zip(FIELDS, (48000, 2, 10000, 2, 3, 1024), strict=True))
    assert artifact.codes.tolist() == HAND_CODES
    assert artifact.codes.dtype == np.uint16
    assert artifact.duration_seconds == 10000 / 48000
    assert artifact.file_bytes == len(HAND_ARTIFACT) == HEADER_BYTES + 8
    assert build_artifact(artifact) == HAND_ARTIFACT
    assert build_artifact(artifact_of(HAND_CODES, original_samples=10000)) == HAND_ARTIFACT


class NoisyFile(io.BytesIO):
    """Counts what is read of it."""

    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.read_bytes += len(data)
        return data


def test_a_file_is_read_no_further_than_its_header_allows() -> None:
    assert load_artifact(io.BytesIO(HAND_ARTIFACT), "x").codes.tolist() == HAND_CODES
    for data in (b"no artifact, but long", HAND_ARTIFACT):
        file = NoisyFile(data + bytes(10 << 20))
        with pytest.raises(ArtifactError, match=r"^x\.mossnano: "):
            load_artifact(file, "x.mossnano")
        assert file.read_bytes <= 1 << 16
    with pytest.raises(ArtifactError, match=r"^x: the artifact is cut: 39 of 40"):
        load_artifact(io.BytesIO(HAND_ARTIFACT[:-1]), "x")


@given(st.data())
def test_what_is_built_is_parsed_again_however_it_comes(data: st.DataObject) -> None:
    codebook_size = data.draw(st.integers(2, 65536))
    frames, quantizers = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    row = st.lists(st.integers(0, codebook_size - 1), min_size=quantizers, max_size=quantizers)
    codes = np.array(data.draw(st.lists(row, min_size=frames, max_size=frames)), dtype=np.uint16)
    artifact = artifact_of(
        codes.reshape(frames, quantizers),
        sample_rate=data.draw(st.integers(1, 2**32 - 1)),
        channels=data.draw(st.integers(1, 2**32 - 1)),
        original_samples=data.draw(st.integers(0, 2**32 - 1)),
        codebook_size=codebook_size,
    )
    built = build_artifact(artifact)
    reader = ArtifactReader()
    rest = built
    while rest:
        piece_bytes = data.draw(st.integers(1, len(rest)))
        missing_bytes = reader.push(rest[:piece_bytes])
        rest = rest[piece_bytes:]
        assert missing_bytes == reader.missing_bytes
        if reader.maybe_header is not None:
            assert missing_bytes == len(rest)
        else:
            assert 0 < missing_bytes <= len(rest)
    for parsed in (reader.artifact(), parse_artifact(built), parse_artifact(memoryview(bytearray(built)))):
        assert facts_of(parsed) == facts_of(artifact)
        assert np.array_equal(parsed.codes, artifact.codes)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("edge", [0, 1, "right - 1", "right", "right + 1", 2**31 - 1, 2**31, 2**32 - 1])
def test_every_header_field_at_every_edge(name: str, edge: int | str) -> None:
    right: int = getattr(parse_artifact(HAND_ARTIFACT), name)
    number = edge if isinstance(edge, int) else right + {"right - 1": -1, "right": 0, "right + 1": 1}[edge]
    data = with_field(HAND_ARTIFACT, name, number)
    facts = facts_of(parse_artifact(HAND_ARTIFACT)) | {name: number}
    tracemalloc.start()
    try:
        outcome = outcome_of(data)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()
    assert outcome == expected_outcome(facts)
    assert all(outcome_in_pieces(data, piece_bytes) == outcome for piece_bytes in (1, 7, 32, 33))


def expected_outcome(facts: dict[str, int]) -> str:
    """The oracle: what must be said of HAND_ARTIFACT with these fields, written without a look at the module."""
    limits = {"codebook_size": (2, 65536), "original_samples": (0, 2**32 - 1), "frames": (0, 2**32 - 1)}
    for name, value in facts.items():
        least, most = limits.get(name, (1, 2**32 - 1))
        if not least <= value <= most:
            return f"the artifact's {name} is {value}, allowed are {least} to {most}"
    bits = next(bits for bits in range(1, 17) if 2**bits >= facts["codebook_size"])
    body_bytes = -(-facts["quantizers"] * facts["frames"] * bits // 8)
    if 32 + body_bytes > 32 << 20:
        return (
            f"an artifact of {facts['quantizers']} quantizers x {facts['frames']} frames x {bits} bits "
            f"is {32 + body_bytes} bytes, allowed are {32 << 20}"
        )
    if body_bytes < 8:
        return f"there are bytes beyond the artifact's end: by its header it has {32 + body_bytes} bytes"
    if body_bytes > 8:
        return f"the artifact is cut: 40 of {32 + body_bytes} bytes are there"
    if facts["codebook_size"] < 1024:
        return (
            f"code 1 of frame 0 is 1023, allowed are 0 to {facts['codebook_size'] - 1} "
            f"(the artifact's codebook_size is {facts['codebook_size']})"
        )
    return "parsed"


def outcome_of(data: bytes) -> str:
    try:
        parse_artifact(data)
    except ArtifactError as error:
        return str(error)
    return "parsed"


def outcome_in_pieces(data: bytes, piece_bytes: int) -> str:
    reader = ArtifactReader()
    try:
        for start in range(0, len(data), piece_bytes):
            reader.push(data[start : start + piece_bytes])
        reader.artifact()
    except ArtifactError as error:
        return str(error)
    return "parsed"


@pytest.mark.parametrize("length", range(len(HAND_ARTIFACT)))
def test_truncation_at_every_byte(length: int) -> None:
    reader = ArtifactReader()
    missing_bytes = reader.push(HAND_ARTIFACT[:length])
    assert missing_bytes == (HEADER_BYTES - length if length < HEADER_BYTES else len(HAND_ARTIFACT) - length)
    inside = f" inside its header: {length} of 32" if length < HEADER_BYTES else f": {length} of 40"
    with pytest.raises(ArtifactError, match=f"^the artifact is cut{inside} bytes are there$"):
        reader.artifact()
    assert outcome_in_pieces(HAND_ARTIFACT[:length], 1) == outcome_of(HAND_ARTIFACT[:length])
    reader.push(HAND_ARTIFACT[length:])
    assert reader.artifact().codes.tolist() == HAND_CODES


@pytest.mark.parametrize("more", [1, 1000])
def test_bytes_beyond_the_end(more: int) -> None:
    expected = "there are bytes beyond the artifact's end: by its header it has 40 bytes"
    assert outcome_of(HAND_ARTIFACT + bytes(more)) == expected
    reader = ArtifactReader()
    assert reader.push(HAND_ARTIFACT) == 0
    assert reader.push(b"") == 0
    with pytest.raises(ArtifactError, match=expected):
        reader.push(bytes(more))


@pytest.mark.parametrize("place", range(len(MAGIC)))
def test_every_byte_of_the_magic_counts(place: int) -> None:
    data = bytearray(HAND_ARTIFACT)
    data[place] ^= 0x20
    expected = f"the first bytes are {bytes(data[:8])!r}, allowed is b'MOSSNANO': this is no .mossnano artifact"
    assert outcome_of(bytes(data)) == expected
    assert outcome_in_pieces(bytes(data), 1) == expected
    assert outcome_of(bytes(data[: place + 1])).startswith(f"the first bytes are {bytes(data[: place + 1])!r}")


def test_a_header_is_judged_before_its_body_comes() -> None:
    bad_header = with_field(HAND_ARTIFACT, "codebook_size", 1)[:HEADER_BYTES]
    reader = ArtifactReader()
    assert reader.push(bad_header[:-1]) == 1
    for last in (bad_header[-1:], b"", b"more"):  # and it stays bad
        with pytest.raises(ArtifactError, match="codebook_size is 1, allowed are 2 to 65536"):
            reader.push(last)
        assert reader.maybe_header is None
    reader = ArtifactReader()
    reader.push(HAND_ARTIFACT[:HEADER_BYTES])
    assert isinstance(reader.maybe_header, ArtifactHeader)
    assert reader.maybe_header.body_bytes == 8


@pytest.mark.parametrize("bit", range(4, 8))
def test_padding_must_be_zero(bit: int) -> None:
    data = bytearray(HAND_ARTIFACT)
    data[-1] |= 1 << bit
    assert outcome_of(bytes(data)).startswith("the artifact's body: the 4 padding bits after the last code are 0x")


def test_the_size_is_capped_before_the_body_comes() -> None:
    with pytest.raises(ArtifactError, match="is 40 bytes, allowed are 39"):
        ArtifactReader(max_bytes=39).push(HAND_ARTIFACT[:32])
    assert ArtifactReader(max_bytes=40).push(HAND_ARTIFACT) == 0
    with pytest.raises(ArtifactError, match="is 40 bytes, allowed are 39"):
        build_artifact(artifact_of(HAND_CODES), max_bytes=39)
    too_long = with_field(HAND_ARTIFACT, "frames", 2**31)
    assert "is 5368709152 bytes, allowed are 33554432" in outcome_of(too_long)


def test_the_largest_artifact_takes_no_more_than_its_bytes_and_codes() -> None:
    frames = ((32 << 20) - HEADER_BYTES) * 8 // 160
    data = HAND_ARTIFACT[:20] + struct.pack("<3I", 16, frames, 1024) + bytes(frames * 20)
    tracemalloc.start()
    try:
        artifact = parse_artifact(data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert artifact.codes.shape == (frames, 16)
    assert peak_bytes < len(data) * 1.15 + artifact.codes.size * 2 + (2 << 20)


def test_an_artifact_of_no_frames_is_legal() -> None:
    empty = artifact_of(np.empty((0, 16), dtype=np.uint16))
    data = build_artifact(empty)
    assert len(data) == HEADER_BYTES
    assert parse_artifact(data).codes.shape == (0, 16)
    assert parse_artifact(with_field(data, "quantizers", 2**32 - 1)).codes.shape == (0, 2**32 - 1)


@pytest.mark.parametrize(
    ("codes", "fields", "words"),
    [
        ([[0, 1024]], {}, "code 1 of frame 0 is 1024, allowed are 0 to 1023"),
        ([[0, 0], [-1, 0]], {}, "code 0 of frame 1 is -1, allowed are 0 to 1023"),
        ([[0, 65536]], {"codebook_size": 65536}, "code 1 of frame 0 is 65536"),
        ([[0.5]], {}, r"codes are float64 \[1, 1\], allowed are integers \[1, 1\]"),
        ([[0]], {"codebook_size": 65537}, "codebook_size is 65537, allowed are 2 to 65536"),
        ([[0]], {"original_samples": 2**32}, "original_samples is 4294967296"),
        ([[0]], {"sample_rate": -1}, "sample_rate is -1, allowed are 1 to 4294967295"),
    ],
)
def test_what_could_not_be_parsed_is_not_built(codes: Any, fields: dict[str, int], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        build_artifact(artifact_of(codes, **fields))


def test_artifacts_with_equal_headers_are_not_taken_for_equal() -> None:
    assert artifact_of([[1]]) != artifact_of([[2]])


def test_codes_have_the_shape_that_the_header_says() -> None:
    with pytest.raises(ArtifactError, match=r"uint16 \[2, 3\], allowed are integers \[3, 2\]"):
        Artifact(48000, 2, 0, quantizers=2, frames=3, codebook_size=4, codes=np.zeros((2, 3), dtype=np.uint16))


def nano_header(**fields: int) -> ArtifactHeader:
    right = ArtifactHeader(48000, 2, 10 * 3840, quantizers=16, frames=10, codebook_size=1024)
    return dataclasses.replace(right, **fields)


@pytest.mark.parametrize(
    ("fields", "prefix_allowed"),
    [
        ({}, False),
        ({}, True),
        ({"original_samples": 0}, False),
        ({"quantizers": 1}, True),
        ({"quantizers": 15}, True),
        ({"frames": 0, "original_samples": 0}, False),
    ],
)
def test_what_fits_the_weights(fields: dict[str, int], prefix_allowed: bool) -> None:
    nano_header(**fields).check_fits(NANO, prefix_allowed)


@pytest.mark.parametrize(
    ("fields", "prefix_allowed", "found", "needed"),
    [
        ({"sample_rate": 24000}, True, "sample_rate is 24000", "48000 only"),
        ({"channels": 1}, True, "channels is 1", "2 only"),
        ({"codebook_size": 1025}, True, "codebook_size is 1025", "1024 only"),
        ({"quantizers": 8}, False, "quantizers are 8", "16 only"),
        ({"quantizers": 17}, True, "quantizers are 17", "1 to 16"),
        ({"quantizers": 17}, False, "quantizers are 17", "16 only"),
        ({"original_samples": 38401}, True, "original_samples are 38401", "10 frames of 3840 samples hold 38400 only"),
        ({"frames": 0, "original_samples": 1}, True, "original_samples are 1", "hold 0 only"),
    ],
)
def test_what_does_not_fit_names_both_values(
    fields: dict[str, int], prefix_allowed: bool, found: str, needed: str
) -> None:
    with pytest.raises(ArtifactError) as caught:
        nano_header(**fields).check_fits(NANO, prefix_allowed)
    assert found in str(caught.value)
    assert needed in str(caught.value)


@pytest.mark.skipif(not REAL_CODES.exists(), reason="the real codes are not here")
def test_real_codes_come_back() -> None:
    lines = REAL_CODES.read_text("utf-8").splitlines()
    assert len(lines) == 10
    for line in lines:
        codes = json.loads(line)["audio_codes"]
        built = build_artifact(artifact_of(codes))
        assert len(built) == HEADER_BYTES + 20 * len(codes)
        assert parse_artifact(built).codes.tolist() == codes
