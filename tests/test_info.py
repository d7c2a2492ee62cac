"""The tool info: by its first bytes, whatever it is."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.protocol.messages import Kind, encode_message
from mossnano_stdio.tokens import Artifact, build_artifact
from tests.tool import Outcome, call_tool, run_tool

CODES = np.array([[1, 7], [2, 7], [1, 7], [4, 7]], dtype=np.uint16)
ARTIFACT = build_artifact(Artifact(48000, 2, 12000, 2, 4, 1024, CODES))
STREAM = encode_message(Kind.TOKENS, bytes(40)) + encode_message(Kind.END)


def facts_of(outcome: Outcome) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(outcome.out)
    return facts


def test_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(ARTIFACT)
    outcome = call_tool("info", tmp_path / "x", "--json")
    assert (outcome.status, outcome.err) == (0, "")
    assert facts_of(outcome) == {
        "kind": "artifact",
        "sample_rate": 48000,
        "channels": 2,
        "original_samples": 12000,
        "quantizers": 2,
        "frames": 4,
        "codebook_size": 1024,
        "bits_per_code": 10,
        "duration_seconds": 0.25,
        "payload_bytes": 10,
        "file_bytes": 42,
        "bitrate_bps": 320.0,
        "codes": {
            "least": 1,
            "most": 7,
            "distinct": 4,
            "entropy_bits": 1.75,  # shares 2/8, 1/8, 1/8, 4/8
            "by_quantizer": {"least": [1, 7], "most": [4, 7], "distinct": [3, 1], "entropy_bits": [1.5, 0.0]},
        },
    }


def test_nano_is_two_kilobits_a_second() -> None:
    codes = np.zeros((25, 16), dtype=np.uint16)
    data = build_artifact(Artifact(48000, 2, 96000, 16, 25, 1024, codes))
    assert facts_of(call_tool("info", "-", "--json", stdin=data))["bitrate_bps"] == 2000


def test_a_table_has_the_same_facts() -> None:
    lines = call_tool("info", "-", stdin=ARTIFACT).out.decode().splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    assert shown["original_samples"] == "12,000"
    assert shown["duration_seconds"] == "0.25"
    assert shown["kind"] == "artifact"


def test_many_quantizers_and_no_frames() -> None:
    empty = ARTIFACT[:20] + struct.pack("<3I", 2**32 - 1, 0, 1024)
    facts = facts_of(call_tool("info", "-", "--json", stdin=empty))
    assert (facts["quantizers"], facts["codes"], facts["payload_bytes"]) == (2**32 - 1, {}, 0)
    many = build_artifact(Artifact(48000, 2, 0, 10_000, 1, 2, np.ones((1, 10_000), dtype=np.uint16)))
    facts = facts_of(call_tool("info", "-", "--json", stdin=many))
    assert facts["codes"] == {"least": 1, "most": 1, "distinct": 1, "entropy_bits": 0.0}
    assert facts["bitrate_bps"] is None


def test_a_framed_stream() -> None:
    outcome = run_tool("info", "-", "--json", stdin=STREAM)
    assert (outcome.status, outcome.err) == (0, "")
    facts = facts_of(outcome)
    assert facts["kind"] == "framed stream"
    assert facts["messages"] == {"TOKENS": 1, "END": 1}
    assert (facts["frames"], facts["seconds"], facts["truncated"]) == (2, 0.16, False)


def test_a_cut_stream_gives_its_facts_and_65() -> None:
    outcome = call_tool("info", "-", "--json", stdin=STREAM[:-1])
    assert outcome.status == ExitStatus.BAD_INPUT
    assert facts_of(outcome)["truncated"] is True
    assert facts_of(outcome)["frames"] == 2
    assert "cut inside a message: 4 bytes" in outcome.error_line


def test_a_stream_that_loses_its_framing_gives_its_facts_and_76() -> None:
    outcome = call_tool("info", "-", "--json", stdin=STREAM + b"RIFF")
    assert outcome.status == ExitStatus.FRAMING_LOST
    assert facts_of(outcome)["messages"] == {"TOKENS": 1, "END": 1}
    assert "length of 1179011410" in outcome.error_line


def test_a_longer_message_than_any_is_a_sign_that_this_is_no_stream() -> None:
    longest = encode_message(Kind.AUDIO, bytes((1 << 20) - 1))
    assert facts_of(call_tool("info", "-", "--json", stdin=longest))["audio_samples"] == (1 << 18) - 1
    longer = encode_message(Kind.AUDIO, bytes(1 << 20))
    assert call_tool("info", "-", stdin=longer).status == ExitStatus.BAD_INPUT
    assert call_tool("info", "-", "--max-message-bytes", 2 << 20, stdin=longer).status == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 of 32 bytes"),
        (b"M", "1 of 32 bytes"),
        (b"MOSS", "4 of 32 bytes"),
        (b"\x05\x00", "the first bytes are"),
        (bytes(4), "the first bytes are"),
        (b"\xff\xff\xff\xff", "the first bytes are"),
        (b"RIFF....WAVE", "the first bytes are b'RIFF....'"),
        (ARTIFACT[:-1], "41 of 42 bytes"),
        (ARTIFACT + b"x", "beyond the artifact's end"),
    ],
)
def test_what_is_neither_is_judged_as_an_artifact(data: bytes, words: str) -> None:
    outcome = call_tool("info", "-", stdin=data)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert outcome.out == b""
    assert words in outcome.error_line


def test_a_weights_folder(tiny_bundle: Path) -> None:
    facts = facts_of(call_tool("info", tiny_bundle, "--json"))
    assert facts["kind"] == "weights"
    assert facts["format"] == {
        "sample_rate": 48000,
        "channels": 2,
        "frame_samples": 3840,
        "quantizers": 16,
        "codebook_size": 1024,
    }
    step = facts["graphs"]["decode_step"]
    files = [tiny_bundle / step["file"], tiny_bundle / "moss_audio_tokenizer_decode_shared.data"]
    assert step["bytes"] == sum(path.stat().st_size for path in files)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    outcome = call_tool("info", tmp_path)
    assert outcome.status == ExitStatus.NO_WEIGHTS
    assert str(tmp_path) in outcome.error_line
    assert call_tool("info", tmp_path / "nothing").status == ExitStatus.NO_WEIGHTS
