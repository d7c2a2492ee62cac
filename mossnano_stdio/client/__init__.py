"""Runs a decoder in a process of its own for a Python program: `Decoder` for threads, `AsyncDecoder` for asyncio.

    with Decoder(weights="demo") as decoder:
        stream = decoder.feed(frames)  # [frames, quantizers], or packed bytes
        decoder.finish()
        for pcm in stream:  # bytes: PCM16, as it comes
            ...

Rules of this room:

- `Exchange` builds every message and reads every answer, without IO and without a lock. Both clients use it, and differ
  in how they wait.
- Neither side blocks the other for good. Feeding never waits: frames are queued here, and frames that would exceed
  `queue_bytes` are refused as a whole. Answers are read until `buffer_bytes` wait to be taken; then reading stops,
  unless a caller waits for an answer behind them.
- Voices go on side by side. Of each, no more than its window waits here, and one that nobody reads stops alone. A plain
  stream that nobody reads stops all of them, once `buffer_bytes` wait.
- `cancel` of a decoder ends every stream that was not read to its end, at once. What still comes of them is dropped.
- Streams that a process had not answered when it died are lost. Reading or feeding one of them raises
  DecoderDiedError, even when the next process runs already. The next stream starts a new process; with `restart`, the
  death itself does.
- After `close` there is no process, no thread and no descriptor left. (If the process has started others that outlive
  it and hold its pipes, those are not ended, and outside Windows a thread of `Decoder` waits for their end.)
"""

from __future__ import annotations

from mossnano_stdio.client.asynchronous import AsyncDecoder, AsyncStream, AsyncVoice
from mossnano_stdio.client.blocking import Decoder, Stream, Voice
from mossnano_stdio.client.state import (
    DecoderDiedError,
    DecoderError,
    Mark,
    NotReadyError,
    Played,
    QueueFullError,
    StreamEnd,
    StreamOverError,
)

__all__ = [
    "AsyncDecoder",
    "AsyncStream",
    "AsyncVoice",
    "Decoder",
    "DecoderDiedError",
    "DecoderError",
    "Mark",
    "NotReadyError",
    "Played",
    "QueueFullError",
    "Stream",
    "StreamEnd",
    "StreamOverError",
    "Voice",
]
