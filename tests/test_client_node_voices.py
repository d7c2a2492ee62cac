"""Voices of the Node client: many at once over one process, each with its own ring, as it would be alone."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.protocol.messages import Kind, encode_message
from tests.child import DEMO, double, run
from tests.doubles import NANO, SMALL, expected_pcm, some_frames, tokens_payload
from tests.test_client_node import STEADY, play

VOICES = 16
CHUNKED = [*DEMO, "--chunk-frames", "4"]  # equal chunks give equal PCM
FRAME_SAMPLES = NANO.frame_samples

VOICES_PRELUDE = """
import { createHash } from "node:crypto";
const frames = (number) => readFileSync(`${folder}/${number}.tokens`);
const sha256 = (pieces) => createHash("sha256").update(Buffer.concat(pieces)).digest("hex");
/** Pulls from all in turn until none speaks, as one callback for each would; what each has said. */
async function pullAll(voices, count = 441) {
  const heard = voices.map(() => []);
  while (voices.some((voice) => voice.isSpeaking)) {
    let sound = 0;
    voices.forEach((voice, at) => {
      const pcm = new Int16Array(count * voice.format.channels);
      const samples = voice.pullInto(pcm);
      heard[at].push(Buffer.from(pcm.buffer, 0, samples * 2 * voice.format.channels));
      sound += samples;
    });
    if (!sound) await sleep(1);
  }
  return heard;
}
"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder with the frames of each voice, and the PCM that the process makes of each alone."""
    folder, pcm = tmp_path_factory.mktemp("voices"), []
    wire = b""
    lengths = [20 + 3 * number for number in range(VOICES)]
    for number, length in enumerate(lengths):
        packed = tokens_payload(some_frames(length, NANO, seed=number))
        (folder / f"{number}.tokens").write_bytes(packed)
        wire += encode_message(Kind.TOKENS, packed) + encode_message(Kind.END)
    sound = run([*CHUNKED, "--output", "raw"], wire).stdout
    for length in lengths:
        pcm.append(sound[: length * NANO.frame_pcm_bytes])
        sound = sound[length * NANO.frame_pcm_bytes :]
    assert not sound
    return folder, pcm


def speak(folder: Path, script: str, command: Any = CHUNKED) -> list[Any]:
    return play(f"const folder = {json.dumps(str(folder))};\n{VOICES_PRELUDE}{script}", command)


def digest(pcm: bytes) -> str:
    return hashlib.sha256(pcm).hexdigest()


