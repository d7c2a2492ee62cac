"""The clients to copy, compiled and run against the real process: the same scenario for each, see tests/scenarios.

What a stream must sound like is what the process itself says to the same tokens in the same chunks. Godot is not to be
had here: of its client the brackets and the names that it asks the engine for are looked at, and its logic is run by
test_client_godot.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mossnano_stdio.protocol.messages import Kind, encode_message
from mossnano_stdio.tokens import pack_frames
from tests.child import DEMO, PROCESS, ROOT, run
from tests.doubles import NANO, some_frames, tokens_payload

CLIENTS = ROOT / "mossnano_stdio" / "clients"
SCENARIOS = ROOT / "tests" / "scenarios"
CHUNKED = [*DEMO, "--chunk-frames", "4"]
STREAMS = {"first": 21, "second": 200, "third": 10}  # frames

# A decoder that answers its first TOKENS and then dies, or never ends by itself; its HANDSHAKE is hard to read.
IMPOSTOR = r"""
import os, signal, struct, sys, time
def say(kind, payload):
    os.write(1, struct.pack("<IB", len(payload) + 1, kind) + payload)
open(sys.argv[2], "w").write(str(os.getpid()))
say(0, rb'''{"weights": "\"frame_bytes\": 1, {[ \\", "more": {"frame_bytes": 2, "list": [3, {"quantizers": 4}]},
 "x": null, "protocol" : 1, "direction":"decode", "sample_rate": 48000, "channels": 2,
 "frame_samples": 4, "quantizers": 4, "codebook_size": 1000, "frame_bytes": 5, "max_audio_bytes": 64, "later": true}''')
