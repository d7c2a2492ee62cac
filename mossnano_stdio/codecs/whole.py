"""Graphs over whole files at once: the reference that stepping is held against, and the published encoder.

Rules of this room:

- They need memory with the square of the length, and the kernel kills without a word. So a run that would not fit is
  refused before it starts, by an estimate that errs on the large side. Where the machine does not say how much is free,
  nothing is refused.
- A recording may end inside a frame, which is filled up with silence, so that nothing is lost, unless the graph
  completes it in a way of its own; how long it was is the caller's to remember.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import (
    FLOAT32,
    INT32,
    check_audio,
    check_audio_in,
    check_codes,
    check_codes_out,
    check_decode_contract,
    codes_feed,
    joined,
)
from mossnano_stdio.codecs.engine import Array, Engine, TensorSpec, check_contract, open_session
from mossnano_stdio.codecs.moss import OfficialRuntime
from mossnano_stdio.errors import DecodeError, UsageError
from mossnano_stdio.tokens import CodecFormat, Codes
from mossnano_stdio.weights import Bundle, Graph
from mossnano_stdio.weights.checked_json import Entry

ALWAYS_FITTING_FRAMES = 25  # two seconds as a whole need 64 MB of the official weights
SCORE_COPIES = 6.5  # attention scores that are alive at once, as measured over lengths of 8 to 24 seconds
COLUMN_COPIES = 6  # the same of columns
VALUE_BYTES = 4  # float32
GIB = 1 << 30

CGROUP = Path("/sys/fs/cgroup")


class FullDecoder:
    """A whole stream at once: the reference that stepping is held against."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.session = open_session(bundle.graph("decode_full"), engine)
        check_decode_contract(self.session, self.format)

    def decode(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]."""
        check_codes(codes, self.format)
        if not len(codes):
            return joined([], self.format)
        if len(codes) > ALWAYS_FITTING_FRAMES:
            check_fits(
                f"decoding {len(codes)} frames as a whole",
                bytes_at_once(self.session.graph, self.bundle, self.engine, len(codes)),
                "decode in steps (`--decoder step`), which takes the same memory for every length",
            )
        audio, lengths = self.session.run(self.session.graph.output_names, codes_feed(self.session, codes))
        check_audio(self.session, audio, lengths, len(codes), self.format)
        whole: NDArray[np.float32] = audio[0].T
        return whole


class FullEncoder:
    """A loaded `encode`. It has no state: any number of threads may share it."""

    graph_name: Literal["encode"] = "encode"

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.session = open_session(bundle.graph("encode"), engine)
        # Some graphs complete the last frame themselves, with other columns than those of silence.
        facts = Entry(dict(self.session.graph.facts), f"{self.session.graph.path}: facts")
        maybe_completes = facts.maybe_at("completes_frames")
        self._completes_frames = maybe_completes.boolean() if maybe_completes else False
        self._wave_name, self._wave_lengths_name = self.session.graph.input_names
        codes_name, code_lengths_name = self.session.graph.output_names
        check_contract(
            self.session,
            inputs={
                self._wave_name: TensorSpec((1, self.format.channels, None), FLOAT32),
                self._wave_lengths_name: TensorSpec((1,), INT32),
            },
            outputs={
                codes_name: TensorSpec((1, None, self.format.quantizers), INT32),
                code_lengths_name: TensorSpec((1,), INT32),
            },
            states=(),
        )

    def encode(self, audio: NDArray[np.float32]) -> Codes:
        """[samples, channels] -> [frames, quantizers], one frame for each that was begun."""
        check_audio_in(audio, self.format)
        whole = audio if self._completes_frames else filled_up(audio, self.format)
        frames = -(-len(whole) // self.format.frame_samples)
        if not frames:
            return np.zeros((0, self.format.quantizers), dtype=np.uint16)
        if frames > ALWAYS_FITTING_FRAMES:
            check_fits(
                f"encoding {frames} frames as a whole",
                # The encoder mirrors the decoder, layer by layer.
                bytes_at_once(self.session.graph, self.bundle, self.engine, frames),
                "build a streaming encoder with `mossnano build`, which takes the same memory for every length",
            )
        feed = {
            self._wave_name: np.ascontiguousarray(whole.T, dtype=np.float32)[np.newaxis],
            self._wave_lengths_name: np.array([len(whole)], dtype=np.int32),
        }
        codes, lengths = self.session.run(self.session.graph.output_names, feed)
        self._check_codes(codes, lengths, frames)
        frame_major: Codes = codes[0].astype(np.uint16)
        return frame_major

    def _check_codes(self, codes: Array, lengths: Array, frames: int) -> None:
        shape = (1, frames, self.format.quantizers)
        if codes.shape != shape or lengths.tolist() != [frames]:
            raise DecodeError(
                f"{self.session.graph.path}: {frames} frames of audio gave codes {list(codes.shape)} "
                f"of length {lengths.tolist()}, {list(shape)} of length {[frames]} was due"
            )
        check_codes_out(self.session.graph.path, codes, self.format)


def filled_up(audio: NDArray[np.float32], codec: CodecFormat) -> NDArray[np.float32]:
    """The audio with silence up to the next whole frame."""
    missing = -len(audio) % codec.frame_samples
    return np.pad(audio, ((0, missing), (0, 0))) if missing else audio


# --- will it fit? ------------------------------------------------------------------------------------------------


def bytes_at_once(graph: Graph, bundle: Bundle, engine: Engine, frames: int) -> int:
    """What a run over `frames` frames takes: attention in its busiest layer, and the longest rows of columns where a
    codec has convolutions, which graphs of ours say how long they are.
    """
    busiest = max((heads * tokens_per_frame**2 for heads, tokens_per_frame in _layers(bundle, engine)), default=0)
    maybe_widest = Entry(dict(graph.facts), f"{graph.path}: facts").maybe_at("widest_values")
    values = maybe_widest.whole() if maybe_widest else 0
    return int(VALUE_BYTES * (SCORE_COPIES * busiest * frames**2 + COLUMN_COPIES * values * frames))


def _layers(bundle: Bundle, engine: Engine) -> list[tuple[int, int]]:
    """Heads, and tokens in a frame, of the layers of the decoder, or of the encoder, which mirrors it."""
    for graph in bundle.graphs.values():
        entries = Entry(dict(graph.facts), f"{graph.path}: facts").items_at("transformers")
        if layers := [(entry.at("heads").whole(1), entry.at("tokens_per_frame").whole(1)) for entry in entries]:
            return layers
    if "decode_step" not in bundle.graphs or bundle.sidecar.maybe_codec is not None:
        return []  # an official encoder alone says nothing about it, and a codec of our own says all
    tokens_per_frame = OfficialRuntime(bundle, engine).tokens_per_frame
    return [(cache.heads, tokens_per_frame[cache.offset_input_name]) for cache in bundle.caches]


def check_fits(what: str, needed_bytes: int, advice: str) -> None:
    free_bytes = _free_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise UsageError(
            f"{what} needs about {needed_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} GiB are free; {advice}"
        )


def _free_bytes() -> int | None:
    """What this process can still get, as far as the machine says so."""
    limits = [limit for limit in (_machine_bytes(), _group_bytes(), _address_bytes()) if limit is not None]
    return min(limits, default=None)


def _machine_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    """What a container leaves; `max` where there is no limit, which is no number."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        return limit - int((CGROUP / "memory.current").read_text(encoding="ascii"))
    return None


def _address_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
