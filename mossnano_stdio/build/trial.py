"""Runs our own graphs beside the official ones, before they are kept.

    python -m mossnano_stdio.build.trial SOURCE BUILT [CODES ...]     two weights folders, which may be one

Rules of this room:

- Decoding: seeded random codes of 15 s, which is longer than every context of the published models, in chunks of mixed
  sizes. The audio must be that of the bundle's own decode_step within MAX_ERROR.
- An int8 graph is held against the float32 graph that it was made of: the worst second must keep its bar, over the same
  codes and over recorded ones (precision.py).
- Where a codec has no official graphs but one of ours over whole files, that is the reference, over codes that go past
  the longest context.
- Encoding: 5 s of seeded noise and tones. The codes must be those of the bundle's own encode, except in one frame of
  MIN_FRAMES_PER_TIE.
- A graph over segments has nothing beside it to be compared with: it must give sound.
- Where a bundle has no official graphs, ours are run once more, in chunks of one size only: both must be the same, and
  neither silence. That shows that a state is lost, not that a weight is wrong.
- The error for a departure says at which frame it begins and how large it is.
- The trial of large graphs is a process of its own: a build that needs little memory stays one.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.build.precision import (
    CHUNK_FRAMES,
    SEED,
    decoded,
    load_recorded,
    noises_of,
    seeded_codes,
    sounds_of,
    worst_db,
)
from mossnano_stdio.chunks import Fixed, first_chunk_frames_of, plan
from mossnano_stdio.codecs import (
    INT8,
    PRECISIONS,
    SegmentDecoder,
    int8_name,
    load_decoder,
    load_encoder_runtime,
    load_full_decoder,
    load_full_encoder,
    load_runtime,
)
from mossnano_stdio.errors import (
    BugError,
    BundleError,
    CheckFailedError,
    DecodeError,
    ExitStatus,
    MossnanoError,
    OutOfMemoryError,
)
from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.weights import Bundle, Graph, load_bundle
from mossnano_stdio.weights.checked_json import Entry

FRAMES_PAST_CONTEXT = 12
REMEMBERED_FRAMES = 40  # for layers without a context: what they remember shows long before
ENCODED_SECONDS = 5  # the whole-file graph needs memory with the square of the length
MAX_ERROR = 1e-4  # three 16-bit steps: a wrong weight is louder by far, rounding far softer
# Two rows can be equally near within float rounding. A code chosen the other way changes the codes after it in its
# frame, and nothing else.
MIN_FRAMES_PER_TIE = 50
LEVEL = 0.1  # RMS of what is encoded
PITCHES = (0.002, 0.005, 0.011, 0.023, 0.047)  # of its tones, in cycles per sample
LARGE_BYTES = 1 << 30  # of graphs. To start a process for smaller ones takes longer than their trial

Audio = NDArray[np.float32]

ERRORS: dict[int, type[MossnanoError]] = {  # what a trial ended with -> what its caller raises
    error.exit_status: error for error in (CheckFailedError, BundleError, OutOfMemoryError, DecodeError)
}


def try_folders(source: Path, built: Path, recorded: Sequence[Path] = ()) -> None:
    """Try the graphs of our own in `built` beside those of `source`. Raises what was wrong with them. `recorded`: files
    of codes that an int8 graph was made with."""
    if sum(path.stat().st_size for path in built.iterdir()) >= LARGE_BYTES:
        try_in_own_process(source, built, recorded)
        return
    try:
        try_graphs(load_bundle(source), load_bundle(built), recorded)
    except BaseException as error:
        # What failed holds the graphs open, and Windows removes no file that is open.
        traceback.clear_frames(error.__traceback__)
        raise


def try_in_own_process(source: Path, built: Path, recorded: Sequence[Path] = ()) -> None:
    command = [sys.executable, "-m", __name__, str(source), str(built), *map(str, recorded)]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    if run.returncode < 0:
        raise OutOfMemoryError(
            f"the trial of {built} was ended by signal {-run.returncode}, for want of memory perhaps; "
            "--graphs fast, or --what decode, has less to run at once"
        )
    if run.returncode != ExitStatus.DONE:
        raise ERRORS.get(run.returncode, BugError)(run.stdout.strip() or f"the trial ended with {run.returncode}")


def try_graphs(source: Bundle, built: Bundle, recorded: Sequence[Path] = ()) -> None:
    """Everything of our own that `built` has."""
    if built.has_graph("fast"):
        try_decoder(source, built)
    elif built.has_graph("decode_step"):
        try_steps(source, built)
    elif built.has_graph("decode_segment"):
        try_segments(built)
    for name in ("fast", "decode_step"):
        if built.has_graph(int8_name(name)):
            try_int8(built, name, recorded)
    if built.has_graph("encode_step"):
        try_encoder(source, built)


def try_decoder(source: Bundle, built: Bundle) -> None:
    """Compare the fast graph of `built` with the decode_step of `source`, or else with itself."""
    judge, judged_by = ("official", "decode_step") if source.has_graph("decode_step") else ("fast", "fast")
    codec = source.format
    codes = seeded_codes(codec)
    # The official graph takes the largest chunks throughout, which is quickest.
    expected = decoded(load_decoder(source, graph=judge), codes, CHUNK_FRAMES[-1:])
    if not expected.any():
        raise CheckFailedError(f"{source.graph(judged_by).path}: gives silence for random codes, so nothing is kept")
    found = decoded(load_decoder(built, graph="fast"), codes)
    _compare(found, expected, len(codes), "the fast graph", source.graph(judged_by))


def try_steps(source: Bundle, built: Bundle) -> None:
    """Compare the steps of `built` with the whole-file graph of `source`, or else with larger steps."""
    runtime = load_runtime(built)
    frames = max(runtime.layer_context_frames, default=REMEMBERED_FRAMES) + FRAMES_PAST_CONTEXT
    shape = (frames, built.format.quantizers)
    codes = np.random.default_rng(SEED).integers(0, built.format.codebook_size, shape, dtype=np.uint16)
    if source.has_graph("decode_full"):
        reference, expected = source.graph("decode_full"), load_full_decoder(source).decode(codes)
    else:
        reference = source.graph("decode_step")
        expected = decoded(runtime.new_decoder(), codes, CHUNK_FRAMES[-1:])
    _compare(decoded(runtime.new_decoder(), codes), expected, frames, "stepping", reference)


def try_int8(built: Bundle, name: str, recorded: Sequence[Path]) -> None:
    """Compare an int8 graph with the float32 graph that it was made of."""
    graph = built.graph(int8_name(name))
    bar_db = Entry(dict(graph.facts), f"{graph.path}: facts").at(INT8).at("bar_db").number()
    streams = [seeded_codes(built.format), *(load_recorded(path, built.format) for path in recorded)]
    expected, found = (sounds_of(built, streams, precision) for precision in PRECISIONS)
    reached_db = worst_db(noises_of(found, expected, built.format.sample_rate))
    if not reached_db >= bar_db:  # NaN is too little as well
        raise CheckFailedError(
            f"{graph.path.name} is at {reached_db:.2f} dB of {built.graph(name).path.name} in its worst second; "
            f"{bar_db:g} are the least, so it is not kept"
        )


def try_segments(built: Bundle) -> None:
    """Decode seeded codes in two lengths. There is no other graph to compare them with, but silence is wrong."""
    decoder = load_runtime(built).new_decoder()
    assert isinstance(decoder, SegmentDecoder)
    for frames in (1, FRAMES_PAST_CONTEXT):
        shape = (frames, built.format.quantizers)
        codes = np.random.default_rng(SEED).integers(0, built.format.codebook_size, shape, dtype=np.uint16)
        audio = decoder.decode_segment(codes, 1.0)
        if not np.isfinite(audio).all() or not audio.any():
            path = built.graph("decode_segment").path
            raise CheckFailedError(f"{path}: gives silence, or no numbers, for random codes, so nothing is kept")


def _compare(found: Audio, expected: Audio, frames: int, what: str, reference: Graph) -> None:
    errors = np.abs(found - expected).reshape(frames, -1).max(axis=1)
    worse = np.flatnonzero(~(errors <= MAX_ERROR))  # NaN is worse too
    if worse.size:
        raise CheckFailedError(
            f"{what} departs from {reference.path} at frame {worse[0]} by "
            f"{errors[worse[0]]:.2g} (by {errors.max():.2g} at most in {frames} frames; allowed is {MAX_ERROR:g}), "
            f"so it is not kept"
        )


def try_encoder(source: Bundle, built: Bundle) -> None:
    """Compare the streaming encoder of `built` with the whole-file encode of `source`, or else with itself."""
    audio = _recording(source.format)
    runtime = load_encoder_runtime(built)
    found = runtime.new_encoder().step(audio)
    if source.has_graph("encode"):
        judged_by = "encode"
        expected = load_full_encoder(source).encode(audio)
    else:
        judged_by = "encode_step"
        stream = runtime.new_encoder()
        samples = source.format.frame_samples
        pieces = plan(len(audio) // samples, Fixed(1), first_chunk_frames_of(stream))
        expected = np.concatenate([stream.step(audio[start * samples : (start + n) * samples]) for start, n in pieces])
    other = np.flatnonzero((found != expected).any(axis=1))
    if other.size * MIN_FRAMES_PER_TIE > len(expected):
        raise CheckFailedError(
            f"the streaming encoder departs from {source.graph(judged_by).path} at frame {other[0]} "
            f"(in {other.size} of {len(expected)} frames; allowed is one in {MIN_FRAMES_PER_TIE}), so it is not kept"
        )


def _recording(codec: CodecFormat) -> NDArray[np.float32]:
    """Noise under a chord that moves from one side to the other, [samples, channels]."""
    samples = round(ENCODED_SECONDS * codec.frames_per_second) * codec.frame_samples
    times = np.arange(samples)
    tones = sum(np.sin(2 * np.pi * pitch * times) for pitch in PITCHES)
    sides = np.linspace(0, 1, samples)[:, np.newaxis] - np.arange(codec.channels)
    noise = np.random.default_rng(SEED).standard_normal((samples, codec.channels))
    audio = tones[:, np.newaxis] * np.abs(sides) + noise
    levelled: NDArray[np.float32] = (audio * (LEVEL / audio.std())).astype(np.float32)
    return levelled


def _run() -> int:
    try:
        source, built, *recorded = map(Path, sys.argv[1:])
        try_graphs(load_bundle(source), load_bundle(built), recorded)
    except MossnanoError as error:
        sys.stdout.buffer.write(str(error).encode("utf-8", "backslashreplace"))
        return error.exit_status
    except MemoryError as error:
        sys.stdout.buffer.write(f"the trial had too little memory ({error})".encode())
        return ExitStatus.NO_MEMORY
    except KeyboardInterrupt:  # the build has got it too, and says so
        return ExitStatus.INTERRUPTED
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(_run())
