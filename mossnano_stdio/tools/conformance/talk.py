"""One conversation with the peer, from its HANDSHAKE on: sends messages, and checks the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np

from mossnano_stdio.errors import PayloadError
from mossnano_stdio.protocol import Kind, Message, encode_message, json_message, kind_name, parse_json
from mossnano_stdio.tokens import SAMPLE_BYTES, Artifact, CodecFormat, Codes, build_artifact, pack_frames
from mossnano_stdio.tools.conformance.peer import DepartureError, NotApplicableError, Peer

END: Final = Message(Kind.END)
ANSWER_KINDS: Final = (Kind.HANDSHAKE, Kind.AUDIO, Kind.ERROR, Kind.PING, Kind.END)  # others are ignored, as clients do
_SHOWN_CHARACTERS: Final = 200


class Talk:
    """Sends messages and checks the answers. All it knows of the codec is in `format`, and how many frames a stream's
    first chunk waits for.
    """

    def __init__(self, peer: Peer, handshake: Mapping[str, Any]) -> None:
        self.peer = peer
        self.handshake = dict(handshake)
        self.format = format_in(handshake)
        self.first_frames = first_chunk_frames_in(handshake)
        self._fences = 0

    # --- what there is to say --------------------------------------------------------------------

    def frames(self, count: int, seed: int = 0) -> Codes:
        """Frames that any decoder of this format takes, the same for the same seed."""
        if "segment_frames" in self.handshake:
            not_applicable("it decodes segments, each with a scale, and these cases have frames of codes alone")
        # Not numpy's numbers: a frozen folder does without that part of it, 3 MB.
        codes = random.Random(seed).choices(range(self.format.codebook_size), k=count * self.format.quantizers)
        return np.array(codes, np.uint16).reshape(count, self.format.quantizers)

    def tokens(self, frames: Codes) -> Message:
        return Message(Kind.TOKENS, pack_frames(frames, self.format.codebook_size))

    def artifact(self, frames: Codes, maybe_samples: int | None = None) -> bytes:
        """A `.mossnano` of these frames."""
        samples = len(frames) * self.format.frame_samples if maybe_samples is None else maybe_samples
        weights = self.format
        numbers = (weights.sample_rate, weights.channels, samples, weights.quantizers, len(frames))
        return build_artifact(Artifact(*numbers, weights.codebook_size, frames))

    def bad_tokens(self) -> Message:
        """TOKENS that no decoder of this format takes: part of a frame, or where a frame is one byte, no code."""
        weights = self.format
        if weights.frame_bytes > 1:
            return Message(Kind.TOKENS, bytes(weights.frame_bytes + 1))
        if weights.codebook_size**weights.quantizers == 1 << 8:
            not_applicable("a frame is one byte, and every byte is a frame")
        return Message(Kind.TOKENS, b"\xff")

    @property
    def sample_bytes(self) -> int:
        return self.format.channels * SAMPLE_BYTES

    # --- saying it -------------------------------------------------------------------------------

    def say(self, *messages: Message) -> None:
        """All of them in one write."""
        self.write(b"".join(encode_message(*message) for message in messages))

    def write(self, wire: bytes) -> None:
        self.peer.write(wire)

    def settle(self, **settings: int | None) -> dict[str, Any]:
        """Send SETTINGS that must be taken; the HANDSHAKE that answers them."""
        self.say(json_message(Kind.SETTINGS, settings))
        return self.expect_handshake()

    def use_ramp(self) -> None:
        """Make sure that frames are decoded as they come."""
        if self.handshake.get("chunk_frames") is not None:
            self.settle(chunk_frames=None)

    # --- hearing the answers ---------------------------------------------------------------------

    def next(self, expected: str) -> Message:
        """The next answer, which should be what `expected` says."""
        while (maybe_message := self.peer.maybe_read()) is not None:
            if maybe_message.kind in ANSWER_KINDS:
                return maybe_message
        raise DepartureError(expected, self.peer.describe_end())

    def next_of_any_stream(self, expected: str) -> Message:
        """The next answer, of a numbered stream too."""
        if (maybe_message := self.peer.maybe_read()) is None:
            raise DepartureError(expected, self.peer.describe_end())
        return maybe_message

    def decode_beside(self, keep: Callable[[Message], None]) -> None:
        """Put a plain stream of several chunks through, beside what is due in others; `keep` gets all answers."""
        self.say(self.tokens(self.frames(8)), END)
        while (message := self.next_of_any_stream("END of a plain stream beside others")).kind != Kind.END:
            keep(message)

    def expect_audio(self, samples: int, why: str) -> bytes:
        """AUDIO messages that hold exactly so many samples together."""
        expected = f"{samples} samples of AUDIO ({why})"
        pcm = b""
        while len(pcm) < samples * self.sample_bytes:
            message = self.next(expected)
            if message.kind != Kind.AUDIO:
                raise DepartureError(expected, f"{len(pcm) // self.sample_bytes}, then {describe(message)}")
            pcm += message.payload
        if len(pcm) > samples * self.sample_bytes:
            raise DepartureError(expected, f"{len(pcm) // self.sample_bytes} samples")
        return pcm

    def audio_until(self, kind: Kind, expected: str) -> tuple[bytes, Message]:
        """AUDIO only, then a message of this kind."""
        pcm = []
        while (message := self.next(expected)).kind == Kind.AUDIO:
            pcm.append(message.payload)
        if message.kind != kind:
            raise DepartureError(expected, describe(message))
        return b"".join(pcm), message

    def expect_end(self, expected: str = "END", **values: Any) -> tuple[bytes, dict[str, Any]]:
        """The PCM up to the next END, and what the END says, which must hold these values."""
        shown = ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items())
        expected = f"{expected} with {shown}" if shown else expected
        pcm, message = self.audio_until(Kind.END, expected)
        fields = fields_of(message)
        if any(name not in fields or fields[name] != value for name, value in values.items()):
            raise DepartureError(expected, describe(message))
        return pcm, fields

    def expect_error(self, *codes: str, fatal: bool = False) -> dict[str, Any]:
        """The next answer is an ERROR with one of these codes."""
        expected = f"{'a fatal ' * fatal}ERROR {' or '.join(codes)}"
        message = self.next(expected)
        if message.kind != Kind.ERROR:
            raise DepartureError(expected, describe(message))
        fields = fields_of(message)
        if fields.get("code") not in codes or fields.get("fatal") is not fatal:
            raise DepartureError(expected, describe(message))
        return fields

    def expect_handshake(self) -> dict[str, Any]:
        message = self.next("HANDSHAKE")
        if message.kind != Kind.HANDSHAKE:
            raise DepartureError("HANDSHAKE", describe(message))
        return fields_of(message)

    def expect_nothing(self, why: str) -> None:
        """No answer is due: a PING sent now is answered by its echo at once."""
        self._fences += 1
        fence = Message(Kind.PING, f"fence {self._fences}".encode())
        self.say(fence)
        self.expect_ping(fence.payload, f"no answer ({why}), then the echo of a PING")

    def expect_ping(self, payload: bytes, expected: str = "PING with its payload") -> None:
        message = self.next(expected)
        if message != (Kind.PING, payload):
            raise DepartureError(expected, describe(message))

    def decode(self, frames: Codes) -> bytes:
        """A token stream from its first message to its END, which must be all right."""
        self.say(self.tokens(frames), END)
        return self.expect_stream(len(frames))

    def expect_stream(self, frames: int, what: str = "END of a stream", error: str | None = None) -> bytes:
        """The PCM of a stream of so many frames, and its END; with an ERROR of this code somewhere in between."""
        samples = frames * self.format.frame_samples
        before = b""
        if error is not None:
            before, message = self.audio_until(Kind.ERROR, f"ERROR {error} inside the stream")
            expect(fields_of(message).get("code") == error, f"ERROR {error}", describe(message))
        pcm, _ = self.expect_end(what, cancelled=False, samples=samples)
        return self.expect_samples(before + pcm, samples, what)

    def expect_out_of_place(self, message: Message, name: str) -> None:
        """A token stream, an artifact and a bad stream refuse this message and go on."""
        frames = self.frames(2)
        pcm = self.decode(frames)
        data = self.artifact(frames)
        self.say(self.tokens(frames), message, END)
        expect_equal_pcm(self.expect_stream(2, error="out_of_place"), pcm, f"the token stream as without {name}")
        self.say(Message(Kind.ARTIFACT, data[:-1]), message, Message(Kind.ARTIFACT, data[-1:]))
        expect_equal_pcm(self.expect_stream(2, error="out_of_place"), pcm, f"the artifact as without {name}")
        self.say(self.bad_tokens(), message, END)
        self.expect_error("bad_tokens")
        self.expect_error("out_of_place")
        self.expect_end("END of the bad stream", samples=0)

    def expect_samples(self, pcm: bytes, samples: int, what: str) -> bytes:
        if len(pcm) != samples * self.sample_bytes:
            raise DepartureError(f"{what}: {samples} samples of AUDIO", f"{len(pcm) / self.sample_bytes:g}")
        return pcm

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """No more input will come."""
        self.peer.close_input()

    def expect_exit(self, status: int) -> None:
        """Nothing more is said, and the process ends with this status."""
        expected = f"nothing more, and exit status {status}"
        while (maybe_message := self.peer.maybe_read()) is not None:
            if maybe_message.kind in ANSWER_KINDS:
                raise DepartureError(expected, describe(maybe_message))
        self.expect_status(status)

    def expect_status(self, status: int) -> None:
        seen = self.peer.wait()
        if seen != status:
            raise DepartureError(f"exit status {status}", f"exit status {seen}")


# --- in words ------------------------------------------------------------------------------------


def expect_equal_pcm(pcm: bytes, expected_pcm: bytes, what: str) -> None:
    """`what`: whose PCM should equal whose."""
    if pcm == expected_pcm:
        return
    both = min(len(pcm), len(expected_pcm))
    differs = [index for index in range(both) if pcm[index] != expected_pcm[index]][:1]
    first = differs[0] if differs else both
    raise DepartureError(
        f"{what}, {len(expected_pcm)} bytes of PCM", f"{len(pcm)} bytes, the first difference at byte {first}"
    )


def expect(is_right: bool, expected: str, seen: object) -> None:
    if not is_right:
        raise DepartureError(expected, seen if isinstance(seen, str) else json.dumps(seen))


def not_applicable(reason: str) -> NoReturn:
    raise NotApplicableError(reason)


def fields_of(message: Message) -> dict[str, Any]:
    """The JSON of an answer."""
    try:
        return parse_json(message)
    except PayloadError as error:
        raise DepartureError(f"{kind_name(message.kind)} with a JSON object", str(error)) from None


def describe(message: Message) -> str:
    """An answer in words."""
    name = kind_name(message.kind)
    match message.kind:
        case Kind.AUDIO:
            return f"AUDIO of {len(message.payload)} bytes"
        case Kind.PING:
            return f"PING {message.payload[:32]!r}"
        case _:
            text = message.payload.decode("utf-8", "replace")
            return f"{name} {text[:_SHOWN_CHARACTERS]}" + "..." * (len(text) > _SHOWN_CHARACTERS)


def first_chunk_frames_in(handshake: Mapping[str, Any]) -> int:
    """1 where it does not say."""
    value = handshake.get("first_chunk_frames", 1)
    if type(value) is not int or value < 1:
        raise DepartureError("a HANDSHAKE whose first_chunk_frames, if there is one, is above 0", json.dumps(value))
    return value


def format_in(handshake: Mapping[str, Any]) -> CodecFormat:
    """The numbers of a HANDSHAKE that say how codes and sound lie."""
    names: Sequence[str] = ("sample_rate", "channels", "frame_samples", "quantizers", "codebook_size")
    for name in names:
        value = handshake.get(name)
        if type(value) is not int or value < 1 + (name == "codebook_size"):
            seen = json.dumps(value) if name in handshake else "none"
            raise DepartureError(f"a HANDSHAKE whose {name} is a number above 0", seen)
    return CodecFormat(**{name: handshake[name] for name in names})
