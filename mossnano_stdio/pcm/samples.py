"""Float samples <-> PCM16, and the files that hold them.

Rules of this room:

- Audio is float32 [samples, channels] in memory, whatever its strides. PCM is bytes: 16 bits, little-endian,
  channels interleaved.
- A float becomes the integer nearest to x * 32767 after clipping to [-1, 1], ties to even, computed exactly. An
  integer becomes v / 32767, and comes back as itself. (-32768 never leaves here; read, it counts as -32767.)
- NaN and infinity are named by their place, never converted.
- A WAV whose length is not known when it begins says so with the largest size there is, which readers take as "to
  the end of the file"; where the file can seek, the true size is filled in at the end.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, NonFiniteError, UsageError
from mossnano_stdio.tokens.format import SAMPLE_BYTES

FULL_SCALE: Final = 32767
BLOCK_SAMPLES: Final = 1 << 15  # converted at a time, so that an hour needs no float64 copy of itself
UNKNOWN_BYTES: Final = 0xFFFFFFFF
WIDEST_PCM_BYTES: Final = 4

_WAV_HEADER: Final = struct.Struct("<4sI4s4sIHHIIHH4sI")
_WAV_RIFF_SIZE_AT: Final = 4
_WAV_DATA_SIZE_AT: Final = 40
_WAV_PCM: Final = 1


# --- samples -----------------------------------------------------------------------------------------------------


def to_pcm16(audio: NDArray[np.float32]) -> bytes:
    """[samples, channels] -> interleaved PCM16LE. Planar audio comes as `planar.T`.

    >>> to_pcm16(np.array([[0.0, 1.0], [-1.0, 2.0]], dtype=np.float32)).hex(" ", 2)
    '0000 ff7f 0180 ff7f'
    """
    if audio.ndim != 2:
        raise UsageError(f"audio has {audio.ndim} axes, allowed are 2: [samples, channels]")
    samples, channels = audio.shape
    pcm = np.empty((samples, channels), dtype="<i2")
    for start in range(0, samples, BLOCK_SAMPLES):
        block = audio[start : start + BLOCK_SAMPLES]
        if not np.isfinite(block).all():
            raise _not_finite(block, start)
        steps = np.multiply(block, float(FULL_SCALE), dtype=np.float64)  # in float32 the product would round
        np.rint(steps, out=steps)
        np.clip(steps, -FULL_SCALE, FULL_SCALE, out=steps)
        for channel in range(channels):  # one by one is fast for planar audio as well as interleaved
            pcm[start : start + len(block), channel] = steps[:, channel]
    return pcm.tobytes()


def from_pcm16(pcm: bytes | bytearray | memoryview, channels: int) -> NDArray[np.float32]:
    """Interleaved PCM16LE -> [samples, channels].

    >>> from_pcm16(bytes.fromhex("0000 ff7f 0180 ff7f"), channels=2).tolist()
    [[0.0, 1.0], [-1.0, 1.0]]
    """
    return _as_float(pcm16_samples(pcm, channels))


def pcm16_samples(pcm: bytes | bytearray | memoryview, channels: int) -> NDArray[np.int16]:
    """Interleaved PCM16LE as integers, [samples, channels].

    >>> pcm16_samples(bytes.fromhex("0000 ff7f 0180 ff7f"), channels=2).tolist()
    [[0, 32767], [-32767, 32767]]
    """
    sample_bytes = SAMPLE_BYTES * channels
    if len(pcm) % sample_bytes:
        raise InputError(
            f"{len(pcm)} bytes of PCM are no whole number of samples: "
            f"{channels} channels of 16 bits make {sample_bytes} bytes each"
        )
    return np.frombuffer(pcm, dtype="<i2").astype(np.int16, copy=False).reshape(-1, channels)


def _as_float(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    return np.maximum(samples / np.float32(FULL_SCALE), np.float32(-1))


def _not_finite(block: NDArray[np.float32], start: int) -> NonFiniteError:
    bad = ~np.isfinite(block)
    sample, channel = map(int, np.unravel_index(bad.argmax(), bad.shape))
    return NonFiniteError(
        f"sample {start + sample} of channel {channel} is {block[sample, channel]}, "
        f"one of {int(bad.sum())} that are not finite: PCM holds finite numbers only"
    )


# --- writing -----------------------------------------------------------------------------------------------------


def wav_header(sample_rate: int, channels: int, maybe_pcm_bytes: int | None = None) -> bytes:
    """The 44 bytes before the PCM. None, or more than a WAV can count: to the end of the file.

    >>> wav_header(48000, 2, 8).hex()[:16]
    '524946462c000000'
    """
    sample_bytes = SAMPLE_BYTES * channels
    if not (1 <= channels <= 0xFFFF // SAMPLE_BYTES and 1 <= sample_rate <= 0xFFFFFFFF // sample_bytes):
        raise InputError(f"{channels} channels at {sample_rate} Hz are more, or less, than a WAV can hold")
    riff_size, data_size = _wav_sizes(maybe_pcm_bytes)
    return _WAV_HEADER.pack(
        b"RIFF", riff_size, b"WAVE",
        b"fmt ", 16, _WAV_PCM, channels, sample_rate, sample_rate * sample_bytes, sample_bytes, 8 * SAMPLE_BYTES,
        b"data", data_size,
    )  # fmt: skip


def _wav_sizes(maybe_pcm_bytes: int | None) -> tuple[int, int]:
    """What stands in the RIFF chunk's and in the data chunk's size."""
    before_pcm_bytes = _WAV_HEADER.size - _WAV_RIFF_SIZE_AT - 4
    if maybe_pcm_bytes is None or maybe_pcm_bytes + before_pcm_bytes > UNKNOWN_BYTES:
        return UNKNOWN_BYTES, UNKNOWN_BYTES
    return maybe_pcm_bytes + before_pcm_bytes, maybe_pcm_bytes


class WavWriter:
    """A WAV, written as its PCM comes, to a file or to a pipe.

    >>> file = io.BytesIO()
    >>> writer = WavWriter(file, sample_rate=48000, channels=2)
    >>> writer.write(bytes(8))
    >>> writer.finish()
    >>> file.getvalue() == wav_header(48000, 2, 8) + bytes(8)
    True
    """

    def __init__(self, file: BinaryIO, sample_rate: int, channels: int, maybe_samples: int | None = None) -> None:
        """`maybe_samples`: how many will come, where that is known: then even a pipe gets the true size."""
        self._file = file
        self._announced_bytes = None if maybe_samples is None else maybe_samples * SAMPLE_BYTES * channels
        self._pcm_bytes = 0
        self._seekable = file.seekable()
        self._starts_at = file.tell() if self._seekable else 0
        file.write(wav_header(sample_rate, channels, self._announced_bytes))

    def write(self, pcm: bytes | memoryview) -> None:
        self._file.write(pcm)
        self._pcm_bytes += len(pcm)

    def finish(self) -> None:
        """All PCM is written: the header says how much it was, where that can still be said."""
        if not self._seekable or self._pcm_bytes == self._announced_bytes:
            return
        riff_size, data_size = _wav_sizes(self._pcm_bytes)
        ends_at = self._file.tell()
        for place, size in ((_WAV_RIFF_SIZE_AT, riff_size), (_WAV_DATA_SIZE_AT, data_size)):
            self._file.seek(self._starts_at + place)
            self._file.write(struct.pack("<I", size))
        self._file.seek(ends_at)


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recording:
    """What a file holds: 16-bit integers where it holds those, else floats. [samples, channels]"""

    sample_rate: int
    samples: NDArray[np.int16] | NDArray[np.float32]

    @property
    def audio(self) -> NDArray[np.float32]:
        """As floats, full scale is 1."""
        if self.samples.dtype == np.int16:
            return _as_float(self.samples.astype(np.int16, copy=False))
        return self.samples.astype(np.float32, copy=False)

    def steps_between(self, start: int, stop: int) -> NDArray[np.float64]:
        """Samples `start` to `stop` in 16-bit steps, full scale is 32767; exact for what is 16 bits in the file."""
        part = self.samples[start:stop]
        if part.dtype == np.int16:
            return part.astype(np.float64)
        return part * np.float64(FULL_SCALE)


@dataclass(frozen=True, eq=False)
class Sound:
    """An audio file that is read while its samples are used: [samples, channels], as floats."""

    sample_rate: int
    channels: int
    samples: int  # as its header says
    blocks: Iterator[NDArray[np.float32]]


def read_audio(file: BinaryIO, name: str) -> Recording:
    """A WAV, or whatever else the extra `audio` reads (FLAC, OGG, MP3, ...). `name` is for the errors."""
    opened = _opened(file, name)
    blocks = [np.empty((0, opened.channels), dtype=opened.dtype), *opened.blocks]
    return Recording(opened.sample_rate, np.concatenate(blocks))


def read_sound(file: BinaryIO, name: str) -> Sound:
    """Like `read_audio`, but block by block. `name` is for the errors."""
    opened = _opened(file, name)
    blocks = (Recording(opened.sample_rate, block).audio for block in opened.blocks)
    return Sound(opened.sample_rate, opened.channels, opened.samples, blocks)


def resampled(
    blocks: Iterable[NDArray[np.float32]], channels: int, sample_rate: int, wanted_rate: int
) -> Iterator[NDArray[np.float32]]:
    """The same sound at another rate. n samples become n * wanted_rate / sample_rate, half up, for any blocks.

    A block is resampled piece by piece: from a low rate to a high one it would grow as much, at once.
    """
    if sample_rate == wanted_rate:
        yield from blocks
        return
    try:
        import soxr
    except ImportError:
        raise UsageError(
            f"audio at {sample_rate} Hz has to be resampled to {wanted_rate} Hz, and soxr is not installed: "
            "pip install 'mossnano-stdio[audio]'"
        ) from None
    stream = soxr.ResampleStream(sample_rate, wanted_rate, channels, dtype="float32")
    piece_samples = max(1, BLOCK_SAMPLES * sample_rate // wanted_rate)
    for block in blocks:
        for start in range(0, len(block), piece_samples):
            yield stream.resample_chunk(np.ascontiguousarray(block[start : start + piece_samples]), last=False)
    yield stream.resample_chunk(np.zeros((0, channels), dtype=np.float32), last=True)


def _import_soundfile() -> ModuleType | None:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, the library that it wraps is not
        return None
    return soundfile  # type: ignore[no-any-return]


class _Patient:
    """A file as libsndfile is given it. A damaged header makes it ask for places that no file has: nothing moves then,
    where a file's own error would be printed from inside the library, and still not stop it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def __repr__(self) -> str:
        return "it"  # as libsndfile's errors call it, behind a name that ours have

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with contextlib.suppress(ValueError, OSError):
            self._file.seek(offset, whence)
        return self._file.tell()


