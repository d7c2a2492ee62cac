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
from mossnano_stdio.pcm import Mixer, SoundForm, wav_header
from mossnano_stdio.process.logs import log
from mossnano_stdio.protocol import NUMBERED, Kind, Message, encode_message, out_of_stream, parse_json

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

    def start(self, form: SoundForm) -> None:
        """Begin, before the first message. `form` is that of plain streams, and stays so."""

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
        self._maybe_form: SoundForm | None = None
        self._data_bytes = 0

    def start(self, form: SoundForm) -> None:
        self._maybe_form = form
        self._sink.write(wav_header(form.sample_rate, form.channels, None, form.sample_format))

    def put(self, message: Message) -> None:
        super().put(message)
        if message.kind == Kind.AUDIO:
            self._data_bytes += len(message.payload)

    def finish(self) -> None:
        if self._maybe_form is not None:
            form = self._maybe_form
            header = wav_header(form.sample_rate, form.channels, self._data_bytes, form.sample_format)
            self._sink.rewrite_start(header)


class SpeakerOutput(Output):
    """Sound to the sound card, as fast as it plays. `should_stop` is asked while we wait for it.

    Streams that sound at once are mixed. All are of the form that holds at the start.
    """

    def __init__(self, open_player: Callable[[SoundForm], Player], should_stop: Callable[[], bool]) -> None:
        self._open_player = open_player
        self._should_stop = should_stop
        self._maybe_player: Player | None = None

    def start(self, form: SoundForm) -> None:
        self._form = form
        self._mixer = Mixer(form)
        self._maybe_player = self._open_player(form)

    def put(self, message: Message) -> None:
        if self._maybe_player is None:
            return
        maybe_number, message = out_of_stream(message) if message.kind & NUMBERED else (None, message)
        if message.kind == Kind.AUDIO:
            self._push(self._maybe_player, self._mixer.push(maybe_number, message.payload, self._form))
        elif message.kind == Kind.END:
            self._end(self._maybe_player, maybe_number, parse_json(message)["cancelled"])

    def finish(self) -> None:
        if self._maybe_player is not None:
            self._push(self._maybe_player, self._mixer.finish_all())
            self._maybe_player.finish(self._should_stop)

    def abort(self) -> None:
        if self._maybe_player is not None:
            self._maybe_player.abort()
            self._maybe_player = None

    def _push(self, player: Player, pcm: bytes) -> None:
        if pcm:
            player.push(pcm, self._should_drop, since=time.perf_counter())

    def _should_drop(self) -> bool:
        """A plain CANCEL waits, and nobody else would lose sound."""
        return self._should_stop() and self._mixer.is_all_of(None)

    def _end(self, player: Player, maybe_number: int | None, is_cancelled: bool) -> None:
        is_all = self._mixer.is_all_of(maybe_number)
        if is_cancelled:
            self._push(player, self._mixer.drop(maybe_number))
        else:
            self._push(player, self._mixer.finish(maybe_number))
        if self._mixer.is_idle and is_cancelled and is_all:
            # What it holds is of this stream only, or of others before it. Those that are plain are the same voice.
            player.flush(keeps_ended=maybe_number is not None)
        elif self._mixer.is_idle:
            player.end_stream(self._should_drop)


class SeveralOutputs(Output):
    """One output after the other is given each message; the first is what the peer reads.

    A device that is lost takes no other output with it.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = list(outputs)
        self._maybe_lost: DeviceError | None = None
        self.carries_errors = bool(outputs) and outputs[0].carries_errors

    def start(self, form: SoundForm) -> None:
        for output in self._outputs:
            output.start(form)

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
