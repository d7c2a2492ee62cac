"""build/random_weights.py: the true shape, the same every time, and nothing in it can be lost unheard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from mossnano_stdio.build.bundle import build_standin
from mossnano_stdio.build.checkpoint import shard_name
from mossnano_stdio.build.random_weights import SIZES, config
from mossnano_stdio.codecs import load_decoder, load_full_decoder
from mossnano_stdio.tokens import Codes
from mossnano_stdio.weights import load_bundle

ONE_STEP = 1 / 32768  # of 16-bit PCM

Tensors = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def tiny_standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standin")
    build_standin(folder, "tiny", seed=0)
    return folder


def random_codes(frames: int, seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(0, 1024, (frames, 16)).astype(np.uint16)


def test_nano_has_the_published_shape(nano_bundle: Path) -> None:
    with safe_open(nano_bundle / "checkpoint" / shard_name(1, 1), "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - it is no mapping
    assert len(shapes) == 374
    assert sum(int(np.prod(shape)) for shape in shapes) == 21_969_664


def test_tiny_has_the_reference_dimensions(tiny_reference: Path) -> None:
    reference = json.loads((tiny_reference / "config.json").read_text())
    for side in ("encoder_kwargs", "decoder_kwargs"):
        for ours, theirs in zip(config(SIZES["nano"]["tiny"])[side], reference[side], strict=True):
            assert ours.items() <= theirs.items()


def test_the_same_seed_is_the_same_model(tiny_standin: Path, tmp_path: Path) -> None:
    build_standin(tmp_path / "same", "tiny", seed=0)
    build_standin(tmp_path / "other", "tiny", seed=1)
    recorded = [
        json.loads((folder / "mossnano.json").read_text())["files"]
        for folder in (tiny_standin, tmp_path / "same", tmp_path / "other")
    ]
    assert recorded[0] == recorded[1]
    assert not {entry["sha256"] for name, entry in recorded[0].items() if name.endswith(".data")} & {
        entry["sha256"] for entry in recorded[2].values()
    }


def test_it_is_as_loud_as_music_and_does_not_clip(nano_bundle: Path) -> None:
    audio = load_full_decoder(load_bundle(nano_bundle)).decode(random_codes(30))
    assert 0.08 < audio.std() < 0.2
    assert np.abs(audio).max() < 0.9
    assert all(0.05 < piece.std() < 0.25 for piece in np.split(audio, 30))


def test_every_codebook_is_heard(nano_bundle: Path) -> None:
    decoder = load_decoder(load_bundle(nano_bundle), graph="official")
    codes = random_codes(2)
    plain = decoder.step(codes)
    for quantizer in range(16):
        changed = codes.copy()
        changed[0, quantizer] ^= 1
        decoder.reset()
        assert np.abs(decoder.step(changed) - plain).max() > 50 * ONE_STEP, quantizer


def zeroed(tensors: Tensors, name: str) -> Tensors:
    return {name: np.zeros_like(tensors[name])}


def forgotten(tensors: Tensors, name: str) -> Tensors:
    return {name: np.full_like(tensors[name], -1 if "positions" in name else 0)}


def newest_lost(tensors: Tensors, name: str) -> Tensors:
    lost = tensors[name].copy()
    lost[..., -1:, :] = 0
    return {name: lost}


def rolled(tensors: Tensors, name: str) -> Tensors:
    return {name: np.roll(tensors[name], 1, axis=2)}


def swapped_with_next(tensors: Tensors, name: str) -> Tensors:
    alike = [other for other in tensors if other != name and tensors[other].shape == tensors[name].shape]
    other = next(other for other in alike if not np.array_equal(tensors[other], tensors[name]))
    return {name: tensors[other], other: tensors[name]}


def counted_on(tensors: Tensors, name: str) -> Tensors:
    return {name: tensors[name] + 1}


DAMAGES: list[tuple[str, Callable[[Tensors, str], Tensors]]] = [
    ("attn_cached_keys", zeroed),
    ("attn_cached_keys", newest_lost),
    ("attn_cached_keys", rolled),
    ("attn_cached_keys", swapped_with_next),
    ("attn_cached_values", zeroed),
    ("attn_cached_values", newest_lost),
    ("attn_cached_values", rolled),
    ("attn_cached_values", swapped_with_next),
    ("attn_cached_positions", forgotten),
    ("attn_cached_positions", counted_on),
    ("attn_offset", zeroed),
    ("attn_offset", counted_on),
]


@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_no_state_is_lost_unheard(nano_bundle: Path, kind: str, damage: Callable[[Tensors, str], Tensors]) -> None:
    decoder = load_decoder(load_bundle(nano_bundle), graph="official")
    codes = random_codes(4)
    decoder.step(codes[:3])
    before = decoder.snapshot()
    plain = decoder.step(codes[3:])
    tensors = dict(before.tensors)
    names = [name for name in tensors if name.startswith(kind)]
    assert len(names) == 12
    for name in names:
        decoder.restore(type(before)(tensors | damage(tensors, name), before.next_frame))
        assert np.abs(decoder.step(codes[3:]) - plain).max() > 3 * ONE_STEP, name


def test_rounding_is_not_heard(nano_bundle: Path) -> None:
    bundle = load_bundle(nano_bundle)
    codes = random_codes(24)
    decoder = load_decoder(bundle, graph="official")
    stepped = np.concatenate([decoder.step(codes[frame : frame + 1]) for frame in range(24)])
    assert np.abs(stepped - load_full_decoder(bundle).decode(codes)).max() < 0.1 * ONE_STEP
