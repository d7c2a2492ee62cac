"""tools/info/tally.py: what a framed stream comes to, against counts made by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.protocol.messages import MAX_MESSAGE_BYTES, Kind, encode_message
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


def test_an_impossible_length_ends_the_count() -> None:
    tally = Tally(MAX_MESSAGE_BYTES)
    maybe_fault = tally.read([encode_message(Kind.PING) + b"RIFF"])
    assert "length of" in str(maybe_fault)
    assert tally.facts()["messages"] == {"PING": 1}
    assert tally.facts()["truncated"] is False


@given(st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=60)), max_size=12))
def test_any_messages_are_counted_without_an_error_of_ours(messages: list[tuple[int, bytes]]) -> None:
    facts, _ = tally_of(*messages)
    assert sum(facts["messages"].values()) == len(messages)
    assert facts["payload_bytes"] == sum(len(payload) for _, payload in messages)
