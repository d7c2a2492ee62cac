"""Many voices of one process: the same table of scenarios for each client, with the real process on the demo weights.

A driver in the client's language does what it is told, one line for one: tests/voices has them. What a voice must sound
like is what the process itself says to the same tokens alone, in the same chunks.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from mossnano_stdio.protocol.messages import Kind, encode_message
from tests.child import DEMO, ROOT, run, stop
from tests.doubles import NANO, some_frames, tokens_payload
from tests.gdscript import PackedByteArray, PackedInt32Array, Script
from tests.test_clients import assert_gone, needs

if sys.platform == "win32":
    pytest.skip("processes are stopped and ended here as POSIX does", allow_module_level=True)

DRIVERS = ROOT / "tests" / "voices"
CLIENTS = ROOT / "mossnano_stdio" / "clients"
CHUNKED = [*DEMO, "--chunk-frames", "4"]
CHUNK_SAMPLES = 4 * NANO.frame_samples
PLAIN = (2, 0, 0, 1, 0, 0)  # ring_seconds, prebuffer_ms, fade_ms, gain, mono, priority
FRAMES = 5  # of an utterance: a chunk, and a rest
SAMPLES = FRAMES * NANO.frame_samples
FADE = 240  # samples of 5 ms
READY = 1  # a state of the Godot client


class Driver(Protocol):
    """A client with numbered voices, which does what it is told."""

    max_streams: int
    pid: int

    def ask(self, verb: str, *words: object) -> str: ...

    def stop(self) -> None: ...


class Driven:
    """A program of tests/voices, in a process of its own."""

    def __init__(self, program: Sequence[object], command: Sequence[object]) -> None:
        self._process = subprocess.Popen(
            [*map(str, program), *map(str, command)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.max_streams, self.pid = map(int, self._answer().split())

    def ask(self, verb: str, *words: object) -> str:
        assert self._process.stdin
        print(verb, *words, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().rstrip("\n")

    def stop(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._process.communicate(timeout=60)
        assert self._process.returncode == 0


class GodotDriver:
    """The Godot client, run by tests/gdscript.py: its driver is here, since its language is."""

    def __init__(self, command: Sequence[object]) -> None:
        self._client: Any = Script(CLIENTS / "godot" / "mossnano.gd", ROOT)
        self._voices: dict[int, Any] = {}
        self._marks: dict[int, list[str]] = {}
        self._errors: list[str] = []
        self._client.restart = 1
        self._client.failed.connect(lambda code, *_: self._errors.append(code))
        program, *arguments = map(str, command)
        assert self._client.start(program, arguments)
        until(lambda: self.ask("ready") == "1")
        self.max_streams, self.pid = self._client.max_streams(), self._client.pid

    def stop(self) -> None:
        self._client.stop()

    def ask(self, verb: str, *words: object) -> str:
        self._client.run_deferred()
        answer = getattr(self, f"ask_{verb}")(*words)
        self._client.run_deferred()
        return {True: "1", False: "0"}[answer] if isinstance(answer, bool) else str(answer)

    def ask_open(self, number: int, seconds: float, prebuffer_ms: float, fade_ms: int, gain: float, *rest: int) -> str:
        self._client.fade_ms = fade_ms
        voice = self._client.open(seconds, prebuffer_ms, rest[1])
        if voice is None:
            return str(self._client.engine.pushed_errors[-1])
        voice.gain, voice.mono = gain, bool(rest[0])
        self._marks[number] = []
        voice.marked.connect(lambda text, sample: self._marks[number].append(f"{text}@{sample}"))
        self._voices[number] = voice
        return "opened"

    def _said(self, is_taken: bool) -> bool:
        """What is refused is said: of what is too much, the other clients say so by a code."""
        if not is_taken and re.search("feed less|mark later", "".join(self._client.engine.pushed_errors[-1:])):
            self._client.engine.pushed_errors.clear()
            self._errors.append("queue_full")
        return is_taken

    def ask_feed(self, number: int, path: Path) -> bool:
        return self._said(self._voices[number].feed(PackedByteArray(path.read_bytes())))

    def ask_codes(self, number: int, path: Path) -> bool:
        codes = PackedInt32Array(code for (code,) in struct.iter_unpack("<H", path.read_bytes()))
        return self._said(self._voices[number].feed_codes(codes))

    def ask_mark(self, number: int, text: str) -> bool:
        return self._said(self._voices[number].mark(text))

    def _samples(self, number: int, samples: int) -> tuple[int, list[tuple[int, int]]]:
        """How many are real, and all."""
        before = self._voices[number].played()
        given = [(_as_s16(value.x), _as_s16(value.y)) for value in self._voices[number].pull(samples)]
        return self._voices[number].played() - before, given

    def ask_pull(self, number: int, samples: int) -> str:
        real, given = self._samples(number, samples)
        return " ".join(map(str, [real, *itertools.chain(*given)]))

    def ask_pull_mono(self, number: int, samples: int) -> str:
        real, given = self._samples(number, samples)
        assert all(left == right for left, right in given)
        return " ".join(map(str, [real, *(left for left, _ in given)]))

    def ask_hear(self, folder: Path, *numbers: int) -> str:
        heard = dict.fromkeys(numbers, b"")
        deadline = time.monotonic() + 60
        while any(self._voices[number].is_speaking() for number in numbers):
            assert time.monotonic() < deadline
            for number in numbers:
                real, given = self._samples(number, min(1920, self.ask_waiting(number) or 48))
                heard[number] += b"".join(struct.pack("<2h", *sample) for sample in given[:real])
            time.sleep(0.002)
        for number, pcm in heard.items():
            (folder / f"{number}.pcm").write_bytes(pcm)
        return "heard"

    def ask_gain(self, number: int, gain: float) -> str:
        self._voices[number].gain = float(gain)
        return "set"

    def ask_marks(self, number: int) -> str:
        said, self._marks[number] = self._marks[number], []
        return " ".join(said)

    def ask_close(self, number: int) -> str:
        if maybe_voice := self._voices.pop(number, None):
            maybe_voice.cancel()
        return "closed"

    def ask_waiting(self, number: int) -> int:
        return int(self._voices[number].ring.bytes) // 4

    def ask_finish(self, number: int) -> bool:
        return bool(self._voices[number].finish())

    def ask_cancel(self, number: int) -> int:
        return int(self._voices[number].cancel())

    def ask_played(self, number: int) -> int:
        return int(self._voices[number].played())

    def ask_underruns(self, number: int) -> int:
        return int(self._voices[number].underruns())

    def ask_speaking(self, number: int) -> bool:
        return bool(self._voices[number].is_speaking())

    def ask_reason(self, number: int) -> str:
        return str(self._voices[number].reason)

    def ask_ready(self) -> bool:
        return bool(self._client.state == READY)

    def ask_errors(self) -> str:
        return " ".join([str(len(self._errors)), *self._errors[-1:]])


def _as_s16(value: float) -> int:
    return max(-32768, min(32767, round(value * 32767)))


def build_c(folder: Path) -> list[object]:
    needs("gcc")
    flags = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-pthread", f"-I{CLIENTS / 'c'}"]
    subprocess.run(["gcc", *flags, DRIVERS / "voices.c", "-o", folder / "voices"], check=True)
    return [folder / "voices"]


def build_csharp(folder: Path) -> list[object]:
    needs("mcs", "mono")
    sources = [DRIVERS / "Voices.cs", CLIENTS / "csharp" / "Mossnano.cs"]
    subprocess.run(["mcs", "-warnaserror", "-warn:4", f"-out:{folder / 'voices.exe'}", *sources], check=True)
    return ["mono", "--debug", folder / "voices.exe"]


Program = Callable[[Sequence[object]], Driver]
BUILDERS = {"c": build_c, "csharp": build_csharp}
CLIENT_NAMES = [*BUILDERS, "godot"]


@pytest.fixture(scope="module", params=CLIENT_NAMES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    if request.param == "godot":
        return GodotDriver
    built = BUILDERS[request.param](tmp_path_factory.mktemp("built"))
    return lambda command: Driven(built, command)


@pytest.fixture(scope="module")
def shared(program: Program) -> Iterator[Driver]:
    driver = program(CHUNKED)
    yield driver
    driver.stop()


@pytest.fixture
def driver(shared: Driver) -> Iterator[Driver]:
    """One that does as it should all the time. Which voices a test opened does not matter to the next."""
    errors = shared.ask("errors")
    yield shared
    for voice in range(16):
        shared.ask("close", voice)
    assert shared.ask("errors") == errors


@pytest.fixture
def start(program: Program) -> Iterator[Program]:
    drivers = []

    def start(command: Sequence[object] = CHUNKED) -> Driver:
        drivers.append(program(command))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.stop()


@pytest.fixture(scope="module")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder with tokens and codes of sixteen, and what each sounds like."""
    folder, wire = tmp_path_factory.mktemp("utterances"), b""
    for seed in range(16):
        frames = some_frames(FRAMES, NANO, seed)
        (folder / f"{seed}.tokens").write_bytes(tokens_payload(frames))
        (folder / f"{seed}.codes").write_bytes(struct.pack(f"<{FRAMES * 16}H", *itertools.chain(*frames)))
        wire += encode_message(Kind.TOKENS, tokens_payload(frames)) + encode_message(Kind.END)
    pcm = run([*CHUNKED, "--output", "raw"], wire).stdout
    assert len(pcm) == 16 * SAMPLES * 4
    return folder, [pcm[start : start + SAMPLES * 4] for start in range(0, len(pcm), SAMPLES * 4)]


