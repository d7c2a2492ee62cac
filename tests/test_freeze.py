"""`mossnano freeze`: what it refuses at once, and, behind the marker `freeze`, a folder that is made and run.

The README's own commands make the folder, once for all tests; a second one is made for comparison, under strace.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest

from mossnano_stdio.cli import VERBS
from mossnano_stdio.frozen import how_to_get
from mossnano_stdio.pcm import WavWriter
from mossnano_stdio.protocol.messages import Kind, Message
from mossnano_stdio.tools.freeze.licences import collect_licences
from mossnano_stdio.tools.freeze.recipe import PACKAGES, VERBS_LEFT_OUT
from mossnano_stdio.weights import published
from tests.child import DEMO, PROCESS, ROOT, decoded, encoded, run
from tests.conftest import REFERENCE
from tests.test_readme import run_block
from tests.tool import COMMAND, Outcome, call_tool, run_tool

OTHER_PEER = [sys.executable, "-I", "-S", str(ROOT / "tests" / "other_peer.py")]
MELODY = ROOT / "mossnano_stdio" / "demo" / "melody.bin"
README = (ROOT / "README.md").read_text("utf-8")
TINY_WIRE = encoded(Message(Kind.TOKENS, bytes(range(240))), Message(Kind.END))

MAX_BYTES, MAX_PACKED_BYTES = 100_000_000, 32_000_000  # without weights
START_TURNS, MAX_START_RATIO = 15, 1.2

freezes = pytest.mark.freeze


# --- what is refused before anything is made ------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    outcome = call_tool("freeze", *arguments)
    assert (outcome.status, outcome.out) == (2, b"")
    return outcome.error_line


@pytest.fixture(autouse=True)
def extra() -> None:
    pytest.importorskip("PyInstaller", reason="the extra `freeze` is not installed: pip install '.[freeze]'")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "game").mkdir()
    (tmp_path / "game" / "savegame").write_text("1")
    assert "holds something else" in refused(tmp_path / "game")
    (tmp_path / "game" / "MANIFEST.json").write_text('{"another": 1}')
    assert "holds something else" in refused(tmp_path / "game")
    assert "is no folder" in refused(tmp_path / "game" / "savegame")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["MANIFEST.json", "game", "savegame"]


def test_weights_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    outcome = call_tool("freeze", tmp_path / "voice", "--weights", tmp_path / "nowhere")
    assert outcome.status == 66
    assert outcome.error_line.endswith("--weights takes a weights folder, or 'demo'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only there something is done after PyInstaller")
def test_what_it_calls_on_linux_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(tmp_path / "voice").endswith(
        "freezing needs objdump, which is not installed: apt-get install binutils"
    )


def test_a_build_that_fails_says_why_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "site" / "PyInstaller"
    broken.mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "__main__.py").write_text("print('no disk'); raise SystemExit(3)")
    # The child looks into the checkout first, and then here.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "MANIFEST.json").write_text('{"mossnano-stdio": "0"}')
    outcome = call_tool("freeze", tmp_path / "voice")
    assert outcome.status == 74
    assert outcome.error_line == "mossnano freeze: error: PyInstaller failed with status 3: no disk"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "voice"]
    assert [path.name for path in (tmp_path / "voice").iterdir()] == ["MANIFEST.json"]


def test_a_frozen_program_does_not_advise_pip_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert how_to_get("plot") == "pip install 'mossnano-stdio[plot]'"
    monkeypatch.setattr("sys.frozen", True, raising=False)
    assert how_to_get("plot").startswith("a frozen folder has it not")


def test_the_published_weights_come_with_their_licence(tmp_path: Path) -> None:
    assert collect_licences({}, tmp_path, for_weights=True)["weights"] == ["Apache-2.0"]
    assert "Apache License" in (tmp_path / "weights" / "Apache-2.0").read_text("utf-8")
    assert published.LICENCE == "Apache-2.0"


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems nothing of the system is taken along")
def test_a_library_whose_package_nobody_knows_is_a_component_without_a_licence(tmp_path: Path) -> None:
    (tmp_path / "libours.so.1").touch()
    libraries = {"libours.so.1": str(tmp_path / "libours.so.1"), "numpy/x.so": np.__file__}
    found = collect_licences(libraries, tmp_path / "licences", for_weights=False)
    assert [component for component, files in found.items() if not files] == ["libours.so.1"]
    assert "weights" not in found


def test_what_is_left_out_are_verbs() -> None:
    assert set(VERBS_LEFT_OUT) < set(VERBS)


# --- one folder, made once ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands were run; the folder is called voice."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(REFERENCE / "bundle", place / "tiny-weights")
    (block,) = re.findall(r"^```text\npip install 'mossnano-stdio\[freeze\]'.*?\n(.*?)^```", README, re.M | re.S)
    (place / "tokens.bin").write_bytes(TINY_WIRE)
    assert run_block(block, place, timeout=600) == ""  # every licence was found
    return place


@pytest.fixture(scope="session")
def voice(place: Path) -> Path:
    return place / "voice"


@pytest.fixture(scope="session")
def manifest(voice: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((voice / "MANIFEST.json").read_bytes())
    return loaded


def frozen_tool(voice: Path, *arguments: object) -> Outcome:
    done = subprocess.run([voice / "mossnano", *map(str, arguments)], capture_output=True, timeout=120, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr.decode())


def files_of(folder: Path) -> dict[str, tuple[str, int, float]]:
    """Name -> SHA-256, mode and time."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            stat.S_IMODE(path.lstat().st_mode),
            path.lstat().st_mtime,
        )
        for path in sorted(folder.rglob("*"))
    }


