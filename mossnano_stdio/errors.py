"""The error tree: what can go wrong, as it is called on the wire and as it ends a process.

Rules of this room:

- Every error that we raise on purpose is a MossnanoError. Anything else that escapes is a bug of ours: the
  programs print its traceback on stderr and exit with `ExitStatus.BUG`.
- An error knows two things beside its message: `code`, the word that an ERROR message carries on the wire, and
  `exit_status`, how a process ends that could not go on because of it. No other module defines one of either.
- A message says what was found, what is allowed, and what to change. It fits on one line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from enum import IntEnum


class ExitStatus(IntEnum):
    """How a process of ours ends. The numbers follow sysexits.h where it has one that fits."""

    DONE = 0
    CHECK_FAILED = 1  # a comparison or a check said no
    USAGE = 2  # the command line was wrong
    BAD_INPUT = 65  # the input was cut or malformed
    NO_WEIGHTS = 66  # weights or an input file are missing or wrong
    NO_DEVICE = 69  # a device or the network is not to be had
    BUG = 70  # a defect of ours
    NO_MEMORY = 71
    OUTPUT_FAILED = 74  # output cannot be written, a full disk for instance
    FRAMING_LOST = 76  # the input is no sequence of messages (any more)
    INTERRUPTED = 130  # SIGINT
    READER_GONE = 141  # whoever read our output has closed it
    TERMINATED = 143  # SIGTERM


class MossnanoError(Exception):
    """The root of all errors that are not bugs."""

    code = "error"
    exit_status = ExitStatus.BUG


class UsageError(MossnanoError):
    """What was asked for makes no sense: a flag, or an argument of the library."""

    code = "usage"
    exit_status = ExitStatus.USAGE


class CheckFailedError(MossnanoError):
    """A comparison or a check ran to its end and said no."""

    code = "check_failed"
    exit_status = ExitStatus.CHECK_FAILED


class NoPlanError(CheckFailedError):
    """Nothing of a graph can be in 8 bits at the bar that was set."""


class InputError(MossnanoError):
    """The bytes that came in are not what they should be."""

    code = "bad_input"
    exit_status = ExitStatus.BAD_INPUT


class ProtocolError(InputError):
    """Framing is lost: nothing after this point can be read. Always fatal."""

    code = "framing_lost"
    exit_status = ExitStatus.FRAMING_LOST


class InputCutError(InputError):
    """The input ended inside a message."""

    code = "input_cut"


class PayloadError(InputError):
    """One message or stream is wrong; the next one may be right."""

    code = "bad_payload"


class ArtifactError(PayloadError):
    """These bytes are not a `.mossnano` artifact, or not one for these weights."""

    code = "bad_artifact"


class TokenError(PayloadError):
    """These bytes are not whole frames of codes in range."""

    code = "bad_tokens"


class AudioError(PayloadError):
    """These bytes are not whole samples, or not of the codec's format."""

    code = "bad_audio"


class HandshakeError(PayloadError):
    """The peer's format is not ours."""

    code = "handshake_mismatch"


class SettingsError(PayloadError):
    """No such setting, or no such value of it. Nothing is set."""

    code = "bad_settings"


class UnknownKindError(PayloadError):
    """A message of a kind that means nothing in this direction."""

    code = "unknown_kind"


class OutOfPlaceError(PayloadError):
    """A message of a kind that has no place where the stream stands."""

    code = "out_of_place"


class NoStreamError(PayloadError):
    """An END came while no stream was open."""

    code = "no_stream"


class LateStreamError(PayloadError):
    """Input for a numbered stream that is over, or whose number was passed over."""

    code = "late_stream"


class TooManyStreamsError(PayloadError):
    """No more numbered streams can be open at once. The one that came is not opened."""

    code = "too_many_streams"


class BacklogError(PayloadError):
    """More waits in one numbered stream than may wait. The stream is lost."""

    code = "backlog_full"


class PeerError(PayloadError):
    """The peer sent an ERROR of its own."""

    code = "peer_error"


class BundleError(MossnanoError):
    """Weights, or an input file, are missing, damaged, or of another make than their metadata says."""

    code = "bad_weights"
    exit_status = ExitStatus.NO_WEIGHTS


class DecodeError(MossnanoError):
    """The graph failed on valid input. The decoder's state is as it was before the step."""

    code = "decode_failed"


class NonFiniteError(DecodeError):
    """The graph answered NaN or infinity, which no PCM can hold."""

    code = "not_finite"


class DeviceError(MossnanoError):
    """A sound device, or the network, is not to be had."""

    code = "no_device"
    exit_status = ExitStatus.NO_DEVICE


class OutputError(MossnanoError):
    """Output could not be written; the message names the errno."""

    code = "output_failed"
    exit_status = ExitStatus.OUTPUT_FAILED


class OutOfMemoryError(MossnanoError):
    """The system gave no more memory."""

    code = "out_of_memory"
    exit_status = ExitStatus.NO_MEMORY


class BugError(MossnanoError):
    """Something of ours broke; what a peer is told of it."""

    code = "bug"


class Terminated(BaseException):
    """SIGTERM came. No error, and no `except Exception` may swallow it."""


def reason_of(error: OSError) -> str:
    """What the system said, and the errno's name.

    >>> reason_of(OSError(errno.ENOSPC, "No space left on device"))
    'No space left on device (ENOSPC)'
    """
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown errno')})"


def exit_status_of(error: BaseException, program: str) -> int:
    """Say on stderr what ended `program`, and with which status it should end.

    One line for whatever is no bug of ours, nothing at all for a reader that went away, a traceback for the rest.
    """
    is_reader_gone = isinstance(error, BrokenPipeError) or (
        # Windows says EINVAL of a pipe that nobody reads any more, and no file of ours is called so.
        sys.platform == "win32" and isinstance(error, OSError) and error.errno == errno.EINVAL and not error.filename
    )
    if is_reader_gone:
        _silence_stdout()
        return ExitStatus.READER_GONE
    status, line = _verdict(error)
    if sys.stderr is not None:  # where it is closed, print would say it on stdout
        with contextlib.suppress(OSError, ValueError):  # the status says it too
            if status == ExitStatus.BUG:
                traceback.print_exception(error)
            print(f"{program}: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
    return status


def _verdict(error: BaseException) -> tuple[ExitStatus, str]:
    match error:
        case MossnanoError():
            return error.exit_status, f"error: {error}"
        case KeyboardInterrupt():
            return ExitStatus.INTERRUPTED, "interrupted"
        case Terminated():
            return ExitStatus.TERMINATED, "terminated"
        case MemoryError():
            return ExitStatus.NO_MEMORY, f"error: out of memory ({str(error) or 'no more to be had'})"
        case FileNotFoundError() | IsADirectoryError() | NotADirectoryError() | PermissionError():
            return ExitStatus.NO_WEIGHTS, f"error: {error.strerror}: {error.filename}"
        case OSError():
            where = f": {error.filename}" if error.filename else ""
            return ExitStatus.OUTPUT_FAILED, f"error: {reason_of(error)}{where}"
        case _:
            return ExitStatus.BUG, f"a bug of ours: {type(error).__name__}: {error}"


def _silence_stdout() -> None:
    """Keep the interpreter from complaining, at exit, that it could not flush into a closed pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
