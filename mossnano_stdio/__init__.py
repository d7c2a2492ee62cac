"""mossnano-stdio: neural-codec tokens in, PCM out, at once."""

from __future__ import annotations

__version__ = "1.0.0"
