"""tools/diagnose/: faults planted in decoders of another make are named; what is right, or only coarse, is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mossnano_stdio import codecs
from mossnano_stdio.build.bundle import save_bundle, save_mimi_bundle
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.mimi_checkpoint import load_mimi
from mossnano_stdio.build.mimi_model import MimiWeights
from mossnano_stdio.build.model import DecoderWeights
from mossnano_stdio.build.nodes import PlainNode, read_decoder
from mossnano_stdio.errors import BundleError
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.tokens import Artifact, Codes, build_artifact
from mossnano_stdio.tokens.plain import save_codes
from mossnano_stdio.tools.diagnose.diagnosis import Diagnosis, Subject, diagnose
from mossnano_stdio.tools.diagnose.network import Network
from mossnano_stdio.weights import load_bundle
from tests.tool import call_tool
from tests.wrong_decoder import Wrong, decode_mimi, decode_moss

REFERENCES = Path(__file__).parent / "reference"
Sound = NDArray[np.float64]
Weights = DecoderWeights | MimiWeights
FRAMES = 20  # past the longest context, which is 10


class Member:
    """A stand-in, and what decodes it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        if name == "mimi":
            mimi = load_mimi(REFERENCES / name / "tokenizer-tiny.safetensors")
            self.weights: Weights = mimi
            save_mimi_bundle(folder, mimi, name=name, trial=False)
        else:
            loaded = load_checkpoint(REFERENCES / name, "decode")
            assert loaded.decoder is not None
            self.weights = loaded.decoder
            save_bundle(folder, loaded, name=name, checkpoint_name=name, graphs="fast", trial=False)
        self.bundle = load_bundle(folder)
        self.format = self.bundle.format
        self.network = Network(read_decoder(self.bundle), self.format.codebook_size)
        self.decoder = codecs.load_decoder(self.bundle, threads=1)
        size = (FRAMES, self.format.quantizers)
        self.codes: Codes = np.random.default_rng(7).integers(0, self.format.codebook_size, size).astype(np.uint16)

    def decoded(self, codes: Codes) -> Sound:
        self.decoder.reset()
        return self.decoder.step(codes).astype(np.float64)

    @cached_property
    def right(self) -> Sound:
        return self.decoded(self.codes)

    def wrongly(self, wrong: Wrong, codes: Codes | None = None, weights: Weights | None = None) -> Sound:
        used, given = weights or self.weights, self.codes if codes is None else codes
        if isinstance(used, MimiWeights):
            return decode_mimi(used, given, wrong)
        return decode_moss(used, given, wrong)

    def diagnosed(self, other: Sound, rate: int | None = None, codes: Codes | None = None) -> Diagnosis:
        given = self.codes if codes is None else codes
        ours = self.right if codes is None else self.decoded(given)
        subject = Subject(given, ours, other, rate or self.format.sample_rate, (len(ours),))
        return diagnose(subject, self.format, self.network)


NAMES = ("tiny", "moss-24k", "mimi")


@pytest.fixture(scope="module", params=NAMES)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    return Member(request.param, tmp_path_factory.mktemp(request.param))


# --- faults in the network -------------------------------------------------------------------------------------------


RIGHT = Wrong()


@dataclass(frozen=True)
class Planted:
    """A fault, and what it must be called: a name, and a part of how. Mostly it is tried when there is time for it."""

    name: str
    how: str
    wrong: Wrong = RIGHT
    codes_of: Callable[[Codes], Codes] = lambda codes: codes
    weights_of: Callable[[Weights], Weights] = lambda weights: weights
    members: tuple[str, ...] = NAMES
    always: tuple[str, ...] = ()  # the members in which it is tried in every run


