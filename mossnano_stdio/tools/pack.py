"""Make an artifact of codes.

  IN.u16le   little-endian 16-bit codes in [quantizer, frame] order, nothing else
  IN.npy     numpy, whole numbers [frames, quantizers]
  IN.json    a list of frames, each a list of codes

`-` is stdin or stdout. `mossnano unpack` is the way back. The numbers that codes alone do not say are those of --model
unless given.
"""

from __future__ import annotations

import argparse

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.tokens import FIELD_LIMITS, Artifact, build_artifact
from mossnano_stdio.tokens.plain import FORMS, form_of, load_codes
from mossnano_stdio.weights import MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codes", metavar="IN", help="the codes; its name says the form")
    parser.add_argument("artifact", metavar="OUT", help="where the artifact goes, OUT.mossnano for instance")
    parser.add_argument("--form", choices=FORMS, help="the form, where the name does not say it")
    parser.add_argument("--model", choices=MODELS, default="nano", help="whose codes they are (default: nano)")
    parser.add_argument(
        "--original-samples",
        type=int,
        metavar="N",
        help="length of the sound per channel (default: that of all frames)",
    )
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="default: the model's")
    parser.add_argument("--channels", type=int, metavar="N", help="default: the model's")
    parser.add_argument("--codebook-size", type=int, metavar="N", help="default: the model's")
    parser.add_argument(
        "--quantizers", type=int, metavar="N", help="codes in a frame; .u16le alone needs it (default: the model's)"
    )


def run(args: argparse.Namespace) -> int:
    form = form_of(args.codes, args.form)
    for name in FIELD_LIMITS.keys() - {"frames"}:
        _check_option(name, getattr(args, name))
    model = MODELS[args.model].format
    with open_input(args.codes) as file:
        codes = load_codes(file.read(), form, args.quantizers or model.quantizers)
    frames, quantizers = codes.shape
    if args.quantizers not in (None, quantizers):
        raise UsageError(f"--quantizers is {args.quantizers}, but {args.codes} has {quantizers} codes in each frame")
    artifact = Artifact(
        args.sample_rate or model.sample_rate,
        args.channels or model.channels,
        frames * model.frame_samples if args.original_samples is None else args.original_samples,
        quantizers,
        frames,
        args.codebook_size or model.codebook_size,
        codes,
    )
    with open_output(args.artifact) as file:
        file.write(build_artifact(artifact))
    return ExitStatus.DONE


def _check_option(name: str, maybe_value: int | None) -> None:
    least, most = FIELD_LIMITS[name]
    if maybe_value is not None and not least <= maybe_value <= most:
        raise UsageError(f"--{name.replace('_', '-')} is {maybe_value}, allowed are {least} to {most}")
