"""Numbered streams: their numbers, their credit, their marks, and that none notices another."""

from __future__ import annotations

import gc
import json
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mossnano_stdio.chunks import Fixed, Ramp, Schedule
from mossnano_stdio.errors import ProtocolError
from mossnano_stdio.protocol import connection as connection_module
from mossnano_stdio.protocol.connection import MAX_BACKLOG_BYTES, Connection, Turn
from mossnano_stdio.protocol.decoding import DECODE, DECODE_TO_ZEROS
from mossnano_stdio.protocol.encoding import ENCODE
from mossnano_stdio.protocol.messages import Kind, Message, in_stream, json_message, out_of_stream
from mossnano_stdio.tokens import CodecFormat
from tests.conftest import repeated
from tests.doubles import (
    NANO,
    SMALL,
    CountingDecoder,
    CountingEncoder,
    artifact_bytes,
    expected_codes,
    expected_pcm,
    some_frames,
    tokens_payload,
)

END, CANCEL, PING = Message(Kind.END), Message(Kind.CANCEL, b"barge"), Message(Kind.PING, b"hi")
FRAMES = some_frames(20)
TOKENS = Message(Kind.TOKENS, tokens_payload(FRAMES))
ARTIFACT = Message(Kind.ARTIFACT, artifact_bytes(FRAMES, SMALL))
WHOLE_SAMPLES = len(FRAMES) * SMALL.frame_samples


def settle(**fields: Any) -> Message:
    return json_message(Kind.SETTINGS, fields)


def credit(samples: int) -> Message:
    return Message(Kind.CREDIT, samples.to_bytes(8, "little"))


def mark(text: str) -> Message:
    return Message(Kind.MARK, text.encode())


class Voices:
    """A connection, and what each of its streams was answered."""

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        new_codec: Callable[[], Any] = CountingDecoder,
        direction: Any = DECODE,
        max_streams: int = 4,
        **more: Any,
    ) -> None:
        self.connection = Connection(direction, new_codec, schedule or Ramp(), {}, max_streams=max_streams, **more)
        self.heard: dict[int | None, list[Message]] = {}

    def take(self, answers: Any) -> list[Message]:
        taken = []
        for answer in answers:
            number, inner = out_of_stream(answer) if answer.kind & 0x80 else (None, answer)
            self.heard.setdefault(number, []).append(inner)
            taken.append(inner)
        return taken

    def say(self, number: int | None, *messages: Message) -> list[Message]:
        """What is answered at once: nothing is computed."""
        return [
            answer
            for message in messages
            for answer in self.take(
                self.connection.receive(message if number is None else in_stream(number, message), 0.0)
            )
        ]

    def compute(self) -> list[Message]:
        """All chunks that are due, a round of all streams at a time."""
        answers = []
        while due := self.connection.due_lanes():
            turns = [Turn(lane, lane.stream.allowed_frames) for lane in due if lane.stream]
            answers += self.take(self.connection.advance(turns))
        return answers

    def close(self, maybe_fault: ProtocolError | None = None) -> None:
        self.take(self.connection.end_input(is_faulty=maybe_fault is not None))
        self.compute()
        self.take(self.connection.close(maybe_fault))

    def pcm(self, number: int | None) -> bytes:
        return pcm(self.heard.get(number, []))

    def outline(self, number: int | None) -> list[str]:
        return outline(self.heard.get(number, []))


def fields(message: Message) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(message.payload)
    return parsed


def pcm(answers: Sequence[Message]) -> bytes:
    return b"".join(answer.payload for answer in answers if answer.kind == Kind.AUDIO)


def outline(answers: Sequence[Message]) -> list[str]:
    """Kinds, with runs of AUDIO as one word, and ERRORs by their code."""
    words: list[str] = []
    for answer in answers:
        word = fields(answer)["code"] if answer.kind == Kind.ERROR else Kind(answer.kind).name
        if word != "AUDIO" or words[-1:] != ["AUDIO"]:
            words.append(word)
    return words


# --- numbers -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([None, 1, 2, 3]), st.integers(0, 5), st.booleans()), max_size=30))
def test_every_stream_is_as_it_is_alone_however_they_come(told: list[tuple[int | None, int, bool]]) -> None:
    voices = Voices()
    frames: dict[int | None, list[list[int]]] = {number: [] for number in (1, 2, 3, None)}
    for number in frames:  # so that they open in order
        voices.say(number, Message(Kind.TOKENS))
    for seed, (number, count, computes) in enumerate(told):
        more = some_frames(count, seed=seed)
        frames[number] += more
        voices.say(number, Message(Kind.TOKENS, tokens_payload(more)))
        if computes:
            voices.compute()
    voices.close()
    for number, expected in frames.items():
        assert voices.pcm(number) == expected_pcm(expected, SMALL)
        end = fields(voices.heard[number][-1])
        assert (end["frames"], end["stream"]) == (len(expected), number or 0)
        assert ("next_stream" in end) == (number is None)


