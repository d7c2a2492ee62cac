"""Hold one recording against another: sample by sample, and join by join.

Each is a WAV (or FLAC, OGG, MP3 with the extra `audio`) or raw PCM, 16 bits, little-endian, interleaved: what does not
begin like an audio file is raw. Errors are counted in 16-bit steps (full scale is 32,767).

With --chunk-frames, every place where the candidate's chunks meet is looked at: the jump there, beside the 99.9th
percentile of the jumps inside chunks. A join is called loud where its jump is larger than that, and larger than the
reference's jump at the same place by more than one step.

Status 1: --max-error or --min-snr is broken, or one of them was asked for and the lengths differ.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import CheckFailedError, ExitStatus, UsageError
from mossnano_stdio.files import open_input
from mossnano_stdio.pcm.comparison import Comparison, Join, compare_recordings
from mossnano_stdio.pcm.recordings import Recording, read_audio_or_pcm
from mossnano_stdio.process.flags import any_number
from mossnano_stdio.tools.facts import as_json, as_table, check_plot_name, plotted
from mossnano_stdio.weights import MODELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

StepsBetween = Callable[[int, int], NDArray[np.float64]]

MOST_LOUD_JOINS_SHOWN = 10
PLOT_COLUMNS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="what it should be; `-` is stdin")
    parser.add_argument("candidate", metavar="CANDIDATE", help="what it is")
    parser.add_argument("--chunk-frames", type=int, metavar="N", help="frames in the candidate's chunks: look at joins")
    parser.add_argument("--model", choices=MODELS, default="nano", help="which codec made both (default: nano)")
    parser.add_argument("--frame-samples", type=int, metavar="N", help="samples in a frame (default: the model's)")
    parser.add_argument("--max-error", type=any_number, metavar="STEPS", help="the largest error that is allowed")
    parser.add_argument(
        "--min-snr", type=any_number, metavar="DB", help="the least signal-to-noise ratio that is allowed"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw both waveforms, the error and the joins")
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="of raw PCM (default: the model's)")
    parser.add_argument("--channels", type=int, metavar="N", help="of raw PCM (default: the model's)")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every join in it")


def run(args: argparse.Namespace) -> int:
    for name in ("chunk_frames", "frame_samples", "sample_rate", "channels"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}, allowed is 1 or more")
    if args.plot:
        check_plot_name(args.plot)
    model = MODELS[args.model].format
    for name in ("frame_samples", "sample_rate", "channels"):
        setattr(args, name, getattr(args, name) or getattr(model, name))
    reference, candidate = _load(args.reference, args), _load(args.candidate, args)
    maybe_chunk_samples = args.chunk_frames and args.chunk_frames * args.frame_samples
    comparison = compare_recordings(reference, candidate, maybe_chunk_samples)
    if args.plot:
        _save_plot(args.plot, reference, candidate, comparison)
    facts = _facts(args, comparison)
    if args.json:
        if comparison.inside_jump_steps is not None:
            facts["joins"] = [_join_facts(join, comparison) for join in comparison.joins]
        print(as_json(facts))
    else:
        print(as_table(facts))
    if broken := _broken_limits(args, comparison):
        raise CheckFailedError("; ".join(broken))
    return ExitStatus.DONE


def _load(path: str, args: argparse.Namespace) -> Recording:
    with open_input(path) as file:
        return read_audio_or_pcm(file, path, args.sample_rate, args.channels)


def _facts(args: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "reference": args.reference,
        "candidate": args.candidate,
        "sample_rate": comparison.sample_rate,
        "channels": comparison.channels,
        "reference_samples": comparison.reference_samples,
        "candidate_samples": comparison.candidate_samples,
        "identical": comparison.identical,
        "differing_values": comparison.differing_values,
        "max_error_steps": comparison.max_error_steps,
        "max_error_sample": comparison.max_error_sample,
        "rms_error_steps": comparison.rms_error_steps,
        "snr_db": comparison.snr_db,
    }
    if args.chunk_frames:
        loud = comparison.loud_joins
        loudest = max(comparison.joins, key=lambda join: join.jump_steps, default=None)
        facts |= {
            "chunk_frames": args.chunk_frames,
            "join_count": len(comparison.joins),
            "inside_jump_steps": comparison.inside_jump_steps,
            "loudest_join": {} if loudest is None else _join_facts(loudest, comparison),
            "loud_join_count": len(loud),
            "loud_join_samples": [join.sample for join in loud[:MOST_LOUD_JOINS_SHOWN]],
        }
    return facts


def _join_facts(join: Join, comparison: Comparison) -> dict[str, Any]:
    return {**vars(join), "seconds": join.sample / comparison.sample_rate}


def _broken_limits(args: argparse.Namespace, comparison: Comparison) -> list[str]:
    broken = []
    if args.max_error is not None and not comparison.max_error_steps <= args.max_error:
        broken.append(
            f"the largest error is {comparison.max_error_steps:.6g} steps, at sample {comparison.max_error_sample}, "
            f"allowed are {args.max_error:g}"
        )
    if args.min_snr is not None and not comparison.snr_db >= args.min_snr:
        broken.append(f"the signal-to-noise ratio is {comparison.snr_db:.6g} dB, allowed is {args.min_snr:g} or more")
    has_limit = args.max_error is not None or args.min_snr is not None
    if has_limit and comparison.reference_samples != comparison.candidate_samples:
        broken.append(
            f"the candidate has {comparison.candidate_samples} samples, the reference {comparison.reference_samples}"
        )
    return broken


# --- the picture -------------------------------------------------------------------------------------------------


def _save_plot(path: str, reference: Recording, candidate: Recording, comparison: Comparison) -> None:
    with plotted(path, figsize=(16, 9)) as figure:
        _draw_comparison(figure, reference, candidate, comparison)


def _draw_comparison(figure: Figure, reference: Recording, candidate: Recording, comparison: Comparison) -> None:
    waves, errors, joins = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    _draw(waves, reference.steps_between, comparison, label="reference", color="tab:blue")
    _draw(waves, candidate.steps_between, comparison, label="candidate", color="tab:orange")
    waves.set_ylabel("16-bit steps")
    waves.legend(loc="upper right")

    def noise(start: int, stop: int) -> NDArray[np.float64]:
        return candidate.steps_between(start, stop) - reference.steps_between(start, stop)

    _draw(errors, noise, comparison, label="error", color="tab:red")
    errors.set_ylabel("error, 16-bit steps")
    _draw_joins(joins, comparison)
    joins.set_ylabel("jump, 16-bit steps")
    joins.set_xlabel("seconds")


def _draw(axes: Axes, steps_between: StepsBetween, comparison: Comparison, *, label: str, color: str) -> None:
    """Draw the range from the least to the largest value in each of the picture's columns."""
    columns = min(PLOT_COLUMNS, comparison.compared_samples)
    edges = np.linspace(0, comparison.compared_samples, columns + 1).astype(int)
    parts = [steps_between(start, stop) for start, stop in itertools.pairwise(edges.tolist())]
    seconds = edges[:-1] / comparison.sample_rate
    least, most = [part.min() for part in parts], [part.max() for part in parts]
    axes.fill_between(seconds, least, most, step="post", label=label, color=color, alpha=0.6, linewidth=0.5)


def _draw_joins(axes: Axes, comparison: Comparison) -> None:
    if comparison.inside_jump_steps is None:
        axes.text(0.5, 0.5, "joins: --chunk-frames N", transform=axes.transAxes, ha="center", va="center")
        return
    seconds = [join.sample / comparison.sample_rate for join in comparison.joins]
    jumps = [join.jump_steps for join in comparison.joins]
    reference_jumps = [join.reference_jump_steps for join in comparison.joins]
    axes.plot(seconds, jumps, "o", label="candidate at its joins", color="tab:orange")
    axes.plot(seconds, reference_jumps, "x", label="reference there", color="tab:blue")
    axes.axhline(comparison.inside_jump_steps, label="99.9 % of jumps inside chunks", color="tab:gray")
    axes.legend(loc="upper right")
