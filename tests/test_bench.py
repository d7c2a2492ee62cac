"""`mossnano bench` measures what it says: that it runs, that its figures are there, and what it counts."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import safetensors

from mossnano_stdio import cli
from mossnano_stdio.benchmarks.graphs import sides_of
from mossnano_stdio.bundle import DEMO_FOLDER, load_bundle
from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.graph.arithmetic import bytes_per_step, decoding_macs
from mossnano_stdio.graph.checkpoint import load_checkpoint
from mossnano_stdio.graph.contract import DECODE_STEP_FILE
from tests.tool import call_tool

SIDES = {"official loop", "our runtime, official graph"}


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_an_hour_of_codes(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(bench(capsys, "--bits", "--json"))["bits"]
    assert figures["frames"] == 45_000
    assert figures["pack_ms"] > 0
    assert figures["unpack_ms"] > 0


def test_graphs_side_by_side(capsys: pytest.CaptureFixture[str], tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "steps.png"
    arguments = ["--weights", str(tiny_bundle), "--threads", "1", "--chunks", "1,3", "--turns", "1"]
    figures = json.loads(bench(capsys, *arguments, "--json", "--plot", str(picture)))["threads"]["1"]
    assert set(figures["steps_ms"]) == {"1", "3"}
    assert set(figures["utterances_ms"]) == {"0.08", "1", "3", "10"}
    for cells in (figures["steps_ms"]["3"], figures["starts"]["load_ms"], figures["real_time_streams_per_core"]["8"]):
        assert set(cells) == SIDES
        assert all(cell["lowest"] <= cell["median"] <= cell["highest"] for cell in cells.values())
        assert cells["official loop"]["times"] == 1
    assert figures["limit_ms_per_frame"] > 0
    assert figures["reading_ms_per_step"] > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_process_against_a_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    (figures,) = json.loads(
        bench(capsys, "--weights", "demo", "--process", "--threads", "1", "--turns", "1", "--json")
    )["process"]
    assert figures["overhead"]["8"]["process_over_bare"] > 0
    assert figures["first_audio"]["first_byte_p95_ms"] >= figures["first_audio"]["first_byte_p50_ms"]
    assert figures["start"]["handshake_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--encode"], ExitStatus.NO_WEIGHTS, "has no streaming encoder to measure"),
        (["--against", "demo", "--against", "demo", "--against", "demo"], ExitStatus.USAGE, "name it once"),
        (["--plot", "x.png", "--bits"], ExitStatus.USAGE, "leave --process, --encode and --bits out"),
        (["--plot", "-"], ExitStatus.USAGE, "--plot takes a file"),
        (["--plot", "no/such/x.png"], ExitStatus.OUTPUT_FAILED, "cannot write x.png there"),
    ],
)
def test_what_cannot_be_measured_is_said_before_it_is(arguments: list[str], status: int, words: str) -> None:
    outcome = call_tool("bench", "--weights", "demo", *arguments)
    assert outcome.status == status
    assert words in outcome.error_line


@pytest.mark.parametrize("what", [[], ["--process"]])
def test_weights_that_do_not_run(tiny_bundle: Path, tmp_path: Path, what: list[str]) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (folder / DECODE_STEP_FILE).write_bytes(b"no graph")
    outcome = call_tool("bench", "--weights", folder, *what, "--threads", "1")
    assert outcome.status == ExitStatus.NO_WEIGHTS
    assert str(folder) in outcome.error_line


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    bundles = [load_bundle(Path(shutil.copytree(DEMO_FOLDER, tmp_path / place / "demo"))) for place in ("a", "b")]
    names = [side.name for side in sides_of(bundles[0], bundles)]
    assert len(set(names)) == len(names) == 4


def test_the_arithmetic_is_that_of_the_matrices(tiny_reference: Path) -> None:
    """Counted again from the shapes that the checkpoint's config gives, in plain numbers."""
    config = json.loads((tiny_reference / "config.json").read_text())
    quantizer = config["quantizer_kwargs"]
    macs = quantizer["num_quantizers"] * quantizer["codebook_dim"] * quantizer["rvq_dim"]
    macs += quantizer["rvq_dim"] * quantizer["output_dim"]
    tokens = 1
    for module in config["decoder_kwargs"]:
        if module["module_type"] == "PatchedPretransform":
            tokens *= module["patch_size"]
            continue
        model, hidden = module["d_model"], module["dim_feedforward"]
        context = round(module["context_duration"] * tokens * config["sample_rate"] / config["downsample_rate"])
        layer = 4 * model * model + 2 * model * hidden + 2 * context * model
        joints = model * (module["input_dimension"] + module["output_dimension"])
        macs += tokens * (module["num_layers"] * layer + joints)
    assert decoding_macs(load_checkpoint(tiny_reference).decoder) == macs


def test_a_step_reads_every_matrix_and_all_caches_once(tiny_reference: Path, tiny_bundle: Path) -> None:
    """Matrices counted in the checkpoint's file, caches in the metadata."""
    with safetensors.safe_open(tiny_reference / "model.safetensors", "numpy") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    decoding = re.compile(r"decoder\.|quantizer\.output_proj\.|quantizer\.quantizers\.\d+\.out_proj\.")
    sizes = [[size for size in shape if size > 1] for name, shape in shapes.items() if decoding.match(name)]
    matrices = sum(math.prod(size) for size in sizes if len(size) == 2)
    states = load_bundle(tiny_bundle).graph("decode_step").states
    caches = sum(math.prod(state.shape) for state in states if len(state.shape) == 4)
    assert bytes_per_step(load_checkpoint(tiny_reference).decoder) == 4 * (matrices + caches)


def test_the_fill_is_longer_than_every_context(tiny_bundle: Path) -> None:
    from mossnano_stdio.benchmarks.graphs import _frames_to_fill

    assert _frames_to_fill(load_bundle(tiny_bundle)) >= 10
