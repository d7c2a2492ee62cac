"""Writes the demo weights: a sinusoidal codec in the official contract, small enough to be part of the package.

    python -m mossnano_stdio.demo.synth [FOLDER]     writes all files of mossnano_stdio/demo/ anew

Rules of this room:

- The files have the same bytes whenever and wherever they are written: a test compares those in mossnano_stdio/demo/.
  After a change of a graph, write them anew.
- In each frame the pitch and the levels of each partial go along straight lines from those of the frame before to its
  own, and the phase runs on. A partial that fades in starts at its own pitch, one that fades out keeps its last.
- The state for the next frame is one cache entry: keys hold the phase (cycles, 0 .. 1) and the pitch (cycles a frame)
  of each partial, values its levels left and right. They count only when the cached position is the one just before
  the offset, else all was silent. So a state tensor that is lost, swapped or fed twice is heard.
- The graphs are written as text, in the notation of `onnx.parser`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from mossnano_stdio.demo.notes import (
    FORMAT,
    Note,
    codes_for_notes,
    gain_of_partials,
    level_of_codes,
    pitch_of_codes,
)
from mossnano_stdio.protocol import Kind, encode_message
from mossnano_stdio.tokens import Artifact, build_artifact, pack_frames
from mossnano_stdio.weights import (
    DEMO_FOLDER,
    METADATA_NAME,
    Sidecar,
    build_cache,
    build_metadata,
    build_streaming,
    record_files,
    save_sidecar,
)

WEIGHTS_FOLDER = "weights"
STEP_NAME = "demo_decode_step.onnx"
FULL_NAME = "demo_decode_full.onnx"
ARTIFACT_NAME = "melody.mossnano"
STREAM_NAME = "melody.bin"

MESSAGE_FRAMES = 4  # of melody.bin
QUAVER_SECONDS = 0.24  # three frames
CUT_SAMPLES = 1_337  # the artifact is that much shorter than its frames, so that trimming shows

_FULL_GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
demo_decode_full (int32[1, code_length, 16] audio_codes, int32[1] audio_code_lengths)
    => (float[1, 2, audio_length] audio, int32[1] audio_lengths)
{
    last_phase, last_pitch = Split <axis = 3> (nothing)
    last_levels = Identity (nothing)
    SOUND
}
"""

