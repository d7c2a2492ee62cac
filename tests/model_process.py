"""The real process around the codec of streams_model.py: `python -m tests.model_process --max-streams 6`."""

from __future__ import annotations

import os
import sys

import numpy as np
from numpy.typing import NDArray

from mossnano_stdio.errors import DecodeError
from mossnano_stdio.process import loop, stdio
from mossnano_stdio.process.logs import flush_stderr
from mossnano_stdio.tokens import CodecFormat, Codes
from tests import streams_model as model

FORMAT = CodecFormat(model.RATE, model.CHANNELS, model.FRAME_SAMPLES, model.QUANTIZERS, model.CODEBOOK)


class DoubleOfTheModel:
    """As a decoder, what model.Codec is in the model."""

    format = FORMAT
    decodes_prefix = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._codec = model.Codec()

    def step(self, codes: Codes) -> NDArray[np.float32]:
        frames = codes.tolist()
        if any(frame[0] == model.FAILING for frame in frames):
            raise DecodeError("as it was told to")
        values = np.array([self._codec.values(tuple(frame)) for frame in frames], np.float32) / np.float32(32767)
        audio = np.repeat(values, model.FRAME_SAMPLES, axis=0)
        if any(frame[0] == model.NOT_FINITE for frame in frames):
            audio[-1, 0] = np.nan
        return audio


def main() -> None:
    signals = stdio.StopSignals()
    signals.install()
    status = loop.main(signals, sys.argv[1:], lambda options: loop.ready_to_decode(DoubleOfTheModel, {"demo": False}))
    flush_stderr()
    os._exit(status)


if __name__ == "__main__":
    main()
