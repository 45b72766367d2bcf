"""A gateway as a process of its own, in front of a mesh: `llambo gateway`, as a person would start it.

with Mesh(workers=2) as mesh, GatewayProcess(mesh.address) as gateway:
    reply = gateway.post("/v1/chat/completions", chat("hello"))
"""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from llambo.testing.commands import LLAMBO
from llambo.testing.processes import TIMEOUT_S, Process


class GatewayProcess:
    def __init__(self, broker: str, *words: str) -> None:
        """`words`: more of the command line."""
        # It writes its port to descriptor 1 when requests are answered.
        options = ["--broker", broker, "--http-port", "0", "--notify-fd", "1", *words]
        self.process = Process("-m", LLAMBO, "-v", "gateway", *options, name="gateway")
        self.port = int(self.process.first_line())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> GatewayProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.process.story("it runs" if self.process.running else "it has ended"))
        self.process.close()

    def stop(self) -> int:
        """Its exit status."""
        self.process.send(signal.SIGTERM)
        return self.process.end()

    # --- asking ------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """A connection of its own, closed when the block is left. `last_event_id=` is the header Last-Event-ID."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {name.replace("_", "-"): text for name, text in headers.items()})
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (decoded if it is JSON) and headers."""
        with self.open(method, path, body, **headers) as response:
            data = response.read()
            fields = {name.lower(): value for name, value in response.getheaders()}
        found = json.loads(data) if fields.get("content-type", "").startswith("application/json") else data
        return response.status, found, fields

    def post(self, path: str, body: Any, **headers: str) -> Any:
        """The body of a reply that has to be a 200."""
        status, found, _ = self.ask("POST", path, body, **headers)
        assert status == 200, f"{path} answered {status}: {found}"
        return found

    def get(self, path: str, **headers: str) -> Any:
        status, found, _ = self.ask("GET", path, **headers)
        assert status == 200, f"{path} answered {status}: {found}"
        return found


def chat(prompt: str = "hello", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], **more}


def events(response: http.client.HTTPResponse, count: int = 10**9) -> list[bytes]:
    """The next events as they stand there, comments left out; fewer if the stream ends before."""
    found: list[bytes] = []
    lines: list[bytes] = []
    while len(found) < count and (line := response.readline()):
        if line.strip():
            lines.append(line)
        else:
            event = b"".join(each for each in lines if not each.startswith(b":"))
            lines = []
            if event:
                found.append(event)
    return found


def data_of(event: bytes) -> Any:
    """What an event says; None for the [DONE] at the end."""
    found = next(line.removeprefix(b"data: ") for line in event.splitlines() if line.startswith(b"data: "))
    return None if found == b"[DONE]" else json.loads(found)


def id_of(event: bytes) -> str:
    return next(line.removeprefix(b"id: ") for line in event.splitlines() if line.startswith(b"id: ")).decode()


def text_of(received: list[bytes]) -> str:
    """Of a chat's events."""
    chunks = [data for event in received if (data := data_of(event)) is not None]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
