"""Builds a weights folder: every graph that the weights give, the metadata, and `mossnano.json`.

Rules of this room:

- Everything is written into a folder within the target, tried out there, and then moved into the target. A failed
  build leaves nothing behind and changes no file that was there before.
- That folder is locked while its build runs (on Windows, where folders cannot be locked, a file in it), and the system
  unlocks it when the process ends in whatever way. So the next build removes what one left that was killed, and nothing
  of one that runs.
- `mossnano.json` is moved last. Until then an older one names sizes and SHA-256 that do not fit the new files, so a
  bundle that is moved by half is refused and never decoded.
- Official files are never changed: graphs built from a bundle are put beside its files, or beside copies of them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mossnano_stdio.build import official
from mossnano_stdio.build.builder import OPSET, open_data
from mossnano_stdio.build.checkpoint import Sides, is_checkpoint, load_checkpoint
from mossnano_stdio.build.decode_step import save_fast_graph
from mossnano_stdio.build.encode_step import save_encode_step
from mossnano_stdio.build.encodec_checkpoint import load_encodec, maybe_encodec_file
from mossnano_stdio.build.encodec_model import EncodecWeights
from mossnano_stdio.build.encodec_random import ENCODEC_SIZES, save_encodec_standin
from mossnano_stdio.build.encodec_steps import save_encodec_decode_step, save_encodec_encode_step
from mossnano_stdio.build.encodec_whole import (
    save_encodec_segment_decode,
    save_encodec_segment_encode,
    save_encodec_whole_decode,
    save_encodec_whole_encode,
)
from mossnano_stdio.build.extract import extract_weights
from mossnano_stdio.build.frame_graphs import copy_frame_graphs, frame_graph_format, maybe_frame_graphs
from mossnano_stdio.build.mimi_checkpoint import load_mimi, maybe_mimi_file
from mossnano_stdio.build.mimi_model import MimiWeights
from mossnano_stdio.build.mimi_random import MIMI_SIZES, save_mimi_standin
from mossnano_stdio.build.mimi_steps import save_mimi_decode_step, save_mimi_encode_step
from mossnano_stdio.build.mimi_whole import save_whole_decode, save_whole_encode
from mossnano_stdio.build.model import CodecWeights
from mossnano_stdio.build.precision import Int8Wish as Int8Wish
from mossnano_stdio.build.precision import add_int8
from mossnano_stdio.build.random_weights import SIZES, save_standin
from mossnano_stdio.build.trial import try_folders
from mossnano_stdio.codecs import INT8
from mossnano_stdio.errors import BundleError, OutputError, UsageError
from mossnano_stdio.files import cannot_write, open_named, told_as
from mossnano_stdio.weights import (
    CODEC_FOLDERS,
    DECODE_DATA,
    DECODE_FULL_FILE,
    DECODE_STEP_FILE,
    ENCODE_DATA,
    ENCODE_FILE,
    METADATA_NAME,
    MIMI_FILES,
    MODELS,
    OFFICIAL_FILES,
    SIDECAR_NAME,
    GraphSpec,
    OwnCodec,
    Sidecar,
    build_metadata,
    load_bundle,
    record_files,
    save_sidecar,
)
from mossnano_stdio.weights.checked_json import Entry

ENCODEC = "encodec"  # the family, as codecs/encodec.py calls it
MIMI = "mimi"  # the family, as codecs/mimi.py calls it, and what the published weights are called
STAGE_PREFIX = ".building-"
ABANDONED_NAME = re.compile(re.escape(STAGE_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile names them
LOCK_NAME = ".locked"  # the file in it that is locked on Windows


Graphs = Literal["fast", "official", "all"]  # ours, those of the official contract, or both


def build_from_checkpoint(
    checkpoint: Path,
    folder: Path,
    sides: Sides = "all",
    graphs: Graphs = "all",
    maybe_int8: Int8Wish | None = None,
) -> None:
    """Build the graphs that a checkpoint gives into `folder`. It may lie inside a text-to-speech model's folder."""
    if (maybe_file := maybe_mimi_file(checkpoint)) is not None:
        mimi, name = load_mimi(maybe_file), _mimi_name(maybe_file)
        save_mimi_bundle(folder, mimi, name=name, sides=sides, graphs=graphs, maybe_int8=maybe_int8)
        return
    if (maybe_file := maybe_encodec_file(checkpoint)) is not None:
        _refuse_int8(maybe_int8)
        save_encodec_bundle(
            folder, load_encodec(maybe_file), name=_encodec_name(maybe_file), sides=sides, graphs=graphs
        )
        return
    if (maybe_document := maybe_frame_graphs(checkpoint)) is not None:
        _refuse_int8(maybe_int8)
        save_frame_graphs(folder, checkpoint, maybe_document)
        return
    codec = maybe_codec_inside(checkpoint) or checkpoint
    weights = load_checkpoint(codec, sides)
    name = codec.resolve().name
    save_bundle(folder, weights, name=name, checkpoint_name=name, graphs=graphs, maybe_int8=maybe_int8)


