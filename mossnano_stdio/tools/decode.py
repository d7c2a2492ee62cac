"""Decode an artifact to a file.

  OUT.wav     a WAV
  OUT         anything else, `-` (stdout) too: raw PCM, 16 bits, little-endian, channels interleaved

The sound is trimmed to the recording's original length, and for equal chunks it is what mossnano-stdio gives, byte for
byte. Without --chunk-frames or --chunk-seconds chunks grow as in mossnano-stdio: 1, 2, 4, 8, 8, ... frames.
`--decoder full` runs the whole artifact at once through decode_full, the reference; it needs memory with the square
of the length, and is refused where that is not there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from mossnano_stdio.container import Artifact, load_artifact
from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.facts import as_json
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output
from mossnano_stdio.layout import CodecFormat
from mossnano_stdio.options import add_chunk_arguments, add_decoder_arguments, chosen_schedule
from mossnano_stdio.pcm import WavWriter
from mossnano_stdio.renderer import Decoder, Renderer
from mossnano_stdio.schedule import Fixed, Schedule

if TYPE_CHECKING:
    from mossnano_stdio.bundle import Bundle
    from mossnano_stdio.codec import Engine

WAV_SUFFIX = ".wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="IN", help="a .mossnano file")
    parser.add_argument("sound", metavar="OUT", help="where the sound goes; its name says the form")
    parser.add_argument("--decoder", choices=("step", "full"), default="step", help="(default: step)")
    add_chunk_arguments(parser)
    add_decoder_arguments(parser)
    parser.add_argument("--json", action="store_true", help="a summary as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    _check_flags(args)
    with open_input(args.artifact) as file:
        artifact = load_artifact(file, "stdin" if args.artifact == STANDARD_STREAM else args.artifact)
    loaded = _load(args)
    artifact.check_fits(loaded.decoder.format, loaded.decoder.decodes_prefix)
    renderer = Renderer(loaded.decoder, _schedule(args, artifact, loaded.decoder.format))
    with open_output(args.sound) as output, _progress(artifact.frames) as advance:
        write, finish = _sink(output, args.sound, artifact)
        facts = _render(renderer, artifact, write, advance)
        finish()
    if args.json:
        print(as_json(facts | loaded.identity))
    else:
        _say(f"{args.sound}: {facts['seconds']:.2f} s, decoded {facts['real_time_factor'] or 0:.1f} x real time")
    return ExitStatus.DONE


def _check_flags(args: argparse.Namespace) -> None:
    if args.json and args.sound == STANDARD_STREAM:
        raise UsageError("--json and the sound both want stdout; give the sound a file")
    if args.decoder == "full" and (args.chunk_frames or args.chunk_seconds or args.graph):
        raise UsageError("--decoder full has no chunks and no other graph; leave those flags out")


# --- decoders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    decoder: Decoder
    identity: dict[str, Any]


def _load(args: argparse.Namespace) -> _Loaded:
    from mossnano_stdio import codec
    from mossnano_stdio.bundle import find_weights, load_bundle

    bundle = load_bundle(find_weights(args.weights))
    if bundle.demo:
        _say("these are the built-in demo weights: a small synthesiser, not the codec")
    if args.decoder == "full":
        full = codec.load_full_decoder(bundle, provider=args.provider, threads=args.threads)
        return _Loaded(_AtOnce(full.format, full.decode), _identity(bundle, "decode_full", full.engine))
    runtime = codec.load_runtime(bundle, provider=args.provider, threads=args.threads, graph=args.graph)
    return _Loaded(runtime.new_decoder(), _identity(bundle, runtime.graph_name, runtime.engine))


def _identity(bundle: Bundle, graph: str, engine: Engine) -> dict[str, Any]:
    return {
        "weights": str(bundle.folder),
        "demo": bundle.demo,
        "graph": graph,
        "provider": engine.provider,
        "threads": engine.threads,
    }


class _AtOnce:
    """A Decoder whose only chunk is all of its stream."""

    decodes_prefix = False

    def __init__(self, codec_format: CodecFormat, decode: Callable[[Any], Any]) -> None:
        self.format = codec_format
        self.step = decode

    def reset(self) -> None:
        """There is nothing to forget."""


def _schedule(args: argparse.Namespace, artifact: Artifact, codec_format: CodecFormat) -> Schedule:
    if args.decoder == "full":
        return Fixed(max(1, artifact.frames))
    return chosen_schedule(args, codec_format.frames_per_second)


# --- sound --------------------------------------------------------------------------------------------------------


def _render(
    renderer: Renderer, artifact: Artifact, write: Callable[[bytes], object], advance: Callable[[int], object]
) -> dict[str, Any]:
    """Decode all of it; the facts of the summary."""
    started = time.perf_counter()
    maybe_first_audio_ms = None
    chunks = 0
    renderer.push(artifact.codes)
    renderer.finish(artifact.original_samples)
    while chunk := renderer.render():
        if chunk.error:
            raise chunk.error
        write(chunk.pcm)
        if maybe_first_audio_ms is None:
            maybe_first_audio_ms = 1000 * (time.perf_counter() - started)
        advance(chunk.frames)
        chunks += 1
    took_seconds = time.perf_counter() - started
    audio_seconds = artifact.frames / renderer.decoder.format.frames_per_second
    return {
        "frames": artifact.frames,
        "seconds": artifact.duration_seconds,
        "chunks": chunks,
        "decode_seconds": round(took_seconds, 6),
        "real_time_factor": round(audio_seconds / took_seconds, 2) if chunks else None,
        "first_audio_ms": round(maybe_first_audio_ms, 3) if maybe_first_audio_ms else None,
    }


def _sink(output: BinaryIO, name: str, artifact: Artifact) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """How PCM is written, and what is to be done when all of it was."""
    if not name.lower().endswith(WAV_SUFFIX):
        return output.write, output.flush
    writer = WavWriter(output, artifact.sample_rate, artifact.channels, artifact.original_samples)
    return writer.write, writer.finish


@contextmanager
def _progress(frames: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal's stderr, where tqdm is installed; elsewhere nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _: None
        return
    with tqdm(total=frames, unit="frame", leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def _say(line: str) -> None:
    print(f"mossnano decode: {line}", file=sys.stderr)
