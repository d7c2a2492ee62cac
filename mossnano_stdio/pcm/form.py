"""The form in which a stream's sound leaves: its rate, its channels, its numbers, its volume, and how loud it is.

Rules of this room:

- What leaves does not depend on how a stream is cut, neither its bytes nor its levels, to the bit.
- How many samples have left is a function of how many came in: a caller knows it before a chunk is decoded.
- A form that asks for nothing is PCM16 of the codec's own rate and channels, and costs what `to_pcm16` costs.
- soxr is imported only where the rate changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, Final, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, MossnanoError, SettingsError
from mossnano_stdio.pcm.samples import check_finite, from_pcm16, to_pcm16
from mossnano_stdio.tokens import SAMPLE_BYTES, CodecFormat

LEAST_SAMPLE_RATE: Final = 8_000
MOST_SAMPLE_RATE: Final = 192_000
LEAST_GAIN_DB: Final = -60.0
MOST_GAIN_DB: Final = 20.0
LEVELS_MS: Final = (0, 10, 20, 40, 80)  # how long a window of the levels may be; 0: no levels
FULL_LEVEL: Final = 65_535
VALUE_BYTES: Final = {"s16le": SAMPLE_BYTES, "f32le": 4}  # of one channel's value
SAMPLE_FORMATS: Final = tuple(VALUE_BYTES)

# +144 dB. No sound is that loud; but a graph may answer any finite float, and their sums would be infinite.
LOUDEST: Final = np.float32(2.0**24)

# soxr gets pieces of this length, and only the last may be shorter: so how the caller cuts cannot matter. Half of it
# waits on average; and a call costs some microseconds.
PIECES_PER_SECOND: Final = 500

# From 48,000 to 8,000 Hz the better filter of soxr holds back 158 ms and the plainer one 75; at all rates nearer to
# each other both hold back the same. The plainer one's error, 120 dB down, is below PCM16's too.
STEEP_RATIO: Final = 5

Audio = NDArray[np.float32]  # [samples, channels]
SampleFormat = Literal["s16le", "f32le"]


@dataclass(frozen=True)
class SoundForm:
    """How sound leaves. `changed` makes another form out of it, and checks what is asked for."""

    sample_rate: int
    channels: int
    sample_format: SampleFormat = "s16le"
    gain_db: float = 0.0
    levels_ms: int = 0

    @classmethod
    def of_codec(cls, codec: CodecFormat) -> SoundForm:
        """The form that asks for nothing.

        >>> SoundForm.of_codec(CodecFormat(48000, 2, 3840, 16, 1024))
        SoundForm(sample_rate=48000, channels=2, sample_format='s16le', gain_db=0.0, levels_ms=0)
        """
        return cls(codec.sample_rate, codec.channels)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample, all channels."""
        return self.channels * VALUE_BYTES[self.sample_format]

    def as_floats(self, sound: bytes) -> Audio:
        """Sound of this form -> [samples, channels], as it is: neither gain nor levels are undone.

        >>> SoundForm(48000, 2).as_floats(bytes.fromhex("0000 ff7f")).tolist()
        [[0.0, 1.0]]
        """
        if len(sound) % self.sample_bytes:
            raise InputError(f"{len(sound)} bytes are no whole number of samples of {self.sample_bytes} bytes")
        if self.sample_format == "s16le":
            return from_pcm16(sound, self.channels)
        return np.frombuffer(sound, dtype="<f4").astype(np.float32, copy=False).reshape(-1, self.channels)

    def is_plain_of(self, codec: CodecFormat) -> bool:
        """Does it ask for nothing?"""
        return self == SoundForm.of_codec(codec)

    def most_samples(self, codec_samples: int, codec: CodecFormat) -> int:
        """How many samples may leave at once where `codec_samples` come, wherever in the stream; or at its end.

        >>> codec = CodecFormat(48000, 2, 3840, 16, 1024)
        >>> SoundForm.of_codec(codec).most_samples(3840, codec), SoundForm(16000, 1).most_samples(1, codec) > 1
        (3840, True)
        """
        if self.sample_rate == codec.sample_rate:
            return codec_samples
        longest = -(-codec_samples * self.sample_rate // codec.sample_rate)
        return max(longest, _delay_samples(codec.sample_rate, self.sample_rate))

    def changed(self, name: str, value: Any, codec: CodecFormat) -> SoundForm:
        """This form with another value of the setting `name`, one of FORM_SETTINGS; a SettingsError where that cannot
        be.

        >>> codec = CodecFormat(48000, 2, 3840, 16, 1024)
        >>> SoundForm.of_codec(codec).changed("channels", 3, codec)
        Traceback (most recent call last):
        mossnano_stdio.errors.SettingsError: channels is 3; 1 or 2 is allowed
        """
        match name:
            case "sample_rate":
                is_allowed = _is_whole(value) and (
                    LEAST_SAMPLE_RATE <= value <= MOST_SAMPLE_RATE or value == codec.sample_rate
                )
                allowed = f"a whole number from {LEAST_SAMPLE_RATE} to {MOST_SAMPLE_RATE} is allowed"
            case "channels":
                counts = sorted({1, max(2, codec.channels)})
                is_allowed = _is_whole(value) and value in counts
                allowed = f"{_one_of(counts)} is allowed"
            case "sample_format":
                is_allowed = value in SAMPLE_FORMATS
                allowed = f"{_one_of(SAMPLE_FORMATS)} is allowed"
            case "gain_db":
                is_number = _is_whole(value) or isinstance(value, float)
                is_allowed = is_number and LEAST_GAIN_DB <= value <= MOST_GAIN_DB
                allowed = f"a number from {LEAST_GAIN_DB:g} to {MOST_GAIN_DB:g} is allowed"
            case "levels_ms":
                is_allowed = _is_whole(value) and value in LEVELS_MS
                allowed = f"{_one_of(LEVELS_MS)} is allowed (0: no levels)"
            case _:
                raise SettingsError(f"the form of the sound has no {name!r}: it has {', '.join(FORM_SETTINGS)}")
        if not is_allowed:
            raise SettingsError(f"{name} is {value!r}; {allowed}")
        if name == "sample_rate" and value != codec.sample_rate:
            import_soxr(codec.sample_rate, value, SettingsError)
        return replace(self, **{name: value})


def form_said_by(handshake: Mapping[str, Any]) -> SoundForm:
    """The form that a HANDSHAKE speaks of. One of an older decoder says no sample format.

    >>> form_said_by({"sample_rate": 24000, "channels": 1})
    SoundForm(sample_rate=24000, channels=1, sample_format='s16le', gain_db=0.0, levels_ms=0)
    """
    sample_rate, channels = handshake.get("sample_rate"), handshake.get("channels")
    if not (_is_whole(sample_rate) and _is_whole(channels) and min(sample_rate, channels) >= 1):
        raise InputError(
            f"the HANDSHAKE says sample_rate {sample_rate!r} and channels {channels!r}, "
            "allowed are whole numbers above 0"
        )
    sample_format = handshake.get("sample_format", "s16le")
    if sample_format not in SAMPLE_FORMATS:
        raise InputError(f"the HANDSHAKE says sample_format {sample_format!r}, allowed is {_one_of(SAMPLE_FORMATS)}")
    return SoundForm(sample_rate, channels, sample_format)


FORM_SETTINGS: Final = ("sample_rate", "channels", "sample_format", "gain_db", "levels_ms")


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int  # a bool is an int to isinstance


def _one_of(choices: Any) -> str:
    """
    >>> _one_of(["s16le", "f32le"]), _one_of([0, 10, 20])
    ("'s16le' or 'f32le'", '0, 10 or 20')
    """
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}"


