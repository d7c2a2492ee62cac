"""weights/: metadata and sidecars become trustworthy specifications, or one BundleError that begins with the path."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.errors import BundleError
from mossnano_stdio.weights import (
    DEMO_FOLDER,
    METADATA_NAME,
    SIDECAR_NAME,
    FileRecord,
    GraphSpec,
    OwnCodec,
    Sidecar,
    StateSpec,
    find_weights,
    load_bundle,
    load_sidecar,
    published,
    record_files,
    save_sidecar,
)
from tests.conftest import SHARED, STEP, needs_symlinks
from tests.doubles import NANO

OFFICIAL = Path(__file__).parents[2] / "shared" / "reference" / "official"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="../shared/reference/official is not here")


@pytest.fixture(scope="module")
def metadata(tiny_bundle: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((tiny_bundle / METADATA_NAME).read_text())
    return document


def write_metadata(folder: Path, document: object) -> None:
    (folder / METADATA_NAME).write_text(json.dumps(document))


def refusal(folder: Path) -> str:
    """What load_bundle says against a folder."""
    with pytest.raises(BundleError) as raised:
        load_bundle(folder)
    message = str(raised.value)
    assert message.startswith(str(folder)), "a refusal begins with the path"
    assert "\n" not in message
    return message


# --- what is read -----------------------------------------------------------------------------------------------


@needs_official
def test_the_official_metadata_loads_as_it_is() -> None:
    bundle = load_bundle(OFFICIAL)
    assert bundle.format == NANO
    assert bundle.name == "MOSS-Audio-Tokenizer-Nano"
    assert bundle.is_published
    assert not bundle.demo
    assert list(bundle.graphs) == ["decode_step", "decode_full", "encode"]
    step = bundle.graphs["decode_step"]
    assert step.path == OFFICIAL / STEP
    assert [file.path.name for file in step.files] == [STEP, SHARED]
    assert [file.record for file in step.files] == [published.BUNDLE.files[STEP], published.BUNDLE.files[SHARED]]
    assert step.input_names == ("audio_codes", "audio_code_lengths")
    assert step.output_names == ("audio", "audio_lengths")
    assert len(step.states) == 52
    assert sum(cache.context_tokens for cache in bundle.caches) == 4 * 500 + 2 * 800 + 2 * 1200 + 4 * 1600


@needs_official
def test_the_pinned_table_is_the_published_one() -> None:
    official = json.loads((OFFICIAL / "files.json").read_text())
    for key, repository in (("onnx", published.BUNDLE), ("checkpoint", published.CHECKPOINT)):
        assert official[key]["repo"] == repository.repository
        assert official[key]["revision"] == repository.revision
        assert official[key]["files"] == {
            name: {"bytes": record.size_bytes, "sha256": record.sha256} for name, record in repository.files.items()
        }
    assert official["licence"] == published.LICENCE.lower()
    assert record_files(OFFICIAL, [METADATA_NAME])[METADATA_NAME] == published.BUNDLE.files[METADATA_NAME]


@needs_official
def test_states_are_those_of_the_metadata() -> None:
    """Recomputed from the document: every name, shape, dtype and initial value, in the order of the graph's inputs."""
    document = json.loads((OFFICIAL / METADATA_NAME).read_text())
    states = load_bundle(OFFICIAL).graphs["decode_step"].states
    names = document["onnx"]
    assert [state.input_name for state in states] == names["decode_step_input_names"][2:]
    assert [state.output_name for state in states] == names["decode_step_output_names"][2:]
    for state in states:
        value = state.initial_value()
        assert value.shape == state.shape
        assert value.dtype == (np.float32 if "keys" in state.input_name or "values" in state.input_name else np.int32)
        assert (value == (-1 if "positions" in state.input_name else 0)).all()
    caches = document["streaming_decode"]["attention_caches"]
    assert [state.shape for state in states if "keys" in state.input_name] == [tuple(c["cache_shape"]) for c in caches]


