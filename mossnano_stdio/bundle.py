"""A weights folder: its metadata, checked, as specifications that the codec can trust; and where such a folder lies.

Rules of this room:

- A bundle is what `codec_browser_onnx_meta.json` says, plus what our own `mossnano.json` beside it adds. Nothing is
  assumed that can be read there, and nothing here opens a graph but for the size of its codebooks.
- Whatever is wrong with a file is a BundleError that begins with the file's path.
- Sizes are always compared, and the SHA-256 of every file that is used and whose SHA-256 is known: what we built is
  recorded in `mossnano.json`, what was published is pinned in pinned.py.
- There is no silent fall back: weights that were asked for and are not there are an error, and the demo is only
  loaded by its name.

`mossnano.json`, every key but the first optional:

    {
      "mossnano": 1,                      version of this file
      "name": "nano stand-in, seed 0",    what to call these weights
      "demo": false,                      the built-in demo, to be labelled as such wherever it appears
      "precision": "float32",             of the official graphs
      "codebook_size": 1024,
      "graphs": {                         graphs beyond the three official ones
        "fast": {
          "file": "fast.onnx",
          "data": ["fast.data"],          its external data
          "precision": "float32",
          "states": [{"input": "keys", "output": "keys_out", "shape": [1, 4], "dtype": "float32", "initial": 0}],
          "facts": {}                     whatever the code that runs this graph has to know
        }
      },
      "files": {"fast.onnx": {"bytes": 123, "sha256": "..."}}    what was built, to the byte
    }
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio import pinned
from mossnano_stdio.digest import cache_folder, sha256_of
from mossnano_stdio.entry import Entry, load_json
from mossnano_stdio.errors import BundleError
from mossnano_stdio.files import open_named
from mossnano_stdio.initializers import initializer_shapes
from mossnano_stdio.layout import CodecFormat
from mossnano_stdio.pinned import FileRecord

METADATA_NAME = pinned.METADATA_NAME
METADATA_VERSION = 2
SIDECAR_NAME = "mossnano.json"
SIDECAR_VERSION = 1

DEMO = "demo"  # what `--weights` calls the built-in weights
DEMO_FOLDER = Path(__file__).parent / "demo" / "weights"
WEIGHTS_VARIABLE = "MOSSNANO_WEIGHTS"
WEIGHTS_NAME = "MOSS-Audio-Tokenizer-Nano-ONNX"

EMPTY_POSITION = -1  # of a cache entry that holds nothing yet: masked in every attention


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a streaming graph gives as `output_name` and takes as `input_name` in the next run."""

    input_name: str
    output_name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    initial: int

    def initial_value(self) -> NDArray[Any]:
        return np.full(self.shape, self.initial, dtype=self.dtype)


@dataclass(frozen=True)
class CacheSpec:
    """One layer's attention cache: how many tokens it looks back, and which state tensor counts its tokens."""

    decoder_index: int
    layer_index: int
    heads: int
    context_tokens: int
    offset_input_name: str


@dataclass(frozen=True)
class WeightFile:
    """A file of a bundle, and what it must be where that is known."""

    path: Path
    record: FileRecord | None
    origin: Literal["published", "recorded", "unknown"]

    def check_size(self) -> None:
        """Is it there, a regular file (through any symlinks), and as large as it must be?"""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise BundleError(
                f"{self.path}: is not there; `mossnano fetch` gets the official files, `mossnano build` makes ours"
            ) from None
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{self.path}: is no regular file")
        if self.record and status.st_size != self.record.size_bytes:
            raise BundleError(
                f"{self.path}: has {status.st_size} bytes, the {self.origin} size is {self.record.size_bytes}; "
                f"it is cut short or another file: get it again"
            )

    def check_content(self, *, afresh: bool = False) -> None:
        """Is its SHA-256 what it must be? Takes its time with a file not seen before, or `afresh` (see digest.py)."""
        if self.record is None:
            return
        try:
            found = sha256_of(self.path, afresh=afresh)
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read ({error.strerror})") from None
        if found != self.record.sha256:
            raise BundleError(
                f"{self.path}: has SHA-256 {found}, the {self.origin} one is {self.record.sha256}; "
                f"it was damaged or changed: get it again"
            )