@pytest.mark.parametrize("opening", [TOKENS, ARTIFACT, settle(urgency=1), mark("m")])
def test_a_higher_number_opens_a_stream(opening: Message) -> None:
    voices = Voices()
    voices.say(7, opening)
    voices.say(7, END)
    voices.compute()
    assert voices.outline(7)[-1] == "END"
    assert voices.connection.numbered == {}


@pytest.mark.parametrize("refused", [credit(1000), END, CANCEL])
def test_what_opens_no_stream_leaves_the_number_unused(refused: Message) -> None:
    voices = Voices()
    (error,) = voices.say(5, refused)
    assert (fields(error)["code"], fields(error)["stream"]) == ("no_stream", 5)
    voices.say(4, TOKENS, END)
    voices.compute()
    assert voices.pcm(4) == expected_pcm(FRAMES, SMALL)


def test_a_number_that_is_over_or_passed_over_is_late() -> None:
    voices = Voices()
    voices.say(3, TOKENS, END)
    voices.compute()
    for number in (3, 2):
        assert voices.say(number, credit(9999), CANCEL, END, mark("late")) == []
        assert outline(voices.say(number, TOKENS, ARTIFACT, settle(urgency=1), TOKENS)) == ["late_stream"]
        assert voices.say(number, PING) == [PING]
    assert voices.connection.numbered == {}


def test_what_follows_an_end_is_late_although_the_stream_is_open_and_a_ping_waits_its_turn() -> None:
    voices = Voices()
    voices.say(1, TOKENS, END)
    assert voices.say(1, END, mark("late"), PING) == []
    assert outline(voices.say(1, TOKENS, TOKENS)) == ["late_stream"]
    voices.compute()
    assert voices.outline(1) == ["late_stream", "AUDIO", "END", "PING"]
    assert voices.pcm(1) == expected_pcm(FRAMES, SMALL)


def test_no_more_than_max_streams_are_open_and_nobody_is_evicted() -> None:
    voices = Voices(max_streams=2)
    for number in (0, 1, 2):
        voices.say(number, TOKENS)
    assert voices.outline(2) == ["too_many_streams"]
    assert voices.say(2, END, CANCEL) == []  # it is used, and gets no END
    voices.say(0, END)
    voices.compute()
    voices.say(3, TOKENS, END)
    voices.say(1, END)
    voices.compute()
    for number in (0, 1, 3):
        assert voices.pcm(number) == expected_pcm(FRAMES, SMALL)
    assert voices.outline(2) == ["too_many_streams"]


@pytest.mark.parametrize(
    ("more", "why"), [({"max_streams": 0}, "--max-streams is 0"), ({"maybe_no_numbers": "raw"}, "raw")]
)
def test_where_there_are_none_it_says_why(more: dict[str, Any], why: str) -> None:
    (error,) = Voices(**more).say(1, TOKENS)
    assert (fields(error)["code"], fields(error)["stream"]) == ("unknown_kind", None)
    assert fields(error)["message"] == f"there are no numbered streams here: {why}"


def test_a_message_too_short_for_its_number_is_refused() -> None:
    voices = Voices()
    (error,) = voices.take(voices.connection.receive(Message(0x84, b"\1\0\0")))
    assert fields(error)["code"] == "bad_payload"


def test_a_cancel_drops_its_stream_only_and_at_once() -> None:
    voices = Voices()
    voices.say(1, TOKENS, PING, END)
    voices.say(2, TOKENS, END)
    voices.take(voices.connection.advance([Turn(voices.connection.numbered[1], 3)]))
    assert outline(voices.say(1, CANCEL)) == ["PING", "END"]
    end = fields(voices.heard[1][-1])
    assert (end["cancelled"], end["samples"], end["echo"], end["stream"]) == (True, SMALL.frame_samples, "barge", 1)
    voices.compute()
    assert voices.pcm(1) == expected_pcm(FRAMES[:1], SMALL)
    assert voices.pcm(2) == expected_pcm(FRAMES, SMALL)


