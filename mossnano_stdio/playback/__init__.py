"""PCM -> the sound card: a bounded ring, filled by whoever decodes and emptied by the device's callback.

Rules of this room:

- The only room that speaks sounddevice, and it is imported inside functions: its import wakes PortAudio, which
  most users of this package neither have nor need.
- The callback takes no lock, waits for nothing, writes no log and allocates nothing but the small views of a slice.
  It owns the ring's read counter and the tallies; whoever pushes owns the write counter and the wishes (end, drop,
  stop). Each value has one writer, so that neither side can ever keep the other from its work.
- Whatever was pushed is played, in order, sample by sample, or was dropped because somebody said flush or abort.
  A producer that comes late costs silence, never a sample.
- Counts are *samples* (one instant on all channels). The ring holds them as the device wants them: resampling,
  mixing and volume are the pushing side's work.

ring.py is the ring, feed.py what the callback does with it, devices.py what there is to play on, convert.py how PCM
is made to fit, player.py all of it together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mossnano_stdio.playback.devices import OutputDevice, output_devices
    from mossnano_stdio.playback.player import ALL, Latency, Player, ShouldStop

__all__ = ["ALL", "Latency", "OutputDevice", "Player", "ShouldStop", "output_devices"]


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: a process that plays nothing wants the defaults of its flags only."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mossnano_stdio.playback import devices, player

    return getattr(player if hasattr(player, name) else devices, name)
