"""Counts the messages, frames, seconds and faults of a framed stream, in whichever direction it went.

Rules of this room:

- A tally decodes nothing. It counts a message that is wrong as an error and goes on, as the process does.
- Frames are counted in TOKENS and ARTIFACT. A stream that has neither, a decoder's output, says them in its ENDs.
- HANDSHAKE and SETTINGS say the format. Until they do, the numbers of a model are assumed, and the facts say so.
- A numbered stream begins with what holds for plain ones when its first message comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from mossnano_stdio.errors import InputError, PayloadError, ProtocolError
from mossnano_stdio.pcm import SAMPLE_FORMATS, SoundForm
from mossnano_stdio.protocol import NUMBERED, Kind, Message, MessageReader, kind_name, out_of_stream, parse_json
from mossnano_stdio.tokens import ArtifactReader, CodecFormat
from mossnano_stdio.tokens.ecdc import RECORDING_MAGICS, EcdcReader, reader_for
from mossnano_stdio.weights import MODELS

MOST_ERRORS_KEPT: Final = 10  # by their text; all are counted
MOST_STREAMS_SHOWN: Final = 32  # the first numbered ones; all are counted


class Tally:
    """Bytes of a framed stream in, facts out.

    >>> tally = Tally(max_message_bytes=1 << 20)
    >>> tally.read([bytes.fromhex("15000000 04") + bytes(20), bytes.fromhex("01000000 07")])
    >>> tally.facts()["messages"], tally.facts()["frames"], tally.facts()["seconds"]
    ({'TOKENS': 1, 'END': 1}, 1, 0.08)
    """

    def __init__(self, max_message_bytes: int, model: str = "nano") -> None:
        self._model = model
        self._reader = MessageReader(max_message_bytes)
        self._kinds: Counter[str] = Counter()
        self._payload_bytes = 0
        assumed = MODELS[model].format
        self._plain = StreamTally(SoundForm.of_codec(assumed), assumed)
        self._numbers: set[int] = set()  # of all numbered streams
        self._numbered: dict[int, StreamTally] = {}  # of those that are shown or go on; the rest are summed up
        self._rest = StreamTally(SoundForm.of_codec(assumed), assumed)
        self._errors: list[str] = []
        self._error_count = 0
        self._is_truncated = False

    def read(self, pieces: Iterable[bytes]) -> InputError | None:
        """Count every message. Returns what ended the stream early: a length that cannot be, or a cut."""
        try:
            for piece in pieces:
                for message in self._reader.feed(piece):
                    self._count(message)
        except ProtocolError as error:
            return error
        unfinished = {number: stream for number, stream in self._numbered.items() if stream.maybe_artifact is not None}
        if incomplete_bytes := self._reader.incomplete_bytes:
            place = f"a message: {incomplete_bytes} bytes of it are there"
        elif self._plain.maybe_artifact is not None:
            place = f"an artifact: {_what_is_missing(self._plain.maybe_artifact)}"
        elif unfinished:
            place = f"an artifact, in stream {', '.join(map(str, unfinished))}"
        else:
            self._is_truncated = False
            return None
        self._is_truncated = True
        return InputError(f"the stream is cut inside {place}")

    def facts(self) -> dict[str, Any]:
        codec, form = self._plain.codec, self._plain.form
        streams = [self._plain, self._rest, *self._numbered.values()]
        facts = {
            "messages": dict(self._kinds),
            "payload_bytes": self._payload_bytes,
            "frames": sum(stream.seen_frames for stream in streams)
            or sum(stream.reported_frames for stream in streams),
            "audio_samples": sum(stream.audio_samples for stream in streams),
            "seconds": sum(stream.seconds for stream in streams),
            "format": vars(codec),
            "format_is": "as the stream says" if self._plain.is_said else f"assumed ({self._model}'s)",
            "error_count": self._error_count,
            "errors": self._errors,
            "truncated": self._is_truncated,
            "incomplete_bytes": self._reader.incomplete_bytes,
        }
        if not form.is_plain_of(codec):
            facts["form"] = _form_facts(form)
        if self._numbers:
            facts["numbered_streams"] = len(self._numbers)
            facts["streams"] = {
                str(number): stream.facts() for number, stream in self._numbered.items() if stream.is_shown
            }
        return facts

    def _count(self, message: Message) -> None:
        name = kind_name(message.kind)
        if message.kind & NUMBERED and message.kind & ~NUMBERED in list(Kind):
            name = f"numbered {kind_name(message.kind & ~NUMBERED)}"
        self._kinds[name] += 1
        self._payload_bytes += len(message.payload)
        try:
            if message.kind & NUMBERED:
                maybe_line = self._count_numbered(*out_of_stream(message))
            else:
                maybe_line = self._plain.count(message)
        except PayloadError as error:
            maybe_line = f"{name}: {error}"
        if maybe_line is not None:
            self._error_count += 1
            if len(self._errors) < MOST_ERRORS_KEPT:
                self._errors.append(maybe_line)

    def _count_numbered(self, number: int, message: Message) -> str | None:
        stream = self._numbered.get(number)
        if stream is None:
            stream = self._numbered[number] = StreamTally(self._plain.form, self._plain.codec)
            stream.is_shown = len(self._numbers) < MOST_STREAMS_SHOWN
            self._numbers.add(number)
        try:
            maybe_line = stream.count(message)
        except PayloadError as error:
            raise PayloadError(f"in stream {number}, {error}") from None
        finally:
            if stream.maybe_end is not None and not stream.is_shown:
                self._rest.add(self._numbered.pop(number))  # a file may hold any number of streams
        return maybe_line


class StreamTally:
    """Counts one numbered stream, or all plain ones."""

    def __init__(self, form: SoundForm, codec: CodecFormat) -> None:
        self.form = form
        self.codec = codec
        self.is_said = False  # by the stream?
        self.is_shown = True
        self.kinds: Counter[str] = Counter()
        self.seen_frames = 0
        self.reported_frames = 0
        self.audio_samples = 0
        self.seconds = 0.0
        self.error_count = 0
        self.maybe_end: str | None = None
        self.maybe_artifact: ArtifactReader | EcdcReader | None = None  # the one that is not whole yet
        self._skips_artifact = False  # inside a bad one, until the next begins

    def add(self, other: StreamTally) -> None:
        self.seen_frames += other.seen_frames
        self.reported_frames += other.reported_frames
        self.audio_samples += other.audio_samples
        self.seconds += other.seconds

    def facts(self) -> dict[str, Any]:
        return {
            "messages": dict(self.kinds),
            "frames": self.seen_frames or self.reported_frames,
            "audio_samples": self.audio_samples,
            "seconds": self.seconds,
            **_form_facts(self.form),
            "error_count": self.error_count,
            "end": self.maybe_end,
        }

    def count(self, message: Message) -> str | None:
        """Returns what a peer's ERROR says. A PayloadError says what is wrong with the message itself."""
        self.kinds[kind_name(message.kind)] += 1
        try:
            return self._look_into(message)
        except PayloadError:
            self.error_count += 1
            raise

    def _look_into(self, message: Message) -> str | None:
        match message.kind:
            case Kind.HANDSHAKE:
                self._agree(parse_json(message))
            case Kind.SETTINGS:
                fields = parse_json(message)
                if quantizers := _count_in(fields, "quantizers"):
                    self.codec = replace(self.codec, quantizers=quantizers)
            case Kind.TOKENS:
                self._count_tokens(message.payload)
            case Kind.ARTIFACT:
                self._count_artifact(message.payload)
            case Kind.AUDIO:
                samples = len(message.payload) // self.form.sample_bytes
                self.audio_samples += samples
                self.seconds += samples / self.form.sample_rate
            case Kind.CANCEL:
                self.maybe_artifact, self._skips_artifact = None, False
            case Kind.END:
                self._count_end(message)
            case Kind.ERROR:
                self.error_count += 1
                fields = parse_json(message)
                return f"{fields.get('code')}: {fields.get('message')}"
        return None

    def _agree(self, fields: dict[str, Any]) -> None:
        said = {name: number for name in vars(self.codec) if (number := _count_in(fields, name))}
        form = replace(
            self.form,
            sample_rate=said.get("sample_rate", self.form.sample_rate),
            channels=said.get("channels", self.form.channels),
        )
        if fields.get("sample_format") in SAMPLE_FORMATS:
            form = replace(form, sample_format=fields["sample_format"])
        for name in ("sample_rate", "channels"):  # the codec's own, where the sound is in another form
            if number := _count_in(fields, f"codec_{name}"):
                said[name] = number
        codec = replace(self.codec, **said)
        if codec.frame_bytes:  # 0 where a codebook has one entry
            self.codec, self.form = codec, form
            self.is_said = self.is_said or "sample_rate" in said

    def _count_tokens(self, payload: bytes) -> None:
        codec = self.codec
        frames, rest_bytes = divmod(len(payload), codec.frame_bytes)
        self.seen_frames += frames
        self.seconds += frames * codec.frame_samples / codec.sample_rate
        if rest_bytes:
            raise PayloadError(f"{len(payload)} bytes are no whole number of frames of {codec.frame_bytes} bytes")

    def _count_artifact(self, payload: bytes) -> None:
        if self._skips_artifact and not payload.startswith(RECORDING_MAGICS):
            return
        reader = reader_for(payload, self.maybe_artifact or ArtifactReader())
        self.maybe_artifact, self._skips_artifact = None, True  # where push raises, the rest is skipped
        if isinstance(reader, EcdcReader):
            for _ in reader.push(payload):
                pass  # its header says how many frames they have
        else:
            reader.push(payload)
        if reader.is_complete:
            whole = reader.finish() if isinstance(reader, EcdcReader) else reader.artifact()
            self.seen_frames += whole.frames
            self.seconds += whole.duration_seconds
        else:
            self.maybe_artifact = reader
        self._skips_artifact = False

    def _count_end(self, message: Message) -> None:
        maybe_cut, self.maybe_artifact = self.maybe_artifact, None
        self._skips_artifact = False
        self.maybe_end = "whole"
        if maybe_cut is not None:
            raise PayloadError(f"an artifact is cut: {_what_is_missing(maybe_cut)}")
        if message.payload:
            fields = parse_json(message)
            self.reported_frames += _count_in(fields, "frames")
            self.maybe_end = "cancelled" if fields.get("cancelled") is True else "whole"


def _what_is_missing(artifact: ArtifactReader | EcdcReader) -> str:
    if isinstance(artifact, EcdcReader):
        return str(artifact.maybe_cut())
    return f"{artifact.missing_bytes} bytes of it are missing"


def _form_facts(form: SoundForm) -> dict[str, Any]:
    return {"sample_rate": form.sample_rate, "channels": form.channels, "sample_format": form.sample_format}


def _count_in(fields: dict[str, Any], name: str) -> int:
    """The field of that name where it is a whole number from 1 to 2**32 - 1, else 0."""
    value = fields.get(name)
    return value if type(value) is int and 0 < value < 1 << 32 else 0
