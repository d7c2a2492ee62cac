"""`mossnano protocol` prints the page, from a checkout and from a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.child import ROOT
from tests.tool import call_tool

PAGE = (ROOT / "protocol.md").read_bytes()


def test_the_page_is_printed() -> None:
    assert call_tool("protocol") == (0, PAGE, "")


def test_the_page_travels_in_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the extra `test` is not installed")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "mossnano_stdio.cli", "protocol"]
    printed = subprocess.run(
        command, cwd=tmp_path / "site", capture_output=True, check=True
    ).stdout  # cwd is imported first
    assert (tmp_path / "site" / "mossnano_stdio" / "protocol.md").read_bytes() == printed == PAGE
