"""Every branch of what reads bytes of strangers is taken by these rooms' own tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    *("test_messages.py", "test_artifact.py", "test_decoding.py", "test_encoding.py", "test_connection.py"),
    *("test_streams.py", "test_turns.py", "test_encodec_segments.py"),
)
# They take half of the time, and no branch that others do not: many voices, or streams, for long.
LEFT_OUT = (
    "test_streams.py::test_streams_that_are_over_leave_nothing",
    "test_turns.py::test_sixteen_voices_whose_tokens_come_ahead_never_pause_and_leave_cores_idle",
    "test_turns.py::test_a_sixteenth_voice_that_joins_fifteen_is_heard_at_once",
    "test_turns.py::test_twelve_voices_whose_tokens_come_live_are_on_time",
    "test_turns.py::test_overload_comes_to_all_alike_and_goes_when_its_cause_goes",
)
ROOMS = ("protocol/", "tokens/artifact.py")  # in mossnano_stdio/
SOURCE = "--source=mossnano_stdio/protocol,mossnano_stdio/tokens"  # counting lines is slow, so it is done there only


def test_all_branches_of_protocol_and_artifact(tmp_path: Path) -> None:
    data_file, report = tmp_path / "coverage", tmp_path / "report.json"
    arguments = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *(f"tests/{name}" for name in TESTS)]
    arguments += [f"--deselect=tests/{name}" for name in LEFT_OUT]
    run_coverage("run", f"--data-file={data_file}", SOURCE, "-m", "pytest", *arguments)
    run_coverage("json", f"--data-file={data_file}", "-o", str(report))
    files = json.loads(report.read_text())["files"]
    seen = set()
    gaps = []
    for name, facts in files.items():
        for room in (room for room in ROOMS if name.startswith(f"mossnano_stdio/{room}")):
            seen.add(room)
            gaps += [f"{name}: line {line}" for line in facts["missing_lines"]]
            gaps += [f"{name}: branch {start} -> {end}" for start, end in facts["missing_branches"]]
    assert seen == set(ROOMS)
    assert not gaps


def run_coverage(*arguments: str) -> None:
    run = subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
