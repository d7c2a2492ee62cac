"""`mossnano-stdio`: messages in on stdin, PCM out on stdout, until the input ends.

Rules of this room:

- It puts the pieces together (weights, codec, connection, file descriptors) and decides how the process ends. What a
  message means is protocol/'s business, what a descriptor does is stdio.py's.
- Every end has one of the statuses in errors.py. Whatever is said to people goes to stderr, whatever is said to the
  peer is a message.
- The loop computes only when no more input would change the next chunk, or none waits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mossnano_stdio import __version__
from mossnano_stdio.chunks import MAX_CHUNK_FRAMES, RAMP_MAX_FRAMES, Decoder, Encoder, Ramp, SegmentingDecoder
from mossnano_stdio.errors import (
    BugError,
    ExitStatus,
    MossnanoError,
    OutOfMemoryError,
    OutputError,
    SettingsError,
    UsageError,
)
from mossnano_stdio.pcm import SoundForm
from mossnano_stdio.process.flags import (
    PLAYER_OPTIONS,
    SOUND_OPTIONS,
    add_chunk_arguments,
    add_decoder_arguments,
    add_player_arguments,
    add_sound_arguments,
    add_zero_frame_argument,
    chosen_schedule,
    whole_number,
)
from mossnano_stdio.process.inbox import Arrival, Ending, Inbox
from mossnano_stdio.process.logs import LEVELS, MAX_LINE_BYTES, log, start_logging, write_stderr
from mossnano_stdio.process.outputs import STDOUT_FORMS, Output, SeveralOutputs, SpeakerOutput
from mossnano_stdio.process.stats import Durations, StepTimes, StreamTimes, peak_resident_bytes
from mossnano_stdio.process.stdio import InputThread, OutputFd, Stopped, StopSignals, take_stdout
from mossnano_stdio.process.turns import Turns
from mossnano_stdio.protocol import (
    MAX_MESSAGE_BYTES,
    NUMBERED,
    VERSION,
    Kind,
    Message,
    MessageReader,
    out_of_stream,
    parse_json,
)
from mossnano_stdio.protocol.connection import Connection, Direction, error_message
from mossnano_stdio.protocol.decoding import DECODE, DECODE_SEGMENTS, DECODE_TO_ZEROS
from mossnano_stdio.protocol.encoding import ENCODE
from mossnano_stdio.tokens import CodecFormat

if TYPE_CHECKING:
    from mossnano_stdio.codecs import EncoderRuntime, Runtime
    from mossnano_stdio.playback import Player
    from mossnano_stdio.weights import Bundle

PROGRAM: Final = "mossnano-stdio"


@dataclass(frozen=True)
class Loaded:
    """A codec that has done its first step, the slowest of all."""

    direction: Direction
    new_codec: Callable[[], Decoder | Encoder]  # the first one has stepped already
    format: CodecFormat
    identity: Mapping[str, Any]  # what the HANDSHAKE says of where it came from
    ramp_second_frames: Callable[[], int] = lambda: 2  # of this codec, on this machine


Loader = Callable[[argparse.Namespace], Loaded]


def ready_to_decode(new_decoder: Callable[[], Decoder], identity: Mapping[str, Any]) -> Loaded:
    decoder = new_decoder()
    codes = np.zeros((1, decoder.format.quantizers), np.uint16)
    if isinstance(decoder, SegmentingDecoder):
        decoder.decode_segment(codes, 1.0)
        return Loaded(DECODE_SEGMENTS, _first_then(decoder, new_decoder), decoder.format, identity)
    decoder.step(codes)
    decoder.reset()
    return Loaded(DECODE, _first_then(decoder, new_decoder), decoder.format, identity)


def ready_to_encode(new_encoder: Callable[[], Encoder], identity: Mapping[str, Any]) -> Loaded:
    encoder = new_encoder()
    encoder.step(np.zeros((encoder.format.frame_samples, encoder.format.channels), np.float32))
    encoder.reset()
    return Loaded(ENCODE, _first_then(encoder, new_encoder), encoder.format, identity)


def _first_then(first: Any, new_codec: Callable[[], Any]) -> Callable[[], Any]:
    """Gives what was made already, and then new ones."""
    made = [first]
    return lambda: made.pop() if made else new_codec()


def main(signals: StopSignals, arguments: Sequence[str] | None = None, load: Loader | None = None) -> int:
    """Run the process; the exit status. Tests bring a decoder double's `load`."""
    options = _parse(arguments)
    start_logging(PROGRAM, options.log_level, as_json=options.log_json)
    process = _Process(options, signals)
    try:
        return process.serve(load or load_codec)
    except Stopped as stopped:
        return stopped.exit_status
    except BrokenPipeError:
        return ExitStatus.READER_GONE
    except Exception as error:  # noqa: BLE001 - every end has its status, a bug's too
        return process.die(error)
    finally:
        process.stop_output()
        if options.stats:
            process.report()


