"""codec/: the right sound from every chunking, a state that cannot be spoilt unnoticed, no session from bad files."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from mossnano_stdio import codec, pinned
from mossnano_stdio.bundle import (
    METADATA_NAME,
    Sidecar,
    load_bundle,
    record_files,
    save_sidecar,
)
from mossnano_stdio.codec import Engine, memory, runtime
from mossnano_stdio.codec.encoder import FullEncoder
from mossnano_stdio.codec.official import FullDecoder, OfficialRuntime, StreamDecoder
from mossnano_stdio.codec.runtime import Session
from mossnano_stdio.comparison import compare_recordings
from mossnano_stdio.errors import BundleError, DecodeError, TokenError, UsageError
from mossnano_stdio.layout import Codes
from mossnano_stdio.pcm import Recording, pcm16_samples, to_pcm16

STEP = "moss_audio_tokenizer_decode_step.onnx"
FULL = "moss_audio_tokenizer_decode_full.onnx"
SHARED = "moss_audio_tokenizer_decode_shared.data"

TOLERANCE = 2e-5  # of the goldens
PCM16_STEP = 1 / 32767
FRAMES = 24  # of the goldens
TOKENS_PER_FRAME = {1: 4, 3: 8, 5: 16, 7: 32}  # by the decoder's module
CONTEXTS = {1: 40, 3: 64, 5: 96, 7: 128}  # in tokens

Audio = NDArray[np.float32]


@pytest.fixture(scope="module")
def codes(tiny_reference: Path) -> Codes:
    loaded: Codes = np.load(tiny_reference / "codes.npy")
    return loaded


@pytest.fixture(scope="module")
def audio(tiny_reference: Path) -> Audio:
    """[samples, channels]"""
    loaded: Audio = np.load(tiny_reference / "audio.npy").T
    return loaded


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> OfficialRuntime:
    return OfficialRuntime(load_bundle(tiny_bundle), Engine.of(threads=1))


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be spoilt."""
    copied = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copied, copy_function=shutil.copyfile)
    return copied


def in_chunks(decoder: codec.StreamDecoder, codes: Codes, chunk_frames: int) -> Audio:
    starts = range(0, len(codes), chunk_frames)
    return np.concatenate([decoder.step(codes[start : start + chunk_frames]) for start in starts])


def over(genuine: OfficialRuntime, session: Session) -> OfficialRuntime:
    """The same runtime, over another session."""
    other = copy.copy(genuine)
    other.session = session
    return other


def furthest(here: Audio, there: Audio) -> float:
    assert here.shape == there.shape
    return float(np.abs(here - there).max())


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "built_bundle"])
def test_goldens(bundle_name: str, codes: Codes, audio: Audio, request: pytest.FixtureRequest) -> None:
    bundle = load_bundle(request.getfixturevalue(bundle_name))
    whole = codec.load_full_decoder(bundle, threads=1).decode(codes)
    assert furthest(whole, audio) < TOLERANCE
    decoder = OfficialRuntime(bundle, Engine.of(threads=1)).new_decoder()
    for chunk_frames in (1, 2, 5, 7, 12, 24):
        decoder.reset()
        assert furthest(in_chunks(decoder, codes, chunk_frames), audio) < TOLERANCE, chunk_frames


@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "built_bundle"])
def test_encoder_goldens(bundle_name: str, tiny_reference: Path, request: pytest.FixtureRequest) -> None:
    wave, encoded = np.load(tiny_reference / "wave.npy"), np.load(tiny_reference / "encoded.npy")
    encoder = FullEncoder(load_bundle(request.getfixturevalue(bundle_name)), Engine.of(threads=1))
    found = encoder.encode(wave.T)
    whole_frames = wave.shape[1] // 3840
    assert (found[:whole_frames] == encoded[:whole_frames]).all()
    assert len(found) == whole_frames + 1, "the frame that was begun is kept"
    assert len(encoder.encode(wave.T[: 12 * 3840])) == 12
    assert encoder.encode(wave.T[:0]).shape == (0, 16)


@pytest.mark.parametrize("chunk_frames", [1, 23])
def test_nano_past_its_shortest_context(nano_bundle: Path, nano: OfficialRuntime, chunk_frames: int) -> None:
    codes = np.random.default_rng(6).integers(0, 1024, (60, 16)).astype(np.uint16)
    whole = codec.load_full_decoder(load_bundle(nano_bundle)).decode(codes)
    assert furthest(in_chunks(nano.new_decoder(), codes, chunk_frames), whole) <= PCM16_STEP