def _refuse_int8(maybe_int8: Int8Wish | None) -> None:
    if maybe_int8 is not None:
        raise UsageError("--precision int8 is for codecs with transformers, and EnCodec has none; leave it out")


def build_from_bundle(source: Path, folder: Path, maybe_int8: Int8Wish | None = None) -> None:
    """Build our own graphs into `folder` from the weights in the official graphs of `source`, which may be `folder`."""
    bundle = load_bundle(source)
    if bundle.demo:
        raise BundleError(f"{source}: is the demo, whose graphs have no weights to take out; official files are needed")
    if not any(map(bundle.has_graph, ("decode_step", "decode_full"))) or bundle.sidecar.maybe_codec is not None:
        raise BundleError(
            f"{source}: has no official graphs that decode, out of which the weights are taken; "
            f"`mossnano build CHECKPOINT_DIR {folder}` builds graphs of a checkpoint"
        )
    weights = extract_weights(bundle)
    with staged(folder) as stage:
        beside = folder.samefile(source)
        if not beside:
            names = (name for name in ("decode_step", "decode_full", "encode") if bundle.has_graph(name))
            for path in {file.path for name in names for file in bundle.graph(name).files}:
                _copy(path, stage)
        graphs = _save_own_graphs(stage, weights)
        records = record_files(stage, _files_of(graphs))
        fast_files = _files_of({name: graph for name, graph in graphs.items() if name == "fast"})
        keeps_int8 = beside and all(bundle.sidecar.files.get(name) == records[name] for name in fast_files)
        older = {name: graph for name, graph in bundle.sidecar.graphs.items() if keeps_int8 or graph.precision != INT8}
        sidecar = replace(
            bundle.sidecar,
            codebook_size=weights.format.codebook_size,
            graphs={**older, **graphs},  # an int8 graph of other weights is none of these
            files={**bundle.sidecar.files, **records},
        )
        _copy(bundle.folder / METADATA_NAME, stage)
        _finish(stage, sidecar, bundle.folder, maybe_int8)
        if beside:  # the metadata lay here for the trial only
            (stage / METADATA_NAME).unlink()


def save_bundle(
    folder: Path,
    weights: CodecWeights,
    *,
    name: str,
    checkpoint_name: str,
    graphs: Graphs = "all",
    trial: bool = True,
    maybe_int8: Int8Wish | None = None,
) -> None:
    """Build graphs into `folder`: the official contract's, our own, metadata and `mossnano.json`.

    Without a trial nothing is run before it is kept: tests do that, which run the graphs themselves.
    """
    with staged(folder) as stage:
        names = [] if graphs == "fast" else _save_official_graphs(stage, weights)
        streaming = official.streaming_decode(weights.maybe_decoder)
        files = {graph: files for graph, files in OFFICIAL_FILES.items() if files[0] in names}
        metadata = build_metadata(checkpoint_name, weights.format, files, streaming, OPSET)
        with open_named(stage / METADATA_NAME) as file:
            file.write(json.dumps(metadata, indent=2).encode() + b"\n")
        own = {} if graphs == "official" else _save_own_graphs(stage, weights)
        sidecar = Sidecar(
            name=name,
            codebook_size=weights.format.codebook_size,
            graphs=own,
            files=record_files(stage, [*names, METADATA_NAME, *_files_of(own)]),
        )
        _finish(stage, sidecar, stage if trial else None, maybe_int8)


def maybe_codec_inside(folder: Path) -> Path | None:
    """Where in a text-to-speech model's folder its codec's checkpoint lies: in the folder itself if that is no model
    of another kind, or in one inside that is called after the codec.
    """
    places = (folder, *(folder / name for name in CODEC_FOLDERS))
    return next((place for place in places if is_checkpoint(place)), None)


def save_mimi_bundle(
    folder: Path,
    weights: MimiWeights,
    *,
    name: str,
    sides: Sides = "all",
    graphs: Graphs = "all",
    trial: bool = True,
    maybe_int8: Int8Wish | None = None,
) -> None:
    """Build the graphs of a Mimi, and `mossnano.json`, into `folder`. Its "fast" ones are those that step."""
    saves = {
        ("decode", "fast"): ("decode_step", save_mimi_decode_step),
        ("encode", "fast"): ("encode_step", save_mimi_encode_step),
        ("decode", "official"): ("decode_full", save_whole_decode),
        ("encode", "official"): ("encode", save_whole_encode),
    }
    chosen = _chosen(saves, sides, graphs)
    _save_own_codec(
        folder, OwnCodec(MIMI, weights.format), weights, chosen, name=name, trial=trial, maybe_int8=maybe_int8
    )


