"""How the process is started, the same for both clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mossnano_stdio.client.exchange import DecoderError

START_SECONDS: Final = 60.0  # how long it may take to say its HANDSHAKE
STOP_SECONDS: Final = 2.0  # how long it may take to end by itself
READ_BYTES: Final = 1 << 16

# A child of its own group, so that Ctrl-C is ours to deal with, and without a window.
CHILD_OPTIONS: Final[Mapping[str, Any]] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


def command_line(weights: str | None, arguments: Sequence[str], command: Sequence[str] | None) -> list[str]:
    """Our own process, with this Python, unless another command is given."""
    program = [sys.executable, "-m", "mossnano_stdio"] if command is None else list(command)
    return [*program, *(() if weights is None else ("--weights", weights)), *arguments]


def not_started(command: Sequence[str], error: OSError) -> DecoderError:
    """What to raise when there is no such program."""
    return DecoderError("not_started", f"{command[0]} cannot be started: {error.strerror}", fatal=True)