def test_sixteen_voices_at_once_each_byte_for_byte_as_it_is_alone(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const voices = Array.from({ length: 16 }, () => first.openVoice({ fadeMs: 0 }));
        const packed = voices.map((_, number) => frames(number));
        const step = 7 * first.format.frame_bytes;
        for (let from = 0; from < 2000; from += step) { // some frames of each in turn
          voices.forEach((voice, number) => {
            const piece = packed[number].subarray(from, from + step);
            if (piece.length) voice.feed(piece);
          });
        }
        for (const voice of voices) voice.finish();
        say("heard", (await pullAll(voices)).map(sha256));
        say("played", voices.map(({ played, stream }) => [stream, played.stream, played.samples]));
        const again = first.feed(frames(3)); // and the process is a voice of its own
        first.finish();
        say("itself", (await pullAll([first])).map(sha256));
        await first.stop();
        """,
    )
    assert said == [
        ["heard", [digest(each) for each in pcm]],
        ["played", [[0, 0, len(each) // 4] for each in pcm]],
        ["itself", [digest(pcm[3])]],
    ]


def test_a_voice_says_one_stream_after_the_other_beside_the_process_itself(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const voice = first.openVoice({ fadeMs: 0 });
        for (const number of [5, 0, 1]) { // the short ones end long before the first is heard to its end
          voice.feed(frames(number));
          voice.finish();
        }
        first.feed(frames(2));
        first.finish();
        say("streams", [voice.stream, first.stream]);
        say("heard", (await pullAll([voice, first])).map(sha256));
        say("played", voice.played);
        await first.stop();
        """,
    )
    assert said == [
        ["streams", [2, 0]],
        ["heard", [digest(pcm[5] + pcm[0] + pcm[1]), digest(pcm[2])]],
        ["played", {"stream": 2, "samples": len(pcm[1]) // 4}],
    ]


def test_a_voice_that_nobody_pulls_stops_alone(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const unheard = first.openVoice({ fadeMs: 0, bufferSeconds: 0.5, prebufferMs: 60000 });
        unheard.feed(Buffer.concat(Array.from({ length: 16 }, (_, number) => frames(number))));
        unheard.finish();
        const voice = first.openVoice({ fadeMs: 0 });
        voice.feed(frames(15));
        voice.finish();
        say("heard", (await pullAll([voice])).map(sha256));
        await sleep(200);
        say("waiting", unheard._pcmBytes);
        const [rest] = await pullAll([unheard]);
        say("rest", rest.reduce((sum, { length }) => sum + length, 0));
        await first.stop();
        """,
    )
    assert said[0] == ["heard", [digest(pcm[15])]]
    assert 0.5 * 48000 * 4 <= said[1][1] <= 0.5 * 48000 * 4 + 4 * NANO.frame_pcm_bytes, "half a second and a chunk"
    assert said[2] == ["rest", sum(map(len, pcm))]


def test_marks_are_told_when_their_sample_is_pulled(spoken: tuple[Path, list[bytes]]) -> None:
    said = speak(
        spoken[0],
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        let pulled = 0;
        const told = [];
        const onMark = (mark) => told.push([mark.stream, mark.text, mark.sample, pulled]);
        const voice = first.openVoice({ onMark, fadeMs: 0 });
        const packed = frames(0);
        for (let frame = 0; frame < 20; frame++) {
          if (frame % 3 === 0) voice.mark(`wörd ${frame}`);
          voice.feed(packed.subarray(frame * 20, (frame + 1) * 20));
        }
        voice.mark("end");
        voice.finish();
        voice.mark("again"); // opens the next stream
        voice.finish();
        try {
          voice.mark("ö".repeat(501));
        } catch (error) {
          say("refused", error.message);
        }
        const pcm = new Int16Array(200);
        while (voice.isSpeaking) {
          const sound = voice.pullInto(pcm);
          pulled += sound;
          if (!sound) await sleep(1);
        }
        say("told", told);
        await first.stop();
        """,
    )
    assert said[0] == ["refused", "a mark of 1002 bytes: up to 1000 are allowed"]
    told = said[1][1]
    places = [(0, f"wörd {frame}", frame * FRAME_SAMPLES) for frame in range(0, 20, 3)]
    places += [(0, "end", 20 * FRAME_SAMPLES), (1, "again", 0)]
    assert [(stream, text, sample) for stream, text, sample, _ in told] == places
    # `pulled` is what all earlier pulls gave: the mark's sample was in the pull of 100 that came then.
    assert all(pulled <= sample < pulled + 100 for _, _, sample, pulled in told[:-2])


def test_a_mark_at_the_end_is_told_with_it_though_nobody_pulls_any_more(spoken: tuple[Path, list[bytes]]) -> None:
    said = speak(
        spoken[0],
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError, onMark: (mark) => say("itself", mark) });
        const other = first.openVoice({ fadeMs: 0, onMark: (mark) => say("other", mark) });
        for (const voice of [first, other]) {
          voice.feed(frames(0));
          let pulled = 0;
          await until(() => (pulled += voice.pullInto(new Int16Array(2000))) >= 20 * 3840);
          voice.mark("end");
          voice.finish();
          await until(() => !voice.isSpeaking);
        }
        await first.stop();
        """,
    )
    assert said == [[who, {"stream": 0, "sample": 20 * FRAME_SAMPLES, "text": "end"}] for who in ("itself", "other")]


def test_cancel_ends_one_voice_and_says_what_was_heard(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const told = [];
        const voice = first.openVoice({ fadeMs: 0, onMark: ({ text }) => told.push(text) });
        const other = first.openVoice({ fadeMs: 0 });
        for (const text of ["said", "unsaid"]) {
          voice.mark(text);
          voice.feed(frames(0));
        }
        voice.finish();
        voice.feed(frames(1)); // waits behind it
        other.feed(frames(2));
        other.finish();
        await until(() => voice.pull(100).some(Boolean));
        const heard = voice.played;
        say("cancelled", voice.cancel());
        say("played", [heard, voice.played].map(({ stream }) => stream));
        say("silent", !voice.pull(480).some(Boolean));
        voice.feed(frames(3));
        voice.finish();
        say("heard", (await pullAll([voice, other])).map(sha256));
        say("played", [heard.samples > 0, heard.samples % 100, voice.played.stream]);
        say("told", told);
        await first.stop();
        """,
    )
    assert said == [
        ["cancelled", True],
        ["played", [0, 0]],
        ["silent", True],
        ["heard", [digest(pcm[3]), digest(pcm[2])]],
        ["played", [True, 0, 2]],
        ["told", ["said"]],
    ]


