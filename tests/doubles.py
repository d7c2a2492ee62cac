"""A decoder double that counts: every sample it gives depends on every frame it was ever given since its reset.

Rules of this room:

- A lost, repeated or reordered frame, or a reset that is missing or too many, changes all samples after it.
- The result does not depend on how frames are cut into chunks, so the expected PCM of a stream is known without it:
  `expected_pcm` computes it frame by frame, and shares no code with the renderer.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import DecodeError, MossnanoError
from mossnano_stdio.protocol.connection import Connection, Turn
from mossnano_stdio.protocol.messages import Message
from mossnano_stdio.tokens import CodecFormat, Codes

SMALL = CodecFormat(sample_rate=48000, channels=2, frame_samples=4, quantizers=4, codebook_size=1000)
NANO = CodecFormat(sample_rate=48000, channels=2, frame_samples=3840, quantizers=16, codebook_size=1024)
MODULUS = 30011  # a prime below 32,767: every remainder is a sample
MOST_STEPS_KEPT = 10_000  # of a double


def count_on(memory: int, frame: Sequence[int]) -> int:
    """What the double remembers after one more frame."""
    for code in frame:
        memory = (memory * 31 + int(code) + 1) % MODULUS
    return memory


def expected_pcm(frames: Sequence[Sequence[int]], codec_format: CodecFormat, memory: int = 7) -> bytes:
    """The PCM of one whole stream."""
    values = []
    for frame in frames:
        memory = count_on(memory, frame)
        for index in range(codec_format.frame_samples * codec_format.channels):
            values.append((memory + index) % MODULUS)
    return struct.pack(f"<{len(values)}h", *values)


class CountingDecoder:
    """Counts, and misbehaves where it is told to."""

    def __init__(
        self,
        codec_format: CodecFormat = SMALL,
        *,
        decodes_prefix: bool = True,
        step_seconds: float = 0.0,
        not_finite_steps: Sequence[int] = (),
        failing_steps: Sequence[int] = (),
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.format = codec_format
        self.decodes_prefix = decodes_prefix
        self._step_seconds = step_seconds
        self._not_finite_steps = not_finite_steps
        self._failing_steps = failing_steps
        self._on_step = on_step
        self.steps: list[int] = []  # frames of each of the first steps
        self._step_count = 0
        self.resets = 0
        self._memory = 7

    def step(self, codes: Codes) -> NDArray[np.float32]:
        step = self._step_count
        self._step_count += 1
        if step < MOST_STEPS_KEPT:  # what watches our memory takes a hundred thousand
            self.steps.append(len(codes))
        self._on_step(step)
        if self._step_seconds:
            time.sleep(self._step_seconds)
        if step in self._failing_steps:
            raise DecodeError(f"step {step} fails, as it was told to")
        values = np.arange(self.format.frame_samples * self.format.channels)
        audio = []
        for frame in codes.tolist():
            self._memory = count_on(self._memory, frame)
            audio.append((values + self._memory) % MODULUS / np.float32(32767))
        samples = np.concatenate(audio).astype(np.float32).reshape(-1, self.format.channels)
        if step in self._not_finite_steps:
            samples[1, 1] = np.nan
        return samples

    def reset(self) -> None:
        self.resets += 1
        self._memory = 7


def pack(codes: Sequence[int], bits: int) -> bytes:
    """Codes as one long number, least significant first: packing as plainly as it can be said."""
    number = sum(code << (bits * index) for index, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


def tokens_payload(frames: Sequence[Sequence[int]], bits: int = 10) -> bytes:
    """Frames as TOKENS carries them."""
    return b"".join(pack(frame, bits) for frame in frames)


def artifact_bytes(
    frames: Sequence[Sequence[int]], codec_format: CodecFormat, maybe_samples: int | None = None
) -> bytes:
    """Frames as a `.mossnano`."""
    samples = len(frames) * codec_format.frame_samples if maybe_samples is None else maybe_samples
    header = struct.pack(
        "<8s6I",
        b"MOSSNANO",
        codec_format.sample_rate,
        codec_format.channels,
        samples,
        len(frames[0]),
        len(frames),
        codec_format.codebook_size,
    )
    by_quantizer = [code for quantizer in zip(*frames, strict=True) for code in quantizer]
    return header + pack(by_quantizer, codec_format.bits_per_code)


def some_frames(count: int, codec_format: CodecFormat = SMALL, seed: int = 0) -> list[list[int]]:
    """Frames that differ from one another and from those of any other seed."""
    random = np.random.default_rng(seed)
    frames: list[list[int]] = random.integers(0, codec_format.codebook_size, (count, codec_format.quantizers)).tolist()
    return frames


class CountingEncoder:
    """The mirror: every code it gives depends on every sample it was ever given since its reset."""

    def __init__(self, codec_format: CodecFormat = SMALL, *, failing_steps: Sequence[int] = ()) -> None:
        self.format = codec_format
        self._failing_steps = failing_steps
        self.steps: list[int] = []
        self._memory = 7

    def step(self, audio: NDArray[np.float32]) -> Codes:
        step = len(self.steps)
        frames, rest = divmod(len(audio), self.format.frame_samples)
        assert rest == 0, "an encoder is given whole frames"
        self.steps.append(frames)
        if step in self._failing_steps:
            raise DecodeError(f"step {step} fails, as it was told to")
        samples = np.rint(audio * np.float32(32767)).astype(int).reshape(frames, -1).tolist()
        return np.array([self._encode_frame(frame) for frame in samples], np.uint16).reshape(frames, -1)

    def reset(self) -> None:
        self._memory = 7

    def _encode_frame(self, samples: Sequence[int]) -> list[int]:
        for sample in samples:
            self._memory = (self._memory * 31 + sample + 40_000) % MODULUS
        return [(self._memory + quantizer) % self.format.codebook_size for quantizer in range(self.format.quantizers)]


def expected_codes(pcm: bytes, codec_format: CodecFormat = SMALL) -> list[list[int]]:
    """The codes of one whole stream, its last frame filled up with silence."""
    frame_values = codec_format.frame_samples * codec_format.channels
    values = list(struct.unpack(f"<{len(pcm) // 2}h", pcm))
    values += [0] * (-len(values) % frame_values)
    memory, frames = 7, []
    for at, value in enumerate(values, 1):
        memory = (memory * 31 + value + 40_000) % MODULUS
        if at % frame_values == 0:
            frames.append([(memory + q) % codec_format.codebook_size for q in range(codec_format.quantizers)])
    return frames


def handle(connection: Connection, message: Message, seconds: float = 0.0) -> Iterator[Message]:
    """Deal with one message, and compute what it waits for."""
    yield from connection.receive(message, seconds)
    while connection.plain.waiting or connection.plain.after_chunks:
        yield from advance(connection)


def advance(connection: Connection) -> Iterator[Message]:
    """Compute one chunk of the plain stream, if one is due."""
    yield from connection.advance(
        [Turn(lane, lane.stream.allowed_frames) for lane in connection.due_lanes()[:1] if lane.stream]
    )


def close(connection: Connection, maybe_fault: MossnanoError | None = None) -> Iterator[Message]:
    """End of input, or of what can be read of it."""
    yield from connection.end_input(is_faulty=maybe_fault is not None)
    while connection.due_lanes():
        yield from advance(connection)
    yield from connection.close(maybe_fault)


class FailingNative:
    """onnxruntime's session in front, which fails in one of its next runs when that is done."""

    def __init__(self, native: Any, fails_in_run: int) -> None:
        self.io_binding = native.io_binding
        self._native = native
        self._runs_left = fails_in_run

    def run_with_iobinding(self, binding: Any) -> None:
        self._native.run_with_iobinding(binding)
        self._runs_left -= 1
        if not self._runs_left:
            raise RuntimeError("as it was told to")
