"""A connection with many streams against the model of streams_model.py, step by step, in random interleavings."""

from __future__ import annotations

import json
import random
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest

from mossnano_stdio.chunks import Ramp
from mossnano_stdio.protocol.connection import Connection, Turn
from mossnano_stdio.protocol.decoding import DECODE
from mossnano_stdio.protocol.messages import NUMBERED, Kind, Message, in_stream, out_of_stream
from tests import streams_model as model
from tests.child import Child
from tests.model_process import DoubleOfTheModel
from tests.streams_model import Answer, Model

MAX_STREAMS = 6
VOICES = 8
MESSAGES = 20  # of one interleaving
INTERLEAVINGS_A_CONNECTION = 25


# --- what is said ------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"chunk_frames": 3},
    {"chunk_frames": None},
    {"quantizers": 1},
    {"quantizers": 2},
    {"channels": 1},
    {"channels": 2, "sample_format": "f32le"},
    {"sample_format": "s16le", "gain_db": 20},
    {"gain_db": 0, "levels_ms": 10},
    {"levels_ms": 0, "urgency": 0},
    {"window_samples": 100},
    {"window_samples": 20},
    {"window_samples": None},
    {"window_samples": 19},
    {"chunk_frames": 2, "window_samples": 40},
    {"urgency": 8},
    {"volume": 1},
    {"channels": 3, "quantizers": 1},
]
KINDS = {
    model.TOKENS: 36,
    model.MARK: 8,
    model.END: 8,
    model.CREDIT: 10,
    model.PING: 6,
    model.CANCEL: 5,
    model.SETTINGS: 9,
    model.ARTIFACT: 8,
    model.HANDSHAKE: 3,
    model.ERROR: 1,
    0x42: 1,
}


class Peer:
    """Says random things, most of which make sense."""

    def __init__(self, seed: int, *, is_anything: bool = True) -> None:
        """Without `is_anything` it says nothing whose moment cannot be told from the answers."""
        self._random = random.Random(seed)
        self._is_anything = is_anything
        self._base = self._random.choice([0, 1, 1000, 2**32 - 400])
        self._kinds = list(KINDS)
        self._weights = list(KINDS.values())
        self._rest_of_artifacts: dict[int | None, bytes] = {}

    def begin_interleaving(self) -> None:
        self._base = min(self._base + self._random.randint(0, VOICES), 2**32 - VOICES)

    def message(self) -> Message:
        chance = self._random.random
        number: int | None = self._base + int(chance() * VOICES)
        if chance() < 0.15:
            number = None
        elif chance() < 0.05:
            number = max(0, self._base - self._random.randint(1, 20))
        kind = self._random.choices(self._kinds, self._weights)[0]
        if number is None and kind == model.CANCEL and not self._is_anything:
            kind = model.PING  # a process looks ahead for a plain CANCEL
        rest = self._rest_of_artifacts.pop(number, b"")
        if rest and chance() < 0.7:
            kind, payload = model.ARTIFACT, rest
        else:
            payload = self._payload(kind, number)
        if number is None:
            return Message(kind, payload)
        if chance() < 0.005:
            return Message(kind | NUMBERED, payload[:3])
        return Message(kind | NUMBERED, struct.pack("<I", number) + payload)

    def _payload(self, kind: int, number: int | None) -> bytes:
        choose, chance = self._random.choice, self._random.random
        match kind:
            case model.TOKENS:
                return self._codes(model.QUANTIZERS * choose([0, 1, 1, 2, 3, 5, 9]))
            case model.MARK:
                return b"m" * (choose([0, 1, 5, 1000]) if chance() < 0.95 else 1001)
            case model.CREDIT:
                samples = choose([0, 19, 20, 60, 100, 200, 400, 1000])
                return struct.pack("<Q", samples) if chance() < 0.95 else b"four"
            case model.SETTINGS if chance() < 0.2:
                frames = sorted(choose(range(9)) for _ in range(3))
                return json.dumps({"marks": [[frame, f"s{at}"] for at, frame in enumerate(frames)]}).encode()
            case model.SETTINGS:
                return json.dumps(choose(SETTINGS)).encode() if chance() < 0.95 else b"{"
            case model.ARTIFACT:
                data = self._artifact()
                cut = len(data) if chance() < 0.5 else self._random.randint(0, len(data))
                self._rest_of_artifacts[number] = data[cut:]
                return data[:cut]
            case model.HANDSHAKE:
                fields: dict[str, Any] = choose([{}, {"sample_rate": model.RATE}, {"channels": 5}, {"quantizers": 1}])
                return json.dumps(fields).encode() if chance() < 0.9 else b"["
            case model.END:
                return choose([b"", b"", b'{"stream":null}', b"no JSON"])
            case _:
                return choose([b"", b"a", "\N{SNOWMAN}".encode()])

    def _codes(self, count: int) -> bytes:
        chance = self._random.random()
        codes = bytearray(self._random.choices(range(198), k=count))
        if chance < 0.08 and count:
            codes[self._random.randrange(count)] = self._random.choice([model.FAILING, model.NOT_FINITE, 200, 255])
        elif chance < 0.10:
            codes.append(1)
        return bytes(codes)

    def _artifact(self) -> bytes:
        frames, quantizers = self._random.randint(0, 6), self._random.choice([2, 2, 2, 1])
        least_samples = 0 if self._is_anything or not frames else (frames - 1) * model.FRAME_SAMPLES + 1
        samples = self._random.randint(least_samples, frames * model.FRAME_SAMPLES)
        chance = self._random.random()
        rate = model.RATE if chance > 0.05 else 8000
        samples += 1000 if 0.05 < chance < 0.1 else 0
        header = b"MOSSNANO" if not 0.1 < chance < 0.15 else b"MOSSNANA"
        numbers = (rate, model.CHANNELS, samples, quantizers, frames, model.CODEBOOK)
        return header + struct.pack("<6I", *numbers) + self._codes(frames * quantizers)

    # --- what is computed next -----------------------------------------------------------------------

    def wants_chunk(self) -> bool:
        return self._random.random() < 0.4

    def turn(self, due: dict[int | None, int], is_fixed: dict[int | None, bool]) -> tuple[int | None, int]:
        number = self._random.choice(list(due))
        if is_fixed[number]:
            return number, due[number]
        return number, self._random.choice([due[number], self._random.randint(1, due[number])])


