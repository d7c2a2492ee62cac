"""codecs/engine.py: no session from bad files, and none that is not what was asked for."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from mossnano_stdio import codecs
from mossnano_stdio.codecs import Engine, engine
from mossnano_stdio.codecs.engine import Session
from mossnano_stdio.codecs.moss import OfficialRuntime
from mossnano_stdio.errors import BundleError, DecodeError, UsageError
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import (
    DEMO_FOLDER,
    METADATA_NAME,
    Sidecar,
    load_bundle,
    published,
    record_files,
    save_sidecar,
)
from tests.conftest import FULL, SHARED, STEP, needs_symlinks
from tests.oracle import Sound, furthest

TOLERANCE = 2e-5  # of the goldens


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Session:
    return OfficialRuntime(load_bundle(tiny_bundle), Engine.of(threads=1)).session


def test_a_run_that_fails_is_one_of_our_errors(tiny: Session, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DecodeError, match=f"{STEP}: the graph failed"):
        tiny.run(["audio"], {"audio_codes": np.zeros((1, 1, 16), np.int32)})
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_a_memory_error(tiny: Session) -> None:
    for message in ("std::bad_alloc", "Failed to allocate memory for requested buffer of size 123"):
        with pytest.raises(MemoryError), engine.translated_errors(tiny.graph):
            raise RuntimeError(message)


# --- loading ------------------------------------------------------------------------------------------------------


def test_threads_and_providers() -> None:
    assert 1 <= codecs.default_threads() <= 4
    assert Engine.of() == Engine("cpu", codecs.default_threads(), spin=False)
    with pytest.raises(UsageError, match="provider 'gpu' is not known, allowed are cpu, cuda"):
        Engine.of("gpu")
    with pytest.raises(UsageError, match="0 threads, allowed is a whole number from 1 to 1024"):
        Engine.of(threads=0)


def test_threads_spin_for_moments_only_unless_asked_to() -> None:
    assert engine._spinning(Engine.of(), "1.25.1") == {"intra_op.allow_spinning": "0"}
    assert engine._spinning(Engine.of(spin=True), "1.31.1") == {"intra_op.allow_spinning": "1"}
    assert engine._spinning(Engine.of(), "1.26.0")["intra_op.spin_duration_us"] == "10"


def test_providers_are_told_to_be_exact_and_modest() -> None:
    assert engine._provider_options(Engine.of("cuda")) == {"use_tf32": "0"}
    assert engine._provider_options(Engine.of("openvino", threads=3)) == {"num_of_threads": "3"}
    assert engine._provider_options(Engine.of()) == {}


def test_default_threads_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, usable=usable: range(usable), raising=False)
        monkeypatch.setattr("os.cpu_count", lambda usable=usable: usable if sys.platform != "linux" else 99)
        assert codecs.default_threads() == expected


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "coreml", "directml", "openvino"])
def test_a_provider_that_is_not_there_is_refused(
    tiny_bundle: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BundleError, match=f"provider '{provider}' is not in this onnxruntime; here there are cpu"):
        codecs.load_runtime(load_bundle(tiny_bundle), provider=provider)


def test_a_provider_that_does_not_start_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is built in, but its driver is not there: onnxruntime itself would go on with the CPU."""
    import onnxruntime

    genuine = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(engine.PROVIDERS.values()))
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, enable_fallback: genuine(path, options, providers=["CPUExecutionProvider"]),
    )
    monkeypatch.setattr(engine, "_missing_libraries", lambda: ", for want of libexample")
    for provider, reason in (
        ("cuda", ", for want of libexample"),
        ("tensorrt", ", for want of libexample"),
        ("coreml", ""),
    ):
        with pytest.raises(BundleError, match=f"provider '{provider}' was asked for, but did not start{reason}; this"):
            codecs.load_runtime(load_bundle(tiny_bundle), provider=provider)
    assert capfd.readouterr().out == ""


