"""What becomes of messages on their way out: bytes on stdout in one of three forms, sound from the speaker, or both.

Rules of this room:

- An output is given every message, in order, and takes what concerns it.
- Where the bytes go and how they are written is not known here: a `ByteSink` is handed in.
- A sound card that is lost is a loss of sound only. Whoever reads stdout as well gets all of it, the log says at once
  what happened, and the exit status says it again at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from mossnano_stdio.errors import DeviceError
from mossnano_stdio.pcm import wav_header
from mossnano_stdio.process.logs import log
from mossnano_stdio.protocol import Kind, Message, encode_message, parse_json
from mossnano_stdio.tokens import CodecFormat

if TYPE_CHECKING:
    from mossnano_stdio.playback import Player


class ByteSink(Protocol):
    def write(self, data: bytes) -> None:
        """Write all of it."""

    def rewrite_start(self, data: bytes) -> bool:
        """Replace the first bytes, where that is possible."""


class Output:
    """Takes every message and does nothing with it. Each of those below does one thing more."""

    carries_errors = False  # does the peer learn of errors from what it reads?

    def start(self, codec_format: CodecFormat) -> None:
        """Begin, before the first message."""

    def put(self, message: Message) -> None:
        """Take a message."""

    def finish(self) -> None:
        """All messages were put: bring to an end what was begun."""

    def abort(self) -> None:
        """The process ends now, whatever is still under way."""


class FramedOutput(Output):
    """Every message, as protocol.md has it."""

    carries_errors = True

    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink

    def put(self, message: Message) -> None:
        self._sink.write(encode_message(*message))


class RawOutput(Output):
    """The PCM of all streams, one after the other, and nothing else."""

    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink

    def put(self, message: Message) -> None:
        if message.kind == Kind.AUDIO:
            self._sink.write(message.payload)


class WavOutput(RawOutput):
    """The same with a WAV header before it, which gets its true sizes at the end where that is possible."""

    def __init__(self, sink: ByteSink) -> None:
        super().__init__(sink)
        self._maybe_format: CodecFormat | None = None
        self._data_bytes = 0

    def start(self, codec_format: CodecFormat) -> None:
        self._maybe_format = codec_format
        self._sink.write(wav_header(codec_format.sample_rate, codec_format.channels, None))

    def put(self, message: Message) -> None:
        super().put(message)
        if message.kind == Kind.AUDIO:
            self._data_bytes += len(message.payload)

    def finish(self) -> None:
        if self._maybe_format is not None:
            header = wav_header(self._maybe_format.sample_rate, self._maybe_format.channels, self._data_bytes)
            self._sink.rewrite_start(header)


class SpeakerOutput(Output):
    """PCM to the sound card, as fast as it plays. `should_stop` is asked while we wait for it."""

    def __init__(self, open_player: Callable[[CodecFormat], Player], should_stop: Callable[[], bool]) -> None:
        self._open_player = open_player
        self._should_stop = should_stop
        self._maybe_player: Player | None = None

    def start(self, codec_format: CodecFormat) -> None:
        self._maybe_player = self._open_player(codec_format)

    def put(self, message: Message) -> None:
        if self._maybe_player is None:
            return
        if message.kind == Kind.AUDIO:
            self._maybe_player.push(message.payload, self._should_stop, since=time.perf_counter())
        elif message.kind == Kind.END and parse_json(message)["cancelled"]:
            self._maybe_player.flush()
        elif message.kind == Kind.END:
            self._maybe_player.end_stream(self._should_stop)

    def finish(self) -> None:
        if self._maybe_player is not None:
            self._maybe_player.finish(self._should_stop)

    def abort(self) -> None:
        if self._maybe_player is not None:
            self._maybe_player.abort()
            self._maybe_player = None


class SeveralOutputs(Output):
    """One output after the other is given each message; the first is what the peer reads.

    A device that is lost takes no other output with it.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = list(outputs)
        self._maybe_lost: DeviceError | None = None
        self.carries_errors = bool(outputs) and outputs[0].carries_errors

    def start(self, codec_format: CodecFormat) -> None:
        for output in self._outputs:
            output.start(codec_format)

    def put(self, message: Message) -> None:
        self._each(lambda output: output.put(message))

    def finish(self) -> None:
        self._each(lambda output: output.finish())
        if self._maybe_lost is not None:
            raise self._maybe_lost

    def abort(self) -> None:
        for output in self._outputs:
            output.abort()

    def _each(self, give: Callable[[Output], None]) -> None:
        for output in list(self._outputs):
            try:
                give(output)
            except DeviceError as error:
                if len(self._outputs) == 1:
                    raise
                log.error("%s; what goes to stdout goes on", error)
                output.abort()
                self._outputs.remove(output)
                self._maybe_lost = error


STDOUT_FORMS: Final[Mapping[str, Callable[[ByteSink], Output]]] = {
    "framed": FramedOutput,
    "raw": RawOutput,
    "wav": WavOutput,
}