def rounded(value: Any, rounding: Callable[[Any], Any]) -> Any:
    """All matrices of weights rounded."""
    if isinstance(value, np.ndarray):
        return rounding(value) if value.ndim > 1 else value
    if isinstance(value, tuple | list):
        return tuple(rounded(item, rounding) for item in value)
    if is_dataclass(value):
        changed = {field.name: rounded(getattr(value, field.name), rounding) for field in fields(value)}
        return replace(value, **changed)  # type: ignore[type-var]
    return value


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """By hand: 8 bits of mantissa, the first of which is not written."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    nearest: NDArray[np.float32] = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    return nearest


def reversed_books(weights: Any) -> Any:
    if isinstance(weights, MimiWeights):
        return replace(weights, acoustic=replace(weights.acoustic, codebooks=weights.acoustic.codebooks[::-1]))
    parts = weights.dequantizer
    turned = {name: getattr(parts, name)[::-1] for name in ("codebooks", "out_proj_w", "out_proj_b")}
    return replace(weights, dequantizer=replace(parts, **turned))


MOSS, MIMI = ("tiny", "moss-24k"), ("mimi",)
PLANTED = (
    Planted("window missing", "full attention", Wrong(context=lambda number, context: 10**6), always=("moss-24k",)),
    Planted("window off by one", "too many", Wrong(context=lambda number, context: context + 1), always=("mimi",)),
    Planted("window off by one", "too few", Wrong(context=lambda number, context: context - 1)),
    Planted("window too short", "", Wrong(context=lambda number, context: context * 5 // 8)),
    Planted("ring overwritten before it is attended to", "chunks of 1 frame", Wrong(1, ring=True)),
    Planted("ring overwritten before it is attended to", "chunks of 2 frames", Wrong(2, ring=True), always=("tiny",)),
    Planted("ring overwritten before it is attended to", "chunks of 4 frames", Wrong(4, ring=True)),
    Planted("state reset at every chunk", "chunks of 3 frames", Wrong(3, reset=True), always=("mimi",)),
    Planted("state reset at every chunk", "chunks of 1 frame", Wrong(1, reset=True)),
    Planted(
        "one layer's cache lost",
        "cache 1 ",
        Wrong(2, caches_lost=lambda number, layer: (number, layer) == (0, 1)),
        always=("tiny",),
    ),
    Planted("positions restarted per chunk", "chunks of 3 frames", Wrong(3, offset="none"), always=("moss-24k",)),
    Planted("positions counted in frames, not in tokens", "chunks of 2 frames", Wrong(2, offset="frames")),
    Planted("RoPE half-split for interleaved", "", Wrong(pairing="halves"), always=("tiny",)),
    Planted("RoPE interleaved for half-split", "", Wrong(rows="halves")),
    Planted("RoPE missing", "", Wrong(pairing="none")),
    Planted("RoPE with a wrong base", "100000 instead of 10000", Wrong(base=1e5)),
    Planted("not causal", "chunks of 2 frames", Wrong(2, causal=False)),
    Planted("not causal", "in the whole recording", Wrong(FRAMES, causal=False)),
    Planted("fewer codebooks", "the first 8", Wrong(quantizers=8)),
    Planted(
        "codes transposed",
        "frame-major",
        codes_of=lambda codes: codes.reshape(codes.shape[::-1]).T,
        always=("moss-24k",),
    ),
    Planted("codes transposed", "codebook-major", codes_of=lambda codes: codes.T.reshape(codes.shape)),
    Planted("codes shifted", "too high", codes_of=lambda codes: np.minimum(codes + 1, codes.max()).astype(np.uint16)),
    Planted(
        "codebooks in another order",
        "neighbours",
        codes_of=lambda codes: codes.reshape(FRAMES, -1, 2)[..., ::-1].reshape(codes.shape),
    ),
    Planted("codebooks in another order", "last one first", weights_of=reversed_books, members=MOSS),
    Planted("a prefix with all biases", "the first 8", Wrong(quantizers=8, all_biases=True), members=MOSS),
    Planted("float16", "weights", weights_of=lambda weights: rounded(weights, lambda x: x.astype(np.float16))),
    Planted("bfloat16", "weights", weights_of=lambda weights: rounded(weights, to_bfloat16), always=("mimi",)),
    Planted(
        "convolutions' tails lost at every chunk",
        "chunks of 2 frames",
        Wrong(2, tails_lost=True),
        members=MIMI,
        always=("mimi",),
    ),
    Planted(
        "all caches lost at every chunk",
        "chunks of 2 frames",
        Wrong(2, caches_lost=lambda number, layer: True),
        members=MIMI,
    ),
    Planted(
        "biases of transposed tails doubled",
        "chunks of 2 frames",
        Wrong(2, bias="tail"),
        members=MIMI,
        always=("mimi",),
    ),
    Planted("biases of transposed convolutions missing", "everywhere", Wrong(bias="none"), members=MIMI),
    Planted("biases of transposed convolutions missing", "first columns", Wrong(bias="subtracted"), members=MIMI),
    Planted("padded by repetition", "", Wrong(replicates=True), members=MIMI),
)


def pairs() -> Iterator[Any]:
    for planted in PLANTED:
        for name in planted.members:
            marks = [] if name in planted.always else [pytest.mark.slow]
            yield pytest.param(name, planted, id=f"{name}: {planted.name} {planted.how}", marks=marks)


@pytest.mark.parametrize(("member", "planted"), tuple(pairs()), indirect=["member"])
def test_what_is_planted_is_named(member: Member, planted: Planted) -> None:
    other = member.wrongly(planted.wrong, planted.codes_of(member.codes), planted.weights_of(member.weights))
    diagnosis = member.diagnosed(other)
    assert diagnosis.is_fault
    assert diagnosis.named is not None, diagnosis.verdict
    assert diagnosis.named.name == planted.name, diagnosis.verdict
    assert planted.how in diagnosis.named.how
    assert len(diagnosis.next_ones) == 2
    assert diagnosis.named.snr_db >= diagnosis.next_ones[0].snr_db - 1 or planted.name.endswith("float16")


def test_enough_is_planted() -> None:
    for name in NAMES:
        assert sum(name in planted.members for planted in PLANTED) + len(SPOILT) >= 16


@pytest.mark.parametrize(
    ("member", "name", "how"),
    [
        ("moss-24k", "audio_streamed_1", "chunks of 1 frame"),
        ("moss-24k", "audio_streamed_8", "chunks of 8 frames"),
        ("mimi", "audio_moshi_stream_1", "chunks of 1 frame"),
        ("mimi", "audio_moshi_stream_5", "chunks of 5 frames"),
    ],
    indirect=["member"],
)
def test_what_the_published_programs_stream_is_recognised(member: Member, name: str, how: str) -> None:
    """Not planted by us: that is how they work."""
    folder = REFERENCES / member.name
    codes, other = np.load(folder / "codes.npy"), np.load(folder / f"{name}.npy")
    codes, other = (codes[0].T, other[0]) if codes.ndim == 3 else (codes, other)
    diagnosis = member.diagnosed(other.T.astype(np.float64), codes=codes.astype(np.uint16))
    assert diagnosis.named is not None
    assert diagnosis.named.name == "ring overwritten before it is attended to"
    assert diagnosis.named.how == how
    assert diagnosis.named.snr_db > 100
    assert diagnosis.first_frame in (4, 5, 8)  # where the shortest context is full, or its chunk begins


def test_a_fault_in_16_bits_late_and_too_quiet(member: Member) -> None:
    other = member.wrongly(Wrong(3, offset="none"))
    diagnosis = member.diagnosed(np.pad(to_16_bits(0.5 * other), ((50, 0), (0, 0))))
    assert diagnosis.named is not None
    assert diagnosis.named.name == "positions restarted per chunk"
    assert [misfit.name for misfit in diagnosis.misfits] == ["gain", "offset"]


@pytest.mark.parametrize(
    ("wrong", "quantizers", "name"),
    [(RIGHT, 32, "a prefix filled up with code 0"), (Wrong(all_biases=True), 8, "a prefix with all biases")],
)
@pytest.mark.parametrize("member", ["moss-24k"], indirect=True)
def test_codes_of_the_first_codebooks(member: Member, wrong: Wrong, quantizers: int, name: str) -> None:
    few = member.codes[:, :8]
    assert not member.diagnosed(member.decoded(few), codes=few).is_fault
    filled_up = np.pad(few, ((0, 0), (0, quantizers - 8)))
    diagnosis = member.diagnosed(member.wrongly(wrong, filled_up), codes=few)
    assert diagnosis.named is not None
    assert diagnosis.named.name == name


# --- faults behind it ------------------------------------------------------------------------------------------------


def to_16_bits(sound: Sound) -> Sound:
    return np.rint(np.clip(sound, -1, 1) * 32767) / 32767


def zeroed(sound: Sound) -> Sound:
    changed = sound.copy()
    changed[5 * 3840 : 6 * 3840 + 77] = 0
    return changed


def dithered(sound: Sound) -> Sound:
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, (2, *sound.shape)).sum(axis=0)
    steps: Sound = np.rint(sound * 32767 + noise)
    return steps / 32767


def resampled(sound: Sound, rate: int, wanted: int) -> Sound:
    import soxr

    again: Sound = soxr.resample(sound, rate, wanted)
    return again


def wrapped(sound: Sound) -> Sound:
    return ((np.rint(sound * 32767).astype(np.int64) + 32768) % 65536 - 32768) / np.float64(32767)


@dataclass(frozen=True)
class Spoilt:
    """What is done to the right sound, and what that must be called."""

    name: str
    how: str
    change: Callable[[Sound], Sound]
    channels: int = 1  # at the least


SPOILT = (
    Spoilt("gain", "-6.02 dB", lambda sound: sound / 2),
    Spoilt("gain", "+0.25 dB", lambda sound: sound * 10 ** (0.25 / 20)),
    Spoilt("polarity", "all channels", lambda sound: -sound),
    Spoilt("offset", "100 samples", lambda sound: np.pad(sound, ((100, 0), (0, 0)))),
    Spoilt("missing head", "333 samples", lambda sound: sound[333:]),
    Spoilt("missing tail", "2000 samples", lambda sound: sound[:-2000]),
    Spoilt("too long", "480 samples", lambda sound: np.pad(sound, ((0, 480), (0, 0)))),
    Spoilt("NaN to 0", "", zeroed),
    Spoilt("NaN", "7 samples", lambda sound: np.where(np.arange(len(sound))[:, np.newaxis] // 7 == 40, np.nan, sound)),
    Spoilt("clipped", "at -0.1500 and +0.1500", lambda sound: np.clip(sound, -0.15, 0.15)),
    Spoilt("dithered", "", dithered),
    Spoilt("truncated to 16 bits", "towards zero", lambda sound: np.trunc(sound * 32767) / 32767),
    Spoilt("truncated to 16 bits", "downwards", lambda sound: np.floor(sound * 32767) / 32767),
    Spoilt("channel order", "[1, 0]", lambda sound: sound[:, ::-1], channels=2),
    Spoilt("polarity", "channel [1]", lambda sound: sound * [1, -1], channels=2),
    Spoilt("mono", "mean", lambda sound: np.repeat(sound.mean(axis=1, keepdims=True), 2, axis=1), channels=2),
    Spoilt("mono", "channel 1", lambda sound: sound[:, [1, 1]], channels=2),
    Spoilt(
        "channels interleaved wrongly",
        "the whole: planar",
        lambda sound: np.ascontiguousarray(sound.T).reshape(sound.shape),
        channels=2,
    ),
    Spoilt(
        "channels interleaved wrongly",
        "chunks of 2 frames: planar",
        lambda sound: sound.reshape(-1, 7680, 2).transpose(0, 2, 1).reshape(sound.shape),
        channels=2,
    ),
)


@pytest.mark.parametrize("spoilt", SPOILT, ids=lambda spoilt: f"{spoilt.name} {spoilt.how}")
def test_what_is_done_behind_a_decoder_is_named(member: Member, spoilt: Spoilt) -> None:
    if spoilt.channels > member.format.channels:
        return  # there is nothing to exchange or mix in one channel
    sound = spoilt.change(member.right)
    has_other_bits = spoilt.name in ("NaN", "dithered", "truncated to 16 bits")
    for other in (sound,) if has_other_bits else (sound, to_16_bits(sound)):
        diagnosis = member.diagnosed(other)
        assert diagnosis.is_fault
        assert diagnosis.named is not None, diagnosis.verdict
        assert diagnosis.named.name == spoilt.name, diagnosis.verdict
        assert spoilt.how in diagnosis.named.how


@pytest.mark.parametrize("member", ["tiny"], indirect=True)
@pytest.mark.parametrize(("rate", "labelled"), [(44100, 44100), (16000, 48000), (44100, None), (24000, None)])
def test_what_was_resampled_is_named(member: Member, rate: int, labelled: int | None) -> None:
    """None: and back again."""
    pytest.importorskip("soxr", reason="the extra `audio` is not installed")
    other = resampled(member.right, 48000, rate)
    diagnosis = member.diagnosed(resampled(other, rate, 48000) if labelled is None else other, labelled)
    assert diagnosis.named is not None
    assert diagnosis.named.name == "resampled"
    assert str(rate) in diagnosis.named.how


def test_a_header_with_another_rate(member: Member) -> None:
    diagnosis = member.diagnosed(member.right, 44100)
    assert diagnosis.named is not None
    assert diagnosis.named.name == "sample rate in the header"


@pytest.mark.parametrize("member", ["mimi"], indirect=True)
def test_samples_that_wrap_around(member: Member) -> None:
    """Of a sound that leaves full scale, as this model's may."""
    louder = member.right * (1.5 / np.abs(member.right).max())
    subject = Subject(member.codes, louder, wrapped(louder), member.format.sample_rate, (len(louder),))
    diagnosis = diagnose(subject, member.format, member.network)
    assert diagnosis.named is not None
    assert diagnosis.named.name == "wrapped around"
    subject = replace(subject, other=to_16_bits(louder))
    assert not diagnose(subject, member.format, member.network).is_fault


