"""onnxruntime sessions: how they are made, and what can go wrong with them.

Rules of this room:

- onnxruntime is imported here only, with its telemetry off, and when the first session is made, not before: a missing
  file should not cost its import.
- A session exists only when its files are whole, its inputs and outputs are what the metadata says, and the provider
  that was asked for is active. There is no silent fall to the CPU.
- A session has no state of a stream. Any number of threads may run it at once, so many decoders share one.
- Nothing of onnxruntime's own reaches stdout, and its exceptions do not leave this package.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import BundleError, DecodeError, MossnanoError, UsageError
from mossnano_stdio.tokens.arrays import is_whole_number
from mossnano_stdio.weights import Graph, StateSpec, WeightFile

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
RESTS_ON_CUDA = ("cuda", "tensorrt")
DEVICES = {"cuda": "cuda"}  # whose memory states stay in; of all others they come back to the CPU's
MAX_DEFAULT_THREADS = 4  # more do not help graphs of this size
MAX_THREADS = 1024

SPIN_US = 10
# Of onnxruntime.
BOUNDED_SPINNING_SINCE = (1, 26)
DATA_FOLDER_SINCE = (1, 21)

LOG_ERRORS, LOG_FATAL = 3, 4  # onnxruntime's severities
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
MISSING_LIBRARY = re.compile(r"^Failed to load (.+?): ", re.MULTILINE)  # as onnxruntime's preload_dlls prints it
MEMORY_WORDS = ("bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory")

NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"  # onnxruntime reads it while it is imported, and never again
_importing = threading.Lock()

DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}

Array = NDArray[Any]
BindRun = Callable[[int, int], Mapping[str, Array]]  # first and end frame of a run -> arrays by their names


class UnfitRuntimeError(BundleError):
    """This onnxruntime cannot run such a graph, whatever the weights."""


@dataclass(frozen=True)
class Engine:
    """Where graphs run, on how many threads, and whether these spin while they wait: sooner, but at a core each."""

    provider: str
    threads: int
    spin: bool

    @classmethod
    def of(cls, provider: str = "cpu", threads: int | None = None, spin: bool = False) -> Engine:
        if provider not in PROVIDERS:
            raise UsageError(f"provider {provider!r} is not known, allowed are {', '.join(PROVIDERS)}")
        if threads is not None and (not is_whole_number(threads) or not 1 <= threads <= MAX_THREADS):
            raise UsageError(f"{threads!r} threads, allowed is a whole number from 1 to {MAX_THREADS}")
        return cls(provider, default_threads() if threads is None else int(threads), spin)

    @property
    def device(self) -> str:
        """In whose memory graphs leave what the next run takes."""
        return DEVICES.get(self.provider, "cpu")


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output. A dimension that may vary is None."""

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any] | str

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


class Session:
    """A graph that can be run."""

    def __init__(self, graph: Graph, engine: Engine, native: Any) -> None:
        self.graph = graph
        self.engine = engine
        self.native = native  # the onnxruntime.InferenceSession, for whoever binds its inputs and outputs
        try:
            self.inputs = _tensor_specs(native.get_inputs())
            self.outputs = _tensor_specs(native.get_outputs())
        except UnicodeDecodeError as error:
            raise BundleError(f"{graph.path}: has an input or output whose name is no text ({error})") from None

    def run(self, output_names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        with translated_errors(self.graph):
            outputs: list[Array] = self.native.run(output_names, feed)
        return outputs


def default_threads() -> int:
    """The CPUs that this process may use, at most four."""
    usable = os.cpu_count() or 1
    if sys.platform == "linux":
        usable = len(os.sched_getaffinity(0))
    return min(MAX_DEFAULT_THREADS, usable)


def check_provider(name: str) -> None:
    """Is it in this onnxruntime?"""
    if PROVIDERS[name] not in import_onnxruntime().get_available_providers():
        raise BundleError(f"provider {name!r} is not in this onnxruntime; {_available_providers()}")


def open_session(graph: Graph, engine: Engine, *, optimise: bool = True, maybe_model: bytes | None = None) -> Session:
    """Load `graph`, or in its place a model over the same data. Its large files are hashed beside onnxruntime's own
    work; no verdict, no session.
    """
    check = _ContentCheck(graph.data)
    graph.model.check_content()  # first, and small: a damaged graph never reaches the native library
    try:
        session = Session(graph, engine, _native_session(graph, engine, optimise, maybe_model))
    except MossnanoError:
        check.finish()  # damaged data explains the failure better than onnxruntime does
        raise
    check.finish()
    return session


def check_contract(
    session: Session, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], states: Iterable[StateSpec]
) -> None:
    """Are the graph's inputs and outputs these, and each state tensor's output of the kind that its input takes?"""
    states = tuple(states)
    tensors = [TensorSpec(state.shape, state.dtype) for state in states]
    state_inputs = {state.input_name: tensor for state, tensor in zip(states, tensors, strict=True)}
    state_outputs = {state.output_name: tensor for state, tensor in zip(states, tensors, strict=True)}
    if len(state_inputs) != len(states) or len(state_outputs) != len(states):
        raise BundleError(f"{session.graph.path}: a state tensor is fed back twice; each has one input and one output")
    _check_tensors(session.graph, "input", session.inputs, {**inputs, **state_inputs})
    _check_tensors(session.graph, "output", session.outputs, {**outputs, **state_outputs})