def load_codec(options: argparse.Namespace) -> Loaded:
    """The weights that the command line asks for, as a decoder, or as an encoder."""
    from mossnano_stdio.codecs import load_encoder_runtime, load_runtime, ramp_second_frames
    from mossnano_stdio.weights import find_weights, load_bundle

    bundle = load_bundle(find_weights(options.weights))
    if bundle.demo:
        log.warning("these are the built-in demo weights: a small synthesiser, not the codec")
    engine = {"provider": options.provider, "threads": options.threads}
    runtime: Runtime | EncoderRuntime
    if options.encode:
        runtime = encoding = load_encoder_runtime(bundle, **engine)
        loaded = ready_to_encode(encoding.new_encoder, _identity(bundle, encoding))
    else:
        runtime = decoding = load_runtime(bundle, graph=options.graph, precision=options.precision, **engine)
        loaded = ready_to_decode(decoding.new_decoder, _identity(bundle, decoding))
    # Measured once, when a ramp is first asked for: while loading, or by SETTINGS after a fixed size.
    return replace(loaded, ramp_second_frames=cache(lambda: ramp_second_frames(runtime)))


def _identity(bundle: Bundle, runtime: Runtime | EncoderRuntime) -> dict[str, Any]:
    return {
        "codec": bundle.name,
        "weights": str(bundle.folder),
        "demo": bundle.demo,
        "graph": runtime.graph_name,
        "precision": runtime.precision,
        "provider": runtime.engine.provider,
        "threads": runtime.engine.threads,
    }


class _StopOnErrorError(Exception):
    """`--on-error stop`, and an ERROR was sent."""


