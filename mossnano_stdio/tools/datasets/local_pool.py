"""The local engine: processes on this machine, each with one encoder or decoder of one thread.

A thread here for each process gives it items and takes its answers. A process that dies is replaced, and its item tried
again. An item at which DEATHS processes have died, one after the other, is taken for what kills them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, cast

import numpy as np

from mossnano_stdio.errors import (
    BugError,
    BundleError,
    DeviceError,
    InputError,
    MossnanoError,
    OutOfMemoryError,
    OutputError,
    UsageError,
)
from mossnano_stdio.tools.datasets.work import Outcome

PROGRAM: Final = "mossnano_stdio.tools.datasets.labourer"
DEATHS: Final = 5
ITEMS_AHEAD: Final = 64  # for each process: so many may be done, and wait for one before them that takes longer
WAITING_BYTES: Final = 64 << 20  # of codes that wait so

FAILURES: Final = (UsageError, InputError, BundleError, DeviceError, OutOfMemoryError, OutputError)


def usable_cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_outcomes(items: Iterable[str], settings: Mapping[str, Any], processes: int) -> Generator[Outcome, None, None]:
    """What comes of each item, in their order. Close it to end the processes."""
    pool = _Pool(settings)
    threads = ThreadPoolExecutor(processes, thread_name_prefix="worker")
    waiting: deque[Future[Outcome]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(pool.outcome_of, item))
            while waiting and (
                waiting[0].done() or len(waiting) > ITEMS_AHEAD * processes or pool.waiting_bytes > WAITING_BYTES
            ):
                yield pool.taken(waiting.popleft().result())
        while waiting:
            yield pool.taken(waiting.popleft().result())
    finally:
        pool.end()
        threads.shutdown(cancel_futures=True)
        pool.close()


class _Pool:
    """The processes, one for each thread that asks."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.waiting_bytes = 0
        self._settings = settings
        self._lock = threading.Lock()
        self._is_ended = False
        self._processes: set[_Labourer] = set()
        self._of_thread = threading.local()

    def outcome_of(self, item: str) -> Outcome:
        for _ in range(DEATHS):
            process = self._process()
            try:
                outcome = process.ask(item)
            except (EOFError, BrokenPipeError):
                last_words = self._buried(process)
                if self._is_ended:
                    break
                continue
            with self._lock:
                self.waiting_bytes += _size(outcome)
            return outcome
        else:
            return Outcome(f"{DEATHS} processes died while they worked on it, the last one with {last_words}")
        raise EOFError("the pool is ended")

    def taken(self, outcome: Outcome) -> Outcome:
        """Nobody waits for it any more."""
        with self._lock:
            self.waiting_bytes -= _size(outcome)
        return outcome

    def end(self) -> None:
        """Kill all processes, so that every thread that waits for one goes on."""
        with self._lock:
            self._is_ended = True
            processes = list(self._processes)
        for process in processes:
            process.kill()

    def close(self) -> None:
        """Once no thread asks any more."""
        for process in self._processes:
            process.close()

    def _process(self) -> _Labourer:
        maybe_process: _Labourer | None = getattr(self._of_thread, "process", None)
        if maybe_process is not None:
            return maybe_process
        with self._lock:
            if self._is_ended:
                raise EOFError("the pool is ended")
            process = _Labourer()
            self._processes.add(process)
        self._of_thread.process = process
        with contextlib.suppress(BrokenPipeError, EOFError):  # who died so early is found dead when it is asked
            process.begin(self._settings)
        return process

    def _buried(self, process: _Labourer) -> str:
        """Remove a dead process; how it ended."""
        self._of_thread.process = None
        with self._lock:
            self._processes.discard(process)
        return process.last_words()


class _Labourer:
    """One process, and the way to it."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - as long as the process
        self._child = subprocess.Popen(
            [sys.executable, "-m", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def begin(self, settings: Mapping[str, Any]) -> None:
        self.ask(json.dumps(settings))

    def ask(self, line: str) -> Outcome:
        """The answer to one line; an EOFError or a BrokenPipeError where the process is dead."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()
        answer_line = self._child.stdout.readline()
        if not answer_line.endswith(b"\n"):
            raise EOFError
        answer = json.loads(answer_line)
        if "failure" in answer:
            raise failure_of(answer["exit_status"], answer["failure"])
        maybe_codes = None
        if "shape" in answer:
            size_bytes = 2 * int(np.prod(answer["shape"]))
            data = self._child.stdout.read(size_bytes)
            if len(data) < size_bytes:
                raise EOFError
            maybe_codes = np.frombuffer(data, "<u2").astype(np.uint16, copy=False).reshape(answer["shape"])
        self._errors.truncate(0)  # whatever libraries said of an item that they could read after all
        return Outcome(answer.get("fault"), answer.get("facts", {}), maybe_codes)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            with contextlib.suppress(OSError):  # of a pipe that still had something for the dead
                cast(Any, stream).close()

    def last_words(self) -> str:
        self.kill()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        self.close()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"status {self._child.returncode}" + (f" ({said})" if said else "")


def failure_of(exit_status: int, message: str) -> MossnanoError:
    """What ended a worker that could say it, as the error that it was there."""
    kind = next((kind for kind in FAILURES if kind.exit_status == exit_status), BugError)
    return kind(message)


def _size(outcome: Outcome) -> int:
    return 0 if outcome.maybe_codes is None else outcome.maybe_codes.nbytes
