"""Frames wait, and go through a codec in chunks.

Rules of this room:

- Everything that turns codes into sound, or sound into codes, does it here, the process as well as the tools: a WAV
  equals the PCM on stdout by construction.
- One call of `step` computes the one chunk that is due. Nothing is computed ahead: who has to stop, stops calling.
- A schedule knows counts, not frames. It never asks for more than wait, and at a stream's end it leaves none behind.
  Its position in the stream is its only state: `advance` moves it, `reset` takes it back, asking changes nothing.
- The codec is handed in. This room knows neither onnxruntime nor weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ArtifactError, NonFiniteError, UsageError
from mossnano_stdio.pcm import BLOCK_SAMPLES, check_finite, to_pcm16
from mossnano_stdio.tokens import Artifact, CodecFormat, Codes, frames_before_zeros
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcSegment

MAX_CHUNK_FRAMES = 1000  # what anybody may ask for: 80 s of nano
MAX_PIECES = 1000  # that wait apart
SCALES_NEEDED = (
    "this codec decodes segments of a second, each with a scale, which codes alone do not hold; send it an .ecdc"
)
RAMP_MAX_FRAMES = 8  # larger chunks cost more per frame, and nobody hears that they came at once

Audio = NDArray[np.float32]  # [samples, channels]
Row = TypeVar("Row", bound=np.generic)
Rows = TypeVar("Rows", contravariant=True)


# --- how large a chunk is ----------------------------------------------------------------------------------------


class Schedule(Protocol):
    @property
    def wanted_frames(self) -> int:
        """How large the next chunk would like to be. More waiting frames than that change nothing."""

    @property
    def max_frames(self) -> int:
        """How large a chunk can be at most."""

    @property
    def maybe_chunk_frames(self) -> int | None:
        """The fixed size, where there is one."""

    def next_frames(self, waiting: int, final: bool) -> int:
        """How many of the `waiting` frames the next chunk takes; 0 = wait for more. `final`: no more will come."""

    def advance(self) -> None:
        """The chunk that was asked for was taken."""

    def reset(self) -> None:
        """Back to the start of a stream."""


class Ramp:
    """Small chunks first, for audio at once, then larger ones, for less work per frame: 1, 2, 4, 8, 8, ...

    It never waits: what is there is taken, at most as much as its next step allows. Where a chunk takes longer than it
    sounds unless it has some frames, the second one has so many: each smaller one would only be a gap more.

    >>> plan(20, Ramp())
    [(0, 1), (1, 2), (3, 4), (7, 8), (15, 5)]
    >>> plan(20, Ramp(second_frames=8))
    [(0, 1), (1, 8), (9, 8), (17, 3)]
    """

    maybe_chunk_frames = None

    def __init__(self, max_frames: int = RAMP_MAX_FRAMES, second_frames: int = 2) -> None:
        self.max_frames = _checked_chunk_frames(max_frames)
        self._second_frames = _checked_chunk_frames(second_frames)
        self.wanted_frames = 1

    def next_frames(self, waiting: int, final: bool) -> int:
        return min(waiting, self.wanted_frames)

    def advance(self) -> None:
        self.wanted_frames = min(max(2 * self.wanted_frames, self._second_frames), self.max_frames)

    def reset(self) -> None:
        self.wanted_frames = 1


class Fixed:
    """Chunks of one size; only the last may be smaller.

    >>> plan(20, Fixed(8))
    [(0, 8), (8, 8), (16, 4)]
    """

    def __init__(self, chunk_frames: int) -> None:
        self.maybe_chunk_frames = self.max_frames = self.wanted_frames = _checked_chunk_frames(chunk_frames)

    def next_frames(self, waiting: int, final: bool) -> int:
        if waiting < self.wanted_frames and not final:
            return 0
        return min(waiting, self.wanted_frames)

    def advance(self) -> None:
        """Every chunk is like the first."""

    def reset(self) -> None:
        """Every stream is like the first."""


def _checked_chunk_frames(frames: int) -> int:
    if frames < 1:
        raise UsageError(f"a chunk of {frames} frames, allowed is 1 or more")
    return frames


def plan(frames: int, schedule: Schedule, first_chunk_frames: int = 1) -> list[tuple[int, int]]:
    """The chunks, (start_frame, frames), of a stream that is there as a whole. `schedule` stays where it is.

    >>> plan(20, Fixed(4), first_chunk_frames=7)
    [(0, 7), (7, 4), (11, 4), (15, 4), (19, 1)]
    """
    schedule = copy.copy(schedule)
    schedule.reset()
    chunks = []
    start_frame = 0
    while start_frame < frames:
        chunk_frames = schedule.next_frames(frames - start_frame, final=True)
        if not start_frame:
            chunk_frames = max(chunk_frames, min(first_chunk_frames, frames))
        chunks.append((start_frame, chunk_frames))
        start_frame += chunk_frames
        schedule.advance()
    return chunks


def frames_for_seconds(seconds: float, frames_per_second: float) -> int:
    """The nearest whole number of frames, half up, at least 1.

    Half up as the numbers are written: 2.28 s at 12.5 frames/s is 28.5 frames, so 29, although the nearest binary
    fractions make it a little less.

    >>> [frames_for_seconds(seconds, 12.5) for seconds in (0.01, 1.333, 1.8, 2.28)]
    [1, 17, 23, 29]
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"a chunk of {seconds} seconds, allowed is any length above 0")
    from decimal import ROUND_HALF_UP, Decimal  # here, as few starts need it

    frames = Decimal(repr(float(seconds))) * Decimal(repr(float(frames_per_second)))
    return max(1, int(frames.to_integral_value(ROUND_HALF_UP)))


