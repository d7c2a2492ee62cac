"""Numbered streams: several at once, each with its number, its credit, its marks and its form.

They are tried where the HANDSHAKE offers them: an implementation without `max_streams` is told so, and judged on the
rest.
"""

from __future__ import annotations

from typing import Any

from mossnano_stdio.protocol import NUMBERED, Kind, Message, in_stream, json_message, out_of_stream
from mossnano_stdio.tools.conformance.talk import (
    END,
    Talk,
    describe,
    expect,
    expect_equal_pcm,
    fields_of,
    not_applicable,
)

_CANCEL = Message(Kind.CANCEL, b"barge")
_VALUE_BYTES = {"s16le": 2, "f32le": 4}


def sound_like_plain_ones(talk: Talk) -> None:
    """Several at once, message by message, each sounds as it does alone, bit by bit where chunks are equal."""
    voices = _Voices(talk)
    talk.settle(chunk_frames=2)
    spoken = {number: talk.frames(6, seed=number) for number in (1, 2, 7)}
    alone = {number: talk.decode(frames) for number, frames in spoken.items()}
    for at in range(6):
        for number, frames in spoken.items():
            voices.say(number, talk.tokens(frames[at : at + 1]))
    for number in spoken:
        voices.say(number, END)
    for number, pcm in alone.items():
        voices.until_end_of(number)
        expect_equal_pcm(voices.pcm(number), pcm, f"stream {number} as the same codes in a plain stream")


def end_with_their_number(talk: Talk) -> None:
    """END and ERROR of a numbered stream say its number, what was sent and how many errors there were."""
    voices = _Voices(talk)
    voices.say(5, talk.tokens(talk.frames(4)), json_message(Kind.SETTINGS, {}), END)
    end = voices.until_end_of(5)
    samples = 4 * talk.format.frame_samples
    right = {"stream": 5, "frames": 4, "samples": samples, "cancelled": False, "errors": 1}
    expect({name: end.get(name) for name in right} == right, f"END with {right}", end)
    expect("next_stream" not in end, "an END without next_stream", end)
    (error,) = voices.errors(5)
    expect((error.get("code"), error.get("stream")) == ("out_of_place", 5), "out_of_place in stream 5", error)


def are_never_opened_again(talk: Talk) -> None:
    """A number that is over, or was passed over, is late_stream, once; what may cross an END is dropped in silence."""
    voices = _Voices(talk)
    voices.say(5, talk.tokens(talk.frames(1)), END)
    voices.until_end_of(5)
    for number in (5, 3):
        voices.say(number, Message(Kind.CREDIT, bytes(8)), _CANCEL, END, Message(Kind.MARK, b"m"))
        voices.expect_pong(number)
        voices.expect_errors(number)
        voices.say(number, talk.tokens(talk.frames(1)), talk.tokens(talk.frames(1)))
        voices.expect_pong(number)
        voices.expect_errors(number, "late_stream")


def are_opened_by_input_only(talk: Talk) -> None:
    """CREDIT, END and CANCEL open nothing: they are a no_stream, and the number may still be used."""
    voices = _Voices(talk)
    voices.say(4, Message(Kind.CREDIT, bytes(8)), END, _CANCEL)
    voices.expect_pong(4)
    voices.expect_errors(4, "no_stream", "no_stream", "no_stream")
    voices.say(4, talk.tokens(talk.frames(2)), END)
    expect(voices.until_end_of(4).get("frames") == 2, "END of 2 frames", voices.ends[4])


def are_as_many_as_was_said(talk: Talk) -> None:
    """One more than max_streams is too_many_streams; its number is used and gets no END, and nobody is evicted."""
    voices = _Voices(talk)
    most = voices.max_streams
    for number in range(most + 1):
        voices.say(number, json_message(Kind.SETTINGS, {}))
        voices.expect_pong(number)
        voices.expect_errors(number, *["too_many_streams"] * (number == most))
    voices.say(most, END)
    voices.say(0, talk.tokens(talk.frames(2)), END)
    expect(voices.until_end_of(0).get("frames") == 2, "END of 2 frames in stream 0", voices.ends[0])
    voices.expect_pong(most)
    expect(most not in voices.ends, f"no END of stream {most}, which never opened", voices.ends)


