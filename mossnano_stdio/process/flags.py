"""Command-line flags that more than one program has, each declared once.

Rules of this room:

- A flag means the same, has the same default and refuses the same values wherever it stands.
- Nothing heavy is imported: `--help` needs neither numpy nor onnxruntime nor a sound card.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Final, Literal

from mossnano_stdio.chunks import (
    MAX_CHUNK_FRAMES,
    Fixed,
    Ramp,
    Schedule,
    frames_for_seconds,
)
from mossnano_stdio.errors import UsageError
from mossnano_stdio.files import open_input
from mossnano_stdio.pcm import (
    FORM_SETTINGS,
    LEAST_GAIN_DB,
    LEAST_SAMPLE_RATE,
    LEVELS_MS,
    MOST_GAIN_DB,
    MOST_SAMPLE_RATE,
    SAMPLE_FORMATS,
)
from mossnano_stdio.playback.defaults import LATENCY_MS, MAX_VOLUME, PREBUFFER_MS

MAX_CHUNK_SECONDS: Final = 80.0
LONGEST_WAIT_MS: Final = 60_000.0
INT8_DB: Final = 45.0
MOST_INT8_DB: Final = 200.0


Arguments = argparse._ActionsContainer  # a parser, or a group of one


def add_decoder_arguments(parser: Arguments) -> None:
    """Which weights, and what runs them."""
    parser.add_argument("--weights", metavar="DIR|demo", help="a weights folder, or the built-in demo")
    add_engine_arguments(parser)
    parser.add_argument("--graph", choices=("official", "fast"), help="which graph runs (fast where there is one)")
    parser.add_argument(
        "--precision",
        choices=("float32", "int8"),
        help="int8: the graph that `mossnano build --precision float32,int8` makes, smaller and quicker (float32)",
    )


def add_engine_arguments(parser: Arguments) -> None:
    """What graphs run on."""
    parser.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        metavar="N",
        help="of one step: 1 for each voice of a game; more shorten a lone voice's steps, and take CPUs from others "
        "(the CPUs we may use, at most 4)",
    )
    parser.add_argument(
        "--provider", default="cpu", metavar="P", help="cpu, cuda, tensorrt, coreml, directml or openvino (cpu)"
    )


def add_chunk_arguments(parser: argparse.ArgumentParser) -> None:
    """A fixed size of chunks, in one of two units."""
    chunk = parser.add_mutually_exclusive_group()
    chunk.add_argument("--chunk-frames", type=whole_number(1, MAX_CHUNK_FRAMES), metavar="N", help="chunks of N frames")
    chunk.add_argument(
        "--chunk-seconds", type=number_above_zero(MAX_CHUNK_SECONDS), metavar="S", help="the same, to whole frames"
    )


def add_sound_arguments(parser: Arguments) -> None:
    """In which form the sound leaves. None says that a flag was not given."""
    parser.add_argument(
        "--sample-rate",
        type=whole_number(LEAST_SAMPLE_RATE, MOST_SAMPLE_RATE),
        metavar="HZ",
        help="resample to so many samples a second (as the weights have it)",
    )
    parser.add_argument("--channels", type=whole_number(1, 2), metavar="N", help="1: their mean, or 2 (as the weights)")
    parser.add_argument("--sample-format", choices=SAMPLE_FORMATS, help="f32le is not clipped (s16le)")
    parser.add_argument(
        "--gain-db",
        type=number_between(LEAST_GAIN_DB, MOST_GAIN_DB),
        metavar="DB",
        help=f"louder or softer, {LEAST_GAIN_DB:g} to {MOST_GAIN_DB:g} (0)",
    )
    parser.add_argument(
        "--levels-ms",
        type=int,
        choices=LEVELS_MS,
        metavar="MS",
        help=f"say how loud each so many ms are: {', '.join(map(str, LEVELS_MS))} (0: do not)",
    )


SOUND_OPTIONS: Final = FORM_SETTINGS  # what add_sound_arguments adds


def chosen_schedule(
    options: argparse.Namespace, frames_per_second: float, new_ramp: Callable[[], Schedule] = Ramp
) -> Schedule:
    """What the chunk arguments say; without any, the live ramp."""
    if options.chunk_seconds is not None:
        return Fixed(frames_for_seconds(options.chunk_seconds, frames_per_second))
    if options.chunk_frames is not None:
        return Fixed(options.chunk_frames)
    return new_ramp()


def add_build_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """In which precisions the graph that decodes is built."""
    parser.add_argument(
        "--precision",
        choices=("float32", "float32,int8"),
        default="float32",
        metavar="WHICH",
        help="float32, or float32,int8: beside that graph one that does some layers in 8 bits (float32)",
    )
    parser.add_argument(
        "--int8-db",
        type=number_above_zero(MOST_INT8_DB),
        default=INT8_DB,
        metavar="DB",
        help="how far the noise of int8 must lie below the sound in the worst second (%(default)g)",
    )
    parser.add_argument(
        "--codes",
        action="append",
        default=[],
        metavar="FILE",
        help="with int8: recorded codes (.mossnano, .npy, .json, .u16le) that it must hold over, too; may be repeated",
    )


def check_build_precision(options: argparse.Namespace) -> None:
    if options.precision == "float32" and (options.codes or options.int8_db != INT8_DB):
        raise UsageError("--codes and --int8-db are for --precision float32,int8, which is not given")
    for path in options.codes:
        with open_input(path):  # it is there: said before the float32 graph is built, which may take minutes
            pass


def add_zero_frame_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop-on-zero-frame",
        action="store_true",
        help="a frame whose codes are all 0 ends its stream and is not decoded, as Sesame CSM means it",
    )


PLAYER_OPTIONS: Final = ("device", "prebuffer_ms", "latency", "volume")  # what add_player_arguments adds


def add_player_arguments(parser: Arguments) -> None:
    """What is played on, and how far ahead."""
    parser.add_argument("--device", metavar="D", help="its index, or a part of its name that no other has")
    parser.add_argument(
        "--prebuffer-ms",
        type=_prebuffer_ms,
        default=PREBUFFER_MS,
        metavar="MS|all",
        help="how much must be there before sound starts; all: everything (default: %(default)g)",
    )
    parser.add_argument(
        "--latency",
        type=_latency,
        default=LATENCY_MS,
        metavar="MS|low|high",
        help="the device's own buffer; low and high are what its driver proposes (default: %(default)g)",
    )
    parser.add_argument(
        "--volume",
        type=_volume,
        default=1.0,
        metavar="V",
        help=f"0 to {MAX_VOLUME:g}, 1 is as it is (default: 1)",
    )


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """An argument that is a whole number in a range.

    >>> whole_number(1, 1000)("17")
    17
    """

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number from {least} to {most} is allowed")
        return int(text)

    return parse


def number_above_zero(most: float) -> Callable[[str], float]:
    """An argument that is a number above 0.

    >>> number_above_zero(80)("1.333")
    1.333
    """

    def parse(text: str) -> float:
        number = _number(text)
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 and up to {most:g} is allowed")
        return number

    return parse


def number_between(least: float, most: float) -> Callable[[str], float]:
    """An argument that is a number in a range.

    >>> number_between(-60, 20)("-3.5")
    -3.5
    """

    def parse(text: str) -> float:
        number = _number(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {least:g} to {most:g} is allowed")
        return number

    return parse


def any_number(text: str) -> float:
    """An argument that is a number of any size. NaN is none: as a limit it would hold nothing, or everything.

    >>> any_number("-1.5")
    -1.5
    """
    number = _number(text)
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"{text!r}: a number is allowed")
    return number


def _prebuffer_ms(text: str) -> float:
    return math.inf if text == "all" else _milliseconds(text)


def _latency(text: str) -> Literal["low", "high"] | float:
    match text:
        case "low":
            return "low"
        case "high":
            return "high"
        case _:
            return _milliseconds(text)


def _milliseconds(text: str) -> float:
    milliseconds = _number(text)
    if not 0 <= milliseconds <= LONGEST_WAIT_MS:
        raise argparse.ArgumentTypeError(f"{text!r}: milliseconds are allowed, 0 to {LONGEST_WAIT_MS:g}")
    return milliseconds


def _volume(text: str) -> float:
    volume = _number(text)
    if not 0 <= volume <= MAX_VOLUME:
        raise argparse.ArgumentTypeError(f"{text!r}: a volume from 0 (silence) to {MAX_VOLUME:g} is allowed")
    return volume


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
