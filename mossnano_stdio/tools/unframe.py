"""Take the sound out of what mossnano-stdio answered.

OUT ends with .wav, or --wav is given: a WAV, with the numbers that the HANDSHAKE says. Else raw PCM, 16 bits,
little-endian, channels interleaved. It is passed on as it comes, so this may stand in a live pipe:

`mossnano-stdio < tokens | mossnano unframe --wav | aplay`

ERROR messages are told on stderr, and the status is 65 if there were any. A stream that is cut has status 65 too: then
no file is left, but stdout has got all that was whole.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, BinaryIO

from mossnano_stdio.errors import ExitStatus, InputError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output
from mossnano_stdio.pcm import WavWriter
from mossnano_stdio.protocol import Kind, MessageReader, parse_json
from mossnano_stdio.tokens import SAMPLE_BYTES
from mossnano_stdio.weights import NANO

PIECE_BYTES = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stream", nargs="?", default=STANDARD_STREAM, metavar="IN", help="default: stdin")
    parser.add_argument("sound", nargs="?", default=STANDARD_STREAM, metavar="OUT", help="default: stdout")
    parser.add_argument("--wav", action="store_true", help="a WAV, whatever OUT is called")


def run(args: argparse.Namespace) -> int:
    is_wav = args.wav or args.sound.lower().endswith(".wav")
    reader = MessageReader()
    error_count = 0
    with open_input(args.stream) as stream, open_output(args.sound) as output:
        sound = _Sound(output, is_wav)
        while piece := stream.read1(PIECE_BYTES):
            for message in reader.feed(piece):
                match message.kind:
                    case Kind.HANDSHAKE:
                        sound.agree(parse_json(message))
                    case Kind.AUDIO:
                        sound.write(message.payload)
                    case Kind.ERROR:
                        error_count += 1
                        error = parse_json(message)
                        where = "" if error.get("stream") is None else f" in stream {error['stream']}"
                        _say(f"ERROR{where}: {error.get('code')}: {error.get('message')}")
            output.flush()
        if reader.incomplete_bytes:
            raise InputError(f"the stream is cut inside a message: {reader.incomplete_bytes} bytes of it are there")
        sound.finish()
    return ExitStatus.BAD_INPUT if error_count else ExitStatus.DONE


class _Sound:
    """Writes PCM in the form that was asked for."""

    def __init__(self, output: BinaryIO, is_wav: bool) -> None:
        self._output = output
        self._is_wav = is_wav
        self._maybe_said: tuple[int, int] | None = None  # sample_rate and channels, as the HANDSHAKE has them
        self._maybe_writer: WavWriter | None = None

    def agree(self, handshake: dict[str, Any]) -> None:
        sample_rate, channels = handshake.get("sample_rate"), handshake.get("channels")
        if type(sample_rate) is not int or type(channels) is not int or min(sample_rate, channels) < 1:
            raise InputError(
                f"the HANDSHAKE says sample_rate {sample_rate!r} and channels {channels!r}, "
                "allowed are whole numbers above 0"
            )
        if self._maybe_said not in (None, (sample_rate, channels)):
            raise InputError(
                f"the stream changes from {self._maybe_said} to {(sample_rate, channels)} (sample_rate, channels): "
                "one file holds one of them"
            )
        self._maybe_said = sample_rate, channels

    def write(self, pcm: bytes) -> None:
        channels = self._maybe_said[1] if self._maybe_said else NANO.channels
        if len(pcm) % (SAMPLE_BYTES * channels):
            raise InputError(f"AUDIO of {len(pcm)} bytes is no whole number of samples of {channels} channels")
        if self._is_wav:
            self._writer().write(pcm)
        else:
            self._output.write(pcm)

    def finish(self) -> None:
        if self._is_wav:
            self._writer().finish()

    def _writer(self) -> WavWriter:
        if self._maybe_writer is None:
            if self._maybe_said is None:
                _say(f"no HANDSHAKE came: {NANO.sample_rate} Hz and {NANO.channels} channels are assumed")
            self._maybe_writer = WavWriter(self._output, *(self._maybe_said or (NANO.sample_rate, NANO.channels)))
        return self._maybe_writer


def _say(line: str) -> None:
    """Print one line; letters of a peer that are not printable, line ends among them, become spaces."""
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    print(f"mossnano unframe: {shown}", file=sys.stderr)
