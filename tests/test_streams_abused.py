"""Numbered streams under readers that stop, and clients that grant nothing, send too much, cancel, or count wrong.

Whatever one stream's client does, the others give the same bytes as in peace, and the process stays as large as it was.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("looks into /proc, and leans on Linux's pipes", allow_module_level=True)

from mossnano_stdio.protocol.messages import Kind, Message, in_stream, json_message, out_of_stream
from tests.child import Child, decoded, double, encoded, fields, go_on, stop
from tests.conftest import repeated
from tests.doubles import NANO, SMALL, artifact_bytes, expected_pcm, some_frames, tokens_payload
from tests.test_process_abused import cpu_seconds, grows_by_less_than, memory_bytes

END = Message(Kind.END)
CANCEL = Message(Kind.CANCEL)
MIB = 1 << 20
LAST_NUMBER = 2**32 - 1


def tokens(frames: list[list[int]]) -> Message:
    return Message(Kind.TOKENS, tokens_payload(frames))


def credit(samples: int) -> Message:
    return Message(Kind.CREDIT, samples.to_bytes(8, "little"))


def window(samples: int) -> Message:
    return json_message(Kind.SETTINGS, {"window_samples": samples})


def of_stream(answers: list[Message], number: int) -> list[Message]:
    """The answers in one numbered stream, as plain ones."""
    pairs = (out_of_stream(answer) for answer in answers if answer.kind & 0x80)
    return [inner for its_number, inner in pairs if its_number == number]


def sound_of(answers: list[Message]) -> bytes:
    return b"".join(answer.payload for answer in answers if answer.kind == Kind.AUDIO)


def ends_of(answers: list[Message]) -> list[dict[str, Any]]:
    return [fields(answer) for answer in answers if answer.kind == Kind.END]


def numbers_of_ends(answers: list[Message]) -> list[int]:
    return [out_of_stream(answer)[0] for answer in answers if answer.kind == Kind.END | 0x80]


def codes_of(answers: list[Message]) -> list[str]:
    return [fields(answer)["code"] for answer in answers if answer.kind == Kind.ERROR]


class Voices:
    """A child, and what it answered, by stream."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.answers: list[Message] = []
        self._ended: set[int] = set()
        child.next()

    def say(self, number: int, *messages: Message) -> None:
        self.child.say(*(in_stream(number, message) for message in messages))

    def until_end_of(self, number: int) -> list[Message]:
        while number not in self._ended:
            self._hear(self.child.next())
        return of_stream(self.answers, number)

    def until_samples_of(self, number: int, samples: int) -> None:
        while len(sound_of(of_stream(self.answers, number))) < samples * SMALL.sample_bytes:
            self._hear(self.child.next())

    def fence(self) -> None:
        """Until all that was sent by now was dealt with, as far as it waits for nothing."""
        self.child.say(Message(Kind.PING, b"fence"))
        while (answer := self.child.next()) != Message(Kind.PING, b"fence"):
            self._hear(answer)

    def _hear(self, answer: Message) -> None:
        self.answers.append(answer)
        self._ended.update(numbers_of_ends([answer]))

    def finish(self) -> int:
        status, rest, _ = self.child.finish()
        self.answers += rest
        return status


@pytest.fixture
def voices() -> Iterator[Voices]:
    with Child(double({}, "--max-streams", "200"), stderr=subprocess.DEVNULL) as child:
        yield Voices(child)


def is_idle(child: Child) -> bool:
    before = cpu_seconds(child.process.pid)
    time.sleep(0.3)
    return cpu_seconds(child.process.pid) - before <= 0.02


# --- a reader that is stopped ------------------------------------------------------------------------------------

COPY = "import os\nwhile data := os.read(0, 4096): os.write(1, data)"


