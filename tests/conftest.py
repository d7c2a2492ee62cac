"""What several rooms' tests share: weights folders, something to play on, and how the suite behaves on any machine."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

from mossnano_stdio.tokens import Codes
from tests.child import DEMO, LONG, LONG_FRAMES, run
from tests.doubles import NANO
from tests.sound import FileDevice, SoundServer

# How long an example takes says what else the machine does, not whether the code is right.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# A suite that a shell started in the background ignores Ctrl-C, and so would each process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By what the reason of a skipped test says: how to get it to run.
WAYS_TO_RUN_SKIPPED = {
    r"gcc is not": "apt-get install gcc libc6-dev",
    r"g\+\+ is not": "apt-get install g++",
    r"(mcs|mono) is not": "apt-get install mono-mcs mono-runtime",
    r"node is not": "apt-get install nodejs",
    r"building needs onnxruntime": "pip install 'onnxruntime>=1.24'",
    r"wine is not set up|mingw is not": "apt-get install wine64 wine gcc-mingw-w64-x86-64-win32, then .ci/wine",
    r"chromium is not|onnxruntime-web is not": "apt-get install chromium npm, and onnxruntime-web as .ci/run gets it",
    r"strace is not": "apt-get install strace",
    r"libportaudio2": "apt-get install libportaudio2 libasound2",
    r"pulseaudio|libasound2-plugins": "apt-get install pulseaudio pulseaudio-utils libasound2-plugins",
    r"namespaces cannot": "run it as root, or where users may make namespaces",
    r"the extra|could not import": "pip install --editable '.[test]'",
    r"no other provider": "where there is a GPU, pip install 'onnxruntime-gpu[cuda,cudnn]' in the place of onnxruntime",
    r"two CPUs": "let it use two CPUs (see taskset)",
    r"no git checkout": "run it in a git clone",
}

needs_symlinks = pytest.mark.skipif(
    sys.platform == "win32", reason="on Windows a symlink takes rights that few have, and wine has none that work"
)

REFERENCE = Path(__file__).parent / "reference" / "tiny"
ENCODEC_REFERENCE = REFERENCE.parent / "encodec"

# The files of a bundle.
STEP = "moss_audio_tokenizer_decode_step.onnx"
FULL = "moss_audio_tokenizer_decode_full.onnx"
SHARED = "moss_audio_tokenizer_decode_shared.data"
ENCODE = "moss_audio_tokenizer_encode.onnx"

# Doctests are looked for in every module, which imports it; this one needs torch, which no test of the usual run does.
collect_ignore = [] if find_spec("torch") else ["torch_export.py"]


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that these lines come after pytest's own
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    yield
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        terminalreporter.section("what was skipped, and how to get it")
    for way, count in Counter(map(way_to_run, reasons)).most_common():
        terminalreporter.write_line(f"{count} skipped: {way}")


def way_to_run(reason: str) -> str:
    """What to do about a skipped test; where nothing is known that would help, why it was skipped."""
    return next((way for words, way in WAYS_TO_RUN_SKIPPED.items() if re.search(words, reason)), reason)


def skip_if_nothing_can_be_built() -> None:
    """What is built is tried at once, and the fast graph needs more than the oldest onnxruntime that we run with."""
    from mossnano_stdio.codecs.engine import import_onnxruntime

    major, minor, *_ = import_onnxruntime().__version__.split(".")  # whichever package it comes from
    if (int(major), int(minor)) < (1, 24):
        pytest.skip("building needs onnxruntime 1.24 or later")


def repeated(few: int, many: int) -> pytest.MarkDecorator:
    """A test that is run `few` times in the gate and `many` times when there is time for it."""
    return pytest.mark.parametrize("times", [few, pytest.param(many, marks=pytest.mark.slow)])


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


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of them that may be spoilt."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle", copy_function=shutil.copyfile))


@pytest.fixture(scope="session")
def codes() -> Codes:
    """[24 frames, 16 quantizers]"""
    loaded: Codes = np.load(REFERENCE / "codes.npy")
    return loaded


@pytest.fixture(scope="session")
def audio() -> NDArray[np.float32]:
    """[samples, channels]: what torch makes of the codes"""
    loaded: NDArray[np.float32] = np.load(REFERENCE / "audio.npy").T
    return loaded


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights once more, as we build them."""
    skip_if_nothing_can_be_built()
    from mossnano_stdio.build.bundle import save_bundle
    from mossnano_stdio.build.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("built")
    save_bundle(folder, load_checkpoint(REFERENCE), name="tiny", checkpoint_name="tiny")
    return folder


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in with the published model's dimensions, built once."""
    from mossnano_stdio.build.bundle import build_standin

    folder = tmp_path_factory.mktemp("nano")
    build_standin(folder, "true", seed=0, trial=False)  # which takes seconds, and which tests do themselves
    return folder


@pytest.fixture(scope="session")
def mimi_standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mimi with codebooks as large as the published one's."""
    skip_if_nothing_can_be_built()
    from tests.tool import call_tool

    folder = tmp_path_factory.mktemp("weights") / "mimi"
    assert call_tool("standin", "--model", "mimi", "--size", "tiny", folder) == (0, f"{folder}\n".encode(), "")
    return folder


def save_encodec_checkpoint(folder: Path, model: str = "model24") -> Path:
    """The reference's tensors, in the names of EnCodec's own tool."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(dict(np.load(ENCODEC_REFERENCE / f"{model}.npz")), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def encodec24_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The causal reference's weights, as we build them."""
    return _built_encodec(tmp_path_factory.mktemp("encodec24"), "model24")


@pytest.fixture(scope="session")
def encodec48_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the reference that decodes segments."""
    return _built_encodec(tmp_path_factory.mktemp("encodec48"), "model48")


def _built_encodec(folder: Path, model: str) -> Path:
    skip_if_nothing_can_be_built()
    from mossnano_stdio.build.bundle import build_from_checkpoint

    build_from_checkpoint(save_encodec_checkpoint(folder / "checkpoint", model), folder)
    return folder


@pytest.fixture(scope="session")
def in_peace() -> bytes:
    """What the demo makes of LONG when nobody disturbs it. Its sound does not depend on how it is cut into chunks."""
    done = run([*DEMO, "--output", "raw"], LONG)
    assert len(done.stdout) == LONG_FRAMES * NANO.frame_pcm_bytes
    return done.stdout


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