def test_a_graph_that_a_provider_cannot_load_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of both is to blame, only onnxruntime knows."""
    import onnxruntime

    def fail(*_: object, **_options: object) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(engine.PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    for provider, where in (("cpu", ""), ("openvino", " on provider 'openvino'")):
        with pytest.raises(BundleError, match=f"cannot load it with [a-z_.]+{where}: no such operator$"):
            codecs.load_runtime(load_bundle(tiny_bundle), provider=provider)


def test_a_fast_graph_that_is_not_there_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no fast graph; `mossnano build` makes one"):
        codecs.load_runtime(load_bundle(tiny_bundle), graph="fast")
    assert codecs.load_runtime(load_bundle(tiny_bundle)).graph_name == "official"


# --- graphs of another make ---------------------------------------------------------------------------------------


def rename(model: onnx.ModelProto, name: str, new_name: str) -> None:
    """One input or output of the graph, wherever its name stands."""
    for value in [*model.graph.input, *model.graph.output]:
        value.name = new_name if value.name == name else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new_name if one == name else one for one in names]


def resize(model: onnx.ModelProto, name: str, size: int) -> None:
    value = next(value for value in model.graph.input if value.name == name)
    value.type.tensor_type.shape.dim[2].dim_value = size


def double_counter(model: onnx.ModelProto) -> None:
    value = next(value for value in model.graph.output if value.name == "attn_offset_out_0")
    value.type.tensor_type.elem_type = onnx.TensorProto.INT64
    for node in model.graph.node:
        node.output[:] = ["counted" if name == "attn_offset_out_0" else name for name in node.output]
    cast = helper.make_node("Cast", ["counted"], ["attn_offset_out_0"], to=onnx.TensorProto.INT64)
    model.graph.node.append(cast)


def extra_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["audio"], ["audio_again"]))
    model.graph.output.append(helper.make_tensor_value_info("audio_again", 1, None))


def point_data_elsewhere(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../../../../etc/passwd" if entry.key == "location" else entry.value


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda model: rename(model, "attn_cached_keys_0", "x"), "no input 'attn_cached_keys_0', which the metadata"),
        (lambda model: rename(model, "attn_offset_out_0", "x"), "no output 'attn_offset_out_0', which the metadata"),
        (lambda model: resize(model, "attn_cached_keys_0", 41),
         r"attn_cached_keys_0' is float32 \[1, 4, 41, 8\], the metadata says float32 \[1, 4, 40, 8\]"),
        (lambda model: resize(model, "audio_codes", 15), r"int32 \[1, \?, 15\], the metadata says int32 \[1, \?, 16\]"),
        (double_counter, r"output 'attn_offset_out_0' is int64 \[1\], the metadata says int32 \[1\]"),
        (extra_output, "has an output 'audio_again', which the metadata does not know"),
        (lambda model: model.graph.output.pop(), "has no output 'attn_cached_positions_out_5', which the metadata"),
        (lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator"),
         "onnxruntime cannot load it with .*NoSuchOperator"),
        (point_data_elsewhere, "onnxruntime cannot load it with "),
    ],
    ids=["input renamed", "output renamed", "context", "codes", "counter", "output more", "output less", "operator",
         "data elsewhere"],
)  # fmt: skip
def test_a_graph_of_another_make_is_refused(
    folder: Path, spoil: Callable[[onnx.ModelProto], object], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(folder / STEP, load_external_data=False)
    spoil(model)
    (folder / STEP).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=says) as raised:
        codecs.load_runtime(load_bundle(folder))
    assert str(raised.value).startswith(str(folder / STEP))
    assert raised.value.exit_status == 66
    assert capfd.readouterr() == ("", ""), "what is wrong is said once, by the error"


def test_a_graph_whose_names_are_no_text(folder: Path) -> None:
    content = (folder / STEP).read_bytes()
    (folder / STEP).write_bytes(content.replace(b"transformer_offset_2", b"transformer_offset\xc62"))
    with pytest.raises(BundleError, match=f"{STEP}: "):
        codecs.load_runtime(load_bundle(folder))


# --- damaged files ------------------------------------------------------------------------------------------------


def flip_bit(path: Path, at: int = 1000, bit: int = 2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


SPOILT: dict[str, Callable[[Path], object]] = {
    "no file": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit": flip_bit,
    "another graph": lambda path: shutil.copyfile(path.with_name(FULL), path),
}


@pytest.mark.parametrize("known", ["recorded", "published", "unknown"])
@pytest.mark.parametrize("guilty", [STEP, SHARED])
@pytest.mark.parametrize("spoil", SPOILT)
def test_spoilt_files(folder: Path, guilty: str, spoil: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published or recorded is refused whatever is wrong with it; of the rest, whatever can be seen."""
    records = record_files(folder, [METADATA_NAME, STEP, FULL, SHARED])
    if known == "published":
        monkeypatch.setattr(published, "BUNDLE", published.PinnedRepository("a/b", "c", records))
    else:
        save_sidecar(folder, Sidecar(codebook_size=1024, files=records if known == "recorded" else {}))
    assert codecs.load_runtime(load_bundle(folder))
    SPOILT[spoil](folder / guilty)
    if (known, guilty, spoil) == ("unknown", SHARED, "a bit"):
        assert codecs.load_runtime(load_bundle(folder)), "nothing can tell it from other weights"
        return
    with pytest.raises(BundleError) as raised:
        codecs.load_runtime(load_bundle(folder))
    said = str(raised.value)
    assert said.startswith(str(folder))
    assert guilty in (said if known == "unknown" else said.partition(": ")[0])


