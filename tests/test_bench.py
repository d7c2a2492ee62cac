"""`mossnano bench` measures what it says: that it runs, that its figures are there, and what it counts."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors

from mossnano_stdio import cli
from mossnano_stdio.build.arithmetic import bytes_per_step, decoding_macs
from mossnano_stdio.build.bundle import build_standin, save_bundle
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.codecs.carried import CarriedStream
from mossnano_stdio.codecs.engine import PROVIDERS
from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.tools import bench as bench_tool
from mossnano_stdio.tools.bench import ELSEWHERE, voices
from mossnano_stdio.tools.bench.estimate import Estimate, Pace
from mossnano_stdio.tools.bench.sides import GraphBench, Side, sides_of
from mossnano_stdio.tools.bench.worker import LoopStream
from mossnano_stdio.tools.bench.worker import Worker as RealWorker
from mossnano_stdio.weights import DECODE_STEP_FILE, DEMO_FOLDER, load_bundle
from tests.tool import COMMAND, Outcome, call_tool

SIDES = {"official loop", "our runtime, official graph"}


QUICK = ("--threads", "1", "--turns", "1", "--json")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plot") / "steps.png"


@pytest.fixture(scope="module")
def graphs_measured(tiny_bundle: Path, picture: Path) -> Outcome:
    plot = ["--plot", picture] if find_spec("matplotlib") else []
    return call_tool("bench", "--weights", tiny_bundle, "--chunks", "1,3", *QUICK, *plot)


@pytest.fixture(scope="module")
def process_measured() -> Outcome:
    return call_tool("bench", "--weights", "demo", "--process", *QUICK)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_an_hour_of_codes(capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(bench(capsys, "--bits", "--json"))["bits"]
    assert figures["frames"] == 45_000
    assert figures["pack_ms"] > 0
    assert figures["unpack_ms"] > 0


def test_graphs_side_by_side(graphs_measured: Outcome, picture: Path) -> None:
    figures = json.loads(graphs_measured.out)["threads"]["1"]
    assert set(figures["steps_ms"]) == {"1", "3"}
    assert set(figures["utterances_ms"]) == {"0.08", "1", "3", "10"}
    for cells in (figures["steps_ms"]["3"], figures["starts"]["load_ms"], figures["real_time_streams"]["8"]):
        assert set(cells) == SIDES
        assert all(cell["lowest"] <= cell["median"] <= cell["highest"] for cell in cells.values())
        assert cells["official loop"]["times"] == 1
    starts = {part: cells["official loop"]["median"] for part, cells in figures["starts"].items()}
    assert starts["start_to_first_audio_ms"] > starts["import_ms"] + starts["load_ms"] + starts["first_step_ms"]
    assert figures["limit_ms_per_frame"] > 0
    assert figures["reading_ms_per_step"] > 0
    assert find_spec("matplotlib") is None or picture.read_bytes()[:4] == b"\x89PNG"


def test_one_graph_is_measured_alone_and_beside_others(tmp_path: Path, tiny_bundle: Path) -> None:
    weights = load_checkpoint(Path(__file__).parent / "reference" / "moss-24k", "decode")
    save_bundle(tmp_path, weights, name="f", checkpoint_name="f", graphs="fast", trial=False)
    quick = ("--threads", "1", "--chunks", "1", "--turns", "1", "--json")
    outcome = call_tool("bench", "--weights", tmp_path, *quick)
    assert outcome.status == 0, outcome.err
    assert f"fast graph of {tmp_path} is measured alone" in outcome.err
    assert "no limit is computed, as the work is counted in official graphs" in outcome.err
    assert set(json.loads(outcome.out)["threads"]["1"]["steps_ms"]["1"]) == {"fast graph"}
    sides = sides_of(load_bundle(tmp_path), [load_bundle(tiny_bundle)])
    assert [(side.name, side.kind) for side in sides] == [("fast graph", "fast"), ("bundle, official", "official")]


def test_a_provider_is_measured_beside_the_cpu(
    built_bundle: Path, mimi_standin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[str]] = []

    def note_sides(_: object, sides: Sequence[Side], *_rest: object, has_limits: bool) -> None:
        assert not has_limits
        measured.append([side.name for side in sides])

    assert set(ELSEWHERE) == PROVIDERS.keys() - {"cpu"}
    for folder, names in (
        (built_bundle, ["official loop", "our runtime, official graph", "fast graph", "fast graph, coreml"]),
        (mimi_standin, ["our runtime", "our runtime, coreml"]),
    ):
        sides = sides_of(load_bundle(folder), maybe_provider="coreml")
        assert [side.name for side in sides] == names
        outcome = call_tool("bench", "--weights", folder, "--provider", "coreml", "--steps", "--threads", "1")
        assert outcome.status == ExitStatus.NO_WEIGHTS
        assert "provider 'coreml' is not in this onnxruntime" in outcome.error_line
        monkeypatch.setitem(PROVIDERS, "coreml", PROVIDERS["cpu"])  # pretended: it computes on the CPU
        for kind in (sides[-1].kind, "encode@coreml"):
            worker = RealWorker(kind, str(folder), 1, 8, 1024, 0, load_bundle(folder).format.frame_samples)
            assert isinstance(worker.streams[0]._stream, CarriedStream)
            assert len(worker.steps(chunk_frames=2, steps=3)) == 3
        monkeypatch.setattr(bench_tool, "_measure_sides", note_sides)
        assert call_tool("bench", "--weights", folder, "--encode", "--provider", "coreml").status == 0
        assert measured.pop() == ["decoding", "encoding", "encoding, coreml"]
        monkeypatch.undo()
    for what in (["--bits"], ["--process"], ["--streams", "1"]):
        outcome = call_tool("bench", "--weights", built_bundle, "--provider", "coreml", *what)
        assert outcome.status == ExitStatus.USAGE
        assert "--provider are for graphs; leave --bits, --process and --streams out" in outcome.error_line


def test_one_side_of_a_codec_is_measured_alone(tmp_path: Path) -> None:
    checkpoint = Path(__file__).parent / "reference" / "moss-24k"
    weights = load_checkpoint(checkpoint, "encode")
    save_bundle(tmp_path, weights, name="e", checkpoint_name="e", graphs="fast", trial=False)
    quick = ("--threads", "1", "--chunks", "1", "--turns", "1")
    outcome = call_tool("bench", "--weights", tmp_path, "--encode", *quick)
    assert f"encoding of {tmp_path} is measured alone" in outcome.err
    assert re.search(rb"encoding +[\d.]+  \([\d.]+ to [\d.]+\)$", outcome.out, re.MULTILINE), outcome.out
    for what in ([], ["--process"]):
        outcome = call_tool("bench", "--weights", tmp_path, *what, *quick)
        assert outcome.status == ExitStatus.NO_WEIGHTS
        assert "has no decoder to measure, `mossnano build` makes one; --encode measures" in outcome.error_line


def test_a_family_with_a_single_graph_is_measured(tmp_path: Path) -> None:
    build_standin(tmp_path, "tiny", 0, model="mimi", trial=False)
    outcome = call_tool("bench", "--weights", tmp_path, "--threads", "1", "--chunks", "1", "--turns", "1", "--json")
    assert outcome.status == 0, outcome.err
    assert set(json.loads(outcome.out)["threads"]["1"]["steps_ms"]["1"]) == {"our runtime"}


# --- how long it takes -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["graphs_measured", "process_measured"])
def test_it_says_first_how_long_it_takes_and_then_how_far_it_is(what: str, request: pytest.FixtureRequest) -> None:
    outcome: Outcome = request.getfixturevalue(what)
    assert outcome.status == 0
    lines = outcome.err.splitlines()
    begin = next(number for number, line in enumerate(lines) if re.fullmatch(r"this takes about \d+ (s|min)", line))
    assert not [line for line in lines[:begin] if line.startswith("[")]
    progress = [line for line in lines[begin:] if line.startswith("[")]
    parts = len(progress)
    assert parts >= 5
    for number, line in enumerate(progress, start=1):
        assert re.fullmatch(rf"\[{number}/{parts}\] .+ \(\d+ (s|min) of about \d+ (s|min)\)", line)


def test_packing_says_how_long_it_takes() -> None:
    assert "takes a few seconds" in call_tool("bench", "--bits").error_line


def test_the_estimate_counts_the_frames_that_a_worker_decodes(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second for each frame and none for anything else."""
    frames = 0

    def step(self: LoopStream, codes: Any) -> None:
        nonlocal frames
        frames += len(codes)

    monkeypatch.setattr(LoopStream, "step", step)
    worker = RealWorker("loop", str(tiny_bundle), 1, 20, 1024, 16, 3840)
    side = Side("the loop", "loop", tiny_bundle)
    estimate = Estimate({(side.name, 1): Pace(0, 0, lone_step_seconds=1, trial_step_seconds=8)}, frames_to_fill=20)
    calls = {
        "steps": worker.steps,
        "utterance": worker.utterance,
        "streams": worker.streams_at_once,
        "memory": worker.memory,
    }
    with estimate.start(side, 1) as reckoning:
        for what, details in (
            ("steps", {"chunk_frames": 4, "steps": 3}),
            ("steps", {"chunk_frames": 1, "steps": 5}),
            ("utterance", {"frames": 13, "chunk_frames": 1}),
            ("steps", {"chunk_frames": 1, "steps": 5}),
            ("memory", {}),
            ("streams", {"count": 4, "frames": 6}),
            ("memory", {"streams": 6}),
        ):
            frames, estimate.seconds = 0, 0.0
            calls[what](**details)  # type: ignore[operator]
            reckoning.ask(what, **details)
            assert estimate.seconds == frames, (what, details)


