"""Get the official weights: the pinned revision, every file verified by size and SHA-256.

  decode       what turns tokens into sound: 45 MB, into the folder where mossnano-stdio looks for it
  encode       what turns sound into tokens: 45 MB more, into the same folder
  checkpoint   what `mossnano build` makes graphs of: 88 MB

They come through huggingface_hub: its cache serves what it holds, a cut download is resumed, and HF_ENDPOINT (a
mirror), HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean everywhere. Progress goes to stderr, the folder
to stdout.

Where the extra `build` is installed, our own faster graphs are built beside the official files, as by
`mossnano build --from-bundle`; mossnano-stdio then takes them.

Of the larger models (--model 24k, v2) no graphs that stream are published. What is fetched of them is their checkpoint,
or the files of it that decode or encode need; `mossnano build` makes graphs of the whole one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mossnano_stdio.errors import ExitStatus, MossnanoError
from mossnano_stdio.weights import MODELS, load_bundle
from mossnano_stdio.weights.hub import fetch, selections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default="nano", help="(default: nano)")
    parser.add_argument("--what", choices=selections(), default="decode", help="which files (default: decode)")
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="where they go (default: ./weights/... where ./weights exists, else the user's cache folder; "
        "mossnano-stdio finds both)",
    )
    parser.add_argument("--no-build", action="store_true", help="the official files only, no graphs of our own")


def run(args: argparse.Namespace) -> int:
    selection = selections(args.model)[args.what]
    folder = args.to or selection.default_folder
    placed = fetch(selection, folder, _say)
    if MODELS[args.model].maybe_bundle is None:
        _say(
            f"no graphs of {args.model} are published: `mossnano build {folder} {folder}` makes them of the whole "
            "checkpoint (--what checkpoint)"
        )
    elif args.what != "checkpoint" and not args.no_build:
        try:
            _build_own_graphs(folder, are_files_new=bool(placed))
        except MossnanoError as error:  # what was asked for is there, and decodes without
            _say(f"our own graphs are left out: {error}")
    print(folder)
    return ExitStatus.DONE


def _build_own_graphs(folder: Path, *, are_files_new: bool) -> None:
    bundle = load_bundle(folder)
    if not bundle.has_graph("decode_step") or (bundle.has_graph("fast") and not are_files_new):
        return
    try:
        from mossnano_stdio.build.bundle import build_from_bundle
    except ModuleNotFoundError as error:
        _say(
            f"our own graphs are left out, as {error.name} is not installed: pip install 'mossnano-stdio[build]', "
            f"then mossnano build --from-bundle {folder} {folder}"
        )
        return
    _say("building our own graphs")
    build_from_bundle(folder, folder)


def _say(line: str) -> None:
    print(f"mossnano fetch: {line}", file=sys.stderr, flush=True)
