"""Reads audio files, WAVs or with the extra `audio` whatever libsndfile reads, and resamples them.

Rules of this room:

- A file is read block by block. Samples of 16 bits stay integers until floats are asked for.
- NaN and infinity raise an error that names the place of the first.
- What is there is read, whatever the header says; but `read_part` refuses a file that ends before its header says.
"""

from __future__ import annotations

import contextlib
import io
import re
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from types import ModuleType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, NonFiniteError, UsageError
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.pcm.form import import_soxr
from mossnano_stdio.pcm.samples import BLOCK_SAMPLES, FULL_SCALE, as_float, check_finite, pcm16_samples
from mossnano_stdio.pcm.wav import WavWriter
from mossnano_stdio.tokens import SAMPLE_BYTES, CodecFormat
from mossnano_stdio.tokens.arrays import HIGHEST_RATE, LOWEST_RATE, MONO

WIDEST_PCM_BYTES: Final = 4
AUDIO_STARTS: Final = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b"caff")
AUDIO_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".caf")

WRITTEN_FORMS: Final = ("flac", "wav", "ogg")
MISJUDGED_SECONDS: Final = 0.5
MP3_FRAME_SAMPLES: Final = 1152
LEAST_UNKNOWN_BYTES: Final = 0x7FFF0000  # what is written to a pipe says about this, or twice as much, of its length
# RIFF's own size is not among them: many programs get it wrong, and nothing depends on it.
_LENGTHS_IN_LOG: Final = re.compile(r"(?:data|SSND|riff|Riff size) *: *(\d+) \(should be (\d+)\)")


@dataclass(frozen=True, eq=False)
class Recording:
    """The samples of a file, [samples, channels]: 16-bit integers where it holds those, else floats."""

    sample_rate: int
    samples: NDArray[np.int16] | NDArray[np.float32]

    @property
    def audio(self) -> NDArray[np.float32]:
        """The samples as floats; full scale is 1."""
        if self.samples.dtype == np.int16:
            return as_float(self.samples.astype(np.int16, copy=False))
        return self.samples.astype(np.float32, copy=False)

    def steps_between(self, start: int, stop: int) -> NDArray[np.float64]:
        """Samples `start` to `stop` in 16-bit steps, full scale is 32767; exact for what is 16 bits in the file."""
        part = self.samples[start:stop]
        if part.dtype == np.int16:
            return part.astype(np.float64)
        return part * np.float64(FULL_SCALE)


