"""Where a weights folder lies, and what it holds: a bundle, checked, that the codecs can trust.

A bundle is what `codec_browser_onnx_meta.json` says, plus what our own `mossnano.json` beside it adds; of a codec that
has no such metadata, `mossnano.json` says everything. What can be read there is not assumed, and no graph is opened but
for the size of its codebooks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mossnano_stdio.errors import BundleError
from mossnano_stdio.frozen import WEIGHTS_FOLDER, maybe_frozen_folder
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights import published
from mossnano_stdio.weights.checked_json import Entry
from mossnano_stdio.weights.digest import cache_folder, sha256_of
from mossnano_stdio.weights.graphs import CacheSpec, Graph, GraphSpec, WeightFile
from mossnano_stdio.weights.metadata import (
    METADATA_NAME,
    load_metadata,
    parse_caches,
    parse_codec_config,
    parse_graphs,
)
from mossnano_stdio.weights.onnx_shapes import initializer_shapes
from mossnano_stdio.weights.published import PinnedRepository, PublishedModel
from mossnano_stdio.weights.sidecar import SIDECAR_NAME, SIDECAR_VERSION, Sidecar, load_sidecar

DEMO = "demo"  # what `--weights` calls the built-in weights
DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "weights"
WEIGHTS_VARIABLE = "MOSSNANO_WEIGHTS"
CODEC_FOLDERS = ("audio_tokenizer", "moss_audio_tokenizer", "codec")  # as text-to-speech models call the codec's


@dataclass(frozen=True)
class Bundle:
    """A weights folder whose metadata made sense. Its graphs' files are looked at when they are asked for."""

    folder: Path
    name: str
    format: CodecFormat
    metadata_file: WeightFile
    graphs: Mapping[str, Graph]
    caches: tuple[CacheSpec, ...]
    sidecar: Sidecar
    is_published: bool  # it claims to be the pinned revision, so its files are held against that

    @property
    def demo(self) -> bool:
        return self.sidecar.demo

    @property
    def contexts_tokens(self) -> tuple[int, ...]:
        """How far each layer of the graph that decodes looks back."""
        if self.sidecar.maybe_codec is None:
            return tuple(cache.context_tokens for cache in self.caches)
        if "decode_step" not in self.graphs:
            return ()
        graph = self.graphs["decode_step"]
        transformers = Entry(dict(graph.facts), f"{graph.path}: facts").items_at("transformers")
        contexts = [
            [entry.at("context_tokens").whole(least=1)] * entry.at("layers").whole(least=1) for entry in transformers
        ]
        return tuple(itertools.chain(*contexts))

    def has_graph(self, name: str) -> bool:
        """Is there such a graph, with its file? `mossnano fetch` may have left out those that nobody needed."""
        return name in self.graphs and self.graphs[name].path.exists()

    def graph(self, name: str) -> Graph:
        """The graph, its files all there and of the right sizes."""
        if name not in self.graphs:
            raise BundleError(f"{self.folder}: has no graph {name!r}, only {', '.join(self.graphs)}")
        graph = self.graphs[name]
        for file in graph.files:
            file.check_size()
        self._refuse_foreign_metadata(graph)
        return graph

    def _refuse_foreign_metadata(self, graph: Graph) -> None:
        """A published graph beside metadata that is neither published nor ours: one changed digit is a wrong rate."""
        maybe_pinned = published.BUNDLE.files.get(graph.path.name)
        if graph.model.record or not maybe_pinned or graph.path.stat().st_size != maybe_pinned.size_bytes:
            return
        if sha256_of(graph.path) == maybe_pinned.sha256:
            raise BundleError(
                f"{self.folder / METADATA_NAME}: is not the one that was published with {graph.path.name}; "
                f"it was damaged or changed: get it again"
            )


def find_weights(option: str | None = None) -> Path:
    """The folder that `--weights` names; else that of a frozen folder, $MOSSNANO_WEIGHTS, ./weights/..., the user's
    caches, in this order."""
    maybe_frozen = maybe_frozen_folder()
    frozen_places = [maybe_frozen / WEIGHTS_FOLDER] if maybe_frozen else []
    if not option and frozen_places and _is_weights_folder(frozen_places[0]):
        return frozen_places[0]
    if chosen := option or os.environ.get(WEIGHTS_VARIABLE):
        asked_by = "--weights" if option else f"${WEIGHTS_VARIABLE}"
        return _named_weights(chosen, asked_by)
    places = _places_of(published.MODELS["nano"])
    for folder in places:
        if _is_weights_folder(folder):
            return folder
    looked = ", ".join(str(folder) for folder in (*frozen_places, *places))
    raise BundleError(
        f"no weights found in {looked}, and neither --weights nor ${WEIGHTS_VARIABLE} names any; "
        f"`mossnano fetch` gets the official ones, `--weights {DEMO}` is the built-in demo"
    )


def _named_weights(chosen: str, asked_by: str) -> Path:
    folder = DEMO_FOLDER if chosen == DEMO else Path(chosen).expanduser()
    if folder.is_file():
        raise BundleError(f"{folder}: is a file; {asked_by} takes the folder that holds {METADATA_NAME}")
    if chosen in published.MODELS and not folder.is_dir():
        return _weights_of_model(chosen)
    if not folder.is_dir():
        raise BundleError(f"{folder}: is not there; {asked_by} takes a weights folder, or {DEMO!r}")
    places = (folder, *(folder / name for name in CODEC_FOLDERS))
    maybe_inside = next((place for place in places if _is_weights_folder(place)), None)
    if maybe_inside is None:
        raise BundleError(
            f"{folder / METADATA_NAME}: is not there, so this is no weights folder; "
            f"`mossnano fetch --to {folder}` makes it one"
        )
    return maybe_inside


