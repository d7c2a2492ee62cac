"""The only encode loop: samples -> frames -> chunks -> encoder.step -> codes. The renderer's mirror.

Rules of this room:

- Everything that turns sound into codes drives a Recorder, the process as well as `mossnano encode`, so that the
  codes on stdout are those of the file by construction.
- One call of `record` is one chunk. Nothing is encoded ahead.
- Samples may come in any pieces. The last frame is filled up with silence, and how many samples there really were is
  remembered: `original_samples`.
- The encoder is handed in. This room knows neither onnxruntime nor weights.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.chunks.backlog import Backlog
from mossnano_stdio.chunks.schedule import Schedule
from mossnano_stdio.tokens.format import CodecFormat, Codes

Audio = NDArray[np.float32]  # [samples, channels]


class Encoder(Protocol):
    """Whatever turns whole frames of samples into codes, one chunk after the other."""

    @property
    def format(self) -> CodecFormat: ...

    def step(self, audio: Audio) -> Codes:
        """[frames * frame_samples, channels] -> [frames, quantizers]. The state moves on only when this returns."""

    def reset(self) -> None:
        """Forget everything: the next step is the first of a stream."""


class Recorder:
    """Samples are pushed in, chunks of codes are recorded, until the stream is finished and nothing is due."""

    def __init__(self, encoder: Encoder, schedule: Schedule) -> None:
        self.encoder = encoder
        self.schedule = schedule
        self.original_samples = 0
        self._samples: Backlog[np.float32] = Backlog()
        self._finished = False

    @property
    def due_frames(self) -> int:
        """How many frames the next chunk would have; 0 while there is nothing to encode."""
        return self.schedule.next_frames(self._pending_frames, self._finished)

    @property
    def is_sated(self) -> bool:
        """Would more samples leave the next chunk as it is?"""
        return self._pending_frames >= self.schedule.wanted_frames

    def push(self, audio: Audio) -> None:
        """Take [samples, channels] of the stream that is open."""
        self._samples.push(audio)
        self.original_samples += len(audio)

    def finish(self) -> None:
        """No more samples will come: what is left is due, the last frame filled up with silence."""
        self._finished = True
        missing_samples = -len(self._samples) % self.encoder.format.frame_samples
        self._samples.push(np.zeros((missing_samples, self.encoder.format.channels), np.float32))

    def record(self) -> Codes | None:
        """Encode the chunk that is due."""
        frames = self.due_frames
        if not frames:
            return None
        audio = self._samples.take(frames * self.encoder.format.frame_samples)
        self.schedule.advance()
        return self.encoder.step(audio)

    def reset(self) -> None:
        """Drop what is pending and begin a new stream."""
        self.original_samples = 0
        self._samples.clear()
        self._finished = False
        self.schedule.reset()
        self.encoder.reset()

    @property
    def _pending_frames(self) -> int:
        return len(self._samples) // self.encoder.format.frame_samples
