"""The suite on other machines: slow ones, ones with one CPU, ones where not everything is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest

from tests.child import ROOT
from tests.conftest import WAYS_TO_RUN_SKIPPED, way_to_run

# A process inherits the CPUs that it may use.
ON_ONE_CPU = """
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "--quiet"]


def run_python(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_no_example_has_to_be_quick() -> None:
    assert hypothesis.settings().deadline is None


@pytest.mark.skipif(sys.platform != "linux", reason="sets the CPUs that a process may use")
def test_tests_of_threads_know_how_many_cpus_they_may_use() -> None:
    done = run_python("-c", ON_ONE_CPU, *PYTEST, "tests/test_process.py", "-k", "numpy_starts_no_threads")
    assert done.returncode == 0, done.stdout
    assert "1 skipped: let it use two CPUs (see taskset)" in done.stdout.splitlines()


def test_the_last_lines_say_how_to_run_what_was_skipped(tmp_path: Path) -> None:
    """With a PATH where no compiler is."""
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = run_python(*PYTEST, "tests/test_readme.py", "-k", "my-engine", env=environment)
    assert done.stdout.splitlines()[-2] == "1 skipped: apt-get install gcc libc6-dev"


def test_the_last_lines_say_nothing_where_nothing_was_skipped() -> None:
    done = run_python(*PYTEST, "tests/test_readme.py", "-k", "something_to_run")
    assert done.returncode == 0
    assert "skipped" not in done.stdout


def test_a_reason_without_a_way_is_said_itself() -> None:
    assert way_to_run("this machine has a sound card") == "this machine has a sound card"


def test_every_package_of_the_ways_is_one_that_ci_installs() -> None:
    """Where it is Debian's."""
    names = {
        name for way in WAYS_TO_RUN_SKIPPED.values() if "apt-get" in way for name in way.partition(",")[0].split()[2:]
    }
    ci = (ROOT / ".ci" / "run").read_text("utf-8").split()
    assert not names - set(ci)
