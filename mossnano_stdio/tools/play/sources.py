"""Tells by its first bytes what an input is, and gives its PCM while the rest still comes.

Rules of this room:

- Each event reads no more bytes than it needs: a live stream sounds live, and a slow reader slows its writer.
- A fault is an event, at the place where it was met: what comes before it is played, and what follows it too where
  that can be read. Only a fault that makes any sound impossible is raised.
- A graph is loaded for artifacts only.
- One stream after the other is played as it came, to the bit. Streams that sound at once are mixed, at the rate and
  with the channels of the first HANDSHAKE.
"""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Literal

import numpy as np

from mossnano_stdio.errors import InputError, MossnanoError, PayloadError, ProtocolError, UsageError
from mossnano_stdio.pcm import SAMPLE_FORMATS, Mixer, SoundForm, form_said_by, to_pcm16
from mossnano_stdio.pcm.recordings import read_audio
from mossnano_stdio.process.logs import log
from mossnano_stdio.protocol import (
    LENGTH_BYTES,
    MAX_MESSAGE_BYTES,
    NUMBERED,
    Kind,
    Message,
    MessageReader,
    kind_name,
    out_of_stream,
    parse_json,
)
from mossnano_stdio.tokens import MAGIC, SAMPLE_BYTES
from mossnano_stdio.tokens.ecdc import RECORDING_MAGICS, load_recording

PIECE_BYTES: Final = 1 << 16
LONGEST_MESSAGE_BYTES: Final = MAX_MESSAGE_BYTES + 1  # AUDIO has up to 1 MiB of PCM, and its kind
LONGEST_WAV_HEADER_BYTES: Final = 1 << 20
ENDLESS_WAV_BYTES: Final = 0x7FFF_0000  # a size from here on was made up by who wrote into a pipe

_CHUNK: Final = struct.Struct("<4sI")
_WAV_FORMAT: Final = struct.Struct("<HHIIHH")
_WAV_PCM, _WAV_EXTENSIBLE = 1, 0xFFFE
_WAV_GUID_AT, _WAV_PCM_GUID_START = 24, b"\x01\x00"


@dataclass(frozen=True)
class Pcm:
    """Whole samples, and the instant (time.perf_counter) at which what they were made of came in."""

    pcm: bytes
    since: float


@dataclass(frozen=True)
class EndOfStream:
    """The end of a stream, whole or cancelled."""

    is_cancelled: bool
    keeps_ended: bool = False  # what was played before it is another voice


@dataclass(frozen=True)
class Source:
    """What is played: its numbers, and its events in order, faults among them."""

    sample_rate: int
    channels: int
    events: Iterator[Pcm | EndOfStream | MossnanoError]


@dataclass(frozen=True)
class Decoding:
    """How to decode the input if it is an artifact."""

    weights: str | None = None  # as `find_weights` takes it
    threads: int | None = None
    provider: str = "cpu"
    graph: Literal["official", "fast"] | None = None
    precision: Literal["float32", "int8"] | None = None


def open_source(file: BinaryIO, name: str, decoding: Decoding, maybe_number: int | None = None) -> Source:
    """Open an artifact, an .ecdc, what mossnano-stdio answers, or an audio file. `name` is for the errors.

    `maybe_number` chooses one numbered stream; None: all streams.
    """
    data = _Input(file, name)
    start = data.look(LENGTH_BYTES + len(MAGIC))
    if not start:
        raise InputError(f"{name} is empty: there is nothing to play")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) > LENGTH_BYTES and 1 <= length <= LONGEST_MESSAGE_BYTES and start[LENGTH_BYTES] in list(Kind):
        messages = _messages(data.pieces())
        form = _greeted(next(messages, None))
        return Source(form.sample_rate, form.channels, _events(messages, form, maybe_number))
    if maybe_number is not None:
        raise UsageError(
            f"{name} is not what mossnano-stdio answers, so it has no numbered streams: leave --stream out"
        )
    if start.startswith(RECORDING_MAGICS):
        return _artifact(data, decoding)
    if start.startswith(b"RIFF") and (maybe_wav := _maybe_wav(data)):
        return maybe_wav
    return _audio_file(data)


