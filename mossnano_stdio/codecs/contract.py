"""What goes into the graphs and what comes out of them, checked on both sides.

Rules of this room:

- A graph is trusted no further than it was checked: names, shapes and dtypes as it is loaded, the length of its audio
  after every run. A code outside of the codebook never reaches it.
- Codes go in as int32 [1, frames, quantizers], audio comes out as float32 [1, channels, samples].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.engine import Array, Session, TensorSpec, check_contract
from mossnano_stdio.errors import DecodeError, TokenError, UsageError
from mossnano_stdio.tokens import CodecFormat, Codes, meaning_of, to_graph

INT32 = np.dtype(np.int32)
FLOAT32 = np.dtype(np.float32)


def check_decode_contract(session: Session, codec: CodecFormat) -> None:
    """Is this a decode graph for `codec`, with the state tensors of its metadata?"""
    codes_name, code_lengths_name = session.graph.input_names
    audio_name, audio_lengths_name = session.graph.output_names
    check_contract(
        session,
        inputs={
            codes_name: TensorSpec((1, None, codec.quantizers), INT32),
            code_lengths_name: TensorSpec((1,), INT32),
        },
        outputs={
            audio_name: TensorSpec((1, codec.channels, None), FLOAT32),
            audio_lengths_name: TensorSpec((1,), INT32),
        },
        states=session.graph.states,
    )


def check_codes(codes: Codes, codec: CodecFormat, least_quantizers: int | None = None) -> None:
    """[frames, quantizers], each code in the codebook; fewer quantizers only where `least_quantizers` allows."""
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise TokenError(f"codes are {codes.dtype} {list(codes.shape)}, allowed are integers [frames, quantizers]")
    quantizers = codes.shape[1]
    if not (least_quantizers or codec.quantizers) <= quantizers <= codec.quantizers:
        raise TokenError(f"codes of {quantizers} quantizers, these weights take {codec.quantizers}")
    if codes.size and (codes.max() >= codec.codebook_size or codes.min() < 0):
        frame, quantizer = np.argwhere((codes < 0) | (codes >= codec.codebook_size))[0]
        raise TokenError(
            f"frame {frame}, quantizer {quantizer}: code {codes[frame, quantizer]}, "
            f"allowed is 0 to {codec.codebook_size - 1}"
            f"{meaning_of(int(codes[frame, quantizer]), codec.codebook_size)}"
        )


def codes_feed(session: Session, codes: Codes) -> dict[str, Array]:
    codes_name, lengths_name = session.graph.input_names
    return {codes_name: to_graph(codes), lengths_name: np.array([len(codes)], dtype=np.int32)}


def check_audio(session: Session, audio: Array, lengths: Array, frames: int, codec: CodecFormat) -> None:
    samples = frames * codec.frame_samples
    if audio.shape != (1, codec.channels, samples) or lengths.tolist() != [samples]:
        raise DecodeError(
            f"{session.graph.path}: {frames} frames gave audio {list(audio.shape)} of length {lengths.tolist()}, "
            f"{[1, codec.channels, samples]} of length {[samples]} was due"
        )


def joined(pieces: Sequence[NDArray[np.float32]], codec: CodecFormat) -> NDArray[np.float32]:
    """Pieces of [samples, channels], one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    if not pieces:
        return np.zeros((0, codec.channels), dtype=np.float32)
    return np.concatenate(pieces)


def check_audio_in(audio: NDArray[np.float32], codec: CodecFormat) -> None:
    if audio.ndim != 2 or audio.shape[1] != codec.channels:
        raise UsageError(f"audio is {list(audio.shape)}, allowed is [samples, {codec.channels}]")
    if not np.isfinite(audio).all():
        raise UsageError("audio holds NaN or infinity; allowed are finite numbers")


def check_codes_out(path: Path, codes: Array, codec: CodecFormat) -> None:
    if codes.size and (codes.min() < 0 or codes.max() >= codec.codebook_size):
        raise DecodeError(
            f"{path}: gave codes from {codes.min()} to {codes.max()}, allowed are 0 to {codec.codebook_size - 1}"
        )
