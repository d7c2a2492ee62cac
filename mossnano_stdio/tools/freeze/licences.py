"""Collects the licences of everything in a frozen folder, from the packages that it was taken from.

What pip installed has them in its metadata or beside its modules, Python beside its library, and what came from a
Debian system in /usr/share/doc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution
from pathlib import Path

# By pip's names. PyInstaller is in the programs themselves: the part that starts Python.
DISTRIBUTIONS = ("mossnano-stdio", "numpy", "onnxruntime", "soxr", "pyinstaller")
LICENCE_NAMES = re.compile(r"(licen[cs]e|copying|notice|third.?party.?notices)\b[^/]*$", re.IGNORECASE)
NO_TEXTS = (".py", ".pyc")

WEIGHTS_LICENCE = "Apache-2.0"
APACHE_HOLDER = "packaging"  # which PyInstaller brings along, and which is under that licence too

DOCUMENTS = Path("/usr/share/doc")
SHARED_TEXTS = Path("/usr/share/common-licenses")  # which Debian's notices refer to


def collect_licences(libraries: Mapping[str, str], folder: Path, *, for_weights: bool) -> dict[str, list[str]]:
    """Copy them into a folder for each component; return the files' names, by component.

    `libraries` has each native library's name and where it was taken from. One of the system whose package is not
    found is a component without any licence. `for_weights`: the published weights are in it, which come without a text
    of their licence.
    """
    texts: dict[str, dict[str, Path]] = {name: _of_distribution(name) for name in DISTRIBUTIONS}
    texts["python"] = _of_python()
    if for_weights:
        maybe_apache = _of_distribution(APACHE_HOLDER).get("LICENSE.APACHE")
        texts["weights"] = {WEIGHTS_LICENCE: maybe_apache} if maybe_apache else {}
    for source in _of_the_system(libraries.values()) if sys.platform == "linux" else ():  # elsewhere, none is taken
        package = _package_of(source)
        texts[package or source.name] = _of_package(package) if package else {}
    referred = {text for of_package in texts.values() for path in of_package.values() for text in _referred_by(path)}
    if referred:
        texts[SHARED_TEXTS.name] = {path.name: path for path in referred}
    for component, files in texts.items():
        for name, path in files.items():
            (folder / component).mkdir(parents=True, exist_ok=True)
            (folder / component / name).write_bytes(path.read_bytes())
    return {component: sorted(files) for component, files in sorted(texts.items())}


def _of_distribution(name: str) -> dict[str, Path]:
    """A name that says where it lay -> the file."""
    found = {}
    for file in distribution(name).files or ():
        if LICENCE_NAMES.search(file.as_posix()) and file.suffix not in NO_TEXTS:
            parts = [part for part in file.parts if not part.endswith(".dist-info") and part != "licenses"]
            found["-".join(parts)] = Path(str(file.locate()))
    return found


def _of_python() -> dict[str, Path]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = (
        Path(sysconfig.get_path("stdlib"), "LICENSE.txt"),
        Path(sys.base_prefix, "LICENSE.txt"),
        DOCUMENTS / version / "copyright",
    )
    return {path.name: path for path in places if path.is_file()}


def _of_the_system(sources: Iterable[str]) -> list[Path]:
    """Those that neither pip nor Python brought along."""
    brought = [Path(place).resolve() for place in (sysconfig.get_path("purelib"), sys.base_prefix)]
    if sys.base_prefix == "/usr":  # the system's own Python: its modules come from its packages, but so does the rest
        brought[1] = Path(sysconfig.get_path("stdlib")).resolve()
    paths = [Path(source) for source in sources]
    return sorted(path for path in paths if not any(place in path.resolve().parents for place in brought))


def _package_of(library: Path) -> str | None:
    """Debian's package that has brought it. Some are entered below /lib, which is /usr/lib today, some with their
    whole version."""
    if shutil.which("dpkg-query") is None:
        return None
    files = {library, library.resolve()}
    for path in sorted({*files, *(Path("/usr", *path.parts[1:]) for path in files), *map(_without_usr, files)}):
        asked = subprocess.run(["dpkg-query", "--search", path], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return asked.stdout.partition(":")[0]
    return None


def _without_usr(path: Path) -> Path:
    return Path("/", *path.parts[2:]) if path.parts[1:2] == ("usr",) else path


def _of_package(package: str) -> dict[str, Path]:
    notice = DOCUMENTS / package / "copyright"
    return {notice.name: notice} if notice.is_file() else {}


def _referred_by(notice: Path) -> set[Path]:
    """The texts that Debian keeps once and for all. GPL is a link to the newest version."""
    if DOCUMENTS not in notice.parents:
        return set()
    names = re.findall(rf"{SHARED_TEXTS.as_posix()}/([\w.-]*\w)", notice.read_text("utf-8", "replace"))
    return {path for path in (SHARED_TEXTS / name for name in names) if path.is_file()}
