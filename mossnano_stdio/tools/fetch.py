"""Get the official weights: the pinned revision, every file verified by size and SHA-256.

  decode       what turns tokens into sound: 45 MB, into the folder where mossnano-stdio looks for it
  encode       what turns sound into tokens: 45 MB more, into the same folder
  checkpoint   what `mossnano build` makes graphs of: 88 MB

They come through huggingface_hub: its cache serves what it holds, a cut download is resumed, and HF_ENDPOINT (a
mirror), HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean everywhere. Progress goes to stderr, the folder
to stdout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.fetch import fetch, selections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--what", choices=selections(), default="decode", help="which files (default: decode)")
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="where they go (default: ./weights/... where ./weights exists, else the user's cache folder; "
        "mossnano-stdio finds both)",
    )


def run(args: argparse.Namespace) -> int:
    selection = selections()[args.what]
    folder = args.to or selection.default_folder
    fetch(selection, folder, _say)
    print(folder)
    return ExitStatus.DONE


def _say(line: str) -> None:
    print(f"mossnano fetch: {line}", file=sys.stderr, flush=True)