class _Process:
    """The life of one process."""

    def __init__(self, options: argparse.Namespace, signals: StopSignals) -> None:
        self._options = options
        self._signals = signals
        self._fd = OutputFd(take_stdout(), self._signals)
        self._inbox = Inbox()
        self._output = self._open_output()
        self._stops_on_error = options.on_error == "stop"
        self._maybe_connection: Connection | None = None
        self._maybe_times: StepTimes | None = None
        self._turns: Turns  # when it is known how long a frame is
        self._maybe_pool: ThreadPoolExecutor | None = None  # where several streams are computed side by side
        self._stream_times = StreamTimes()
        self._first_audio = Durations()
        self._ready_seconds = 0.0

    def serve(self, load: Loader) -> int:
        """From start to end; the exit status."""
        self._signals.report_with(self.report)
        with self._signals.ending():
            messages = MessageReader(self._options.max_message_bytes)
            reading = InputThread(self._inbox, messages, None if self._options.output == "none" else self._fd.fd)
            # Reading beside the loading saves the peer a wait for a full pipe. On Windows, a thread that waits for its
            # input can lock out the loading of libraries.
            if sys.platform != "win32":
                reading.start()
            loaded = load(self._options)
            try:
                connection = self._maybe_connection = self._connect(loaded)
            except SettingsError as error:
                raise UsageError(f"{error} (asked for by a flag)") from error
            if sys.platform == "win32":
                reading.start()
        self._output.start(connection.plain.settings.form)
        self._put(connection.handshake())
        self._ready_seconds = time.perf_counter()
        try:
            ending = self._converse(connection)
        except _StopOnErrorError:
            return ExitStatus.BAD_INPUT
        return self._close(connection, ending)

    def _converse(self, connection: Connection) -> Ending:
        """Until no more messages come, and all that they made due is computed."""
        maybe_ending: Ending | None = None
        while True:
            # All that has come goes to its stream first: what is computed next may depend on it.
            while maybe_ending is None and not connection.is_full:
                match self._inbox.maybe_next():
                    case Arrival(message, seconds):
                        self._put_all(connection.receive(message, seconds))
                    case Ending() as ending:
                        if ending.is_reader_gone:
                            raise BrokenPipeError
                        self._put_all(connection.end_input(is_faulty=ending.maybe_fault is not None))
                        maybe_ending = ending
                    case None:
                        break
            due = connection.due_lanes()
            if turns := self._turns.next(due, time.perf_counter()):
                self._put_all(connection.advance(turns, self._maybe_pool.map if self._maybe_pool else map))
            elif maybe_ending is not None:
                return maybe_ending
            elif self._inbox.is_empty:
                with self._signals.raising():
                    self._inbox.wait(self._fd.check_reader, self._turns.wakes_at(due))

    def stop_output(self) -> None:
        """Whatever still sounds is silent from now on."""
        self._output.abort()

    def report(self) -> None:
        """One JSON line on stderr: what was done so far."""
        stats = {
            "streams": self._maybe_connection.streams_opened if self._maybe_connection else 0,
            "numbered_streams": self._maybe_connection.numbered_opened if self._maybe_connection else 0,
            **(self._maybe_times.snapshot() if self._maybe_times else {}),
            "first_audio_p50_ms": self._first_audio.percentile_ms(50),
            "first_audio_p95_ms": self._first_audio.percentile_ms(95),
            "peak_resident_bytes": peak_resident_bytes(),
            "errors": self._maybe_connection.error_count if self._maybe_connection else 0,
            **self._stream_times.snapshot(),
        }
        while len(line := json.dumps(stats)) >= MAX_LINE_BYTES and stats["latest_streams"]:
            del stats["latest_streams"][0]  # what does not fit would be cut off
        write_stderr(line)

    def die(self, error: Exception) -> int:
        """Say why we cannot go on, to the peer and on stderr; the status with which we end."""
        fault = _as_fault(error)
        if fault.exit_status is ExitStatus.BUG:
            for line in "".join(traceback.format_exception(error)).splitlines():
                write_stderr(line)
        self._stops_on_error = False
        if isinstance(fault, OutputError):
            log.error("%s", fault)
        else:
            with contextlib.suppress(MossnanoError, OSError, Stopped):
                self._put(error_message(fault, fatal=True))
        return fault.exit_status

    def _open_output(self) -> Output:
        options = self._options
        outputs = [] if options.output == "none" else [STDOUT_FORMS[options.output](self._fd)]
        if options.play:
            outputs.append(SpeakerOutput(self._open_player, self._should_stop_playing))
        return SeveralOutputs(outputs)

    def _open_player(self, form: SoundForm) -> Player:
        from mossnano_stdio.playback import Player

        options = self._options
        return Player(
            form.sample_rate,
            form.channels,
            device=options.device,
            prebuffer_ms=options.prebuffer_ms,
            latency=options.latency,
            volume=options.volume,
        )

    def _should_stop_playing(self) -> bool:
        """A CANCEL drops what waits for the speaker; a signal ends us."""
        self._signals.check()
        return self._inbox.cancel_waits()

    @property
    def _has_one_form(self) -> bool:
        return self._options.output in ("raw", "wav")

    @property
    def _settings(self) -> dict[str, Any]:
        """What flags set."""
        options = {name: getattr(self._options, name) for name in (*SOUND_OPTIONS, "window_samples")}
        return {name: value for name, value in options.items() if value is not None}

    def _connect(self, loaded: Loaded) -> Connection:
        options = self._options
        frames_per_second = loaded.format.frames_per_second
        times = self._maybe_times = StepTimes(frames_per_second)
        if options.stop_on_zero_frame and loaded.direction is DECODE_SEGMENTS:
            raise UsageError("--stop-on-zero-frame is for frames of codes, these weights decode segments; leave it out")
        # A session's threads are fixed. Where a step has one of several, streams share the CPUs; else each step does.
        if options.threads == 1:
            from mossnano_stdio.codecs import default_threads

            at_once = default_threads()
        else:
            at_once = 1
        turns = self._turns = Turns(1 / frames_per_second, at_once)
        self._maybe_pool = ThreadPoolExecutor(at_once) if at_once > 1 else None
        one_at_a_time = threading.Lock()

        def note_step(frames: int, seconds: float) -> None:
            with one_at_a_time:
                times.add(frames, seconds)
                turns.note_cost(frames, seconds)

        identity = {
            "protocol": VERSION,
            "name": PROGRAM,
            "version": __version__,
            **loaded.identity,
            "max_message_bytes": options.max_message_bytes,
        }

        def new_ramp() -> Ramp:
            return Ramp(options.max_chunk_frames, loaded.ramp_second_frames())

        return Connection(
            DECODE_TO_ZEROS if options.stop_on_zero_frame else loaded.direction,
            loaded.new_codec,
            chosen_schedule(options, frames_per_second, new_ramp),
            identity,
            settings=self._settings,
            new_ramp=new_ramp,
            max_streams=options.max_streams,
            maybe_no_numbers=(
                f"--output {options.output} has no place for them: use --output framed" if self._has_one_form else None
            ),
            maybe_fixed_form=(
                f"{'--play' if options.play else f'--output {options.output}'} has one form for the whole run: "
                "set it with flags of the same names, --sample-rate for instance"
                if options.play or self._has_one_form
                else None
            ),
            cancel_waiting=self._inbox.cancel_waits,
            on_handled=self._inbox.release,
            on_step=note_step,
        )

    def _put_all(self, answers: Iterable[Message]) -> None:
        for answer in answers:
            self._put(answer)

    def _put(self, answer: Message) -> None:
        self._output.put(answer)
        if answer.kind & ~NUMBERED in (Kind.AUDIO, Kind.TOKENS) and self._maybe_connection is not None:
            stream, now = self._maybe_connection.maybe_stream_of(answer), time.perf_counter()
            if stream is not None:
                if stream.heard_until_seconds is None:
                    self._first_audio.add(now - max(stream.due_seconds or 0.0, self._ready_seconds))
                self._stream_times.add(stream, now)
                stream.note_sent(now)
        if answer.kind & ~NUMBERED == Kind.ERROR:
            log.error("%s", parse_json(out_of_stream(answer)[1] if answer.kind & NUMBERED else answer)["message"])
            if self._stops_on_error:
                raise _StopOnErrorError
        self._signals.check()

    def _close(self, connection: Connection, ending: Ending) -> int:
        """Say the last, and judge what came in."""
        fault = ending.maybe_fault
        if fault is not None and not isinstance(fault, MossnanoError):
            raise fault
        self._stops_on_error = False
        is_cut = connection.is_cut
        self._put_all(connection.close(fault))
        self._output.finish()
        if fault is not None:
            return fault.exit_status
        is_bad = is_cut or (connection.error_count > 0 and not self._output.carries_errors)
        return ExitStatus.BAD_INPUT if is_bad else ExitStatus.DONE


