"""A bundle, put together: every graph that can be built from some weights, the metadata, and our own notes beside it.

Rules of this room:

- Everything is written into a folder of its own within the target and moved from there when it is whole and was
  tried out. Of a failed build nothing stays, and what was there before does.
- That folder is locked while its build runs, and the system unlocks it when the process ends in whatever way. So the
  next build removes what one left that was killed, and nothing of one that runs. (On Windows it cannot tell, and leaves
  both.)
- `mossnano.json` comes last. Until it is there, what an older one says about sizes and SHA-256 does not fit the new
  files, so a half-moved bundle is refused and never decoded.
- Official files are never changed: built from a bundle, our graphs land beside its files, or beside copies of them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mossnano_stdio.build import official
from mossnano_stdio.build.builder import OPSET, save_graphs
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.decode_step import save_fast_graph
from mossnano_stdio.build.encode_step import save_encode_step
from mossnano_stdio.build.extract import extract_weights
from mossnano_stdio.build.model import CodecWeights
from mossnano_stdio.build.random_weights import SIZES, save_standin
from mossnano_stdio.build.trial import try_decoder, try_encoder
from mossnano_stdio.errors import BundleError, OutputError
from mossnano_stdio.files import cannot_write, open_named, told_as
from mossnano_stdio.weights import published
from mossnano_stdio.weights.folder import Bundle, load_bundle
from mossnano_stdio.weights.graphs import GraphSpec
from mossnano_stdio.weights.metadata import (
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
    OFFICIAL_FILES,
    build_metadata,
)
from mossnano_stdio.weights.sidecar import SIDECAR_NAME, Sidecar, record_files, save_sidecar

STAGE_PREFIX = ".building-"
ABANDONED_NAME = re.compile(re.escape(STAGE_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile names them
PUBLISHED_CHECKPOINT_NAME = published.CHECKPOINT.repository.rpartition("/")[2]


def build_from_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Every graph that a checkpoint gives, into `folder`."""
    name = checkpoint.resolve().name
    save_bundle(folder, load_checkpoint(checkpoint), name=name, checkpoint_name=name)


def build_from_bundle(source: Path, folder: Path) -> None:
    """Our own graphs into `folder`, their weights taken out of the official graphs in `source`; it may be the same."""
    bundle = load_bundle(source)
    if bundle.demo:
        raise BundleError(f"{source}: is the demo, whose graphs have no weights to take out; official files are needed")
    weights = extract_weights(bundle)
    with staged(folder) as stage:
        beside = folder.samefile(source)
        if not beside:
            _copy_official_files(bundle, stage)
        graphs = _save_own_graphs(stage, weights)
        sidecar = replace(
            bundle.sidecar,
            codebook_size=weights.format.codebook_size,
            graphs={**bundle.sidecar.graphs, **graphs},
            files={**bundle.sidecar.files, **record_files(stage, _files_of(graphs))},
        )
        save_sidecar(stage, sidecar)
        _copy(bundle.folder / METADATA_NAME, stage)
        _try(bundle, load_bundle(stage))
        if beside:
            (stage / METADATA_NAME).unlink()


def save_bundle(folder: Path, weights: CodecWeights, *, name: str, checkpoint_name: str, trial: bool = True) -> None:
    """All graphs into `folder`: those of the official contract, our own, metadata and `mossnano.json`.

    Without a trial they are kept unheard, for who tries them anyway.
    """
    with staged(folder) as stage:
        names = _save_official_graphs(stage, weights)
        streaming = official.streaming_decode(weights.decoder)
        metadata = build_metadata(checkpoint_name, weights.format, OFFICIAL_FILES, streaming, OPSET)
        with open_named(stage / METADATA_NAME) as file:
            file.write(json.dumps(metadata, indent=2).encode() + b"\n")
        graphs = _save_own_graphs(stage, weights)
        sidecar = Sidecar(
            name=name,
            codebook_size=weights.format.codebook_size,
            graphs=graphs,
            files=record_files(stage, [*names, METADATA_NAME, *_files_of(graphs)]),
        )
        save_sidecar(stage, sidecar)
        if trial:
            built = load_bundle(stage)
            _try(built, built)