# --- no fault --------------------------------------------------------------------------------------------------------


def test_what_is_right_has_no_fault(member: Member) -> None:
    for other in (
        member.right,
        to_16_bits(member.right),
        np.rint(member.right * 32768) / 32768,
        member.wrongly(RIGHT),
        member.wrongly(Wrong(5)),
    ):
        diagnosis = member.diagnosed(other)
        assert not diagnosis.is_fault, diagnosis.verdict
        assert (diagnosis.named, diagnosis.first_frame) == (None, None)


def to_steps(x: NDArray[np.float32], steps: int, *, by_row: bool) -> NDArray[np.float32]:
    scale = np.abs(x).max(axis=-1, keepdims=True) / steps if by_row else np.abs(x).max() / steps
    coarse: NDArray[np.float32] = (np.rint(x / np.where(scale > 0, scale, 1)) * scale).astype(np.float32)
    return coarse


@pytest.mark.parametrize("by_row", [True, False])
def test_a_good_int8_has_no_fault(member: Member, by_row: bool) -> None:
    coarse = rounded(member.weights, lambda x: to_steps(x, 127, by_row=by_row))
    diagnosis = member.diagnosed(member.wrongly(RIGHT, weights=coarse))
    assert not diagnosis.is_fault
    assert "a steady noise floor" in diagnosis.verdict


