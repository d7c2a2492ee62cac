"""What the Node client can do beyond what test_clients.py has every client do.

Each test is a script for node, which begins with PRELUDE and prints lines of JSON, and is given a decoder's command.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from mossnano_stdio.protocol.messages import Kind, encode_message
from tests.child import DEMO, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload

CLIENT = ROOT / "mossnano_stdio" / "clients" / "node" / "mossnano.mjs"

PRELUDE = """
import { readdirSync, readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
const { Mossnano, MossnanoError } = await import(process.argv[1]);
const command = process.argv.slice(2);
const say = (name, value = null) => console.log(JSON.stringify([name, value]));
const onError = ({ code, fatal, lost }) => say("error", { code, fatal, lost });
async function until(condition) { // a minute is far more than anything here takes
  for (let waited = 0; !condition(); waited += 2) {
    if (waited > 60000) throw new Error(`never: ${condition}`);
    await sleep(2);
  }
}
function hang(pid) { // returns when none of its threads runs
  process.kill(pid, "SIGSTOP");
  const runs = (thread) => !/\\) T /.test(readFileSync(`/proc/${pid}/task/${thread}/stat`, "latin1"));
  while (readdirSync(`/proc/${pid}/task`).some(runs));
}
"""


def play(script: str, command: Sequence[object] = DEMO) -> list[Any]:
    """What the script said: [name, value] each."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(
        ["node", "--input-type=module", "-e", PRELUDE + script, str(CLIENT), *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_stream_to_which_nothing_was_fed_ends() -> None:
    said = play("""
        const voice = await Mossnano.start({ command, onError });
        voice.feed(Buffer.alloc(0));
        say("speaking", voice.isSpeaking);
        voice.finish();
        await until(() => !voice.isSpeaking);
        voice.feedCodes([]);
        voice.finish();
        await until(() => !voice.isSpeaking);
        voice.finish(); // nothing is open: nothing is to end
        say("speaking", voice.isSpeaking);
        await voice.stop();
    """)
    assert said == [["speaking", True], ["speaking", False]]


def test_a_process_that_hangs_holds_nobody_up() -> None:
    """Nothing waits for it, 4 MiB are kept for it, more are refused, and when it goes on, all is as it should be."""
    frames = tokens_payload(some_frames(30, NANO))
    wire = encode_message(Kind.TOKENS, frames) + encode_message(Kind.END)
    command = [*DEMO, "--chunk-frames", "4"]
    expected = run([*command, "--output", "raw"], wire).stdout
    said = play(
        f"""
        const frames = Buffer.from("{frames.hex()}", "hex");
        const voice = await Mossnano.start({{ command, fadeMs: 0, onError }});
        hang(voice.pid);
        const many = Buffer.alloc(8000 * voice.format.frame_bytes);
        say("fed", voice.feed(many));
        say("finished", voice.finish());
        say("cancelled", voice.cancel());
        let fed = 0;
        try {{
          for (; fed < 100; fed++) voice.feed(many);
        }} catch (error) {{
          say("refused", [fed, error instanceof MossnanoError, error.code, error.fatal, error.message]);
        }}
        say("finished", voice.finish());
        for (let times = 0; times < 1000; times++) voice.cancel();
        say("fed", voice.feed(frames));
        say("finished", voice.finish());
        say("speaking", voice.isSpeaking);
        process.kill(voice.pid, "SIGCONT");
        const heard = [];
        const pcm = new Int16Array(960);
        while (voice.isSpeaking) {{
          const samples = voice.pullInto(pcm);
          heard.push(Buffer.from(pcm.slice(0, samples * 2).buffer));
          if (samples < 480) await sleep(1);
        }}
        say("heard", Buffer.concat(heard).toString("base64"));
        await voice.stop();
        """,
        command,
    )
    assert [word for word, _ in said] == [
        *("fed", "finished", "cancelled", "refused", "finished", "fed", "finished", "speaking", "heard")
    ]
    assert all(value is True for word, value in said if word not in ("refused", "heard"))
    fed, is_ours, code, is_fatal, message = said[3][1]
    assert fed in (26, 27, 28), "of 160,015 bytes into 4 MiB, and what the socket to it took"
    assert (is_ours, code, is_fatal) == (True, "queue_full", False)
    assert "4194304 (4 MiB) are allowed" in message
    assert base64.b64decode(said[-1][1]) == expected


def test_a_process_that_hangs_is_ended_by_stop() -> None:
    said = play("""
        const voice = await Mossnano.start({ command, onError });
        hang(voice.pid);
        voice.feed(Buffer.alloc(8000 * voice.format.frame_bytes));
        await voice.stop();
        try {
          process.kill(voice.pid, 0);
        } catch (error) {
          say("gone", error.code);
        }
    """)
    assert said == [["gone", "ESRCH"]]


# --- what is heard, of a decoder that says 10,000 all the time -------------------------------------------------------

STEADY = [sys.executable, ROOT / "tests" / "steady.py"]
STEADY_PRELUDE = """
const samples = (count) => { const frame = Buffer.alloc(4); frame.writeUInt32LE(count); return frame; };
const pulled = []; // of the left channel
function pull(voice, count) {
  const pcm = new Int16Array(count * 2).fill(0x5555);
  const sound = voice.pullInto(pcm);
  pulled.push(...pcm.filter((_, at) => at % 2 === 0));
  if (pcm.some((value, at) => at % 2 && value !== -pcm[at - 1])) say("channels differ");
  return sound;
}
async function feed(voice, count) { // and waits for the first sample of them
  voice.feed(samples(count));
  while (!pull(voice, 1)) {
    pulled.pop();
    await sleep(1);
  }
}
"""
LOUD = 10_000
FADE = 240  # samples in 5 ms
STEP = LOUD / FADE + 1  # between neighbours in a fade


def largest_step(samples: Sequence[int]) -> int:
    return max(abs(after - before) for before, after in pairwise(samples))


def test_an_underrun_fades_out_and_what_follows_fades_in() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const voice = await Mossnano.start({ command, onError });
        await feed(voice, 1000);
        pull(voice, 899);
        say("sound", pull(voice, 480)); // 100 were there
        say("underruns", voice.underruns);
        say("sound", pull(voice, 480));
        await feed(voice, 1000);
        pull(voice, 999);
        say("pulled", pulled);
        say("speaking", voice.isSpeaking);
        voice.finish();
        pull(voice, 480);
        await until(() => !voice.isSpeaking);
        await voice.stop();
        """,
        STEADY,
    )
    assert said[:3] == [["sound", 100 + FADE], ["underruns", 1], ["sound", 0]]
    pulled = said[3][1]
    assert pulled[:1000] == [LOUD] * 1000
    assert pulled[1000 + FADE : 1860] == [0] * (860 - FADE)
    assert pulled[-1000 + FADE :] == [LOUD] * (1000 - FADE), "no sample is lost"
    assert largest_step(pulled) <= STEP


def test_cancel_fades_out_and_what_follows_fades_in() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const voice = await Mossnano.start({ command, onError });
        await feed(voice, 200);
        pull(voice, 100);
        voice.cancel(); // 99 wait: the rest of the fade holds the last one
        say("speaking", voice.isSpeaking);
        say("sound", pull(voice, 480));
        await until(() => !voice.isSpeaking);
        await feed(voice, 1000);
        pull(voice, 999);
        voice.cancel();
        pull(voice, 100);
        pull(voice, 140);
        await feed(voice, 1000);
        pull(voice, 99);
        voice.cancel(); // while it fades in
        pull(voice, 480);
        say("pulled", pulled);
        await voice.stop();
        """,
        STEADY,
    )
    assert said[:2] == [["speaking", True], ["sound", FADE]]
    pulled = said[2][1]
    assert pulled[:101] == [LOUD] * 101
    assert pulled[101 + FADE : 581] == [0] * (480 - FADE)
    assert pulled[581 + FADE : 1581] == [LOUD] * (1000 - FADE)
    assert pulled[1820] == 0
    assert pulled[1920] > LOUD / 3
    assert pulled[1920 + FADE :] == [0] * (481 - FADE)
    assert largest_step(pulled) <= STEP