def left_channel(pcm: bytes) -> list[int]:
    return [left for left, _ in struct.iter_unpack("<2h", pcm)]


def pull(driver: Driver, voice: int, samples: int) -> tuple[int, list[int]]:
    """How many are real, and the left channel of all."""
    real, *values = map(int, driver.ask("pull", voice, samples).split())
    assert len(values) == 2 * samples
    return real, values[::2]


def is_near(values: Sequence[int], expected: Sequence[float]) -> bool:
    """Clipped where it is too loud. C cuts fractions off, Godot has floats."""
    return all(abs(a - max(-32768, min(32767, b))) < 1.5 for a, b in zip(values, expected, strict=True))


def until(condition: Callable[[], object]) -> None:
    for _ in range(15_000):  # half a minute is far more than anything here takes
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("never")


def speak(driver: Driver, voice: int, folder: Path, *, utterance: int | None = None) -> None:
    assert driver.ask("open", voice, *PLAIN) == "opened"
    assert driver.ask("feed", voice, folder / f"{voice if utterance is None else utterance}.tokens") == "1"
    assert driver.ask("finish", voice) == "1"


def until_waiting(driver: Driver, voice: int, samples: int) -> None:
    """Until so many can be pulled."""
    until(lambda: int(driver.ask("waiting", voice)) >= samples)


