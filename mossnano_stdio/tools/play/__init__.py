"""Play an artifact, the output of mossnano-stdio, an audio file, or raw PCM, live.

  mossnano play speech.mossnano
  mossnano-stdio < in.bin | mossnano play -
  mossnano-stdio --output raw < in.bin | mossnano play --raw -

What PATH is, is told by its first bytes; `-` is stdin. Numbered streams are mixed, each from where the others are when
its first sound comes; --stream N plays one of them. Sound starts when --prebuffer-ms of it are there. An underrun,
which is PCM that comes late, puts in silence, loses nothing, and waits for twice as much before it goes on. What is
left of a stream that was cancelled is dropped, in a mix what is not mixed yet. Ctrl-C stops at once.

Status 65: the input was cut or malformed, or held an ERROR; what could be played was. 69: no sound device, or it was
lost while playing.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Final

from mossnano_stdio.errors import ExitStatus, MossnanoError, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input
from mossnano_stdio.playback import OutputDevice, Player, output_devices
from mossnano_stdio.process.flags import add_decoder_arguments, add_player_arguments, whole_number
from mossnano_stdio.process.logs import log, start_logging, write_stderr
from mossnano_stdio.protocol import MAX_NUMBER
from mossnano_stdio.tools.facts import as_json
from mossnano_stdio.tools.play.sources import Decoding, EndOfStream, Pcm, Source, open_raw, open_source
from mossnano_stdio.weights import MODELS

PROGRESS_SECONDS: Final = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", nargs="?", default=STANDARD_STREAM, help="what to play (default: stdin)"
    )
    parser.add_argument(
        "--list-devices", action="store_true", help="say what can be played on (*: the default), and end"
    )
    parser.add_argument("--json", action="store_true", help="--list-devices as JSON")
    parser.add_argument("--stream", type=whole_number(0, MAX_NUMBER), metavar="N", help="only the numbered stream N")
    add_player_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="one line of JSON on stderr at the end")
    raw = parser.add_argument_group("raw PCM, 16 bits, little-endian, channels interleaved")
    raw.add_argument("--raw", action="store_true", help="take the input as that, whatever its first bytes are")
    raw.add_argument("--model", choices=MODELS, default="nano", help="which codec made it (default: nano)")
    raw.add_argument("--sample-rate", type=int, metavar="HZ", help="(default: the model's)")
    raw.add_argument("--channels", type=int, metavar="N", help="(default: the model's)")
    decoding = parser.add_argument_group("decoding of artifacts")
    add_decoder_arguments(decoding)


def run(args: argparse.Namespace) -> int:
    if args.list_devices:
        devices = output_devices()
        if args.json:
            print(as_json({"devices": [asdict(device) for device in devices]}))
        else:
            print(*map(_device_row, devices), sep="\n")
        return ExitStatus.DONE
    if args.json:
        raise UsageError("--json says in which form to --list-devices, so it needs that")
    if args.path == STANDARD_STREAM and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("stdin is a terminal: name a PATH, or pipe something in")
    if args.raw and args.stream is not None:
        raise UsageError("--raw is one stream without a number: leave --stream out")
    start_logging("mossnano play", "warning", as_json=False)
    name = "stdin" if args.path == STANDARD_STREAM else args.path
    with open_input(args.path) as file:
        if args.raw:
            model = MODELS[args.model].format
            sample_rate = model.sample_rate if args.sample_rate is None else args.sample_rate
            channels = model.channels if args.channels is None else args.channels
            source = open_raw(file, name, sample_rate, channels)
        else:
            decoding = Decoding(args.weights, args.threads, args.provider, args.graph, args.precision)
            source = open_source(file, name, decoding, args.stream)
        return _play(source, args)


def _device_row(device: OutputDevice) -> str:
    mark = "*" if device.is_default else " "
    facts = f"{device.host_api}, {device.channels} channels, {device.sample_rate} Hz"
    return f"{mark} {device.index:>3}  {device.name}  ({facts})"


def _play(source: Source, args: argparse.Namespace) -> int:
    status = ExitStatus.DONE
    player = Player(
        source.sample_rate,
        source.channels,
        device=args.device,
        prebuffer_ms=args.prebuffer_ms,
        latency=args.latency,
        volume=args.volume,
    )
    try:
        with player, _ProgressLine(player):
            for event in source.events:
                match event:
                    case Pcm(pcm, since):
                        player.push(pcm, since=since)
                    case EndOfStream(is_cancelled=True, keeps_ended=keeps_ended):
                        player.flush(keeps_ended)
                    case EndOfStream():
                        player.end_stream()
                    case MossnanoError():
                        log.error("%s", event)
                        status = status or event.exit_status
            player.finish()
    finally:
        if args.stats:
            write_stderr(json.dumps(player.stats()))
    return status


class _ProgressLine:
    """Rewrites a line with the position ten times a second where stderr is a terminal, and clears it for log lines."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rewrite, name="mossnano-progress", daemon=True)
        self._is_shown = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> None:
        if self._is_shown:
            log.addFilter(self._clear)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown:
            self._over.set()
            self._thread.join()
            log.removeFilter(self._clear)
            print(f"\r\x1b[K{self._text()}", file=sys.stderr, flush=True)

    def _rewrite(self) -> None:
        while not self._over.wait(PROGRESS_SECONDS):
            print(f"\r\x1b[K{self._text()}", end="", file=sys.stderr, flush=True)

    def _clear(self, record: object) -> bool:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return True

    def _text(self) -> str:
        minutes, seconds = divmod(round(self._player.position_samples / self._player.sample_rate, 1), 60)
        underruns = self._player.underruns
        return f"{minutes:.0f}:{seconds:04.1f}  buffer {self._player.buffered_ms:4.0f} ms  underruns {underruns}"