def test_a_fade_of_nothing_leaves_every_sample_as_it_came() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const voice = await Mossnano.start({ command, fadeMs: 0, onError });
        await feed(voice, 1000);
        say("sound", pull(voice, 1200));
        await feed(voice, 1000);
        pull(voice, 499);
        voice.cancel();
        say("sound", pull(voice, 100));
        say("pulled", pulled);
        await voice.stop();
        """,
        STEADY,
    )
    assert said[:2] == [["sound", 999], ["sound", 0]]
    assert said[2][1] == [LOUD] * 1000 + [0] * 201 + [LOUD] * 500 + [0] * 100


def test_a_stream_that_ends_by_itself_is_not_faded() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const voice = await Mossnano.start({ command, onError });
        await feed(voice, 1000);
        pull(voice, 999);
        voice.finish();
        await until(() => !voice.isSpeaking);
        pull(voice, 480);
        say("pulled", pulled);
        say("underruns", voice.underruns);
        await voice.stop();
        """,
        STEADY,
    )
    assert said == [["pulled", [LOUD] * 1000 + [0] * 480], ["underruns", 0]]


def test_a_prebuffer_is_filled_before_a_stream_sounds_and_after_an_underrun() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const voice = await Mossnano.start({ command, prebufferMs: 20, fadeMs: 0, onError }); // 960 samples
        voice.feed(samples(500));
        await sleep(300); // they should have come
        say("sound", pull(voice, 480));
        await feed(voice, 500);
        say("sound", pull(voice, 999));
        say("sound", pull(voice, 10));
        say("underruns", voice.underruns);
        voice.feed(samples(500));
        await sleep(300);
        say("sound", pull(voice, 480));
        say("underruns", voice.underruns);
        voice.finish(); // no more comes: what there is, is the rest
        await until(() => pull(voice, 480) === 480);
        say("sound", pull(voice, 480));
        say("speaking", voice.isSpeaking);
        await voice.stop();
        """,
        STEADY,
    )
    assert said == [
        *(["sound", 0], ["sound", 999], ["sound", 0], ["underruns", 1]),
        *(["sound", 0], ["underruns", 1], ["sound", 20], ["speaking", False]),
    ]


# --- starting, dying, starting again ---------------------------------------------------------------------------------


def test_a_start_that_is_not_awaited_tells_how_far_it_is() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const lines = [];
        const voice = Mossnano.launch({ command, log: (line) => lines.push(line), onError });
        say("first", [voice.state, voice.reason, voice.version, voice.demo, voice.format, voice.stream]);
        say("too early", [voice.feed(samples(1)), voice.feedCodes([]), voice.finish(), voice.cancel()]);
        say("silence", [...voice.pull(2)]);
        say("same", (await voice.whenReady()) === voice && (await voice.whenReady()) === voice);
        say("then", [voice.state, voice.reason, voice.version, voice.demo, voice.format.name, typeof voice.pid]);
        voice.feed(samples(0));
        await until(() => voice.state === "failed");
        say("at last", [voice.reason.code, voice.reason.lost, voice.stream]);
        say("lines", lines);
        await voice.stop();
        say("state", voice.state);
        """,
        STEADY,
    )
    assert said == [
        ["first", ["starting", None, None, None, None, None]],
        ["too early", [False, False, False, False]],
        ["silence", [0, 0, 0, 0]],
        ["same", True],
        ["then", ["ready", None, "1.2", True, "steady", "number"]],
        ["error", {"code": "process_ended", "fatal": True, "lost": [0]}],
        ["at last", ["process_ended", [0], 0]],
        ["lines", ["loading", "dying: gr\u00fcn", "without a last line"]],
        ["state", "stopped"],
    ]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["no-such-decoder"], "not_started"),
        ([*DEMO, "--weights", "nowhere"], "bad_weights"),
        (["true"], "process_ended"),
    ],
    ids=["no program", "no weights", "no decoder"],
)
def test_a_start_that_fails_tells_why_and_is_not_tried_again(command: list[str], code: str) -> None:
    said = play(
        """
        const voice = Mossnano.launch({ command, restart: 5, log: () => {}, onError });
        await voice.whenReady().catch((error) => say("rejected", [error.code, error === voice.reason]));
        await voice.whenReady().catch((error) => say("rejected", [error.code, error === voice.reason]));
        say("state", voice.state);
        await voice.stop();
        """,
        command,
    )
    assert said == [
        ["error", {"code": code, "fatal": True, "lost": []}],
        *([["rejected", [code, True]]] * 2),
        ["state", "failed"],
    ]


