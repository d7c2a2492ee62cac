"""Graphs from weights: the official contract, and our own faster ones beside it.

  mossnano build CHECKPOINT_DIR OUT_DIR       from config.json and safetensors: all graphs
  mossnano build --from-bundle DIR OUT_DIR    from the official ONNX files: our own graphs, beside them or beside copies

OUT_DIR may be DIR. Official files are never changed. Our graphs are kept only if they decode as the official ones do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mossnano_stdio.errors import ExitStatus, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT_DIR", help="config.json and tensors")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="where the graphs go; created where needed")
    parser.add_argument("--from-bundle", type=Path, metavar="DIR", help="take the weights out of these official files")


def run(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.from_bundle is None):
        raise UsageError("build takes either CHECKPOINT_DIR OUT_DIR or --from-bundle DIR OUT_DIR")
    try:
        from mossnano_stdio.build.bundle import build_from_bundle, build_from_checkpoint
    except ImportError as error:
        raise UsageError(
            f"building needs {error.name}, which is not installed: pip install 'mossnano-stdio[build]'"
        ) from None
    if args.from_bundle:
        build_from_bundle(args.from_bundle, args.folder)
    else:
        build_from_checkpoint(args.checkpoint, args.folder)
    print(args.folder)
    return ExitStatus.DONE
