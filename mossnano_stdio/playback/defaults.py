"""The defaults of a player and of its flags. The flags must not load numpy or a sound card, so nothing is imported."""

from __future__ import annotations

from typing import Final

PREBUFFER_MS: Final = 160.0  # two frames of the codec: one plays while the next one is on its way
LATENCY_MS: Final = 100.0  # what ALSA proposes, 35, is too little for a callback in Python on a busy machine
MAX_VOLUME: Final = 4.0
