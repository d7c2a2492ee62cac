"""The decoder's side: tokens and artifacts in, audio out.

Rules of this room:

- `DECODING` is the whole protocol: for every state and every inbound kind, the one action that is taken. It is
  printed in protocol.md, and a test compares the two.
- Each AUDIO message is at most one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from mossnano_stdio.chunks.renderer import Chunk, Renderer
from mossnano_stdio.chunks.schedule import RAMP_MAX_FRAMES
from mossnano_stdio.errors import ArtifactError, MossnanoError, SettingsError, TokenError
from mossnano_stdio.protocol.connection import Action, Answers, Conversation, State
from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.tokens.artifact import MAGIC, Artifact, ArtifactReader
from mossnano_stdio.tokens.packing import unpack_frames

DECODING: Final[Mapping[tuple[State, Kind], Action]] = {
    (State.IDLE, Kind.HANDSHAKE): Action.COMPARE_FORMATS,
    (State.IDLE, Kind.ARTIFACT): Action.OPEN_ARTIFACT,
    (State.IDLE, Kind.TOKENS): Action.OPEN_TOKENS,
    (State.IDLE, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.IDLE, Kind.PING): Action.ECHO,
    (State.IDLE, Kind.END): Action.REFUSE_NO_STREAM,
    (State.IDLE, Kind.CANCEL): Action.CANCEL,
    (State.IDLE, Kind.SETTINGS): Action.SETTLE,
    (State.TOKENS, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.TOKENS, Kind.ARTIFACT): Action.REFUSE_OUT_OF_PLACE,
    (State.TOKENS, Kind.TOKENS): Action.PUSH_TOKENS,
    (State.TOKENS, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.TOKENS, Kind.PING): Action.ECHO,
    (State.TOKENS, Kind.END): Action.FINISH,
    (State.TOKENS, Kind.CANCEL): Action.CANCEL,
    (State.TOKENS, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
    (State.ARTIFACT, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.ARTIFACT, Kind.ARTIFACT): Action.GROW_ARTIFACT,
    (State.ARTIFACT, Kind.TOKENS): Action.REFUSE_OUT_OF_PLACE,
    (State.ARTIFACT, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.ARTIFACT, Kind.PING): Action.ECHO,
    (State.ARTIFACT, Kind.END): Action.CUT_ARTIFACT,
    (State.ARTIFACT, Kind.CANCEL): Action.CANCEL,
    (State.ARTIFACT, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
    (State.SKIP, Kind.HANDSHAKE): Action.REFUSE_OUT_OF_PLACE,
    (State.SKIP, Kind.ARTIFACT): Action.SKIP_ARTIFACT,
    (State.SKIP, Kind.TOKENS): Action.IGNORE,
    (State.SKIP, Kind.ERROR): Action.REPORT_PEER_ERROR,
    (State.SKIP, Kind.PING): Action.ECHO,
    (State.SKIP, Kind.END): Action.FINISH,
    (State.SKIP, Kind.CANCEL): Action.CANCEL,
    (State.SKIP, Kind.SETTINGS): Action.REFUSE_OUT_OF_PLACE,
}


class DecodeSession(Conversation):
    """A peer who sends tokens and hears audio."""

    DIRECTION = "decode"
    OPENED_BY = "TOKENS or ARTIFACT"
    TRANSITIONS = DECODING

    def __init__(
        self,
        renderer: Renderer,
        identity: Mapping[str, Any],
        *,
        ramp_max_frames: int = RAMP_MAX_FRAMES,
        cancel_waiting: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(
            renderer,
            renderer.decoder.format,
            identity,
            ramp_max_frames=ramp_max_frames,
            cancel_waiting=cancel_waiting,
        )
        self._renderer = renderer
        self._artifact = ArtifactReader()

    def advance(self) -> Answers:
        """Compute the one chunk that is due."""
        if self._drops():
            self._renderer.reset()
            return
        try:
            chunk = self._renderer.render()
        except MossnanoError as error:
            yield from self._fail_stream(error)
            return
        if chunk is not None:
            yield from self._audio(chunk)

    def _open_tokens(self, message: Message) -> Answers:
        self._open(State.TOKENS)
        if self._maybe_misfit is not None:
            yield from self._fail_stream(TokenError(f"{self._maybe_misfit}; send one that fits, then the tokens"))
            return
        yield from self._push_tokens(message)

    def _push_tokens(self, message: Message) -> Answers:
        if self._drops():
            return
        try:
            self._renderer.push(unpack_frames(message.payload, self._quantizers, self._weights.codebook_size))
        except TokenError as error:
            yield from self._compute_due()  # what came before it is whole
            yield from self._fail_stream(error)

    def _open_artifact(self, message: Message) -> Answers:
        self._open(State.ARTIFACT)
        self._artifact = ArtifactReader()
        yield from self._grow_artifact(message)

    def _grow_artifact(self, message: Message) -> Answers:
        try:
            missing_bytes = self._artifact.push(message.payload)
            if self._artifact.maybe_header is not None:  # what does not fit is refused before its body takes memory
                prefix_allowed = self._renderer.decoder.decodes_prefix
                self._artifact.maybe_header.check_fits(self._weights, prefix_allowed)
            if missing_bytes:
                return
            artifact = self._artifact.artifact()
        except ArtifactError as error:
            yield from self._fail_stream(error)
            return
        yield from self._play_artifact(artifact)

    def _play_artifact(self, artifact: Artifact) -> Answers:
        if not self._drops():
            self._renderer.push(artifact.codes)
            self._renderer.finish(artifact.original_samples)
            yield from self._compute_due()
        yield from self._finish(Message(Kind.END))

    def _cut_artifact(self, message: Message) -> Answers:
        self.state = State.SKIP
        yield self._error(self._artifact_cut())
        yield from self._finish(message)

    def _skip_artifact(self, message: Message) -> Answers:
        """The rest of a bad stream, unless it begins like a new artifact."""
        if message.payload.startswith(MAGIC):
            yield from self._finish(Message(Kind.END))
            yield from self._open_artifact(message)

    def _audio(self, chunk: Chunk) -> Answers:
        self._count(chunk.frames, len(chunk.pcm) // self._sample_bytes)
        if chunk.error is not None:
            yield self._error(chunk.error)
        step = self._max_audio_bytes
        for start in range(0, len(chunk.pcm), step):
            yield Message(Kind.AUDIO, chunk.pcm[start : start + step])

    def _finish_loop(self) -> None:
        if self.state is State.TOKENS:  # an artifact's loop was finished when its last byte came
            self._renderer.finish()

    def _forget_input(self) -> None:
        self._artifact = ArtifactReader()

    def _maybe_cut(self) -> MossnanoError | None:
        return self._artifact_cut() if self.state is State.ARTIFACT else None

    def _artifact_cut(self) -> ArtifactError:
        return ArtifactError(
            f"the artifact ended {self._artifact.missing_bytes} bytes before its end: send all of it, then no END"
        )

    def _check_quantizers(self, quantizers: int) -> None:
        most = self._weights.quantizers
        if quantizers < most and not self._renderer.decoder.decodes_prefix:
            raise SettingsError(
                f"quantizers is {quantizers}, but this graph decodes all {most} only: "
                "`mossnano build --from-bundle` makes one that decodes any number of them"
            )
