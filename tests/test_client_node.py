"""What the Node client can do beyond what test_clients.py has every client do.

Each test is a script for node, which begins with PRELUDE and prints lines of JSON, and is given a decoder's command.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from mossnano_stdio.protocol import Kind, encode_message
from tests.child import DEMO, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload

CLIENT = ROOT / "mossnano_stdio" / "clients" / "node" / "mossnano.mjs"

PRELUDE = """
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
        const voice = await Mossnano.start({{ command, onError }});
        process.kill(voice.pid, "SIGSTOP");
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
    assert (fed, is_ours, code, is_fatal) == (26, True, "queue_full", False), "of 160,015 bytes into 4 MiB"
    assert "4194304 (4 MiB) are allowed" in message
    assert base64.b64decode(said[-1][1]) == expected


def test_a_process_that_hangs_is_ended_by_stop() -> None:
    said = play("""
        const voice = await Mossnano.start({ command, onError });
        process.kill(voice.pid, "SIGSTOP");
        voice.feed(Buffer.alloc(8000 * voice.format.frame_bytes));
        await voice.stop();
        try {
          process.kill(voice.pid, 0);
        } catch (error) {
          say("gone", error.code);
        }
    """)
    assert said == [["gone", "ESRCH"]]