# --- what waits --------------------------------------------------------------------------------------------------


class Backlog(Generic[Row]):
    """A queue of rows, frames of codes or samples of audio: pushed in any pieces, taken by the number, in order.

    >>> backlog = Backlog()
    >>> backlog.push(np.array([[1], [2], [3]])); backlog.push(np.array([[4], [5]]))
    >>> backlog.take(4).ravel().tolist(), len(backlog)
    ([1, 2, 3, 4], 1)
    """

    def __init__(self) -> None:
        self._pieces: deque[NDArray[Row]] = deque()
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def push(self, rows: NDArray[Row]) -> None:
        if not len(rows):
            return
        self._pieces.append(rows)
        self._rows += len(rows)
        if len(self._pieces) > MAX_PIECES:  # an array costs more than the few frames that a live stream's pieces hold
            self._pieces = deque([np.concatenate(self._pieces)])

    def take(self, count: int) -> NDArray[Row]:
        """The first `count` rows, which must be there. Only those that were pushed apart are copied."""
        if not 1 <= count <= self._rows:
            raise IndexError(f"{count} rows of {self._rows}")
        self._rows -= count
        taken: list[NDArray[Any]] = []
        while count:
            piece = self._pieces.popleft()
            if len(piece) > count:
                self._pieces.appendleft(piece[count:])
                piece = piece[:count]
            taken.append(piece)
            count -= len(piece)
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def clear(self) -> None:
        self._pieces.clear()
        self._rows = 0


# --- through a codec ---------------------------------------------------------------------------------------------


class Decoder(Protocol):
    """Whatever turns frames into samples, one chunk after the other, and remembers what it must in between."""

    @property
    def format(self) -> CodecFormat: ...

    @property
    def decodes_prefix(self) -> bool:
        """May a chunk hold fewer quantizers than the format says?"""

    def step(self, codes: Codes) -> Audio:
        """[frames, quantizers] -> [samples, channels]. The state moves on only when this returns."""

    def reset(self) -> None:
        """Forget everything: the next step is the first of a stream."""


class Encoder(Protocol):
    """Whatever turns whole frames of samples into codes, one chunk after the other."""

    @property
    def format(self) -> CodecFormat: ...

    def step(self, audio: Audio) -> Codes:
        """[frames * frame_samples, channels] -> [frames, quantizers]. The state moves on only when this returns.

        An encoder that says `completes_frames` takes a stream's last samples as they are.
        """

    def reset(self) -> None:
        """Forget everything: the next step is the first of a stream."""


def first_chunk_frames_of(codec: object) -> int:
    """How many frames the first chunk of a stream must have, unless they are all. Few codecs need more than one."""
    frames: int = getattr(codec, "first_chunk_frames", 1)
    return frames


class Steps(Protocol[Rows]):
    """What Decoder and Encoder have in common."""

    def step(self, rows: Rows, /) -> NDArray[Any]: ...

    def reset(self) -> None: ...


