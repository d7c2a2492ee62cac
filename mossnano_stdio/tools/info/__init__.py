"""Say what a file or a folder is, by its first bytes, and what is in it.

  an artifact         its header, its sizes, its bit rate, and how its codes are spread
  an .ecdc            the same of EnCodec's own files, whose codes no language model packed
  a framed stream     what mossnano-stdio reads or writes: messages by kind, frames, seconds, and whether it is whole;
                      the same of each numbered stream, up to 32
  a weights folder    its numbers, its graphs, and where they come from

`-` is stdin. Status 65: cut or malformed, after the facts that could be read. 76: a framed stream that has an
impossible length in it.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.files import open_input
from mossnano_stdio.protocol import LENGTH_BYTES, MAX_MESSAGE_BYTES
from mossnano_stdio.tokens import MAGIC, Artifact, ArtifactReader, Codes
from mossnano_stdio.tokens.ecdc import BITS_PER_CODE, CODEBOOK_SIZE, ECDC_MAGIC, Ecdc, load_ecdc
from mossnano_stdio.tools.facts import as_json, as_table
from mossnano_stdio.tools.info.tally import Tally
from mossnano_stdio.weights import MODELS

PIECE_BYTES = 1 << 16
MOST_QUANTIZERS_SHOWN = 64
COUNTED_AT_ONCE = 1 << 20  # codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="an artifact, an .ecdc, a framed stream, or a weights folder")
    parser.add_argument(
        "--model", choices=MODELS, default="nano", help="whose numbers a stream has that does not say them (nano)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--max-message-bytes",
        type=int,
        default=MAX_MESSAGE_BYTES,
        metavar="N",
        help="longer messages are taken as a sign that this is no framed stream (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    maybe_fault = None
    if args.path != "-" and Path(args.path).is_dir():
        facts = weights_facts(Path(args.path))
    else:
        with open_input(args.path) as file:
            start = file.read(LENGTH_BYTES)
            pieces = itertools.chain([start], iter(lambda: file.read(PIECE_BYTES), b""))
            could_be_message = len(start) == LENGTH_BYTES and not MAGIC.startswith(start)
            if start == ECDC_MAGIC:
                facts = ecdc_facts(load_ecdc(file, args.path, start))
            elif could_be_message and 1 <= int.from_bytes(start, "little") <= args.max_message_bytes:
                tally = Tally(args.max_message_bytes, args.model)
                maybe_fault = tally.read(pieces)
                facts = {"kind": "framed stream", **tally.facts()}
            else:
                reader = ArtifactReader()
                for piece in pieces:
                    reader.push(piece)
                facts = artifact_facts(reader.artifact())
    print(as_json(facts) if args.json else as_table(facts))
    if maybe_fault is not None:
        raise maybe_fault
    return ExitStatus.DONE


# --- artifacts ---------------------------------------------------------------------------------------------------


def artifact_facts(artifact: Artifact) -> dict[str, Any]:
    return {
        "kind": "artifact",
        "sample_rate": artifact.sample_rate,
        "channels": artifact.channels,
        "original_samples": artifact.original_samples,
        "quantizers": artifact.quantizers,
        "frames": artifact.frames,
        "codebook_size": artifact.codebook_size,
        "bits_per_code": artifact.bits_per_code,
        "duration_seconds": artifact.duration_seconds,
        "payload_bytes": artifact.body_bytes,
        "file_bytes": artifact.file_bytes,
        "bitrate_bps": 8 * artifact.body_bytes / artifact.duration_seconds if artifact.original_samples else None,
        "codes": _code_statistics(artifact.codes, artifact.codebook_size),
    }


def ecdc_facts(ecdc: Ecdc) -> dict[str, Any]:
    header = ecdc.header
    scales = [segment.maybe_scale for segment in ecdc.segments if segment.maybe_scale is not None]
    return {
        "kind": "ecdc",
        "model": header.model_name,
        "sample_rate": header.model.sample_rate,
        "channels": header.model.channels,
        "original_samples": header.original_samples,
        "quantizers": header.quantizers,
        "segments": len(ecdc.segments),
        "frames": header.frames,
        "codebook_size": CODEBOOK_SIZE,
        "bits_per_code": BITS_PER_CODE,
        "duration_seconds": header.duration_seconds,
        "payload_bytes": header.body_bytes,
        "bitrate_bps": 8 * header.body_bytes / header.duration_seconds,
        **({"scales": {"least": min(scales), "most": max(scales)}} if scales else {}),
        "codes": _code_statistics(ecdc.codes, CODEBOOK_SIZE),
    }


def _code_statistics(codes: Codes, codebook_size: int) -> dict[str, Any]:
    """How the codes are spread, over all quantizers and, where these are few enough to be shown, for each."""
    rows = codes.T
    if not len(codes):
        return {}
    statistics: dict[str, Any] = _spread(_counts(rows.reshape(-1), codebook_size))
    if len(rows) <= MOST_QUANTIZERS_SHOWN:
        spreads = [_spread(_counts(row, codebook_size)) for row in rows]
        statistics["by_quantizer"] = {name: [spread[name] for spread in spreads] for name in spreads[0]}
    return statistics


def _counts(codes: NDArray[np.uint16], codebook_size: int) -> NDArray[np.intp]:
    counts = np.zeros(codebook_size, dtype=np.intp)
    for start in range(0, len(codes), COUNTED_AT_ONCE):
        counts += np.bincount(codes[start : start + COUNTED_AT_ONCE], minlength=codebook_size)
    return counts


def _spread(counts: NDArray[np.intp]) -> dict[str, int | float]:
    present = np.flatnonzero(counts)
    shares = counts[present] / counts.sum()
    return {
        "least": int(present[0]),
        "most": int(present[-1]),
        "distinct": len(present),
        "entropy_bits": round(abs(float(-(shares * np.log2(shares)).sum())), 3),
    }


# --- weights -----------------------------------------------------------------------------------------------------


def weights_facts(folder: Path) -> dict[str, Any]:
    from mossnano_stdio.weights import load_bundle

    bundle = load_bundle(folder)
    return {
        "kind": "weights",
        "name": bundle.name,
        "folder": str(bundle.folder),
        "demo": bundle.demo,
        "published": bundle.is_published,
        "format": vars(bundle.format),
        "frames_per_second": bundle.format.frames_per_second,
        "frame_bytes": bundle.format.frame_bytes,
        "graphs": {
            name: {
                "file": graph.path.name,
                "precision": graph.precision,
                "bytes": sum(file.path.stat().st_size for file in graph.files) if bundle.has_graph(name) else None,
                "states": len(graph.states),
            }
            for name, graph in bundle.graphs.items()
        },
        "caches": len(bundle.contexts_tokens),
        "longest_context_tokens": max(bundle.contexts_tokens, default=0),
    }
