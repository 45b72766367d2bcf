"""Anthropic's messages and OpenAI's responses in front of a mesh: streams that survive, errors in their own shapes,
and what is remembered of whom."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from llambo.mesh.security import api_tokens
from llambo.testing.mesh import Mesh, key_folder
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeFaults, FakeOptions
from tests.integration.gateway_process import GatewayProcess, data_of, events, id_of

MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=2, fake=FakeOptions(slots=4, tokens_per_s=200, faults=FakeFaults(poison="poison"))) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address, "--resume-ms", "2000") as gateway:
        yield gateway


def message(prompt: str = "hello", **more: Any) -> dict[str, Any]:
    return {"max_tokens": 20, "messages": [{"role": "user", "content": prompt}], "seed": 5, **more}


def respond(prompt: str = "hello", **more: Any) -> dict[str, Any]:
    return {"max_output_tokens": 20, "input": prompt, "seed": 5, **more}


def asked(path: str, **more: Any) -> dict[str, Any]:
    return message(**more) if path == MESSAGES else respond(**more)


def text_of(path: str, received: list[bytes]) -> str:
    """What the deltas of a stream add up to."""
    found = [data for data in map(data_of, received) if data["type"].endswith("delta") and "usage" not in data]
    return "".join(data["delta"]["text"] if path == MESSAGES else data["delta"] for data in found)


def whole_text(path: str, reply: dict[str, Any]) -> str:
    found = reply["content"] if path == MESSAGES else reply["output"][0]["content"]
    return str(found[0]["text"])


# --- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_an_answer_whole_and_streamed_is_the_same(gateway: GatewayProcess, path: str) -> None:
    whole = gateway.post(path, asked(path))
    with gateway.open("POST", path, asked(path, stream=True)) as response:
        assert response.status == 200 and response.getheader("content-type", "").startswith("text/event-stream")
        received = events(response)
    assert text_of(path, received) == whole_text(path, whole)
    last = data_of(received[-2 if path == MESSAGES else -1])
    usage = last["usage"] if path == MESSAGES else last["response"]["usage"]
    assert usage == whole["usage"] and usage["output_tokens"] == 20


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_a_client_that_was_cut_off_misses_nothing(gateway: GatewayProcess, path: str) -> None:
    body = asked(path, stream=True)
    with gateway.open("POST", path, body) as response:
        received = events(response, 8)
    with gateway.open("POST", path, body, last_event_id=id_of(received[-1])) as response:
        received += events(response)
    # The whole once more, after its end: byte for byte the same, from the first event after the one that is named.
    with gateway.open("POST", path, body, last_event_id=id_of(received[0])) as response:
        assert events(response) == received[1:]
    assert text_of(path, received) == whole_text(path, gateway.post(path, asked(path)))


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_the_same_events_come_over_a_websocket(gateway: GatewayProcess, path: str) -> None:
    with gateway.open("POST", path, asked(path, stream=True)) as response:
        received = [data_of(event) for event in events(response)]
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as socket:
        socket.send(json.dumps({"type": "ask", "id": "a", "api": path.removeprefix("/v1/"), "body": asked(path)}))
        got = [json.loads(socket.recv(TIMEOUT_S))]
        while got[-1]["type"] not in ("end", "error"):
            got.append(json.loads(socket.recv(TIMEOUT_S)))
    found = [message["data"] for message in got if message["type"] == "event"]
    assert [message["name"] for message in got if message["type"] == "event"] == [each["type"] for each in received]
    assert [each.get("delta") for each in found if "usage" not in each] == [
        each.get("delta") for each in received if "usage" not in each
    ]


def test_the_stop_string_that_ended_it_is_reported(gateway: GatewayProcess) -> None:
    text = whole_text(MESSAGES, gateway.post(MESSAGES, message()))
    third = text.split()[2]
    reply = gateway.post(MESSAGES, message(stop_sequences=["no such thing", third]))
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", third)
    assert reply["content"][0]["text"].split() == text.split()[:2]
    with gateway.open("POST", MESSAGES, message(stop_sequences=["no such thing", third], stream=True)) as response:
        ended = data_of(events(response)[-2])
    assert ended["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": third}


def test_tokens_are_counted_before_they_are_sent(gateway: GatewayProcess) -> None:
    body = {name: value for name, value in message().items() if name != "max_tokens"}
    few = gateway.post(COUNT, {**body, "model": "fake"}, anthropic_version="2023-06-01")["input_tokens"]
    many = gateway.post(COUNT, {**body, "system": "be brief " * 100})["input_tokens"]
    assert 0 < few < many
    assert gateway.ask("POST", COUNT, {"messages": []})[1]["error"]["message"].startswith("messages: ")


# --- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "kind", "begins"),
    [
        (message(max_tokens=0), 400, "invalid_request_error", "max_tokens: "),
        (message(temperature="hot"), 400, "invalid_request_error", "temperature: "),
        ({"max_tokens": 1}, 400, "invalid_request_error", ""),
        (message(model="none"), 404, "not_found_error", ""),
        (b"{", 400, "invalid_request_error", ""),
        (b"[" * 100_000, 400, "invalid_request_error", ""),
    ],
)
def test_errors_of_messages(gateway: GatewayProcess, body: Any, status: int, kind: str, begins: str) -> None:
    got, reply, headers = gateway.ask("POST", MESSAGES, body)
    assert (got, reply["type"], reply["error"]["type"]) == (status, "error", kind)
    assert reply["error"]["message"].startswith(begins) and headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (respond(max_output_tokens=0), 400, "max_output_tokens"),
        ({"model": "fake", "input": [{"role": "user", "content": [{"type": "input_file"}]}]}, 400,
         "input[0].content[0].type"),
        (respond(previous_response_id="resp_none"), 400, "previous_response_id"),
        (respond(tools=[{"type": "web_search"}]), 400, "tools[0].type"),
        (respond(model="none"), 404, "model"),
        (b"", 400, None),
    ],
)  # fmt: skip
def test_errors_of_responses(gateway: GatewayProcess, body: Any, status: int, field: str | None) -> None:
    got, reply, _ = gateway.ask("POST", RESPONSES, body)
    assert (got, reply["error"]["param"]) == (status, field)
    assert reply["error"]["message"]


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_an_error_in_the_middle_is_the_last_event(gateway: GatewayProcess, path: str) -> None:
    with gateway.open("POST", path, asked(path, prompt="poison", stream=True)) as response:
        assert response.status == 200
        received = events(response)
    assert text_of(path, received)
    last = data_of(received[-1])
    if path == MESSAGES:
        assert received[-1].startswith(b"event: error\n")
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    else:
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["code"] == "server_error"
        assert gateway.ask("GET", f"{RESPONSES}/{last['response']['id']}")[0] == 404


# --- what is remembered --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_fetched_and_forgotten(gateway: GatewayProcess, stream: bool) -> None:
    if stream:
        with gateway.open("POST", RESPONSES, respond(stream=True, metadata={"a": "b"})) as response:
            completed = data_of(events(response)[-1])["response"]
    else:
        completed = gateway.post(RESPONSES, respond(metadata={"a": "b"}))
    place = f"{RESPONSES}/{completed['id']}"
    assert gateway.get(place) == completed and completed["metadata"] == {"a": "b"}
    following = gateway.post(RESPONSES, respond("and?", previous_response_id=completed["id"], store=False))
    assert following["previous_response_id"] == completed["id"]
    # A longer conversation is another prompt: the fake engine counts its words.
    assert following["usage"]["input_tokens"] > completed["usage"]["input_tokens"]
    assert gateway.ask("GET", f"{RESPONSES}/{following['id']}")[0] == 404
    assert gateway.ask("DELETE", place)[:2] == (200, {"id": completed["id"], "object": "response", "deleted": True})
    assert gateway.ask("GET", place)[0] == gateway.ask("DELETE", place)[0] == 404


def test_responses_belong_to_who_asked(tmp_path: Path) -> None:
    folder = key_folder(tmp_path / "keys", alice="client", bob="client", gateway="client")
    alice, bob = [{"x-api-key": api_tokens.issue(folder, name, int(time.time()))} for name in ("alice", "bob")]
    with (
        Mesh(workers=1, fake=FakeOptions(slots=4, tokens_per_s=500), keys=folder) as mesh,
        GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway,
    ):
        status, reply, _ = gateway.ask("POST", MESSAGES, message())
        assert (status, reply["error"]["type"]) == (401, "authentication_error")
        assert gateway.post(MESSAGES, message(), **alice)["content"]
        mine = gateway.post(RESPONSES, respond(), **alice)
        place = f"{RESPONSES}/{mine['id']}"
        assert gateway.ask("GET", place)[0] == 401
        assert gateway.ask("GET", place, **bob)[0] == gateway.ask("DELETE", place, **bob)[0] == 404
        status, reply, _ = gateway.ask("POST", RESPONSES, respond(previous_response_id=mine["id"]), **bob)
        assert (status, reply["error"]["param"]) == (400, "previous_response_id")
        assert gateway.get(place, **alice) == mine