def are_cancelled_alone(talk: Talk) -> None:
    """CANCEL drops its own stream: one END, cancelled, with the samples that were sent. Others go on."""
    voices = _Voices(talk)
    talk.settle(chunk_frames=4)
    frames = talk.frames(6)
    pcm = talk.decode(frames)
    voices.say(1, talk.tokens(talk.frames(2)))
    voices.say(2, talk.tokens(frames[:3]))
    voices.say(1, _CANCEL)
    end = voices.until_end_of(1)
    right = {"stream": 1, "samples": 0, "cancelled": True, "echo": "barge"}
    expect({name: end.get(name) for name in right} == right, f"END with {right}", end)
    voices.say(2, talk.tokens(frames[3:]), END)
    voices.until_end_of(2)
    expect_equal_pcm(voices.pcm(2), pcm, "stream 2 as without a CANCEL in stream 1")


def get_what_was_granted(talk: Talk) -> None:
    """No sample is sent that CREDIT has not granted; more credit brings more, and a smaller one takes none back."""
    voices = _Voices(talk)
    one = talk.format.frame_samples
    first = talk.first_frames * one
    # The most urgent: whatever it owes goes before all but the first chunk of the plain streams beside it.
    voices.say(1, json_message(Kind.SETTINGS, {"window_samples": first, "chunk_frames": None, "urgency": 0}))
    voices.say(1, talk.tokens(talk.frames(talk.first_frames + 3)), END)
    for granted, samples in ((first, first), (first + 2 * one, first + 2 * one), (first + one, first + 2 * one)):
        voices.say(1, Message(Kind.CREDIT, granted.to_bytes(8, "little")))
        voices.expect_no_more_than(1, samples)
    all_of_it = first + 3 * one
    voices.say(1, Message(Kind.CREDIT, all_of_it.to_bytes(8, "little")))
    expect(voices.until_end_of(1).get("samples") == all_of_it, f"END of {all_of_it} samples", voices.ends[1])


def refuse_windows_that_never_move(talk: Talk) -> None:
    """A window below the smallest chunk is a bad_settings, and a bad_payload as first CREDIT."""
    voices = _Voices(talk)
    least = talk.format.frame_samples
    voices.say(1, json_message(Kind.SETTINGS, {"chunk_frames": 2, "window_samples": 2 * least - 1}))
    voices.expect_pong(1)
    voices.expect_errors(1, "bad_settings")
    voices.say(2, json_message(Kind.SETTINGS, {"chunk_frames": 2}))
    voices.say(2, Message(Kind.CREDIT, (2 * least - 1).to_bytes(8, "little")))
    voices.expect_pong(2)
    voices.expect_errors(2, "bad_payload")


