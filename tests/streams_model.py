"""A second implementation of what protocol.md says of streams side by side: the answers due for each message, in words.

It is written from the page and shares no code with the process. Slow things are left out (another sample rate, and
bounds in megabytes); all else is here: the state table, numbers, credit, marks, levels, form, limits and the end.

Rules of this room:

- Nothing of mossnano_stdio is imported.
- An answer is a tuple: the number of its stream (None: a plain one), its name, and what it says.
- A codec of its own: `Codec` gives both channels of a frame as two 16-bit values, each held for FRAME_SAMPLES.
"""

from __future__ import annotations

import json
import math
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

HANDSHAKE, AUDIO, ARTIFACT, TOKENS, ERROR, PING, END, CANCEL, SETTINGS, CREDIT, MARK = 0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11
NUMBERED = 0x80
OPENING = (TOKENS, ARTIFACT, SETTINGS, MARK)
NAMED = (HANDSHAKE, ARTIFACT, TOKENS, ERROR, PING, END, CANCEL, SETTINGS, MARK)

RATE, CHANNELS, FRAME_SAMPLES, QUANTIZERS, CODEBOOK = 4000, 2, 20, 2, 200
RAMP_FRAMES = 8
NOT_FINITE, FAILING = 199, 198  # a frame that begins with one of these makes the codec answer so
FIRST_MEMORY = 7
FULL_SCALE = 32767

Answer = tuple[Any, ...]
Frame = tuple[int, ...]


class Codec:
    """Every frame's values depend on all frames since the reset."""

    def __init__(self) -> None:
        self.memory = FIRST_MEMORY

    def values(self, frame: Frame) -> tuple[int, int]:
        for code in frame:
            self.memory = (self.memory * 31 + code + 1) % 30011
        return self.memory, self.memory - 2 * (self.memory % 50)  # of one parity, so that their mean is whole


@dataclass(frozen=True)
class Settings:
    quantizers: int = QUANTIZERS
    chunk_frames: int | None = None
    channels: int = CHANNELS
    sample_format: str = "s16le"
    gain_db: float = 0
    levels_ms: int = 0
    urgency: int = 3
    window_samples: int | None = None

    def with_fields(self, fields: dict[str, Any]) -> Settings | None:
        """None: one of them is wrong, and nothing is set."""
        for name, value in fields.items():
            is_whole = type(value) is int
            is_right = {
                "quantizers": is_whole and 1 <= value <= QUANTIZERS,
                "chunk_frames": value is None or (is_whole and 1 <= value <= 1000),
                "channels": is_whole and 1 <= value <= 2,
                "sample_format": value in ("s16le", "f32le"),
                "gain_db": (is_whole or isinstance(value, float)) and -60 <= value <= 20,
                "levels_ms": is_whole and value in (0, 10, 20, 40, 80),
                "urgency": is_whole and 0 <= value <= 7,
                "window_samples": value is None or (is_whole and 1 <= value <= 1 << 32),
            }.get(name, False)
            if not is_right:
                return None
        changed = replace(self, **fields)
        window = changed.window_samples
        return None if window is not None and window < changed.least_window else changed

    @property
    def least_window(self) -> int:
        return (self.chunk_frames or 1) * FRAME_SAMPLES