def open_raw(file: BinaryIO, name: str, sample_rate: int, channels: int) -> Source:
    """Take the input as PCM16LE, whatever its first bytes are."""
    if sample_rate < 1 or channels < 1:
        raise UsageError(f"{channels} channels at {sample_rate} Hz are no sound: both must be 1 or more")
    return Source(sample_rate, channels, _whole_samples(_Input(file, name).pieces(), SAMPLE_BYTES * channels))


class _Input:
    """Reads bytes as they come, and can look at the first of them without taking them."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        assert isinstance(file, io.BufferedReader)  # its read1 gives what is there, and does not wait for more
        self.name = name
        self._file = file
        self._seen = b""

    def look(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end of the input."""
        while len(self._seen) < count and (piece := self._file.read1(PIECE_BYTES)):
            self._seen += piece
        return self._seen[:count]

    def skip(self, count: int) -> None:
        """Drop the first `count` of the bytes that were looked at."""
        self._seen = self._seen[count:]

    def pieces(self) -> Iterator[bytes]:
        """All that is left, each piece as soon as it is there."""
        seen, self._seen = self._seen, b""
        if seen:
            yield seen
        while piece := self._file.read1(PIECE_BYTES):
            yield piece

    def rest(self) -> io.BytesIO:
        return io.BytesIO(b"".join(self.pieces()))


def _whole_samples(pieces: Iterator[bytes], sample_bytes: int) -> Iterator[Pcm | MossnanoError]:
    rest = b""
    for piece in pieces:
        since = time.perf_counter()
        rest += piece
        whole_bytes = len(rest) - len(rest) % sample_bytes
        yield Pcm(rest[:whole_bytes], since)
        rest = rest[whole_bytes:]
    if rest:
        yield InputError(f"the PCM ends inside a sample: {len(rest)} bytes of {sample_bytes} are there")


# --- artifacts ---------------------------------------------------------------------------------------------------


def _artifact(data: _Input, decoding: Decoding) -> Source:
    from mossnano_stdio.chunks import Ramp, new_decoding_chunks, push_recording
    from mossnano_stdio.codecs import load_runtime, ramp_second_frames
    from mossnano_stdio.weights import find_weights, load_bundle

    recording = load_recording(data.rest(), data.name)
    bundle = load_bundle(find_weights(decoding.weights))
    if bundle.demo:
        log.warning("these are the built-in demo weights: a small synthesiser, not the codec")
    runtime = load_runtime(
        bundle,
        provider=decoding.provider,
        threads=decoding.threads,
        graph=decoding.graph,
        precision=decoding.precision,
    )
    recording.check_fits(runtime.format, runtime.decodes_prefix)
    chunks = new_decoding_chunks(runtime.new_decoder(), Ramp(second_frames=ramp_second_frames(runtime)))
    push_recording(chunks, recording)

    def events() -> Iterator[Pcm | MossnanoError]:
        since = time.perf_counter()
        while chunk := chunks.step():
            if chunk.error is not None:
                yield chunk.error
            yield Pcm(chunk.pcm, since)
            since = time.perf_counter()

    return Source(recording.sample_rate, recording.channels, events())


# --- what mossnano-stdio answers ---------------------------------------------------------------------------------


def _messages(pieces: Iterator[bytes]) -> Iterator[Message | MossnanoError]:
    """Gives every message, then the fault that ended them too early, if one did."""
    reader = MessageReader(LONGEST_MESSAGE_BYTES)
    try:
        for piece in pieces:
            yield from reader.feed(piece)
    except ProtocolError as error:
        yield error
        return
    if reader.incomplete_bytes:
        yield InputError(f"the input is cut inside a message: {reader.incomplete_bytes} bytes of it are there")