class _Opened(NamedTuple):
    """An audio file whose header was read. Its blocks are int16 or float32, and found finite."""

    sample_rate: int
    channels: int
    samples: int
    dtype: type[np.int16] | type[np.float32]
    blocks: Iterator[NDArray[Any]]


def _opened(file: BinaryIO, name: str) -> _Opened:
    if not file.seekable():
        file = io.BytesIO(file.read())
    maybe_soundfile = _import_soundfile()
    return _opened_by_wave(file, name) if maybe_soundfile is None else _opened_by(maybe_soundfile, file, name)


def _opened_by(soundfile: ModuleType, file: BinaryIO, name: str) -> _Opened:
    try:
        sound = soundfile.SoundFile(_Patient(file))
    except soundfile.SoundFileError as error:
        raise InputError(f"{name} is no audio file that can be read: {error}") from None
    dtype = np.int16 if sound.subtype == "PCM_16" else np.float32

    def blocks() -> Iterator[NDArray[Any]]:
        start = 0
        with sound:
            while len(block := _next_block(soundfile, sound, dtype.__name__, name, start)):
                if not np.isfinite(block).all():
                    raise InputError(f"{name}: {_not_finite(block, start)}")
                yield block
                start += len(block)

    return _Opened(sound.samplerate, sound.channels, sound.frames, dtype, blocks())


def _next_block(soundfile: ModuleType, sound: Any, dtype: str, name: str, start: int) -> NDArray[Any]:
    try:
        block: NDArray[Any] = sound.read(BLOCK_SAMPLES, dtype=dtype, always_2d=True)
    except soundfile.SoundFileError as error:
        raise InputError(f"{name} cannot be read on from sample {start}: {error}") from None
    return block


def _opened_by_wave(file: BinaryIO, name: str) -> _Opened:
    import wave  # here, as nothing that decodes needs it

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
    return _Opened(sample_rate, channels, sound.getnframes(), dtype, blocks())


@contextlib.contextmanager
def _wave_errors(name: str) -> Iterator[None]:
    import wave

    try:
        yield
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: a chunk that claims to end before it begins
        raise InputError(
            f"{name} is no WAV of whole numbers ({str(error) or 'it ends too early'}); "
            "for FLAC, OGG, MP3 and other WAVs: pip install 'mossnano-stdio[audio]'"
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