@contextlib.contextmanager
def translated_errors(graph: Graph) -> Iterator[None]:
    """What onnxruntime raises in a run, as one of ours."""
    try:
        yield
    except MossnanoError:
        raise
    except Exception as error:  # its exceptions have no common root but this
        _raise_if_memory(error)
        raise DecodeError(f"{graph.path}: the graph failed: {_first_line(error)}") from error


@cache
def import_onnxruntime() -> Any:
    """The package, which says nothing to anybody.

    By itself version 1.32 looks for a host of its maker's, and writes below HOME and TMPDIR. A program that imported it
    before us, or has set the variable, has decided for itself.
    """
    with _importing:
        is_ours = NO_TELEMETRY not in os.environ and "onnxruntime" not in sys.modules
        if is_ours:
            os.environ[NO_TELEMETRY] = "1"
        try:
            import onnxruntime
        finally:
            if is_ours:  # what the program imports or starts later is its own affair
                del os.environ[NO_TELEMETRY]
    return onnxruntime


def official_instead(graph: Graph) -> str:
    """What else may run in the place of a graph that decodes: that of MOSS has an official one beside it."""
    return ", `--graph official` runs with any" if graph.name == "fast" else ""


def native_value(array: NDArray[Any]) -> Any:
    """The array's own memory as onnxruntime takes it."""
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(array)


def device_value(array: NDArray[Any], device: str) -> Any:
    """A copy of the array in a device's memory."""
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, device)


def _native_session(graph: Graph, engine: Engine, optimise: bool, maybe_model: bytes | None) -> Any:
    onnxruntime = import_onnxruntime()
    check_provider(engine.provider)
    wanted = PROVIDERS[engine.provider]
    if maybe_model and _numbers(onnxruntime.__version__) < DATA_FOLDER_SINCE:
        raise UnfitRuntimeError(
            f"{graph.path}: onnxruntime {onnxruntime.__version__} finds no data of a graph that is rewritten as it is "
            f"loaded; 1.21 and later do{official_instead(graph)}"
        )
    missing = _missing_libraries() if engine.provider in RESTS_ON_CUDA else ""
    # onnxruntime refuses external data behind a symlink that leads out of the graph's folder, some versions (1.24.1)
    # even within the hub's cache. Then the data is handed over in memory, which takes a copy of it while it loads.
    linked = any(file.path.is_symlink() for file in graph.data)
    maybe_failure = None
    for data_in_memory in (False, True) if linked else (False,):
        try:
            native = _create(onnxruntime, graph, engine, optimise, data_in_memory, maybe_model)
        except Exception as error:  # noqa: BLE001 - its exceptions have no common root but this
            maybe_failure = maybe_failure or error
            continue
        if wanted not in native.get_providers():
            raise BundleError(
                f"provider {engine.provider!r} was asked for, but did not start{missing}; this onnxruntime has it, and "
                "has written to stderr what it misses: a library, a driver or a device"
            )
        return native
    assert maybe_failure is not None
    _raise_if_memory(maybe_failure)
    files = " with ".join(["it", *(file.path.name for file in graph.data)])
    where = "" if engine.provider == "cpu" else f" on provider {engine.provider!r}"
    raise BundleError(
        f"{graph.path}: onnxruntime cannot load {files}{where}: {_first_line(maybe_failure)}"
    ) from maybe_failure


def _create(
    onnxruntime: Any, graph: Graph, engine: Engine, optimise: bool, data_in_memory: bool, maybe_model: bytes | None
) -> Any:
    options = _session_options(onnxruntime, engine)
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The CPU takes the operators that another provider does not have.
    providers = {PROVIDERS[engine.provider]: _provider_options(engine), PROVIDERS["cpu"]: {}}
    with contextlib.ExitStack() as open_files:
        if data_in_memory:
            files = [open_files.enter_context(file.path.open("rb")) for file in graph.data]
            mapped = [open_files.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) for file in files]
            names = [file.path.name for file in graph.data]
            options.add_external_initializers_from_files_in_memory(names, mapped, [len(data) for data in mapped])
        path = open_files.enter_context(_path_as_text(graph.path))
        if maybe_model:  # which has no folder in which its data would be looked for
            options.add_session_config_entry(DATA_FOLDER, str(Path(path).parent))
        return onnxruntime.InferenceSession(
            maybe_model or path, options, providers=[*providers.items()], enable_fallback=0
        )


