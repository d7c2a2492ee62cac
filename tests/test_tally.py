"""tools/info/tally.py: what a framed stream comes to, against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.protocol.messages import MAX_MESSAGE_BYTES, Kind, Message, encode_message, in_stream
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.tools.info.tally import Tally


def tally_of(*messages: tuple[int, bytes], cut: int = 0, piece_bytes: int = 1 << 16) -> tuple[dict[str, Any], str]:
    data = b"".join(encode_message(kind, payload) for kind, payload in messages)
    data = data[: len(data) - cut]
    tally = Tally(MAX_MESSAGE_BYTES)
    maybe_fault = tally.read(data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes))
    return tally.facts(), str(maybe_fault or "")


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def artifact(frames: int = 5, quantizers: int = 16, original_samples: int = 19000) -> bytes:
    codes = np.arange(frames * quantizers, dtype=np.uint16).reshape(frames, quantizers)
    return build_artifact(Artifact(48000, 2, original_samples, quantizers, frames, 1024, codes))


def test_an_inbound_stream() -> None:
    whole = artifact()
    facts, fault = tally_of(
        (Kind.TOKENS, bytes(40)),
        (Kind.TOKENS, b""),
        (Kind.TOKENS, bytes(20)),
        (Kind.PING, b"hi"),
        (Kind.END, b""),
        (Kind.ARTIFACT, whole[:10]),
        (Kind.ARTIFACT, whole[10:]),
        (0x55, b"?"),
        piece_bytes=3,
    )
    assert fault == ""
    assert facts["messages"] == {"TOKENS": 3, "PING": 1, "END": 1, "ARTIFACT": 2, "kind 0x55": 1}
    assert facts["payload_bytes"] == 60 + 2 + len(whole) + 1
    assert facts["frames"] == 3 + 5
    assert facts["seconds"] == pytest.approx(3 * 0.08 + 19000 / 48000)
    assert (facts["error_count"], facts["truncated"], facts["incomplete_bytes"]) == (0, False, 0)
    assert facts["format_is"] == "assumed (nano's)"


def test_a_stream_of_another_model() -> None:
    tally = Tally(MAX_MESSAGE_BYTES, "24k")
    assert tally.read([encode_message(Kind.TOKENS, bytes(2 * 40))]) is None
    assert (tally.facts()["frames"], tally.facts()["seconds"]) == (2, pytest.approx(0.16))
    assert tally.facts()["format_is"] == "assumed (24k's)"


def test_an_outbound_stream() -> None:
    facts, fault = tally_of(
        (Kind.HANDSHAKE, as_json(protocol=1, sample_rate=24000, channels=1, frame_samples=1920, name="x")),
        (Kind.AUDIO, bytes(3840)),
        (Kind.ERROR, as_json(code="bad_tokens", message="why", stream=0)),
        (Kind.AUDIO, bytes(100)),
        (Kind.END, as_json(stream=0, frames=1)),
        (Kind.END, as_json(stream=1, frames=2)),
    )
    assert fault == ""
    assert facts["frames"] == 3
    assert facts["audio_samples"] == 1920 + 50
    assert facts["seconds"] == pytest.approx(1970 / 24000)
    assert facts["errors"] == ["bad_tokens: why"]
    assert facts["format_is"] == "as the stream says"


def test_settings_change_the_size_of_frames() -> None:
    facts, _ = tally_of((Kind.SETTINGS, as_json(quantizers=8)), (Kind.TOKENS, bytes(40)))
    assert facts["frames"] == 4
    assert facts["format"]["quantizers"] == 8


@pytest.mark.parametrize("nonsense", [{"codebook_size": 1}, {"quantizers": 0}, {"quantizers": True}, {"channels": -1}])
def test_a_format_that_makes_no_sense_is_not_believed(nonsense: dict[str, Any]) -> None:
    facts, _ = tally_of((Kind.HANDSHAKE, as_json(**nonsense)), (Kind.TOKENS, bytes(40)), (Kind.AUDIO, bytes(8)))
    assert facts["frames"] == 2
    assert facts["audio_samples"] == 2


@pytest.mark.parametrize(
    ("messages", "errors"),
    [
        ([(Kind.TOKENS, bytes(21))], ["TOKENS: 21 bytes are no whole number of frames of 20 bytes"]),
        ([(Kind.HANDSHAKE, b"{")], ["HANDSHAKE: the payload of HANDSHAKE is no JSON"]),
        ([(Kind.ERROR, b"[]")], ["ERROR: the payload of ERROR is JSON, but a list"]),
        ([(Kind.ARTIFACT, b"X" * 40), (Kind.ARTIFACT, bytes(10))], ["ARTIFACT: the first bytes are"]),
        ([(Kind.ARTIFACT, artifact()[:50]), (Kind.END, b"")], ["END: an artifact is cut: 82 bytes"]),
        ([(Kind.ARTIFACT, artifact()[:50]), (Kind.CANCEL, b"")], []),
    ],
)
def test_what_is_wrong_is_counted_and_passed_over(messages: list[tuple[int, bytes]], errors: list[str]) -> None:
    facts, fault = tally_of(*messages, (Kind.ARTIFACT, artifact()))
    assert fault == ""
    assert facts["error_count"] == len(errors)
    assert all(found.startswith(expected) for found, expected in zip(facts["errors"], errors, strict=True))
    assert facts["frames"] == 5 + (1 if messages[0][0] == Kind.TOKENS else 0)


def test_many_errors_are_counted_and_few_are_kept() -> None:
    facts, _ = tally_of(*[(Kind.TOKENS, b"x")] * 1000)
    assert facts["error_count"] == 1000
    assert len(facts["errors"]) == 10


@pytest.mark.parametrize("cut", [1, 3, 19])
def test_a_cut_inside_a_message(cut: int) -> None:
    facts, fault = tally_of((Kind.TOKENS, bytes(20)), (Kind.TOKENS, bytes(20)), cut=cut)
    assert facts["truncated"] is True
    assert facts["incomplete_bytes"] == 25 - cut
    assert facts["frames"] == 1
    assert fault == f"the stream is cut inside a message: {25 - cut} bytes of it are there"


@pytest.mark.parametrize("there", [0, 1, 40])
def test_a_cut_inside_an_artifact(there: int) -> None:
    facts, fault = tally_of((Kind.ARTIFACT, artifact()[:there]))
    assert facts["truncated"] is True
    assert fault.startswith("the stream is cut inside an artifact: ")


LONG_ECDC = (Path(__file__).parent / "reference" / "encodec" / "long.raw.ecdc").read_bytes()  # 101,567 samples


def test_an_ecdc_counts_as_an_artifact() -> None:
    pieces = [(Kind.ARTIFACT, LONG_ECDC[start : start + 500]) for start in range(0, len(LONG_ECDC), 500)]
    bad_version = (Kind.ARTIFACT, b"ECDC\x01" + LONG_ECDC[5:500])
    facts, fault = tally_of((Kind.ARTIFACT, b""), *pieces, bad_version, *pieces[1:], *pieces)
    assert fault == ""
    assert facts["errors"] == ["ARTIFACT: the .ecdc's version is 1, allowed is 0"]
    assert facts["frames"] == 2 * 321
    assert facts["seconds"] == pytest.approx(2 * 101_567 / 48_000)


@pytest.mark.parametrize("end", [(), ((Kind.END, b""),)])
def test_a_cut_inside_an_ecdc(end: tuple[tuple[int, bytes], ...]) -> None:
    facts, fault = tally_of((Kind.ARTIFACT, LONG_ECDC[:-5]), *end)
    cut = "the .ecdc is cut inside segment 2: 5 bytes are missing"
    if end:
        assert facts["errors"] == [f"END: an artifact is cut: {cut}"]
    else:
        assert fault == f"the stream is cut inside an artifact: {cut}"
    assert facts["frames"] == 0


def test_an_impossible_length_ends_the_count() -> None:
    tally = Tally(MAX_MESSAGE_BYTES)
    maybe_fault = tally.read([encode_message(Kind.PING) + b"RIFF"])
    assert "length of" in str(maybe_fault)
    assert tally.facts()["messages"] == {"PING": 1}
    assert tally.facts()["truncated"] is False


# --- numbered streams, and every form ----------------------------------------------------------------------------


def numbered(number: int, kind: int, payload: bytes = b"") -> tuple[int, bytes]:
    message = in_stream(number, Message(kind, payload))
    return message.kind, message.payload


def test_numbered_streams_on_their_way_in() -> None:
    whole = artifact()
    facts, fault = tally_of(
        (Kind.SETTINGS, as_json(quantizers=8, sample_rate=16000)),
        numbered(3, Kind.CREDIT, bytes(8)),
        numbered(3, Kind.TOKENS, bytes(40)),
        numbered(4, Kind.ARTIFACT, whole[:50]),
        numbered(5, Kind.SETTINGS, as_json(quantizers=16)),
        (Kind.TOKENS, bytes(10)),
        numbered(5, Kind.TOKENS, bytes(40)),
        numbered(3, Kind.MARK, b"hello"),
        numbered(4, Kind.ARTIFACT, whole[50:]),
        numbered(3, Kind.END),
    )
    assert fault == ""
    assert facts["messages"] == {
        "SETTINGS": 1, "TOKENS": 1, "numbered CREDIT": 1, "numbered TOKENS": 2, "numbered ARTIFACT": 2,
        "numbered SETTINGS": 1, "numbered MARK": 1, "numbered END": 1,
    }  # fmt: skip
    assert (facts["frames"], facts["error_count"], facts["numbered_streams"]) == (1 + 4 + 5 + 2, 0, 3)
    assert facts["seconds"] == pytest.approx(7 * 0.08 + 19000 / 48000)
    assert {number: stream["frames"] for number, stream in facts["streams"].items()} == {"3": 4, "4": 5, "5": 2}
    assert facts["streams"]["3"]["messages"] == {"CREDIT": 1, "TOKENS": 1, "MARK": 1, "END": 1}
    assert [stream["end"] for stream in facts["streams"].values()] == ["whole", None, None]


def test_numbered_streams_on_their_way_out_each_in_its_form() -> None:
    said: dict[str, Any] = {"sample_rate": 16000, "channels": 1, "codec_sample_rate": 48000, "codec_channels": 2}
    facts, fault = tally_of(
        (Kind.HANDSHAKE, as_json(**said)),
        numbered(1, Kind.AUDIO, bytes(3200)),
        numbered(2, Kind.HANDSHAKE, as_json(**said | {"channels": 2, "sample_format": "f32le"})),
        numbered(2, Kind.LEVELS, bytes(2)),
        numbered(2, Kind.AUDIO, bytes(3200)),
        numbered(1, Kind.END, as_json(frames=2)),
        numbered(2, Kind.ERROR, as_json(code="bad_tokens", message="why", stream=2)),
        numbered(2, Kind.END, as_json(frames=1, cancelled=True)),
        (Kind.AUDIO, bytes(320)),
    )
    assert fault == ""
    assert (facts["frames"], facts["audio_samples"]) == (3, 1600 + 400 + 160)
    assert facts["seconds"] == pytest.approx(2160 / 16000)
    assert (facts["format"]["sample_rate"], facts["format"]["channels"]) == (48000, 2)
    assert facts["form"] == {"sample_rate": 16000, "channels": 1, "sample_format": "s16le"}
    assert facts["errors"] == ["bad_tokens: why"]
    assert facts["streams"] == {
        "1": {
            "messages": {"AUDIO": 1, "END": 1}, "frames": 2, "audio_samples": 1600, "seconds": 0.1,
            "sample_rate": 16000, "channels": 1, "sample_format": "s16le", "error_count": 0, "end": "whole",
        },
        "2": {
            "messages": {"HANDSHAKE": 1, "LEVELS": 1, "AUDIO": 1, "ERROR": 1, "END": 1}, "frames": 1,
            "audio_samples": 400, "seconds": 0.025, "sample_rate": 16000, "channels": 2, "sample_format": "f32le",
            "error_count": 1, "end": "cancelled",
        },
    }  # fmt: skip


def test_the_sum_of_many_streams_and_the_facts_of_the_first() -> None:
    messages = [numbered(number, Kind.TOKENS, bytes(20)) for number in range(1000)]
    facts, _ = tally_of(*[message for each in messages for message in (each, (0x87, each[1][:4]))])
    assert (facts["frames"], facts["numbered_streams"]) == (1000, 1000)
    assert list(facts["streams"]) == [str(number) for number in range(32)]
    assert facts["seconds"] == pytest.approx(80)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ((0x84, b"abc"), "numbered TOKENS: a message of kind 0x84 has a payload of 3 bytes"),
        (numbered(9, Kind.TOKENS, b"x"), "numbered TOKENS: in stream 9, 1 bytes are no whole number of frames"),
        (numbered(9, Kind.HANDSHAKE, b"{"), "numbered HANDSHAKE: in stream 9, the payload of HANDSHAKE is no JSON"),
    ],
)
def test_what_is_wrong_in_a_numbered_stream(message: tuple[int, bytes], line: str) -> None:
    facts, _ = tally_of(message)
    assert facts["error_count"] == 1
    assert facts["errors"][0].startswith(line)


def test_a_cut_inside_an_artifact_of_a_numbered_stream() -> None:
    facts, fault = tally_of(*[numbered(number, Kind.ARTIFACT, artifact()[:40]) for number in (8, 9)])
    assert facts["truncated"] is True
    assert fault == "the stream is cut inside an artifact, in stream 8, 9"


@given(st.lists(st.tuples(st.one_of(st.integers(0, 14), st.integers(0x80, 0x8E)), st.binary(max_size=60)), max_size=12))
def test_any_messages_are_counted_without_an_error_of_ours(messages: list[tuple[int, bytes]]) -> None:
    facts, _ = tally_of(*messages)
    assert sum(facts["messages"].values()) == len(messages)
    assert facts["payload_bytes"] == sum(len(payload) for _, payload in messages)