def test_a_reader_that_is_stopped_costs_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """Eight voices, 2.5 MB of sound, and one of them is cancelled while nobody reads."""
    count, frames = 8, 20
    heard = tmp_path / "heard"
    with (
        Child(double({"nano": True}), stderr=subprocess.DEVNULL) as child,
        heard.open("wb") as file,
        subprocess.Popen([sys.executable, "-c", COPY], stdin=child.process.stdout, stdout=file) as reader,
    ):
        assert child.process.stdout is not None
        child.process.stdout.close()
        child.process.stdout = None
        while not heard.stat().st_size:
            time.sleep(0.01)
        stop(reader.pid)
        spoken = {number: some_frames(frames, NANO, seed=number) for number in range(count)}
        for number, its_frames in spoken.items():
            child.say(in_stream(number, tokens(its_frames)), in_stream(number, END))
        time.sleep(0.5)
        with grows_by_less_than(2 * MIB, child):
            child.say(in_stream(3, CANCEL))
            assert is_idle(child)
        go_on(reader.pid)
        assert child.process.stdin is not None
        child.process.stdin.close()
        child.process.stdin = None
        assert child.process.wait(60) == 0
        assert reader.wait(60) == 0
    answers = decoded(heard.read_bytes())
    for number, its_frames in spoken.items():
        mine = of_stream(answers, number)
        (end,) = ends_of(mine)
        pcm, expected = sound_of(mine), expected_pcm(its_frames, NANO)
        assert end["cancelled"] is (number == 3)
        assert pcm == (expected[: len(pcm)] if number == 3 else expected)
        assert end["samples"] * 4 == len(pcm)
        assert mine[-1].kind == Kind.END


# --- credit that never comes -------------------------------------------------------------------------------------


def test_who_gets_no_credit_stops_alone(voices: Voices) -> None:
    frames = {number: some_frames(200, seed=number) for number in range(1, 6)}
    voices.say(1, window(SMALL.frame_samples), tokens(frames[1]), END)
    voices.say(2, tokens(frames[2][:1]), credit(5 * SMALL.frame_samples), tokens(frames[2][1:]), END)
    for number in (3, 4, 5):
        voices.say(number, tokens(frames[number]), END)
    for number in (3, 4, 5):
        assert sound_of(voices.until_end_of(number)) == expected_pcm(frames[number], SMALL)
    voices.until_samples_of(1, SMALL.frame_samples)
    voices.until_samples_of(2, 5 * SMALL.frame_samples)
    voices.fence()
    assert sound_of(of_stream(voices.answers, 1)) == expected_pcm(frames[1][:1], SMALL)
    assert sound_of(of_stream(voices.answers, 2)) == expected_pcm(frames[2][:5], SMALL)
    assert is_idle(voices.child)
    voices.say(2, CANCEL)
    (end,) = ends_of(voices.until_end_of(2))
    assert (end["cancelled"], end["frames"]) == (True, 5)
    assert voices.finish() == 0  # nobody can grant any more, and so all of it comes
    assert sound_of(of_stream(voices.answers, 1)) == expected_pcm(frames[1], SMALL)


def test_credit_in_drops_gives_the_same_sound(voices: Voices) -> None:
    """Less than a frame at a time, sent twice, and smaller ones in between."""
    frames = some_frames(40)
    voices.say(7, window(SMALL.frame_samples), tokens(frames), END)
    for granted in range(SMALL.frame_samples, 40 * SMALL.frame_samples + 1, 3):
        voices.say(7, credit(granted), credit(granted), credit(1))
        voices.fence()
        assert len(sound_of(of_stream(voices.answers, 7))) <= granted * SMALL.sample_bytes
    voices.say(7, credit(40 * SMALL.frame_samples))
    assert sound_of(voices.until_end_of(7)) == expected_pcm(frames, SMALL)


# --- a stream that is flooded ------------------------------------------------------------------------------------