def save_encodec_bundle(
    folder: Path,
    weights: EncodecWeights,
    *,
    name: str,
    sides: Sides = "all",
    graphs: Graphs = "all",
    trial: bool = True,
) -> None:
    """The same of an EnCodec."""
    saves: Saves = {
        ("decode", "fast"): ("decode_step", save_encodec_decode_step),
        ("encode", "fast"): ("encode_step", save_encodec_encode_step),
        ("decode", "official"): ("decode_full", save_encodec_whole_decode),
        ("encode", "official"): ("encode", save_encodec_whole_encode),
    }
    if weights.maybe_segments is not None:  # of which there is one kind
        saves = {
            ("decode", graphs): ("decode_segment", save_encodec_segment_decode),
            ("encode", graphs): ("encode_segment", save_encodec_segment_encode),
        }
    chosen = _chosen(saves, sides, graphs)
    _save_own_codec(folder, OwnCodec(ENCODEC, weights.format), weights, chosen, name=name, trial=trial)


def save_frame_graphs(folder: Path, source: Path, document: Entry) -> None:
    """encodec-rs's graphs of an EnCodec, as they are, and `mossnano.json`."""
    codec = OwnCodec(ENCODEC, frame_graph_format(document))
    with staged(folder) as stage:
        built = dict(copy_frame_graphs(source, document, stage))
        _finish(stage, _sidecar_of(stage, codec, built, f"{ENCODEC}, {source.resolve().name}"), stage, None)


Saves = Mapping[tuple[str, str], tuple[str, Callable[[Path, Any], GraphSpec]]]  # (side, kind) -> graph, what writes it


def _chosen(saves: Saves, sides: Sides, graphs: Graphs) -> dict[str, Callable[[Path, Any], GraphSpec]]:
    return {
        graph_name: save
        for (side, kind), (graph_name, save) in saves.items()
        if sides in ("all", side) and graphs in ("all", kind)
    }


def _save_own_codec(
    folder: Path,
    codec: OwnCodec,
    weights: Any,
    saves: Mapping[str, Callable[[Path, Any], GraphSpec]],
    *,
    name: str,
    trial: bool,
    maybe_int8: Int8Wish | None = None,
) -> None:
    """Build the graphs of a codec that has no official metadata, and `mossnano.json`, into `folder`."""
    with staged(folder) as stage:
        built = {graph_name: save(stage, weights) for graph_name, save in saves.items()}
        _finish(stage, _sidecar_of(stage, codec, built, name), stage if trial else None, maybe_int8)


def _finish(stage: Path, sidecar: Sidecar, maybe_judge: Path | None, maybe_int8: Int8Wish | None) -> None:
    """Write what is said of the graphs, make the int8 one of those that are there, and try all beside `maybe_judge`."""
    save_sidecar(stage, sidecar)
    if maybe_int8 is not None:
        built = add_int8(stage, load_bundle(stage), maybe_int8)
        files = {**sidecar.files, **record_files(stage, _files_of(built))}
        save_sidecar(stage, replace(sidecar, graphs={**sidecar.graphs, **built}, files=files))
    if maybe_judge is not None:
        try_folders(maybe_judge, stage, maybe_int8.recorded if maybe_int8 else ())


def _sidecar_of(stage: Path, codec: OwnCodec, built: dict[str, GraphSpec], name: str) -> Sidecar:
    return Sidecar(
        name=name,
        codebook_size=codec.format.codebook_size,
        maybe_codec=codec,
        graphs=built,
        files=record_files(stage, _files_of(built)),
    )


def _mimi_name(path: Path) -> str:
    """Which training it is, where that is known."""
    (found,) = record_files(path.parent, [path.name]).values()
    names = [name for name, record in MIMI_FILES.items() if record == found]
    return names[0] if names else f"{MIMI}, {path.stem}"


def _encodec_name(path: Path) -> str:
    """What the checkpoint's folder is called; no hashes of published files are known that would say more."""
    return f"{ENCODEC}, {path.resolve().parent.name}"


def build_encodec_standin(folder: Path, model: str, size: str, seed: int, *, trial: bool = True) -> None:
    """The same of an EnCodec: its checkpoint lies in `folder`/checkpoint."""
    with staged(folder / "checkpoint") as stage:
        path = save_encodec_standin(stage, ENCODEC_SIZES[model][size], seed)
        save_encodec_bundle(folder, load_encodec(path), name=f"{model} {size} stand-in, seed {seed}", trial=trial)


