"""`mossnano check`: whole weights pass, and every kind of fault is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mossnano_stdio.codecs import whole
from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.weights import METADATA_NAME, Sidecar, load_sidecar, record_files, save_sidecar
from tests.conftest import ENCODE, FULL, SHARED, STEP
from tests.tool import call_tool

ENCODE_DATA = "moss_audio_tokenizer_encode.data"


@pytest.fixture(autouse=True)
def fewer_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny bundle's contexts are short."""
    monkeypatch.setattr("mossnano_stdio.tools.check.LONG_FRAMES", 26)


@pytest.fixture
def folder(folder: Path) -> Path:
    """Recorded as if it had been built."""
    record(folder)
    return folder


def record(folder: Path) -> None:
    names = [METADATA_NAME, STEP, FULL, SHARED, ENCODE, ENCODE_DATA]
    save_sidecar(folder, Sidecar(codebook_size=1024, files=record_files(folder, names)))


def check(folder: object) -> tuple[int, dict[str, dict[str, str]]]:
    """The status, and each check by its name."""
    outcome = call_tool("check", folder, "--threads", 1, "--json")
    document = json.loads(outcome.out)
    assert document["passed"] == (outcome.status == 0)
    return outcome.status, {f"{row['about']} {row['name']}": row for row in document["checks"]}


def test_whole_weights_pass(folder: Path) -> None:
    status, rows = check(folder)
    assert status == ExitStatus.DONE
    assert {row["verdict"] for row in rows.values()} == {"ok"}
    assert [name for name in rows if name.startswith("file")] == [
        f"file {name}" for name in (METADATA_NAME, STEP, SHARED, FULL, ENCODE, ENCODE_DATA)
    ]
    assert [name for name in rows if name.startswith("graph")] == [
        "graph decode_step",
        "graph decode_full",
        "graph encode",
    ]
    assert "as recorded" in rows[f"file {SHARED}"]["detail"]


def test_the_table(folder: Path) -> None:
    outcome = call_tool("check", folder)
    assert outcome.status == 0
    lines = outcome.out.decode().splitlines()
    assert lines[0] == f"{folder}: bundle"
    assert lines[-1] == "all is well"
    assert all(line.split()[0] == "ok" for line in lines[1:-1])


def test_the_demo_passes() -> None:
    assert check("demo")[0] == ExitStatus.DONE


def test_weights_that_nobody_knows_are_said_to_be_unknown(tiny_bundle: Path) -> None:
    status, rows = check(tiny_bundle)
    assert status == ExitStatus.DONE
    assert rows[f"file {SHARED}"]["verdict"] == "unknown"


def test_what_is_not_needed_may_be_absent(folder: Path) -> None:
    for name in (FULL, ENCODE, ENCODE_DATA):
        (folder / name).unlink()
    status, rows = check(folder)
    assert status == ExitStatus.DONE
    assert rows[f"file {ENCODE}"]["verdict"] == "absent"
    assert rows["sound decode_full"]["verdict"] == "absent"


def flip(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1000] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", [STEP, SHARED, ENCODE_DATA])
def test_a_damaged_file_is_found_although_it_was_right_before(folder: Path, name: str) -> None:
    assert check(folder)[0] == ExitStatus.DONE
    flip(folder, name)
    status, rows = check(folder)
    assert status == ExitStatus.NO_WEIGHTS
    assert rows[f"file {name}"]["verdict"] == "FAILED"
    assert "SHA-256" in rows[f"file {name}"]["detail"]
    assert not any(row["about"] == "sound" for row in rows.values()), "damaged weights are not run"


def test_a_missing_file(folder: Path) -> None:
    (folder / SHARED).unlink()
    status, rows = check(folder)
    assert status == ExitStatus.NO_WEIGHTS
    assert rows[f"file {SHARED}"]["verdict"] == "FAILED"
    assert "is not there" in rows[f"file {SHARED}"]["detail"]


def test_no_weights_at_all(tmp_path: Path) -> None:
    outcome = call_tool("check", tmp_path / "nowhere")
    assert outcome.status == ExitStatus.NO_WEIGHTS
    assert "nowhere: is not there" in outcome.error_line


