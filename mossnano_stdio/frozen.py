"""Is this program one of a frozen folder, as `mossnano freeze` makes it? And what is otherwise then.

Rules of this room:

- A frozen folder is complete and stays as it is: its programs write nothing into it, and nothing beside it either, not
  even what would make the next start quicker.
- Weights that lie in it belong to it, and are taken before any that lie elsewhere, unless others are named.
"""

from __future__ import annotations

import sys
from pathlib import Path

WEIGHTS_FOLDER = "weights"  # within the frozen folder


def maybe_frozen_folder() -> Path | None:
    """The folder with the program that runs; None where it is Python that runs."""
    return Path(sys.executable).parent if getattr(sys, "frozen", False) else None


def how_to_get(extra: str) -> str:
    """What an error says where a package is missing.

    >>> how_to_get("play")
    "pip install 'mossnano-stdio[play]'"
    """
    command = f"pip install 'mossnano-stdio[{extra}]'"
    return command if maybe_frozen_folder() is None else f"a frozen folder has it not, but a Python after {command}"
