"""Compares the process with a bare loop over the same graph: what framing, threads, PCM and pipes add to it.

Rules of this room:

- Both sides are processes of their own and take turns, A B A B: a machine that slows down slows both. A figure is the
  median over the turns; a ratio is taken within a turn.
- The bare loop answers each line on its stdin with the seconds that the same frames took it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from mossnano_stdio.protocol import Kind, Message, MessageReader, encode_message, parse_json
from mossnano_stdio.tokens import CodecFormat, Codes, pack_frames
from mossnano_stdio.tools.bench.measured import Measured, ended, measured

LONE_FRAMES: Final = 150
FRAMES_BY_CHUNK: Final = {1: 60, 8: 160}
READ_BYTES: Final = 1 << 18
WIRE_SECONDS: Final = 3.0  # what `measure_wire` was seen to take

_BARE_LOOP: Final = """
import sys, time, json
from pathlib import Path
started = time.perf_counter()
from mossnano_stdio.codecs.engine import import_onnxruntime
import_onnxruntime()
imported = time.perf_counter()
from mossnano_stdio.weights import load_bundle
from mossnano_stdio.codecs import load_runtime
from mossnano_stdio.chunks import Fixed, first_chunk_frames_of, plan
from mossnano_stdio.tools.bench.overhead import some_codes
began = time.perf_counter()
decoder = load_runtime(load_bundle(Path(sys.argv[1])), threads=int(sys.argv[2])).new_decoder()
loaded = time.perf_counter()
codes = some_codes(1, decoder.format)
ready = time.perf_counter()
decoder.step(codes); decoder.reset()
stepped = time.perf_counter()
print(json.dumps({"import_ms": 1000 * (imported - started), "load_ms": 1000 * (loaded - began),
                  "first_step_ms": 1000 * (stepped - ready)}), flush=True)
for line in sys.stdin:
    frames, chunk_frames = map(int, line.split())
    codes = some_codes(frames, decoder.format)
    decoder.reset()
    chunks = plan(frames, Fixed(chunk_frames), first_chunk_frames_of(decoder))
    begin = time.perf_counter()
    for start, count in chunks:
        decoder.step(codes[start : start + count])
    print(time.perf_counter() - begin, flush=True)