def build_standin(folder: Path, size: str, seed: int, *, trial: bool = True) -> None:
    """Make up a stand-in: its checkpoint in `folder`/checkpoint, and the bundle built from that in `folder`."""
    with staged(folder / "checkpoint") as stage:  # it comes to stay when the bundle has: both, or neither
        save_standin(stage, SIZES[size], seed)
        save_bundle(
            folder,
            load_checkpoint(stage),
            name=f"{size} stand-in, seed {seed}",
            checkpoint_name=PUBLISHED_CHECKPOINT_NAME,
            trial=trial,
        )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to build in, whose files are moved into `folder` at the end and are gone where something failed."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with told_as(cannot_write(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        with _locked_stage(folder) as stage:
            yield stage
            _move(stage, folder)
        made.clear()  # it stays
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


@contextmanager
def _locked_stage(folder: Path) -> Iterator[Path]:
    """A new folder within `folder`, which is ours until the end of the block and gone after it."""
    with ExitStack() as undo:
        while True:
            with told_as(cannot_write(folder)):
                stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=folder))
            undo.callback(shutil.rmtree, stage, ignore_errors=True)
            try:
                _lock(stage, undo)
            except (BlockingIOError, FileNotFoundError):
                continue  # another build came in between and took it for abandoned
            except OSError:
                break  # nothing can be locked here, so nobody will find that it is not
            if stage.exists():
                break
        yield stage


def _remove_abandoned(folder: Path) -> None:
    """The stages of builds that were killed: nobody has locked them."""
    for stage in folder.iterdir():
        if ABANDONED_NAME.fullmatch(stage.name) and not stage.is_symlink():
            with ExitStack() as undo, suppress(OSError):
                _lock(stage, undo)
                shutil.rmtree(stage, ignore_errors=True)


def _lock(folder: Path, undo: ExitStack) -> None:
    """Lock it until `undo`. An OSError where another has, where it is gone, or where folders cannot be locked."""
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(folder))
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    undo.callback(os.close, opened)
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _move(stage: Path, folder: Path) -> None:
    paths = sorted(stage.iterdir(), key=lambda path: path.name == SIDECAR_NAME)
    for target in (folder / path.name for path in paths):
        if target.is_dir():
            raise OutputError(f"{cannot_write(target)}: {os.strerror(errno.EISDIR)} (EISDIR)")
    for path in paths:
        with told_as(cannot_write(folder / path.name)):
            path.replace(folder / path.name)


def _try(source: Bundle, built: Bundle) -> None:
    try_decoder(source, built)
    if "encode_step" in built.graphs:
        try_encoder(source, built)


def _save_official_graphs(folder: Path, weights: CodecWeights) -> list[str]:
    decoder, maybe_encoder = weights.decoder, weights.maybe_encoder
    decode = {
        DECODE_STEP_FILE: official.decode_step(decoder),
        DECODE_FULL_FILE: official.decode_full(decoder),
    }
    names = save_graphs(folder, decode, DECODE_DATA)
    if maybe_encoder is not None:
        names += save_graphs(folder, {ENCODE_FILE: official.encode(maybe_encoder)}, ENCODE_DATA)
    return names


def _save_own_graphs(folder: Path, weights: CodecWeights) -> dict[str, GraphSpec]:
    graphs = {"fast": save_fast_graph(folder, weights.decoder)}
    if weights.maybe_encoder is not None:
        graphs["encode_step"] = save_encode_step(folder, weights.maybe_encoder)
    return graphs


def _files_of(graphs: dict[str, GraphSpec]) -> list[str]:
    return [name for graph in graphs.values() for name in (graph.file, *graph.data)]


def _copy_official_files(bundle: Bundle, folder: Path) -> None:
    names = (name for name in ("decode_step", "decode_full", "encode") if bundle.has_graph(name))
    for path in {file.path for name in names for file in bundle.graph(name).files}:
        _copy(path, folder)


def _copy(path: Path, folder: Path) -> None:
    """As shutil would, which names the file that is read when the other cannot be written."""
    with path.open("rb") as source, open_named(folder / path.name) as copy:
        shutil.copyfileobj(source, copy)