@dataclass(frozen=True, eq=False)
class Sound:
    """An audio file whose header was read. Its samples, [samples, channels], are read as its blocks are used."""

    sample_rate: int
    channels: int
    samples: int  # as its header says
    dtype: type[np.int16] | type[np.float32]
    stored: Iterator[NDArray[Any]]  # block by block; all values are finite

    @property
    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The blocks as floats."""
        return (Recording(self.sample_rate, block).audio for block in self.stored)


def read_audio(file: BinaryIO, name: str) -> Recording:
    """Read a WAV, or any format that the extra `audio` reads (FLAC, OGG, MP3, ...). `name` is for the errors."""
    sound = read_sound(file, name)
    return Recording(sound.sample_rate, np.concatenate([np.empty((0, sound.channels), sound.dtype), *sound.stored]))


def read_audio_or_pcm(file: BinaryIO, name: str, sample_rate: int, channels: int) -> Recording:
    """Like `read_audio`; what neither begins nor is named like an audio file is raw PCM16 of that rate and channels."""
    content: BinaryIO = file if file.seekable() else io.BytesIO(file.read())
    is_audio_file = content.read(4).startswith(AUDIO_STARTS) or PurePath(name).suffix.lower() in AUDIO_SUFFIXES
    content.seek(0)
    if is_audio_file:
        return read_audio(content, name)
    try:
        return Recording(sample_rate, pcm16_samples(content.read(), channels))
    except InputError as error:
        raise InputError(f"{name}, taken as raw PCM: {error}") from None


def read_sound(file: BinaryIO, name: str) -> Sound:
    """Like `read_audio`, but block by block. `name` is for the errors."""
    if not file.seekable():
        file = io.BytesIO(file.read())
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, the library that it wraps is not
        return _read_by_wave(file, name)
    return _read_by(soundfile, file, name)


def read_part(file: BinaryIO, name: str, start_seconds: float = 0.0, maybe_end_seconds: float | None = None) -> Sound:
    """The sound between two places of a file that can seek; an InputError where the file is cut, or has no such part.

    A part may end MISJUDGED_SECONDS behind the file's end: what others wrote down of its length is often rounded.
    """
    import soundfile

    sound = _opened(soundfile, file, name)
    _refuse_cut_file(sound, name)
    rate = sound.samplerate
    start = round(start_seconds * rate)
    end = sound.frames if maybe_end_seconds is None else round(maybe_end_seconds * rate)
    if not sound.frames:
        raise InputError(f"{name} has no samples")
    if start >= sound.frames or end > sound.frames + MISJUDGED_SECONDS * rate:
        raise InputError(
            f"{name} is {sound.frames / rate:.3f} s long, and has no part from {start_seconds:g} s to "
            + ("its end" if maybe_end_seconds is None else f"{maybe_end_seconds:g} s")
        )
    samples = min(end, sound.frames) - start
    if samples <= 0:
        raise InputError(f"{name} has no samples from {start_seconds:g} s to {maybe_end_seconds:g} s")
    dtype = np.int16 if sound.subtype == "PCM_16" else np.float32
    stored = _blocks_of_part(soundfile, sound, name, start, samples, dtype)
    return Sound(rate, sound.channels, samples, dtype, stored)


def _blocks_of_part(
    soundfile: ModuleType, sound: Any, name: str, start: int, samples: int, dtype: type[Any]
) -> Iterator[NDArray[Any]]:
    place = 0
    with sound:
        try:
            if sound.format == "MP3":  # where libsndfile only comes near the place that it is told
                while place < start and (passed := len(sound.read(min(BLOCK_SAMPLES, start - place)))):
                    place += passed
            elif start:
                place = sound.seek(start)
            while place < start + samples:
                block = sound.read(min(BLOCK_SAMPLES, start + samples - place), dtype=dtype.__name__, always_2d=True)
                check_finite(block, place)
                if not len(block):
                    break
                yield block
                place += len(block)
        except soundfile.SoundFileError as error:
            raise InputError(f"{name} cannot be read on from sample {place}: {error}") from None
        except NonFiniteError as error:
            raise InputError(f"{name}: {error}") from None
    missing = start + samples - place
    if missing > (MP3_FRAME_SAMPLES if sound.format == "MP3" else 0):  # its header's count may be that much too high
        raise InputError(f"{name} is cut: it ends at sample {place}, its header says {sound.frames}")


def _refuse_cut_file(sound: Any, name: str) -> None:
    """libsndfile mends a header that says more than there is; what it said before stands in its log."""
    for said, found in _LENGTHS_IN_LOG.findall(sound.extra_info):
        if int(found) < int(said) < LEAST_UNKNOWN_BYTES:
            raise InputError(f"{name} is cut: {found} bytes of its sound are there, its header says {said}")


def write_sound(file: BinaryIO, form: str, sample_rate: int, channels: int, blocks: Iterable[bytes]) -> None:
    """Write blocks of PCM16 as one of WRITTEN_FORMS to a file that can seek."""
    if form == "wav":
        writer = WavWriter(file, sample_rate, channels)
        for pcm in blocks:
            writer.write(pcm)
        writer.finish()
        return
    import soundfile

    subtype = "VORBIS" if form == "ogg" else "PCM_16"
    target = _Told(file)
    try:
        with soundfile.SoundFile(target, "w", sample_rate, channels, subtype, format=form.upper()) as sound:
            for pcm in blocks:
                sound.write(pcm16_samples(pcm, channels))
                target.check()
    except soundfile.SoundFileError as error:
        target.check()
        raise InputError(f"{sample_rate} Hz of {channels} channels cannot be written as {form}: {error}") from None
    target.check()


class _Told:
    """A file for libsndfile that keeps what went wrong in a write. There an exception would only be printed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._maybe_error: Exception | None = None
        self.seek = file.seek
        self.tell = file.tell

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except Exception as error:  # noqa: BLE001 - raised again by `check`
            self._maybe_error = self._maybe_error or error
            return 0

    def check(self) -> None:
        if self._maybe_error is not None:
            raise self._maybe_error