# --- both sides --------------------------------------------------------------------------------------


class DifferenceError(AssertionError):
    """What was said and answered up to it is its text."""


class Comparison:
    """One connection and one model, which must say and want the same."""

    def __init__(self, seed: int) -> None:
        self._peer = Peer(seed)
        self._seed = seed
        self._waiting_cancels = 0
        self._model = Model(MAX_STREAMS)
        self._connection = Connection(
            DECODE,
            DoubleOfTheModel,
            Ramp(),
            {},
            max_streams=MAX_STREAMS,
            cancel_waiting=lambda: self._waiting_cancels > 0,
            on_handled=self._note_handled,
        )
        self._told: list[str] = []

    def run(self, interleavings: int) -> None:
        for _ in range(interleavings):
            self._peer.begin_interleaving()
            left = MESSAGES
            while left:
                if self._peer.wants_chunk() and (due := self._model.due()):
                    self._advance(due)
                else:
                    self._receive(self._peer.message())
                    left -= 1
            del self._told[:-200]
        self._same("end of input", self._connection.end_input(), self._model.end_input())
        while due := self._model.due():
            self._advance(due)
        self._same("close", self._connection.close(), self._model.close())

    def _note_handled(self, message: Message) -> None:
        self._waiting_cancels -= message.kind == Kind.CANCEL

    def _receive(self, message: Message) -> None:
        self._waiting_cancels += message.kind == Kind.CANCEL
        said = f"{message.kind:#04x} {message.payload!r}"
        self._same(said, self._connection.receive(message), self._model.receive(*message))

    def _advance(self, due: dict[int | None, int]) -> None:
        lanes = {lane.maybe_number: lane for lane in self._connection.due_lanes()}
        fixed = {
            number: bool(lane.stream and lane.stream.settings.schedule.maybe_chunk_frames)
            for number, lane in lanes.items()
        }
        number, frames = self._peer.turn(due, fixed)
        answers = self._connection.advance([Turn(lanes[number], frames)])
        self._same(f"{frames} frames of {number}", answers, self._model.advance(number, frames))

    def _same(self, said: str, answers: Iterable[Message], expected: list[Answer]) -> None:
        self._told.append(said)
        try:
            found = [as_answer(answer) for answer in answers]
            self._told += [f"    {str(answer)[:200]}" for answer in found]
            if found != expected:
                check_alike(found, expected)
            due = {
                lane.maybe_number: lane.stream.allowed_frames for lane in self._connection.due_lanes() if lane.stream
            }
            assert due == self._model.due(), f"due are {due}, in the model {self._model.due()}"
        except Exception as error:
            told = "\n".join(self._told)
            raise DifferenceError(f"seed {self._seed}:\n{told}\n{type(error).__name__}: {error}") from error


