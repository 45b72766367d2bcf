"""Clients that disconnect, stop reading or stay connected: nothing is left of them in the gateway or the broker."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, events, id_of

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=1, fake=FakeOptions(slots=8, tokens_per_s=200)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address, "--resume-ms", "300") as gateway:
        yield gateway


def gauge(gateway: GatewayProcess, name: str) -> float:
    found = re.search(rf"^llambo_gateway_{name} (\S+)$", gateway.get("/metrics").decode(), re.MULTILINE)
    assert found is not None, f"there is no {name}"
    return float(found[1])


def nothing_is_left(mesh: Mesh, gateway: GatewayProcess) -> None:
    mesh.until(lambda core: not core.state.requests, "no request is left in the broker")
    for name, left in (("answers_open", 0), ("readers", 0), ("websockets_open", 0), ("http_open", 1)):
        deadline = time.monotonic() + TIMEOUT_S
        while (found := gauge(gateway, name)) != left:  # (the one that is open is the one that asks)
            assert time.monotonic() < deadline, f"{name} is {found}, and not {left}"
            time.sleep(0.02)


def test_after_any_disconnect_nothing_is_left(mesh: Mesh, gateway: GatewayProcess) -> None:
    def half(path: str, body: dict[str, Any], *, of: float = 1.0) -> socket.socket:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        connection = socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S)
        connection.sendall((head + data)[: int((len(head) + len(data)) * of)])
        return connection

    long = chat(max_tokens=50_000)
    embedding = {"input": ["x"] * 64, "model": "fake"}
    gone = [half(CHAT, long, of=share) for share in (0.1, 0.9)]
    gone += [half(CHAT, body) for body in (long, {**long, "stream": True}, {**long, "n": 8, "stream": True})]
    gone += [half("/v1/messages", {**long, "stream": True}), half("/v1/embeddings", embedding)]
    gone += [half("/v1/responses", {"input": "x", "stream": True, "max_output_tokens": 50_000})]
    for connection in gone:
        connection.close()  # at once: the gateway has not answered yet
    for _ in range(3):
        with gateway.open("POST", CHAT, {**long, "stream": True}) as response:
            place = id_of(events(response, 3)[-1])
        with gateway.open("POST", CHAT, {**long, "stream": True}, last_event_id=place) as response:
            events(response, 1)
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as asking:
        for id in range(12):  # more than there are slots
            asking.send(json.dumps({"type": "ask", "id": str(id), "body": long}))
        asking.recv(TIMEOUT_S)
    live = gateway.open("GET", "/board/live")
    with live as response:
        response.readline()
    nothing_is_left(mesh, gateway)
    assert b'"5xx"' not in gateway.get("/metrics"), "what clients do is no error of the gateway"


def test_who_takes_nothing_does_not_make_the_gateway_grow(gateway: GatewayProcess, mesh: Mesh) -> None:
    data = json.dumps(chat(max_tokens=400, stream=True, logprobs=True, top_logprobs=20)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    connections = []
    for _ in range(8):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.settimeout(TIMEOUT_S)
        connection.connect(("127.0.0.1", gateway.port))
        connection.sendall(head + data)
        connections.append(connection)
    mesh.until(lambda core: core.state.running, "they run")
    mesh.until(lambda core: not core.state.requests, "they are answered, although no client reads it")
    # A reader that continues later gets all of it. (Through the small buffer that would take a minute.)
    connections[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    reply = http.client.HTTPResponse(connections[0])
    reply.begin()
    assert events(reply)[-1].endswith(b"data: [DONE]\n")
    for connection in connections:
        connection.close()
    nothing_is_left(mesh, gateway)


def test_it_leaves_although_others_hold_on(mesh: Mesh) -> None:
    """And what clients do is no error of the gateway: there is no traceback in its log."""
    with GatewayProcess(mesh.address, "--leave-ms", "1000") as gateway:
        with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as wrong:
            wrong.send(b"\xff", text=True)
            with pytest.raises(ConnectionClosedError) as closed:
                wrong.recv(TIMEOUT_S)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1007  # invalid data
        idle = [socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) for _ in range(50)]
        idle[0].sendall(b"GET / HT")
        with (
            gateway.open("POST", CHAT, chat(max_tokens=100_000, stream=True)) as endless,
            gateway.open("GET", "/board/live") as live,
            connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as asking,
        ):
            asking.send(json.dumps({"type": "ask", "id": "a", "body": chat(max_tokens=100_000)}))
            asking.recv(TIMEOUT_S)
            events(endless, 2)
            live.readline()
            with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) as waiting:  # for a whole answer
                body = json.dumps(chat(max_tokens=100_000)).encode()
                waiting.sendall(b"POST %s HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
                mesh.until(lambda core: len(core.state.requests) == 3, "it is there")
                assert gateway.stop() == 0
        for connection in idle:
            connection.close()
        assert "Traceback" not in "\n".join(gateway.process.lines)
    mesh.until(lambda core: not core.state.requests, "what was asked through it is cancelled")
