"""How it ends: the input ends or is cut, nobody reads any more, a signal comes; with which exit status."""

from __future__ import annotations

import signal

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.protocol import Kind, Message, encode_message
from mossnano_stdio.tools.conformance.peer import HAS_SIGNALS
from mossnano_stdio.tools.conformance.talk import END, Talk, expect, expect_equal_pcm, not_applicable


def between_streams(talk: Talk) -> None:
    """End of input between streams: nothing more is said, exit status 0."""
    talk.decode(talk.frames(1))
    talk.finish()
    talk.expect_exit(ExitStatus.DONE)


def in_a_token_stream(talk: Talk) -> None:
    """End of input closes an open token stream like END: all of it is decoded, exit status 0."""
    frames = talk.frames(5)
    pcm = talk.decode(frames)
    talk.say(talk.tokens(frames))
    talk.finish()
    expect_equal_pcm(talk.expect_stream(5), pcm, "a stream that the end of input closed as one with END")
    talk.expect_exit(ExitStatus.DONE)


def behind_streams_that_wait(talk: Talk) -> None:
    """Everything that was sent before the end of input is decoded and answered, exit status 0."""
    for count in (3, 2):
        talk.say(talk.tokens(talk.frames(count)), END, Message(Kind.PING, b"%d" % count))
    talk.say(Message(Kind.ARTIFACT, talk.artifact(talk.frames(4))))
    talk.finish()
    for count in (3, 2):
        talk.expect_stream(count)
        talk.expect_ping(b"%d" % count)
    talk.expect_stream(4)
    talk.expect_exit(ExitStatus.DONE)


def in_a_bad_stream(talk: Talk) -> None:
    """A stream that went bad gets its END at the end of input too, exit status 0: the ERROR was told."""
    talk.say(talk.bad_tokens())
    talk.finish()
    talk.expect_error("bad_tokens")
    talk.expect_end("END of the bad stream", samples=0)
    talk.expect_exit(ExitStatus.DONE)


def after_a_cancel(talk: Talk) -> None:
    """End of input after a CANCEL: its END comes, exit status 0."""
    talk.say(talk.tokens(talk.frames(3)), Message(Kind.CANCEL, b"last words"))
    talk.finish()
    talk.expect_end("END of CANCEL", cancelled=True, echo="last words")
    talk.expect_exit(ExitStatus.DONE)


def inside_a_message(talk: Talk) -> None:
    """End of input inside a message, of its length or its payload, is a fatal input_cut, exit status 65."""
    talk.write(encode_message(*talk.tokens(talk.frames(1)))[:-1])
    talk.finish()
    talk.expect_error("input_cut", fatal=True)
    talk.expect_exit(ExitStatus.BAD_INPUT)


def inside_a_message_of_a_stream(talk: Talk) -> None:
    """An end inside a message: what is whole is decoded, then the ERROR, then the END of the open stream, 65."""
    frames = talk.frames(3)
    pcm = talk.decode(frames)
    talk.write(encode_message(*talk.tokens(frames)) + encode_message(Kind.END)[:2])
    talk.finish()
    samples = 3 * talk.format.frame_samples
    heard = talk.expect_audio(samples, "frames before the cut")
    expect_equal_pcm(heard, pcm, "a stream whose input is cut as one with END")
    talk.expect_error("input_cut", fatal=True)
    talk.expect_end("END of the stream that was open", samples=samples, cancelled=False)
    talk.expect_exit(ExitStatus.BAD_INPUT)


def inside_an_artifact(talk: Talk) -> None:
    """End of input inside an artifact: a fatal ERROR, then the END of the artifact, exit status 65."""
    talk.say(Message(Kind.ARTIFACT, talk.artifact(talk.frames(3))[:-1]))
    talk.finish()
    talk.expect_error("bad_artifact", "input_cut", fatal=True)
    heard, _ = talk.expect_end("END of the artifact", samples=0)
    expect(heard == b"", "no AUDIO of a cut artifact", f"{len(heard)} bytes")
    talk.expect_exit(ExitStatus.BAD_INPUT)


def with_nothing_but_messages_on_stdout(talk: Talk) -> None:
    """stdout holds whole messages from the first byte to the last; whatever else is said goes to stderr."""
    talk.say(Message(0x77), talk.tokens(talk.frames(2)), END)
    talk.finish()
    while talk.peer.maybe_read() is not None:
        pass  # a message, whatever it says; what is none shows as a DepartureError or as torn
    expect(talk.peer.torn_bytes == 0, "whole messages", f"{talk.peer.torn_bytes} bytes that are none, at the end")


def when_nobody_reads(talk: Talk) -> None:
    """When the reader of its output is gone, it ends with 141, though its input stays open."""
    talk.peer.close_output()
    talk.say(talk.tokens(talk.frames(1)))
    talk.expect_status(ExitStatus.READER_GONE)


def by_sigterm(talk: Talk) -> None:
    """SIGTERM ends it with 143."""
    _expect_end_by(talk, "SIGTERM", ExitStatus.TERMINATED)


def by_sigint(talk: Talk) -> None:
    """SIGINT ends it with 130."""
    _expect_end_by(talk, "SIGINT", ExitStatus.INTERRUPTED)


def _expect_end_by(talk: Talk, name: str, status: ExitStatus) -> None:
    if not HAS_SIGNALS:
        not_applicable(f"there is no {name} here")
    talk.decode(talk.frames(1))
    talk.peer.send_signal(signal.Signals[name])
    talk.expect_exit(status)