def test_stop_while_it_starts_rejects_who_waits() -> None:
    said = play(
        """
        const voice = Mossnano.launch({ command, onError });
        const waiting = voice.whenReady().catch((error) => say("rejected", error.code));
        await voice.stop();
        await waiting;
        say("state", voice.state);
        """,
        ["sleep", "600"],
    )
    assert said == [["rejected", "stopped"], ["state", "stopped"]]


def test_an_end_that_a_fatal_error_brings_is_no_end() -> None:
    """It says how much was sent, which is less than all. So it ends no row of restarts either."""
    said = play(
        """
        const voice = await Mossnano.start({ command, restart: 1, log: () => {}, onError });
        for (const next of ["ready", "failed"]) {
          voice.feed(Buffer.alloc(20));
          voice.feed(Buffer.alloc(400));
          await until(() => voice.state !== "ready");
          await until(() => voice.state === next);
        }
        say("restarts", voice.restarts);
        await voice.stop();
        """,
        [*DEMO, "--max-message-bytes", "300"],
    )
    assert said == [
        ["error", {"code": "framing_lost", "fatal": False, "lost": []}],
        ["error", {"code": "process_ended", "fatal": False, "lost": [0]}],
        ["error", {"code": "framing_lost", "fatal": True, "lost": []}],
        ["restarts", 1],
    ]


