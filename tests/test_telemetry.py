"""Nothing leaves the machine, and nothing is written but what was asked for.

onnxruntime reports to its maker unless it is told not to. Every program of ours that does not say so in its name runs
here as a user would start it, traced, with empty folders for HOME and for temporary files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from mossnano_stdio.cli import VERBS
from mossnano_stdio.protocol.messages import Kind, encode_message
from tests.child import DEMO, PROCESS
from tests.conftest import REFERENCE, skip_if_nothing_can_be_built
from tests.sound import missing_portaudio
from tests.tool import COMMAND

MELODY = Path(str(files("mossnano_stdio") / "demo" / "melody.mossnano"))
NO_CARD = 'pcm.!default { type file slave.pcm "nothing" file "/dev/null" format "raw" }\npcm.nothing { type null }\n'
SPEAK_TO_THE_NETWORK = {"fetch"}
TRACED_ELSEWHERE = {"freeze"}  # takes half a minute; see test_freeze.py
LISTEN_TO_THIS_MACHINE = {"web"}  # and to nobody else; see test_web.py

# On what lies in the folder; see `folder`.
COMMANDS: dict[str, list[str]] = {
    "info": ["info", "weights"],
    "pack": ["pack", "codes.npy", "packed.mossnano"],
    "unpack": ["unpack", "melody.mossnano", "unpacked.npy"],
    "frame": ["frame", "melody.mossnano", "--output", "framed.bin"],
    "unframe": ["unframe", "melody.out", "unframed.wav"],
    "compare": ["compare", "melody.wav", "melody.wav"],
    "decode": ["decode", "--weights", "weights", "tiny.mossnano", "decoded.wav"],
    "encode": ["encode", "--weights", "weights", "melody.wav", "encoded.mossnano"],
    "play": ["play", "--weights", "demo", "--prebuffer-ms", "10", "melody.mossnano"],
    "check": ["check", "weights"],
    "build": ["build", "--from-bundle", "weights", "built"],
    "standin": ["standin", "standin", "--size", "tiny"],
    "bench": ["bench", "--weights", "weights", "--turns", "1", "--threads", "1", "--chunks", "1"],
    "roundtrip": ["roundtrip", "--weights", "weights", "melody.wav", "again.wav"],
    "tokenize": ["tokenize", "melody.wav", "--to", "codes", "--form", "npy", "--weights", "stepping"],
    "detokenize": ["detokenize", "coded", "--to", "sounds", "--form", "wav", "--weights", "stepping"],
    "clients": ["clients", "c", "game"],
    "diagnose": ["diagnose", "tiny.mossnano", "tiny.wav", "--weights", "weights"],
    "protocol": ["protocol"],
    "conformance": ["conformance", "--case", "pings-are-echoed", "--", *DEMO],
}
TO_WAV = ["decode", "--weights", "weights", "tiny.mossnano", "tiny.wav"]
# What a verb needs beside that.
BEFORE = {
    "tokenize": [["standin", "stepping", "--size", "tiny"]],
    "detokenize": [
        ["standin", "stepping", "--size", "tiny"],
        ["tokenize", "melody.wav", "--to", "coded", "--form", "npy", "--weights", "stepping"],
    ],
}
IMPORTS = "import os; from mossnano_stdio.codecs.engine import import_onnxruntime as it; "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(REFERENCE / "bundle", folder / "weights")
    shutil.copy(REFERENCE / "codes.npy", folder / "codes.npy")
    shutil.copy(MELODY, folder)
    answer = subprocess.run([*DEMO], input=MELODY.with_suffix(".bin").read_bytes(), capture_output=True, check=True)
    (folder / "melody.out").write_bytes(answer.stdout)
    for words in (["pack", "codes.npy", "tiny.mossnano"], ["unframe", "melody.out", "melody.wav"], TO_WAV):
        subprocess.run([*COMMAND, *words], cwd=folder, check=True)
    return folder


def run_traced(command: list[str], folder: Path, tmp_path: Path, stdin: bytes = b"") -> tuple[str, set[str]]:
    """What it opened on the network, as strace writes it, and the files that it left where nobody named any."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    home, temporary, trace = tmp_path / "home", tmp_path / "temporary", tmp_path / "trace"
    home.mkdir()
    temporary.mkdir()
    (home / ".asoundrc").write_text(NO_CARD)
    forgotten = {"XDG_CACHE_HOME", "MOSSNANO_CACHE", "ORT_DISABLE_TELEMETRY"}
    environment = {name: value for name, value in os.environ.items() if name not in forgotten}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "JACK_NO_START_SERVER": "1"}
    traced = ["strace", "--follow-forks", "--trace=network", f"--output={trace}", *command]
    done = subprocess.run(
        traced, cwd=folder, env=environment, input=stdin, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    left = {str(path.relative_to(tmp_path)) for top in (home, temporary) for path in top.rglob("*") if path.is_file()}
    return trace.read_text("utf-8", "replace"), left - {"home/.asoundrc"}


def assert_quiet(command: list[str], folder: Path, tmp_path: Path, stdin: bytes = b"") -> None:
    trace, left = run_traced(command, folder, tmp_path, stdin)
    assert "exited with 0" in trace  # it was followed to its end
    assert [line for line in trace.splitlines() if "AF_INET" in line] == []
    assert left <= {"home/.cache/mossnano-stdio/verified.json"}  # which README and protocol.md name


def test_the_trace_sees_what_it_is_for(folder: Path, tmp_path: Path) -> None:
    program = "import os, socket; os.fork() or socket.socket(); open(os.environ['HOME'] + '/trail', 'w')"
    trace, left = run_traced([sys.executable, "-c", program], folder, tmp_path)
    assert "AF_INET" in trace
    assert left == {"home/trail"}


@pytest.mark.parametrize("weights", ["demo", "weights"])
def test_the_process_speaks_to_nobody_but_its_pipes(weights: str, folder: Path, tmp_path: Path) -> None:
    name = "melody.mossnano" if weights == "demo" else "tiny.mossnano"
    wire = encode_message(Kind.ARTIFACT, (folder / name).read_bytes())
    assert_quiet([*PROCESS, "--weights", weights, "--log-json"], folder, tmp_path, stdin=wire)


@pytest.mark.parametrize("verb", COMMANDS)
def test_no_tool_speaks_to_the_network(verb: str, folder: Path, tmp_path: Path) -> None:
    if verb == "play":
        pytest.importorskip("sounddevice", exc_type=ImportError)
        if missing := missing_portaudio():
            pytest.skip(missing)
    if verb in ("build", "standin", "diagnose", *BEFORE):
        skip_if_nothing_can_be_built()
    for words in BEFORE.get(verb, ()):
        subprocess.run([*COMMAND, *words], cwd=folder, check=True)
    assert_quiet([*COMMAND, *COMMANDS[verb]], folder, tmp_path)


def test_every_tool_was_looked_at() -> None:
    assert set(COMMANDS) | SPEAK_TO_THE_NETWORK | TRACED_ELSEWHERE | LISTEN_TO_THIS_MACHINE == set(VERBS)


def test_the_library_speaks_to_nobody(folder: Path, tmp_path: Path) -> None:
    program = "from mossnano_stdio import Codec; Codec.load('weights').decode([[0] * 16])"
    assert_quiet([sys.executable, "-c", program], folder, tmp_path)


def test_stderr_has_our_lines_only_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    """onnxruntime complained there, past our log, of a home that it could not write to."""
    environment = {**os.environ, "HOME": "/dev/null/home", "TMPDIR": "/dev/null/temporary"}
    command = [*PROCESS, "--weights", "weights", "--log-json"]
    wire = encode_message(Kind.ARTIFACT, (folder / "tiny.mossnano").read_bytes())
    done = subprocess.run(command, cwd=folder, env=environment, input=wire, capture_output=True, check=True, timeout=60)
    assert all(line.startswith(b'{"') for line in done.stderr.splitlines())


# --- a program that has us as a library ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (IMPORTS + "it(); print(os.environ.get('ORT_DISABLE_TELEMETRY'))", "None"),
        (IMPORTS + "os.environ['ORT_DISABLE_TELEMETRY'] = '0'; it(); print(os.environ['ORT_DISABLE_TELEMETRY'])", "0"),
    ],
    ids=["finds its environment as it was", "keeps what it has set itself"],
)
def test_a_program(program: str, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    assert done.stdout.strip() == expected