def test_a_plain_cancel_concerns_plain_streams_only() -> None:
    voices = Voices(cancel_waiting=lambda: True)
    voices.say(1, TOKENS, END)
    voices.say(None, TOKENS, CANCEL)
    voices.compute()
    assert voices.outline(None) == ["END"]
    assert voices.pcm(1) == expected_pcm(FRAMES, SMALL)


def test_a_bad_stream_is_bad_alone_and_an_artifact_in_it_is_skipped_too() -> None:
    voices = Voices()
    voices.say(1, Message(Kind.TOKENS, b"\xff"))
    voices.say(2, ARTIFACT)
    assert voices.say(1, ARTIFACT, TOKENS) == []
    voices.say(1, END)
    voices.compute()
    assert voices.outline(1) == ["bad_tokens", "END"]
    assert fields(voices.heard[1][-1])["errors"] == 1
    assert voices.pcm(2) == expected_pcm(FRAMES, SMALL)


def test_a_step_that_fails_ends_its_own_stream() -> None:
    codecs = iter([CountingDecoder(), CountingDecoder(failing_steps=[1])])
    voices = Voices(new_codec=lambda: next(codecs, CountingDecoder()))
    for number in (1, 2):
        voices.say(number, TOKENS, END)
    voices.compute()
    assert voices.outline(1) == ["AUDIO", "decode_failed", "END"]
    assert voices.pcm(2) == expected_pcm(FRAMES, SMALL)


# --- settings ------------------------------------------------------------------------------------------------


def test_a_streams_own_settings_hold_for_it_only_and_begin_as_the_plain_ones() -> None:
    voices = Voices()
    voices.say(None, settle(quantizers=3))
    (hello,) = voices.say(0, settle(chunk_frames=2))
    assert [fields(hello)[name] for name in ("quantizers", "chunk_frames", "max_audio_bytes")] == [3, 2, 32]
    prefix = [frame[:3] for frame in FRAMES]
    for number in (0, 1):
        voices.say(number, Message(Kind.TOKENS, tokens_payload(prefix)), END)
    assert outline(voices.say(0, settle(chunk_frames=3))) == ["late_stream"]
    voices.compute()
    for number, frames_each in ((0, [2] * 10), (1, [1, 2, 4, 8, 5])):
        sizes = [len(answer.payload) for answer in voices.heard[number] if answer.kind == Kind.AUDIO]
        assert sizes == [frames * SMALL.frame_pcm_bytes for frames in frames_each]
        assert voices.pcm(number) == expected_pcm(prefix, SMALL)


def test_settings_come_before_the_first_input() -> None:
    voices = Voices()
    voices.say(1, TOKENS)
    voices.compute()
    assert outline(voices.say(1, settle(chunk_frames=2))) == ["out_of_place"]


def test_bad_settings_open_a_stream_all_the_same() -> None:
    voices = Voices()
    assert outline(voices.say(1, settle(urgency=8))) == ["bad_settings"]
    voices.say(1, TOKENS, END)
    voices.compute()
    assert voices.pcm(1) == expected_pcm(FRAMES, SMALL)


def test_plain_settings_that_wait_hold_back_the_streams_that_would_open_behind_them() -> None:
    voices = Voices()
    voices.say(1, TOKENS)
    voices.say(None, TOKENS, END, settle(chunk_frames=10))
    assert voices.say(2, TOKENS, END, PING) == []
    voices.say(1, END)
    assert sorted(voices.connection.numbered) == [1]
    voices.compute()
    for number, chunks in ((1, 5), (2, 2)):
        assert voices.pcm(number) == expected_pcm(FRAMES, SMALL)
        assert len([answer for answer in voices.heard[number] if answer.kind == Kind.AUDIO]) == chunks
    assert voices.outline(2) == ["AUDIO", "END", "PING"]


def test_no_fixed_size_means_the_ramp_that_was_measured() -> None:
    voices = Voices(Ramp(8, 6), new_ramp=lambda: Ramp(8, 6))
    voices.say(None, settle(chunk_frames=5), settle(chunk_frames=None), TOKENS, END)
    voices.compute()
    sizes = [len(answer.payload) for answer in voices.heard[None] if answer.kind == Kind.AUDIO]
    assert sizes == [frames * SMALL.frame_pcm_bytes for frames in (1, 6, 8, 5)]


