"""process/flags.py: what the pages of help and the README advise is the same everywhere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.child import ROOT
from tests.tool import call_tool

README = (ROOT / "README.md").read_text("utf-8")
ADVICE = "1 for each voice of a game"


@pytest.mark.parametrize("verb", ["decode", "encode", "play", "check"])
def test_the_tools_help_says_how_many_threads_to_choose(verb: str) -> None:
    assert ADVICE in " ".join(call_tool(verb, "--help").out.decode().split())


def test_the_process_help_says_how_many_threads_to_choose() -> None:
    command = [sys.executable, "-m", "mossnano_stdio", "--help"]
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert ADVICE in " ".join(page.split())


def test_the_readme_says_it_too_and_reckons_with_its_own_table() -> None:
    advice = README.split("**Threads.**")[1].split("\n\n")[0]
    assert "`--threads 1`" in advice
    advised_ms = re.search(r"1-frame step takes (\d+) ms", advice)
    measured_ms = re.search(r"\| 1-frame step, caches full \| [\d.]+ / ([\d.]+) \|", README)
    assert advised_ms
    assert measured_ms
    assert int(advised_ms[1]) == round(float(measured_ms[1]))
    assert f"one core carries {('six', 'seven', 'eight')[int(80 / float(measured_ms[1])) - 6]} voices" in advice
