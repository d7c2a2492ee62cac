"""Whatever needs an extra that is not installed says the command that installs it, before it has written a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.child import ROOT

# In a process of its own, as modules that are loaded here already cannot be hidden.
HIDING = """
import sys
sys.modules[sys.argv[1]] = None
from mossnano_stdio.cli import main
sys.exit(main(sys.argv[2:]))
"""
CHECKPOINT = str(ROOT / "tests" / "reference" / "tiny")
BUNDLE = f"{CHECKPOINT}/bundle"
MELODY = str(ROOT / "mossnano_stdio" / "demo" / "melody.mossnano")


def run_without(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDING, module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("module", "arguments", "extra", "status"),
    [
        ("onnx", ["standin", "out", "--size", "tiny"], "build", 2),
        ("safetensors", ["standin", "out", "--size", "tiny"], "build", 2),
        ("onnx", ["build", CHECKPOINT, "out"], "build", 2),
        ("safetensors", ["build", "--from-bundle", BUNDLE, "out"], "build", 2),
        ("huggingface_hub", ["fetch", "--to", "out"], "fetch", 2),
        ("PyInstaller", ["freeze", "out"], "freeze", 2),
        ("soxr", ["freeze", "out"], "freeze", 2),
        ("onnx", ["diagnose", f"{CHECKPOINT}/codes.npy", f"{CHECKPOINT}/audio.npy", "--weights", BUNDLE], "build", 2),
        ("pyarrow", ["tokenize", CHECKPOINT, "--to", "out", "--weights", BUNDLE], "datasets", 2),
        ("soxr", ["tokenize", CHECKPOINT, "--to", "out", "--weights", BUNDLE, "--form", "npy"], "datasets", 2),
        ("matplotlib", ["tokenize", CHECKPOINT, "--to", "out", "--form", "npy", "--plot", "x.png"], "plot", 2),
        ("ray", ["detokenize", MELODY, "--to", "out", "--weights", "demo", "--engine", "ray"], "ray", 2),
        ("sounddevice", ["play", "--weights", "demo", MELODY], "play", 69),
        ("matplotlib", ["bench", "--weights", "demo", "--plot", "out.png"], "plot", 2),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else str(value),
)
def test_a_tool_without_its_extra_says_what_to_install(
    module: str, arguments: list[str], extra: str, status: int, tmp_path: Path
) -> None:
    done = run_without(module, tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert f"pip install 'mossnano-stdio[{extra}]'" in done.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_bench_without_the_extra_says_what_its_limits_need(tmp_path: Path) -> None:
    """It measures all the same."""
    arguments = ["--weights", BUNDLE, "--threads", "1", "--chunks", "1", "--turns", "1"]
    done = run_without("onnx", tmp_path, "bench", *arguments)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if "limit" in line]
    assert line == "no limit is computed, as onnx is not installed: pip install 'mossnano-stdio[build]'"
    assert "GFLOP/s" not in done.stdout


def test_the_readme_says_what_a_standin_needs() -> None:
    """The first install of the page lacks it."""
    readme = (ROOT / "README.md").read_text("utf-8")
    before, _ = readme.split("mossnano standin tiny-weights")
    assert "[build]" in before.split("Without the real ones")[1]
