"""The fast graph: the sound of the official one from every chunking and every prefix, in memory that only slides."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mossnano_stdio import codecs
from mossnano_stdio.build.attention import PROBE_PATH, attention_probe
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.decode_step import FAST_FILE, fast_decode_step
from mossnano_stdio.build.model import DecoderWeights, transformers
from mossnano_stdio.codecs import Engine, in_place, moss, probe, rings
from mossnano_stdio.codecs.moss import FastDecoder, FastRuntime
from mossnano_stdio.codecs.rings import MAX_RUN_FRAMES, Rings, RingSpec
from mossnano_stdio.errors import BundleError, DecodeError, TokenError, UsageError
from mossnano_stdio.tokens.format import Codes
from mossnano_stdio.weights.folder import Bundle, load_bundle
from tests import oracle

TOLERANCE = 1e-5
PCM16_STEP = 1 / 32767
FRAMES = 24  # of the goldens
LONG_FRAMES = 72  # seven times the longest context: the end of every memory is reached several times

Audio = NDArray[np.float32]


@pytest.fixture(scope="module")
def bundle(built_bundle: Path) -> Bundle:
    return load_bundle(built_bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> FastRuntime:
    return FastRuntime(bundle, Engine.of(threads=1))


@pytest.fixture
def decoder(runtime: FastRuntime) -> FastDecoder:
    return runtime.new_decoder()


@pytest.fixture(scope="module")
def weights(tiny_reference: Path) -> DecoderWeights:
    return load_checkpoint(tiny_reference).decoder


@pytest.fixture(scope="module")
def codes(tiny_reference: Path) -> Codes:
    loaded: Codes = np.load(tiny_reference / "codes.npy").astype(np.uint16)
    return loaded


@pytest.fixture(scope="module")
def audio(tiny_reference: Path) -> Audio:
    loaded: Audio = np.load(tiny_reference / "audio.npy").T
    return loaded


@pytest.fixture(scope="module")
def long_codes() -> Codes:
    return np.random.default_rng(4).integers(0, 1024, (LONG_FRAMES, 16)).astype(np.uint16)


@pytest.fixture(scope="module")
def long_audio(weights: DecoderWeights, long_codes: Codes) -> NDArray[np.float64]:
    return oracle.decode(weights, long_codes)


def in_chunks(decoder: codecs.SeekingDecoder, codes: Codes, chunk_frames: int) -> Audio:
    starts = range(0, len(codes), chunk_frames)
    return np.concatenate([decoder.step(codes[start : start + chunk_frames]) for start in starts])


def furthest(here: NDArray[Any], there: NDArray[Any]) -> float:
    assert here.shape == there.shape
    return float(np.abs(here - there).max())


# --- the sound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 7, 8, 9, 17, 24])
def test_goldens(decoder: FastDecoder, codes: Codes, audio: Audio, chunk_frames: int) -> None:
    assert furthest(in_chunks(decoder, codes, chunk_frames), audio) < TOLERANCE
    assert decoder.next_frame == FRAMES


@pytest.mark.parametrize("quantizers", [1, 8])
def test_goldens_of_a_prefix(decoder: FastDecoder, codes: Codes, tiny_reference: Path, quantizers: int) -> None:
    expected = np.load(tiny_reference / f"audio_q{quantizers}.npy").T
    assert furthest(decoder.step(codes[:8, :quantizers]), expected) < TOLERANCE


def test_every_prefix(decoder: FastDecoder, codes: Codes, weights: DecoderWeights) -> None:
    for quantizers in range(1, 17):
        decoder.reset()
        expected = oracle.decode(weights, codes[:4], quantizers)
        assert furthest(decoder.step(codes[:4, :quantizers]), expected) < TOLERANCE, quantizers
    with pytest.raises(TokenError):
        decoder.step(codes[:4, :0])


def test_the_prefix_may_change_within_a_stream(decoder: FastDecoder, codes: Codes) -> None:
    """Nobody asks for it, but nothing stands against it either: only the tables of codes differ."""
    whole = decoder.step(codes[:8])
    decoder.reset()
    decoder.step(codes[:4])
    assert furthest(decoder.step(codes[4:8, :3]), whole[len(whole) // 2 :]) > 100 * TOLERANCE


@pytest.mark.parametrize("chunk_frames", [1, 2, 4, 5, 8, 17, 23, LONG_FRAMES])
def test_past_every_context(
    decoder: FastDecoder, long_codes: Codes, long_audio: NDArray[np.float64], chunk_frames: int
) -> None:
    assert furthest(in_chunks(decoder, long_codes, chunk_frames), long_audio) < TOLERANCE


def test_chunks_of_mixed_sizes_and_many_streams_in_turn(
    decoder: FastDecoder, long_codes: Codes, long_audio: NDArray[np.float64]
) -> None:
    random = np.random.default_rng(0)
    for _ in range(6):
        decoder.reset()
        start, until = 0, int(random.integers(1, LONG_FRAMES))
        pieces: list[Audio] = []
        while start < until:
            frames = int(random.integers(0, 12))
            pieces.append(decoder.step(long_codes[start : min(start + frames, until)]))
            start = min(start + frames, until)
        found = np.concatenate(pieces)
        assert furthest(found, long_audio[: len(found)]) < TOLERANCE


def from_the_middle(runtime: codecs.Runtime, codes: Codes, start_frame: int) -> Audio:
    decoder = runtime.new_decoder()
    decoder.reset(start_frame)
    audio = in_chunks(decoder, codes, 8)
    assert decoder.next_frame == start_frame + len(codes)
    return audio


@pytest.fixture(scope="module")
def official(bundle: Bundle) -> codecs.Runtime:
    return codecs.load_runtime(bundle, graph="official", threads=1)


def test_for_a_minute_it_is_the_official_graphs_twin(
    runtime: FastRuntime, official: codecs.Runtime, long_codes: Codes
) -> None:
    for start_frame in (1, 300, 750):
        found, expected = (from_the_middle(either, long_codes[:40], start_frame) for either in (runtime, official))
        assert furthest(found, expected) < PCM16_STEP / 2


def test_later_it_is_right_where_the_official_graph_is_not(
    runtime: FastRuntime, official: codecs.Runtime, long_codes: Codes, long_audio: NDArray[np.float64]
) -> None:
    """RoPE turns by differences: what a stream's age changes is nothing but rounding."""
    truth = long_audio[: 40 * 3840]
    for start_frame in (7500, 45_000):
        found, rounded = (from_the_middle(either, long_codes[:40], start_frame) for either in (runtime, official))
        assert furthest(found, truth) < TOLERANCE
        assert furthest(rounded, truth) > 4 * TOLERANCE


