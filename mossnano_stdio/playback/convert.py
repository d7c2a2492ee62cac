"""Pushed bytes -> samples as the device takes them: mixed, resampled, made louder or softer.

Rules of this room:

- PCM that the device takes as it is passes through unchanged, to the bit, at volume 1.
- soxr is imported only where something has to be resampled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mossnano_stdio.errors import DeviceError, UsageError
from mossnano_stdio.playback.devices import CHOOSE_ANOTHER
from mossnano_stdio.playback.ring import Samples
from mossnano_stdio.tokens import SAMPLE_BYTES


class Converter:
    """Converts one stream after the other, and keeps the resampler's state between the pieces of a stream."""

    def __init__(self, rate: int, channels: int, device_rate: int, device_channels: int, volume: float) -> None:
        self.device_rate = device_rate
        self.device_channels = device_channels
        self._channels = channels
        self._volume = volume
        self._resampler = None if rate == device_rate else _build_resampler(rate, device_rate, device_channels)

    def convert(self, pcm: bytes, is_last: bool = False) -> Samples:
        sample_bytes = SAMPLE_BYTES * self._channels
        if len(pcm) % sample_bytes:
            raise UsageError(f"{len(pcm)} bytes of PCM are not whole samples: push multiples of {sample_bytes} bytes")
        samples: Samples = np.frombuffer(pcm, "<i2").reshape(-1, self._channels)
        samples = _mix(samples, self.device_channels)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(np.ascontiguousarray(samples), last=is_last)
        return _scale(samples, self._volume)

    def finish(self) -> Samples:
        """Return what the resampler still holds back, and begin a new stream."""
        tail = self.convert(b"", is_last=True)
        self.reset()
        return tail

    def reset(self) -> None:
        if self._resampler is not None:
            self._resampler.clear()


def _mix(samples: Samples, device_channels: int) -> Samples:
    """
    >>> stereo = np.array([[100, -100], [7, 8]], np.int16)
    >>> _mix(stereo, 1).tolist(), _mix(stereo[:, :1], 2).tolist()
    ([[0], [8]], [[100, 100], [7, 7]])
    """
    channels = samples.shape[1]
    if channels == device_channels:
        return samples
    if device_channels == 1:
        mixed: Samples = np.rint(samples.mean(axis=1, keepdims=True)).astype(np.int16)
        return mixed
    mono = samples if channels == 1 else _mix(samples, 1)
    return np.repeat(mono, device_channels, axis=1)


def _scale(samples: Samples, volume: float) -> Samples:
    """
    >>> _scale(np.array([[20000, -3]], np.int16), 2.0).tolist()
    [[32767, -6]]
    """
    if volume == 1.0:
        return samples
    scaled: Samples = np.clip(np.rint(samples * volume), -32768, 32767).astype(np.int16)
    return scaled


def _build_resampler(rate: int, device_rate: int, channels: int) -> Any:
    try:
        import soxr
    except ImportError as error:
        raise DeviceError(
            f"this device cannot play {rate} Hz, and soxr, which would resample it, is not installed: "
            f"pip install 'mossnano-stdio[audio]', or {CHOOSE_ANOTHER}"
        ) from error
    return soxr.ResampleStream(rate, device_rate, channels, dtype="int16")
