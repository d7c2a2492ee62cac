"""The demo weights: rebuilt to the byte, against a float64 recomputation, and every piece of their state counts."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from mossnano_stdio.demo.notes import FORMAT, HARMONICS, Note, code_of, codes_for_notes, gain_of_partials
from mossnano_stdio.demo.synth import CUT_SAMPLES, melody, save_demo
from mossnano_stdio.errors import UsageError
from mossnano_stdio.protocol.messages import Kind, MessageReader
from mossnano_stdio.tokens import parse_artifact, to_graph, unpack_frames
from mossnano_stdio.weights import DEMO, DEMO_FOLDER, Bundle, find_weights, load_bundle

Codes = NDArray[np.integer]
State = dict[str, NDArray[Any]]

SHIPPED = DEMO_FOLDER.parent
FRAME_SAMPLES = 3840


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(find_weights(DEMO))


@pytest.fixture(scope="module")
def stepper(bundle: Bundle) -> Stepper:
    return Stepper(bundle)


class Stepper:
    """decode_step driven by nothing but the metadata."""

    def __init__(self, bundle: Bundle) -> None:
        graph = bundle.graph("decode_step")
        self.session = session_of(graph.path)
        self.states = graph.states

    def fresh(self) -> State:
        return {spec.input_name: spec.initial_value() for spec in self.states}

    def step(self, codes: Codes, state: State) -> tuple[NDArray[np.float32], State]:
        names = ["audio", "audio_lengths", *(spec.output_name for spec in self.states)]
        audio, lengths, *after = self.session.run(names, {**feeds(codes), **state})
        assert lengths.tolist() == [len(codes) * FRAME_SAMPLES]
        return audio[0], {spec.input_name: value for spec, value in zip(self.states, after, strict=True)}

    def decode(
        self, codes: Codes, sizes: Iterable[int], spoil: Callable[[int, State], State] = lambda chunk, state: state
    ) -> NDArray[np.float32]:
        """Step through codes in chunks of these sizes, the last of them until the end."""
        chunks, state = [], self.fresh()
        for index, chunk in enumerate(split(codes, sizes)):
            audio, state = self.step(chunk, spoil(index, state))
            chunks.append(audio)
        return np.concatenate(chunks, axis=1)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(codes: Codes) -> State:
    return {"audio_codes": to_graph(codes), "audio_code_lengths": np.array([len(codes)], dtype=np.int32)}


def split(codes: Codes, sizes: Iterable[int]) -> Iterable[Codes]:
    start, size = 0, 0
    remaining = iter(sizes)
    while start < len(codes):
        size = next(remaining, size)
        yield codes[start : start + size]
        start += size


def random_codes(frames: int, seed: int = 0) -> Codes:
    """Any code of any partial, and a fifth of them silence."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, FORMAT.codebook_size, (frames, FORMAT.quantizers))
    codes[generator.random(codes.shape) < 0.2] = 0
    return codes


