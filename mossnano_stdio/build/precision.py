"""Finds which products a graph of ours can do in 8 bits, and builds the graph that does them so.

Rules of this room:

- What counts is the signal-to-noise ratio of the worst second against the float32 graph, over seeded codes that are
  longer than every context, and over recorded ones where there are any, in chunks of mixed sizes.
- Each part is tried alone. Then parts are taken, those first that save most time for the noise that they add, as long
  as all their noise together leaves the bar unbroken. What was taken is decoded with, and the dearest part is left
  out again until the bar holds. Noises add up to a little less than their sum, so parts that would break the bar by a
  little are tried, too.
- How much time is saved is counted, not measured, so that the same weights give the same graph.
- Noise that is softer than rounding to 16 bits is none: a second of silence cannot break the bar.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.build.builder import DataFile, open_data
from mossnano_stdio.build.int8 import FloatGraph, Part
from mossnano_stdio.chunks import first_chunk_frames_of
from mossnano_stdio.codecs import INT8, SeekingDecoder, int8_name, load_decoder
from mossnano_stdio.errors import InputError, NoPlanError
from mossnano_stdio.files import open_input
from mossnano_stdio.tokens import CodecFormat, Codes, first_outside, load_artifact, meaning_of
from mossnano_stdio.tokens.plain import form_of, load_codes
from mossnano_stdio.weights import Bundle, GraphSpec, WeightFile
from mossnano_stdio.weights.checked_json import Entry

DECODED_SECONDS = 15  # longer than every context of the published models
CHUNK_FRAMES = (1, 2, 4, 8)  # in turn
SEED = 0
ROUNDING_POWER = (1 / 32767) ** 2 / 12  # of the noise of 16 bits
NEAR = 1.3  # times what the bar allows
TRIAL_FILE, TRIAL_DATA = "int8-trial.onnx", "int8-trial.data"
MOST_DB = 200.0  # what no noise at all is called

Noises = NDArray[np.float64]  # of each second: its noise over its signal


@dataclass(frozen=True)
class Int8Wish:
    """What is asked for beside the float32 graph."""

    bar_db: float
    recorded: tuple[Path, ...] = ()  # codes, as plain files or artifacts


def add_int8(folder: Path, bundle: Bundle, wish: Int8Wish) -> dict[str, GraphSpec]:
    """Build the int8 graph of the float32 one in `folder`; returns what `mossnano.json` says of it, by its name."""
    (name,) = (name for name in ("fast", "decode_step") if name in bundle.sidecar.graphs)
    graph = bundle.sidecar.graphs[name]
    stem = Path(graph.file).stem
    file, data_file = f"{stem}_{INT8}.onnx", f"{stem}_{INT8}.data"
    transformers = Entry(dict(graph.facts), f"{folder / graph.file}: facts").items_at("transformers")
    floats = FloatGraph(folder / graph.file, [entry.at("tokens_per_frame").whole() for entry in transformers])
    streams = [seeded_codes(bundle.format), *(load_recorded(path, bundle.format) for path in wish.recorded)]
    trials = _Trials(folder, bundle, name, floats, streams)
    with open_data(folder / TRIAL_DATA) as tried_data:
        chosen, noises = _choose(floats.parts(), trials, tried_data, wish.bar_db)
    (folder / TRIAL_DATA).unlink()
    with open_data(folder / data_file) as data:
        floats.save(folder / file, data, _weights_of(chosen))
    plan = {
        "parts": [part.name for part in chosen],
        "bar_db": wish.bar_db,
        "snr_db": round(worst_db(noises), 2),
        "codes_sha256": digest_of(streams),
    }
    facts = {**graph.facts, INT8: plan}
    return {int8_name(name): replace(graph, file=file, data=(data_file,), precision=INT8, facts=facts)}


def seeded_codes(codec: CodecFormat) -> Codes:
    shape = (round(DECODED_SECONDS * codec.frames_per_second), codec.quantizers)
    return np.random.default_rng(SEED).integers(0, codec.codebook_size, shape, dtype=np.uint16)


def load_recorded(path: Path, codec: CodecFormat) -> Codes:
    """The codes in a `.mossnano`, `.npy`, `.json` or `.u16le`, [frames, quantizers]."""
    if path.suffix == ".mossnano":
        with open_input(path) as file:
            artifact = load_artifact(file, str(path))
        try:
            artifact.check_fits(codec, prefix_allowed=True)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        codes = artifact.codes
    else:
        codes = _load_plain(path, codec)
    if not len(codes):
        raise InputError(f"{path}: has no frames, and nothing can be measured with it; name one that has")
    return codes


def _load_plain(path: Path, codec: CodecFormat) -> Codes:
    form = form_of(str(path), None)
    with open_input(path) as file:
        data = file.read()
    try:
        codes = load_codes(data, form, codec.quantizers, codec.codebook_size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    frame_codes = codes.shape[1]
    if not 1 <= frame_codes <= codec.quantizers:
        raise InputError(f"{path}: holds {frame_codes} codes in each frame, allowed are 1 to {codec.quantizers}")
    if place := first_outside(codes, codec.codebook_size):  # here, as decoders count the frames of a chunk
        frame, quantizer = place
        raise InputError(
            f"{path}: code {quantizer} of frame {frame} is {codes[place]}, allowed are 0 to {codec.codebook_size - 1}"
            f"{meaning_of(int(codes[place]), codec.codebook_size)}"
        )
    return codes


def decoded(decoder: SeekingDecoder, codes: Codes, chunk_frames: Sequence[int] = CHUNK_FRAMES) -> NDArray[np.float32]:
    """[samples, channels], in chunks of these sizes in turn."""
    pieces: list[NDArray[np.float32]] = []
    start = 0
    while start < len(codes):
        frames = chunk_frames[len(pieces) % len(chunk_frames)]
        if not start:
            frames = max(frames, first_chunk_frames_of(decoder))
        pieces.append(decoder.step(codes[start : start + frames]))
        start += frames
    return np.concatenate(pieces)


def sounds_of(bundle: Bundle, streams: Sequence[Codes], precision: str = "float32") -> list[NDArray[np.float32]]:
    """Each stream decoded from a reset, by the graph of ours."""
    decoder = load_decoder(bundle, graph="fast" if bundle.has_graph("fast") else None, precision=precision)
    sounds = []
    for codes in streams:
        decoder.reset()
        sounds.append(decoded(decoder, codes))
    return sounds


def noises_of(
    found: Iterable[NDArray[np.float32]], expected: Iterable[NDArray[np.float32]], sample_rate: int
) -> Noises:
    """Of each second of each recording: its noise over its signal. What is left of a last second counts as one."""
    return np.array(
        [noise for pair in zip(found, expected, strict=True) for noise in _noises_of_seconds(*pair, sample_rate)]
    )


def worst_db(noises: Noises) -> float:
    """The signal-to-noise ratio of the worst second."""
    worst = float(noises.max())
    return MOST_DB if worst == 0 else -10 * math.log10(worst)


def digest_of(streams: Sequence[Codes]) -> str:
    """SHA-256 of the codes that something was measured with."""
    digest = hashlib.sha256()
    for codes in streams:
        digest.update(np.array(codes.shape, "<u8").tobytes())
        digest.update(np.ascontiguousarray(codes, "<u2").tobytes())
    return digest.hexdigest()


class _Trials:
    """Decodes with graphs that do some parts in 8 bits."""

    def __init__(self, folder: Path, bundle: Bundle, name: str, floats: FloatGraph, streams: Sequence[Codes]) -> None:
        self._path = folder / TRIAL_FILE
        self._bundle = bundle
        self._name = name
        self._floats = floats
        self._streams = streams
        self._expected = sounds_of(bundle, streams)

    def noises(self, parts: Sequence[Part], data: DataFile) -> Noises:
        self._floats.save(self._path, data, _weights_of(parts), whole=False)
        data.flush()
        try:
            graph = replace(self._bundle.graphs[self._name], model=WeightFile(self._path, None, "unknown"))
            found = sounds_of(replace(self._bundle, graphs={**self._bundle.graphs, self._name: graph}), self._streams)
        finally:
            self._path.unlink()
        return noises_of(found, self._expected, self._bundle.format.sample_rate)


def _choose(parts: Sequence[Part], trials: _Trials, data: DataFile, bar_db: float) -> tuple[list[Part], Noises]:
    """The parts to be done in 8 bits, and the noise that is left."""
    budget = 10 ** (-bar_db / 10)
    noises = {part.name: trials.noises([part], data) for part in parts}
    chosen: list[Part] = []
    near: list[Part] = []
    together: Noises = np.zeros_like(noises[parts[0].name])
    for part in sorted(parts, key=lambda part: float(noises[part.name].max()) / part.saved_ms):
        more = together + noises[part.name]
        if more.max() <= budget:
            chosen.append(part)
            together = more
        elif more.max() <= NEAR * budget:
            near.append(part)
    reached = together
    while chosen and not (reached := trials.noises(chosen, data)).max() <= budget:
        chosen.pop()
    for part in near:
        if (tried := trials.noises([*chosen, part], data)).max() <= budget:
            chosen.append(part)
            reached = tried
    if not chosen:
        best_db = max(map(worst_db, noises.values()))
        raise NoPlanError(
            f"no part of this graph can be in 8 bits at {bar_db:g} dB, the best one alone reaches {best_db:.1f} dB; "
            "leave int8 out or lower the bar with --int8-db"
        )
    return chosen, reached


def _noises_of_seconds(found: NDArray[np.float32], expected: NDArray[np.float32], sample_rate: int) -> Iterator[float]:
    for start in range(0, len(expected), sample_rate):
        signal = expected[start : start + sample_rate].astype(np.float64)
        noise_power = float(np.square(found[start : start + sample_rate] - signal).mean())
        signal_power = float(np.square(signal).mean())
        is_heard = not noise_power <= ROUNDING_POWER  # NaN is heard
        yield noise_power / signal_power if is_heard and signal_power else math.inf if is_heard else 0.0


def _weights_of(parts: Iterable[Part]) -> set[str]:
    return {weight for part in parts for weight in part.weights}
