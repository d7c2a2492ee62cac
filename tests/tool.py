"""How tests run the tools: in this process for speed, or as a user would."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from mossnano_stdio import cli

# On Windows the script would be a process of its own in front of the one that works.
COMMAND = (
    [sys.executable, "-m", "mossnano_stdio.cli"]
    if sys.platform == "win32"
    else [str(Path(sys.executable).with_name("mossnano"))]
)


class Outcome(NamedTuple):
    status: int
    out: bytes
    err: str

    @property
    def error_line(self) -> str:
        """What stderr says, where it must be one line."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err.rstrip("\n")


def call_tool(*arguments: object, stdin: bytes = b"") -> Outcome:
    """`mossnano ARGUMENTS` without a new process."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n"), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin)))),
    ):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as ending:  # argparse
            status = int(ending.code or 0)
        out.flush()
        return Outcome(status, out.buffer.getvalue(), err.getvalue())


def run_tool(*arguments: object, stdin: bytes = b"") -> Outcome:
    """`mossnano ARGUMENTS` as a process of its own."""
    run = subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=60)
    return Outcome(run.returncode, run.stdout, run.stderr.decode())
