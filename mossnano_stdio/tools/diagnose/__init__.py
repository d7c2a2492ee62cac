"""Say what is wrong with another decoder, by the sound that it made of some codes.

    mossnano diagnose CODES OTHER            OTHER is a WAV (FLAC, ...), raw PCM16, or .npy [channels, samples]
    mossnano diagnose CODES -- COMMAND ...   COMMAND is run, and makes the sound

CODES is an artifact, .npy, .json or .u16le. COMMAND gets them on stdin as they are, or as a file where one of its words
holds {codes}; {codes.npy}, {codes.json} and {codes.u16le} are other forms of it. Its sound is what it prints, or the
file that it writes where a word holds {sound}, {sound.npy} or {sound.raw}.

OTHER is laid over our own decode: its offset, gain, polarity, channels, rate and length. Then come the ratio of signal
to noise for each second, the first frame that departs, and the fault that explains the sound best: a decode of ours
which is wrong in just that way gives the same. Half a minute of sound, past the longest context, says most.

Status 0: there is no fault, but perhaps noise of weights with fewer bits; 1: there is one, named or not.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.tools.facts import as_json, as_table, check_plot_name

if TYPE_CHECKING:
    from mossnano_stdio.tools.diagnose.diagnosis import Diagnosis, Explanation
    from mossnano_stdio.weights import Bundle

HAS_COMMAND = True
MOST_THREADS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codes", metavar="CODES", help="what was decoded; `-` is stdin, for an artifact or .npy")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="what the other decoder made of it")
    parser.add_argument("--weights", metavar="DIR", help="a weights folder of the same model")
    parser.add_argument("--threads", type=int, metavar="N", help="(the CPUs we may use, at most 4)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratio over time, with contexts and the verdict")


def run(args: argparse.Namespace) -> int:
    if args.threads is not None and not 1 <= args.threads <= MOST_THREADS:
        raise UsageError(f"--threads is {args.threads}, allowed is a whole number from 1 to {MOST_THREADS}")
    if (args.other is None) == (not args.command):
        raise UsageError("diagnose takes either CODES OTHER or CODES -- PROGRAM ARGUMENTS")
    if args.plot:
        check_plot_name(args.plot)
    with _products_on_one_thread():
        import numpy  # noqa: F401 - it reads the variable now, and never again
    from mossnano_stdio.weights import find_weights, load_bundle

    bundle = load_bundle(find_weights(args.weights))
    if bundle.sidecar.maybe_codec is not None and not bundle.contexts_tokens:
        raise UsageError(
            f"{bundle.folder}: what can be wrong with a decoder is known here of those with transformers, and "
            f"{bundle.name} has none"
        )
    if bundle.demo:
        raise UsageError(
            "the demo weights are a small synthesiser, and nobody else decodes them; name others: --weights"
        )
    diagnosis = _diagnosed(args, bundle)
    if args.plot:
        from mossnano_stdio.tools.diagnose.picture import save_picture

        save_picture(args.plot, diagnosis, bundle.format, f"mossnano diagnose: {_short_name(args)}, {bundle.name}")
    facts = _facts(args, bundle, diagnosis)
    print(as_json(facts) if args.json else _text(facts, diagnosis))
    return ExitStatus.CHECK_FAILED if diagnosis.is_fault else ExitStatus.DONE


@contextlib.contextmanager
def _products_on_one_thread() -> Iterator[None]:
    """Importing numpy within, its matrix products take one thread each: hypotheses are tried side by side instead, and
    threads that wait for each other by spinning take ten times as long where there are other programs.

    Where the variable is set, that stands. COMMAND does not inherit it.
    """
    name = "OPENBLAS_NUM_THREADS"
    is_ours = name not in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if is_ours:
            del os.environ[name]


def _diagnosed(args: argparse.Namespace, bundle: Bundle) -> Diagnosis:
    import numpy as np

    try:
        from mossnano_stdio.build.nodes import read_decoder
    except ImportError as error:
        raise UsageError(
            f"diagnosing needs {error.name}, which is not installed: pip install 'mossnano-stdio[build]'"
        ) from None
    from mossnano_stdio.codecs import load_runtime
    from mossnano_stdio.tools.diagnose.diagnosis import Subject, diagnose
    from mossnano_stdio.tools.diagnose.network import Network
    from mossnano_stdio.tools.diagnose.other import read_codes, read_other, run_other

    codec = bundle.format
    given = read_codes(args.codes, codec)
    if args.command:
        sound, sample_rate = run_other(args.command, given, codec)
    else:
        sound, sample_rate = read_other(args.other, codec)
    runtime = load_runtime(bundle, threads=args.threads)
    network = Network(read_decoder(bundle), codec.codebook_size)
    if runtime.decodes_prefix or given.codes.shape[1] == codec.quantizers:
        ours = runtime.new_decoder().step(given.codes)
    else:
        ours = network.decode(given.codes).reshape(-1, codec.channels)
    # A recording ends within its last frame; codes without a header do not say where.
    shortest = len(ours) - codec.frame_samples + 1 if given.maybe_samples is None else given.maybe_samples
    subject = Subject(given.codes, ours.astype(np.float64), sound, sample_rate, (shortest, len(ours)))
    return diagnose(subject, codec, network, runtime.engine.threads)


# --- what is shown -------------------------------------------------------------------------------------------------


def _name_of_other(args: argparse.Namespace) -> str:
    return args.other or " ".join(args.command)


def _short_name(args: argparse.Namespace) -> str:
    return PurePath(args.other or args.command[0]).name


def _facts(args: argparse.Namespace, bundle: Bundle, diagnosis: Diagnosis) -> dict[str, Any]:
    codec = bundle.format
    first = diagnosis.first_sample
    return {
        "verdict": diagnosis.verdict,
        "fault": diagnosis.is_fault,
        "named": None if diagnosis.named is None else _explanation_facts(diagnosis.named),
        "next": [_explanation_facts(explanation) for explanation in diagnosis.next_ones],
        "misfits": [vars(misfit) for misfit in diagnosis.misfits],
        "other": _name_of_other(args),
        "codes": args.codes,
        "weights": bundle.name,
        "frames": len(diagnosis.frame_snr_db),
        "snr_db": _rounded(diagnosis.snr_db),
        "first_departing_frame": diagnosis.first_frame,
        "first_departing_second": None if first is None else round(first / codec.sample_rate, 6),
        "snr_db_by_second": [_rounded(value) for value in diagnosis.second_snr_db.tolist()],
        "context_seconds": [round(frames / codec.frames_per_second, 3) for frames in diagnosis.contexts_frames],
    }


def _explanation_facts(explanation: Explanation) -> dict[str, Any]:
    return {**vars(explanation), "snr_db": _rounded(explanation.snr_db)}


def _rounded(value: float) -> float:
    return round(value, 2) if math.isfinite(value) else value


def _text(facts: dict[str, Any], diagnosis: Diagnosis) -> str:
    lines = [diagnosis.verdict]
    if diagnosis.named is not None:
        lines.append(f"look for: {diagnosis.named.look_for}")
    if diagnosis.next_ones:
        lines.append("next to it:" if diagnosis.named else "the nearest:")
        lines += [f"  {other.snr_db:6.1f} dB  {other.name} ({other.how})" for other in diagnosis.next_ones]
    if diagnosis.misfits:
        lines.append("as a whole:")
        lines += [f"  {misfit.name}: {misfit.how}" for misfit in diagnosis.misfits]
    shown = ("other", "weights", "frames", "snr_db", "first_departing_frame", "first_departing_second")
    rest = {name: facts[name] for name in (*shown, "context_seconds", "snr_db_by_second")}
    return "\n".join([*lines, "", as_table(rest)])
