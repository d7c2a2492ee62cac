"""What a frozen folder holds: PyInstaller calls `collect` from a spec of two lines.

Nothing is in it because it happens to be installed: whatever pip has put there and PACKAGES does not name is left out,
so that two machines with the same versions make the same folder.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import mossnano_stdio

PACKAGES = ("mossnano_stdio", "numpy", "onnxruntime", "soxr")

# The programs, and the scripts that PyInstaller makes them of.
PROCESS, TOOLS = "mossnano-stdio", "mossnano"
SCRIPTS = {
    PROCESS: "from mossnano_stdio.__main__ import run\n\nrun()\n",
    TOOLS: "import sys\n\nfrom mossnano_stdio.cli import main\n\nsys.exit(main())\n",
}

VERBS_LEFT_OUT = {
    "build": "needs onnx",
    "standin": "needs onnx",
    "fetch": "a frozen folder speaks to no network",
    "play": "a game has its own way to the sound card",
    "bench": "starts Python",
    "diagnose": "needs onnx",
    "freeze": "needs what it freezes",
    "tokenize": "starts Python",
    "detokenize": "starts Python",
    "web": "a frozen folder serves no pages",
}

# Of Python's library: what brings another library along, or much that nothing here imports. Without OpenSSL hashes take
# 0.2 s for 44 MB, six times as long, but beside onnxruntime's own work: no start was measured to be later.
LIBRARY_LEFT_OUT = (
    *("_hashlib", "email", "importlib.metadata", "tarfile", "urllib.error", "urllib.request"),
    *("ssl", "_ssl", "lzma", "_lzma", "bz2", "_bz2", "readline", "curses", "_curses", "dbm", "sqlite3", "tkinter"),
    *("uuid", "_uuid", "crypt", "_crypt", "nis", "decimal", "_decimal", "_pydecimal", "pyexpat", "unicodedata"),
    *("unittest", "doctest", "pdb", "pydoc", "http", "xml", "xmlrpc", "ftplib", "smtplib", "asyncio", "lib2to3"),
    *("multiprocessing", "ensurepip", "venv", "idlelib", "sysconfig"),
)
PARTS_LEFT_OUT = (
    *("numpy.f2py", "numpy.testing", "numpy._core.tests", "numpy._core._multiarray_tests", "numpy.fft"),
    *("numpy.ma", "numpy.polynomial", "numpy.random"),
    *(f"onnxruntime.{part}" for part in ("backend", "datasets", "quantization", "tools", "transformers")),
)

SOURCES_NAME = "sources.json"  # in PyInstaller's working folder: where each native library came from


def programs(with_tools: bool) -> tuple[str, ...]:
    return (PROCESS, TOOLS) if with_tools else (PROCESS,)


def collect(blocks: Mapping[str, Any], *, with_tools: bool) -> None:
    """Give PyInstaller's own building blocks, which a spec finds in its namespace, what they are to work on."""
    package = Path(mossnano_stdio.__file__).parent
    names = programs(with_tools)
    analysis = blocks["Analysis"](
        [f"{name}.py" for name in names],
        pathex=[str(package.parent)],
        datas=[(str(source), folder) for source, folder in _files_beside_modules(package, with_tools)],
        hiddenimports=["soxr", *(_tool_modules(package) if with_tools else ())],
        excludes=[
            *(name for name in packages_distributions() if name not in PACKAGES),
            *LIBRARY_LEFT_OUT,
            *PARTS_LEFT_OUT,
            *(f"mossnano_stdio.tools.{verb}" for verb in VERBS_LEFT_OUT),
        ],
    )
    modules = blocks["PYZ"](analysis.pure)
    executables = [
        blocks["EXE"](
            modules,
            # All scripts of one analysis would run in every program, one after the other.
            [script for script in analysis.scripts if script[0] == name or script[0] not in names],
            [],
            name=name,
            exclude_binaries=True,
            console=True,
            upx=False,
        )
        for name in names
    ]
    libraries = [entry for entry in analysis.binaries if not _is_of_the_system(entry[0])]
    # Metadata of packages holds paths of this machine, and nothing here asks for it.
    datas = [entry for entry in analysis.datas if ".dist-info" not in entry[0] and entry[2] != "SYMLINK"]
    blocks["COLLECT"](*executables, libraries, datas, name="folder", upx=False)
    Path(SOURCES_NAME).write_text(json.dumps({name: source for name, source, _ in libraries}), "utf-8")


def _tool_modules(package: Path) -> list[str]:
    """Those that nobody imports by name: the command line finds them by their verb."""
    names = [module.name for module in pkgutil.iter_modules([str(package / "tools")])]
    return [f"mossnano_stdio.tools.{name}" for name in names if name not in VERBS_LEFT_OUT]


def _files_beside_modules(package: Path, with_tools: bool) -> list[tuple[Path, str]]:
    """What modules read that lies beside them, and the folder that it goes to."""
    files = [
        *(path for path in (package / "demo" / "weights").iterdir() if path.is_file()),
        package / "codecs" / "attention_probe.onnx",
    ]
    if with_tools:
        clients = package / "clients"
        files += [path for path in clients.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        files.append(package / "demo" / "melody.mossnano")  # which `mossnano clients web` copies along
    return [(path, path.parent.relative_to(package.parent).as_posix()) for path in sorted(files)]


def _is_of_the_system(name: str) -> bool:
    """Is it part of the C library, whose parts must be of one version?"""
    return sys.platform == "linux" and name.startswith("libmvec.so")
