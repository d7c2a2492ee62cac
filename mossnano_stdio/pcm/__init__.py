"""Converts samples to and from PCM16, shapes a stream's sound, reads and writes audio files, and compares recordings.

Rules of this room:

- What every stream needs is imported from here. recordings.py and comparison.py, which only tools and the library
  need, are imported by their names, so that a start of the process does not load them.
"""

from mossnano_stdio.pcm.form import (
    FORM_SETTINGS,
    LEAST_GAIN_DB,
    LEAST_SAMPLE_RATE,
    LEVELS_MS,
    MOST_GAIN_DB,
    MOST_SAMPLE_RATE,
    SAMPLE_FORMATS,
    SampleFormat,
    ShapedSound,
    Shaper,
    SoundForm,
    form_said_by,
)
from mossnano_stdio.pcm.mixing import Mixer
from mossnano_stdio.pcm.samples import (
    BLOCK_SAMPLES,
    FULL_SCALE,
    check_finite,
    from_pcm16,
    pcm16_samples,
    to_pcm16,
)
from mossnano_stdio.pcm.wav import WavWriter, wav_header

__all__ = [
    "BLOCK_SAMPLES",
    "FORM_SETTINGS",
    "FULL_SCALE",
    "LEAST_GAIN_DB",
    "LEAST_SAMPLE_RATE",
    "LEVELS_MS",
    "MOST_GAIN_DB",
    "MOST_SAMPLE_RATE",
    "SAMPLE_FORMATS",
    "Mixer",
    "SampleFormat",
    "ShapedSound",
    "Shaper",
    "SoundForm",
    "WavWriter",
    "check_finite",
    "form_said_by",
    "from_pcm16",
    "pcm16_samples",
    "to_pcm16",
    "wav_header",
]
