"""The engine for a cluster: Ray Data, with actors that load the weights once.

References go to the actors as blocks of text, and codes come back, in the items' order. Every node must have this
package, and see inputs and weights at the same paths; shards are written by the driver, and recordings by the actors.
How many actors there are, how far they are ahead, and what is done again where a node dies, is Ray's affair.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import numpy as np

from mossnano_stdio.errors import DeviceError, MossnanoError, UsageError
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.tools.datasets.work import Outcome, Work, answer_to, failure_answer, outcome_of, work_of

# Items that an actor gets at a time, and that are done again where it dies. A block costs the driver some 50 KB as long
# as the job lasts, so the more there were before it, the larger it is: of 100,000 items some 1,800 blocks are made.
LEAST_BLOCK_ITEMS: Final = 16
MOST_BLOCK_ITEMS: Final = 256
PART_OF_THOSE_BEFORE: Final = 512
LOOPBACK: Final = "127.0.0.1"
REACHED_SECONDS: Final = 10.0
CLUSTERS_VARIABLE: Final = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's own; it is read on Linux, too


def ray_outcomes(
    items: Iterable[str], settings: Mapping[str, Any], maybe_address: str | None, maybe_workers: int | None
) -> Generator[Outcome, None, None]:
    """What comes of each item, in their order."""
    ray = import_ray(maybe_address)
    try:
        _start(ray, maybe_address, maybe_workers)
        for document, codes in _answers(ray, items, settings, maybe_workers):
            yield outcome_of(json.loads(document), codes)
    except (ray.exceptions.RayError, ConnectionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DeviceError(f"Ray cannot go on: {lines[0]}; run the same command again once it can") from error
    finally:
        ray.shutdown()


def import_ray(maybe_address: str | None) -> Any:
    """The package. With no address it is told, before it is imported, to listen to this machine alone.

    On Linux it takes a loopback address for a mistake otherwise, and listens on all interfaces.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if maybe_address is None:
        os.environ.setdefault(CLUSTERS_VARIABLE, "0")
    try:
        import ray.data
    except ImportError:
        raise UsageError(f"--engine ray needs Ray, which is not installed: {how_to_get('ray')}") from None
    return ray


def _start(ray: Any, maybe_address: str | None, maybe_workers: int | None) -> None:
    """Join the cluster at an address; or start one of this machine, which nobody else reaches or hears of."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if maybe_address is not None:
        _check_reachable(maybe_address)
        ray.init(address=maybe_address, **quiet)
    else:
        # "local": by itself it would join whatever cluster was last started here.
        ray.init("local", num_cpus=maybe_workers, include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:  # `auto`, or the address of something before the cluster
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED_SECONDS).close()
    except OSError as error:
        raise DeviceError(f"no Ray cluster is at {address}: {error.strerror or error}") from None


def _answers(
    ray: Any, items: Iterable[str], settings: Mapping[str, Any], maybe_workers: int | None
) -> Iterator[tuple[str, bytes]]:
    import pyarrow as arrow

    blocks = [ray.put(arrow.table({"item": block})) for block in _blocks(items)]
    if not blocks:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    cpus = int(ray.cluster_resources().get("CPU", 1))
    at_once = max(1, min(maybe_workers or cpus, len(blocks)))
    results = ray.data.from_arrow_refs(blocks).map_batches(
        _Answering,
        fn_constructor_args=(json.dumps(settings),),
        batch_size=None,
        # Without --workers there may be more as a cluster grows, and fewer where a node is lost.
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=at_once, max_size=maybe_workers),
        num_cpus=1,
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for row in batch.to_pylist():
            yield row["document"], row["codes"]


def _blocks(items: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(items)
    taken = 0
    while block := list(islice(rest, min(MOST_BLOCK_ITEMS, max(LEAST_BLOCK_ITEMS, taken // PART_OF_THOSE_BEFORE)))):
        taken += len(block)
        yield block


class _Answering:
    """An actor: it loads the weights once, and then answers blocks of items."""

    def __init__(self, settings: str) -> None:
        self._settings = settings
        self._maybe_work: Work | None = None

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        answers = [self._answer(str(item)) for item in block["item"]]
        return {
            "document": np.array([json.dumps(document) for document, _ in answers], dtype=object),
            "codes": np.array([codes for _, codes in answers], dtype=object),
        }

    def _answer(self, item: str) -> tuple[dict[str, Any], bytes]:
        """Weights that cannot be loaded are a failure as any other: an actor that cannot start is tried for ever."""
        try:
            self._maybe_work = self._maybe_work or work_of(json.loads(self._settings))
        except (MossnanoError, MemoryError) as error:
            return failure_answer(error), b""
        return answer_to(self._maybe_work, item)