def test_a_frame_of_zeros_ends_its_own_stream_and_what_follows_is_no_place() -> None:
    voices = Voices(direction=DECODE_TO_ZEROS)
    zeros = Message(Kind.TOKENS, tokens_payload([[0] * len(FRAMES[0])]))
    voices.say(1, TOKENS, zeros, TOKENS, mark("behind"), END)
    voices.say(2, TOKENS, TOKENS, END)
    voices.compute()
    assert voices.pcm(1) == expected_pcm(FRAMES, SMALL)
    assert voices.pcm(2) == expected_pcm(FRAMES + FRAMES, SMALL)
    (told,) = [answer for answer in voices.heard[1] if answer.kind == Kind.MARK]
    assert told.payload == WHOLE_SAMPLES.to_bytes(8, "little") + b"behind"


def test_a_handshake_that_does_not_fit_is_of_its_own_stream() -> None:
    voices = Voices()
    hello = json_message(Kind.HANDSHAKE, {"sample_rate": 8000})
    assert outline(voices.say(4, hello)) == ["handshake_mismatch"]
    assert voices.connection.numbered == {}  # it opens nothing
    voices.say(2, TOKENS, END)
    voices.say(4, TOKENS, END)
    voices.compute()
    assert voices.pcm(2) == expected_pcm(FRAMES, SMALL)
    assert voices.outline(4) == ["handshake_mismatch", "bad_tokens", "END"]


# --- credit --------------------------------------------------------------------------------------------------


def test_a_chunk_is_computed_only_when_all_of_it_is_granted_and_a_smaller_one_fits_sooner() -> None:
    voices = Voices()
    voices.say(1, TOKENS, END, credit(3 * 4))
    voices.say(2, TOKENS, END)
    voices.compute()
    assert len(voices.pcm(1)) == 3 * SMALL.frame_pcm_bytes  # 1 and 2: a chunk of 4 does not fit
    assert voices.pcm(2) == expected_pcm(FRAMES, SMALL)  # who gets no credit stops alone
    voices.say(1, credit(6 * 4 - 1), credit(5))  # what is smaller than before is ignored
    voices.compute()
    assert len(voices.pcm(1)) == 5 * SMALL.frame_pcm_bytes
    voices.say(1, credit(WHOLE_SAMPLES))
    voices.compute()
    assert voices.pcm(1) == expected_pcm(FRAMES, SMALL)
    assert voices.outline(1) == ["AUDIO", "END"]


def test_a_fixed_chunk_is_never_cut() -> None:
    voices = Voices(Fixed(5))
    voices.say(1, settle(window_samples=20), TOKENS, credit(39))
    voices.compute()
    assert len(voices.pcm(1)) == 5 * SMALL.frame_pcm_bytes
    voices.say(1, credit(40))
    voices.compute()
    assert len(voices.pcm(1)) == 10 * SMALL.frame_pcm_bytes


@pytest.mark.parametrize("how", ["settings", "credit"])
@pytest.mark.parametrize(("schedule", "least"), [(Ramp(), 4), (Fixed(5), 20)])
def test_a_window_that_could_never_move_is_refused(schedule: Schedule, least: int, how: str) -> None:
    def ask(samples: int) -> list[str]:
        voices = Voices(schedule)
        voices.say(1, settle(urgency=3))
        message = settle(window_samples=samples) if how == "settings" else credit(samples)
        return outline(voices.say(1, message))

    assert ask(least - 1) == [{"settings": "bad_settings", "credit": "bad_payload"}[how]]
    assert ask(least) == {"settings": ["HANDSHAKE"], "credit": []}[how]


@pytest.mark.parametrize("payload", [b"", bytes(7), bytes(9)])
def test_a_credit_is_eight_bytes(payload: bytes) -> None:
    voices = Voices()
    voices.say(1, mark("m"))
    assert outline(voices.say(1, Message(Kind.CREDIT, payload))) == ["bad_payload"]


def test_credit_stays_when_settings_follow_it() -> None:
    voices = Voices()
    voices.say(1, mark("begin"), credit(8), settle(urgency=1), TOKENS)
    voices.compute()
    assert len(voices.pcm(1)) == 2 * SMALL.frame_pcm_bytes
    assert voices.outline(1) == ["HANDSHAKE", "MARK", "AUDIO"]


def test_plain_streams_have_no_credit() -> None:
    voices = Voices()
    assert outline(voices.say(None, settle(window_samples=8), TOKENS, END, credit(4))) == ["HANDSHAKE"]
    voices.compute()
    assert voices.outline(None) == ["HANDSHAKE", "AUDIO", "END", "unknown_kind"]


