"""Take an artifact apart: its codes as a plain file.

  OUT.u16le   little-endian 16-bit codes in [quantizer, frame] order, nothing else
  OUT.npy     numpy, uint16 [frames, quantizers]
  OUT.json    a list of frames, each a list of codes

`-` is stdin or stdout. `mossnano pack` is the way back; what the codes alone do not say (sample rate, original
length, ...) is printed by `mossnano info`.

IN may also be an .ecdc of EnCodec's own tool, whose codes no language model packed. Its segments follow each other;
their scales are left out.
"""

from __future__ import annotations

import argparse

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.tokens.ecdc import load_recording
from mossnano_stdio.tokens.plain import FORMS, form_of, save_codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="IN", help="a .mossnano or .ecdc file")
    parser.add_argument("codes", metavar="OUT", help="where the codes go; its name says the form")
    parser.add_argument("--form", choices=FORMS, help="the form, where the name does not say it")


def run(args: argparse.Namespace) -> int:
    form = form_of(args.codes, args.form)
    with open_input(args.artifact) as file:
        codes = load_recording(file, args.artifact).codes
    with open_output(args.codes) as file:
        file.write(save_codes(codes, form))
    return ExitStatus.DONE