@freezes
def test_the_readmes_process_has_decoded_with_the_weights_inside(place: Path) -> None:
    messages = decoded((place / "out.bin").read_bytes())
    handshake = json.loads(messages[0].payload)
    assert handshake["weights"] == str(place / "voice" / "weights")
    expected = run([*PROCESS, "--weights", str(REFERENCE / "bundle"), "--threads", "1"], TINY_WIRE)
    assert [message for message in messages if message.kind == Kind.AUDIO] == [
        message for message in decoded(expected.stdout) if message.kind == Kind.AUDIO
    ]


@freezes
def test_it_is_small(voice: Path, tmp_path: Path) -> None:
    files = [path for path in voice.rglob("*") if path.is_file() and "weights" not in path.relative_to(voice).parts[:1]]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    with tarfile.open(tmp_path / "voice.tar.xz", "w:xz", preset=1) as archive:  # the default packs it smaller
        for path in files:
            archive.add(path, path.relative_to(voice))
    assert (tmp_path / "voice.tar.xz").stat().st_size <= MAX_PACKED_BYTES


@freezes
def test_the_manifest_has_every_file_and_version(voice: Path, manifest: dict[str, Any]) -> None:
    found = {name: hashed for name, (hashed, _, _) in files_of(voice).items() if hashed and name != "MANIFEST.json"}
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == found
    assert all((voice / name).stat().st_size == record["bytes"] for name, record in manifest["files"].items())
    assert set(manifest["versions"]) == {"python", "numpy", "onnxruntime", "soxr", "pyinstaller"}
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["weights"] == {"name": "weights", "is_published": False}  # as these do not call themselves anything


@freezes
def test_everything_has_its_licence(voice: Path, manifest: dict[str, Any]) -> None:
    assert all(manifest["licences"].values())
    listed = {f"licences/{part}/{name}" for part, names in manifest["licences"].items() for name in names}
    assert listed == {name for name in manifest["files"] if name.startswith("licences/")}
    assert {"mossnano-stdio", "numpy", "onnxruntime", "soxr", "pyinstaller", "python"} <= set(manifest["licences"])
    assert "PSF" in "".join(path.read_text("utf-8") for path in (voice / "licences" / "python").iterdir())


@freezes
def test_nothing_is_in_it_that_only_happened_to_be_installed(voice: Path) -> None:
    from PyInstaller.archive.readers import CArchiveReader  # type: ignore[import-untyped]

    modules = CArchiveReader(str(voice / "mossnano")).open_embedded_archive("PYZ.pyz")
    assert {name.partition(".")[0] for name in modules.toc} - sys.stdlib_module_names == set(PACKAGES)
    assert [name for name in modules.toc if "_sysconfigdata" in name] == []
    paths = {path for name in modules.toc for path in code_paths(modules.extract(name))}
    assert paths and not [path for path in paths if Path(path).is_absolute()]
    for path in filter(Path.is_file, voice.rglob("*")):
        assert str(ROOT).encode() not in path.read_bytes(), path
        assert sys.prefix.encode() not in path.read_bytes(), path


