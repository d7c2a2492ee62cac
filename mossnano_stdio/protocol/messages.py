"""Messages on the wire: `u32 length, little-endian` + `u8 kind` + payload, as protocol.md says.

Rules of this room:

- Sans-IO: bytes go in, messages come out, and the other way round. Nothing here reads, writes or waits.
- `MessageReader` answers with messages or with ProtocolError and nothing else, the same for every split of its input.
  What stands before a bad length is still answered.
- A length is judged as soon as its four bytes are there, before anything is allocated for it.
- What a payload means is not known here: that is the connection's business.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, Final, NamedTuple

from mossnano_stdio.errors import PayloadError, ProtocolError

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 1 << 20  # the default for the longest inbound message: its kind and its payload
INBOX_BYTES: Final = 4 << 20  # what may wait to be dealt with
MESSAGE_COST_BYTES: Final = 64  # what each waiting message counts on top of its own bytes

NUMBERED: Final = 0x80  # added to the kind of a message whose payload begins with the number of its stream
NUMBER_BYTES: Final = 4
MAX_NUMBER: Final = (1 << 32) - 1
MAX_MARK_BYTES: Final = 1000  # of the text of one MARK

LENGTH_BYTES: Final = 4
_HEADER = struct.Struct("<IB")
_LENGTH = struct.Struct("<I")
_ARTIFACT_START: Final = b"MOSS"  # the first bytes of a bare .mossnano, which as a length are more than a gigabyte


class Kind(IntEnum):
    """What a message is. The same number may mean something else in the other direction: protocol.md has both."""

    HANDSHAKE = 0x00  # who I am and which numbers we must agree on (JSON)
    AUDIO = 0x01  # PCM16LE, interleaved, whole samples
    TEXT = 0x02  # reserved, as in moshi-stdio
    ARTIFACT = 0x03  # bytes of one .mossnano, a stream of its own
    TOKENS = 0x04  # whole frames of packed codes
    ERROR = 0x05  # what went wrong (JSON)
    PING = 0x06  # echoed once all before it was dealt with
    END = 0x07  # the stream is over (JSON on the way out)
    CANCEL = 0x08  # drop all audio work, at once
    SETTINGS = 0x09  # how the streams to come are decoded, and in which form their sound leaves (JSON)
    CREDIT = 0x0A  # how many samples a numbered stream may have sent in all
    MARK = 0x0B  # a place in a stream, which comes back with its position in the sound
    LEVELS = 0x0C  # how loud the AUDIO that follows is


class Message(NamedTuple):
    """One unit on the wire. `kind` is a plain int: unknown kinds are messages too."""

    kind: int
    payload: bytes = b""

    @property
    def cost_bytes(self) -> int:
        """What it counts while it waits."""
        return len(self.payload) + MESSAGE_COST_BYTES


def in_stream(number: int, message: Message) -> Message:
    """The message as one of a numbered stream.

    >>> in_stream(7, Message(Kind.PING, b"hi"))
    Message(kind=134, payload=b'\\x07\\x00\\x00\\x00hi')
    """
    return Message(message.kind | NUMBERED, _LENGTH.pack(number) + message.payload)


def out_of_stream(message: Message) -> tuple[int, Message]:
    """The other way round: the number, and the message as one of a plain stream.

    >>> out_of_stream(Message(0x86, bytes.fromhex("07000000 6869")))
    (7, Message(kind=6, payload=b'hi'))
    """
    if len(message.payload) < NUMBER_BYTES:
        raise PayloadError(
            f"a message of kind 0x{message.kind:02x} has a payload of {len(message.payload)} bytes: "
            f"it begins with the {NUMBER_BYTES} bytes of its stream's number"
        )
    (number,) = _LENGTH.unpack_from(message.payload)
    return number, Message(message.kind & ~NUMBERED, message.payload[NUMBER_BYTES:])


class MessageReader:
    """Bytes in any pieces -> messages.

    >>> reader = MessageReader()
    >>> list(reader.feed(bytes.fromhex("03000000 06 6869 01")))
    [Message(kind=6, payload=b'hi')]
    >>> reader.incomplete_bytes
    1
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer = bytearray()

    @property
    def incomplete_bytes(self) -> int:
        """How many bytes of a message that is not whole have come in."""
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """The messages that `data` makes whole, in order. Take them all before feeding on."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= LENGTH_BYTES:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if not 1 <= length <= self._max_message_bytes:
                    raise self._framing_lost(length, start)
                end = start + LENGTH_BYTES + length
                if end > len(buffer):
                    return
                message = Message(buffer[start + LENGTH_BYTES], bytes(buffer[start + LENGTH_BYTES + 1 : end]))
                start = end
                yield message
        finally:
            del buffer[:start]

    def _framing_lost(self, length: int, start: int) -> ProtocolError:
        if self._buffer[start : start + LENGTH_BYTES] == _ARTIFACT_START:
            return ProtocolError(
                "the input is a bare .mossnano artifact, not a sequence of messages: "
                "frame it first, `mossnano frame FILE | mossnano-stdio`"
            )
        return ProtocolError(
            f"a message claims a length of {length} bytes; 1 to {self._max_message_bytes} are allowed "
            "(the peer lost count, sends something else, or needs a larger --max-message-bytes)"
        )


def encode_message(kind: int, payload: bytes | memoryview = b"") -> bytes:
    """One message as bytes, ready to be written.

    >>> encode_message(Kind.PING, b"hi").hex(" ")
    '03 00 00 00 06 68 69'
    """
    return b"".join((_HEADER.pack(len(payload) + 1, kind), payload))


def json_message(kind: Kind, fields: Mapping[str, Any]) -> Message:
    """A message whose payload is a JSON object, on one line, in ASCII.

    >>> json_message(Kind.SETTINGS, {"chunk_frames": 4})
    Message(kind=<Kind.SETTINGS: 9>, payload=b'{"chunk_frames":4}')

    What is no character (a path may have such bytes) would be an escape that strict readers refuse:

    >>> json_message(Kind.HANDSHAKE, {"weights": "/\\udcff"}).payload
    b'{"weights":"/?"}'
    """
    fields = {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in fields.items()
    }
    return Message(kind, json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii"))


def parse_json(message: Message) -> dict[str, Any]:
    """The JSON object that a payload holds.

    >>> parse_json(Message(Kind.END, b'{"stream":0}'))
    {'stream': 0}
    """
    try:
        fields = json.loads(message.payload)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the payload of {kind_name(message.kind)} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise PayloadError(
            f"the payload of {kind_name(message.kind)} is JSON, but a {type(fields).__name__} where an object belongs"
        )
    return fields


def kind_name(kind: int) -> str:
    """How a kind is called in messages to people.

    >>> kind_name(4), kind_name(0x42)
    ('TOKENS', 'kind 0x42')
    """
    try:
        return Kind(kind).name
    except ValueError:
        return f"kind 0x{kind:02x}"