@settings(max_examples=100)
@given(
    codec=st.sampled_from([SMALL, replace(SMALL, frame_samples=480)]),
    rate=st.sampled_from([48000, 8000, 16000, 22050, 44100, 96000]),
    frames=st.integers(0, 40),
    schedule=st.sampled_from([Ramp(), Ramp(1), Fixed(3)]),
    maybe_cut=st.none() | st.integers(0, 30),
    as_artifact=st.booleans(),
)
def test_a_player_with_the_least_window_hears_all_of_every_stream(
    codec: CodecFormat, rate: int, frames: int, schedule: Schedule, maybe_cut: int | None, as_artifact: bool
) -> None:
    voices = Voices(schedule, new_codec=lambda: CountingDecoder(codec))
    voices.say(1, settle(sample_rate=rate))
    lane = voices.connection.numbered[1]
    window = lane.settings.least_window_samples(codec)
    voices.say(1, credit(window))
    codes = some_frames(frames)
    samples = frames * codec.frame_samples
    if as_artifact and frames:
        samples -= min(samples, maybe_cut or 0)
        voices.say(1, Message(Kind.ARTIFACT, artifact_bytes(codes, codec, samples)))
    else:
        voices.say(1, Message(Kind.TOKENS, tokens_payload(codes)), END)
    played_samples = -1
    while voices.connection.numbered:
        voices.compute()
        sent_samples = len(voices.pcm(1)) // 4
        assert max(0, played_samples) <= sent_samples <= max(0, played_samples) + window
        assert sent_samples > played_samples or not voices.connection.numbered, "it stands still"
        played_samples = sent_samples
        voices.say(1, credit(window + played_samples))
    total_samples = half_up(Fraction(samples * rate, 48000))
    assert fields(voices.heard[1][-1])["samples"] == len(voices.pcm(1)) // 4 == total_samples


def half_up(number: Fraction) -> int:
    return int(number + Fraction(1, 2))


def test_what_of_a_resampled_stream_came_before_it_went_bad_is_heard_to_its_end() -> None:
    voices = Voices()
    voices.say(1, settle(sample_rate=16000), TOKENS, Message(Kind.TOKENS, b"\xff"), END)
    voices.compute()
    assert voices.outline(1) == ["HANDSHAKE", "bad_tokens", "AUDIO", "END"]
    assert fields(voices.heard[1][-1])["samples"] == half_up(Fraction(WHOLE_SAMPLES, 3))


