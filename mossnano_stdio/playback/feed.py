"""Fills the blocks that the callback is given, and decides when to wait and when to play. It knows no device.

Rules of this room:

- A feed *waits*, giving silence, until enough lies in the ring; then it plays until the ring is dry.
- A ring that runs dry inside a stream is an underrun as soon as more of that stream comes. The feed then waits for
  twice as much. At the end of a stream, a dry ring is no underrun.
- The pushing side alone writes the wishes, the callback alone the tallies.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.playback.ring import PcmRing, Samples

_LEAST_PREBUFFER_SECONDS = 0.020  # the first underrun stretches the prebuffer to at least this: 0 doubled stays 0
_MAX_LEAD_SECONDS = 5.0  # some drivers report nonsense: a longer lead than this is ignored
_TIMED_MARKS = 4096


class Outlook(Enum):
    """How the callback goes on after a block."""

    GO_ON = auto()
    PLAYED_OUT = auto()  # the last sample was heard
    ABORTED = auto()


class Feed:
    """Fills the device's blocks from the ring."""

    def __init__(self, ring: PcmRing, sample_rate: int, prebuffer_samples: float, max_prebuffer_samples: float) -> None:
        self.ring = ring
        self.sample_rate = sample_rate
        self.latency_samples = 0  # what the device buffers by itself; known once it is open
        # Wishes: the pushing side alone writes them.
        self.ended_at = 0  # everything before this position belongs to streams that are whole
        self._ends: deque[int] = deque()  # where the streams end that are not played out; the callback removes them
        self._drop_until = 0  # everything before this position is to be dropped
        # From, until: what is to be dropped behind what is still heard. The callback removes them.
        self._drops: deque[tuple[int, int]] = deque()
        self.stopping = False
        self.aborting = False
        self.mark_at = -1  # the position whose way to the speaker is to be timed
        self.mark_since = 0.0
        # Tallies: the callback alone writes them.
        self.prebuffer_samples = prebuffer_samples
        self.waiting = True
        self.underruns = 0
        self.underrun_silence_samples = 0
        self.device_underflows = 0
        self.played_samples = 0
        self.dropped_samples = 0
        self.maybe_played_out_at: float | None = None
        self.maybe_first_heard_at: float | None = None
        self.last_call_at = 0.0
        self.mark_answered = -1
        self.latencies_seconds: NDArray[np.float64] = np.zeros(_TIMED_MARKS)
        self.latency_count = 0
        self._max_prebuffer_samples = max_prebuffer_samples
        self._primed = False
        self._dry_inside = False  # the ring ran dry while a stream was open
        self._last_end = 0  # the end of a stream that playing reached last
        self._silence_run = 0  # silent samples given since the last one from the ring
        self._heard_until = 0.0

    def end_stream(self) -> None:
        """Mark what was written so far as whole streams. The pushing side calls this."""
        if self.ended_at != self.ring.written:
            self._ends.append(self.ring.written)
            self.ended_at = self.ring.written

    def drop_stream(self, keeps_ended: bool = False) -> None:
        """Drop what was written and not yet played, or of that only what follows the last end, and begin a new stream.
        The pushing side calls this.
        """
        if keeps_ended:
            self._drops.append((self.ended_at, self.ring.written))
        else:
            self._drop_until = self.ring.written
        self.end_stream()

    def is_ready(self) -> bool:
        """Whether enough lies in the ring to start, or to go on after a wait."""
        ring = self.ring
        if self.ended_at > ring.read:
            return True
        wanted = self._longer_prebuffer() if self._dry_inside else self.prebuffer_samples
        return ring.filled > 0 and (ring.filled >= wanted or ring.free == 0)

    def fill(self, out: Samples, now: float, lead_seconds: float) -> Outlook:
        """Fill one block whose first sample is heard `lead_seconds` seconds from `now`."""
        self.last_call_at = now
        if self.aborting:
            out[:] = 0
            return Outlook.ABORTED
        if not 0.0 <= lead_seconds <= _MAX_LEAD_SECONDS:
            lead_seconds = self.latency_samples / self.sample_rate
        self.drop_what_is_not_wanted()
        while self._ends and self._ends[0] <= self.ring.read:
            self._last_end = self._ends.popleft()
        count = self._play(out, now + lead_seconds) if self._is_primed(len(out), lead_seconds) else 0
        out[count:] = 0
        self._silence_run = len(out) - count + (0 if count else self._silence_run)
        # Whether the last sample has left the device. The clock alone does not tell: some devices have none, and some
        # drivers discard their buffer when they are stopped (ALSA's way to PulseAudio does). So as much silence must
        # follow it as the device buffers: then a stop cuts off silence only.
        was_heard = self._silence_run >= self.latency_samples and now >= self._heard_until
        if self.stopping and self.ring.filled == 0 and was_heard:
            self.maybe_played_out_at = now
            return Outlook.PLAYED_OUT
        return Outlook.GO_ON

    def drop_what_is_not_wanted(self) -> None:
        """Skip what `drop_stream` marked. The callback calls this; before it runs, the pushing side does."""
        until = max(self.ring.read, self._drop_until)
        while self._drops and self._drops[0][0] <= until:
            until = max(until, self._drops.popleft()[1])
        unwanted = until - self.ring.read
        if unwanted > 0:
            self.ring.read += unwanted
            self.dropped_samples += unwanted
            self.waiting = True
            self._dry_inside = False
            self.mark_answered = self.mark_at

    def _is_primed(self, block_samples: int, lead_seconds: float) -> bool:
        """Whether the device's own buffer is full."""
        # A device that starts with an empty buffer would take a good part of the prebuffer at once. It is given silence
        # instead, so that the prebuffer still covers a producer that comes late.
        if not self._primed:
            given_samples = max(self._silence_run, lead_seconds * self.sample_rate) + block_samples
            self._primed = given_samples >= self.latency_samples
        return self._primed

    def _play(self, out: Samples, heard_at: float) -> int:
        if self.waiting and not self._end_wait():
            return 0
        start = self.ring.read
        until = self._drops[0][0] if self._drops else start + len(out)
        count = self.ring.read_into(out[: max(0, until - start)])
        if count < len(out):
            self.waiting = True
            self._dry_inside = self.ended_at < self.ring.read
        if count:
            self._note_heard(start, count, heard_at)
        return count

    def _end_wait(self) -> bool:
        if self._last_end == self.ring.read:
            self._dry_inside = False  # only the end followed, so the silence was not inside the stream
        if not self.is_ready():
            return False
        if self._dry_inside:
            self.underruns += 1
            self.underrun_silence_samples += self._silence_run
            self.prebuffer_samples = self._longer_prebuffer()
            self._dry_inside = False
        self.waiting = False
        return True

    def _longer_prebuffer(self) -> float:
        longer = max(2 * self.prebuffer_samples, self.latency_samples, self.sample_rate * _LEAST_PREBUFFER_SECONDS)
        return min(longer, self._max_prebuffer_samples)

    def _note_heard(self, start: int, count: int, heard_at: float) -> None:
        self.played_samples += count
        self._heard_until = heard_at + count / self.sample_rate
        if self.maybe_first_heard_at is None:
            self.maybe_first_heard_at = heard_at
        if self.mark_answered < self.mark_at < start + count:
            mark_heard_at = heard_at + (self.mark_at - start) / self.sample_rate
            self.latencies_seconds[self.latency_count % len(self.latencies_seconds)] = mark_heard_at - self.mark_since
            self.latency_count += 1
            self.mark_answered = self.mark_at