_STEP_GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
demo_decode_step (
    int32[1, code_length, 16] audio_codes, int32[1] audio_code_lengths, int32[1] attn_offset_0,
    float[1, 16, 1, 2] attn_cached_keys_0, float[1, 16, 1, 2] attn_cached_values_0,
    int32[1, 1] attn_cached_positions_0
) => (
    float[1, 2, audio_length] audio, int32[1] audio_lengths, int32[1] attn_offset_out_0,
    float[1, 16, 1, 2] attn_cached_keys_out_0, float[1, 16, 1, 2] attn_cached_values_out_0,
    int32[1, 1] attn_cached_positions_out_0
)
{
    # What is cached counts only if it is the frame just before this one.
    position_after = Add (attn_cached_positions_0, one_frame)
    follows = Equal (position_after, attn_offset_0)
    holds_a_frame = GreaterOrEqual (attn_cached_positions_0, first_position)
    counts = And (follows, holds_a_frame)
    cached_keys = Transpose <perm = [0, 2, 1, 3]> (attn_cached_keys_0)
    cached_values = Transpose <perm = [0, 2, 1, 3]> (attn_cached_values_0)
    last_keys = Where (counts, cached_keys, nothing)
    last_levels = Where (counts, cached_values, nothing)
    last_phase, last_pitch = Split <axis = 3> (last_keys)
    SOUND
    # The end of the last frame is what the next one starts from.
    frames64 = Shape <start = 1, end = 2> (audio_codes)
    frames = Cast <to = 6> (frames64)
    attn_offset_out_0 = Add (attn_offset_0, frames)
    last_position = Sub (attn_offset_out_0, one_frame)
    attn_cached_positions_out_0 = Unsqueeze (last_position, first)
    end_phases = Add (start_phase, advance)
    end_phase64 = Slice (end_phases, last, beyond, frame_axis)
    end_turns = Floor (end_phase64)
    end_phase_wrapped = Sub (end_phase64, end_turns)
    end_phase = Cast <to = 1> (end_phase_wrapped)
    end_pitch = Slice (pitch, last, beyond, frame_axis)
    end_levels = Slice (levels, last, beyond, frame_axis)
    end_keys = Concat <axis = 3> (end_phase, end_pitch)
    attn_cached_keys_out_0 = Transpose <perm = [0, 2, 1, 3]> (end_keys)
    attn_cached_values_out_0 = Transpose <perm = [0, 2, 1, 3]> (end_levels)
}
"""

# Shapes: [1, frames, 16 partials, 1 pitch or 2 levels or 3840 samples]. The time within a frame depends on no input,
# so the runtime computes it once, when it loads the graph.
_SOUND = """
    sample_numbers = Range (no_samples, all_samples, one_sample)
    time64 = Div (sample_numbers, all_samples)
    powers_of_time = Pow (time64, exponents)
    time = Cast <to = 1> (time64)

    codes = Unsqueeze (audio_codes, last_axis)
    pitch = Gather (pitch_of_codes, codes)
    level = Gather (level_of_codes, codes)
    levels = Mul (level, gains)

    # Each frame starts from where the one before ended; silence has no pitch of its own.
    pitches = Concat <axis = 1> (last_pitch, pitch)
    all_levels = Concat <axis = 1> (last_levels, levels)
    pitch_before = Slice (pitches, first, last, frame_axis)
    levels_before = Slice (all_levels, first, last, frame_axis)
    fades_in = Equal (pitch_before, silent_pitch)
    fades_out = Equal (pitch, silent_pitch)
    from_pitch32 = Where (fades_in, pitch, pitch_before)
    to_pitch32 = Where (fades_out, pitch_before, pitch)

    # Phase at time t of a frame, 0 <= t < 1: start + from_pitch t + bend t^2. Phases are added up in float64, where
    # every sum is exact (see notes.py), and wrapped before they become float32.
    from_pitch = Cast <to = 11> (from_pitch32)
    to_pitch = Cast <to = 11> (to_pitch32)
    change = Sub (to_pitch, from_pitch)
    bend = Mul (change, half)
    advance = Add (from_pitch, bend)
    phase_so_far = CumSum <exclusive = 1> (advance, cumsum_axis)
    first_phase = Cast <to = 11> (last_phase)
    start_unwrapped = Add (first_phase, phase_so_far)
    start_turns = Floor (start_unwrapped)
    start_phase = Sub (start_unwrapped, start_turns)
    curve = Concat <axis = 3> (start_phase, from_pitch, bend)
    phase = MatMul (curve, powers_of_time)
    turns = Round (phase)
    fraction = Sub (phase, turns)
    fraction32 = Cast <to = 1> (fraction)
    angle = Mul (fraction32, whole_turn)
    wave = Sin (angle)

    # Level at time t: before + rise t; the partials are added up before the rise is multiplied with t.
    rise = Sub (levels, levels_before)
    lines = Concat <axis = 3> (levels_before, rise)
    rows = Transpose <perm = [0, 1, 3, 2]> (lines)
    mixed = MatMul (rows, wave)
    steady, rising = Split <axis = 2> (mixed)
    risen = Mul (rising, time)
    by_frame = Add (steady, risen)
    by_side = Transpose <perm = [0, 2, 1, 3]> (by_frame)
    audio = Reshape (by_side, audio_shape)
    audio_lengths = Mul (audio_code_lengths, frame_samples)