def test_angles_are_rounded_first_and_exact_later() -> None:
    angles = tuple(map(float, np.exp(-np.arange(8)).astype(np.float32)))
    spec = a_spec(angles=angles, tokens_per_frame=2)
    for position in (1997, 1_440_000, 100_000_007):
        for token, row in enumerate(spec.angles_at(position, 3), start=position):
            for angle, found in zip(angles, row, strict=True):
                if token < 2000:
                    assert found == np.float32(token) * np.float32(angle)
                else:
                    assert abs(math.remainder(token * angle - float(found), math.tau)) < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("chunk_frames", [1, 8, 17])
def test_nano_within_one_step_of_the_official_graph_for_a_minute(nano_bundle: Path, chunk_frames: int) -> None:
    bundle = load_bundle(nano_bundle)
    codes = np.random.default_rng(5).integers(0, 1024, (750, 16)).astype(np.uint16)
    expected = in_chunks(codecs.load_decoder(bundle, graph="official"), codes, 8)
    found = in_chunks(codecs.load_decoder(bundle, graph="fast"), codes, chunk_frames)
    assert furthest(found, expected) <= PCM16_STEP


@pytest.mark.slow
@pytest.mark.parametrize("minute", [10, 60])
def test_nano_later_is_right_where_the_official_graph_is_not(nano_bundle: Path, minute: int) -> None:
    """Run with -s, it says how far both are from float64."""
    bundle = load_bundle(nano_bundle)
    codes = np.random.default_rng(6).integers(0, 1024, (20, 16)).astype(np.uint16)
    truth = oracle.decode(load_checkpoint(nano_bundle / "checkpoint").decoder, codes)
    fast, official = (
        furthest(from_the_middle(runtime, codes, minute * 750), truth)
        for runtime in (codecs.load_runtime(bundle, graph="fast"), codecs.load_runtime(bundle, graph="official"))
    )
    print(
        f"minute {minute}: fast graph {fast / PCM16_STEP:.3f}, official graph {official / PCM16_STEP:.3f} 16-bit steps"
    )
    assert fast < TOLERANCE
    assert official > fast


