"""Take the sound out of what mossnano-stdio answered.

OUT ends with .wav, or --wav is given: a WAV, with the numbers that the HANDSHAKE says. Else raw PCM, 16 bits,
little-endian, channels interleaved; floats where the HANDSHAKE says f32le. It is passed on as it comes, so this may
stand in a live pipe:

`mossnano-stdio < tokens | mossnano unframe --wav | aplay`

Where the input has numbered streams, --stream N takes one of them, and --each DIR makes a WAV of each: DIR/1.wav,
DIR/2.wav and so on, and DIR/plain.wav of the plain streams, if there are any.

--events FILE writes the MARKs and LEVELS that come with the sound, a JSON object a line; --each writes those of a
stream that has some beside its WAV: DIR/1.jsonl. `seconds` and `sample` count from the stream's start:

    {"stream": 1, "numbered": true, "seconds": 0.08, "sample": 3840, "mark": "word"}
    {"stream": 1, "numbered": true, "seconds": 0.08, "levels_ms": 20, "levels": [0, 812, 9001, 8770]}

A mark that is no UTF-8 is a `mark_hex`. 65535 is the level of full scale.

ERROR messages are told on stderr, and the status is 65 if there were any. A stream that is cut has status 65 too: then
no file of it is left, but stdout has got all that was whole.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mossnano_stdio.errors import ExitStatus, InputError, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output, told_as
from mossnano_stdio.pcm import SoundForm, WavWriter, form_said_by
from mossnano_stdio.protocol import MAX_NUMBER, NUMBERED, Kind, Message, MessageReader, out_of_stream, parse_json
from mossnano_stdio.weights import NANO

PIECE_BYTES = 1 << 16
MOST_NUMBERS_TOLD = 10
POSITION_BYTES = 8  # of a MARK
LEVEL_BYTES = 2
NANO_FORM = SoundForm.of_codec(NANO)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="?", default=STANDARD_STREAM, metavar="IN", help="default: stdin")
    parser.add_argument("sound", nargs="?", default=STANDARD_STREAM, metavar="OUT", help="default: stdout")
    parser.add_argument("--wav", action="store_true", help="a WAV, whatever OUT is called")
    parser.add_argument("--events", metavar="FILE", help="write the marks and levels here, as JSON lines")
    numbered = parser.add_mutually_exclusive_group()
    numbered.add_argument("--stream", type=int, metavar="N", help="only the numbered stream N")
    numbered.add_argument("--each", metavar="DIR", help="a WAV of each stream in this folder, instead of OUT")


def run(args: argparse.Namespace) -> int:
    if args.stream is not None and not 0 <= args.stream <= MAX_NUMBER:
        raise UsageError(f"--stream is {args.stream}, allowed is 0 to {MAX_NUMBER}")
    if args.each is not None and (args.sound != STANDARD_STREAM or args.wav):
        raise UsageError("--each makes WAVs of its own: leave OUT and --wav out")
    if args.each is not None and args.events is not None:
        raise UsageError("--each writes marks and levels beside its WAVs: leave --events out")
    if args.events == args.sound == STANDARD_STREAM:
        raise UsageError("stdout has the sound: give --events a file, or OUT")
    is_wav = args.wav or args.sound.lower().endswith(".wav")
    with open_input(args.input) as file, contextlib.ExitStack() as stack:
        if args.each is not None:
            return _unframe(file, stack.enter_context(_Folder(Path(args.each))))
        output = stack.enter_context(open_output(args.sound))
        maybe_events = None if args.events is None else _Events(stack.enter_context(open_output(args.events)))
        return _unframe(file, _OneFile(_Sound(output, is_wav), maybe_events, args.stream))


def _unframe(file: io.BufferedReader, files: _OneFile | _Folder) -> int:
    reader = MessageReader()
    error_count = 0
    forms: dict[int | None, SoundForm | None] = {None: None}  # of plain streams, and of numbered ones that began
    levels_ms: dict[int | None, Any] = {None: None}  # the same
    while piece := file.read1(PIECE_BYTES):
        for message in reader.feed(piece):
            maybe_number, message = out_of_stream(message) if message.kind & NUMBERED else (None, message)
            match message.kind:
                case Kind.HANDSHAKE:
                    fields = parse_json(message)
                    form = forms[maybe_number] = form_said_by(fields)
                    levels_ms[maybe_number] = fields.get("levels_ms")
                    files.agree(maybe_number, form)
                case Kind.AUDIO if sound := files.maybe_sound(maybe_number):
                    sound.agree(forms.setdefault(maybe_number, forms[None]))
                    sound.write(message.payload)
                case Kind.MARK if events := files.maybe_events(maybe_number):
                    events.mark(maybe_number, message, forms.setdefault(maybe_number, forms[None]) or NANO_FORM)
                case Kind.LEVELS if events := files.maybe_events(maybe_number):
                    events.levels(maybe_number, message, levels_ms.setdefault(maybe_number, levels_ms[None]))
                case Kind.END:
                    files.end(maybe_number, message, forms.get(maybe_number, forms[None]))
                    if maybe_number is not None:
                        forms.pop(maybe_number, None)
                        levels_ms.pop(maybe_number, None)
                case Kind.ERROR if files.concerns(maybe_number):
                    error_count += 1
                    error = parse_json(message)
                    where = "" if error.get("stream") is None else f" in stream {error['stream']}"
                    _say(f"ERROR{where}: {error.get('code')}: {error.get('message')}")
        files.flush()
    if reader.incomplete_bytes:
        raise InputError(f"the stream is cut inside a message: {reader.incomplete_bytes} bytes of it are there")
    files.finish()
    return ExitStatus.BAD_INPUT if error_count else ExitStatus.DONE


class _OneFile:
    """The sound of all plain streams, one after the other, or of one numbered stream."""

    def __init__(self, sound: _Sound, maybe_events: _Events | None, maybe_number: int | None) -> None:
        self._sound = sound
        self._events = maybe_events
        self._maybe_number = maybe_number
        self._numbers: set[int] = set()  # some that came
        self._is_there = maybe_number is None

    def concerns(self, maybe_number: int | None) -> bool:
        """Is an ERROR of this stream told? Those of plain streams may be about the input as a whole."""
        return maybe_number in (None, self._maybe_number)

    def agree(self, maybe_number: int | None, form: SoundForm) -> None:
        if maybe_number == self._maybe_number:
            self._sound.agree(form)

    def maybe_sound(self, maybe_number: int | None) -> _Sound | None:
        if maybe_number == self._maybe_number:
            self._is_there = True
            return self._sound
        if self._maybe_number is None:
            raise UsageError(
                f"the input has numbered streams, {maybe_number} among them: choose one with --stream N, "
                "or --each DIR for a file of each"
            )
        if maybe_number is not None and len(self._numbers) < MOST_NUMBERS_TOLD:
            self._numbers.add(maybe_number)
        return None

    def maybe_events(self, maybe_number: int | None) -> _Events | None:
        return self._events if maybe_number == self._maybe_number else None

    def end(self, maybe_number: int | None, message: Message, maybe_form: SoundForm | None) -> None:
        if maybe_number != self._maybe_number:
            return
        if maybe_number is not None:
            self._is_there = True
            self._sound.agree(maybe_form)
        elif self._events is not None:
            self._events.begin_next_plain(message)

    def flush(self) -> None:
        self._sound.flush()
        if self._events is not None:
            self._events.flush()

    def finish(self) -> None:
        if not self._is_there:
            others = f"there are {', '.join(map(str, sorted(self._numbers)))}" if self._numbers else "none is"
            raise InputError(f"no stream {self._maybe_number} is in the input; of numbered ones {others}")
        self._sound.finish()


class _Folder:
    """A WAV of each numbered stream, which is there once the stream is over, and one of all plain streams."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stacks: dict[int | None, contextlib.ExitStack] = {}  # of the files that are open
        self._sounds: dict[int | None, _Sound] = {}
        self._events: dict[int | None, _Events] = {}

    def __enter__(self) -> _Folder:
        with told_as(f"{self._path}: cannot be made"):
            self._path.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stack in self._stacks.values():  # those that are left are of streams without an end
            stack.__exit__(kind, error, trace)

    def concerns(self, maybe_number: int | None) -> bool:
        return True

    def agree(self, maybe_number: int | None, form: SoundForm) -> None:
        if maybe_number in self._sounds:
            self._sounds[maybe_number].agree(form)

    def maybe_sound(self, maybe_number: int | None) -> _Sound:
        if maybe_number not in self._sounds:
            self._sounds[maybe_number] = _Sound(self._opened(maybe_number, "wav"), is_wav=True)
        return self._sounds[maybe_number]

    def maybe_events(self, maybe_number: int | None) -> _Events:
        if maybe_number not in self._events:
            self._events[maybe_number] = _Events(self._opened(maybe_number, "jsonl"))
        return self._events[maybe_number]

    def end(self, maybe_number: int | None, message: Message, maybe_form: SoundForm | None) -> None:
        if maybe_number is not None:
            self.maybe_sound(maybe_number).agree(maybe_form)  # one that gave no sound has a WAV too
            self._close(maybe_number)
        elif None in self._events:
            self._events[None].begin_next_plain(message)

    def _opened(self, maybe_number: int | None, suffix: str) -> BinaryIO:
        name = f"{'plain' if maybe_number is None else maybe_number}.{suffix}"
        stack = self._stacks.setdefault(maybe_number, contextlib.ExitStack())
        return stack.enter_context(open_output(self._path / name))

    def flush(self) -> None:
        """Files are there when they are whole."""

    def finish(self) -> None:
        for maybe_number in list(self._stacks):
            self._close(maybe_number)

    def _close(self, maybe_number: int | None) -> None:
        self._events.pop(maybe_number, None)
        if maybe_number in self._sounds:
            self._sounds.pop(maybe_number).finish()
        self._stacks.pop(maybe_number).close()


