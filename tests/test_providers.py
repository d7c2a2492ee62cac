"""Elsewhere than on the CPU: codecs/plain_attention.py and codecs/carried.py, and what users are told.

Each codec gives the goldens there too. That is tried on each provider that starts here, and on one that is pretended:
it computes on the CPU, but is treated as any other.
"""

from __future__ import annotations

import builtins
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mossnano_stdio import codecs
from mossnano_stdio.build.bundle import build_from_checkpoint
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.decode_step import FAST_FILE
from mossnano_stdio.codecs import engine
from mossnano_stdio.codecs.carried import CarriedGraph
from mossnano_stdio.codecs.engine import UnfitRuntimeError
from mossnano_stdio.codecs.moss import FastRuntime, StreamEncoder
from mossnano_stdio.codecs.probe import PROBE_PATH
from mossnano_stdio.errors import BundleError, DecodeError, UsageError
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.protocol import Kind, Message
from mossnano_stdio.tokens import Codes, pack_frames
from mossnano_stdio.tools.check import _Graphs
from mossnano_stdio.weights import Bundle, load_bundle
from tests import oracle
from tests.child import PROCESS, encoded, run
from tests.conftest import needs_symlinks, skip_if_nothing_can_be_built
from tests.doubles import FailingNative
from tests.oracle import Sound, furthest, in_chunks
from tests.tool import call_tool

REFERENCES = Path(__file__).parent / "reference"
TOLERANCE = 1e-5
PCM16_STEP = 1 / 32767
LONG_FRAMES = 72  # seven times the longest context
PRETENDED = "coreml"


@cache
def providers_here() -> list[str]:
    """Those that are built in and whose drivers are there."""
    import onnxruntime

    def starts(native: str) -> bool:
        session = onnxruntime.InferenceSession(str(PROBE_PATH), providers=[native, "CPUExecutionProvider"])
        return native in session.get_providers()

    available = set(onnxruntime.get_available_providers())
    if available & {"CUDAExecutionProvider"}:
        engine._missing_libraries()
    others = {name: native for name, native in engine.PROVIDERS.items() if native in available and name != "cpu"}
    return [name for name, native in others.items() if starts(native)]


@pytest.fixture(scope="module", params=[PRETENDED, *providers_here()])
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == PRETENDED:
            patch.setitem(engine.PROVIDERS, PRETENDED, engine.PROVIDERS["cpu"])
        yield request.param


@pytest.fixture(scope="module")
def bundle(built_bundle: Path) -> Bundle:
    return load_bundle(built_bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle, provider: str) -> FastRuntime:
    found = codecs.load_runtime(bundle, provider=provider, threads=1)
    assert isinstance(found, FastRuntime)
    assert isinstance(found.stack, CarriedGraph)
    return found


@pytest.fixture(scope="module")
def long_codes() -> Codes:
    return np.random.default_rng(4).integers(0, 1024, (LONG_FRAMES, 16)).astype(np.uint16)


@pytest.fixture(scope="module")
def long_audio(tiny_reference: Path, long_codes: Codes) -> NDArray[np.float64]:
    decoder = load_checkpoint(tiny_reference).maybe_decoder
    assert decoder is not None
    return oracle.decode(decoder, long_codes)


# --- nano's sound and state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 7, 8, 9, 17, 24])
def test_goldens(runtime: FastRuntime, codes: Codes, audio: Sound, chunk_frames: int) -> None:
    assert furthest(in_chunks(runtime.new_decoder(), codes, chunk_frames), audio) < TOLERANCE


@pytest.mark.parametrize("quantizers", [1, 8])
def test_goldens_of_a_prefix(runtime: FastRuntime, codes: Codes, tiny_reference: Path, quantizers: int) -> None:
    expected = np.load(tiny_reference / f"audio_q{quantizers}.npy").T
    assert furthest(runtime.new_decoder().step(codes[:8, :quantizers]), expected) < TOLERANCE


@pytest.mark.parametrize("chunk_frames", [1, 4, 5, 8, 23])
def test_past_every_context(
    runtime: FastRuntime, long_codes: Codes, long_audio: NDArray[np.float64], chunk_frames: int
) -> None:
    assert furthest(in_chunks(runtime.new_decoder(), long_codes, chunk_frames), long_audio) < TOLERANCE