def test_a_crash_is_survived_and_what_was_fed_is_reported_lost() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        let message;
        const remember = (error) => {
          message = error.message;
          onError(error);
          say("while told", [voice.state, voice.feed(samples(1))]);
        };
        const voice = await Mossnano.start({ command, restart: 1, log: () => {}, onError: remember });
        const before = voice.pid;
        await feed(voice, 100); // stream 0 is heard to its end
        voice.finish();
        pull(voice, 99);
        await until(() => !voice.isSpeaking);
        await feed(voice, 500); // stream 1 is cut
        voice.feed(samples(0));
        voice.finish();
        voice.feed(samples(7)); // stream 2 is not even begun
        await until(() => voice.state === "starting");
        say("message", message);
        await voice.whenReady();
        say("again", [voice.restarts, voice.pid !== before, voice.isSpeaking]);
        voice.feed(samples(300)); // stream 3
        voice.finish();
        await sleep(300); // it should lie behind what is left of stream 1
        pull(voice, 499 + 240);
        say("played", [voice.stream, voice.played]);
        await until(() => pull(voice, 300) === 300 || (pulled.splice(-300), false));
        say("played", [voice.stream, voice.played]);
        say("pulled", pulled);
        await until(() => !voice.isSpeaking);
        voice.feed(samples(0)); // a stream came to its end: it may be started again
        await until(() => voice.restarts === 2);
        await voice.whenReady();
        voice.feed(samples(0)); // none did
        await until(() => voice.state === "failed");
        say("reason", voice.reason.code);
        await voice.stop();
        """,
        STEADY,
    )
    crash = {"code": "process_ended", "fatal": False, "lost": [1, 2]}
    told = ["while told", ["starting", False]]
    assert said[:2] == [["error", crash], told]
    assert said[2][0] == "message"
    assert said[2][1] == (
        "the process ended by itself with status 3: its stderr says more; it is started again, "
        "without what was fed to the streams 1, 2"
    )
    assert said[3:6] == [
        ["again", [1, True, True]],
        ["played", [3, {"stream": 1, "samples": 500}]],
        ["played", [3, {"stream": 3, "samples": 300}]],
    ]
    pulled = said[6][1]
    assert len(pulled) == 100 + 500 + FADE + 300
    assert pulled[:600] == [LOUD] * 600
    assert pulled[600 + FADE - 1] == 0
    assert pulled[-60:] == [LOUD] * 60
    assert largest_step(pulled) <= STEP
    assert said[7:] == [
        ["error", {**crash, "lost": [4]}],
        told,
        ["error", {**crash, "lost": [5], "fatal": True}],
        ["while told", ["failed", False]],
        ["reason", "process_ended"],
    ]


def test_played_says_how_much_of_which_stream_was_given_out() -> None:
    said = play(
        STEADY_PRELUDE
        + """
        const voice = await Mossnano.start({ command, onError });
        say("played", voice.played);
        await feed(voice, 100);
        voice.finish();
        pull(voice, 49);
        say("played", voice.played);
        pull(voice, 50);
        await until(() => !voice.isSpeaking);
        await feed(voice, 1000);
        pull(voice, 299);
        voice.cancel();
        pull(voice, 480);
        say("played", voice.played);
        await feed(voice, 10);
        say("played", voice.played);
        await voice.stop();
        """,
        STEADY,
    )
    assert [value for _, value in said] == [
        {"stream": None, "samples": 0},
        {"stream": 0, "samples": 50},
        {"stream": 1, "samples": 300},
        {"stream": 2, "samples": 1},
    ]


def test_options_that_make_no_sense_are_refused() -> None:
    said = play("""
        for (const options of [{ fadeMs: -1 }, { prebufferMs: NaN }, { restart: "often" }]) {
          await Mossnano.start({ command, ...options }).catch((error) => say(error.constructor.name, error.message));
        }
    """)
    assert said == [
        ["RangeError", "fadeMs is -1: 0 or more is allowed"],
        ["RangeError", "prebufferMs is NaN: 0 or more is allowed"],
        ["RangeError", "restart is often: 0 or more is allowed"],
    ]
