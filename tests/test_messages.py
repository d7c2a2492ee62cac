"""protocol/messages.py: any split of the input gives the same messages, and nothing but ProtocolError is raised."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.errors import ExitStatus, PayloadError, ProtocolError
from mossnano_stdio.protocol.messages import (
    MAX_MESSAGE_BYTES,
    Kind,
    Message,
    MessageReader,
    encode_message,
    json_message,
    kind_name,
    parse_json,
)

THREE = [Message(Kind.PING, b"abc"), Message(0x42), Message(Kind.TOKENS, bytes(40))]
WIRE = b"".join(encode_message(*message) for message in THREE)


def read_in_pieces(wire: bytes, cuts: list[int], max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[Message | str]:
    """What a reader makes of `wire`, cut at `cuts`; a ProtocolError ends it and stands for itself."""
    reader = MessageReader(max_message_bytes)
    seen: list[Message | str] = []
    edges = [0, *sorted(cut % (len(wire) + 1) for cut in cuts), len(wire)]
    try:
        for start, end in itertools.pairwise(edges):
            seen.extend(reader.feed(wire[start:end]))
        seen.append(f"{reader.incomplete_bytes} bytes incomplete")
    except ProtocolError as error:
        seen.append(str(error))
    return seen


def test_bytes_of_a_message_are_as_they_were_worked_out_by_hand() -> None:
    assert encode_message(Kind.END).hex() == "0100000007"
    assert encode_message(Kind.TOKENS, bytes(20)).hex() == "1500000004" + "00" * 20
    assert encode_message(0xFF, b"\x01\x02").hex() == "03000000ff0102"


@pytest.mark.parametrize("message", [*THREE, *(Message(kind, b"x") for kind in Kind)])
def test_each_message_is_read_whole_byte_by_byte_and_with_trailing_data(message: Message) -> None:
    wire = encode_message(*message)
    whole, after = [message, "0 bytes incomplete"], [message, "3 bytes incomplete"]
    assert read_in_pieces(wire, []) == whole
    assert read_in_pieces(wire, list(range(len(wire)))) == whole
    assert read_in_pieces(wire + b"\x09\x00\x00", []) == after
    assert read_in_pieces(wire + b"\x09\x00\x00", list(range(len(wire) + 3))) == after


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=20), st.integers(1, 60))
def test_any_bytes_give_the_same_for_every_split(wire: bytes, cuts: list[int], cap: int) -> None:
    assert read_in_pieces(wire, cuts, cap) == read_in_pieces(wire, [], cap)


@given(
    st.lists(st.builds(Message, st.integers(0, 255), st.binary(max_size=80)), max_size=12),
    st.lists(st.integers(0, 2000), max_size=20),
)
def test_what_was_encoded_is_what_is_read(messages: list[Message], cuts: list[int]) -> None:
    wire = b"".join(encode_message(*message) for message in messages)
    assert read_in_pieces(wire, cuts) == [*messages, "0 bytes incomplete"]


@pytest.mark.parametrize("length", [0, 101, 2**31, 2**32 - 1])
@pytest.mark.parametrize("cuts", [[], list(range(200))])
def test_an_impossible_length_is_fatal_and_what_came_before_is_answered(length: int, cuts: list[int]) -> None:
    seen = read_in_pieces(WIRE + struct.pack("<I", length), cuts, 100)
    assert seen[:3] == THREE
    assert seen[3] == (
        f"a message claims a length of {length} bytes; 1 to 100 are allowed "
        "(the peer lost count, sends something else, or needs a larger --max-message-bytes)"
    )


def test_the_longest_allowed_message_is_read() -> None:
    longest = Message(Kind.TOKENS, bytes(99))
    assert read_in_pieces(encode_message(*longest), [50], 100) == [longest, "0 bytes incomplete"]


def test_framing_stays_lost() -> None:
    reader = MessageReader()
    for _ in range(2):
        with pytest.raises(ProtocolError) as caught:
            list(reader.feed(bytes(4)))
    assert caught.value.exit_status == ExitStatus.FRAMING_LOST


def test_a_bare_artifact_is_told_how_to_be_framed() -> None:
    with pytest.raises(ProtocolError, match=r"`mossnano frame FILE \| mossnano-stdio`"):
        list(MessageReader().feed(b"MOSSNANO"))


@pytest.mark.parametrize("length", [2**32 - 1, MAX_MESSAGE_BYTES])
def test_nothing_is_allocated_for_a_length_that_is_only_claimed(length: int) -> None:
    reader = MessageReader()
    tracemalloc.start()
    with contextlib.suppress(ProtocolError):
        list(reader.feed(struct.pack("<IB", length, Kind.TOKENS)))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_a_consumer_that_stops_half_way_finds_the_rest_later() -> None:
    reader = MessageReader()
    messages = reader.feed(WIRE)
    assert next(messages) == THREE[0]
    messages.close()  # type: ignore[attr-defined]
    assert list(reader.feed(b"")) == THREE[1:]


def test_json_survives_the_way_there_and_back() -> None:
    fields = {"text": "naïve \n", "number": 3, "none": None, "list": [1, 2]}
    message = json_message(Kind.SETTINGS, fields)
    assert message.payload.isascii()
    assert parse_json(message) == fields
    assert parse_json(Message(Kind.END, json.dumps(fields, ensure_ascii=False).encode())) == fields


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[1]", "a list where an object belongs"),
        (b"7", "a int where an object belongs"),
    ],
)
def test_what_is_no_json_object_is_a_bad_payload(payload: bytes, says: str) -> None:
    with pytest.raises(PayloadError, match=says):
        parse_json(Message(Kind.SETTINGS, payload))


def test_json_never_holds_what_json_cannot() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_message(Kind.SETTINGS, {"value": float("nan")})


def test_every_kind_has_a_name_for_people() -> None:
    assert [kind_name(kind) for kind in (0, 10, 13, 255)] == ["HANDSHAKE", "CREDIT", "kind 0x0d", "kind 0xff"]
