"""A bundle, put together: every graph that can be built from some weights, the metadata, and our own notes beside it.

Rules of this room:

- Everything is written into a folder of its own within the target and moved from there when it is whole: what was
  in the target before stays until then, and of a failed build nothing stays.
- `mossnano.json` comes last. Until it is there, what an older one says about sizes and SHA-256 does not fit the new
  files, so a half-moved bundle is refused and never decoded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mossnano_stdio import pinned
from mossnano_stdio.bundle import SIDECAR_NAME, Sidecar, record_files, save_sidecar
from mossnano_stdio.errors import OutputError
from mossnano_stdio.graph import contract, official
from mossnano_stdio.graph.builder import save_graphs
from mossnano_stdio.graph.checkpoint import load_checkpoint
from mossnano_stdio.graph.standin import SIZES, save_standin
from mossnano_stdio.graph.weights import CodecWeights

PUBLISHED_CHECKPOINT_NAME = pinned.CHECKPOINT.repository.rpartition("/")[2]


def build_from_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Every graph that a checkpoint gives, into `folder`."""
    name = checkpoint.resolve().name
    save_bundle(folder, load_checkpoint(checkpoint), name=name, checkpoint_name=name)


def save_bundle(folder: Path, weights: CodecWeights, *, name: str, checkpoint_name: str) -> None:
    """Build all graphs into `folder`: the official contract, our own, metadata and `mossnano.json`."""
    with staged(folder) as stage:
        names = _save_official_graphs(stage, weights)
        metadata = contract.metadata(weights, checkpoint_name)
        (stage / contract.METADATA_NAME).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        sidecar = Sidecar(
            name=name,
            codebook_size=weights.format.codebook_size,
            files=record_files(stage, [*names, contract.METADATA_NAME]),
        )
        save_sidecar(stage, sidecar)


def build_standin(folder: Path, size: str, seed: int) -> None:
    """Make up a stand-in: its checkpoint in `folder`/checkpoint, and the bundle built from that in `folder`."""
    checkpoint = folder / "checkpoint"
    with staged(checkpoint) as stage:
        save_standin(stage, SIZES[size], seed)
    save_bundle(
        folder,
        load_checkpoint(checkpoint),
        name=f"{size} stand-in, seed {seed}",
        checkpoint_name=PUBLISHED_CHECKPOINT_NAME,
    )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to build in, whose files are moved into `folder` at the end and are gone where something failed."""
    stage = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
        yield stage
        for path in sorted(stage.iterdir(), key=lambda path: path.name == SIDECAR_NAME):
            path.replace(folder / path.name)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror} ({error.filename})") from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)


def _save_official_graphs(folder: Path, weights: CodecWeights) -> list[str]:
    decoder, maybe_encoder = weights.decoder, weights.maybe_encoder
    decode = {
        contract.DECODE_STEP_FILE: official.decode_step(decoder),
        contract.DECODE_FULL_FILE: official.decode_full(decoder),
    }
    names = save_graphs(folder, decode, contract.DECODE_DATA)
    if maybe_encoder is not None:
        names += save_graphs(folder, {contract.ENCODE_FILE: official.encode(maybe_encoder)}, contract.ENCODE_DATA)
    return names
