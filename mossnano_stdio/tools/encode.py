"""Encode a recording to an artifact.

IN is a WAV, FLAC, OGG, MP3 or whatever else soundfile reads (without soundfile: a WAV of whole numbers); `-` is stdin.
Other sample rates are resampled, and one channel goes to all. How long the recording was is kept in the artifact.

OUT.ecdc is a file of EnCodec's own tool, for EnCodec's weights; those of 48 kHz write nothing else. Any other name is
that of a .mossnano.

With a streaming encoder, which `mossnano build` makes, a recording of any length takes the same memory. The official
graph encodes recordings as a whole and needs memory with the square of their length: 5 GB for 20 seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ExitStatus, InputError, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output
from mossnano_stdio.pcm.recordings import Sound, read_sound, resampled
from mossnano_stdio.process.flags import add_engine_arguments, whole_number
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.tokens.arrays import HIGHEST_RATE, LOWEST_RATE
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcHeader, EcdcSegment, build_ecdc, ecdc_model_of
from mossnano_stdio.tools.facts import as_json, progress_bar

if TYPE_CHECKING:
    from mossnano_stdio.codecs import EncoderRuntime, FrameGraphEncoder, FullEncoder, SegmentEncoder

    AnyEncoder = EncoderRuntime | FullEncoder | SegmentEncoder | FrameGraphEncoder

ECDC_SUFFIX = ".ecdc"
MONO = 1
MOST_QUANTIZERS = 1024

Audio = NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sound", metavar="IN", help="the recording")
    parser.add_argument("artifact", metavar="OUT", help="where the artifact goes, OUT.mossnano or OUT.ecdc")
    parser.add_argument(
        "--quantizers", type=whole_number(1, MOST_QUANTIZERS), metavar="N", help="keep only the first N (all)"
    )
    parser.add_argument("--weights", metavar="DIR", help="a weights folder")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="a summary as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    if args.json and args.artifact == STANDARD_STREAM:
        raise UsageError("--json and the artifact both want stdout; give the artifact a file")
    name = "stdin" if args.sound == STANDARD_STREAM else args.sound
    with open_input(args.sound) as file:
        sound = read_sound(file, name)
        encoder = _load(args, sound, name)
        quantizers = args.quantizers or encoder.format.quantizers
        build = _builder(args, encoder)
        started = time.perf_counter()
        channels = encoder.format.channels
        with progress_bar(round(sound.samples / sound.sample_rate, 1), "s") as advance:
            # a single channel goes to all
            wide = (np.broadcast_to(block, (len(block), channels)) for block in _followed_blocks(sound, advance))
            at_rate = resampled(wide, channels, sound.sample_rate, encoder.format.sample_rate)
            encoded = _encode(encoder, at_rate, quantizers)
        took_seconds = time.perf_counter() - started
    data = build(encoded)
    with open_output(args.artifact) as output:
        output.write(data)
    facts = _facts(encoded, encoder, took_seconds, len(data))
    if args.json:
        print(as_json(facts))
    else:
        figures = f"{facts['seconds']:.2f} s, encoded {facts['real_time_factor'] or 0:.1f} x real time"
        print(f"mossnano encode: {args.artifact}: {figures}", file=sys.stderr)
    return ExitStatus.DONE


def _builder(args: argparse.Namespace, encoder: AnyEncoder) -> Callable[[Artifact | Ecdc], bytes]:
    """What makes the file of a recording; raise where it cannot hold what this encoder gives."""
    is_segmenting = hasattr(encoder, "encode_segment")
    if args.artifact.lower().endswith(ECDC_SUFFIX):
        model_name = ecdc_model_of(encoder.format)

        def build(recording: Artifact | Ecdc) -> bytes:
            if isinstance(recording, Ecdc):
                return build_ecdc(recording)
            header = EcdcHeader(model_name, recording.original_samples, recording.quantizers)
            return build_ecdc(Ecdc(header, [EcdcSegment(recording.codes, maybe_scale=None)]))

        return build
    if is_segmenting:
        raise UsageError(
            f"{args.artifact}: this codec gives each second of sound a scale, which an .ecdc alone holds; name it "
            f"OUT{ECDC_SUFFIX}"
        )
    return lambda recording: build_artifact(cast(Artifact, recording))


def _encode(encoder: AnyEncoder, blocks: Iterator[Audio], quantizers: int) -> Artifact | Ecdc:
    from mossnano_stdio.chunks import encode_segments
    from mossnano_stdio.codecs import FrameGraphEncoder, SegmentEncoder
    from mossnano_stdio.library import encode_blocks

    if not isinstance(encoder, SegmentEncoder | FrameGraphEncoder):
        return encode_blocks(encoder, blocks, quantizers).artifact
    segments, samples = [], 0
    for segment, added_samples in encode_segments(encoder, blocks):
        segments.append(replace(segment, codes=segment.codes[:, :quantizers]))
        samples += added_samples
    return Ecdc(EcdcHeader(ecdc_model_of(encoder.format), samples, quantizers), segments)


def _load(args: argparse.Namespace, sound: Sound, name: str) -> AnyEncoder:
    """Load the encoder; refuse a recording it cannot take, and more quantizers than it has."""
    from mossnano_stdio.codecs import load_encoder, load_segment_encoder
    from mossnano_stdio.weights import find_weights, load_bundle

    bundle = load_bundle(find_weights(args.weights))
    if sound.channels not in (MONO, bundle.format.channels):
        raise InputError(
            f"{name} has {sound.channels} channels, allowed are 1 and {bundle.format.channels}; mix it down first"
        )
    if not LOWEST_RATE <= sound.sample_rate <= HIGHEST_RATE:
        raise InputError(f"{name} has {sound.sample_rate} Hz, allowed are {LOWEST_RATE} to {HIGHEST_RATE}")
    if args.quantizers and args.quantizers > bundle.format.quantizers:
        raise UsageError(f"--quantizers is {args.quantizers}, these weights have {bundle.format.quantizers}")
    load = load_segment_encoder if bundle.has_graph("encode_segment") else load_encoder
    return load(bundle, provider=args.provider, threads=args.threads)


def _followed_blocks(sound: Sound, advance: Callable[[float], object]) -> Iterator[Audio]:
    """Passes the blocks on and reports the seconds of each once it has been encoded."""
    for block in sound.blocks:
        yield block
        advance(len(block) / sound.sample_rate)


def _facts(encoded: Artifact | Ecdc, encoder: AnyEncoder, took_seconds: float, file_bytes: int) -> dict[str, Any]:
    frames, quantizers = encoded.codes.shape
    seconds = encoded.original_samples / encoded.sample_rate
    return {
        "frames": frames,
        "seconds": seconds,
        "original_samples": encoded.original_samples,
        "quantizers": quantizers,
        "file_bytes": file_bytes,
        "encode_seconds": round(took_seconds, 6),
        "real_time_factor": round(seconds / took_seconds, 2) if frames else None,
        "weights": str(encoder.bundle.folder),
        "graph": encoder.graph_name,
        "provider": encoder.engine.provider,
        "threads": encoder.engine.threads,
    }
