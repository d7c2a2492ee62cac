"""The web client, as far as it needs no browser: `node --test` over client_web.test.mjs, with numpy's answers."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.weights import METADATA_NAME, SIDECAR_NAME, StateSpec, load_bundle
from tests.child import ROOT

FIELDS = ("sample_rate", "channels", "original_samples", "quantizers", "frames", "codebook_size")


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def artifact_case(rng: np.random.Generator, quantizers: int, frames: int, codebook_size: int) -> dict[str, Any]:
    codes = rng.integers(0, codebook_size, (frames, quantizers)).astype(np.uint16)
    artifact = Artifact(48_000, 2, 100, quantizers, frames, codebook_size, codes)
    header = {name: getattr(artifact, name) for name in FIELDS}
    return {"file": as_text(build_artifact(artifact)), "header": header, "codes": codes.reshape(-1).tolist()}


def beyond_its_codebook() -> bytes:
    """Of 9 entries, whose codes take 4 bits: code 9 can be written."""
    codes = np.zeros((3, 2), np.uint16)
    codes[2, 1] = 8
    data = bytearray(build_artifact(Artifact(48_000, 2, 100, 2, 3, 9, codes)))
    assert data[-1] >> 4 == 8  # the last of the last quantizer
    data[-1] |= 1 << 4
    return bytes(data)


def state_case(state: StateSpec) -> dict[str, Any]:
    return {
        "input": state.input_name,
        "output": state.output_name,
        "shape": list(state.shape),
        "dtype": state.dtype.name,
        "initial": state.initial,
    }


def loud_and_quiet(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Random values, values beyond full scale, and those that lie exactly between two steps."""
    ties = (np.arange(-40, 40) + 0.5) / 32_767
    audio = np.concatenate([rng.normal(0, 0.5, 4_000), [0, 1, -1, 1.5, -1.5], ties, np.nextafter(ties, 1)])
    return np.resize(audio, (len(audio) // 2, 2)).astype(np.float32)


def wav_of(pcm: bytes) -> bytes:
    import wave  # Python's own, not ours

    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(2)
        writer.setsampwidth(2)
        writer.setframerate(48_000)
        writer.writeframes(pcm)
    return file.getvalue()


def test_everything_that_needs_no_browser(tiny_bundle: Path, built_bundle: Path, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    rng = np.random.default_rng(5)
    audio = loud_and_quiet(rng)
    pcm = to_pcm16(audio)
    bundle = load_bundle(tiny_bundle)
    shapes = [(16, 3, 1024), (32, 5, 2048), (1, 1, 2), (3, 7, 65_536), (5, 0, 9)]
    cases = {
        "artifacts": [artifact_case(rng, *shape) for shape in shapes],
        "beyond": as_text(beyond_its_codebook()),
        "audio": as_text(audio.tobytes()),
        "pcm": as_text(pcm),
        "wav": as_text(wav_of(pcm)),
        "official": {
            "metadata": json.loads((tiny_bundle / METADATA_NAME).read_text()),
            "states": [state_case(state) for state in bundle.graphs["decode_step"].states],
        },
        "format": vars(bundle.format) | {"frame_bytes": bundle.format.frame_bytes},
        "built": {
            "sidecar": json.loads((built_bundle / SIDECAR_NAME).read_text()),
            "metadata": json.loads((built_bundle / METADATA_NAME).read_text()),
        },
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        ["node", "--test", "tests/client_web.test.mjs"],
        cwd=ROOT,
        env={**os.environ, "MOSSNANO_WEB_CASES": str(tmp_path / "cases.json")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout
    assert "# tests 18" in done.stdout
