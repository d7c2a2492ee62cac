"""Decode an artifact to a file.

  OUT.wav     a WAV
  OUT         anything else, `-` (stdout) too: raw PCM, 16 bits, little-endian, channels interleaved

The sound is trimmed to the recording's original length, and for equal chunks it is what mossnano-stdio gives, byte for
byte. Without --chunk-frames or --chunk-seconds chunks grow as in mossnano-stdio: 1, 2, 4, 8, 8, ... frames.
`--decoder full` runs the whole artifact at once through decode_full, the reference; it needs memory with the square
of the length, and is refused where that is not there.

With --start or --duration only a part is decoded. So that it sounds as it does in the whole, the frames before it are
decoded, too: as far back as all layers together look (84 s with nano's weights), or as many as make it the same within
half a step of 16 bits (160 s with the larger models', whose layers look back 620 s and more), or --warm-up seconds.

An .ecdc of EnCodec's own tool decodes as an artifact does; at 48 kHz, where it has segments of a second, from its start
on and a segment at a time. One of encodec-rs (acv 2) takes the --bundle that it was made with: bundle.json and the
weights of its language model. With --salvage a damaged chunk of it is silent and told, and the status is 65.

With --stop-on-zero-frame the recording ends before its first frame whose codes are all 0.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mossnano_stdio.chunks import (
    SCALES_NEEDED,
    Audio,
    Decoder,
    DecodingChunks,
    Fixed,
    Schedule,
    SegmentingDecoder,
    first_chunk_frames_of,
    new_decoding_chunks,
)
from mossnano_stdio.errors import ArtifactError, ExitStatus, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output
from mossnano_stdio.pcm import WavWriter
from mossnano_stdio.process.flags import (
    add_chunk_arguments,
    add_decoder_arguments,
    add_zero_frame_argument,
    chosen_schedule,
)
from mossnano_stdio.tokens import SAMPLE_BYTES, Artifact, CodecFormat, Codes, frames_before_zeros
from mossnano_stdio.tokens.arrays import sample_range
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcSegment, load_recording
from mossnano_stdio.tokens.packed_ecdc import LostChunk, PackedLayout, open_packed_ecdc
from mossnano_stdio.tools.facts import as_json, progress_bar

if TYPE_CHECKING:
    from mossnano_stdio.codecs import Engine, Runtime, SeekingDecoder
    from mossnano_stdio.weights import Bundle

WAV_SUFFIX = ".wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="IN", help="a .mossnano or .ecdc file")
    parser.add_argument("sound", metavar="OUT", help="where the sound goes; its name says the form")
    parser.add_argument("--decoder", choices=("step", "full"), default="step", help="(default: step)")
    parser.add_argument("--start", type=_seconds, metavar="S", help="begin S seconds into the recording (0)")
    parser.add_argument("--duration", type=_seconds, metavar="S", help="end S seconds later (at its end)")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="of encodec-rs, where it wrote IN")
    parser.add_argument("--salvage", action="store_true", help="chunks that are damaged are silent; needs --bundle")
    parser.add_argument("--warm-up", type=_seconds, metavar="S", help="decode only S seconds before --start for it")
    add_zero_frame_argument(parser)
    add_chunk_arguments(parser)
    add_decoder_arguments(parser)
    parser.add_argument("--json", action="store_true", help="a summary as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    _check_flags(args)
    name = "stdin" if args.artifact == STANDARD_STREAM else args.artifact
    recording: Artifact | Ecdc
    maybe_layout, lost = None, dict[int, LostChunk]()
    with open_input(args.artifact) as file:
        if args.bundle:
            packed = open_packed_ecdc(file, name, args.bundle, salvage=args.salvage)
            recording, lost = packed.unpacked(salvage=args.salvage)
            maybe_layout = packed.layout
        else:
            recording = load_recording(file, name)
    for chunk in lost.values():
        _say(f"{name}: {chunk.fault}; {chunk.frames} frames are silent")
    loaded = _load(args)
    recording.check_fits(loaded.decoder.format, loaded.decoder.decodes_prefix)
    decoder: Any = loaded.decoder
    if maybe_layout is not None:
        decoder = _ChunkDecoder(decoder, maybe_layout, lost.keys())
    if isinstance(decoder, SegmentingDecoder):
        part = _segment_part(args, recording, decoder)
    else:
        artifact = recording if isinstance(recording, Artifact) else recording.as_artifact()
        if args.stop_on_zero_frame:
            artifact = _up_to_zeros(artifact, loaded.decoder.format.frame_samples)
        part = _seek(args, artifact, loaded)
    if args.decoder == "full":
        schedule: Schedule = Fixed(max(1, part.frames))
    else:
        schedule = chosen_schedule(args, loaded.decoder.format.frames_per_second)
    chunks = new_decoding_chunks(decoder, schedule)
    with open_output(args.sound) as output, progress_bar(part.frames, "frame") as advance:
        write, finish = _sink(output, args.sound, recording, part)
        facts = _render(chunks, part, write, advance)
        finish()
    if args.json:
        print(as_json(facts | loaded.identity))
    else:
        _say(f"{args.sound}: {facts['seconds']:.2f} s, decoded {facts['real_time_factor'] or 0:.1f} x real time")
    return ExitStatus.BAD_INPUT if lost else ExitStatus.DONE


def _check_flags(args: argparse.Namespace) -> None:
    if args.json and args.sound == STANDARD_STREAM:
        raise UsageError("--json and the sound both want stdout; give the sound a file")
    if args.decoder == "full" and (args.chunk_frames or args.chunk_seconds or args.graph or args.precision):
        raise UsageError("--decoder full has no chunks, no other graph and no int8; leave those flags out")
    if args.decoder == "full" and (args.start, args.duration, args.warm_up) != (None, None, None):
        raise UsageError("--decoder full decodes all of it; leave --start, --duration and --warm-up out")
    if args.salvage and not args.bundle:
        raise UsageError("--salvage is for chunks that have checksums: give --bundle, or leave it out")
    if args.warm_up is not None and args.start is None:
        raise UsageError("--warm-up is for what lies before --start, which is not given")


# --- decoders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    decoder: Decoder
    identity: dict[str, Any]
    maybe_stream: tuple[Runtime, SeekingDecoder] | None = None  # where the decoder can begin in the middle


def _load(args: argparse.Namespace) -> _Loaded:
    from mossnano_stdio import codecs
    from mossnano_stdio.weights import find_weights, load_bundle

    bundle = load_bundle(find_weights(args.weights))
    if bundle.demo:
        _say("these are the built-in demo weights: a small synthesiser, not the codec")
    if args.decoder == "full":
        full = codecs.load_full_decoder(bundle, provider=args.provider, threads=args.threads)
        return _Loaded(
            _AtOnce(full.format, full.decode),
            _identity(bundle, "decode_full", bundle.graph("decode_full").precision, full.engine),
        )
    runtime = codecs.load_runtime(
        bundle, provider=args.provider, threads=args.threads, graph=args.graph, precision=args.precision
    )
    decoder = runtime.new_decoder()
    return _Loaded(
        decoder, _identity(bundle, runtime.graph_name, runtime.precision, runtime.engine), (runtime, decoder)
    )


def _identity(bundle: Bundle, graph: str, precision: str, engine: Engine) -> dict[str, Any]:
    return {
        "weights": str(bundle.folder),
        "demo": bundle.demo,
        "graph": graph,
        "precision": precision,
        "provider": engine.provider,
        "threads": engine.threads,
    }


class _AtOnce:
    """A Decoder that decodes its whole stream in one chunk."""

    decodes_prefix = False

    def __init__(self, codec_format: CodecFormat, decode: Callable[[Any], Any]) -> None:
        self.format = codec_format
        self.step = decode

    def reset(self) -> None:
        """Does nothing: no state is kept between streams."""


class _ChunkDecoder:
    """Decodes the chunks that encodec-rs cut, one after the other, each by itself and to its length."""

    decodes_prefix = True

    def __init__(self, decoder: Any, layout: PackedLayout, lost: Set[int]) -> None:
        self.format: CodecFormat = decoder.format
        self.segment_stride = layout.stride
        self._decoder, self._layout, self._lost = decoder, layout, lost
        self._number = 0

    def decode_segment(self, codes: Codes, scale: float) -> Audio:
        number, samples = self._number, self._layout.samples_of(self._number)
        self._number += 1
        if number in self._lost:
            return np.zeros((samples, self.format.channels), np.float32)
        if isinstance(self._decoder, SegmentingDecoder):
            audio = self._decoder.decode_segment(codes, scale)
        else:
            chunks = DecodingChunks(self._decoder, Fixed(len(codes)))
            chunks.reset()
            chunks.push(codes)
            chunks.finish()
            audio = np.float32(scale) * np.concatenate([chunk.audio for chunk in chunks.finite_chunks()])
        context_samples = self._layout.context_samples
        return audio[context_samples : context_samples + samples]

    def reset(self) -> None:
        self._number = 0


# --- what is asked for --------------------------------------------------------------------------------------------


def _up_to_zeros(artifact: Artifact, frame_samples: int) -> Artifact:
    frames = frames_before_zeros(artifact.codes)
    samples = min(artifact.original_samples, frames * frame_samples)
    return replace(artifact, codes=artifact.codes[:frames], frames=frames, original_samples=samples)


@dataclass(frozen=True)
class _Part:
    """What to decode. Of its samples the first `skipped_samples` are left out, the next `samples` written."""

    segments: Sequence[EcdcSegment]  # of a codec that has none: one
    skipped_samples: int
    samples: int

    @property
    def frames(self) -> int:
        return sum(len(segment.codes) for segment in self.segments)


def _segment_part(args: argparse.Namespace, recording: Artifact | Ecdc, decoder: SegmentingDecoder) -> _Part:
    """From the recording's start on, as the first segment decides how the others fade."""
    if isinstance(recording, Artifact):
        raise ArtifactError(SCALES_NEEDED)
    for name in ("chunk_frames", "chunk_seconds", "warm_up", "stop_on_zero_frame"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} means nothing to a codec with segments; leave it out")
    samples = _samples(args, recording)
    needed = -(-samples.stop // decoder.segment_stride)
    return _Part(recording.segments[:needed], samples.start, len(samples))


def _samples(args: argparse.Namespace, recording: Artifact | Ecdc) -> range:
    """Those that --start and --duration ask for."""
    try:
        return sample_range(args.start or 0.0, args.duration, recording.original_samples, recording.sample_rate)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _seek(args: argparse.Namespace, artifact: Artifact, loaded: _Loaded) -> _Part:
    """Find the frames that --start and --duration ask for, and bring the decoder to the first of them."""
    if args.start is None and args.duration is None:
        return _Part([EcdcSegment(artifact.codes, None)], 0, artifact.original_samples)
    from mossnano_stdio.codecs import maybe_warm_up_frames, seek

    assert loaded.maybe_stream is not None  # see _check_flags
    runtime, decoder = loaded.maybe_stream
    codec_format = decoder.format
    samples = _samples(args, artifact)
    first_frame = samples.start // codec_format.frame_samples
    end_frame = -(-samples.stop // codec_format.frame_samples)
    first_frame = seek(decoder, artifact.codes, first_frame, maybe_warm_up_frames(runtime, args.warm_up))
    if first_frame < end_frame:  # how a stream begins, its first frames say together
        end_frame = max(end_frame, first_frame + first_chunk_frames_of(decoder))
    skipped_samples = samples.start - first_frame * codec_format.frame_samples
    return _Part([EcdcSegment(artifact.codes[first_frame:end_frame], None)], skipped_samples, len(samples))


# --- sound --------------------------------------------------------------------------------------------------------


def _render(
    decoding: DecodingChunks, part: _Part, write: Callable[[bytes], object], advance: Callable[[int], object]
) -> dict[str, Any]:
    """Decode and write all of the part; returns the facts of the summary."""
    started = time.perf_counter()
    maybe_first_audio_ms = None
    chunks = 0
    for segment in part.segments:
        decoding.push_segment(segment)
    decoding.finish(part.skipped_samples + part.samples)
    for chunk in decoding.finite_chunks():
        write(chunk.pcm)
        if maybe_first_audio_ms is None:
            maybe_first_audio_ms = 1000 * (time.perf_counter() - started)
        advance(chunk.frames)
        chunks += 1
    took_seconds = time.perf_counter() - started
    codec_format = decoding.decoder.format
    audio_seconds = part.frames / codec_format.frames_per_second
    return {
        "frames": part.frames,
        "seconds": part.samples / codec_format.sample_rate,
        "chunks": chunks,
        "decode_seconds": round(took_seconds, 6),
        "real_time_factor": round(audio_seconds / took_seconds, 2) if chunks else None,
        "first_audio_ms": round(maybe_first_audio_ms, 3) if maybe_first_audio_ms else None,
    }


def _sink(
    output: BinaryIO, name: str, artifact: Artifact | Ecdc, part: _Part
) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """Returns a function that writes PCM, and one to call after all of it."""
    skipped_bytes = part.skipped_samples * SAMPLE_BYTES * artifact.channels
    if not name.lower().endswith(WAV_SUFFIX):
        return _without_first(skipped_bytes, output.write), output.flush
    writer = WavWriter(output, artifact.sample_rate, artifact.channels, part.samples)
    return _without_first(skipped_bytes, writer.write), writer.finish


def _without_first(count: int, write: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """Returns a `write` that drops the first `count` bytes."""
    left = count

    def write_rest(data: bytes) -> None:
        nonlocal left
        skipped, left = min(left, len(data)), max(0, left - len(data))
        write(data[skipped:])

    return write_rest


def _seconds(text: str) -> float:
    """Any number of seconds from 0: the recording's length, an upper limit, is not known yet."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds from 0 is allowed")
    return seconds


def _say(line: str) -> None:
    print(f"mossnano decode: {line}", file=sys.stderr)