def _greeted(first: Message | MossnanoError | None) -> SoundForm:
    """Read the form of the sound from the HANDSHAKE, which must come first; refuse what cannot be played."""
    if not isinstance(first, Message):
        raise first or InputError("the input ended before its first message")
    if first.kind == Kind.ERROR:
        raise _said_error(first)
    if first.kind != Kind.HANDSHAKE:
        raise InputError(
            f"the input begins with {kind_name(first.kind)}, not with a HANDSHAKE: what mossnano-stdio answers can be "
            "played, what it is sent goes through it first (mossnano-stdio < FILE | mossnano play -)"
        )
    fields = parse_json(first)
    if fields.get("direction", "decode") != "decode":
        raise InputError("this is an encoder's answer, tokens without sound: send it through mossnano-stdio first")
    if fields.get("sample_format", "s16le") not in SAMPLE_FORMATS:
        raise InputError(f"the PCM is {fields['sample_format']!r}, only s16le and f32le can be played")
    sample_rate, channels = fields.get("sample_rate"), fields.get("channels")
    if not (type(sample_rate) is int and type(channels) is int and sample_rate > 0 and channels > 0):
        raise InputError(f"the HANDSHAKE says {channels!r} channels at {sample_rate!r} Hz: both must be whole numbers")
    return form_said_by(fields)


def _events(
    messages: Iterator[Message | MossnanoError], form: SoundForm, maybe_wanted: int | None
) -> Iterator[Pcm | EndOfStream | MossnanoError]:
    answers = _Answers(form, maybe_wanted)
    for message in messages:
        if isinstance(message, MossnanoError):
            yield message
            continue
        since = time.perf_counter()
        try:
            number, message = out_of_stream(message) if message.kind & NUMBERED else (None, message)
            yield from answers.events_of(number, message, since)
        except MossnanoError as error:
            yield error
    yield from answers.last_events()


class _Answers:
    """What each message is to a player: sound, the end of it, an error, or nothing."""

    def __init__(self, form: SoundForm, maybe_wanted: int | None) -> None:
        self._maybe_wanted = maybe_wanted
        self._forms: dict[int | None, SoundForm] = {None: form}  # of plain streams, and of numbered ones that began
        self._mixer = Mixer(form)
        self._lost: set[int] = set()  # numbered streams that cannot be played on
        self._is_there = maybe_wanted is None

    def events_of(self, number: int | None, message: Message, since: float) -> Iterator[Pcm | EndOfStream | InputError]:
        is_wanted = self._maybe_wanted in (None, number)
        match message.kind:
            case Kind.HANDSHAKE:
                self._forms[number] = form_said_by(parse_json(message))
            case Kind.AUDIO if is_wanted and number not in self._lost:
                self._is_there = True
                yield from self._sound(number, message.payload, since)
            case Kind.END if is_wanted:
                self._is_there = True
                yield from self._end(number, parse_json(message).get("cancelled") is True, since)
            case Kind.ERROR if is_wanted or number is None:
                yield _said_error(message, number)

    def last_events(self) -> Iterator[Pcm | InputError]:
        if pcm := self._mixer.finish_all():
            yield Pcm(pcm, time.perf_counter())
        if not self._is_there:
            yield InputError(f"no stream {self._maybe_wanted} is in the input")

    def _sound(self, number: int | None, sound: bytes, since: float) -> Iterator[Pcm]:
        form = self._forms.setdefault(number, self._forms[None])
        if len(sound) % form.sample_bytes:
            raise PayloadError(f"AUDIO of {len(sound)} bytes is not whole samples of {form.sample_bytes} bytes")
        try:
            pcm = self._mixer.push(number, sound, form)
        except MossnanoError:
            if number is not None:
                self._lost.add(number)  # it would fail again and again
            raise
        if pcm:
            yield Pcm(pcm, since)

    def _end(self, number: int | None, is_cancelled: bool, since: float) -> Iterator[Pcm | EndOfStream]:
        if number is not None:
            self._forms.pop(number, None)
            self._lost.discard(number)
        is_all = self._mixer.is_all_of(number)
        if pcm := self._mixer.drop(number) if is_cancelled else self._mixer.finish(number):
            yield Pcm(pcm, since)
        if self._mixer.is_idle:
            # Of what was cancelled the player drops what it holds, unless sound of other streams would go with it.
            is_dropped = is_cancelled and is_all
            yield EndOfStream(is_dropped, keeps_ended=is_dropped and number is not None)