def test_more_than_may_wait_ends_one_stream() -> None:
    voices = Voices()
    for number in (1, 2):
        voices.say(number, TOKENS, credit(4))
    a_quarter = Message(Kind.TOKENS, bytes(MAX_BACKLOG_BYTES // 4 // SMALL.frame_bytes * SMALL.frame_bytes))
    assert voices.say(1, *[a_quarter] * 4) == []
    assert outline(voices.say(1, a_quarter)) == ["backlog_full"]
    assert outline(voices.say(1, a_quarter, PING)) == ["PING"]
    voices.say(1, END)
    voices.compute()
    assert voices.outline(1) == ["backlog_full", "PING", "END"]
    assert len(voices.pcm(2)) == SMALL.frame_pcm_bytes


def test_an_artifact_of_any_length_is_no_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_BACKLOG_BYTES", len(ARTIFACT.payload) // 2)
    voices = Voices()
    voices.say(1, settle(window_samples=4), ARTIFACT, PING)
    assert voices.outline(1) == ["HANDSHAKE"]
    voices.say(2, settle(window_samples=4), TOKENS, PING)
    assert voices.outline(2) == ["HANDSHAKE", "backlog_full", "PING"]


def test_artifacts_of_all_streams_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossnano_stdio.protocol.decoding.MAX_ARTIFACTS_BYTES", 2 * len(ARTIFACT.payload))
    half = Message(Kind.ARTIFACT, ARTIFACT.payload[:-1])
    voices = Voices()
    assert voices.say(1, half) == []
    assert voices.say(2, half) == []
    assert outline(voices.say(2, Message(Kind.ARTIFACT, ARTIFACT.payload[-1:]))) == []
    assert outline(voices.say(3, half)) == ["backlog_full"]
    voices.say(1, Message(Kind.ARTIFACT, ARTIFACT.payload[-1:]))
    voices.compute()
    assert voices.pcm(1) == voices.pcm(2) == expected_pcm(FRAMES, SMALL)


# --- marks and levels ----------------------------------------------------------------------------------------


def placed(answers: Sequence[Message]) -> list[tuple[int, int, str]]:
    """Marks: the samples that were heard before, the position that they name, and their text."""
    heard = 0
    marks: list[tuple[int, int, str]] = []
    for answer in answers:
        if answer.kind == Kind.AUDIO:
            heard += len(answer.payload) // 4
        elif answer.kind == Kind.MARK:
            (position,) = struct.unpack_from("<Q", answer.payload)
            marks.append((heard, position, answer.payload[8:].decode()))
    return marks


@pytest.mark.parametrize("number", [None, 1])
def test_a_mark_comes_back_before_the_audio_that_holds_its_sample(number: int | None) -> None:
    voices = Voices(Fixed(2))
    pieces = [Message(Kind.TOKENS, tokens_payload(FRAMES[at : at + 1])) for at in range(5)]
    voices.say(number, mark("a"), mark("b"), pieces[0], mark("c"), *pieces[1:4], mark("d"), pieces[4], mark("e"), END)
    voices.compute()
    assert placed(voices.heard[number]) == [(0, 0, "a"), (0, 0, "b"), (0, 4, "c"), (16, 16, "d"), (20, 20, "e")]
    assert voices.outline(number)[-2:] == ["MARK", "END"]


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
def test_after_resampling_a_mark_is_at_most_a_sample_away(rate: int) -> None:
    voices = Voices()
    voices.say(1, settle(sample_rate=rate))
    for frame in FRAMES:
        voices.say(1, mark("here"), Message(Kind.TOKENS, tokens_payload([frame])))
    voices.say(1, END)
    voices.compute()
    marks = placed(voices.heard[1])
    assert len(marks) == len(FRAMES)
    for before_frame, (heard, position, _) in enumerate(marks):
        assert abs(position - Fraction(before_frame * SMALL.frame_samples * rate, 48000)) <= 1
        assert heard <= position


def test_an_artifacts_marks_stand_in_its_settings() -> None:
    voices = Voices()
    voices.say(1, settle(marks=[[3, "three"], [0, "first"], [99, "beyond"]]), ARTIFACT)
    voices.compute()
    assert placed(voices.heard[1]) == [(0, 0, "first"), (12, 12, "three"), (80, 80, "beyond")]


@pytest.mark.parametrize("marks", [3, [[0]], [[-1, "x"]], [[True, "x"]], [["x", 0]], [[0, "x" * 1001]]])
def test_bad_marks_are_bad_settings(marks: Any) -> None:
    assert outline(Voices().say(1, settle(marks=marks)))[0] in ("bad_settings", "bad_payload")


def test_a_mark_is_at_most_a_thousand_bytes() -> None:
    voices = Voices()
    assert voices.say(1, Message(Kind.MARK, bytes(1000))) == []
    assert outline(voices.say(1, Message(Kind.MARK, bytes(1001)))) == ["bad_payload"]


def test_what_a_cancel_drops_never_comes_back() -> None:
    voices = Voices()
    voices.say(1, TOKENS, mark("never"), CANCEL)
    assert voices.outline(1) == ["END"]


def test_levels_come_before_the_audio_that_they_measure() -> None:
    voices = Voices(Fixed(20), new_codec=lambda: CountingDecoder(NANO))
    frames = some_frames(20, NANO)
    voices.say(1, settle(levels_ms=20), Message(Kind.TOKENS, tokens_payload(frames)), END)
    voices.compute()
    assert voices.outline(1) == ["HANDSHAKE", "LEVELS", "AUDIO", "END"]
    assert len(voices.heard[1][1].payload) == 2 * 20 * 4


# --- the end -------------------------------------------------------------------------------------------------


def test_end_of_input_ends_and_grants_every_stream() -> None:
    voices = Voices(Fixed(3))
    voices.say(1, settle(window_samples=12), TOKENS)
    voices.say(2, TOKENS)
    voices.say(3, mark("alone"))
    voices.say(None, TOKENS, settle(chunk_frames=4))
    voices.say(4, settle(window_samples=16), TOKENS)
    voices.close()
    for number in (None, 1, 2, 4):
        assert voices.pcm(number) == expected_pcm(FRAMES, SMALL)
        assert voices.outline(number)[-1] == "END"
    assert voices.outline(3) == ["MARK", "END"]


def test_a_fatal_error_is_followed_by_the_end_of_each_open_stream() -> None:
    voices = Voices(Fixed(3))
    order = []
    take = voices.take
    voices.take = lambda answers: [order.append(answer) or answer for answer in take(answers)]  # type: ignore
    voices.say(1, settle(window_samples=12), TOKENS)
    voices.say(2, TOKENS)
    voices.close(ProtocolError("lost"))
    assert outline(order) == ["HANDSHAKE", "AUDIO", "framing_lost", "END", "END"]
    assert voices.pcm(1) == voices.pcm(2) == expected_pcm(FRAMES, SMALL)


def test_credit_that_waited_for_the_end_of_input_takes_nothing_back() -> None:
    voices = Voices(Fixed(3))
    voices.say(None, TOKENS, END, settle(chunk_frames=2))
    voices.say(1, settle(window_samples=12), TOKENS, credit(12), END)  # waits for those SETTINGS
    voices.close()
    assert voices.pcm(1) == expected_pcm(FRAMES, SMALL)


def test_an_artifact_that_the_end_cuts_is_known_to_be_cut() -> None:
    half = Message(Kind.ARTIFACT, ARTIFACT.payload[:50])
    for number in (None, 1):
        voices = Voices()
        voices.say(number, half)
        assert voices.connection.is_cut == (number is None)
        voices.take(voices.connection.end_input())
        assert voices.connection.is_cut
        voices.close()
        assert voices.outline(number)[0] == "bad_artifact"


# --- what whoever drives it asks ---------------------------------------------------------------------------


def test_an_answer_is_of_the_stream_that_is_open_there() -> None:
    voices = Voices(Fixed(3))
    voices.say(1, TOKENS)
    voices.say(None, TOKENS)
    connection = voices.connection
    pong = Message(Kind.PING)
    assert connection.maybe_stream_of(pong) is connection.plain.stream is not None
    assert connection.maybe_stream_of(in_stream(1, pong)) is connection.numbered[1].stream
    assert connection.maybe_stream_of(in_stream(2, pong)) is None


def test_nobody_waits_for_a_stream_that_has_not_sounded() -> None:
    voices = Voices(Fixed(3))
    voices.say(1, TOKENS)
    stream = voices.connection.numbered[1].stream
    assert stream is not None and stream.late_seconds(100.0) == 0


# --- settings, one after the other ---------------------------------------------------------------------------


def test_streams_go_by_the_settings_before_them_however_many_wait() -> None:
    voices = Voices(Fixed(5))
    for number, chunk_frames in ((1, 2), (2, 4)):
        voices.say(None, TOKENS, END, settle(chunk_frames=chunk_frames))
        voices.say(number, TOKENS, END)
    voices.compute()
    for number, chunk_frames in ((1, 2), (2, 4)):
        first = next(answer for answer in voices.heard[number] if answer.kind == Kind.AUDIO)
        assert len(first.payload) == chunk_frames * SMALL.frame_pcm_bytes
        assert voices.pcm(number) == expected_pcm(FRAMES, SMALL)


def test_settings_in_an_open_plain_stream_are_out_of_place() -> None:
    voices = Voices()
    assert outline(voices.say(None, mark("m"), settle(chunk_frames=2))) == ["out_of_place"]


def test_a_window_that_credit_gave_holds_against_settings() -> None:
    voices = Voices()
    voices.say(1, mark("m"), credit(8))
    (error,) = voices.say(1, settle(chunk_frames=3))
    assert "8 samples are the window that CREDIT gave this stream" in fields(error)["message"]
    assert outline(voices.say(1, settle(chunk_frames=2))) == ["HANDSHAKE"]


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "all", 2**32 + 1])
def test_a_window_is_a_number_of_samples(window: Any) -> None:
    (error,) = Voices().say(1, settle(window_samples=window))
    assert f"window_samples is {window!r}; a whole number from 1 to 4294967296 is allowed" in fields(error)["message"]