class _Sound:
    """Writes a WAV, or the bare samples."""

    def __init__(self, output: BinaryIO, is_wav: bool) -> None:
        self._output = output
        self._is_wav = is_wav
        self._maybe_said: SoundForm | None = None  # by a HANDSHAKE
        self._maybe_writer: WavWriter | None = None

    def agree(self, maybe_form: SoundForm | None) -> None:
        """The sound that follows is of this form, where that was said."""
        if self._maybe_said not in (None, maybe_form):
            names = ["sample_rate", "channels"]
            if getattr(self._maybe_said, "sample_format", None) != getattr(maybe_form, "sample_format", None):
                names.append("sample_format")
            before, after = (
                tuple(getattr(form, name, None) for name in names) for form in (self._maybe_said, maybe_form)
            )
            raise InputError(
                f"the stream changes from {before} to {after} ({', '.join(names)}): one file holds one of them"
            )
        self._maybe_said = maybe_form

    def write(self, sound: bytes) -> None:
        form = self._maybe_said or NANO_FORM
        if len(sound) % form.sample_bytes:
            raise InputError(f"AUDIO of {len(sound)} bytes is no whole number of samples of {form.channels} channels")
        if self._is_wav:
            self._writer().write(sound)
        else:
            self._output.write(sound)

    def flush(self) -> None:
        self._output.flush()

    def finish(self) -> None:
        if self._is_wav:
            self._writer().finish()

    def _writer(self) -> WavWriter:
        if self._maybe_writer is None:
            if self._maybe_said is None:
                _say(f"no HANDSHAKE came: {NANO.sample_rate} Hz and {NANO.channels} channels are assumed")
            form = self._maybe_said or NANO_FORM
            self._maybe_writer = WavWriter(
                self._output, form.sample_rate, form.channels, sample_format=form.sample_format
            )
        return self._maybe_writer