def test_a_storm_of_cancels_leaves_every_place_free(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const voices = Array.from({ length: 4 }, () => first.openVoice({ fadeMs: 0 }));
        for (let times = 0; times < 300; times++) {
          const voice = voices[times % 4];
          voice.cancel();
          await until(() => {
            try {
              return voice.feed(frames(times % 16));
            } catch (error) {
              if (error.code !== "too_many_streams") throw error; // its ENDs are on the way
            }
          });
        }
        for (const voice of voices) {
          voice.cancel();
          await until(() => !voice.isSpeaking);
          voice.feed(frames(7));
          voice.finish();
        }
        say("heard", (await pullAll(voices)).map(sha256));
        try {
          for (;;) voices[0].feed(frames(0)), voices[0].finish();
        } catch (error) {
          say("refused", [error.code, error.fatal]);
        }
        await first.stop();
        """,
        [*CHUNKED, "--max-streams", "5"],
    )
    assert said == [["heard", [digest(pcm[7])] * 4], ["refused", ["too_many_streams", False]]]


def test_what_is_pulled_is_as_loud_as_its_gain_says_and_mono_where_that_is_set(
    spoken: tuple[Path, list[bytes]],
) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const halved = first.openVoice({ fadeMs: 0 });
        halved.gain = 0.5;
        const loud = first.openVoice({ fadeMs: 0 });
        loud.gain = 100;
        const mono = first.openVoice({ fadeMs: 0, settings: { channels: 1, gain_db: -6 } });
        const voices = [halved, loud, mono];
        for (const voice of voices) {
          voice.feed(frames(0));
          voice.finish();
        }
        const heard = await pullAll(voices);
        for (const pieces of heard) say("heard", Buffer.concat(pieces).toString("base64"));
        say("channels", voices.map(({ format }) => format.channels));
        await first.stop();
        """,
    )
    plain = np.frombuffer(pcm[0], "<i2").astype(float)
    halved, loud, mono = (np.frombuffer(base64.b64decode(text), "<i2") for _, text in said[:3])
    assert np.abs(halved - plain * 0.5).max() <= 0.5
    assert loud.tolist() == np.clip(plain * 100, -32768, 32767).tolist()
    assert np.abs(mono - plain.reshape(-1, 2).mean(axis=1) * 10 ** (-6 / 20)).max() <= 1
    assert said[3] == ["channels", [2, 2, 1]]


def test_what_comes_ahead_is_at_least_what_a_resampler_keeps_until_the_end(spoken: tuple[Path, list[bytes]]) -> None:
    said = speak(
        spoken[0],
        """
        const first = await Mossnano.start({ command, onError });
        const voice = first.openVoice({ bufferSeconds: 0, fadeMs: 0, settings: { sample_rate: 11025 } });
        voice.feed(frames(0));
        voice.finish();
        const [pieces] = await pullAll([voice]);
        say("samples", Buffer.concat(pieces).length / 4);
        await first.stop();
        """,
        DEMO,
    )
    assert said == [["samples", round(len(spoken[1][0]) / 4 * 11025 / NANO.sample_rate)]]


def test_a_gain_that_changes_does_not_click() -> None:
    said = play(
        """
        const samples = (count) => { const frame = Buffer.alloc(4); frame.writeUInt32LE(count); return frame; };
        const voice = await Mossnano.start({ command, onError });
        voice.feed(samples(2000));
        await until(() => voice.pull(100).some(Boolean));
        voice.gain = 0;
        const left = [...voice.pull(480)].filter((_, at) => at % 2 === 0);
        say("first", left[0]);
        say("last", left.slice(240).every((value) => value === 0));
        say("step", Math.max(...left.slice(1).map((value, at) => Math.abs(value - left[at]))));
        await voice.stop();
        """,
        STEADY,
    )
    assert said == [["first", 9958], ["last", True], ["step", 42]]


