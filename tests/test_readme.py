"""The commands of README.md and clients/README.md do what they promise: every `sh` block is run, in order, in one
folder, as a new user would.

Blocks of another kind (`text`, `python`, ...) are not run here: the two set-up commands, which install from a package
registry (`.ci/run` runs one of them, word for word), and what needs weights or a sound card that nobody can be sure of.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mossnano_stdio.weights import MODELS
from tests.child import ROOT

README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "mossnano_stdio" / "clients" / "README.md").read_text()
BLOCKS = re.findall(r"^```sh(?: needs=(\w+))?\n(.*?)^```", PAGES, re.M | re.S)  # (what must be installed, commands)
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGES, re.M | re.S)
SETUP = re.findall(r"^    (python3 -m venv .*)$", README, re.M)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root, and takes what the commands write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("mossnano_stdio", "weights", "protocol.md", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment() -> dict[str, str]:
    """Commands are found as in an activated virtual environment."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run_block(block: str, folder: Path, timeout: int = 120) -> str:
    """What it said on stderr."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stderr


@pytest.mark.parametrize(("needs", "block"), BLOCKS, ids=[block.splitlines()[0][:50] for _, block in BLOCKS])
def test_a_block_of_commands_works(needs: str, block: str, checkout: Path) -> None:
    if needs and shutil.which(needs) is None:
        pytest.skip(f"{needs} is not installed")
    run_block(block, checkout)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=[block.splitlines()[0][:50] for block in PYTHON_BLOCKS])
def test_a_block_of_python_works(block: str, checkout: Path) -> None:
    for _, commands in BLOCKS:  # its weights, where this test is run alone
        made = re.search(r"^mossnano standin .* (\S+)$", commands, re.M)
        if made and f'"{made[1]}"' in block and not (checkout / made[1]).exists():
            run_block(commands, checkout)
    subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=checkout, check=True, timeout=120)


def test_the_table_of_codecs_has_the_numbers_of_the_published_models() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("|")]
    names = next(row for row in rows if row[1:2] == ["nano"])[1:]
    table = {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows if len(row) == len(names) + 1}
    assert names == [*MODELS]
    for name, model in MODELS.items():
        codec = model.format
        channels = {1: "mono", 2: "stereo"}[codec.channels]
        assert table["sound"][name] == f"{codec.sample_rate // 1000} kHz, {channels}"
        assert table["codebooks of entries"][name].endswith(f"{codec.quantizers} of {codec.codebook_size:,}")
        assert str(codec.frame_bytes) in table["bytes a frame of 80 ms"][name]
        assert codec.frames_per_second == 12.5
        assert model.licence in table["weights, licence"][name]


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 5
    assert len(PYTHON_BLOCKS) >= 2


def test_two_commands_set_everything_up_and_ci_runs_the_second() -> None:
    hear, test = SETUP
    assert "&& .venv/bin/mossnano-stdio --weights demo" in hear
    assert test.endswith("&& .venv/bin/pytest -n 2 --dist loadfile")
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_main_command_leaves_a_sound_behind(checkout: Path) -> None:
    """Its second half, with the environment that runs these tests in place of the one that it would make."""
    run_block(SETUP[0].split("&& .venv/bin/")[-1], checkout)
    assert (checkout / "out.pcm").stat().st_size > 1_000_000


def test_where_is_x_knows_every_room() -> None:
    table = README.split("## Where is X?")[1]
    package = ROOT / "mossnano_stdio"
    rooms = [path.name + "/" * path.is_dir() for path in package.iterdir() if not path.name.startswith(("__", "py."))]
    assert [room for room in sorted(rooms) if f"`{room}`" not in table] == []
