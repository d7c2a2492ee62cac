"""The conformance kit: any implementation of protocol.md, run as a child through a table of cases.

Rules of this room:

- A case is one promise of protocol.md: a function that takes a `Talk`, and whose docstring is the promise. It ends
  quietly, or with a DepartureError that says what was expected and what was seen, or with a NotApplicableError where
  the peer's own numbers leave nothing to try.
- Each case has a process of its own, so that one that fails spoils no other.
- Nothing is assumed of the codec: sizes, quantizers, codebook and caps come from the peer's HANDSHAKE. What a stream
  must sound like is not known; that it sounds the same, sample for sample, however it is sent, is.
- Nothing hangs: a child that does not answer in time is killed, and the case says what it waited for.
"""

from __future__ import annotations

from mossnano_stdio.conformance.table import CASES, Case, Status, Verdict, try_cases

__all__ = ["CASES", "Case", "Status", "Verdict", "try_cases"]