@dataclass(frozen=True)
class Graph:
    """One ONNX graph: its files, its contract as the metadata has it, and the facts that only its runner knows."""

    name: str
    model: WeightFile
    data: tuple[WeightFile, ...]
    input_names: tuple[str, ...]  # those that are no state, in order; empty where the metadata does not say
    output_names: tuple[str, ...]
    states: tuple[StateSpec, ...]
    precision: str
    facts: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.model.path

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return (self.model, *self.data)


@dataclass(frozen=True)
class SidecarGraph:
    """A graph that the official metadata has no place for."""

    file: str
    data: tuple[str, ...] = ()
    precision: str = "float32"
    states: tuple[StateSpec, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sidecar:
    """What `mossnano.json` holds."""

    name: str | None = None
    demo: bool = False
    precision: str = "float32"
    codebook_size: int | None = None
    graphs: Mapping[str, SidecarGraph] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)


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
        published = pinned.BUNDLE.files.get(graph.path.name)
        if graph.model.record or not published or graph.path.stat().st_size != published.size_bytes:
            return
        if sha256_of(graph.path) == published.sha256:
            raise BundleError(
                f"{self.folder / METADATA_NAME}: is not the one that was published with {graph.path.name}; "
                f"it was damaged or changed: get it again"
            )


def find_weights(option: str | None = None) -> Path:
    """The folder that `--weights` names; else $MOSSNANO_WEIGHTS, ./weights/..., the user's caches, in this order."""
    if chosen := option or os.environ.get(WEIGHTS_VARIABLE):
        asked_by = "--weights" if option else f"${WEIGHTS_VARIABLE}"
        return _named_weights(chosen, asked_by)
    places = [Path("weights") / WEIGHTS_NAME, cache_folder() / WEIGHTS_NAME, _hub_folder()]
    for folder in places:
        if (folder / METADATA_NAME).is_file():
            return folder
    looked = ", ".join(str(folder) for folder in places)
    raise BundleError(
        f"no weights found in {looked}, and neither --weights nor ${WEIGHTS_VARIABLE} names any; "
        f"`mossnano fetch` gets the official ones, `--weights {DEMO}` is the built-in demo"
    )