def test_a_fault_that_nobody_knows_is_one(member: Member) -> None:
    coarse = rounded(member.weights, lambda x: to_steps(x, 7, by_row=True))  # int4
    noise = np.random.default_rng(3).normal(0, 0.1, member.right.shape)
    for other in (member.wrongly(RIGHT, weights=coarse), noise):
        diagnosis = member.diagnosed(other)
        assert diagnosis.is_fault
        assert diagnosis.named is None
        assert "none of these" in diagnosis.verdict


# --- the tool --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The 24 kHz stand-in with what it makes of its codes, and what the published program makes of them."""
    folder, reference = tmp_path_factory.mktemp("files"), REFERENCES / "moss-24k"
    member = Member("moss-24k", folder)
    codes = np.load(reference / "codes.npy").astype(np.uint16)
    (folder / "right.raw").write_bytes(to_pcm16(member.decoded(codes).astype(np.float32)))
    (folder / "codes.json").write_bytes(save_codes(codes, "json"))
    samples = len(codes) * member.format.frame_samples - 700
    artifact = Artifact(24_000, 1, samples, 32, len(codes), 1024, codes)
    (folder / "codes.mossnano").write_bytes(build_artifact(artifact))
    return {
        "weights": folder,
        "codes": reference / "codes.npy",
        "artifact": folder / "codes.mossnano",
        "json": folder / "codes.json",
        "wrong": reference / "audio_streamed_8.npy",
        "right": folder / "right.raw",
        "picture": folder / "snr.png",
    }