def recomputed(codes: Codes) -> NDArray[np.float64]:
    """The oracle: one frame after the other in float64, from what the docstrings say and not from the tables."""
    gains = gain_of_partials().astype(np.float64)
    loudest = 1 / gains[:, 0].sum()
    time = np.arange(FRAME_SAMPLES) / FRAME_SAMPLES
    phase, last_pitch, last_level = np.zeros((3, FORMAT.quantizers))
    frames = []
    for row in codes:
        note, steps_down = np.divmod(row.astype(int) - 1, 11)
        pitch = np.where(row > 0, np.round(440 * 2 ** ((note + 24 - 69) / 12) * 0.08 * 8192) / 8192, 0)
        level = np.where(row > 0, loudest * 10 ** (-3 * steps_down / 20), 0)
        begin = np.where(last_pitch > 0, last_pitch, pitch)
        end = np.where(pitch > 0, pitch, last_pitch)
        turns = phase[:, None] + np.outer(begin, time) + np.outer((end - begin) / 2, time**2)
        levels = np.outer(last_level, 1 - time) + np.outer(level, time)
        frames.append(gains.T @ (levels * np.sin(2 * np.pi * turns)))
        phase = (phase + (begin + end) / 2) % 1
        last_pitch, last_level = pitch, level
    return np.concatenate(frames, axis=1)


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_shipped_files_are_what_the_code_writes(tmp_path: Path) -> None:
    save_demo(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {
        path.relative_to(SHIPPED): path.read_bytes()
        for path in SHIPPED.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert written.keys() == shipped.keys()
    differing = [str(name) for name in written if written[name] != shipped[name]]
    assert not differing, "run python -m mossnano_stdio.demo.synth"
    assert sum(map(len, shipped.values())) < 100_000


def test_the_bundle_is_labelled_as_a_demo(bundle: Bundle) -> None:
    assert bundle.demo
    assert "demo" in bundle.name
    assert bundle.format == FORMAT


def test_the_melody_is_the_same_in_both_forms() -> None:
    artifact = parse_artifact((SHIPPED / "melody.mossnano").read_bytes())
    messages = list(MessageReader().feed((SHIPPED / "melody.bin").read_bytes()))
    *tokens, end = messages
    assert end == (Kind.END, b"")
    assert {message.kind for message in tokens} == {Kind.TOKENS}
    framed = unpack_frames(b"".join(message.payload for message in tokens), 16, 1024)
    assert np.array_equal(framed, artifact.codes)
    assert 5 < artifact.original_samples / artifact.sample_rate < 8
    assert artifact.original_samples == artifact.frames * FRAME_SAMPLES - CUT_SAMPLES
    assert artifact.original_samples % FRAME_SAMPLES


# --- the graphs ------------------------------------------------------------------------------------------------------


def test_both_graphs_equal_the_recomputation(bundle: Bundle, stepper: Stepper) -> None:
    codes = random_codes(60)
    reference = recomputed(codes)
    full = session_of(bundle.graph("decode_full").path)
    audio, lengths = full.run(["audio", "audio_lengths"], feeds(codes))
    assert lengths.tolist() == [60 * FRAME_SAMPLES]
    assert np.abs(audio[0] - reference).max() < 5e-7
    assert np.abs(stepper.decode(codes, [7]) - reference).max() < 5e-7


@pytest.mark.parametrize("sizes", [[1], [2], [5], [23], [48], [1, 2, 4, 8], [7, 1, 19, 3]], ids=str)
def test_pieces_equal_the_whole(bundle: Bundle, stepper: Stepper, sizes: list[int]) -> None:
    codes = random_codes(48, seed=1)
    whole = session_of(bundle.graph("decode_full").path).run(["audio"], feeds(codes))[0][0]
    assert np.abs(stepper.decode(codes, sizes) - whole).max() < 1e-7


def test_phases_are_exact_whatever_the_chunks(stepper: Stepper) -> None:
    """Nothing is rounded on the way from one chunk to the next, so nothing can drift, in an hour or in a year."""
    codes = random_codes(150, seed=2)
    state = stepper.fresh()
    for chunk in split(codes, [1, 2, 4, 8, 3, 100, 1, 1, 1]):
        _, state = stepper.step(chunk, state)
    assert state["attn_cached_keys_0"][0, :, 0, 0].tolist() == exact_phases(codes)
    assert state["attn_offset_0"].tolist() == [150]
    assert state["attn_cached_positions_0"].tolist() == [[149]]


def exact_phases(codes: Codes) -> list[float]:
    """The phase of each partial after all codes, in whole numbers of 2**-14 cycles."""
    phases = []
    for partial in codes.T.tolist():
        phase = last = 0
        for code in partial:
            pitch = round(440 * 2 ** (((code - 1) // 11 + 24 - 69) / 12) * 0.08 * 8192) if code else 0
            phase += (last or pitch) + (pitch or last)
            last = pitch
        phases.append(phase % 2**14 / 2**14)
    return phases


@pytest.mark.slow
def test_an_hour_leaves_no_trace_of_its_chunks(stepper: Stepper) -> None:
    codes = random_codes(45_000, seed=3)
    endings = []
    for size in (1, 8):
        state = stepper.fresh()
        for chunk in split(codes, [size]):
            audio, state = stepper.step(chunk, state)
        endings.append(audio[:, -FRAME_SAMPLES:])
        assert state["attn_cached_keys_0"][0, :, 0, 0].tolist() == exact_phases(codes)
    assert np.abs(endings[0] - endings[1]).max() * 32767 < 1


def spoilings(stepper: Stepper) -> dict[str, Callable[[int, State], State]]:
    first: State = stepper.fresh()

    def remember_first(index: int, state: State) -> State:
        if index == 1:
            first.update(state)
        return state

    def reset(name: str) -> Callable[[int, State], State]:
        return lambda index, state: {**state, name: stepper.fresh()[name]}

    def stale(name: str) -> Callable[[int, State], State]:
        return lambda index, state: {**remember_first(index, state), name: first[name]} if index > 1 else state

    def swapped(index: int, state: State) -> State:
        keys, values = state["attn_cached_keys_0"], state["attn_cached_values_0"]
        return {**state, "attn_cached_keys_0": values, "attn_cached_values_0": keys}

    names = list(first)
    return (
        {f"reset {name}": reset(name) for name in names}
        | {f"stale {name}": stale(name) for name in names}
        | {"swapped keys and values": swapped, "all reset": lambda index, state: stepper.fresh()}
    )


def test_no_state_can_be_lost_swapped_or_fed_twice_unheard(stepper: Stepper) -> None:
    codes = random_codes(12, seed=4)
    right = stepper.decode(codes, [3])
    for name, spoil in spoilings(stepper).items():
        wrong = stepper.decode(codes, [3], spoil)
        assert np.abs(wrong - right).max() > 0.02, name


def test_codes_out_of_range_fail_before_anything_sounds(stepper: Stepper) -> None:
    with pytest.raises(Exception, match="1024"):
        stepper.step(np.full((1, 16), 1024), stepper.fresh())


# --- the sound -------------------------------------------------------------------------------------------------------


def test_silence_is_silent(stepper: Stepper) -> None:
    assert not stepper.decode(np.zeros((5, 16), dtype=np.int64), [2]).any()


def test_a_stream_begins_with_silence_and_ends_in_it(stepper: Stepper) -> None:
    codes = random_codes(4)
    codes[2:] = 0
    audio = stepper.decode(codes, [1])
    assert not audio[:, 0].any()
    assert np.abs(audio[:, 3 * FRAME_SAMPLES - 1]).max() < 1e-3
    assert not audio[:, 3 * FRAME_SAMPLES :].any()


def test_no_codes_can_clip(stepper: Stepper) -> None:
    everything_at_its_loudest = np.full((3, 16), code_of(69, 0))
    audio = stepper.decode(everything_at_its_loudest, [1])
    assert 0.99 < np.abs(audio).max() <= 1


def test_left_is_not_right(stepper: Stepper) -> None:
    for partial in range(16):
        codes = np.zeros((3, 16), dtype=np.int64)
        codes[:, partial] = code_of(60, 0)
        left, right = np.abs(stepper.decode(codes, [3])).max(axis=1)
        assert max(left, right) > 1.05 * min(left, right)


@pytest.mark.parametrize("codes", [codes_for_notes(melody()), random_codes(60, seed=5)], ids=["melody", "random"])
def test_no_frame_border_clicks(stepper: Stepper, codes: Codes) -> None:
    """Neither the signal nor its slope jumps more where frames meet than it moves anywhere else."""
    audio = stepper.decode(codes, [1])
    borders = np.arange(FRAME_SAMPLES, audio.shape[1], FRAME_SAMPLES)
    for order in (1, 2):
        moves = np.abs(np.diff(audio, order, axis=1))
        at_borders = np.maximum.reduce([moves[:, borders - back] for back in range(1, order + 1)])
        inside = np.delete(moves, np.concatenate([borders - 1, borders - 2]), axis=1)
        assert at_borders.max() <= inside.max()


def test_a_glide_goes_through_the_pitches_between(stepper: Stepper) -> None:
    codes = np.zeros((3, 16), dtype=np.int64)
    codes[:, 0] = code_of(57, 0), code_of(57, 0), code_of(69, 0)  # 220 Hz, then up to 440 Hz within the third frame
    left = stepper.decode(codes, [1])[0]
    crossings = [
        int((np.diff(np.signbit(left[start : start + 960])) != 0).sum())
        for start in range(2 * FRAME_SAMPLES, 3 * FRAME_SAMPLES, 960)
    ]
    assert crossings == sorted(crossings)
    assert crossings[-1] - crossings[0] >= 5


# --- notes -----------------------------------------------------------------------------------------------------------


def test_a_note_sounds_at_its_pitch_with_its_harmonics(stepper: Stepper) -> None:
    codes = codes_for_notes([Note(start=0.08, seconds=1.6, pitch=69, decay_db_per_second=0)])
    assert codes.shape == (22, 16)
    assert not codes[0].any()
    assert not codes[-1].any()
    audio = stepper.decode(codes, [8]).sum(axis=0)[4 * FRAME_SAMPLES : -4 * FRAME_SAMPLES]
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    hertz = np.fft.rfftfreq(len(audio), 1 / 48_000)
    for semitones, _ in HARMONICS:
        expected = 440 * 2 ** (semitones / 12)
        near = np.abs(hertz - expected) < 30
        assert abs(hertz[near][spectrum[near].argmax()] - expected) < 1
    assert abs(hertz[spectrum.argmax()] - 440) < 1


def test_a_note_decays(stepper: Stepper) -> None:
    codes = codes_for_notes([Note(start=0, seconds=2, pitch=60, harmonics=1, decay_db_per_second=12)])
    audio = np.abs(stepper.decode(codes, [8]))
    early = audio[:, FRAME_SAMPLES : 4 * FRAME_SAMPLES].max()
    late = audio[:, 18 * FRAME_SAMPLES : 21 * FRAME_SAMPLES].max()
    assert 12 < 20 * np.log10(early / late) < 21


def test_notes_that_follow_each_other_take_other_partials() -> None:
    """A partial that had to sound twice without a pause would glide from the one note to the other."""
    scale = [Note(start=0.24 * step, seconds=0.24, pitch=60 + step, harmonics=3) for step in range(12)]
    codes = codes_for_notes(scale)
    pitches = np.where(codes > 0, (codes.astype(int) - 1) // 11, -1)
    for before, after in itertools.pairwise(pitches):
        assert not ((before >= 0) & (after >= 0) & (before != after)).any()


def test_frames_can_be_asked_for() -> None:
    note = Note(start=0, seconds=0.4, pitch=60)
    assert np.array_equal(codes_for_notes([note], frames=3), codes_for_notes([note])[:3])
    assert codes_for_notes([note], frames=9).shape == (9, 16)
    assert codes_for_notes([]).shape == (0, 16)
    assert not codes_for_notes([], frames=2).any()


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ([Note(0, 1, 60)] * 5, "more than 16 harmonics sound in frame 0"),
        ([Note(0, 1, 23)], "note 23 is none of 24 .. 116"),
        ([Note(0, 1, 100)], "note 119 is none of 24 .. 116"),
    ],
    ids=["too many", "too low", "harmonic too high"],
)
def test_what_cannot_be_written_is_refused(notes: list[Note], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        codes_for_notes(notes)


def test_levels_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match=r"level 11 is none of 0 .. 10"):
        code_of(60, 11)


def test_notes_need_no_onnx() -> None:
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "from mossnano_stdio.demo.notes import Note, codes_for_notes\n"
        "print(codes_for_notes([Note(0, 0.08, 69)]).shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "(2, 16)\n"
