"""The flags that both verbs have, and what they say at their end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.files import open_output
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.process.flags import whole_number
from mossnano_stdio.tools.facts import as_json, check_plot_name

if TYPE_CHECKING:
    from mossnano_stdio.tools.datasets.job import Engine, Report
    from mossnano_stdio.tools.datasets.work import Outcome

MOST_WORKERS = 1024


def add_job_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Where to, with which weights, and by which engine."""
    parser.add_argument("--to", required=True, metavar="DIR", help=f"where {what} go: a new folder, or that of the job")
    parser.add_argument("--weights", metavar="DIR", help="a weights folder")
    parser.add_argument(
        "--workers", type=whole_number(1, MOST_WORKERS), metavar="N", help="processes of one thread (the CPUs' number)"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    parser.add_argument(
        "--address", metavar="A", help="of the Ray cluster, `auto` for the one that runs here (a new one)"
    )
    parser.add_argument("--fail-fast", action="store_true", help="end at the first recording that is bad, with 65")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What is said while it runs and at its end."""
    parser.add_argument("--log-json", action="store_true", help="how far it is as lines of JSON on stderr, and no bar")
    parser.add_argument("--stats", metavar="FILE", help="figures of the end as JSON; - is stdout")


def chosen_engine(args: argparse.Namespace) -> Engine:
    if args.engine == "ray":
        from mossnano_stdio.tools.datasets.ray_cluster import import_ray, ray_outcomes

        import_ray(args.address)
        return lambda items, settings: ray_outcomes(items, settings, args.address, args.workers)
    if args.address is not None:
        raise UsageError("--address is for --engine ray, which is not given")
    from mossnano_stdio.tools.datasets.local_pool import local_outcomes, usable_cpus

    def outcomes(items: Iterable[str], settings: Mapping[str, Any]) -> Generator[Outcome, None, None]:
        return local_outcomes(items, settings, args.workers or usable_cpus())

    return outcomes


def reported(args: argparse.Namespace, job: Callable[[], Report]) -> int:
    """Run a job, and say what came of it."""
    from mossnano_stdio.tools.datasets.job import check_packages

    check_packages()
    maybe_plot = getattr(args, "plot", None)
    if maybe_plot is not None:
        check_plot_name(maybe_plot)
        if find_spec("matplotlib") is None:  # before hours of work, not after them
            raise UsageError(f"--plot needs matplotlib: {how_to_get('plot')}")
    report = job()
    if args.stats is not None:
        with open_output(args.stats) as file:
            file.write(as_json(report.facts).encode() + b"\n")
    if maybe_plot is not None and report.census is not None:
        report.census.plot(maybe_plot)
    facts = report.facts
    speed = f"{facts['hours_done']:.3f} h in {facts['seconds']:.1f} s, {facts['real_time_factor'] or 0:.1f} x real time"
    print(f"{args.to}: {facts['rows_done']:,} recordings are done; this run did {speed}", file=sys.stderr)
    if not report.quarantined:
        return ExitStatus.DONE
    print(f"{report.quarantine}: {report.quarantined:,} recordings are bad, and why", file=sys.stderr)
    return ExitStatus.CHECK_FAILED
