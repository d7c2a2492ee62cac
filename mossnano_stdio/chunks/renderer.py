"""The only decode loop: frames -> chunks -> decoder.step -> PCM16.

Rules of this room:

- Everything that turns codes into sound drives a Renderer, the process as well as `mossnano decode`, so that a WAV
  equals the PCM on stdout by construction.
- One call of `render` is one chunk. Nothing is decoded ahead: who wants less latency or has to stop, stops calling.
- A chunk in which the graph answers NaN or infinity becomes silence of its exact length, the decoder is reset, and
  the error travels beside the silence. A chunk that the decoder refuses is an error, and its frames are gone.
- The decoder is handed in. This room knows neither onnxruntime nor weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.chunks.backlog import Backlog
from mossnano_stdio.chunks.schedule import Schedule
from mossnano_stdio.errors import NonFiniteError
from mossnano_stdio.pcm.samples import to_pcm16
from mossnano_stdio.tokens.format import SAMPLE_BYTES, CodecFormat, Codes


class Decoder(Protocol):
    """Whatever turns frames into samples, one chunk after the other, and remembers what it must in between."""

    @property
    def format(self) -> CodecFormat: ...

    @property
    def decodes_prefix(self) -> bool:
        """May a chunk hold fewer quantizers than the format says?"""

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> [samples, channels]. The state moves on only when this returns."""

    def reset(self) -> None:
        """Forget everything: the next step is the first of a stream."""


@dataclass(frozen=True)
class Chunk:
    """What one decode_step gave."""

    pcm: bytes
    frames: int
    error: NonFiniteError | None = None


class Renderer:
    """Frames are pushed in, chunks are rendered out, until the stream is finished and nothing is due any more."""

    def __init__(self, decoder: Decoder, schedule: Schedule) -> None:
        self.decoder = decoder
        self.schedule = schedule
        self._frames: Backlog[np.uint16] = Backlog()
        self._finished = False
        self._samples_left: int | None = None

    @property
    def due_frames(self) -> int:
        """How many frames the next chunk would have; 0 while there is nothing to render."""
        return self.schedule.next_frames(len(self._frames), self._finished)

    @property
    def is_sated(self) -> bool:
        """Would more frames leave the next chunk as it is?"""
        return len(self._frames) >= self.schedule.wanted_frames

    def push(self, codes: Codes) -> None:
        """Take [frames, quantizers] of the stream that is open."""
        self._frames.push(codes)

    def finish(self, original_samples: int | None = None) -> None:
        """No more frames will come: what is left is due, trimmed to `original_samples` where they are known."""
        self._finished = True
        self._samples_left = original_samples

    def render(self) -> Chunk | None:
        """Decode the chunk that is due."""
        frames = self.due_frames
        if not frames:
            return None
        codes = self._frames.take(frames)
        self.schedule.advance()
        audio = self.decoder.step(codes)
        error = None
        try:
            pcm = to_pcm16(audio)
        except NonFiniteError as not_finite:
            error = not_finite
            pcm = bytes(frames * self.decoder.format.frame_pcm_bytes)
            self.decoder.reset()
        return Chunk(self._trim(pcm), frames, error)

    def reset(self) -> None:
        """Drop what is pending and begin a new stream."""
        self._frames.clear()
        self._finished = False
        self._samples_left = None
        self.schedule.reset()
        self.decoder.reset()

    def _trim(self, pcm: bytes) -> bytes:
        if self._samples_left is None:
            return pcm
        sample_bytes = self.decoder.format.channels * SAMPLE_BYTES
        pcm = pcm[: self._samples_left * sample_bytes]
        self._samples_left -= len(pcm) // sample_bytes
        return pcm