@dataclass(frozen=True)
class ShapedSound:
    """What leaves at once: samples in the form that was asked for, and the levels of the windows that are full."""

    sound: bytes
    samples: int
    clipped_samples: int  # those with a channel beyond full scale, which s16le cannot hold
    levels: bytes  # one u16, little-endian, for each window


class Shaper:
    """Shapes the sound of one stream: what the codec makes is pushed in any pieces, and `finish` gives the rest.

    >>> codec = CodecFormat(48000, 2, 3840, 16, 1024)
    >>> shaper = Shaper(codec, SoundForm(sample_rate=48000, channels=1, gain_db=20.0))
    >>> shaped = shaper.push(np.array([[0.02, 0.04], [1.0, 0.0]], dtype=np.float32))
    >>> shaped.sound.hex(" ", 2), shaped.samples, shaped.clipped_samples
    ('6626 ff7f', 2, 1)
    """

    def __init__(self, codec: CodecFormat, form: SoundForm) -> None:
        self.form = form
        self.codec_samples = 0  # that came
        self.samples = 0  # that left
        self._codec = codec
        self._is_plain = form.is_plain_of(codec)
        self._gain = np.float32(10 ** (form.gain_db / 20))
        self._maybe_meter = LevelMeter(form.sample_rate, form.levels_ms) if form.levels_ms else None
        # Fewer channels are less work: channels are mixed before the rate changes, and doubled after it.
        self._mixed_channels = min(form.channels, codec.channels)
        self._maybe_resampler: _Resampler | None = None
        if form.sample_rate != codec.sample_rate:
            self._maybe_resampler = _Resampler(codec.sample_rate, form.sample_rate, self._mixed_channels)

    @property
    def delay_samples(self) -> int:
        """How many samples, of the form's rate, the resampler keeps until more sound comes, or `finish`."""
        return self._maybe_resampler.delay_samples if self._maybe_resampler is not None else 0

    def output_position(self, codec_samples: int) -> int:
        """Which sample, of all that leave, the codec's sample of that number is; also how many a whole stream gives.

        >>> shaper = Shaper(CodecFormat(48000, 2, 3840, 16, 1024), SoundForm(16000, 1))
        >>> [shaper.output_position(codec_samples) for codec_samples in (0, 1, 2, 3840)]
        [0, 0, 1, 1280]
        """
        return _rounded(codec_samples, self._codec.sample_rate, self.form.sample_rate)

    def samples_after(self, codec_samples: int) -> int:
        """How many samples have left when so many came in all and more are expected."""
        return max(0, self.output_position(codec_samples) - self.delay_samples)

    def push(self, audio: Audio) -> ShapedSound:
        """[samples, channels] of the codec -> what can leave. Where it is not finite nothing has changed: push
        silence instead."""
        if self._is_plain:
            sound = to_pcm16(audio)  # which looks for what is not finite
            self.codec_samples += len(audio)
            self.samples += len(audio)
            return ShapedSound(sound, len(audio), _count_clipped(audio), b"")
        check_finite(audio, 0)
        audio = np.clip(audio, -LOUDEST, LOUDEST)
        if self._mixed_channels < audio.shape[1]:
            audio = _mean_of_channels(audio)[:, np.newaxis]
        self.codec_samples += len(audio)
        if self._maybe_resampler is not None:
            self._maybe_resampler.push(audio)
            audio = self._maybe_resampler.take(self.samples_after(self.codec_samples) - self.samples)
        return self._leave(audio)

    def finish(self) -> ShapedSound:
        """The stream is at its end: what is left, and the level of the window that did not fill up."""
        audio = np.empty((0, self._mixed_channels), np.float32)
        if self._maybe_resampler is not None:
            self._maybe_resampler.finish()
            audio = self._maybe_resampler.take(self.output_position(self.codec_samples) - self.samples)
        shaped = self._leave(audio)
        maybe_last_level = self._maybe_meter.finish() if self._maybe_meter is not None else b""
        return replace(shaped, levels=shaped.levels + maybe_last_level)

    def _leave(self, audio: Audio) -> ShapedSound:
        """Mixed sound at the form's rate -> its bytes."""
        audio = audio * self._gain
        levels = self._maybe_meter.push(audio) if self._maybe_meter is not None else b""
        clipped_samples = 0 if self.form.sample_format == "f32le" else _count_clipped(audio)
        if audio.shape[1] < self.form.channels:
            audio = np.repeat(audio, self.form.channels, axis=1)
        sound = audio.astype("<f4").tobytes() if self.form.sample_format == "f32le" else to_pcm16(audio)
        self.samples += len(audio)
        return ShapedSound(sound, len(audio), clipped_samples, levels)