def as_answer(message: Message) -> Answer:
    """A message as the model has it."""
    number: int | None = None
    if message.kind & NUMBERED:
        number, message = out_of_stream(message)
    kind, payload = message
    match kind:
        case Kind.AUDIO:
            return number, "AUDIO", payload
        case Kind.LEVELS:
            return number, "LEVELS", list(struct.unpack(f"<{len(payload) // 2}H", payload))
        case Kind.MARK:
            return number, "MARK", int.from_bytes(payload[:8], "little"), payload[8:].decode()
        case Kind.PING:
            return number, "PING", payload
        case _:
            fields = json.loads(payload)
    match kind:
        case Kind.ERROR:
            return number, "ERROR", fields["code"], fields["stream"], fields["fatal"]
        case Kind.HANDSHAKE:
            names = [*vars(model.Settings()), "max_streams", "sample_rate"]
            return number, "HANDSHAKE", {name: fields[name] for name in names}
        case _:
            return number, Kind(kind).name, fields


def check_alike(found: list[Answer], expected: list[Answer]) -> None:
    """PCM is compared as numbers, and levels may be rounded the other way."""
    names = [answer[:2] for answer in found]
    if names != [answer[:2] for answer in expected]:
        raise AssertionError("the model says\n" + "\n".join(f"    {str(answer)[:200]}" for answer in expected))
    for answer, right in zip(found, expected, strict=True):
        match answer[1]:
            case "AUDIO":
                _, _, sample_format, values = right
                if sample_format == "s16le":
                    heard = list(struct.unpack(f"<{len(answer[2]) // 2}h", answer[2]))
                else:
                    heard = [round(32767 * value) for value in struct.unpack(f"<{len(answer[2]) // 4}f", answer[2])]
                assert heard == values
            case "LEVELS":
                assert len(answer[2]) == len(right[2])
                assert all(abs(a - b) <= 1 for a, b in zip(answer[2], right[2], strict=True)), right
            case _:
                assert answer == right, f"the model says {right}"


def compare(seeds: Iterable[int]) -> int:
    """The number of interleavings that were alike."""
    count = 0
    for seed in seeds:
        Comparison(seed).run(INTERLEAVINGS_A_CONNECTION)
        count += INTERLEAVINGS_A_CONNECTION
    return count


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_some_thousands_of_interleavings(start: int) -> None:
    assert compare(range(start, start + 20)) == 500


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 40_000, 1000))
def test_a_million_interleavings(start: int) -> None:
    assert compare(range(start, start + 1000)) == 25_000


# --- the real process ----------------------------------------------------------------------------------------

QUIET_SECONDS = 0.1  # whoever says nothing for so long has computed all that was due
FENCE = 0  # a stream that is over: its PINGs are echoed at once, and so tell when they were read


