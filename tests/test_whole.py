"""codecs/whole.py: the right codes and sound of whole files, and no run that would not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.codecs import Engine, whole
from mossnano_stdio.codecs.whole import FullDecoder, FullEncoder
from mossnano_stdio.errors import UsageError
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import load_bundle


@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "built_bundle"])
def test_encoder_goldens(bundle_name: str, tiny_reference: Path, request: pytest.FixtureRequest) -> None:
    wave, encoded = np.load(tiny_reference / "wave.npy"), np.load(tiny_reference / "encoded.npy")
    encoder = FullEncoder(load_bundle(request.getfixturevalue(bundle_name)), Engine.of(threads=1))
    found = encoder.encode(wave.T)
    whole_frames = wave.shape[1] // 3840
    assert (found[:whole_frames] == encoded[:whole_frames]).all()
    assert len(found) == whole_frames + 1, "the frame that was begun is kept"
    assert len(encoder.encode(wave.T[: 12 * 3840])) == 12
    assert encoder.encode(wave.T[:0]).shape == (0, 16)


def test_what_does_not_fit_is_refused_with_advice(
    tiny_bundle: Path, codes: Codes, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FullDecoder(load_bundle(tiny_bundle), Engine.of(threads=1))
    many = np.tile(codes, (5, 1))
    assert len(full.decode(many)) == len(many) * 3840
    monkeypatch.setattr(whole, "_free_bytes", lambda: 64 << 20)
    with pytest.raises(UsageError, match=r"decoding 120 frames as a whole needs about 1.4 GiB, 0.1 GiB are free"):
        full.decode(many)
    encoder = FullEncoder(load_bundle(tiny_bundle), Engine.of(threads=1))
    with pytest.raises(UsageError, match=r"encoding 120 frames as a whole .* build a streaming encoder"):
        encoder.encode(np.zeros((120 * 3840, 2), np.float32))


def test_free_memory_is_the_least_of_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "CGROUP", tmp_path)
    machine = whole._machine_bytes()
    assert machine and whole._free_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert whole._group_bytes() is None
    (tmp_path / "memory.max").write_text("3000000\n")
    assert whole._free_bytes() == 2_000_000


@pytest.mark.parametrize("wrong", [np.zeros((10, 1)), np.zeros(10), np.full((10, 2), np.nan), np.full((10, 2), np.inf)])
def test_audio_that_cannot_be_encoded(tiny_bundle: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"audio is \[|audio holds NaN"):
        FullEncoder(load_bundle(tiny_bundle), Engine.of(threads=1)).encode(wrong.astype(np.float32))
