"""A model of seeded random weights in the true shape, built to a weights folder: for tests and measurements.

nano has the published model's dimensions (21,969,664 parameters), tiny is small enough for quick tests. What it
says is noise, but every code, every cache entry and every joint counts. OUT_DIR can be given to --weights; its
checkpoint, as `mossnano build` reads it, lies in OUT_DIR/checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where to write it; created where needed")
    parser.add_argument("--size", choices=("nano", "tiny"), default="nano", help="its dimensions (default: nano)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds are other weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    from mossnano_stdio.graph.assemble import save_standin_bundle

    save_standin_bundle(args.folder, args.size, args.seed)
    print(f"{args.folder}: {args.size} stand-in, seed {args.seed}")
    return 0
