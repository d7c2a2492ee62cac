"""Encode a recording and decode it again in one go: what the codec makes of it.

IN is what `mossnano encode` takes, OUT.wav a WAV, any other name raw PCM (16 bits, little-endian, interleaved); `-` is
stdin or stdout. The sound comes back as long as it was, at the codec's rate and with its channels.

It says how long both are, the bit rate of the codes, how long encoding and decoding took, and how loud the recording is
against what differs (SNR). A codec makes sound that sounds alike, not samples that are alike: an SNR of a few dB, or
below zero, is what good ones have. It tells whether two runs, or two numbers of quantizers, do the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ExitStatus, InputError, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output
from mossnano_stdio.pcm import WavWriter, pcm16_samples
from mossnano_stdio.pcm.comparison import compare_recordings
from mossnano_stdio.pcm.recordings import Recording, blocks_for, read_sound
from mossnano_stdio.process.flags import add_engine_arguments, whole_number
from mossnano_stdio.tokens import Artifact
from mossnano_stdio.tokens.ecdc import Ecdc
from mossnano_stdio.tools.facts import as_json, as_table

if TYPE_CHECKING:
    from mossnano_stdio.weights import Bundle

Audio = NDArray[np.float32]

MOST_QUANTIZERS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sound", metavar="IN", help="the recording")
    parser.add_argument("again", metavar="OUT", help="where the sound goes; its name says the form")
    parser.add_argument(
        "--quantizers", type=whole_number(1, MOST_QUANTIZERS), metavar="N", help="use only the first N (all)"
    )
    parser.add_argument("--weights", metavar="DIR", help="a weights folder")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from mossnano_stdio.codecs import load_recording_encoder
    from mossnano_stdio.library import encode_recording
    from mossnano_stdio.weights import find_weights, load_bundle

    if args.json and args.again == STANDARD_STREAM:
        raise UsageError("--json and the sound both want stdout; give the sound a file")
    bundle = load_bundle(find_weights(args.weights))
    if args.quantizers and args.quantizers > bundle.format.quantizers:
        raise UsageError(f"--quantizers is {args.quantizers}, these weights have {bundle.format.quantizers}")
    audio = _read(args.sound, bundle)
    encoder = load_recording_encoder(bundle, provider=args.provider, threads=args.threads)
    decode = _load_decode(args, bundle)
    started = time.perf_counter()
    recording = encode_recording(encoder, [audio], args.quantizers or bundle.format.quantizers)
    encoded = time.perf_counter()
    pcm = decode(recording)
    decoded = time.perf_counter()
    codec = bundle.format
    with open_output(args.again) as output:
        if args.again.lower().endswith(".wav"):
            writer = WavWriter(output, codec.sample_rate, codec.channels, len(pcm) // codec.sample_bytes)
            writer.write(pcm)
            writer.finish()
        else:
            output.write(pcm)
    facts = _facts(recording, audio, pcm, bundle) | {
        "encode_seconds": round(encoded - started, 6),
        "decode_seconds": round(decoded - encoded, 6),
    }
    if args.json:
        print(as_json(facts))
    else:
        print(as_table(facts), file=sys.stderr if args.again == STANDARD_STREAM else sys.stdout)
    return ExitStatus.DONE


def _read(path: str, bundle: Bundle) -> Audio:
    """The recording at the codec's rate, with its channels."""
    name = "stdin" if path == STANDARD_STREAM else path
    with open_input(path) as file:
        blocks = [*blocks_for(bundle.format, read_sound(file, name), name)]
    if not any(map(len, blocks)):
        raise InputError(f"{name} is empty: there is nothing to encode")
    return np.concatenate(blocks)


def _load_decode(args: argparse.Namespace, bundle: Bundle) -> Callable[[Artifact | Ecdc], bytes]:
    from mossnano_stdio.chunks import RAMP_MAX_FRAMES, Fixed, new_decoding_chunks, push_recording
    from mossnano_stdio.codecs import load_runtime

    runtime = load_runtime(bundle, provider=args.provider, threads=args.threads)
    chunks = new_decoding_chunks(runtime.new_decoder(), Fixed(RAMP_MAX_FRAMES))

    def decode(recording: Artifact | Ecdc) -> bytes:
        recording.check_fits(runtime.format, runtime.decodes_prefix)
        push_recording(chunks, recording)
        return b"".join(chunk.pcm for chunk in chunks.finite_chunks())

    return decode


def _facts(recording: Artifact | Ecdc, audio: Audio, pcm: bytes, bundle: Bundle) -> dict[str, Any]:
    codec = bundle.format
    again = Recording(codec.sample_rate, pcm16_samples(pcm, codec.channels))
    comparison = compare_recordings(Recording(codec.sample_rate, audio), again)
    frames, quantizers = recording.codes.shape
    seconds = len(audio) / codec.sample_rate
    return {
        "codec": bundle.name,
        "sample_rate": codec.sample_rate,
        "channels": codec.channels,
        "samples": len(audio),
        "samples_again": len(again.samples),
        "seconds": seconds,
        "frames": frames,
        "quantizers": quantizers,
        "bitrate_bps": frames * quantizers * codec.bits_per_code / seconds,
        "snr_db": round(comparison.snr_db, 3),
    }
