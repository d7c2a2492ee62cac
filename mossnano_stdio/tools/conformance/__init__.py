"""Hold any implementation of protocol.md against it.

    mossnano conformance -- mossnano-stdio --weights demo

COMMAND is started once for each case, talked to through its stdin and stdout, and judged by what it answers and how
it ends. Sizes, quantizers and codebook are taken from its HANDSHAKE. A line for each case, and for each that fails
what was expected and what was seen. The exit status is 1 where any failed. Where the first case gets no HANDSHAKE,
nothing else is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mossnano_stdio.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from mossnano_stdio.tools.conformance.table import Case, Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="the program and its arguments, after --")
    parser.add_argument("--list", action="store_true", help="the cases and what each promises; nothing is run")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case only; may be given several times")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    parser.add_argument(
        "--timeout", type=_seconds, default=10.0, metavar="S", help="how long a case may take once it began (10)"
    )
    parser.add_argument(
        "--start-timeout", type=_seconds, default=60.0, metavar="S", help="how long the first HANDSHAKE may take (60)"
    )
    parser.add_argument(
        "--jobs", type=_jobs, default=min(4, os.cpu_count() or 1), metavar="N", help="cases at a time (one per CPU, 4)"
    )


def run(args: argparse.Namespace) -> int:
    from mossnano_stdio.tools.conformance.table import Status, try_cases

    cases = _chosen(args.case)
    if args.list:
        for case in cases:
            listed = {"name": case.name, "promise": case.promise}
            print(json.dumps(listed) if args.json else f"{case.name}\n  {case.promise}")
        return ExitStatus.DONE
    if not args.command:
        raise UsageError("there is no COMMAND: mossnano conformance -- PROGRAM ARGUMENTS")
    counts: Counter[Status] = Counter()
    for verdict in try_cases(
        cases,
        args.command,
        start_seconds=args.start_timeout,
        case_seconds=args.timeout,
        jobs=args.jobs,
        on_wait=_print_wait,
    ):
        counts[verdict.status] += 1
        _print_verdict(verdict, as_json=args.json)
    if not args.json:
        passed, failed, rest = (counts[status] for status in Status)
        untried = len(cases) - counts.total()
        print(f"{passed} passed, {failed} failed, {rest} not applicable" + f", {untried} not tried" * bool(untried))
    return ExitStatus.CHECK_FAILED if counts[Status.FAILED] else ExitStatus.DONE


def _chosen(maybe_names: Sequence[str] | None) -> Sequence[Case]:
    from mossnano_stdio.tools.conformance.table import CASES

    if maybe_names is None:
        return CASES
    unknown = set(maybe_names) - {case.name for case in CASES}
    if unknown:
        raise UsageError(f"there is no case {min(unknown)!r}: `mossnano conformance --list` has them all")
    return [case for case in CASES if case.name in maybe_names]


def _print_wait(seconds_left: float) -> None:
    print(
        f"waiting for the HANDSHAKE, {seconds_left:g} s more at the most (--start-timeout)", file=sys.stderr, flush=True
    )


def _print_verdict(verdict: Verdict, *, as_json: bool) -> None:
    from mossnano_stdio.tools.conformance.table import Status

    if as_json:
        fields = {
            "name": verdict.case.name,
            "promise": verdict.case.promise,
            "status": verdict.status.name.lower(),
            "seconds": round(verdict.seconds, 3),
            "expected": verdict.expected,
            "seen": verdict.seen,
        }
        print(json.dumps(fields), flush=True)
        return
    maybe_reason = f"  ({verdict.seen})" if verdict.status is Status.NOT_APPLICABLE else ""
    print(f"{verdict.status.value}  {verdict.case.name}{maybe_reason}", flush=True)
    if verdict.status is Status.FAILED:
        print(f"      promise   {verdict.case.promise}")
        print(f"      expected  {verdict.expected}")
        print(f"      seen      {verdict.seen}", flush=True)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 and up to 3600 is allowed")
    return seconds


def _jobs(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 to 64 is allowed")
    return int(text)
