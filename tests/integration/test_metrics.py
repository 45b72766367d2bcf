"""Where Prometheus looks in: a real broker's page, and everybody who means ill standing before it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from llambo.broker.report import metrics_http as windows
from llambo.broker.report.metrics_http import CONNECTIONS, MOMENT_MS, PATIENCE_MS, PAUSE_MS, Window, token_in
from llambo.gateway.observe.gateway_metrics import TABLE
from llambo.mesh.security import api_tokens
from llambo.mesh.security.keyring import Folder
from llambo.mesh.service.prometheus import CONTENT_TYPE, OTHER
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.testing.mesh import Mesh, truth
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.engine.engine_options import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, events, id_of
from tests.unit.pages import Told, check_page, value

GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
TOKEN = "a-token-that-nobody-guesses"


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


def test_a_broker_is_scraped_while_it_streams() -> None:
    async def scenario(mesh: Mesh, port: int) -> None:
        async with mesh.client(name="reader") as client:
            stream = client.stream("hello", seed=5, max_tokens=60)
            seen = []
            async for piece in stream:
                seen += piece.ids
                if piece.index == 30:
                    status, body = await fetch(port)
                    assert status == 200
                    told = check_page(body)
                    assert 30 <= value(told, "llambo_broker_tokens_total", model="fake", **{"class": "none"}) <= 60
                    assert value(told, "llambo_broker_requests_running", model="fake", **{"class": "none"}) == 1
            assert seen == truth("hello", 5, 60)
            told = check_page((await fetch(port))[1])
            one: dict[str, str] = {"model": "fake", "class": "none"}
            assert value(told, "llambo_broker_requests_ended_total", model="fake", reason="length") == 1
            assert value(told, "llambo_broker_tokens_total", **one) == 60
            assert value(told, "llambo_broker_first_token_seconds_count", **one) == 1
            # Its chunks come 10 ms apart.
            paused = value(told, "llambo_broker_inter_token_seconds_sum", **one)
            assert value(told, "llambo_broker_inter_token_seconds_count", **one) == 59 and paused >= 59 * 0.008
            assert value(told, "llambo_broker_workers", state="ready", **{"class": "none"}) == 2
            assert value(told, "process_open_fds") > 10
            # The same without HTTP, but for what the process says of itself.
            asked = check_page(await client.metrics())
            assert {name for name in told if not name.startswith("process_")} == set(asked)
            assert asked["llambo_broker_tokens_total"] == told["llambo_broker_tokens_total"]

    window = Window("127.0.0.1:0")
    with Mesh(workers=2, fake=FakeOptions(tokens_per_s=100), window=window) as mesh:
        mesh.run(scenario(mesh, window.port))


def test_who_means_ill_harms_nobody() -> None:
    """Slowloris, garbage, readers that do not read, and 200 at once, before a broker that streams meanwhile."""

    async def scenario(mesh: Mesh, port: int) -> None:
        async with mesh.client() as client:
            stream = client.stream("hello", seed=5, max_tokens=150)
            first = await stream.next_piece()
            assert first is not None
            idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * CONNECTIONS)]
            for number, each in enumerate(idle):
                each.sendall(GET[: 1 + number % len(GET[:-1])])  # never the end of it
            garbage = [
                b"\x16\x03\x01" + os.urandom(400) + b"\r\n\r\n",
                b"\0" * 9_000,
                b"GET /metrics\r\n\r\n",
                b"\r\n\r\n",
            ]
            turned_away = [status for status, _ in await asyncio.gather(*[fetch(port, each) for each in garbage])]
            assert turned_away == [400, 431, 400, 400]
            answers = [status for status, _ in await asyncio.gather(*[fetch(port) for _ in range(200)])]
            print(f"{answers.count(200)} of 200 at once were served")
            # Who was too slow between coming and asking had to make room. Asking again, without a crowd, he is served.
            assert set(answers) <= {0, 200} and answers.count(200) >= 100
            assert [(await fetch(port))[0] for _ in range(answers.count(0))] == [200] * answers.count(0)
            for each in idle:
                each.close()
            status, body = await fetch(port)
            assert status == 200
            check_page(body)
            ids = list(first.ids)
            async for piece in stream:
                ids += piece.ids
            assert ids == truth("hello", 5, 150)

    window = Window("127.0.0.1:0")
    with Mesh(workers=1, fake=FakeOptions(tokens_per_s=100), window=window) as mesh:
        mesh.run(scenario(mesh, window.port))
        assert mesh.counter("workers_lost") == 0


# --- the window alone, at a clock of ours ----------------------------------------------------------------


class Standing:
    """A window whose loop is turned by hand. Its page is long enough to fill any socket's buffer."""

    def __init__(self, page: str = "page\n", token: str = "") -> None:
        self.window = Window("127.0.0.1:0", token)
        self.poller = zmq.Poller()
        self.made = self.now_ms = 0
        self.window.open(self.poller, self._page)
        self._text = page

    def _page(self) -> str:
        self.made += 1
        return self._text

    def turn(self, wait_ms: int = 0) -> None:
        self.window.turn(dict(self.poller.poll(wait_ms)), self.now_ms)

    def outside(self, said: bytes) -> socket.socket:
        """Somebody who has come, and said this."""
        there = socket.create_connection(("127.0.0.1", self.window.port), TIMEOUT_S)
        there.sendall(said)
        return there

    def visitor(self, said: bytes) -> socket.socket:
        """... and the window has noticed."""
        there = self.outside(said)
        self.turn(int(TIMEOUT_S * 1_000))
        return there