"""


def save_demo(folder: Path) -> None:
    """Write all files of the demo into `folder`: its weights, and a melody as artifact and as framed input."""
    weights = folder / WEIGHTS_FOLDER
    weights.mkdir(parents=True, exist_ok=True)
    (weights / FULL_NAME).write_bytes(_model(_FULL_GRAPH).SerializeToString())
    (weights / STEP_NAME).write_bytes(_model(_STEP_GRAPH).SerializeToString())
    (weights / METADATA_NAME).write_bytes(json.dumps(metadata(), indent=2).encode() + b"\n")
    save_sidecar(
        weights,
        Sidecar(
            name="demo (16 sinusoids, no speech)",
            demo=True,
            codebook_size=FORMAT.codebook_size,
            files=record_files(weights, (METADATA_NAME, FULL_NAME, STEP_NAME)),
        ),
    )
    codes = codes_for_notes(melody())
    artifact = Artifact(
        sample_rate=FORMAT.sample_rate,
        channels=FORMAT.channels,
        original_samples=len(codes) * FORMAT.frame_samples - CUT_SAMPLES,
        quantizers=FORMAT.quantizers,
        frames=len(codes),
        codebook_size=FORMAT.codebook_size,
        codes=codes,
    )
    (folder / ARTIFACT_NAME).write_bytes(build_artifact(artifact))
    messages = [
        encode_message(Kind.TOKENS, pack_frames(codes[start : start + MESSAGE_FRAMES], FORMAT.codebook_size))
        for start in range(0, len(codes), MESSAGE_FRAMES)
    ]
    (folder / STREAM_NAME).write_bytes(b"".join([*messages, encode_message(Kind.END)]))


def _model(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text.replace("SOUND", _SOUND))
    used = {name for node in model.graph.node for name in node.input}
    for name, value in _constants().items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def _constants() -> dict[str, Any]:
    return {
        "pitch_of_codes": pitch_of_codes(),
        "level_of_codes": level_of_codes(),
        "gains": gain_of_partials(),
        "nothing": np.zeros((1, 1, FORMAT.quantizers, FORMAT.channels), dtype=np.float32),
        "silent_pitch": np.float32(0),
        "half": np.float64(0.5),
        "whole_turn": np.float32(2 * np.pi),
        "no_samples": np.float64(0),
        "one_sample": np.float64(1),
        "all_samples": np.float64(FORMAT.frame_samples),
        "exponents": np.array([[0.0], [1.0], [2.0]]),
        "frame_samples": np.array([FORMAT.frame_samples], dtype=np.int32),
        "one_frame": np.array([1], dtype=np.int32),
        "first_position": np.array([0], dtype=np.int32),
        "audio_shape": np.array([1, FORMAT.channels, -1]),
        "frame_axis": np.array([1]),
        "cumsum_axis": np.array(1),
        "last_axis": np.array([3]),
        "first": np.array([0]),
        "last": np.array([-1]),
        "beyond": np.array([np.iinfo(np.int64).max]),
    }


def metadata() -> dict[str, Any]:
    """The metadata of this bundle, with the keys of the official one."""
    cache = build_cache(0, 0, 0, context=1, heads=FORMAT.quantizers, head_dim=FORMAT.channels)
    files = {"decode_full": (FULL_NAME,), "decode_step": (STEP_NAME,)}
    return build_metadata("mossnano-stdio demo", FORMAT, files, build_streaming([], [cache]), opset=17)


def melody() -> list[Note]:
    """Four bars of three beats and a last chord: 7.28 s of broken chords under a tune."""
    tune_by_bar = (
        ((0, 3, 76), (3, 3, 79)),
        ((0, 2, 84), (2, 1, 83), (3, 3, 81)),
        ((0, 3, 77), (3, 2, 81), (5, 1, 79)),
        ((0, 2, 74), (2, 1, 76), (3, 2, 77), (5, 1, 74)),
    )
    chord_by_bar = (
        (48, 55, 64, 60, 64, 55),  # C
        (45, 52, 60, 57, 60, 52),  # A minor
        (41, 48, 57, 53, 57, 48),  # F
        (43, 50, 59, 55, 59, 53),  # G7
    )
    notes = []
    for bar, (chord, tune) in enumerate(zip(chord_by_bar, tune_by_bar, strict=True)):
        first = bar * len(chord)
        bass, *broken = chord
        notes.append(_note(first, 6, bass, loudness_db=-1, harmonics=3))
        notes += [_note(first + 1 + step, 2, pitch, -6, 2) for step, pitch in enumerate(broken)]
        notes += [_note(first + step, length, pitch, 0, 3) for step, length, pitch in tune]
    last = len(chord_by_bar) * 6
    return notes + [_note(last, 6, pitch, -3, harmonics) for pitch, harmonics in ((48, 2), (55, 1), (64, 2), (72, 3))]


def _note(start_quavers: int, quavers: int, pitch: int, loudness_db: float, harmonics: int) -> Note:
    return Note(start_quavers * QUAVER_SECONDS, quavers * QUAVER_SECONDS, pitch, loudness_db, harmonics)


if __name__ == "__main__":
    save_demo(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_FOLDER.parent)
