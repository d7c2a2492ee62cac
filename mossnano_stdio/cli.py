"""`mossnano`: one verb per file in tools/, found by its name, imported only when it is asked for.

Rules of this room:

- A tool is a module with `add_arguments(parser)` and `run(args) -> int`; its page of help is its docstring.
- `mossnano --help` imports no tool, so neither numpy nor onnxruntime nor sounddevice.
- Whatever ends a tool ends it here: an error of ours is one line on stderr and its own exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mossnano_stdio import __version__
from mossnano_stdio.errors import exit_status_of

VERBS = {
    "info": "say what a file or a weights folder is",
    "pack": "codes (.u16le, .npy, .json) -> artifact",
    "unpack": "artifact -> codes (.u16le, .npy, .json)",
    "frame": "artifacts -> a framed stream for mossnano-stdio",
    "unframe": "what mossnano-stdio answered -> raw PCM or WAV",
    "compare": "two recordings, sample by sample and join by join",
    "decode": "artifact -> WAV or raw PCM",
    "encode": "WAV, FLAC, OGG, MP3, ... -> artifact",
    "play": "play an artifact or a stream of PCM, live",
    "check": "are these weights whole, and do they decode right?",
    "fetch": "get the official weights, verified",
    "build": "checkpoint or official bundle -> graphs",
    "standin": "a seeded random model in the true shape, for tests",
    "bench": "measure it, side by side with the official loop",
    "clients": "list or copy the clients for other languages",
    "conformance": "hold any implementation against protocol.md",
}


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _top_parser()
    if not words or words[0] not in VERBS:
        parser.parse_args(words or ["--help"])  # --help and --version end here, and so does a wrong verb
    verb = words[0]
    try:
        tool = importlib.import_module(f"mossnano_stdio.tools.{verb}")
        tool_parser = argparse.ArgumentParser(
            prog=f"mossnano {verb}",
            description=tool.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        tool.add_arguments(tool_parser)
        status: int = tool.run(tool_parser.parse_args(words[1:]))
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001 - exit_status_of names every one, and a bug keeps its traceback
        return exit_status_of(error, program=f"mossnano {verb}")
    except KeyboardInterrupt as interrupt:
        return exit_status_of(interrupt, program=f"mossnano {verb}")
    return status


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
        prog="mossnano",
        description="Tools around mossnano-stdio.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
        + "\n\n`mossnano VERB --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mossnano {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    return parser
