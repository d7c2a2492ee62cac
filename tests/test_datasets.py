"""`mossnano tokenize` and `detokenize`: what is encoded is what the library encodes, and nothing is lost or doubled.

What needs pyarrow, Ray, or the programs that read data sets is in test_datasets_read.py.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from mossnano_stdio import Codec
from mossnano_stdio.errors import ExitStatus, InputError, UsageError
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.pcm.recordings import WRITTEN_FORMS, read_part, resampled
from mossnano_stdio.tokens import parse_artifact
from mossnano_stdio.tools import detokenize, tokenize
from mossnano_stdio.tools.datasets import shards
from mossnano_stdio.tools.datasets.census import Census
from mossnano_stdio.tools.datasets.inputs import find_references
from mossnano_stdio.tools.datasets.references import Reference
from mossnano_stdio.tools.datasets.work import BLOCKS_AHEAD, Detokenizing, Tokenizing, read_ahead
from tests.conftest import repeated
from tests.tool import COMMAND, Outcome, call_tool

RATE = 48000
LIGHT_FORMS = ("webdataset", "npy", "mossnano")
SHARD_ROWS = 3
BAD = "c-bad.wav"  # in the middle of the corpus

Audio = NDArray[np.float64]


def noise(samples: int, channels: int = 2, seed: int = 0) -> Audio:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recordings that are good, in all rates and channels, and one that is not."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "inner").mkdir()
    for number, (name, rate, channels) in enumerate(
        [
            ("a.wav", RATE, 2), ("b.flac", 44100, 1), ("d.wav", 16000, 2), ("inner/e.wav", RATE, 1),
            ("inner/f.flac", RATE, 2), ("inner/g.wav", RATE, 2), ("z.wav", RATE, 3), ("é.wav", RATE, 2),
        ]
    ):  # fmt: skip
        samples = int(rate * (0.2 + 0.1 * number))
        soundfile.write(folder / name, noise(samples, channels, number), rate, subtype="PCM_16")
    (folder / BAD).write_text("this is no sound at all\n" * 9)
    (folder / "notes.txt").write_text("this is not even called like one\n")
    return folder


@pytest.fixture(scope="module")
def codec(built_bundle: Path) -> Codec:
    return Codec.load(built_bundle, threads=1)


def tokenized(corpus: Path, to: Path, weights: Path, *flags: object, form: str = "npy") -> Outcome:
    return call_tool(
        "tokenize", corpus, "--to", to, "--weights", weights, "--form", form,
        "--shard-rows", SHARD_ROWS, "--workers", 1, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data_sets(corpus: Path, built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus in each form."""
    folder = tmp_path_factory.mktemp("sets")
    for form in LIGHT_FORMS:
        assert tokenized(corpus, folder / form, built_bundle, form=form).status == ExitStatus.CHECK_FAILED
    return {form: folder / form for form in LIGHT_FORMS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def rows_of(folder: Path) -> dict[str, tuple[dict[str, Any], NDArray[np.uint16]]]:
    """By their ids: facts and codes, read by numpy and tarfile alone."""
    rows = {}
    for path in sorted(folder.glob("shard-*.npy")):
        codes = np.load(path)
        for facts in lines_of(path.with_suffix(".jsonl")):
            start = facts.pop("start_frame")
            rows[facts["id"]] = (facts, codes[:, start : start + facts["frames"]])
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(members):
            if name.endswith(".json"):
                key, facts = name.removesuffix(".json"), json.loads(members[name])
                if f"{key}.mossnano" in members:
                    codes = parse_artifact(members[f"{key}.mossnano"]).codes.T
                else:
                    codes = np.load(io.BytesIO(members[f"{key}.codes.npy"]))
                rows[facts["id"]] = (facts, codes)
    return rows


# --- what is encoded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LIGHT_FORMS)
def test_rows_are_what_the_library_encodes(form: str, data_sets: dict[str, Path], corpus: Path, codec: Codec) -> None:
    rows = rows_of(data_sets[form])
    names = sorted(str(path.relative_to(corpus).as_posix()) for path in corpus.rglob("*") if path.suffix != ".txt")
    assert list(rows) == [name for name in names if (corpus / name).is_file() and name != BAD]
    for name, (facts, codes) in rows.items():
        pcm, rate = soundfile.read(corpus / name, dtype="int16", always_2d=True)
        wave = np.maximum(pcm / np.float32(32767), np.float32(-1)).astype(np.float32)
        if wave.shape[1] == 3:
            wave = wave.mean(axis=1, keepdims=True)
        expected = codec.encode(wave.T, sample_rate=rate)
        assert np.array_equal(codes, expected.codes), name
        assert codes.dtype == np.uint16
        assert facts == {
            "id": name,
            "frames": expected.frames,
            "quantizers": 16,
            "original_samples": expected.original_samples,
            "sample_rate": RATE,
            "codec": codec.bundle.name,
            "weights_sha256": facts["weights_sha256"],
        }
        assert re.fullmatch("[0-9a-f]{64}", facts["weights_sha256"])


def test_the_manifest_says_what_is_there(data_sets: dict[str, Path]) -> None:
    import hashlib

    for form, folder in data_sets.items():
        manifest = lines_of(folder / "manifest.jsonl")
        assert [line["shard"] for line in manifest] == [0, 1, 2]
        assert [line["rows"] + line["quarantined"] for line in manifest] == [3, 3, 3]
        for file in (file for line in manifest for file in line["files"]):
            data = (folder / file["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"]), form
        (bad,) = lines_of(folder / "quarantine.jsonl")
        assert (bad["shard"], bad["row"], bad["id"]) == (0, 2, BAD)
        assert "is no audio file that can be read" in bad["reason"]


def test_statistics_are_those_of_the_rows(data_sets: dict[str, Path]) -> None:
    for folder in data_sets.values():
        statistics = json.loads((folder / "statistics.json").read_bytes())
        rows = rows_of(folder).values()
        whole = np.concatenate([codes for _, codes in rows], axis=1)
        used = [[int((row == code).sum()) for code in range(1024)] for row in whole]
        assert statistics["used"] == used
        assert statistics["rows"] == sum(statistics["durations"]) == 8
        assert statistics["samples"] == sum(facts["original_samples"] for facts, _ in rows)
        assert statistics["quarantined"] == 1


def test_fewer_quantizers_a_picture_and_figures(
    corpus: Path, built_bundle: Path, tmp_path: Path, data_sets: dict[str, Path]
) -> None:
    flags = ["--quantizers", 3, "--plot", tmp_path / "p.svg", "--stats", "-", "--log-json"]
    outcome = tokenized(corpus, tmp_path / "out", built_bundle, *flags)
    assert outcome.status == ExitStatus.CHECK_FAILED
    rows, all_rows = rows_of(tmp_path / "out"), rows_of(data_sets["npy"])
    assert all(np.array_equal(codes, all_rows[name][1][:3]) for name, (_, codes) in rows.items())
    facts = json.loads(outcome.out)
    whole = np.concatenate([codes for _, codes in rows.values()], axis=1)
    assert facts["codes_used"] == [len(set(row.tolist())) for row in whole]
    assert (facts["rows"], facts["rows_done"], facts["rows_total"], facts["quarantined"]) == (8, 9, 9, 1)
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    logged = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    assert [line["shard"] for line in logged if line["event"] == "shard"] == [0, 1, 2]
    assert logged[-1]["event"] == "end"
    assert logged[-1]["eta_seconds"] == 0
    assert {"hours_done", "hours_per_second", "real_time_factor", "failures"} <= logged[0].keys()


def test_a_dead_codebook_is_named() -> None:
    census = Census(2, 8, RATE)
    census.add(np.array([[3, 3, 3, 3], [1, 2, 3, 4]], np.uint16), 9000)
    assert census.facts()["codes_used"] == [1, 4]
    assert census.facts()["perplexity"] == [1.0, 4.0]
    assert census.facts()["dead_codebooks"] == [0]


def test_of_mimi_too(mimi_standin: Path, tmp_path: Path) -> None:
    """A codec with one channel and other rates; stereo is averaged."""
    wave = noise(RATE // 2).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", wave, RATE, subtype="FLOAT")
    outcome = tokenized(tmp_path / "x.wav", tmp_path / "out", mimi_standin)
    assert outcome.status == ExitStatus.DONE
    ((facts, codes),) = rows_of(tmp_path / "out").values()
    with Codec.load(mimi_standin, threads=1) as codec:
        expected = codec.encode(wave.mean(axis=1, dtype=np.float32)[np.newaxis], sample_rate=RATE)
    assert np.array_equal(codes, expected.codes)
    assert facts["sample_rate"] == 24000


# --- what is bad --------------------------------------------------------------------------------------------------


def wav_bytes(audio: Audio, rate: int = RATE, subtype: str = "PCM_16", form: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.fixture(scope="module")
def work(built_bundle: Path) -> Tokenizing:
    return Tokenizing({"weights": str(built_bundle), "quantizers": 16})


def the_only(references: Iterator[Reference]) -> Reference:
    (reference,) = references
    return reference


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is no audio file that can be read"),
        (b"not a sound" * 50, "is no audio file that can be read"),
        (wav_bytes(noise(0)), "has no samples"),
        (wav_bytes(noise(9, 13)), "has 13 channels, allowed are 1 to 8"),
        (wav_bytes(noise(9), rate=1), "has 1 Hz, allowed are 1000 to 1048576"),
        (wav_bytes(np.full((9, 1), np.nan), subtype="FLOAT"), "sample 0 of channel 0 is nan"),
        (wav_bytes(noise(9999))[:20044], "is cut: 20000 bytes of its sound are there, its header says 39996"),
        (wav_bytes(noise(99999), form="FLAC")[:9000], "cannot be read on from sample"),
        (wav_bytes(noise(9999), form="AIFF")[:20052], "is cut: 20006 bytes"),
        (wav_bytes(noise(99999), form="MP3", subtype="MPEG_LAYER_III")[:9000], "is cut: it ends at sample"),
        (wav_bytes(noise(9999))[:30], "is no audio file that can be read"),
    ],
    ids=["empty", "no sound", "0 samples", "13 channels", "1 Hz", "NaN", "cut WAV", "cut FLAC", "cut AIFF", "cut MP3",
         "cut header"],
)  # fmt: skip
def test_a_bad_file_is_a_reason(data: bytes, reason: str, tmp_path: Path, work: Tokenizing) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(data)
    outcome = work.do(the_only(find_references([str(path)], "audio")).to_json())
    assert reason in str(outcome.maybe_fault)
    assert str(path) in str(outcome.maybe_fault)
    assert outcome.maybe_codes is None


def test_a_wav_of_unknown_length_is_not_cut(tmp_path: Path, work: Tokenizing) -> None:
    """As a program writes it that writes to a pipe."""
    data = bytearray(wav_bytes(noise(9999)))
    data[4:8] = data[40:44] = b"\xff" * 4
    (tmp_path / "x.wav").write_bytes(data)
    outcome = work.do(the_only(find_references([str(tmp_path / "x.wav")], "audio")).to_json())
    assert outcome.facts == {"original_samples": 9999}


def test_a_file_that_changes_ends_the_job(tmp_path: Path, work: Tokenizing) -> None:
    (tmp_path / "x.wav").write_bytes(wav_bytes(noise(9999)))
    reference = the_only(find_references([str(tmp_path / "x.wav")], "audio"))
    (tmp_path / "x.wav").write_bytes(wav_bytes(noise(9998)))
    with pytest.raises(InputError, match="was changed while the job ran"):
        work.do(reference.to_json())
    (tmp_path / "x.wav").unlink()
    with pytest.raises(InputError, match="now it is not"):
        work.do(reference.to_json())


def test_fail_fast_ends_at_the_first(corpus: Path, built_bundle: Path, tmp_path: Path) -> None:
    outcome = tokenized(corpus, tmp_path / "out", built_bundle, "--fail-fast")
    assert outcome.status == ExitStatus.BAD_INPUT
    assert BAD in outcome.error_line
    assert [*contents(tmp_path / "out")] == ["job.json"]


def test_what_was_read_ahead_is_over_with_its_reader() -> None:
    closed = []

    def blocks() -> Iterator[NDArray[np.float32]]:
        for number in range(1000):
            closed.append(number)
            yield np.zeros((1, 1), np.float32)

    reading = read_ahead(blocks())
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert len(closed) <= 2 * BLOCKS_AHEAD + 3

    def failing() -> Iterator[NDArray[np.float32]]:
        yield np.zeros((1, 1), np.float32)
        raise InputError("why")

    with pytest.raises(InputError, match="why"):
        list(read_ahead(failing()))


# --- where recordings lie -----------------------------------------------------------------------------------------


def test_parts_of_a_file(tmp_path: Path) -> None:
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")):
        data = wav_bytes(noise(60000), form=form, subtype=subtype)
        whole = np.concatenate([*read_part(io.BytesIO(data), "x").blocks])
        part = read_part(io.BytesIO(data), "x", 0.5, 0.75)
        assert part.samples == 12000
        assert np.array_equal(np.concatenate([*part.blocks]), whole[24000:36000]), form
    for start, end, words in ((2.0, None, "no part from 2 s to its end"), (0.0, 2.0, "no part from 0 s to 2 s")):
        with pytest.raises(InputError, match=words):
            read_part(io.BytesIO(data), "x", start, end)
    assert read_part(io.BytesIO(data), "x", 1.0, 1.3).samples == len(whole) - RATE  # a length that was rounded


def test_a_manifest(tmp_path: Path, work: Tokenizing) -> None:
    (tmp_path / "x.wav").write_bytes(wav_bytes(noise(RATE)))
    entries: list[dict[str, Any]] = [
        {"path": "x.wav", "text": "all", "snr": 3},
        {"audio_filepath": "x.wav", "offset": 0.25, "duration": 0.5, "id": "part", "words": ["a"]},
        {"path": str(tmp_path / "x.wav"), "start": 0.5, "end": 0.75, "id": 7, "sample_rate": 8000},
        {"path": "missing.wav"},
    ]
    text = "\n".join(map(json.dumps, entries)) + "\n\n"
    (tmp_path / "m.jsonl").write_text(text)
    with gzip.open(tmp_path / "m2.jsonl.gz", "wt") as file:
        file.write(text)
    references = list(find_references([str(tmp_path / "m.jsonl")], "audio"))
    assert references == list(find_references([str(tmp_path / "m2.jsonl.gz")], "audio"))
    assert [reference.id for reference in references] == ["x.wav", "part", "7", "missing.wav"]
    assert [dict(reference.extra) for reference in references] == [
        {"text": "all", "snr": 3}, {"words": ["a"]}, {"sample_rate": 8000}, {},
    ]  # fmt: skip
    outcomes = [work.do(reference.to_json()) for reference in references]
    assert [outcome.facts.get("original_samples") for outcome in outcomes] == [RATE, RATE // 2, RATE // 4, None]
    assert outcomes[3].maybe_fault == f"{tmp_path / 'missing.wav'}: No such file or directory"
    row = shards.CodedRow(0, "7", np.zeros((1, 1), np.uint16), 1, references[2].extra)
    facts = row.facts(shards.Origin("x", "y", RATE, 2, 1024))
    assert (facts["sample_rate"], facts["source_sample_rate"]) == (RATE, 8000)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "m.jsonl, line 2: is no JSON"),
        ("[]", "line 2: is no object"),
        ('{"id": "x"}', "has no text `path`; its keys are id"),
        ('{"path": "x", "offset": -1}', "offset is -1, allowed are seconds from 0"),
        ('{"path": "x", "offset": 1, "start": 1}', "says twice where it starts or ends"),
        ('{"path": "x", "start": 2, "end": 1}', "ends at 1 s, which is not behind its start at 2 s"),
        ('{"path": "x", "id": {}}', "its id is {}, a text is allowed"),
    ],
)
def test_a_manifest_that_makes_no_sense(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "y.wav"}\n' + line + "\n")
    with pytest.raises(InputError, match=re.escape(words)):
        list(find_references([str(tmp_path / "m.jsonl")], "audio"))


