"""codecs/moss.py and stepping.py: the official graph, right from every chunking, its state never spoilt unnoticed."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from mossnano_stdio import codecs
from mossnano_stdio.codecs import Engine
from mossnano_stdio.codecs.moss import OfficialDecoder, OfficialRuntime
from mossnano_stdio.errors import DecodeError, TokenError
from mossnano_stdio.pcm import pcm16_samples, to_pcm16
from mossnano_stdio.pcm.comparison import compare_recordings
from mossnano_stdio.pcm.recordings import Recording
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import METADATA_NAME, Sidecar, load_bundle, save_sidecar
from tests.conftest import STEP
from tests.oracle import Sound, furthest, in_chunks

TOLERANCE = 2e-5  # of the goldens
PCM16_STEP = 1 / 32767
FRAMES = 24  # of the goldens
TOKENS_PER_FRAME = {1: 4, 3: 8, 5: 16, 7: 32}  # by the decoder's module
CONTEXTS = {1: 40, 3: 64, 5: 96, 7: 128}  # in tokens

Feed = Mapping[str, NDArray[Any]]
Run = Callable[[Sequence[str], Feed], list[NDArray[Any]]]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> OfficialRuntime:
    return OfficialRuntime(load_bundle(tiny_bundle), Engine.of(threads=1))


def over(genuine: OfficialRuntime, run: Run) -> OfficialRuntime:
    """The same runtime, over a session that is run like this."""
    other = copy.copy(genuine)
    other.session = copy.copy(genuine.session)
    vars(other.session)["run"] = run
    return other


# --- goldens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "built_bundle"])
def test_goldens(bundle_name: str, codes: Codes, audio: Sound, request: pytest.FixtureRequest) -> None:
    bundle = load_bundle(request.getfixturevalue(bundle_name))
    whole = codecs.load_full_decoder(bundle, threads=1).decode(codes)
    assert furthest(whole, audio) < TOLERANCE
    decoder = OfficialRuntime(bundle, Engine.of(threads=1)).new_decoder()
    for chunk_frames in (1, 2, 5, 7, 12, 24):
        decoder.reset()
        assert furthest(in_chunks(decoder, codes, chunk_frames), audio) < TOLERANCE, chunk_frames


@pytest.mark.parametrize("chunk_frames", [1, 23])
def test_nano_past_its_shortest_context(nano_bundle: Path, nano: OfficialRuntime, chunk_frames: int) -> None:
    codes = np.random.default_rng(6).integers(0, 1024, (60, 16)).astype(np.uint16)
    whole = codecs.load_full_decoder(load_bundle(nano_bundle)).decode(codes)
    assert furthest(in_chunks(nano.new_decoder(), codes, chunk_frames), whole) <= PCM16_STEP


@pytest.mark.slow
@pytest.mark.parametrize("chunk_frames", [1, 7, 17, 23])
def test_nano_past_every_context(
    nano_bundle: Path, nano_whole: tuple[Codes, Sound], nano: OfficialRuntime, chunk_frames: int
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
def nano_whole(nano_bundle: Path) -> tuple[Codes, Sound]:
    """16 s: the longest context is 10 s."""
    codes = np.random.default_rng(5).integers(0, 1024, (200, 16)).astype(np.uint16)
    return codes, codecs.load_full_decoder(load_bundle(nano_bundle)).decode(codes)


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


def test_caches_of_half_precision(folder: Path, codes: Codes, audio: Sound) -> None:
    halve_caches(folder)
    decoder = codecs.load_decoder(load_bundle(folder), threads=1)
    found = in_chunks(decoder, codes, 5)
    assert 0 < furthest(found, audio) < 0.01
    dtypes = {name: tensor.dtype.name for name, tensor in decoder.snapshot().tensors.items()}
    assert dtypes["attn_cached_keys_3"] == dtypes["attn_cached_values_0"] == "float16"
    assert dtypes["attn_cached_positions_0"] == "int32"


# --- the state ----------------------------------------------------------------------------------------------------

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


class SpoilingRun:
    """Feeds something else once, in its fourth run."""

    def __init__(self, genuine: Run, fault: Fault, name: str, variant: int) -> None:
        self._genuine, self._fault, self._name, self._variant = genuine, fault, name, variant
        self._fed: list[Feed] = []
        self.variants = 0

    def __call__(self, output_names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        self._fed.append(dict(feed))
        if len(self._fed) == 4:
            spoilt = list(self._fault(feed, self._fed[-2], self._name))
            self.variants = len(spoilt)
            feed = spoilt[self._variant] if self._variant < len(spoilt) else feed
        return self._genuine(output_names, feed)


def departure(decoder: OfficialDecoder, codes: Codes, audio: Sound) -> str | None:
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


def test_without_a_fault_nothing_departs(tiny: OfficialRuntime, codes: Codes, audio: Sound) -> None:
    assert departure(tiny.new_decoder(), codes, audio) is None


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("fault", [dropped, reset, fed_twice, swapped])
def test_every_fault_in_every_state_is_noticed(
    tiny: OfficialRuntime, codes: Codes, audio: Sound, fault: Fault, name: str
) -> None:
    variant, variants = 0, 1
    while variant < variants:
        run = SpoilingRun(tiny.session.run, fault, name, variant)
        assert departure(over(tiny, run).new_decoder(), codes, audio), f"{fault.__name__} {name} goes unnoticed"
        variant, variants = variant + 1, run.variants
    assert variants


def test_every_state_output_comes_back_by_its_own_input_once(tiny: OfficialRuntime, codes: Codes) -> None:
    """States of one shape that hold equal values, as positions of sibling layers do, cannot be told apart by sound.

    So each tensor gets a mark of its own here, which is demanded back from the input that it belongs to.
    """
    states = tiny.session.graph.states
    marks: dict[str, int] = {}

    def run(output_names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        assert {name for name in feed if not name.startswith("audio_")} == {state.input_name for state in states}
        assert all((feed[name] == mark).all() for name, mark in marks.items())
        marks.update(zip(STATES, itertools.count(1 + max(marks.values(), default=0)), strict=False))
        samples = feed["audio_codes"].shape[1] * 3840
        outputs = {"audio": np.zeros((1, 2, samples), np.float32), "audio_lengths": np.array([samples], np.int32)}
        for state in states:
            outputs[state.output_name] = np.full(state.shape, marks[state.input_name], state.dtype)
        return [outputs[name] for name in output_names]

    in_chunks(over(tiny, run).new_decoder(), codes, 3)
    assert min(marks.values()) > len(STATES)


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
    runs = itertools.count(1)

    def run(output_names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        if next(runs) == 2:  # of the two that a chunk of 12 frames takes
            raise DecodeError("as it was told to")
        return tiny.session.run(output_names, feed)

    decoder = tiny.new_decoder()
    decoder.step(codes[:5])
    expected = tiny.new_decoder()
    expected.step(codes[:5])
    decoder.runtime = over(tiny, run)
    before = decoder.snapshot()
    with pytest.raises(DecodeError):
        decoder.step(codes[5:17])
    assert decoder.snapshot() is before
    decoder.runtime = tiny
    assert np.array_equal(decoder.step(codes[5:17]), expected.step(codes[5:17]))


def test_beginning_in_the_middle(tiny: OfficialRuntime, codes: Codes, audio: Sound) -> None:
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
    with ThreadPoolExecutor(len(streams)) as pool:
        found = list(pool.map(lambda stream: in_chunks(tiny.new_decoder(), stream, 3), streams))
    assert all(map(np.array_equal, found, expected))


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
    decoder = codecs.load_decoder(load_bundle(folder))
    assert codes.max() >= 1000
    with pytest.raises(TokenError, match="allowed is 0 to 999"):
        decoder.step(codes)


@pytest.mark.parametrize("lengths", [[3839], [3840, 1], [0]])
def test_a_graph_that_gives_another_length_is_not_believed(tiny: OfficialRuntime, codes: Codes, lengths: Any) -> None:
    def run(output_names: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        audio, _, *states = tiny.session.run(output_names, feed)
        return [audio, np.array(lengths, np.int32), *states]

    with pytest.raises(DecodeError, match=r"1 frames gave audio \[1, 2, 3840\] of length"):
        over(tiny, run).new_decoder().step(codes[:1])