def code_paths(maybe_code: object) -> Iterator[str]:
    if isinstance(maybe_code, CodeType):
        yield maybe_code.co_filename
        for constant in maybe_code.co_consts:
            yield from code_paths(constant)


# --- it sounds as it does here ---------------------------------------------------------------------------------------


@freezes
@pytest.mark.parametrize(
    "arguments",
    [
        ["--weights", "demo", "--chunk-frames", "8"],
        ["--weights", str(REFERENCE / "bundle"), "--threads", "1", "--chunk-frames", "3"],
    ],
    ids=["demo", "tiny"],
)
def test_its_samples_are_those_of_the_process_here(voice: Path, arguments: list[str]) -> None:
    wire = MELODY.read_bytes() if "demo" in arguments else TINY_WIRE
    there = run([str(voice / "mossnano-stdio"), *arguments, "--output", "raw"], wire)
    here = run([*PROCESS, *arguments, "--output", "raw"], wire)
    assert (there.returncode, here.returncode) == (0, 0)
    assert len(here.stdout) > 100_000
    assert there.stdout == here.stdout


@freezes
def test_it_resamples(voice: Path, tmp_path: Path) -> None:
    with (tmp_path / "in.wav").open("wb") as file:
        writer = WavWriter(file, 44_100, 2)
        writer.write(np.random.default_rng(0).integers(-9999, 9999, 2 * 44_100, dtype=np.int16).tobytes())
        writer.finish()
    arguments = ["encode", "--weights", REFERENCE / "bundle", "--threads", "1", tmp_path / "in.wav"]
    assert frozen_tool(voice, *arguments, tmp_path / "there.mossnano").status == 0
    assert run_tool(*arguments, tmp_path / "here.mossnano").status == 0
    assert (tmp_path / "there.mossnano").read_bytes() == (tmp_path / "here.mossnano").read_bytes()


