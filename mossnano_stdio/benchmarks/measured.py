"""A process that is measured: it says one line of JSON when it is ready, and answers each line with one.

Rules of this room:

- One that ends instead has said why on stderr, which it shares with us. What it was given were weights, so that is what
  is wrong.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mossnano_stdio.errors import BundleError


class Measured:
    def __init__(self, child: subprocess.Popen[str], folder: Path) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._stdin, self._stdout, self._folder = child.stdin, child.stdout, folder
        self.facts: dict[str, float] = self._answer()

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
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield Measured(child, folder)
        finally:
            child.kill()


def ended(folder: Path) -> BundleError:
    return BundleError(f"{folder}: a process that ran these weights has ended; above it says why")
