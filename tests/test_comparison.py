"""pcm/comparison.py and the tool compare: against plain loops, and against sounds with and without clicks."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio.errors import ExitStatus, InputError, UsageError
from mossnano_stdio.pcm import WavWriter
from mossnano_stdio.pcm import comparison as room
from mossnano_stdio.pcm.comparison import compare_recordings
from mossnano_stdio.pcm.recordings import Recording
from tests.tool import call_tool, run_tool

RATE = 48000
sounds = st.integers(1, 3).flatmap(
    lambda channels: st.tuples(
        *[st.lists(st.lists(st.integers(-50, 50), min_size=channels, max_size=channels), max_size=30)] * 2
    ).map(lambda pair: tuple(np.array(one, dtype=np.int16).reshape(-1, channels) for one in pair))
)


def recording(samples: Any) -> Recording:
    return Recording(RATE, np.asarray(samples))


@given(sounds, st.integers(1, 8), st.integers(1, 7))
def test_against_plain_loops(sounds: tuple[NDArray[np.int16], NDArray[np.int16]], chunk: int, block: int) -> None:
    reference, candidate = sounds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BLOCK_SAMPLES", block)  # so that short sounds have block borders too
        found = compare_recordings(recording(reference), recording(candidate), chunk)
    samples = min(len(reference), len(candidate))
    errors = [[int(b) - int(a) for a, b in zip(x, y, strict=True)] for x, y in zip(reference, candidate, strict=False)]
    largest = [max(map(abs, row)) for row in errors]
    assert found.max_error_steps == max(largest, default=0)
    assert found.max_error_sample == (largest.index(max(largest)) if any(largest) else None)
    flat = [error for row in errors for error in row]
    assert found.differing_values == sum(map(bool, flat))
    assert found.rms_error_steps == pytest.approx(math.sqrt(sum(e * e for e in flat) / len(flat)) if flat else 0)
    signal, noise = int((reference[:samples].astype(int) ** 2).sum()), sum(e * e for e in flat)
    expected_snr = math.inf if not noise else -math.inf if not signal else 10 * math.log10(signal / noise)
    assert found.snr_db == pytest.approx(expected_snr)
    jumps = [max(abs(int(a) - int(b)) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(candidate)]
    jumps = jumps[: max(0, samples - 1)]
    places = list(range(chunk, samples, chunk))
    assert [(join.sample, join.jump_steps) for join in found.joins] == [(place, jumps[place - 1]) for place in places]
    inside = [jump for index, jump in enumerate(jumps) if index + 1 not in places]
    assert found.inside_jump_steps == pytest.approx(np.percentile(inside, 99.9) if inside else 0)
    assert found.identical == np.array_equal(reference, candidate)


def tone(seconds: float = 1.0) -> NDArray[np.float32]:
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 3000 * time)
    return np.stack([wave, -wave], axis=1).astype(np.float32)


def test_equal_sounds_have_no_loud_join() -> None:
    found = compare_recordings(recording(tone()), recording(tone()), 3840)
    assert found.identical
    assert found.snr_db == math.inf
    assert len(found.joins) == 12
    assert found.loud_joins == ()


def test_a_click_at_a_join_is_found_there() -> None:
    clicking = tone()
    clicking[7680:] += np.float32(0.2)  # as if a state had been lost at the second join
    found = compare_recordings(recording(tone()), recording(clicking), 3840)
    assert [join.sample for join in found.loud_joins] == [7680]


def test_a_sound_that_begins_at_a_join_is_no_click() -> None:
    sound = np.zeros((RATE, 2), dtype=np.float32)
    sound[3840 * 5 :] = 0.5
    assert compare_recordings(recording(sound), recording(sound), 3840).loud_joins == ()
    late = np.zeros_like(sound)
    late[3840 * 6 :] = 0.5
    assert [join.sample for join in compare_recordings(recording(sound), recording(late), 3840).loud_joins] == [
        3840 * 6
    ]


def test_floats_far_beyond_full_scale_are_still_measured() -> None:
    loud = np.array([[3e38], [-3e38], [0]], dtype=np.float32)
    found = compare_recordings(recording(loud), recording(-loud), 1)
    assert found.max_error_steps == pytest.approx(6e38 * 32767, rel=1e-6)
    assert found.joins[0].jump_steps == pytest.approx(6e38 * 32767, rel=1e-6)
    assert found.snr_db == pytest.approx(-6.02, abs=0.01)


def test_what_cannot_be_compared() -> None:
    stereo, mono = recording(np.zeros((5, 2), dtype=np.int16)), recording(np.zeros((5, 1), dtype=np.int16))
    with pytest.raises(InputError, match="number of channels is 1 in the candidate and 2 in the reference"):
        compare_recordings(stereo, mono)
    with pytest.raises(InputError, match="sample rate is 48000 in the candidate and 24000"):
        compare_recordings(Recording(24000, stereo.samples), stereo)
    with pytest.raises(UsageError, match="a chunk of 0 samples"):
        compare_recordings(stereo, stereo, 0)


# --- the tool ----------------------------------------------------------------------------------------------------


def wav(samples: NDArray[np.int16], rate: int = RATE) -> bytes:
    file = io.BytesIO()
    writer = WavWriter(file, rate, samples.shape[1])
    writer.write(samples.astype("<i2").tobytes())
    writer.finish()
    return file.getvalue()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A reference as a WAV, and a candidate as raw PCM that is 3 steps off at one place."""
    samples = np.rint(tone() * 32767).astype(np.int16)
    (tmp_path / "reference.wav").write_bytes(wav(samples))
    samples[5000, 1] += 3
    (tmp_path / "candidate.pcm").write_bytes(samples.astype("<i2").tobytes())
    return tmp_path / "reference.wav", tmp_path / "candidate.pcm"


