"""process/outputs.py: stdout in its forms, the speaker, and what happens when the speaker is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.errors import DeviceError
from mossnano_stdio.pcm import SoundForm, wav_header
from mossnano_stdio.process.outputs import RawOutput, SeveralOutputs, SpeakerOutput, WavOutput
from mossnano_stdio.protocol.messages import Kind, Message, in_stream, json_message
from tests.child import DEMO, ROOT, decoded, encoded, fields, pcm_of
from tests.doubles import SMALL
from tests.sound import FileDevice, Samples, missing_portaudio

needs_portaudio = pytest.mark.skipif(missing_portaudio() is not None, reason=str(missing_portaudio()))

FORM = SoundForm.of_codec(SMALL)
AUDIO = Message(Kind.AUDIO, b"\1\0\2\0")
END = json_message(Kind.END, {"cancelled": False})
CANCELLED = json_message(Kind.END, {"cancelled": True})
MELODY = ROOT / "mossnano_stdio" / "demo" / "melody.bin"


def inside(samples: Samples) -> Samples:
    """Without the silence at both ends, of which a device may add some."""
    loud = np.flatnonzero(samples.any(axis=1))
    return samples[loud[0] : loud[-1] + 1]


class BytesSink:
    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def rewrite_start(self, data: bytes) -> bool:
        return False


class FakePlayer:
    """Notes what is asked of it; from `lost_at` on its device is gone."""

    def __init__(self, lost_at: int = 1000) -> None:
        self.calls: list[str] = []
        self.pushed: list[bytes] = []
        self.drops: list[bool] = []  # would a push, or the end of a stream, have been broken off?
        self.kept: list[bool] = []  # what had ended before, at each flush
        self._lost_at = lost_at

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def call(*arguments: Any, **more: Any) -> bool:
            if len(self.calls) >= self._lost_at and name != "abort":
                raise DeviceError("the device is gone")
            self.calls.append(name)
            if name == "push":
                self.pushed.append(arguments[0])
            if name == "flush":
                self.kept.append(more["keeps_ended"])
            if name in ("push", "end_stream"):
                self.drops.append(arguments[-1]())
            return True

        return call


def speaker(player: FakePlayer) -> SpeakerOutput:
    return SpeakerOutput(lambda _: player, lambda: False)  # type: ignore[arg-type, return-value]


def test_the_speaker_plays_ends_and_drops_streams_as_they_do() -> None:
    player = FakePlayer()
    output = speaker(player)
    output.put(AUDIO)  # nothing was started: nowhere to play
    output.start(FORM)
    for message in (AUDIO, END, AUDIO, CANCELLED, Message(Kind.PING)):
        output.put(message)
    output.finish()
    output.abort()
    output.abort()
    assert player.calls == ["push", "end_stream", "push", "flush", "finish", "abort"]
    assert player.kept == [False], "plain streams are one voice"


def test_the_speaker_mixes_numbered_streams() -> None:
    player = FakePlayer()
    output = speaker(player)
    output.start(FORM)
    loud = Message(Kind.AUDIO, b"\x10\0\x20\0")
    for message in (
        in_stream(1, AUDIO),  # alone: at once
        in_stream(2, loud),  # waits for the first
        in_stream(1, AUDIO),
        in_stream(3, loud),
        in_stream(3, CANCELLED),  # nothing of it was in the mix, and of the others nothing is dropped
        in_stream(1, END),
        in_stream(2, END),
        in_stream(4, AUDIO),
        in_stream(4, CANCELLED),  # alone again: what the player holds is all of it
    ):
        output.put(message)
    output.finish()
    assert player.pushed == [AUDIO.payload, b"\x11\0\x22\0", AUDIO.payload]
    assert player.calls == ["push", "push", "end_stream", "push", "flush", "finish"]
    assert player.kept == [True]


def test_a_cancel_drops_nothing_of_another_stream_that_is_over_and_still_heard() -> None:
    player = FakePlayer()
    output = speaker(player)
    output.start(FORM)
    for message in (in_stream(1, AUDIO), in_stream(1, END), in_stream(2, CANCELLED), CANCELLED):
        output.put(message)
    assert player.calls == ["push", *["end_stream"] * 3]


def test_a_plain_cancel_that_waits_takes_no_sound_from_numbered_streams() -> None:
    player = FakePlayer()
    output = SpeakerOutput(lambda _: player, lambda: True)  # type: ignore[arg-type, return-value]
    output.start(FORM)
    for message in (AUDIO, END, in_stream(1, AUDIO), in_stream(1, END)):
        output.put(message)
    assert player.drops == [True, True, False, False]


def test_what_waits_in_the_mix_is_played_at_the_end() -> None:
    player = FakePlayer()
    output = speaker(player)
    output.start(FORM)
    for number in (1, 2):
        output.put(in_stream(number, AUDIO))
    output.finish()
    assert player.pushed == [AUDIO.payload, AUDIO.payload]


def test_floats_are_pcm_to_the_speaker_and_a_wav_of_floats() -> None:
    form = SoundForm(FORM.sample_rate, FORM.channels, "f32le")
    half = Message(Kind.AUDIO, np.array([0.5, 2.0], "<f4").tobytes())
    player, sink = FakePlayer(), BytesSink()
    outputs = SeveralOutputs([WavOutput(sink), speaker(player)])
    outputs.start(form)
    outputs.put(half)
    outputs.finish()
    assert player.pushed == [np.array([16384, 32767], "<i2").tobytes()]
    assert sink.written == wav_header(form.sample_rate, form.channels, None, "f32le") + half.payload


def test_a_lost_speaker_takes_nothing_from_stdout_and_shows_at_the_end() -> None:
    sink, player = BytesSink(), FakePlayer(lost_at=1)
    outputs = SeveralOutputs([RawOutput(sink), speaker(player)])
    outputs.start(FORM)
    for _ in range(3):
        outputs.put(AUDIO)
    with pytest.raises(DeviceError, match="gone"):
        outputs.finish()
    assert sink.written == 3 * AUDIO.payload
    assert player.calls == ["push", "abort"]


def test_a_lost_speaker_that_was_all_there_was_is_the_end() -> None:
    outputs = SeveralOutputs([speaker(FakePlayer(lost_at=0))])
    outputs.start(FORM)
    with pytest.raises(DeviceError):
        outputs.put(AUDIO)


def test_no_output_takes_everything() -> None:
    outputs = SeveralOutputs([])
    outputs.start(FORM)
    outputs.put(AUDIO)
    outputs.finish()
    outputs.abort()
    assert not outputs.carries_errors


def test_output_none_decodes_and_says_nothing() -> None:
    with MELODY.open("rb") as stdin:
        done = subprocess.run([*DEMO, "--output", "none"], stdin=stdin, capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b""


@needs_portaudio
@pytest.mark.parametrize("form", ["framed", "none"])
def test_the_process_plays_what_it_writes(form: str, tmp_path: Path) -> None:
    device = FileDevice(tmp_path)
    command = [*DEMO, "--play", "--prebuffer-ms", "all", "--output", form]
    with MELODY.open("rb") as stdin:
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, cwd=ROOT, env=device.environment, check=True, timeout=60
        )
    expected = subprocess.run([*DEMO, "--output", "raw"], input=MELODY.read_bytes(), capture_output=True, cwd=ROOT)
    samples = np.frombuffer(expected.stdout, "<i2").reshape(-1, 2)
    assert np.array_equal(inside(device.played()), inside(samples))
    if form == "framed":
        assert pcm_of(decoded(done.stdout)) == expected.stdout


@needs_portaudio
def test_no_such_device_ends_the_process_before_its_handshake(tmp_path: Path) -> None:
    device = FileDevice(tmp_path)
    done = subprocess.run(
        [*DEMO, "--play", "--device", "no such thing"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=ROOT,
        env=device.environment,
        check=False,
    )
    assert done.returncode == 69
    (message,) = decoded(done.stdout)
    assert (fields(message)["code"], fields(message)["fatal"]) == ("no_device", True)


@needs_portaudio
def test_what_is_played_has_one_form_and_numbered_streams_are_mixed(tmp_path: Path) -> None:
    device = FileDevice(tmp_path)
    tokens = Message(
        Kind.TOKENS, b"\x01\x08\x30\x00\x01\x05\x18\x70\x00\x02\x09\x28\xb0\x00\x03\x0d\x38\xf0\x00\x04" * 5
    )
    wire = encoded(
        json_message(Kind.SETTINGS, {"channels": 1}),
        *(in_stream(number, message) for number in (1, 2) for message in (tokens, Message(Kind.END))),
    )
    done = subprocess.run(
        [*DEMO, "--play", "--prebuffer-ms", "all", "--gain-db", "-12"],
        input=wire,
        capture_output=True,
        cwd=ROOT,
        env=device.environment,
        check=True,
        timeout=60,
    )
    answers = decoded(done.stdout)
    (error,) = (answer for answer in answers if answer.kind == Kind.ERROR)
    assert fields(error)["code"] == "bad_settings"
    assert "--play has one form for the whole run" in fields(error)["message"]
    voice = b"".join(answer.payload[4:] for answer in answers if answer.kind == Kind.AUDIO | 0x80)
    one = np.frombuffer(voice[: len(voice) // 2], "<i2").reshape(-1, 2)
    assert len(one) <= len(device.played())  # where in the mix the second begins depends on when it comes
    assert np.abs(device.played()).max() > np.abs(one).max() / 2
