"""The official graphs: `decode_step` with its state carried from run to run, and `decode_full` for reference.

Rules of this room:

- A decoder's state is one StreamState, and a new one replaces the old one after every run of a step succeeded. So a
  step that fails leaves the decoder where it was.
- Many decoders share one OfficialRuntime. Each belongs to one thread at a time.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.codecs.contract import check_audio, check_codes, check_decode_contract, codes_feed, joined
from mossnano_stdio.codecs.engine import Engine, open_session
from mossnano_stdio.codecs.memory import attention_bytes, check_fits
from mossnano_stdio.codecs.state import StreamState
from mossnano_stdio.tokens.format import CodecFormat, Codes
from mossnano_stdio.weights.folder import Bundle

MAX_RUN_FRAMES = 8  # more frames in one run cost more per frame, not less
ALWAYS_FITTING_FRAMES = 25  # two seconds as a whole need 64 MB of the official weights


class OfficialRuntime:
    """A loaded `decode_step`, shared by the decoders that it makes."""

    graph_name: Literal["official"] = "official"
    decodes_prefix = False  # its inputs are as wide as the codec has quantizers

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.session = open_session(bundle.graph("decode_step"), engine)
        self.states = self.session.graph.states
        self.precision = self.session.graph.precision
        check_decode_contract(self.session, self.format)

    def new_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    @cached_property
    def layer_context_frames(self) -> tuple[int, ...]:
        tokens_per_frame = self.tokens_per_frame
        return tuple(
            math.ceil(cache.context_tokens / tokens_per_frame[cache.offset_input_name]) for cache in self.bundle.caches
        )

    @cached_property
    def tokens_per_frame(self) -> dict[str, int]:
        """By the name of each counter's input: what one frame adds to it, found by decoding one."""
        decoder = self.new_decoder()
        decoder.step(np.zeros((1, self.format.quantizers), dtype=np.uint16))
        counted = decoder.snapshot().tensors
        return {
            state.input_name: int(counted[state.input_name].flat[0]) for state in self.states if state.shape == (1,)
        }


class StreamDecoder:
    """Frames in, samples out, chunk after chunk as if they came at once."""

    def __init__(self, runtime: OfficialRuntime) -> None:
        self.runtime = runtime
        self._state = StreamState.initial(runtime.states)
        self._names = [*runtime.session.graph.output_names, *(state.output_name for state in runtime.states)]

    @property
    def format(self) -> CodecFormat:
        return self.runtime.format

    @property
    def decodes_prefix(self) -> bool:
        return self.runtime.decodes_prefix

    @property
    def next_frame(self) -> int:
        return self._state.next_frame

    def step(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]."""
        check_codes(codes, self.format)
        state = self._state
        pieces = []
        for start in range(0, len(codes), MAX_RUN_FRAMES):
            audio, state = self._run(codes[start : start + MAX_RUN_FRAMES], state)
            pieces.append(audio)
        self._state = state
        return joined(pieces, self.format)

    def reset(self, start_frame: int = 0) -> None:
        """Forget everything. The next frame is the stream's first, or stands at `start_frame` of it."""
        state = StreamState.initial(self.runtime.states)
        self._state = state.starting_at(start_frame, self.runtime.tokens_per_frame) if start_frame else state

    def snapshot(self) -> StreamState:
        return self._state

    def restore(self, state: StreamState) -> None:
        self._state = state

    def _run(self, codes: Codes, state: StreamState) -> tuple[NDArray[np.float32], StreamState]:
        session = self.runtime.session
        feed = {**codes_feed(session, codes), **state.tensors}
        audio, lengths, *tensors = session.run(self._names, feed)
        check_audio(session, audio, lengths, len(codes), self.format)
        return audio[0].T, state.after(tensors, self.runtime.states, len(codes))


class FullDecoder:
    """A whole stream at once: the reference that stepping is held against."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle = bundle
        self.engine = engine
        self.format = bundle.format
        self.session = open_session(bundle.graph("decode_full"), engine)
        check_decode_contract(self.session, self.format)

    def decode(self, codes: Codes) -> NDArray[np.float32]:
        """[frames, quantizers] -> float32 [samples, channels]."""
        check_codes(codes, self.format)
        if not len(codes):
            return joined([], self.format)
        if len(codes) > ALWAYS_FITTING_FRAMES:
            check_fits(
                f"decoding {len(codes)} frames as a whole",
                attention_bytes(self.bundle, self._tokens_per_frame, len(codes)),
                "decode in steps (`--decoder step`), which takes the same memory for every length",
            )
        audio, lengths = self.session.run(self.session.graph.output_names, codes_feed(self.session, codes))
        check_audio(self.session, audio, lengths, len(codes), self.format)
        whole: NDArray[np.float32] = audio[0].T
        return whole

    @cached_property
    def _tokens_per_frame(self) -> dict[str, int]:
        return OfficialRuntime(self.bundle, self.engine).tokens_per_frame
