"""Imports sounddevice, lists its devices, and finds the format that one of them takes.

Rules of this room:

- A missing sounddevice, PortAudio or device raises a DeviceError that says what to install or to choose.
- A device is asked which formats it takes before it is opened. Other channels are tried before another sample rate.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import ModuleType

from mossnano_stdio.errors import DeviceError
from mossnano_stdio.frozen import how_to_get

CHOOSE_ANOTHER = "choose another one with --device (`mossnano play --list-devices` shows them)"


@dataclass(frozen=True)
class OutputDevice:
    """A device with output channels, as PortAudio describes it."""

    index: int
    name: str
    host_api: str
    channels: int  # at most
    sample_rate: int  # its default
    is_default: bool


def import_sounddevice() -> ModuleType:
    try:
        import sounddevice
    except ImportError as error:
        raise DeviceError(f"playing needs sounddevice: {how_to_get('play')}") from error
    except OSError as error:
        raise DeviceError(
            f"playing needs the PortAudio library ({error}): on Debian and Ubuntu apt-get install libportaudio2, on "
            "Fedora dnf install portaudio; for Windows and macOS pip install sounddevice brings it along"
        ) from error
    module: ModuleType = sounddevice
    return module


def output_devices() -> list[OutputDevice]:
    """List the devices with output channels, in PortAudio's order; raise DeviceError where there is none."""
    sounddevice = import_sounddevice()
    host_apis = sounddevice.query_hostapis()
    default_index = sounddevice.default.device[1]
    devices = [
        OutputDevice(
            index=index,
            name=facts["name"],
            host_api=host_apis[facts["hostapi"]]["name"],
            channels=facts["max_output_channels"],
            sample_rate=round(facts["default_samplerate"]),
            is_default=index == default_index,
        )
        for index, facts in enumerate(sounddevice.query_devices())
        if facts["max_output_channels"] > 0
    ]
    if not devices:
        raise DeviceError(
            "there is no sound device to play on: PortAudio sees none. Plug one in, or start the sound server "
            "(PulseAudio and PipeWire are reached through ALSA's plugin, on Debian libasound2-plugins)"
        )
    return devices


def find_device(asked: int | str | None) -> OutputDevice:
    """Find the device by its index (also as digits in a text) or by a part of its name; None finds the default."""
    sounddevice = import_sounddevice()
    devices = output_devices()
    try:
        wanted = int(asked) if isinstance(asked, str) and asked.isdecimal() else asked
        index = sounddevice.query_devices(wanted, "output")["index"]
    except (ValueError, sounddevice.PortAudioError) as error:
        names = ", ".join(f"{device.index} {device.name}" for device in devices)
        named = "the default device" if asked is None else f"device {asked!r}"
        reason = " ".join(str(error).split())
        raise DeviceError(f"{named} cannot be played on ({reason}); --device takes one of: {names}") from error
    return next(device for device in devices if device.index == index)


def nearest_format(device: OutputDevice, sample_rate: int, channels: int) -> tuple[int, int]:
    """Return the sample rate and channels nearest to these in which the device takes 16-bit PCM."""
    sounddevice = import_sounddevice()
    for rate in dict.fromkeys((sample_rate, device.sample_rate, 48_000, 44_100)):
        for count in dict.fromkeys((channels, 2, 1)):
            if count > device.channels:
                continue
            with contextlib.suppress(sounddevice.PortAudioError):
                sounddevice.check_output_settings(device=device.index, samplerate=rate, channels=count, dtype="int16")
                return rate, count
    raise DeviceError(
        f"{device.name} takes no 16-bit PCM, neither at {sample_rate} Hz nor at {device.sample_rate} Hz, neither "
        f"stereo nor mono: is another program using it? If so end that one, or {CHOOSE_ANOTHER}"
    )
