"""The codes of the demo codec, and the function that writes notes as codes.

Rules of this room:

- The demo codec has sixteen partials, one per codebook, each with its own place between left and right. A code
  is a pitch and a level of its partial; code 0 is silence. Pitches are the semitones of a piano, levels go down
  in steps of 3 dB: 93 x 11 + 1 = 1,024 codes, all of them used.
- synth.py puts the tables made here into its graphs.
- No codes can clip: all partials at their loudest add up to full scale on either side.
- Writing notes needs numpy only, no `onnx`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import UsageError
from mossnano_stdio.tokens import CodecFormat, Codes

FORMAT = CodecFormat(sample_rate=48000, channels=2, frame_samples=3840, quantizers=16, codebook_size=1024)

SILENCE = 0
LOWEST_NOTE = 24  # as MIDI counts: 24 is C1, 69 the A of 440 Hz
NOTES = 93
LEVELS = 11
LEVEL_STEP_DB = 3

HARMONICS = ((0, 0), (12, -9), (19, -15), (24, -18))  # semitones above the note, dB below it
WIDTH = 0.8  # 1 would put the outermost partials into one ear alone


class Note(NamedTuple):
    """One note: when it starts and ends, in seconds, its pitch as MIDI counts, and how it sounds."""

    start: float
    seconds: float
    pitch: int
    loudness_db: float = 0.0
    harmonics: int = len(HARMONICS)
    decay_db_per_second: float = 18.0


def code_of(note: int, level_steps_down: int) -> int:
    """The code for a pitch at so many steps of 3 dB below the loudest.

    >>> code_of(24, 0), code_of(24, 1), code_of(69, 0), code_of(116, 10)
    (1, 2, 496, 1023)
    """
    if not LOWEST_NOTE <= note < LOWEST_NOTE + NOTES:
        raise UsageError(f"note {note} is none of {LOWEST_NOTE} .. {LOWEST_NOTE + NOTES - 1}")
    if not 0 <= level_steps_down < LEVELS:
        raise UsageError(f"level {level_steps_down} is none of 0 .. {LEVELS - 1}")
    return 1 + (note - LOWEST_NOTE) * LEVELS + level_steps_down


def pitch_of_codes() -> NDArray[np.float32]:
    """[1024]: the cycles that a partial goes through in one frame; 0 for silence."""
    pitches = np.zeros(FORMAT.codebook_size, dtype=np.float32)
    for code in range(1, FORMAT.codebook_size):
        note = LOWEST_NOTE + (code - 1) // LEVELS
        hertz = 440.0 * 2.0 ** ((note - 69) / 12)
        # A multiple of 2**-13 cycles a frame (0.0015 Hz). Phases add up halves of pitches, so they are multiples of
        # 2**-14 cycles. Float32 holds both without rounding, so the sound does not depend on the sizes of chunks.
        pitches[code] = round(hertz / FORMAT.frames_per_second * 2**13) / 2**13
    return pitches


def level_of_codes() -> NDArray[np.float32]:
    """[1024]: the amplitude of a partial before it is panned; 0 for silence."""
    # The loudest partials, all sixteen of them, reach full scale on the side on which they add up to more.
    loudest = 1.0 / max(math.fsum(side) for side in zip(*_gains(), strict=True))
    levels = np.zeros(FORMAT.codebook_size, dtype=np.float32)
    for code in range(1, FORMAT.codebook_size):
        steps_down = (code - 1) % LEVELS
        levels[code] = loudest * 10.0 ** (-LEVEL_STEP_DB * steps_down / 20)
    return levels


def gain_of_partials() -> NDArray[np.float32]:
    """[16, 2]: how much of each partial goes left and right, at equal power. Neighbours lie far apart."""
    return np.array(_gains(), dtype=np.float32)


def _gains() -> list[tuple[float, float]]:
    partials = FORMAT.quantizers
    places = [(partial * 7 % partials) / (partials - 1) for partial in range(partials)]  # 0 is left, 1 is right
    angles = [math.pi / 4 * (1 + WIDTH * (2 * place - 1)) for place in places]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def codes_for_notes(notes: Iterable[Note], frames: int | None = None) -> Codes:
    """Write notes as codes [frames, 16]. Each harmonic of each note takes a partial that is silent at that time.

    A note fades in over its first frame and out over the frame after its last. `frames` defaults to what the
    notes need. When more than sixteen harmonics would sound at once, that is a UsageError.

    >>> codes_for_notes([Note(start=0.0, seconds=0.16, pitch=69, harmonics=2)])[:, :3].tolist()
    [[496, 631, 0], [496, 631, 0], [0, 0, 0]]
    """
    per_second = FORMAT.frames_per_second
    spans = [
        (math.floor(note.start * per_second + 0.5), max(1, math.floor(note.seconds * per_second + 0.5)), note)
        for note in sorted(notes, key=lambda note: note.start)
    ]
    needed = max((start + length + 1 for start, length, _ in spans), default=0)
    codes = np.zeros((needed, FORMAT.quantizers), dtype=np.uint16)
    next_partial = 0
    for start, length, note in spans:
        for semitones, harmonic_db in HARMONICS[: note.harmonics]:
            line = _line(note, semitones, note.loudness_db + harmonic_db, length)
            partial = _silent_partial(codes, next_partial, start, len(line))
            codes[start : start + len(line), partial] = line
            next_partial = (partial + 1) % FORMAT.quantizers
    if frames is None:
        return codes
    fitted = np.zeros((frames, FORMAT.quantizers), dtype=np.uint16)
    fitted[: len(codes)] = codes[:frames]
    return fitted


def _line(note: Note, semitones: int, start_db: float, frames: int) -> list[int]:
    """The codes of one harmonic, frame by frame, until its note ends or its level falls below the softest code."""
    line = []
    for frame in range(frames):
        level_db = start_db - note.decay_db_per_second * frame / FORMAT.frames_per_second
        steps_down = math.floor(-level_db / LEVEL_STEP_DB + 0.5)
        if steps_down >= LEVELS:
            break
        line.append(code_of(note.pitch + semitones, max(0, steps_down)))
    return line


def _silent_partial(codes: Codes, first: int, start: int, frames: int) -> int:
    """The first partial from `first` on that is silent during these frames and in the frames before and after."""
    # So no note glides into another.
    for step in range(FORMAT.quantizers):
        partial = (first + step) % FORMAT.quantizers
        if not codes[max(0, start - 1) : start + frames + 1, partial].any():
            return partial
    raise UsageError(
        f"more than {FORMAT.quantizers} harmonics sound in frame {start} ({start / FORMAT.frames_per_second:.2f} s): "
        "use fewer notes at once, shorter ones, or fewer harmonics"
    )
