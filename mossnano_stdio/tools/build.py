"""Graphs from weights: the official contract, and our own faster ones beside it.

  mossnano build CHECKPOINT_DIR OUT_DIR       from config.json and safetensors: all graphs
  mossnano build --from-bundle DIR OUT_DIR    from the official ONNX files: our own graphs, beside them or beside copies

CHECKPOINT_DIR may also be the folder of facebook/encodec_24khz or encodec_48khz, a file with their tensors, or a folder
of encodec-rs with its bundle.json, whose graphs are taken as they are.

CHECKPOINT_DIR is a codec's, or a text-to-speech model's with the codec inside (audio_tokenizer/, moss_audio_tokenizer/,
codec/). OUT_DIR may be DIR. Official files are never changed.

Our graphs are kept only if they decode as the official ones do. --graphs fast builds ours alone; they are then compared
with themselves in other chunks. Of the larger models that is what there is memory and disk for: the trial, a process of
its own, loads whatever it compares.

--precision float32,int8 builds a second graph that decodes, with the products of some layers in 8 bits: smaller, and
quicker where that is allowed to cost something. Which layers is found by decoding: those that save most time for the
noise that they add, as many as leave the worst second at --int8-db (45) against float32, over seeded codes and over
recorded ones, --codes. float32 remains what runs; `--precision int8` chooses the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.process.flags import add_build_precision_arguments, check_build_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT_DIR", help="config.json and tensors")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where the graphs go; created where needed")
    parser.add_argument(
        "--what",
        choices=("decode", "encode", "all"),
        default="all",
        help="of a checkpoint, what decodes, or encodes (all)",
    )
    parser.add_argument(
        "--graphs",
        choices=("fast", "official", "all"),
        default="all",
        help="of a checkpoint, ours or the official contract's (all)",
    )
    add_build_precision_arguments(parser)
    parser.add_argument("--from-bundle", type=Path, metavar="DIR", help="take the weights out of these official files")


def run(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.from_bundle is None):
        raise UsageError("build takes either CHECKPOINT_DIR OUT_DIR or --from-bundle DIR OUT_DIR")
    if args.from_bundle and (args.what, args.graphs) != ("all", "all"):
        raise UsageError(
            "--from-bundle builds our own graphs of all that the files hold; leave --what and --graphs out"
        )
    check_build_precision(args)
    if "int8" in args.precision and (args.what == "encode" or args.graphs == "official"):
        raise UsageError("--precision int8 is of our graph that decodes; leave --what encode and --graphs official out")
    try:
        from mossnano_stdio.build.bundle import Int8Wish, build_from_bundle, build_from_checkpoint
    except ImportError as error:
        raise UsageError(
            f"building needs {error.name}, which is not installed: pip install 'mossnano-stdio[build]'"
        ) from None
    maybe_int8 = Int8Wish(args.int8_db, tuple(map(Path, args.codes))) if "int8" in args.precision else None
    if args.from_bundle:
        build_from_bundle(args.from_bundle, args.folder, maybe_int8)
    else:
        build_from_checkpoint(args.checkpoint, args.folder, args.what, args.graphs, maybe_int8)
    print(args.folder)
    return ExitStatus.DONE
