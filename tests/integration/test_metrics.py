"""The metrics page of a real broker and gateway, with hostile clients at the same port."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llambo.broker.report import metrics_http
from llambo.broker.report.metrics_http import (
    CONNECTION_S,
    CONNECTIONS,
    FULL_PAUSE_S,
    PAGE_S,
    PAGE_SHARE,
    MetricsServer,
    Snapshot,
    token_in,
)
from llambo.gateway.gateway_metrics import TABLE
from llambo.mesh.security import api_tokens
from llambo.mesh.service.prometheus import CONTENT_TYPE, OTHER
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import Mesh, key_folder, truth
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, events, id_of
from tests.unit.pages import Samples, check_page, value

GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
TOKEN = "a-token-that-cannot-be-guessed"


async def fetch(port: int, head: bytes = GET) -> tuple[int, str]:
    """Status and body; 0: it was turned away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head)
        reply = (await reader.read()).decode()
    except ConnectionError:
        return 0, ""
    finally:
        writer.close()
    first, _, body = reply.partition("\r\n\r\n")
    return (int(first.split()[1]) if first else 0), body


# --- a broker's ----------------------------------------------------------------------------------------


async def test_a_broker_is_scraped_while_it_streams() -> None:
    metrics = MetricsServer("127.0.0.1:0")
    with Mesh(workers=2, fake=FakeOptions(tokens_per_s=100), metrics=metrics) as mesh:
        async with mesh.client(name="reader") as client:
            stream = client.stream("hello", seed=5, max_tokens=60)
            seen = []
            async for piece in stream:
                seen += piece.ids
                if piece.index == 30:
                    status, body = await fetch(metrics.port)
                    assert status == 200
                    page = check_page(body)
                    assert 30 <= value(page, "llambo_broker_tokens_total", model="fake", **{"class": "none"}) <= 60
                    assert value(page, "llambo_broker_requests_running", model="fake", **{"class": "none"}) == 1
            assert seen == truth("hello", 5, 60)
            page = check_page((await fetch(metrics.port))[1])
            one: dict[str, str] = {"model": "fake", "class": "none"}
            assert value(page, "llambo_broker_requests_ended_total", model="fake", reason="length") == 1
            assert value(page, "llambo_broker_tokens_total", **one) == 60
            assert value(page, "llambo_broker_first_token_seconds_count", **one) == 1
            # Its chunks come 10 ms apart.
            paused = value(page, "llambo_broker_inter_token_seconds_sum", **one)
            assert value(page, "llambo_broker_inter_token_seconds_count", **one) == 59 and paused >= 59 * 0.008
            assert value(page, "llambo_broker_workers", state="ready", **{"class": "none"}) == 2
            assert value(page, "process_open_fds") > 10
            # The same without HTTP, but for what the process says of itself.
            asked = check_page(await client.metrics())
            assert {name for name in page if not name.startswith("process_")} == set(asked)
            assert asked["llambo_broker_tokens_total"] == page["llambo_broker_tokens_total"]


