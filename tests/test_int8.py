"""build/int8.py and precision.py: 8 bits where the bar allows, safe on any CPU, and chosen by `--precision`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mossnano_stdio import Codec, codecs
from mossnano_stdio.build import precision, trial
from mossnano_stdio.build.bundle import Int8Wish, build_from_checkpoint
from mossnano_stdio.build.int8 import BLOCK, MAX_PAIR, ZERO, in_blocks, in_columns
from mossnano_stdio.codecs.engine import import_onnxruntime
from mossnano_stdio.errors import BundleError, CheckFailedError, ExitStatus, InputError
from mossnano_stdio.tokens import Artifact, Codes, build_artifact
from mossnano_stdio.tools.bench.sides import float32_side, sides_of
from mossnano_stdio.tools.bench.worker import Worker
from mossnano_stdio.weights import Bundle, load_bundle
from tests.child import PROCESS, decoded, encoded, fields, random_tokens, run
from tests.conftest import skip_if_nothing_can_be_built
from tests.tool import call_tool

BAR_DB = 50.0  # which some parts of the tiny model break and others do not
LEAST_CHOSEN = 3


@pytest.fixture(scope="module")
def int8_bundle(tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_if_nothing_can_be_built()
    folder = tmp_path_factory.mktemp("int8")
    arguments = ["--graphs", "fast", "--what", "decode", "--precision", "float32,int8", "--int8-db", BAR_DB]
    assert call_tool("build", tiny_reference, folder, *arguments) == (0, f"{folder}\n".encode(), "")
    return folder


@pytest.fixture(scope="module")
def bundle(int8_bundle: Path) -> Bundle:
    return load_bundle(int8_bundle)


# --- 8 bits on any CPU -------------------------------------------------------------------------------------------


def saturating_products(x: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """x . values as CPUs without VNNI add them up: two neighbours in 16 bits, and those sums in 32."""
    padding = x.shape[1] % 2
    x, values = (np.pad(array, ((0, 0), (0, padding))) for array in (x, values))
    products = x[:, np.newaxis] * values[np.newaxis]
    pairs = products.reshape(*products.shape[:2], -1, 2).sum(axis=3)
    sums: NDArray[np.int64] = np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=2)
    return sums


def loudest_inputs(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The unsigned bytes by which each column gets as far up, and as far down, as it can; and all of them at once."""
    loudest: NDArray[np.int64] = np.concatenate(
        [np.where(values > 0, 255, 0), np.where(values < 0, 255, 0), np.full((1, values.shape[1]), 255)]
    )
    return loudest


def matrices() -> st.SearchStrategy[NDArray[np.float32]]:
    def of(seed: int, rows: int, columns: int, kind: str) -> NDArray[np.float32]:
        random = np.random.default_rng(seed)
        matrix = random.standard_normal((rows, columns))
        if kind == "all alike":
            matrix = np.sign(matrix)
        elif kind == "of one sign":
            matrix = np.ones((rows, columns))
        elif kind == "with an outlier":
            matrix[0, 0] = 1e4
        elif kind == "with zeros":
            matrix[0] = 0
            matrix[-1] *= 1e-44
        return matrix.astype(np.float32)

    kinds = st.sampled_from(["any", "all alike", "of one sign", "with an outlier", "with zeros"])
    return st.builds(of, st.integers(0, 1000), st.integers(1, 8), st.integers(1, 33), kinds)


@given(matrices())
def test_no_cpu_saturates(matrix: NDArray[np.float32]) -> None:
    values = in_columns(matrix).values.astype(np.int64)
    x = loudest_inputs(values)
    assert (saturating_products(x, values) == x @ values.T).all()


def test_plain_rounding_would_saturate() -> None:
    """So the test before can fail."""
    values = np.full((4, 32), 127)
    x = loudest_inputs(values)
    assert (saturating_products(x, values) != x @ values.T).any()


