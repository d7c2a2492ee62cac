"""Play an artifact, the output of mossnano-stdio, an audio file, or raw PCM, live.

  mossnano play speech.mossnano
  mossnano-stdio < in.bin | mossnano play -
  mossnano-stdio --output raw < in.bin | mossnano play --raw -

What PATH is, is told by its first bytes; `-` is stdin. Sound starts when --prebuffer-ms of it are there. An underrun,
which is PCM that comes late, puts in silence, loses nothing, and waits for twice as much before it goes on. What is
left of a stream that was cancelled is dropped. Ctrl-C stops at once.

Status 65: the input was cut or malformed, or held an ERROR; what could be played was. 69: no sound device, or it was
lost while playing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Final

from mossnano_stdio.errors import ExitStatus, MossnanoError, UsageError
from mossnano_stdio.facts import as_json, as_table
from mossnano_stdio.files import STANDARD_STREAM, open_input
from mossnano_stdio.logs import log, start_logging, write_stderr
from mossnano_stdio.playback import (
    ALL,
    DEFAULT_LATENCY_MS,
    DEFAULT_PREBUFFER_MS,
    MAX_VOLUME,
    Latency,
    Player,
    output_devices,
)
from mossnano_stdio.sources import Decoding, Pcm, Source, StreamEnd, open_raw, open_source

LONGEST_WAIT_MS: Final = 60_000
PROGRESS_SECONDS: Final = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", nargs="?", default=STANDARD_STREAM, help="what to play (default: stdin)"
    )
    parser.add_argument("--device", metavar="D", help="its index, or a part of its name that no other has")
    parser.add_argument("--list-devices", action="store_true", help="say what can be played on, and end")
    parser.add_argument("--json", action="store_true", help="--list-devices as JSON")
    parser.add_argument(
        "--prebuffer-ms",
        type=_prebuffer_ms,
        default=DEFAULT_PREBUFFER_MS,
        metavar="MS|all",
        help="how much must be there before sound starts; all: everything (default: %(default)g)",
    )
    parser.add_argument(
        "--latency",
        type=_latency,
        default=DEFAULT_LATENCY_MS,
        metavar="MS|low|high",
        help="the device's own buffer; low and high are what its driver proposes (default: %(default)g)",
    )
    parser.add_argument(
        "--volume", type=float, default=1.0, metavar="V", help=f"0 to {MAX_VOLUME:g}, 1 is as it is (default: 1)"
    )
    parser.add_argument("--stats", action="store_true", help="one line of JSON on stderr at the end")
    raw = parser.add_argument_group("raw PCM, 16 bits, little-endian, channels interleaved")
    raw.add_argument("--raw", action="store_true", help="take the input as that, whatever its first bytes are")
    raw.add_argument("--sample-rate", type=int, default=48_000, metavar="HZ", help="(default: %(default)s)")
    raw.add_argument("--channels", type=int, default=2, metavar="N", help="(default: %(default)s)")
    decoding = parser.add_argument_group("decoding of artifacts")
    decoding.add_argument("--weights", metavar="DIR|demo", help="a weights folder, or the built-in demo")
    decoding.add_argument("--threads", type=int, metavar="N", help="of one decode step")
    decoding.add_argument("--provider", default="cpu", metavar="P", help="where the graph runs (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.list_devices:
        _list_devices(args.json)
        return ExitStatus.DONE
    if args.json:
        raise UsageError("--json says in which form to --list-devices, so it needs that")
    start_logging("mossnano play", "warning", as_json=False)
    name = "stdin" if args.path == STANDARD_STREAM else args.path
    with open_input(args.path) as file:
        if args.raw:
            source = open_raw(file, name, args.sample_rate, args.channels)
        else:
            source = open_source(file, name, Decoding(args.weights, args.threads, args.provider))
        return _play(source, args)


def _list_devices(as_one_json: bool) -> None:
    devices = output_devices()
    if as_one_json:
        print(as_json({"devices": [asdict(device) for device in devices]}))
    else:
        print("\n\n".join(as_table(asdict(device)) for device in devices))


def _play(source: Source, args: argparse.Namespace) -> int:
    status = ExitStatus.DONE
    player = Player(
        source.sample_rate,
        source.channels,
        device=args.device if args.device is None or not args.device.isdigit() else int(args.device),
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
                    case StreamEnd(is_cancelled=True):
                        player.flush()
                    case StreamEnd():
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
    """Where playing is, rewritten ten times a second where stderr is a terminal. Log lines take its place."""

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
        minutes, seconds = divmod(self._player.position_samples / self._player.sample_rate, 60)
        underruns = self._player.underruns
        return f"{minutes:.0f}:{seconds:04.1f}  buffer {self._player.buffered_ms:4.0f} ms  underruns {underruns}"


# --- the command line --------------------------------------------------------------------------------------------


def _prebuffer_ms(text: str) -> float:
    return ALL if text == "all" else _milliseconds(text)


def _latency(text: str) -> Latency:
    match text:
        case "low":
            return "low"
        case "high":
            return "high"
        case _:
            return _milliseconds(text)


def _milliseconds(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 <= milliseconds <= LONGEST_WAIT_MS:
        raise argparse.ArgumentTypeError(f"{text!r}: milliseconds are allowed, 0 to {LONGEST_WAIT_MS}")
    return milliseconds