def test_a_flipped_bit_is_found_where_a_sha256_is_known(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "demo", copy_function=shutil.copyfile))
    chosen = random.Random(0)
    for _ in range(300):
        path = folder / chosen.choice([METADATA_NAME, "demo_decode_step.onnx"])
        at, bit = chosen.randrange(path.stat().st_size), chosen.randrange(8)
        flip_bit(path, at, bit)
        with pytest.raises(BundleError) as raised:
            codecs.load_runtime(load_bundle(folder))
        assert str(path) in str(raised.value)
        flip_bit(path, at, bit)


def test_a_damaged_graph_is_never_shown_to_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sidecar(folder, Sidecar(codebook_size=1024, files=record_files(folder, [STEP])))
    flip_bit(folder / STEP)
    monkeypatch.setattr(engine, "_native_session", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match="SHA-256"):
        codecs.load_runtime(load_bundle(folder))


def test_metadata_of_another_codec_is_refused(folder: Path) -> None:
    content = (folder / METADATA_NAME).read_text()
    (folder / METADATA_NAME).write_text(content.replace('"num_quantizers": 16', '"num_quantizers": 8'))
    with pytest.raises(
        BundleError, match=r"'audio_codes' is int32 \[1, \?, 16\], the metadata says int32 \[1, \?, 8\]"
    ):
        codecs.load_runtime(load_bundle(folder))


@needs_symlinks
@pytest.mark.parametrize("layout", ["as the hub keeps it", "every file elsewhere", "folder"])
def test_weights_behind_symlinks(tiny_bundle: Path, tmp_path: Path, layout: str, codes: Codes, audio: Sound) -> None:
    names = [path.name for path in tiny_bundle.iterdir()]
    folder = tmp_path / "snapshots" / "revision"
    if layout == "folder":
        shutil.copytree(tiny_bundle, tmp_path / "real", copy_function=shutil.copyfile)
        folder.parent.mkdir()
        folder.symlink_to("../real")
    else:
        folder.mkdir(parents=True)
        for number, name in enumerate(names):
            blobs = tmp_path / ("blobs" if layout == "as the hub keeps it" else f"blobs{number}")
            blobs.mkdir(exist_ok=True)
            shutil.copyfile(tiny_bundle / name, blobs / f"{number:064x}")
            (folder / name).symlink_to(f"../../{blobs.name}/{number:064x}")
    decoder = codecs.load_decoder(load_bundle(folder), threads=1)
    assert furthest(decoder.step(codes), audio) < TOLERANCE


@pytest.mark.skipif(sys.platform != "linux", reason="only here are names any bytes")
def test_symlinks_in_a_path_that_is_no_text(tiny_bundle: Path, tmp_path: Path, codes: Codes, audio: Sound) -> None:
    folder = tmp_path / os.fsdecode(b"gew\xf6hnlich")
    folder.mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "elsewhere")
    for path in tiny_bundle.iterdir():
        (folder / path.name).symlink_to(f"../elsewhere/{path.name}")
    decoder = codecs.load_decoder(load_bundle(folder), threads=1)
    assert furthest(decoder.step(codes), audio) < TOLERANCE


@pytest.mark.skipif(sys.platform != "linux", reason="only here are names any bytes")
@pytest.mark.parametrize("name", ["official", "fast", "full", "encoder"])
def test_a_path_that_is_no_text(built_bundle: Path, tmp_path: Path, codes: Codes, audio: Sound, name: str) -> None:
    folder = Path(shutil.copytree(built_bundle, tmp_path / os.fsdecode(b"gew\xf6hnlich")))
    bundle = load_bundle(folder)
    if name == "encoder":
        silence = np.zeros((2 * 3840, 2), dtype=np.float32)
        expected = codecs.load_encoder_runtime(load_bundle(built_bundle), threads=1).new_encoder().step(silence)
        assert np.array_equal(codecs.load_encoder_runtime(bundle, threads=1).new_encoder().step(silence), expected)
    elif name == "full":
        assert furthest(codecs.load_full_decoder(bundle, threads=1).decode(codes), audio) < TOLERANCE
    else:
        decoder = codecs.load_decoder(bundle, threads=1, graph="fast" if name == "fast" else "official")
        assert furthest(decoder.step(codes), audio) < TOLERANCE


@needs_symlinks
def test_data_missing_behind_a_symlink(folder: Path) -> None:
    (folder / SHARED).unlink()
    (folder / SHARED).symlink_to("nowhere")
    with pytest.raises(BundleError, match=f"{SHARED}: is not there"):
        codecs.load_runtime(load_bundle(folder))


def test_a_fast_graph_that_is_recorded_but_gone_is_an_error_and_no_silent_fall_back(
    built_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(built_bundle, folder)
    (folder / load_bundle(folder).graphs["fast"].path.name).unlink()
    with pytest.raises(BundleError, match="is not there"):
        codecs.load_runtime(load_bundle(folder))
    assert codecs.load_runtime(load_bundle(folder), graph="official").graph_name == "official"