def load_bundle(folder: Path) -> Bundle:
    """Read and check `folder`'s metadata."""
    metadata, content = load_json(folder / METADATA_NAME)
    if (version := metadata.at("format_version").whole()) != METADATA_VERSION:
        raise BundleError(
            f"{metadata.where}: format_version is {version}, {METADATA_VERSION} is what this program reads"
        )
    sidecar = load_sidecar(folder)
    is_published = _is_published(content, sidecar)
    files = _Files(folder, sidecar.files, is_published)
    metadata_file = files.weight_file(METADATA_NAME)
    metadata_file.check_size()
    metadata_file.check_content()
    graphs = _official_graphs(metadata, files, sidecar) | _sidecar_graphs(files, sidecar)
    return Bundle(
        folder=folder,
        name=sidecar.name or metadata.text_at("checkpoint_path", default=folder.name),
        format=_codec_format(metadata, graphs, sidecar, is_published),
        metadata_file=metadata_file,
        graphs=graphs,
        caches=tuple(_caches(metadata)),
        sidecar=sidecar,
        is_published=is_published,
    )


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
    return Sidecar(
        name=document.text_at("name", default="") or None,
        demo=demo.boolean() if demo else False,
        precision=document.text_at("precision", default="float32"),
        codebook_size=codebook_size.whole(2, 65_536) if codebook_size else None,
        graphs={name: _parse_sidecar_graph(entry) for name, entry in document.entries_at("graphs")},
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
    document["graphs"] = {name: _built_sidecar_graph(graph) for name, graph in sidecar.graphs.items()}
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


def _named_weights(chosen: str, asked_by: str) -> Path:
    folder = DEMO_FOLDER if chosen == DEMO else Path(chosen).expanduser()
    if folder.is_file():
        raise BundleError(f"{folder}: is a file; {asked_by} takes the folder that holds {METADATA_NAME}")
    if not folder.is_dir():
        raise BundleError(f"{folder}: is not there; {asked_by} takes a weights folder, or {DEMO!r}")
    if not (folder / METADATA_NAME).exists():
        raise BundleError(
            f"{folder / METADATA_NAME}: is not there, so this is no weights folder; "
            f"`mossnano fetch --to {folder}` makes it one"
        )
    return folder


def _hub_folder() -> Path:
    """Where the model hub's client keeps the pinned revision."""
    owner, name = pinned.BUNDLE.repository.split("/")
    return _hub_cache() / f"models--{owner}--{name}" / "snapshots" / pinned.BUNDLE.revision


def _hub_cache() -> Path:
    if chosen := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


@dataclass(frozen=True)
class _Files:
    """Files of one folder, each with what is known about it."""

    folder: Path
    recorded: Mapping[str, FileRecord]
    is_published: bool

    def weight_file(self, name: str) -> WeightFile:
        path = self.folder / name
        if name in self.recorded:
            return WeightFile(path, self.recorded[name], "recorded")
        if self.is_published and name in pinned.BUNDLE.files:
            return WeightFile(path, pinned.BUNDLE.files[name], "published")
        return WeightFile(path, None, "unknown")

    def weight_files(self, names: Sequence[str]) -> tuple[WeightFile, ...]:
        return tuple(map(self.weight_file, names))


def _is_published(metadata: bytes, sidecar: Sidecar) -> bool:
    """Is this the published metadata, and did nobody record other graphs for it (a stand-in of the same shape)?"""
    if hashlib.sha256(metadata).hexdigest() != pinned.BUNDLE.files[METADATA_NAME].sha256:
        return False
    return all(sidecar.files.get(name, record) == record for name, record in pinned.BUNDLE.files.items())


def _codec_format(metadata: Entry, graphs: Mapping[str, Graph], sidecar: Sidecar, is_published: bool) -> CodecFormat:
    config = metadata.at("codec_config")
    return CodecFormat(
        sample_rate=config.at("sample_rate").whole(least=1),
        channels=config.at("channels").whole(least=1),
        frame_samples=config.at("downsample_rate").whole(least=1),
        quantizers=config.at("num_quantizers").whole(least=1),
        codebook_size=sidecar.codebook_size
        or (pinned.CODEBOOK_SIZE if is_published else _codebook_size(graphs["decode_step"])),
    )


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


def _official_graphs(metadata: Entry, files: _Files, sidecar: Sidecar) -> dict[str, Graph]:
    """The three graphs of the official contract; `encode` may be left out."""
    names = metadata.at("onnx")
    states = _decoder_states(metadata.at("streaming_decode"))
    contracts = {"decode_step": "decode_step", "decode_full": "decode", "encode": "encode"}
    graphs = {}
    for name, prefix in contracts.items():
        entry = metadata.at("files").maybe_at(name)
        if entry is None:
            continue
        file_name = entry.file_name()
        data = metadata.at("external_data_files").maybe_at(file_name)
        input_names = names.at(f"{prefix}_input_names")
        output_names = names.at(f"{prefix}_output_names")
        graph_states = states if name == "decode_step" else ()
        graphs[name] = Graph(
            name=name,
            model=files.weight_file(file_name),
            data=files.weight_files([item.file_name() for item in data.items()]) if data else (),
            input_names=_without_states(input_names, [state.input_name for state in graph_states]),
            output_names=_without_states(output_names, [state.output_name for state in graph_states]),
            states=graph_states,
            precision=sidecar.precision,
            facts={},
        )
    if "decode_step" not in graphs:
        raise BundleError(f"{metadata.at('files').where}: 'decode_step' is missing, nothing can be decoded without it")
    return graphs


def _without_states(listed: Entry, state_names: Sequence[str]) -> tuple[str, ...]:
    """The two names in the list that no state has; every state's name must be in the list once."""
    names = listed.texts()
    if len(set(names)) != len(names) or len(set(state_names)) != len(state_names):
        repeated = [name for name in {*names} if max(names.count(name), state_names.count(name)) > 1]
        raise BundleError(f"{listed.where}: {', '.join(repeated)} comes twice, every tensor has a name of its own")
    if missing := set(state_names) - set(names):
        raise BundleError(f"{listed.where}: lacks {', '.join(sorted(missing))}, which streaming_decode describes")
    rest = tuple(name for name in names if name not in state_names)
    if len(rest) != 2:
        raise BundleError(
            f"{listed.where}: has {len(rest)} names that streaming_decode does not describe as state "
            f"({', '.join(rest)}), 2 are needed: the values and their lengths"
        )
    return rest


def _decoder_states(streaming: Entry) -> tuple[StateSpec, ...]:
    """Token counters first, then per attention its counter, keys, values and positions."""
    if (batch := streaming.at("batch_size").whole()) != 1:
        raise BundleError(f"{streaming.where}: batch_size is {batch}, 1 is what this program runs")
    states = [
        StateSpec(
            input_name=entry.at("input_name").text(),
            output_name=entry.at("output_name").text(),
            shape=_counter_shape(entry.at("shape")),
            dtype=_counter_dtype(entry.at("dtype")),
            initial=0,
        )
        for entry in streaming.at("transformer_offsets").items()
    ]
    for entry in streaming.at("attention_caches").items():
        states += _cache_states(entry)
    return tuple(states)


def _cache_states(entry: Entry) -> list[StateSpec]:
    counter, cache = _counter_dtype(entry.at("positions_dtype")), _cache_dtype(entry.at("cache_dtype"))
    cache_shape, positions_shape = entry.at("cache_shape").shape(), entry.at("positions_shape").shape()
    context = entry.at("context").whole(least=1)
    expected = (1, entry.at("num_heads").whole(least=1), context, entry.at("head_dim").whole(least=1))
    if cache_shape != expected or positions_shape != (1, context):
        raise BundleError(
            f"{entry.where}: cache_shape {list(cache_shape)} and positions_shape {list(positions_shape)} do not fit "
            f"num_heads, context and head_dim, which need {list(expected)} and {[1, context]}"
        )
    parts: list[tuple[str, tuple[int, ...], np.dtype[Any], int]] = [
        ("offset", _counter_shape(entry.at("offset_shape")), counter, 0),
        ("cached_keys", expected, cache, 0),
        ("cached_values", expected, cache, 0),
        ("cached_positions", (1, context), counter, EMPTY_POSITION),
    ]
    return [
        StateSpec(
            input_name=entry.at(f"{part}_input_name").text(),
            output_name=entry.at(f"{part}_output_name").text(),
            shape=part_shape,
            dtype=dtype,
            initial=initial,
        )
        for part, part_shape, dtype, initial in parts
    ]


def _caches(metadata: Entry) -> Iterator[CacheSpec]:
    for entry in metadata.at("streaming_decode").at("attention_caches").items():
        yield CacheSpec(
            decoder_index=entry.at("decoder_index").whole(),
            layer_index=entry.at("layer_index").whole(),
            heads=entry.at("num_heads").whole(least=1),
            context_tokens=entry.at("context").whole(least=1),
            offset_input_name=entry.at("offset_input_name").text(),
        )


def _counter_shape(entry: Entry) -> tuple[int, ...]:
    if (shape := entry.shape()) != (1,):
        raise entry.wrong("[1]")
    return shape


def _counter_dtype(entry: Entry) -> np.dtype[Any]:
    return np.dtype(entry.one_of("int32", "int64"))


def _cache_dtype(entry: Entry) -> np.dtype[Any]:
    return np.dtype(entry.one_of("float32", "float16"))


def _sidecar_graphs(files: _Files, sidecar: Sidecar) -> dict[str, Graph]:
    return {
        name: Graph(
            name=name,
            model=files.weight_file(entry.file),
            data=files.weight_files(entry.data),
            input_names=(),
            output_names=(),
            states=entry.states,
            precision=entry.precision,
            facts=entry.facts,
        )
        for name, entry in sidecar.graphs.items()
    }


def _parse_sidecar_graph(entry: Entry) -> SidecarGraph:
    data, states, facts = entry.maybe_at("data"), entry.maybe_at("states"), entry.maybe_at("facts")
    if facts and not isinstance(facts.value, dict):
        raise facts.wrong("an object")
    return SidecarGraph(
        file=entry.at("file").file_name(),
        data=tuple(item.file_name() for item in data.items()) if data else (),
        precision=entry.text_at("precision", default="float32"),
        states=tuple(map(_parse_state, states.items())) if states else (),
        facts=facts.value if facts and isinstance(facts.value, dict) else {},
    )


def _built_sidecar_graph(graph: SidecarGraph) -> dict[str, Any]:
    return {
        "file": graph.file,
        "data": list(graph.data),
        "precision": graph.precision,
        "states": [_built_state(state) for state in graph.states],
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


def _built_state(state: StateSpec) -> dict[str, Any]:
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
