"""What a worker does with one item, whichever engine gives it: encode a recording, or decode a row to a file.

`work_of(settings)` loads the weights once; `do` answers one item. Settings and items are JSON, as they cross processes.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.chunks import DecodingChunks, Fixed
from mossnano_stdio.codecs import load_encoder_runtime, load_runtime
from mossnano_stdio.errors import (
    BugError,
    BundleError,
    DeviceError,
    ExitStatus,
    InputError,
    MossnanoError,
    NonFiniteError,
    OutOfMemoryError,
    OutputError,
    PayloadError,
    UsageError,
)
from mossnano_stdio.files import cannot_write, open_output, told_as
from mossnano_stdio.library import STEP_FRAMES, encode_blocks
from mossnano_stdio.pcm.recordings import Sound, blocks_for, read_part, write_sound
from mossnano_stdio.tokens import Codes
from mossnano_stdio.tools.datasets.references import ParquetRows, Reference, opened
from mossnano_stdio.tools.datasets.shards import CodesReader
from mossnano_stdio.weights import load_bundle

MOST_CHANNELS: Final = 8  # that are mixed; who records with more has channels that are no one sound
BLOCKS_AHEAD: Final = 4  # read, and waiting to be encoded
FAILURES: Final = (UsageError, InputError, BundleError, DeviceError, OutOfMemoryError, OutputError)

Audio = NDArray[np.float32]  # [samples, channels]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of one item."""

    maybe_fault: str | None = None  # why it goes into quarantine
    facts: Mapping[str, Any] = field(default_factory=dict)
    maybe_codes: Codes | None = None  # [quantizers, frames]


class Work(Protocol):
    def do(self, item: str) -> Outcome: ...


def work_of(settings: Mapping[str, Any]) -> Work:
    return Tokenizing(settings) if settings["verb"] == "tokenize" else Detokenizing(settings)


# --- between processes --------------------------------------------------------------------------------------------


def answer_to(work: Work, item: str) -> tuple[dict[str, Any], bytes]:
    """What comes of an item, as it crosses processes: a document, and the codes, uint16 little-endian.

    A failure, which ends the job, is an answer too. So is a bug of ours that one recording brings to light: as one
    that is bad, it does not end a job of a million.
    """
    try:
        outcome = work.do(item)
    except (MossnanoError, MemoryError) as error:
        return failure_answer(error), b""
    except Exception as error:  # noqa: BLE001 - see above
        outcome = Outcome(f"a bug of ours: {type(error).__name__}: {error}")
    document: dict[str, Any] = {"fault": outcome.maybe_fault, "facts": dict(outcome.facts)}
    if outcome.maybe_codes is None:
        return document, b""
    return document | {"shape": list(outcome.maybe_codes.shape)}, outcome.maybe_codes.astype("<u2").tobytes()


def failure_answer(error: MossnanoError | MemoryError) -> dict[str, Any]:
    status = error.exit_status if isinstance(error, MossnanoError) else ExitStatus.NO_MEMORY
    return {"failure": str(error) or "out of memory", "exit_status": int(status)}


def codes_bytes(document: Mapping[str, Any]) -> int:
    """How many bytes of codes there are beside an answer."""
    return 2 * math.prod(document["shape"]) if "shape" in document else 0


def outcome_of(document: Mapping[str, Any], codes: bytes) -> Outcome:
    """What the answer means; a failure is raised, as the error that it was there."""
    if "failure" in document:
        kind = next((kind for kind in FAILURES if kind.exit_status == document["exit_status"]), BugError)
        raise kind(document["failure"])
    maybe_codes = None
    if "shape" in document:
        maybe_codes = np.frombuffer(codes, "<u2").astype(np.uint16, copy=False).reshape(document["shape"])
    return Outcome(document.get("fault"), document.get("facts", {}), maybe_codes)


# --- recordings to codes ------------------------------------------------------------------------------------------


