"""codecs/moss.py: the fast graph sounds as the official one, from every chunking and prefix, in sliding memory."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mossnano_stdio import codecs
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.decode_step import FAST_FILE, fast_decode_step
from mossnano_stdio.build.model import DecoderWeights, transformers
from mossnano_stdio.codecs import Engine, in_place, moss
from mossnano_stdio.codecs.moss import FastDecoder, FastRuntime
from mossnano_stdio.errors import BundleError, DecodeError, TokenError
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import Bundle, load_bundle
from tests import oracle
from tests.doubles import FailingNative
from tests.oracle import Sound, furthest, in_chunks

TOLERANCE = 1e-5
PCM16_STEP = 1 / 32767
FRAMES = 24  # of the goldens
LONG_FRAMES = 72  # seven times the longest context: the end of every memory is reached several times


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
def long_codes() -> Codes:
    return np.random.default_rng(4).integers(0, 1024, (LONG_FRAMES, 16)).astype(np.uint16)


@pytest.fixture(scope="module")
def long_audio(weights: DecoderWeights, long_codes: Codes) -> NDArray[np.float64]:
    return oracle.decode(weights, long_codes)


# --- the sound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 7, 8, 9, 17, 24])
def test_goldens(decoder: FastDecoder, codes: Codes, audio: Sound, chunk_frames: int) -> None:
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
        pieces: list[Sound] = []
        while start < until:
            frames = int(random.integers(0, 12))
            pieces.append(decoder.step(long_codes[start : min(start + frames, until)]))
            start = min(start + frames, until)
        found = np.concatenate(pieces)
        assert furthest(found, long_audio[: len(found)]) < TOLERANCE


def from_the_middle(runtime: codecs.Runtime, codes: Codes, start_frame: int) -> Sound:
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


def test_nan_does_not_outlive_a_reset(runtime: FastRuntime, codes: Codes, audio: Sound) -> None:
    decoder = runtime.new_decoder()
    decoder.step(codes)
    assert isinstance(decoder._stream, in_place.InPlaceStream)
    for ring in decoder._stream._rings:
        for layer in ring._memories[0]:
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
    native = runtime.stack.session.native
    monkeypatch.setattr(runtime.stack.session, "native", FailingNative(native, fails_in_run))
    with pytest.raises(DecodeError, match="as it was told to"):
        decoder.step(long_codes[41 : 41 + frames])
    monkeypatch.undo()
    assert decoder.next_frame == 41
    found, expected = (in_chunks(either, long_codes[41:], 8) for either in (decoder, undisturbed))
    assert furthest(found, expected) < TOLERANCE


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
                decoder.restore(replace(snapshot, windows=tuple(windows)))
                assert furthest(decoder.step(codes[12:16]), expected) > 4 * PCM16_STEP, (transformer, ring)


def test_a_lost_frame_is_heard(runtime: FastRuntime, codes: Codes, audio: Sound) -> None:
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


# --- where the runtime does not write in place, or does not attend ------------------------------------------------


@pytest.fixture
def by_copies(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FastRuntime:
    monkeypatch.setattr(in_place, "attention_support", lambda: "by copies")
    return FastRuntime(bundle, Engine.of(threads=1))


def test_by_copies_it_is_the_same_sound_and_the_log_says_so(
    by_copies: FastRuntime, runtime: FastRuntime, long_codes: Codes, caplog: pytest.LogCaptureFixture
) -> None:
    assert ["does not write in place" in record.message for record in caplog.get_records("setup")] == [True]
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


def test_a_runtime_that_does_not_attend_runs_the_official_graph(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert codecs.load_runtime(bundle, threads=1).graph_name == "fast"
    monkeypatch.setattr(in_place, "attention_support", lambda: "none")
    with caplog.at_level(logging.WARNING, "mossnano"):
        assert codecs.load_runtime(bundle, threads=1).graph_name == "official"
    assert "the official graph runs instead" in caplog.text
    with pytest.raises(
        BundleError, match=r"as this graph needs it; 1.24 and later do, `--graph official` runs with any$"
    ):
        codecs.load_runtime(bundle, graph="fast", threads=1)


# --- the graph and its facts --------------------------------------------------------------------------------------


def test_the_graph_is_small_and_the_same_each_time(weights: DecoderWeights) -> None:
    graphs = [fast_decode_step(weights) for _ in range(2)]
    models = [graph.model() for graph in graphs]
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
    assert moss.table_rows(codes[:1, :2], decoder.format)[0, 2:].tolist() == [16 * 1024] * 14
