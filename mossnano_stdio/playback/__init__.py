"""PCM -> the sound card: a bounded ring, filled by whoever decodes and emptied by the device's callback.

Rules of this room:

- Only this room uses sounddevice. It is imported inside functions, because its import starts PortAudio, which most
  users of this package neither have nor need.
- The callback takes no lock, waits for nothing, writes no log and allocates nothing but the small views of a slice.
  It writes the ring's read counter and the tallies; the pushing side writes the write counter and the wishes (end,
  drop, stop). Each value has one writer, so neither side ever waits for the other.
- Every pushed sample is played, in order, unless flush or abort drops it. A producer that comes late causes silence;
  no sample is lost.
- Counts are *samples* (one instant on all channels). The pushing side resamples, mixes and applies the volume, so
  the ring holds samples as the device takes them.

ring.py is the ring, feed.py fills the device's blocks from it, devices.py finds devices and their formats, convert.py
makes PCM fit the device, and player.py puts these together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mossnano_stdio.playback.devices import OutputDevice, output_devices
    from mossnano_stdio.playback.player import ALL, Latency, Player, ShouldStop

__all__ = ["ALL", "Latency", "OutputDevice", "Player", "ShouldStop", "output_devices"]


def __getattr__(name: str) -> Any:
    """Import the player when one of its names is first used."""
    # A process that plays nothing imports this package too, for the defaults of its flags.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mossnano_stdio.playback import devices, player

    return getattr(player if hasattr(player, name) else devices, name)
