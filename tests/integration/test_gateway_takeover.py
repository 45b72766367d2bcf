"""A stream whose gateway is gone goes on at another one; and no answer that was cut short looks like a whole one."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from llambo.testing.mesh import Mesh
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, data_of, events, id_of
from tests.integration.test_two_brokers import both_know, two_brokers

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
PATHS = (CHAT, TEXT, MESSAGES, RESPONSES)
FAKE = FakeOptions(slots=16, tokens_per_s=150)


def body_of(path: str, tokens: int, **more: Any) -> dict[str, Any]:
    match path:
        case "/v1/completions":
            return {"prompt": "x", "max_tokens": tokens, **more}
        case "/v1/responses":
            return {"input": "x", "max_output_tokens": tokens, **more}
        case _:
            return chat("x", max_tokens=tokens, **more)


def said(data: list[Any]) -> list[Any]:
    """Without what differs between two requests that have the same tokens: ids, times and workers."""

    def same(value: Any) -> Any:
        if isinstance(value, dict):
            left_out = ("id", "item_id", "created", "created_at", "llambo", "usage")
            return {key: same(each) for key, each in value.items() if key not in left_out}
        return [same(each) for each in value] if isinstance(value, list) else value

    return [same(each) for each in data]


def streamed(gateway: GatewayProcess, path: str, body: dict[str, Any]) -> list[Any]:
    with gateway.open("POST", path, body) as response:
        return said([data_of(event) for event in events(response)])


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=2, fake=FAKE) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address, "--resume-ms", "300") as gateway:
        yield gateway


# --- ends that are no natural ones ---------------------------------------------------------------------------


def cancel_the_only_one(mesh: Mesh) -> None:
    mesh.until(lambda core: len(core.state.running) == 1, "it runs")
    (id,) = mesh.look(lambda core: [id.hex() for id in core.state.requests])
    mesh.commands.ok("cancel", id)


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_was_cancelled_ends_with_an_error(mesh: Mesh, gateway: GatewayProcess, path: str) -> None:
    mesh.until(lambda core: not core.state.requests, "nothing is left of other tests")
    with gateway.open("POST", path, body_of(path, 50_000, stream=True)) as response:
        received = events(response, 5)
        cancel_the_only_one(mesh)
        received += events(response)
    last = data_of(received[-1])
    error = last["response"]["error"] if path == RESPONSES else last["error"]
    assert error["retryable"] is True
    assert (error["code"] if path == RESPONSES else error["type"]) == {
        CHAT: "server_error", TEXT: "server_error", MESSAGES: "api_error", RESPONSES: "server_error"
    }[path]  # fmt: skip
    # Nothing before it says that the answer is complete.
    others = json.dumps([data_of(event) for event in received])
    assert not [each for each in ("length", "max_tokens", "completed", "incomplete") if f': "{each}"' in others]
    assert all(data_of(event) is not None for event in received), "there is a [DONE]"


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_is_not_streamed_and_was_cancelled_is_an_error(
    mesh: Mesh, gateway: GatewayProcess, path: str
) -> None:
    mesh.until(lambda core: not core.state.requests, "nothing is left of other tests")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(gateway.ask, "POST", path, body_of(path, 50_000))
        cancel_the_only_one(mesh)
        status, body, headers = asked.result(TIMEOUT_S)
    assert (status, body["error"]["retryable"], headers["x-should-retry"]) == (409, True, "true")


def test_over_a_websocket_only_a_whole_answer_has_an_end(mesh: Mesh, gateway: GatewayProcess) -> None:
    mesh.until(lambda core: not core.state.requests, "nothing is left of other tests")
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as socket:
        socket.send(json.dumps({"type": "ask", "id": "a", "body": body_of(CHAT, 50_000)}))
        socket.recv(TIMEOUT_S)
        cancel_the_only_one(mesh)
        received = messages_of(socket, "a")
    assert (received[-1]["type"], received[-1]["error"]["code"], received[-1]["error"]["retryable"]) == (
        "error", "cancelled", True
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_ran_out_of_time_says_so(gateway: GatewayProcess, path: str) -> None:
    body = gateway.post(path, body_of(path, 50_000, deadline_ms=300))
    why = {
        CHAT: lambda: body["choices"][0]["finish_reason"],
        TEXT: lambda: body["choices"][0]["finish_reason"],
        MESSAGES: lambda: body["stop_reason"],
        RESPONSES: lambda: body["incomplete_details"]["reason"],
    }
    assert why[path]() == "deadline"


# --- another gateway -----------------------------------------------------------------------------------------


def messages_of(socket: ClientConnection, id: str, count: int = 10**9) -> list[dict[str, Any]]:
    """The messages of one request: so many, or up to its end or error."""
    found: list[dict[str, Any]] = []
    while len(found) < count and (not found or found[-1]["type"] not in ("end", "error")):
        message = json.loads(socket.recv(TIMEOUT_S))
        if message["id"] == id:
            found.append(message)
    return found


def kill(gateway: GatewayProcess) -> None:
    gateway.process.send(signal.SIGKILL)
    gateway.process.end()


class Reader:
    """One stream of events, or the answer to one question over a WebSocket, from one gateway and then another."""

    def __init__(self, path: str, tokens: int, *, socket: bool = False, **more: Any) -> None:
        self.path, self.socket, self.choices = path, socket, int(more.get("n", 1))
        self.body = body_of(path, tokens, stream=True, **more)
        self.ids: list[str] = []
        self.data: list[Any] = []
        self._open = ExitStack()
        self._source: Any = None

    def begin(self, gateway: GatewayProcess) -> None:
        place = self.ids[-1] if self.ids else ""
        if self.socket:
            self._source = self._open.enter_context(connect(f"ws://127.0.0.1:{gateway.port}/v1/stream"))
            asked = {"type": "ask", "id": "a", "api": self.path.split("/")[2], "body": self.body}
            self._source.send(json.dumps(asked | ({"last_event_id": place} if place else {})))
        else:
            headers = {"last_event_id": place} if place else {}
            self._source = self._open.enter_context(gateway.open("POST", self.path, self.body, **headers))

    def read(self, count: int = 10**9) -> None:
        if self.socket:
            messages = [each for each in messages_of(self._source, "a", count) if each["type"] == "event"]
            self.ids += [message["event_id"] for message in messages]
            self.data += [None if message["data"] == "[DONE]" else message["data"] for message in messages]
        else:
            received = events(self._source, count)
            self.ids += [id_of(event) for event in received]
            self.data += [data_of(event) for event in received]

    def close(self) -> None:
        self._open.close()

    def by_choice(self, data: list[Any]) -> list[list[Any]]:
        """Of several choices the order is left open."""
        if self.choices == 1:
            return [data]
        indexes = [each["choices"][0]["index"] if each and each["choices"] else -1 for each in data]
        return [
            [each for each, index in zip(data, indexes, strict=True) if index == choice]
            for choice in range(-1, self.choices)
        ]

    def check(self, gateway: GatewayProcess) -> None:
        """Every event came once, and says what that of an undisturbed stream says."""
        assert len(set(self.ids)) == len(self.ids)
        assert self.by_choice(said(self.data)) == self.by_choice(streamed(gateway, self.path, self.body))


def test_streams_that_were_taken_over_outlive_the_broker() -> None:
    """Their gateway is killed; then the broker, and it begins again without a memory."""
    readers = [Reader(path, 120, seed=number) for number, path in enumerate(PATHS)]
    readers += [Reader(path, 120, seed=7, n=3) for path in (CHAT, TEXT)]
    readers += [Reader(CHAT, 120, seed=8, socket=True), Reader(CHAT, 120, seed=9, n=2, socket=True)]
    fake = FakeOptions(slots=16, tokens_per_s=60)
    with Mesh(workers=2, fake=fake, broker="process") as mesh, GatewayProcess(mesh.address) as second:
        with GatewayProcess(mesh.address) as first:
            for reader in readers:
                reader.begin(first)
            for reader in readers:
                reader.read(10)
            kill(first)
        for reader in readers:
            reader.begin(second)
        for reader in readers:
            reader.read(5)
        mesh.restart_broker(signal.SIGKILL)
        for reader in readers:
            reader.read()
            reader.close()
        with ThreadPoolExecutor(len(readers)) as pool:
            list(pool.map(lambda reader: reader.check(second), readers))


async def test_with_two_brokers_a_stream_is_found_at_either() -> None:
    """Also if the broker is killed with the gateway: the worker has it, and no reader gave a seed."""
    with two_brokers(2, FAKE) as brokers:
        await both_know(brokers, 2)
        addresses = [mesh.address for mesh in brokers]
        with GatewayProcess(",".join(addresses)) as second:
            for mesh in brokers:
                reader = Reader(CHAT, 200)
                with GatewayProcess(mesh.address) as first:
                    reader.begin(first)
                    reader.read(15)
                    kill(first)
                    if mesh is brokers[1]:
                        assert mesh.process is not None
                        mesh.process.send(signal.SIGKILL)
                reader.begin(second)
                reader.read()
                reader.close()
                finishes = [each["choices"][0]["finish_reason"] for each in reader.data[:-1]]
                assert finishes == [None] * (1 + 200) + ["length"]
                if mesh is brokers[0]:
                    submitted = []
                    for each in brokers:
                        async with each.client() as client:
                            submitted.append((await client.status()).counters["submitted"])
                    assert submitted == [1, 0], "it was begun again at the broker that does not have it"


def test_a_stream_that_another_gateway_has_taken_over_is_not_cancelled_by_the_first(
    mesh: Mesh, gateway: GatewayProcess
) -> None:
    """The reader's connection was cut. The gateway waits for it, and then gives the answer up."""
    mesh.until(lambda core: not core.state.requests, "nothing is left of other tests")
    asked = body_of(CHAT, 300, stream=True, seed=8)
    with GatewayProcess(mesh.address) as second:
        with gateway.open("POST", CHAT, asked) as response:
            received = events(response, 10)
        with second.open("POST", CHAT, asked, last_event_id=id_of(received[-1])) as response:
            mesh.until(lambda core: all(len(r.followers) == 1 for r in core.state.requests.values()), "one has left")
            received += events(response)
        assert said([data_of(event) for event in received]) == streamed(second, CHAT, asked)