@dataclass
class Stream:
    number: int
    settings: Settings
    state: str = "open"  # without input; then "tokens", "artifact" or "bad"
    codec: Codec = field(default_factory=Codec)
    waiting: deque[Frame] = field(default_factory=deque)
    pushed_frames: int = 0
    ramp_frames: int = 1
    is_finished: bool = False
    samples_left: int | None = None
    frames: int = 0
    samples: int = 0
    errors: int = 0
    clipped: int = 0
    artifact: bytes = b""
    marks: list[tuple[int, str]] = field(default_factory=list)  # (frame, text), in the order of frames
    squares: list[float] = field(default_factory=list)  # of the samples of the level that is not full
    is_dropped: bool = False
    has_credit: bool = False
    window: int | None = None
    granted: int | None = None

    @property
    def due_frames(self) -> int:
        waiting, fixed = len(self.waiting), self.settings.chunk_frames
        if fixed is None:
            return min(waiting, self.ramp_frames)
        return min(waiting, fixed) if waiting >= fixed or self.is_finished else 0

    @property
    def is_sated(self) -> bool:
        return len(self.waiting) >= (self.settings.chunk_frames or self.ramp_frames)

    @property
    def allowed_frames(self) -> int:
        due = self.due_frames
        if not due or self.fits(due):
            return due
        if self.settings.chunk_frames is not None:
            return 0
        return next((fewer for fewer in (8, 4, 2, 1) if fewer < due and self.fits(fewer)), 0)

    def fits(self, frames: int) -> bool:
        samples = frames * FRAME_SAMPLES
        if self.samples_left is not None:
            samples = min(samples, self.samples_left)
        return self.granted is None or self.samples + samples <= self.granted


class Lane:
    """Where the plain streams come along, or one numbered one."""

    def __init__(self, number: int | None, settings: Settings, is_misfit: bool) -> None:
        self.number = number
        self.settings = settings
        self.is_misfit = is_misfit
        self.stream: Stream | None = None
        self.queue: deque[tuple[int, bytes]] = deque()
        self.then: Callable[[], None] | None = None  # when nothing is due any more
        self.is_closed = False  # all input of a numbered stream has come


