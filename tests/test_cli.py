"""The front door of the tools: how they are found, and how whatever ends them ends the process."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mossnano_stdio import __version__, cli, errors
from mossnano_stdio.cli import VERBS
from mossnano_stdio.errors import ExitStatus, MossnanoError, Terminated, exit_status_of
from mossnano_stdio.weights import DEMO_FOLDER
from tests.tool import COMMAND, call_tool, run_tool


def test_help_names_every_verb() -> None:
    for arguments in ([], ["--help"]):
        outcome = call_tool(*arguments)
        assert outcome.status == 0
        page = outcome.out.decode()
        assert all(f"  {verb} " in page and summary in page for verb, summary in VERBS.items())


def test_it_runs_by_module_too(tmp_path: Path) -> None:
    def by_module(*arguments: str) -> tuple[int, bytes, bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "mossnano_stdio.cli", *arguments], capture_output=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    assert by_module("--version") == (0, f"mossnano {__version__}{os.linesep}".encode(), b"")
    assert by_module("clients") == (0, run_tool("clients").out, b"")
    missing = f"mossnano unpack: error: No such file or directory: {tmp_path / 'x'}{os.linesep}".encode()
    assert by_module("unpack", str(tmp_path / "x"), "-", "--form", "json") == (ExitStatus.NO_WEIGHTS, b"", missing)


def test_version() -> None:
    assert run_tool("--version").out.decode() == f"mossnano {__version__}{os.linesep}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["info"], ["info", "x", "--nonsense"]])
def test_a_wrong_command_line_is_2(arguments: list[str]) -> None:
    outcome = call_tool(*arguments)
    assert outcome.status == ExitStatus.USAGE
    assert outcome.out == b""
    assert "usage: mossnano" in outcome.err


@pytest.mark.parametrize("arguments", [["--vers"], ["info", "--js", "x"], ["compare", "--min", "1", "x", "y"]])
def test_options_are_written_out(arguments: list[str]) -> None:
    """What is short today may mean two things tomorrow."""
    assert call_tool(*arguments).status == ExitStatus.USAGE


def ending_of(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """What becomes of a tool that ends with `error`."""

    def run(args: object) -> int:
        raise error

    tool = SimpleNamespace(__doc__="A tool that fails.", add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "mossnano_stdio.tools.info", tool)
    outcome = call_tool("info")
    assert outcome.out == b""
    return outcome.status, outcome.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.UsageError("why"), 2, "error: why"),
        (errors.CheckFailedError("why"), 1, "error: why"),
        (errors.ArtifactError("two\nlines"), 65, "error: two lines"),
        (errors.BundleError("why"), 66, "error: why"),
        (errors.DeviceError("why"), 69, "error: why"),
        (errors.OutputError("why"), 74, "error: why"),
        (errors.ProtocolError("why"), 76, "error: why"),
        (MemoryError("so many bytes"), 71, "error: out of memory (so many bytes)"),
        (MemoryError(), 71, "error: out of memory (no more to be had)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 66, "error: No such file or directory: x"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 66, "error: Permission denied: x"),
        (OSError(errno.ENOSPC, "No space left on device"), 74, "error: No space left on device (ENOSPC)"),
        (OSError(errno.EIO, "Input/output error", "x"), 74, "error: Input/output error (EIO): x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
    ],
)
def test_what_ends_a_tool_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending_of(error, monkeypatch) == (status, f"mossnano info: {line}\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = ending_of(ZeroDivisionError("oh"), monkeypatch)
    assert status == ExitStatus.BUG
    assert text.startswith("Traceback")
    assert text.endswith("mossnano info: a bug of ours: ZeroDivisionError: oh\n")


def test_a_reader_that_went_away_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_silence_stdout", lambda: None)
    assert ending_of(BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch) == (141, "")


def all_errors(kind: type[MossnanoError]) -> list[type[MossnanoError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in all_errors(child))]


def test_every_error_has_its_word_and_its_status() -> None:
    for kind in all_errors(MossnanoError):
        assert kind.code.isidentifier(), kind
        assert kind.code.islower(), kind
        assert kind.exit_status in ExitStatus, kind
        assert kind.__doc__ or kind.__module__ != "mossnano_stdio.errors", kind


@pytest.mark.skipif(sys.platform == "win32", reason="a shell there cannot start a program with a closed stream")
def test_a_closed_stderr_does_not_lead_to_stdout() -> None:
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "unpack", "-", "-", "--form", "json"]
    run = subprocess.run(shell, input=b"no artifact", stdout=subprocess.PIPE)
    assert (run.returncode, run.stdout) == (ExitStatus.BAD_INPUT, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stderr_changes_no_status() -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run([*COMMAND, "unpack", "-", "-", "--form", "json"], input=b"x", stderr=full)
    assert run.returncode == ExitStatus.BAD_INPUT


@pytest.mark.skipif(sys.platform == "win32", reason="to send a signal there is to end a process at once, unheard")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, ExitStatus.INTERRUPTED), (signal.SIGTERM, ExitStatus.TERMINATED)]
)
def test_signals_leave_no_half_file(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "unframe", "-", tmp_path / "x.wav"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.iterdir()):  # the unfinished file is there: it is at work
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, text = process.communicate()
    assert process.returncode == status
    assert text.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_callers_own_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    call_tool("info", "-")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_tool_can_be_run_in_any_thread() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(cli.main(["info", os.devnull])))
    thread.start()
    thread.join()
    assert statuses == [ExitStatus.BAD_INPUT]


def test_the_verdict_is_given_without_a_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_status_of(errors.UsageError("why"), "x") == ExitStatus.USAGE


@pytest.mark.skipif(sys.platform != "linux", reason="only here are names any bytes")
def test_a_name_that_is_no_text_comes_out_as_it_is(tmp_path: Path) -> None:
    """Even where stdout is strict, as it is in most places."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    shutil.copytree(DEMO_FOLDER, os.fsdecode(folder))
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*COMMAND, "check", folder], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (ExitStatus.DONE, b"")
    assert done.stdout.startswith(folder + b": ")