def are_bounded_alone(talk: Talk) -> None:
    """Where more than 1 MiB of tokens waits for credit, that stream goes bad with backlog_full, and no other."""
    voices = _Voices(talk)
    first = talk.first_frames * talk.format.frame_samples
    frames = max(1, 30_000 // talk.format.frame_bytes)
    piece = talk.tokens(talk.frames(frames))
    voices.say(1, json_message(Kind.SETTINGS, {"window_samples": first, "chunk_frames": None}))
    voices.say(2, talk.tokens(talk.frames(1)))
    for _ in range((1 << 20) // len(piece.payload) + 2):
        voices.say(1, piece)
    voices.say(1, END)
    voices.until_end_of(1)
    voices.expect_errors(1, "backlog_full")
    voices.say(2, talk.tokens(talk.frames(1)), END)
    expect(voices.until_end_of(2).get("frames") == 2, "END of 2 frames in stream 2", voices.ends[2])


def carry_marks_to_their_samples(talk: Talk) -> None:
    """A MARK comes back with its sample, before the AUDIO that holds it; what stands at the end, before END."""
    voices = _Voices(talk)
    one = talk.format.frame_samples
    frames = talk.frames(3)
    voices.say(1, Message(Kind.MARK, b"begin"), talk.tokens(frames[:2]), Message(Kind.MARK, b"\xff mid"))
    voices.say(1, talk.tokens(frames[2:]), Message(Kind.MARK, b"end"), END)
    voices.until_end_of(1)
    sent, marks = 0, []
    for message in voices.heard[1]:
        if message.kind == Kind.AUDIO:
            sent += len(message.payload) // talk.sample_bytes
        elif message.kind == Kind.MARK:
            sample = int.from_bytes(message.payload[:8], "little")
            expect(sent <= sample, f"the MARK of sample {sample} before its AUDIO", f"behind {sent} samples")
            marks.append((sample, message.payload[8:].hex()))
    right = [(0, b"begin".hex()), (2 * one, b"\xff mid".hex()), (3 * one, b"end".hex())]
    expect(marks == right, f"MARKs {right}", marks)


def have_a_form_of_their_own(talk: Talk) -> None:
    """SETTINGS of a stream change its own form only: channels, numbers and levels."""
    voices = _Voices(talk)
    settings: dict[str, Any] = {"channels": 1, "sample_format": "f32le", "levels_ms": 10}
    voices.say(1, json_message(Kind.SETTINGS, settings), talk.tokens(talk.frames(5)), END)
    end = voices.until_end_of(1)
    samples = 5 * talk.format.frame_samples
    expect(end.get("samples") == samples, f"END of {samples} samples", end)
    said = fields_of(next(message for message in voices.heard[1] if message.kind == Kind.HANDSHAKE))
    expect({name: said.get(name) for name in settings} == settings, f"HANDSHAKE with {settings}", said)
    sent = len(voices.pcm(1))
    expect(sent == samples * _VALUE_BYTES["f32le"], f"{samples} samples of 4 bytes", f"{sent} bytes")
    levels = sum(len(message.payload) // 2 for message in voices.heard[1] if message.kind == Kind.LEVELS)
    windows = next(count for count in range(samples + 1) if count * talk.format.sample_rate // 100 >= samples)
    expect(levels == windows, f"LEVELS of {windows} windows", levels)
    talk.decode(talk.frames(2))  # a plain stream, in the form of the first HANDSHAKE


def have_urgency_from_0_to_7(talk: Talk) -> None:
    """Any other urgency is a bad_settings, and the stream is there all the same."""
    voices = _Voices(talk)
    for wrong in (-1, 8, 1.5, "first", None):
        voices.say(1, json_message(Kind.SETTINGS, {"urgency": wrong}))
    voices.expect_pong(1)
    voices.expect_errors(1, *["bad_settings"] * 5)
    voices.say(1, json_message(Kind.SETTINGS, {"urgency": 0}), talk.tokens(talk.frames(1)), END)
    expect(voices.until_end_of(1).get("frames") == 1, "END of one frame", voices.ends[1])


class _Voices:
    """Talks in numbered streams, and keeps what each was answered."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        most = talk.handshake.get("max_streams")
        if type(most) is not int or most < 1:
            not_applicable("it does not offer numbered streams: its HANDSHAKE has no max_streams")
        self.max_streams: int = most
        self.heard: dict[int, list[Message]] = {}
        self.ends: dict[int, dict[str, Any]] = {}
        self._pongs: set[bytes] = set()
        self._pings = 0

    def say(self, number: int, *messages: Message) -> None:
        self._talk.say(*(in_stream(number, message) for message in messages))

    def until_end_of(self, number: int) -> dict[str, Any]:
        while number not in self.ends:
            self._hear(f"END of stream {number}")
        return self.ends[number]

    def expect_pong(self, number: int) -> None:
        """All that was sent to this stream is dealt with, as far as it waits for nothing."""
        self._pings += 1
        payload = b"ping %d" % self._pings
        self.say(number, Message(Kind.PING, payload))
        while payload not in self._pongs:
            self._hear(f"the echo of a PING in stream {number}")

    def expect_no_more_than(self, number: int, samples: int) -> None:
        """So many samples of a stream come, and while a plain stream takes its turns, no more."""
        wanted_bytes = samples * self._talk.sample_bytes
        while len(self.pcm(number)) < wanted_bytes:
            self._hear(f"{samples} samples of stream {number}, as granted")
        self._talk.decode_beside(self._keep)
        heard = len(self.pcm(number))
        expect(heard == wanted_bytes, f"{samples} samples", f"{heard // self._talk.sample_bytes}")

    def expect_errors(self, number: int, *codes: str) -> None:
        found = [str(error.get("code")) for error in self.errors(number)]
        expect(found == list(codes), f"in stream {number} ERRORs {list(codes)}", found)

    def errors(self, number: int) -> list[dict[str, Any]]:
        return [fields_of(message) for message in self.heard.get(number, []) if message.kind == Kind.ERROR]

    def pcm(self, number: int) -> bytes:
        return b"".join(message.payload for message in self.heard.get(number, []) if message.kind == Kind.AUDIO)

    def _hear(self, expected: str) -> None:
        self._keep(self._talk.next_of_any_stream(expected))

    def _keep(self, message: Message) -> None:
        if not message.kind & NUMBERED:
            expect(message.kind != Kind.ERROR, "answers in numbered streams", describe(message))
            return
        number, inner = out_of_stream(message)
        self.heard.setdefault(number, []).append(inner)
        if inner.kind == Kind.END:
            expect(number not in self.ends, f"one END of stream {number}", describe(inner))
            self.ends[number] = fields_of(inner)
        elif inner.kind == Kind.PING:
            self._pongs.add(inner.payload)
