"""Print protocol.md: how to talk to mossnano-stdio from any language.

`mossnano protocol | less`, or `mossnano protocol > protocol.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.files import STANDARD_STREAM, open_output

NAME = "protocol.md"
PACKAGE = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: this tool takes no arguments."""


def run(args: argparse.Namespace) -> int:
    with open_output(STANDARD_STREAM) as file:
        installed = PACKAGE / NAME  # where a wheel puts it; an editable install has it in its checkout
        file.write((installed if installed.exists() else PACKAGE.parent / NAME).read_bytes())
    return ExitStatus.DONE