# --- the state ----------------------------------------------------------------------------------------------------


def test_reset_is_a_fresh_decoder(runtime: FastRuntime, long_codes: Codes) -> None:
    decoder = runtime.new_decoder()
    decoder.step(long_codes[:7])
    decoder.reset()
    assert np.array_equal(in_chunks(decoder, long_codes, 3), in_chunks(runtime.new_decoder(), long_codes, 3))


def test_nan_does_not_outlive_a_reset(runtime: FastRuntime, codes: Codes, audio: Audio) -> None:
    decoder = runtime.new_decoder()
    decoder.step(codes)
    for layer in memories(decoder):
        layer[...] = np.nan
    assert np.isnan(decoder.step(codes[:1])).any()
    decoder.reset()
    assert furthest(in_chunks(decoder, codes, 3), audio) < TOLERANCE


def test_streams_over_one_runtime_do_not_touch_each_other(runtime: FastRuntime, long_codes: Codes) -> None:
    streams = [long_codes[start : start + 40] for start in (0, 20, 40, 60)]
    expected = [in_chunks(runtime.new_decoder(), stream, 4) for stream in streams]
    decoders = [runtime.new_decoder() for _ in streams]
    found = [
        [decoder.step(stream[start : start + 4]) for decoder, stream in zip(decoders, streams, strict=True)]
        for start in range(0, 40, 4)
    ]
    for number, audio in enumerate(expected):
        assert np.array_equal(np.concatenate([step[number] for step in found]), audio)


@pytest.mark.parametrize("begun", [0, 3, 50])
def test_going_back_to_a_snapshot(runtime: FastRuntime, long_codes: Codes, begun: int) -> None:
    decoder, other = runtime.new_decoder(), runtime.new_decoder()
    decoder.reset(start_frame=5)
    decoder.step(long_codes[:begun])
    snapshot = decoder.snapshot()
    windows = [window.copy() for window in snapshot.windows]
    first = in_chunks(decoder, long_codes[begun : begun + 60], 8)
    other.step(long_codes[:11])
    for either in (decoder, other):
        either.restore(snapshot)
        assert either.next_frame == 5 + begun
        assert furthest(in_chunks(either, long_codes[begun : begun + 60], 8), first) < TOLERANCE
    assert all(np.array_equal(here, there) for here, there in zip(snapshot.windows, windows, strict=True))


