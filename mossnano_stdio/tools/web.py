"""Serve the page that decodes in the browser, and the weights that it decodes with, to this machine alone.

    mossnano web --weights DIR --ort node_modules/onnxruntime-web/dist

prints the page's address on stdout, and runs until Ctrl-C. Nothing but the page, the graphs of DIR and onnxruntime-web
can be read through it. The same files on any static host do the same: `mossnano clients web DIR` copies the page, the
weights belong beside it in weights/, onnxruntime-web in ort/.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.weights import SIDECAR_NAME, Bundle, find_weights, load_bundle
from mossnano_stdio.weights.checked_json import load_json

PACKAGE = Path(__file__).parents[1]
PAGE = PACKAGE / "clients" / "web"
MELODY = PACKAGE / "demo" / "melody.mossnano"

ADDRESS = "127.0.0.1"
RUNTIME = "ort.wasm.min.mjs"  # what the page imports of onnxruntime-web
GETTING_RUNTIME = "`npm install onnxruntime-web` brings it, in node_modules/onnxruntime-web/dist"
PIECE_BYTES = 1 << 18

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",  # browsers run no module of another type
    ".json": "application/json",
    ".wasm": "application/wasm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="DIR", help="weights folder, `demo`, or a model's name")
    parser.add_argument("--ort", type=Path, metavar="DIR", help=f"the folder of onnxruntime-web; {GETTING_RUNTIME}")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="by default whichever is free")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    served = _page() | _weights(load_bundle(find_weights(args.weights)))
    if args.ort:
        served |= _runtime(args.ort)
    if not 0 <= args.port <= 65_535:
        raise UsageError(f"--port {args.port}, allowed are 0 (whichever is free) to 65535")
    handler = type("Handler", (_Handler,), {"served": served})
    try:
        server = ThreadingHTTPServer((ADDRESS, args.port), handler)
    except OSError as error:
        raise UsageError(f"port {args.port} of {ADDRESS} cannot be listened to ({error.strerror})") from None
    with server:
        server.daemon_threads = True
        address = f"http://{ADDRESS}:{server.server_port}/"
        print(address, flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(address)
        server.serve_forever(poll_interval=0.1)
    return ExitStatus.DONE


# --- what is served ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A file, or bytes that stand for one."""

    path: Path | None = None
    content: bytes = b""


def _page() -> dict[str, Served]:
    """By the path that a browser asks for."""
    page = {f"/{path.name}": Served(path) for path in (*PAGE.iterdir(), MELODY)}
    return page | {"/": page["/index.html"]}


def _weights(bundle: Bundle) -> dict[str, Served]:
    """The files of its graphs, and `mossnano.json` with what is known of each: the page runs nothing unverified."""
    files = [bundle.metadata_file, *(file for graph in bundle.graphs.values() for file in graph.files)]
    there = {file.path.name: file for file in files if file.path.is_file()}
    sidecar_path = bundle.folder / SIDECAR_NAME
    document: dict[str, Any] = {"mossnano": 1, "name": bundle.name}
    if sidecar_path.exists():
        document |= load_json(sidecar_path)[0].object()
    records = {
        name: {"bytes": file.record.size_bytes, "sha256": file.record.sha256}
        for name, file in there.items()
        if file.record
    }
    document = {"codebook_size": bundle.format.codebook_size, **document, "files": records}
    sidecar = Served(content=json.dumps(document).encode())
    served = {f"/weights/{name}": Served(file.path) for name, file in there.items()}
    return served | {f"/weights/{SIDECAR_NAME}": sidecar}


def _runtime(folder: Path) -> dict[str, Served]:
    """onnxruntime-web's modules: `folder` is its own or the `dist` in it."""
    for place in (folder, folder / "dist"):
        if (place / RUNTIME).is_file():
            return {f"/ort/{path.name}": Served(path) for path in place.iterdir() if path.suffix in (".mjs", ".wasm")}
    raise UsageError(f"--ort {folder}: has no {RUNTIME}; {GETTING_RUNTIME}")


# --- how it is served --------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of what is listed, from any byte on."""

    served: ClassVar[dict[str, Served]]
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a browser that says nothing

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        """Says nothing: stdout has the address, and stderr what goes wrong."""

    def _answer(self, *, with_body: bool) -> None:
        # Another name for this address is a foreign page that had itself resolved to it, to read along.
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in (ADDRESS, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, f"only {ADDRESS} and localhost are served")
            return
        served = self.served.get(self.path.partition("?")[0])
        if served is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        size = served.path.stat().st_size if served.path else len(served.content)
        maybe_start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(maybe_start[1]) if maybe_start else 0
        if maybe_start and start >= size:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if maybe_start else HTTPStatus.OK)
        if maybe_start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        name = served.path.name if served.path else SIDECAR_NAME
        self.send_header("Content-Type", MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(size - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Cache-Control", "no-cache")  # the page keeps what is worth keeping, by its hash
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self._send(served, start)

    def _send(self, served: Served, start: int) -> None:
        try:
            if served.path is None:
                self.wfile.write(served.content[start:])
                return
            with served.path.open("rb") as file:
                file.seek(start)
                while piece := file.read(PIECE_BYTES):
                    self.wfile.write(piece)
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True  # the page was closed
