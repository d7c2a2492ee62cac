"""The tool web: serves the page and the weights to this machine, and nothing else to anybody."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.tools.web import MELODY, PAGE
from mossnano_stdio.weights.metadata import METADATA_NAME
from mossnano_stdio.weights.published import BUNDLE
from tests.conftest import SHARED, STEP
from tests.test_weights import OFFICIAL, needs_official
from tests.tool import COMMAND, call_tool


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    """Runs `mossnano web`, and gives its address."""
    with subprocess.Popen([*COMMAND, "web", *map(str, arguments)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --ort takes, as far as a server can tell."""
    package = tmp_path_factory.mktemp("onnxruntime-web")
    (package / "dist").mkdir()
    (package / "dist" / "ort.wasm.min.mjs").write_text("export const env = {};")
    (package / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm")
    (package / "dist" / "private.txt").write_text("not for pages")
    return package


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, runtime: Path) -> Iterator[str]:
    with serving("--weights", tiny_bundle, "--ort", runtime) as place:
        yield place


def ask(address: str, path: str, *, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


def test_the_address_is_one_line_and_of_this_machine_alone(address: str) -> None:
    parts = urlsplit(address)
    assert (parts.scheme, parts.hostname, parts.path) == ("http", "127.0.0.1", "/")
    own_name = socket.gethostbyname(socket.gethostname())
    if own_name != "127.0.0.1":
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((own_name, parts.port or 0), timeout=5)


@pytest.mark.parametrize("file", [*PAGE.iterdir(), MELODY], ids=lambda file: file.name)
def test_the_page_is_served_as_it_is(address: str, file: Path) -> None:
    assert ask(address, f"/{file.name}").body == file.read_bytes()


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js?graph=official", "text/javascript; charset=utf-8"),
        ("/weights/mossnano.json", "application/json"),
        ("/weights/codec_browser_onnx_meta.json", "application/json"),
        (f"/weights/{SHARED}", "application/octet-stream"),
        ("/ort/ort.wasm.min.mjs", "text/javascript; charset=utf-8"),
        ("/ort/ort-wasm-simd-threaded.wasm", "application/wasm"),
    ],
)
def test_browsers_are_told_the_right_media_types(address: str, path: str, media_type: str) -> None:
    answer = ask(address, path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, media_type)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_weights_come_with_their_hashes(address: str, tiny_bundle: Path) -> None:
    document = json.loads(ask(address, "/weights/mossnano.json").body)
    assert document["mossnano"] == 1
    assert document["codebook_size"] == 1024
    for name, record in document["files"].items():
        content = (tiny_bundle / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@needs_official
def test_published_weights_come_with_the_published_hashes(tmp_path: Path, tiny_bundle: Path) -> None:
    """Whoever has the pinned metadata is held against the pinned files, mossnano.json or not."""
    shutil.copyfile(OFFICIAL / METADATA_NAME, tmp_path / METADATA_NAME)
    (tmp_path / STEP).write_bytes(b"not it")
    with serving("--weights", tmp_path) as place:
        document = json.loads(ask(place, "/weights/mossnano.json").body)
    assert document["files"][STEP]["sha256"] == BUNDLE.files[STEP].sha256


def test_a_file_can_be_had_from_its_middle_on(address: str, tiny_bundle: Path) -> None:
    whole = (tiny_bundle / SHARED).read_bytes()
    rest = ask(address, f"/weights/{SHARED}", Range="bytes=1000-")
    assert (rest.status, rest.body) == (206, whole[1000:])
    assert rest.headers["Content-Range"] == f"bytes 1000-{len(whole) - 1}/{len(whole)}"
    past = ask(address, f"/weights/{SHARED}", Range=f"bytes={len(whole)}-")
    assert (past.status, past.headers["Content-Range"]) == (416, f"bytes */{len(whole)}")
    head = ask(address, f"/weights/{SHARED}", method="HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(whole)))


@pytest.mark.parametrize(
    "path",
    [
        "/weights/",
        "/weights/../pyproject.toml",
        "/../../../../etc/passwd",
        "/weights/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/ort/private.txt",
        "/ort/../dist/private.txt",
        "/weights/none.onnx",
    ],
)
def test_nothing_else_can_be_read(address: str, path: str) -> None:
    assert ask(address, path).status == 404


@pytest.mark.parametrize("host", ["elsewhere.test", "elsewhere.test:80", "127.0.0.1.elsewhere.test", ""])
def test_a_foreign_page_cannot_read_along(address: str, host: str) -> None:
    """It may have its own name resolved to 127.0.0.1, but says that name."""
    assert ask(address, "/", Host=host).status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_written(address: str, method: str) -> None:
    assert ask(address, "/", method=method).status == 501


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--port", "65536"], ExitStatus.USAGE, "--port 65536, allowed are 0 (whichever is free) to 65535"),
        (["--ort", "/none"], ExitStatus.USAGE, "`npm install onnxruntime-web` brings it"),
        (["--weights", "/none"], ExitStatus.NO_WEIGHTS, "/none"),
    ],
)
def test_what_cannot_be_served_is_said(arguments: list[str], status: int, words: str) -> None:
    outcome = call_tool("web", "--weights", "demo", *arguments)
    assert outcome.status == status
    assert words in outcome.error_line


def test_a_port_that_is_taken_is_named(address: str) -> None:
    port = urlsplit(address).port
    outcome = call_tool("web", "--weights", "demo", "--port", port)
    assert outcome.status == ExitStatus.USAGE
    assert outcome.error_line.startswith(f"mossnano web: error: port {port} of 127.0.0.1 cannot be listened to (")


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C goes to a whole console")
def test_ctrl_c_ends_it() -> None:
    with subprocess.Popen([*COMMAND, "web", "--weights", "demo"], stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline().startswith(b"http://127.0.0.1:")
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 128 + signal.SIGINT
