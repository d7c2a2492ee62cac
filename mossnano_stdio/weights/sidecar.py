"""`mossnano.json`: what we note beside a bundle's official metadata, and all there is to know of a codec that has none.
Every key but the first is optional:

{
  "mossnano": 1,                      version of this file
  "name": "nano stand-in, seed 0",    what to call these weights
  "demo": false,                      the built-in demo, to be labelled as such wherever it appears
  "precision": "float32",             of the official graphs
  "codebook_size": 1024,
  "codec": {                          of a codec without official metadata: its family, and the numbers of its format
    "family": "mimi", "sample_rate": 24000, "channels": 1, "frame_samples": 1920, "quantizers": 32
  },
  "graphs": {                         graphs beyond the three official ones
    "fast": {
      "file": "fast.onnx",
      "data": ["fast.data"],          its external data
      "precision": "float32",
      "inputs": ["codes"],            those that are no state, in order, and outputs alike; where that has to be said
      "outputs": ["audio"],
      "states": [{"input": "keys", "output": "keys_out", "shape": [1, 4], "dtype": "float32", "initial": 0}],
      "facts": {}                     whatever the code that runs this graph has to know
    },
    "fast_int8": {                    the same with some products in 8 bits, "precision": "int8"; its facts have, too:
      ...                             "int8": {"parts": [...], "bar_db": 45, "snr_db": 46.1, "codes_sha256": "..."}
    }                                 what is in 8 bits, the bar, what was reached, over which codes
  },
  "files": {"fast.onnx": {"bytes": 123, "sha256": "..."}}    what was built, to the byte
}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights.checked_json import Entry, load_json
from mossnano_stdio.weights.graphs import EMPTY_POSITION, FileRecord, GraphSpec, StateSpec

SIDECAR_NAME = "mossnano.json"
SIDECAR_VERSION = 1


@dataclass(frozen=True)
class OwnCodec:
    """A codec of which nobody else's metadata says anything."""

    family: str
    format: CodecFormat


@dataclass(frozen=True)
class Sidecar:
    """What `mossnano.json` holds."""

    name: str | None = None
    demo: bool = False
    precision: str = "float32"
    codebook_size: int | None = None
    maybe_codec: OwnCodec | None = None
    graphs: Mapping[str, GraphSpec] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)


def load_sidecar(folder: Path) -> Sidecar:
    """What `mossnano.json` says; the defaults where there is none."""
    path = folder / SIDECAR_NAME
    if not path.exists():
        return Sidecar()
    document, _ = load_json(path)
    if (version := document.at("mossnano").whole()) != SIDECAR_VERSION:
        raise BundleError(f"{path}: is of version {version}, {SIDECAR_VERSION} is what this program reads")
    codebook_size = document.maybe_at("codebook_size")
    demo = document.maybe_at("demo")
    maybe_codec = document.maybe_at("codec")
    return Sidecar(
        maybe_codec=_parse_codec(maybe_codec, document.at("codebook_size")) if maybe_codec else None,
        name=document.text_at("name", default="") or None,
        demo=demo.boolean() if demo else False,
        precision=document.text_at("precision", default="float32"),
        codebook_size=codebook_size.whole(2, 65_536) if codebook_size else None,
        graphs={name: _parse_graph(entry) for name, entry in document.entries_at("graphs")},
        files={name: _parse_record(entry) for name, entry in document.entries_at("files")},
    )


def save_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write `mossnano.json` into `folder`."""
    document: dict[str, Any] = {"mossnano": SIDECAR_VERSION}
    if sidecar.name:
        document["name"] = sidecar.name
    document |= {"demo": sidecar.demo, "precision": sidecar.precision}
    if sidecar.codebook_size:
        document["codebook_size"] = sidecar.codebook_size
    if own := sidecar.maybe_codec:
        numbers = {key: value for key, value in vars(own.format).items() if key != "codebook_size"}
        document["codec"] = {"family": own.family, **numbers}
    document["graphs"] = {name: _build_graph(graph) for name, graph in sidecar.graphs.items()}
    document["files"] = {
        name: {"bytes": record.size_bytes, "sha256": record.sha256} for name, record in sidecar.files.items()
    }
    with open_named(folder / SIDECAR_NAME) as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of files that were just built, for `Sidecar.files`."""
    records = {}
    for name in names:
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = FileRecord(file.tell(), sha256)
    return records


def _parse_codec(entry: Entry, codebook_size: Entry) -> OwnCodec:
    keys = ("sample_rate", "channels", "frame_samples", "quantizers")
    sample_rate, channels, frame_samples, quantizers = (entry.at(key).whole(least=1) for key in keys)
    size = codebook_size.whole(2, 65_536)
    return OwnCodec(entry.at("family").text(), CodecFormat(sample_rate, channels, frame_samples, quantizers, size))


def _parse_graph(entry: Entry) -> GraphSpec:
    facts = entry.maybe_at("facts")
    return GraphSpec(
        facts=facts.object() if facts else {},
        file=entry.at("file").file_name(),
        data=tuple(item.file_name() for item in entry.items_at("data")),
        precision=entry.text_at("precision", default="float32"),
        states=tuple(map(_parse_state, entry.items_at("states"))),
        input_names=tuple(item.text() for item in entry.items_at("inputs")),
        output_names=tuple(item.text() for item in entry.items_at("outputs")),
    )


def _build_graph(graph: GraphSpec) -> dict[str, Any]:
    names = {"inputs": list(graph.input_names), "outputs": list(graph.output_names)}
    return {
        "file": graph.file,
        "data": list(graph.data),
        "precision": graph.precision,
        **{key: listed for key, listed in names.items() if listed},
        "states": [_build_state(state) for state in graph.states],
        "facts": dict(graph.facts),
    }


def _parse_state(entry: Entry) -> StateSpec:
    return StateSpec(
        input_name=entry.at("input").text(),
        output_name=entry.at("output").text(),
        shape=entry.at("shape").shape(),
        dtype=np.dtype(entry.at("dtype").one_of("float32", "float16", "int32", "int64")),
        initial=entry.at("initial").whole(least=EMPTY_POSITION),
    )


def _build_state(state: StateSpec) -> dict[str, Any]:
    return {
        "input": state.input_name,
        "output": state.output_name,
        "shape": list(state.shape),
        "dtype": state.dtype.name,
        "initial": state.initial,
    }


def _parse_record(entry: Entry) -> FileRecord:
    sha256 = entry.at("sha256").text()
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise entry.at("sha256").wrong("64 hexadecimal digits in lower case")
    return FileRecord(entry.at("bytes").whole(most=2**63 - 1), sha256)
