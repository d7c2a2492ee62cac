"""Takes the ONNX graphs that encodec-rs runs, as they are, with what its `bundle.json` says of them.

Rules of this room:

- The graphs are copied and never changed. Their length is fixed: what differs for shorter segments stands in
  codecs/encodec.py.
- Only segments as EnCodec's own `.ecdc` files have them are taken: files of other segments are encodec-rs's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.tokens.ecdc import CODEBOOK_SIZE, ECDC_MODELS
from mossnano_stdio.weights import GraphSpec
from mossnano_stdio.weights.checked_json import Entry, load_json

BUNDLE_JSON = "bundle.json"
SCHEMA_VERSION = 1


def maybe_frame_graphs(checkpoint: Path) -> Entry | None:
    """What bundle.json says; None where there is none, or that of something else."""
    path = checkpoint / BUNDLE_JSON
    if not path.is_file():
        return None
    document, _ = load_json(path)
    return document if document.maybe_at("decode_model") else None


def frame_graph_format(document: Entry) -> CodecFormat:
    """Checks that it is a bundle for `.ecdc` files of version 0."""
    if document.at("schema_version").value != SCHEMA_VERSION:
        raise document.at("schema_version").wrong(str(SCHEMA_VERSION))
    segmented = {name: model for name, model in ECDC_MODELS.items() if model.maybe_segment}
    model = segmented[document.at("model_name").one_of(*segmented)]
    assert model.maybe_segment
    length, stride = model.maybe_segment
    needed = {
        "sample_rate": model.sample_rate,
        "channels": model.channels,
        "segment_samples": length,
        "segment_stride": stride,
        "normalize": True,
        "frame_length": length // model.frame_samples,
    }
    for key, value in needed.items():
        if (found := document.at(key)).value != value:
            raise found.wrong(f"{str(value).lower()}, as .ecdc files of {document.at('model_name').text()} have it")
    entries = document.maybe_at("codebook_cardinality")
    if entries and entries.value != CODEBOOK_SIZE:
        raise entries.wrong(str(CODEBOOK_SIZE))
    quantizers = document.at("num_codebooks").whole(1, model.quantizers)
    return CodecFormat(model.sample_rate, model.channels, model.frame_samples, quantizers, CODEBOOK_SIZE)


def copy_frame_graphs(source: Path, document: Entry, folder: Path) -> Iterator[tuple[str, GraphSpec]]:
    """Copy the graphs into `folder`, and give what `mossnano.json` says of them. What encodes may be missing."""
    facts = {
        "contract": "frame graph",
        **{key: document.at(key).whole() for key in ("segment_samples", "segment_stride")},
    }
    for key, graph_name in (("decode_model", "decode_segment"), ("encode_model", "encode_segment")):
        path = source / document.at(key).file_name()
        if not path.is_file() and key == "encode_model":
            continue
        try:
            with path.open("rb") as file, open_named(folder / path.name) as copy:
                shutil.copyfileobj(file, copy)
        except FileNotFoundError:
            raise BundleError(f"{path}: is not there, but {document.at(key).where} names it") from None
        yield graph_name, GraphSpec(path.name, facts=facts)
