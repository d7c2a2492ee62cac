"""Decodes and encodes in the caller's own process: `mossnano_stdio.Codec`.

Rules of this room:

- Arrays of codes may come in any order that tokens/arrays.py reads. Results have one order: codes are
  [quantizers, frames], audio is float32 [channels, samples], with the batch in front where there is more than one.
- A wrong argument raises a ValueError that says which and why. A fault in weights, in a file's content, or in a run
  raises a MossnanoError. Failing to open an input raises the plain OSError.
- A Codec has no stream. Every call steps a decoder of its own over one shared graph, so calls may come from any number
  of threads. Beside its result, a call needs no memory that grows with the length of what it decodes.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.chunks import EncodingChunks, Fixed, encode_segments, first_chunk_frames_of, plan
from mossnano_stdio.codecs import (
    EncoderRuntime,
    FrameGraphEncoder,
    GraphName,
    PrecisionName,
    Runtime,
    SeekingDecoder,
    SegmentEncoder,
    load_encoder,
    load_runtime,
    maybe_warm_up_frames,
    refuse_segments,
    seek,
)
from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.pcm.recordings import resampled
from mossnano_stdio.tokens import (
    FIELD_LIMITS,
    Artifact,
    ArtifactHeader,
    CodecFormat,
    Codes,
    build_artifact,
    load_artifact,
    to_quantizer_major,
)
from mossnano_stdio.tokens.arrays import (
    check_range,
    checked_quantizers,
    checked_rate,
    integer_array,
    is_whole_number,
    normalised_codes,
    normalised_wave,
    sample_range,
)
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcHeader, ecdc_model_of
from mossnano_stdio.weights import Bundle, find_weights, load_bundle

if TYPE_CHECKING:
    from mossnano_stdio.codecs import FullEncoder, RecordingEncoder

Audio = NDArray[np.float32]

STEP_FRAMES = 8  # decoded at a time, where all frames are there


@dataclass(frozen=True, eq=False)
class EncodedAudio(ArtifactHeader):
    """A recording as codes, [quantizers, frames], with the fields of its file's header.

    >>> encoded = EncodedAudio(48000, 2, 5000, 16, 2, 1024, codes=np.zeros((16, 2), np.uint16))
    >>> encoded.original_samples, encoded.duration_seconds, encoded.artifact.codes.shape
    (5000, 0.10416666666666667, (2, 16))
    """

    codes: Codes

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        fields = {name: getattr(artifact, name) for name in FIELD_LIMITS}
        return cls(**fields, codes=to_quantizer_major(artifact.codes))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `.mossnano` file."""
        with open_input(path) as file:
            return cls.of(load_artifact(file, str(path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `.mossnano` file."""
        with open_output(path) as file:
            file.write(build_artifact(self.artifact))

    @property
    def artifact(self) -> Artifact:
        """The same recording with frame-major codes, as the rest of this package uses it."""
        fields = {name: getattr(self, name) for name in FIELD_LIMITS}
        return Artifact(**fields, codes=np.asarray(self.codes).T)  # not cast, so that Artifact checks what is there


class Codec:
    """The codec, loaded. Use it as a context manager, or `close` it.

    >>> with Codec.load("demo") as codec:
    ...     codes = np.zeros((codec.quantizers, 25), dtype=np.uint16)
    ...     codec.decode(codes).shape
    (2, 96000)
    """

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle = bundle
        self._maybe_runtime: Runtime | None = runtime
        self._maybe_encoder: EncoderRuntime | FullEncoder | None = None
        self._encoder_lock = threading.Lock()

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str] | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        graph: GraphName | None = None,
        precision: PrecisionName | None = None,
    ) -> Self:
        """Load `weights`: a folder, "demo", or None for the folders that `mossnano fetch` writes to.

        `precision`: "int8" takes the graph that `mossnano build --precision float32,int8` makes, None float32.
        """
        bundle = load_bundle(find_weights(None if weights is None else os.fspath(weights)))
        refuse_segments(bundle)
        try:
            runtime = load_runtime(bundle, provider=provider, threads=threads, graph=graph, precision=precision)
            return cls(bundle, runtime)
        except UsageError as error:
            raise ValueError(str(error)) from None

    def close(self) -> None:
        """Release the graphs. Calls that are under way finish."""
        self._maybe_runtime = self._maybe_encoder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def format(self) -> CodecFormat:
        return self.bundle.format

    @property
    def sample_rate(self) -> int:
        return self.format.sample_rate

    @property
    def channels(self) -> int:
        return self.format.channels

    @property
    def quantizers(self) -> int:
        return self.format.quantizers

    @property
    def codebook_size(self) -> int:
        return self.format.codebook_size

    @property
    def frame_samples(self) -> int:
        return self.format.frame_samples

    @property
    def context_seconds(self) -> float:
        """How far back the layer with the longest context looks. `chunk_duration` may be as long.

        Infinity where a layer remembers all of a stream, as EnCodec's LSTM does.
        """
        contexts = self._runtime.layer_context_frames
        return self._seconds(max(contexts)) if contexts else math.inf

    @property
    def warm_up_seconds(self) -> float:
        """How far back all layers together look. Decoding from the middle decodes so much before it.

        Infinity where all frames since the start count: for the demo's tones, and for EnCodec.
        """
        maybe_frames = maybe_warm_up_frames(self._runtime)
        return math.inf if maybe_frames is None else self._seconds(maybe_frames)

    # --- decoding -------------------------------------------------------------------------------------------------

    def decode(self, codes: Any, num_quantizers: int | None = None, chunk_duration: float | None = None) -> Audio:
        """Codes -> float32 [channels, samples]; for a batch of B > 1, [B, channels, samples].

        `codes`: integers (quantizers, frames) or (frames, quantizers), with a batch (quantizers, B, frames) or
        (B, frames, quantizers); or an EncodedAudio: its audio is as long as the recording was.
        `num_quantizers`: decode only the first so many.
        `chunk_duration`: seconds decoded at a time. The result is the same.

        >>> with Codec.load("demo") as codec:
        ...     codec.decode(np.zeros((25, 16), int)).shape, codec.decode(np.zeros((3, 25, 16), int)).shape
        ((2, 96000), (3, 2, 96000))
        """
        batch = self._batch(codes, num_quantizers)
        if chunk_duration is not None and batch.shape[1] > 1:
            raise ValueError(f"chunk_duration is for one stream, the codes are a batch of {batch.shape[1]}")
        step_frames = self._chunk_frames(chunk_duration)
        runtime = self._runtime
        frame_major = batch.transpose(1, 2, 0)  # [batch, frames, quantizers]
        decoded = [self._decoded(runtime.new_decoder(), frames, step_frames) for frames in frame_major]
        audio = decoded[0] if len(decoded) == 1 else np.stack(decoded)
        return audio[..., : _original_samples(codes)]

    def batch_decode(self, codes_list: Iterable[Any], num_quantizers: int | None = None) -> list[Audio]:
        """Decode one after the other. Their lengths may differ; none may be a batch itself.

        >>> with Codec.load("demo") as codec:
        ...     [audio.shape for audio in codec.batch_decode([np.zeros((16, 3), int), np.zeros((16, 5), int)])]
        [(2, 11520), (2, 19200)]
        """
        entries = list(codes_list)
        for number, entry in enumerate(entries):
            self._single(entry, num_quantizers, f"entry {number}")  # all are checked before the first is decoded
        return [self.decode(entry, num_quantizers) for entry in entries]

    def streaming_decode(self, codes: Any, chunk_frames: int = 1, num_quantizers: int | None = None) -> Iterator[Audio]:
        """Decode chunk by chunk: yield float32 [channels, samples] of `chunk_frames` frames, or fewer at the end. Of
        EnCodec the first chunk has 7 frames or more.

        `codes`: whatever `decode` takes, or any other iterable of frames of codes, of any length. The last frame of an
        EncodedAudio is not cut to the recording's length. Lists and tuples are read as arrays; for one of frames,
        give `iter(frames)`. Close the generator to stop half way.

        >>> with Codec.load("demo") as codec:
        ...     [audio.shape for audio in codec.streaming_decode(np.zeros((16, 5), int), chunk_frames=2)]
        [(2, 7680), (2, 7680), (2, 3840)]
        """
        if not is_whole_number(chunk_frames) or chunk_frames < 1:
            raise ValueError(f"chunk_frames is {chunk_frames!r}, allowed is a whole number from 1")
        # What is neither a recording nor an array, nor read as one, gives frame after frame.
        if isinstance(codes, list | tuple | ArtifactHeader) or hasattr(codes, "__array__"):
            frames: Iterable[Codes] = self._single(codes, num_quantizers)
        else:
            wanted = self._wanted_quantizers(num_quantizers)
            frames = (self._frame(frame, wanted, number) for number, frame in enumerate(codes))
        return self._stream(self._runtime.new_decoder(), frames, chunk_frames)

    def decode_range(
        self,
        codes: Any,
        start: float,
        duration: float | None = None,
        *,
        warm_up: float | None = None,
        num_quantizers: int | None = None,
    ) -> Audio:
        """Decode `duration` seconds (None: all that is left) from `start` seconds on: float32 [channels, samples].

        To restore the decoder's state, `warm_up` seconds of frames before it are decoded too. The default is long
        enough to be within one 16-bit step of a decode from the start (`warm_up_seconds`).

        >>> with Codec.load("demo") as codec:
        ...     codec.decode_range(np.zeros((16, 50), int), start=1.0, duration=0.5).shape
        (2, 24000)
        """
        frames = self._single(codes, num_quantizers)
        maybe_samples = _original_samples(codes)
        total_samples = len(frames) * self.frame_samples if maybe_samples is None else maybe_samples
        samples = sample_range(start, duration, total_samples, self.sample_rate)
        first_frame = samples.start // self.frame_samples
        end_frame = math.ceil(samples.stop / self.frame_samples)
        decoder = self._runtime.new_decoder()
        first_frame = seek(decoder, frames, first_frame, maybe_warm_up_frames(self._runtime, warm_up))
        if first_frame < end_frame:  # how a stream begins, its first frames say together
            end_frame = max(end_frame, first_frame + first_chunk_frames_of(decoder))
        audio = self._decoded(decoder, frames[first_frame:end_frame], STEP_FRAMES)
        skipped = samples.start - first_frame * self.frame_samples
        return audio[:, skipped : skipped + len(samples)]

    # --- encoding -------------------------------------------------------------------------------------------------

    def encode(
        self,
        wave: Any,
        sample_rate: int | None = None,
        num_quantizers: int | None = None,
        chunk_duration: float | None = None,
    ) -> EncodedAudio:
        """float32 [channels, samples], full scale 1 -> codes, with the fields of their file's header.

        `wave`: mono, [samples] or [1, samples], is copied to all channels.
        `sample_rate`: that of the wave; None: the codec's. Any other is resampled.
        `num_quantizers`: keep only the first so many.
        `chunk_duration`: seconds encoded at a time. The result is the same.

        The last frame is padded. `original_samples` holds the length without padding, and `decode` cuts the audio to
        it.
        """
        audio = normalised_wave(wave, self.channels)
        rate = self.sample_rate if sample_rate is None else checked_rate(sample_rate)
        quantizers = checked_quantizers(num_quantizers, self.quantizers)
        chunk_frames = self._chunk_frames(chunk_duration)
        encoder = self._encoder
        if chunk_duration is not None and not isinstance(encoder, EncoderRuntime):
            raise BundleError(
                f"{self.bundle.folder}: its graph encodes recordings as a whole; "
                f"`mossnano build {self.bundle.folder} DIR` makes one that encodes chunk after chunk"
            )
        blocks = resampled([audio], self.channels, rate, self.sample_rate)
        return encode_blocks(encoder, blocks, quantizers, chunk_frames)

    def batch_encode(
        self,
        waves: Iterable[Any],
        sample_rate: int | None = None,
        num_quantizers: int | None = None,
        chunk_duration: float | None = None,
    ) -> list[EncodedAudio]:
        """Encode the waves one after the other; their lengths may differ."""
        return [self.encode(wave, sample_rate, num_quantizers, chunk_duration) for wave in waves]

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _runtime(self) -> Runtime:
        runtime = self._maybe_runtime
        if runtime is None:
            raise ValueError("this Codec is closed")
        return runtime

    @property
    def _encoder(self) -> EncoderRuntime | FullEncoder:
        """The encoder, loaded when it is first used."""
        engine = self._runtime.engine
        with self._encoder_lock:
            if self._maybe_encoder is None:
                self._maybe_encoder = load_encoder(self.bundle, provider=engine.provider, threads=engine.threads)
            return self._maybe_encoder

    def _batch(self, codes: Any, num_quantizers: int | None, name: str = "codes") -> Codes:
        """Codes in any form that is allowed -> (num_quantizers, batch, frames)."""
        if isinstance(codes, ArtifactHeader):
            codes.check_fits(self.format, self._runtime.decodes_prefix)
            wanted = checked_quantizers(num_quantizers, codes.quantizers)
            return _quantizer_major(codes)[: self._wanted_quantizers(wanted), np.newaxis]
        wanted = self._wanted_quantizers(num_quantizers)
        return normalised_codes(codes, self.quantizers, self.codebook_size, wanted, name)

    def _single(self, codes: Any, num_quantizers: int | None, name: str = "codes") -> Codes:
        """Codes of one stream in any form that is allowed -> [frames, num_quantizers]."""
        batch = self._batch(codes, num_quantizers, name)
        if batch.shape[1] > 1:
            raise ValueError(f"{name}: a batch of {batch.shape[1]}, allowed is one stream")
        return batch[:, 0].T

    def _wanted_quantizers(self, num_quantizers: int | None) -> int:
        wanted = checked_quantizers(num_quantizers, self.quantizers)
        if wanted < self.quantizers and not self._runtime.decodes_prefix:
            raise BundleError(
                f"{self.bundle.folder}: its {self._runtime.graph_name} graph decodes all {self.quantizers} quantizers "
                f"only; `mossnano build {self.bundle.folder} DIR` makes a graph that decodes any prefix"
            )
        return wanted

    def _frame(self, frame: Any, wanted: int, number: int) -> Codes:
        """Check one frame of an iterable -> [num_quantizers]."""
        array = integer_array(frame, f"frame {number}")
        if array.shape not in ((wanted,), (self.quantizers,)):
            raise ValueError(f"frame {number}: the shape is {array.shape}, allowed is ({self.quantizers},)")
        check_range(array, self.codebook_size, f"frame {number}")
        return array[:wanted].astype(np.uint16)

    def _stream(self, decoder: SeekingDecoder, frames: Iterable[Codes], chunk_frames: int) -> Iterator[Audio]:
        chunk: list[Codes] = []
        needed_frames = max(chunk_frames, first_chunk_frames_of(decoder))
        for frame in frames:
            chunk.append(frame)
            if len(chunk) == needed_frames:
                yield np.ascontiguousarray(decoder.step(np.stack(chunk)).T)
                chunk.clear()
                needed_frames = chunk_frames
        if chunk:
            yield np.ascontiguousarray(decoder.step(np.stack(chunk)).T)

    def _decoded(self, decoder: SeekingDecoder, frames: Codes, step_frames: int) -> Audio:
        """Decode [frames, quantizers] step by step into one array, [channels, samples]."""
        audio = np.empty((self.channels, len(frames) * self.frame_samples), dtype=np.float32)
        for first, count in plan(len(frames), Fixed(step_frames), first_chunk_frames_of(decoder)):
            start = first * self.frame_samples
            step = decoder.step(frames[first : first + count])
            audio[:, start : start + len(step)] = step.T
        return audio

    def _chunk_frames(self, chunk_duration: float | None) -> int:
        """How many frames `chunk_duration` seconds are: a whole number, within the context."""
        if chunk_duration is None:
            return STEP_FRAMES
        if not 0 < chunk_duration <= self.context_seconds:
            raise ValueError(f"chunk_duration is {chunk_duration}, allowed is above 0 and up to {self.context_seconds}")
        samples = round(chunk_duration * self.sample_rate)
        if samples % self.frame_samples or not math.isclose(samples, chunk_duration * self.sample_rate):
            raise ValueError(
                f"chunk_duration is {chunk_duration}, allowed are multiples of a frame, {self._seconds(1)} seconds"
            )
        return samples // self.frame_samples

    def _seconds(self, frames: int) -> float:
        return frames * self.frame_samples / self.sample_rate


def encode_blocks(
    encoder: EncoderRuntime | FullEncoder, blocks: Iterable[Audio], quantizers: int, chunk_frames: int = STEP_FRAMES
) -> EncodedAudio:
    """Encode a recording that comes block by block, [samples, channels] at the codec's rate."""
    if isinstance(encoder, EncoderRuntime):
        chunks = EncodingChunks(encoder.new_encoder(), Fixed(chunk_frames))
        codes = np.concatenate([np.zeros((0, encoder.format.quantizers), np.uint16), *_recorded(chunks, blocks)])
        samples = chunks.original_samples
    else:
        audio = np.concatenate([np.zeros((0, encoder.format.channels), np.float32), *blocks])
        codes, samples = encoder.encode(audio), len(audio)
    return EncodedAudio(
        sample_rate=encoder.format.sample_rate,
        channels=encoder.format.channels,
        original_samples=samples,
        quantizers=quantizers,
        frames=len(codes),
        codebook_size=encoder.format.codebook_size,
        codes=to_quantizer_major(codes[:, :quantizers]),
    )


def encode_recording(encoder: RecordingEncoder, blocks: Iterable[Audio], quantizers: int) -> Artifact | Ecdc:
    """Encode a recording, block by block: to an .ecdc where the codec gives scales with its codes, else an artifact."""
    if not isinstance(encoder, SegmentEncoder | FrameGraphEncoder):
        return encode_blocks(encoder, blocks, quantizers).artifact
    segments, samples = [], 0
    for segment, added_samples in encode_segments(encoder, blocks):
        segments.append(replace(segment, codes=segment.codes[:, :quantizers]))
        samples += added_samples
    return Ecdc(EcdcHeader(ecdc_model_of(encoder.format), samples, quantizers), segments)


def _recorded(chunks: EncodingChunks, blocks: Iterable[Audio]) -> Iterator[Codes]:
    """Encode chunk after chunk, while the blocks come."""
    for block in blocks:
        chunks.push(block)
        while (codes := chunks.step()) is not None:
            yield codes
    chunks.finish()
    while (codes := chunks.step()) is not None:
        yield codes


def _quantizer_major(recording: ArtifactHeader) -> Codes:
    match recording:
        case EncodedAudio():
            return to_quantizer_major(recording.artifact.codes)  # which checks that they are what the header says
        case Artifact():
            return to_quantizer_major(recording.codes)
    raise ValueError(f"codes are a {type(recording).__name__}, which holds none")


def _original_samples(codes: Any) -> int | None:
    return codes.original_samples if isinstance(codes, ArtifactHeader) else None
