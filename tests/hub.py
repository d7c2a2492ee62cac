"""A stand-in for the model hub on the loopback interface: as much of its file API as a download needs.

Small files are answered directly; large ones by a redirect to another host name, as the hub does with its CDN, which
must not be shown the token. `cut_after` closes connections in the middle, `sent` is what is handed out.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LARGE_BYTES = 10_000
HUB_HOST, CDN_HOST = "127.0.0.1", "localhost"


@dataclass
class Request:
    method: str
    host: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """What is published, what is sent instead, and what was asked for."""

    revisions: dict[str, str]  # repository -> revision
    files: dict[tuple[str, str], bytes]  # (repository, name) -> content
    sent: dict[str, bytes] = field(default_factory=dict)  # name -> other bytes than those that are published
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # name -> bytes until each next connection is cut
    status: dict[str, int] = field(default_factory=dict)  # name -> the status to answer with
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://{HUB_HOST}:{self.port}"

    def asked(self, method: str, name: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and request.path.endswith("/" + name)]


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = http.server.ThreadingHTTPServer(("", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            host = (self.headers["Host"] or "").split(":")[0]
            hub.requests.append(
                Request(self.command, host, self.path, self.headers["Range"], self.headers["Authorization"])
            )
            maybe_match = re.fullmatch(r"/(cdn/)?([^/]+/[^/]+)/resolve/([0-9a-f]{40})/([^/]+)", self.path)
            if not maybe_match or hub.revisions.get(maybe_match[2]) != maybe_match[3]:
                self._status(404, {"X-Error-Code": "RevisionNotFound" if maybe_match else "RepoNotFound"})
                return
            on_cdn, repository, revision, name = maybe_match.groups()
            maybe_content = hub.files.get((repository, name))
            if name in hub.status:
                self._status(hub.status[name], {})
            elif maybe_content is None:
                self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
            elif len(maybe_content) >= LARGE_BYTES and not on_cdn:
                self._redirect(name, maybe_content, revision)
            else:
                self._send(name, hub.sent.get(name, maybe_content), revision, with_body=with_body)

        def _redirect(self, name: str, content: bytes, revision: str) -> None:
            digest = hashlib.sha256(content).hexdigest()
            size = len(hub.sent.get(name, content))
            self._status(
                302,
                {
                    "Location": f"http://{CDN_HOST}:{hub.port}/cdn{self.path}",
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(size),
                    "X-Repo-Commit": revision,
                },
            )

        def _send(self, name: str, content: bytes, revision: str, *, with_body: bool) -> None:
            start = 0
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": revision}
            if asked := self.headers["Range"]:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body = content[start:]
            self.send_response(206 if start else 200)
            for key, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
                self.send_header(key, value)
            self.end_headers()
            if not with_body:
                return
            cuts = hub.cut_after.get(name)
            if cuts:
                body = body[: cuts.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def _status(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(key, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
