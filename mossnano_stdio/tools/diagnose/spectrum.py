"""What takes a Fourier transform of a whole recording: cutting off its upper band, another rate, how late it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Sound = NDArray[np.float64]  # [samples, channels], full scale is 1

BAND_HZ = 100.0


def band_limited(sound: Sound, sample_rate: float, highest_hz: float) -> Sound:
    """Nothing above `highest_hz` is left."""
    spectrum = np.fft.rfft(sound, axis=0)
    spectrum[np.fft.rfftfreq(len(sound), 1 / sample_rate) > highest_hz] = 0
    limited: Sound = np.fft.irfft(spectrum, len(sound), axis=0)
    return limited


def with_length(sound: Sound, samples: int) -> Sound:
    """Resample to so many samples."""
    spectrum = np.fft.rfft(sound, axis=0)
    kept = np.zeros((samples // 2 + 1, sound.shape[1]), spectrum.dtype)
    bins = min(len(kept), len(spectrum))
    kept[:bins] = spectrum[:bins]
    resampled: Sound = np.fft.irfft(kept, samples, axis=0) * (samples / len(sound))
    return resampled


def best_filter(ours: Sound, other: Sound, sample_rate: int) -> tuple[NDArray[np.float64], Sound]:
    """The gain of each band of BAND_HZ by which ours becomes most like the other, and what it becomes by them."""
    spectrum, wanted = np.fft.rfft(ours, axis=0), np.fft.rfft(other, axis=0)
    bands = (np.fft.rfftfreq(len(ours), 1 / sample_rate) / BAND_HZ).astype(int)
    powers = np.bincount(bands, np.square(np.abs(spectrum)).sum(axis=1))
    products = np.bincount(bands, (spectrum.conj() * wanted).real.sum(axis=1))
    gains = products / np.maximum(powers, 1e-30)
    filtered: Sound = np.fft.irfft(spectrum * gains[bands][:, np.newaxis], len(ours), axis=0)
    return gains, filtered


def lag_of(sound: Sound, reference: Sound) -> int:
    """By how many samples `sound` is late, where both are most alike, their channels added up."""
    one, other = sound.sum(axis=1), reference.sum(axis=1)
    size = 1 << (len(one) + len(other)).bit_length()
    likeness = np.abs(np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size).conj(), size))
    best = int(likeness.argmax())
    return best - size if best > size // 2 else best