def test_facts_as_json(pair: tuple[Path, Path]) -> None:
    outcome = run_tool("compare", *pair, "--chunk-frames", 2, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    facts = json.loads(outcome.out)
    assert (facts["max_error_steps"], facts["max_error_sample"], facts["differing_values"]) == (3.0, 5000, 1)
    assert facts["rms_error_steps"] == pytest.approx(3 / math.sqrt(2 * RATE))
    assert (facts["reference_samples"], facts["candidate_samples"], facts["identical"]) == (RATE, RATE, False)
    assert (facts["join_count"], facts["loud_join_count"]) == (6, 0)
    assert [join["sample"] for join in facts["joins"]] == [7680 * n for n in range(1, 7)]
    assert facts["joins"][0]["seconds"] == 0.16
    assert facts["loudest_join"] in facts["joins"]


def test_identical_files_have_infinite_snr(pair: tuple[Path, Path]) -> None:
    outcome = call_tool("compare", pair[0], pair[0], "--max-error", 0, "--min-snr", 200)
    assert outcome.status == 0
    assert "identical          yes" in outcome.out.decode()
    assert json.loads(call_tool("compare", pair[0], pair[0], "--json").out)["snr_db"] is None


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (["--max-error", "3", "--min-snr", "100"], None),
        (["--max-error", "2.9"], "the largest error is 3 steps, at sample 5000, allowed are 2.9"),
        (["--min-snr", "150"], "dB, allowed is 150 or more"),
        (["--max-error", "0", "--min-snr", "150"], "allowed are 0; the signal-to-noise ratio is"),
        (["--max-error", "inf"], None),
    ],
)
def test_limits(pair: tuple[Path, Path], limits: list[str], words: str | None) -> None:
    outcome = call_tool("compare", *pair, *limits)
    assert b"max_error_steps" in outcome.out
    if words is None:
        assert (outcome.status, outcome.err) == (0, "")
    else:
        assert outcome.status == ExitStatus.CHECK_FAILED
        assert words in outcome.error_line


@pytest.mark.parametrize("limit", ["--max-error", "--min-snr"])
def test_nan_is_no_limit(pair: tuple[Path, Path], limit: str) -> None:
    outcome = call_tool("compare", *pair, limit, "nan")
    assert (outcome.status, outcome.out) == (ExitStatus.USAGE, b"")
    assert f"argument {limit}: 'nan': a number is allowed" in outcome.err


def test_another_length_breaks_any_limit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.pcm").write_bytes(pair[1].read_bytes()[:-4])
    assert call_tool("compare", pair[0], tmp_path / "short.pcm").status == 0
    outcome = call_tool("compare", pair[0], tmp_path / "short.pcm", "--max-error", 100)
    assert outcome.status == ExitStatus.CHECK_FAILED
    assert "the candidate has 47999 samples, the reference 48000" in outcome.error_line


def test_nothing_beside_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    (tmp_path / "a.pcm").write_bytes(b"")
    plot = tmp_path / "x.png"
    outcome = call_tool("compare", tmp_path / "a.pcm", "-", "--chunk-frames", 1, "--json", "--plot", plot)
    assert outcome.status == 0
    assert json.loads(outcome.out)["joins"] == []


def test_raw_pcm_of_another_format(tmp_path: Path) -> None:
    samples = np.arange(30, dtype=np.int16).reshape(10, 3)
    (tmp_path / "a.raw").write_bytes(samples.tobytes())
    (tmp_path / "a.wav").write_bytes(wav(samples, 16000))
    flags = ["--channels", 3, "--sample-rate", 16000, "--max-error", 0]
    assert call_tool("compare", tmp_path / "a.raw", tmp_path / "a.wav", *flags).status == 0
    assert call_tool("compare", tmp_path / "a.wav", "-", *flags, stdin=samples.tobytes()).status == 0


@pytest.mark.parametrize("chunks", [[], ["--chunk-frames", "3"]])
def test_a_picture_is_drawn(pair: tuple[Path, Path], tmp_path: Path, chunks: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert call_tool("compare", *pair, "--plot", tmp_path / "x.png", *chunks).status == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["REFERENCE", "missing.wav"], ExitStatus.NO_WEIGHTS, "missing.wav"),
        (["REFERENCE", "-"], ExitStatus.BAD_INPUT, "-, taken as raw PCM: 3 bytes"),
        (["REFERENCE", "CANDIDATE", "--channels", "1"], ExitStatus.BAD_INPUT, "number of channels is 1"),
        (["REFERENCE", "CANDIDATE", "--channels", "0"], ExitStatus.USAGE, "--channels is 0"),
        (["REFERENCE", "CANDIDATE", "--chunk-frames", "0"], ExitStatus.USAGE, "--chunk-frames is 0"),
        (["REFERENCE", "CANDIDATE", "--plot", "x.txt"], ExitStatus.USAGE, ".png, .svg, .pdf"),
    ],
)
def test_what_is_wrong(pair: tuple[Path, Path], arguments: list[str], status: int, words: str) -> None:
    names = {"REFERENCE": str(pair[0]), "CANDIDATE": str(pair[1])}
    outcome = call_tool("compare", *[names.get(word, word) for word in arguments], stdin=b"abc")
    assert outcome.status == status
    assert words in outcome.error_line
    assert outcome.out == b""


def test_a_picture_needs_the_extra(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = call_tool("compare", *pair, "--plot", tmp_path / "x.png")
    assert outcome.status == ExitStatus.USAGE
    assert "mossnano-stdio[plot]" in outcome.error_line