@contextlib.contextmanager
def _path_as_text(path: Path) -> Iterator[str]:
    """A path that onnxruntime takes: it wants UTF-8. On Linux a name may be any bytes, and a way leads around them."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{folder}/{path.name}"
        finally:
            os.close(folder)
    else:
        yield str(path)


@cache
def _missing_libraries() -> str:
    """Load what CUDA's providers rest on, out of the packages that pip puts beside onnxruntime: by itself it looks for
    them in the system only. Returns words about those that are nowhere.
    """
    maybe_load = getattr(import_onnxruntime(), "preload_dlls", None)  # since 1.21
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if maybe_load is not None:
            maybe_load()
    names = [Path(path).name for path in MISSING_LIBRARY.findall(said.getvalue())]
    return f", for want of {', '.join(names)}: pip install 'onnxruntime-gpu[cuda,cudnn]'" if names else ""


def _provider_options(engine: Engine) -> dict[str, str]:
    match engine.provider:
        case "cuda":  # by itself it rounds what it multiplies to 10 bits of mantissa (TF32), and leaves 62 dB of 120
            return {"use_tf32": "0"}
        case "openvino":  # by itself it takes all CPUs, whatever the session was told
            return {"num_of_threads": str(engine.threads)}
        case _:
            return {}


def _session_options(onnxruntime: Any, engine: Engine) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = engine.threads
    options.inter_op_num_threads = 1
    for key, value in _spinning(engine, onnxruntime.__version__).items():
        options.add_session_config_entry(f"session.{key}", value)
    # Planning which buffers to share takes two thirds of the loading time, and saves nothing worth having here.
    options.enable_mem_reuse = False
    # What goes wrong on the CPU arrives as an exception; why another provider did not start is only in the log.
    options.log_severity_level = LOG_FATAL if engine.provider == "cpu" else LOG_ERRORS
    if engine.provider == "directml":
        options.enable_mem_pattern = False  # it cannot run otherwise
    return options


def _numbers(version: str) -> tuple[int, ...]:
    """Its first two: (1, 26) of 1.26.0."""
    return tuple(map(int, version.split(".")[:2]))


def _spinning(engine: Engine, version: str) -> dict[str, str]:
    """How threads wait for their next part of the work.

    Between two nodes it is often some microseconds away: to spin so long is a tenth faster in two threads than to sleep
    and be woken, and takes no more CPU. To spin on, as onnxruntime would, takes CPUs from other streams.
    """
    if engine.spin:
        return {"intra_op.allow_spinning": "1"}
    if _numbers(version) < BOUNDED_SPINNING_SINCE:
        return {"intra_op.allow_spinning": "0"}
    return {
        "intra_op.allow_spinning": "1",
        "intra_op.spin_duration_us": str(SPIN_US),
        "force_spinning_stop": "1",  # and not at all between two runs
    }


class _ContentCheck(threading.Thread):
    """Hashes files beside whatever else is done until `finish`, which raises what was found."""

    def __init__(self, files: Sequence[WeightFile]) -> None:
        super().__init__(name="content-check", daemon=True)
        self._files = files
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for file in self._files:
                file.check_content()
        except Exception as error:  # noqa: BLE001 - raised again in `finish`
            self._error = error

    def finish(self) -> None:
        self.join()
        if self._error:
            raise self._error


def _tensor_specs(native_arguments: Sequence[Any]) -> dict[str, TensorSpec]:
    return {
        argument.name: TensorSpec(
            shape=tuple(size if isinstance(size, int) else None for size in argument.shape),
            dtype=DTYPES.get(argument.type, str(argument.type)),
        )
        for argument in native_arguments
    }


def _check_tensors(graph: Graph, kind: str, found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> None:
    for name in wanted.keys() - found.keys():
        raise BundleError(f"{graph.path}: has no {kind} {name!r}, which the metadata promises")
    for name in found.keys() - wanted.keys():
        raise BundleError(f"{graph.path}: has an {kind} {name!r}, which the metadata does not know")
    for name, tensor in wanted.items():
        if not _fits(found[name], tensor):
            raise BundleError(f"{graph.path}: {kind} {name!r} is {found[name]}, the metadata says {tensor}")


def _fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    """Same dtype and rank, and no dimension that contradicts: one that may vary fits every number."""
    if found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
        return False
    pairs = zip(found.shape, wanted.shape, strict=True)
    return all(here is None or there is None or here == there for here, there in pairs)


def _available_providers() -> str:
    available = import_onnxruntime().get_available_providers()
    names = [name for name, native in PROVIDERS.items() if native in available]
    return f"here there are {', '.join(names)}; another build of onnxruntime, or its drivers, may bring it"


def _raise_if_memory(error: Exception) -> None:
    if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_WORDS):
        raise MemoryError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