def test_a_bundle_without_any_notes_tells_its_codebooks_by_the_graph(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert bundle.format == NANO
    assert bundle.name == "bundle"
    assert not bundle.is_published
    assert bundle.sidecar == Sidecar()


def test_caches_of_half_precision(folder: Path, metadata: dict[str, Any]) -> None:
    document = copy.deepcopy(metadata)
    for cache in document["streaming_decode"]["attention_caches"]:
        cache["cache_dtype"] = "float16"
    write_metadata(folder, document)
    states = load_bundle(folder).graphs["decode_step"].states
    assert {state.dtype.name for state in states if "cached_keys" in state.input_name} == {"float16"}


def test_the_demo_is_labelled() -> None:
    bundle = load_bundle(DEMO_FOLDER)
    assert bundle.demo
    assert not bundle.is_published
    assert "demo" in bundle.name


# --- what is refused --------------------------------------------------------------------------------------------


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document, itself left out. Of long lists, the first two entries and the last."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(document, list) and 2 <= key < len(document) - 1:
            continue
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], *replacement: Any) -> Any:
    """A copy in which the value at `path` is another, or gone."""
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if replacement:
        parent[path[-1]] = replacement[0]
    else:
        del parent[path[-1]]
    return document


def is_needed(path: tuple[Any, ...]) -> bool:
    """Must a bundle be refused that lacks this?"""
    match path:
        case ("checkpoint_path",) | ("onnx", "opset") | (*_, "index"):
            return False  # nobody reads these
        case ("files", "encode" | "decode_full") | ("external_data_files", _) | ("external_data_files", _, _):
            return False  # there may be none
        case ("streaming_decode", "transformer_offsets", _, "decoder_index"):
            return False  # each cache says it again
        case ("streaming_decode", "transformer_offsets" | "attention_caches", _):
            return False  # see the next test
    return True


def test_nothing_in_the_metadata_can_be_missing(folder: Path, metadata: dict[str, Any]) -> None:
    for path in filter(is_needed, places(metadata)):
        write_metadata(folder, changed(metadata, path))
        assert refusal(folder), path


def test_a_state_that_is_not_described_or_not_listed_is_refused(folder: Path, metadata: dict[str, Any]) -> None:
    for states in ("transformer_offsets", "attention_caches"):
        for number in range(len(metadata["streaming_decode"][states])):
            write_metadata(folder, changed(metadata, ("streaming_decode", states, number)))
            assert "does not describe as state" in refusal(folder)
    for side in ("input", "output"):
        names = f"decode_step_{side}_names"
        for number in range(len(metadata["onnx"][names])):
            write_metadata(folder, changed(metadata, ("onnx", names, number)))
            refusal(folder)
        listed = metadata["onnx"][names]
        write_metadata(folder, changed(metadata, ("onnx", names, 5), listed[6]))
        assert "twice" in refusal(folder)


@pytest.mark.parametrize(
    "wrong", [None, True, -1, 0, 1.5, 10**12, "", "x/y", "..", [], {}, [[]], [1, 2], "float64", "NaN", "ü\0"]
)
def test_a_wrong_value_is_refused_or_harmless_and_nothing_else(
    folder: Path, metadata: dict[str, Any], wrong: object
) -> None:
    for path in places(metadata):
        write_metadata(folder, changed(metadata, path, wrong))
        try:
            load_bundle(folder)
        except BundleError as error:
            assert str(error).startswith(str(folder))
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b"[]", "is [], allowed is an object"),
        (b"null", "is null, allowed is an object"),
        (b"{}", "'format_version' is missing"),
        (b'{"format_version": 3}', "format_version is 3, 2 is what this program reads"),
        (b" " * (5 << 20), "so it is no metadata"),
    ],
)
def test_damaged_metadata(folder: Path, content: bytes, says: str) -> None:
    (folder / METADATA_NAME).write_bytes(content)
    assert says in refusal(folder)


def test_names_of_files_cannot_lead_out_of_the_folder(folder: Path, metadata: dict[str, Any]) -> None:
    for name in ("../decode.onnx", "/etc/passwd", "sub/decode.onnx", "..", "C:\\decode.onnx"):
        write_metadata(folder, changed(metadata, ("files", "decode_step"), name))
        assert "the name of a file in the same folder" in refusal(folder)


def test_shapes_must_fit_the_numbers_beside_them(folder: Path, metadata: dict[str, Any]) -> None:
    for key, value in (("context", 41), ("num_heads", 5), ("head_dim", 9), ("cache_shape", [1, 4, 40, 9])):
        write_metadata(folder, changed(metadata, ("streaming_decode", "attention_caches", 0, key), value))
        assert "do not fit num_heads, context and head_dim" in refusal(folder)


