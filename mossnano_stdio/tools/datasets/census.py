"""Counts what a data set holds: durations, and how often each code of each codebook was used.

A codebook is called dead where its codes are worth fewer than two that are used equally often (its perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.tokens import Codes
from mossnano_stdio.tools.facts import plotted

BINS_PER_DECADE: Final = 10  # of durations, from 0.1 s to 100,000 s
SHORTEST_SECONDS: Final = 0.1
DECADES: Final = 6
DEAD_PERPLEXITY: Final = 2.0


class Census:
    """What was counted so far."""

    def __init__(self, quantizers: int, codebook_size: int, sample_rate: int) -> None:
        self.rows = self.frames = self.samples = self.quarantined = 0
        self.sample_rate = sample_rate
        self.durations = np.zeros(BINS_PER_DECADE * DECADES, np.int64)
        self.used = np.zeros((quantizers, codebook_size), np.int64)

    def add(self, codes: Codes, original_samples: int) -> None:
        """Count one row: [quantizers, frames]."""
        self.rows += 1
        self.frames += codes.shape[1]
        self.samples += original_samples
        seconds = max(original_samples / self.sample_rate, SHORTEST_SECONDS)
        bin_number = int(BINS_PER_DECADE * math.log10(seconds / SHORTEST_SECONDS))
        self.durations[min(bin_number, len(self.durations) - 1)] += 1
        for quantizer, row in enumerate(codes):
            self.used[quantizer] += np.bincount(row, minlength=self.used.shape[1])

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "frames": self.frames,
            "samples": self.samples,
            "quarantined": self.quarantined,
            "durations": self.durations.tolist(),
            "used": self.used.tolist(),
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        for name in ("rows", "frames", "samples", "quarantined"):
            setattr(self, name, int(document[name]))
        for name, array in (("durations", self.durations), ("used", self.used)):
            array[...] = np.array(document[name], np.int64).reshape(array.shape)

    def facts(self) -> dict[str, Any]:
        """The summary of it."""
        return {
            "rows": self.rows,
            "quarantined": self.quarantined,
            "hours": round(self.seconds / 3600, 6),
            "frames": self.frames,
            "codes_used": np.count_nonzero(self.used, axis=1).tolist(),
            "perplexity": [round(each, 1) for each in self.perplexities().tolist()],
            "dead_codebooks": self.dead_codebooks(),
        }

    def perplexities(self) -> NDArray[np.float64]:
        """Of each codebook: how many codes, used equally often, would say as much."""
        totals = np.maximum(self.used.sum(axis=1, keepdims=True), 1)
        shares = self.used / totals
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.asarray(np.exp(-(shares * logs).sum(axis=1)), np.float64)

    def dead_codebooks(self) -> list[int]:
        return np.flatnonzero(self.perplexities() < DEAD_PERPLEXITY).tolist() if self.frames else []

    def plot(self, path: str) -> None:
        """A picture: durations above, codebooks below."""
        with plotted(path, figsize=(9, 7)) as figure:
            above, below = figure.subplots(2, 1)
            edges = SHORTEST_SECONDS * 10 ** (np.arange(len(self.durations) + 1) / BINS_PER_DECADE)
            above.stairs(self.durations, edges, fill=True)
            above.set(xscale="log", xlabel="seconds", ylabel="rows", title=f"{self.rows:,} rows, {self._hours()}")
            if self.rows:
                filled = np.flatnonzero(self.durations)
                above.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
            quantizers = np.arange(len(self.used))
            dead = self.dead_codebooks()
            colours = ["tab:red" if quantizer in dead else "tab:blue" for quantizer in quantizers]
            below.bar(quantizers, np.count_nonzero(self.used, axis=1), color=colours, label="codes used")
            below.plot(quantizers, self.perplexities(), "k.", label="perplexity")
            below.set(xlabel="codebook", ylabel=f"of {self.used.shape[1]:,} codes", ylim=(0, None))
            below.set_title(f"dead: {', '.join(map(str, dead))}" if dead else "no dead codebooks")
            below.legend()

    def _hours(self) -> str:
        return f"{self.seconds / 3600:,.1f} hours" if self.seconds >= 360 else f"{self.seconds:,.1f} s"
