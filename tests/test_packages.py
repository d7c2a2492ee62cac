"""What is published: an sdist, and a wheel that comes out of it, both as their index wants them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.child import ROOT


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("build", "twine", "hatchling"):
        pytest.importorskip(module, reason="the extra `test` is not installed")
    folder = tmp_path_factory.mktemp("packages")
    # First the sdist, then the wheel from that. An environment of its own would have to be downloaded.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_index_takes_both(packages: Path) -> None:
    names = sorted(path.name for path in packages.iterdir())
    assert [name.removeprefix("mossnano_stdio-1.0.0") for name in names] == ["-py3-none-any.whl", ".tar.gz"]
    command = [
        sys.executable,
        "-m",
        "twine",
        "--no-color",
        "check",
        "--strict",
        *(str(packages / name) for name in names),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_sdist_has_what_it_takes_to_test_and_the_wheel_what_it_takes_to_run(packages: Path) -> None:
    (sdist,), (wheel,) = packages.glob("*.tar.gz"), packages.glob("*.whl")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mossnano_stdio").rglob("*.py")}
    assert {*modules, "tests/test_packages.py", ".ci/run", "protocol.md", "README.md", "LICENSE"} <= inside
    assert {*modules, "mossnano_stdio/protocol.md", "mossnano_stdio/clients/c/mossnano.h"} <= installed
    assert not [name for name in installed if name.startswith("tests/")]