def test_cuts_of_lhotse(tmp_path: Path, work: Tokenizing) -> None:
    wave = noise(RATE)
    (tmp_path / "x.wav").write_bytes(wav_bytes(wave))
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0, 1], "source": str(tmp_path / "x.wav")}]}
    supervision = {"id": "s", "text": "hello", "speaker": "ann", "start": 0.0, "duration": 0.2}
    cuts: list[dict[str, Any]] = [
        {"id": "c1", "start": 0.5, "duration": 0.25, "channel": 1, "recording": recording, "type": "MonoCut",
         "supervisions": [supervision], "custom": {"snr": 9}},
        {"id": "c2", "type": "MixedCut", "tracks": []},
    ]  # fmt: skip
    (tmp_path / "cuts.jsonl").write_text("\n".join(map(json.dumps, cuts)))
    mono, mixed = find_references([str(tmp_path / "cuts.jsonl")], "audio")
    assert dict(mono.extra) == {"snr": 9, "text": "hello", "speaker": "ann", "supervisions": [supervision]}
    assert "a cut out of one file is allowed, this is 'MixedCut'" in str(work.do(mixed.to_json()).maybe_fault)
    (tmp_path / "y.wav").write_bytes(wav_bytes(wave[RATE // 2 : RATE * 3 // 4, 1:]))
    expected = work.do(the_only(find_references([str(tmp_path / "y.wav")], "audio")).to_json())
    assert np.array_equal(np.asarray(work.do(mono.to_json()).maybe_codes), np.asarray(expected.maybe_codes))


def test_a_tar_of_webdataset(tmp_path: Path, work: Tokenizing) -> None:
    members = [
        ("dir/k1.flac", wav_bytes(noise(9000, 1), form="FLAC")), ("dir/k1.json", b'{"speaker": "ann", "id": 5}'),
        ("dir/k1.txt", b"hello\n"), ("k2.json", b"{}"), ("k3.wav", wav_bytes(noise(5000))), ("k4.wav", b"no"),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "set-07.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    references = list(find_references([str(tmp_path / "set-07.tar")], "audio"))
    assert [reference.id for reference in references] == ["set-07/dir/k1", "set-07/k3", "set-07/k4"]
    assert dict(references[0].extra) == {"speaker": "ann", "text": "hello"}
    outcomes = [work.do(Reference.from_json(reference.to_json()).to_json()) for reference in references]
    assert [outcome.facts.get("original_samples") for outcome in outcomes] == [9000, 5000, None]
    assert "set-07/k4 is no audio file" in str(outcomes[2].maybe_fault)


def test_globs_folders_and_what_is_not_there(corpus: Path) -> None:
    by_glob = [reference.path for reference in find_references([f"{corpus}/**/*.flac"], "audio")]
    assert by_glob == [str(corpus / "b.flac"), str(corpus / "inner/f.flac")]
    with pytest.raises(UsageError, match="no file is called like that"):
        list(find_references([f"{corpus}/*.nothing"], "audio"))
    assert "No such file" in str(the_only(find_references([f"{corpus}/nothing.wav"], "audio")).maybe_fault)
    with pytest.raises(UsageError, match="unpack it"):
        list(find_references(["x.tar.gz"], "audio"))


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["{corpus}", "{corpus}", "--to", "{out}"], ExitStatus.BAD_INPUT, "are both called 'a.wav'; give each an `id`"),
        (["{corpus}", "--to", "{corpus}/out"], ExitStatus.USAGE, "which lies in the input"),
        (["{corpus}", "--to", "{corpus}"], ExitStatus.USAGE, "which lies in the input"),
        (["{corpus}/inner", "--to", "{full}"], ExitStatus.USAGE, "has no job in it, but x; name an empty folder"),
        (["{corpus}", "--to", "{out}", "--quantizers", "17"], ExitStatus.USAGE, "these weights have 16"),
        (["{corpus}", "--to", "{out}", "--address", "auto"], ExitStatus.USAGE, "--address is for --engine ray"),
        (["{corpus}", "--to", "{out}", "--weights", "demo"], ExitStatus.NO_WEIGHTS, "has no streaming encoder"),
        (["{corpus}", "--to", "{out}", "--plot", "x.txt"], ExitStatus.USAGE, "--plot is x.txt"),
        (["{full}", "--to", "{out}"], ExitStatus.USAGE, "has no recordings, tars or Parquet files in it"),
    ],
)
def test_a_job_that_makes_no_sense(
    flags: list[str], status: int, words: str, corpus: Path, built_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    names = {"corpus": corpus, "out": tmp_path / "out", "full": tmp_path / "full"}
    words_given = [flag.format(**names) for flag in flags]
    outcome = call_tool("tokenize", "--weights", built_bundle, "--form", "npy", *words_given)
    assert (outcome.status, outcome.out) == (status, b"")
    assert words in outcome.error_line
    assert not (tmp_path / "out").exists()
    assert not (corpus / "out").exists()


def test_forms_are_the_same_in_help_and_in_work() -> None:
    assert tokenize.FORMS == shards.FORMS
    assert detokenize.FORMS == WRITTEN_FORMS


# --- run again ----------------------------------------------------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in contents(folder).items():
        (target / name).write_bytes(data)
    return target


def test_a_job_that_is_done_does_nothing(
    data_sets: dict[str, Path], corpus: Path, built_bundle: Path, tmp_path: Path
) -> None:
    folder = data_sets["npy"]
    before = contents(folder)
    outcome = tokenized(corpus, folder, built_bundle, "--stats", tmp_path / "stats.json")
    assert outcome.status == ExitStatus.CHECK_FAILED  # there is something in quarantine still
    assert contents(folder) == before
    assert json.loads((tmp_path / "stats.json").read_bytes())["rows"] == 8


def told_half(folder: Path) -> None:
    (folder / "manifest.jsonl").unlink()
    os.truncate(folder / "quarantine.jsonl", 30)
    (folder / ".unfinished-shard-000000.npy").write_bytes(b"half")


SPOILT: dict[str, Callable[[Path], object]] = {
    "the last line is cut": lambda folder: os.truncate(
        folder / "manifest.jsonl", (folder / "manifest.jsonl").stat().st_size - 9
    ),
    "the line is not there": lambda folder: (folder / "manifest.jsonl").write_bytes(
        b"".join((folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)[:2])
    ),
    "nothing is done but the bad are told": lambda folder: (folder / "manifest.jsonl").unlink(),
    "the bad are told half": told_half,
    "statistics are lost": lambda folder: (folder / "statistics.json").write_bytes(b"{"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_was_left_half_done_is_mended(
    how: str, data_sets: dict[str, Path], corpus: Path, built_bundle: Path, tmp_path: Path
) -> None:
    folder = copied(data_sets["npy"], tmp_path / "out")
    SPOILT[how](folder)
    outcome = tokenized(corpus, folder, built_bundle, "--stats", tmp_path / "stats.json")
    assert outcome.status == ExitStatus.CHECK_FAILED
    assert ("its last line is cut, and done again" in outcome.err) == (
        how in ("the last line is cut", "the bad are told half")
    )
    if how == "statistics are lost":  # nothing is written where nothing is to be done
        facts = json.loads((tmp_path / "stats.json").read_bytes())
        assert (facts["rows"], facts["quarantined"]) == (8, 1)
        assert facts["codes_used"] == [
            sum(map(bool, row)) for row in json.loads((data_sets["npy"] / "statistics.json").read_bytes())["used"]
        ]
    else:
        assert contents(folder) == contents(data_sets["npy"])


def test_another_job_is_refused_and_says_what_differs(
    data_sets: dict[str, Path], corpus: Path, built_bundle: Path, mimi_standin: Path, tmp_path: Path
) -> None:
    folder = data_sets["npy"]
    before = contents(folder)

    def difference(*flags: object, corpus: Path = corpus, weights: Path = built_bundle, form: str = "npy") -> str:
        outcome = tokenized(corpus, folder, weights, *flags, form=form)
        assert outcome.status == ExitStatus.USAGE
        assert contents(folder) == before
        return outcome.error_line

    assert "began with form npy, and now it is webdataset" in difference(form="webdataset")
    assert "began with quantizers 16, and now it is 8" in difference("--quantizers", 8)
    assert "began with shard_rows 3, and now it is 4" in difference("--shard-rows", 4)
    assert "began with quantizers 16, and now it is 32" in difference(weights=mimi_standin)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "inner").mkdir()
    for path in (path for path in corpus.rglob("*") if path.is_file()):
        os.link(path, moved / path.relative_to(corpus))
    assert tokenized(moved, folder, built_bundle).status == ExitStatus.CHECK_FAILED  # a corpus may move
    (moved / "inner" / "f.flac").unlink()
    line = difference(corpus=moved)
    assert "were 9 recordings, now they are 8, and they differ first among rows 3 to 5" in line
    (moved / "inner" / "f.flac").write_bytes((corpus / "inner" / "f.flac").read_bytes())
    assert "were 9 recordings, now they are 9, and they differ first among rows 3 to 5" in difference(corpus=moved)


def test_other_weights_of_the_same_shape_are_refused(
    data_sets: dict[str, Path], corpus: Path, built_bundle: Path, tmp_path: Path
) -> None:
    """Their graphs' names and sizes are the same; what is recorded of their bytes is not."""
    other = tmp_path / "weights"
    other.mkdir()
    for path in built_bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    sidecar = json.loads((other / "mossnano.json").read_bytes())
    name = next(name for name in sidecar["files"] if name.endswith("encode_step.data"))
    sidecar["files"][name]["sha256"] = "0" * 64
    (other / "mossnano.json").write_text(json.dumps(sidecar))
    outcome = tokenized(corpus, data_sets["npy"], other)
    assert outcome.status == ExitStatus.USAGE
    assert "began with weights_sha256 " in outcome.error_line


def test_a_shard_that_was_lost_is_told(
    data_sets: dict[str, Path], corpus: Path, built_bundle: Path, tmp_path: Path
) -> None:
    folder = copied(data_sets["npy"], tmp_path / "out")
    (folder / "shard-000001.npy").unlink()
    outcome = tokenized(corpus, folder, built_bundle)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert "shard-000001.npy: is not there, but manifest.jsonl says that it was done" in outcome.error_line


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit there")
def test_a_full_disk_is_74_and_the_job_goes_on_behind_it(
    data_sets: dict[str, Path], corpus: Path, built_bundle: Path, tmp_path: Path
) -> None:
    from tests.test_full_disk import room_for

    outcomes = []
    for room in (100, 1000, 30_000):
        with room_for(room):
            outcomes.append(tokenized(corpus, tmp_path / "out", built_bundle, form="webdataset"))
    assert [outcome.status for outcome in outcomes] == [ExitStatus.OUTPUT_FAILED] * 3
    assert "cannot be written: File too large (EFBIG)" in outcomes[0].error_line
    assert tokenized(corpus, tmp_path / "out", built_bundle, form="webdataset").status == ExitStatus.CHECK_FAILED
    assert contents(tmp_path / "out") == contents(data_sets["webdataset"])


@repeated(10, 200)
def test_kills_cost_nothing_but_time(times: int, built_bundle: Path, tmp_path: Path) -> None:
    """Of workers and of the driver, -9, at random moments: then run again, to the bytes of a job in peace."""
    if sys.platform != "linux":
        pytest.skip("looks for the workers in /proc")
    (tmp_path / "in").mkdir()
    for number in range(12):
        soundfile.write(tmp_path / "in" / f"{number:02}.wav", noise(4 * RATE, 2, number), RATE, subtype="PCM_16")
    (tmp_path / "in" / "05.wav").write_bytes(b"")
    command = [
        *COMMAND, "tokenize", str(tmp_path / "in"), "--weights", str(built_bundle), "--form", "npy",
        "--shard-rows", "2", "--workers", "2", "--to",
    ]  # fmt: skip
    began = time.monotonic()
    run = subprocess.run([*command, str(tmp_path / "peace")], stderr=subprocess.DEVNULL)
    takes_seconds = time.monotonic() - began
    assert run.returncode == ExitStatus.CHECK_FAILED
    in_peace = contents(tmp_path / "peace")

    chance = random.Random(times)
    out = tmp_path / "out"
    kills = ends = 0
    shards_left: Counter[int] = Counter()
    while kills < times:
        wanted = shards_done(out) + chance.randrange(3)
        with subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL) as driver:
            if chance.random() < 0.4:
                kills += killed_worker(driver, chance, signal.SIGKILL)
            while driver.poll() is None and shards_done(out) < wanted:
                time.sleep(0.005)
            time.sleep(takes_seconds * chance.uniform(0, 0.3))
            if driver.poll() is None:
                driver.kill()
                kills += 1
        if driver.returncode != -signal.SIGKILL:
            assert driver.returncode == ExitStatus.CHECK_FAILED
            assert contents(out) == in_peace
            ends += 1
            for path in out.iterdir():
                path.unlink()
        else:
            shards_left[shards_done(out)] += 1
    assert subprocess.run([*command, str(out)], stderr=subprocess.DEVNULL).returncode == ExitStatus.CHECK_FAILED
    assert contents(out) == in_peace
    print(f"{kills} kills, {ends} jobs came to their end in between; shards that were done: {dict(shards_left)}")
    assert shards_left.keys() - {0}, "all kills came too early to have interrupted anything"


def shards_done(folder: Path) -> int:
    manifest = folder / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def killed_worker(driver: subprocess.Popen[bytes], chance: random.Random, how: int) -> int:
    """Kill one of its workers once there is one; how many were killed."""
    for _ in range(300):
        time.sleep(0.005)
        found = []
        for path in Path(f"/proc/{driver.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that ended just now
                found += path.read_text().split()
        if driver.poll() is not None:
            return 0
        if found:
            time.sleep(chance.uniform(0.0, 0.4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(chance.choice(found)), how)
                return 1
            return 0
    return 0


@pytest.mark.skipif(sys.platform == "win32", reason="a process there ends in other ways")
def test_a_recording_that_kills_its_worker_is_bad(
    built_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that a library crashes at."""
    from mossnano_stdio.tools.datasets import local_pool

    program = tmp_path / "dies.py"
    program.write_text(
        "import sys\n"
        "sys.stdin.readline()\n"
        "print('{}', flush=True)\n"
        "for line in iter(sys.stdin.readline, ''):\n"
        "    if 'kill' in line: sys.exit('it fell over')\n"
        '    print(\'{"fault": null, "facts": {}}\', flush=True)\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local_pool, "PROGRAM", "dies")
    outcomes = list(local_pool.local_outcomes(["a", "kill", "b"], {}, 2))
    assert [outcome.maybe_fault for outcome in outcomes] == [
        None, "5 processes died while they worked on it, the last one with status 1 (it fell over)", None,
    ]  # fmt: skip


def test_two_jobs_in_one_folder_are_refused(corpus: Path, built_bundle: Path, data_sets: dict[str, Path]) -> None:
    from mossnano_stdio.tools.datasets.journal import Journal

    folder = data_sets["npy"]
    with Journal(folder, json.loads((folder / "job.json").read_bytes()), print):
        outcome = tokenized(corpus, folder, built_bundle)
    assert outcome.status == ExitStatus.OUTPUT_FAILED
    assert "another job is at work in it" in outcome.error_line


# --- and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "form"), [*zip(LIGHT_FORMS, WRITTEN_FORMS, strict=True)])
def test_back_to_recordings(
    stored: str, form: str, data_sets: dict[str, Path], built_bundle: Path, codec: Codec, tmp_path: Path
) -> None:
    arguments = ["detokenize", data_sets[stored], "--to", tmp_path, "--form", form, "--weights", built_bundle]
    assert call_tool(*arguments, "--workers", 1).status == ExitStatus.DONE
    rows = rows_of(data_sets[stored])
    names = {name if name.endswith(f".{form}") else f"{name}.{form}" for name in rows}
    assert contents(tmp_path).keys() == {*names, "job.json"}
    for name, (facts, codes) in rows.items():
        path = tmp_path / (name if name.endswith(f".{form}") else f"{name}.{form}")
        pcm, rate = soundfile.read(path, dtype="int16", always_2d=True)
        expected = np.frombuffer(to_pcm16(codec.decode(codes).T), "<i2").reshape(-1, 2)[: facts["original_samples"]]
        assert rate == RATE
        assert len(pcm) == facts["original_samples"]
        if form == "ogg":
            assert np.corrcoef(pcm.ravel(), expected.ravel())[0, 1] > 0.5  # what Vorbis leaves of noise
        else:
            assert np.array_equal(pcm, expected)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in contents(tmp_path)}
    missing = sorted(names)[0]
    (tmp_path / missing).unlink()
    (tmp_path / f".{Path(missing).name}.123.part").write_bytes(b"what a worker left that was killed")
    assert call_tool(*arguments, "--workers", 1).status == ExitStatus.DONE
    after = {name: (tmp_path / name).stat().st_mtime_ns for name in contents(tmp_path)}
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {missing}


def test_a_row_that_cannot_be_decoded_is_a_reason(built_bundle: Path, tmp_path: Path) -> None:
    work = Detokenizing({"weights": str(built_bundle), "form": "wav"})
    order = {"id": "x", "original_samples": 3840, "sample_rate": RATE, "target": str(tmp_path / "x.wav")}

    def fault(codes: NDArray[Any], **changes: Any) -> str:
        np.save(tmp_path / "shard.npy", codes)
        place = {"path": str(tmp_path / "shard.npy"), "kind": "npy", "start_frame": 0, "frames": codes.shape[1]}
        return str(work.do(json.dumps(order | {"place": place} | changes)).maybe_fault)

    good = np.zeros((16, 1), np.uint16)
    assert fault(good) == "None"
    (tmp_path / "x.wav").unlink()
    assert "x: holds the code 1024, allowed are 0 to 1023" in fault(good + np.uint16(1024))
    assert "allowed are 1 to 16 quantizers" in fault(np.zeros((17, 1), np.uint16))
    assert "is of 8000 Hz, these weights decode 48000 only" in fault(good, sample_rate=8000)
    assert "its 1 frames hold fewer" in fault(good, original_samples=3841)
    assert not (tmp_path / "x.wav").exists()


def test_a_mossnano_file_is_a_row(built_bundle: Path, corpus: Path, tmp_path: Path) -> None:
    for name in ("encode", "decode"):
        ends = (
            [corpus / "a.wav", tmp_path / "a.mossnano"]
            if name == "encode"
            else [tmp_path / "a.mossnano", tmp_path / "a.wav"]
        )
        assert call_tool(name, *ends, "--weights", built_bundle).status == 0
    outcome = call_tool(
        "detokenize", tmp_path / "a.mossnano", "--to", tmp_path / "out", "--form", "wav", "--weights", built_bundle
    )
    assert outcome.status == ExitStatus.DONE
    assert (tmp_path / "out" / "a.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()


# --- long ones ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "minutes"), [("built_bundle", 60), ("nano_bundle", 10)])
def test_an_hour_takes_little_memory_in_each_worker(
    weights: str, minutes: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As `test_encode` measures it, of the process that encodes. (With nano an hour takes as little, and long.)"""
    second = (0.1 * np.random.default_rng(0).standard_normal((44_100, 2))).astype(np.float32)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 44_100, 2, subtype="PCM_16") as sound:
        for number in range(60 * minutes):
            sound.write(np.roll(second, 7 * number, axis=0))
    program = (
        "import json, re, sys; from mossnano_stdio.tools.datasets.work import Tokenizing;"
        "outcome = Tokenizing(json.loads(sys.argv[1])).do(sys.argv[2]);"
        "print(outcome.facts['original_samples'], re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    settings = json.dumps({"weights": str(request.getfixturevalue(weights)), "quantizers": 16})
    item = the_only(find_references([str(tmp_path / "long.flac")], "audio")).to_json()
    run = subprocess.run([sys.executable, "-c", program, settings, item], capture_output=True, check=True, text=True)
    samples, resident_kb = map(int, run.stdout.split())
    print(f"{weights}, {minutes} minutes: {resident_kb / 1000:.0f} MB")
    assert samples == 60 * minutes * RATE
    assert resident_kb * 1024 < 400e6


def test_resampling_does_not_depend_on_channels() -> None:
    """So that one channel may be resampled, and then go to all."""
    wave = noise(5000, 1).astype(np.float32)
    one = np.concatenate([*resampled([wave], 1, 44100, RATE)])
    two = np.concatenate([*resampled([np.repeat(wave, 2, axis=1)], 2, 44100, RATE)])
    assert np.array_equal(np.repeat(one, 2, axis=1), two)