@freezes
def test_its_own_weights_come_before_the_variable_and_after_the_flag(
    voice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSSNANO_WEIGHTS", str(REFERENCE / "bundle"))

    def weights_of(*arguments: str) -> str:
        shaken = decoded(run([str(voice / "mossnano-stdio"), *arguments]).stdout)[0]
        return str(json.loads(shaken.payload)["weights"])

    assert weights_of() == str(voice / "weights")
    assert weights_of("--weights", str(REFERENCE / "bundle")) == str(REFERENCE / "bundle")


# --- its tools ------------------------------------------------------------------------------------------------------


@freezes
def test_the_tools_are_those_that_need_no_python(voice: Path) -> None:
    page = frozen_tool(voice, "--help").out.decode()
    assert set(re.findall(r"^  ([a-z]+)  ", page, re.MULTILINE)) == set(VERBS) - set(VERBS_LEFT_OUT)
    outcome = frozen_tool(voice, "fetch")
    assert outcome.status == 2
    assert "invalid choice: 'fetch'" in outcome.err


@freezes
def test_every_tool_works(voice: Path, tmp_path: Path) -> None:
    shutil.copy(MELODY.with_suffix(".mossnano"), tmp_path)
    (tmp_path / "framed.out").write_bytes(run(DEMO, MELODY.read_bytes()).stdout)
    melody, codes, sound = tmp_path / "melody.mossnano", tmp_path / "codes.npy", tmp_path / "melody.wav"
    for arguments in (
        ["info", melody],
        ["unpack", melody, codes],
        ["pack", codes, tmp_path / "again.mossnano"],
        ["frame", melody, "--output", tmp_path / "framed.bin"],
        ["decode", "--weights", "demo", melody, sound],
        ["unframe", tmp_path / "framed.out", tmp_path / "unframed.wav"],
        ["compare", sound, tmp_path / "unframed.wav"],
        ["encode", sound, tmp_path / "encoded.mossnano"],  # by the weights in the folder, as check does
        ["check"],
        ["clients", "c", tmp_path / "client"],
        ["protocol"],
    ):
        outcome = frozen_tool(voice, *arguments)
        assert outcome.status == 0, outcome
    assert frozen_tool(voice, "protocol").out == (ROOT / "protocol.md").read_bytes()


@freezes
def test_the_conformance_kit_passes_on_it(voice: Path) -> None:
    """The kit in the folder, too, which is held against what must fail."""
    command = ["--", str(voice / "mossnano-stdio"), "--weights", "demo"]
    done = subprocess.run([*COMMAND, "conformance", *command], capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout.decode()
    assert " 0 failed" in done.stdout.decode().splitlines()[-1]
    chosen = ["--case", "streams-end-may-hold-json"]
    assert frozen_tool(voice, "conformance", *chosen, *command).status == 0
    assert frozen_tool(voice, "conformance", *chosen, "--", *OTHER_PEER, "END must be empty").status == 1


@freezes
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_c_client_that_is_in_it_speaks_to_it(place: Path, voice: Path, tmp_path: Path) -> None:
    example = [str(tmp_path / "example"), str(tmp_path / "frames.bin")]
    (tmp_path / "frames.bin").write_bytes(bytes(range(200)) * 5)
    subprocess.run(["gcc", "-pthread", voice / "clients" / "c" / "example.c", "-o", example[0]], check=True)
    there = subprocess.run([*example, voice / "mossnano-stdio", "--chunk-frames", "8"], capture_output=True, check=True)
    here = subprocess.run(
        [*example, *PROCESS, "--weights", place / "tiny-weights", "--chunk-frames", "8"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert there.stdout == here.stdout
    assert len(there.stdout) == 50 * 15_360


@freezes
def test_it_says_where_sound_is_to_be_had(voice: Path) -> None:
    done = run([str(voice / "mossnano-stdio"), "--weights", "demo", "--play", "--output", "none"])
    assert done.returncode == 69
    assert b"a frozen folder has it not" in done.stderr


# --- where there is nothing else -------------------------------------------------------------------------------------

C_LIBRARY = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|util|mvec)\.so\.\d+)$")
C_LIBRARY_FOLDERS = ("/lib64", "/lib", "/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/usr/lib64")
# In namespaces of its own: `root` is where everything lies, and nothing can be written.
BARE = (
    'mount --bind "$0" "$0" && mount -t proc proc "$0/proc" && mount -o remount,bind,ro "$0" '
    '&& exec chroot $USERSPEC "$0" "$@"'
)


@pytest.fixture
def bare_root(voice: Path, tmp_path: Path) -> Path:
    """The C library, the folder, and nothing else."""
    root = tmp_path / "root"
    for folder in map(Path, C_LIBRARY_FOLDERS):
        for path in folder.iterdir() if folder.is_dir() else ():
            if C_LIBRARY.match(path.name):
                copy = root / path.relative_to("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                copy.chmod(0o755)
    (root / "proc").mkdir()
    shutil.copytree(voice, root / "Ein Spiel für 日本" / "voice")
    for path in (tmp_path, root):
        path.chmod(0o755)
    return root


@freezes
@pytest.mark.parametrize("language", ["C", "C.UTF-8", ""])
def test_it_runs_in_a_bare_root_as_another_user_where_nothing_can_be_written(bare_root: Path, language: str) -> None:
    if sys.platform != "linux":
        pytest.skip("namespaces are Linux'")
    is_root = os.geteuid() == 0
    namespaces = ["unshare", "--mount", "--pid", "--fork", *([] if is_root else ["--user", "--map-root-user"])]
    if subprocess.run([*namespaces, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here: run it as root")
    program = "/Ein Spiel für 日本/voice/mossnano-stdio"
    before = files_of(bare_root)
    bare = {"PATH": os.environ["PATH"], "USERSPEC": "--userspec=65534:65534" if is_root else "", "LC_ALL": language}
    for arguments, wire in (["--weights", "demo"], MELODY.read_bytes()), ([], TINY_WIRE):
        command = [*arguments, "--output", "raw", "--chunk-frames", "8", "--threads", "1"]
        there = run([*namespaces, "sh", "-c", BARE, str(bare_root), program, *command], wire, env=bare)
        assert there.returncode == 0, there.stderr.decode()
        weights = arguments or ["--weights", str(REFERENCE / "bundle")]
        assert there.stdout == run([*PROCESS, *weights, *command[len(arguments) :]], wire).stdout
    assert files_of(bare_root) == before


# --- what it costs, and what it leaves alone --------------------------------------------------------------------------


def seconds_to_handshake(command: list[str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as process:
        assert process.stdout and process.stdin
        assert process.stdout.read(5)[4] == Kind.HANDSHAKE
        seconds = time.perf_counter() - began
        process.stdin.close()
        process.stdout.read()
    return seconds


@freezes
def test_it_starts_as_quickly_as_python_does(voice: Path, nano_bundle: Path) -> None:
    """With weights of the published size, whose hashes the process here remembers."""
    sides = ([str(voice / "mossnano-stdio")], PROCESS)
    seconds: list[list[float]] = [[], []]
    for _ in range(START_TURNS):
        for side, measured in zip(sides, seconds, strict=True):
            measured.append(seconds_to_handshake([*side, "--weights", str(nano_bundle)]))
    frozen, here = map(statistics.median, seconds)
    print(f"start to HANDSHAKE: {1000 * frozen:.0f} ms frozen, {1000 * here:.0f} ms here, medians of {START_TURNS}")
    assert frozen <= MAX_START_RATIO * here


def traced(command: list[str], folder: Path, wire: bytes = b"") -> tuple[str, set[str]]:
    """What it opened on the network, as strace writes it, and the files that it left in HOME and for the moment."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    home, temporary, trace = folder / "home", folder / "temporary", folder / "trace"
    home.mkdir(parents=True)
    temporary.mkdir()
    forgotten = {"XDG_CACHE_HOME", "MOSSNANO_CACHE", "ORT_DISABLE_TELEMETRY"}
    around = {name: value for name, value in os.environ.items() if name not in forgotten}
    around |= {"HOME": str(home), "TMPDIR": str(temporary)}
    prefix = ["strace", "--follow-forks", "--seccomp-bpf", "--trace=network", f"--output={trace}"]
    done = subprocess.run([*prefix, *command], env=around, cwd=ROOT, input=wire, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    left = {str(path.relative_to(folder)) for top in (home, temporary) for path in top.rglob("*")}
    lines = trace.read_text("utf-8", "replace").splitlines()
    assert any("exited with 0" in line for line in lines)  # it was followed to its end
    return "\n".join(line for line in lines if "AF_INET" in line), left


@freezes
def test_it_leaves_nothing_behind_and_speaks_to_nobody(voice: Path, nano_bundle: Path, tmp_path: Path) -> None:
    before = files_of(voice)
    time.sleep(2.1)  # what is newer than 2 s is not remembered by any process
    arguments = ["--weights", str(nano_bundle), "--threads", "1"]
    assert traced([str(voice / "mossnano-stdio"), *arguments], tmp_path / "there", TINY_WIRE) == ("", set())
    _, left = traced([*PROCESS, *arguments], tmp_path / "here", TINY_WIRE)
    assert "home/.cache/mossnano-stdio/verified.json" in left  # so it would have been seen
    assert traced([str(voice / "mossnano"), "check"], tmp_path / "check") == ("", set())
    assert files_of(voice) == before


@freezes
def test_a_second_run_gives_the_same_bytes(voice: Path, tmp_path: Path) -> None:
    """From another place, with other settings; and what it makes for the moment is gone, and nobody was asked."""
    again = tmp_path / "other" / "voice"
    command = [*COMMAND, "freeze", str(again), "--weights", str(REFERENCE / "bundle"), "--tools"]
    command += ["--client", "godot", "--client", "c"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "7")
        patch.setenv("LC_ALL", "C")
        patch.setenv("TZ", "Asia/Tokyo")
        previous = os.umask(0o077)
        try:
            asked, left = traced(command, tmp_path)
        finally:
            os.umask(previous)
    assert (asked, left) == ("", set())
    assert files_of(again) == files_of(voice)
    assert [path.name for path in again.parent.iterdir()] == ["voice"]


@freezes
def test_an_earlier_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "MANIFEST.json").write_text('{"mossnano-stdio": "0"}')
    (tmp_path / "voice" / "old").touch()
    assert run_tool_patiently("freeze", tmp_path / "voice") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["voice"]
    names = {path.name for path in (tmp_path / "voice").iterdir()}
    assert names == {"MANIFEST.json", "_internal", "licences", "mossnano-stdio", "protocol.md"}
    assert run([str(tmp_path / "voice" / "mossnano-stdio"), "--weights", "demo"]).returncode == 0


def run_tool_patiently(*arguments: object) -> int:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, timeout=600, check=False).returncode
