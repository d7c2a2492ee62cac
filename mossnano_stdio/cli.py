"""`mossnano`: one verb per file in tools/, found by its name, imported only when it is asked for.

Rules of this room:

- A tool is a module with `add_arguments(parser)` and `run(args) -> int`; its page of help is its docstring.
- What follows `--` is a COMMAND, untouched, for a tool that says HAS_COMMAND: it is in `args.command`.
- `python -m mossnano_stdio.cli` is `mossnano`, and `python -m mossnano_stdio` is the process.
- `mossnano --help` imports no tool, so neither numpy nor onnxruntime nor sounddevice.
- Every error ends here: one of ours prints one line on stderr and exits with its own status; Ctrl-C and SIGTERM
  unwind the tool and exit with 130 and 143.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from mossnano_stdio import __version__
from mossnano_stdio.errors import Terminated, exit_status_of
from mossnano_stdio.files import named_stdout
from mossnano_stdio.frozen import maybe_frozen_folder

VERBS = {
    "info": "say what a file or a weights folder is",
    "pack": "codes (.u16le, .npy, .json) -> artifact",
    "unpack": "artifact -> codes (.u16le, .npy, .json)",
    "frame": "artifacts -> a framed stream for mossnano-stdio",
    "unframe": "what mossnano-stdio answered -> raw PCM or WAV",
    "compare": "two recordings, sample by sample and join by join",
    "diagnose": "what is wrong with another decoder's sound?",
    "decode": "artifact -> WAV or raw PCM",
    "encode": "WAV, FLAC, OGG, MP3, ... -> artifact",
    "roundtrip": "encode and decode in one go: what the codec makes of a sound",
    "tokenize": "a data set of recordings -> shards of codes",
    "detokenize": "shards of codes -> recordings",
    "play": "play an artifact or a stream of PCM, live",
    "check": "are these weights whole, and do they decode right?",
    "fetch": "get the official weights, verified",
    "build": "checkpoint or official bundle -> graphs",
    "standin": "a seeded random model in the true shape, for tests",
    "bench": "measure it, side by side with the official loop",
    "web": "serve the page that decodes in the browser",
    "clients": "list or copy the clients for other languages",
    "protocol": "print protocol.md, the whole protocol",
    "freeze": "one folder that runs without Python",
    "conformance": "hold any implementation against protocol.md",
}


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbs = _verbs_here()
    parser = _top_parser(verbs)
    if not words or words[0] not in verbs:
        parser.parse_args(words or ["--help"])  # --help and --version end here, and so does a wrong verb
    verb = words[0]
    if sys.stderr is None:  # it is closed, and what tools print to it would go to stdout
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no text come out as they are
        if sys.platform == "win32" and not sys.stdout.isatty():  # by itself a pipe takes the letters of one region only
            sys.stdout.reconfigure(encoding="utf-8")
    try:
        with _sigterm_raised(), named_stdout():
            return _run_tool(verb, words[1:])
    except (Exception, KeyboardInterrupt, Terminated) as ending:  # noqa: BLE001 - a bug keeps its traceback
        return exit_status_of(ending, program=f"mossnano {verb}")


def _verbs_here() -> dict[str, str]:
    """All of them, but in a frozen folder only those whose tool is in it."""
    if maybe_frozen_folder() is None:
        return VERBS
    return {verb: what for verb, what in VERBS.items() if find_spec(f"mossnano_stdio.tools.{verb}")}


def _run_tool(verb: str, words: list[str]) -> int:
    tool = importlib.import_module(f"mossnano_stdio.tools.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"mossnano {verb}",
        description=tool.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tool.add_arguments(parser)
    if getattr(tool, "HAS_COMMAND", False):
        end = words.index("--") if "--" in words else len(words)
        args = parser.parse_args(words[:end])
        args.command = words[end + 1 :]
    else:
        args = parser.parse_args(words)
    status: int = tool.run(args)
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Within, SIGTERM raises Terminated, so that tools unwind as from Ctrl-C and leave no half-written file."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread: whoever started us there has the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _top_parser(verbs: dict[str, str]) -> argparse.ArgumentParser:
    width = max(map(len, verbs))
    parser = argparse.ArgumentParser(
        prog="mossnano",
        description="Tools around mossnano-stdio.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in verbs.items())
        + "\n\n`mossnano VERB --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mossnano {__version__}")
    parser.add_argument("verb", choices=verbs, metavar="VERB", help="one of the verbs below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
