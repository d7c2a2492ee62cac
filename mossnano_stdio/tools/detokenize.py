"""Decode a data set: what `mossnano tokenize` wrote, to a recording for each row.

INPUT is a folder of shards, a shard (.parquet, .tar, .npy with its .jsonl beside it), a .mossnano file, or a folder of
those. A row becomes DIR/ID.flac, .wav or .ogg, its length that of the recording. An id that ends with another form's
name keeps that: a.wav becomes a.wav.flac.

Run again, it decodes the files that are missing. Rows that cannot be decoded stand in DIR/quarantine.jsonl with the
reason, and the exit status is 1.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mossnano_stdio.tools.datasets.options import add_job_arguments, add_report_arguments, chosen_engine, reported

if TYPE_CHECKING:
    from mossnano_stdio.tools.datasets.job import Report

FORMS = ("flac", "wav", "ogg")  # those of pcm/recordings.py, without what it imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="where the codes are")
    parser.add_argument("--form", choices=FORMS, default="flac", help="of the recordings (%(default)s)")
    add_job_arguments(parser, "the recordings")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return reported(args, partial(_detokenized, args))


def _detokenized(args: argparse.Namespace) -> Report:
    from mossnano_stdio.tools.datasets.job import detokenize_all, find_bundle

    return detokenize_all(
        args.inputs,
        Path(args.to),
        find_bundle(args.weights),
        chosen_engine(args),
        form=args.form,
        fail_fast=args.fail_fast,
        log_json=args.log_json,
    )