def test_cpu_time_leaves_waiting_out(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopStream, "step", lambda self, codes: time.sleep(0.05))
    worker = RealWorker("loop", str(tiny_bundle), 1, 8, 1024, 16, 3840)
    assert min(worker.steps(1, 2)) >= 50
    assert max(worker.steps(1, 2, cpu_time=1)) < 40


def test_the_estimate_counts_starts_sessions_and_rests(tiny_bundle: Path) -> None:
    loop, ours = Side("the loop", "loop", tiny_bundle), Side("ours", "official", tiny_bundle)
    pace = Pace(start_seconds=100, load_seconds=10, lone_step_seconds=0, trial_step_seconds=0)
    estimate = Estimate({(side.name, 2): pace for side in (loop, ours)}, frames_to_fill=20)
    with estimate.start(loop, 2) as one, estimate.start(ours, 2) as other:
        assert estimate.seconds == 200
        for worker in (one, other):
            worker.ask("streams", count=8, frames=6)  # the loop has a session for each, ours has one
            worker.ask("memory", streams=4)
            worker.rest(0.5)
    assert estimate.seconds == 200 + 7 * 10 + 2 * 0.5


def test_a_step_takes_what_the_line_through_both_tried_ones_says() -> None:
    pace = Pace(0, 0, lone_step_seconds=2, trial_step_seconds=9)
    assert [pace.step_seconds(frames) for frames in (1, 4, 8, 23)] == [2, 5, 9, 24]
    assert Pace(0, 0, 2, 1).step_seconds(23) == 2  # what was tried was disturbed


