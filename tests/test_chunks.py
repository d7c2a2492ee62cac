"""Chunks: how seconds become frames, and how frames become chunks."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossnano_stdio.chunks import Fixed, Ramp, Schedule, frames_for_seconds, plan
from mossnano_stdio.errors import UsageError

NANO_FRAMES_PER_SECOND = 12.5


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [
        (1.333, 17),  # 16.66
        (1.8, 23),  # 22.5, half up
        (2.28, 29),  # 28.5, which binary floats make 28.499999999999996
        (0.2, 3),  # 2.5
        (0.08, 1),
        (0.0001, 1),  # never 0
        (0.119, 1),
        (0.12, 2),  # 1.5
        (3600, 45000),
        (1e9, 12_500_000_000),
    ],
)
def test_seconds_to_whole_frames(seconds: float, frames: int) -> None:
    assert frames_for_seconds(seconds, NANO_FRAMES_PER_SECOND) == frames


@given(st.integers(1, 10_000_000), st.integers(1, 2000))
def test_seconds_round_half_up_as_written(milliseconds: int, frames_per_8_seconds: int) -> None:
    exact = Fraction(milliseconds, 1000) * Fraction(frames_per_8_seconds, 8)
    half_up = (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
    assert frames_for_seconds(milliseconds / 1000, frames_per_8_seconds / 8) == max(1, half_up)


@pytest.mark.parametrize("seconds", [0, -1, -0.0, float("nan"), float("inf"), float("-inf")])
def test_a_length_that_is_none(seconds: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        frames_for_seconds(seconds, NANO_FRAMES_PER_SECOND)


@pytest.mark.parametrize(
    ("max_frames", "sizes"),
    [(8, [1, 2, 4, 8, 8, 8]), (1, [1, 1, 1]), (6, [1, 2, 4, 6, 6]), (16, [1, 2, 4, 8, 16, 16]), (3, [1, 2, 3, 3])],
)
def test_the_ramp_doubles_up_to_its_limit(max_frames: int, sizes: list[int]) -> None:
    ramp = Ramp(max_frames)
    assert ramp.max_frames == max_frames
    assert ramp.maybe_chunk_frames is None
    assert [take(ramp, 1000) for _ in sizes] == sizes
    ramp.reset()
    assert take(ramp, 1000) == 1


def take(schedule: Schedule, waiting: int, final: bool = False) -> int:
    """Ask for a chunk, and take it where there is one."""
    frames = schedule.next_frames(waiting, final)
    if frames:
        schedule.advance()
    return frames


def test_the_ramp_never_waits_and_is_not_moved_by_questions() -> None:
    ramp = Ramp()
    assert ramp.next_frames(0, final=False) == 0
    assert ramp.next_frames(0, final=True) == 0
    assert [ramp.next_frames(5, final=False) for _ in range(3)] == [1, 1, 1]
    assert take(ramp, 5) == 1
    assert ramp.wanted_frames == 2
    assert take(ramp, 1) == 1
    assert take(ramp, 3) == 3
    assert take(ramp, 100) == 8


def test_fixed_waits_for_its_size_or_the_end() -> None:
    fixed = Fixed(17)
    assert fixed.next_frames(16, final=False) == 0
    assert fixed.next_frames(17, final=False) == 17
    assert fixed.next_frames(40, final=True) == 17
    assert fixed.next_frames(6, final=True) == 6
    assert fixed.next_frames(0, final=True) == 0
    fixed.advance()
    assert fixed.maybe_chunk_frames == fixed.wanted_frames == fixed.max_frames == 17


@pytest.mark.parametrize("frames", [0, -1])
def test_chunks_of_nothing_are_refused(frames: int) -> None:
    for schedule in (Ramp, Fixed):
        with pytest.raises(UsageError, match="1 or more"):
            schedule(frames)


schedules = st.one_of(st.builds(Ramp, st.integers(1, 20)), st.builds(Fixed, st.integers(1, 40)))


@given(schedules, st.lists(st.integers(0, 30), max_size=30))
def test_a_schedule_takes_no_more_than_waits_and_leaves_nothing_at_the_end(schedule: Schedule, came: list[int]) -> None:
    waiting = taken = 0
    for frames in came:
        waiting += frames
        while chunk_frames := take(schedule, waiting):
            assert 0 < chunk_frames <= waiting
            waiting -= chunk_frames
            taken += chunk_frames
    while chunk_frames := take(schedule, waiting, final=True):
        assert 0 < chunk_frames <= waiting
        waiting -= chunk_frames
        taken += chunk_frames
    assert waiting == 0
    assert taken == sum(came)


@given(schedules, st.integers(0, 500))
def test_a_plan_covers_every_frame_once_and_is_what_a_stream_would_get(schedule: Schedule, frames: int) -> None:
    take(schedule, 3, final=True)  # somewhere in a stream, where a plan must neither start nor leave it
    chunks = plan(frames, schedule)
    assert plan(frames, schedule) == chunks
    assert [start for start, _ in chunks] == [sum(size for _, size in chunks[:index]) for index in range(len(chunks))]
    assert sum(size for _, size in chunks) == frames
    schedule.reset()
    assert all(take(schedule, frames - start, final=True) == size for start, size in chunks)


def test_plans_by_hand() -> None:
    assert plan(0, Ramp()) == []
    assert plan(17, Fixed(17)) == [(0, 17)]
    assert plan(18, Fixed(17)) == [(0, 17), (17, 1)]
    assert plan(16, Ramp()) == [(0, 1), (1, 2), (3, 4), (7, 8), (15, 1)]