def test_an_hour_later(runtime: FastRuntime, long_codes: Codes, long_audio: NDArray[np.float64]) -> None:
    decoder = runtime.new_decoder()
    decoder.reset(45_000)
    assert furthest(in_chunks(decoder, long_codes[:40], 8), long_audio[: 40 * 3840]) < TOLERANCE
    assert decoder.next_frame == 45_040


def test_streams_do_not_touch_each_other(runtime: FastRuntime, long_codes: Codes) -> None:
    streams = [long_codes[start : start + 40] for start in (0, 20, 32)]
    expected = [in_chunks(runtime.new_decoder(), stream, 4) for stream in streams]
    decoders = [runtime.new_decoder() for _ in streams]
    found = [
        [decoder.step(stream[start : start + 4]) for decoder, stream in zip(decoders, streams, strict=True)]
        for start in range(0, 40, 4)
    ]
    for number, audio in enumerate(expected):
        assert furthest(np.concatenate([step[number] for step in found]), audio) < TOLERANCE


def test_a_reset_forgets_everything(runtime: FastRuntime, codes: Codes, audio: Sound) -> None:
    decoder = runtime.new_decoder()
    decoder.step(codes[:7])
    decoder.reset()
    assert furthest(in_chunks(decoder, codes, 3), audio) < TOLERANCE


def test_a_stream_begins_without_any_work(runtime: FastRuntime, codes: Codes) -> None:
    decoder, other = runtime.new_decoder(), runtime.new_decoder()
    decoder.step(codes[:7])
    decoder.reset(3)
    begun = zip(decoder.snapshot().tensors, other.snapshot().tensors, strict=True)
    assert all(tensor is shared and not tensor.numpy().any() for tensor, shared in begun)


def test_going_back_to_a_snapshot(runtime: FastRuntime, codes: Codes, audio: Sound) -> None:
    """It also knows where its stream began: fewer frames were seen than the place says, and than a context has."""
    decoder, other = runtime.new_decoder(), runtime.new_decoder()
    decoder.reset(100)
    decoder.step(codes[:3])
    snapshot = decoder.snapshot()
    decoder.step(codes[3:20])
    for either in (decoder, other):
        either.restore(snapshot)
        assert either.next_frame == 103
        found = in_chunks(either, codes[3:], 4)
        assert furthest(found, audio[-len(found) :]) < TOLERANCE