def test_settings_that_are_refused_are_told_and_nothing_sounds(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const told = [];
        const onErrorOfBad = ({ code, fatal }) => told.push([code, fatal]);
        const bad = first.openVoice({ settings: { channels: 7 }, onError: onErrorOfBad });
        bad.feed(frames(0));
        bad.finish();
        bad.feed(frames(1));
        await until(() => told.length === 2 && !bad.isSpeaking);
        say("told", told);
        for (let times = 0; times < 5; times++) { // each leaves its place
          await until(() => {
            try {
              return bad.feed(frames(0));
            } catch {
              return false; // its END is on the way
            }
          });
          await until(() => told.length === 3 + times);
        }
        say("sound", bad.pull(480).some(Boolean));
        first.openVoice({ settings: { gain_db: 99 } }).feed(frames(0)); // whose errors the process hears
        const voice = first.openVoice({ fadeMs: 0 });
        voice.feed(frames(1));
        voice.finish();
        say("heard", (await pullAll([voice])).map(sha256));
        for (const options of [{ settings: { sample_format: "f32le" } }, { bufferSeconds: -1 }, { fadeMs: NaN }]) {
          try {
            first.openVoice(options);
          } catch (error) {
            say(error.constructor.name);
          }
        }
        await first.stop();
        """,
        [*CHUNKED, "--max-streams", "3"],
    )
    assert said == [
        ["told", [["bad_settings", False]] * 2],
        ["sound", False],
        ["error", {"code": "bad_settings", "fatal": False, "lost": []}],
        ["heard", [digest(pcm[1])]],
        *[["RangeError", None]] * 3,
    ]


def test_more_than_the_process_lets_wait_in_one_stream_is_refused_here(spoken: tuple[Path, list[bytes]]) -> None:
    said = speak(
        spoken[0],
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const voice = first.openVoice({ fadeMs: 0 });
        let fed = 0;
        try {
          for (; fed < 100; fed++) voice.feed(Buffer.alloc(20 * 2000));
        } catch (error) {
          say("refused", [error.code, fed, error.message.includes("983040 are allowed")]);
        }
        await until(() => voice.pull(480) && voice.played.samples); // all of it was taken
        await first.stop();
        """,
    )
    assert said == [["refused", ["queue_full", 24, True]]]


def test_a_decoder_without_voices_is_said_to_be_one() -> None:
    said = play(
        """
        const voice = Mossnano.launch({ command, onError });
        const early = voice.openVoice(); // nobody knows yet
        say("early", [early.feed(Buffer.alloc(4)), early.mark("x"), early.cancel(), early.format, [...early.pull(1)]]);
        await voice.whenReady();
        for (const call of [() => voice.openVoice(), () => early.feed(Buffer.alloc(4)), () => voice.mark("x")]) {
          try {
            call();
          } catch (error) {
            say(error.code, error.message.includes("its HANDSHAKE says no max_streams"));
          }
        }
        await voice.stop();
        """,
        STEADY,
    )
    assert said == [["early", [False, False, False, None, [0, 0]]], *[["no_voices", True]] * 3]


def test_a_process_that_dies_ends_every_voice_with_the_reason() -> None:
    frames = some_frames(20)
    said = play(
        f"""
        const frames = Buffer.from("{tokens_payload(frames).hex()}", "hex");
        const voice = await Mossnano.start({{ command, fadeMs: 0, log: () => {{}}, onError, restart: 1 }});
        const told = [];
        const voices = Array.from({{ length: 4 }}, (_, at) => voice.openVoice({{
          fadeMs: 0,
          onError: ({{ code, fatal, lost, message }}) => told.push([at, code, fatal, lost, message.slice(-7)]),
        }}));
        for (const each of voices) each.feed(frames);
        voices[1].finish();
        voices[1].feed(frames);
        voices[2].finish();
        await until(() => voices.every((each) => each.pull(1).some(Boolean)));
        const pcm = [];
        while (voices[2].isSpeaking) pcm.push(...voices[2].pull(80)), await sleep(1); // heard to its end
        await until(() => voices[1]._current === 1); // its first stream came to its end
        process.kill(voice.pid, "SIGKILL");
        await until(() => voice.restarts === 1);
        await voice.whenReady();
        say("told", told.sort());
        voices[0].cancel();
        voices[0].feed(frames);
        voices[0].finish();
        const heard = [];
        while (voices[0].isSpeaking) {{
          const pcm = new Int16Array(20);
          const samples = voices[0].pullInto(pcm);
          heard.push(...pcm.subarray(0, samples * 2));
          if (!samples) await sleep(1);
        }}
        say("heard", heard);
        say("stream", [voices[0].stream, voices[3].isSpeaking]);
        voices[3].cancel();
        voices[3].feed(frames);
        process.kill(voice.pid, "SIGKILL");
        await until(() => voice.state === "failed" || voice.restarts === 2);
        await voice.stop();
        """,
        double(),
    )
    crash = {"code": "process_ended", "fatal": False, "lost": []}
    # The first stream of voice 1 had come whole, and voice 2 was heard to its end.
    lost = [[voice, "process_ended", False, [stream], "SIGKILL"] for voice, stream in [(0, 0), (1, 1), (3, 0)]]
    pcm = np.frombuffer(expected_pcm(frames, SMALL), "<i2").tolist()
    assert said[:4] == [["error", crash], ["told", lost], ["heard", pcm], ["stream", [1, True]]]


