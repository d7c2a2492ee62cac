"""Plays the PCM that is pushed to it.

Rules of this room:

- One thread pushes, ends, flushes and finishes; only `abort` may come from another one.
- The pushing side waits by short sleeps, never for a lock that the callback would have to release, so it sees an
  interrupt or an abort within a few milliseconds.
- Closing asks the callback to stop before it calls PortAudio: ALSA's own abort cancels the thread that runs the
  callback, wherever in the interpreter that is.
- The callback counts underruns; the pushing side logs them.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Literal

import numpy as np

from mossnano_stdio.errors import DeviceError, UsageError
from mossnano_stdio.playback.convert import Converter
from mossnano_stdio.playback.defaults import LATENCY_MS, MAX_VOLUME, PREBUFFER_MS
from mossnano_stdio.playback.devices import CHOOSE_ANOTHER, find_device, import_sounddevice, nearest_format
from mossnano_stdio.playback.feed import Feed, Outlook
from mossnano_stdio.playback.ring import PcmRing, Samples

Latency = Literal["low", "high"] | float  # one of PortAudio's two proposals for the device, or milliseconds
ShouldStop = Callable[[], bool]

ALL: Final = float("inf")  # as prebuffer_ms: a stream is played once its end was pushed

_MAX_PREBUFFER_MS: Final = 2_000.0  # how far underruns can stretch the prebuffer
_MIN_RING_MS: Final = 4_000.0
_NAP_SECONDS: Final = 0.010
_ABORT_PATIENCE_SECONDS: Final = 0.060  # the callback usually comes every 10 ms
_HUNG_PATIENCE_SECONDS: Final = 1.0
_DRAIN_PATIENCE_SECONDS: Final = 2.0
_LOST_AFTER_SECONDS: Final = 5.0

_log = logging.getLogger("mossnano")


class Player:
    """Plays PCM16, beginning when enough of it was pushed.

    `prebuffer_ms` is what must lie in the ring before the first sound (`ALL`: a whole stream), `latency` what the
    device buffers by itself. Leaving the `with` block stops at once, so call `finish()` to hear the end.

        with Player(48000, 2) as player:
            for pcm in chunks:
                player.push(pcm)
            player.finish()
    """

    def __init__(
        self,
        sample_rate: int,
        channels: int,
        *,
        device: int | str | None = None,
        prebuffer_ms: float = PREBUFFER_MS,
        latency: Latency = LATENCY_MS,
        volume: float = 1.0,
    ) -> None:
        if not prebuffer_ms >= 0:
            raise UsageError(f"a prebuffer of {prebuffer_ms} ms cannot be: give 0 or more")
        if not 0 <= volume <= MAX_VOLUME:
            raise UsageError(f"a volume of {volume} cannot be: give 0 (silence) to {MAX_VOLUME:g}; 1 is as it is")
        if not isinstance(latency, str) and not latency > 0:
            raise UsageError(f"a latency of {latency} ms cannot be: give more than 0, low, or high")
        self.sample_rate = sample_rate
        self.channels = channels
        self.device = find_device(device)
        self._device_rate, device_channels = nearest_format(self.device, sample_rate, channels)
        self._log_format(device_channels)
        self._converter = Converter(sample_rate, channels, self._device_rate, device_channels, volume)
        self._feed = _build_feed(prebuffer_ms, self._device_rate, device_channels)
        self._sounddevice = import_sounddevice()
        self._finished = threading.Event()  # the device's stream has ended, for whatever reason
        self._maybe_bug: Exception | None = None  # what escaped in the callback
        self._stream = self._open_stream(latency, device_channels)
        self._feed.latency_samples = round(self._stream.latency * self._device_rate)
        self._closing = threading.Lock()  # for the pushing thread and an abort from another one; not for the callback
        self._closed = False
        self._maybe_started_at: float | None = None
        self._maybe_first_since: float | None = None
        self._logged_underruns = 0
        self._logged_underflows = 0

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    # --- pushing ------------------------------------------------------------------------------------

    def push(self, pcm: bytes, should_stop: ShouldStop | None = None, since: float | None = None) -> bool:
        """Queue whole samples, waiting while the ring is full. False: `should_stop` or an abort cut it short.

        `since` is the instant, by time.perf_counter(), from which the latency to the speaker is measured, for example
        when the tokens of this PCM came in. None means now.
        """
        self._refuse_if_finished()
        since = time.perf_counter() if since is None else since
        if self._maybe_first_since is None:
            self._maybe_first_since = since
        samples = self._converter.convert(pcm)
        feed = self._feed
        if len(samples) and feed.mark_answered == feed.mark_at:  # one position is timed at a time
            feed.mark_since = since
            feed.mark_at = feed.ring.written
        return self._write(samples, should_stop)

    def end_stream(self, should_stop: ShouldStop | None = None) -> bool:
        """End the stream: it is played even if shorter than the prebuffer, and silence after it is no underrun."""
        self._refuse_if_finished()
        if not self._write(self._converter.finish(), should_stop):
            return False
        self._feed.end_stream()
        self._start_when_ready()
        return True

    def flush(self, keeps_ended: bool = False) -> None:
        """Drop what is queued, or of that only what was pushed since the last `end_stream`. The device plays what it
        has taken already, then silence.
        """
        self._refuse_if_finished()
        self._converter.reset()
        self._feed.drop_stream(keeps_ended)
        if self._maybe_started_at is None:
            self._feed.drop_what_is_not_wanted()

    def finish(self, should_stop: ShouldStop | None = None) -> bool:
        """Play everything to the last sample, then close. False: `should_stop` or an abort cut it short."""
        if not self.end_stream(should_stop) or not self._play_out(should_stop):
            self.abort()
            return False
        self._log_trouble()
        self._close()
        return True

    def abort(self) -> None:
        """Stop at once and close. Drop what is queued and what the device still holds."""
        self._feed.aborting = True
        self._close()

    # --- questions ----------------------------------------------------------------------------------

    @property
    def underruns(self) -> int:
        """How often a stream was interrupted by silence because its PCM came late."""
        return self._feed.underruns

    @property
    def position_samples(self) -> int:
        """How many of the pushed samples the device has taken."""
        return round(self._feed.played_samples * self.sample_rate / self._device_rate)

    @property
    def buffered_ms(self) -> float:
        return self._to_ms(self._feed.ring.filled)

    @property
    def prebuffer_ms(self) -> float:
        """What must lie in the ring before sound starts. Each underrun doubles it."""
        return self._to_ms(self._feed.prebuffer_samples)

    @property
    def device_latency_ms(self) -> float:
        return self._to_ms(self._feed.latency_samples)

    def stats(self) -> dict[str, Any]:
        """The counts so far, as values for JSON. A latency runs from the `since` of a push to the speaker."""
        feed = self._feed
        return {
            "device": self.device.name,
            "device_sample_rate": self._device_rate,
            "device_latency_ms": round(self.device_latency_ms, 1),
            "device_underflows": feed.device_underflows,
            "played_seconds": round(feed.played_samples / self._device_rate, 3),
            "dropped_seconds": round(feed.dropped_samples / self._device_rate, 3),
            "underruns": feed.underruns,
            "underrun_silence_ms": round(self._to_ms(feed.underrun_silence_samples)),
            "prebuffer_ms": None if self.prebuffer_ms == ALL else round(self.prebuffer_ms),
            **self._first_sound(),
            **self._latency_percentiles(),
        }

    # --- the pushing side ---------------------------------------------------------------------------

    def _write(self, samples: Samples, should_stop: ShouldStop | None) -> bool:
        feed, ring = self._feed, self._feed.ring
        while not self._is_told_to_stop(should_stop):
            self._raise_if_lost()
            if feed.prebuffer_samples == ALL and self._maybe_started_at is None and ring.free <= len(samples):
                ring.grow(2 * (ring.filled + len(samples)))  # a full ring would start before the stream's end
            samples = samples[ring.write(samples) :]
            self._start_when_ready()
            self._log_trouble()
            if not len(samples):
                return True
            time.sleep(_NAP_SECONDS)
        return False

    def _start_when_ready(self) -> None:
        if self._maybe_started_at is not None or not self._feed.is_ready():
            return
        with self._closing:
            if self._closed:
                return
            try:
                self._stream.start()
            except self._sounddevice.PortAudioError as error:
                raise DeviceError(f"{self.device.name} does not start: {error}; {CHOOSE_ANOTHER}") from error
            self._maybe_started_at = time.perf_counter()

    def _play_out(self, should_stop: ShouldStop | None) -> bool:
        self._feed.stopping = True
        while self._maybe_started_at is not None and not self._finished.is_set():
            if self._is_told_to_stop(should_stop):
                return False
            if self._was_played_out(_DRAIN_PATIENCE_SECONDS):
                break
            self._raise_if_lost()
            self._finished.wait(_NAP_SECONDS)
        if not self._feed.aborting:
            self._raise_if_lost()
        return not self._feed.aborting

    def _was_played_out(self, seconds_ago: float) -> bool:
        maybe_at = self._feed.maybe_played_out_at
        return maybe_at is not None and time.perf_counter() - maybe_at >= seconds_ago

    def _is_told_to_stop(self, should_stop: ShouldStop | None) -> bool:
        return self._feed.aborting or (should_stop is not None and should_stop())

    def _refuse_if_finished(self) -> None:
        if self._closed and not self._feed.aborting:
            raise UsageError("this player has finished: make a new one")

    def _raise_if_lost(self) -> None:
        if self._maybe_bug is not None:
            raise self._maybe_bug
        if self._maybe_started_at is None or self._was_played_out(0):
            return
        if self._finished.is_set():
            raise DeviceError(
                f"{self.device.name} stopped in the middle: was it unplugged, did its sound server end? "
                f"Bring it back, or {CHOOSE_ANOTHER}"
            )
        if time.perf_counter() - max(self._maybe_started_at, self._feed.last_call_at) > _LOST_AFTER_SECONDS:
            raise DeviceError(
                f"{self.device.name} has taken no sound for {_LOST_AFTER_SECONDS:g} s: is its sound server hanging? "
                f"Restart that, or {CHOOSE_ANOTHER}"
            )

    # --- log and stats ------------------------------------------------------------------------------

    def _log_format(self, device_channels: int) -> None:
        if self._device_rate != self.sample_rate:
            _log.warning(
                "%s does not play %d Hz: resampled to %d Hz", self.device.name, self.sample_rate, self._device_rate
            )
        if device_channels != self.channels:
            _log.warning("%s does not play %d channels: mixed to %d", self.device.name, self.channels, device_channels)

    def _log_trouble(self) -> None:
        feed = self._feed
        if feed.underruns > self._logged_underruns:
            self._logged_underruns = feed.underruns
            _log.warning(
                "underrun %d: PCM came late, %.0f ms of silence in all; the prebuffer is %.0f ms from now on",
                feed.underruns,
                self._to_ms(feed.underrun_silence_samples),
                self.prebuffer_ms,
            )
        if feed.device_underflows > self._logged_underflows:
            self._logged_underflows = feed.device_underflows
            _log.warning(
                "%s ran dry (%d) although PCM was there: its own %.0f ms are too little here, try a longer latency",
                self.device.name,
                feed.device_underflows,
                self.device_latency_ms,
            )

    def _to_ms(self, samples: float) -> float:
        return 1000 * samples / self._device_rate

    def _first_sound(self) -> dict[str, float | None]:
        """When sound began: in milliseconds after the first `since`, and as the Unix time, which processes share."""
        maybe_since, maybe_heard = self._maybe_first_since, self._feed.maybe_first_heard_at
        if maybe_since is None or maybe_heard is None:
            return {"first_sound_ms": None, "first_sound_unix_seconds": None}
        unix_seconds = time.time() - (time.perf_counter() - maybe_heard)
        return {
            "first_sound_ms": round(1000 * (maybe_heard - maybe_since), 1),
            "first_sound_unix_seconds": round(unix_seconds, 4),
        }

    def _latency_percentiles(self) -> dict[str, float | None]:
        names = ("latency_p50_ms", "latency_p95_ms", "latency_max_ms")
        measured = 1000 * self._feed.latencies_seconds[: self._feed.latency_count]
        if not len(measured):
            return dict.fromkeys(names)
        return dict(zip(names, np.percentile(measured, (50, 95, 100)).round(1).tolist(), strict=True))

    # --- the device ---------------------------------------------------------------------------------

    def _open_stream(self, latency: Latency, device_channels: int) -> Any:
        try:
            return self._sounddevice.OutputStream(
                device=self.device.index,
                samplerate=self._device_rate,
                channels=device_channels,
                dtype="int16",
                latency=latency if isinstance(latency, str) else latency / 1000,
                callback=self._fill_block,
                finished_callback=self._finished.set,
            )
        except self._sounddevice.PortAudioError as error:
            raise DeviceError(f"{self.device.name} cannot be opened: {error}; {CHOOSE_ANOTHER}") from error

    def _fill_block(self, out: Samples, samples: int, times: Any, status: Any) -> None:
        """The callback, which PortAudio calls on its own thread."""
        try:
            if status.output_underflow:
                self._feed.device_underflows += 1
            verdict = self._feed.fill(out, time.perf_counter(), times.outputBufferDacTime - times.currentTime)
        except Exception as bug:  # noqa: BLE001 - the pushing side raises it
            self._maybe_bug = bug
            verdict = Outlook.ABORTED
        if verdict is Outlook.PLAYED_OUT:
            raise self._sounddevice.CallbackStop
        if verdict is Outlook.ABORTED:
            raise self._sounddevice.CallbackAbort

    def _close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if self._maybe_started_at is None or self._finished.wait(_ABORT_PATIENCE_SECONDS):
                self._stream.close(ignore_errors=True)
            else:
                self._close_by_force()

    def _close_by_force(self) -> None:
        """Close a device that has stopped calling back, on a thread: closing it may never return."""

        def abort_and_close() -> None:
            self._stream.abort(ignore_errors=True)
            self._stream.close(ignore_errors=True)

        closer = threading.Thread(target=abort_and_close, name="mossnano-close-device", daemon=True)
        closer.start()
        closer.join(_HUNG_PATIENCE_SECONDS)
        if closer.is_alive():
            atexit.unregister(self._sounddevice._exit_handler)  # at exit it would wait for the same device


def _build_feed(prebuffer_ms: float, sample_rate: int, channels: int) -> Feed:
    prebuffer_samples = prebuffer_ms * sample_rate / 1000
    longest_samples = max(_MAX_PREBUFFER_MS * sample_rate / 1000, prebuffer_samples)
    capacity_samples = _MIN_RING_MS * sample_rate / 1000
    if prebuffer_ms != ALL:
        capacity_samples = max(capacity_samples, 2 * prebuffer_samples)
    return Feed(PcmRing(round(capacity_samples), channels), sample_rate, prebuffer_samples, longest_samples)