# --- an early end ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGINT, ExitStatus.INTERRUPTED, "mossnano bench: interrupted"),
        (signal.SIGTERM, ExitStatus.TERMINATED, "mossnano bench: terminated"),
    ],
)
def test_who_ends_it_early_gets_what_was_measured(
    tiny_bundle: Path, number: signal.Signals, status: int, words: str
) -> None:
    if sys.platform == "win32":
        pytest.skip("there are no such signals")
    command = [*COMMAND, "bench", "--weights", str(tiny_bundle), "--threads", "1", "--chunks", "1,2", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("[2/"):
                break
        os.killpg(child.pid, number)  # as a terminal does
        out, err = child.communicate(timeout=60)  # its workers, which have the same stderr, are gone as well
    assert child.returncode == status
    assert err.splitlines()[-1] == words
    assert "Traceback" not in err
    assert set(json.loads(out)["threads"]["1"]["steps_ms"]["1"]) == SIDES


class WorkerOfFewAnswers:
    """Is ended by Ctrl-C after so many."""

    facts: Mapping[str, float] = {}

    def __init__(self, answers: int) -> None:
        self.left = answers

    def ask(self, what: str, **details: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return [float(self.left)]

    def rest(self, seconds: float) -> None:
        pass


def test_turns_that_were_whole_count(tiny_bundle: Path) -> None:
    worker = WorkerOfFewAnswers(2 + 2 * 3 + 1)  # two sides: to warm up, three turns, and half of one

    @contextmanager
    def start(side: Side, threads: int) -> Iterator[WorkerOfFewAnswers]:
        yield worker

    sides = [Side("a", "loop", tiny_bundle), Side("b", "official", tiny_bundle)]
    found: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        GraphBench(12.5, sides, 9, start, lambda line: None).steps(1, [1, 2], found)
    (cells,) = found["steps_ms"].values()
    assert (cells["a"]["highest"], cells["a"]["median"], cells["a"]["lowest"]) == (6, 4, 2)
    assert (cells["b"]["highest"], cells["b"]["median"], cells["b"]["lowest"]) == (5, 3, 1)


def test_many_streams_are_measured_of_our_own_sides(tiny_bundle: Path) -> None:
    started = []

    class Answers(WorkerOfFewAnswers):
        def ask(self, what: str, **details: int) -> Any:
            return [24.0, 12.5] if what == "streams" else 1.0

    @contextmanager
    def start(side: Side, threads: int) -> Iterator[WorkerOfFewAnswers]:
        started.append(side.name)
        yield Answers(0)

    found: dict[str, Any] = {}
    sides = [Side("peer", "moshi", tiny_bundle, is_peer=True), Side("ours", "official", tiny_bundle)]
    GraphBench(12.5, sides, 1, start, lambda line: None).streams(1, found)
    assert set(started) == set(found["real_time_streams"]["8"]) == {"ours"}
    assert found["real_time_streams"]["8"]["ours"]["median"] == 24 / 12.5
    assert found["real_time_streams_per_core"]["8"]["ours"]["median"] == 1


def test_what_was_measured_is_shown_as_a_table(graphs_measured: Outcome) -> None:
    text = "\n".join(bench_tool._tables(json.loads(graphs_measured.out)))
    for words in ("step of 3, caches full, ms", "10 s from a reset", "8 streams at once", "GFLOP/s"):
        assert words in text
    assert re.search(r"^    official loop +[\d.]+  \([\d.]+ to [\d.]+\)  x 1\.00$", text, re.MULTILINE), text


@pytest.mark.parametrize(
    "figures",
    [
        {"weights": "w", "threads": {}},
        {"weights": "w", "threads": {"1": {}}},
        {"weights": "w", "threads": {"1": {"steps_ms": {}, "utterances_ms": {}}}},
        {"process": [{"threads": 1}]},
    ],
)
def test_whatever_is_there_can_be_shown(figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(args: object, found: dict[str, Any]) -> None:
        found |= figures
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_tool, "_measure", measure)
    outcome = call_tool("bench")
    assert (outcome.status, outcome.error_line) == (130, "mossnano bench: interrupted")
    assert outcome.out


def test_nothing_is_shown_where_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(args: object, found: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_tool, "_measure", measure)
    assert call_tool("bench", "--json").out == b""


# --- what is measured ------------------------------------------------------------------------------


def test_a_start_loads_nothing_that_decoding_does_not_need() -> None:
    """The process and its runtime; each module costs a start some time."""
    program = "import sys, mossnano_stdio.process.loop, mossnano_stdio.codecs.moss\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "mossnano_stdio.protocol" in loaded
    assert not {"decimal", "wave", "asyncio", "subprocess", "tempfile", "socket", "urllib.request"} & set(loaded)


def test_the_process_against_a_bare_loop(process_measured: Outcome) -> None:
    (figures,) = json.loads(process_measured.out)["process"]
    assert figures["overhead"]["8"]["process_over_bare"] > 0
    assert figures["first_audio"]["first_byte_p95_ms"] >= figures["first_audio"]["first_byte_p50_ms"]
    assert figures["start"]["handshake_ms"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_streams_over_one_pipe_against_a_process_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voices, "BULK_SECONDS", 0.4)
    monkeypatch.setattr(voices, "LIVE_SECONDS", 0.5)
    arguments = ["--weights", "demo", "--streams", "1,2", "--seconds", "1", "--turns", "1", "--json"]
    found = json.loads(bench(capsys, *arguments))["streams"]
    assert set(found) == {"1", "2"}
    for sides in found.values():
        assert set(sides) == {"one process", "a process each"}
        for figures in sides.values():
            assert figures["late_p99_ms"] >= figures["late_p50_ms"] > 0
            assert figures["real_time_streams_per_core"] > 0
            assert figures["first_audio_of_the_last_ms"] > 0
            assert 0 < figures["played_busy_cpus"] < 4
            assert (figures["played_silent_ms"] > 0) == (figures["played_underruns"] > 0)
    assert found["2"]["a process each"]["resident_mb"] > 1.5 * found["2"]["one process"]["resident_mb"]


def test_a_player_counts_what_is_not_there_in_time() -> None:
    player = voices._Player(1000, 900)
    player.play(150, 10.0)  # less than its prebuffer
    player.play(300, 10.1)
    for received, seconds, played in ((300, 10.2, 100), (300, 10.4, 300), (300, 10.5, 300), (900, 10.6, 400)):
        player.play(received, seconds)
        assert player.played_samples == played
    assert (player.underruns, round(player.silent_seconds, 3), player.is_done) == (1, 0.1, False)
    player.play(900, 12.0)
    assert player.is_done and player.underruns == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--seconds", "3"], ExitStatus.USAGE, "add --streams"),
        (["--encode"], ExitStatus.NO_WEIGHTS, "has no streaming encoder to measure"),
        (["--against", "demo", "--against", "demo", "--against", "demo"], ExitStatus.USAGE, "name it once"),
        (["--plot", "x.png", "--bits"], ExitStatus.USAGE, "leave --process, --encode and --bits out"),
        (["--plot", "-"], ExitStatus.USAGE, "--plot takes a file"),
        (["--plot", "no/such/x.png"], ExitStatus.OUTPUT_FAILED, "cannot write x.png there"),
    ],
)
def test_what_cannot_be_measured_is_said_before_it_is(arguments: list[str], status: int, words: str) -> None:
    if "no/such/x.png" in arguments:
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    outcome = call_tool("bench", "--weights", "demo", *arguments)
    assert outcome.status == status
    assert words in outcome.error_line


@pytest.mark.parametrize("what", [[], ["--process"]])
def test_weights_that_do_not_run(folder: Path, what: list[str]) -> None:
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
    from mossnano_stdio.tools.bench.sides import _frames_to_fill

    assert _frames_to_fill(load_bundle(tiny_bundle)) >= 10
