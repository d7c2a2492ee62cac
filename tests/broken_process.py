"""Our process around the decoder double, with one promise about numbered streams broken: `BREAKAGE --max-streams 4`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from mossnano_stdio.process import loop, outputs, stdio
from mossnano_stdio.process.logs import flush_stderr
from mossnano_stdio.protocol import connection, settings
from mossnano_stdio.protocol.connection import Connection
from mossnano_stdio.protocol.decoding import DecodingStream
from mossnano_stdio.protocol.messages import Kind, Message, in_stream, json_message, out_of_stream
from tests.doubles import CountingDecoder


def without(kind: Kind, code: str = "") -> Callable[[int, Message], Message | None]:
    """Answers of this kind are not sent; of ERRORs, those with this code."""
    return lambda number, answer: (
        None if answer.kind == kind and (not code or json.loads(answer.payload)["code"] == code) else answer
    )


def with_another_number(number: int, answer: Message) -> Message:
    if answer.kind != Kind.END:
        return answer
    return json_message(Kind.END, {**json.loads(answer.payload), "stream": number + 1})


def without_echo(number: int, answer: Message) -> Message:
    if answer.kind != Kind.END:
        return answer
    return json_message(Kind.END, {**json.loads(answer.payload), "echo": ""})


def with_late_marks(number: int, answer: Message) -> Message:
    if answer.kind != Kind.MARK:
        return answer
    sample = int.from_bytes(answer.payload[:8], "little") + 1
    return Message(Kind.MARK, sample.to_bytes(8, "little") + answer.payload[8:])


SAID_WRONG: dict[str, Callable[[int, Message], Message | None]] = {
    "END has the next number": with_another_number,
    "END and CREDIT may open a stream": without(Kind.ERROR, "no_stream"),
    "one stream too many is dropped in silence": without(Kind.ERROR, "too_many_streams"),
    "CANCEL of a stream is not echoed": without_echo,
    "a MARK is a sample late": with_late_marks,
    "levels are never told": without(Kind.LEVELS),
}


def break_it(breakage: str) -> None:
    if breakage in SAID_WRONG:
        put, rewrite = outputs.FramedOutput.put, SAID_WRONG[breakage]

        def put_rewritten(self: outputs.FramedOutput, message: Message) -> None:
            if message.kind & 0x80:
                number, inner = out_of_stream(message)
                maybe_answer = rewrite(number, inner)
                if maybe_answer is None:
                    return
                message = in_stream(number, maybe_answer)
            put(self, message)

        outputs.FramedOutput.put = put_rewritten  # type: ignore[method-assign]
    elif breakage == "late input is dropped in silence":
        Connection._maybe_too_late = lambda self, number, kind: None  # type: ignore[method-assign]
    elif breakage == "credit is ignored":
        fits = DecodingStream.fits  # of a stream that goes on, or it would never fill up
        DecodingStream.fits = lambda self, frames: self.frames < 20 or fits(self, frames)  # type: ignore[method-assign]
    elif breakage == "any window will do":
        settings.Settings.least_window_samples = lambda self, codec: 0  # type: ignore[method-assign]
    elif breakage == "a stream has no bound":
        connection.MAX_BACKLOG_BYTES = 1 << 40  # type: ignore[misc]
    elif breakage == "urgency may be 8":
        settings.MAX_URGENCY = 8  # type: ignore[misc]


def main() -> None:
    breakage = sys.argv[1]
    break_it(breakage)
    shared = CountingDecoder()
    new_decoder = (lambda: shared) if breakage == "all streams have one state" else CountingDecoder
    signals = stdio.StopSignals()
    signals.install()
    status = loop.main(signals, sys.argv[2:], lambda options: loop.ready_to_decode(new_decoder, {"demo": False}))
    flush_stderr()
    os._exit(status)


if __name__ == "__main__":
    main()