def test_sixteen_voices_at_once_sound_as_each_alone(
    driver: Driver, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, pcm = utterances
    assert driver.max_streams == 32
    for voice in range(16):
        assert driver.ask("open", voice, 0.5, *PLAIN[1:]) == "opened"
    for voice in range(16):
        assert (
            driver.ask(
                "feed" if voice % 2 else "codes", voice, folder / f"{voice}.{'tokens' if voice % 2 else 'codes'}"
            )
            == "1"
        )
        assert driver.ask("finish", voice) == "1"
        assert driver.ask("feed", voice, folder / "0.tokens") == "0", "it was finished"
    driver.ask("hear", tmp_path, *range(16))
    for voice in range(16):
        assert (tmp_path / f"{voice}.pcm").read_bytes() == pcm[voice], voice
        assert driver.ask("played", voice) == str(SAMPLES)
        assert driver.ask("reason", voice) == ""


def test_a_voice_that_nobody_pulls_stops_no_other(
    driver: Driver, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, pcm = utterances
    window = CHUNK_SAMPLES + 1000  # a chunk fits, and a second one does not
    assert driver.ask("open", 0, window / NANO.sample_rate, *PLAIN[1:]) == "opened"
    for _ in range(3):
        assert driver.ask("feed", 0, folder / "0.tokens") == "1"
    assert driver.ask("finish", 0) == "1"
    until_waiting(driver, 0, CHUNK_SAMPLES)
    for voice in (1, 2):
        speak(driver, voice, folder)
    driver.ask("hear", tmp_path, 1, 2)
    assert [(tmp_path / f"{voice}.pcm").read_bytes() for voice in (1, 2)] == pcm[1:3]
    assert driver.ask("waiting", 0) == str(CHUNK_SAMPLES), "no more than was granted"
    driver.ask("hear", tmp_path, 0)
    heard = (tmp_path / "0.pcm").read_bytes()
    assert len(heard) == 3 * len(pcm[0])
    assert heard.startswith(pcm[0][: 4 * CHUNK_SAMPLES])


def test_marks_come_in_order_when_their_sample_was_pulled(driver: Driver, utterances: tuple[Path, list[bytes]]) -> None:
    folder, _ = utterances
    assert driver.ask("open", 0, *PLAIN) == "opened"
    for text in ("first", "grün"):
        assert driver.ask("mark", 0, text) == "1"
    assert driver.ask("feed", 0, folder / "0.tokens") == "1"
    assert driver.ask("mark", 0, "middle") == "1"
    assert driver.ask("feed", 0, folder / "1.tokens") == "1"
    assert driver.ask("mark", 0, "last") == "1"
    assert driver.ask("finish", 0) == "1"
    assert driver.ask("mark", 0, "late") == "0"
    until_waiting(driver, 0, 2 * SAMPLES)
    assert driver.ask("marks", 0).split() == [], "nothing was pulled"
    for samples, marks in (
        (1, ["first@0", "grün@0"]),
        (SAMPLES // 5 * 2 - 1, []),
        (SAMPLES // 5 * 3, []),
        (1, [f"middle@{SAMPLES}"]),
        (SAMPLES // 5 * 3, []),
        (SAMPLES // 5 * 2 - 2, []),
        (1, [f"last@{2 * SAMPLES}"]),
    ):
        for piece in [4000] * (samples // 4000) + [samples % 4000]:
            pull(driver, 0, piece)
        assert driver.ask("marks", 0).split() == marks
    assert driver.ask("played", 0) == str(2 * SAMPLES)
    assert driver.ask("speaking", 0) == "0"


def test_cancel_silences_one_voice_and_says_how_much_was_heard(
    driver: Driver, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, pcm = utterances
    assert driver.ask("open", 0, 2, 0, 5, 1, 0, 0) == "opened"
    assert driver.ask("mark", 0, "heard") == "1"
    for part in (0, 1, 2):
        assert driver.ask("feed", 0, folder / f"{part}.tokens") == "1"
        assert driver.ask("mark", 0, "not") == "1"
    speak(driver, 1, folder)
    until_waiting(driver, 0, 3 * CHUNK_SAMPLES)
    sound = left_channel(pcm[0])
    real, before = pull(driver, 0, 3000)
    assert (real, before) == (3000, sound[:3000])
    assert driver.ask("cancel", 0) == "3000"
    real, after = pull(driver, 0, 1000)
    assert real == 0
    assert driver.ask("speaking", 0) == "0"
    fade = [value * (FADE - 1 - at) / FADE for at, value in enumerate(sound[3000 : 3000 + FADE])]
    assert is_near(after, fade + [0] * (1000 - FADE))
    assert after[FADE - 1 :] == [0] * (1001 - FADE)
    assert driver.ask("played", 0) == "3000"
    assert driver.ask("marks", 0).split() == ["heard@0"]
    assert driver.ask("feed", 0, folder / "0.tokens") == "0"
    driver.ask("hear", tmp_path, 1)
    assert (tmp_path / "1.pcm").read_bytes() == pcm[1]


def test_a_voice_that_is_cancelled_before_it_left_was_never_there(
    start: Program, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    """And of many that are opened, cancelled and closed, none stays."""
    folder, pcm = utterances
    driver = start([*CHUNKED, "--max-streams", "2"])
    assert driver.max_streams == 2
    stop(driver.pid)
    for _ in range(1000):
        assert driver.ask("open", 0, 0.1, *PLAIN[1:]) == "opened"
        assert driver.ask("feed", 0, folder / "0.tokens") == "1"
        assert driver.ask("cancel", 0) == "0"
        assert driver.ask("close", 0) == "closed"
    os.kill(driver.pid, signal.SIGCONT)
    for _ in range(50):
        speak(driver, 0, folder)
        assert driver.ask("close", 0) == "closed"
    speak(driver, 1, folder)
    driver.ask("hear", tmp_path, 1)
    assert (tmp_path / "1.pcm").read_bytes() == pcm[1]
    assert driver.ask("errors").split()[0] == "0"


def test_a_process_that_is_killed_ends_every_voice_and_the_next_one_speaks(
    start: Program, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, pcm = utterances
    driver = start(CHUNKED)
    for voice in range(3):
        assert driver.ask("open", voice, *PLAIN) == "opened"
        assert driver.ask("feed", voice, folder / f"{voice}.tokens") == "1"
        until_waiting(driver, voice, CHUNK_SAMPLES)
    os.kill(driver.pid, signal.SIGKILL)
    until(lambda: all("process_ended" in driver.ask("reason", voice) for voice in range(3)))
    driver.ask("hear", tmp_path, 0, 1, 2)
    for voice in range(3):
        assert (tmp_path / f"{voice}.pcm").read_bytes() == pcm[voice][: 4 * CHUNK_SAMPLES], "what came is heard"
        assert driver.ask("feed", voice, folder / "0.tokens") == "0"
        assert driver.ask("mark", voice, "late") == "0"
        assert driver.ask("finish", voice) == "0"
    until(lambda: driver.ask("ready") == "1")
    speak(driver, 3, folder)
    driver.ask("hear", tmp_path, 3)
    assert (tmp_path / "3.pcm").read_bytes() == pcm[3]
    assert re.match("1 process_ended", driver.ask("errors"))


def test_an_end_that_a_fatal_error_brings_is_no_end(
    start: Program, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    """It says how much was sent, which is less than all."""
    long = tmp_path / "long.tokens"
    long.write_bytes((utterances[0] / "0.tokens").read_bytes() * 4)
    driver = start([*CHUNKED, "--max-message-bytes", "300"])  # one message with all of it is more
    assert driver.ask("open", 0, *PLAIN) == "opened"
    assert driver.ask("feed", 0, long) == "1"
    until(lambda: driver.ask("reason", 0) != "" or driver.ask("speaking", 0) == "0")
    assert "framing_lost" in driver.ask("reason", 0)


def test_a_ring_holds_at_least_what_a_resampler_keeps_until_the_end(
    start: Program, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    driver = start([*DEMO, "--sample-rate", "11025"])
    assert driver.ask("open", 0, 0.001, *PLAIN[1:]) == "opened"
    assert driver.ask("feed", 0, utterances[0] / "0.tokens") == "1"
    assert driver.ask("finish", 0) == "1"
    driver.ask("hear", tmp_path, 0)
    assert driver.ask("reason", 0) == ""
    assert len((tmp_path / "0.pcm").read_bytes()) == 4 * round(SAMPLES * 11025 / NANO.sample_rate)


def test_gain_and_mono_are_the_voices_own(driver: Driver, utterances: tuple[Path, list[bytes]]) -> None:
    folder, pcm = utterances
    assert driver.ask("open", 0, 2, 0, 0, 0.5, 0, 0) == "opened"
    assert driver.ask("open", 1, 2, 0, 0, 1, 1, 0) == "opened"
    for voice in (0, 1):
        assert driver.ask("feed", voice, folder / "0.tokens") == "1"
        until_waiting(driver, voice, CHUNK_SAMPLES)
    sound = left_channel(pcm[0])
    right = [right for _, right in struct.iter_unpack("<2h", pcm[0])]
    _, half = pull(driver, 0, 1000)
    assert is_near(half, [value / 2 for value in sound[:1000]])
    assert driver.ask("gain", 0, 100) == "set"
    _, rising = pull(driver, 0, 1000)
    expected = [value * (0.5 + 99.5 * (at + 1) / 1000) for at, value in enumerate(sound[1000:2000])]
    assert is_near(rising, expected)
    _, loud = pull(driver, 0, 1000)
    assert is_near(loud, [100 * value for value in sound[2000:3000]])
    assert min(loud) == -32768
    assert max(loud) == 32767
    real, *mono = map(int, driver.ask("pull_mono", 1, 1000).split())
    assert real == 1000
    assert is_near(mono, [(a + b) / 2 for a, b in zip(sound[:1000], right[:1000], strict=True)])
    assert mono != sound[:1000]


def test_a_process_that_takes_no_numbered_streams_is_told_apart(start: Program) -> None:
    driver = start([*DEMO, "--max-streams", "0"])
    assert driver.max_streams == 0
    assert "max_streams" in driver.ask("open", 0, *PLAIN)
    driver = start([sys.executable, ROOT / "tests" / "steady.py"])  # as version 1 was before
    assert "max_streams" in driver.ask("open", 0, *PLAIN)


def test_one_voice_too_many_is_told_so_and_the_next_one_is_not(
    start: Program, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, pcm = utterances
    driver = start([*CHUNKED, "--max-streams", "2"])
    for voice in range(3):
        assert driver.ask("open", voice, *PLAIN) == "opened"
    until(lambda: driver.ask("reason", 2).endswith("(too_many_streams)"))
    assert driver.ask("speaking", 2) == "0"
    assert driver.ask("cancel", 1) == "0"
    speak(driver, 3, folder)
    driver.ask("hear", tmp_path, 3)
    assert (tmp_path / "3.pcm").read_bytes() == pcm[3]
    assert driver.ask("errors") == "1 too_many_streams"


def test_what_waits_in_a_voice_is_bounded(start: Program, utterances: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    (tmp_path / "many.tokens").write_bytes(bytes(10_000 * 20))
    driver = start(CHUNKED)
    stop(driver.pid)
    for voice in (0, 1):
        assert driver.ask("open", voice, *PLAIN) == "opened"
    assert [driver.ask("feed", 0, tmp_path / "many.tokens") for _ in range(4)] == ["1", "1", "1", "0"]
    assert driver.ask("errors") == "1 queue_full"
    assert driver.ask("feed", 1, tmp_path / "many.tokens") == "1", "the other one has a bound of its own"
    assert [driver.ask("mark", 0, "x" * 1000) for _ in range(129)] == ["1"] * 128 + ["0"]
    assert driver.ask("errors") == "2 queue_full"
    assert driver.ask("mark", 1, "x" * 1001) == "0"
    os.kill(driver.pid, signal.SIGCONT)
    until_waiting(driver, 0, CHUNK_SAMPLES)
    assert driver.ask("reason", 0) == "", "it is not too much for the process either"
    assert driver.ask("errors") == "2 queue_full"


def test_a_prebuffer_larger_than_the_ring_fills_all_the_same(
    driver: Driver, utterances: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    folder, _ = utterances
    assert driver.ask("open", 0, 0.01, 350, 0, 1, 0, 0) == "opened"
    assert driver.ask("feed", 0, folder / "0.tokens") == "1"
    assert driver.ask("feed", 0, folder / "0.tokens") == "1"
    until_waiting(driver, 0, CHUNK_SAMPLES)
    assert pull(driver, 0, 480)[0] in (0, 480)
    assert driver.ask("finish", 0) == "1"
    driver.ask("hear", tmp_path, 0)
    assert int(driver.ask("played", 0)) == 2 * SAMPLES
    assert driver.ask("open", 1, 2, -1, 0, 1, 0, 0) != "opened"
    assert driver.ask("open", 1, 2, 0, 0, 1, 0, 9) != "opened"


def test_stop_ends_the_process_and_all_voices(start: Program, utterances: tuple[Path, list[bytes]]) -> None:
    folder, _ = utterances
    driver = start(CHUNKED)
    for voice in range(16):
        assert driver.ask("open", voice, *PLAIN) == "opened"
        assert driver.ask("feed", voice, folder / f"{voice}.tokens") == "1"
    driver.stop()
    assert_gone(driver.pid)