def _count_clipped(audio: Audio) -> int:
    is_beyond = np.zeros(len(audio), dtype=np.bool_)
    for channel in audio.T:
        is_beyond |= np.abs(channel) > 1
    return int(np.count_nonzero(is_beyond))


def _mean_of_channels(values: NDArray[Any]) -> NDArray[Any]:
    """[samples, channels] -> [samples]. numpy's own mean over so short an axis is ten times slower."""
    total = values[:, 0].copy()
    for channel in values.T[1:]:
        total += channel
    total /= values.shape[1]
    return total


def _rounded(samples: int, sample_rate: int, wanted_rate: int) -> int:
    """samples * wanted_rate / sample_rate, half up."""
    return (2 * samples * wanted_rate + sample_rate) // (2 * sample_rate)


class LevelMeter:
    """Measures how loud sound is, window by window: RMS over all channels, FULL_LEVEL is full scale.

    >>> meter = LevelMeter(sample_rate=200, levels_ms=10)
    >>> meter.push(np.array([[1.0], [1.0], [0.5]], dtype=np.float32)).hex(" ", 2), meter.finish().hex(" ", 2)
    ('ffff', '0080')
    """

    def __init__(self, sample_rate: int, levels_ms: int) -> None:
        self._sample_rate = sample_rate
        self._levels_ms = levels_ms
        self._windows = 0  # that are full
        self._powers: NDArray[np.float64] = np.empty(0)  # of each sample since

    def push(self, audio: Audio) -> bytes:
        """The levels of the windows that are full now."""
        # A window is summed when all of it is there: sums of sums would depend on how the sound was cut.
        self._powers = np.concatenate([self._powers, _mean_of_channels(np.square(audio, dtype=np.float64))])
        starts_at = self._window_start(self._windows)
        edges = [0]
        while (edge := self._window_start(self._windows + len(edges)) - starts_at) <= len(self._powers):
            edges.append(edge)
        self._windows += len(edges) - 1
        powers, self._powers = self._powers[: edges[-1]], self._powers[edges[-1] :].copy()
        return _levels(np.add.reduceat(powers, edges[:-1]) / np.diff(edges)) if len(edges) > 1 else b""

    def finish(self) -> bytes:
        """The level of what is left, if anything is."""
        return _levels(self._powers.mean(keepdims=True)) if self._powers.size else b""

    def _window_start(self, window: int) -> int:
        # At 22,050 Hz windows of 10 ms are 220 and 221 samples long, in turn: none drifts away from its time.
        return window * self._sample_rate * self._levels_ms // 1000


