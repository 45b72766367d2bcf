"""A server for tests, on loopback, that speaks the protocols of Hugging Face's hub and of Ollama's registry.

It is a fake: it has the files that a test gives it, and does wrong what the test asks for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

BLOCK = 64 * 1024


@cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """What the server has, and what goes wrong."""

    #: By repository and path.
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    #: By namespace/name:tag: layers by media type.
    ollama: dict[str, dict[str, bytes]] = field(default_factory=dict)
    #: By path: files that are no part of a repository.
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = "a" * 40
    #: A token that every request of a repository needs.
    token: str = ""
    ranges: bool = True
    #: Where the bytes of repositories and blobs are, if at another host.
    elsewhere: str = ""
    #: What the next answers are, in place of the right ones: a status, and headers.
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    #: For each body: after how many bytes the connection is cut; None: not at all.
    cut: Callable[[], int | None] = lambda: None
    #: Called when a body is cut, before the connection is closed.
    on_cut: Callable[[], object] = lambda: None
    #: Called after each block of a body.
    after_block: Callable[[], object] = lambda: None
    #: Changes the bytes of files.
    spoil: Callable[[bytes], bytes] = lambda content: content
    #: Headers in place of those of a body.
    headers: dict[str, str] = field(default_factory=dict)
    #: The files of a repository in an answer; more have a page of their own.
    page: int = 1_000
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def bodies(self) -> list[Request]:
        """The requests for the bytes of files."""
        return [
            each
            for each in self.requests
            if each.method == "GET" and re.search(r"/resolve/|/blobs/|/files/", each.path)
        ]

    def starts(self) -> list[int]:
        return [
            int(each.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            for each in self.bodies()
        ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `Hub.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.served
        parts = urlsplit(self.path)
        hub.requests.append(Request(self.command, self.path, dict(self.headers)))
        needs_token = hub.token and not parts.path.startswith(("/files/", "/bytes/"))
        if hub.refusals:
            status, headers = hub.refusals.pop(0)
            self._send(status, b"no", headers)
        elif needs_token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(\w+)", parts.path):
            self._api(found[1], found[2], parts.query)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", parts.path):
            self._file(hub.repos.get(found[1], {}).get(found[2]), hub.commit)
        elif found := re.fullmatch(r"/v2/([^/]+/[^/]+)/manifests/(.+)", parts.path):
            self._manifest(hub.ollama.get(f"{found[1]}:{found[2]}"))
        elif found := re.fullmatch(r"/v2/[^/]+/[^/]+/blobs/sha256:(\w+)", parts.path):
            layers = [content for model in hub.ollama.values() for content in model.values()]
            self._file(next((each for each in layers if sha256(each) == found[1]), None))
        elif found := re.fullmatch(r"/bytes/(\w+)", parts.path):
            every = [content for files in (*hub.repos.values(), *hub.ollama.values()) for content in files.values()]
            self._body(next((each for each in every if sha256(each) == found[1]), None))
        else:
            self._body(hub.files.get(parts.path))

    def _api(self, repo: str, what: str, query: str) -> None:
        hub = self.served
        if repo not in hub.repos or what == "revision":
            self._send(200 if repo in hub.repos else 404, json.dumps({"sha": hub.commit, "siblings": []}).encode())
            return
        names = sorted(hub.repos[repo])
        start = int(query.rpartition("start=")[2]) if "start=" in query else 0
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "x", "oid": "b" * 40, "size": 0}]
        for name in names[start : start + hub.page]:
            content = hub.repos[repo][name]
            entry = {"type": "file", "path": name, "oid": "c" * 40, "size": len(content)}
            if name.endswith(".gguf"):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        more = start + hub.page < len(names)
        after = f"{hub.url}/api/models/{repo}/tree/{hub.commit}?recursive=true&start={start + hub.page}"
        self._send(200, json.dumps(entries).encode(), {"Link": f'<{after}>; rel="next"'} if more else {})

    def _manifest(self, layers: dict[str, bytes] | None) -> None:
        if layers is None:
            self._send(404, b'{"errors": []}')
            return
        found = [
            {"mediaType": kind, "digest": f"sha256:{sha256(content)}", "size": len(content)}
            for kind, content in layers.items()
        ]
        config = found.pop(0)
        self._send(200, json.dumps({"schemaVersion": 2, "config": config, "layers": found}).encode())

    def _file(self, content: bytes | None, commit: str = "") -> None:
        """As the hub answers: what the file is, and where it is, or the file."""
        if content is None:
            self._send(404, b"")
            return
        about = {"ETag": f'"{sha256(content)}"'}
        if commit:
            about |= {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256(content)}"',
                "X-Linked-Size": str(len(content)),
            }
        if self.served.elsewhere:
            about["Location"] = f"{self.served.elsewhere}/bytes/{sha256(content)}"
            self._send(302, b"", about)
        else:
            self._body(content, about)

    def _body(self, content: bytes | None, about: dict[str, str] | None = None) -> None:
        hub = self.served
        if content is None:
            self._send(404, b"")
            return
        content = hub.spoil(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if hub.ranges else None
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1, len(content)) if asked and asked[2] else len(content)
        headers = {"Content-Length": str(end - start), **(about or {})}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._head(206 if asked else 200, headers | hub.headers)
        if self.command == "HEAD":
            return
        limit = hub.cut()
        wanted = memoryview(content)[start:end] if limit is None else memoryview(content)[start:end][:limit]
        try:
            while wanted:
                self.wfile.write(wanted[:BLOCK])
                hub.sent += len(wanted[:BLOCK])
                wanted = wanted[BLOCK:]
                hub.after_block()
            self.wfile.flush()
        except OSError:
            self.close_connection = True
            return
        if limit is not None:
            hub.on_cut()
            self.close_connection = True

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": str(len(content)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
