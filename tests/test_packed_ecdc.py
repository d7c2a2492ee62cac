"""tokens/packed_ecdc.py, interval_coder.py and language_model.py: files that encodec-rs wrote, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mossnano_stdio import codecs
from mossnano_stdio.codecs.encodec import EncodecDecoder
from mossnano_stdio.errors import ArtifactError, BundleError, ExitStatus
from mossnano_stdio.tokens import Codes
from mossnano_stdio.tokens import packed_ecdc as room
from mossnano_stdio.tokens.ecdc import EcdcSegment
from mossnano_stdio.tokens.interval_coder import IntervalDecoder, Tabulation, most_packed_bytes
from mossnano_stdio.tokens.language_model import LanguageModel, parse_lm_weights, sum_in_order
from mossnano_stdio.tokens.packed_ecdc import (
    EcdcBundle,
    LostChunk,
    PackedEcdc,
    PackedEcdcReader,
    layout_of,
    load_ecdc_bundle,
    load_packed_ecdc,
)
from mossnano_stdio.weights import load_bundle
from tests.packed_writer import IntervalEncoder, bundle_values, lm_file, metadata_of, packed_file, packed_payload
from tests.tool import call_tool

REFERENCE = Path(__file__).parent / "reference" / "encodec"
FILES = {"dynamic": REFERENCE / "acv2" / "dynamic.ecdc", "fixed": REFERENCE / "acv2.fixed.ecdc"}
LM = lm_file()
WEIGHTS = parse_lm_weights(LM)
CHUNKS: list[Codes] = [np.array(codes, np.uint16) for codes in ([[1, 2], [1023, 0]], [[5, 6], [7, 8]], [[9, 9]])]
SAMPLES = 1300  # chunks at 0, 600 and 1200, the last one of a single frame
PAYLOADS = [packed_payload(WEIGHTS, codes, maybe_scale=scale) for codes, scale in zip(CHUNKS, (0.5, 1, 2), strict=True)]
METADATA = metadata_of(LM, SAMPLES)
SMALL = packed_file(METADATA, PAYLOADS)
BODY_START = len(packed_file(METADATA, []))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the two golden files, as folders."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FILES}
    for name, folder in folders.items():
        shutil.copy(REFERENCE / "acv2" / f"{name}.bundle.json", folder / "bundle.json")
        shutil.copy(REFERENCE / "acv2" / "lm_weights_q8.bin", folder)
    return folders


def bundle_in(folder: Path, lm: bytes = LM, **changed: Any) -> EcdcBundle:
    (folder / "lm.bin").write_bytes(lm)
    (folder / "bundle.json").write_text(json.dumps(bundle_values(**changed)))
    return load_ecdc_bundle(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> EcdcBundle:
    return bundle_in(tmp_path_factory.mktemp("small"))


def loaded(data: bytes, bundle: EcdcBundle, *, salvage: bool = False) -> PackedEcdc:
    return load_packed_ecdc(BytesIO(data), "x.ecdc", bundle, salvage=salvage)


def unpacked(data: bytes, bundle: EcdcBundle) -> list[Any]:
    return [segment.codes.tolist() for segment in loaded(data, bundle).segments() if isinstance(segment, EcdcSegment)]


def with_metadata(**changed: Any) -> bytes:
    return packed_file({**METADATA, **changed}, PAYLOADS)


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_codes_and_scales_are_those_that_encodec_rs_packed(name: str, bundles: dict[str, Path]) -> None:
    ecdc = loaded(FILES[name].read_bytes(), load_ecdc_bundle(bundles[name]))
    segments = [*ecdc.segments()]
    with np.load(REFERENCE / "acv2" / f"{name}.npz") as golden:
        assert ecdc.header.original_samples == golden["audio_length"]
        assert len(segments) == len(golden["codes"]) == 3
        for segment, codes, scale in zip(segments, golden["codes"], golden["scales"], strict=True):
            assert isinstance(segment, EcdcSegment)
            assert segment.maybe_scale == scale
            assert np.array_equal(segment.codes, codes[:, : len(segment.codes)].T)
    frames = {"dynamic": (150, 150, 78), "fixed": (200, 200, 200)}
    assert ecdc.layout.chunk_frames == frames[name]
    assert tuple(len(segment.codes) for segment in segments if isinstance(segment, EcdcSegment)) == frames[name]
    assert ecdc.layout.context_samples == 0


def test_packing_gives_the_bytes_that_encodec_rs_wrote(bundles: dict[str, Path]) -> None:
    """So the writer of these tests is no other coder than the one that is read."""
    ecdc = loaded(FILES["dynamic"].read_bytes(), load_ecdc_bundle(bundles["dynamic"]))
    *_, segment = ecdc.segments()
    assert isinstance(segment, EcdcSegment)
    packed = packed_payload(ecdc.bundle.weights, segment.codes, maybe_scale=segment.maybe_scale)
    assert packed == ecdc.chunks[-1].payload


# --- the language model -------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 20), st.sampled_from([np.float32, np.float64]))
def test_sums_are_taken_in_order(rows: int, columns: int, dtype: type) -> None:
    values: Any = (np.random.default_rng(rows).standard_normal((rows, columns)) * 10).astype(dtype)
    in_order = values[0].copy()
    for row in values[1:]:
        in_order = in_order + row
    assert np.array_equal(sum_in_order(values), in_order)


def plain_product(rows: Any, scales: Any, bias: Any, x: Any) -> Any:
    """As encodec-rs does it, with whole numbers of any size and one row after the other."""
    scale = np.float32(np.abs(x).max() / np.float32(32767))
    inverse = np.float32(1) / scale
    whole = [int(math.copysign(math.floor(abs(float(value * inverse)) + 0.5), value)) for value in x]
    sums = [sum(int(a) * b for a, b in zip(row, whole, strict=True)) for row in rows]
    return np.array(
        [b + np.float32(total) * scale * s for total, s, b in zip(sums, scales, bias, strict=True)], np.float32
    )


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_products_in_halves_are_exact(seed: int) -> None:
    from mossnano_stdio.tokens.language_model import Matrix, _product

    chance = np.random.default_rng(seed)
    rows = chance.choice([-128, -127, 127, int(chance.integers(-127, 128))], (6, 1024))  # the largest there may be
    scales, bias = chance.standard_normal((2, 6)).astype(np.float32)
    x = (chance.choice([-1, 1], 1024) * chance.choice([1, chance.random()], 1024)).astype(np.float32)
    columns = np.ascontiguousarray(rows.reshape(2, 3, 1024).transpose(0, 2, 1).astype(np.float32))
    assert np.array_equal(_product(Matrix(columns, scales, bias), x), plain_product(rows, scales, bias, x))


def test_the_model_starts_anew_behind_its_last_position() -> None:
    symbols = np.array([3, 4])
    model, fresh = LanguageModel(WEIGHTS), LanguageModel(WEIGHTS)
    first = fresh.step(np.zeros(2, np.intp))
    assert not np.array_equal(model.step(np.zeros(2, np.intp)), model.step(symbols))
    for _ in range(len(WEIGHTS.positions) - 2):
        model.step(symbols)
    assert np.array_equal(model.step(symbols), first)
    assert np.array_equal(model.step(symbols), fresh.step(symbols))


def test_the_model_forgets_what_lies_before_its_past_context() -> None:
    """One layer: what a frame was counts as long as it is looked at."""

    def last_of(first: int, frames: int) -> Any:
        model = LanguageModel(WEIGHTS)
        model.step(np.array([first, first]))
        return [model.step(np.array([2, 2])) for _ in range(frames)][-1]

    assert WEIGHTS.past_context == 3
    assert not np.array_equal(last_of(0, 3), last_of(9, 3))
    assert np.array_equal(last_of(0, 4), last_of(9, 4))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "a language model of 0 bytes begins with b''"),
        (b"ELMQ0002" + LM[8:], "begins with b'ELMQ0002'"),
        (LM[:35], "of 35 bytes"),
        (LM[:-1], f"is {len(LM) - 1} bytes, its numbers make it {len(LM)}"),
        (LM + b"\0", f"is {len(LM) + 1} bytes"),
        (lm_file(heads=1)[:16] + struct.pack("<I", 3) + lm_file(heads=1)[20:], "dim is 4, allowed are multiples of"),
        (LM[:36] + struct.pack("<f", math.nan) + LM[40:], "a weight that is not finite"),
        *(
            (LM[:at] + struct.pack("<I", value) + LM[at + 4 :], f"{name} is {value}, allowed are")
            for at, name, values in (
                (8, "dim", (0, 257)),
                (12, "layers", (0, 17)),
                (16, "heads", (0, 257)),
                (20, "codebooks", (0, 33)),
                (24, "cardinality", (1023, 1025)),
                (28, "positions", (0, 1025)),
                (32, "past_context", (0, 65_537)),
            )
            for value in values
        ),
    ],
)
def test_no_language_model(data: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(said)):
        parse_lm_weights(data)


def test_weights_that_overflow() -> None:
    at = 36 + 2 * 16 + 5 * 16  # the scales of the first matrix
    weights = parse_lm_weights(LM[:at] + struct.pack("<f", 3e38) * 12 + LM[at + 48 :])
    with np.errstate(all="ignore"), pytest.raises(ArtifactError, match="not real ones"):
        LanguageModel(weights).step(np.array([1, 2]))


# --- tables and the coder -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 9]), st.floats(0.01, 60), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_what_is_packed_unpacks(seed: int, smallest_share: int, spread: float, count: int) -> None:
    chance = np.random.default_rng(seed)
    logits = (chance.standard_normal((3, 1024)) * spread).astype(np.float32)
    tables = Tabulation(smallest_share=smallest_share).tables(logits)
    assert (tables[:, -1] == 1 << 24).all()
    assert np.diff(tables, prepend=0).min() >= smallest_share
    likeliest = np.argsort(logits[0])[::-1]
    codes = [
        int(chance.choice(likeliest[:3])) if chance.random() < 0.7 else int(chance.integers(1024)) for _ in range(count)
    ]
    encoder = IntervalEncoder()
    for number, code in enumerate(codes):
        encoder.push(code, tables[number % 3])
    packed = encoder.finish()
    assert len(packed) <= most_packed_bytes(count, smallest_share)
    decoder = IntervalDecoder(packed)
    assert [decoder.pull(tables[number % 3]) for number in range(count)] == codes
    decoder.finish()


def test_the_least_likely_codes_are_the_longest() -> None:
    logits = np.zeros((1, 1024), np.float32)
    logits[0, 0] = 1000
    (table,) = Tabulation(smallest_share=1).tables(logits)
    encoder = IntervalEncoder()
    for _ in range(1000):
        encoder.push(1023, table)
    assert most_packed_bytes(1000, 1) * 0.9 < len(encoder.finish()) <= most_packed_bytes(1000, 1)


def test_logits_that_say_nothing_give_a_flat_table() -> None:
    flat = list(range(1 << 14, (1 << 24) + 1, 1 << 14))
    almost = np.linspace(-2, 2, 1024, dtype=np.float32)[None]  # within two steps
    assert Tabulation().tables(np.zeros((2, 1024), np.float32)).tolist() == [flat, flat]
    assert Tabulation().tables(almost).tolist() == [flat]
    assert Tabulation(logit_step=0.1).tables(almost).tolist() != [flat]
    assert Tabulation(logit_step=0.1, counts=1).tables(almost).tolist() == [flat]  # all counts are 0


def test_padding_is_zero() -> None:
    (table,) = Tabulation().tables(np.zeros((1, 1024), np.float32))  # 10 bits a code, and 14 open ones at the end
    encoder = IntervalEncoder()
    for code in (700, 300):
        encoder.push(code, table)
    packed = encoder.finish()
    assert len(packed) == 5  # of 34 bits
    for bit in range(2, 8):
        decoder = IntervalDecoder(flipped(packed, 4, bit))
        assert [decoder.pull(table), decoder.pull(table)] == [700, 300]
        with pytest.raises(ArtifactError, match="6 bits are left over behind its codes, allowed are up to 7"):
            decoder.finish()


def test_more_bits_open_than_the_writer_holds() -> None:
    """A code on both sides of the middle decides no bit, however often it comes."""
    table = np.array([1 << 22, 3 << 22, 1 << 24])
    encoder = IntervalEncoder()
    for _ in range(60):
        encoder.push(1, table)
    decoder = IntervalDecoder(encoder.finish())
    assert [decoder.pull(table) for _ in range(39)] == [1] * 39
    with pytest.raises(ArtifactError, match="it holds 63 bits open, allowed are 62"):
        decoder.pull(table)


def test_logits_that_overflow() -> None:
    with pytest.raises(ArtifactError, match="logits overflow"):
        Tabulation().tables(np.full((1, 1024), np.inf, np.float32))


# --- files --------------------------------------------------------------------------------------------------------


def test_a_small_file(small: EcdcBundle) -> None:
    ecdc = loaded(SMALL, small)
    assert unpacked(SMALL, small) == [codes.tolist() for codes in CHUNKS]
    assert [s.maybe_scale for s in ecdc.segments() if isinstance(s, EcdcSegment)] == [0.5, 1, 2]
    assert ecdc.layout.chunk_frames == (2, 2, 1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_any_split_gives_the_same_chunks(sizes: list[int]) -> None:
    reader = PackedEcdcReader()
    payloads = []
    at = 0
    while at < len(SMALL):
        size = sizes[at % len(sizes)]
        payloads += [chunk.payload for chunk in reader.push(SMALL[at : at + size])]
        at += size
    assert payloads == PAYLOADS
    assert reader.finish().original_samples == SAMPLES


def test_numbers_of_the_file_are_used(small: EcdcBundle) -> None:
    tabulation = Tabulation(temperature=2.0, counts=100, smallest_share=5)
    payloads = [packed_payload(WEIGHTS, codes, tabulation) for codes in CHUNKS]
    assert payloads != PAYLOADS
    data = packed_file({**METADATA, "tau": 2, "fp": 100, "mr": 5, "unknown": [1]}, payloads)
    assert unpacked(data, small) == [codes.tolist() for codes in CHUNKS]
    without = {key: value for key, value in METADATA.items() if key not in ("tau", "fp", "mr")}
    assert unpacked(packed_file(without, PAYLOADS), small) == [codes.tolist() for codes in CHUNKS]


def test_the_larger_step_of_the_bundle_counts(tmp_path: Path) -> None:
    bundle = bundle_in(tmp_path, lm_logit_step=3.3, lm_entropy_logit_step=0.5)
    assert bundle.logit_step == float(np.float32(3.3))
    payloads = [packed_payload(WEIGHTS, codes, Tabulation(logit_step=bundle.logit_step)) for codes in CHUNKS]
    assert unpacked(packed_file(METADATA, payloads), bundle) == [codes.tolist() for codes in CHUNKS]


def test_a_model_that_does_not_scale(tmp_path: Path) -> None:
    bundle = bundle_in(tmp_path, model_name="encodec_24khz", sample_rate=24_000, channels=1, normalize=False)
    payloads = [packed_payload(WEIGHTS, codes, maybe_scale=None) for codes in CHUNKS]
    (*_, last) = loaded(packed_file({**METADATA, "m": "encodec_24khz"}, payloads), bundle).segments()
    assert isinstance(last, EcdcSegment)
    assert (last.codes.tolist(), last.maybe_scale) == ([[9, 9]], None)


def test_the_file_says_how_it_is_cut(small: EcdcBundle) -> None:
    codes = np.array([[4, 4], [5, 5], [6, 6]], np.uint16)
    data = packed_file({**METADATA, "cs": 900, "cst": 900, "fl": 3}, 2 * [packed_payload(WEIGHTS, codes)])
    ecdc = loaded(data, small)
    assert unpacked(data, small) == 2 * [codes.tolist()]
    assert (ecdc.layout.chunk_samples, ecdc.layout.stride, ecdc.layout.context_samples) == (900, 900, 0)


@pytest.mark.parametrize(("stride", "frames"), [(64_000, 203), (86_400, 273)])
def test_chunks_with_fixed_context(stride: int, frames: int, tmp_path: Path) -> None:
    bundle = bundle_in(tmp_path, segment_samples=stride + 960, segment_stride=stride, frame_length=frames)
    codes = np.zeros((frames, 2), np.uint16)
    metadata = metadata_of(LM, stride, fl=frames)
    data = packed_file(metadata, [packed_payload(WEIGHTS, codes)])
    assert unpacked(data, bundle) == [codes.tolist()]
    assert loaded(data, bundle).layout.context_samples == 480
    without = {key: value for key, value in metadata.items() if key != "fl"}
    for wrong in (without, {**without, "fl": frames - 1}):
        with pytest.raises(ArtifactError, match=f"goes with {stride + 960} samples and fl {frames}"):
            loaded(packed_file(wrong, []), bundle)
    fading = bundle_in(tmp_path, segment_samples=stride, segment_stride=stride, frame_length=frames)
    with pytest.raises(ArtifactError, match=f"goes with {stride + 960} samples"):
        loaded(data, fading)
    # The file's own cs and cst are of May, whatever the bundle.
    of_may = {**metadata, "cs": stride, "cst": stride, "fl": frames - 3}
    assert loaded(packed_file(of_may, [b"x"]), bundle).layout.context_samples == 0


@pytest.mark.parametrize(("numbers", "most"), [({"fl": 3}, 2), ({"cs": 900, "cst": 900, "fl": 20_000}, 3)])
def test_a_chunk_has_no_more_frames_than_its_samples_make(
    numbers: dict[str, int], most: int, small: EcdcBundle
) -> None:
    with pytest.raises(ArtifactError, match=f"samples of this bundle make up to {most}"):
        loaded(packed_file({**METADATA, **numbers}, PAYLOADS), small)
    longer = dataclasses.replace(small, segment_samples=63_998, segment_stride=63_998, frame_length=200)
    assert layout_of(loaded(SMALL, small).header, longer).chunk_frames == (5,)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut inside its header: 9 bytes"),
        (b"RIFF" + bytes(40), "this is no .ecdc"),
        (SMALL[:4] + b"\1" + SMALL[5:], "version is 1"),
        (SMALL[:5] + b"\0\1\0\1" + SMALL[9:], "metadata are 65537 bytes, allowed are 65536"),
        (packed_file([], []), "metadata are list"),
        (with_metadata(acv=1), "acv is 1, allowed is 2"),
        (with_metadata(acv=2.0), "acv is 2.0, allowed is 2"),
        (with_metadata(acv=True), "acv is true, allowed is 2"),
        (packed_file({"m": "encodec_48khz"}, []), "acv is missing"),
        (with_metadata(lm=False), "lm is false"),
        (with_metadata(m="encodec_32khz"), 'model is "encodec_32khz"'),
        (with_metadata(m=[]), "m is [], allowed is text"),
        (with_metadata(m="encodec_24khz"), "model (m) is encodec_24khz, the bundle's is encodec_48khz"),
        (with_metadata(nc=1), "number of codes in a frame (nc) is 1, the bundle's is 2"),
        (with_metadata(nc=17), "nc is 17, allowed are 1 to 16"),
        (with_metadata(lmh="0" * 64), "language model (lmh) is 000"),
        (with_metadata(lmh="A" * 64), 'lmh is "AAA'),
        (with_metadata(lmh=None), "lmh is null"),
        (with_metadata(al=0), "al is 0, allowed are 1 to 4294967295"),
        (with_metadata(al=2**32), "al is 4294967296"),
        (with_metadata(al=True), "al is true"),
        (with_metadata(al=2**32 - 1), "4294967295 samples make 7158279 chunks, allowed are 65536"),
        (with_metadata(fl=0), "fl is 0"),
        (with_metadata(cs=0), "cs is 0"),
        (with_metadata(cst=None), "cst is null"),
        (with_metadata(cst=641), "start every 641 samples (cst), allowed are their 640"),
        (with_metadata(fl=2**24), "have 16777216 frames (fl), 640 samples of this bundle make up to 2"),
        (
            with_metadata(al=2**32 - 1, cs=640 * 2**21, cst=640 * 2**21, fl=2**22),
            "16777216 frames of 2 codes, 41943040 bytes unpacked, allowed are 33554432",
        ),
        (with_metadata(fp=0), "fp is 0, allowed are 1 to 4294967295"),
        (with_metadata(fp=2**32), "fp is 4294967296"),
        (with_metadata(mr=0), "mr is 0, allowed are 1 to 16383"),
        (with_metadata(mr=16384), "mr is 16384"),
        (with_metadata(tau=0), "tau is 0, allowed are 0.001 to 1000.0"),
        (with_metadata(tau=math.nan), "tau is NaN"),
        (with_metadata(tau=math.inf), "tau is Infinity"),
        (with_metadata(tau=10**400), "tau is 1000"),
        (with_metadata(tau="1"), 'tau is "1"'),
        (with_metadata(al=1800 + 1), "has 3 chunks, its 1801 samples make 4 with this bundle"),
        (with_metadata(al=1200), "has 3 chunks, its 1200 samples make 2"),
        (SMALL[:-1], "cut inside chunk 2: 1 bytes are missing"),
        (SMALL[: -len(PAYLOADS[2]) - 3], "cut inside chunk 2: 3 bytes are missing"),
        (SMALL + b"\0", "cut inside chunk 3: 7 bytes are missing"),
        (flipped(SMALL, BODY_START + 9), "chunk 0 of the .ecdc: its CRC-32 is "),
        (flipped(SMALL, len(SMALL) - 1), "chunk 2 of the .ecdc: its CRC-32 is "),
        (flipped(SMALL, BODY_START + 5), "chunk 0 of the .ecdc: its CRC-32 is "),
        (flipped(SMALL, BODY_START, 7), "chunk 0 of the .ecdc is 2147483"),
    ],
)
def test_no_such_file(data: bytes, said: str, small: EcdcBundle) -> None:
    with pytest.raises(ArtifactError, match=re.escape(said)) as raised:
        loaded(data, small)
    assert str(raised.value).startswith("x.ecdc: ")


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "its payload is 0 bytes, 2 frames take 5 to "),
        (PAYLOADS[0][:4], "its payload is 4 bytes"),
        (PAYLOADS[0] + bytes(30), f"its payload is {len(PAYLOADS[0]) + 30} bytes"),
        (PAYLOADS[0][:-1], "its bits end before its codes do"),
        (PAYLOADS[0] + b"\0", "bits are left over behind its codes"),
        (struct.pack(">f", math.nan) + PAYLOADS[0][4:], "scale of segment 0 is nan"),
        (struct.pack(">f", -math.inf) + PAYLOADS[0][4:], "scale of segment 0 is -inf"),
    ],
)
def test_no_such_chunk(payload: bytes, said: str, small: EcdcBundle) -> None:
    ecdc = loaded(packed_file(METADATA, [payload, *PAYLOADS[1:]]), small)
    with pytest.raises(ArtifactError, match=re.escape(said)) as raised:
        next(ecdc.segments())
    assert str(raised.value).startswith("chunk 0 of the .ecdc: ")
    lost, *others = ecdc.segments(salvage=True)
    assert isinstance(lost, LostChunk)
    assert (lost.frames, said in lost.fault) == (2, True)
    assert [segment.codes.tolist() for segment in others if isinstance(segment, EcdcSegment)] == [
        codes.tolist() for codes in CHUNKS[1:]
    ]


def test_every_flipped_bit_is_found(small: EcdcBundle) -> None:
    for place in range(BODY_START, len(SMALL)):
        with pytest.raises(ArtifactError):
            unpacked(flipped(SMALL, place, place % 8), small)


def test_the_longest_file(monkeypatch: pytest.MonkeyPatch) -> None:
    body_bytes = len(SMALL) - BODY_START
    assert len([*PackedEcdcReader(max_bytes=body_bytes).push(SMALL)]) == 3
    with pytest.raises(ArtifactError, match=f"chunk 2 of the .ecdc is {len(PAYLOADS[2])} bytes, allowed are"):
        [*PackedEcdcReader(max_bytes=body_bytes - 1).push(SMALL)]
    monkeypatch.setattr(room, "MAX_CHUNKS", 2)
    with pytest.raises(ArtifactError, match="more chunks than the 2 that are allowed"):
        [*PackedEcdcReader().push(SMALL)]


# --- salvage ------------------------------------------------------------------------------------------------------


def salvaged(data: bytes, bundle: EcdcBundle) -> list[Any]:
    """Of each chunk its codes, or why there are none."""
    segments = loaded(data, bundle, salvage=True).segments(salvage=True)
    return [segment.codes.tolist() if isinstance(segment, EcdcSegment) else segment.fault for segment in segments]


def test_what_is_whole_outlives_what_is_damaged(small: EcdcBundle) -> None:
    whole = [codes.tolist() for codes in CHUNKS]
    assert salvaged(SMALL, small) == whole
    damaged = salvaged(flipped(SMALL, BODY_START + 8), small)
    assert damaged[1:] == whole[1:]
    assert "chunk 0 of the .ecdc: its CRC-32 is" in damaged[0]
    cut = salvaged(SMALL[:-1], small)
    assert cut[:2] == whole[:2]
    assert "cut inside chunk 2" in cut[2]
    assert "ends before it" in salvaged(packed_file(METADATA, PAYLOADS[:2]), small)[2]
    second = BODY_START + 8 + len(PAYLOADS[0])
    broken_length = salvaged(flipped(SMALL, second, 7), small)
    assert broken_length[0] == whole[0]
    assert all("chunk 1 of the .ecdc is" in fault for fault in broken_length[1:])
    assert salvaged(SMALL + b"\0", small) == whole


def test_what_is_not_this_file_is_not_salvaged(small: EcdcBundle) -> None:
    for data in (SMALL[:30], with_metadata(acv=1), with_metadata(lmh="0" * 64)):
        with pytest.raises(ArtifactError):
            loaded(data, small, salvage=True)


# --- bundles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema_version": 2}, "schema_version is 2, allowed are 1 to 1"),
        ({"schema_version": None}, "schema_version is missing"),
        ({"model_name": "x"}, 'model_name is "x"'),
        ({"sample_rate": 24_000}, "sample_rate is 24000, allowed are 48000 to 48000"),
        ({"channels": 1}, "channels is 1"),
        ({"normalize": 1}, "normalize is 1, allowed is true or false"),
        ({"num_codebooks": 4}, "num_codebooks is 4, allowed are 2 to 2"),
        ({"lm_dim": 5}, "lm_dim is 5, allowed are 4 to 4"),
        ({"lm_num_layers": 5}, "lm_num_layers is 5"),
        ({"lm_past_context": 5}, "lm_past_context is 5"),
        ({"bits_per_codebook": 11}, "bits_per_codebook is 11"),
        ({"codebook_cardinality": 512}, "codebook_cardinality is 512"),
        ({"segment_samples": 0}, "segment_samples is 0"),
        ({"segment_stride": "600"}, 'segment_stride is "600"'),
        ({"frame_length": None}, "frame_length is missing"),
        ({"lm_logit_step": 0}, "lm_logit_step is 0"),
        ({"lm_entropy_logit_step": 10**400}, "lm_entropy_logit_step is 1000"),
        ({"lm_quant_weight_model": None}, "lm_weights_q8.bin: "),
        ({"lm_quant_weight_model": ""}, 'lm_quant_weight_model is ""'),
        ({"lm_quant_weight_model": ".."}, 'lm_quant_weight_model is ".."'),
        ({"lm_quant_weight_model": "../lm.bin"}, 'lm_quant_weight_model is "../lm.bin"'),
        ({"lm_quant_weight_model": "a\\lm.bin"}, "lm_quant_weight_model is"),
        ({"lm_quant_weight_model": "C:lm.bin"}, "lm_quant_weight_model is"),
        ({"lm_quant_weight_model": "lm\0.bin"}, "lm_quant_weight_model is"),
        ({"lm_quant_weight_model": "other.bin"}, "other.bin: "),
    ],
)
def test_no_bundle(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=re.escape(said)):
        bundle_in(tmp_path, **changed)


def test_no_folder_no_json_and_files_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match=r"a folder with bundle\.json in it"):
        load_ecdc_bundle(tmp_path)
    for text, said in (("{", "no JSON"), ("[]", "it is list"), ("[" * 100_000, "no JSON")):
        (tmp_path / "bundle.json").write_text(text)
        with pytest.raises(BundleError, match=said):
            load_ecdc_bundle(tmp_path)
    with pytest.raises(BundleError, match="begins with b''"):
        bundle_in(tmp_path, b"")
    monkeypatch.setattr(room, "MAX_LM_BYTES", len(LM) - 1)
    with pytest.raises(BundleError, match=f"more than {len(LM) - 1} bytes"):
        bundle_in(tmp_path)
    monkeypatch.setattr(room, "MAX_BUNDLE_JSON_BYTES", 10)
    with pytest.raises(BundleError, match="more than 10 bytes"):
        bundle_in(tmp_path)


# --- tools --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle_in(tmp_path)
    return tmp_path


def test_unpack(folder: Path) -> None:
    (folder / "x.ecdc").write_bytes(SMALL)
    for source, stdin in ((folder / "x.ecdc", b""), ("-", SMALL)):
        outcome = call_tool("unpack", source, "-", "--form", "json", "--bundle", folder, stdin=stdin)
        assert outcome.status == ExitStatus.DONE
        assert json.loads(outcome.out) == np.concatenate(CHUNKS).tolist()


def test_unpack_salvages(folder: Path) -> None:
    damaged = flipped(SMALL, BODY_START + 8)
    arguments = ("unpack", "-", "-", "--form", "json", "--bundle", folder)
    outcome = call_tool(*arguments, stdin=damaged)
    assert (outcome.status, outcome.out) == (ExitStatus.BAD_INPUT, b"")
    assert "chunk 0 of the .ecdc: its CRC-32 is" in outcome.err
    outcome = call_tool(*arguments, "--salvage", stdin=damaged)
    assert outcome.status == ExitStatus.BAD_INPUT  # what is lost is told by the status, too
    assert json.loads(outcome.out) == [[0, 0], [0, 0], *np.concatenate(CHUNKS[1:]).tolist()]
    assert outcome.err.count("\n") == 1
    assert "2 frames lost" in outcome.err


@pytest.mark.parametrize(
    ("stdin", "options", "status", "said"),
    [
        (SMALL, [], ExitStatus.BAD_INPUT, "`decode --bundle` and `unpack --bundle` know"),
        (SMALL, ["--salvage"], ExitStatus.USAGE, "give --bundle"),
        (SMALL, ["--bundle", "missing"], ExitStatus.NO_WEIGHTS, "a folder with bundle.json in it"),
        (b"MOSSNANO", ["--bundle", ""], ExitStatus.USAGE, "--bundle is for an .ecdc of encodec-rs"),
        (b"ECDC\0\0\0\0\2{}", ["--bundle", ""], ExitStatus.USAGE, "--bundle is for an .ecdc of encodec-rs"),
        (b"ECDC\0\xff\0\0\2{}", ["--bundle", ""], ExitStatus.USAGE, "--bundle is for an .ecdc of encodec-rs"),
        (b"ECDC\0\0\0\0\2[}", ["--bundle", ""], ExitStatus.USAGE, "--bundle is for an .ecdc of encodec-rs"),
    ],
)
def test_what_unpack_refuses(stdin: bytes, options: list[str], status: int, said: str, folder: Path) -> None:
    placed = [option if option.startswith("--") else folder / option for option in options]
    outcome = call_tool("unpack", "-", "-", "--form", "json", *placed, stdin=stdin)
    assert (outcome.status, outcome.out) == (status, b"")
    assert said in outcome.err


# --- decode -------------------------------------------------------------------------------------------------------


def decoded_wav(*arguments: Any, status: int = ExitStatus.DONE) -> Any:
    outcome = call_tool("decode", *arguments)
    assert outcome.status == status, outcome.err
    return np.frombuffer(outcome.out, "<i2").reshape(-1, 2).astype(float), outcome.err


def overlapped(weights: Path, scales: Sequence[float]) -> Any:
    """What decode makes of SMALL, in float64: each chunk rises to its middle and falls again."""
    decoder = codecs.load_decoder(load_bundle(weights), threads=1)
    assert isinstance(decoder, codecs.SegmentDecoder)
    sound, weight = np.zeros((SAMPLES, 2)), np.zeros((SAMPLES, 1))
    ramp = 0.5 - np.abs(np.arange(1, 641) / 641 - 0.5)
    for number, (chunk, scale) in enumerate(zip(CHUNKS, scales, strict=True)):
        start = 600 * number
        samples = min(640, SAMPLES - start)
        audio = decoder.decode_segment(chunk, scale)[:samples]
        sound[start : start + samples] += ramp[:samples, np.newaxis] * audio
        weight[start : start + samples, 0] += ramp[:samples]
    return np.clip(sound / weight, -1, 1) * 32767


def test_decode_fades_from_chunk_to_chunk(folder: Path, encodec48_bundle: Path) -> None:
    (folder / "x.ecdc").write_bytes(SMALL)
    found, _ = decoded_wav(folder / "x.ecdc", "-", "--weights", encodec48_bundle, "--bundle", folder)
    assert found.shape == (SAMPLES, 2)
    assert np.abs(found - overlapped(encodec48_bundle, (0.5, 1, 2))).max() <= 1
    start = ("--start", "0.02", "--duration", "0.005")
    part, _ = decoded_wav(folder / "x.ecdc", "-", "--weights", encodec48_bundle, "--bundle", folder, *start)
    assert np.array_equal(part, found[960:1200])


def test_sound_of_the_causal_model_that_is_none_is_an_error(
    folder: Path, encodec24_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_in(folder, model_name="encodec_24khz", sample_rate=24_000, channels=1, normalize=False)
    payloads = [packed_payload(WEIGHTS, codes, maybe_scale=None) for codes in CHUNKS]
    (folder / "x.ecdc").write_bytes(packed_file({**METADATA, "m": "encodec_24khz"}, payloads))
    command = (folder / "x.ecdc", "-", "--weights", encodec24_bundle, "--bundle", folder)
    outcome = call_tool("decode", *command)
    assert (outcome.status, len(outcome.out)) == (ExitStatus.DONE, 2 * SAMPLES)
    genuine = EncodecDecoder.step
    monkeypatch.setattr(EncodecDecoder, "step", lambda self, codes: genuine(self, codes) * np.nan)
    outcome = call_tool("decode", *command)
    assert (outcome.status, outcome.out) == (ExitStatus.BUG, b"")
    assert "sample 0 of channel 0 is nan" in outcome.err


@pytest.mark.parametrize("number", range(3))
def test_a_damaged_chunk_is_silent_and_the_others_are_as_they_were(
    number: int, folder: Path, encodec48_bundle: Path
) -> None:
    place = BODY_START + sum(8 + len(payload) for payload in PAYLOADS[:number]) + 10
    (folder / "x.ecdc").write_bytes(flipped(SMALL, place))
    command = (folder / "x.ecdc", "-", "--weights", encodec48_bundle, "--bundle", folder)
    silent, said = decoded_wav(*command, status=ExitStatus.BAD_INPUT)
    assert silent.size == 0
    assert f"chunk {number} of the .ecdc: its CRC-32 is" in said
    found, said = decoded_wav(*command, "--salvage", status=ExitStatus.BAD_INPUT)
    assert f"chunk {number} of the .ecdc: its CRC-32 is" in said
    scales = [scale * (at != number) for at, scale in enumerate((0.5, 1, 2))]
    assert np.abs(found - overlapped(encodec48_bundle, scales)).max() <= 1
    assert (found[600 * number + 40 : 600 * (number + 1)] == 0).all()
    assert (found != 0).any()


def test_fixed_context_is_cut_off(tmp_path: Path, encodec48_bundle: Path) -> None:
    stride, frames = 64_000, 203
    bundle_in(tmp_path, segment_samples=stride + 960, segment_stride=stride, frame_length=frames)
    chunks = [np.full((frames, 2), code, np.uint16) for code in (3, 4)]
    payloads = [packed_payload(WEIGHTS, codes, maybe_scale=1.0) for codes in chunks]
    (tmp_path / "x.ecdc").write_bytes(packed_file(metadata_of(LM, stride + 1000, fl=frames), payloads))
    found, _ = decoded_wav(tmp_path / "x.ecdc", "-", "--weights", encodec48_bundle, "--bundle", tmp_path)
    decoder = codecs.load_decoder(load_bundle(encodec48_bundle), threads=1)
    assert isinstance(decoder, codecs.SegmentDecoder)
    first, second = (decoder.decode_segment(codes, 1.0)[480:] for codes in chunks)
    expected = np.clip(np.concatenate([first[:stride], second[:1000]]), -1, 1) * 32767
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--salvage"], ExitStatus.USAGE, "give --bundle"),
        ([], ExitStatus.BAD_INPUT, "`decode --bundle` and `unpack --bundle` know"),
    ],
)
def test_what_decode_refuses(options: list[str], status: int, said: str, folder: Path, encodec48_bundle: Path) -> None:
    (folder / "x.ecdc").write_bytes(SMALL)
    outcome = call_tool("decode", folder / "x.ecdc", "-", "--weights", encodec48_bundle, *options)
    assert (outcome.status, outcome.out) == (status, b"")
    assert said in outcome.err


# --- info ---------------------------------------------------------------------------------------------------------


def test_info() -> None:
    outcome = call_tool("info", FILES["fixed"], "--json")
    facts = json.loads(outcome.out)
    assert (outcome.status, facts["kind"], facts["acv"], facts["chunks"]) == (ExitStatus.DONE, "ecdc", 2, 3)
    assert (facts["model"], facts["quantizers"], facts["original_samples"]) == ("encodec_48khz", 4, 130_000)
    assert (facts["payload_bytes"], facts["damaged_chunks"]) == (2256 + 2256 + 2261, [])
    assert facts["language_model"].startswith("be950a6c")


def test_info_of_damaged_files() -> None:
    outcome = call_tool("info", "-", "--json", stdin=flipped(SMALL, len(SMALL) - 1)[:-1] + b"x" + SMALL[BODY_START:-1])
    facts = json.loads(outcome.out)
    assert (outcome.status, facts["chunks"], facts["damaged_chunks"]) == (ExitStatus.BAD_INPUT, 5, [2])
    assert "chunk 2 of the .ecdc: its CRC-32 is" in outcome.err
    outcome = call_tool("info", "-", "--json", stdin=with_metadata(acv=3))
    assert (outcome.status, outcome.out) == (ExitStatus.BAD_INPUT, b"")
    assert "acv is 3, allowed is 2" in outcome.err


def test_layouts_are_told_from_the_header_alone(small: EcdcBundle) -> None:
    reader = PackedEcdcReader()
    assert [*reader.push(SMALL[:BODY_START])] == []
    assert layout_of(reader.finish(), small).chunk_frames == (2, 2, 1)