@given(matrices())
def test_what_is_quantized_is_near(matrix: NDArray[np.float32]) -> None:
    """No farther from the matrix than 7 bits would be, with which no neighbours saturate either."""
    values, scales = in_columns(matrix)
    seven_bits = np.abs(matrix).max(axis=1, keepdims=True, initial=1e-20) / (MAX_PAIR // 2)
    rounded = np.rint(matrix / seven_bits) * seven_bits
    found, expected = (np.square(made - matrix, dtype=np.float64).sum() for made in (values * scales[:, None], rounded))
    assert found <= expected + 1e-12 * np.square(matrix, dtype=np.float64).sum()
    assert (scales > 0).all()


@given(matrices())
def test_blocks_are_as_near_as_their_largest_value_allows(matrix: NDArray[np.float32]) -> None:
    values, scales = in_blocks(matrix)
    found = ((values.astype(np.int64) - ZERO) * scales[:, :, np.newaxis]).reshape(len(matrix), -1)
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % BLOCK)))
    steps = np.repeat(scales, BLOCK, axis=1)
    assert (np.abs(found - padded) <= steps * 0.501).all()
    assert (values >= ZERO - 127).all()


def extreme_matrix() -> NDArray[np.float32]:
    signs: NDArray[np.float32] = np.sign(np.random.default_rng(0).standard_normal((64, 256))).astype(np.float32)
    return signs


def run_product(
    kind: str, x: NDArray[np.int64], values: NDArray[Any], scales: tuple[int, ...], **attributes: int
) -> Any:
    """y of one node, with scales of 1."""
    node = helper.make_node(kind, ["x", "values", "scales"], ["y"], domain="com.microsoft", **attributes)
    tensors = [numpy_helper.from_array(np.ascontiguousarray(values), "values")]
    tensors.append(numpy_helper.from_array(np.ones(scales, np.float32), "scales"))
    x_end, y_end = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["t", "c"]) for name in "xy")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", [x_end], [y_end], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.astype(np.float32)})[0]


# On the CPU that runs these two. Where it has VNNI, an emulated one without shows more: `qemu-x86_64 -cpu Haswell`.


def test_the_runtime_multiplies_extreme_columns_exactly() -> None:
    values = in_columns(extreme_matrix()).values
    assert np.abs(values).max() == MAX_PAIR // 2
    x = loudest_inputs(values.astype(np.int64))[-5:]
    x[:, :2] = (0, 255)  # so that 255 is 255, and 0 is 0
    found = run_product("DynamicQuantizeMatMul", x, values.T, (len(values),))
    assert (found == x @ values.T.astype(np.int64)).all()


