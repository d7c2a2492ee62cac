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
from mossnano_stdio.tools.datasets.work import answer_to, failure_answer, work_of


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; who started us ends us
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    items = sys.stdin.buffer
    try:
        work = work_of(json.loads(items.readline()))
    except (MossnanoError, MemoryError) as error:
        _answer(answers, failure_answer(error))
        return ExitStatus.DONE
    _answer(answers, {})
    while item := items.readline():
        _answer(answers, *answer_to(work, item.decode()))
    return ExitStatus.DONE


def _answer(answers: BinaryIO, document: Mapping[str, Any], codes: bytes = b"") -> None:
    answers.write(json.dumps(document).encode() + b"\n" + codes)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