RING = "ring overwritten before it is attended to (chunks of 8 frames)"


def test_the_tool_says_what_is_wrong_in_words_and_in_a_picture(files: dict[str, Path]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    outcome = call_tool(
        "diagnose", files["codes"], files["wrong"], "--weights", files["weights"], "--plot", files["picture"]
    )
    assert (outcome.status, outcome.err) == (1, "")
    lines = outcome.out.decode().splitlines()
    assert lines[0].startswith(RING)
    assert lines[1].startswith("look for: a key-value ring")
    assert lines[2] == "next to it:"
    assert files["picture"].read_bytes()[:4] == b"\x89PNG"


def test_one_json_object(files: dict[str, Path]) -> None:
    outcome = call_tool("diagnose", files["json"], files["wrong"], "--weights", files["weights"], "--json")
    facts = json.loads(outcome.out)
    assert outcome.status == 1
    assert (facts["fault"], facts["first_departing_frame"], facts["first_departing_second"]) == (True, 8, 0.64)
    assert facts["named"]["name"] in RING
    assert facts["named"]["snr_db"] > 100
    assert len(facts["next"]) == 2
    assert facts["context_seconds"] == [0.64] * 4
    assert len(facts["snr_db_by_second"]) == 3
    assert facts["snr_db_by_second"][1] < 20


def test_a_command_is_run_on_the_codes(files: dict[str, Path]) -> None:
    """It gets them on stdin or as a file in any form, and gives its sound on stdout or in a file."""
    weights = ("--weights", files["weights"])
    copies = f"import sys; assert sys.stdin.buffer.read(6) == b'\\x93NUMPY'; print(end='', flush=True); \
sys.stdout.buffer.write(open({str(files['wrong'])!r}, 'rb').read())"
    outcome = call_tool("diagnose", *weights, files["codes"], "--", sys.executable, "-c", copies)
    assert (outcome.status, outcome.err) == (1, "")
    assert outcome.out.decode().startswith(RING)
    checks = f"import json, shutil, sys; assert len(json.load(open(sys.argv[1]))[0]) == 32; \
shutil.copyfile({str(files['right'])!r}, sys.argv[2])"
    words = ["-c", checks, "{codes.json}", "{sound.raw}"]
    outcome = call_tool("diagnose", files["codes"], *weights, "--json", "--", sys.executable, *words)
    assert (outcome.status, json.loads(outcome.out)["fault"]) == (0, False)


def test_an_artifact_may_be_trimmed_or_not(files: dict[str, Path], tmp_path: Path) -> None:
    whole = files["right"].read_bytes()
    for pcm, status in ((whole, 0), (whole[: -2 * 700], 0), (whole[: -2 * 701], 1)):
        (tmp_path / "other.raw").write_bytes(pcm)
        outcome = call_tool("diagnose", files["artifact"], tmp_path / "other.raw", "--weights", files["weights"])
        assert outcome.status == status, outcome.out
    for missing, status in ((1919, 0), (1920, 1)):  # codes alone do not say where in its last frame a recording ends
        (tmp_path / "other.raw").write_bytes(whole[: -2 * missing])
        outcome = call_tool("diagnose", files["codes"], tmp_path / "other.raw", "--weights", files["weights"])
        assert outcome.status == status, outcome.out


def test_a_bundle_of_official_graphs_alone(tiny_bundle: Path, tiny_reference: Path) -> None:
    arguments = (tiny_reference / "codes.npy", tiny_reference / "audio.npy", "--weights", tiny_bundle)
    outcome = call_tool("diagnose", *arguments)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(b"no fault: it is the right decode")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["CODES"], 2, "diagnose takes either CODES OTHER or CODES -- PROGRAM ARGUMENTS"),
        (["CODES", "OTHER", "--", "true"], 2, "diagnose takes either CODES OTHER or CODES -- PROGRAM ARGUMENTS"),
        (["CODES", "OTHER", "--weights", "demo"], 2, "nobody else decodes them; name others: --weights"),
        (["CODES", "OTHER", "--threads", "0"], 2, "--threads is 0, allowed is a whole number from 1 to 1024"),
        (["CODES", "OTHER", "--plot", "x.txt"], 2, "allowed are names that end with .png, .svg, .pdf"),
        (["NONE", "OTHER"], 65, "none.npy holds no codes, allowed is one frame or more"),
        (["BATCH", "OTHER"], 65, "batch.npy holds a batch of 2 recordings, allowed is one"),
        (["CODES", "BATCH"], 65, "batch.npy holds int64 [2, 3, 32], allowed are numbers [channels, samples]"),
        (["LARGE", "OTHER"], 65, "holds 1024, allowed are 0 to 1023"),
        (["CUT", "OTHER"], 65, "cut.npy is no .npy file that can be read"),
        (["CODES", "--", "no-such-program"], 2, "no-such-program: cannot be run"),
        (["CODES", "--", sys.executable, "-c", "exit('so it is')"], 65, "COMMAND ended with status 1: so it is"),
        (["CODES", "--", sys.executable, "-c", "", "{sound}"], 65, "left no sound.wav where it was told to"),
        (["CODES", "--", sys.executable, "-c", "print('ab')"], 65, "stdout of COMMAND, taken as raw PCM"),
    ],
)
def test_what_cannot_be(files: dict[str, Path], tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 32), int))
    np.save(tmp_path / "batch.npy", np.zeros((2, 3, 32), int))
    np.save(tmp_path / "large.npy", np.full((3, 32), 1024))
    (tmp_path / "cut.npy").write_bytes(files["codes"].read_bytes()[:200])
    paths = {"CODES": files["codes"], "OTHER": files["right"]}
    paths |= {name.upper(): tmp_path / f"{name}.npy" for name in ("none", "batch", "large", "cut")}
    options = [] if "--weights" in arguments else ["--weights", files["weights"]]
    outcome = call_tool("diagnose", *options, *(paths.get(word, word) for word in arguments))
    assert outcome.status == status
    assert outcome.out == b""
    assert words in outcome.error_line


def test_a_graph_with_nodes_of_another_version_is_refused(mimi_standin: Path) -> None:
    graph = read_decoder(load_bundle(mimi_standin))
    older = replace(graph, nodes=(*graph.nodes, PlainNode("Elu", ("audio",), ("louder",), {})))
    with pytest.raises(BundleError, match=r"nodes that are not known here \(Elu\).*build it anew"):
        Network(older, 2048).decode(np.zeros((1, 1), np.uint16))
