"""Hostile HTTP clients: pages in a browser, strangers, requests that are too large, and readers that do not read."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from litestar import Litestar
from litestar.routes import HTTPRoute
from uvicorn.server import ServerState
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

from llambo.gateway import server as gateway_server
from llambo.gateway.access import Access
from llambo.gateway.app import Gateway, make_app
from llambo.gateway.config import GatewayConfig
from llambo.gateway.dashboard.routes import assets
from llambo.gateway.server import Strangers, TimeoutProtocol, listen, set_tcp_unsent_limit, set_tcp_user_timeout
from llambo.mesh.security import api_tokens
from llambo.mesh.wire.errors import LlamboError
from llambo.testing.mesh import Mesh, key_folder
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, events, id_of

CHAT = "/v1/chat/completions"
ELSEWHERE = "http://attacker.example"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=1, fake=FakeOptions(slots=8, tokens_per_s=200)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(
        mesh.address, "--resume-ms", "300", "--http-cors", "http://friend.example", "--http-hosts", "box.example"
    ) as gateway:
        yield gateway


# --- pages of others, where there are no keys ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": ELSEWHERE, "content_type": "text/plain"}, 403),
        ({"origin": "null", "content_type": "text/plain"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({"origin": ELSEWHERE, "host": "attacker.example"}, 403),  # its name was made to lead here
        ({"host": "attacker.example:7340"}, 403),
        ({"host": "127.0.0.1.attacker.example"}, 403),
        ({"host": "box.example", "origin": "http://box.example"}, 200),
        ({"host": "localhost", "origin": "http://localhost"}, 200),
        ({"host": "[::1]:7340", "origin": "http://[::1]:7340"}, 200),
        ({"origin": "http://friend.example"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_another_site_cannot_ask(
    mesh: Mesh, gateway: GatewayProcess, headers: dict[str, str], status: int
) -> None:
    before = mesh.counter("submitted")
    assert gateway.ask("POST", CHAT, chat(max_tokens=1), **headers)[0] == status
    assert mesh.counter("submitted") == before + (status == 200)


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/", "/board/live", "/v1/models", "/openapi.json"])
def test_no_answer_under_a_host_name_that_is_not_ours(gateway: GatewayProcess, path: str) -> None:
    assert gateway.ask("GET", path, host="attacker.example")[0] == 403


def test_a_link_to_the_dashboard_may_be_followed(gateway: GatewayProcess) -> None:
    headers = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert gateway.ask("GET", "/", **headers)[0] == 200
    assert gateway.ask("GET", "/board/live", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403


def test_a_websocket_of_another_page_is_refused(gateway: GatewayProcess) -> None:
    url = f"ws://127.0.0.1:{gateway.port}/v1/stream"
    with pytest.raises(InvalidStatus) as refused, connect(url, origin=Origin(ELSEWHERE)):
        pass
    assert refused.value.response.status_code == 403
    for welcome in ("http://friend.example", f"http://127.0.0.1:{gateway.port}"):
        with connect(url, origin=Origin(welcome)) as socket:
            socket.send("{")
            assert json.loads(socket.recv(TIMEOUT_S))["type"] == "error"


# --- what a browser is given ------------------------------------------------------------------------------------

#: The name of a language, which nothing fetches.
NAMESPACE = b"http://www.w3.org/2000/svg"
NOWHERE = ["/schema", "/schema/swagger", "/schema/redoc", "/schema/elements", "/schema/rapidoc", "/schema/openapi.json",
           "/schema/openapi.yaml", "/schema/openapi.yml", "/docs", "/none"]  # fmt: skip


def all_routes() -> list[tuple[str, str]]:
    """Each method and path of the application, by its own table, with the files of the page; and some that it lacks."""
    access = Access("tcp://127.0.0.1:1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Litestar's, about its release 3
        app = make_app(Gateway(GatewayConfig(), access)).app
    asyncio.run(access.close())
    assert isinstance(app, Litestar)
    table = [(method, route.path_format) for route in app.routes if isinstance(route, HTTPRoute)
             for method in sorted(route.methods)]  # fmt: skip
    files = [("GET", f"/board/{name}") for name in assets()]
    return [*table, *files, *[("GET", path) for path in NOWHERE]]


def check_what_a_browser_is_given(gateway: GatewayProcess) -> set[str]:
    """Without a token. The paths that were answered."""
    found = {}
    for method, path in all_routes():
        with gateway.open(method, re.sub(r"\{.*?\}", "x", path), b"{}" if method == "POST" else None) as response:
            kind = response.getheader("content-type", "").partition(";")[0]
            body = b"" if kind == "text/event-stream" else response.read()
            found[method, path] = response.status, kind
            headers = {name.lower(): value for name, value in response.getheaders()}
        where = (method, path, response.status, headers)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy, where
        assert "unsafe" not in policy and "*" not in policy and "http" not in policy, where
        assert headers["cross-origin-opener-policy"] == "same-origin", where
        assert headers["x-content-type-options"] == "nosniff", where
        assert headers["referrer-policy"] == "no-referrer", where
        assert len(headers) == len(response.getheaders()), "a header is sent twice"
        assert kind != "text/html" or path in ("/", "/board/index.html"), where
        assert re.findall(rb"//[\w-]+\.[\w.-]+", body.replace(NAMESPACE, b"")) == [], where
    assert found["GET", "/"] == (200, "text/html") and found["GET", "/openapi.json"] == (200, "application/json")
    assert {found["GET", path] for path in NOWHERE} == {(404, "application/json")}
    return {path for (_, path), (status, _) in found.items() if status == 200}


def test_nothing_from_elsewhere_on_any_path(gateway: GatewayProcess) -> None:
    check_what_a_browser_is_given(gateway)


# --- strangers, where there are keys ---------------------------------------------------------------------------

#: What needs any token, and what needs an admin's. Besides these there are the page, and what probes read.
FOR_CLIENTS = [
    ("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"),
    ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"), ("GET", "/v1/models"), ("GET", "/v1/models/fake"),
    ("GET", "/v1/responses/resp_0"), ("DELETE", "/v1/responses/resp_0"), ("POST", "/v1/rerank"),
    ("POST", "/v1/reranking"), ("POST", "/v2/rerank"), ("POST", "/rerank"), ("POST", "/reranking"),
]  # fmt: skip
FOR_ADMINS = [
    ("GET", "/metrics"), ("GET", "/board/live"), ("GET", "/board/requests/" + "0" * 32), ("POST", "/board/drain"),
    ("POST", "/board/cancel"),
]  # fmt: skip


def test_every_door_wants_its_token(tmp_path: Any) -> None:
    folder = key_folder(tmp_path / "keys", alice="client", bob="client", root="admin", gateway="client")
    alice, bob = [api_tokens.issue(folder, name, int(time.time())) for name in ("alice", "bob")]
    with (
        Mesh(workers=1, fake=FakeOptions(slots=4, tokens_per_s=100), keys=folder) as mesh,
        GatewayProcess(mesh.address, "-vv", "--http-keys", str(folder.path)) as gateway,
    ):
        page = {"/", *(f"/board/{name}" for name in assets())}
        assert check_what_a_browser_is_given(gateway) == page | {"/openapi.json", "/healthz", "/health", "/readyz"}
        ways = gateway.get("/openapi.json")["paths"]
        offered = {path for path in ways if path.startswith("/v1/") or "rerank" in path}
        asked = {path.replace("/fake", "/{name}").replace("/resp_0", "/{id}") for _, path in FOR_CLIENTS}
        assert offered == asked, "a path was added: say here who may use it"
        for method, path in FOR_CLIENTS + FOR_ADMINS:
            for headers in ({}, {"authorization": "Bearer sk-llambo-no"}, {"authorization": "Bearer " + "x" * 5_000}):
                assert gateway.ask(method, path, b"{", **headers)[0] == 401, (method, path)
        for method, path in FOR_ADMINS:
            assert gateway.ask(method, path, b"{", authorization=f"Bearer {alice}")[0] == 403, (method, path)
        stored = gateway.post("/v1/responses", {"input": "x", "max_output_tokens": 1}, authorization=f"Bearer {alice}")
        for method in ("GET", "DELETE"):
            path = f"/v1/responses/{stored['id']}"
            assert gateway.ask(method, path, authorization=f"Bearer {bob}")[0] == 404
        url = f"ws://127.0.0.1:{gateway.port}/v1/stream"
        for words in (["llambo"], ["llambo", "sk-llambo-no"]):
            with pytest.raises(InvalidStatus), connect(url, subprotocols=[Subprotocol(word) for word in words]):
                pass
        with gateway.open("POST", CHAT, chat(max_tokens=500, stream=True), authorization=f"Bearer {alice}") as response:
            place = id_of(events(response, 2)[-1])
            with connect(url, subprotocols=[Subprotocol("llambo"), Subprotocol(bob)]) as other:
                asking = {"type": "ask", "id": "a", "body": chat(max_tokens=500, stream=True), "last_event_id": place}
                other.send(json.dumps(asking))
                assert json.loads(other.recv(TIMEOUT_S))["error"]["code"] == "unknown_request"
                # The connection outlives the token, what it may do does not.
                api_tokens.withdraw(folder, "bob")
                other.send(json.dumps({"type": "ask", "id": "b", "body": chat(max_tokens=1)}))
                assert json.loads(other.recv(TIMEOUT_S))["error"]["code"] == "invalid_api_key"
        written = gateway.process.log()
    assert "alice POST" in written
    for token in (alice, bob):
        assert token not in written, "a token is in the log"


# --- too much, too slowly, too cleverly ------------------------------------------------------------------------


def reply_to(gateway: GatewayProcess, *parts: bytes) -> bytes:
    """What is answered until the connection is closed; the parts are sent until the connection breaks."""
    with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) as connection:
        found = b""
        try:
            for part in parts:
                connection.sendall(part)
            while more := connection.recv(65_536):
                found += more
        except (ConnectionResetError, BrokenPipeError):
            pass
        return found


def test_a_head_without_an_end_is_cut(gateway: GatewayProcess) -> None:
    before = gateway.process.rss_bytes()
    begin = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"
    reply_to(gateway, begin + b"x: ", *[b"y" * 60_000] * 500)
    reply_to(gateway, begin, *[b"".join(b"x%d: y\r\n" % each for each in range(5_000))] * 500)
    reply_to(gateway, b"GET /", *[b"y" * 60_000] * 500)
    chunked = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ".encode()
    reply_to(gateway, chunked, *[b"y" * 60_000] * 500)
    assert gateway.process.rss_bytes() - before < 16 * 2**20, "30 MB were sent four times"
    assert gateway.get("/healthz") == {"status": "ok"}


def test_strangers_at_the_port_are_a_line_a_minute(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    with GatewayProcess(mesh.address) as gateway:
        for _ in range(3):
            assert reply_to(gateway, b"\xff\0\0\0\0\0\0\0\x01\x7f").startswith(b"HTTP/1.1 400")
        assert gateway.stop() == 0
        (line,) = [line for line in gateway.process.log().splitlines() if "HTTP" in line and "WARNING" in line]
        assert "127.0.0.1 has sent what is not valid HTTP; it is a peer of a mesh" in line and "7330" in line

    strangers = Strangers()
    for now_ms in (0, 1, 59_999, 60_000):
        strangers.report("peer", b"x", now_ms)
    assert caplog.messages == [
        "peer has sent what is not valid HTTP",
        "peer has sent what is not valid HTTP, as did 2 connections since the last such line",
    ]


def test_a_port_that_is_taken_names_the_option() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(LlamboError, match="cannot listen on") as refused:
        listen(*listener.getsockname())
    assert "--http-port 0" in refused.value.hint


def test_a_head_that_comes_in_one_piece_is_no_longer_than_others(gateway: GatewayProcess) -> None:
    for size, found in ((40_000, [b"200", b"404"]), (70_000, [b"431", b"431"])):
        head = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: " + b"y" * size + b"\r\n\r\n"
        path = b"GET /" + b"h" * size + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert [reply_to(gateway, each)[9:12] for each in (head, path)] == found


def test_a_body_that_is_too_large_is_read_far_enough_for_its_error(gateway: GatewayProcess) -> None:
    # A client that sends all of it before it reads gets the error
    for headers in ({}, {"connection": "close"}):
        status, reply, _ = gateway.ask("POST", CHAT, b" " * (20 * 2**20), **headers)
        assert status == 413, reply
    # and one that never comes to an end is disconnected, however it sends it.
    for framing in ("transfer-encoding: chunked", f"content-length: {2**40}"):
        with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n".encode())
            chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
            with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
                connection.sendall(chunk * (4 * gateway_server.DISCARDED_BYTES // len(chunk)))


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 4\r\ntransfer-encoding: chunked",
        b"content-length: 4\r\ncontent-length: 5",
        b"transfer-encoding: chunked, identity",
        b"transfer-encoding : chunked",
        b"content-length: +4",
        b"content-length: 4\r\n folded: x",
        b"x: a\nb: c\rd: e",
        b"host: attacker.example",
        b"host: localhost",
        b"transfer-encoding: gzip, chunked",
        b"transfer-encoding: gzip\r\ntransfer-encoding: chunked",
    ],
)
def test_what_two_servers_would_read_differently_is_refused(gateway: GatewayProcess, head: bytes) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    request = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n".encode()
    answer = reply_to(gateway, request + head + b"\r\n\r\n0\r\n\r\n" + smuggled)
    assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1 and b'"object":"list"' not in answer


def test_chunks_of_the_old_version_are_refused(gateway: GatewayProcess) -> None:
    answer = reply_to(gateway, f"POST {CHAT} HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("depth", [60, 300, 900, 1_100, 50_000])
def test_what_is_nested_deeply_is_an_error_of_the_caller(gateway: GatewayProcess, depth: int) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    asked = b'"messages":[{"role":"user","content":"x"}],"max_tokens":1,'
    bodies = [
        (CHAT, b"{" + asked + b'"json_schema":' + deep + b"}"),
        (CHAT, b"{" + asked + b'"metadata":' + deep + b"}"),
        (CHAT, b"{" + asked + b'"response_format":{"type":"json_schema","json_schema":{"schema":' + deep + b"}}}"),
        (CHAT, b"{" + asked + b'"tools":[{"type":"function","function":{"name":"f","parameters":' + deep + b"}}]}"),
        ("/v1/messages", b"{" + asked + b'"tools":[{"name":"f","input_schema":' + deep + b"}]}"),
        (
            "/v1/responses",
            b'{"input":"x","max_output_tokens":1,"text":{"format":{"type":"json_schema","name":"n","schema":'
            + deep
            + b"}}}",
        ),
        ("/v1/completions", b'{"prompt":' + b"[" * depth + b"]" * depth + b"}"),
        ("/v1/embeddings", b'{"input":' + b"[" * depth + b"]" * depth + b"}"),
    ]
    for path, body in bodies:
        status, reply, _ = gateway.ask("POST", path, body)
        assert status == 200 or 400 <= status < 500, (path, body[:120], status, reply)


def test_a_long_prompt_is_not_answered_many_times(gateway: GatewayProcess) -> None:
    status, reply, _ = gateway.ask("POST", "/v1/completions", {"prompt": "x" * 3_000_000, "n": 128, "max_tokens": 1})
    assert status == 400 and "128 answers" in reply["error"]["message"]


def too_much(socket: ClientConnection) -> None:
    socket.send(" " * (9 * 2**20))
    socket.recv(TIMEOUT_S)


def test_a_websocket_takes_no_longer_message_than_a_body(gateway: GatewayProcess) -> None:
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream", compression="deflate") as socket:
        assert not socket.protocol.extensions, "what is compressed may grow to anything"
        with pytest.raises(ConnectionClosed) as closed:
            too_much(socket)
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009  # (none: the client still wrote)


def test_what_a_websocket_does_not_read_stays_in_the_mesh_and_comes_when_it_reads() -> None:
    count, length = 8, 600
    # With log probabilities an event has some kilobytes
    asked = chat(max_tokens=length, stream=True, seed=1, logprobs=True, top_logprobs=20)
    with (
        Mesh(workers=1, fake=FakeOptions(slots=count + 1)) as mesh,
        GatewayProcess(mesh.address, "--http-unread-bytes", "1MiB") as gateway,
        socket.socket() as narrow,
    ):
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)  # otherwise the kernel stores all of it
        narrow.connect(("127.0.0.1", gateway.port))
        with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream", sock=narrow, max_queue=1) as reader:
            for number in range(count):
                reader.send(json.dumps({"type": "ask", "id": str(number), "body": asked}))
            mesh.until(lambda core: core.state.counters.requests.ended == count, "all answers are made")
            whole = gateway.post(CHAT, chat(max_tokens=length, seed=1))["choices"][0]["message"]["content"]
            assert mesh.look(lambda core: core.state.archive.owed_bytes), "the gateway has fetched all of it"
            texts: dict[str, str] = {}
            open_now = count
            while open_now:
                message = json.loads(reader.recv(TIMEOUT_S))
                assert message["type"] in ("event", "end", "waiting"), message
                open_now -= message["type"] == "end"
                if message["type"] == "event" and isinstance(message["data"], dict):
                    delta = message["data"]["choices"][0]["delta"].get("content") or ""
                    texts[message["id"]] = texts.get(message["id"], "") + delta
    assert set(texts.values()) == {whole} and len(texts) == count


def test_websockets_count_as_well(mesh: Mesh) -> None:
    with GatewayProcess(mesh.address, "--http-requests", "2") as gateway:
        url = f"ws://127.0.0.1:{gateway.port}/v1/stream"
        with connect(url), connect(url):
            with pytest.raises(InvalidStatus) as refused, connect(url):
                pass
            assert refused.value.response.status_code == 403
            assert gateway.get("/healthz") == {"status": "ok"}


@pytest.mark.parametrize(
    ("begins", "status"),
    [
        (b"", b"408"),
        (b"GET / HT", b"408"),
        (b"\r\n", b"408"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n|\r\n", b"200"),  # after an answer empty lines do not keep it open
        (b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nx", b""),
    ],
)
async def test_who_never_comes_to_the_point_is_cut(
    monkeypatch: pytest.MonkeyPatch, begins: bytes, status: bytes
) -> None:
    monkeypatch.setattr(gateway_server, "HEAD_S", 0.2)
    monkeypatch.setattr(gateway_server, "BODY_S", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        if message["type"] == "http.request":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: TimeoutProtocol(config, ServerState(), {}), "127.0.0.1", 0)
    async with server, asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        found = b""
        for number, part in enumerate(begins.split(b"|")):
            if number:
                found += await reader.readuntil(b"\r\n\r\n")
            writer.write(part)
        with suppress(ConnectionResetError):
            found += await reader.read()
        writer.close()
    assert found.split(b" ", 2)[1:2] == ([status] if status else []), found


async def test_a_websocket_has_no_time_limit() -> None:
    """Its connection was one of HTTP, whose next request would have to come within a time."""
    made: list[TimeoutProtocol] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="websockets-sansio")

    def protocol() -> TimeoutProtocol:
        made.append(TimeoutProtocol(config, ServerState(), {}))
        return made[-1]

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    async with server, asyncio.timeout(TIMEOUT_S):
        port = server.sockets[0].getsockname()[1]
        async with connect_async(f"ws://127.0.0.1:{port}/"):
            assert [each._timer for each in made] == [None]


def test_the_kernel_stores_little_for_who_takes_nothing() -> None:
    with listen("127.0.0.1", 0) as listener, socket.socket() as reader:
        set_tcp_unsent_limit(listener)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        reader.connect(listener.getsockname())
        writer, _ = listener.accept()
        with writer:
            writer.setblocking(False)
            taken = 0
            with suppress(BlockingIOError):
                while taken < 2**24:
                    taken += writer.send(b"x" * 65_536)
    assert taken < 2**20, "it is stored as if it had been read"


def test_who_takes_nothing_is_cut_by_the_kernel() -> None:
    with listen("127.0.0.1", 0) as listener:
        set_tcp_user_timeout(listener, 0.5)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            reader.connect(listener.getsockname())
            writer, _ = listener.accept()
            with writer:
                writer.settimeout(TIMEOUT_S)
                with pytest.raises(OSError, match="timed out") as cut:
                    writer.sendall(b"x" * 2**26)
                assert cut.value.errno == errno.ETIMEDOUT, "the test has timed out first"