@pytest.mark.parametrize("fails_in_run", [1, 2, 3])
def test_a_step_that_fails_leaves_the_decoder_where_it_was(
    runtime: FastRuntime, long_codes: Codes, fails_in_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, undisturbed = runtime.new_decoder(), runtime.new_decoder()
    for either in (decoder, undisturbed):
        in_chunks(either, long_codes[:41], 8)
    session = runtime.stack.session
    monkeypatch.setattr(session, "native", FailingNative(session.native, fails_in_run))
    with pytest.raises(DecodeError, match="as it was told to"):
        decoder.step(long_codes[41:61])
    monkeypatch.undo()
    assert decoder.next_frame == 41
    found, expected = (in_chunks(either, long_codes[41:], 8) for either in (decoder, undisturbed))
    assert furthest(found, expected) < TOLERANCE


def test_every_piece_of_the_state_is_heard(runtime: FastRuntime, codes: Codes) -> None:
    """Whichever is lost, or takes another one's place, it shows by many steps of 16 bits."""
    decoder = runtime.new_decoder()
    decoder.step(codes[:12])
    snapshot = decoder.snapshot()
    expected = decoder.step(codes[12:16])
    assert len(snapshot.tensors) == 2 * len(runtime.layer_context_frames)
    for index, tensor in enumerate(snapshot.tensors):
        kept = tensor.numpy()
        for spoilt in (np.zeros_like(kept), snapshot.tensors[index ^ 1].numpy(), kept[:, :, ::-1].copy()):
            tensors = list(snapshot.tensors)
            tensors[index] = engine.native_value(np.ascontiguousarray(spoilt))
            decoder.restore(replace(snapshot, tensors=tuple(tensors)))
            assert furthest(decoder.step(codes[12:16]), expected) > 4 * PCM16_STEP, index


@pytest.mark.parametrize("chunk_frames", [1, 5, 24])
def test_codes_of_a_recording(bundle: Bundle, provider: str, tiny_reference: Path, chunk_frames: int) -> None:
    encoder = new_encoder(bundle, provider)
    wave = np.ascontiguousarray(np.load(tiny_reference / "wave.npy").T)
    found = encoded_in_chunks(encoder, wave, chunk_frames)
    assert len(found) == 12  # whole frames
    assert np.array_equal(found, np.load(tiny_reference / "encoded.npy")[:12])


def new_encoder(bundle: Bundle, provider: str) -> StreamEncoder:
    runtime = codecs.load_encoder(bundle, provider=provider, threads=1)
    assert isinstance(runtime, codecs.EncoderRuntime)
    encoder = runtime.new_encoder()
    assert isinstance(encoder, StreamEncoder)
    return encoder


def encoded_in_chunks(encoder: StreamEncoder, wave: Sound, chunk_frames: int) -> Codes:
    chunk_samples = chunk_frames * encoder.format.frame_samples
    whole = len(wave) // encoder.format.frame_samples * encoder.format.frame_samples
    return np.concatenate(
        [encoder.step(wave[start : min(start + chunk_samples, whole)]) for start in range(0, whole, chunk_samples)]
    )


def test_the_official_graph(bundle: Bundle, provider: str, codes: Codes, audio: Sound) -> None:
    decoder = codecs.load_runtime(bundle, provider=provider, graph="official", threads=1).new_decoder()
    assert furthest(in_chunks(decoder, codes, 5), audio) < TOLERANCE


@needs_symlinks
def test_folders_that_are_named_otherwise(
    built_bundle: Path, provider: str, codes: Codes, audio: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From within, by a link, and with data that lie elsewhere: as the hub's cache has them."""
    elsewhere = tmp_path / "a b"
    elsewhere.mkdir()
    for file in built_bundle.iterdir():
        (elsewhere / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(built_bundle)
    monkeypatch.chdir(built_bundle)
    for folder in (Path(), elsewhere, tmp_path / "link"):
        decoder = codecs.load_runtime(load_bundle(folder), provider=provider, threads=1).new_decoder()
        assert furthest(decoder.step(codes), audio) < TOLERANCE


# --- the other codecs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moss-24k", "moss-v2", "mimi"])
def test_goldens_of_other_codecs(provider: str, tmp_path: Path, name: str) -> None:
    skip_if_nothing_can_be_built()
    build_from_checkpoint(REFERENCES / name, tmp_path, graphs="fast")
    bundle = load_bundle(tmp_path)

    def golden(part: str) -> NDArray[Any]:
        loaded: NDArray[Any] = np.load(REFERENCES / name / f"{part}.npy")
        return np.ascontiguousarray(
            loaded[0].T if name == "mimi" else loaded if part in ("codes", "encoded") else loaded.T
        )

    decoder = codecs.load_runtime(bundle, provider=provider, threads=1).new_decoder()
    for chunk_frames in (1, 3, 8, 100):
        decoder.reset()
        assert (
            furthest(in_chunks(decoder, golden("codes").astype(np.uint16), chunk_frames), golden("audio")) < TOLERANCE
        )
    encoder = new_encoder(bundle, provider)
    for chunk_frames in (1, 5, 100):
        encoder.reset()
        found = encoded_in_chunks(encoder, golden("wave"), chunk_frames)
        assert len(found) == len(golden("wave")) // bundle.format.frame_samples
        assert np.array_equal(found, golden("encoded")[: len(found)])


def test_tokens_that_see_only_themselves(provider: str, tmp_path: Path) -> None:
    """The first transformer's context is 1 token, so that it has nothing to remember."""
    skip_if_nothing_can_be_built()
    checkpoint = Path(shutil.copytree(REFERENCES / "moss-24k", tmp_path / "checkpoint", copy_function=shutil.copyfile))
    config = json.loads((checkpoint / "config.json").read_text())
    config["causal_transformer_context_duration"] = 0.08
    (checkpoint / "config.json").write_text(json.dumps(config))
    build_from_checkpoint(checkpoint, tmp_path, sides="decode", graphs="fast")
    runtime = codecs.load_runtime(load_bundle(tmp_path), provider=provider, threads=1)
    assert runtime.layer_context_frames == (1,) * 6
    weights = load_checkpoint(checkpoint).maybe_decoder
    assert weights is not None
    codes = np.load(REFERENCES / "moss-24k" / "codes.npy").astype(np.uint16)[:12]
    assert furthest(in_chunks(runtime.new_decoder(), codes, 5), oracle.decode(weights, codes)) < TOLERANCE


def test_goldens_of_encodec(provider: str, encodec24_bundle: Path) -> None:
    goldens, bundle = np.load(REFERENCES / "encodec" / "goldens24.npz"), load_bundle(encodec24_bundle)
    codes, audio, wave = (np.ascontiguousarray(goldens[f"v60.{part}"].T) for part in ("codes", "audio", "wav"))
    decoder = codecs.load_runtime(bundle, provider=provider, threads=1).new_decoder()
    for chunk_frames in (7, 8, len(codes)):
        decoder.reset()
        assert furthest(in_chunks(decoder, codes, chunk_frames)[: len(audio)], audio) < TOLERANCE
    encoder = new_encoder(bundle, provider)
    assert np.array_equal(encoder.step(wave), codes)


def test_segments_of_encodec(provider: str, encodec48_bundle: Path) -> None:
    bundle = load_bundle(encodec48_bundle)
    there, here = (codecs.load_segment_encoder(bundle, provider=name, threads=1) for name in (provider, "cpu"))
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (here.segment_samples, 2)).astype(np.float32)
    (found, found_scale), (expected, scale) = (encoder.encode_segment(audio) for encoder in (there, here))
    assert np.array_equal(found, expected)
    assert found_scale == scale
    decoders = [codecs.load_decoder(bundle, provider=name, threads=1) for name in (provider, "cpu")]
    sounds = [
        decoder.decode_segment(expected, scale) for decoder in decoders if isinstance(decoder, codecs.SegmentDecoder)
    ]
    assert furthest(*sounds) < TOLERANCE


def test_states_stay_on_the_device(
    bundle: Bundle, runtime: FastRuntime, provider: str, codes: Codes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named where a stream begins and where a run ends; one that onnxruntime does not know fails there."""
    assert engine.DEVICES == {"cuda": "cuda"}
    monkeypatch.setitem(engine.DEVICES, provider, "nowhere")
    with pytest.raises(DecodeError, match="the graph failed: Unsupported device type: nowhere"):
        runtime.new_decoder().step(codes[:1])
    with pytest.raises(DecodeError, match="the graph failed: Unsupported device type: nowhere"):
        codecs.load_runtime(bundle, provider=provider)


# --- what users are told ------------------------------------------------------------------------------------------


def test_int8_stays_on_the_cpu(bundle: Bundle, provider: str) -> None:
    graphs = {**bundle.graphs, "fast_int8": replace(bundle.graphs["fast"], precision="int8")}
    with pytest.raises(UsageError, match=f"int8 graph runs on provider 'cpu' only; on '{provider}' leave int8 out"):
        codecs.load_runtime(replace(bundle, graphs=graphs), provider=provider, precision="int8")


def test_without_onnx_the_official_graph_runs(
    bundle: Bundle, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    genuine = builtins.__import__

    def without_onnx(name: str, *rest: Any) -> Any:
        if name == "onnx":
            raise ImportError(name="onnx")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with caplog.at_level(logging.WARNING, "mossnano"):
        assert codecs.load_runtime(bundle, provider=provider).graph_name == "official"
        assert not isinstance(codecs.load_encoder(bundle, provider=provider), codecs.EncoderRuntime)
    assert caplog.text.count("takes onnx, and that is not installed: pip install onnx; ") == 2
    with pytest.raises(UnfitRuntimeError, match="pip install onnx"):
        codecs.load_runtime(bundle, provider=provider, graph="fast")
    for file in bundle.folder.glob("*"):
        if file.name.startswith("mossnano") or file.suffix == ".json":  # the official graphs were left out
            shutil.copyfile(file, tmp_path / file.name)
    for load in (codecs.load_runtime, codecs.load_encoder):
        with pytest.raises(UnfitRuntimeError, match="pip install onnx"):
            load(load_bundle(tmp_path), provider=provider)


def test_an_old_onnxruntime_runs_the_official_graph(
    bundle: Bundle, mimi_standin: Path, provider: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with caplog.at_level(logging.WARNING, "mossnano"):
        assert codecs.load_runtime(bundle, provider=provider).graph_name == "official"
    assert "onnxruntime 1.20.1 finds no data of a graph that is rewritten" in caplog.text
    with pytest.raises(UnfitRuntimeError, match=r"1.21 and later do, `--graph official` runs with any$"):
        codecs.load_runtime(bundle, provider=provider, graph="fast")
    with pytest.raises(UnfitRuntimeError, match=r"1.21 and later do$"):  # Mimi has no other
        codecs.load_runtime(load_bundle(mimi_standin), provider=provider)


def test_graphs_that_cannot_be_rewritten(provider: str, built_bundle: Path, tmp_path: Path) -> None:
    for file in built_bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / FAST_FILE
    model = onnx.load(path, load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    model.graph.node.remove(attention)
    for content, complaint in (
        (b"?" + path.read_bytes()[1:], "was damaged or changed"),
        (b"no graph", "is no ONNX graph"),
        (model.SerializeToString(), "has 1 layers less than its facts say"),
    ):
        path.write_bytes(content)
        bundle = load_bundle(tmp_path)
        if complaint != "was damaged or changed":
            graph = bundle.graphs["fast"]
            bundle = replace(
                bundle, graphs={**bundle.graphs, "fast": replace(graph, model=replace(graph.model, record=None))}
            )
        with pytest.raises(BundleError, match=complaint):
            codecs.load_runtime(bundle, provider=provider)


def test_a_graph_with_more_layers_than_its_facts_say(bundle: Bundle, provider: str) -> None:
    graph = bundle.graphs["fast"]
    first, *others = graph.facts["transformers"]
    fewer = replace(graph, facts={**graph.facts, "transformers": [{**first, "layers": first["layers"] - 1}, *others]})
    with pytest.raises(BundleError, match=r"fast\.onnx: onnxruntime cannot load it"):
        codecs.load_runtime(replace(bundle, graphs={**bundle.graphs, "fast": fewer}), provider=provider)


def test_check_decodes_and_encodes_with_every_graph(provider: str, built_bundle: Path) -> None:
    outcome = call_tool("check", built_bundle, "--provider", provider)
    assert outcome.status == 0, outcome.out
    assert b"absent" not in outcome.out
    assert b"ok       sound  fast, chunks of 23" in outcome.out
    assert b"ok       sound  encode_step, chunks of 23" in outcome.out


def test_check_leaves_int8_to_the_cpu(bundle: Bundle, provider: str) -> None:
    both = {name: bundle.graphs[name] for name in ("fast", "encode_step")}
    graphs = _Graphs(
        replace(bundle, graphs={**both, "fast_int8": replace(both["fast"], precision="int8")}), provider, 1
    )
    verdicts = {row.name: (row.verdict, row.detail) for row in graphs.check()}
    assert verdicts["fast_int8"] == ("absent", f"runs on the CPU only, not on {provider!r}")
    assert {name: verdicts[name][0] for name in both} == {"fast": "ok", "encode_step": "ok"}


def test_libraries_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def preload_dlls() -> None:
        print("Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file")
        print("Failed to load C:\\cuda\\cudart64_13.dll: it is none")
        print("Please follow the page about it")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls, raising=False)
    engine._missing_libraries.cache_clear()
    words = engine._missing_libraries()
    engine._missing_libraries.cache_clear()
    assert words.startswith(", for want of libcublasLt.so.13, ")
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in words


@pytest.mark.skipif(not providers_here(), reason="this onnxruntime has no other provider than the CPU's")
def test_the_process(built_bundle: Path, codes: Codes, audio: Sound) -> None:
    for name in providers_here():
        command = [*PROCESS, "--weights", str(built_bundle), "--provider", name, "--output", "raw"]
        outcome = run(command, encoded(Message(Kind.TOKENS, pack_frames(codes, 1024)), Message(Kind.END)))
        assert outcome.returncode == 0, outcome.stderr
        found = np.frombuffer(outcome.stdout, "<i2").reshape(-1, 2)
        assert np.abs(found - np.frombuffer(to_pcm16(audio), "<i2").reshape(-1, 2).astype(int)).max() <= 1
