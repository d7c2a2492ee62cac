"""Other programs that run Mimi, out of an environment that has them, beside our own graphs of the same checkpoint.

Rules of this room:

- Nothing of them is installed, and none of their figures is remembered: they are measured in the run that names them.
- What is missing is said before anything is measured.
- They read Kyutai's own layout of the checkpoint.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from mossnano_stdio.errors import BundleError, UsageError
from mossnano_stdio.tools.bench.sides import Side
from mossnano_stdio.weights import Bundle

_IS_THERE = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def peer_sides(
    bundle: Bundle, names: Sequence[str], python: str, maybe_checkpoint: Path | None, *, encodes: bool
) -> list[Side]:
    """The peers, each in decoding or encoding, once it is known that they are there."""
    if not names:
        return []
    from mossnano_stdio.codecs import family_of

    family = family_of(bundle).NAME
    if family != "mimi":
        raise UsageError(f"--peer is for Mimi, and {bundle.folder} is of {family}; leave it out")
    checkpoint = maybe_checkpoint or _checkpoint_of(bundle.folder)
    for name in names:
        _check_is_there(name, python)
    suffix = "-encode" if encodes else ""
    return [Side(name, f"{name}{suffix}", checkpoint, is_peer=True, python=python) for name in dict.fromkeys(names)]


def _checkpoint_of(folder: Path) -> Path:
    found = [*folder.glob("*.safetensors"), *folder.glob("checkpoint/*.safetensors")]
    if len(found) != 1:
        raise UsageError(
            f"{folder} has {len(found)} files *.safetensors in it and in its folder checkpoint, where the one would be "
            "that the peers read: name it with --peer-checkpoint"
        )
    return found[0]


def _check_is_there(name: str, python: str) -> None:
    try:
        is_there = subprocess.run([python, "-c", _IS_THERE, name], capture_output=True).returncode == 0
    except OSError as error:
        raise UsageError(f"--peer-python {python} cannot be run: {error.strerror}") from None
    if not is_there:
        raise BundleError(f"{name} is not installed for {python}: name a Python that has it with --peer-python")
