"""Encoding: its transition table, and that any cut of the audio gives the same tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.chunks import Fixed, Ramp, Schedule
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE
from mossnano_stdio.protocol.encoding import ENCODE, ENCODING
from mossnano_stdio.protocol.messages import Kind, Message, json_message
from mossnano_stdio.protocol.stream import State
from tests.doubles import (
    SMALL,
    CountingDecoder,
    CountingEncoder,
    advance,
    close,
    expected_codes,
    handle,
    tokens_payload,
)

END = Message(Kind.END)
SAMPLE_BYTES = 4


def noise(samples: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(-32767, 32768, samples * 2).astype("<i2").tobytes()


PCM = noise(18)  # four frames and a half


class Talk:
    def __init__(self, encoder: CountingEncoder | None = None, schedule: Schedule | None = None) -> None:
        self.encoder = encoder or CountingEncoder()
        self.cancels_waiting = 0
        self.connection = Connection(
            ENCODE,
            lambda: self.encoder,
            schedule or Ramp(),
            {"protocol": 1},
            cancel_waiting=lambda: self.cancels_waiting > 0,
        )

    def say(self, *messages: Message) -> list[Message]:
        answers: list[Message] = []
        for message in messages:
            self.cancels_waiting -= message.kind == Kind.CANCEL
            answers.extend(handle(self.connection, message))
            while self.connection.due_lanes():
                answers.extend(advance(self.connection))
        return answers


def fields(message: Message) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(message.payload)
    return parsed


def tokens_of(answers: Sequence[Message]) -> bytes:
    return b"".join(answer.payload for answer in answers if answer.kind == Kind.TOKENS)


def names(answers: Sequence[Message]) -> list[str]:
    return [
        fields(answer)["code"] if answer.kind == Kind.ERROR else Kind(answer.kind).name
        for answer in answers
        if answer.kind != Kind.TOKENS
    ]


@given(
    st.integers(0, 40),
    st.lists(st.integers(0, 200), max_size=10),
    st.sampled_from([Ramp(), Ramp(1), Fixed(1), Fixed(3), Fixed(50)]),
)
def test_any_cut_of_the_audio_gives_the_same_tokens(samples: int, cuts: list[int], schedule: Schedule) -> None:
    pcm = noise(samples)
    edges = [0, *sorted(cut % (len(pcm) + 1) for cut in cuts), len(pcm)]
    pieces = [Message(Kind.AUDIO, pcm[start:end]) for start, end in itertools.pairwise(edges)]
    answers = Talk(schedule=schedule).say(*pieces, END)
    assert tokens_of(answers) == tokens_payload(expected_codes(pcm))
    frames = -(-samples // SMALL.frame_samples)
    assert fields(answers[-1]) == {
        "stream": 0,
        "frames": frames,
        "samples": frames * SMALL.frame_samples,
        "original_samples": samples,
        "cancelled": False,
        "errors": 0,
        "next_stream": 1,
    }


def test_a_frame_is_answered_as_soon_as_it_is_full() -> None:
    talk = Talk()
    assert talk.say(Message(Kind.AUDIO, PCM[: 4 * SAMPLE_BYTES - 1])) == []
    answers = talk.say(Message(Kind.AUDIO, PCM[4 * SAMPLE_BYTES - 1 : 4 * SAMPLE_BYTES]))
    assert tokens_of(answers) == tokens_payload(expected_codes(PCM[: 4 * SAMPLE_BYTES]))


def test_streams_leave_nothing_behind() -> None:
    talk = Talk()
    first = talk.say(Message(Kind.AUDIO, PCM), END)
    again = talk.say(Message(Kind.AUDIO, PCM), END)
    assert tokens_of(first) == tokens_of(again)
    assert fields(again[-1])["stream"] == 1


def test_a_sample_that_is_cut_at_the_end_is_an_error() -> None:
    talk = Talk()
    answers = talk.say(Message(Kind.AUDIO, PCM + b"\1\2\3"), END)
    assert names(answers) == ["bad_audio", "END"]
    assert tokens_of(answers) == tokens_payload(expected_codes(PCM))
    assert tokens_of(talk.say(Message(Kind.AUDIO, PCM), END)) == tokens_payload(expected_codes(PCM))


def test_fewer_quantizers_are_the_first_codes_of_each_frame() -> None:
    talk = Talk()
    now = talk.say(json_message(Kind.SETTINGS, {"quantizers": 2, "chunk_frames": 2}))
    assert (fields(now[0])["quantizers"], fields(now[0])["direction"]) == (2, "encode")
    answers = talk.say(Message(Kind.AUDIO, PCM), END)
    assert tokens_of(answers) == tokens_payload([frame[:2] for frame in expected_codes(PCM)])


def test_a_cancel_drops_what_was_not_encoded() -> None:
    talk = Talk()
    talk.say(Message(Kind.AUDIO, PCM[:20]))
    talk.cancels_waiting = 1
    answers = talk.say(Message(Kind.AUDIO, PCM), Message(Kind.CANCEL, b"off"))
    assert names(answers) == ["END"]
    assert (fields(answers[0])["cancelled"], fields(answers[0])["frames"]) == (True, 1)
    assert tokens_of(talk.say(Message(Kind.AUDIO, PCM), END)) == tokens_payload(expected_codes(PCM))


@pytest.mark.parametrize("kind", [Kind.TOKENS, Kind.ARTIFACT, Kind.TEXT, 0x55])
def test_what_only_a_decoder_takes_is_unknown(kind: int) -> None:
    assert names(Talk().say(Message(kind, bytes(20)))) == ["unknown_kind"]


def test_a_step_that_fails_ends_its_stream_only() -> None:
    talk = Talk(CountingEncoder(failing_steps=[1]))
    assert names(talk.say(Message(Kind.AUDIO, PCM), Message(Kind.AUDIO, PCM), END)) == ["decode_failed", "END"]
    assert tokens_of(talk.say(Message(Kind.AUDIO, PCM), END)) == tokens_payload(expected_codes(PCM))


def test_a_peer_whose_numbers_differ_is_not_encoded() -> None:
    talk = Talk()
    answers = talk.say(json_message(Kind.HANDSHAKE, {"sample_rate": 44100}), Message(Kind.AUDIO, PCM), END)
    assert names(answers) == ["handshake_mismatch", "bad_audio", "END"]
    assert tokens_of(answers) == b""


@given(
    st.lists(st.tuples(st.sampled_from(["AUDIO", "END", "CANCEL", "CANCEL at once"]), st.integers(0, 9)), max_size=12)
)
def test_whatever_it_is_told_a_decoder_behind_it_has_nothing_to_refuse(told: list[tuple[str, int]]) -> None:
    conversation = Talk()
    answers = [conversation.connection.handshake()]
    for what, samples in told:
        if what == "AUDIO":
            answers += conversation.say(Message(Kind.AUDIO, noise(samples)))
        elif what == "CANCEL at once":
            conversation.cancels_waiting += 1
            answers += conversation.say(Message(Kind.AUDIO, noise(samples)), Message(Kind.CANCEL))
        elif what == "CANCEL":
            conversation.cancels_waiting += 1
            answers += conversation.say(Message(Kind.CANCEL))
        elif conversation.connection.plain.state is not State.IDLE:
            answers += conversation.say(END)
    decoder = Connection(DECODE, lambda: CountingDecoder(), Ramp(), {})
    heard = [answer for message in answers for answer in decoded(decoder, message)]
    assert [answer for answer in heard if answer.kind == Kind.ERROR] == []
    streams = [fields(answer)["stream"] for answer in answers if answer.kind == Kind.END]
    ends = sum(answer.kind == Kind.END for answer in heard)
    assert ends == sum(stream is not None for stream in streams)


def decoded(connection: Connection, message: Message) -> list[Message]:
    answers = list(handle(connection, message))
    while connection.due_lanes():
        answers += advance(connection)
    return answers


def test_end_of_input_ends_the_stream() -> None:
    talk = Talk(schedule=Fixed(3))
    answers = talk.say(Message(Kind.AUDIO, PCM)) + list(close(talk.connection))
    assert tokens_of(answers) == tokens_payload(expected_codes(PCM))
    assert fields(answers[-1])["original_samples"] == 18


def test_the_table_has_a_cell_for_every_state_and_every_inbound_kind() -> None:
    inbound = {kind for _, kind in ENCODING}
    assert inbound == set(Kind) - {Kind.TOKENS, Kind.ARTIFACT, Kind.TEXT, Kind.CREDIT, Kind.MARK, Kind.LEVELS}
    assert set(ENCODING) == {
        (state, kind) for state in (State.IDLE, State.OPEN, State.AUDIO, State.SKIP) for kind in inbound
    }
    assert all(callable(action) for action in ENCODING.values())