class Model:
    def __init__(self, max_streams: int) -> None:
        self.max_streams = max_streams
        self.plain = Lane(None, Settings(), False)
        self.numbered: dict[int, Lane] = {}
        self.highest = -1
        self.told_late: set[int] = set()
        self.misfits: dict[int, bool] = {}
        self.next_plain = 0
        self.first_dropped: Stream | None = None
        self.is_dropping = False
        self.has_ended = False
        self.defaults_told = self.defaults_taken = 0  # plain SETTINGS and HANDSHAKEs
        self.behind: list[tuple[int, int, bytes]] = []  # messages that would open a stream, and defaults told before
        self.answers: list[Answer] = []

    # --- what is asked of it --------------------------------------------------------------------------

    def receive(self, kind: int, payload: bytes) -> list[Answer]:
        self._take(kind, payload)
        return self._given()

    def due(self) -> dict[int | None, int]:
        lanes = [self.plain, *self.numbered.values()]
        return {lane.number: frames for lane in lanes if lane.stream and (frames := lane.stream.allowed_frames)}

    def advance(self, number: int | None, most_frames: int) -> list[Answer]:
        lane = self.plain if number is None else self.numbered[number]
        self._decode(lane, most_frames)
        self._progress(lane)
        return self._given()

    def end_input(self) -> list[Answer]:
        self.has_ended = True
        for lane in [*self.numbered.values(), self.plain]:
            if lane.stream is not None:
                lane.stream.granted = None
            if lane.number is not None and not lane.is_closed:
                lane.queue.append((END, b""))
            self._progress(lane)
        return self._given()

    def close(self) -> list[Answer]:
        if self.plain.stream is not None and self.plain.stream.state == "artifact":
            self._error(self.plain, "bad_artifact", is_fatal=True)
        for lane in [self.plain, *self.numbered.values()]:  # numbered ones that waited for SETTINGS until now
            if lane.stream is not None:
                self._finish(lane)
                self._progress(lane)
        return self._given()

    def _given(self) -> list[Answer]:
        given, self.answers = self.answers, []
        return given

    # --- where a message belongs ----------------------------------------------------------------------

    def _take(self, kind: int, payload: bytes) -> None:
        inner = kind & ~NUMBERED
        if not kind & NUMBERED or inner not in (*NAMED, CREDIT):
            self.is_dropping = kind == CANCEL
            self.defaults_told += kind in (SETTINGS, HANDSHAKE)
            self.plain.queue.append((kind, payload))
            self._progress(self.plain)
            return
        if len(payload) < 4:
            self.answers.append((None, "ERROR", "bad_payload", None, False))
            return
        number, rest = int.from_bytes(payload[:4], "little"), payload[4:]
        if number > self.highest and self._defaults_wait(self.defaults_told):
            self.behind.append((self.defaults_told, kind, payload))
        else:
            self._take_numbered(number, inner, rest)

    def _take_numbered(self, number: int, kind: int, payload: bytes) -> None:
        lane = self.numbered.get(number) or self._opened(number, kind, payload)
        if lane is not None:
            self._take_in(lane, kind, payload)

    def _defaults_wait(self, told: int) -> bool:
        return self.defaults_taken < told

    def _take_behind(self) -> None:
        behind, self.behind = self.behind, []
        for told, kind, payload in behind:
            number = int.from_bytes(payload[:4], "little")
            if number > self.highest and self._defaults_wait(told):
                self.behind.append((told, kind, payload))
            else:
                self._take_numbered(number, kind & ~NUMBERED, payload[4:])

    def _opened(self, number: int, kind: int, payload: bytes) -> Lane | None:
        visitor = Lane(number, self.plain.settings, False)
        if kind == PING:
            self._answer(visitor, "PING", payload)
        elif kind == ERROR:
            self._error(visitor, "peer_error")
        elif kind == HANDSHAKE:
            self._compare(visitor, payload)
            if number > self.highest:
                self.misfits[number] = visitor.is_misfit
        elif number <= self.highest:
            self._late(visitor, kind)
        elif kind not in OPENING:
            self._error(visitor, "no_stream")
        else:
            self.highest = number
            if len(self.numbered) < self.max_streams:
                is_misfit = self.misfits.get(number, self.plain.is_misfit)
                lane = self.numbered[number] = Lane(number, self.plain.settings, is_misfit)
                self._open(lane)
                return lane
            self._error(visitor, "too_many_streams")
        return None

    def _late(self, lane: Lane, kind: int) -> None:
        assert lane.number is not None
        if kind in (TOKENS, ARTIFACT, SETTINGS) and lane.number not in self.told_late:
            self.told_late.add(lane.number)
            self._error(lane, "late_stream")

    def _take_in(self, lane: Lane, kind: int, payload: bytes) -> None:
        assert lane.number is not None
        if kind == CREDIT:
            self._grant(lane, payload)
        elif kind == CANCEL:
            self._deal_with_the_rest(lane)
            self._end(lane, lane.stream, echo=payload)
            self._close(lane)
            return
        elif lane.is_closed and kind in (*OPENING, END):
            self._late(lane, kind)
        else:
            lane.is_closed = lane.is_closed or kind == END
            lane.queue.append((kind, payload))
        self._progress(lane)

    def _grant(self, lane: Lane, payload: bytes) -> None:
        stream = lane.stream
        assert stream is not None
        granted = int.from_bytes(payload, "little")
        if len(payload) != 8 or (stream.window is None and granted < stream.settings.least_window):
            self._error(lane, "bad_payload")
            return
        if self.has_ended:
            return
        stream.has_credit = True
        stream.window = granted if stream.window is None else stream.window
        stream.granted = max(granted, stream.granted or 0)

    # --- in order -------------------------------------------------------------------------------------

    def _progress(self, lane: Lane) -> None:
        while True:
            if lane.number is None and self.is_dropping and lane.stream is not None:
                self._drop(lane.stream)
            is_due = lane.stream is not None and lane.stream.due_frames > 0
            # Of plain messages no more is taken than the next chunk can use: the rest fills the inbox.
            is_sated = lane.number is None and lane.stream is not None and lane.stream.is_sated
            if lane.then is not None and not is_due:
                then, lane.then = lane.then, None
                then()
            elif (
                lane.then is None
                and lane.queue
                and (not is_due or (not is_sated and lane.queue[0][0] in (TOKENS, MARK)))
            ):
                kind, payload = lane.queue.popleft()
                self._handle(lane, kind, payload)
                if lane.number is None and kind in (SETTINGS, HANDSHAKE):
                    self.defaults_taken += 1
                    self._take_behind()
            else:
                break
        if self.has_ended and lane.stream is not None and not lane.queue and lane.then is None:
            lane.stream.is_finished = True

    def _drop(self, stream: Stream) -> None:
        self.first_dropped = self.first_dropped or stream
        stream.is_dropped = True
        stream.waiting.clear()

    def _handle(self, lane: Lane, kind: int, payload: bytes) -> None:
        stream = lane.stream
        state = stream.state if stream else "idle"
        match kind, state:
            case (kind, _) if kind not in NAMED:
                self._error(lane, "unknown_kind")
            case (4, "idle"):
                self._open(lane)
                self._push(lane, payload)
            case (4, "open" | "tokens"):
                self._push(lane, payload)
            case (3, "idle"):
                self._open(lane)
                self._grow(lane, payload)
            case (3, "open" | "artifact"):
                self._grow(lane, payload)
            case (3, "bad"):
                if payload.startswith(b"MOSSNANO") and lane.number is None:
                    self._finish(lane)
                    lane.queue.appendleft((kind, payload))
            case (11, "idle"):
                self._open(lane)
                self._mark(lane, payload)
            case (11, "open" | "tokens"):
                self._mark(lane, payload)
            case (5, _):
                self._error(lane, "peer_error")
            case (6, _):
                self._answer(lane, "PING", payload)
            case (7, "idle"):
                if not (payload.startswith(b"{") and json.loads(payload).get("stream", 0) is None):
                    self._error(lane, "no_stream")
            case (7, "artifact"):
                assert stream is not None
                stream.state = "bad"
                self._error(lane, "bad_artifact")
                self._finish(lane)
            case (7, _):
                self._finish(lane)
            case (8, _):
                self._end(lane, self.first_dropped or stream, echo=payload)
                self.first_dropped, self.is_dropping = None, False
                self._close(lane)
            case (0, "idle" | "open"):
                self._compare(lane, payload)
            case (9, "idle"):
                self._settle(lane, payload)
            case (9, "open") if lane.number is not None:
                self._settle(lane, payload)
            case (4 | 11, "bad"):
                pass
            case _:
                self._error(lane, "out_of_place")

    def _open(self, lane: Lane) -> None:
        number = lane.number
        if number is None:
            number = self.next_plain
            self.next_plain += 1
        is_limited = lane.number is not None and not self.has_ended
        window = lane.settings.window_samples if is_limited else None
        lane.stream = Stream(number, lane.settings, window=window, granted=window)
        if lane.number is None and self.is_dropping:
            self._drop(lane.stream)

    def _push(self, lane: Lane, payload: bytes) -> None:
        stream = lane.stream
        assert stream is not None
        is_first, stream.state = stream.state == "open", "tokens"
        if is_first and lane.is_misfit:
            self._fail(lane, "bad_tokens")
            return
        if lane.number is None and self.is_dropping:
            return
        width = stream.settings.quantizers
        if len(payload) % width or any(code >= CODEBOOK for code in payload):
            lane.then = lambda: self._fail(lane, "bad_tokens")
            return
        frames = [tuple(payload[at : at + width]) for at in range(0, len(payload), width)]
        stream.waiting.extend(frames)
        stream.pushed_frames += len(frames)

    def _grow(self, lane: Lane, payload: bytes) -> None:
        stream = lane.stream
        assert stream is not None
        stream.state = "artifact"
        stream.artifact += payload
        data = stream.artifact
        is_bad = False
        if len(data) >= 32:  # a header is judged as a whole
            rate, channels, samples, quantizers, frames, codebook = struct.unpack_from("<6I", data, 8)
            is_bad = (
                data[:8] != b"MOSSNANO"
                or (rate, channels, codebook) != (RATE, CHANNELS, CODEBOOK)
                or not 1 <= quantizers <= QUANTIZERS
            )
            is_bad = is_bad or samples > frames * FRAME_SAMPLES or len(data) > 32 + quantizers * frames
            if not is_bad and len(data) == 32 + quantizers * frames:
                rows = [data[32 + row * frames : 32 + (row + 1) * frames] for row in range(quantizers)]
                is_bad = any(code >= CODEBOOK for code in data[32:])
                if not is_bad:
                    if not (lane.number is None and self.is_dropping):
                        stream.waiting.extend(zip(*rows, strict=True))
                        stream.pushed_frames += frames
                        stream.samples_left = samples
                    stream.state = "whole artifact"
                    self._finish(lane)
        if is_bad:
            self._fail(lane, "bad_artifact")

    def _mark(self, lane: Lane, payload: bytes) -> None:
        stream = lane.stream
        assert stream is not None
        if lane.number is None and self.is_dropping:
            return
        if len(payload) > 1000:
            self._error(lane, "bad_payload")
        else:
            stream.marks.append((stream.pushed_frames, payload.decode()))
            stream.marks.sort(key=lambda mark: mark[0])

    def _compare(self, lane: Lane, payload: bytes) -> None:
        try:
            theirs = json.loads(payload)
        except ValueError:
            self._error(lane, "bad_payload")
            return
        ours = {"sample_rate": RATE, "channels": CHANNELS, "codebook_size": CODEBOOK}
        ours["quantizers"] = lane.settings.quantizers
        lane.is_misfit = any(theirs.get(name, value) != value for name, value in ours.items())
        if lane.is_misfit:
            self._error(lane, "handshake_mismatch")

    def _settle(self, lane: Lane, payload: bytes) -> None:
        try:
            fields = json.loads(payload)
        except ValueError:
            self._error(lane, "bad_payload")
            return
        maybe_marks = fields.pop("marks", None) if lane.number is not None else None
        settings = lane.settings.with_fields(fields)
        stream = lane.stream
        has_credit = stream is not None and stream.has_credit
        if settings is None or (stream and has_credit and (stream.window or 0) < settings.least_window):
            self._error(lane, "bad_settings")
            return
        lane.settings = settings
        if stream is not None:
            stream.settings = settings
            if not has_credit:
                stream.window = stream.granted = settings.window_samples
            stream.marks = sorted([*stream.marks, *map(tuple, maybe_marks or [])], key=lambda mark: mark[0])
        self._answer(lane, "HANDSHAKE", {**vars(settings), "max_streams": self.max_streams, "sample_rate": RATE})

    # --- how a stream goes on and ends ------------------------------------------------------------------

    def _decode(self, lane: Lane, most_frames: int) -> None:
        stream = lane.stream
        assert stream is not None
        chunk = [stream.waiting.popleft() for _ in range(min(stream.due_frames, most_frames))]
        stream.ramp_frames = min(2 * stream.ramp_frames, RAMP_FRAMES)
        if any(frame[0] == FAILING for frame in chunk):
            self._fail(lane, "decode_failed")
            return
        values = [stream.codec.values(frame) for frame in chunk for _ in range(1)]
        if any(frame[0] == NOT_FINITE for frame in chunk):
            self._error(lane, "not_finite")
            values = [(0, 0)] * len(chunk)
            stream.codec = Codec()
        stream.frames += len(chunk)
        samples = [value for value in values for _ in range(FRAME_SAMPLES)]
        if stream.samples_left is not None:
            samples = samples[: stream.samples_left]
            stream.samples_left -= len(samples)
        self._sound(lane, stream, samples)

    def _sound(self, lane: Lane, stream: Stream, samples: list[tuple[int, int]]) -> None:
        settings = stream.settings
        gain = 10 if settings.gain_db == 20 else 1
        shaped = [tuple(gain * value for value in pair) for pair in samples]
        if settings.channels == 1:
            shaped = [(sum(pair) // 2,) for pair in shaped]
        if settings.levels_ms:
            stream.squares += [sum(value * value for value in values) / len(values) for values in shaped]
            size = settings.levels_ms * RATE // 1000
            levels = []
            while len(stream.squares) >= size:
                levels.append(_level(stream.squares[:size]))
                del stream.squares[:size]
            if levels:
                self._answer(lane, "LEVELS", levels)
        if settings.sample_format == "s16le":
            stream.clipped += sum(any(abs(value) > FULL_SCALE for value in values) for values in shaped)
            shaped = [tuple(max(-FULL_SCALE, min(FULL_SCALE, value)) for value in values) for values in shaped]
        while stream.marks and stream.marks[0][0] * FRAME_SAMPLES < stream.samples + len(shaped):
            frame, text = stream.marks.pop(0)
            self._answer(lane, "MARK", frame * FRAME_SAMPLES, text)
        stream.samples += len(shaped)
        if shaped:
            self._answer(lane, "AUDIO", settings.sample_format, [value for values in shaped for value in values])

    def _finish(self, lane: Lane) -> None:
        """No more input: what is left is decoded, then END comes."""
        stream = lane.stream
        assert stream is not None
        lane.is_closed = lane.number is not None
        stream.is_finished = True

        def end() -> None:
            if stream.is_dropped:
                self._close(lane)
                return
            if stream.squares:
                self._answer(lane, "LEVELS", [_level(stream.squares)])
            for frame, text in stream.marks:
                self._answer(lane, "MARK", min(frame * FRAME_SAMPLES, stream.samples), text)
            self._end(lane, stream)
            self._close(lane)

        lane.then = end

    def _fail(self, lane: Lane, code: str) -> None:
        stream = lane.stream
        assert stream is not None
        if not stream.is_dropped:
            self._error(lane, code)
        stream.state = "bad"
        stream.waiting.clear()
        stream.marks.clear()
        stream.pushed_frames = stream.frames

    def _end(self, lane: Lane, stream: Stream | None, echo: bytes | None = None) -> None:
        said: dict[str, Any] = {
            "stream": stream.number if stream else None,
            "frames": stream.frames if stream else 0,
            "samples": stream.samples if stream else 0,
            "cancelled": echo is not None,
            "errors": stream.errors if stream else 0,
        }
        if lane.number is None:
            said["next_stream"] = self.next_plain
        if stream is not None:
            said["clipped_samples"] = stream.clipped
        if echo is not None:
            said["echo"] = echo.decode("utf-8", "replace")[:1000]
        self._answer(lane, "END", said)

    def _close(self, lane: Lane) -> None:
        lane.stream = lane.then = None
        if lane.number is not None:
            del self.numbered[lane.number]
            self._deal_with_the_rest(lane)

    def _deal_with_the_rest(self, lane: Lane) -> None:
        """What waits when a numbered stream is over opens and adds to nothing, but is answered."""
        queue, lane.queue = lane.queue, deque()
        for kind, payload in queue:
            if kind == PING:
                self._answer(lane, "PING", payload)
            elif kind == ERROR:
                self._error(lane, "peer_error")
            elif kind == HANDSHAKE:
                self._compare(lane, payload)

    def _error(self, lane: Lane, code: str, *, is_fatal: bool = False) -> None:
        number = lane.number
        if lane.stream is not None:
            lane.stream.errors += 1
            number = lane.stream.number
        self._answer(lane, "ERROR", code, number, is_fatal)

    def _answer(self, lane: Lane, name: str, *said: Any) -> None:
        self.answers.append((lane.number, name, *said))


def _level(squares: list[float]) -> int:
    return min(65535, round(65535 * math.sqrt(sum(squares) / len(squares)) / FULL_SCALE))
