"""The picture of a diagnosis, to be pasted into an issue."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from mossnano_stdio.tokens import CodecFormat
from mossnano_stdio.tools.diagnose.diagnosis import Diagnosis
from mossnano_stdio.tools.facts import plotted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HIGHEST_DB = 130.0  # what has no error at all is drawn here
WIDTH = 110  # letters in a line


def save_picture(path: str, diagnosis: Diagnosis, codec: CodecFormat, title: str) -> None:
    with plotted(path, figsize=(12, 6)) as figure:
        axes = figure.subplots()
        _draw(axes, diagnosis, codec)
        verdict = textwrap.fill(diagnosis.verdict, WIDTH)
        axes.set_title(f"{title}\n{verdict}", loc="left", fontsize=11, fontweight="bold", wrap=True)
        if diagnosis.named is not None:
            look_for = textwrap.fill(f"Look for: {diagnosis.named.look_for}", WIDTH)
            figure.supxlabel(look_for, x=0.02, ha="left", fontsize=10)


def _draw(axes: Axes, diagnosis: Diagnosis, codec: CodecFormat) -> None:
    seconds = np.arange(len(diagnosis.frame_snr_db)) / codec.frames_per_second
    for snr, label, color in (
        (diagnosis.frame_snr_db, "against the right decode", "tab:red"),
        (diagnosis.named_frame_snr_db, "against a decode with the named fault", "tab:green"),
    ):
        if snr is not None:
            drawn = np.clip(snr, -10, HIGHEST_DB)
            axes.step(seconds, drawn, where="post", label=label, color=color, marker=".", markersize=3)
    for context, numbers in _contexts(diagnosis).items():
        place = context / codec.frames_per_second
        if place <= len(seconds) / codec.frames_per_second:
            axes.axvline(place, color="tab:gray", linestyle="--", linewidth=1)
            axes.annotate(
                f"context of {numbers} full",
                (place, 0.02),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=8,
                color="tab:gray",
                va="bottom",
                ha="right",
            )
    if diagnosis.first_sample is not None:
        departs = diagnosis.first_sample / codec.sample_rate
        axes.axvline(departs, color="tab:red", linewidth=1, label=f"departs at {departs:.2f} s")
    axes.set_xlabel("seconds")
    axes.set_ylabel("signal-to-noise ratio of each frame, dB")
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)


def _contexts(diagnosis: Diagnosis) -> dict[float, str]:
    """Where they end, and whose they are; several may end together."""
    contexts: dict[float, list[int]] = {}
    for number, frames in enumerate(diagnosis.contexts_frames):
        contexts.setdefault(frames, []).append(number)
    return {
        frames: f"transformer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
        for frames, numbers in contexts.items()
    }