def _levels(powers: NDArray[np.float64]) -> bytes:
    levels: NDArray[np.uint16] = np.minimum(np.rint(np.sqrt(powers) * FULL_LEVEL), FULL_LEVEL).astype("<u2")
    return levels.tobytes()


# --- another rate ------------------------------------------------------------------------------------------------


def import_soxr(sample_rate: int, wanted_rate: int, error_class: type[MossnanoError]) -> ModuleType:
    """soxr, or an error that says how to get it."""
    try:
        import soxr
    except (ImportError, OSError):  # OSError: the package is there, the library that it wraps is not
        raise error_class(
            f"audio at {sample_rate} Hz has to be resampled to {wanted_rate} Hz, and soxr is not installed: "
            "pip install 'mossnano-stdio[audio]'"
        ) from None
    module: ModuleType = soxr
    return module


class _Resampler:
    """Sound of one rate is pushed in any pieces, and sound of another is taken, by the number of samples."""

    def __init__(self, sample_rate: int, wanted_rate: int, channels: int) -> None:
        self.delay_samples = _delay_samples(sample_rate, wanted_rate)
        self._piece_samples = _piece_samples(sample_rate)
        self._stream = _stream(sample_rate, wanted_rate, channels)
        self._waiting: Audio = np.empty((0, channels), np.float32)  # less than a piece
        self._ready: Audio = np.empty((0, channels), np.float32)

    def push(self, audio: Audio) -> None:
        waiting = np.ascontiguousarray(
            np.concatenate([self._waiting, audio])
        )  # planar pieces would be copied one by one
        whole = len(waiting) - len(waiting) % self._piece_samples
        self._waiting = waiting[whole:].copy()
        pieces = [waiting[start : start + self._piece_samples] for start in range(0, whole, self._piece_samples)]
        self._ready = np.concatenate([self._ready, *(self._stream.resample_chunk(piece) for piece in pieces)])

    def finish(self) -> None:
        # After a stream there is silence. With some of it soxr gives at least as many samples as are due; its own count
        # may be one less, as it does not compute it exactly.
        silence = np.zeros((self._piece_samples, self._waiting.shape[1]), np.float32)
        rest = self._stream.resample_chunk(np.concatenate([self._waiting, silence]), last=True)
        self._ready = np.concatenate([self._ready, rest])

    def take(self, samples: int) -> Audio:
        taken, self._ready = self._ready[:samples], self._ready[samples:].copy()
        return taken


def _piece_samples(sample_rate: int) -> int:
    return max(1, sample_rate // PIECES_PER_SECOND)


def _stream(sample_rate: int, wanted_rate: int, channels: int) -> Any:
    soxr = import_soxr(sample_rate, wanted_rate, SettingsError)
    quality = "MQ" if sample_rate > STEEP_RATIO * wanted_rate else "HQ"
    return soxr.ResampleStream(sample_rate, wanted_rate, channels, dtype="float32", quality=quality)


@lru_cache(maxsize=256)
def _delay_samples(sample_rate: int, wanted_rate: int) -> int:
    """How far soxr may be behind, in samples of the wanted rate.

    What soxr gives comes in bursts, whose size it does not tell. So a second of silence shows it.
    """
    stream = _stream(sample_rate, wanted_rate, channels=1)
    silence = np.zeros(_piece_samples(sample_rate), np.float32)
    given = most_behind = 0
    for fed in range(len(silence), sample_rate + 1, len(silence)):
        given += len(stream.resample_chunk(silence))
        most_behind = max(most_behind, _rounded(fed, sample_rate, wanted_rate) - given)
    # What came since the last whole piece is not in soxr yet; and later on its bursts may fall up to two pieces worse
    # than in the first second, one for each of the two filters that change a rate.
    return most_behind + 3 * math.ceil(len(silence) * wanted_rate / sample_rate)
