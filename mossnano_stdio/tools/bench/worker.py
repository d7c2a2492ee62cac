"""One side of a comparison, in a process of its own: loads its graph, says how long that took, then takes orders.

    python worker.py SIDE WEIGHTS THREADS FRAMES_TO_FILL CODEBOOK_SIZE QUANTIZERS FRAME_SAMPLES

prints one JSON line when its first step is done (how long imports, loading and that step took), then answers each JSON
line on stdin with one on stdout:

    {"do": "steps", "chunk_frames": T, "steps": N}       milliseconds of each step, caches full; with "cpu_time": 1
                                                         those that all threads together computed
    {"do": "utterance", "frames": F, "chunk_frames": T}  milliseconds from a reset to the last sample
    {"do": "streams", "count": N, "frames": F}           N streams at once, a thread each: frames per second on the
                                                         wall, and per second of CPU time that all threads used
    {"do": "memory"}                                     resident bytes now
    {"do": "memory", "streams": N}                       the same with N streams, caches full

Rules of this room:

- SIDE `loop` is the official way and uses nothing of ours: a session with its defaults, `session.run` with a dict of
  numpy state. This file is run, not imported from the package, so that `loop` pays for its own imports only.
- SIDE `official`, `fast` and `only` are our runtime on a graph that decodes, `fast-int8` and `only-int8` the same in
  int8, `encode` is our streaming encoder. Behind an "@" there may be a provider other than the CPU's.
- SIDE `moshi`, `rustymimi`, `moshi-encode` and `rustymimi-encode` are other programs that run Mimi, by the Python of an
  environment that has them, as their users call them: numpy in, numpy out. WEIGHTS is the checkpoint then.
- QUANTIZERS 0 means as many as the weights have; a peer has to be told.
- A step is timed alone. Loading is the time between the end of the imports, ours included, and the first step.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as codecs/engine.py does, which `loop` does not import
import numpy as np  # noqa: E402 - the clock comes first


class LoopSide:
    """The official loop: keeps state in a dict and feeds each output to its input in the next step."""

    def __init__(self, folder: str, threads: int) -> None:
        self.metadata = json.loads(Path(folder, "codec_browser_onnx_meta.json").read_text("utf-8"))
        self.folder, self.threads = folder, threads
        self.sessions = [self._load()]
        caches = self.metadata["streaming_decode"]
        self.states = [
            (entry["input_name"], entry["output_name"], entry["shape"], entry["dtype"], 0)
            for entry in caches["transformer_offsets"]
        ]
        for cache in caches["attention_caches"]:
            for part, shape, dtype, initial in (
                ("offset", cache["offset_shape"], "int32", 0),
                ("cached_keys", cache["cache_shape"], cache["cache_dtype"], 0),
                ("cached_values", cache["cache_shape"], cache["cache_dtype"], 0),
                ("cached_positions", cache["positions_shape"], cache["positions_dtype"], -1),
            ):
                names = cache[f"{part}_input_name"], cache[f"{part}_output_name"]
                self.states.append((*names, shape, dtype, initial))
        self.quantizers = self.metadata["codec_config"]["num_quantizers"]

    def _load(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        path = f"{self.folder}/{self.metadata['files']['decode_step']}"
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def open(self, number: int) -> LoopStream:
        """Opens a stream with a session of its own, as the official way does."""
        while len(self.sessions) <= number:
            self.sessions.append(self._load())
        return LoopStream(self, self.sessions[number])


class LoopStream:
    def __init__(self, side: LoopSide, session: Any) -> None:
        self.side, self.session = side, session
        self.codes_name, self.lengths_name = side.metadata["onnx"]["decode_step_input_names"][:2]
        self.output_names = side.metadata["onnx"]["decode_step_output_names"]
        self.state: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        self.state = {name: np.full(shape, initial, dtype) for name, _, shape, dtype, initial in self.side.states}

    def step(self, codes: Any) -> None:
        feed = {self.codes_name: codes[None], self.lengths_name: np.array([len(codes)], np.int32), **self.state}
        outputs = dict(zip(self.output_names, self.session.run(self.output_names, feed), strict=True))
        self.state = {input_name: outputs[output_name] for input_name, output_name, *_ in self.side.states}


class OurSide:
    """Our runtime: one session for all streams."""

    def __init__(self, folder: str, threads: int, graph: str, quantizers: int, provider: str = "cpu") -> None:
        from mossnano_stdio.codecs import load_encoder_runtime, load_runtime
        from mossnano_stdio.weights import load_bundle

        bundle = load_bundle(Path(folder))
        self.quantizers = quantizers or bundle.format.quantizers
        self.encodes = graph == "encode"
        self.channels = bundle.format.channels
        if graph == "encode":
            self.new: Callable[[], Any] = load_encoder_runtime(bundle, provider=provider, threads=threads).new_encoder
        else:
            name, _, precision = graph.partition("-")
            maybe_graph = None if name == "only" else name
            runtime = load_runtime(
                bundle, provider=provider, threads=threads, graph=maybe_graph, precision=precision or None
            )
            self.new = runtime.new_decoder

    def open(self, number: int) -> Any:
        return self.new()


class MoshiSide:
    """PyPI's moshi, in torch."""

    channels = 1

    def __init__(self, checkpoint: str, threads: int, quantizers: int, *, encodes: bool) -> None:
        import torch
        from moshi.models.loaders import get_mimi

        torch.set_num_threads(threads)
        self.torch, self.quantizers, self.encodes = torch, quantizers, encodes
        self.model = get_mimi(checkpoint, None, "cpu", num_codebooks=quantizers)
        self.model.streaming_forever(1)

    def open(self, number: int) -> MoshiSide:
        return self

    def reset(self) -> None:
        self.model.reset_streaming()

    def step(self, rows: Any) -> Any:
        with self.torch.no_grad():
            call = self.model.encode if self.encodes else self.model.decode
            return call(self.torch.from_numpy(np.ascontiguousarray(rows.T)[None])).numpy()