say(0x42, b"unknown")
os.read(0, 10)
say(5, rb'{"code":"peer_error","message":"gr\u00fcn \"and\" blue","stream":null,"fatal":false,"more":1}')
say(1, bytes(range(16)))
if sys.argv[1] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module", params=["c", "csharp", "node"])
def scenario(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of the scenario in one language, which MODE FOLDER RING_SECONDS COMMAND... are added to."""
    folder = tmp_path_factory.mktemp("built")
    return BUILDERS[request.param](folder, SCENARIOS)


def build_c(folder: Path, sources: Path) -> list[str]:
    needs("gcc")
    (source,) = sources.glob("*.c")
    flags = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-pthread", f"-I{CLIENTS / 'c'}"]
    subprocess.run(["gcc", *flags, source, "-o", folder / "built"], check=True)
    return [str(folder / "built")]


def build_csharp(folder: Path, sources: Path) -> list[str]:
    needs("mcs", "mono")
    (source,) = (path for path in sources.glob("*.cs") if path.name != "Mossnano.cs")
    built = folder / "built.exe"
    subprocess.run(
        ["mcs", "-warnaserror", "-warn:4", f"-out:{built}", source, CLIENTS / "csharp" / "Mossnano.cs"], check=True
    )
    return ["mono", str(built)]


def build_node(folder: Path, sources: Path) -> list[str]:
    needs("node")
    (source,) = (path for path in sources.glob("*.mjs") if path.name != "mossnano.mjs")
    return ["node", str(source)]


BUILDERS = {"c": build_c, "csharp": build_csharp, "node": build_node}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with the streams, packed and as codes, and the PCM that the process makes of each."""
    folder, pcm = tmp_path_factory.mktemp("streams"), {}
    for seed, (name, count) in enumerate(STREAMS.items()):
        frames = some_frames(count, NANO, seed)
        packed = tokens_payload(frames)
        (folder / f"{name}.tokens").write_bytes(packed)
        (folder / f"{name}.codes").write_bytes(
            struct.pack(f"<{count * 16}H", *(code for frame in frames for code in frame))
        )
        wire = encode_message(Kind.TOKENS, packed) + encode_message(Kind.END)
        pcm[name] = run([*CHUNKED, "--output", "raw"], wire).stdout
        assert len(pcm[name]) == count * NANO.frame_samples * 4
    return folder, pcm


def play(scenario: Sequence[str], mode: str, folder: Path, seconds: float, command: Sequence[object]) -> list[str]:
    """What the scenario printed."""
    done = subprocess.run(
        [*scenario, mode, str(folder), str(seconds), *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "MOSSNANO_CLIENT": str(CLIENTS / "node" / "mossnano.mjs")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("ring_seconds", [0.3, 20.0], ids=["a ring that fills", "a ring that does not"])
def test_two_streams_with_a_cancel_between_sound_as_the_process_says(
    scenario: list[str], expected: tuple[Path, dict[str, bytes]], tmp_path: Path, ring_seconds: float
) -> None:
    streams, pcm = expected
    for path in streams.iterdir():
        shutil.copy(path, tmp_path)
    said = play(scenario, "streams", tmp_path, ring_seconds, CHUNKED)
    assert said == ["format 48000 2 3840 16 1024 20 61440", "bad codes refused", "stopped"]
    heard = {name: (tmp_path / f"{name}.pcm").read_bytes() for name in STREAMS}
    for name in ("first", "third"):
        assert hashlib.sha256(heard[name]).digest() == hashlib.sha256(pcm[name]).digest(), name
    assert 80_000 <= len(heard["second"]) < len(pcm["second"]) / 2
    assert pcm["second"].startswith(heard["second"])


def test_a_dry_pull_is_silence_and_counts_in_the_middle_of_a_stream_only(
    scenario: list[str], expected: tuple[Path, dict[str, bytes]]
) -> None:
    streams, pcm = expected
    said = play(scenario, "dry", streams, 10, CHUNKED)
    assert said[1:] == ["underruns 0", "silent 1", "counted 1", "counted 0", "stopped"]
    assert pcm["first"].startswith((streams / "dry.pcm").read_bytes())


def test_a_program_that_is_not_there_is_said(scenario: list[str], tmp_path: Path) -> None:
    (said,) = play(scenario, "none", tmp_path, 1, ["no-such-decoder"])
    assert said.startswith("not started no-such-decoder cannot be started")
    assert "PATH" in said


def test_why_there_was_no_handshake_is_said(scenario: list[str], tmp_path: Path) -> None:
    (said,) = play(scenario, "none", tmp_path, 1, [*CHUNKED[:-4], "--weights", tmp_path / "nowhere"])
    assert said.startswith("not started")
    assert "nowhere" in said
    assert said.endswith("(bad_weights)")


def test_a_process_that_dies_is_said_and_nobody_hangs(scenario: list[str], tmp_path: Path) -> None:
    said = play(scenario, "dies", tmp_path, 1, [sys.executable, "-c", IMPOSTOR, "dies", tmp_path / "pid"])
    assert said[:2] == ["format 48000 2 4 4 1000 5 64", 'error peer_error 0 grün "and" blue']
    assert re.match("error process_ended 1 the process ended by itself with (status|signal) ", said[2])
    assert said[3:] == ["fed 0", "finished 0", "stopped"]
    assert (tmp_path / "dies.pcm").read_bytes() in (bytes(range(16)), b"")  # the death may be seen before it is pulled
    assert_gone(int((tmp_path / "pid").read_text()))


def test_a_process_that_does_not_end_is_ended(scenario: list[str], tmp_path: Path) -> None:
    said = play(scenario, "none", tmp_path, 1, [sys.executable, "-c", IMPOSTOR, "stays", tmp_path / "pid"])
    assert said[-1] == "stopped"
    assert_gone(int((tmp_path / "pid").read_text()))


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("client", BUILDERS)
def test_the_example_decodes_a_file(client: str, expected: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    streams, pcm = expected
    example = BUILDERS[client](tmp_path, CLIENTS / client)
    assert run([*example, str(streams / "first.tokens"), *CHUNKED]).stdout == pcm["first"]


@pytest.mark.parametrize("client", BUILDERS)
def test_the_example_decodes_mimi(client: str, mimi_standin: Path, tmp_path: Path) -> None:
    """In mono, with codes that begin inside a byte: whatever is not nano's number comes from the HANDSHAKE."""
    tokens = pack_frames(np.random.default_rng(0).integers(0, 2048, (11, 32)), 2048)
    (tmp_path / "tokens").write_bytes(tokens)
    command = [*PROCESS, "--weights", str(mimi_standin), "--threads", "1", "--chunk-frames", "4"]
    expected = run([*command, "--output", "raw"], encode_message(Kind.TOKENS, tokens)).stdout
    assert len(expected) == 2 * 11 * 1920
    assert run([*BUILDERS[client](tmp_path, CLIENTS / client), str(tmp_path / "tokens"), *command]).stdout == expected


# --- Godot -----------------------------------------------------------------------------------------------------------

# What the client and its example call of the engine, by its class reference for 4.3, with nothing else beside it.
GODOT_CALLS = {
    "OS": {"execute_with_pipe", "kill", "is_process_running", "delay_msec"},
    "FileAccess": {"get_buffer", "store_buffer", "close", "get_file_as_bytes"},
    "Thread": {"start", "wait_to_finish"},
    "Mutex": {"lock", "unlock"},
    "Time": {"get_ticks_msec"},
    "Semaphore": {"post", "wait"},
    "JSON": {"parse_string"},
    "Signal": {"emit", "connect", "get_connections"},
    "Callable": {"call_deferred"},
    "Array": {"append", "insert", "pop_front", "clear", "is_empty", "size"},
    "Dictionary": {"get", "is_empty", "erase", "values"},
    "PackedVector2Array": {"append", "append_array", "is_empty", "resize", "size", "slice"},
    "PackedByteArray": {
        "append_array", "decode_s16", "decode_s64", "decode_u32", "encode_u32", "encode_u64", "find",
        "get_string_from_utf8", "resize", "slice",
    },
    "String": {"trim_suffix", "to_ascii_buffer", "to_utf8_buffer"},
    "AudioStreamPlayer": {"play", "get_stream_playback"},
    "AudioStreamGeneratorPlayback": {"push_buffer", "get_frames_available"},
    "Object": {"new"},
    "global": {"push_error", "print", "str", "int", "float", "maxi", "mini", "minf", "floori", "ceili", "range",
               "Vector2", "PackedVector2Array", "PackedByteArray", "PackedInt32Array", "PackedStringArray",
               "warning_ignore"},
}  # fmt: skip
CLOSING = {")": "(", "]": "[", "}": "{"}


@pytest.mark.parametrize("path", sorted((CLIENTS / "godot").glob("*.gd")), ids=lambda path: path.name)
def test_gdscript_is_balanced_and_calls_what_there_is(path: Path) -> None:
    code = re.sub(r'"(?:\\.|[^"\\])*"', '""', path.read_text())
    code = re.sub(r"#.*", "", code)
    open_brackets = []
    for character in code:
        if character in "([{":
            open_brackets.append(character)
        elif character in CLOSING:
            assert open_brackets
            assert open_brackets.pop() == CLOSING[character]
    assert not open_brackets
    assert not re.search(r"^\t* +\S", code, re.M), "GDScript is indented with tabs"
    ours = set(
        re.findall(r"\b(?:func|signal) (\w+)", (CLIENTS / "godot" / "mossnano.gd").read_text() + path.read_text())
    )
    called = set(re.findall(r"\b(?!func\b|if\b|and\b|or\b|not\b|in\b)(\w+)\(", code))
    assert called <= ours | set().union(*GODOT_CALLS.values())
    assert set(re.findall(r"\bOS\.(\w+)", code)) <= GODOT_CALLS["OS"]
