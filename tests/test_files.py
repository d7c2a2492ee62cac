"""files.py: whole files or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mossnano_stdio.errors import ExitStatus, OutputError
from mossnano_stdio.files import open_input, open_output
from tests.conftest import needs_symlinks


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with open_output(path) as file:
        file.write(b"whole")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names_in(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_what_was_there(tmp_path: Path, ending: type[BaseException]) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"before")
    with pytest.raises(ending), open_output(path) as file:
        file.write(b"half")
        raise ending
    assert path.read_bytes() == b"before"
    assert names_in(tmp_path) == ["x.bin"]


def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with open_output(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@needs_symlinks
def test_a_symlink_stays_one(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"before")
    (tmp_path / "link").symlink_to("target")
    with open_output(tmp_path / "link") as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"after"


@pytest.mark.skipif(sys.platform == "win32", reason="a file there has no mode to keep")
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "private").write_bytes(b"before")
    (tmp_path / "private").chmod(0o600)
    with open_output(tmp_path / "private") as file:
        file.write(b"after")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "private").read_bytes() == b"after"


@needs_symlinks
def test_a_symlink_that_leads_to_itself_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with open_output(tmp_path / "loop") as file:
        file.write(b"after")
    assert (tmp_path / "loop").read_bytes() == b"after"


def test_a_named_pipe_is_written_and_stays_one(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no named pipes in folders")
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    with open_output(path) as file:
        file.write(b"through")
    assert reader.communicate()[0] == b"through"
    assert path.is_fifo()
    assert names_in(tmp_path) == ["pipe"]


def test_the_null_device_is_not_replaced() -> None:
    with open_output(os.devnull) as file:
        file.write(b"gone")
    assert Path(os.devnull).is_char_device()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    is_folder = "EACCES" if sys.platform == "win32" else "EISDIR"
    with pytest.raises(OutputError, match=r"x\.bin.*ENOENT"), open_output(tmp_path / "missing" / "x.bin"):
        pass
    with pytest.raises(OutputError, match=is_folder), open_output(tmp_path):
        pass
    with pytest.raises(OutputError, match=rf"x\.bin there: .*{is_folder}"), open_output(tmp_path / "x.bin") as file:
        file.write(b"1")
        (tmp_path / "x.bin").mkdir()
    assert names_in(tmp_path) == ["x.bin"]
    assert OutputError.exit_status == ExitStatus.OUTPUT_FAILED


def test_input_speaks_for_itself(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"here")
    with open_input(str(tmp_path / "x.bin")) as file:
        assert file.read() == b"here"
    with pytest.raises(FileNotFoundError), open_input(str(tmp_path / "y.bin")):
        pass


COPY = """
import sys
from mossnano_stdio.cli import exit_status_of
from mossnano_stdio.files import open_input, open_output
try:
    with open_input("-") as source, open_output("-") as sink:
        sink.write(source.read())
except Exception as error:
    sys.exit(exit_status_of(error, "copy"))
"""


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_the_standard_streams(flags: list[str]) -> None:
    data = os.urandom(1 << 20)
    run = subprocess.run([sys.executable, *flags, "-c", COPY], input=data, capture_output=True, check=True)
    assert run.stdout == data
    assert run.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_full_disk_is_seen(flags: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run([sys.executable, *flags, "-c", COPY], input=b"x", stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == ExitStatus.OUTPUT_FAILED
    assert run.stderr.count(b"\n") == 1
    assert b"ENOSPC" in run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell there cannot start a program with a closed stream")
@pytest.mark.parametrize(("closed", "word"), [("<&-", b"stdin"), (">&-", b"stdout")])
def test_closed_standard_streams_are_named(closed: str, word: bytes) -> None:
    run = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, COPY], capture_output=True)
    assert run.returncode == ExitStatus.USAGE
    assert word in run.stderr


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    with open_output(path) as file:
        file.write(b"all of it")
    assert path.read_bytes() == b"all of it"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_an_error_names_what_was_to_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"cannot write x\.wav there: No such file"),
        open_output(tmp_path / "no/x.wav"),
    ):
        pass
