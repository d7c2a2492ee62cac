"""Print protocol.md: how to talk to mossnano-stdio from any language.

`mossnano protocol | less`, or `mossnano protocol > protocol.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.files import STANDARD_STREAM, open_output
from mossnano_stdio.frozen import maybe_frozen_folder

NAME = "protocol.md"
PACKAGE = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: this tool takes no arguments."""


def run(args: argparse.Namespace) -> int:
    with open_output(STANDARD_STREAM) as file:
        # A wheel puts it into the package, an editable install has it in its checkout.
        places = [folder / NAME for folder in (maybe_frozen_folder() or PACKAGE, PACKAGE.parent)]
        file.write((places[0] if places[0].exists() else places[1]).read_bytes())
    return ExitStatus.DONE