class _Events:
    """Writes marks and levels, a JSON object a line."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._plain_number = 0
        self._windows = 0  # of the levels of the stream that is open

    def mark(self, maybe_number: int | None, message: Message, form: SoundForm) -> None:
        if len(message.payload) < POSITION_BYTES:
            raise InputError(
                f"a MARK of {len(message.payload)} bytes: it begins with the {POSITION_BYTES} of its place"
            )
        sample, text = int.from_bytes(message.payload[:POSITION_BYTES], "little"), message.payload[POSITION_BYTES:]
        try:
            said = {"mark": text.decode()}
        except UnicodeDecodeError:
            said = {"mark_hex": text.hex()}
        self._write(maybe_number, sample / form.sample_rate, {"sample": sample, **said})

    def levels(self, maybe_number: int | None, message: Message, levels_ms: Any) -> None:
        if len(message.payload) % LEVEL_BYTES:
            raise InputError(f"LEVELS of {len(message.payload)} bytes: each level has {LEVEL_BYTES}")
        if type(levels_ms) is not int or levels_ms < 1:
            raise InputError(f"LEVELS came, but the HANDSHAKE says levels_ms {levels_ms!r}: how long is a window?")
        levels = [level for (level,) in struct.iter_unpack("<H", message.payload)]
        seconds = self._windows * levels_ms / 1000
        self._windows += len(levels)
        self._write(maybe_number, seconds, {"levels_ms": levels_ms, "levels": levels})

    def begin_next_plain(self, end: Message) -> None:
        self._windows = 0
        next_number = parse_json(end).get("next_stream")
        self._plain_number = next_number if type(next_number) is int else self._plain_number + 1

    def flush(self) -> None:
        self._output.flush()

    def _write(self, maybe_number: int | None, seconds: float, said: dict[str, Any]) -> None:
        is_numbered = maybe_number is not None
        stream = maybe_number if is_numbered else self._plain_number
        fields = {"stream": stream, "numbered": is_numbered, "seconds": round(seconds, 6), **said}
        self._output.write(json.dumps(fields).encode("ascii") + b"\n")


def _say(line: str) -> None:
    """Print one line; letters of a peer that are not printable, line ends among them, become spaces."""
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    print(f"mossnano unframe: {shown}", file=sys.stderr)