@pytest.mark.slow
@pytest.mark.parametrize("chunk_frames", [1, 7, 17, 23])
def test_nano_past_every_context(
    nano_bundle: Path, nano_whole: tuple[Codes, Audio], nano: OfficialRuntime, chunk_frames: int
) -> None:
    codes, whole = nano_whole
    stepped = in_chunks(nano.new_decoder(), codes, chunk_frames)
    assert furthest(stepped, whole) <= PCM16_STEP
    reference, candidate = (Recording(48000, pcm16_samples(to_pcm16(audio), 2)) for audio in (whole, stepped))
    comparison = compare_recordings(reference, candidate, chunk_frames * 3840)
    assert len(comparison.joins) == -(-200 // chunk_frames) - 1
    assert comparison.loud_joins == ()


@pytest.fixture(scope="module")
def nano(nano_bundle: Path) -> OfficialRuntime:
    return OfficialRuntime(load_bundle(nano_bundle), Engine.of())


@pytest.fixture(scope="module")
def nano_whole(nano_bundle: Path) -> tuple[Codes, Audio]:
    """16 s: the longest context is 10 s."""
    codes = np.random.default_rng(5).integers(0, 1024, (200, 16)).astype(np.uint16)
    return codes, codec.load_full_decoder(load_bundle(nano_bundle)).decode(codes)


def halve_caches(folder: Path) -> None:
    """Keys and values in half precision, outside of the graph: in the graph they are float32 as before."""
    model = onnx.load(folder / STEP, load_external_data=False)
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    first, last = [], []
    for value in [*model.graph.input, *model.graph.output]:
        if "cached_keys" not in value.name and "cached_values" not in value.name:
            continue
        value.type.tensor_type.elem_type = half
        is_input = "_out_" not in value.name
        for node in model.graph.node:
            names = node.input if is_input else node.output
            names[:] = [f"{name}_single" if name == value.name else name for name in names]
        if is_input:
            first.append(helper.make_node("Cast", [value.name], [f"{value.name}_single"], to=single))
        else:
            last.append(helper.make_node("Cast", [f"{value.name}_single"], [value.name], to=half))
    nodes = [*first, *model.graph.node, *last]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (folder / STEP).write_bytes(model.SerializeToString())
    content = (folder / METADATA_NAME).read_text()
    (folder / METADATA_NAME).write_text(content.replace('"cache_dtype": "float32"', '"cache_dtype": "float16"'))


def test_caches_of_half_precision(folder: Path, codes: Codes, audio: Audio) -> None:
    halve_caches(folder)
    decoder = codec.load_decoder(load_bundle(folder), threads=1)
    found = in_chunks(decoder, codes, 5)
    assert 0 < furthest(found, audio) < 0.01
    dtypes = {name: tensor.dtype.name for name, tensor in decoder.snapshot().tensors.items()}
    assert dtypes["attn_cached_keys_3"] == dtypes["attn_cached_values_0"] == "float16"
    assert dtypes["attn_cached_positions_0"] == "int32"


# --- the state ----------------------------------------------------------------------------------------------------

Feed = dict[str, NDArray[Any]]
Fault = Callable[[Feed, Feed, str], Iterator[Feed]]  # this run's feed, the last one's, a state -> what is fed instead


def dropped(feed: Feed, before: Feed, name: str) -> Iterator[Feed]:
    yield {key: value for key, value in feed.items() if key != name}


def reset(feed: Feed, before: Feed, name: str) -> Iterator[Feed]:
    empty = -1 if "positions" in name else 0
    yield {**feed, name: np.full_like(feed[name], empty)}


def fed_twice(feed: Feed, before: Feed, name: str) -> Iterator[Feed]:
    yield {**feed, name: before[name]}


def swapped(feed: Feed, before: Feed, name: str) -> Iterator[Feed]:
    """With each state of the same shape, unless their values are the same anyway, and with one of another shape."""
    others = [other for other in STATES if not np.array_equal(feed[other], feed[name])]
    unlike = [other for other in others if feed[other].shape != feed[name].shape]
    for other in set(others) - set(unlike[1:]):
        yield {**feed, name: feed[other], other: feed[name]}


class FaultySession(Session):
    """Feeds something else once, in the run that it is told to spoil."""

    def __init__(self, genuine: Session, fault: Fault, name: str, variant: int) -> None:
        self.graph = genuine.graph
        self._genuine = genuine
        self._fault, self._name, self._variant = fault, name, variant
        self._runs = 0
        self._before: Feed = {}
        self.variants = 0

    def run(self, output_names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        self._runs += 1
        feed, before, self._before = dict(feed), self._before, dict(feed)
        if self._runs == 4:
            spoilt = list(self._fault(feed, before, self._name))
            self.variants = len(spoilt)
            if self._variant < len(spoilt):
                feed = spoilt[self._variant]
        return self._genuine.run(output_names, feed)


def departure(decoder: StreamDecoder, codes: Codes, audio: Audio) -> str | None:
    """What is wrong with a decoder, if anything: it fails, its sound is another, or its counters are."""
    try:
        found = in_chunks(decoder, codes, 3)
    except DecodeError:
        return "it fails"
    if furthest(found, audio) > 100 * TOLERANCE:
        return "another sound"
    tensors = decoder.snapshot().tensors
    bundle = decoder.runtime.bundle
    for number, module in enumerate(TOKENS_PER_FRAME):
        if tensors[f"transformer_offset_{number}"].tolist() != [FRAMES * TOKENS_PER_FRAME[module]]:
            return "a counter"
    for number, cache in enumerate(bundle.caches):
        tokens, context = FRAMES * TOKENS_PER_FRAME[cache.decoder_index], CONTEXTS[cache.decoder_index]
        if tensors[f"attn_offset_{number}"].tolist() != [tokens]:
            return "a counter"
        if tensors[f"attn_cached_positions_{number}"].tolist() != [list(range(tokens - context, tokens))]:
            return "positions"
    return None


STATES = [
    *(f"transformer_offset_{number}" for number in range(4)),
    *(f"attn_{part}_{n}" for n in range(6) for part in ("offset", "cached_keys", "cached_values", "cached_positions")),
]


def test_these_are_all_the_states(tiny: OfficialRuntime) -> None:
    assert [state.input_name for state in tiny.states] == STATES


def test_without_a_fault_nothing_departs(tiny: OfficialRuntime, codes: Codes, audio: Audio) -> None:
    assert departure(tiny.new_decoder(), codes, audio) is None


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("fault", [dropped, reset, fed_twice, swapped])
def test_every_fault_in_every_state_is_noticed(
    tiny: OfficialRuntime, codes: Codes, audio: Audio, fault: Fault, name: str
) -> None:
    variant, variants = 0, 1
    while variant < variants:
        session = FaultySession(tiny.session, fault, name, variant)
        assert departure(over(tiny, session).new_decoder(), codes, audio), f"{fault.__name__} {name} goes unnoticed"
        variant, variants = variant + 1, session.variants
    assert variants


class MarkingSession(Session):
    """Gives every state tensor a mark of its own, and demands it back from the input that it belongs to."""

    def __init__(self, genuine: Session) -> None:
        self.graph = genuine.graph
        self._runs = 0

    def run(self, output_names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        states = self.graph.states
        if self._runs:
            expected = {state.input_name: self._mark(number) for number, state in enumerate(states)}
            found = {name: value for name, value in feed.items() if not name.startswith("audio_")}
            assert found.keys() == expected.keys()
            assert all((found[name] == mark).all() for name, mark in expected.items())
        self._runs += 1
        frames = feed["audio_codes"].shape[1]
        outputs: Feed = {
            "audio": np.zeros((1, 2, frames * 3840), np.float32),
            "audio_lengths": np.array([frames * 3840], np.int32),
        }
        for number, state in enumerate(states):
            outputs[state.output_name] = np.full(state.shape, self._mark(number), state.dtype)
        return [outputs[name] for name in output_names]

    def _mark(self, number: int) -> int:
        return 1000 * self._runs + number


def test_every_state_output_comes_back_by_its_own_input_once(tiny: OfficialRuntime, codes: Codes) -> None:
    """States of one shape that hold equal values, as positions of sibling layers do, cannot be told apart by sound."""
    marking = over(tiny, MarkingSession(tiny.session))
    in_chunks(marking.new_decoder(), codes, 3)


def test_reset_is_a_fresh_decoder(tiny: OfficialRuntime, codes: Codes) -> None:
    decoder = tiny.new_decoder()
    first = in_chunks(decoder, codes, 5)
    decoder.reset()
    assert decoder.next_frame == 0
    assert np.array_equal(in_chunks(decoder, codes, 5), first)


def test_going_back_to_a_snapshot(tiny: OfficialRuntime, codes: Codes) -> None:
    decoder = tiny.new_decoder()
    decoder.step(codes[:10])
    snapshot = decoder.snapshot()
    kept = {name: value.copy() for name, value in snapshot.tensors.items()}
    first = decoder.step(codes[10:17])
    decoder.step(codes[17:])
    decoder.restore(snapshot)
    assert decoder.next_frame == 10
    assert np.array_equal(decoder.step(codes[10:17]), first)
    other = tiny.new_decoder()
    other.restore(snapshot)
    assert np.array_equal(other.step(codes[10:17]), first)
    assert all(np.array_equal(snapshot.tensors[name], value) for name, value in kept.items())


def test_a_step_that_fails_leaves_the_decoder_where_it_was(tiny: OfficialRuntime, codes: Codes) -> None:
    class FailingSession(Session):
        """Fails in its second run: a chunk of 12 frames takes two."""

        def __init__(self) -> None:
            self.graph = tiny.session.graph
            self.runs = 0

        def run(self, output_names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
            self.runs += 1
            if self.runs == 2:
                raise DecodeError("as it was told to")
            return tiny.session.run(output_names, feed)

    decoder = tiny.new_decoder()
    decoder.step(codes[:5])
    expected = tiny.new_decoder()
    expected.step(codes[:5])
    decoder.runtime = over(tiny, FailingSession())
    before = decoder.snapshot()
    with pytest.raises(DecodeError):
        decoder.step(codes[5:17])
    assert decoder.snapshot() is before
    decoder.runtime = tiny
    assert np.array_equal(decoder.step(codes[5:17]), expected.step(codes[5:17]))


def test_beginning_in_the_middle(tiny: OfficialRuntime, codes: Codes, audio: Audio) -> None:
    """From frame 1 on, with no more warm-up than there is: only the cache of what came before is missing."""
    decoder = tiny.new_decoder()
    decoder.step(codes)
    counted = {name: value for name, value in decoder.snapshot().tensors.items() if "offset" in name}
    decoder.reset(start_frame=FRAMES)
    assert decoder.next_frame == FRAMES
    begun = decoder.snapshot().tensors
    assert {name: begun[name].tolist() for name in counted} == {name: v.tolist() for name, v in counted.items()}
    assert all((begun[name] == -1).all() for name in begun if "positions" in name)


def test_equal_chunks_equal_bytes(tiny: OfficialRuntime, codes: Codes) -> None:
    def digest() -> str:
        return hashlib.sha256(in_chunks(tiny.new_decoder(), codes, 4).tobytes()).hexdigest()

    assert len({digest() for _ in range(20)}) == 1


def test_streams_over_one_runtime_do_not_touch_each_other(tiny: OfficialRuntime) -> None:
    random = np.random.default_rng(0)
    streams = [random.integers(0, 1024, (20, 16)).astype(np.uint16) for _ in range(4)]
    expected = [in_chunks(tiny.new_decoder(), stream, 3) for stream in streams]
    found: list[Audio | None] = [None] * len(streams)

    def decode(number: int) -> None:
        found[number] = in_chunks(tiny.new_decoder(), streams[number], 3)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for here, there in zip(found, expected, strict=True):
        assert here is not None
        assert np.array_equal(here, there)


# --- what goes in and out -----------------------------------------------------------------------------------------


def test_audio_is_what_pcm_wants(tiny: OfficialRuntime, codes: Codes) -> None:
    for frames in (1, 8, 9):
        found = tiny.new_decoder().step(codes[:frames])
        assert found.shape == (frames * 3840, 2)
        assert found.dtype == np.float32
    assert tiny.new_decoder().step(codes[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((2, 15), np.uint16), "codes of 15 quantizers, these weights take 16"),
        (np.zeros((2, 17), np.uint16), "codes of 17 quantizers, these weights take 16"),
        (np.zeros(16, np.uint16), r"codes are uint16 \[16\], allowed are integers \[frames, quantizers\]"),
        (np.zeros((2, 16), np.float32), "codes are float32"),
        (np.full((2, 16), 1024, np.uint16), "frame 0, quantizer 0: code 1024, allowed is 0 to 1023"),
        (np.full((2, 16), 65535, np.uint16), "code 65535, allowed is 0 to 1023"),
        (np.full((2, 16), -1, np.int64), "code -1, allowed is 0 to 1023"),
    ],
)
def test_wrong_codes_never_reach_the_graph(
    tiny: OfficialRuntime, tiny_bundle: Path, wrong: Any, says: str, codes: Codes
) -> None:
    decoder = tiny.new_decoder()
    decoder.step(codes[:3])
    before = decoder.snapshot()
    with pytest.raises(TokenError, match=says):
        decoder.step(wrong)
    assert decoder.snapshot() is before


def test_a_code_outside_of_a_smaller_codebook_is_refused(folder: Path, codes: Codes) -> None:
    """The graph itself would take it: its codebook is larger than what the notes say."""
    save_sidecar(folder, Sidecar(codebook_size=1000))
    decoder = codec.load_decoder(load_bundle(folder))
    assert codes.max() >= 1000
    with pytest.raises(TokenError, match="allowed is 0 to 999"):
        decoder.step(codes)


@pytest.mark.parametrize("lengths", [[3839], [3840, 1], [0]])
def test_a_graph_that_gives_another_length_is_not_believed(tiny: OfficialRuntime, codes: Codes, lengths: Any) -> None:
    class ShortSession(Session):
        def __init__(self) -> None:
            self.graph = tiny.session.graph

        def run(self, output_names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
            audio, _, *states = tiny.session.run(output_names, feed)
            return [audio, np.array(lengths, np.int32), *states]

    short = over(tiny, ShortSession())
    with pytest.raises(DecodeError, match=r"1 frames gave audio \[1, 2, 3840\] of length"):
        short.new_decoder().step(codes[:1])


def test_a_run_that_fails_is_one_of_our_errors(tiny: OfficialRuntime, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DecodeError, match=f"{STEP}: the graph failed"):
        tiny.session.run(["audio"], {"audio_codes": np.zeros((1, 1, 16), np.int32)})
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_a_memory_error(tiny: OfficialRuntime) -> None:
    for message in ("std::bad_alloc", "Failed to allocate memory for requested buffer of size 123"):
        with pytest.raises(MemoryError), runtime.translated_errors(tiny.session.graph):
            raise RuntimeError(message)


# --- loading ------------------------------------------------------------------------------------------------------


def test_threads_and_providers() -> None:
    assert 1 <= codec.default_threads() <= 4
    assert Engine.of() == Engine("cpu", codec.default_threads(), spin=False)
    with pytest.raises(UsageError, match="provider 'gpu' is not known, allowed are cpu, cuda"):
        Engine.of("gpu")
    with pytest.raises(UsageError, match="0 threads, allowed is a whole number from 1 to 1024"):
        Engine.of(threads=0)


def test_threads_spin_for_moments_only_unless_asked_to() -> None:
    assert runtime._spinning(Engine.of(), "1.25.1") == {"intra_op.allow_spinning": "0"}
    assert runtime._spinning(Engine.of(spin=True), "1.31.1") == {"intra_op.allow_spinning": "1"}
    assert runtime._spinning(Engine.of(), "1.26.0")["intra_op.spin_duration_us"] == "10"


def test_default_threads_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, usable=usable: range(usable))
        assert codec.default_threads() == expected


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "coreml", "directml", "openvino"])
def test_a_provider_that_is_not_there_is_refused(tiny_bundle: Path, provider: str) -> None:
    with pytest.raises(BundleError, match=f"provider '{provider}' is not in this onnxruntime; here there are cpu"):
        codec.load_runtime(load_bundle(tiny_bundle), provider=provider)


def test_a_provider_that_does_not_start_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is built in, but its driver is not there: onnxruntime itself would go on with the CPU."""
    import onnxruntime

    genuine = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(runtime.PROVIDERS.values()))
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, enable_fallback: genuine(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(BundleError, match="provider 'cuda' was asked for, but did not start"):
        codec.load_runtime(load_bundle(tiny_bundle), provider="cuda")
    assert capfd.readouterr().out == ""


def test_a_fast_graph_that_is_not_there_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no fast graph; `mossnano build` makes one"):
        codec.load_runtime(load_bundle(tiny_bundle), graph="fast")
    assert codec.load_runtime(load_bundle(tiny_bundle)).graph_name == "official"


def spoilt_model(path: Path, spoil: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    spoil(model)
    path.write_bytes(model.SerializeToString())


def rename_input(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["attn_keys_0" if name == "attn_cached_keys_0" else name for name in node.input]
    next(value for value in model.graph.input if value.name == "attn_cached_keys_0").name = "attn_keys_0"


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["attn_offset_out_0"], ["attn_offset_next_0"]))
    next(value for value in model.graph.output if value.name == "attn_offset_out_0").name = "attn_offset_next_0"


def widen_context(model: onnx.ModelProto) -> None:
    value = next(value for value in model.graph.input if value.name == "attn_cached_keys_0")
    value.type.tensor_type.shape.dim[2].dim_value = 41


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


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (rename_input, "has no input 'attn_cached_keys_0', which the metadata promises"),
        (rename_output, "has no output 'attn_offset_out_0', which the metadata promises"),
        (widen_context, r"attn_cached_keys_0' is float32 \[1, 4, 41, 8\], the metadata says float32 \[1, 4, 40, 8\]"),
        (double_counter, r"output 'attn_offset_out_0' is int64 \[1\], the metadata says int32 \[1\]"),
        (extra_output, "has an output 'audio_again', which the metadata does not know"),
        (unknown_operator, "onnxruntime cannot load it with .*NoSuchOperator"),
    ],
)
def test_a_graph_of_another_make_is_refused(
    folder: Path, spoil: Callable[[onnx.ModelProto], None], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoilt_model(folder / STEP, spoil)
    with pytest.raises(BundleError, match=says) as raised:
        codec.load_runtime(load_bundle(folder))
    assert str(raised.value).startswith(str(folder / STEP))
    assert raised.value.exit_status == 66
    assert capfd.readouterr() == ("", ""), "what is wrong is said once, by the error"


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


SPOILT: dict[str, Callable[[Path], object]] = {
    "no graph": lambda folder: (folder / STEP).unlink(),
    "no data": lambda folder: (folder / SHARED).unlink(),
    "cut graph": lambda folder: cut(folder / STEP),
    "cut data": lambda folder: cut(folder / SHARED),
    "empty graph": lambda folder: (folder / STEP).write_bytes(b""),
    "empty data": lambda folder: (folder / SHARED).write_bytes(b""),
    "bit of the graph": lambda folder: flip_bit(folder / STEP, 1000),
    "bit of the data": lambda folder: flip_bit(folder / SHARED, 400_001),
    "another graph": lambda folder: shutil.copyfile(folder / FULL, folder / STEP),
}


@pytest.mark.parametrize("known", ["recorded", "published", "unknown"])
@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_files(folder: Path, name: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published or recorded is refused whatever is wrong with it; of the rest, whatever can be seen."""
    records = record_files(folder, [METADATA_NAME, STEP, FULL, SHARED])
    if known == "recorded":
        save_sidecar(folder, Sidecar(codebook_size=1024, files=records))
    if known == "published":
        monkeypatch.setattr(pinned, "BUNDLE", pinned.PinnedRepository("a/b", "c", records))
    if known == "unknown":
        save_sidecar(folder, Sidecar(codebook_size=1024))
    assert codec.load_runtime(load_bundle(folder))
    SPOILT[name](folder)
    if known == "unknown" and name == "bit of the data":
        return  # nothing can tell it from other weights
    with pytest.raises(BundleError) as raised:
        codec.load_runtime(load_bundle(folder))
    said, guilty = str(raised.value), SHARED if "data" in name else STEP
    assert said.startswith(str(folder))
    assert guilty in (said if known == "unknown" else said.partition(":")[0])


def test_a_damaged_graph_is_never_shown_to_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sidecar(folder, Sidecar(codebook_size=1024, files=record_files(folder, [STEP])))
    flip_bit(folder / STEP, 1000)
    monkeypatch.setattr(runtime, "_native_session", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match="SHA-256"):
        codec.load_runtime(load_bundle(folder))


def test_metadata_of_another_codec_is_refused(folder: Path) -> None:
    content = (folder / METADATA_NAME).read_text()
    (folder / METADATA_NAME).write_text(content.replace('"num_quantizers": 16', '"num_quantizers": 8'))
    with pytest.raises(
        BundleError, match=r"'audio_codes' is int32 \[1, \?, 16\], the metadata says int32 \[1, \?, 8\]"
    ):
        codec.load_runtime(load_bundle(folder))


@pytest.mark.parametrize("layout", ["as the hub keeps it", "every file elsewhere", "folder"])
def test_weights_behind_symlinks(tiny_bundle: Path, tmp_path: Path, layout: str, codes: Codes, audio: Audio) -> None:
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
    decoder = codec.load_decoder(load_bundle(folder), threads=1)
    assert furthest(decoder.step(codes), audio) < TOLERANCE


@pytest.mark.skipif(sys.platform != "linux", reason="only here are names any bytes")
def test_symlinks_in_a_path_that_is_no_text(tiny_bundle: Path, tmp_path: Path, codes: Codes, audio: Audio) -> None:
    folder = tmp_path / os.fsdecode(b"gew\xf6hnlich")
    folder.mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "elsewhere")
    for path in tiny_bundle.iterdir():
        (folder / path.name).symlink_to(f"../elsewhere/{path.name}")
    decoder = codec.load_decoder(load_bundle(folder), threads=1)
    assert furthest(decoder.step(codes), audio) < TOLERANCE


