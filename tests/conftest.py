"""What several rooms' tests share: weights folders, and something to play on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.sound import FileDevice, SoundServer

REFERENCE = Path(__file__).parent / "reference" / "tiny"

# Doctests are looked for in every module, which imports it; this one needs torch, which no test of the usual run does.
collect_ignore = [] if find_spec("torch") else ["torch_export.py"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests look for weights, and remember hashes, in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSSNANO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.delenv("MOSSNANO_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_reference() -> Path:
    """A checkpoint with contexts of 4 to 10 frames, and what float32 torch makes of its codes and its wave."""
    return REFERENCE


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """The same weights in the official contract, as torch exports them."""
    return REFERENCE / "bundle"


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights once more, as we build them."""
    from mossnano_stdio.graph.assemble import save_bundle
    from mossnano_stdio.graph.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("built")
    save_bundle(folder, load_checkpoint(REFERENCE), name="tiny", checkpoint_name="tiny")
    return folder


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in with the published model's dimensions, built once."""
    from mossnano_stdio.graph.assemble import build_standin

    folder = tmp_path_factory.mktemp("nano")
    build_standin(folder, "nano", seed=0, trial=False)  # which takes seconds, and which tests do themselves
    return folder


@pytest.fixture
def file_device(tmp_path: Path) -> FileDevice:
    """A sound card that writes what it plays to a file."""
    return FileDevice(tmp_path)


@pytest.fixture(scope="session")
def sound_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoundServer]:
    """A sound server that plays in real time and can be recorded."""
    server = SoundServer(tmp_path_factory.mktemp("sound"), is_recorded=True)
    yield server
    server.stop()
