"""What the Node client can do beyond what test_clients.py has every client do.

Each test is a script for node, which begins with PRELUDE and prints lines of JSON, and is given a decoder's command.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from tests.child import DEMO, ROOT

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
