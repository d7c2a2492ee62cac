"""A second implementation of protocol.md, which shares no code with ours, and can be broken on purpose.

    python -I tests/other_peer.py ["a breakage of tests/test_conformance.py"]

Rules of this room:

- Standard library only, one thread, one poll loop: as unlike our process as can be. Windows polls no pipes, so there a
  second thread reads, and the first one waits for who reads.
- Its codec is no codec: mono at 8 kHz, 5 samples a frame, 3 codes of 9 bits below 300, padded to 4 bytes. Every
  sample depends on every code since the stream began.
- Each breakage is one line at the place that it breaks. Without one it keeps every promise.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import sys
from collections import deque
from typing import Any

RATE, CHANNELS, FRAME_SAMPLES, QUANTIZERS, CODEBOOK, BITS = 8000, 1, 5, 3, 300, 9
MAX_MESSAGE_BYTES, MAX_ARTIFACT_BYTES, INBOX_BYTES, MESSAGE_COST_BYTES, RAMP_FRAMES = 4000, 32 << 20, 4 << 20, 64, 8
HANDSHAKE, AUDIO, ARTIFACT, TOKENS, ERROR, PING, END, CANCEL, SETTINGS = 0, 1, 3, 4, 5, 6, 7, 8, 9
IDLE, IN_TOKENS, IN_ARTIFACT, SKIPPING = "between streams", "in tokens", "in an artifact", "skipping"
MODULUS = 30011
Message = tuple[int, bytes]


class BadPayloadError(Exception):
    """What is wrong with a message, and the code of the ERROR that says so."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Stream:
    """What has become of one stream so far."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.frames = self.samples = self.errors = 0
        self.memory = 7
        self.pending: deque[list[int]] = deque()
        self.wanted = 1
        self.finished = False
        self.samples_left: int | None = None


class OtherPeer:
    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.buffer = bytearray()
        self.buffer_reads = 0
        self.inbox: deque[Message] = deque()
        self.inbox_bytes = 0
        self.output = bytearray()
        self.ended = False  # no more input
        self.fault: tuple[str, int] | None = None  # why the input ended, and with which status we do
        self.status: int | None = None
        self.state = IDLE
        self.stream: Stream | None = None
        self.first_dropped: Stream | None = None
        self.next_number = 0
        self.quantizers = QUANTIZERS
        self.chunk_frames: int | None = None
        self.misfit = False
        self.artifact = bytearray()
        self.after_end = False  # the last message was an END
        self.kept_memory = 7
        self.errors = 0

    # --- the loop --------------------------------------------------------------------------------

    def run(self) -> int:
        self.put_handshake()
        maybe_status = self.run_to_the_end()
        if maybe_status is not None:
            return maybe_status
        if self.broken == "a last word on stdout":
            os.write(1, b"bye")
        if self.broken == "ends with 1 when all is well" and self.status == 0:
            return 1
        return self.status or 0

    def run_to_the_end(self) -> int | None:
        """Until all is done; or the status, where nobody reads any more."""
        if sys.platform == "win32":
            return self.run_on_windows()
        os.set_blocking(1, False)
        poller = select.poll()
        poller.register(1, 0)
        while True:
            if not self.output or self.broken == "decodes ahead of the reader":
                if self.status is None:
                    self.take_turn()
                if self.status is not None and not self.output:
                    break
            may_work = self.has_work() and (not self.output or self.broken == "decodes ahead of the reader")
            reads = not self.ended and self.inbox_bytes < INBOX_BYTES
            poller.modify(1, select.POLLOUT if self.output else 0)
            if reads:
                poller.register(0, select.POLLIN)
            events = dict(poller.poll(0 if may_work else None))
            if reads:
                poller.unregister(0)
            if events.get(1, 0) & select.POLLERR:
                return 1 if self.broken == "ends with 1 when nobody reads" else 141
            if events.get(1, 0) & select.POLLOUT:
                del self.output[: os.write(1, self.output[:4096])]
            if 0 in events:
                self.take_in(os.read(0, 1 << 16))
        return None

    def run_on_windows(self) -> int | None:
        """The same with a thread that reads."""
        import queue
        import threading

        arrivals: queue.Queue[bytes] = queue.Queue(INBOX_BYTES >> 16)

        def read() -> None:
            while data := os.read(0, 1 << 16):
                arrivals.put(data)
            arrivals.put(b"")

        threading.Thread(target=read, daemon=True).start()
        while True:
            if self.status is None:
                self.take_turn()
            try:
                is_ahead = self.broken == "decodes ahead of the reader" and self.status is None and self.has_work()
                while self.output and not is_ahead:
                    del self.output[: os.write(1, self.output[:4096])]
            except OSError:
                return 1 if self.broken == "ends with 1 when nobody reads" else 141
            if self.status is not None and not self.output:
                return None
            while not self.ended and self.inbox_bytes < INBOX_BYTES:
                try:
                    self.take_in(arrivals.get(block=not self.has_work()))
                except queue.Empty:
                    break

    def has_work(self) -> bool:
        return bool(self.inbox or self.ended or self.due_frames() or (self.stream and self.stream.finished))

    def take_turn(self) -> None:
        """One chunk, or one message."""
        stream = self.stream
        if self.is_dropping() and stream:
            stream.pending.clear()
        due_frames = self.due_frames()
        is_sated = stream is not None and (len(stream.pending) >= stream.wanted or stream.finished)
        next_kind = self.inbox[0][0] if self.inbox else None
        if self.broken == "PING overtakes audio" and next_kind == PING:
            self.handle(*self.take_message())
        elif due_frames and (is_sated or next_kind != TOKENS):
            self.decode(due_frames)
        elif stream and stream.finished:
            self.end_stream()
        elif self.inbox:
            self.handle(*self.take_message())
        elif self.ended:
            self.close()

    def is_dropping(self) -> bool:
        """Does a CANCEL wait?"""
        if self.broken == "CANCEL waits its turn":
            return False
        is_behind = self.first_dropped not in (None, self.stream)
        if self.broken == "CANCEL drops the open stream only" and is_behind:
            return False
        if not any(kind == CANCEL for kind, _ in self.inbox):
            return False
        self.first_dropped = self.first_dropped or self.stream
        return True

    # --- input -----------------------------------------------------------------------------------

    def take_in(self, data: bytes) -> None:
        if not data:
            self.ended = True
            if self.buffer and self.fault is None and self.broken != "a cut message goes unnoticed":
                self.fault = "input_cut", 65
            if self.broken == "waits for a quiet input":
                self.parse()
            return
        self.buffer += data
        self.buffer_reads += 1
        if self.broken == "waits for a quiet input" and not self.is_quiet():
            return
        self.parse()

    def parse(self) -> None:
        count = 0
        while len(self.buffer) >= 4:
            (length,) = struct.unpack_from("<I", self.buffer)
            if length == 0 and self.broken == "a length of 0 is nothing":
                del self.buffer[:4]
                continue
            most = MAX_MESSAGE_BYTES - (self.broken == "the longest message is too long")
            if length == 0 or (length > most and (self.broken != "no length is too large" or length > 1 << 30)):
                self.lose_framing()
                return
            if len(self.buffer) < 4 + length:
                return
            message = self.buffer[4], bytes(self.buffer[5 : 4 + length])
            del self.buffer[: 4 + length]
            reads, self.buffer_reads = self.buffer_reads, 1
            count += 1
            if self.broken == "loses messages that come in more than three reads" and reads > 3:
                continue
            if self.broken == "loses the 64th message of one read" and count == 64:
                continue
            self.inbox.append(message)
            self.inbox_bytes += len(message[1]) + MESSAGE_COST_BYTES
        if not self.buffer:
            self.buffer_reads = 0

    def lose_framing(self) -> None:
        self.buffer.clear()
        self.ended = True
        self.fault = "framing_lost", 76
        if self.broken == "framing that is lost drops what came before":
            self.inbox.clear()

    def is_quiet(self) -> bool:
        """Does the buffer end with the end of a message, or with nonsense?"""
        at = 0
        while len(self.buffer) - at >= 4:
            (length,) = struct.unpack_from("<I", self.buffer, at)
            if not 1 <= length <= MAX_MESSAGE_BYTES:
                return True
            at += 4 + length
        return at == len(self.buffer)

    def take_message(self) -> Message:
        message = self.inbox.popleft()
        self.inbox_bytes -= len(message[1]) + MESSAGE_COST_BYTES
        return message

    # --- messages --------------------------------------------------------------------------------

    def handle(self, kind: int, payload: bytes) -> None:
        after_end, self.after_end = self.after_end, kind == END
        try:
            match kind:
                case 0:
                    self.take_handshake(payload)
                case 3:
                    self.take_artifact(payload)
                case 4:
                    self.take_tokens(payload)
                case 5:
                    if self.broken != "a peer's ERROR is ignored":
                        self.put_error("peer_error", "you said " + payload.decode("utf-8", "replace"))
                case 6:
                    self.take_ping(payload)
                case 7:
                    if after_end and self.broken == "a second END is ignored":
                        return
                    self.take_end(payload)
                case 8:
                    self.cancel(payload)
                case 9:
                    self.take_settings(payload)
                case _:
                    self.take_unknown(kind)
        except BadPayloadError as error:
            if error.code in ("bad_tokens", "bad_artifact"):
                self.fail_stream(error)
            else:
                self.put_error(error.code, str(error))

    def take_handshake(self, payload: bytes) -> None:
        if self.broken != "a HANDSHAKE in a stream is compared":
            self.refuse_inside_a_stream()
        try:
            theirs = parse_object(payload)
        except BadPayloadError:
            if self.broken == "a HANDSHAKE needs no JSON":
                return
            raise
        ours = self.handshake()
        keys = ("sample_rate", "channels", "frame_samples", "quantizers", "codebook_size")
        if self.broken == "a HANDSHAKE has no keys of its own" and set(theirs) - set(keys):
            raise BadPayloadError("bad_payload", "which keys are these?")
        differences = [key for key in keys if key in theirs and theirs[key] != ours[key]]
        self.misfit = bool(differences) and self.broken != "a HANDSHAKE that does not fit is forgotten"
        if differences:
            raise BadPayloadError("handshake_mismatch", f"not ours: {differences}")

    def take_tokens(self, payload: bytes) -> None:
        if self.state == IN_ARTIFACT:
            if self.broken == "TOKENS end an artifact":
                self.take_end(b"")
                return
            raise BadPayloadError("out_of_place", "TOKENS inside an artifact")
        if self.state == SKIPPING:
            return
        if self.state == IDLE:
            if not payload and self.broken == "empty TOKENS open nothing":
                return
            self.open(IN_TOKENS)
        if self.misfit:
            raise BadPayloadError("bad_tokens", "your HANDSHAKE does not fit")
        stream = self.the_stream()
        if self.broken == "forgets everything between messages":
            stream.memory = 7
        if self.is_dropping():
            return
        frame_bytes = self.frame_bytes()
        if self.broken == "a byte after two frames is dropped" and len(payload) > 2 * frame_bytes:
            payload = payload[: len(payload) // frame_bytes * frame_bytes]
        if len(payload) % frame_bytes:
            raise BadPayloadError("bad_tokens", "part of a frame")
        frames = [payload[at : at + frame_bytes] for at in range(0, len(payload), frame_bytes)]
        stream.pending.extend(self.codes_in(frame, self.quantizers, "bad_tokens") for frame in frames)

    def take_artifact(self, payload: bytes) -> None:
        if self.state == IN_TOKENS:
            if self.broken == "ARTIFACT ends a token stream":
                self.the_stream().finished = True
                return
            raise BadPayloadError("out_of_place", "ARTIFACT inside a token stream")
        if self.state == SKIPPING:
            if not payload.startswith(b"MOSSNANO") or self.broken == "a bad stream is skipped until END":
                return
            self.end_stream()
        if self.state == IDLE:
            self.open(IN_ARTIFACT)
        elif not payload and self.broken == "an empty ARTIFACT ends it":
            self.take_end(b"")
            return
        self.artifact += payload
        stream = self.the_stream()
        if not b"MOSSNANO".startswith(self.artifact[:8]) and self.broken != "any eight bytes begin an artifact":
            raise BadPayloadError("bad_artifact", "this is no artifact")
        if len(self.artifact) < 32:
            return
        rate, channels, samples, quantizers, frames, codebook = struct.unpack_from("<6I", self.artifact, 8)
        codes = quantizers * frames
        end = 32 + (codes * max(1, codebook - 1).bit_length() + 7) // 8
        if end > MAX_ARTIFACT_BYTES:
            raise BadPayloadError("bad_artifact", "too long")
        if len(self.artifact) > end and self.broken != "bytes after an artifact are dropped":
            raise BadPayloadError("bad_artifact", "bytes after the end")
        if len(self.artifact) < end or (frames == 0 and self.broken == "an artifact of no frames waits for more"):
            return
        if self.broken == "any sample rate will do":
            rate = RATE
        if (rate, channels, codebook) != (RATE, CHANNELS, CODEBOOK) or not 1 <= quantizers <= QUANTIZERS:
            raise BadPayloadError("bad_artifact", "of another make")
        if samples > frames * FRAME_SAMPLES and self.broken != "original_samples are not checked":
            raise BadPayloadError("bad_artifact", "more samples than frames hold")
        row = self.codes_in(bytes(self.artifact[32:end]), codes, "bad_artifact")
        if self.broken == "artifacts are frame-major":
            in_order = [row[at : at + quantizers] for at in range(0, codes, quantizers)]
        else:
            in_order = [row[frame::frames] for frame in range(frames)]
        if not self.is_dropping():
            stream.pending.extend(in_order)
            stream.samples_left = None if self.broken == "artifacts are not trimmed" else samples
        stream.finished = True

    def codes_in(self, row: bytes, count: int, error_code: str) -> list[int]:
        number = int.from_bytes(row, "little")
        what = "TOKENS" if error_code == "bad_tokens" else "an artifact"
        if number >> (BITS * count) and self.broken != f"{what} may have bits in the padding":
            raise BadPayloadError(error_code, "bits in the padding")
        codes = [number >> (BITS * index) & ((1 << BITS) - 1) for index in range(count)]
        if any(code >= CODEBOOK for code in codes) and self.broken != f"{what} may hold any code":
            raise BadPayloadError(error_code, "a code out of range")
        return codes

    def take_ping(self, payload: bytes) -> None:
        if self.state == SKIPPING and self.broken == "PING is dropped in a bad stream":
            return
        if not payload and self.broken == "an empty PING is not echoed":
            return
        if self.broken == "CANCEL drops PINGs" and self.is_dropping():
            return
        self.put(PING, payload)

    def take_end(self, payload: bytes) -> None:
        if payload and self.broken == "END must be empty":
            raise BadPayloadError("bad_payload", "END must be empty")
        if self.state == IDLE:
            raise BadPayloadError("no_stream", "END without a stream")
        if self.state == IN_ARTIFACT and self.broken != "END cuts an artifact in silence":
            self.put_error("bad_artifact", "END inside an artifact")
        waiting = self.inbox[0][0] if self.inbox else None
        if self.broken == "END is forgotten when TOKENS wait" and waiting == TOKENS:
            self.close_stream()
            return
        if self.broken == "PING overtakes END" and waiting == PING:
            self.handle(*self.take_message())
        self.the_stream().finished = True

    def take_settings(self, payload: bytes) -> None:
        if self.broken != "SETTINGS take effect inside a stream":
            self.refuse_inside_a_stream()
        try:
            wanted = parse_object(payload)
        except BadPayloadError:
            if self.broken == "SETTINGS need no JSON":
                wanted = {}
            else:
                raise
        if self.broken == "CANCEL drops SETTINGS" and self.is_dropping():
            return
        if not wanted and self.broken == "SETTINGS without keys take all back":
            self.chunk_frames = None
        before = self.chunk_frames, self.quantizers
        try:
            for key, value in wanted.items():
                self.set(key, value)
        except BadPayloadError:
            if self.broken != "the good half of bad SETTINGS is taken":
                self.chunk_frames, self.quantizers = before
            raise
        self.put_handshake()

    def set(self, key: str, value: Any) -> None:
        most = 1001 if self.broken == "chunk_frames may be 1001" else 1000
        is_whole = type(value) is int
        if key == "chunk_frames" and value is None:
            if self.broken != "chunk_frames null changes nothing":
                self.chunk_frames = None
        elif key == "chunk_frames" and is_whole and 1 <= value <= most:
            self.chunk_frames = value
        elif key == "quantizers" and is_whole and 1 <= value <= QUANTIZERS:
            self.quantizers = value
        elif key in ("chunk_frames", "quantizers") or self.broken != "unknown SETTINGS are ignored":
            raise BadPayloadError("bad_settings", f"{key} {value!r}")

    def take_unknown(self, kind: int) -> None:
        if self.state == IDLE and self.broken == "unknown kinds between streams are passed over":
            return
        if self.state != IDLE and self.broken == "unknown kinds end a stream":
            self.the_stream().finished = True
        raise BadPayloadError("unknown_kind", f"kind {kind}")

    def refuse_inside_a_stream(self) -> None:
        if self.state != IDLE:
            raise BadPayloadError("out_of_place", "between streams only")

    def cancel(self, payload: bytes) -> None:
        stream = self.first_dropped or self.stream
        self.first_dropped = None
        if stream is None and self.broken == "CANCEL between streams drops stream 0":
            stream = Stream(0)
        if stream is not None and self.broken == "a dropped stream gets an END too":
            self.put_end(stream)
        kept_state = self.state
        self.close_stream()
        if self.broken == f"CANCEL leaves off {kept_state}":
            self.state, self.stream = kept_state, stream
        if self.broken == "CANCEL takes settings back":
            self.chunk_frames = None
        if stream is not None and self.broken == "CANCEL keeps the decoder's state":
            self.kept_memory = stream.memory
        if self.broken == "CANCELs that wait get one END" and any(kind == CANCEL for kind, _ in self.inbox):
            return
        encoding = "ascii" if self.broken == "CANCEL echoes ASCII" else "utf-8"
        self.put_end(stream, cancelled=True, echo=payload.decode(encoding, "replace"))
        if stream is not None and self.broken == "stale audio after the END of CANCEL":
            self.put(AUDIO, bytes(2 * FRAME_SAMPLES))

    def close(self) -> None:
        """No more input will come, and all of it was dealt with."""
        if self.state == IN_ARTIFACT and self.fault is None and self.broken != "a cut artifact goes unnoticed":
            self.fault = "bad_artifact", 65
        if self.fault is None and self.state == IN_TOKENS and self.broken == "the end of input drops the open stream":
            self.close_stream()
        code, status = self.fault or ("", 0)
        if self.stream is not None and not self.stream.finished:
            self.stream.finished = True
            if code in ("", "bad_artifact"):
                if code:
                    self.put_error(code, "the input ended", fatal=True)
                    self.fault = "", status
                return  # come back when the stream has ended
            # framing_lost and input_cut: what is whole first, then the ERROR, then END
            self.stream.finished = False
            for frames in iter(self.due_at_end, 0):
                self.decode(frames)
            self.put_error(code, "the input ended", fatal=True)
            self.fault = "", status
            if code == "input_cut" and self.broken == "a cut drops the open stream":
                self.close_stream()
            else:
                self.end_stream()
        elif code:
            self.put_error(code, "the input ended", fatal=True)
        if self.broken == "ends with 65 after any ERROR" and self.errors and status == 0:
            status = 65
        self.status = status

    # --- streams ---------------------------------------------------------------------------------

    def the_stream(self) -> Stream:
        assert self.stream is not None
        return self.stream

    def open(self, state: str) -> None:
        self.state = state
        self.stream = Stream(self.next_number)
        self.stream.memory, self.kept_memory = self.kept_memory, 7
        if self.broken == "chunks begin with 4":
            self.stream.wanted = 4
        self.next_number += 1
        self.artifact.clear()

    def close_stream(self) -> None:
        self.state = IDLE
        self.stream = None
        self.artifact.clear()

    def fail_stream(self, error: BadPayloadError) -> None:
        stream = self.the_stream()
        if not self.is_dropping():
            for frames in iter(self.due_frames, 0):
                self.decode(frames)
            self.put_error(error.code, str(error))
        stream.pending.clear()
        if self.broken == "bad TOKENS void what came before":
            stream.samples = 0
        if error.code == "bad_artifact" and self.broken == "a bad artifact takes no number":
            self.next_number -= 1
        if error.code == "bad_tokens" and not self.misfit and self.broken == "bad TOKENS are forgotten":
            return
        self.state = SKIPPING

    def end_stream(self) -> None:
        stream = self.the_stream()
        if not self.is_dropping():
            self.put_end(stream)
        if stream.frames == 9 and self.broken == "a stream of nine frames leaves a trace":
            self.kept_memory = stream.memory
        self.close_stream()

    def put_end(self, stream: Stream | None, **more: Any) -> None:
        fields: dict[str, Any] = {
            "stream": stream.number if stream else None,
            "frames": stream.frames if stream else 0,
            "samples": stream.samples if stream else 0,
            "cancelled": False,
            "errors": stream.errors if stream else 0,
            "next_stream": self.next_number,
            **more,
        }
        if self.broken == "END counts frames from 1":
            fields["frames"] += 1
        if stream and not more and self.broken == "an empty AUDIO before END":
            self.put(AUDIO, b"")
        self.put_json(END, fields)

    # --- decoding --------------------------------------------------------------------------------

    def due_frames(self) -> int:
        stream = self.stream
        if stream is None:
            return 0
        waiting = len(stream.pending)
        if self.broken == "a lone frame waits for a second" and not (stream.finished or stream.frames or waiting > 1):
            return 0
        if self.chunk_frames is None:
            return min(waiting, stream.wanted)
        is_whole = waiting >= self.chunk_frames or stream.finished
        return min(waiting, self.chunk_frames) if is_whole or self.broken == "chunk_frames is a maximum" else 0

    def due_at_end(self) -> int:
        waiting = len(self.the_stream().pending)
        return min(waiting, self.chunk_frames or self.the_stream().wanted)

    def decode(self, frames: int) -> None:
        stream = self.the_stream()
        samples = []
        for _ in range(frames):
            for code in stream.pending.popleft():
                stream.memory = (stream.memory * 31 + code + 1) % MODULUS
            level = 0 if self.broken == "silence, whatever the codes" else stream.memory
            samples += [(level + index) % MODULUS for index in range(FRAME_SAMPLES)]
        if stream.samples_left is not None:
            samples = samples[: stream.samples_left]
            stream.samples_left -= len(samples)
        stream.frames += frames
        stream.samples += len(samples)
        most = {"chunks do not grow": 1, "chunks grow once": 2}.get(self.broken, RAMP_FRAMES)
        stream.wanted = min(2 * stream.wanted, most)
        if samples:
            self.put(AUDIO, struct.pack(f"<{len(samples)}h", *samples))

    def frame_bytes(self) -> int:
        return (self.quantizers * BITS + 7) // 8

    # --- output ----------------------------------------------------------------------------------

    def handshake(self) -> dict[str, Any]:
        most = self.chunk_frames or RAMP_FRAMES
        fields: dict[str, Any] = {
            "protocol": 2 if self.broken == "it calls itself protocol 2" else 1,
            "name": "other-peer",
            "version": "0",
            "direction": "decode",
            "codec": "none",
            "weights": "none",
            "demo": True,
            "graph": "official",
            "precision": "float32",
            "provider": "cpu",
            "threads": 1,
            "sample_rate": RATE,
            "channels": CHANNELS,
            "sample_format": "s16le",
            "frame_samples": FRAME_SAMPLES,
            "quantizers": self.quantizers,
            "codebook_size": CODEBOOK,
            "frame_bytes": 4 if self.broken == "frame_bytes stays as it was" else self.frame_bytes(),
            "max_message_bytes": MAX_MESSAGE_BYTES,
            "max_audio_bytes": most * FRAME_SAMPLES * 2,
            "chunk_frames": self.chunk_frames,
            "max_chunk_frames": most,
            "a key you do not know": [],
        }
        if self.broken == "HANDSHAKE does not say the threads":
            del fields["threads"]
        if self.broken == "three first frames wait, it says":
            fields["first_chunk_frames"] = 3
        return fields

    def put_handshake(self) -> None:
        self.put_json(HANDSHAKE, self.handshake())
        self.put(0x66, b"a kind that you do not know")

    def put_error(self, code: str, text: str, *, fatal: bool = False) -> None:
        self.errors += 1
        if self.stream is not None:
            self.stream.errors += 1
        text = "" if self.broken == "ERROR has nothing to say to people" else text
        number = None if self.stream is None else self.stream.number
        self.put_json(ERROR, {"code": code, "message": text, "stream": number, "fatal": fatal})

    def put_json(self, kind: int, fields: dict[str, Any]) -> None:
        self.put(kind, json.dumps(fields).encode())

    def put(self, kind: int, payload: bytes) -> None:
        self.output += struct.pack("<IB", len(payload) + 1, kind) + payload


def parse_object(payload: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(payload)
    except ValueError as error:
        raise BadPayloadError("bad_payload", str(error)) from None
    if not isinstance(fields, dict):
        raise BadPayloadError("bad_payload", "no object")
    return fields


def main() -> None:
    broken = sys.argv[1] if len(sys.argv) > 1 else ""
    sigterm = signal.SIG_DFL if broken == "SIGTERM kills" else lambda *_: os._exit(143)
    sigint = signal.SIG_DFL if broken == "SIGINT kills" else lambda *_: os._exit(130)
    signal.signal(signal.SIGTERM, sigterm)
    signal.signal(signal.SIGINT, sigint)
    os._exit(OtherPeer(broken).run())


if __name__ == "__main__":
    main()