def test_a_graph_whose_codebooks_cannot_be_told(folder: Path) -> None:
    (folder / STEP).write_bytes(b"")
    assert "names no sizes of codebooks" in refusal(folder)
    (folder / STEP).write_bytes(b"\xff" * 100)
    assert "is no ONNX file" in refusal(folder)
    (folder / STEP).unlink()
    assert "is not there; `mossnano fetch`" in refusal(folder)
    save_sidecar(folder, Sidecar(codebook_size=1000))
    assert load_bundle(folder).format.codebook_size == 1000


# --- the files of a graph -----------------------------------------------------------------------------------------


def test_a_graph_with_all_its_files(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert bundle.has_graph("encode")
    assert [file.path.name for file in bundle.graph("decode_step").files] == [STEP, SHARED]


def make_named_pipe(path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no named pipes in folders")
    os.mkfifo(path)


@pytest.mark.parametrize("name", [METADATA_NAME, STEP, SHARED])
@pytest.mark.parametrize(
    ("put", "says"),
    [
        (lambda path: None, "is not there"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "is not there", marks=needs_symlinks),
        (Path.mkdir, "is no regular file"),
        (make_named_pipe, "is no regular file"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "is no regular file", marks=needs_symlinks),
    ],
    ids=["nothing", "dangling link", "folder", "named pipe", "device"],
)
def test_a_file_that_is_missing_or_no_file(folder: Path, name: str, put: Callable[[Path], object], says: str) -> None:
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(BundleError, match=f"^{re.escape(str(folder / name))}: {says}"):
        load_bundle(folder).graph("decode_step")


def test_a_graph_that_no_metadata_knows(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no graph 'fast', only decode_step, decode_full, encode"):
        load_bundle(tiny_bundle).graph("fast")


def test_recorded_sizes_and_hashes_hold(folder: Path) -> None:
    save_sidecar(folder, Sidecar(codebook_size=1024, files=record_files(folder, [METADATA_NAME, STEP, SHARED])))
    for file in load_bundle(folder).graph("decode_step").files:
        file.check_content()

    content = bytearray((folder / SHARED).read_bytes())
    content[1234] ^= 1
    (folder / SHARED).write_bytes(content)
    graph = load_bundle(folder).graph("decode_step")
    with pytest.raises(BundleError, match=rf"{SHARED}: has SHA-256 .*, the recorded one is .*; it was damaged"):
        graph.data[0].check_content()

    (folder / SHARED).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=rf"{SHARED}: has {len(content) - 1} bytes, the recorded size is"):
        load_bundle(folder).graph("decode_step")


def test_recorded_metadata_that_was_changed_is_refused(folder: Path, metadata: dict[str, Any]) -> None:
    save_sidecar(folder, Sidecar(codebook_size=1024, files=record_files(folder, [METADATA_NAME])))
    content = (folder / METADATA_NAME).read_bytes()
    (folder / METADATA_NAME).write_bytes(content.replace(b"48000", b"44100"))
    assert "the recorded one is" in refusal(folder)


@needs_official
def test_other_graphs_beside_published_metadata_are_refused(folder: Path) -> None:
    shutil.copyfile(OFFICIAL / METADATA_NAME, folder / METADATA_NAME)
    with pytest.raises(BundleError, match=rf"{STEP}: has 190358 bytes, the published size is 351400"):
        load_bundle(folder).graph("decode_step")


@needs_official
def test_a_stand_in_with_published_metadata_is_held_against_its_own_records(folder: Path) -> None:
    shutil.copyfile(OFFICIAL / METADATA_NAME, folder / METADATA_NAME)
    save_sidecar(folder, Sidecar(name="stand-in", codebook_size=1024, files=record_files(folder, [STEP, SHARED])))
    bundle = load_bundle(folder)
    assert not bundle.is_published
    assert bundle.name == "stand-in"
    bundle.graph("decode_step")


def test_published_graphs_beside_other_metadata_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed digit in the metadata would be a wrong sample rate that no graph can contradict."""
    load_bundle(folder).graph("decode_step")
    pinned = record_files(folder, [STEP])
    monkeypatch.setattr(
        published, "BUNDLE", published.PinnedRepository("a/b", "c", {**published.BUNDLE.files, **pinned})
    )
    with pytest.raises(BundleError, match=rf"{METADATA_NAME}: is not the one that was published with {STEP}"):
        load_bundle(folder).graph("decode_step")


# --- the notes of our own -----------------------------------------------------------------------------------------


def test_the_sidecar_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    state = StateSpec("keys", "keys_out", (1, 4), np.dtype(np.float32), 0)
    positions = StateSpec("positions", "positions_out", (1, 4), np.dtype(np.int64), -1)
    fast = GraphSpec("fast.onnx", ("a.data", "b.data"), "int8", (state, positions), {"rows": [1, 2], "x": "y"})
    sidecar = Sidecar(
        name="made up",
        demo=True,
        precision="float16",
        codebook_size=1000,
        graphs={"fast": fast, "encode_step": GraphSpec("encode_step.onnx")},
        files={"fast.onnx": FileRecord(123, "ab" * 32)},
    )
    save_sidecar(tmp_path, sidecar)
    assert load_sidecar(tmp_path) == sidecar


def test_no_sidecar_and_an_empty_one_say_the_same(tmp_path: Path) -> None:
    assert load_sidecar(tmp_path) == Sidecar()
    (tmp_path / SIDECAR_NAME).write_text('{"mossnano": 1, "a key of the future": []}')
    assert load_sidecar(tmp_path) == Sidecar()


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, "'mossnano' is missing"),
        ({"mossnano": 2}, "is of version 2, 1 is what this program reads"),
        ({"mossnano": 1, "demo": 1}, "demo is 1, allowed is true or false"),
        ({"mossnano": 1, "name": 5}, "name is 5, allowed is text"),
        ({"mossnano": 1, "codebook_size": 1}, "codebook_size is 1, allowed is a whole number from 2 to 65536"),
        ({"mossnano": 1, "codebook_size": True}, "codebook_size is true, allowed is a whole number"),
        ({"mossnano": 1, "files": []}, "files is [], allowed is an object"),
        ({"mossnano": 1, "files": {"a": {"bytes": 1}}}, "files: a: 'sha256' is missing"),
        ({"mossnano": 1, "files": {"a": {"bytes": 1, "sha256": "AB" * 32}}}, "64 hexadecimal digits in lower case"),
        ({"mossnano": 1, "graphs": {"fast": {}}}, "graphs: fast: 'file' is missing"),
        ({"mossnano": 1, "graphs": {"fast": {"file": "../x"}}}, "the name of a file in the same folder"),
        ({"mossnano": 1, "graphs": {"fast": {"file": "x", "facts": 1}}}, "facts is 1, allowed is an object"),
        ({"mossnano": 1, "graphs": {"fast": {"file": "x", "states": [{}]}}}, "states[0]: 'input' is missing"),
    ],
)
def test_a_wrong_sidecar_is_refused(tmp_path: Path, document: object, says: str) -> None:
    (tmp_path / SIDECAR_NAME).write_text(json.dumps(document))
    with pytest.raises(BundleError) as raised:
        load_sidecar(tmp_path)
    assert str(raised.value).startswith(str(tmp_path / SIDECAR_NAME))
    assert says in str(raised.value)


# --- where weights are looked for -----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, a cache and a working folder without any weights."""
    for variable in ("MOSSNANO_WEIGHTS", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MOSSNANO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def put_weights(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / METADATA_NAME).write_text("{}")
    return folder


def test_the_order_of_the_search(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last place to the first: each one that is there hides those after it."""
    repository = "models--OpenMOSS-Team--MOSS-Audio-Tokenizer-Nano-ONNX"
    hub = put_weights(elsewhere / "hub" / repository / "snapshots" / published.BUNDLE.revision)
    assert find_weights() == hub
    cached = put_weights(elsewhere / "cache" / "MOSS-Audio-Tokenizer-Nano-ONNX")
    assert find_weights() == cached
    put_weights(elsewhere / "work" / "weights" / "MOSS-Audio-Tokenizer-Nano-ONNX")
    assert find_weights() == Path("weights/MOSS-Audio-Tokenizer-Nano-ONNX")
    monkeypatch.setenv("MOSSNANO_WEIGHTS", str(put_weights(elsewhere / "by variable")))
    assert find_weights() == elsewhere / "by variable"
    monkeypatch.setattr("sys.frozen", True, raising=False)
    monkeypatch.setattr("sys.executable", str(elsewhere / "game" / "mossnano-stdio"))
    assert find_weights() == elsewhere / "by variable"  # a frozen folder without weights of its own
    put_weights(elsewhere / "game" / "weights")
    assert find_weights() == elsewhere / "game" / "weights"
    assert find_weights(str(put_weights(elsewhere / "by option"))) == elsewhere / "by option"


def test_the_hub_keeps_its_cache_where_its_variables_say(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = Path("models--OpenMOSS-Team--MOSS-Audio-Tokenizer-Nano-ONNX") / "snapshots" / published.BUNDLE.revision
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "xdg"))
    in_xdg = put_weights(elsewhere / "xdg" / "huggingface" / "hub" / tail)
    assert find_weights() == in_xdg
    monkeypatch.setenv("HF_HOME", str(elsewhere / "hf"))
    in_home = put_weights(elsewhere / "hf" / "hub" / tail)
    assert find_weights() == in_home


def test_models_lie_beside_each_other(elsewhere: Path) -> None:
    put_weights(elsewhere / "cache" / "MOSS-Audio-Tokenizer-Nano-ONNX")
    larger = put_weights(elsewhere / "cache" / "MOSS-Audio-Tokenizer")
    assert find_weights() == find_weights("nano") == elsewhere / "cache" / "MOSS-Audio-Tokenizer-Nano-ONNX"
    assert find_weights("24k") == larger
    with pytest.raises(BundleError, match=r"no weights of v2 found in .*`mossnano fetch --model v2` gets them"):
        find_weights("v2")
    put_weights(elsewhere / "work" / "v2")
    assert find_weights("v2") == Path("v2")  # a folder of that name was meant


@pytest.mark.parametrize("inside", ["audio_tokenizer", "moss_audio_tokenizer", "codec"])
def test_the_codec_inside_a_text_to_speech_model(elsewhere: Path, inside: str) -> None:
    codec = put_weights(elsewhere / "tts" / inside)
    assert find_weights(str(elsewhere / "tts")) == codec


def test_nothing_found_says_where_and_how_to_get_them(elsewhere: Path) -> None:
    with pytest.raises(BundleError) as raised:
        find_weights()
    message = str(raised.value)
    assert raised.value.exit_status == 66
    assert "`mossnano fetch`" in message
    assert str(Path("weights/MOSS-Audio-Tokenizer-Nano-ONNX")) in message
    assert str(elsewhere / "cache") in message
    assert str(elsewhere / "hub") in message


def test_nothing_found_in_a_frozen_folder_says_so(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.frozen", True, raising=False)
    monkeypatch.setattr("sys.executable", str(elsewhere / "game" / "mossnano-stdio"))
    with pytest.raises(BundleError, match="no weights found in ") as raised:
        find_weights()
    assert str(raised.value).startswith(f"no weights found in {elsewhere / 'game' / 'weights'}, ")


def test_a_frozen_folder_may_hold_a_codec_without_official_metadata(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.frozen", True, raising=False)
    monkeypatch.setattr("sys.executable", str(elsewhere / "game" / "mossnano-stdio"))
    weights = elsewhere / "game" / "weights"
    weights.mkdir(parents=True)
    mimi = published.MODELS["mimi"].format
    save_sidecar(weights, Sidecar(codebook_size=mimi.codebook_size, maybe_codec=OwnCodec("mimi", mimi)))
    assert find_weights() == weights


def test_the_demo_is_only_found_by_its_name(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_weights("demo") == DEMO_FOLDER
    (elsewhere / "work" / "demo").mkdir()
    assert find_weights("demo") == DEMO_FOLDER
    monkeypatch.setenv("MOSSNANO_WEIGHTS", "demo")
    assert find_weights() == DEMO_FOLDER


def test_weights_that_were_named_are_not_replaced_by_others(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_weights(elsewhere / "work" / "weights" / "MOSS-Audio-Tokenizer-Nano-ONNX")
    (elsewhere / "empty").mkdir()
    (elsewhere / "file").touch()
    with pytest.raises(BundleError, match=r"nowhere: is not there; --weights takes"):
        find_weights(str(elsewhere / "nowhere"))
    with pytest.raises(BundleError, match=re.escape(f"`mossnano fetch --to {elsewhere / 'empty'}` makes it one")):
        find_weights(str(elsewhere / "empty"))
    with pytest.raises(BundleError, match=r"file: is a file; --weights takes the folder"):
        find_weights(str(elsewhere / "file"))
    monkeypatch.setenv("MOSSNANO_WEIGHTS", str(elsewhere / "nowhere"))
    with pytest.raises(BundleError, match=r"nowhere: is not there; \$MOSSNANO_WEIGHTS takes"):
        find_weights()