def test_a_form_that_is_fixed_says_why() -> None:
    voices = Voices(maybe_fixed_form="--play has one form for the whole run")
    (error,) = voices.say(None, settle(gain_db=-6))
    assert fields(error)["message"] == "the form of the sound cannot be set: --play has one form for the whole run"
    assert fields(voices.connection.handshake())["gain_db"] == 0


# --- marks that are too many, or of no use -------------------------------------------------------------------


def test_marks_of_a_plain_stream_are_bounded() -> None:
    voices = Voices(Fixed(100))
    voices.say(None, TOKENS, *[mark("m" * 1000)] * 1100)
    assert outline(voices.heard[None]) == ["backlog_full"]


def test_a_mark_of_what_a_cancel_drops_is_dropped() -> None:
    cancels = [False]
    voices = Voices(Fixed(3), cancel_waiting=lambda: cancels[0])
    voices.say(None, TOKENS)
    cancels[0] = True
    voices.compute()
    voices.say(None, mark("m"))
    cancels[0] = False
    voices.say(None, Message(Kind.CANCEL))
    assert voices.outline(None) == ["END"]


# --- encoding ------------------------------------------------------------------------------------------------

SOUND = b"".join(struct.pack("<2h", 3 * at, -at) for at in range(18))


def encoding_voices(schedule: Schedule | None = None) -> Voices:
    return Voices(schedule, new_codec=CountingEncoder, direction=ENCODE)


