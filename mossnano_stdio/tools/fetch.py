"""Get the official weights: the pinned revision, every file verified by size and SHA-256.

  decode       what turns tokens into sound: 45 MB, into the folder where mossnano-stdio looks for it
  encode       what turns sound into tokens: 45 MB more, into the same folder
  checkpoint   what `mossnano build` makes graphs of: 88 MB

They come through huggingface_hub: its cache serves what it holds, a cut download is resumed, and HF_ENDPOINT (a
mirror), HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean everywhere. Progress goes to stderr, the folder
to stdout.

Where the extra `build` is installed, our own faster graphs are built beside the official files, as by
`mossnano build --from-bundle`; mossnano-stdio then takes them.

Of Mimi (--model mimi) it is one file of 385 MB that decodes and encodes, and all graphs are built of it: 0.9 GB.

EnCodec (--model encodec-24k, encodec-48k) is not fetched, as nothing is known by which its files could be verified: it
says how to get them otherwise.

Of the larger models (--model 24k, v2) no graphs that stream are published. There decode and encode get the files of the
checkpoint that are needed (7.1 GB of 24k, up to 8.5 GB of v2), and graphs are built of them in the same folder, which
takes as much again.

--precision, --int8-db and --codes are those of `mossnano build`: --precision float32,int8 makes an int8 graph, too.
Where no part of a graph can be in 8 bits at that bar, it says so, and float32 is there all the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final, Literal

from mossnano_stdio.errors import BundleError, ExitStatus, MossnanoError, NoPlanError, UsageError
from mossnano_stdio.process.flags import add_build_precision_arguments, check_build_precision
from mossnano_stdio.weights import METADATA_NAME, MODELS, SIDECAR_NAME, UNPINNED_MODELS, Bundle, load_bundle
from mossnano_stdio.weights.hub import fetch, selections, tensor_files

Side = Literal["decode", "encode"]
Int8Choice = tuple[float, tuple[Path, ...]]  # decibels, recorded codes

GRAPHS_OF: Final[dict[Side, set[str]]] = {"decode": {"fast", "decode_step"}, "encode": {"encode_step"}}  # of our own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=(*MODELS, *UNPINNED_MODELS), default="nano", help="(default: nano)")
    parser.add_argument("--what", choices=selections(), default="decode", help="which files (default: decode)")
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="where they go (default: ./weights/... where ./weights exists, else the user's cache folder; "
        "mossnano-stdio finds both)",
    )
    add_build_precision_arguments(parser)
    parser.add_argument("--no-build", action="store_true", help="the official files only, no graphs of our own")


def run(args: argparse.Namespace) -> int:
    if args.model in UNPINNED_MODELS:
        raise _unpinned(args.model)
    check_build_precision(args)
    if "int8" in args.precision and (args.no_build or args.what != "decode"):
        raise UsageError("--precision int8 is of our graph that decodes; leave --no-build out, and --what but decode")
    maybe_int8 = (args.int8_db, tuple(map(Path, args.codes))) if "int8" in args.precision else None
    selection = selections(args.model)[args.what]
    folder = args.to or selection.default_folder
    placed = fetch(selection, folder, _say)
    if attribution := MODELS[args.model].maybe_attribution:
        _say(attribution)
    if args.what != "checkpoint" and not args.no_build:
        try:
            _build(folder, args, maybe_int8, are_files_new=bool(placed))
        except MossnanoError as error:  # what was asked for is there, and decodes without
            _say(f"our own graphs are left out: {error}")
    print(folder)
    return ExitStatus.DONE


def _unpinned(model: str) -> BundleError:
    repository = UNPINNED_MODELS[model]
    return BundleError(
        f"{repository}: neither size nor SHA-256 of its files is known here, so nothing that came could be verified; "
        f"get its config.json and model.safetensors yourself (`hf download {repository} --local-dir DIR`), then "
        "`mossnano build DIR OUT_DIR`"
    )


def _build(folder: Path, args: argparse.Namespace, maybe_int8: Int8Choice | None, *, are_files_new: bool) -> None:
    """Graphs of our own, in float32 alone where none in int8 keeps the bar."""
    try:
        if MODELS[args.model].maybe_bundle:
            _build_own_graphs(folder, maybe_int8, are_files_new=are_files_new)
        else:
            _build_of_checkpoint(folder, args.model, args.what, maybe_int8, are_files_new=are_files_new)
    except NoPlanError as error:
        _say(f"int8 is left out: {error}")
        _build(folder, args, None, are_files_new=are_files_new)


def _build_own_graphs(folder: Path, maybe_int8: Int8Choice | None, *, are_files_new: bool) -> None:
    bundle = load_bundle(folder)
    is_built = bundle.has_graph("fast") and maybe_int8 is None
    if not bundle.has_graph("decode_step") or (is_built and not are_files_new):
        return
    try:
        from mossnano_stdio.build.bundle import Int8Wish, build_from_bundle
    except ModuleNotFoundError as error:
        _say(
            f"our own graphs are left out, as {error.name} is not installed: pip install 'mossnano-stdio[build]', "
            f"then mossnano build --from-bundle {folder} {folder}"
        )
        return
    _say("building our own graphs")
    build_from_bundle(folder, folder, Int8Wish(*maybe_int8) if maybe_int8 else None)


def _build_of_checkpoint(
    folder: Path, model: str, what: Side, maybe_int8: Int8Choice | None, *, are_files_new: bool
) -> None:
    """Graphs of all sides whose tensors are there, which are those of `what`, and what was fetched before."""
    sides = [side for side in GRAPHS_OF if side == what or _is_fetched(model, side, folder)]
    has_metadata = any((folder / name).exists() for name in (METADATA_NAME, SIDECAR_NAME))
    is_wanted_anew = are_files_new or maybe_int8 is not None
    if has_metadata and not is_wanted_anew and all(_has_graph(load_bundle(folder), side) for side in sides):
        return
    graphs = MODELS[model].built_graphs
    try:
        from mossnano_stdio.build.bundle import Int8Wish, build_from_checkpoint
    except ModuleNotFoundError as error:
        _say(
            f"no graphs are built, as {error.name} is not installed: pip install 'mossnano-stdio[build]', "
            f"then mossnano build --graphs {graphs} --what {what} {folder} {folder}"
        )
        return
    _say("building graphs")
    built_sides: Side | Literal["all"] = "all" if len(sides) == len(GRAPHS_OF) else what
    build_from_checkpoint(folder, folder, built_sides, graphs, Int8Wish(*maybe_int8) if maybe_int8 else None)


def _has_graph(bundle: Bundle, side: Side) -> bool:
    return any(map(bundle.has_graph, GRAPHS_OF[side]))


def _is_fetched(model: str, side: Side, folder: Path) -> bool:
    return all((folder / name).exists() for name in tensor_files(selections(model)[side], folder))


def _say(line: str) -> None:
    print(f"mossnano fetch: {line}", file=sys.stderr, flush=True)