@pytest.mark.skipif(sys.platform != "linux", reason="only here are names any bytes")
@pytest.mark.parametrize("name", ["official", "fast", "full", "encoder"])
def test_a_path_that_is_no_text(built_bundle: Path, tmp_path: Path, codes: Codes, audio: Audio, name: str) -> None:
    folder = Path(shutil.copytree(built_bundle, tmp_path / os.fsdecode(b"gew\xf6hnlich")))
    bundle = load_bundle(folder)
    if name == "encoder":
        silence = np.zeros((2 * 3840, 2), dtype=np.float32)
        expected = codec.load_encoder_runtime(load_bundle(built_bundle), threads=1).new_encoder().step(silence)
        assert np.array_equal(codec.load_encoder_runtime(bundle, threads=1).new_encoder().step(silence), expected)
    elif name == "full":
        assert furthest(codec.load_full_decoder(bundle, threads=1).decode(codes), audio) < TOLERANCE
    else:
        decoder = codec.load_decoder(bundle, threads=1, graph="fast" if name == "fast" else "official")
        assert furthest(decoder.step(codes), audio) < TOLERANCE


def test_data_missing_behind_a_symlink(folder: Path) -> None:
    (folder / SHARED).unlink()
    (folder / SHARED).symlink_to("nowhere")
    with pytest.raises(BundleError, match=f"{SHARED}: is not there"):
        codec.load_runtime(load_bundle(folder))