def resampled(
    blocks: Iterable[NDArray[np.float32]], channels: int, sample_rate: int, wanted_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Resample. n samples become n * wanted_rate / sample_rate, rounded half up, however the blocks are cut."""
    if sample_rate == wanted_rate:
        yield from blocks
        return
    soxr = import_soxr(sample_rate, wanted_rate, UsageError)
    stream = soxr.ResampleStream(sample_rate, wanted_rate, channels, dtype="float32")
    # A block is resampled piece by piece: from a low rate to a high one, a whole one would grow large.
    piece_samples = max(1, BLOCK_SAMPLES * sample_rate // wanted_rate)
    for block in blocks:
        for start in range(0, len(block), piece_samples):
            yield stream.resample_chunk(np.ascontiguousarray(block[start : start + piece_samples]), last=False)
    yield stream.resample_chunk(np.zeros((0, channels), dtype=np.float32), last=True)


def blocks_for(codec: CodecFormat, sound: Sound, name: str) -> Iterator[NDArray[np.float32]]:
    """Its blocks at the codec's rate, on the codec's channels: a single one goes to all. `name` is for the errors.

    A sound of other channels, or of a rate that is too low or too high, raises an InputError before any block is read.
    """
    if sound.channels not in (MONO, codec.channels):
        raise InputError(f"{name} has {sound.channels} channels, allowed are 1 and {codec.channels}; mix it down first")
    if not LOWEST_RATE <= sound.sample_rate <= HIGHEST_RATE:
        raise InputError(f"{name} has {sound.sample_rate} Hz, allowed are {LOWEST_RATE} to {HIGHEST_RATE}")
    at_rate = resampled(sound.blocks, sound.channels, sound.sample_rate, codec.sample_rate)
    return (np.broadcast_to(block, (len(block), codec.channels)) for block in at_rate)


class _Patient:
    """A file for libsndfile whose seek never raises: seeking to an impossible place leaves it where it is."""

    # A damaged header makes libsndfile seek to places that no file has. An exception there would be printed from inside
    # the library, which then goes on all the same.

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def __repr__(self) -> str:
        return "it"  # libsndfile's errors hold this; ours name the file before it

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with contextlib.suppress(ValueError, OSError):
            self._file.seek(offset, whence)
        return self._file.tell()


def _read_by(soundfile: ModuleType, file: BinaryIO, name: str) -> Sound:
    sound = _opened(soundfile, file, name)
    dtype = np.int16 if sound.subtype == "PCM_16" else np.float32

    def blocks() -> Iterator[NDArray[Any]]:
        start = 0
        with sound:
            while True:
                try:
                    block: NDArray[Any] = sound.read(BLOCK_SAMPLES, dtype=dtype.__name__, always_2d=True)
                    check_finite(block, start)
                except soundfile.SoundFileError as error:
                    raise InputError(f"{name} cannot be read on from sample {start}: {error}") from None
                except NonFiniteError as error:
                    raise InputError(f"{name}: {error}") from None
                if not len(block):
                    return
                yield block
                start += len(block)

    return Sound(sound.samplerate, sound.channels, sound.frames, dtype, blocks())


def _opened(soundfile: ModuleType, file: BinaryIO, name: str) -> Any:
    try:
        return soundfile.SoundFile(_Patient(file))
    except soundfile.SoundFileError as error:
        raise InputError(f"{name} is no audio file that can be read: {error}") from None


def _read_by_wave(file: BinaryIO, name: str) -> Sound:
    with _wave_errors(name):
        sound = wave.open(file, "rb")  # noqa: SIM115 - closed where the last block was read
    sample_rate, channels, width_bytes = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
    if width_bytes > WIDEST_PCM_BYTES or sample_rate < 1:
        raise InputError(f"{name} has {8 * width_bytes} bits at {sample_rate} Hz, allowed are 8 to 32 at 1 Hz or more")

    def blocks() -> Iterator[NDArray[Any]]:
        with _wave_errors(name), sound:
            while data := sound.readframes(BLOCK_SAMPLES):
                data = data[: len(data) - len(data) % (width_bytes * channels)]  # a cut file may end inside a sample
                yield _samples_of_width(data, width_bytes).reshape(-1, channels)

    dtype = np.int16 if width_bytes == SAMPLE_BYTES else np.float32
    return Sound(sample_rate, channels, sound.getnframes(), dtype, blocks())


@contextlib.contextmanager
def _wave_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: a chunk that claims to end before it begins
        raise InputError(
            f"{name} is no WAV of whole numbers ({str(error) or 'it ends too early'}); "
            f"for FLAC, OGG, MP3 and other WAVs: {how_to_get('audio')}"
        ) from None


def _samples_of_width(data: bytes, width_bytes: int) -> NDArray[np.int16] | NDArray[np.float32]:
    """16 bits stay as they are; other widths become floats, scaled as soundfile does."""
    if width_bytes == SAMPLE_BYTES:
        return np.frombuffer(data, dtype="<i2").astype(np.int16, copy=False)
    if width_bytes == 1:
        return ((np.frombuffer(data, dtype=np.uint8).astype(np.float32)) - 128) / np.float32(128)
    wide = np.zeros((len(data) // width_bytes, 4), dtype=np.uint8)
    wide[:, 4 - width_bytes :] = np.frombuffer(data, dtype=np.uint8).reshape(-1, width_bytes)
    return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
