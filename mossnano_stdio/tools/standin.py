"""A model of seeded random weights in the true shape, built to a weights folder: for tests and measurements.

nano has the published model's dimensions (21,969,664 parameters), tiny is small enough for quick tests. What it
says is noise, but every code, every cache entry and every joint counts. OUT_DIR can be given to --weights; its
checkpoint, as `mossnano build` reads it, lies in OUT_DIR/checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mossnano_stdio.errors import ExitStatus, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where to write it; created where needed")
    parser.add_argument("--size", choices=("nano", "tiny"), default="nano", help="its dimensions (default: nano)")
    parser.add_argument("--seed", type=_seed, default=0, help="other seeds are other weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    try:
        from mossnano_stdio.build.bundle import build_standin
    except ImportError as error:
        raise UsageError(
            f"building needs {error.name}, which is not installed: pip install 'mossnano-stdio[build]'"
        ) from None
    build_standin(args.folder, args.size, args.seed)
    print(args.folder)
    return ExitStatus.DONE


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)
