"""A decoder in a process of its own, for Python programs: `Decoder` for threads, `AsyncDecoder` for asyncio.

    with Decoder(weights="demo") as decoder:
        stream = decoder.feed(frames)  # [frames, quantizers], or packed bytes
        decoder.finish()
        for pcm in stream:  # bytes: PCM16, as it comes
            ...

Rules of this room:

- What is said and what an answer means is `Exchange`, sans-IO and without a lock. Both clients drive the same one, and
  differ only in how they wait.
- Nobody deadlocks. What is fed waits here as tokens, which are small, and never makes the caller wait: what would be
  more than `queue_bytes` is refused, whole. What comes back is read until `buffer_bytes` wait to be taken; then the
  process is left to wait, unless somebody here waits for something that stands behind them.
- `cancel` ends every stream that was not read to its end, at once. What still comes of them is dropped.
- A process that died takes with it what it had not answered. Who reads one of those streams, or feeds it, is told, also
  when the next process is there already. The next stream starts that, or with `restart` its death does.
- After `close` there is no process, no thread and no descriptor left.
"""

from __future__ import annotations

from mossnano_stdio.client.asynchronous import AsyncDecoder, AsyncStream
from mossnano_stdio.client.blocking import Decoder, Stream
from mossnano_stdio.client.exchange import (
    DecoderDiedError,
    DecoderError,
    NotReadyError,
    Played,
    QueueFullError,
    StreamEnd,
    StreamOverError,
)

__all__ = [
    "AsyncDecoder",
    "AsyncStream",
    "Decoder",
    "DecoderDiedError",
    "DecoderError",
    "NotReadyError",
    "Played",
    "QueueFullError",
    "Stream",
    "StreamEnd",
    "StreamOverError",
]
