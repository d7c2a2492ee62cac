"""Counts the messages, frames, seconds and faults of a framed stream, in whichever direction it went.

Rules of this room:

- A tally decodes nothing. It counts a message that is wrong as an error and goes on, as the process does.
- Frames are counted in TOKENS and ARTIFACT. A stream that has neither, a decoder's output, says them in its ENDs.
- HANDSHAKE and SETTINGS say the format. Until they do, the numbers of a model are assumed, and the facts say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from mossnano_stdio.errors import InputError, PayloadError, ProtocolError
from mossnano_stdio.protocol import Kind, Message, MessageReader, kind_name, parse_json
from mossnano_stdio.tokens import MAGIC, SAMPLE_BYTES, ArtifactReader, CodecFormat
from mossnano_stdio.weights import MODELS

MOST_ERRORS_KEPT: Final = 10  # by their text; all are counted


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
        self._said: dict[str, int] = {}  # by HANDSHAKE and SETTINGS
        self._kinds: Counter[str] = Counter()
        self._payload_bytes = 0
        self._seen_frames = 0
        self._reported_frames = 0
        self._audio_samples = 0
        self._seconds = 0.0
        self._errors: list[str] = []
        self._error_count = 0
        self._maybe_artifact: ArtifactReader | None = None  # the one that is not whole yet
        self._skips_artifact = False  # inside a bad one, until the next begins
        self._is_truncated = False

    def read(self, pieces: Iterable[bytes]) -> InputError | None:
        """Count every message. Returns what ended the stream early: a length that cannot be, or a cut."""
        try:
            for piece in pieces:
                for message in self._reader.feed(piece):
                    self._kinds[kind_name(message.kind)] += 1
                    self._payload_bytes += len(message.payload)
                    try:
                        self._look_into(message)
                    except PayloadError as error:
                        self._note_error(f"{kind_name(message.kind)}: {error}")
        except ProtocolError as error:
            return error
        if incomplete_bytes := self._reader.incomplete_bytes:
            place = f"a message: {incomplete_bytes} bytes of it are there"
        elif self._maybe_artifact is not None:
            place = f"an artifact: {self._maybe_artifact.missing_bytes} bytes of it are missing"
        else:
            self._is_truncated = False
            return None
        self._is_truncated = True
        return InputError(f"the stream is cut inside {place}")

    def facts(self) -> dict[str, Any]:
        return {
            "messages": dict(self._kinds),
            "payload_bytes": self._payload_bytes,
            "frames": self._seen_frames or self._reported_frames,
            "audio_samples": self._audio_samples,
            "seconds": self._seconds,
            "format": vars(self._format),
            "format_is": "as the stream says" if "sample_rate" in self._said else f"assumed ({self._model}'s)",
            "error_count": self._error_count,
            "errors": self._errors,
            "truncated": self._is_truncated,
            "incomplete_bytes": self._reader.incomplete_bytes,
        }

    @property
    def _format(self) -> CodecFormat:
        return CodecFormat(**(vars(MODELS[self._model].format) | self._said))

    def _look_into(self, message: Message) -> None:
        match message.kind:
            case Kind.HANDSHAKE | Kind.SETTINGS:
                fields = parse_json(message)
                said = {name: number for name in vars(self._format) if (number := _count_in(fields, name))}
                if CodecFormat(**(vars(self._format) | said)).frame_bytes:  # 0 bytes where a codebook has one entry
                    self._said |= said
            case Kind.TOKENS:
                self._count_tokens(message.payload)
            case Kind.ARTIFACT:
                self._count_artifact(message.payload)
            case Kind.AUDIO:
                samples = len(message.payload) // (SAMPLE_BYTES * self._format.channels)
                self._audio_samples += samples
                self._seconds += samples / self._format.sample_rate
            case Kind.CANCEL:
                self._maybe_artifact, self._skips_artifact = None, False
            case Kind.END:
                self._count_end(message)
            case Kind.ERROR:
                fields = parse_json(message)
                self._note_error(f"{fields.get('code')}: {fields.get('message')}")

    def _count_tokens(self, payload: bytes) -> None:
        codec = self._format
        frames, rest_bytes = divmod(len(payload), codec.frame_bytes)
        self._seen_frames += frames
        self._seconds += frames * codec.frame_samples / codec.sample_rate
        if rest_bytes:
            raise PayloadError(f"{len(payload)} bytes are no whole number of frames of {codec.frame_bytes} bytes")

    def _count_artifact(self, payload: bytes) -> None:
        if self._skips_artifact and not payload.startswith(MAGIC):
            return
        artifact = self._maybe_artifact or ArtifactReader()
        self._maybe_artifact, self._skips_artifact = None, True  # where push raises, the rest is skipped
        missing_bytes = artifact.push(payload)
        if missing_bytes:
            self._maybe_artifact = artifact
        else:
            whole = artifact.artifact()
            self._seen_frames += whole.frames
            self._seconds += whole.duration_seconds
        self._skips_artifact = False

    def _count_end(self, message: Message) -> None:
        maybe_cut, self._maybe_artifact = self._maybe_artifact, None
        self._skips_artifact = False
        if maybe_cut is not None:
            raise PayloadError(f"an artifact is cut: {maybe_cut.missing_bytes} bytes of it are missing")
        if message.payload:
            self._reported_frames += _count_in(parse_json(message), "frames")

    def _note_error(self, line: str) -> None:
        self._error_count += 1
        if len(self._errors) < MOST_ERRORS_KEPT:
            self._errors.append(line)


def _count_in(fields: dict[str, Any], name: str) -> int:
    """The field of that name where it is a whole number from 1 to 2**32 - 1, else 0."""
    value = fields.get(name)
    return value if type(value) is int and 0 < value < 1 << 32 else 0