@pytest.mark.parametrize(("frames", "fails_in_run"), [(3, 1), (8, 1), (20, 1), (20, 2), (20, 3)])
def test_a_step_that_fails_leaves_the_decoder_where_it_was(
    runtime: FastRuntime, long_codes: Codes, frames: int, fails_in_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, undisturbed = runtime.new_decoder(), runtime.new_decoder()
    for either in (decoder, undisturbed):
        in_chunks(either, long_codes[:41], 8)
    native = runtime.in_place.session.native
    monkeypatch.setattr(runtime.in_place.session, "native", FailingNative(native, fails_in_run))
    with pytest.raises(DecodeError, match="as it was told to"):
        decoder.step(long_codes[41 : 41 + frames])
    monkeypatch.undo()
    assert decoder.next_frame == 41
    found, expected = (in_chunks(either, long_codes[41:], 8) for either in (decoder, undisturbed))
    assert furthest(found, expected) < TOLERANCE


class FailingNative:
    def __init__(self, native: Any, fails_in_run: int) -> None:
        self._native = native
        self._runs_left = fails_in_run

    def run_with_iobinding(self, binding: Any) -> None:
        self._native.run_with_iobinding(binding)
        self._runs_left -= 1
        if not self._runs_left:
            raise RuntimeError("as it was told to")


def test_every_ring_is_heard(runtime: FastRuntime, codes: Codes) -> None:
    """Whichever ring is lost, or takes another one's place, it shows by many steps of 16 bits."""
    decoder = runtime.new_decoder()
    decoder.step(codes[:12])
    snapshot = decoder.snapshot()
    expected = decoder.step(codes[12:16])
    for transformer, window in enumerate(snapshot.windows):
        for ring in range(len(window)):
            for spoilt in (np.zeros_like(window[ring]), window[ring ^ 1], window[ring][:, ::-1]):
                windows = list(snapshot.windows)
                windows[transformer] = window.copy()
                windows[transformer][ring] = spoilt
                decoder.restore(in_place.InPlaceState(snapshot.first_frame, snapshot.next_frame, tuple(windows)))
                assert furthest(decoder.step(codes[12:16]), expected) > 4 * PCM16_STEP, (transformer, ring)


def test_a_lost_frame_is_heard(runtime: FastRuntime, codes: Codes, audio: Audio) -> None:
    decoder = runtime.new_decoder()
    decoder.step(codes[:10])
    found = decoder.step(codes[11:])
    assert furthest(found, audio[-len(found) :]) > 100 * PCM16_STEP


def test_no_frames_are_no_samples(decoder: FastDecoder, codes: Codes) -> None:
    assert decoder.step(codes[:0]).shape == (0, 2)
    assert decoder.next_frame == 0


def test_what_a_step_gave_stays_as_it_is(decoder: FastDecoder, codes: Codes) -> None:
    first = decoder.step(codes[:2])
    kept = first.copy()
    decoder.step(codes[2:4])
    assert np.array_equal(first, kept)
    assert first.dtype == np.float32
    assert first.flags.c_contiguous


def memories(decoder: FastDecoder) -> list[NDArray[np.float32]]:
    return [part for ring in decoder._stream._rings for part in ring._memories[0]]


# --- where the runtime does not write in place, or does not attend ------------------------------------------------


@pytest.fixture
def by_copies(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FastRuntime:
    monkeypatch.setattr(in_place, "attention_support", lambda: "by copies")
    return FastRuntime(bundle, Engine.of(threads=1))


def test_by_copies_it_is_the_same_sound(
    by_copies: FastRuntime, runtime: FastRuntime, long_codes: Codes, caplog: pytest.LogCaptureFixture
) -> None:
    for chunk_frames in (1, 3, 8, 17):
        found, expected = (in_chunks(each.new_decoder(), long_codes, chunk_frames) for each in (by_copies, runtime))
        assert np.array_equal(found, expected)
    decoder = by_copies.new_decoder()
    decoder.step(long_codes[:30])
    snapshot = decoder.snapshot()
    expected = decoder.step(long_codes[30:50])
    decoder.reset()
    decoder.restore(snapshot)
    assert furthest(decoder.step(long_codes[30:50]), expected) < TOLERANCE


def test_by_copies_is_said_in_the_log(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(in_place, "attention_support", lambda: "by copies")
    with caplog.at_level(logging.WARNING, "mossnano"):
        FastRuntime(bundle, Engine.of(threads=1))
    assert "does not write in place" in caplog.text


def test_a_runtime_that_does_not_attend_runs_the_official_graph(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert codecs.load_runtime(bundle, threads=1).graph_name == "fast"
    monkeypatch.setattr(in_place, "attention_support", lambda: "none")
    with caplog.at_level(logging.WARNING, "mossnano"):
        assert codecs.load_runtime(bundle, threads=1).graph_name == "official"
    assert "the official graph runs instead" in caplog.text
    with pytest.raises(BundleError, match="does not attend as this graph needs it"):
        codecs.load_runtime(bundle, graph="fast", threads=1)


def test_other_providers_run_the_official_graph(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="runs on provider 'cpu' only"):
        FastRuntime(bundle, Engine.of("cuda"))


def test_this_runtime_writes_in_place() -> None:
    assert probe.attention_support() == "in place"


def test_a_runtime_that_spoils_what_it_shares_works_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    answers_right = probe._answers_right

    def only_apart(session: Any, rings: Any, rings_out: Any) -> bool:
        if rings[0] is rings_out[0]:
            rings[0][...] = 0
        return answers_right(session, rings, rings_out)

    monkeypatch.setattr(probe, "_answers_right", only_apart)
    assert probe.judge(probe._probe_session()) == "by copies"


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("local_window_size", 4), ("local_window_size", -1), ("rotary_interleaved", 1), ("scale", 1.0)],
)
def test_another_attention_is_found_out(
    attribute: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load_from_string(attention_probe())
    (node,) = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    kept = [one for one in node.attribute if one.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    onnx.save(model, tmp_path / "probe.onnx")
    monkeypatch.setattr(probe, "PROBE_PATH", tmp_path / "probe.onnx")
    assert probe.judge(probe._probe_session()) == "none"


def test_a_node_that_the_runtime_does_not_know_is_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe.onnx").write_bytes(attention_probe().replace(b"GroupQueryAttention", b"GroupQueryAttentiom"))
    monkeypatch.setattr(probe, "PROBE_PATH", tmp_path / "probe.onnx")
    assert probe.attention_support.__wrapped__() == "none"


def test_the_probe_is_what_the_builder_makes() -> None:
    assert PROBE_PATH.read_bytes() == attention_probe()


# --- rings --------------------------------------------------------------------------------------------------------


def a_spec(**changes: Any) -> RingSpec:
    spec = {
        "number": 0,
        "first_layer": 0,
        "layers": 2,
        "heads": 3,
        "ring_dim": 2 * len(changes.get("angles", (0.5, 0.25))),
        "context_tokens": 5,
        "tokens_per_frame": 2,
        "angles": (0.5, 0.25),
    }
    return RingSpec(**{**spec, **changes})


class Memory:
    """A binding that keeps the arrays themselves, and writes tokens into them as the graph would."""

    def __init__(self) -> None:
        self.inputs: dict[str, NDArray[Any]] = {}
        self.outputs: dict[str, NDArray[Any]] = {}

    def bind_ortvalue_input(self, name: str, array: NDArray[Any]) -> None:
        self.inputs[name] = array

    def bind_ortvalue_output(self, name: str, array: NDArray[Any]) -> None:
        self.outputs[name] = array

    def ring_names(self) -> Iterator[tuple[str, str]]:
        for name in self.inputs:
            kind, _, layer = name.partition("_")
            if kind in ("keys", "values"):
                yield name, f"{kind}_out_{layer}"

    def run(self, tokens: NDArray[Any]) -> None:
        """Each token is marked with its number, its head, and the number of its ring."""
        end = int(self.inputs["total_0"][0])
        start = end - len(tokens)
        assert self.inputs["last_0"][0] == end - 1
        for ring, (name, out_name) in enumerate(self.ring_names()):
            source, target = self.inputs[name][0], self.outputs[out_name][0]
            past = source[:, :start].copy()
            if target.ctypes.data != source.ctypes.data:
                target[...] = np.nan
            target[:, :start] = past
            for head in range(len(target)):
                target[head, start:end] = (tokens + head / 10 + ring / 100)[:, np.newaxis]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("context_tokens", "tokens_per_frame"), [(1, 1), (5, 2), (64, 1), (70, 3)])
@settings(max_examples=40)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["run", "run", "run", "fail", "abandon", "reset", "restore"]),
            st.integers(1, MAX_RUN_FRAMES),
        ),
        max_size=60,
    )
)
def test_the_window_is_always_what_the_next_token_can_see(
    in_place: bool, context_tokens: int, tokens_per_frame: int, steps: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "native_value", lambda array: array)
        memory = Memory()
        spec = a_spec(context_tokens=context_tokens, tokens_per_frame=tokens_per_frame)
        ring = Rings(spec, memory, in_place=in_place)
        frames, snapshot = 0, (0, ring.window(0))

        def run(start: int, count: int, mark: float = 0.0) -> None:
            ring.prepare(start, count, start)
            memory.run(np.arange(start * tokens_per_frame, (start + count) * tokens_per_frame) + mark)

        for what, count in steps:
            match what:
                case "run":
                    run(frames, count)
                    ring.commit()
                    frames += count
                case "fail":
                    run(frames, count, mark=0.5)
                case "abandon":
                    passing = ring.passing(frames, 4 * count)
                    for number in range(3):
                        run(frames + number * count, count, mark=0.5)
                        ring.commit()
                    run(frames + 3 * count, count, mark=0.5)
                    ring.go_back(frames, passing)
                case "reset":
                    ring.reset()
                    frames = 0
                case "restore":
                    frames = snapshot[0]
                    ring.restore(*snapshot)
            window = ring.window(frames)
            if count % 3 == 0:
                snapshot = (frames, window)
            assert_window(window, frames * tokens_per_frame, spec)


