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
ROOMS = ("protocol/", "tokens/artifact.py")  # in mossnano_stdio/


def test_all_branches_of_protocol_and_artifact(tmp_path: Path) -> None:
    data_file, report = tmp_path / "coverage", tmp_path / "report.json"
    arguments = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *(f"tests/{name}" for name in TESTS)]
    run_coverage("run", f"--data-file={data_file}", "-m", "pytest", *arguments)
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
