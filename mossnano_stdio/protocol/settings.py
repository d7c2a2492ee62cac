"""What can be set of a stream: how it is decoded, in which form its sound leaves, and how it takes turns with others.

Rules of this room:

- `Settings` is one value. It comes from flags, is changed by SETTINGS, and holds for the streams that open later; a
  numbered stream may change its own before its first input.
- Every value is checked here and nowhere else. One that is wrong changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from mossnano_stdio.chunks import MAX_CHUNK_FRAMES, Fixed, Schedule
from mossnano_stdio.errors import SettingsError
from mossnano_stdio.pcm import FORM_SETTINGS, SoundForm
from mossnano_stdio.tokens import CodecFormat

MAX_URGENCY: Final = 7  # the last
USUAL_URGENCY: Final = 3
MAX_WINDOW_SAMPLES: Final = 1 << 32


@dataclass(frozen=True)
class Settings:
    quantizers: int
    schedule: Schedule  # a stream gets a copy
    form: SoundForm
    first_chunk_frames: int = 1  # which the codec needs, whatever is set
    urgency: int = USUAL_URGENCY
    window_samples: int | None = None  # the first grant of a numbered stream; None: everything is granted

    @classmethod
    def of_codec(cls, codec: CodecFormat, schedule: Schedule, first_chunk_frames: int = 1) -> Settings:
        """Those that ask for nothing."""
        return cls(codec.quantizers, schedule, SoundForm.of_codec(codec), first_chunk_frames)

    def least_window_samples(self, codec: CodecFormat) -> int:
        """With less granted, a stream would stop for good: before its smallest chunk, or before what the resampler has
        kept until the end."""
        chunk_frames = max(self.schedule.maybe_chunk_frames or 1, self.first_chunk_frames)
        return self.form.most_samples(chunk_frames * codec.frame_samples, codec)


@dataclass(frozen=True)
class Rules:
    """What may be set in a conversation."""

    codec: CodecFormat
    new_ramp: Callable[[], Schedule]  # where no size of chunks is set
    check_quantizers: Callable[[int], None]  # a SettingsError where this codec does not do with so few
    encodes: bool = False
    maybe_fixed_form: str | None = None  # why the form of the sound cannot be changed

    @property
    def names(self) -> tuple[str, ...]:
        usual = ("quantizers", "chunk_frames")
        return (*usual, "urgency") if self.encodes else (*usual, *FORM_SETTINGS, "urgency", "window_samples")

    def changed(self, settings: Settings, fields: Mapping[str, Any]) -> Settings:
        """The settings with `fields` set."""
        for name, value in fields.items():
            if name not in self.names:
                known = ", ".join(map(repr, self.names[:-1]))
                raise SettingsError(f"SETTINGS has no {name!r}: only {known} and {self.names[-1]!r} can be set")
            match name:
                case "quantizers":
                    settings = replace(settings, quantizers=self._checked_quantizers(value))
                case "chunk_frames":
                    settings = replace(settings, schedule=self._checked_schedule(value))
                case "urgency":
                    if type(value) is not int or not 0 <= value <= MAX_URGENCY:
                        raise SettingsError(
                            f"urgency is {value!r}; a whole number from 0 (first) to {MAX_URGENCY} (last) is allowed"
                        )
                    settings = replace(settings, urgency=value)
                case "window_samples":
                    if value is not None and (type(value) is not int or not 1 <= value <= MAX_WINDOW_SAMPLES):
                        raise SettingsError(
                            f"window_samples is {value!r}; a whole number from 1 to {MAX_WINDOW_SAMPLES} is allowed, "
                            "or null for no limit"
                        )
                    settings = replace(settings, window_samples=value)
                case _:
                    settings = replace(settings, form=settings.form.changed(name, value, self.codec))
        if self.maybe_fixed_form is not None and set(fields) & set(FORM_SETTINGS):
            raise SettingsError(f"the form of the sound cannot be set: {self.maybe_fixed_form}")
        least = settings.least_window_samples(self.codec)
        if settings.window_samples is not None and settings.window_samples < least:
            raise SettingsError(
                f"window_samples is {settings.window_samples}; {least} samples may have to be sent at once and would "
                f"never fit: allowed is {least} or more"
            )
        return settings

    def _checked_quantizers(self, value: Any) -> int:
        most = self.codec.quantizers
        if type(value) is not int or not 1 <= value <= most:
            raise SettingsError(f"quantizers is {value!r}; a whole number from 1 to {most} is allowed")
        self.check_quantizers(value)
        return value

    def _checked_schedule(self, value: Any) -> Schedule:
        if value is None:
            return self.new_ramp()
        if type(value) is not int or not 1 <= value <= MAX_CHUNK_FRAMES:
            raise SettingsError(
                f"chunk_frames is {value!r}; a whole number from 1 to {MAX_CHUNK_FRAMES} is allowed, "
                "or null for the ramp"
            )
        return Fixed(value)
