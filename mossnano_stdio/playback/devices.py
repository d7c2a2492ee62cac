"""What there is to play on: sounddevice, its devices, and the format that one of them takes.

Rules of this room:

- Whatever is missing (sounddevice, PortAudio, a device) is a DeviceError that says what to install or to choose.
- A device is asked before it is opened, and the nearest format that it takes is taken: rather its channels changed
  than its sample rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from mossnano_stdio.errors import DeviceError

CHOOSE_ANOTHER = "choose another one with --device (`mossnano play --list-devices` shows them)"


@dataclass(frozen=True)
class OutputDevice:
    """A device that can be played on."""

    index: int
    name: str
    host_api: str
    channels: int  # at most
    sample_rate: int  # what it likes best
    is_default: bool


def import_sounddevice() -> ModuleType:
    try:
        import sounddevice
    except ImportError as error:
        raise DeviceError("playing needs sounddevice: pip install 'mossnano-stdio[play]'") from error
    except OSError as error:
        raise DeviceError(
            f"playing needs the PortAudio library ({error}): on Debian and Ubuntu apt-get install libportaudio2, on "
            "Fedora dnf install portaudio; for Windows and macOS pip install sounddevice brings it along"
        ) from error
    module: ModuleType = sounddevice
    return module


def output_devices() -> list[OutputDevice]:
    """Everything that can be played on, in PortAudio's order; at least one."""
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
    """The device with this index (a text of digits is one too), the one whose name holds this text, or the default."""
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
    """The sample rate and channels in which the device takes 16-bit PCM."""
    for rate in dict.fromkeys((sample_rate, device.sample_rate, 48_000, 44_100)):
        for count in dict.fromkeys((channels, 2, 1)):
            if _takes(device, rate, count):
                return rate, count
    raise DeviceError(
        f"{device.name} takes no 16-bit PCM, neither at {sample_rate} Hz nor at {device.sample_rate} Hz, neither "
        f"stereo nor mono: is another program using it? If so end that one, or {CHOOSE_ANOTHER}"
    )


def _takes(device: OutputDevice, sample_rate: int, channels: int) -> bool:
    sounddevice = import_sounddevice()
    if channels > device.channels:
        return False
    try:
        sounddevice.check_output_settings(device=device.index, samplerate=sample_rate, channels=channels, dtype="int16")
    except sounddevice.PortAudioError:
        return False
    return True
