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
    """There are none."""


def run(args: argparse.Namespace) -> int:
    with open_output(STANDARD_STREAM) as file:
        file.write(_page())
    return ExitStatus.DONE


def _page() -> bytes:
    """From the package, where a wheel puts it; else from the checkout that an editable install points to."""
    installed = PACKAGE / NAME
    return (installed if installed.exists() else PACKAGE.parent / NAME).read_bytes()