def _as_fault(error: Exception) -> MossnanoError:
    match error:
        case MossnanoError():
            return error
        case MemoryError():
            return OutOfMemoryError(f"out of memory: {error or 'no more is to be had'}")
        case _:
            return BugError(f"a bug of ours: {type(error).__name__}: {error}")


# --- command line -------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Decode framed codec tokens from stdin to PCM on stdout. protocol.md says how to talk to it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    add_decoder_arguments(parser)
    parser.add_argument("--encode", action="store_true", help="the other way round: PCM in, tokens out")
    parser.add_argument(
        "--output",
        choices=(*STDOUT_FORMS, "none"),
        default="framed",
        help="messages, bare PCM, WAV, or nothing (framed)",
    )
    add_chunk_arguments(parser)
    parser.add_argument(
        "--max-chunk-frames",
        type=whole_number(1, MAX_CHUNK_FRAMES),
        default=RAMP_MAX_FRAMES,
        metavar="N",
        help=f"without a fixed size, chunks take what waits: 1, 2, 4, ... and at most N frames ({RAMP_MAX_FRAMES})",
    )
    add_zero_frame_argument(parser)
    parser.add_argument(
        "--max-streams",
        type=whole_number(0, 1000),
        default=32,
        metavar="N",
        help="how many numbered streams may be open at once (32)",
    )
    parser.add_argument(
        "--window-samples",
        type=whole_number(1, 2**32),
        metavar="N",
        help="how many samples a numbered stream may send before its first CREDIT (all)",
    )
    parser.add_argument("--max-message-bytes", type=whole_number(1, 2**32 - 1), default=MAX_MESSAGE_BYTES, metavar="N")
    parser.add_argument(
        "--on-error", choices=("skip", "stop"), default="skip", help="stop: the first ERROR ends us with 65"
    )
    add_sound_arguments(parser.add_argument_group("the form of the sound, which SETTINGS may change"))
    player = parser.add_argument_group("sound card, as well as stdout or, with --output none, instead")
    player.add_argument("--play", action="store_true", help="play the PCM")
    add_player_arguments(player)
    parser.add_argument("--log-level", choices=LEVELS, default="warning")
    parser.add_argument("--log-json", action="store_true", help="log lines as JSON")
    parser.add_argument(
        "--stats", action="store_true", help="one line of JSON on stderr at the end (always on SIGUSR1)"
    )
    # argparse leaves alone what it finds set, so None says that a flag was not given, whatever its default is.
    options = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(PLAYER_OPTIONS)))
    for name in PLAYER_OPTIONS:
        if getattr(options, name) is None:
            setattr(options, name, parser.get_default(name))
        elif not options.play:
            parser.error(f"--{name.replace('_', '-')} is for the sound card, which is used with --play only: add that")
    if options.encode and options.stop_on_zero_frame:
        parser.error("--stop-on-zero-frame is for decoding; leave it out with --encode")
    if options.encode and (options.output not in ("framed", "none") or options.play or options.graph):
        parser.error("--encode writes tokens as messages: --output raw and wav, --play and --graph are for decoding")
    if options.encode and options.precision:
        parser.error("--precision is for decoding; leave it out with --encode: encoders are float32")
    for name in (*SOUND_OPTIONS, "window_samples"):
        if options.encode and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for decoding: --encode writes no sound")
    return options
