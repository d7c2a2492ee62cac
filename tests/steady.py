"""A decoder whose PCM is loud and steady, so that every click is seen: left 10,000, right -10,000, all the time.

A frame of it is 4 bytes, a number: so many samples are the answer, in one AUDIO. A frame of zero makes it die, after
two lines on stderr. END and CANCEL are answered as protocol.md says. It is run as a file, and imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import struct
import sys

HANDSHAKE = {
    "protocol": 1,
    "direction": "decode",
    "name": "steady",
    "version": "1.2",
    "demo": True,
    "sample_rate": 48000,
    "channels": 2,
    "frame_samples": 4,
    "quantizers": 4,
    "codebook_size": 256,
    "frame_bytes": 4,
    "max_audio_bytes": 1 << 20,
}


def say(kind: int, payload: bytes) -> None:
    os.write(1, struct.pack("<IB", len(payload) + 1, kind) + payload)


def end(*, cancelled: bool, echo: str = "") -> None:
    say(7, json.dumps({"cancelled": cancelled, "echo": echo}).encode())


def take(size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            sys.exit(0)
        data += piece
    return data


def decode(samples: int) -> None:
    if samples == 0:
        os.write(2, "dying: grün\r\nwithout a last line".encode())
        os._exit(3)
    say(1, struct.pack("<2h", 10_000, -10_000) * samples)


def main() -> None:
    os.write(2, b"loading\n")
    say(0, json.dumps(HANDSHAKE).encode())
    while True:
        length, kind = struct.unpack("<IB", take(5))
        payload = take(length - 1)
        if kind == 4:
            for (samples,) in struct.iter_unpack("<I", payload):
                decode(samples)
        elif kind == 7:
            end(cancelled=False)
        elif kind == 8:
            end(cancelled=True, echo=payload.decode())


if __name__ == "__main__":
    main()