async def test_hostile_scrapers_disturb_no_stream() -> None:
    """Slowloris, garbage, readers that do not read, and 200 at once, before a broker that streams meanwhile."""
    metrics = MetricsServer("127.0.0.1:0")
    with Mesh(workers=1, fake=FakeOptions(tokens_per_s=100), metrics=metrics) as mesh:
        async with mesh.client() as client:
            stream = client.stream("hello", seed=5, max_tokens=150)
            first = await stream.next_piece()
            assert first is not None
            idle = [socket.create_connection(("127.0.0.1", metrics.port)) for _ in range(3 * CONNECTIONS)]
            for number, each in enumerate(idle):
                each.sendall(GET[: 1 + number % len(GET[:-1])])  # never the end of it
            garbage = [
                b"\x16\x03\x01" + os.urandom(400) + b"\r\n\r\n",
                b"\0" * 9_000,
                b"GET /metrics\r\n\r\n",
                b"\r\n\r\n",
            ]
            turned_away = [
                status for status, _ in await asyncio.gather(*[fetch(metrics.port, each) for each in garbage])
            ]
            assert turned_away == [400, 431, 400, 400]
            answers = [status for status, _ in await asyncio.gather(*[fetch(metrics.port) for _ in range(200)])]
            print(f"{answers.count(200)} of 200 at once were served")
            # A connection without a request may be closed to make room. A second request, without the crowd, is served.
            assert set(answers) <= {0, 200} and answers.count(200) >= 100
            assert [(await fetch(metrics.port))[0] for _ in range(answers.count(0))] == [200] * answers.count(0)
            for each in idle:
                each.close()
            status, body = await fetch(metrics.port)
            assert status == 200
            check_page(body)
            ids = list(first.ids)
            async for piece in stream:
                ids += piece.ids
            assert ids == truth("hello", 5, 150)
        assert mesh.counter("workers_lost") == 0


# --- the server alone, with a loop of ours ---


class Loop:
    """A server and a thread that turns as the broker's loop does, until it is to stand still."""

    def __init__(self, page: str = "page\n", token: str = "") -> None:
        self.server = MetricsServer("127.0.0.1:0", token)
        self.made = 0
        self.page = page
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.server.start()

    def _run(self) -> None:
        while not self._stopping.wait(0.002):
            self.server.snapshot.turned(self._make)

    def _make(self) -> str:
        self.made += 1
        if not self.page:
            raise ZeroDivisionError
        return self.page

    def connect(self, request: bytes) -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", self.server.port), TIMEOUT_S)
        peer.sendall(request)
        return peer

    def ask(self, request: bytes = GET) -> bytes:
        with self.connect(request) as peer:
            return read_all(peer)

    def stand_still(self) -> None:
        self._stopping.set()
        self._thread.join()

    def close(self) -> None:
        self.stand_still()
        self.server.close()


def read_all(peer: socket.socket) -> bytes:
    """Until the server closes, which it may do with something unread."""
    reply = bytearray()
    with suppress(ConnectionError):
        while part := peer.recv(2**20):
            reply += part
    return bytes(reply)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_a_connection_that_does_not_read_is_closed() -> None:
    loop = Loop("x" * 50_000_000)  # fills the buffers of any socket
    try:
        with loop.connect(GET) as slow:
            time.sleep(CONNECTION_S + 0.5)
            assert len(read_all(slow)) < 50_000_000
        assert loop.made == 1
    finally:
        loop.close()


def test_a_connection_that_does_not_ask_is_closed(loop: Loop) -> None:
    began = time.monotonic()
    with loop.connect(b"GET /met") as slow:
        for letter in b"rics HTTP/1.1":  # a byte now and then buys no time
            time.sleep(0.1)
            slow.sendall(bytes([letter]))
        assert read_all(slow) == b""
    assert CONNECTION_S - 0.1 <= time.monotonic() - began < CONNECTION_S + 2 and loop.made == 0


def test_idle_connections_make_room_for_others(loop: Loop) -> None:
    idle = [loop.connect(b"G") for _ in range(CONNECTIONS)]
    began = time.monotonic()
    assert b"200 OK" in loop.ask()
    assert time.monotonic() - began < CONNECTION_S / 2, "it waited until one was closed for its age"
    assert read_all(idle[0]) == b""
    idle[-1].settimeout(0.05)
    with pytest.raises(TimeoutError):
        idle[-1].recv(1)
    for each in idle:
        each.close()


def test_one_that_waits_is_served_when_another_leaves(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "CROWDED_S", 60.0)
    idle = [loop.connect(b"G") for _ in range(CONNECTIONS)]
    with loop.connect(GET) as waiting:
        time.sleep(0.1)
        idle[3].close()
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"
    for each in idle:
        each.close()


