"""Take an artifact apart: its codes as a plain file.

  OUT.u16le   little-endian 16-bit codes in [quantizer, frame] order, nothing else
  OUT.npy     numpy, uint16 [frames, quantizers]
  OUT.json    a list of frames, each a list of codes

`-` is stdin or stdout. `mossnano pack` is the way back; what the codes alone do not say (sample rate, original
length, ...) is printed by `mossnano info`.

IN may also be an .ecdc of EnCodec's own tool, whose codes no language model packed. Its segments follow each other;
their scales are left out. An .ecdc of encodec-rs (acv 2) takes the --bundle that it was made with: bundle.json and the
language model, lm_weights_q8.bin, in a folder. With --salvage the chunks of it that are damaged are codes 0, and told
on stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import BinaryIO

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.tokens import Codes
from mossnano_stdio.tokens.ecdc import load_recording
from mossnano_stdio.tokens.packed_ecdc import open_packed_ecdc
from mossnano_stdio.tokens.plain import FORMS, form_of, save_codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="IN", help="a .mossnano or .ecdc file")
    parser.add_argument("codes", metavar="OUT", help="where the codes go; its name says the form")
    parser.add_argument("--form", choices=FORMS, help="the form, where the name does not say it")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="of encodec-rs, which wrote IN")
    parser.add_argument("--salvage", action="store_true", help="go on past damaged chunks; needs --bundle")


def run(args: argparse.Namespace) -> int:
    form = form_of(args.codes, args.form)
    if args.salvage and not args.bundle:
        raise UsageError("--salvage is for chunks that have checksums: give --bundle, or leave it out")
    with open_input(args.artifact) as file:
        codes, has_losses = (
            _load_packed(args, file) if args.bundle else (load_recording(file, args.artifact).codes, False)
        )
    with open_output(args.codes) as file:
        file.write(save_codes(codes, form))
    return ExitStatus.BAD_INPUT if has_losses else ExitStatus.DONE


def _load_packed(args: argparse.Namespace, file: BinaryIO) -> tuple[Codes, bool]:
    """The codes, and whether some of them are lost."""
    packed = open_packed_ecdc(file, args.artifact, args.bundle, salvage=args.salvage)
    ecdc, lost = packed.unpacked(salvage=args.salvage)
    for chunk in lost.values():
        print(f"mossnano unpack: {args.artifact}: {chunk.fault}; {chunk.frames} frames lost", file=sys.stderr)
    return ecdc.codes, bool(lost)
