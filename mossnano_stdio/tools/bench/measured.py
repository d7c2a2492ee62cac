"""Runs a process that is measured: it prints one line of JSON when it is ready, and answers each line with one.

Rules of this room:

- A process that ends instead of answering is a BundleError: it was given weights, and said on our stderr what is wrong.
- Each process is in a session of its own, so that Ctrl-C reaches only us and the process prints no traceback.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mossnano_stdio.errors import BundleError


class Measured:
    def __init__(self, child: subprocess.Popen[str], folder: Path, began: float) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._stdin, self._stdout, self._folder = child.stdin, child.stdout, folder
        self.facts: dict[str, float] = self._answer()
        self.ready_ms = 1000 * (time.perf_counter() - began)

    def ask(self, line: str) -> Any:
        self._stdin.write(f"{line}\n")
        self._stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._stdout.readline()
        if not line:
            raise ended(self._folder)
        return json.loads(line)


@contextmanager
def measured(command: Sequence[str], folder: Path) -> Iterator[Measured]:
    """`folder` is where the weights lie, for the error."""
    began = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as child:
        try:
            yield Measured(child, folder, began)
        finally:
            child.kill()


def ended(folder: Path) -> BundleError:
    return BundleError(f"{folder}: a process that ran these weights has ended; above it says why")