class Replay:
    """What a process was sent and what it answered, against a model that computes when the process did."""

    def __init__(self, sent: list[Message], answers: list[Answer]) -> None:
        self._sent = sent
        self._answers = answers

    def run(self) -> None:
        """Nothing tells when a process learned of the end of its input: some moment must be right."""
        turns_before_end = 0
        while not self._is_right(turns_before_end):
            turns_before_end += 1

    def _is_right(self, turns_before_end: int) -> bool:
        self._at = 0
        self._model = Model(MAX_STREAMS)
        for message in self._sent:
            self._compute()
            self._check(f"{message.kind:#04x} {message.payload!r}", self._model.receive(*message))
        if self._compute(turns_before_end) < turns_before_end:
            raise AssertionError("no end of the input fits")
        try:
            self._check("the end of input", self._model.end_input())
            self._compute()
            self._check("the last words", self._model.close())
            if self._at != len(self._answers):
                raise DifferenceError(f"the model is at its end; {self._answers[self._at :]}")
        except DifferenceError:
            return False
        return True

    def _compute(self, most_turns: int = 1 << 30) -> int:
        """Takes the turns that come next, and returns how many there were."""
        turns = 0
        while turns < most_turns and (maybe_turn := self._maybe_turn()) is not None:
            self._check(f"{maybe_turn[1]} frames of {maybe_turn[0]}", self._model.advance(*maybe_turn))
            turns += 1
        return turns

    def _maybe_turn(self) -> tuple[int | None, int] | None:
        """Which stream computed how many frames, where what comes next tells that."""
        due = self._model.due()
        rest = self._answers[self._at : self._at + 40]
        if not rest or rest[0][0] not in due:
            return None
        number = rest[0][0]
        if rest[0][1:3] == ("ERROR", "decode_failed"):
            return number, due[number]
        for answer in rest:
            if answer[0] != number or answer[1] not in ("AUDIO", "LEVELS", "MARK", "ERROR"):
                return None
            if answer[1] == "ERROR" and answer[2] != "not_finite":
                return None
            if answer[1] == "AUDIO":
                lane = self._model.plain if number is None else self._model.numbered[number]
                assert lane.stream is not None
                settings = lane.stream.settings
                sample_bytes = settings.channels * (2 if settings.sample_format == "s16le" else 4)
                frames = -(-len(answer[2]) // sample_bytes // model.FRAME_SAMPLES)
                is_fixed = settings.chunk_frames is not None
                return (number, frames) if frames == due[number] or (frames < due[number] and not is_fixed) else None
        return None

    def _check(self, what: str, expected: list[Answer]) -> None:
        found = self._answers[self._at : self._at + len(expected)]
        self._at += len(expected)
        try:
            check_alike(found, expected)
        except AssertionError as error:
            before = "\n".join(f"    {str(answer)[:200]}" for answer in self._answers[: self._at][-30:])
            raise DifferenceError(f"{what}:\n{before}\n{error}") from error


def compare_process(seed: int, interleavings: int) -> None:
    peer, chance = Peer(seed, is_anything=False), random.Random(seed)
    sent = [in_stream(FENCE, Message(Kind.TOKENS)), in_stream(FENCE, Message(Kind.END))]
    for _ in range(interleavings):
        peer.begin_interleaving()
        for _ in range(MESSAGES):
            sent.append(peer.message())
            sent.append(in_stream(FENCE, Message(Kind.PING, b"%d" % len(sent))))
    command = [sys.executable, "-m", "tests.model_process", "--max-streams", str(MAX_STREAMS)]
    with Child(command, stderr=subprocess.DEVNULL) as child:

        def write() -> None:
            left = sent
            while left:
                count = chance.choice([1, 2, 3, 5, 8, 20])
                child.say(*left[:count])
                left = left[count:]
                if chance.random() < 0.5:
                    time.sleep(0.0005)

        writer = threading.Thread(target=write)
        writer.start()
        answers = [child.next()]
        while answers[-1] != sent[-1]:
            answers.append(child.next())
        writer.join()
        while child.has_read or select.select([child.stdout_fd], [], [], QUIET_SECONDS)[0]:
            answers.append(child.next())
        _, rest, _ = child.finish()
    assert answers.pop(0).kind == Kind.HANDSHAKE
    try:
        Replay(sent, [as_answer(message) for message in [*answers, *rest]]).run()
    except AssertionError as error:
        raise DifferenceError(f"seed {seed}: {error}") from error


@pytest.mark.skipif(sys.platform == "win32", reason="pipes cannot be waited for there")
@pytest.mark.parametrize("seed", range(2))
def test_some_tens_of_interleavings_in_the_process(seed: int) -> None:
    compare_process(seed, 20)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 200, 10))
def test_ten_thousand_interleavings_in_the_process(start: int) -> None:
    for seed in range(start, start + 10):
        compare_process(seed, 50)


# --- the comparison itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spoiled"),
    [
        ("_late", lambda self, lane, kind: None),
        ("_grant", lambda self, lane, payload: None),
        ("_mark", lambda self, lane, payload: None),
        ("_defaults_wait", lambda self, told: False),
        ("_drop", lambda self, stream: None),
    ],
)
def test_another_rule_is_noticed(name: str, spoiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, name, spoiled)
    with pytest.raises(DifferenceError, match=r"seed \d+:"):
        compare(range(40))
