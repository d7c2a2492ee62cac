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
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output
from mossnano_stdio.pcm.recordings import blocks_for, read_sound
from mossnano_stdio.process.flags import add_engine_arguments, whole_number
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.tokens.ecdc import Ecdc, EcdcHeader, EcdcSegment, build_ecdc, ecdc_model_of
from mossnano_stdio.tools.facts import as_json, progress_bar

if TYPE_CHECKING:
    from mossnano_stdio.codecs import RecordingEncoder

ECDC_SUFFIX = ".ecdc"
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
    from mossnano_stdio.codecs import load_recording_encoder
    from mossnano_stdio.library import encode_recording
    from mossnano_stdio.weights import find_weights, load_bundle

    if args.json and args.artifact == STANDARD_STREAM:
        raise UsageError("--json and the artifact both want stdout; give the artifact a file")
    name = "stdin" if args.sound == STANDARD_STREAM else args.sound
    with open_input(args.sound) as file:
        sound = read_sound(file, name)
        bundle = load_bundle(find_weights(args.weights))
        codec = bundle.format
        blocks = blocks_for(codec, sound, name)
        if args.quantizers and args.quantizers > codec.quantizers:
            raise UsageError(f"--quantizers is {args.quantizers}, these weights have {codec.quantizers}")
        encoder = load_recording_encoder(bundle, provider=args.provider, threads=args.threads)
        build = _builder(args, encoder)
        started = time.perf_counter()
        with progress_bar(round(sound.samples / sound.sample_rate, 1), "s") as advance:
            followed = _followed_blocks(blocks, codec.sample_rate, advance)
            encoded = encode_recording(encoder, followed, args.quantizers or codec.quantizers)
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


def _builder(args: argparse.Namespace, encoder: RecordingEncoder) -> Callable[[Artifact | Ecdc], bytes]:
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


def _followed_blocks(blocks: Iterator[Audio], sample_rate: int, advance: Callable[[float], object]) -> Iterator[Audio]:
    """Passes the blocks on and reports the seconds of each once it has been encoded."""
    for block in blocks:
        yield block
        advance(len(block) / sample_rate)


def _facts(encoded: Artifact | Ecdc, encoder: RecordingEncoder, took_seconds: float, file_bytes: int) -> dict[str, Any]:
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