"""


def some_codes(frames: int, codec_format: CodecFormat) -> Codes:
    """The same on both sides."""
    random = np.random.default_rng(0)
    return random.integers(0, codec_format.codebook_size, (frames, codec_format.quantizers)).astype(np.uint16)


def measure_process(
    folder: Path, threads: int, turns: int, report: Callable[[str], None], found: dict[str, Any]
) -> None:
    """Measure one weights folder, and put each figure into `found` as it comes."""
    found["threads"] = threads
    report(f"{threads} threads, starts")
    found["start"] = _measure_start(folder, threads, turns)
    report(f"{threads} threads, first audio")
    found["first_audio"] = _measure_first_audio(folder, threads)
    found["overhead"] = {}
    for chunk, frames in FRAMES_BY_CHUNK.items():
        report(f"{threads} threads, chunks of {chunk}")
        found["overhead"][str(chunk)] = _measure_overhead(folder, threads, chunk, frames, turns)
    report("reading and writing messages")
    found["wire"] = measure_wire()


PARTS: Final = 3 + len(FRAMES_BY_CHUNK)  # that `measure_process` reports


def estimated_seconds(folder: Path, threads: int, turns: int) -> float:
    """Estimate from a short trial how long `measure_process` takes."""
    began = time.perf_counter()
    with _bare_loop(folder, threads) as bare:
        start_seconds = time.perf_counter() - began
        step_seconds = {chunk: bare.run(4 * chunk, chunk) / 4 for chunk in (1, *FRAMES_BY_CHUNK)}
    rounds = {chunk: (turns + 1) * frames / chunk for chunk, frames in FRAMES_BY_CHUNK.items()}
    starts = 2 * turns + 2 * (1 + len(FRAMES_BY_CHUNK))
    steps_seconds = LONE_FRAMES * step_seconds[1] + sum(rounds[chunk] * step_seconds[chunk] for chunk in rounds)
    return starts * start_seconds + 2 * steps_seconds + WIRE_SECONDS  # twice: the process, and the bare loop


def measure_wire(turns: int = 5) -> dict[str, Any]:
    """Reading and writing messages, in this process."""
    return {
        "messages_per_second_of_25_bytes": round(_messages_per_second(20, 100_000, turns)),
        "megabytes_per_second_of_64_kib": round(_messages_per_second(65_531, 2_000, turns) * 65_536 / 1e6),
    }


def _messages_per_second(payload_bytes: int, count: int, turns: int) -> float:
    wire = encode_message(Kind.TOKENS, bytes(payload_bytes)) * count
    seconds = []
    for _ in range(turns):
        reader = MessageReader()
        began = time.perf_counter()
        for start in range(0, len(wire), 65_536):
            for message in reader.feed(wire[start : start + 65_536]):
                encode_message(*message)
        seconds.append(time.perf_counter() - began)
    return count / median(seconds)


def _measure_start(folder: Path, threads: int, turns: int) -> dict[str, float]:
    handshake_ms, interpreter_ms, parts = [], [], []
    for _ in range(turns):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        interpreter_ms.append(1000 * (time.perf_counter() - began))
        with _bare_loop(folder, threads) as bare:
            parts.append(bare.facts)
        began = time.perf_counter()
        with _talk(folder, threads, 1):
            handshake_ms.append(1000 * (time.perf_counter() - began))
    figures = {"interpreter_ms": median(interpreter_ms)}
    figures |= {name: median(part[name] for part in parts) for name in ("import_ms", "load_ms", "first_step_ms")}
    figures["handshake_ms"] = median(handshake_ms)
    figures["beyond_these_ms"] = figures["handshake_ms"] - sum(list(figures.values())[:-1])
    return {name: round(value, 1) for name, value in figures.items()}


def _measure_first_audio(folder: Path, threads: int) -> dict[str, float]:
    """From the last byte of a lone frame written to the first byte of its PCM readable."""
    waits_ms, steps_ms = [], []
    with _bare_loop(folder, threads) as bare, _talk(folder, threads, 1) as talk:
        frame = pack_frames(some_codes(1, talk.format), talk.format.codebook_size)
        for _ in range(LONE_FRAMES):
            steps_ms.append(1000 * bare.run(1, 1))
            talk.write(Message(Kind.TOKENS, frame))
            began = time.perf_counter()
            talk.read()
            waits_ms.append(1000 * (time.perf_counter() - began))
            talk.write(Message(Kind.END))
            talk.until(Kind.END)
    return {
        "bare_step_p50_ms": round(float(np.percentile(steps_ms, 50)), 3),
        "bare_step_p95_ms": round(float(np.percentile(steps_ms, 95)), 3),
        "first_byte_p50_ms": round(float(np.percentile(waits_ms, 50)), 3),
        "first_byte_p95_ms": round(float(np.percentile(waits_ms, 95)), 3),
    }


def _measure_overhead(folder: Path, threads: int, chunk_frames: int, frames: int, turns: int) -> dict[str, float]:
    bare_ms, ratios = [], []
    with _bare_loop(folder, threads) as bare, _talk(folder, threads, chunk_frames) as talk:
        wire = pack_frames(some_codes(frames, talk.format), talk.format.codebook_size)
        for turn in range(turns + 1):
            bare_seconds = bare.run(frames, chunk_frames)
            began = time.perf_counter()
            talk.write(Message(Kind.TOKENS, wire), Message(Kind.END))
            talk.until(Kind.END)
            seconds = time.perf_counter() - began
            if turn:  # the first one warms up
                bare_ms.append(1000 * bare_seconds / frames * chunk_frames)
                ratios.append(seconds / bare_seconds)
    return {
        "bare_chunk_ms": round(median(bare_ms), 3),
        "process_over_bare": round(median(ratios), 4),
        "lowest": round(min(ratios), 4),
        "highest": round(max(ratios), 4),
    }


class _BareLoop:
    def __init__(self, process: Measured) -> None:
        self._process = process
        self.facts = process.facts

    def run(self, frames: int, chunk_frames: int) -> float:
        """The seconds that so many frames took."""
        return float(self._process.ask(f"{frames} {chunk_frames}"))


@contextmanager
def _bare_loop(folder: Path, threads: int) -> Iterator[_BareLoop]:
    with measured([sys.executable, "-c", _BARE_LOOP, str(folder), str(threads)], folder) as process:
        yield _BareLoop(process)


class _Talk:
    """A conversation with the process, on bare descriptors: the client should cost as little as it can."""

    def __init__(self, child: subprocess.Popen[bytes], folder: Path) -> None:
        self._folder = folder
        assert child.stdin is not None
        assert child.stdout is not None
        self._stdin_fd, self._stdout_fd = child.stdin.fileno(), child.stdout.fileno()
        self._reader = MessageReader()
        self._messages: list[Message] = []
        facts = parse_json(self.until(Kind.HANDSHAKE))
        self.format = CodecFormat(
            **{name: facts[name] for name in CodecFormat.__dataclass_fields__}  # they are called the same
        )

    def write(self, *messages: Message) -> None:
        left = memoryview(b"".join(encode_message(*message) for message in messages))
        while left:
            left = left[os.write(self._stdin_fd, left) :]

    def read(self) -> None:
        """Wait for the next bytes."""
        data = os.read(self._stdout_fd, READ_BYTES)
        if not data:
            raise ended(self._folder)
        self._messages.extend(self._reader.feed(data))

    def until(self, kind: Kind) -> Message:
        """The next message of this kind; what comes before it is dropped."""
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if message.kind == kind:
                    return message
            self.read()


@contextmanager
def _talk(folder: Path, threads: int, chunk_frames: int) -> Iterator[_Talk]:
    command = [sys.executable, "-m", "mossnano_stdio", "--weights", str(folder)]
    command += ["--threads", str(threads), "--chunk-frames", str(chunk_frames)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True) as child:
        yield _Talk(child, folder)
        assert child.stdin is not None
        child.stdin.close()
        assert child.stdout is not None
        child.stdout.read()
