"""Decoding: every cell of the transition table, and that streams leave no trace in one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.chunks import Fixed, Ramp, Schedule
from mossnano_stdio.errors import DecodeError, ProtocolError
from mossnano_stdio.protocol.connection import MAX_SENT_BYTES, Connection, Direction
from mossnano_stdio.protocol.decoding import DECODE, DECODE_TO_ZEROS, DECODING
from mossnano_stdio.protocol.messages import Kind, Message, json_message
from mossnano_stdio.protocol.stream import State
from tests.doubles import (
    NANO,
    SMALL,
    CountingDecoder,
    advance,
    artifact_bytes,
    close,
    expected_pcm,
    handle,
    some_frames,
    tokens_payload,
)

END = Message(Kind.END)
PING = Message(Kind.PING, b"are you there?")
FRAMES = some_frames(5)


class Talk:
    """A connection, what was said to it, and what it answered."""

    def __init__(
        self,
        decoder: CountingDecoder | None = None,
        schedule: Schedule | None = None,
        direction: Direction = DECODE,
    ) -> None:
        self.decoder = decoder or CountingDecoder()
        self.cancels_waiting = 0
        self.connection = Connection(
            direction,
            lambda: self.decoder,
            schedule or Ramp(),
            {"protocol": 1, "demo": False},
            cancel_waiting=lambda: self.cancels_waiting > 0,
        )

    def say(self, *messages: Message) -> list[Message]:
        """Each message dealt with before the next one comes, as if the peer were slow."""
        answers: list[Message] = []
        for message in messages:
            if message.kind == Kind.CANCEL:
                self.cancels_waiting -= 1
            answers.extend(handle(self.connection, message))
            while self.connection.due_lanes():
                answers.extend(advance(self.connection))
        return answers

    def say_and_cancel(self, *messages: Message, cancel: bytes = b"") -> list[Message]:
        """The messages are still waiting when a CANCEL comes in behind them."""
        self.cancels_waiting += 1
        return self.say(*messages, Message(Kind.CANCEL, cancel))


def is_sated(talk: Talk) -> bool:
    stream = talk.connection.plain.stream
    return stream is not None and stream.chunks.is_sated


def tokens(frames: Sequence[Sequence[int]]) -> Message:
    return Message(Kind.TOKENS, tokens_payload(frames))


def artifact(frames: Sequence[Sequence[int]], maybe_samples: int | None = None) -> Message:
    return Message(Kind.ARTIFACT, artifact_bytes(frames, SMALL, maybe_samples))


def fields(message: Message) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(message.payload)
    return parsed


def pcm(answers: Sequence[Message]) -> bytes:
    return b"".join(answer.payload for answer in answers if answer.kind == Kind.AUDIO)


def outline(answers: Sequence[Message]) -> list[str]:
    """Answers in a word each: ERRORs by their code, ENDs by their stream."""
    words = []
    for answer in answers:
        match answer.kind:
            case Kind.ERROR:
                words.append(fields(answer)["code"])
            case Kind.END:
                words.append(f"END {fields(answer)['stream']}" + (" cancelled" * fields(answer)["cancelled"]))
            case kind:
                words.append(Kind(kind).name)
    return words


def end_of(stream: int | None, frames: int, errors: int = 0, **more: Any) -> dict[str, Any]:
    usual = {"samples": frames * SMALL.frame_samples, "cancelled": False, "next_stream": (stream or 0) + 1}
    usual |= {} if stream is None else {"clipped_samples": 0}
    return {"stream": stream, "frames": frames, "errors": errors} | usual | more


# --- streams ---------------------------------------------------------------------------------------


def test_an_encoder_that_had_nothing_to_cancel_is_not_refused() -> None:
    conversation = Talk()
    assert conversation.say(json_message(Kind.END, {"stream": None, "cancelled": True})) == []
    for other in (json_message(Kind.END, {"stream": 0}), json_message(Kind.END, {}), Message(Kind.END, b"null")):
        assert outline(conversation.say(other)) == ["no_stream"]


@given(st.lists(st.integers(0, 4), max_size=6), st.sampled_from([Ramp(), Ramp(1), Fixed(1), Fixed(3), Fixed(100)]))
def test_a_token_stream_is_its_frames_however_they_come(pieces: list[int], schedule: Schedule) -> None:
    frames = some_frames(sum(pieces) + 1)
    messages, start = [], 0
    for count in [*pieces, 1]:
        messages.append(tokens(frames[start : start + count]))
        start += count
    answers = Talk(schedule=schedule).say(*messages, END)
    assert pcm(answers) == expected_pcm(frames, SMALL)
    assert fields(answers[-1]) == end_of(0, len(frames))


def test_a_lone_frame_is_answered_at_once() -> None:
    answers = Talk().say(tokens(FRAMES[:1]))
    assert outline(answers) == ["AUDIO"]
    assert pcm(answers) == expected_pcm(FRAMES[:1], SMALL)


def test_the_ramp_takes_what_waits() -> None:
    talk = Talk()
    talk.say(tokens(some_frames(30)), END, tokens(FRAMES[:1]))
    assert talk.decoder.steps == [1, 2, 4, 8, 8, 7, 1]


def test_tokens_only_queue_until_the_next_chunk_is_asked_for() -> None:
    talk = Talk(schedule=Fixed(2))
    assert list(handle(talk.connection, tokens(FRAMES[:1]))) == []
    assert (bool(talk.connection.due_lanes()), is_sated(talk)) == (False, False)
    assert list(handle(talk.connection, tokens(FRAMES[1:5]))) == []
    assert (bool(talk.connection.due_lanes()), is_sated(talk)) == (True, True)
    assert len(list(advance(talk.connection))) == 1
    assert talk.decoder.steps == [2]


def test_each_chunk_is_decoded_only_when_its_message_is_taken() -> None:
    talk = Talk()
    answers = handle(talk.connection, artifact(some_frames(20)))
    next(answers)
    assert talk.decoder.steps == [1]
    next(answers)
    assert talk.decoder.steps == [1, 2]


def test_an_empty_token_stream_is_a_stream() -> None:
    answers = Talk().say(Message(Kind.TOKENS), END)
    assert [fields(answer) for answer in answers] == [end_of(0, 0)]


@pytest.mark.parametrize("piece_bytes", [1, 7, 31, 32, 33, 1000])
@pytest.mark.parametrize("samples", [0, 1, 19, 20])
def test_an_artifact_is_a_stream_of_its_own_trimmed_to_its_samples(piece_bytes: int, samples: int) -> None:
    whole = artifact_bytes(FRAMES, SMALL, samples)
    talk = Talk()
    answers = talk.say(
        *(Message(Kind.ARTIFACT, whole[at : at + piece_bytes]) for at in range(0, len(whole), piece_bytes))
    )
    assert pcm(answers) == expected_pcm(FRAMES, SMALL)[: samples * 4]
    assert fields(answers[-1]) == end_of(0, 5, samples=samples)
    assert all(answer.payload for answer in answers)
    assert talk.connection.plain.state is State.IDLE


def test_streams_are_numbered_and_start_from_nothing() -> None:
    talk = Talk()
    first = talk.say(tokens(FRAMES), END)
    between = talk.say(artifact(FRAMES[:2]))
    again = talk.say(tokens(FRAMES), END)
    assert pcm(first) == pcm(again) == expected_pcm(FRAMES, SMALL)
    assert [outline(answers)[-1] for answers in (first, between, again)] == ["END 0", "END 1", "END 2"]


def test_a_chunk_larger_than_an_audio_message_may_be_is_split() -> None:
    frames = some_frames(140, NANO)
    answers = Talk(CountingDecoder(NANO), Fixed(140)).say(Message(Kind.TOKENS, tokens_payload(frames)), END)
    sizes = [len(answer.payload) for answer in answers[:-1]]
    most = MAX_SENT_BYTES // 4 * 4
    assert sizes == [most, most, 140 * NANO.frame_pcm_bytes - 2 * most]
    assert pcm(answers) == expected_pcm(frames, NANO)


# --- a frame of zeros ------------------------------------------------------------------------------

ZEROS = [[0] * 4]


@given(
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 9),
    st.sampled_from([Ramp(), Fixed(1), Fixed(4), Fixed(100)]),
)
def test_a_frame_of_zeros_ends_what_is_decoded(before: int, after: int, piece_frames: int, schedule: Schedule) -> None:
    frames = some_frames(before)
    sent = frames + ZEROS + some_frames(after, seed=1)
    pieces = [tokens(sent[at : at + piece_frames]) for at in range(0, len(sent), piece_frames)]
    talk = Talk(schedule=schedule, direction=DECODE_TO_ZEROS)
    answers = talk.say(*pieces)
    assert pcm(answers) == expected_pcm(frames, SMALL)  # at once, although END has not come
    assert [fields(answer) for answer in talk.say(END)] == [end_of(0, before)]
    assert pcm(talk.say(tokens(FRAMES), END)) == expected_pcm(FRAMES, SMALL)


@pytest.mark.parametrize("ending", [END, Message(Kind.CANCEL)], ids=["END", "CANCEL"])
def test_what_follows_a_frame_of_zeros_is_not_looked_at(ending: Message) -> None:
    talk = Talk(direction=DECODE_TO_ZEROS)
    assert outline(talk.say(tokens(FRAMES[:1] + ZEROS), *BAD_TOKENS.values(), PING)) == ["AUDIO", "PING"]
    assert outline(talk.say(Message(Kind.SETTINGS, b"{}"))) == ["out_of_place"]  # the stream is open still
    (end,) = talk.say(ending)
    assert (fields(end)["frames"], fields(end)["errors"]) == (1, 1)
    assert outline(talk.say(tokens(FRAMES[:1]), END)) == ["AUDIO", "END 1"]


@pytest.mark.parametrize("samples", [0, 7, 8, 9, 24])
def test_an_artifact_ends_before_its_frame_of_zeros(samples: int) -> None:
    answers = Talk(direction=DECODE_TO_ZEROS).say(artifact(FRAMES[:2] + ZEROS + FRAMES[2:], samples))
    assert pcm(answers) == expected_pcm(FRAMES[:2], SMALL)[: samples * 4]
    assert fields(answers[-1]) == end_of(0, 2, samples=min(samples, 8))


def test_zeros_are_decoded_unless_they_are_to_end_a_stream() -> None:
    frames = FRAMES[:2] + ZEROS + FRAMES[2:]
    assert pcm(Talk().say(tokens(frames), END)) == expected_pcm(frames, SMALL)


# --- pings, handshakes, settings -------------------------------------------------------------------


def test_a_ping_comes_back_after_all_that_was_due() -> None:
    talk = Talk()
    list(handle(talk.connection, tokens(FRAMES)))
    assert outline(talk.say(PING)) == ["AUDIO"] * 3 + ["PING"]
    assert talk.say(PING) == [PING]


def test_a_ping_is_echoed_only_where_the_echo_may_be_sent() -> None:
    longest = Message(Kind.PING, bytes(MAX_SENT_BYTES))
    talk = Talk()
    assert talk.say(longest) == [longest]
    too_long = Message(Kind.PING, bytes(MAX_SENT_BYTES + 1))
    (refusal,) = talk.say(too_long)
    assert fields(refusal) == {
        "code": "bad_payload",
        "message": "a PING of 1048576 bytes is too long to be echoed: 1048575 bytes of payload are allowed",
        "stream": None,
        "fatal": False,
    }
    assert outline(talk.say(tokens(FRAMES[:1]), too_long, END)) == ["AUDIO", "bad_payload", "END 0"]


def test_a_ping_does_not_hurry_a_fixed_chunk() -> None:
    assert outline(Talk(schedule=Fixed(4)).say(tokens(FRAMES[:3]), PING, END)) == ["PING", "AUDIO", "END 0"]


def test_the_handshake_says_what_holds() -> None:
    assert fields(Talk().connection.handshake()) == {
        "protocol": 1,
        "demo": False,
        "direction": "decode",
        "sample_rate": 48000,
        "channels": 2,
        "sample_format": "s16le",
        "frame_samples": 4,
        "quantizers": 4,
        "codebook_size": 1000,
        "frame_bytes": 5,
        "max_audio_bytes": 8 * 16,
        "chunk_frames": None,
        "max_chunk_frames": 8,
        "codec_sample_rate": 48000,
        "codec_channels": 2,
        "max_streams": 0,
        "urgency": 3,
        "gain_db": 0.0,
        "levels_ms": 0,
        "window_samples": None,
    }


def test_settings_take_hold_and_are_answered_by_a_handshake() -> None:
    talk = Talk()
    answers = talk.say(json_message(Kind.SETTINGS, {"quantizers": 3, "chunk_frames": 2}))
    assert [answer.kind for answer in answers] == [Kind.HANDSHAKE]
    now = fields(answers[0])
    assert (now["quantizers"], now["frame_bytes"], now["chunk_frames"], now["max_audio_bytes"]) == (3, 4, 2, 32)
    prefix = [frame[:3] for frame in FRAMES]
    assert pcm(talk.say(tokens(prefix), END)) == expected_pcm(prefix, SMALL)
    assert talk.decoder.steps == [2, 2, 1]
    ramp = fields(talk.say(json_message(Kind.SETTINGS, {"chunk_frames": None}))[0])
    assert (ramp["chunk_frames"], ramp["quantizers"]) == (None, 3)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b'{"quantizers":0}', "a whole number from 1 to 4"),
        (b'{"quantizers":5}', "a whole number from 1 to 4"),
        (b'{"quantizers":true}', "a whole number from 1 to 4"),
        (b'{"quantizers":2.0}', "a whole number from 1 to 4"),
        (b'{"chunk_frames":0}', "a whole number from 1 to 1000"),
        (b'{"chunk_frames":1001}', "a whole number from 1 to 1000"),
        (b'{"chunk_frames":"2"}', "a whole number from 1 to 1000"),
        (b'{"chunk_frames":2,"volume":1}', "SETTINGS has no 'volume'"),
        (b"[]", "a list where an object belongs"),
    ],
)
def test_bad_settings_change_nothing(payload: bytes, says: str) -> None:
    talk = Talk()
    before = talk.connection.handshake()
    answers = talk.say(Message(Kind.SETTINGS, payload))
    assert outline(answers)[0] in ("bad_settings", "bad_payload")
    assert says in fields(answers[0])["message"]
    assert talk.connection.handshake() == before


def test_a_prefix_is_refused_where_the_graph_cannot() -> None:
    talk = Talk(CountingDecoder(decodes_prefix=False))
    answers = talk.say(json_message(Kind.SETTINGS, {"quantizers": 3}))
    assert "`mossnano build --from-bundle`" in fields(answers[0])["message"]
    assert outline(talk.say(json_message(Kind.SETTINGS, {"quantizers": 4}))) == ["HANDSHAKE"]


def test_a_peer_that_fits_is_welcome_and_one_that_does_not_is_not_decoded() -> None:
    talk = Talk()
    fits = {"sample_rate": 48000, "channels": 2, "quantizers": 4, "codebook_size": 1000, "name": "some encoder"}
    assert talk.say(json_message(Kind.HANDSHAKE, fits)) == []
    misfit = talk.say(json_message(Kind.HANDSHAKE, fits | {"quantizers": 8, "codebook_size": 512}))
    assert outline(misfit) == ["handshake_mismatch"]
    assert "quantizers is 8 there and 4 here, codebook_size is 512 there and 1000 here" in fields(misfit[0])["message"]
    assert outline(talk.say(tokens(FRAMES), END)) == ["bad_tokens", "END 0"]
    assert talk.decoder.steps == []
    talk.say(json_message(Kind.HANDSHAKE, fits))
    assert pcm(talk.say(tokens(FRAMES), END)) == expected_pcm(FRAMES, SMALL)


def test_a_handshake_that_is_no_json_is_an_error() -> None:
    assert outline(Talk().say(Message(Kind.HANDSHAKE, b"hello"))) == ["bad_payload"]


# --- errors ----------------------------------------------------------------------------------------

BAD_TOKENS = {
    "a partial frame": Message(Kind.TOKENS, bytes(4)),
    "a code that is too large": tokens([[1000, 0, 0, 0]]),
}
BAD_ARTIFACTS = {
    "no magic": Message(Kind.ARTIFACT, bytes(32)),
    "another rate": Message(Kind.ARTIFACT, artifact_bytes(FRAMES, replace(SMALL, sample_rate=44100))),
    "too many samples": artifact(FRAMES, 21),
    "a byte too many": Message(Kind.ARTIFACT, artifact_bytes(FRAMES, SMALL) + b"\0"),
}


@pytest.mark.parametrize("bad", BAD_TOKENS)
@pytest.mark.parametrize("begin", [[], [tokens(FRAMES[:2])]], ids=["first", "later"])
def test_bad_tokens_end_their_stream_and_no_other(bad: str, begin: list[Message]) -> None:
    talk = Talk()
    answers = talk.say(*begin, BAD_TOKENS[bad], tokens(FRAMES), END)
    frames = 2 * len(begin)
    assert outline(answers)[frames:] == ["bad_tokens", "END 0"]
    assert fields(answers[-1]) == end_of(0, frames, errors=1)
    assert pcm(talk.say(tokens(FRAMES), END)) == expected_pcm(FRAMES, SMALL)


def test_what_came_before_bad_tokens_is_decoded_although_it_was_still_queued() -> None:
    talk = Talk()
    list(handle(talk.connection, tokens(FRAMES)))
    answers = talk.say(BAD_TOKENS["a partial frame"])
    assert pcm(answers) == expected_pcm(FRAMES, SMALL)
    assert outline(answers) == ["AUDIO", "AUDIO", "AUDIO", "bad_tokens"]


@pytest.mark.parametrize("bad", BAD_ARTIFACTS)
def test_a_bad_artifact_is_skipped_until_a_new_one(bad: str) -> None:
    talk = Talk()
    assert outline(talk.say(BAD_ARTIFACTS[bad], Message(Kind.ARTIFACT, b"the rest of it"), tokens(FRAMES))) == [
        "bad_artifact"
    ]
    answers = talk.say(artifact(FRAMES))
    assert outline(answers) == ["END 0", "AUDIO", "AUDIO", "AUDIO", "END 1"]
    assert pcm(answers) == expected_pcm(FRAMES, SMALL)


def test_a_bad_artifact_is_answered_when_it_is_ended() -> None:
    answers = Talk().say(BAD_ARTIFACTS["no magic"], END)
    assert outline(answers) == ["bad_artifact", "END 0"]
    assert fields(answers[1]) == end_of(0, 0, errors=1)


def test_an_artifact_may_have_fewer_quantizers_where_the_graph_can_decode_a_prefix() -> None:
    prefix = [frame[:2] for frame in FRAMES]
    assert pcm(Talk().say(artifact(prefix))) == expected_pcm(prefix, SMALL)
    refused = Talk(CountingDecoder(decodes_prefix=False)).say(artifact(prefix))
    assert outline(refused) == ["bad_artifact"]


def test_an_end_inside_an_artifact_cuts_it() -> None:
    talk = Talk()
    whole = artifact_bytes(FRAMES, SMALL)
    answers = talk.say(Message(Kind.ARTIFACT, whole[:-3]), END)
    assert outline(answers) == ["bad_artifact", "END 0"]
    assert "3 bytes" in fields(answers[0])["message"]
    assert pcm(talk.say(artifact(FRAMES))) == expected_pcm(FRAMES, SMALL)


@pytest.mark.parametrize("where", ["tokens", "artifact"])
@pytest.mark.parametrize("kind", [Kind.ARTIFACT, Kind.TOKENS, Kind.SETTINGS, Kind.HANDSHAKE])
def test_a_message_out_of_place_is_ignored_and_the_stream_goes_on(where: str, kind: Kind) -> None:
    if kind.name.lower() == where:
        return
    whole = artifact_bytes(FRAMES, SMALL)
    begin, rest = {
        "tokens": ([tokens(FRAMES[:2])], [tokens(FRAMES[2:]), END]),
        "artifact": ([Message(Kind.ARTIFACT, whole[:40])], [Message(Kind.ARTIFACT, whole[40:])]),
    }[where]
    answers = Talk().say(*begin, Message(kind, b'{"chunk_frames":1}'), *rest)
    assert outline(answers).count("out_of_place") == 1
    assert pcm(answers) == expected_pcm(FRAMES, SMALL)
    assert fields(answers[-1]) == end_of(0, 5, errors=1)


@pytest.mark.parametrize("kind", [Kind.AUDIO, Kind.TEXT, 0x0A, 0x84, 0xFF])
@pytest.mark.parametrize("begin", [[], [tokens(FRAMES[:2])]], ids=["idle", "in a stream"])
def test_an_unknown_kind_is_survived(kind: int, begin: list[Message]) -> None:
    answers = Talk().say(*begin, Message(kind, b"what?"), PING)
    assert outline(answers)[-2:] == ["unknown_kind", "PING"]


def test_an_end_without_a_stream_is_an_error() -> None:
    talk = Talk()
    assert fields(talk.say(END)[0])["stream"] is None
    assert outline(talk.say(tokens(FRAMES), END, END))[-2:] == ["END 0", "no_stream"]


def test_an_error_of_the_peer_is_passed_on() -> None:
    answers = Talk().say(Message(Kind.ERROR, b'{"message":"the microphone is gone"}'))
    assert outline(answers) == ["peer_error"]
    assert "the microphone is gone" in fields(answers[0])["message"]


def test_a_chunk_that_is_not_finite_is_silence_and_the_stream_goes_on_from_a_reset() -> None:
    talk = Talk(CountingDecoder(not_finite_steps=[1]), Fixed(2))
    answers = talk.say(tokens(FRAMES), END)
    assert outline(answers) == ["AUDIO", "not_finite", "AUDIO", "AUDIO", "END 0"]
    assert "sample 1 of channel 1 is nan" in fields(answers[1])["message"]
    silence = bytes(2 * SMALL.frame_pcm_bytes)
    assert pcm(answers) == expected_pcm(FRAMES[:2], SMALL) + silence + expected_pcm(FRAMES[4:], SMALL)
    assert fields(answers[-1]) == end_of(0, 5, errors=1)


@pytest.mark.parametrize("message", [tokens(FRAMES), artifact(FRAMES)])
def test_a_step_that_fails_ends_its_stream_and_no_other(message: Message) -> None:
    talk = Talk(CountingDecoder(failing_steps=[1]))
    answers = talk.say(message)
    if message.kind == Kind.TOKENS:
        answers += talk.say(tokens(FRAMES), END)
    assert outline(answers) == ["AUDIO", "decode_failed", "END 0"]
    assert fields(answers[-1]) == end_of(0, 1, errors=1)
    assert pcm(talk.say(tokens(FRAMES), END)) == expected_pcm(FRAMES, SMALL)


def test_a_bug_in_a_decoder_is_not_mistaken_for_bad_input() -> None:
    def break_down(step: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Talk(CountingDecoder(on_step=break_down)).say(tokens(FRAMES))


# --- cancel ----------------------------------------------------------------------------------------


def cancelled(stream: int | None, frames: int, next_stream: int, echo: str, errors: int = 0) -> dict[str, Any]:
    samples = frames * SMALL.frame_samples
    return {
        "stream": stream,
        "frames": frames,
        "samples": samples,
        "cancelled": True,
        "errors": errors,
        "next_stream": next_stream,
        "echo": echo,
        **({} if stream is None else {"clipped_samples": 0}),
    }


def test_a_cancel_between_streams_is_answered() -> None:
    answers = Talk().say_and_cancel(cancel=b"barge \xff")
    assert [fields(answer) for answer in answers] == [cancelled(None, 0, 0, "barge \ufffd")]


def test_a_cancel_drops_the_open_stream_and_what_of_it_waits() -> None:
    talk = Talk()
    talk.say(tokens(FRAMES[:1]))
    list(handle(talk.connection, tokens(FRAMES[1:3])))
    answers = talk.say_and_cancel(tokens(FRAMES[3:]), END)
    assert [fields(answer) for answer in answers] == [cancelled(0, 1, 1, "")]
    assert talk.decoder.steps == [1]
    assert pcm(talk.say(tokens(FRAMES), END)) == expected_pcm(FRAMES, SMALL)


def test_a_cancel_stops_an_artifact_between_two_chunks() -> None:
    talk = Talk()
    answers = handle(talk.connection, artifact(some_frames(50)))
    heard = [next(answers), next(answers)]
    talk.cancels_waiting = 1
    assert list(answers) == []
    end = talk.say(Message(Kind.CANCEL, b"x"))
    assert [fields(answer) for answer in end] == [cancelled(0, 3, 1, "x")]
    assert outline(heard) == ["AUDIO", "AUDIO"]


def test_a_cancel_lets_settings_pings_and_handshakes_through_and_counts_the_streams_it_drops() -> None:
    talk = Talk()
    talk.say(tokens(FRAMES[:2]))
    answers = talk.say_and_cancel(
        tokens(FRAMES),
        END,
        json_message(Kind.SETTINGS, {"chunk_frames": 3}),
        artifact(FRAMES),
        PING,
        BAD_TOKENS["a partial frame"],
        END,
        Message(Kind.ARTIFACT, artifact_bytes(FRAMES, SMALL)[:50]),
        cancel=b"now",
    )
    assert outline(answers) == ["HANDSHAKE", "PING", "END 0 cancelled"]
    assert fields(answers[0])["chunk_frames"] == 3
    assert fields(answers[2]) == cancelled(0, 2, 4, "now")
    assert pcm(talk.say(tokens(FRAMES), END)) == expected_pcm(FRAMES, SMALL)


def test_a_cancel_before_anything_was_dealt_with_names_the_first_stream_it_drops() -> None:
    answers = Talk().say_and_cancel(tokens(FRAMES), END, artifact(FRAMES))
    assert [fields(answer) for answer in answers] == [cancelled(0, 0, 2, "")]


def test_a_bad_artifact_that_is_dropped_is_dropped_in_silence() -> None:
    answers = Talk().say_and_cancel(BAD_ARTIFACTS["no magic"], Message(Kind.ARTIFACT, b"more"))
    assert [fields(answer) for answer in answers] == [cancelled(0, 0, 1, "")]


def test_a_cancel_ends_a_stream_that_went_bad() -> None:
    talk = Talk()
    talk.say(BAD_TOKENS["a partial frame"])
    assert [fields(answer) for answer in talk.say_and_cancel()] == [cancelled(0, 0, 1, "", errors=1)]
    assert talk.connection.plain.state is State.IDLE


def test_each_of_several_cancels_is_answered() -> None:
    talk = Talk()
    talk.cancels_waiting = 2
    answers = talk.say(tokens(FRAMES), Message(Kind.CANCEL, b"1"), tokens(FRAMES), Message(Kind.CANCEL, b"2"))
    assert [fields(answer) for answer in answers] == [cancelled(0, 0, 1, "1"), cancelled(1, 0, 2, "2")]


# --- end of input ----------------------------------------------------------------------------------


def test_end_of_input_closes_an_open_stream_like_an_end() -> None:
    talk = Talk(schedule=Fixed(4))
    answers = talk.say(tokens(FRAMES)) + list(close(talk.connection))
    assert pcm(answers) == expected_pcm(FRAMES, SMALL)
    assert fields(answers[-1]) == end_of(0, 5)


def test_end_of_input_between_streams_says_nothing() -> None:
    talk = Talk()
    talk.say(tokens(FRAMES), END)
    assert list(close(talk.connection)) == []


def test_end_of_input_inside_an_artifact_is_fatal() -> None:
    talk = Talk()
    talk.say(Message(Kind.ARTIFACT, artifact_bytes(FRAMES, SMALL)[:-1]))
    answers = list(close(talk.connection))
    assert outline(answers) == ["bad_artifact", "END 0"]
    assert fields(answers[0])["fatal"] is True


def test_lost_framing_drains_what_is_whole() -> None:
    talk = Talk(schedule=Fixed(2))
    talk.say(tokens(FRAMES))
    answers = list(close(talk.connection, ProtocolError("lost")))
    assert outline(answers) == ["AUDIO", "framing_lost", "END 0"]
    assert fields(answers[1]) == {"code": "framing_lost", "message": "lost", "stream": 0, "fatal": True}
    assert fields(answers[-1]) == end_of(0, 5, errors=1)


def test_lost_framing_between_streams_is_only_said() -> None:
    assert outline(list(close(Talk().connection, ProtocolError("lost")))) == ["framing_lost"]


# --- the table -------------------------------------------------------------------------------------


def test_the_table_has_a_cell_for_every_state_and_every_inbound_kind() -> None:
    inbound = {kind for _, kind in DECODING}
    assert inbound == set(Kind) - {Kind.AUDIO, Kind.TEXT, Kind.CREDIT, Kind.LEVELS}
    assert set(DECODING) == {(state, kind) for state in set(State) - {State.AUDIO} for kind in inbound}
    assert all(callable(action) for action in DECODING.values())


MESSAGES = st.sampled_from(
    [
        END,
        PING,
        tokens(FRAMES),
        artifact(FRAMES),
        Message(Kind.ARTIFACT, artifact_bytes(FRAMES, SMALL)[:45]),
        *BAD_TOKENS.values(),
        *BAD_ARTIFACTS.values(),
        json_message(Kind.SETTINGS, {"chunk_frames": 2}),
        Message(Kind.SETTINGS, b"?"),
        Message(0x77),
    ]
)


@given(st.lists(st.tuples(MESSAGES, st.booleans()), max_size=12))
def test_after_any_abuse_every_stream_was_ended_once_and_the_next_is_as_in_a_fresh_process(
    abuse: list[tuple[Message, bool]],
) -> None:
    talk = Talk()
    answers = []
    for message, cancels in abuse:
        answers += talk.say_and_cancel(message) if cancels else talk.say(message)
    answers += talk.say_and_cancel()
    next_stream = fields(answers[-1])["next_stream"]
    ended = [
        fields(answer)["stream"]
        for answer in answers
        if answer.kind == Kind.END and fields(answer)["stream"] is not None
    ]
    assert ended == sorted(set(ended))
    talk.say(json_message(Kind.SETTINGS, {"chunk_frames": None}))
    after = talk.say(tokens(FRAMES), END)
    assert pcm(after) == expected_pcm(FRAMES, SMALL)
    assert fields(after[-1]) == end_of(next_stream, 5)


def test_decode_errors_know_their_code() -> None:
    assert DecodeError.code == "decode_failed"


@pytest.mark.parametrize("samples", [0, 1, 3840, 5000, 3 * 3840])
def test_the_tail_of_a_trimmed_artifact_comes_once(samples: int) -> None:
    """At another rate, where the resampler keeps some of it back."""
    connection = Connection(DECODE, lambda: CountingDecoder(NANO), Fixed(1), {}, settings={"sample_rate": 16000})
    data = artifact_bytes(some_frames(3, NANO), NANO, samples)
    *sound, end = handle(connection, Message(Kind.ARTIFACT, data))
    wanted = (2 * samples + 3) // 6  # samples / 3, half up
    assert sum(len(message.payload) for message in sound) == 4 * wanted
    assert json.loads(end.payload)["samples"] == wanted
    assert json.loads(end.payload)["frames"] == 3
