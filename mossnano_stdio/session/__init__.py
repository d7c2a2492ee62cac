"""What messages mean: a conversation with one peer, in one of two directions.

Rules of this room:

- conversation.py holds what both directions have in common, decoding.py and encoding.py what is theirs: a transition
  table each, and the actions in it.
- Sans-IO: messages in, messages out. Time, threads, file descriptors and weights are not known here.
"""

from mossnano_stdio.session.conversation import Action, Conversation, State, error_message
from mossnano_stdio.session.decoding import DECODING, DecodeSession
from mossnano_stdio.session.encoding import ENCODING, EncodeSession

__all__ = [
    "DECODING",
    "ENCODING",
    "Action",
    "Conversation",
    "DecodeSession",
    "EncodeSession",
    "State",
    "error_message",
]