def build_mimi_standin(folder: Path, size: str, seed: int, *, trial: bool = True) -> None:
    """The same of a Mimi: its checkpoint lies in `folder`/checkpoint, with a config beside it, as other sizes need."""
    with staged(folder / "checkpoint") as stage:
        path = save_mimi_standin(stage, MIMI_SIZES[size], seed)
        name = f"{MIMI} {'' if size == 'true' else f'{size} '}stand-in, seed {seed}"
        save_mimi_bundle(folder, load_mimi(path), name=name, trial=trial)


def build_standin(folder: Path, size: str, seed: int, *, model: str = "nano", trial: bool = True) -> None:
    """Write a checkpoint of random weights into `folder`/checkpoint, and build the bundle from it into `folder`."""
    if model == MIMI:
        build_mimi_standin(folder, size, seed, trial=trial)
        return
    if model in ENCODEC_SIZES:
        build_encodec_standin(folder, model, size, seed, trial=trial)
        return
    with staged(folder / "checkpoint") as stage:  # it comes to stay when the bundle has: both, or neither
        save_standin(stage, SIZES[model][size], seed)
        save_bundle(
            folder,
            load_checkpoint(stage),
            name=f"{_called(model, size)} stand-in, seed {seed}",
            checkpoint_name=MODELS[model].checkpoint.name,
            trial=trial,
        )


def _called(model: str, size: str) -> str:
    """Nano and tiny, which were there first, are called by one word."""
    if model == "nano":
        return model if size == "true" else size
    return f"{model} {size}"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to build in. At the end its files are moved into `folder`; after a failure they are deleted."""
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
                pass  # nothing can be locked here, so nobody will find that it is not
            if stage.exists():
                break
        yield stage


def _remove_abandoned(folder: Path) -> None:
    """The stages of builds that were killed: nobody has locked them."""
    for stage in folder.iterdir():
        if ABANDONED_NAME.fullmatch(stage.name) and not stage.is_symlink():
            with suppress(OSError):
                with ExitStack() as undo:
                    _lock(stage, undo)
                    shutil.rmtree(stage, ignore_errors=True)
                if sys.platform == "win32":  # which removed no file that was open; one opened anew just now stays again
                    (stage / LOCK_NAME).unlink()
                    stage.rmdir()


def _lock(folder: Path, undo: ExitStack) -> None:
    """Lock it until `undo`. A BlockingIOError where another has, a FileNotFoundError where it is gone, and another
    OSError where nothing can be locked."""
    if sys.platform == "win32":
        import msvcrt

        opened = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)
        undo.callback(os.close, opened)
        try:
            msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
    else:
        import fcntl

        opened = os.open(folder, os.O_RDONLY)
        undo.callback(os.close, opened)
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _move(stage: Path, folder: Path) -> None:
    paths = [path for path in stage.iterdir() if path.name != LOCK_NAME]
    paths.sort(key=lambda path: path.name == SIDECAR_NAME)
    for target in (folder / path.name for path in paths):
        if target.is_dir():
            raise OutputError(f"{cannot_write(target)}: {os.strerror(errno.EISDIR)} (EISDIR)")
    for path in paths:
        with told_as(cannot_write(folder / path.name)):
            path.replace(folder / path.name)


def _save_official_graphs(folder: Path, weights: CodecWeights) -> list[str]:
    """Returns the names of the files."""
    names = []
    if (decoder := weights.maybe_decoder) is not None:
        with open_data(folder / DECODE_DATA) as data:
            official.decode_step(decoder, data).save(folder / DECODE_STEP_FILE)
            official.decode_full(decoder, data).save(folder / DECODE_FULL_FILE)
        names += [DECODE_STEP_FILE, DECODE_FULL_FILE, DECODE_DATA]
    if (encoder := weights.maybe_encoder) is not None:
        with open_data(folder / ENCODE_DATA) as data:
            official.encode(encoder, data).save(folder / ENCODE_FILE)
        names += [ENCODE_FILE, ENCODE_DATA]
    return names


def _save_own_graphs(folder: Path, weights: CodecWeights) -> dict[str, GraphSpec]:
    graphs = {}
    if weights.maybe_decoder is not None:
        graphs["fast"] = save_fast_graph(folder, weights.maybe_decoder)
    if weights.maybe_encoder is not None:
        graphs["encode_step"] = save_encode_step(folder, weights.maybe_encoder)
    return graphs


def _files_of(graphs: dict[str, GraphSpec]) -> list[str]:
    return [name for graph in graphs.values() for name in (graph.file, *graph.data)]


def _copy(path: Path, folder: Path) -> None:
    """As shutil would, which names the file that is read when the other cannot be written."""
    with path.open("rb") as source, open_named(folder / path.name) as copy:
        shutil.copyfileobj(source, copy)