def test_stop_with_voices_open_leaves_nothing(spoken: tuple[Path, list[bytes]]) -> None:
    said = speak(
        spoken[0],
        """
        const first = await Mossnano.start({ command, onError });
        const voices = Array.from({ length: 16 }, () => first.openVoice({ onError }));
        for (const voice of voices) for (let times = 0; times < 30; times++) voice.feed(frames(15));
        await until(() => voices[0].pull(100) && voices[0].played.samples);
        const started = performance.now();
        await first.stop();
        say("took less than it may", performance.now() - started < 1900);
        say("speaking", voices.some((voice) => voice.isSpeaking));
        say("fed", voices.some((voice) => voice.feed(frames(0)) || voice.mark("x") || voice.finish()));
        try {
          process.kill(first.pid, 0);
        } catch (error) {
          say("gone", error.code);
        }
        """,
    )
    assert said == [["took less than it may", True], ["speaking", False], ["fed", False], ["gone", "ESRCH"]]


def test_what_came_of_a_stream_before_a_crash_sounds_and_nothing_behind_it(spoken: tuple[Path, list[bytes]]) -> None:
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, log: () => {} });
        const voice = first.openVoice({ fadeMs: 0 });
        const marks = [];
        for (const number of [15, 14]) { // longer than what comes ahead of a pull
          voice.feed(frames(number));
          voice.finish();
        }
        await until(() => voice._pcmBytes > 4 * 180000); // of both
        process.kill(first.pid, "SIGKILL");
        await until(() => first.state === "failed");
        const [heard] = await pullAll([voice]);
        say("heard", Buffer.concat(heard).toString("base64"));
        say("played", voice.played.stream);
        await first.stop();
        """,
    )
    heard = base64.b64decode(said[0][1])
    assert len(heard) > 4 * 48000
    assert pcm[15].startswith(heard)
    assert said[1] == ["played", 0]


def test_what_has_not_left_is_forgotten_and_the_rest_of_it_is_not(spoken: tuple[Path, list[bytes]]) -> None:
    """To a process that hangs and whose pipe is full."""
    folder, pcm = spoken
    said = speak(
        folder,
        """
        const first = await Mossnano.start({ command, fadeMs: 0, onError });
        const voices = Array.from({ length: 3 }, () => first.openVoice({ fadeMs: 0 }));
        voices[0].feed(frames(0));
        hang(first.pid);
        for (let times = 0; times < 3; times++) first.feed(Buffer.alloc(20 * 8000));
        voices[1].feed(frames(1));
        voices[1].finish();
        for (let times = 0; times < 100; times++) { // the process is told of none, so none takes a place
          voices[2].feed(frames(2));
          voices[2].finish();
          voices[2].cancel();
        }
        say("speaking", voices.map((voice) => voice.isSpeaking));
        voices[0].cancel();
        first.cancel();
        first.feed(frames(3));
        first.finish();
        process.kill(first.pid, "SIGCONT");
        say("heard", (await pullAll([voices[1], first])).map(sha256));
        await until(() => !voices[0].isSpeaking);
        await first.stop();
        """,
        [*CHUNKED, "--max-streams", "4"],
    )
    assert said == [["speaking", [True, True, False]], ["heard", [digest(pcm[1]), digest(pcm[3])]]]
