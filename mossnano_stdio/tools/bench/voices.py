"""Many streams over one pipe, against as many processes of one stream each.

Rules of this room:

- Both sides take turns, A B A B, and each turn has processes of its own. One process has all its threads, each of many
  has one, as a game would start them.
- Streams per core come from the CPU time that was used, not from the clock, so other work on the machine counts little.
- Lateness is measured live: each stream gets a frame when it is due, and its sound should come before the next one.
- Then all streams get all their tokens at once, as a fast model makes them, and are played: credit is what a player has
  room for, a sample that is not there in time is counted, and so is how busy the CPUs are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO, Any, Final

import numpy as np

from mossnano_stdio.errors import UsageError
from mossnano_stdio.protocol import (
    NUMBERED,
    Kind,
    Message,
    MessageReader,
    encode_message,
    in_stream,
    json_message,
)
from mossnano_stdio.tokens import SAMPLE_BYTES, CodecFormat, pack_frames
from mossnano_stdio.tools.bench.measured import ended
from mossnano_stdio.tools.bench.overhead import some_codes
from mossnano_stdio.weights import Bundle

BULK_SECONDS: Final = 4.0  # of sound that each stream decodes as fast as it can
LIVE_SECONDS: Final = 3.0
PLAYED_SECONDS: Final = 4.0
PREBUFFER_SECONDS: Final = 0.2
WINDOW_SECONDS: Final = 2.0  # what a player's ring holds: 25 frames of nano
TICK_SECONDS: Final = 0.02  # a sound card asks for so much
READ_BYTES: Final = 1 << 18
SIDES: Final = ("one process", "a process each")


def estimated_seconds(counts: Sequence[int], turns: int, played_seconds: float) -> float:
    """A start takes about a second, and decoding at most as long as it sounds."""
    sounding = 2 * (LIVE_SECONDS + played_seconds)
    return sum(turns * (sounding + 2 * BULK_SECONDS * count / 8 + count + 1) for count in counts)


def measure_voices(
    bundle: Bundle,
    counts: Sequence[int],
    turns: int,
    played_seconds: float,
    report: Callable[[str], None],
    found: dict[str, Any],
) -> None:
    """Measure each number of streams, and put its figures into `found` as they come."""
    if not Path("/proc/self/stat").exists():
        raise UsageError("--streams reads CPU time and memory in /proc, which this system does not have")
    for count in counts:
        report(f"{count} streams")
        figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(turns):
            figures[SIDES[0]].append(_measure(bundle, [range(count)], [], played_seconds))
            groups = [[number] for number in range(count)]
            figures[SIDES[1]].append(_measure(bundle, groups, ["--threads", "1"], played_seconds))
        found[str(count)] = {
            side: {name: round(median(turn[name] for turn in found_turns), 2) for name in found_turns[0]}
            for side, found_turns in figures.items()
        }


def _measure(
    bundle: Bundle, groups: Sequence[Sequence[int]], options: Sequence[str], played_seconds: float
) -> dict[str, float]:
    """One turn. `groups` has the streams of each process."""
    with ExitStack() as stack:
        peers = [stack.enter_context(_Peer(bundle, numbers, options)) for numbers in groups]
        codec = bundle.format
        frames = max(1, round(BULK_SECONDS * codec.frames_per_second))
        began = sum(peer.cpu_seconds() for peer in peers)
        bulk = pack_frames(some_codes(frames, codec), codec.codebook_size)
        for peer in peers:
            peer.say_to_all(0, [Message(Kind.TOKENS, bulk), Message(Kind.END)])
        for peer in peers:
            peer.wait_for_ends()
        used = sum(peer.cpu_seconds() for peer in peers) - began
        streams = sum(map(len, groups))
        memory_bytes = sum(peer.resident_bytes() for peer in peers)
        first_ms, late_ms = _live(peers, codec)
        return {
            "real_time_streams_per_core": streams * frames / codec.frames_per_second / max(used, 0.01),
            "late_p50_ms": float(np.percentile(late_ms, 50)),
            "late_p99_ms": float(np.percentile(late_ms, 99)),
            "first_audio_of_the_last_ms": first_ms,
            "resident_mb": memory_bytes / 1e6,
            **_play(peers, codec, played_seconds),
        }


def _live(peers: Sequence[_Peer], codec: CodecFormat) -> tuple[float, list[float]]:
    """A frame to each stream when it is due; the last stream joins when the others are half through."""
    frame = Message(Kind.TOKENS, pack_frames(some_codes(1, codec), codec.codebook_size))
    frames = max(2, round(LIVE_SECONDS * codec.frames_per_second))
    last = peers[-1]
    began = time.perf_counter()
    for at in range(frames):
        for peer in peers:
            joins = peer is last
            peer.say_frame(frame, skips_last=joins and at < frames // 2)
        time.sleep(max(0.0, began + (at + 1) / codec.frames_per_second - time.perf_counter()))
    for peer in peers:
        peer.say_to_all(1, [Message(Kind.END)])
    for peer in peers:
        peer.wait_for_ends()
    return last.waits_ms[last.last_number][0], [
        wait for peer in peers for waits in peer.waits_ms.values() for wait in waits
    ]


def _play(peers: Sequence[_Peer], codec: CodecFormat, seconds: float) -> dict[str, float]:
    """All streams at once, with their tokens ahead and a player for each."""
    frames = max(1, round(seconds * codec.frames_per_second))
    tokens = Message(Kind.TOKENS, pack_frames(some_codes(frames, codec), codec.codebook_size))
    window_samples = max(codec.frame_samples, round(WINDOW_SECONDS * codec.sample_rate))
    settings = json_message(Kind.SETTINGS, {"window_samples": window_samples})
    players = [
        (peer, number, _Player(codec.sample_rate, frames * codec.frame_samples))
        for peer in peers
        for number in peer.numbers(2)
    ]
    used, began = sum(peer.cpu_seconds() for peer in peers), time.perf_counter()
    for peer in peers:
        peer.say_to_all(2, [settings, tokens, Message(Kind.END)])
    while not all(player.is_done for _, _, player in players):
        for peer, number, player in players:
            player.play(peer.received_samples(number), time.perf_counter())
            granted = Message(Kind.CREDIT, (window_samples + player.played_samples).to_bytes(8, "little"))
            peer.say(number, [granted])
        time.sleep(TICK_SECONDS)
    elapsed = time.perf_counter() - began
    used = sum(peer.cpu_seconds() for peer in peers) - used
    for peer in peers:
        peer.wait_for_ends()
    return {
        "played_busy_cpus": used / elapsed,
        "played_underruns": sum(player.underruns for _, _, player in players),
        "played_silent_ms": 1000 * sum(player.silent_seconds for _, _, player in players),
    }


class _Player:
    """A sound card that plays one stream, and counts what is not there in time."""

    def __init__(self, sample_rate: int, samples: int) -> None:
        self._sample_rate = sample_rate
        self._samples = samples
        self._prebuffer_samples = min(samples, round(PREBUFFER_SECONDS * sample_rate))
        self._maybe_began: float | None = None  # when its first sample would have been played, without silences
        self.played_samples = 0
        self.underruns = 0
        self.silent_seconds = 0.0

    @property
    def is_done(self) -> bool:
        return self.played_samples == self._samples

    def play(self, received_samples: int, seconds: float) -> None:
        if self._maybe_began is None:
            if received_samples >= self._prebuffer_samples:
                self._maybe_began = seconds
            return
        wanted = min(self._samples, round((seconds - self._maybe_began) * self._sample_rate))
        if wanted > received_samples:
            missing_seconds = (wanted - received_samples) / self._sample_rate
            self._maybe_began += missing_seconds
            self.silent_seconds += missing_seconds
            self.underruns += 1
        self.played_samples = max(self.played_samples, min(wanted, received_samples))


class _Peer:
    """A process, the streams that it decodes, and when their sound came."""

    def __init__(self, bundle: Bundle, numbers: Sequence[int], options: Sequence[str]) -> None:
        self._folder = bundle.folder
        self._format = bundle.format
        self._numbers = [*numbers]
        command = [sys.executable, "-m", "mossnano_stdio", "--weights", str(bundle.folder), *options]
        command += ["--max-streams", str(2 * len(numbers))]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True)
        self._reader = MessageReader()
        self._left: set[int] = set()
        self._sent: dict[int, list[float]] = {}
        self.waits_ms: dict[int, list[float]] = {}  # of the live streams, for each frame
        self._received_samples: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._is_over = False

    def __enter__(self) -> _Peer:
        self._read()  # its HANDSHAKE
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    @property
    def last_number(self) -> int:
        return self.numbers(1)[-1]

    def numbers(self, round_number: int) -> list[int]:
        """Of its streams; each round has new ones."""
        return [round_number * (self._numbers[-1] + 1) + number for number in self._numbers]

    def received_samples(self, number: int) -> int:
        if self._is_over:
            raise ended(self._folder)
        return self._received_samples[number]

    def say(self, number: int, messages: Sequence[Message]) -> None:
        self._write([in_stream(number, message) for message in messages])

    def say_to_all(self, round_number: int, messages: Sequence[Message]) -> None:
        with self._changed:
            self._left |= set(self.numbers(round_number))
        for number in self.numbers(round_number):
            self.say(number, messages)

    def say_frame(self, frame: Message, *, skips_last: bool) -> None:
        numbers = self.numbers(1)[: -1 if skips_last else None]
        for number in numbers:
            self._sent.setdefault(number, []).append(time.perf_counter())
        self._write([in_stream(number, frame) for number in numbers])

    def wait_for_ends(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or not self._left)
        if self._is_over:
            raise ended(self._folder)

    def cpu_seconds(self) -> float:
        if sys.platform == "win32":  # `measure_voices` has refused it
            return 0.0
        numbers = Path(f"/proc/{self._child.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return sum(map(int, numbers[11:13])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        if sys.platform == "win32":  # `measure_voices` has refused it
            return 0
        pages = Path(f"/proc/{self._child.pid}/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _write(self, messages: Sequence[Message]) -> None:
        assert self._child.stdin is not None
        left = memoryview(b"".join(encode_message(*message) for message in messages))
        while left:
            left = left[self._child.stdin.write(left) :]

    def _read(self) -> list[Message]:
        stdout: IO[bytes] | None = self._child.stdout
        assert stdout is not None
        messages: list[Message] = []
        while not messages:
            data = stdout.read(READ_BYTES)
            if not data:
                raise ended(self._folder)
            messages = list(self._reader.feed(data))
        return messages

    def _listen(self) -> None:
        try:
            while True:
                messages, now = self._read(), time.perf_counter()
                with self._changed:
                    for message in messages:
                        self._note(message, now)
                    self._changed.notify_all()
        except Exception:  # noqa: BLE001 - whoever waits raises it in its own thread
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _note(self, message: Message, now: float) -> None:
        number = int.from_bytes(message.payload[:4], "little")
        if message.kind == Kind.END | NUMBERED:
            self._left.discard(number)
        elif message.kind == Kind.AUDIO | NUMBERED:
            pcm_bytes = len(message.payload) - 4
            self._received_samples[number] += pcm_bytes // (SAMPLE_BYTES * self._format.channels)
            if number in self._sent:
                waits = self.waits_ms.setdefault(number, [])
                for _ in range(pcm_bytes // self._format.frame_pcm_bytes):
                    waits.append(1000 * (now - self._sent[number][len(waits)]))