# --- whole-file runs ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_advice(
    tiny_bundle: Path, codes: Codes, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FullDecoder(load_bundle(tiny_bundle), Engine.of(threads=1))
    many = np.tile(codes, (5, 1))
    assert len(full.decode(many)) == len(many) * 3840
    monkeypatch.setattr(memory, "_free_bytes", lambda: 64 << 20)
    with pytest.raises(UsageError, match=r"decoding 120 frames as a whole needs about 1.4 GiB, 0.1 GiB are free"):
        full.decode(many)
    encoder = FullEncoder(load_bundle(tiny_bundle), Engine.of(threads=1))
    with pytest.raises(UsageError, match=r"encoding 120 frames as a whole .* build a streaming encoder"):
        encoder.encode(np.zeros((120 * 3840, 2), np.float32))


def test_free_memory_is_the_least_of_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory._machine_bytes()
    assert machine and memory._free_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory._group_bytes() is None
    (tmp_path / "memory.max").write_text("3000000\n")
    assert memory._free_bytes() == 2_000_000


@pytest.mark.parametrize("wrong", [np.zeros((10, 1)), np.zeros(10), np.full((10, 2), np.nan), np.full((10, 2), np.inf)])
def test_audio_that_cannot_be_encoded(tiny_bundle: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"audio is \[|audio holds NaN"):
        FullEncoder(load_bundle(tiny_bundle), Engine.of(threads=1)).encode(wrong.astype(np.float32))


def test_a_fast_graph_that_is_recorded_but_gone_is_an_error_and_no_silent_fall_back(
    built_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(built_bundle, folder)
    (folder / load_bundle(folder).graphs["fast"].path.name).unlink()
    with pytest.raises(BundleError, match="is not there"):
        codec.load_runtime(load_bundle(folder))
    assert codec.load_runtime(load_bundle(folder), graph="official").graph_name == "official"
