"""Mixes several streams into one, for whoever has one loudspeaker for all of them.

Rules of this room:

- No clock is asked: the same sound in the same order is the same mix.
- A stream begins in the mix where the mix stands when its first sound comes. From then on it is not torn: the others
  wait for its sound, but not for longer than PATIENCE_SECONDS of theirs, and what comes later is mixed later.
- While a stream of the mix's own form is alone, it leaves as it came, to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from mossnano_stdio.pcm.form import Audio, Shaper, SoundForm
from mossnano_stdio.pcm.samples import to_pcm16
from mossnano_stdio.tokens import CodecFormat

# On top of the longest piece that came at once: streams that are decoded in turn are that far apart.
PATIENCE_SECONDS: Final = 1.0


class Mixer:
    """Takes the sound of streams, each by its number, and gives PCM16 of the mix as soon as it is settled.

    >>> form = SoundForm(sample_rate=48000, channels=1)
    >>> mixer = Mixer(form)
    >>> mixer.push(7, bytes.fromhex("0100 0200"), form).hex(" ", 2)
    '0100 0200'
    >>> mixer.push(8, bytes.fromhex("0500 0600"), form), mixer.push(7, bytes.fromhex("0300"), form).hex(" ", 2)
    (b'', '0800')
    >>> mixer.finish(8), mixer.finish(7).hex(" ", 2), mixer.is_idle
    (b'', '0600', True)
    """

    def __init__(self, form: SoundForm) -> None:
        """`form` has the rate and the channels of the mix."""
        self._form = SoundForm(form.sample_rate, form.channels, "f32le")
        self._voices: dict[int | None, _Voice] = {}
        self._heard: set[int | None] = set()  # the streams that gave sound since the mix was idle
        self._longest_samples = 0  # that came at once

    @property
    def is_idle(self) -> bool:
        """Is every stream over, and all of it in the mix?"""
        return not self._voices

    def is_all_of(self, number: int | None) -> bool:
        """Is there no sound of other streams in what was mixed since the mix was idle?"""
        return self._heard <= {number}

    def push(self, number: int | None, sound: bytes, form: SoundForm) -> bytes:
        """Sound of a numbered stream, in its own form; or of a plain one, whose number is None."""
        voice = self._voices.get(number)
        if voice is None:
            voice = self._voices[number] = _Voice(form, self._form)
        elif voice.is_over or voice.form != form:  # plain streams have one voice, and follow one another
            voice.finish()
            voice.begin(form)
        self._heard.add(number)
        is_alone = len(self._voices) == 1 and not len(voice.waiting)
        if is_alone and form == replace(self._form, sample_format="s16le") and not len(sound) % form.sample_bytes:
            self._longest_samples = max(self._longest_samples, len(sound) // form.sample_bytes)
            return sound
        self._longest_samples = max(self._longest_samples, voice.push(sound))
        return self._mix()

    def finish(self, number: int | None) -> bytes:
        """This stream is over. One that gave no sound needs no end."""
        if number in self._voices:
            self._voices[number].finish()
        return self._mix()

    def drop(self, number: int | None) -> bytes:
        """This stream was cancelled: what of it is not in the mix never will be."""
        self._voices.pop(number, None)
        return self._mix()

    def finish_all(self) -> bytes:
        """No more will come."""
        for voice in self._voices.values():
            voice.finish()
        return self._mix()

    def _mix(self) -> bytes:
        """What is settled: where all open streams have sound, and what no stream waits for any longer."""
        voices = self._voices.values()
        longest = max((len(voice.waiting) for voice in voices), default=0)
        settled = min((len(voice.waiting) for voice in voices if not voice.is_over), default=longest)
        patience = round(PATIENCE_SECONDS * self._form.sample_rate) + self._longest_samples
        mix = np.zeros((max(settled, longest - patience), self._form.channels), np.float32)
        for voice in voices:
            part, voice.waiting = voice.waiting[: len(mix)], voice.waiting[len(mix) :]
            mix[: len(part)] += part
        self._voices = {
            number: voice for number, voice in self._voices.items() if not voice.is_over or len(voice.waiting)
        }
        if self.is_idle:
            self._heard.clear()
        return to_pcm16(mix)


class _Voice:
    """One stream: what it gave and the mix has not."""

    def __init__(self, form: SoundForm, mix_form: SoundForm) -> None:
        self._mix_form = mix_form
        self.waiting: Audio = np.empty((0, mix_form.channels), np.float32)
        self.begin(form)

    def begin(self, form: SoundForm) -> None:
        self.form = form
        self.is_over = False
        # To a shaper, this stream's form is what a codec gives.
        self._shaper = Shaper(CodecFormat(form.sample_rate, form.channels, 1, 1, 2), self._mix_form)

    def push(self, sound: bytes) -> int:
        """Returns how many samples of the mix came of it."""
        return self._wait(self._shaper.push(self.form.as_floats(sound)).sound)

    def finish(self) -> None:
        if not self.is_over:
            self._wait(self._shaper.finish().sound)
        self.is_over = True

    def _wait(self, sound: bytes) -> int:
        audio = self._mix_form.as_floats(sound)
        self.waiting = np.concatenate([self.waiting, audio])
        return len(audio)
