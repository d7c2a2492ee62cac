"""The table of cases. Each is tried on a child process, which may be any implementation of protocol.md.

Rules of this room:

- A case is one promise of protocol.md: a function that takes a `Talk`, and whose docstring is the promise. It returns
  where the promise is kept, raises DepartureError with what was expected and what was seen where it is not, and
  NotApplicableError where the peer's own numbers leave nothing to try.
- Each case starts a process of its own, so that a failed case cannot make another fail.
- Sizes, quantizers, codebook and caps come from the peer's HANDSHAKE. Cases do not know how a stream must sound; they
  check that it sounds the same, sample for sample, however it is sent.
- A child that does not answer in time is killed, and the case says what it waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Final

from mossnano_stdio.protocol import Kind
from mossnano_stdio.tools.conformance.cases import (
    artifacts,
    cancelling,
    endings,
    errors,
    framing,
    handshakes,
    numbered,
    pings,
    settings,
    streams,
    tokens,
)
from mossnano_stdio.tools.conformance.peer import DepartureError, NotApplicableError, Peer
from mossnano_stdio.tools.conformance.talk import Talk, describe, fields_of

QUIET_SECONDS: Final = 2.0  # after this long without a HANDSHAKE the tool says that it waits

ROOMS: Final[tuple[ModuleType, ...]] = (
    handshakes,
    framing,
    tokens,
    streams,
    pings,
    artifacts,
    errors,
    cancelling,
    settings,
    numbered,
    endings,
)


class Status(Enum):
    """The result of a case."""

    PASSED = "pass"
    FAILED = "FAIL"
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True)
class Case:
    """One promise of protocol.md."""

    name: str
    promise: str
    run: Callable[[Talk], None]


@dataclass(frozen=True)
class Verdict:
    """The result of a case, and the reason, where it did not pass."""

    case: Case
    status: Status
    seconds: float
    expected: str = ""
    seen: str = ""
    is_mute: bool = False  # there was no HANDSHAKE that a conversation could begin with


class _MuteError(DepartureError):
    """There is no HANDSHAKE, or none that says what the cases have to know."""


def _cases_in(room: ModuleType) -> Iterator[Case]:
    """The functions of a room that have a promise, in the order in which they stand there."""
    subject = room.__name__.rpartition(".")[2]
    for name, value in vars(room).items():
        if callable(value) and getattr(value, "__module__", "") == room.__name__ and not name.startswith("_"):
            assert value.__doc__, f"{subject}.{name} promises nothing"
            yield Case(f"{subject}-{name}".replace("_", "-"), " ".join(value.__doc__.split()), value)


CASES: Final[tuple[Case, ...]] = tuple(case for room in ROOMS for case in _cases_in(room))


def try_cases(
    cases: Sequence[Case],
    command: Sequence[str],
    *,
    start_seconds: float,
    case_seconds: float,
    jobs: int,
    on_wait: Callable[[float], None] = lambda seconds_left: None,
) -> Iterator[Verdict]:
    """Each case with a child of its own, `jobs` of them at a time; the verdicts in the order of the cases.

    A child gets `start_seconds` for its HANDSHAKE, and a case `case_seconds` from then on. Where the first child sends
    no usable HANDSHAKE, no other case is tried, as each would fail alike. Where the first HANDSHAKE takes longer than
    QUIET_SECONDS, `on_wait` is called once with the seconds that are left.
    """

    def try_one(case: Case) -> Verdict:
        return _try(case, command, start_seconds, case_seconds)

    with _called_when_slow(on_wait, start_seconds) as stop_waiting:
        first = _try(cases[0], command, start_seconds, case_seconds, stop_waiting)
    yield first
    if not first.is_mute:
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(try_one, cases[1:])


@contextmanager
def _called_when_slow(on_wait: Callable[[float], None], start_seconds: float) -> Iterator[Callable[[], None]]:
    """Calls `on_wait` after QUIET_SECONDS, unless the function that it gives is called before."""
    timer = threading.Timer(QUIET_SECONDS, on_wait, [start_seconds - QUIET_SECONDS])
    if start_seconds > QUIET_SECONDS:
        timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def _try(
    case: Case,
    command: Sequence[str],
    start_seconds: float,
    case_seconds: float,
    on_handshake: Callable[[], None] = lambda: None,
) -> Verdict:
    started = time.monotonic()
    expected = seen = ""
    status = Status.PASSED
    is_mute = False
    try:
        with Peer(command) as peer:
            peer.allow(start_seconds)
            talk = _begin(peer)
            on_handshake()
            peer.allow(case_seconds)
            case.run(talk)
    except DepartureError as departure:
        status, expected, seen = Status.FAILED, departure.expected, departure.seen
        is_mute = isinstance(departure, _MuteError)
    except NotApplicableError as reason:
        status, seen = Status.NOT_APPLICABLE, str(reason)
    return Verdict(case, status, time.monotonic() - started, expected, seen, is_mute)


def _begin(peer: Peer) -> Talk:
    try:
        maybe_message = peer.maybe_read()
        if maybe_message is None:
            raise DepartureError("HANDSHAKE as the first message", peer.describe_end())
        if maybe_message.kind != Kind.HANDSHAKE:
            raise DepartureError("HANDSHAKE as the first message", describe(maybe_message))
        return Talk(peer, fields_of(maybe_message))
    except DepartureError as departure:
        raise _MuteError(departure.expected, departure.seen) from None