@pytest.fixture
def standing() -> Iterator[Standing]:
    made = Standing("x" * 50_000_000)
    yield made
    made.window.close()


def hung_up(visitor: socket.socket) -> bool:
    """Whether the window has closed this connection, which it may have done with something unread."""
    try:
        while visitor.recv(2**20):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_who_does_not_read_is_dropped(standing: Standing) -> None:
    with standing.visitor(GET) as slow:
        standing.turn()
        assert standing.window.due_ms == PATIENCE_MS
        standing.now_ms = PATIENCE_MS - 1
        standing.turn()
        assert standing.window.due_ms == PATIENCE_MS
        standing.now_ms = PATIENCE_MS
        standing.turn()
        assert standing.window.due_ms == windows.NEVER
        assert hung_up(slow)


def test_who_does_not_ask_is_dropped(standing: Standing) -> None:
    with standing.visitor(b"GET /met") as slow:
        standing.now_ms = PATIENCE_MS
        standing.turn()
        assert hung_up(slow) and standing.made == 0


def test_who_only_holds_on_makes_room_for_others(standing: Standing) -> None:
    holding = [standing.visitor(b"G") for _ in range(CONNECTIONS)]
    waiting = standing.outside(b"G")
    standing.turn()
    assert not standing.poller.poll(50), "who waits outside would turn the loop again and again"
    standing.now_ms = standing.window.due_ms
    assert standing.now_ms == MOMENT_MS
    standing.turn()
    assert hung_up(holding[0])
    holding[1].settimeout(0.05)
    assert not hung_up(holding[1])
    for each in (*holding, waiting):
        each.close()


def test_who_waits_outside_comes_in_when_another_leaves(standing: Standing) -> None:
    holding = [standing.visitor(b"G") for _ in range(CONNECTIONS)]
    with standing.outside(GET) as waiting:
        standing.turn()
        holding[3].close()
        standing.turn(int(TIMEOUT_S * 1_000))
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"
    for each in holding:
        each.close()


def test_a_page_is_made_once_for_all_who_ask_at_once() -> None:
    standing = Standing()
    for at in (0, windows.PAGE_MS - 1, windows.PAGE_MS):
        standing.now_ms = at
        with standing.visitor(GET) as reader:
            assert reader.recv(4096).endswith(b"\r\n\r\npage\n")
    assert standing.made == 2
    standing.window.close()


def test_a_page_that_takes_long_is_made_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    standing, seconds = Standing(), iter((0.0, 0.05, 9.0, 9.05))
    monkeypatch.setattr("llambo.broker.report.metrics_http.time.monotonic", lambda: next(seconds))
    for at in (0, windows.PAGE_MS, windows.PAGE_SHARE * 50 - 1, windows.PAGE_SHARE * 50):
        standing.now_ms = at
        with standing.visitor(GET) as reader:
            assert reader.recv(4096).endswith(b"\r\n\r\npage\n")
    assert standing.made == 2
    standing.window.close()


def test_a_page_that_cannot_be_made_is_no_end(caplog: pytest.LogCaptureFixture) -> None:
    standing = Standing()

    def broken() -> str:
        raise ZeroDivisionError

    standing.window.open(standing.poller, broken)
    with standing.visitor(GET) as reader:
        assert reader.recv(4096).startswith(b"HTTP/1.1 500 ")
    assert "ZeroDivisionError" in caplog.text
    standing.window.close()


def test_without_descriptors_it_pauses(standing: Standing, caplog: pytest.LogCaptureFixture) -> None:
    door: Any = standing.window._door

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(door, name)

        def accept(self) -> Any:
            raise OSError(errno.EMFILE, "too many")

    standing.window._door = Full()  # type: ignore[assignment]
    with socket.create_connection(("127.0.0.1", standing.window.port)) as waiting:
        waiting.sendall(GET)
        standing.turn(int(TIMEOUT_S * 1_000))
        assert "no descriptor" in caplog.text
        assert not standing.poller.poll(50), "it would turn and turn"
        standing.window._door = door
        standing.now_ms = standing.window.due_ms
        assert standing.now_ms == PAUSE_MS
        standing.turn()
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"


