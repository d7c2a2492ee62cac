"""A worker process of the local engine: items come on stdin, a line each, and outcomes go to stdout.

    python -m mossnano_stdio.tools.datasets.labourer

The first line is the settings. The answer to it, and to each item, is a line of JSON; where that has a `shape`, the
codes follow it, uint16 little-endian. It ends when stdin does, so also when who started it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from mossnano_stdio.errors import ExitStatus, MossnanoError
from mossnano_stdio.tools.datasets.work import Outcome, Work, work_of


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; who started us ends us
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    items = sys.stdin.buffer
    try:
        work = work_of(json.loads(items.readline()))
    except (MossnanoError, MemoryError) as error:
        _answer(answers, _failure(error))
        return ExitStatus.DONE
    _answer(answers, {})
    while item := items.readline():
        _answer_item(answers, work, item.decode())
    return ExitStatus.DONE


def _answer_item(answers: BinaryIO, work: Work, item: str) -> None:
    try:
        outcome = work.do(item)
    except (MossnanoError, MemoryError) as error:
        _answer(answers, _failure(error))
        return
    except Exception as error:  # noqa: BLE001 - one recording that we cannot handle does not end a job of a million
        outcome = Outcome(f"a bug of ours: {type(error).__name__}: {error}")
    _answer(answers, *_parts(outcome))


def _parts(outcome: Outcome) -> tuple[Mapping[str, Any], bytes]:
    line: dict[str, Any] = {"fault": outcome.maybe_fault, "facts": dict(outcome.facts)}
    if outcome.maybe_codes is None:
        return line, b""
    line["shape"] = list(outcome.maybe_codes.shape)
    return line, outcome.maybe_codes.astype("<u2").tobytes()


def _failure(error: MossnanoError | MemoryError) -> Mapping[str, Any]:
    status = error.exit_status if isinstance(error, MossnanoError) else ExitStatus.NO_MEMORY
    return {"failure": str(error) or "out of memory", "exit_status": int(status)}


def _answer(answers: BinaryIO, line: Mapping[str, Any], codes: bytes = b"") -> None:
    answers.write(json.dumps(line).encode() + b"\n" + codes)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
