"""Reads what is diagnosed: the codes, and the sound that another decoder made of them, or makes when it is run."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import InputError, UsageError
from mossnano_stdio.files import open_input
from mossnano_stdio.pcm import FULL_SCALE
from mossnano_stdio.pcm.recordings import read_audio_or_pcm
from mossnano_stdio.tokens import MAGIC, CodecFormat, Codes, parse_artifact
from mossnano_stdio.tokens.arrays import normalised_codes
from mossnano_stdio.tokens.plain import form_of, load_codes, save_codes
from mossnano_stdio.tools.diagnose.spectrum import Sound

NUMPY_START = b"\x93NUMPY"
CODES_PLACE, SOUND_PLACE = re.compile(r"\{codes(\.\w+)?\}"), re.compile(r"\{sound(\.\w+)?\}")


@dataclass(frozen=True, eq=False)
class Given:
    """Codes as they were given."""

    path: str
    data: bytes
    codes: Codes  # [frames, quantizers]
    maybe_samples: int | None  # how long the recording was, where that is known


def read_codes(path: str, codec: CodecFormat) -> Given:
    with open_input(path) as file:
        data = file.read()
    if data.startswith(MAGIC):
        artifact = parse_artifact(data)
        artifact.check_fits(codec, prefix_allowed=True)
        if not artifact.frames:
            raise InputError(f"{path} holds no codes, allowed is one frame or more")
        return Given(path, data, artifact.codes, artifact.original_samples)
    if data.startswith(NUMPY_START):
        codes: NDArray[Any] = _array(data, path)
    else:
        codes = load_codes(data, form_of(path, None), codec.quantizers, codec.codebook_size)
    return Given(path, data, _frame_major(codes, path, codec), None)


def read_other(path: str, codec: CodecFormat) -> tuple[Sound, int]:
    """The sound, [samples, channels], and its sample rate."""
    with open_input(path) as file:
        return _sound(file.read(), path, codec)


def run_other(command: Sequence[str], given: Given, codec: CodecFormat) -> tuple[Sound, int]:
    """What a program makes of the codes, which it gets as a file or on stdin, in a file or on stdout."""
    with tempfile.TemporaryDirectory() as folder:
        maybe_sound: Path | None = None

        def codes_path(match: re.Match[str]) -> str:
            if not match[1]:
                path = Path(folder, "codes").with_suffix(PurePath(given.path).suffix)
                path.write_bytes(given.data)
            else:
                path = Path(folder, "codes").with_suffix(match[1])
                path.write_bytes(save_codes(given.codes, form_of(str(path), None)))
            return str(path)

        def sound_path(match: re.Match[str]) -> str:
            nonlocal maybe_sound
            maybe_sound = Path(folder, "sound").with_suffix(match[1] or ".wav")
            return str(maybe_sound)

        has_codes = any(CODES_PLACE.search(word) for word in command)
        words = [SOUND_PLACE.sub(sound_path, CODES_PLACE.sub(codes_path, word)) for word in command]
        run = _run(words, b"" if has_codes else given.data)
        if maybe_sound is None:
            return _sound(run, "stdout of COMMAND", codec)
        try:
            data = maybe_sound.read_bytes()
        except OSError as error:
            raise InputError(f"COMMAND ended well, but left no {maybe_sound.name} where it was told to") from error
        return _sound(data, maybe_sound.name, codec)


def _run(words: Sequence[str], stdin: bytes) -> bytes:
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, check=False)
    except OSError as error:
        raise UsageError(f"{words[0]}: cannot be run ({error.strerror})") from None
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise InputError(f"COMMAND ended with status {done.returncode}: {last or 'without a word on stderr'}")
    return done.stdout


def _sound(data: bytes, name: str, codec: CodecFormat) -> tuple[Sound, int]:
    if not data.startswith(NUMPY_START):
        recording = read_audio_or_pcm(io.BytesIO(data), name, codec.sample_rate, codec.channels)
        return _floats(recording.samples), recording.sample_rate
    samples = _array(data, name)
    while samples.ndim > 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim == 1:
        samples = samples[:, np.newaxis]
    if samples.ndim != 2 or samples.dtype.kind not in "if":
        raise InputError(f"{name} holds {samples.dtype} {list(samples.shape)}, allowed are numbers [channels, samples]")
    if samples.shape[0] < samples.shape[1]:
        samples = samples.T
    return _floats(samples), codec.sample_rate


def _floats(samples: NDArray[Any]) -> Sound:
    """Full scale is 1."""
    if samples.dtype.kind == "i":
        return samples.astype(np.float64) / FULL_SCALE
    return samples.astype(np.float64)


def _array(data: bytes, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{name} is no .npy file that can be read: {error}") from None
    return array


def _frame_major(codes: NDArray[Any], name: str, codec: CodecFormat) -> Codes:
    """In any order of the axes, where both fit [frames, quantizers]; fewer quantizers are on the shorter one."""
    if codes.ndim == 2 and codes.shape[1] == codec.quantizers:
        codes = codes.T
    if not codes.size:
        raise InputError(f"{name} holds no codes, allowed is one frame or more")
    ends = {codes.shape[0], codes.shape[-1]} if codes.ndim else set()
    maybe_fewer = None if codec.quantizers in ends or not ends else min(ends)
    try:
        ordered = normalised_codes(codes, codec.quantizers, codec.codebook_size, maybe_fewer, name)
    except ValueError as error:
        raise InputError(str(error)) from None
    if ordered.shape[1] != 1:
        raise InputError(f"{name} holds a batch of {ordered.shape[1]} recordings, allowed is one")
    return np.ascontiguousarray(ordered[:, 0].T)