# --- who may ---------------------------------------------------------------------------------------------


def test_beyond_this_machine_it_wants_a_token() -> None:
    with pytest.raises(LlamboError, match="metrics_token") as refused:
        Window("0.0.0.0:0")
    assert refused.value.code is Code.BAD_SETTING
    Window("0.0.0.0:0", TOKEN).close()
    for wrong in ("9330", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:x", ":9330"):
        with pytest.raises(LlamboError, match="expected host:port"):
            Window(wrong)
    there = Window("127.0.0.1:0")
    with pytest.raises(LlamboError, match="in use"):
        Window(f"127.0.0.1:{there.port}")
    there.close()


def test_the_token_is_asked_for() -> None:
    standing = Standing(token=TOKEN)
    with standing.visitor(GET) as reader:
        assert reader.recv(4096).startswith(b"HTTP/1.1 401 ")
    with standing.visitor(GET[:-2] + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()) as reader:
        assert reader.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert standing.made == 1
    standing.window.close()


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
    assert "everybody on this machine can read" in caplog.text
    with pytest.raises(LlamboError, match="cannot be read"):
        token_in(str(tmp_path / "no"))
    assert token_in("") == ""


# --- the gateway's ---------------------------------------------------------------------------------------


CHAT = "/v1/chat/completions"


def page_of(gateway: GatewayProcess, **headers: str) -> Told:
    status, body, told = gateway.ask("GET", "/metrics", **headers)
    assert status == 200, body
    assert told["content-type"] == CONTENT_TYPE
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
            told = page_of(gateway)
            assert value(told, "llambo_gateway_answers_open") == value(told, "llambo_gateway_readers") == 1
            assert value(told, "llambo_gateway_http_open") == 2
            assert 7 < value(told, "llambo_gateway_tokens_total", model="fake") < 207
        with gateway.open("POST", CHAT, asked, last_event_id=place) as response:
            rest = events(response)
            assert rest[-1].endswith(b"data: [DONE]\n")
        for number in range(100):  # nothing that somebody invents becomes a label
            assert gateway.ask("POST", CHAT, chat(model=f"no-model-{number}"))[0] == 404
        assert gateway.ask("GET", "/no/such/place")[0] == 404
        assert gateway.ask("POST", "/v1/messages", {"model": 3})[0] == 400
        assert gateway.ask("MKCOL", "/v1/models")[0] in (404, 405)
        told = page_of(gateway)
        chats = {"api": "openai", "route": CHAT, "method": "POST"}
        assert value(told, "llambo_gateway_http_requests_total", status="2xx", **chats) == 3
        assert value(told, "llambo_gateway_http_requests_total", status="4xx", **chats) == 100
        assert value(told, "llambo_gateway_errors_total", api="openai", code="unknown_model") == 100
        assert value(told, "llambo_gateway_errors_total", api="anthropic", code="bad_request") == 1
        assert value(told, "llambo_gateway_answers_ended_total", model="fake", reason="length") == 2
        assert value(told, "llambo_gateway_answers_ended_total", model=OTHER, reason="unknown_model") == 100
        assert value(told, "llambo_gateway_first_token_seconds_count", model="fake") == 2
        assert value(told, "llambo_gateway_tokens_total", model="fake") == 207
        assert value(told, "llambo_gateway_resumed_total") == value(told, "llambo_gateway_disconnects_total") == 1
        labels = {label for samples in told.values() for key in samples for _, label in key}
        assert not [label for label in labels if "no-model" in label or "/no/such" in label or "MKCOL" in label]
        names = {name.removesuffix("_bucket") for name in told}
        assert {metric.name for metric in TABLE} <= names


def test_with_keys_the_gateway_shows_them_to_an_admin_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://127.0.0.1:1")
    for name, role in (("alice", "client"), ("root", "admin"), ("gateway", "client")):
        folder.add(Identity(name, role), int(time.time()))  # type: ignore[arg-type]
    alice, root = [api_tokens.issue(folder, name, int(time.time())) for name in ("alice", "root")]
    with Mesh(workers=0, keys=folder) as mesh, GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway:
        assert gateway.ask("GET", "/metrics")[0] == 401
        assert gateway.ask("GET", "/metrics", authorization=f"Bearer {alice}")[0] == 403
        told = page_of(gateway, authorization=f"Bearer {root}")
        assert value(told, "llambo_gateway_errors_total", api="own", code="forbidden") == 1