class RustymimiSide:
    """PyPI's rustymimi, in Rust."""

    channels = 1
    longest_stream_tokens = 1 << 16  # by itself it ends after 5 minutes, which a benchmark of many turns may take

    def __init__(self, checkpoint: str, threads: int, quantizers: int, *, encodes: bool) -> None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        from rustymimi import Tokenizer

        self.quantizers, self.encodes = quantizers, encodes
        self.model = Tokenizer(checkpoint, num_codebooks=quantizers, max_seq_len=self.longest_stream_tokens)

    def open(self, number: int) -> RustymimiSide:
        return self

    def reset(self) -> None:
        self.model.reset()

    def step(self, rows: Any) -> Any:
        if self.encodes:
            return self.model.encode_step(np.ascontiguousarray(rows.T)[None])
        return self.model.decode_step(np.ascontiguousarray(rows.T, np.uint32)[None])


AnySide = LoopSide | OurSide | MoshiSide | RustymimiSide


def import_for(name: str) -> None:
    """What a side needs, so that `import_ms` counts it and `load_ms` does not."""
    match name.removesuffix("-encode"):
        case "moshi":
            import moshi.models.loaders  # noqa: F401
        case "rustymimi":
            import rustymimi  # noqa: F401
        case "loop":
            import onnxruntime
        case _:
            import onnxruntime  # noqa: F401

            import mossnano_stdio.codecs  # noqa: F401


def side_of(name: str, weights: str, threads: int, quantizers: int) -> AnySide:
    match name.removesuffix("-encode"):
        case "moshi":
            return MoshiSide(weights, threads, quantizers, encodes=name.endswith("-encode"))
        case "rustymimi":
            return RustymimiSide(weights, threads, quantizers, encodes=name.endswith("-encode"))
        case "loop":
            return LoopSide(weights, threads)
        case _:
            graph, _, provider = name.partition("@")
            return OurSide(weights, threads, graph, quantizers, provider or "cpu")


def input_for(side: AnySide, frames: int, codebook_size: int, frame_samples: int) -> Any:
    """Seeded codes for a decoder, seeded noise for an encoder."""
    random = np.random.default_rng(frames)
    if not isinstance(side, LoopSide) and side.encodes:
        return random.uniform(-0.3, 0.3, (frames * frame_samples, side.channels)).astype(np.float32)
    dtype = np.uint16 if isinstance(side, OurSide) else np.int64 if isinstance(side, MoshiSide) else np.int32
    return random.integers(0, codebook_size, (frames, side.quantizers)).astype(dtype)


