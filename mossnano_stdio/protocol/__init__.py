"""The protocol: messages as bytes, and what they mean in a conversation with one peer.

Rules of this room:

- messages.py is for everybody who speaks it, so other rooms import it from here, and it imports next to nothing.
- Only the process holds a whole conversation, by side doors: connection.py has what belongs to a peer, decoding.py and
  encoding.py what a direction does its own way, a transition table each and its actions. stream.py has what belongs to
  one stream.
- Sans-IO: messages in, messages out. Time, threads, file descriptors and weights are not known here.
"""

from mossnano_stdio.protocol.messages import (
    INBOX_BYTES,
    LENGTH_BYTES,
    MAX_MARK_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NUMBER,
    MESSAGE_COST_BYTES,
    NUMBER_BYTES,
    NUMBERED,
    VERSION,
    Kind,
    Message,
    MessageReader,
    encode_message,
    in_stream,
    json_message,
    kind_name,
    out_of_stream,
    parse_json,
)

__all__ = [
    "INBOX_BYTES",
    "LENGTH_BYTES",
    "MAX_MARK_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_NUMBER",
    "MESSAGE_COST_BYTES",
    "NUMBERED",
    "NUMBER_BYTES",
    "VERSION",
    "Kind",
    "Message",
    "MessageReader",
    "encode_message",
    "in_stream",
    "json_message",
    "kind_name",
    "out_of_stream",
    "parse_json",
]
