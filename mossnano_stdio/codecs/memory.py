"""Will it fit? Graphs over whole files need memory with the square of the length, and the kernel kills without a word.

Rules of this room:

- An estimate errs on the large side, and a run that would not fit is refused before it starts.
- Where the machine does not say how much is free, nothing is refused.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

from mossnano_stdio.errors import UsageError
from mossnano_stdio.weights.folder import Bundle

SCORE_COPIES = 6.5  # attention scores that are alive at once, as measured over lengths of 8 to 24 seconds
SCORE_BYTES = 4  # float32
GIB = 1 << 30

CGROUP = Path("/sys/fs/cgroup")


def attention_bytes(bundle: Bundle, tokens_per_frame: Mapping[str, int], frames: int) -> int:
    """What attention over `frames` frames at once takes in its busiest layer."""
    busiest = max(cache.heads * tokens_per_frame[cache.offset_input_name] ** 2 for cache in bundle.caches)
    return int(SCORE_COPIES * SCORE_BYTES * busiest * frames**2)


def check_fits(what: str, needed_bytes: int, advice: str) -> None:
    free_bytes = _free_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise UsageError(
            f"{what} needs about {needed_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} GiB are free; {advice}"
        )


def _free_bytes() -> int | None:
    """What this process can still get, as far as the machine says so."""
    limits = [limit for limit in (_machine_bytes(), _group_bytes(), _address_bytes()) if limit is not None]
    return min(limits, default=None)


def _machine_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    """What a container leaves; `max` where there is no limit, which is no number."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        return limit - int((CGROUP / "memory.current").read_text(encoding="ascii"))
    return None


def _address_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
