"""The process, the tools and the clients on Windows: run under wine, from Linux.

.ci/wine DIR makes a Windows Python, $MOSSNANO_WINE names DIR. What this checkout gives there is what it gives here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.tools.freeze import EPOCH
from tests.child import DEMO, ROOT, Child, decoded, encoded, pcm_of, run
from tests.conftest import REFERENCE
from tests.sound import FileDevice, without_silence

WINE = os.environ.get("MOSSNANO_WINE", "")
PYTHON = f"{WINE}/python/python.exe"
PROCESS = ["wine", PYTHON, "-m", "mossnano_stdio"]
MELODY = ROOT / "mossnano_stdio" / "demo" / "melody.bin"
PATIENCE_SECONDS = 120

pytestmark = pytest.mark.skipif(not WINE, reason="wine is not set up: $MOSSNANO_WINE names no Windows Python")


@pytest.fixture(autouse=True, scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a process is started with there, its cache included."""
    os.environ |= {
        "WINEPREFIX": f"{WINE}/prefix",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "winedbg.exe,explorer.exe=d",  # started by the first who needs them, they keep its pipes
        "PYTHONPATH": f"Z:{ROOT}".replace("/", "\\"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MOSSNANO_CACHE": f"Z:{tmp_path_factory.mktemp('cache')}".replace("/", "\\"),
    }


def on_windows(
    *arguments: str | Path, stdin: bytes = b"", cwd: Path = ROOT, patience: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[bytes]:
    """All three streams are pipes: this Python takes nothing else."""
    command = ["wine", PYTHON, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, cwd=cwd, timeout=patience, check=False
    )  # fmt: skip


def tool(
    *arguments: str | Path, stdin: bytes = b"", cwd: Path = ROOT, patience: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[bytes]:
    return on_windows("-m", "mossnano_stdio.cli", *arguments, stdin=stdin, cwd=cwd, patience=patience)


# --- the process -------------------------------------------------------------------------------------------------


def test_the_melody_is_the_same_to_the_last_bit() -> None:
    arguments = ["--weights", "demo", "--chunk-frames", "8"]
    here = run([*DEMO, "--chunk-frames", "8"], MELODY.read_bytes())
    there = on_windows("-m", "mossnano_stdio", *arguments, stdin=MELODY.read_bytes())
    assert there.returncode == 0, there.stderr
    assert pcm_of(decoded(there.stdout)) == pcm_of(decoded(here.stdout))
    assert [kind for kind, _ in decoded(there.stdout)] == [kind for kind, _ in decoded(here.stdout)]


@pytest.mark.parametrize("graph", ["official", "fast"])
def test_real_graphs_sound_the_same(built_bundle: Path, graph: str) -> None:
    wire = encoded(Message(Kind.TOKENS, bytes(range(240))), Message(Kind.END))
    arguments = ["--weights", str(built_bundle), "--graph", graph, "--threads", "1", "--output", "raw"]
    here = run([*DEMO[:-2], *arguments, "--chunk-frames", "4"], wire)
    there = run([*PROCESS, *arguments, "--chunk-frames", "4"], wire)
    assert there.returncode == here.returncode == 0
    assert len(there.stdout) == len(here.stdout) == 12 * 15360
    # Another compiler made that onnxruntime, so the last bit of a float may differ.
    steps = [
        abs(a - b) for a, b in zip(memoryview(there.stdout).cast("h"), memoryview(here.stdout).cast("h"), strict=True)
    ]
    assert max(steps) <= 1


@pytest.mark.parametrize(
    ("arguments", "wire", "status"),
    [
        (["--weights", "demo"], b"", 0),
        (["--nosuch"], b"", 2),
        (["--weights", "demo"], b"\x15\x00\x00\x00\x04" + bytes(7), 65),
        (["--weights", "nowhere"], b"", 66),
        (["--weights", "demo"], b"\xff\xff\xff\xff\x04", 76),
    ],
)
def test_it_ends_with_the_statuses_of_the_page(arguments: list[str], wire: bytes, status: int) -> None:
    assert on_windows("-m", "mossnano_stdio", *arguments, stdin=wire).returncode == status


def test_a_reader_who_leaves_while_it_writes() -> None:
    with Child([*PROCESS, "--weights", "demo"]) as child:
        child.say(Message(Kind.TOKENS, bytes(20 * 500)))
        assert child.process.stdout
        child.process.stdout.read(100)
        child.process.stdout.close()
        assert child.process.wait(PATIENCE_SECONDS) == 141


# A pipe between two programs of Windows: one that leads out of wine cannot be asked whether it has a reader.
IDLE = """
import subprocess, sys
command = [sys.executable, "-m", "mossnano_stdio", "--weights", "demo"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
child.stdout.read(5)
child.stdout.close()
print(child.wait(60))  # and its stdin stays open
"""


def test_a_reader_who_leaves_while_nothing_happens() -> None:
    assert on_windows("-c", IDLE).stdout.strip() == b"141"


def test_a_log_that_nobody_reads_stops_no_sound() -> None:
    bad, good = Message(Kind.SETTINGS, b"x" * 1000), Message(Kind.TOKENS, bytes(20))
    with Child([*PROCESS, "--weights", "demo"]) as child:  # whose stderr is a pipe that is read at the end
        child.until(Kind.HANDSHAKE)
        for _ in range(2000):  # a log line each, far more than a pipe holds
            child.say(bad)
            child.until(Kind.ERROR)
        child.say(good, Message(Kind.END))
        assert len(child.until(Kind.AUDIO)[-1].payload) == 15360


def test_terminate_is_the_status_that_windows_gives() -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'mossnano_stdio', '--weights', 'demo'],\n"
        "                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "child.stdout.read(5); child.terminate(); print(child.wait())"
    )
    assert on_windows("-c", program).stdout.strip() == b"1"


# --- Ctrl-C: its handler runs in a thread of the system's, as this one does -------------------------------------------

PRESSED = """
import signal, sys, threading
from mossnano_stdio.__main__ import run
from mossnano_stdio.process import stdio
threading.Timer(float(sys.argv.pop(2)), signal.raise_signal, [getattr(signal, sys.argv.pop(1))]).start()
run()
"""


@pytest.mark.parametrize(("key", "status"), [("SIGINT", 130), ("SIGBREAK", 143)])
@pytest.mark.parametrize("what", ["loading", "waiting", "writing"])
def test_ctrl_c_and_ctrl_break(key: str, status: int, what: str) -> None:
    seconds = "0.3" if what == "loading" else "4"
    command = ["wine", PYTHON, "-c", PRESSED, key, seconds, "--weights", "demo"]
    with Child(command) as child:
        if what == "writing":
            child.say(Message(Kind.TOKENS, bytes(20 * 500)))  # 7 MB of sound that nobody takes
        assert child.process.wait(PATIENCE_SECONDS) == status


# --- tools, clients, and the kit -------------------------------------------------------------------------------------


def test_the_conformance_kit_finds_nothing() -> None:
    command = ["--", PYTHON, "-m", "mossnano_stdio", "--weights", "demo"]
    kit = tool("conformance", "--timeout", "60", "--jobs", "2", *command, patience=900)  # a process for each case
    assert kit.returncode == 0, kit.stdout.decode()
    assert b" 0 failed" in kit.stdout


def test_files_have_no_carriage_returns(tmp_path: Path) -> None:
    assert tool("standin", "there", "--size", "tiny", cwd=tmp_path).returncode == 0
    subprocess.run(
        [sys.executable, "-m", "mossnano_stdio.cli", "standin", "here", "--size", "tiny"], cwd=tmp_path, check=True
    )
    texts = list((tmp_path / "there").rglob("*.json"))
    assert len(texts) == 4
    for path in texts:
        assert b"\r" not in path.read_bytes()
    weights = "checkpoint/model-00001-of-00001.safetensors"
    assert (tmp_path / "there" / weights).read_bytes() == (tmp_path / "here" / weights).read_bytes()
    assert tool("check", "there", cwd=tmp_path).returncode == 0


def test_names_of_any_language_reach_a_pipe(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mossnano_stdio" / "demo" / "melody.mossnano", tmp_path / "日本.mossnano")
    for name in ("日本.wav", "same.wav"):
        assert tool("decode", "--weights", "demo", "日本.mossnano", name, cwd=tmp_path).returncode == 0
    compared = tool("compare", "日本.wav", "same.wav", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "日本.wav" in compared.stdout.decode()
    piped = tool("frame", "日本.mossnano", cwd=tmp_path)
    assert (
        piped.stdout
        == run([sys.executable, "-m", "mossnano_stdio.cli", "frame", str(MELODY.with_suffix(".mossnano"))]).stdout
    )


@pytest.mark.parametrize(
    "arguments",
    [["mossnano_stdio.cli", "play", "--raw"], ["mossnano_stdio", "--weights", "demo", "--play", "--output", "none"]],
    ids=["the tool", "the process"],
)
def test_sound_is_played_to_the_sample(file_device: FileDevice, arguments: list[str]) -> None:
    """By the PortAudio of Windows, on wine's sound card, which is one of ALSA's here."""
    melody = MELODY.read_bytes()
    pcm = run([*DEMO, "--output", "raw"], melody).stdout
    command = ["wine", PYTHON, "-m", *arguments, "--prebuffer-ms", "all"]
    no_other_card = {"WINEDLLOVERRIDES": f"{os.environ['WINEDLLOVERRIDES']};winepulse.drv=d"}
    wire = pcm if "--raw" in arguments else melody
    done = run(command, wire, env=file_device.environment | no_other_card)
    assert done.returncode == 0, done.stderr.decode()
    heard = np.frombuffer(pcm, "<i2").reshape(-1, 2)
    # Where the machine is busy, wine lets its card go hungry for a moment, which is silence more and no sound less.
    assert np.array_equal(without_silence(file_device.played()), without_silence(heard))


CLIENTS = """
import asyncio, hashlib
from mossnano_stdio.client import AsyncDecoder, Decoder
frames = bytes(range(200)) * 5

def blocking():
    with Decoder(weights="demo", arguments=["--chunk-frames", "8"]) as decoder:
        stream = decoder.feed(frames)
        decoder.finish()
        return b"".join(stream)

async def awaited():
    async with AsyncDecoder(weights="demo", arguments=["--chunk-frames", "8"]) as decoder:
        stream = await decoder.feed(frames)
        decoder.finish()
        return b"".join([pcm async for pcm in stream])

print(hashlib.sha256(blocking()).hexdigest(), hashlib.sha256(asyncio.run(awaited())).hexdigest())
"""


def test_both_python_clients_hear_the_same() -> None:
    here = run([*DEMO, "--output", "raw", "--chunk-frames", "8"], encoded(Message(Kind.TOKENS, bytes(range(200)) * 5)))
    there = on_windows("-c", CLIENTS)
    assert there.returncode == 0, there.stderr.decode()
    assert there.stdout.decode().split() == 2 * [hashlib.sha256(here.stdout).hexdigest()]


@pytest.mark.skipif(shutil.which("x86_64-w64-mingw32-gcc") is None, reason="mingw is not installed")
def test_the_c_client_is_compiled_and_hears_the_same(tmp_path: Path) -> None:
    client = ROOT / "mossnano_stdio" / "clients" / "c"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2"]
    compiler = ["x86_64-w64-mingw32-gcc", *flags, str(client / "example.c"), "-o", str(tmp_path / "example.exe")]
    subprocess.run(compiler, check=True)
    (tmp_path / "frames.bin").write_bytes(bytes(range(200)) * 5)
    command = ["wine", str(tmp_path / "example.exe"), "frames.bin", PYTHON, "-m", "mossnano_stdio", "--weights", "demo"]
    there = subprocess.run(
        [*command, "--chunk-frames", "8"], cwd=tmp_path, stdin=subprocess.PIPE, capture_output=True, check=False
    )
    here = run([*DEMO, "--output", "raw", "--chunk-frames", "8"], encoded(Message(Kind.TOKENS, bytes(range(200)) * 5)))
    assert there.returncode == 0, there.stderr.decode()
    assert there.stdout == here.stdout


@pytest.mark.skipif(shutil.which("mcs") is None, reason="mcs is not installed")
def test_the_csharp_client_hears_a_process_on_windows(tmp_path: Path) -> None:
    """Mono runs on Linux here; what it starts and talks to is the process on Windows."""
    sources = [str(path) for path in (ROOT / "mossnano_stdio" / "clients" / "csharp").glob("*.cs")]
    subprocess.run(["mcs", f"-out:{tmp_path / 'Example.exe'}", *sources], check=True, capture_output=True)
    (tmp_path / "frames.bin").write_bytes(bytes(range(200)) * 5)
    command = ["mono", "Example.exe", "frames.bin", *PROCESS, "--weights", "demo", "--chunk-frames", "8"]
    there = subprocess.run(command, cwd=tmp_path, stdin=subprocess.PIPE, capture_output=True, check=False)
    here = run([*DEMO, "--output", "raw", "--chunk-frames", "8"], encoded(Message(Kind.TOKENS, bytes(range(200)) * 5)))
    assert there.returncode == 0, there.stderr.decode()
    assert there.stdout == here.stdout


def test_a_folder_without_python_is_made_there_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the README's recipe: the project is installed, not only found in its checkout."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(ROOT)], check=True)
    monkeypatch.setenv("PYTHONPATH", f"Z:{tmp_path / 'site'}".replace("/", "\\"))
    weights = REFERENCE / "bundle"
    made = tool("freeze", "voice", "--tools", "--weights", weights, cwd=tmp_path, patience=600)
    assert made.returncode == 0, made.stderr.decode()
    assert {path.name for path in tmp_path.iterdir()} == {"site", "voice"}
    manifest = json.loads((tmp_path / "voice" / "MANIFEST.json").read_bytes())
    assert manifest["platform"] == "win-amd64"
    assert all(manifest["licences"].values())
    assert sum(record["bytes"] for name, record in manifest["files"].items() if "weights/" not in name) < 100_000_000
    program = (tmp_path / "voice" / "mossnano-stdio.exe").read_bytes()
    header = int.from_bytes(program[0x3C:0x40], "little")  # of Windows' own, where the date of the program stands
    assert int.from_bytes(program[header + 8 : header + 12], "little") == EPOCH  # so a second run gives the same
    shutil.rmtree(tmp_path / "site")  # nor is it found there any more

    process = ["wine", str(tmp_path / "voice" / "mossnano-stdio.exe")]
    arguments = ["--weights", "demo", "--output", "raw", "--chunk-frames", "8"]
    there = run([*process, *arguments], MELODY.read_bytes())
    assert there.returncode == 0, there.stderr
    assert there.stdout == run([*DEMO[:-2], *arguments], MELODY.read_bytes()).stdout
    shaken = json.loads(decoded(run(process).stdout)[0].payload)
    assert shaken["weights"].endswith("voice\\weights")
    tools = run(["wine", str(tmp_path / "voice" / "mossnano.exe"), "--help"])
    assert b"  conformance  " in tools.stdout and b"  freeze  " not in tools.stdout
