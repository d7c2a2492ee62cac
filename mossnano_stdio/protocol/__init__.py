"""The protocol: messages as bytes, and what they mean in a conversation with one peer.

Rules of this room:

- messages.py is for everybody who speaks it, and imports next to nothing. connection.py holds what both directions of a
  conversation have in common, decoding.py and encoding.py what is theirs: a transition table each, and its actions.
- Sans-IO: messages in, messages out. Time, threads, file descriptors and weights are not known here.
"""
