"""Whose turn it is: the least held first, chunks no longer than the others can wait, and who may wait for more."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from mossnano_stdio.chunks import Fixed, Ramp
from mossnano_stdio.process.turns import Turns
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE
from mossnano_stdio.protocol.messages import NUMBERED, Kind, Message, in_stream, json_message
from mossnano_stdio.protocol.stream import Stream
from mossnano_stdio.tokens import Codes
from tests.conftest import repeated
from tests.doubles import NANO, CountingDecoder, some_frames, tokens_payload

TOKENS = Message(Kind.TOKENS, tokens_payload(some_frames(40, NANO)))
FRAME_SECONDS = 0.08


class Table:
    """Streams that hold so many seconds of sound at 100 s of the clock; None: nothing was sent yet."""

    def __init__(self, held: Mapping[int, float | None], **settings: int) -> None:
        self.connection = Connection(DECODE, lambda: CountingDecoder(NANO), Ramp(), {}, max_streams=40)
        for number, maybe_held in held.items():
            self.open(number, maybe_held, **settings)

    def open(self, number: int, maybe_held: float | None, **settings: int) -> Stream:
        for message in (json_message(Kind.SETTINGS, settings), TOKENS):
            list(self.connection.receive(in_stream(number, message), 0.001 * number))
        stream = self.connection.numbered[number].stream
        assert stream is not None
        for _ in range(4):
            stream.chunks.schedule.advance()  # to where the ramp has chunks of 8
        if maybe_held is not None:
            stream.heard_until_seconds = 100 + maybe_held
        return stream

    def next(self, turns: Turns | None = None, seconds: float = 100.0) -> list[tuple[int | None, int]]:
        chosen = (turns or Turns(FRAME_SECONDS)).next(self.connection.due_lanes(), seconds)
        return [(lane.maybe_number, frames) for lane, frames in chosen]


def costing(seconds_a_frame: float, at_once: int = 1) -> Turns:
    turns = Turns(FRAME_SECONDS, at_once)
    turns.note_cost(1, seconds_a_frame)
    return turns


def test_the_stream_with_the_least_held_is_next() -> None:
    assert Table({1: 0.9, 2: 0.2, 3: 0.4}).next() == [(2, 8)]


def test_a_stream_that_has_sent_nothing_goes_first_with_one_frame_and_the_older_of_two_before() -> None:
    assert Table({1: 0.0, 2: None, 3: None}).next() == [(2, 1)]


def test_a_lone_stream_takes_what_it_may() -> None:
    assert Table({1: None}).next() == [(1, 8)]


def test_urgency_decides_among_those_that_hold_little_only() -> None:
    table = Table({1: 0.1})
    table.open(2, 0.3, urgency=0)
    assert table.next() == [(2, 8)]
    bulk = Table({1: 0.1})
    bulk.open(2, 0.6, urgency=0)
    assert bulk.next() == [(1, 8)]


@pytest.mark.parametrize(("left", "frames"), [(0.25, 8), (0.24, 4), (0.15, 4), (0.14, 2), (0.09, 1), (0.01, 1)])
def test_a_chunk_is_cut_so_that_no_other_runs_dry_before_its_own_frame_is_there(left: float, frames: int) -> None:
    table = Table({1: 0.0, 2: left})
    assert table.next(costing(0.025)) == [(1, frames)]


@pytest.mark.parametrize(
    ("second", "third", "frames"), [(0.25, 0.28, 8), (0.25, 0.26, 4), (0.15, 0.18, 4), (0.15, 0.16, 2)]
)
def test_nor_does_one_that_waits_behind_another(second: float, third: float, frames: int) -> None:
    table = Table({1: 0.0, 2: second, 3: third})
    assert table.next(costing(0.025)) == [(1, frames)]


@pytest.mark.parametrize(("streams", "frames"), [(2, 1), (13, 1), (14, 2), (21, 8), (30, 8)])
def test_a_chunk_is_not_cut_to_a_size_at_which_all_could_not_go_on(streams: int, frames: int) -> None:
    turns = Turns(FRAME_SECONDS)
    for size, seconds in STEP_SECONDS.items():
        turns.note_cost(size, seconds)
    assert Table(dict.fromkeys(range(streams), 0.0)).next(turns) == [(0, frames)]


def test_a_fixed_size_is_never_cut() -> None:
    table = Table({2: 0.04})
    table.connection.plain.settings = table.connection.plain.settings.__class__(
        16, Fixed(8), table.connection.plain.settings.form
    )
    table.open(3, 0.01)
    assert table.next(costing(0.025)) == [(3, 8)]


def test_a_cost_is_what_such_chunks_took_lately() -> None:
    turns = Turns(FRAME_SECONDS)
    assert turns.cost_seconds(4) == 0
    turns.note_cost(2, 0.010)
    assert turns.cost_seconds(4) == pytest.approx(0.020)
    for _ in range(50):
        turns.note_cost(2, 0.020)
    assert turns.cost_seconds(2) == pytest.approx(0.020, rel=0.01)


def test_as_many_as_are_decoded_at_once_are_next_together() -> None:
    assert Table({1: 0.9, 2: 0.2, 3: 0.4}).next(Turns(FRAME_SECONDS, 2)) == [(2, 8), (3, 8)]


def granted(stream: Stream, frames: int) -> None:
    stream.grant(frames * NANO.frame_samples)


def test_what_credit_cuts_short_waits_while_its_listener_plays_and_has_enough() -> None:
    table = Table({})
    stream = table.open(1, 0.7, window_samples=4 * NANO.frame_samples)
    assert table.next() == [(1, 4)]  # it has not begun to play, and may wait for this
    granted(stream, 5)
    assert table.next() == []
    assert Turns(FRAME_SECONDS).wakes_at(table.connection.due_lanes()) == pytest.approx(100.2)
    assert table.next(seconds=100.21) == [(1, 4)]
    granted(stream, 12)
    assert table.next() == [(1, 8)]  # a whole one waits for nothing


def test_held_is_what_was_sent_and_not_played() -> None:
    stream = Table({}).open(1, None, window_samples=10 * NANO.frame_samples)
    stream.samples = 6 * NANO.frame_samples
    assert stream.held_seconds(1e9) == pytest.approx(6 * FRAME_SECONDS)
    granted(stream, 12)
    assert stream.held_seconds(1e9) == pytest.approx(4 * FRAME_SECONDS)
    without = Table({}).open(1, 0.5)
    assert without.held_seconds(100.1) == pytest.approx(0.4)
    assert without.held_seconds(200) == 0


def test_lateness_counts_from_when_a_chunk_was_due_and_the_listener_had_nothing() -> None:
    stream = Table({}).open(1, 0.5)
    assert stream.late_seconds(100.4) == 0
    assert stream.late_seconds(100.6) == pytest.approx(0.1)
    stream.due_seconds = 100.55
    assert stream.late_seconds(100.6) == pytest.approx(0.05)


# --- in real time, by a clock of its own -----------------------------------------------------------------------

STEP_SECONDS = {frames: (2.5 + 3.5 * frames) / 1000 for frames in range(1, 9)}  # nano on two cores, see README
MIMI_STEP_SECONDS = {frames: (8.7 + 2.8 * frames) / 1000 for frames in range(1, 9)}  # in ones and twos too slow for 16
RATE = NANO.sample_rate


class SilentDecoder(CountingDecoder):
    def step(self, codes: Codes) -> NDArray[np.float32]:
        return np.zeros((len(codes) * NANO.frame_samples, 2), np.float32)


class Voice:
    """A client's stream: it plays what comes once it has 200 ms, and grants what it played."""

    def __init__(self, number: int, opens_at: float) -> None:
        self.number = number
        self.opened_at = opens_at
        self.heard_at: list[float] = []  # when each frame was there
        self.gap_seconds = 0.0
        self._samples = 0
        self._plays_out_at: float | None = None

    def hear(self, samples: int, now: float) -> None:
        self._samples += samples
        self.heard_at += [now] * (samples // NANO.frame_samples)
        if self._plays_out_at is None:
            if self._samples >= 0.2 * RATE:
                self._plays_out_at = now + self._samples / RATE
            return
        self.gap_seconds += max(0.0, now - self._plays_out_at)
        self._plays_out_at = max(now, self._plays_out_at) + samples / RATE

    def played_samples(self, now: float) -> int:
        left = 0.0 if self._plays_out_at is None else max(0.0, self._plays_out_at - now)
        return self._samples - round(left * RATE) if self._plays_out_at is not None else 0


class RealTime:
    """A process whose steps take so long, and voices that speak to it."""

    def __init__(self, slowness: float = 1.0, step_seconds: Mapping[int, float] = STEP_SECONDS) -> None:
        self.connection = Connection(DECODE, lambda: SilentDecoder(NANO), Ramp(), {}, max_streams=100)
        self.turns = Turns(FRAME_SECONDS)
        self.now = 0.0
        self.busy_seconds = 0.0
        self.voices: dict[int, Voice] = {}
        self._step_seconds = {frames: seconds * slowness for frames, seconds in step_seconds.items()}
        self._told: list[tuple[float, int, Message]] = []  # a heap: when, to which stream, what

    def tell(self, at: float, number: int, message: Message) -> None:
        heapq.heappush(self._told, (at, number, message))
        self.voices.setdefault(number, Voice(number, at))

    def live(self, number: int, at: float, frames: int) -> None:
        """Tokens come as they are spoken."""
        for frame in range(frames):
            self.tell(at + frame * FRAME_SECONDS, number, Message(Kind.TOKENS, bytes(20)))

    def ahead(self, number: int, at: float, seconds: float, window_frames: int = 25) -> None:
        """Tokens come at once, credit as it is played, every 20 ms."""
        window = window_frames * NANO.frame_samples
        self.tell(at, number, json_message(Kind.SETTINGS, {"window_samples": window}))
        self.tell(at + 1e-6, number, Message(Kind.TOKENS, bytes(20 * round(seconds / FRAME_SECONDS))))
        for tick in range(round(seconds * 50)):
            self.tell(at + tick / 50, number, Message(Kind.CREDIT, b""))

    def run(self, until: float) -> None:
        while self.now < until:
            while self._told and self._told[0][0] <= self.now:
                at, number, message = heapq.heappop(self._told)
                if message.kind == Kind.CREDIT:
                    granted_samples = 25 * NANO.frame_samples + self.voices[number].played_samples(self.now)
                    message = Message(Kind.CREDIT, granted_samples.to_bytes(8, "little"))
                list(self.connection.receive(in_stream(number, message), at))
            due = self.connection.due_lanes()
            turns = self.turns.next(due, self.now)
            if not turns:
                told_at = self._told[0][0] if self._told else math.inf
                self.now = max(self.now, min(told_at, self.turns.wakes_at(due), until))
                continue
            ((lane, frames),) = turns
            step_seconds = self._step_seconds[frames]
            self.now += step_seconds
            self.busy_seconds += step_seconds
            self.turns.note_cost(frames, step_seconds)
            for answer in self.connection.advance(turns):
                if answer.kind == Kind.AUDIO | NUMBERED:
                    assert lane.stream is not None
                    lane.stream.note_sent(self.now)
                    assert lane.maybe_number is not None
                    self.voices[lane.maybe_number].hear((len(answer.payload) - 4) // 4, self.now)


@repeated(20, 300)
def test_sixteen_voices_whose_tokens_come_ahead_never_pause_and_leave_cores_idle(times: int) -> None:
    scene = RealTime()
    for number in range(16):
        scene.ahead(number, 0.05 * number, times)
    scene.run(5)  # by now all windows are full
    until_then = scene.busy_seconds
    scene.run(times - 1)
    assert [voice.gap_seconds for voice in scene.voices.values()] == [0.0] * 16
    assert (scene.busy_seconds - until_then) / (times - 6) < 0.8


def test_sixteen_voices_that_open_at_once_never_pause_where_small_chunks_could_not_go_on() -> None:
    scene = RealTime(step_seconds=MIMI_STEP_SECONDS)
    for number in range(16):
        scene.ahead(number, 0, 5)
    scene.run(7)
    assert [round(voice.gap_seconds, 3) for voice in scene.voices.values()] == [0.0] * 16
    assert max(voice.heard_at[0] for voice in scene.voices.values()) < 0.2


def test_a_sixteenth_voice_that_joins_fifteen_is_heard_at_once() -> None:
    scene = RealTime()
    for number in range(15):
        scene.ahead(number, 0.01 * number, 40)
    for number in range(15, 60):
        scene.live(number, 3 + 0.8 * (number - 15) + 0.003 * number, 1)
        scene.tell(3.7 + 0.8 * (number - 15), number, Message(Kind.CANCEL))
    scene.run(39)
    waits = sorted(voice.heard_at[0] - voice.opened_at for number, voice in scene.voices.items() if number >= 15)
    assert waits[round(0.95 * len(waits))] < 0.08


def lateness(voice: Voice, start: float) -> list[float]:
    return [at - start - frame * FRAME_SECONDS for frame, at in enumerate(voice.heard_at)]


def test_twelve_voices_whose_tokens_come_live_are_on_time() -> None:
    scene = RealTime()
    starts = {number: 0.037 * number for number in range(12)}
    for number, start in starts.items():
        scene.live(number, start, 400)
    scene.run(33)
    late = sorted(late for number, start in starts.items() for late in lateness(scene.voices[number], start))
    assert len(late) == 12 * 400
    assert late[round(0.99 * len(late))] < 0.16


def test_fourteen_voices_that_speak_in_step_are_on_time() -> None:
    scene = RealTime()
    for number in range(14):
        scene.live(number, 0, 200)
    scene.run(17)
    assert max(late for voice in scene.voices.values() for late in lateness(voice, 0)) < 0.12


def test_overload_comes_to_all_alike_and_goes_when_its_cause_goes() -> None:
    scene = RealTime()
    for number in range(24):
        scene.live(number, 0.01 * number, 1250 if number < 8 else 250)
    scene.run(20)
    late = [lateness(scene.voices[number], 0.01 * number)[-1] for number in range(24)]
    assert min(late) > 0.3, "that is no overload"
    assert max(late) - min(late) < 1
    scene.run(60)
    for number in range(8):
        assert max(lateness(scene.voices[number], 0.01 * number)[-200:]) < 0.16


def test_overload_makes_chunks_grow() -> None:
    scene = RealTime(slowness=1.5)
    for number in range(16):
        scene.ahead(number, 0, 20)
    scene.run(19)
    frames = sum(len(voice.heard_at) for voice in scene.voices.values())
    assert scene.busy_seconds / frames < 1.05 * 1.5 * STEP_SECONDS[8] / 8