def test_encoding_has_numbered_streams_too() -> None:
    voices = encoding_voices()
    for number in (1, 2):
        voices.say(number, Message(Kind.AUDIO, SOUND), END)
    assert outline(voices.say(2, credit(8))) == ["unknown_kind"]
    voices.compute()
    for number in (1, 2):
        tokens = b"".join(answer.payload for answer in voices.heard[number] if answer.kind == Kind.TOKENS)
        assert tokens == tokens_payload(expected_codes(SOUND))
        assert fields(voices.heard[number][-1])["original_samples"] == 18


def test_an_encoder_offers_no_credit_marks_and_levels() -> None:
    voices = encoding_voices()
    for message in (mark("m"), settle(levels_ms=10), settle(window_samples=100)):
        assert outline(voices.say(3, message))[0] in ("unknown_kind", "bad_settings")
    assert not {"window_samples", "levels_ms", "gain_db"} & set(fields(voices.connection.handshake()))
    (error,) = voices.say(4, settle(urgency=1), settle(marks=[[0, "m"]]))[1:]
    assert fields(error)["message"] == "marks are of decoding: an encoder's sound has none"
    stream = voices.connection.numbered[4].stream
    assert stream is not None
    assert (stream.artifact_bytes, stream.samples_per_second) == (0, SMALL.sample_rate)
    with pytest.raises(AssertionError):
        stream.push_mark(b"m")


def test_a_full_stream_stops_the_reading_unless_it_could_not_go_on() -> None:
    voices = encoding_voices()
    voices.say(1, *[Message(Kind.AUDIO, bytes(1 << 18))] * 4)
    assert not voices.connection.is_full
    voices.say(1, Message(Kind.AUDIO, bytes(4)))
    assert voices.connection.is_full
    voices.compute()
    assert not voices.connection.is_full
    waiting = encoding_voices(Fixed(100_000))
    waiting.say(1, *[Message(Kind.AUDIO, bytes(1 << 18))] * 5)
    assert not waiting.connection.is_full


def test_an_encoders_output_goes_into_a_decoder_as_it_is() -> None:
    encoder, decoder = encoding_voices(), Voices()
    answers = [encoder.connection.handshake()]
    encoder.take = lambda said: [answers.append(answer) or answer for answer in said]  # type: ignore
    encoder.say(1, settle(quantizers=4))
    for number in (1, 2):
        encoder.say(number, Message(Kind.AUDIO, SOUND), END)
        encoder.compute()
    heard = [answer for message in answers for answer in decoder.take(decoder.connection.receive(message))]
    decoder.compute()
    assert heard == []
    for number in (1, 2):
        assert decoder.pcm(number) == expected_pcm(expected_codes(SOUND), SMALL)


def test_numbers_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_REMEMBERED", 10)
    voices = Voices()
    voices.say(1000, TOKENS)
    for number in range(100):
        assert outline(voices.say(number, TOKENS)) == ["late_stream"]
    assert len(voices.connection._late_numbers) == 10


@repeated(2_000, 100_000)
def test_streams_that_are_over_leave_nothing(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MAX_REMEMBERED", 10)
    connection = Connection(DECODE, CountingDecoder, Ramp(), {}, max_streams=4)

    def say(number: int, message: Message) -> None:
        for _ in connection.receive(in_stream(number, message)):
            pass

    def open_and_close(number: int) -> None:
        say(number, settle(window_samples=100, levels_ms=10))
        for message in (mark("m"), TOKENS, PING, *([END] if number % 3 else []), credit(1000)):
            say(number, message)
        if number % 2:
            for lane in connection.due_lanes():
                assert lane.stream is not None
                list(connection.advance([Turn(lane, lane.stream.allowed_frames)]))
        for message in (CANCEL, TOKENS, credit(2000), json_message(Kind.HANDSHAKE, {"sample_rate": 1})):
            say(number, message)

    for number in range(100):
        open_and_close(number)
    gc.collect()
    blocks = sys.getallocatedblocks()
    for number in range(100, 100 + times):
        open_and_close(number)
    gc.collect()
    assert sys.getallocatedblocks() - blocks < times / 10
    assert connection.numbered == {}
    assert connection.numbered_opened == 100 + times