def _said_error(message: Message, maybe_number: int | None = None) -> InputError:
    fields = parse_json(message)
    of_stream = "" if maybe_number is None else f" of stream {maybe_number}"
    return InputError(f"mossnano-stdio says{of_stream} {fields.get('code')}: {fields.get('message')}")


# --- audio files -------------------------------------------------------------------------------------------------


def _maybe_wav(data: _Input) -> Source | None:
    """Opens a WAV of 16 bits, which is played while it comes in. None: another WAV, which is read as a whole."""
    maybe_format: tuple[int, int] | None = None
    at = 12  # after RIFF, size, WAVE
    while at < LONGEST_WAV_HEADER_BYTES:
        header = data.look(at + _CHUNK.size)[at:]
        if len(header) < _CHUNK.size:
            return None
        name, size = _CHUNK.unpack(header)
        at += _CHUNK.size
        if name == b"data" and maybe_format is not None:
            sample_rate, channels = maybe_format
            data.skip(at)
            return Source(sample_rate, channels, _wav_samples(data.pieces(), size, SAMPLE_BYTES * channels))
        if name == b"fmt ":
            maybe_format = _maybe_pcm16_format(data.look(at + size)[at:])
            if maybe_format is None:
                return None
        at += size + size % 2
    return None


def _maybe_pcm16_format(fmt: bytes) -> tuple[int, int] | None:
    """Sample rate and channels, where a WAV's `fmt ` chunk says that its samples are integers of 16 bits."""
    if len(fmt) < _WAV_FORMAT.size:
        return None
    code, channels, sample_rate, _, _, bits = _WAV_FORMAT.unpack_from(fmt)
    if code == _WAV_EXTENSIBLE and fmt[_WAV_GUID_AT:].startswith(_WAV_PCM_GUID_START):
        code = _WAV_PCM
    is_playable = code == _WAV_PCM and bits == 8 * SAMPLE_BYTES and channels > 0 and sample_rate > 0
    return (sample_rate, channels) if is_playable else None


def _wav_samples(pieces: Iterator[bytes], data_bytes: int, sample_bytes: int) -> Iterator[Pcm | MossnanoError]:
    """The PCM of a `data` chunk, without the chunks that may follow it."""
    if data_bytes >= ENDLESS_WAV_BYTES:
        yield from _whole_samples(pieces, sample_bytes)
        return
    missing_bytes = data_bytes

    def wanted() -> Iterator[bytes]:
        nonlocal missing_bytes
        for piece in pieces:
            yield piece[:missing_bytes]
            missing_bytes -= len(piece[:missing_bytes])
            if not missing_bytes:
                return

    yield from _whole_samples(wanted(), sample_bytes)
    if missing_bytes:
        yield InputError(f"the WAV is cut: {missing_bytes} bytes of its {data_bytes} bytes of PCM are missing")


def _audio_file(data: _Input) -> Source:
    """Read the whole of an audio file of any kind that the package reads."""
    try:
        recording = read_audio(data.rest(), data.name)
    except InputError as error:
        raise InputError(
            f"{data.name} is nothing that can be played (artifacts, what mossnano-stdio answers, audio files, and raw "
            f"PCM with --raw): {error}"
        ) from None
    samples = recording.samples
    pcm = samples.astype("<i2").tobytes() if samples.dtype == np.int16 else to_pcm16(recording.audio)
    return Source(recording.sample_rate, samples.shape[1], iter([Pcm(pcm, time.perf_counter())]))