def test_the_runtime_multiplies_extreme_blocks_exactly() -> None:
    values = in_blocks(extreme_matrix()).values
    signed = values.reshape(len(values), -1).astype(np.int64) - ZERO
    assert np.abs(signed).min() == 127
    x = np.concatenate([127 * np.sign(signed[:5]), np.full((1, signed.shape[1]), 127)])
    rows, columns = signed.shape
    attributes = {"K": columns, "N": rows, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    found = run_product("MatMulNBits", x, values, (rows, columns // BLOCK), **attributes)
    assert np.abs(found - x @ signed.T).max() <= 1e-6 * np.abs(x @ signed.T).max()


# --- what is built -----------------------------------------------------------------------------------------------


def test_the_float32_files_stay_as_they_are(int8_bundle: Path, built_bundle: Path) -> None:
    for name in ("mossnano_fast.onnx", "mossnano_fast.data"):
        assert (int8_bundle / name).read_bytes() == (built_bundle / name).read_bytes()


def test_the_sidecar_says_what_was_done(bundle: Bundle, int8_bundle: Path) -> None:
    graph = bundle.graph("fast_int8")
    plan = graph.facts["int8"]
    assert (graph.precision, plan["bar_db"]) == ("int8", BAR_DB)
    assert plan["snr_db"] >= BAR_DB
    codes = np.random.default_rng(0).integers(0, 1024, (188, 16), dtype=np.uint16)
    digest = hashlib.sha256(np.array([188, 16], "<u8").tobytes() + codes.astype("<u2").tobytes())
    assert plan["codes_sha256"] == digest.hexdigest()
    assert {file.origin for file in graph.files} == {"recorded"}
    assert sorted(path.name for path in int8_bundle.glob("*int8*")) == sorted(file.path.name for file in graph.files)
    assert graph.data[0].path.stat().st_size < bundle.graph("fast").data[0].path.stat().st_size


def test_products_are_in_8_bits_as_planned_and_nothing_else_is(bundle: Bundle) -> None:
    graph = bundle.graph("fast_int8")
    model = onnx.load(graph.path)
    forms = {"DynamicQuantizeMatMul": onnx.TensorProto.INT8, "MatMulNBits": onnx.TensorProto.UINT8}
    products = [node for node in model.graph.node if node.op_type in forms]
    weights = [node.input[1].removesuffix(".values") for node in products]
    parts = {".".join([*weight.split(".")[:2], weight.split(".")[-1]]) for weight in weights}
    assert parts == set(graph.facts["int8"]["parts"])
    assert len(parts) >= LEAST_CHOSEN
    floats = [node.input[1] for node in model.graph.node if node.op_type == "FusedMatMul"]
    assert floats, "the bar is such that not all of it is"
    assert {"audio.weight", "decoder.1.in.weight", "decoder.3.in.weight"} <= set(floats)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(types[node.input[1]] == forms[node.op_type] for node in products)


@pytest.mark.parametrize("chunk_frames", [1, 8])
def test_the_worst_second_keeps_the_bar(bundle: Bundle, chunk_frames: int) -> None:
    """Over other codes, and in other chunks, than it was built with: it may miss by a little."""
    stream = np.random.default_rng(7).integers(0, 1024, (100, 16)).astype(np.uint16)
    expected, found = (
        in_chunks(codecs.load_decoder(bundle, precision=name, threads=1), stream, chunk_frames)
        for name in ("float32", "int8")
    )
    seconds = [slice(start, start + 48_000) for start in range(0, len(expected) - 48_000, 48_000)]
    worst = max(np.square(found[part] - expected[part]).sum() / np.square(expected[part]).sum() for part in seconds)
    assert BAR_DB - 2 < -10 * np.log10(worst) < BAR_DB + 15


def in_chunks(decoder: codecs.SeekingDecoder, stream: Codes, chunk_frames: int) -> NDArray[np.float64]:
    starts = range(0, len(stream), chunk_frames)
    return np.concatenate([decoder.step(stream[at : at + chunk_frames]) for at in starts]).astype(np.float64)


def test_the_same_weights_give_the_same_files(tiny_reference: Path, int8_bundle: Path, tmp_path: Path) -> None:
    build_from_checkpoint(tiny_reference, tmp_path, "decode", "fast", Int8Wish(BAR_DB, ()))
    for path in int8_bundle.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_recorded_codes_count(
    int8_bundle: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are decoded with, and what was decoded is told."""
    monkeypatch.setattr(precision, "DECODED_SECONDS", 2)
    recorded = np.tile(np.arange(16, dtype=np.uint16), (30, 1))
    np.save(tmp_path / "recorded.npy", recorded)
    (tmp_path / "recorded.mossnano").write_bytes(build_artifact(Artifact(48000, 2, 30 * 3840, 16, 30, 1024, recorded)))
    paths = tuple(tmp_path / name for name in ("recorded.npy", "recorded.mossnano"))
    built = precision.add_int8(copied(int8_bundle, tmp_path / "copy"), bundle, Int8Wish(BAR_DB, paths))["fast_int8"]
    alone = precision.add_int8(tmp_path / "copy", bundle, Int8Wish(BAR_DB, ()))["fast_int8"]
    streams = [precision.seeded_codes(bundle.format), recorded, recorded]
    assert built.facts["int8"]["codes_sha256"] == precision.digest_of(streams)
    assert alone.facts["int8"]["codes_sha256"] == precision.digest_of(streams[:1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.full((9, 17), 5), "holds 17 codes in each frame, allowed are 1 to 16"),
        (np.full((9, 0), 5), "holds 0 codes in each frame, allowed are 1 to 16"),
        (np.where(np.arange(144).reshape(9, 16) == 116, 1024, 5), "code 4 of frame 7 is 1024, allowed are 0 to 1023"),
        (np.where(np.arange(144).reshape(9, 16) == 116, -1, 5), "code 4 of frame 7 is -1, codes are 0 to 65535"),
        (np.full(9, 5), r"the .npy file holds int64 \[9\], allowed are integers \[frames, quantizers\]"),
    ],
)
def test_recorded_codes_that_are_wrong_are_told_with_their_file(
    bundle: Bundle, tmp_path: Path, wrong: NDArray[np.int64], words: str
) -> None:
    """The frame is that of the file, whatever chunks it would be decoded in."""
    np.save(tmp_path / "recorded.npy", wrong)
    with pytest.raises(InputError, match=f"recorded.npy: {words}"):
        precision.load_recorded(tmp_path / "recorded.npy", bundle.format)


def test_recorded_artifacts_of_another_codec_are_told_with_their_file(bundle: Bundle, tmp_path: Path) -> None:
    artifact = Artifact(24_000, 1, 0, 32, 1, 2048, np.zeros((1, 32), np.uint16))
    (tmp_path / "recorded.mossnano").write_bytes(build_artifact(artifact))
    with pytest.raises(InputError, match=r"recorded.mossnano: the artifact's sample_rate is 24000"):
        precision.load_recorded(tmp_path / "recorded.mossnano", bundle.format)


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_graph_that_misses_its_bar_is_not_kept(bundle: Bundle) -> None:
    graph = bundle.graphs["fast_int8"]
    facts = {**graph.facts, "int8": {**graph.facts["int8"], "bar_db": graph.facts["int8"]["snr_db"] + 0.1}}
    wanting = replace(bundle, graphs={**bundle.graphs, "fast_int8": replace(graph, facts=facts)})
    with pytest.raises(CheckFailedError, match=r"is at \d+\.\d\d dB of mossnano_fast.onnx in its worst second"):
        trial.try_int8(wanting, "fast", ())
    trial.try_int8(bundle, "fast", ())


def test_a_bar_that_nothing_reaches(tiny_reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "DECODED_SECONDS", 1)
    with pytest.raises(CheckFailedError, match=r"no part of this graph can be in 8 bits at 150 dB, the best one"):
        build_from_checkpoint(tiny_reference, tmp_path / "out", "decode", "fast", Int8Wish(150, ()))
    assert not (tmp_path / "out").exists()


def test_noise_is_that_of_the_worst_second() -> None:
    rate = 100
    expected = np.full((250, 1), 0.5, np.float32)
    found = expected.copy()
    found[120] += 0.05
    noises = precision.noises_of([found], [expected], rate)
    assert len(noises) == 3
    assert precision.worst_db(noises) == pytest.approx(10 * np.log10(0.25 * rate / 0.05**2), abs=1e-4)
    found[240] = np.nan
    assert not precision.worst_db(precision.noises_of([found], [expected], rate)) >= 0


def test_noise_softer_than_16_bits_is_none() -> None:
    silence = np.zeros((100, 2), np.float32)
    assert precision.noises_of([silence + np.float32(5e-6)], [silence], 100).tolist() == [0]
    assert precision.noises_of([silence + np.float32(1e-3)], [silence], 100).tolist() == [np.inf]


# --- what is chosen ----------------------------------------------------------------------------------------------


def test_the_process_says_its_precision(int8_bundle: Path, bundle: Bundle) -> None:
    wire = encoded(random_tokens(3))
    pcm = {}
    for name in ("float32", "int8"):
        done = run([*PROCESS, "--weights", str(int8_bundle), "--threads", "1", "--precision", name], wire)
        assert done.returncode == 0, done.stderr
        messages = decoded(done.stdout)
        said = fields(messages[0])
        assert (said["graph"], said["precision"]) == ("fast", name)
        pcm[name] = b"".join(message.payload for message in messages[1:-1])
    assert pcm["float32"] != pcm["int8"]


def test_tools_and_library_take_it(int8_bundle: Path, bundle: Bundle, codes: Codes, tmp_path: Path) -> None:
    np.save(tmp_path / "codes.npy", codes)
    assert call_tool("pack", tmp_path / "codes.npy", tmp_path / "a.mossnano").status == 0
    arguments = [
        tmp_path / "a.mossnano",
        tmp_path / "out.wav",
        "--weights",
        int8_bundle,
        "--precision",
        "int8",
        "--json",
    ]
    said = json.loads(call_tool("decode", *arguments).out)
    assert (said["graph"], said["precision"]) == ("fast", "int8")
    with Codec.load(int8_bundle, precision="int8") as codec, Codec.load(int8_bundle) as plain:
        found, expected = codec.decode(codes), plain.decode(codes)
    assert not np.array_equal(found, expected)
    assert np.square(found - expected).sum() < 1e-4 * np.square(expected).sum()


def test_float32_is_the_default(bundle: Bundle) -> None:
    assert codecs.load_runtime(bundle, threads=1).precision == "float32"


def test_weights_with_int8_pass_the_check(int8_bundle: Path) -> None:
    outcome = call_tool("check", int8_bundle, "--threads", "1", "--json")
    rows = {row["name"]: row for row in json.loads(outcome.out)["checks"]}
    assert (outcome.status, rows["fast_int8"]["verdict"]) == (0, "ok")
    assert "dB above its noise" in rows["fast_int8, chunks of 7"]["detail"]


def test_a_noisy_int8_fails_the_check(int8_bundle: Path, tmp_path: Path) -> None:
    folder = copied(int8_bundle, tmp_path / "noisy")
    path = folder / "mossnano.json"
    sidecar = json.loads(path.read_text())
    sidecar["graphs"]["fast_int8"]["facts"]["int8"]["snr_db"] += 30
    path.write_text(json.dumps(sidecar))
    outcome = call_tool("check", folder, "--threads", "1", "--json")
    failed = [row["name"] for row in json.loads(outcome.out)["checks"] if row["verdict"] == "FAILED"]
    assert outcome.status == ExitStatus.CHECK_FAILED
    assert failed == [f"fast_int8, chunks of {chunk}" for chunk in (1, 7, 23)]


def test_the_bench_has_a_side_for_it(int8_bundle: Path, tiny_bundle: Path) -> None:
    sides = sides_of(load_bundle(int8_bundle), [load_bundle(tiny_bundle)])
    assert [(side.name, side.kind) for side in sides] == [
        ("fast graph", "fast"),
        ("fast graph, int8", "fast-int8"),
        ("bundle, official", "official"),
    ]
    assert float32_side(load_bundle(int8_bundle)).kind == "fast"
    (stream,) = Worker("fast-int8", str(int8_bundle), 1, 8, 1024, 16, 3840).streams
    assert stream.runtime.precision == "int8"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (
            ["--precision", "int8"],
            ExitStatus.NO_WEIGHTS,
            "has no int8 graph; `mossnano build --precision float32,int8`",
        ),
        (["--precision", "int8", "--graph", "official"], ExitStatus.USAGE, "the official graph has no int8"),
        (["--precision", "int8", "--decoder", "full"], ExitStatus.USAGE, "no other graph and no int8"),
        (["--precision", "int4"], ExitStatus.USAGE, "invalid choice: 'int4'"),
    ],
)
def test_what_is_not_there_is_an_error(
    arguments: list[str], status: ExitStatus, words: str, tiny_bundle: Path, codes: Codes, tmp_path: Path
) -> None:
    np.save(tmp_path / "codes.npy", codes)
    call_tool("pack", tmp_path / "codes.npy", tmp_path / "a.mossnano")
    outcome = call_tool("decode", tmp_path / "a.mossnano", tmp_path / "x.wav", "--weights", tiny_bundle, *arguments)
    assert (outcome.status, words in outcome.err) == (status, True), outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "a", "b", "--precision", "int8"], "invalid choice: 'int8'"),
        (["build", "a", "b", "--int8-db", "40"], "are for --precision float32,int8, which is not given"),
        (["build", "a", "b", "--codes", "x.npy"], "are for --precision float32,int8, which is not given"),
        (["build", "a", "b", "--precision", "float32,int8", "--graphs", "official"], "of our graph that decodes"),
        (["build", "a", "b", "--precision", "float32,int8", "--what", "encode"], "of our graph that decodes"),
        (["fetch", "--precision", "float32,int8", "--no-build"], "leave --no-build out"),
        (["fetch", "--precision", "float32,int8", "--what", "checkpoint"], "--what but decode"),
        (["fetch", "--codes", "x.npy"], "are for --precision float32,int8, which is not given"),
    ],
)
def test_flags_that_make_no_sense(arguments: list[str], words: str) -> None:
    outcome = call_tool(*arguments)
    assert (outcome.status, words in outcome.err) == (ExitStatus.USAGE, True), outcome.err


def test_codes_that_are_not_there_are_missed_before_anything_is_built() -> None:
    outcome = call_tool("build", "no-checkpoint", "out", "--precision", "float32,int8", "--codes", "nowhere.npy")
    assert (outcome.status, "nowhere.npy" in outcome.err) == (66, True), outcome.err


def test_an_encoder_has_no_precision() -> None:
    done = run([*PROCESS, "--encode", "--precision", "int8"])
    assert done.returncode == ExitStatus.USAGE
    assert b"--precision is for decoding" in done.stderr


# --- Mimi --------------------------------------------------------------------------------------------------------


def test_mimi_in_int8(mimi_standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same code: products of its transformer, and convolutions, which have biases."""
    monkeypatch.setattr(precision, "DECODED_SECONDS", 2)
    build_from_checkpoint(mimi_standin / "checkpoint", tmp_path, "decode", "fast", Int8Wish(15, ()))
    for name in ("mimi_decode_step.onnx", "mimi_decode_step.data"):
        assert (tmp_path / name).read_bytes() == (mimi_standin / name).read_bytes()
    built = load_bundle(tmp_path)
    graph = built.graph("decode_step_int8")
    nodes = onnx.load(graph.path, load_external_data=False).graph.node
    with_biases = {node.op_type for node in nodes if any(name.endswith(".bias") for name in node.input)}
    assert {"DynamicQuantizeMatMul", "MatMulNBits"} <= with_biases, "columns, and blocks where tokens are few"
    stream = np.random.default_rng(8).integers(0, 2048, (30, 8)).astype(np.uint16)
    runtimes = [codecs.load_runtime(built, precision=name, threads=1) for name in ("float32", "int8")]
    assert [(runtime.graph_name, runtime.precision) for runtime in runtimes] == [
        ("decode_step", "float32"),
        ("decode_step", "int8"),
    ]
    expected, found = (in_chunks(runtime.new_decoder(), stream, 1) for runtime in runtimes)
    assert 12 < -10 * np.log10(np.square(found - expected).sum() / np.square(expected).sum()) < 60


def test_mimi_without_int8_says_so(mimi_standin: Path) -> None:
    with pytest.raises(BundleError, match="has no int8 graph; `mossnano build --precision float32,int8` makes one"):
        codecs.load_runtime(load_bundle(mimi_standin), precision="int8")