def test_an_answer_that_goes_on_otherwise_is_refused(mesh: Mesh, gateway: GatewayProcess) -> None:
    """The tokens that the reader has are not those of the answer: as when it was made again by another model file."""
    asked = body_of(CHAT, 60, stream=True, seed=9)
    with gateway.open("POST", CHAT, asked) as response:
        received = events(response)
    feed, created, _, _ = id_of(received[20]).split("-")
    forged = f"{feed[::-1]}-{created}-20-00000000"
    with gateway.open("POST", CHAT, asked, last_event_id=forged) as response:
        (event,) = events(response)
    assert (data_of(event)["error"]["code"], data_of(event)["error"]["retryable"]) == ("cancelled", True)
    beyond_its_end = f"{feed[::-1][:-1]}0-{created}-900-00000000"
    with gateway.open("POST", CHAT, asked, last_event_id=beyond_its_end) as response:
        (event,) = events(response)
    assert data_of(event)["error"]["code"] == "cancelled"
    for id, parameter in ((f"{feed}-{created}-1.2.3-00000000", "Last-Event-ID"), ("nonsense", "Last-Event-ID")):
        status, problem, _ = gateway.ask("POST", CHAT, asked, last_event_id=id)
        assert (status, problem["error"]["param"]) == (400, parameter)
