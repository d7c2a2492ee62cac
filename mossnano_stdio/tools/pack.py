"""Make an artifact of codes.

  IN.u16le   little-endian 16-bit codes in [quantizer, frame] order, nothing else
  IN.npy     numpy, whole numbers [frames, quantizers]
  IN.json    a list of frames, each a list of codes

`-` is stdin or stdout. `mossnano unpack` is the way back. The numbers that codes alone do not say are those of --model
unless given.

OUT.ecdc is a file as EnCodec's own tool writes it, without a language model, of codes of the 24 kHz model, whose
numbers are fixed: of the options, --form, --quantizers and --original-samples are for it. The 48 kHz model keeps a
scale with each segment, which codes alone do not hold.
"""

from __future__ import annotations

import argparse

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.files import open_input, open_output
from mossnano_stdio.tokens import FIELD_LIMITS, Artifact, Codes, build_artifact
from mossnano_stdio.tokens.ecdc import CODEBOOK_SIZE, ECDC_MODELS, Ecdc, EcdcHeader, EcdcSegment, build_ecdc
from mossnano_stdio.tokens.plain import FORMS, form_of, load_codes
from mossnano_stdio.weights import MODELS

ECDC_MODEL = "encodec_24khz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codes", metavar="IN", help="the codes; its name says the form")
    parser.add_argument("artifact", metavar="OUT", help="where the artifact goes, OUT.mossnano or OUT.ecdc")
    parser.add_argument("--form", choices=FORMS, help="the form, where the name does not say it")
    parser.add_argument("--model", choices=MODELS, help="whose codes they are (default: nano)")
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
    data = _ecdc(args, form) if args.artifact.lower().endswith(".ecdc") else _artifact(args, form)
    with open_output(args.artifact) as file:
        file.write(data)
    return ExitStatus.DONE


def _artifact(args: argparse.Namespace, form: str) -> bytes:
    model = MODELS[args.model or "nano"].format
    codebook_size = args.codebook_size or model.codebook_size
    codes = _load(args, form, model.quantizers, codebook_size)
    frames, quantizers = codes.shape
    return build_artifact(
        Artifact(
            args.sample_rate or model.sample_rate,
            args.channels or model.channels,
            frames * model.frame_samples if args.original_samples is None else args.original_samples,
            quantizers,
            frames,
            codebook_size,
            codes,
        )
    )


def _ecdc(args: argparse.Namespace, form: str) -> bytes:
    for name in ("model", "sample_rate", "channels", "codebook_size"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is fixed in an .ecdc of {ECDC_MODEL}; leave it out")
    model = ECDC_MODELS[ECDC_MODEL]
    codes = _load(args, form, model.quantizers, CODEBOOK_SIZE)
    frames, quantizers = codes.shape
    samples = frames * model.frame_samples if args.original_samples is None else args.original_samples
    return build_ecdc(Ecdc(EcdcHeader(ECDC_MODEL, samples, quantizers), [EcdcSegment(codes, maybe_scale=None)]))


def _load(args: argparse.Namespace, form: str, quantizers: int, codebook_size: int) -> Codes:
    """The codes, [frames, quantizers]. `quantizers` is for the form that does not hold it."""
    with open_input(args.codes) as file:
        codes = load_codes(file.read(), form, args.quantizers or quantizers, codebook_size)
    if args.quantizers not in (None, codes.shape[1]):
        raise UsageError(
            f"--quantizers is {args.quantizers}, but {args.codes} has {codes.shape[1]} codes in each frame"
        )
    return codes


def _check_option(name: str, maybe_value: int | None) -> None:
    least, most = FIELD_LIMITS[name]
    if maybe_value is not None and not least <= maybe_value <= most:
        raise UsageError(f"--{name.replace('_', '-')} is {maybe_value}, allowed are {least} to {most}")