def test_one_loop_that_stands_still_fails_both_paths(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert b" 200 " in loop.ask(b"GET /healthz HTTP/1.1\r\n\r\n") and b" 200 " in loop.ask()
    loop.stand_still()
    monkeypatch.setattr(metrics_http, "STALLED_S", 0.1)
    time.sleep(PAGE_S)
    assert loop.ask(b"GET /healthz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 503 ")
    assert loop.ask().startswith(b"HTTP/1.1 503 ")


class Turning:
    """A snapshot at a clock of ours, with a reader in a thread."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.now, self.made, self._takes_s = 0.0, 0, takes_s
        self.snapshot = Snapshot(lambda: self.now)

    def make(self) -> str:
        self.made += 1
        self.now += self._takes_s
        return f"page {self.made}"

    def read(self) -> str | None:
        pages: list[str | None] = []
        reader = threading.Thread(target=lambda: pages.append(self.snapshot.page()))
        reader.start()
        while reader.is_alive():
            self.snapshot.turned(self.make)
            reader.join(0.001)
        return pages[0]


def test_a_page_is_made_once_for_all_who_ask_at_once() -> None:
    turning = Turning()
    pages = []
    for turning.now in (0.0, PAGE_S - 0.01, PAGE_S):
        pages.append(turning.read())
    assert pages == ["page 1", "page 1", "page 2"]


def test_a_page_that_takes_long_is_made_seldom() -> None:
    turning = Turning(takes_s=0.05)
    assert turning.read() == "page 1"
    until = turning.now + PAGE_SHARE * 0.05
    for turning.now in (until - 0.5, until - 0.01):
        assert turning.read() == "page 1"
    turning.now = until + 0.01
    assert turning.read() == "page 2"


def test_a_page_that_cannot_be_made_is_no_end(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    loop.page = ""
    assert loop.ask().startswith(b"HTTP/1.1 500 ")
    assert "ZeroDivisionError" in caplog.text
    loop.page = "page\n"
    time.sleep(PAGE_S)
    assert loop.ask().endswith(b"\r\n\r\npage\n")


def test_without_descriptors_it_pauses(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accepted: list[float] = []
    listening: Any = loop.server.socket

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(listening, name)

        def accept(self) -> Any:
            accepted.append(time.monotonic())
            if len(accepted) < 2:
                raise OSError(errno.EMFILE, "too many")
            return listening.accept()

    loop.server.socket = Full()  # type: ignore[assignment]
    assert b"200 OK" in loop.ask()
    assert "no descriptor" in caplog.text
    assert accepted[1] - accepted[0] >= FULL_PAUSE_S


# --- permissions ---


def test_beyond_this_machine_it_wants_a_token() -> None:
    with pytest.raises(LlamboError, match="metrics_token") as refused:
        MetricsServer("0.0.0.0:0")
    assert refused.value.code is Code.BAD_SETTING
    MetricsServer("0.0.0.0:0", TOKEN).close()
    for wrong in ("9330", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", ":9330"):
        with pytest.raises(LlamboError, match="expected host:port"):
            MetricsServer(wrong)
    there = MetricsServer("127.0.0.1:0")
    with pytest.raises(LlamboError, match="in use"):
        MetricsServer(f"127.0.0.1:{there.port}")
    there.close()


def test_the_token_is_asked_for() -> None:
    loop = Loop(token=TOKEN)
    try:
        assert loop.ask().startswith(b"HTTP/1.1 401 ")
        assert loop.ask(GET[:-2] + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 ")
        assert loop.made == 1
    finally:
        loop.close()


def test_a_token_is_read_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    for wrong in ("", "short", "two words of some length", "ümlaute-und-noch-viel-mehr"):
        file.write_text(wrong)
        with pytest.raises(LlamboError, match="one word of at least"):
            token_in(str(file))
    file.write_text(TOKEN + "\n")
    file.chmod(stat.S_IRUSR)
    assert token_in(str(file)) == TOKEN and not caplog.text
    file.chmod(stat.S_IRUSR | stat.S_IROTH)
    assert token_in(str(file)) == TOKEN
    assert "every user of this machine can read" in caplog.text
    with pytest.raises(LlamboError, match="cannot be read"):
        token_in(str(tmp_path / "no"))
    assert token_in("") == ""


# --- the gateway's ---------------------------------------------------------------------------------------


CHAT = "/v1/chat/completions"


def page_of(gateway: GatewayProcess, **headers: str) -> Samples:
    status, body, fields = gateway.ask("GET", "/metrics", **headers)
    assert status == 200, body
    assert fields["content-type"] == CONTENT_TYPE
    return check_page(body.decode())


def test_a_gateway_counts_what_it_answers() -> None:
    with (
        Mesh(workers=1, fake=FakeOptions(tokens_per_s=200)) as mesh,
        GatewayProcess(mesh.address, "--resume-ms", "60000") as gateway,
    ):
        gateway.post(CHAT, chat(max_tokens=7))
        asked = chat(max_tokens=200, stream=True)
        with gateway.open("POST", CHAT, asked) as response:
            place = id_of(events(response, 20)[-1])
            page = page_of(gateway)
            assert value(page, "llambo_gateway_answers_open") == value(page, "llambo_gateway_readers") == 1
            assert value(page, "llambo_gateway_http_open") == 2
            assert 7 < value(page, "llambo_gateway_tokens_total", model="fake") < 207
        with gateway.open("POST", CHAT, asked, last_event_id=place) as response:
            rest = events(response)
            assert rest[-1].endswith(b"data: [DONE]\n")
        for number in range(100):  # nothing that a client invents becomes a label
            assert gateway.ask("POST", CHAT, chat(model=f"no-model-{number}"))[0] == 404
        assert gateway.ask("GET", "/no/such/place")[0] == 404
        assert gateway.ask("POST", "/v1/messages", {"model": 3})[0] == 400
        assert gateway.ask("MKCOL", "/v1/models")[0] in (404, 405)
        page = page_of(gateway)
        chats = {"api": "openai", "route": CHAT, "method": "POST"}
        assert value(page, "llambo_gateway_http_requests_total", status="2xx", **chats) == 3
        assert value(page, "llambo_gateway_http_requests_total", status="4xx", **chats) == 100
        assert value(page, "llambo_gateway_errors_total", api="openai", code="unknown_model") == 100
        assert value(page, "llambo_gateway_errors_total", api="anthropic", code="bad_request") == 1
        assert value(page, "llambo_gateway_answers_ended_total", model="fake", reason="length") == 2
        assert value(page, "llambo_gateway_answers_ended_total", model=OTHER, reason="unknown_model") == 100
        assert value(page, "llambo_gateway_first_token_seconds_count", model="fake") == 2
        assert value(page, "llambo_gateway_tokens_total", model="fake") == 207
        assert value(page, "llambo_gateway_resumed_total") == value(page, "llambo_gateway_disconnects_total") == 1
        labels = {label for samples in page.values() for key in samples for _, label in key}
        assert not [label for label in labels if "no-model" in label or "/no/such" in label or "MKCOL" in label]
        names = {name.removesuffix("_bucket") for name in page}
        assert {metric.name for metric in TABLE} <= names


def test_with_keys_the_gateway_shows_them_to_an_admin_alone(tmp_path: Path) -> None:
    folder = key_folder(tmp_path / "keys", alice="client", root="admin", gateway="client")
    alice, root = [api_tokens.issue(folder, name, int(time.time())) for name in ("alice", "root")]
    with Mesh(workers=0, keys=folder) as mesh, GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway:
        assert gateway.ask("GET", "/metrics")[0] == 401
        assert gateway.ask("GET", "/metrics", authorization=f"Bearer {alice}")[0] == 403
        page = page_of(gateway, authorization=f"Bearer {root}")
        assert value(page, "llambo_gateway_errors_total", api="own", code="forbidden") == 1
