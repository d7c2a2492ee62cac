"""Encode a data set: recordings in, shards of codes out; run it again, and it goes on where it was.

INPUT is a recording, a folder of them, a glob in quotes, or
  FILE.jsonl       a manifest: on each line an object with `path` (or NeMo's `audio_filepath`), and if you like `id`,
                   `offset` and `duration`, or `start` and `end`, in seconds; all else, `text` for one, is carried
                   through. Paths are relative to the manifest. Lhotse's cuts, FILE.jsonl.gz too, are read as well
  FILE.tar         WebDataset: a sound with `.json` and `.txt` beside it
  FILE.parquet     a column of sounds (--audio-column), as `datasets` keeps them; the others are carried through

Any rate from 1,000 Hz on is resampled. One channel goes to all of the codec's; others, up to 8, are averaged to one. A
recording of any length takes the same memory.

A row has `id` (the manifest's, or the path), `codes` (uint16 [quantizers, frames]), `frames`, `quantizers`,
`original_samples` (at `sample_rate`, before the last frame was filled up), `sample_rate`, `codec`, `weights_sha256`,
and what its source said of it; a name there that is one of these begins with `source_` here. --form says how rows lie
in shards:
  parquet      `codes` is list<list<uint16>>; what is neither text nor a number is carried through as JSON
  webdataset   a tar with KEY.codes.npy and KEY.json
  npy          shard-000000.npy, [quantizers, frames] of all rows, and shard-000000.jsonl with the `start_frame` of each
  mossnano     a tar with KEY.mossnano and KEY.json

In the folder there are also manifest.jsonl, a line for each shard that is done, quarantine.jsonl, a line with the
reason for each recording that cannot be encoded, statistics.json and job.json. A job that was killed, or found the disk
full, is run again by the same command: it keeps the shards that are done, and ends with the bytes of a job that nobody
disturbed. With other inputs, options or weights it is refused. Where there is a quarantine.jsonl the exit status is 1.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mossnano_stdio.errors import UsageError
from mossnano_stdio.process.flags import whole_number
from mossnano_stdio.tools.datasets.options import add_job_arguments, add_report_arguments, chosen_engine, reported

if TYPE_CHECKING:
    from mossnano_stdio.tools.datasets.job import Report

FORMS = ("parquet", "webdataset", "npy", "mossnano")  # those of datasets/shards.py, without what it imports
DEFAULT_SHARD_ROWS = 1000
MOST_SHARD_ROWS = 1_000_000
MOST_QUANTIZERS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="where the recordings are")
    parser.add_argument("--form", choices=FORMS, default="parquet", help="of the shards (%(default)s)")
    parser.add_argument(
        "--quantizers", type=whole_number(1, MOST_QUANTIZERS), metavar="N", help="keep only the first N (all)"
    )
    parser.add_argument(
        "--shard-rows",
        type=whole_number(1, MOST_SHARD_ROWS),
        default=DEFAULT_SHARD_ROWS,
        metavar="N",
        help="recordings of one shard (%(default)s); what a kill can cost",
    )
    parser.add_argument("--audio-column", default="audio", metavar="NAME", help="of Parquet inputs (%(default)s)")
    add_job_arguments(parser, "the shards")
    add_report_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", help="a picture of durations and of the codes that were used")


def run(args: argparse.Namespace) -> int:
    return reported(args, partial(_tokenized, args))


def _tokenized(args: argparse.Namespace) -> Report:
    from mossnano_stdio.tools.datasets.inputs import import_parquet
    from mossnano_stdio.tools.datasets.job import find_bundle, tokenize_all

    if args.form == "parquet":
        import_parquet()
    bundle = find_bundle(args.weights)
    if args.quantizers and args.quantizers > bundle.format.quantizers:
        raise UsageError(f"--quantizers is {args.quantizers}, these weights have {bundle.format.quantizers}")
    return tokenize_all(
        args.inputs,
        Path(args.to),
        bundle,
        chosen_engine(args),
        form=args.form,
        quantizers=args.quantizers or bundle.format.quantizers,
        shard_rows=args.shard_rows,
        audio_column=args.audio_column,
        fail_fast=args.fail_fast,
        log_json=args.log_json,
    )
