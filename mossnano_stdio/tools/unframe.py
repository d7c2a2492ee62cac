"""Take the sound out of what mossnano-stdio answered.

OUT ends with .wav, or --wav is given: a WAV, with the numbers that the HANDSHAKE says. Else raw PCM, 16 bits,
little-endian, channels interleaved; floats where the HANDSHAKE says f32le. It is passed on as it comes, so this may
stand in a live pipe:

`mossnano-stdio < tokens | mossnano unframe --wav | aplay`

Where the input has numbered streams, --stream N takes one of them, and --each DIR makes a WAV of each: DIR/1.wav,
DIR/2.wav and so on, and DIR/plain.wav of the plain streams, if there are any.

ERROR messages are told on stderr, and the status is 65 if there were any. A stream that is cut has status 65 too: then
no file of it is left, but stdout has got all that was whole.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mossnano_stdio.errors import ExitStatus, InputError, UsageError
from mossnano_stdio.files import STANDARD_STREAM, open_input, open_output, told_as
from mossnano_stdio.pcm import SoundForm, WavWriter, form_said_by
from mossnano_stdio.protocol import MAX_NUMBER, NUMBERED, Kind, MessageReader, out_of_stream, parse_json
from mossnano_stdio.weights import NANO

PIECE_BYTES = 1 << 16
MOST_NUMBERS_TOLD = 10
NANO_FORM = SoundForm.of_codec(NANO)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="?", default=STANDARD_STREAM, metavar="IN", help="default: stdin")
    parser.add_argument("sound", nargs="?", default=STANDARD_STREAM, metavar="OUT", help="default: stdout")
    parser.add_argument("--wav", action="store_true", help="a WAV, whatever OUT is called")
    numbered = parser.add_mutually_exclusive_group()
    numbered.add_argument("--stream", type=int, metavar="N", help="only the numbered stream N")
    numbered.add_argument("--each", metavar="DIR", help="a WAV of each stream in this folder, instead of OUT")


def run(args: argparse.Namespace) -> int:
    if args.stream is not None and not 0 <= args.stream <= MAX_NUMBER:
        raise UsageError(f"--stream is {args.stream}, allowed is 0 to {MAX_NUMBER}")
    if args.each is not None and (args.sound != STANDARD_STREAM or args.wav):
        raise UsageError("--each makes WAVs of its own: leave OUT and --wav out")
    is_wav = args.wav or args.sound.lower().endswith(".wav")
    with open_input(args.input) as file:
        if args.each is not None:
            with _Folder(Path(args.each)) as folder:
                return _unframe(file, folder)
        with open_output(args.sound) as output:
            return _unframe(file, _OneFile(_Sound(output, is_wav), args.stream))


def _unframe(file: io.BufferedReader, files: _OneFile | _Folder) -> int:
    reader = MessageReader()
    error_count = 0
    forms: dict[int | None, SoundForm | None] = {None: None}  # of plain streams, and of numbered ones that began
    while piece := file.read1(PIECE_BYTES):
        for message in reader.feed(piece):
            maybe_number, message = out_of_stream(message) if message.kind & NUMBERED else (None, message)
            match message.kind:
                case Kind.HANDSHAKE:
                    form = forms[maybe_number] = form_said_by(parse_json(message))
                    files.agree(maybe_number, form)
                case Kind.AUDIO if sound := files.maybe_sound(maybe_number):
                    sound.agree(forms.setdefault(maybe_number, forms[None]))
                    sound.write(message.payload)
                case Kind.END if maybe_number is not None:
                    files.end(maybe_number, forms.pop(maybe_number, forms[None]))
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

    def __init__(self, sound: _Sound, maybe_number: int | None) -> None:
        self._sound = sound
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

    def end(self, number: int, maybe_form: SoundForm | None) -> None:
        if number == self._maybe_number:
            self._is_there = True
            self._sound.agree(maybe_form)

    def flush(self) -> None:
        self._sound.flush()

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
            name = "plain.wav" if maybe_number is None else f"{maybe_number}.wav"
            stack = self._stacks[maybe_number] = contextlib.ExitStack()
            self._sounds[maybe_number] = _Sound(stack.enter_context(open_output(self._path / name)), is_wav=True)
        return self._sounds[maybe_number]

    def end(self, number: int, maybe_form: SoundForm | None) -> None:
        self.maybe_sound(number).agree(maybe_form)  # one that gave no sound has a WAV too
        self._close(number)

    def flush(self) -> None:
        """Files are there when they are whole."""

    def finish(self) -> None:
        for maybe_number in list(self._sounds):
            self._close(maybe_number)

    def _close(self, maybe_number: int | None) -> None:
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


def _say(line: str) -> None:
    """Print one line; letters of a peer that are not printable, line ends among them, become spaces."""
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    print(f"mossnano unframe: {shown}", file=sys.stderr)