def timed_ms(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    call()
    return 1000 * (clock() - began)


def resident_bytes() -> int:
    if sys.platform == "win32":
        from mossnano_stdio.process.windows import resident_bytes as bytes_now

        return bytes_now(peak=False) or 0
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS tells the most that it was, in bytes


class Worker:
    def __init__(
        self,
        name: str,
        weights: str,
        threads: int,
        fill_frames: int,
        codebook_size: int,
        quantizers: int,
        frame_samples: int,
    ) -> None:
        self.fill_frames, self.codebook_size, self.frame_samples = fill_frames, codebook_size, frame_samples
        import_for(name)
        imported = time.perf_counter()
        self.side = side_of(name, weights, threads, quantizers)
        self.streams: list[Any] = [self.side.open(0)]
        loaded = time.perf_counter()
        self.first_frames: int = getattr(self.streams[0], "first_chunk_frames", 1)  # which some codecs must have
        codes = self.chunk(self.first_frames)
        self.facts = {
            "import_ms": 1000 * (imported - STARTED),
            "load_ms": 1000 * (loaded - imported),
            "first_step_ms": timed_ms(lambda: self.streams[0].step(codes)),
        }
        self.filled: set[int] = set()

    def chunk(self, frames: int) -> Any:
        return input_for(self.side, frames, self.codebook_size, self.frame_samples)

    def fill(self, number: int) -> None:
        """Step a stream until all of its caches are full."""
        if number not in self.filled:
            for _ in range(-(-self.fill_frames // 8)):
                self.streams[number].step(self.chunk(8))
            self.filled.add(number)

    def have(self, count: int) -> None:
        while len(self.streams) < count:
            self.streams.append(self.side.open(len(self.streams)))

    def steps(self, chunk_frames: int, steps: int, cpu_time: int = 0) -> list[float]:
        self.fill(0)
        codes = self.chunk(chunk_frames)
        clock = time.process_time if cpu_time else time.perf_counter
        return [timed_ms(lambda: self.streams[0].step(codes), clock) for _ in range(steps)]

    def utterance(self, frames: int, chunk_frames: int) -> float:
        codes = self.chunk(chunk_frames)
        self.streams[0].reset()
        self.filled.discard(0)
        if chunk_frames >= self.first_frames:
            return timed_ms(lambda: [self.streams[0].step(codes) for _ in range(frames // chunk_frames)])
        first, rest = self.chunk(self.first_frames), range((frames - self.first_frames) // chunk_frames)
        return timed_ms(lambda: [self.streams[0].step(first), *(self.streams[0].step(codes) for _ in rest)])

    def streams_at_once(self, count: int, frames: int) -> list[float]:
        self.have(count)
        for number in range(count):
            self.fill(number)
        codes = self.chunk(1)

        def run(stream: Any) -> None:
            for _ in range(frames):
                stream.step(codes)

        def run_all() -> None:
            threads = [threading.Thread(target=run, args=(stream,)) for stream in self.streams[:count]]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        cpu_began = time.process_time()
        wall_ms = timed_ms(run_all)
        cpu_ms = 1000 * (time.process_time() - cpu_began)
        return [1000 * count * frames / took_ms for took_ms in (wall_ms, cpu_ms)]

    def memory(self, streams: int = 1) -> int:
        self.have(streams)
        for number in range(streams):
            self.fill(number)
        return resident_bytes()


def main() -> None:
    name, weights = sys.argv[1:3]
    worker = Worker(name, weights, *map(int, sys.argv[3:8]))
    print(json.dumps(worker.facts), flush=True)
    calls: dict[str, Callable[..., Any]] = {
        "steps": worker.steps,
        "utterance": worker.utterance,
        "streams": worker.streams_at_once,
        "memory": worker.memory,
    }
    for line in sys.stdin:
        wish = json.loads(line)
        print(json.dumps(calls[wish.pop("do")](**wish)), flush=True)


if __name__ == "__main__":
    main()
