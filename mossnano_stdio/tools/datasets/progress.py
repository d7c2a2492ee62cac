"""How far a job is: a bar on a terminal, lines of JSON where they are asked for, and the figures of the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from mossnano_stdio.tools.facts import as_json

LINE_SECONDS: Final = 1.0  # between two lines of JSON


class Progress:
    """Counts what this run does. What earlier runs did is done, but says nothing of how quick this one is."""

    def __init__(self, rows: int, rows_before: int, *, log_json: bool) -> None:
        self._rows, self._rows_before = rows, rows_before
        self._log_json = log_json
        self._began = time.monotonic()
        self._last_line = self._began
        self._bar: Any = None
        self.rows_done = rows_before
        self.sound_seconds = 0.0
        self.failures = 0

    def advance(self, sound_seconds: float, *, failed: bool = False) -> None:
        """One more row is done."""
        self.rows_done += 1
        self.sound_seconds += sound_seconds
        self.failures += failed
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(1)
        if self._log_json and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self.log("progress")

    def skip(self, rows: int) -> None:
        """So many were done by earlier runs."""
        self._rows_before += rows
        self.rows_done += rows

    def log(self, event: str, **facts: Any) -> None:
        """A line of JSON, where those are asked for."""
        if self._log_json:
            print(as_json({"event": event, **self.facts(), **facts}), file=sys.stderr, flush=True)

    def facts(self) -> dict[str, Any]:
        took_seconds = time.monotonic() - self._began
        done_now = self.rows_done - self._rows_before
        hours = self.sound_seconds / 3600
        return {
            "rows_done": self.rows_done,
            "rows_total": self._rows,
            "hours_done": round(hours, 6),
            "seconds": round(took_seconds, 3),
            "hours_per_second": round(hours / took_seconds, 6) if took_seconds else None,
            "real_time_factor": round(self.sound_seconds / took_seconds, 2) if took_seconds else None,
            "eta_seconds": round(took_seconds / done_now * (self._rows - self.rows_done), 1) if done_now else None,
            "failures": self.failures,
        }

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, a bar is on the terminal, where stderr is one."""
        try:
            from tqdm import tqdm
        except ImportError:
            yield
            return
        is_hidden = self._log_json or not sys.stderr.isatty()
        with tqdm(total=self._rows, initial=self._rows_before, unit="row", leave=False, disable=is_hidden) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def _figures(self) -> str:
        facts = self.facts()
        return (
            f"{facts['hours_done']:.2f} h, {facts['hours_per_second'] or 0:.4f} h/s, "
            f"{facts['real_time_factor'] or 0:.0f} x real time, {self.failures} failed"
        )