def _weights_of_model(model: str) -> Path:
    places = _places_of(published.MODELS[model])
    for folder in places:
        if _is_weights_folder(folder):
            return folder
    looked = ", ".join(str(folder) for folder in places)
    raise BundleError(f"no weights of {model} found in {looked}; `mossnano fetch --model {model}` gets them")


def _is_weights_folder(folder: Path) -> bool:
    """Is there official metadata, or does `mossnano.json` say all that is needed?"""
    return (folder / METADATA_NAME).exists() or load_sidecar(folder).maybe_codec is not None


def _places_of(model: PublishedModel) -> list[Path]:
    """The folders in which a model's graphs are looked for, the first one first."""
    places = [Path("weights") / model.folder_name, cache_folder() / model.folder_name]
    return [*places, _hub_folder(model.maybe_bundle)] if model.maybe_bundle else places


def _hub_folder(pinned: PinnedRepository) -> Path:
    """Where the model hub's client keeps the pinned revision."""
    if chosen := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        cache = Path(chosen)
    else:
        user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = Path(os.environ.get("HF_HOME") or f"{user_cache}/huggingface") / "hub"
    owner, name = pinned.repository.split("/")
    return cache.expanduser() / f"models--{owner}--{name}" / "snapshots" / pinned.revision


def load_bundle(folder: Path) -> Bundle:
    """Read and check `folder`'s metadata."""
    sidecar = load_sidecar(folder)
    if own := sidecar.maybe_codec:
        return Bundle(
            folder=folder,
            name=sidecar.name or own.family,
            format=own.format,
            metadata_file=WeightFile(folder / SIDECAR_NAME, None, "unknown"),
            graphs=_graphs(sidecar.graphs, lambda name: _recorded_file(folder / name, sidecar)),
            caches=(),
            sidecar=sidecar,
            is_published=False,
        )
    metadata, content = load_metadata(folder)
    is_published = _is_published(content, sidecar)

    def weight_file(name: str) -> WeightFile:
        if name not in sidecar.files and is_published and name in published.BUNDLE.files:
            return WeightFile(folder / name, published.BUNDLE.files[name], "published")
        return _recorded_file(folder / name, sidecar)

    metadata_file = weight_file(METADATA_NAME)
    metadata_file.check_size()
    metadata_file.check_content()
    graphs = _graphs({**parse_graphs(metadata, sidecar.precision), **sidecar.graphs}, weight_file)
    if "decode_step" not in graphs and not sidecar.codebook_size:  # without one, the other says what we have built
        raise BundleError(f"{metadata.at('files').where}: 'decode_step' is missing, nothing can be decoded without it")
    return Bundle(
        folder=folder,
        name=sidecar.name or metadata.text_at("checkpoint_path", default=folder.name),
        format=CodecFormat(
            *parse_codec_config(metadata),
            codebook_size=sidecar.codebook_size
            or (published.NANO.codebook_size if is_published else _codebook_size(graphs["decode_step"])),
        ),
        metadata_file=metadata_file,
        graphs=graphs,
        caches=parse_caches(metadata),
        sidecar=sidecar,
        is_published=is_published,
    )


def _recorded_file(path: Path, sidecar: Sidecar) -> WeightFile:
    if path.name in sidecar.files:
        return WeightFile(path, sidecar.files[path.name], "recorded")
    return WeightFile(path, None, "unknown")


def _graphs(specs: Mapping[str, GraphSpec], weight_file: Callable[[str], WeightFile]) -> dict[str, Graph]:
    return {
        name: Graph(
            name=name,
            model=weight_file(spec.file),
            data=tuple(map(weight_file, spec.data)),
            input_names=spec.input_names,
            output_names=spec.output_names,
            states=spec.states,
            precision=spec.precision,
            facts=spec.facts,
        )
        for name, spec in specs.items()
    }


def _is_published(metadata: bytes, sidecar: Sidecar) -> bool:
    """Is this the published metadata, and did nobody record other graphs for it (a stand-in of the same shape)?"""
    if hashlib.sha256(metadata).hexdigest() != published.BUNDLE.files[METADATA_NAME].sha256:
        return False
    return all(sidecar.files.get(name, record) == record for name, record in published.BUNDLE.files.items())


def _codebook_size(graph: Graph) -> int:
    """How many rows the codebooks in the graph's file have. No metadata says it, but constants keep their names."""
    graph.model.check_size()
    try:
        shapes = initializer_shapes(graph.path.read_bytes())
    except OSError as error:
        raise BundleError(f"{graph.path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BundleError(f"{graph.path}: is no ONNX file ({error})") from None
    sizes = {shape[0] for name, shape in shapes.items() if "codebook" in name and len(shape) == 2}
    if len(sizes) != 1:
        raise BundleError(
            f"{graph.path}: names {len(sizes) or 'no'} sizes of codebooks, one is needed; "
            f'write {{"mossnano": {SIDECAR_VERSION}, "codebook_size": ...}} into {graph.path.with_name(SIDECAR_NAME)}'
        )
    return sizes.pop()
