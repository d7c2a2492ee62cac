"""A fuzzer for what reads bytes of strangers: artifacts, `.ecdc`, messages, and the session
behind them.

    python -m tests.fuzz_readers artifact --executions 10000000
    python -m tests.fuzz_readers protocol --executions 10000000
    python -m tests.fuzz_readers session --executions 1000000
    python -m tests.fuzz_readers ecdc --executions 10000000
    python -m tests.fuzz_readers segments --executions 1000000
    python -m tests.fuzz_readers artifact --engine atheris --executions 10000000

`mutate` needs nothing but this file: it changes what it has by bits, bytes, numbers and lengths, and keeps what gives
an answer of a kind not seen before. `atheris` (pip install atheris) is led by coverage and writes what it finds worth
keeping into the corpus. Both start from tests/corpus/TARGET, which test_fuzz.py replays with every run of the tests.

An execution reads its input whole and again in pieces. It fails when anything but an answer or the documented error
comes out, when the two differ, or when what was read does not write back as it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.chunks import Ramp
from mossnano_stdio.errors import ArtifactError, ProtocolError
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DECODE, DECODE_SEGMENTS
from mossnano_stdio.protocol.messages import Kind, Message, MessageReader, encode_message
from mossnano_stdio.tokens import SAMPLE_BYTES, ArtifactReader, CodecFormat, Codes, build_artifact
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcReader, EcdcSegment, build_ecdc
from tests.doubles import SMALL, CountingDecoder, advance, close, handle

CORPUS = Path(__file__).parent / "corpus"
LONGEST_ARTIFACT_BYTES = 1000  # small limits, so that all of them are reached often
LONGEST_MESSAGE_BYTES = 300
LONGEST_INPUT_BYTES = 1200
LONGEST_SESSION_BYTES = 400  # each byte may be a frame, and frames are decoded here
EDGES = (
    0, 1, 2, 3, 7, 8, 15, 16, 17, 255, 256, 1023, 1024, 1025, 3840, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32 - 1,
)  # fmt: skip
FAMILIAR = (
    b"MOSSNANO",
    b"MOSS",
    b"ECDC",
    bytes(4),
    b"\xff\xff\xff\xff",
    b"\x01\0\0\0\x07",
    b'{"quantizers":2}',
    b"RIFF",
)


# --- targets: each says in a few words what became of its input -------------------------------------------------------


def read_artifact(data: bytes) -> str:
    whole = _artifact_in(data, len(data) or 1)
    assert _artifact_in(data, 1 + data[0] % 40 if data else 1) == whole, "another split, another answer"
    return whole


def _artifact_in(data: bytes, piece_bytes: int) -> str:
    reader = ArtifactReader(LONGEST_ARTIFACT_BYTES)
    try:
        for start in range(0, len(data), piece_bytes):
            missing_bytes = reader.push(data[start : start + piece_bytes])
            assert missing_bytes == reader.missing_bytes >= 0
        artifact = reader.artifact()
    except ArtifactError as error:
        assert "\n" not in str(error)
        return str(error)
    assert build_artifact(artifact) == data, "what was read does not write back"
    return f"{artifact.quantizers} x {artifact.frames} of {artifact.codebook_size}"


def read_ecdc(data: bytes) -> str:
    whole = _ecdc_in(data, len(data) or 1)
    assert _ecdc_in(data, 1 + data[0] % 40 if data else 1) == whole, "another split, another answer"
    return whole


def _ecdc_in(data: bytes, piece_bytes: int) -> str:
    reader = EcdcReader(LONGEST_ARTIFACT_BYTES)
    segments: list[EcdcSegment] = []
    try:
        for start in range(0, len(data), piece_bytes):
            segments += reader.push(data[start : start + piece_bytes])
        header = reader.finish()
    except ArtifactError as error:
        assert "\n" not in str(error)
        return str(error)
    written = build_ecdc(Ecdc(header, segments))
    metadata_bytes = [int.from_bytes(file[5:9], "big") for file in (data, written)]
    bodies = [file[9 + size :] for file, size in zip((data, written), metadata_bytes, strict=True)]
    assert bodies[0] == bodies[1], "what was read does not write back"  # metadata may be spaced otherwise
    return f"{header.model_name}: {header.quantizers} x {header.frames}"


def read_protocol(data: bytes) -> str:
    whole = _messages_in(data, len(data) or 1)
    assert _messages_in(data, 1 + data[-1] % 40 if data else 1) == whole, "another split, another answer"
    messages, words = whole
    written = b"".join(encode_message(*message) for message in messages)
    assert data.startswith(written), "what was read does not write back"
    return words


def _messages_in(data: bytes, piece_bytes: int) -> tuple[list[Message], str]:
    reader = MessageReader(LONGEST_MESSAGE_BYTES)
    messages: list[Message] = []
    try:
        for start in range(0, len(data), piece_bytes):
            messages += reader.feed(data[start : start + piece_bytes])
    except ProtocolError as error:
        assert "\n" not in str(error)
        return messages, str(error)
    read_bytes = sum(5 + len(message.payload) for message in messages)
    assert read_bytes + reader.incomplete_bytes == len(data), "bytes were lost"
    return messages, f"{len(messages)} messages, {reader.incomplete_bytes} bytes"


def read_session(data: bytes) -> str:
    """Whatever is said to a session, it answers with messages, and ends what it opened, once.

    Said slowly, each message is dealt with before the next one comes. Said at once, a CANCEL is known of while what
    stands before it is dealt with.
    """
    messages, _ = _messages_in(data[:LONGEST_SESSION_BYTES], LONGEST_SESSION_BYTES)
    slowly = _answers_to(messages, at_once=False)
    opened = [end["stream"] for end in _ends(slowly) if end["stream"] is not None]
    assert opened == list(range(len(opened))), "each stream is answered by one END"
    at_once = _answers_to(messages, at_once=True)
    numbers = [end["stream"] for end in _ends(at_once) if end["stream"] is not None]
    assert numbers == sorted(set(numbers)), "no stream is answered twice"
    if any(message.kind == Kind.CANCEL for message in messages):
        last_cancel = max(at for at, answer in enumerate(at_once) if _is_cancelled(answer))
        assert Kind.AUDIO not in [answer.kind for answer in at_once[:last_cancel]], "what is cancelled is not decoded"
        last_cancel_slowly = max(at for at, answer in enumerate(slowly) if _is_cancelled(answer))
        if _settings_in(at_once) == _settings_in(slowly):  # else a bad stream took them in, or did not
            behind, behind_slowly = at_once[last_cancel + 1 :], slowly[last_cancel_slowly + 1 :]
            assert _sound_in(behind) == _sound_in(behind_slowly), "a CANCEL leaves no trace"
    else:
        assert at_once == slowly
    kinds = [Kind(answer.kind).name for answer in slowly]
    errors = [str(answer.payload[:40]) for answer in slowly if answer.kind == Kind.ERROR]
    return " ".join([*dict.fromkeys(kinds), *dict.fromkeys(errors)])


def _answers_to(messages: list[Message], *, at_once: bool) -> list[Message]:
    cancels = sum(message.kind == Kind.CANCEL for message in messages) if at_once else 0
    session = Connection(DECODE, lambda: CountingDecoder(), Ramp(), {"protocol": 1}, cancel_waiting=lambda: cancels > 0)
    answers: list[Message] = []
    for message in messages:
        cancels -= at_once and message.kind == Kind.CANCEL
        answers += handle(session, message)
        while session.due_lanes():
            answers += advance(session)
    answers += close(session)
    assert session.plain.stream is None, "a stream was left open"
    audio_bytes = sum(len(answer.payload) for answer in answers if answer.kind == Kind.AUDIO)
    said_samples = sum(end["samples"] for end in _ends(answers))
    assert audio_bytes == said_samples * SMALL.channels * SAMPLE_BYTES, "the ENDs say what was sent"
    return answers


class SegmentDouble:
    """Sound that says which codes made it, as quickly as may be."""

    format = CodecFormat(48_000, 2, 320, 16, 1024)
    decodes_prefix = True
    segment_stride = 47_520
    first_chunk_frames = segment_frames = 150

    def decode_segment(self, codes: Codes, scale: float) -> NDArray[np.float32]:
        audio = np.zeros((len(codes), 320, 2), np.float32)
        audio[:, 0, 0] = codes.sum(axis=1) / 40_000
        return audio.reshape(-1, 2) * np.float32(min(abs(scale), 1))

    def reset(self) -> None:
        """It remembers nothing."""


def read_segments(data: bytes) -> str:
    """An `.ecdc` in ARTIFACT messages, split in two ways, then a whole one: the same sound, and each has its END."""
    if not data.startswith(b"E"):
        return "no .ecdc"
    whole = _sound_of_segments(data, len(data))
    assert _sound_of_segments(data, 1 + data[-1] % 200) == whole, "another split, another answer"
    return f"{len(whole[0])} bytes, {whole[1]}"


def _sound_of_segments(data: bytes, piece_bytes: int) -> tuple[bytes, list[Any]]:
    session = Connection(DECODE_SEGMENTS, SegmentDouble, Ramp(), {"protocol": 1})
    pieces = [data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes)]
    messages = [*(Message(Kind.ARTIFACT, piece) for piece in pieces), Message(Kind.END)]
    answers: list[Message] = []
    for message in messages:
        answers += handle(session, message)
        while session.due_lanes():
            answers += advance(session)
    answers += close(session)
    said_samples = sum(end["samples"] for end in _ends(answers))
    sounds = [answer for answer in answers if answer.kind == Kind.AUDIO]
    assert sum(len(answer.payload) for answer in sounds) == said_samples * SegmentDouble.format.sample_bytes
    errors = [json.loads(answer.payload)["message"] for answer in answers if answer.kind == Kind.ERROR]
    assert not any("\n" in error for error in errors)
    # Bytes behind a whole file are beyond its end, or in a message of their own begin another.
    first_end = next((at for at, answer in enumerate(answers) if answer.kind == Kind.END), len(answers))
    sound = b"".join(answer.payload for answer in answers[:first_end] if answer.kind == Kind.AUDIO)
    before_end = [json.loads(answer.payload)["message"] for answer in answers[:first_end] if answer.kind == Kind.ERROR]
    return sound, [error for error in before_end if "beyond" not in error][:1]


def _ends(answers: list[Message]) -> list[dict[str, Any]]:
    return [json.loads(answer.payload) for answer in answers if answer.kind == Kind.END]


def _settings_in(answers: list[Message]) -> list[Message]:
    return [answer for answer in answers if answer.kind == Kind.HANDSHAKE]


def _sound_in(answers: list[Message]) -> list[Message]:
    return [answer for answer in answers if answer.kind == Kind.AUDIO]


def _is_cancelled(answer: Message) -> bool:
    return answer.kind == Kind.END and json.loads(answer.payload)["cancelled"]


TARGETS: dict[str, Callable[[bytes], str]] = {
    "artifact": read_artifact,
    "ecdc": read_ecdc,
    "protocol": read_protocol,
    "session": read_session,
    "segments": read_segments,
}


# --- mutation ---------------------------------------------------------------------------------------------------------


def corpus_of(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to four changes."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        chance.choice(MUTATIONS)(changed, others, chance)
    return bytes(changed[:LONGEST_INPUT_BYTES])


Mutation = Callable[[bytearray, list[bytes], random.Random], None]


def _place(data: bytearray, chance: random.Random) -> int:
    return chance.randrange(len(data) + 1)


def _flip_bit(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set_byte(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def _set_number(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    """A u32, more often than not where an artifact's header has one."""
    place = 8 + 4 * chance.randrange(6) if chance.random() < 0.7 else _place(data, chance)
    data[place : place + 4] = struct.pack("<I", chance.choice(EDGES))


