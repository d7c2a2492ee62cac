"""A model of seeded random weights in the true shape, built to a weights folder: for tests and measurements.

The true size has the published model's dimensions (nano: 21,969,664 parameters; 24k: 1,774,566,400, which are 7 GB on
disk and 14 GB once all graphs are built; v2: 2,123,701,248); tiny is small enough for quick tests. What it says is
noise, but every code, every cache entry and every joint counts. OUT_DIR can be given to --weights; its checkpoint, as
`mossnano build` reads it, lies in OUT_DIR/checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.weights import MODELS, UNPINNED_MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where to write it; created where needed")
    parser.add_argument(
        "--model", choices=(*MODELS, *UNPINNED_MODELS), default="nano", help="whose shape it has (default: nano)"
    )
    parser.add_argument(
        "--size", choices=("true", "tiny", "nano"), help="default: nano's true size, tiny of all others; nano: its true"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="other seeds are other weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    try:
        from mossnano_stdio.build.bundle import build_standin
    except ImportError as error:
        raise UsageError(
            f"building needs {error.name}, which is not installed: pip install 'mossnano-stdio[build]'"
        ) from None
    if args.size == "nano" and args.model != "nano":
        raise UsageError(f"--size nano is a size of --model nano, allowed for {args.model} are true and tiny")
    by_default = "true" if args.model == "nano" else "tiny"
    size = "true" if args.size == "nano" else args.size or by_default
    build_standin(args.folder, size, args.seed, model=args.model)
    print(args.folder)
    return ExitStatus.DONE


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)
