"""The engine for a cluster: Ray Data, with actors that load the weights once.

References go to the actors as blocks of text, and codes come back, in the items' order. Every node must see the inputs
at the same paths; what is written, the driver writes. How many actors there are, and what is done again when a node
dies, is Ray's affair.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import numpy as np

from mossnano_stdio.errors import MossnanoError, UsageError
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.tools.datasets.local_pool import failure_of
from mossnano_stdio.tools.datasets.work import Outcome, Work, work_of

BLOCK_ITEMS: Final = 16  # that an actor gets at a time, and that are done again where it dies
LOOPBACK: Final = "127.0.0.1"


def ray_outcomes(
    items: Iterable[str], settings: Mapping[str, Any], maybe_address: str | None, maybe_workers: int | None
) -> Generator[Outcome, None, None]:
    """What comes of each item, in their order."""
    ray, data, arrow = import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        _start(ray, maybe_address, maybe_workers)
    try:
        tables = _tables(arrow, items)
        blocks = [ray.put(table) for table in tables]
        if not blocks:
            return
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        workers = maybe_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        results = data.from_arrow_refs(blocks).map_batches(
            _Actor,
            fn_constructor_args=(json.dumps(settings),),
            batch_size=None,
            compute=data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=1,
        )
        for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.to_pylist():
                yield _outcome_of(row)
    finally:
        if is_ours:
            ray.shutdown()


def import_ray() -> tuple[Any, Any, Any]:
    try:
        import pyarrow
        import ray
        import ray.data
    except ImportError:
        raise UsageError(f"--engine ray needs Ray, which is not installed: {how_to_get('ray')}") from None
    return ray, ray.data, pyarrow


def _start(ray: Any, maybe_address: str | None, maybe_workers: int | None) -> None:
    """Join the cluster at an address; or start one of this machine, which nobody else reaches or hears of."""
    import logging
    import os

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if maybe_address is not None:
        ray.init(address=maybe_address, logging_level=logging.ERROR, log_to_driver=False)
        return
    ray.init(
        num_cpus=maybe_workers,
        include_dashboard=False,
        _node_ip_address=LOOPBACK,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _tables(arrow: Any, items: Iterable[str]) -> Iterator[Any]:
    rest = iter(items)
    while block := list(islice(rest, BLOCK_ITEMS)):
        yield arrow.table({"item": block})


class _Actor:
    """Loads the weights once, and then answers blocks of items."""

    def __init__(self, settings: str) -> None:
        self._settings = settings
        self._maybe_work: Work | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = [self._answer(str(item)) for item in batch["item"]]
        return {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}

    def _answer(self, item: str) -> dict[str, Any]:
        """As columns of a table: a failure is a row, too, which ends the job where it is read."""
        try:
            if self._maybe_work is None:
                self._maybe_work = work_of(json.loads(self._settings))
            outcome = self._maybe_work.do(item)
        except MossnanoError as error:
            return _as_row(Outcome(), {"failure": str(error), "exit_status": int(error.exit_status)})
        return _as_row(outcome, {})


def _as_row(outcome: Outcome, failure: Mapping[str, Any]) -> dict[str, Any]:
    codes = outcome.maybe_codes
    document = {"fault": outcome.maybe_fault, "facts": dict(outcome.facts), **failure}
    if codes is not None:
        document["shape"] = list(codes.shape)
    return {"outcome": json.dumps(document), "codes": b"" if codes is None else codes.astype("<u2").tobytes()}


def _outcome_of(row: Mapping[str, Any]) -> Outcome:
    document = json.loads(row["outcome"])
    if "failure" in document:
        raise failure_of(document["exit_status"], document["failure"])
    maybe_codes = None
    if "shape" in document:
        maybe_codes = np.frombuffer(row["codes"], "<u2").astype(np.uint16, copy=False).reshape(document["shape"])
    return Outcome(document["fault"], document["facts"], maybe_codes)