def _step_number(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    place = 8 + 4 * chance.randrange(6)
    if len(data) >= place + 4:
        (number,) = struct.unpack_from("<I", data, place)
        struct.pack_into("<I", data, place, (number + chance.choice((-1, 1))) % 2**32)


def _cut(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _take_out(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    place = _place(data, chance)
    del data[place : place + chance.randrange(1, 20)]


def _put_in(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    place = _place(data, chance)
    data[place:place] = chance.choice(FAMILIAR) if chance.random() < 0.5 else chance.randbytes(chance.randrange(1, 20))


def _splice(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    other = chance.choice(others)
    data[_place(data, chance) :] = other[chance.randrange(len(other) + 1) :]


def _append(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    data += chance.choice(others)


def _mend_body(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    """Give an artifact the body that its header claims, so that what lies behind the header is reached too."""
    if len(data) >= 32:
        quantizers, frames, codebook_size = struct.unpack_from("<3I", data, 20)
        body_bytes = (quantizers * frames * (codebook_size - 1).bit_length() + 7) // 8
        if body_bytes < LONGEST_INPUT_BYTES:
            body = (bytes(data[32:]) or b"\0") * (body_bytes // max(1, len(data) - 32) + 1)
            data[32:] = body[:body_bytes]


def _mend_length(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    """Make a message of what lies at some place: a length that fits, and a kind."""
    place = _place(data, chance)
    length = chance.randrange(1, max(2, min(200, len(data) - place)))
    data[place : place + 5] = struct.pack("<IB", length, chance.randrange(11))


MUTATIONS: tuple[Mutation, ...] = (
    _flip_bit, _set_byte, _set_number, _step_number, _cut, _take_out, _put_in, _splice, _append,
    _mend_body, _mend_length,
)  # fmt: skip


def fuzz(target: str, executions: int, seed: int, report: Callable[[str], None] = lambda line: None) -> int:
    """The kinds of answers seen. A failing input is kept in the corpus, and the failure goes on."""
    read, pool, chance = TARGETS[target], corpus_of(target), random.Random(seed)
    seen = {_kind_of(read(data)) for data in pool}
    started = time.monotonic()
    for execution in range(1, executions + 1):
        data = mutated(chance.choice(pool), pool, chance)
        try:
            kind = _kind_of(read(data))
        except BaseException:
            keep(target, data, "failed")
            raise
        if kind not in seen:
            seen.add(kind)
            pool.append(data)
        if execution % 100_000 == 0:
            per_second = execution / (time.monotonic() - started)
            report(f"{target}: {execution:,} executions, {per_second:,.0f} a second, {len(seen)} kinds of answers")
    return len(seen)


def _kind_of(answer: str) -> str:
    """Numbers by their length, bytes not at all: so that what is kept is of another kind, not of another value."""
    answer = re.sub(r"(first bytes are ).*(, allowed is)", r"\1...\2", answer)
    return re.sub(r"\d+", lambda number: "9" * len(number.group()), answer)


def keep(target: str, data: bytes, prefix: str) -> Path:
    path = CORPUS / target / f"{prefix}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- command line -----------------------------------------------------------------------------------------------------


def fuzz_with_atheris(target: str, executions: int, seed: int) -> None:
    atheris = importlib.import_module("atheris")
    for function in _functions_of_ours():
        atheris.instrument_func(function)
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    flags = [f"-runs={executions}", f"-seed={seed + 1}", f"-max_len={LONGEST_INPUT_BYTES}"]
    atheris.Setup([sys.argv[0], *flags, str(CORPUS / target)], lambda data: void(TARGETS[target](data)))
    atheris.Fuzz()


def _functions_of_ours() -> Iterator[FunctionType]:
    """Those that coverage is counted in; all that Python has loaded would take minutes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mossnano_stdio."):
            homes = [vars(module)] + [vars(value) for value in vars(module).values() if isinstance(value, type)]
            for value in [value for home in homes for value in home.values()]:
                if isinstance(value, FunctionType) and value.__module__ == name:
                    yield value


def void(_: object) -> None:
    """libFuzzer wants nothing back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.engine == "atheris":
        fuzz_with_atheris(args.target, args.executions, args.seed)
    else:
        kinds = fuzz(args.target, args.executions, args.seed, report=print)
        print(f"{args.target}: {args.executions:,} executions, {kinds} kinds of answers, no failure")


if __name__ == "__main__":
    main()
