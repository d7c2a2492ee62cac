"""The protocol: messages as bytes, and what they mean in a conversation with one peer.

Rules of this room:

- messages.py is for everybody who speaks it, and imports next to nothing. connection.py holds what belongs to a peer,
  stream.py what belongs to one stream, decoding.py and encoding.py what a direction does its own way: a transition
  table each, and its actions.
- Sans-IO: messages in, messages out. Time, threads, file descriptors and weights are not known here.
"""