class Tokenizing:
    """Encodes what a Reference refers to."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._encoder = load_encoder_runtime(load_bundle(Path(settings["weights"])), threads=1)
        self._quantizers: int = settings["quantizers"]
        self._parquet_rows = ParquetRows()

    def do(self, item: str) -> Outcome:
        reference = Reference.from_json(item)
        if reference.maybe_fault:
            return Outcome(reference.maybe_fault)
        reference.check_unchanged()
        try:
            with opened(reference, self._parquet_rows) as file:
                sound = read_part(file, reference.name, reference.start_seconds, reference.maybe_end_seconds)
                encoded = encode_blocks(self._encoder, self._heard(sound, reference), self._quantizers)
        except InputError as error:
            return Outcome(str(error))
        except OSError as error:
            return Outcome(f"{reference.name}: cannot be read: {error.strerror or error}")
        return Outcome(None, {"original_samples": encoded.original_samples}, encoded.codes)

    def _heard(self, sound: Sound, reference: Reference) -> Iterator[Audio]:
        """Its blocks at the codec's rate, on the codec's channels."""
        codec = self._encoder.format
        name, chosen = reference.name, reference.maybe_channels
        if chosen is not None and not all(0 <= channel < sound.channels for channel in chosen):
            raise InputError(f"{name} has {sound.channels} channels, and the manifest asks for those at {list(chosen)}")
        channels = sound.channels if chosen is None else len(chosen)
        if channels > MOST_CHANNELS:
            raise InputError(f"{name} has {channels} channels, allowed are 1 to {MOST_CHANNELS}; mix it down first")
        blocks = sound.blocks if chosen is None else (block[:, list(chosen)] for block in sound.blocks)
        mixed_channels = channels if channels == codec.channels else 1
        mixed = (block if mixed_channels == channels else block.mean(axis=1, keepdims=True) for block in blocks)
        sound = replace(sound, channels=mixed_channels, dtype=np.float32, stored=mixed)
        return read_ahead(blocks_for(codec, sound, name))


def read_ahead(blocks: Iterable[Audio]) -> Iterator[Audio]:
    """The same blocks, read, decoded and resampled on a thread of their own while those before are encoded."""
    waiting: queue.Queue[Audio | BaseException | None] = queue.Queue(BLOCKS_AHEAD)
    is_over = threading.Event()

    def read() -> None:
        maybe_error: BaseException | None = None
        try:
            for block in blocks:
                waiting.put(block)
                if is_over.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the blocks are used
            maybe_error = error
        waiting.put(maybe_error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (block := waiting.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block
    finally:
        is_over.set()
        while thread.is_alive():  # it may wait for a place
            try:
                waiting.get(timeout=0.01)
            except queue.Empty:
                continue


# --- codes to recordings ------------------------------------------------------------------------------------------


class Detokenizing:
    """Decodes a stored row into a file of its own, which appears once it is complete."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._decoder = load_runtime(load_bundle(Path(settings["weights"])), threads=1).new_decoder()
        self._form: str = settings["form"]
        self._reader = CodesReader()

    def do(self, item: str) -> Outcome:
        order = json.loads(item)
        target = Path(order["target"])
        codec = self._decoder.format
        try:
            codes = self._checked(order, self._reader.read(order["place"]))
        except (InputError, ValueError) as error:
            return Outcome(f"{order['id']}: {error}")
        chunks = DecodingChunks(self._decoder, Fixed(STEP_FRAMES))
        chunks.reset()
        chunks.push(codes.T)
        chunks.finish(order["original_samples"])
        with told_as(cannot_write(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        pcm = (chunk.pcm for chunk in chunks.finite_chunks())
        try:
            with open_output(target) as file:
                write_sound(file, self._form, codec.sample_rate, codec.channels, pcm)
                file.flush()
                os.fsync(file.fileno())  # so that a file that is there is whole, whatever happens to the machine
        except (PayloadError, NonFiniteError) as error:
            return Outcome(f"{order['id']}: {error}")
        return Outcome(None, {"original_samples": order["original_samples"]})

    def _checked(self, order: Mapping[str, Any], codes: Codes) -> Codes:
        codec = self._decoder.format
        if order["sample_rate"] != codec.sample_rate:
            raise InputError(f"is of {order['sample_rate']} Hz, these weights decode {codec.sample_rate} only")
        least = 1 if self._decoder.decodes_prefix else codec.quantizers
        if codes.ndim != 2 or not least <= len(codes) <= codec.quantizers:
            raise InputError(f"its codes are {list(codes.shape)}, allowed are {least} to {codec.quantizers} quantizers")
        if codes.size and codes.max() >= codec.codebook_size:
            raise InputError(f"holds the code {codes.max()}, allowed are 0 to {codec.codebook_size - 1}")
        if order["original_samples"] > codes.shape[1] * codec.frame_samples:
            raise InputError(f"is {order['original_samples']} samples long, its {codes.shape[1]} frames hold fewer")
        return codes