def spoil(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    record(path.parent)


def scaled(factor: float) -> Callable[[onnx.ModelProto], None]:
    """A graph that is louder or softer than it should be."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["audio_before" if name == "audio" else name for name in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        model.graph.node.append(helper.make_node("Mul", ["audio_before", "factor"], ["audio"]))

    return change


def test_a_graph_of_another_contract(folder: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.output.pop()

    spoil(folder / STEP, change)
    status, rows = check(folder)
    assert status == ExitStatus.NO_WEIGHTS
    assert rows["graph decode_step"]["verdict"] == "FAILED"
    assert "which the metadata promises" in rows["graph decode_step"]["detail"]


def test_steps_that_sound_unlike_the_whole(folder: Path) -> None:
    spoil(folder / STEP, scaled(1.001))
    status, rows = check(folder)
    assert status == ExitStatus.CHECK_FAILED
    assert rows["sound decode_full"]["verdict"] == "ok"
    assert [rows[f"sound official, chunks of {frames}"]["verdict"] for frames in (1, 7, 23)] == ["FAILED"] * 3
    assert call_tool("check", folder).out.decode().splitlines()[-1] == "FAILED"


@pytest.mark.parametrize(("factor", "words"), [(0.0, "gives silence"), (float("nan"), "gives NaN or infinity")])
def test_weights_that_make_no_sound(folder: Path, factor: float, words: str) -> None:
    for name in (STEP, FULL):
        spoil(folder / name, scaled(factor))
    status, rows = check(folder)
    assert status == ExitStatus.CHECK_FAILED
    assert words in rows["sound decode_full"]["detail"]


def test_fewer_frames_where_memory_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_free_bytes", lambda: 1 << 20)
    status, rows = check(folder)
    assert status == ExitStatus.DONE
    assert "over 24 frames" in rows["sound official, chunks of 7"]["detail"]


# --- graphs of our own --------------------------------------------------------------------------------------------


@pytest.fixture
def built(built_bundle: Path, tmp_path: Path) -> Path:
    """A copy of what we build, that may be spoilt."""
    return Path(shutil.copytree(built_bundle, tmp_path / "built", copy_function=shutil.copyfile))


def test_our_own_graphs_are_checked_too(built: Path) -> None:
    status, rows = check(built)
    assert status == ExitStatus.DONE
    assert {row["verdict"] for row in rows.values()} == {"ok"}
    assert {"graph fast", "graph encode_step"} <= rows.keys()
    for graph in ("official", "fast", "encode_step"):
        assert [f"sound {graph}, chunks of {frames}" in rows for frames in (1, 7, 23)] == [True] * 3


@pytest.mark.parametrize(("graph", "output"), [("fast", "audio"), ("encode_step", "codes")])
def test_a_graph_of_our_own_that_is_wrong(built: Path, graph: str, output: str) -> None:
    sidecar = load_sidecar(built)
    path = built / sidecar.graphs[graph].file
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    if output == "audio":
        model.graph.node.append(helper.make_node("Neg", ["before"], [output]))
    else:  # other codes, but in range
        model.graph.initializer.append(numpy_helper.from_array(np.array(1023, np.int32), "most"))
        model.graph.node.append(helper.make_node("Sub", ["most", "before"], [output]))
    path.write_bytes(model.SerializeToString())
    files = {**sidecar.files, **record_files(built, [path.name])}
    save_sidecar(built, replace(sidecar, files=files))
    status, rows = check(built)
    assert status == ExitStatus.CHECK_FAILED
    assert rows[f"graph {graph}"]["verdict"] == "ok"
    assert [rows[f"sound {graph}, chunks of {frames}"]["verdict"] for frames in (1, 7, 23)] == ["FAILED"] * 3
    assert rows["sound official, chunks of 7"]["verdict"] == "ok"


def test_what_this_onnxruntime_cannot_run_is_absent(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mossnano_stdio.codecs.in_place.attention_support", lambda: "none")
    status, rows = check(built)
    assert status == ExitStatus.DONE
    assert rows["graph fast"]["verdict"] == rows["graph encode_step"]["verdict"] == "absent"
