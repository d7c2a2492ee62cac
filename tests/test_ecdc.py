"""tokens/ecdc.py and the tools that read it: files of EnCodec's own tool, byte for byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.errors import ArtifactError, ExitStatus
from mossnano_stdio.tokens import Codes
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcHeader, EcdcReader, EcdcSegment, build_ecdc, load_ecdc
from tests.tool import call_tool

REFERENCE = Path(__file__).parent / "reference" / "encodec"
NAMES_48K = ("one", "few", "stride", "second", "tail100", "long", "long3k", "silence")
NAMES_24K = ("v60", "v1501")
SMALL = {"m": "encodec_24khz", "al": 320, "nc": 2, "lm": False}
SMALL_BODY = bytes([1, 8, 0])  # codes 1 and 2


def path_of(name: str) -> Path:
    return REFERENCE / (f"{name}.raw.ecdc" if name in NAMES_48K else f"{name}.raw.24k.ecdc")


def loaded(name: str) -> Ecdc:
    with path_of(name).open("rb") as file:
        return load_ecdc(file, name)


def golden(key: str) -> Any:
    with np.load(REFERENCE / "ecdc.npz") as goldens:
        return goldens[key]


def file_of(metadata: object, body: bytes = SMALL_BODY) -> bytes:
    text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    return b"ECDC" + struct.pack(">BI", 0, len(text)) + text + body


def read_whole(data: bytes, max_bytes: int = 1000) -> Ecdc:
    reader = EcdcReader(max_bytes)
    segments = [*reader.push(data)]
    return Ecdc(reader.finish(), segments)


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES_48K, *NAMES_24K])
def test_codes_and_scales_are_those_that_were_written(name: str) -> None:
    ecdc = loaded(name)
    assert np.array_equal(ecdc.codes, golden(f"{name}.codes").T)
    scales = [segment.maybe_scale for segment in ecdc.segments]
    assert scales == (golden(f"{name}.scales").tolist() if name in NAMES_48K else [None])


@pytest.mark.parametrize("name", [*NAMES_48K, *NAMES_24K])
def test_files_write_back_byte_for_byte(name: str) -> None:
    assert build_ecdc(loaded(name)) == path_of(name).read_bytes()


@pytest.mark.parametrize(
    ("name", "frames"), [("one", [1]), ("second", [150, 2]), ("tail100", [149, 1]), ("long", [150, 150, 21])]
)
def test_segments_follow_from_the_samples(name: str, frames: list[int]) -> None:
    assert [len(segment.codes) for segment in loaded(name).segments] == frames


@pytest.mark.parametrize("piece_bytes", [1, 7, 400])
def test_segments_come_as_soon_as_they_are_whole(piece_bytes: int) -> None:
    """And no more is held than the one that is on its way."""
    data = path_of("long").read_bytes()
    reader, come = EcdcReader(), []
    for start in range(0, len(data), piece_bytes):
        segments = [*reader.push(data[start : start + piece_bytes])]
        come += [min(start + piece_bytes, len(data))] * len(segments)
        assert len(reader._received) < 4 + 750
    ends = [len(data) - 2 * 754 + 754 - 109, len(data) - 109, len(data)]  # 21 frames: 4 + 105 bytes
    assert come == [min(-(-end // piece_bytes) * piece_bytes, len(data)) for end in ends]
    assert reader.finish().frames == 321


@given(st.integers(1, 200_000), st.integers(1, 16), st.randoms(use_true_random=False))
def test_whatever_is_written_is_read(samples: int, quantizers: int, chance: Any) -> None:
    header = EcdcHeader("encodec_48khz", samples, quantizers)
    random = np.random.default_rng(chance.randrange(1 << 30))
    segments = [
        EcdcSegment(
            random.integers(0, 1024, (frames, quantizers)).astype(np.uint16), float(np.float32(random.normal()))
        )
        for frames in header.segment_frames
    ]
    data = build_ecdc(Ecdc(header, segments))
    back = read_whole(data, max_bytes=1 << 20)
    assert back.header == header
    assert np.array_equal(back.codes, np.concatenate([segment.codes for segment in segments]))
    assert [segment.maybe_scale for segment in back.segments] == [segment.maybe_scale for segment in segments]


# --- what is refused ----------------------------------------------------------------------------------------------

FIRST_48K = {"m": "encodec_48khz", "al": 1, "nc": 1, "lm": False}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut inside its header: 9 bytes are missing"),
        (b"ECD", "cut inside its header: 6 bytes are missing"),
        (b"RIFF" + bytes(40), "this is no .ecdc"),
        (b"RIF", "this is no .ecdc"),
        (b"ECDC\x01" + bytes(40), "version is 1, allowed is 0"),
        (b"ECDC\0\x7f\xff\xff\xff", "metadata are 2147483647 bytes, allowed are 65536"),
        (file_of(SMALL)[:20], "cut inside its header: "),
        (file_of(b"{"), "metadata are no JSON"),
        (file_of(b"\xff{}"), "metadata are no JSON"),
        (file_of(b"[" * 60_000), "metadata are no JSON"),
        (file_of([1]), "metadata are list, allowed is an object"),
        (file_of({**SMALL, "m": "encodec_32khz"}), "model is 'encodec_32khz', allowed are encodec_24khz and"),
        (file_of({**SMALL, "m": 24}), "m is 24, allowed is str"),
        (file_of({"m": "encodec_24khz"}), "al is missing, allowed is int"),
        (file_of({**SMALL, "al": True}), "al is true, allowed is int"),
        (file_of({**SMALL, "al": 320.0}), "al is 320.0, allowed is int"),
        (file_of({**SMALL, "al": 0}), "samples .al. are 0, allowed is 1 or more"),
        (file_of({**SMALL, "nc": 0}), r"nc. are 0, encodec_24khz has 1 to 32"),
        (file_of({**SMALL, "nc": 33}), r"nc. are 33, encodec_24khz has 1 to 32"),
        (file_of({**FIRST_48K, "nc": 17}), r"nc. are 17, encodec_48khz has 1 to 16"),
        (file_of({**SMALL, "lm": 0}), "lm is 0, allowed is bool"),
        (file_of({**SMALL, "lm": True}), "lm is true: a language model packed its codes"),
        (file_of({**SMALL, "acv": 2}), "acv is 2: encodec-rs packed"),
        (file_of({**SMALL, "acv": 0}), "acv is 0: encodec-rs packed"),
        (file_of({**SMALL, "cs": 64_000}), 'metadata have "cs", allowed are m, al, nc, lm only'),
        (file_of({**SMALL, "al": 320 * 500}), "samples with 2 codes a frame is .* allowed are 1000"),
        (file_of({**SMALL, "al": 10**300}), "allowed are 1000"),
        (file_of({**FIRST_48K, "al": 10**300}), "allowed are 1000"),
        (file_of(SMALL, SMALL_BODY[:2]), "cut inside segment 0: 1 bytes are missing"),
        (file_of(SMALL, SMALL_BODY + b"\0"), "bytes beyond the .ecdc's last segment"),
        (file_of(SMALL, b"\1\x08\xf0"), "segment 0 of the .ecdc: "),
        (file_of(FIRST_48K, struct.pack(">f", float("nan")) + bytes(2)), "scale of segment 0 is nan"),
        (file_of(FIRST_48K, struct.pack(">f", float("-inf")) + bytes(2)), "scale of segment 0 is -inf"),
    ],
)  # fmt: skip
def test_files_that_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        read_whole(data)
    with pytest.raises(ArtifactError, match=said):
        reader = EcdcReader(1000)
        for byte in data:
            list(reader.push(bytes([byte])))
        reader.finish()


def test_the_longest_file() -> None:
    data = file_of(FIRST_48K, struct.pack(">f", 0.5) + bytes(2))
    assert read_whole(data, max_bytes=6).codes.tolist() == [[0]]
    with pytest.raises(ArtifactError, match="allowed are 5"):
        read_whole(data, max_bytes=5)


@pytest.mark.parametrize("name", ["few.lm.ecdc", "acv2.fixed.ecdc"])
def test_codes_that_a_language_model_packed(name: str) -> None:
    outcome = call_tool("unpack", REFERENCE / name, "-", "--form", "json")
    assert (outcome.status, outcome.out) == (ExitStatus.BAD_INPUT, b"")
    assert "language model" in outcome.err


SEGMENT = EcdcSegment(np.ones((1, 2), np.uint16), maybe_scale=0.5)
CODES_OF_ANOTHER_SHAPE: Codes = np.ones((2, 2), np.uint16)


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ([], "there are 0 segments, 320 samples make 1"),
        ([EcdcSegment(CODES_OF_ANOTHER_SHAPE, 0.5)], r"segment 0 is uint16 \[2, 2\], allowed are integers \[1, 2\]"),
        ([EcdcSegment(np.full((1, 2), 1024, np.uint16), 0.5)], "code 0 of frame 0 is 1024, allowed are 0 to 1023"),
        ([EcdcSegment(SEGMENT.codes, None)], "scale of segment 0 is None"),
    ],
)
def test_what_is_not_written(segments: list[EcdcSegment], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        build_ecdc(Ecdc(EcdcHeader("encodec_48khz", 320, 2), segments))


# --- tools --------------------------------------------------------------------------------------------------------


def test_info() -> None:
    facts = json.loads(call_tool("info", path_of("long"), "--json").out)
    assert (facts["kind"], facts["model"], facts["sample_rate"], facts["channels"]) == (
        "ecdc",
        "encodec_48khz",
        48000,
        2,
    )
    assert (facts["original_samples"], facts["quantizers"], facts["segments"], facts["frames"]) == (101_567, 4, 3, 321)
    assert facts["payload_bytes"] == 2 * 754 + 109
    scales = golden("long.scales").tolist()
    assert facts["scales"] == {"least": min(scales), "most": max(scales)}
    assert facts["codes"]["most"] == golden("long.codes").max()
    assert "scales" not in json.loads(call_tool("info", path_of("v60"), "--json").out)


@pytest.mark.parametrize("name", ["v60", "long"])
@pytest.mark.parametrize("given", [lambda path: (path, b""), lambda path: ("-", path.read_bytes())])
def test_unpack(name: str, given: Callable[[Path], tuple[str | Path, bytes]], tmp_path: Path) -> None:
    source, stdin = given(path_of(name))
    assert call_tool("unpack", source, tmp_path / "codes.npy", stdin=stdin).status == 0
    assert np.array_equal(np.load(tmp_path / "codes.npy"), golden(f"{name}.codes").T)


@pytest.mark.parametrize(("name", "samples"), [("v60", 60_000), ("v1501", 1501)])
def test_unpack_and_pack_give_the_file_again(name: str, samples: int, tmp_path: Path) -> None:
    plain, back = tmp_path / "codes.npy", tmp_path / "back.ecdc"
    call_tool("unpack", path_of(name), plain)
    assert call_tool("pack", plain, back, "--original-samples", samples).status == 0
    assert back.read_bytes() == path_of(name).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nano"], "--model is fixed in an .ecdc of encodec_24khz"),
        (["--codebook-size", "1024"], "--codebook-size is fixed"),
        (["--original-samples", "1"], "segment 0 is uint16 [5, 2], allowed are integers [1, 2]"),
    ],
)
def test_pack_refuses(options: list[str], said: str, tmp_path: Path) -> None:
    call_tool("unpack", path_of("v1501"), tmp_path / "codes.npy")
    outcome = call_tool("pack", tmp_path / "codes.npy", tmp_path / "out.ecdc", *options)
    assert outcome.status in (ExitStatus.USAGE, ExitStatus.BAD_INPUT)
    assert said in outcome.err
    assert not (tmp_path / "out.ecdc").exists()