class Chunks(Generic[Row]):
    """One stream on its way through a codec: rows are pushed in, and `step` gives what the codec makes of a chunk.

    `on_step` is told of every step how many frames it computed, and how many seconds that took.
    """

    def __init__(
        self,
        codec: Steps[NDArray[Row]],
        schedule: Schedule,
        rows_per_frame: int,
        on_step: Callable[[int, float], object] = lambda frames, seconds: None,
    ) -> None:
        self.schedule = schedule
        self._codec = codec
        self._rows_per_frame = rows_per_frame
        self._on_step = on_step
        self._waiting: Backlog[Row] = Backlog()
        self._finished = False
        self.first_chunk_frames = first_chunk_frames_of(codec)
        # Some encoders take a stream's end as it is, inside a frame; for the others it is filled up with silence.
        self._completes_frames: bool = getattr(codec, "completes_frames", False)
        self._codec_begins = True  # the next step is the first since the codec was reset

    @property
    def _waiting_frames(self) -> int:
        if self._finished and self._completes_frames:
            return -(-len(self._waiting) // self._rows_per_frame)
        return len(self._waiting) // self._rows_per_frame

    @property
    def least_frames(self) -> int:
        """Of the next chunk, unless it is the stream's last. It is never cut to fewer."""
        return self.first_chunk_frames if self._codec_begins else 1

    @property
    def due_frames(self) -> int:
        """How many frames the next chunk would have; 0 while there is nothing to compute."""
        waiting_frames, least_frames = self._waiting_frames, self.least_frames
        if waiting_frames < least_frames and not self._finished:
            return 0
        scheduled_frames = self.schedule.next_frames(waiting_frames, self._finished)
        return scheduled_frames and max(scheduled_frames, min(waiting_frames, least_frames))

    @property
    def is_sated(self) -> bool:
        """Would more frames leave the next chunk as it is?"""
        return self._waiting_frames >= max(self.schedule.wanted_frames, self.least_frames)

    def push(self, rows: NDArray[Row]) -> int:
        """Take [rows, ...] of the stream that is open. Returns how many were taken."""
        self._waiting.push(rows)
        return len(rows)

    def finish(self) -> None:
        """No more rows will come: what is left is due."""
        self._finished = True

    def reset(self) -> None:
        """Drop what waits, and begin a new stream."""
        self._waiting.clear()
        self._finished = False
        self.schedule.reset()
        self._restart_codec()

    def _restart_codec(self) -> None:
        self._codec.reset()
        self._codec_begins = True

    def _step(self, most_frames: int) -> NDArray[Any] | None:
        """What the codec makes of the chunk that is due. Where the codec refuses it, its frames are gone."""
        frames = min(self.due_frames, most_frames)
        if not frames:
            return None
        rows = self._waiting.take(min(frames * self._rows_per_frame, len(self._waiting)))
        self.schedule.advance()
        self._codec_begins = False
        started = time.perf_counter()
        made = self._codec.step(rows)
        self._on_step(frames, time.perf_counter() - started)
        return made


@dataclass(frozen=True, eq=False)
class DecodedChunk:
    """What came of one chunk of codes."""

    audio: Audio
    frames: int
    error: NonFiniteError | None = None

    @property
    def pcm(self) -> bytes:
        return to_pcm16(self.audio)


class DecodingChunks(Chunks[np.uint16]):
    """Frames of codes in, PCM16 out.

    With `stops_on_zero_frame`, a frame of zeros ends the stream, as some language models say that they are done: it and
    all that is pushed after it are dropped.
    """

    def __init__(
        self,
        decoder: Decoder,
        schedule: Schedule,
        on_step: Callable[[int, float], object] = lambda frames, seconds: None,
        *,
        stops_on_zero_frame: bool = False,
    ) -> None:
        super().__init__(decoder, schedule, 1, on_step)
        self.decoder = decoder
        self._stops_on_zero_frame = stops_on_zero_frame
        self.met_zeros = False  # in this stream, which they have ended
        self._samples_left: int | None = None

    def push(self, codes: Codes) -> int:
        """Take [frames, quantizers] of the stream that is open. Returns how many were taken."""
        if self._stops_on_zero_frame:
            if self.met_zeros:
                return 0
            end_frame = frames_before_zeros(codes)
            if end_frame < len(codes):
                self.met_zeros = True
                self.finish()
            codes = codes[:end_frame]
        return super().push(codes)

    def push_segment(self, segment: EcdcSegment) -> int:
        """Take the codes of an .ecdc whose one segment has no scale. Returns how many frames were taken."""
        return self.push(segment.codes)

    def finish(self, original_samples: int | None = None) -> None:
        """No more frames will come: what is left is due, trimmed to `original_samples` where they are known."""
        super().finish()
        self._samples_left = original_samples

    def reset(self) -> None:
        super().reset()
        self.met_zeros = False
        self._samples_left = None

    def step(self, most_frames: int = MAX_CHUNK_FRAMES) -> DecodedChunk | None:
        """Decode the chunk that is due.

        Where the graph answers NaN or infinity, there is silence of its exact length, the error beside it, and a
        decoder that begins anew.
        """
        frames = min(self.due_frames, most_frames)
        audio = self._step(most_frames)
        if audio is None:
            return None
        error = None
        try:
            for start in range(0, len(audio), BLOCK_SAMPLES):
                check_finite(audio[start : start + BLOCK_SAMPLES], start)
        except NonFiniteError as not_finite:
            error = not_finite
            audio = np.zeros_like(audio)
            self._restart_codec()
        if self._samples_left is not None:
            audio = audio[: self._samples_left]
            self._samples_left -= len(audio)
        return DecodedChunk(audio, frames, error)

    def finite_chunks(self) -> Iterator[DecodedChunk]:
        """Decode chunk after chunk while one is due. Raises the error of the first one that has one."""
        while chunk := self.step():
            if chunk.error:
                raise chunk.error
            yield chunk

    @property
    def samples_left(self) -> int | None:
        """How many samples are still to come, where that is known."""
        if self._samples_left is not None or not self._finished:
            return self._samples_left
        return self._waiting_frames * self.decoder.format.frame_samples


@runtime_checkable
class SegmentingDecoder(Protocol):
    """Whatever turns segments with their scales into sound, each by itself."""

    segment_stride: int  # samples from the start of one to the start of the next

    @property
    def format(self) -> CodecFormat: ...

    def decode_segment(self, codes: Codes, scale: float) -> Audio:
        """[frames, quantizers] -> [samples, channels]."""


class SegmentChunks(DecodingChunks):
    """Segments of codes in, PCM16 out: one segment is one chunk, whatever the schedule.

    What two segments have in common fades from the one to the other, as EnCodec's own tool does it. A segment's sound
    from the start of the next one on waits for that.
    """

    def __init__(
        self, decoder: Any, schedule: Schedule, on_step: Callable[[int, float], object] = lambda frames, seconds: None
    ) -> None:
        super().__init__(decoder, schedule, on_step)
        self._segmenting: SegmentingDecoder = decoder
        self._segments: deque[EcdcSegment] = deque()
        self._fade = _Fade(decoder.segment_stride)
        self._given_samples = 0

    @property
    def due_frames(self) -> int:
        return len(self._segments[0].codes) if self._segments else 0

    @property
    def is_sated(self) -> bool:
        return bool(self._segments)

    @property
    def least_frames(self) -> int:
        return self.due_frames

    def push(self, codes: Codes) -> int:
        raise ArtifactError(SCALES_NEEDED)

    def push_segment(self, segment: EcdcSegment) -> int:
        self._segments.append(segment)
        return len(segment.codes)

    def finish(self, original_samples: int | None = None) -> None:
        """No more segments will come. The first of them may have been heard before."""
        super().finish(None if original_samples is None else original_samples - self._given_samples)

    def reset(self) -> None:
        super().reset()
        self._segments.clear()
        self._given_samples = 0
        self._fade = _Fade(self._segmenting.segment_stride)  # the next stream's first segment makes its weights

    def _restart_codec(self) -> None:
        super()._restart_codec()
        self._fade.forget()

    def _step(self, most_frames: int) -> Audio | None:
        if not self._segments:
            return None
        segment = self._segments.popleft()
        started = time.perf_counter()
        scale = 1.0 if segment.maybe_scale is None else segment.maybe_scale
        audio = self._segmenting.decode_segment(segment.codes, scale)
        self._on_step(len(segment.codes), time.perf_counter() - started)
        ready = self._fade.add(audio, is_last=self._finished and not self._segments)
        self._given_samples += len(ready)
        return ready


class _Fade:
    """Overlapping segments, added by weights that rise from a segment's start to its middle and fall to its end.

    >>> fade = _Fade(stride=3)
    >>> fade.add(np.float32([[1], [1], [1], [1]]), is_last=False).ravel().tolist()
    [1.0, 1.0, 1.0]
    >>> fade.add(np.float32([[4], [4]]), is_last=True).ravel().tolist()
    [2.5, 4.0]
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._weights = np.zeros(0, np.float32)
        self._sound: Audio | None = None  # what was added up behind the start of the next segment, and by what weights
        self._weight = np.zeros((0, 1), np.float32)

    def forget(self) -> None:
        """What was added up is no sound: the next segment begins without it."""
        if self._sound is not None:
            self._sound, self._weight = self._sound[:0], self._weight[:0]

    def add(self, audio: Audio, *, is_last: bool) -> Audio:
        """The sound that nothing more will be added to."""
        if self._sound is None:
            # The first segment's length makes the weights of all. None is longer.
            places = np.linspace(0, 1, len(audio) + 2, dtype=np.float32)[1:-1]
            self._weights = (np.float32(0.5) - np.abs(places - np.float32(0.5)))[:, np.newaxis]
            self._sound = audio[:0]
        weights = self._weights[: len(audio)]
        samples = max(len(audio), len(self._sound))
        sound, weight = np.zeros((samples, audio.shape[1]), np.float32), np.zeros((samples, 1), np.float32)
        sound[: len(self._sound)], weight[: len(self._weight)] = self._sound, self._weight
        sound[: len(audio)] += weights * audio
        weight[: len(audio)] += weights
        ready = samples if is_last else self._stride
        self._sound, self._weight = sound[ready:], weight[ready:]
        return sound[:ready] / weight[:ready]


def push_recording(chunks: DecodingChunks, recording: Artifact | Ecdc) -> None:
    """All of it, to its true length."""
    match recording:
        case Artifact():
            chunks.push(recording.codes)
        case Ecdc():
            for segment in recording.segments:
                chunks.push_segment(segment)
    chunks.finish(recording.original_samples)


def new_decoding_chunks(decoder: Any, schedule: Schedule) -> DecodingChunks:
    """What the decoder takes: frames, or segments."""
    return (SegmentChunks if isinstance(decoder, SegmentingDecoder) else DecodingChunks)(decoder, schedule)


class EncodingChunks(Chunks[np.float32]):
    """Samples in, in any pieces; frames of codes out."""

    def __init__(
        self,
        encoder: Encoder,
        schedule: Schedule,
        on_step: Callable[[int, float], object] = lambda frames, seconds: None,
    ) -> None:
        super().__init__(encoder, schedule, encoder.format.frame_samples, on_step)
        self.encoder = encoder
        self.original_samples = 0

    def push(self, audio: Audio) -> int:
        """Take [samples, channels] of the stream that is open. Returns how many were taken."""
        self.original_samples += len(audio)
        return super().push(audio)

    def finish(self) -> None:
        """No more samples will come: what is left is due, the last frame filled up with silence unless the encoder
        completes it.
        """
        super().finish()
        if self._completes_frames:
            return
        missing_samples = -len(self._waiting) % self._rows_per_frame
        self._waiting.push(np.zeros((missing_samples, self.encoder.format.channels), np.float32))

    def reset(self) -> None:
        super().reset()
        self.original_samples = 0

    def step(self, most_frames: int = MAX_CHUNK_FRAMES) -> Codes | None:
        """Encode the chunk that is due."""
        return self._step(most_frames)


class SegmentingEncoder(Protocol):
    """Whatever turns segments of sound into codes and a scale, each by itself."""

    segment_samples: int
    segment_stride: int

    def encode_segment(self, audio: Audio) -> tuple[Codes, float]:
        """[samples, channels] -> [frames, quantizers] and the scale."""


def encode_segments(encoder: SegmentingEncoder, blocks: Iterable[Audio]) -> Iterator[tuple[EcdcSegment, int]]:
    """Encode a recording that comes block by block: each segment, and how many samples it adds to those before it."""
    waiting: list[Audio] = []
    waiting_samples = 0

    def encoded(audio: Audio) -> tuple[EcdcSegment, int]:
        codes, scale = encoder.encode_segment(audio[: encoder.segment_samples])
        return EcdcSegment(codes, scale), min(len(audio), encoder.segment_stride)

    for block in blocks:
        waiting.append(block)
        waiting_samples += len(block)
        while waiting_samples >= encoder.segment_samples:
            audio = np.concatenate(waiting)
            yield encoded(audio)
            waiting = [audio[encoder.segment_stride :]]
            waiting_samples -= encoder.segment_stride
    rest = np.concatenate(waiting) if waiting else np.zeros((0, 1), np.float32)
    while len(rest):  # its end may lie wholly inside of what the segment before it has in common with it
        yield encoded(rest)
        rest = rest[encoder.segment_stride :]