def assert_window(window: NDArray[np.float32], seen: int, spec: RingSpec) -> None:
    tokens = np.arange(max(0, seen - spec.needed_tokens), seen)
    assert window.shape == (2 * spec.layers, spec.heads, len(tokens), spec.ring_dim)
    marks = tokens + np.arange(spec.heads)[:, np.newaxis] / 10
    for number, ring in enumerate(window):
        np.testing.assert_allclose(ring, (marks + number / 100)[..., np.newaxis].repeat(spec.ring_dim, -1), rtol=1e-6)


# --- the graph and its facts --------------------------------------------------------------------------------------


def test_the_graph_is_small_and_the_same_each_time(weights: DecoderWeights) -> None:
    graphs = [fast_decode_step(weights) for _ in range(2)]
    models = [graph.model({}) for graph in graphs]
    assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)
    layers = sum(len(module.layers) for _, module in transformers(weights.modules))
    assert len(models[0].graph.node) == 10 * layers + 2 * len(transformers(weights.modules)) + 5
    onnx.checker.check_model(models[0])


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("heads", 5, "input 'keys_0'"),
        ("layers", 1, "has no input|does not know"),
        ("ring_dim", 32, "angles|cosines_0"),
        ("tokens_per_frame", 0, "a whole number from 1"),
        ("angles", [1.0], "a list of 8 numbers"),
        ("context_tokens", "40", "a whole number from 1"),
    ],
)
def test_facts_of_another_graph_are_refused(bundle: Bundle, key: str, value: Any, complaint: str) -> None:
    graph = bundle.graph("fast")
    facts = copy.deepcopy(dict(graph.facts))
    facts["transformers"][0][key] = value
    spoilt = copy.copy(bundle)
    object.__setattr__(spoilt, "graphs", {**bundle.graphs, "fast": copy.copy(graph)})
    object.__setattr__(spoilt.graphs["fast"], "facts", facts)
    with pytest.raises(BundleError, match=complaint) as caught:
        FastRuntime(spoilt, Engine.of(threads=1))
    assert FAST_FILE in str(caught.value)


def test_it_takes_only_codes_in_the_codebook(decoder: FastDecoder, codes: Codes) -> None:
    with pytest.raises(TokenError):
        decoder.step(np.full((1, 16), 1024, dtype=np.uint16))
    assert moss._rows(codes[:1, :2], decoder.format)[0, 2:].tolist() == [16 * 1024] * 14
