"""The encoder's side: audio in, tokens out.

Rules of this room:

- `ENCODING` is the whole protocol of this direction, printed in protocol.md and compared by a test, as DECODING is.
- Audio may be cut anywhere, inside a sample too. What is left of a sample at the end of its stream is an error.
- An END says `original_samples`, how long the stream was before its last frame was filled up.
- A stream that was too short for a frame, or dropped before it gave one, gives an empty TOKENS before its END: to the
  decoder behind us, there is no stream without TOKENS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from mossnano_stdio.chunks.recorder import Recorder
from mossnano_stdio.chunks.schedule import RAMP_MAX_FRAMES
from mossnano_stdio.errors import AudioError, MossnanoError
from mossnano_stdio.pcm.samples import from_pcm16
from mossnano_stdio.protocol.connection import Action, Answers, Conversation, State, StreamTally
from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.tokens.packing import pack_frames

ENCODING: Final[Mapping[tuple[State, Kind], Action]] = {
    (State.IDLE, Kind.HANDSHAKE): Action.COMPARE_FORMATS,
    (State.IDLE, Kind.AUDIO): Action.OPEN_AUDIO,
    (State.IDLE, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.IDLE, Kind.PING): Action.ECHO,
    (State.IDLE, Kind.END): Action.REFUSE_NO_STREAM,
    (State.IDLE, Kind.CANCEL): Action.CANCEL,
    (State.IDLE, Kind.SETTINGS): Action.SETTLE,
    (State.AUDIO, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.AUDIO, Kind.AUDIO): Action.PUSH_AUDIO,
    (State.AUDIO, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.AUDIO, Kind.PING): Action.ECHO,
    (State.AUDIO, Kind.END): Action.FINISH,
    (State.AUDIO, Kind.CANCEL): Action.CANCEL,
    (State.AUDIO, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
    (State.SKIP, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.SKIP, Kind.AUDIO): Action.IGNORE,
    (State.SKIP, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.SKIP, Kind.PING): Action.ECHO,
    (State.SKIP, Kind.END): Action.FINISH,
    (State.SKIP, Kind.CANCEL): Action.CANCEL,
    (State.SKIP, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
}


class EncodeSession(Conversation):
    """A peer who sends audio and gets tokens."""

    DIRECTION = "encode"
    OPENED_BY = "AUDIO"
    TRANSITIONS = ENCODING

    def __init__(
        self,
        recorder: Recorder,
        identity: Mapping[str, Any],
        *,
        ramp_max_frames: int = RAMP_MAX_FRAMES,
        cancel_waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(
            recorder,
            recorder.encoder.format,
            identity,
            ramp_max_frames=ramp_max_frames,
            cancel_waiting=cancel_waiting,
        )
        self._recorder = recorder
        self._partial_sample = b""

    def advance(self) -> Answers:
        """Compute the one chunk that is due."""
        if self._drops():
            self._recorder.reset()
            return
        try:
            maybe_codes = self._recorder.record()
        except MossnanoError as error:
            yield from self._fail_stream(error)
            return
        if maybe_codes is not None:
            frames = len(maybe_codes)
            self._count(frames, frames * self._weights.frame_samples)
            yield Message(Kind.TOKENS, pack_frames(maybe_codes[:, : self._quantizers], self._weights.codebook_size))

    def _open_audio(self, message: Message) -> Answers:
        self._open(State.AUDIO)
        if self._maybe_misfit is not None:
            yield from self._fail_stream(AudioError(f"{self._maybe_misfit}; send one that fits, then the audio"))
            return
        yield from self._push_audio(message)

    def _push_audio(self, message: Message) -> Answers:
        if self._drops():
            return
        pcm = self._partial_sample + message.payload
        whole_bytes = len(pcm) // self._sample_bytes * self._sample_bytes
        self._partial_sample = pcm[whole_bytes:]
        self._recorder.push(from_pcm16(pcm[:whole_bytes], self._weights.channels))
        yield from ()

    def _finish(self, message: Message) -> Answers:
        if self._partial_sample and not self._drops():
            yield self._error(
                AudioError(
                    f"the audio ended {len(self._partial_sample)} bytes into a sample of {self._sample_bytes}: "
                    "send whole samples; the part is dropped"
                )
            )
        yield from super()._finish(message)

    def _end(self, maybe_tally: StreamTally | None, *, cancelled: bool, **extra: Any) -> Answers:
        if maybe_tally is not None and not maybe_tally.frames:
            yield Message(Kind.TOKENS, b"")
        yield from super()._end(maybe_tally, cancelled=cancelled, **extra)

    def _finish_loop(self) -> None:
        self._recorder.finish()

    def _end_extras(self) -> dict[str, Any]:
        return {"original_samples": self._recorder.original_samples}

    def _forget_input(self) -> None:
        self._partial_sample = b""

    def _check_quantizers(self, quantizers: int) -> None:
        """Any number can be had: the first codes of a frame do not depend on the later ones."""