FLOODS = {
    "tokens": tokens(some_frames(2000)),
    "marks": Message(Kind.MARK, b"m" * 1000),
    "pings": Message(Kind.PING, b"p" * 1000),
    "errors": Message(Kind.ERROR, b"e" * 1000),
    "handshakes": Message(Kind.HANDSHAKE, b'{"x":"' + b"h" * 1000 + b'"}'),
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_flooded_stream_goes_bad_and_nobody_else_notices(what: str, voices: Voices) -> None:
    """16 MiB into a stream that is granted one frame, while another one speaks."""
    flood, frames = FLOODS[what], some_frames(64, seed=5)
    voices.say(1, window(SMALL.frame_samples), tokens(some_frames(3)))
    voices.say(2, tokens(frames[:1]))
    voices.until_samples_of(1, SMALL.frame_samples)
    burst = encoded(*[in_stream(1, flood)] * (MIB // len(flood.payload)))
    with grows_by_less_than(8 * MIB, voices.child):
        for turn in range(16):
            voices.child.write(burst)
            voices.say(2, tokens(frames[1 + turn * 3 : 4 + turn * 3]))
            voices.fence()
    voices.say(2, tokens(frames[49:]), END)
    assert sound_of(voices.until_end_of(2)) == expected_pcm(frames, SMALL)
    assert codes_of(of_stream(voices.answers, 1)).count("backlog_full") == 1
    voices.say(1, END)
    (end,) = ends_of(voices.until_end_of(1))
    assert (end["frames"], end["cancelled"]) == (1, False)
    assert voices.finish() == 0


def test_a_flood_of_marks_in_a_plain_stream_ends_it(voices: Voices) -> None:
    """None of them waits for sound, so nothing but their number bounds them."""
    burst = encoded(*[Message(Kind.MARK, b"m" * 1000)] * 1000)
    with grows_by_less_than(8 * MIB, voices.child):
        for _ in range(16):
            voices.child.write(burst)
        voices.fence()
    assert codes_of(voices.answers) == ["backlog_full"]
    frames = some_frames(5)
    voices.child.say(END, tokens(frames), END)
    answers = voices.child.until(Kind.END) + voices.child.until(Kind.END)
    assert sound_of(answers) == expected_pcm(frames, SMALL)


def test_artifacts_that_are_never_whole_are_bounded_together(voices: Voices) -> None:
    """20 MiB in each of three streams, where 32 MiB are allowed in all; whoever cancels makes room."""
    frames = 20 * MIB * 8 // 40
    header = artifact_bytes(some_frames(1), SMALL)[:24] + frames.to_bytes(4, "little")
    header = header[:16] + (4).to_bytes(4, "little") + header[20:] + (1000).to_bytes(4, "little")
    pieces = [Message(Kind.ARTIFACT, header), *[Message(Kind.ARTIFACT, bytes(MIB - 100))] * 19]
    with grows_by_less_than(48 * MIB, voices.child):
        for number in (1, 2, 3):
            voices.say(number, *pieces)
        voices.fence()
    assert [codes_of(of_stream(voices.answers, number)) for number in (1, 2, 3)] == [
        [],
        ["backlog_full"],
        ["backlog_full"],
    ]
    voices.say(1, CANCEL)
    voices.say(4, *pieces)
    voices.fence()
    assert codes_of(of_stream(voices.answers, 4)) == []


def test_handshakes_of_streams_that_never_open_take_no_memory(voices: Voices) -> None:
    """What does not fit is remembered, but not what was said."""
    with grows_by_less_than(16 * MIB, voices.child):
        for number in range(64):
            voices.say(number, json_message(Kind.HANDSHAKE, {"sample_rate": "x" * (MIB - 100)}))
            voices.fence()
    assert codes_of([out_of_stream(answer)[1] for answer in voices.answers]) == ["handshake_mismatch"] * 64
    voices.say(70, tokens(some_frames(2)), END)
    assert sound_of(voices.until_end_of(70)) == expected_pcm(some_frames(2), SMALL)


def test_more_streams_than_there_may_be() -> None:
    with Child(double({}, "--max-streams", "4"), stderr=subprocess.DEVNULL) as child:
        few = Voices(child)
        frames = {number: some_frames(9, seed=number) for number in range(1000)}
        with grows_by_less_than(2 * MIB, child):
            for number, its_frames in frames.items():
                few.say(number, tokens(its_frames))
                if number % 50 == 49:
                    few.fence()  # or we would both wait for who writes
        assert codes_of([out_of_stream(answer)[1] for answer in few.answers]) == ["too_many_streams"] * 996
        for number in range(4):
            few.say(number, END)
            assert sound_of(few.until_end_of(number)) == expected_pcm(frames[number], SMALL)
        few.say(1000, tokens(frames[0]), END)
        assert sound_of(few.until_end_of(1000)) == expected_pcm(frames[0], SMALL)


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_an_error_of_a_numbered_stream_is_logged_and_stops_where_any_does(on_error: str) -> None:
    with Child(double({}, "--on-error", on_error), stderr=subprocess.PIPE) as child:
        voices = Voices(child)
        voices.say(1, tokens(some_frames(2)), Message(Kind.TOKENS, b"x"), END)
        status, answers, log = child.finish()
    codes = [fields(inner)["code"] for inner in of_stream(answers, 1) if inner.kind == Kind.ERROR]
    assert (status, codes) == ((65, ["bad_tokens"]) if on_error == "stop" else (0, ["bad_tokens"]))
    assert log.count("error: 1 bytes are no whole number of frames") == 1
    assert (len(numbers_of_ends(answers)) == 0) == (on_error == "stop")


# --- cancels -----------------------------------------------------------------------------------------------------


@repeated(few=1500, many=100_000)
def test_a_storm_of_cancels(times: int, voices: Voices) -> None:
    """Sixteen streams at once, each cancelled somewhere or ended, and replaced by the next."""
    chance = random.Random(times)
    frames = some_frames(12, seed=1)
    expected = expected_pcm(frames, SMALL)
    cancelled: dict[int, bool] = {}
    open_numbers: list[int] = []
    kept: list[Message] = []  # what was heard of streams that are open
    sizes = []
    for number in range(times):
        wire = [in_stream(number, tokens(frames[:5]))]
        open_numbers.append(number)
        if len(open_numbers) == 16:
            over = open_numbers.pop(chance.randrange(16))
            cancelled[over] = chance.random() < 0.7
            if chance.random() < 0.5 or not cancelled[over]:
                wire.append(in_stream(over, tokens(frames[5:])))
            wire += [in_stream(over, CANCEL if cancelled[over] else END)]
            wire += [in_stream(over, CANCEL)] * (cancelled[over] and chance.random() < 0.3)  # the second one is late
        voices.child.say(*wire)
        if number % 100 == 99:
            voices.fence()
            sizes.append(memory_bytes(voices.child.process.pid))
            heard, voices.answers = [*kept, *voices.answers], []
            while set(cancelled) - set(numbers_of_ends(heard)):
                heard.append(voices.child.next())
            for over, was_cancelled in cancelled.items():
                mine = of_stream(heard, over)
                (end,) = ends_of(mine)
                pcm = sound_of(mine)
                assert end["cancelled"] is was_cancelled
                assert pcm == (expected[: len(pcm)] if was_cancelled else expected)
                assert end["samples"] * SMALL.sample_bytes == len(pcm)
                assert mine[-1].kind == Kind.END
                assert codes_of(mine) == []
            cancelled.clear()
            kept = [answer for answer in heard if out_of_stream(answer)[0] in open_numbers]
    # A stream that stays is some kB. What is allocated and freed in two threads scatters: up to 46 bytes a stream.
    assert max(sizes[2:]) - min(sizes[2:]) < MIB + 64 * times


@repeated(few=300, many=10_000)
def test_a_cancel_at_any_moment_of_an_ending(times: int, voices: Voices) -> None:
    """Before, behind and after its END: there is one END, and nothing follows it."""
    frames = some_frames(9)
    expected = expected_pcm(frames, SMALL)
    for number in range(times):
        voices.say(number, tokens(frames), END)
        if number % 3:
            voices.fence() if number % 3 == 1 else voices.until_end_of(number)
        voices.say(number, CANCEL)
        if number % 20 == 19:
            voices.fence()
    for number in range(times):
        mine = of_stream(voices.answers, number)
        (end,) = ends_of(mine)
        assert mine[-1].kind == Kind.END
        assert sound_of(mine) == expected[: end["samples"] * SMALL.sample_bytes]
        assert end["cancelled"] or end["frames"] == 9


# --- numbers -----------------------------------------------------------------------------------------------------


def test_numbers_that_are_used_again_or_go_down(voices: Voices) -> None:
    """Said once for each number, and nobody is disturbed, whatever is sent to it."""
    frames = some_frames(6)
    everything = [tokens(frames), json_message(Kind.SETTINGS, {}), Message(Kind.MARK, b"m"), credit(1000), CANCEL, END]
    everything.append(Message(Kind.ARTIFACT, artifact_bytes(frames, SMALL)))
    voices.say(10, tokens(frames[:2]))
    voices.say(20, tokens(frames), END)
    voices.until_end_of(20)
    voices.answers.clear()
    for _ in range(50):
        for number in (0, 9, 11, 19, 20):
            voices.say(number, *everything)
    voices.fence()
    for number in (0, 9, 11, 19, 20):
        mine = of_stream(voices.answers, number)
        assert codes_of(mine) == ["late_stream"]
        assert [answer.kind for answer in mine] == [Kind.ERROR]
        assert fields(mine[0])["stream"] == number
    voices.say(10, tokens(frames[2:]), END)
    assert sound_of(voices.until_end_of(10)) == expected_pcm(frames, SMALL)[-4 * SMALL.frame_pcm_bytes :]
    voices.say(21, tokens(frames), END)
    assert sound_of(voices.until_end_of(21)) == expected_pcm(frames, SMALL)


def test_the_last_number_of_all(voices: Voices) -> None:
    """It is a number as any other; behind it there is none, and only plain streams are left."""
    frames = some_frames(6)
    voices.say(LAST_NUMBER - 1, tokens(frames), END)
    voices.say(LAST_NUMBER, tokens(frames[:3]))
    for number in (0, 1, LAST_NUMBER - 2):
        voices.say(number, tokens(frames), END)
    voices.say(LAST_NUMBER, tokens(frames[3:]), END)
    voices.until_end_of(LAST_NUMBER - 1)
    mine = voices.until_end_of(LAST_NUMBER)
    assert sound_of(mine) == expected_pcm(frames, SMALL)
    assert ends_of(mine)[0]["stream"] == LAST_NUMBER
    voices.say(LAST_NUMBER, tokens(frames), Message(Kind.PING, b"still"))
    voices.fence()
    assert sound_of(of_stream(voices.answers, LAST_NUMBER - 1)) == expected_pcm(frames, SMALL)
    for number in (0, 1, LAST_NUMBER - 2):
        assert codes_of(of_stream(voices.answers, number)) == ["late_stream"]
    assert codes_of(of_stream(voices.answers, LAST_NUMBER)) == ["late_stream"]
    assert of_stream(voices.answers, LAST_NUMBER)[-1] == Message(Kind.PING, b"still")
    voices.child.say(tokens(frames), END)
    assert sound_of(voices.child.until(Kind.END)) == expected_pcm(frames, SMALL)


# --- what the model found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\\ud800", "x" * 1001])
def test_marks_that_no_mark_holds_are_bad_settings(text: str, voices: Voices) -> None:
    voices.say(1, Message(Kind.SETTINGS, b'{"marks":[[0,"%s"]]}' % text.encode()))
    voices.fence()
    assert codes_of(of_stream(voices.answers, 1)) == ["bad_settings"]


def test_a_stream_goes_by_the_settings_that_were_sent_before_it(voices: Voices) -> None:
    """Whatever waits: here the plain stream's last chunk, and more SETTINGS behind the stream."""
    voices.child.say(tokens(some_frames(500)), END, json_message(Kind.SETTINGS, {"chunk_frames": 3}))
    voices.say(1, json_message(Kind.SETTINGS, {}), CANCEL)
    voices.child.say(tokens(some_frames(500)), END, json_message(Kind.SETTINGS, {"chunk_frames": 5}))
    voices.say(2, json_message(Kind.SETTINGS, {}), CANCEL)
    said = []
    for number in (1, 2):
        mine = voices.until_end_of(number)
        said += [fields(answer)["chunk_frames"] for answer in mine if answer.kind == Kind.HANDSHAKE]
    assert said == [3, 5]


def test_settings_that_a_granted_window_does_not_hold_are_refused(voices: Voices) -> None:
    frames = some_frames(8)
    settings = json_message(Kind.SETTINGS, {"chunk_frames": 4})
    voices.say(1, json_message(Kind.SETTINGS, {}), credit(3 * SMALL.frame_samples), settings, tokens(frames), END)
    voices.until_samples_of(1, 3 * SMALL.frame_samples)
    assert codes_of(of_stream(voices.answers, 1)) == ["bad_settings"]
    assert sound_of(of_stream(voices.answers, 1)) == expected_pcm(frames[:3], SMALL)
    voices.say(1, credit(8 * SMALL.frame_samples))
    assert sound_of(voices.until_end_of(1)) == expected_pcm(frames, SMALL)
