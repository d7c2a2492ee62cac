"""Whose turn it is: the least held first, chunks no longer than the others can wait, and who may wait for more."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mossnano_stdio.chunks import Fixed, Ramp
from mossnano_stdio.process.turns import Turns
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE
from mossnano_stdio.protocol.messages import Kind, Message, in_stream, json_message
from mossnano_stdio.protocol.stream import Stream
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
        chosen = (turns or Turns()).next(self.connection.due_lanes(), seconds)
        return [(lane.maybe_number, frames) for lane, frames in chosen]


def costing(seconds_a_frame: float, at_once: int = 1) -> Turns:
    turns = Turns(at_once)
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


@pytest.mark.parametrize(("left", "frames"), [(0.9, 8), (0.79, 4), (0.39, 2), (0.19, 1), (0.05, 8)])
def test_a_chunk_is_cut_so_that_no_other_runs_dry_unless_that_cannot_be_helped(left: float, frames: int) -> None:
    table = Table({1: 0.01, 2: left})
    assert table.next(costing(0.1)) == [(1, frames)]


def test_a_fixed_size_is_never_cut() -> None:
    table = Table({2: 0.19})
    table.connection.plain.settings = table.connection.plain.settings.__class__(
        16, Fixed(8), table.connection.plain.settings.form
    )
    table.open(3, 0.01)
    assert table.next(costing(0.1)) == [(3, 8)]


def test_a_cost_is_what_such_chunks_took_lately() -> None:
    turns = Turns()
    assert turns.cost_seconds(4) == 0
    turns.note_cost(2, 0.010)
    assert turns.cost_seconds(4) == pytest.approx(0.020)
    for _ in range(50):
        turns.note_cost(2, 0.020)
    assert turns.cost_seconds(2) == pytest.approx(0.020, rel=0.01)


def test_as_many_as_are_decoded_at_once_are_next_together() -> None:
    assert Table({1: 0.9, 2: 0.2, 3: 0.4}).next(Turns(2)) == [(2, 8), (3, 8)]


def granted(stream: Stream, frames: int) -> None:
    stream.grant(frames * NANO.frame_samples)


def test_what_credit_cuts_short_waits_while_its_listener_plays_and_has_enough() -> None:
    table = Table({})
    stream = table.open(1, 0.7, window_samples=4 * NANO.frame_samples)
    assert table.next() == [(1, 4)]  # it has not begun to play, and may wait for this
    granted(stream, 5)
    assert table.next() == []
    assert Turns().wakes_at(table.connection.due_lanes()) == pytest.approx(100.2)
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
