"""mossnano-stdio: neural-codec tokens in, PCM out, at once.

>>> from mossnano_stdio import Codec
>>> with Codec.load("demo") as codec:
...     codec.decode([[0] * 16, [1] * 16]).shape
(2, 7680)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mossnano_stdio.library import Codec as Codec
    from mossnano_stdio.library import EncodedAudio as EncodedAudio

__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    """Codec and EncodedAudio, imported when they are asked for: the programs here do without."""
    if name in ("Codec", "EncodedAudio"):
        from mossnano_stdio import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
