"""The gateway in front of a mesh: streams that survive, clients that disconnect, and API tokens."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from llambo.cli.doctor.reach import is_gateway
from llambo.mesh.security import api_tokens
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire.identity import Identity
from llambo.testing.commands import LLAMBO, command
from llambo.testing.mesh import Mesh, key_folder, truth
from llambo.testing.processes import TIMEOUT_S
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, data_of, events, id_of, text_of

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=2, fake=FakeOptions(slots=4, tokens_per_s=200)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address, "--resume-ms", "2000") as gateway:
        yield gateway


# --- answers -------------------------------------------------------------------------------------------------


def test_an_answer_whole_and_streamed_is_the_same(gateway: GatewayProcess) -> None:
    asked = chat(max_tokens=20, seed=5)
    whole = gateway.post(CHAT, asked)
    with gateway.open("POST", CHAT, {**asked, "stream": True, "stream_options": {"include_usage": True}}) as response:
        assert response.status == 200 and response.getheader("content-type", "").startswith("text/event-stream")
        received = events(response)
    assert text_of(received) == whole["choices"][0]["message"]["content"]
    assert data_of(received[-2])["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 20
    assert whole["choices"][0]["finish_reason"] == "length"
    assert received[-1].endswith(b"data: [DONE]\n")
    assert [data["choices"][0]["finish_reason"] for data in map(data_of, received[:-2])] == [None] * 21 + ["length"]


def test_choices_differ_and_can_be_had_again(gateway: GatewayProcess) -> None:
    asked = chat(max_tokens=5, n=3, seed=1)
    once, again = [gateway.post(CHAT, asked) for _ in range(2)]
    texts = [choice["message"]["content"] for choice in once["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert once["usage"]["completion_tokens"] == 15


def test_a_completion_of_several_prompts(gateway: GatewayProcess) -> None:
    asked = {"prompt": ["one", "two"], "n": 2, "max_tokens": 4, "echo": True, "seed": 3, "logprobs": 2}
    reply = gateway.post("/v1/completions", asked)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in reply["choices"]] == ["one", "one", "two", "two"]
    assert all(len(choice["logprobs"]["tokens"]) == 4 for choice in reply["choices"])


def test_embeddings_and_models(gateway: GatewayProcess) -> None:
    reply = gateway.post("/v1/embeddings", {"input": ["a cat", "a kitten"], "model": "fake"})
    assert [entry["index"] for entry in reply["data"]] == [0, 1]
    assert reply["usage"]["prompt_tokens"] > 0
    assert [model["id"] for model in gateway.get("/v1/models")["data"]] == ["fake"]
    assert gateway.get("/v1/models/fake")["id"] == "fake"
    assert gateway.ask("GET", "/v1/models/none")[0] == 404
    status, reply, _ = gateway.ask("GET", "/api/tags")
    assert status == 404 and "Ollama's own API" in reply["error"]["message"], reply
    assert gateway.get("/readyz") == gateway.get("/healthz") == gateway.get("/health") == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "no-such-role", "content": ""}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
        (chat(temperature="hot"), 400, "temperature"),
        (chat(max_tokens=0), 400, "max_tokens"),
        (chat(logit_bias={"a": 1}), 400, "logit_bias"),
        (chat(top_logprobs=3), 400, "top_logprobs"),
        (chat(model="none"), 404, "model"),
        (b"{", 400, None),
        (b"", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[" * 100_000, 400, None),
    ],
)
def test_what_is_wrong_is_named(gateway: GatewayProcess, body: Any, status: int, field: str | None) -> None:
    got, reply, headers = gateway.ask("POST", CHAT, body)
    assert (got, reply["error"]["param"]) == (status, field)
    assert reply["error"]["message"] and headers["x-request-id"]


def test_unknown_fields_are_ignored(gateway: GatewayProcess) -> None:
    gateway.post(CHAT, chat(max_tokens=1, reasoning_effort="low", metadata={"a": "b"}))


def test_a_body_that_is_too_long_is_refused(gateway: GatewayProcess) -> None:
    assert gateway.ask("POST", CHAT, b" " * (9 * 1024 * 1024))[0] == 413


# --- losses --------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_not_seen_in_a_stream() -> None:
    with (
        Mesh(workers=2, fake=FakeOptions(slots=4, tokens_per_s=100)) as mesh,
        GatewayProcess(mesh.address) as gateway,
        gateway.open(
            "POST", "/v1/completions", {"prompt": "x", "max_tokens": 60, "seed": 7, "stream": True}
        ) as response,
    ):
        received = events(response, 20)
        running = mesh.look(lambda core: [request.run.worker.name for request in core.state.requests.values()])  # type: ignore[union-attr]
        (victim,) = [worker for worker in mesh.workers if worker.name in running]
        victim.send(signal.SIGKILL)
        received += events(response)
        text = "".join(data["choices"][0]["text"] for event in received if (data := data_of(event)) is not None)
        whole = gateway.post("/v1/completions", {"prompt": "x", "max_tokens": 60, "seed": 7})
        assert text == whole["choices"][0]["text"]
        assert len(truth("x", 7, 60)) == whole["usage"]["completion_tokens"]
        assert mesh.counter("moved") == 1


def test_a_client_that_was_cut_off_misses_nothing(gateway: GatewayProcess) -> None:
    asked = chat(max_tokens=40, seed=11, stream=True, stream_options={"include_usage": True})
    with gateway.open("POST", CHAT, asked) as response:
        received = events(response, 15)
    with gateway.open("POST", CHAT, asked, last_event_id=id_of(received[-1])) as response:
        received += events(response, 10)
    with gateway.open("POST", CHAT, asked, last_event_id=id_of(received[-1])) as response:
        received += events(response)
    # The whole once more, after its end: byte for byte the same, from the first event after the one that is named.
    with gateway.open("POST", CHAT, asked, last_event_id=id_of(received[0])) as response:
        assert events(response) == received[1:]
    undisturbed = gateway.post(CHAT, chat(max_tokens=40, seed=11))
    assert text_of(received) == undisturbed["choices"][0]["message"]["content"]
    assert received[-1].endswith(b"data: [DONE]\n")


def test_another_gateway_takes_over(mesh: Mesh) -> None:
    asked = chat(max_tokens=150, seed=12, stream=True)
    with GatewayProcess(mesh.address) as first, GatewayProcess(mesh.address) as second:
        with first.open("POST", CHAT, asked) as response:
            received = events(response, 15)
            first.process.send(signal.SIGKILL)
            first.process.end()
        with second.open("POST", CHAT, asked, last_event_id=id_of(received[-1])) as response:
            received += events(response)
        undisturbed = second.post(CHAT, chat(max_tokens=150, seed=12))
    assert text_of(received) == undisturbed["choices"][0]["message"]["content"]


def test_a_stream_is_not_for_another_body(gateway: GatewayProcess) -> None:
    asked = chat(max_tokens=30, seed=11, stream=True)
    with gateway.open("POST", CHAT, asked) as response:
        received = events(response, 3)
        status, problem, _ = gateway.ask("POST", CHAT, {**asked, "seed": 12}, last_event_id=id_of(received[-1]))
        assert status == 400 and "another request body" in problem["error"]["message"]
    assert gateway.ask("POST", CHAT, asked, last_event_id="nonsense")[1]["error"]["param"] == "Last-Event-ID"
    of_an_older_gateway = "0" * 32 + "-0-1"
    assert gateway.ask("POST", CHAT, asked, last_event_id=of_an_older_gateway)[0] == 409


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_for_good_is_cancelled(mesh: Mesh, gateway: GatewayProcess, stream: bool) -> None:
    mesh.until(lambda core: not core.state.requests, "nothing is left of other tests")
    cancelled = mesh.counter("cancelled")
    body = json.dumps(chat(max_tokens=100_000, stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), TIMEOUT_S) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body)
        mesh.until(lambda core: core.state.running, "it runs")
    mesh.until(lambda core: core.state.counters.requests.cancelled == cancelled + 1, "it is cancelled")
    mesh.until(lambda core: not core.state.requests, "nothing is left")


def test_a_request_that_waits_gets_its_place_in_the_queue() -> None:
    with (
        Mesh(workers=1, fake=FakeOptions(slots=1, tokens_per_s=50)) as mesh,
        GatewayProcess(mesh.address) as gateway,
        gateway.open("POST", CHAT, chat(max_tokens=10_000, stream=True)) as first,
    ):
        events(first, 2)
        with gateway.open("POST", CHAT, chat(max_tokens=2, stream=True)) as second:
            assert second.status == 200
            assert second.readline() == b": waiting, you are next\n"


# --- API tokens ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = key_folder(tmp_path / "keys")
    for name, per_minute in (("alice", 2), ("bob", 0), ("gateway", 0)):
        folder.add(Identity(name, "client", per_minute=per_minute), int(time.time()))
    return folder


def test_tokens_stand_for_names_and_their_limits(folder: Folder) -> None:
    alice, bob = [api_tokens.issue(folder, name, int(time.time())) for name in ("alice", "bob")]
    with (
        Mesh(workers=1, fake=FakeOptions(slots=4, tokens_per_s=100), keys=folder) as mesh,
        GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway,
    ):
        for headers in ({}, {"authorization": "Bearer sk-llambo-no"}, {"authorization": f"Basic {alice}"}):
            status, reply, more = gateway.ask("POST", CHAT, chat(max_tokens=1), **headers)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert more["www-authenticate"] == "Bearer"
        mine, his = {"authorization": f"Bearer {alice}"}, {"x-api-key": bob}
        with gateway.open("POST", CHAT, chat(max_tokens=60, stream=True), **mine) as response:
            received = events(response, 3)
            # No other token can read it, or find out that it exists.
            place = id_of(received[-1])
            assert gateway.ask("POST", CHAT, chat(max_tokens=60, stream=True), last_event_id=place, **his)[0] == 404
            received += events(response)
        gateway.post(CHAT, chat(max_tokens=1), **mine)
        status, problem, more = gateway.ask("POST", CHAT, chat(max_tokens=1), **mine)
        assert (status, problem["error"]["code"]) == (429, "over_limit")
        assert int(more["retry-after"]) >= 1
        # Nor does one that claims to come from another gateway get more.
        place, asked = f"{'a' * 32}-{int(time.time()):x}-0-00000000", chat(max_tokens=1, stream=True)
        assert gateway.ask("POST", CHAT, asked, last_event_id=place, **mine)[0] == 429
        gateway.post(CHAT, chat(max_tokens=1), **his)
        assert gateway.get("/readyz") == {"status": "ok"}
        api_tokens.withdraw(folder, "bob")
        assert gateway.ask("POST", CHAT, chat(max_tokens=1), **his)[0] == 401


def test_without_tls_it_stays_on_this_machine() -> None:
    with command(LLAMBO, "gateway", "--http-bind", "0.0.0.0") as refused:
        assert refused.end() == 2
        assert "without keys a gateway listens on loopback only" in refused.story("")
        assert "--tls-cert box.pem --tls-key box-key.pem" in refused.story(""), "the next refusal"


@pytest.mark.needs("openssl")
def test_with_tls_there_is_no_plaintext(mesh: Mesh, tmp_path: Path) -> None:
    cert, key = tmp_path / "box.pem", tmp_path / "box.key"
    words = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -keyout {key}"
    arguments = [*words.split(), "-addext", "subjectAltName=DNS:localhost", "-out", str(cert)]
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=TIMEOUT_S)
    with GatewayProcess(mesh.address, "--tls-cert", str(cert), "--tls-key", str(key)) as gateway:
        trusting = ssl.create_default_context(cafile=str(cert))
        url = f"https://localhost:{gateway.port}{CHAT}"
        asked = json.dumps(chat(max_tokens=3)).encode()
        with urllib.request.urlopen(url, asked, TIMEOUT_S, context=trusting) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"]
        with pytest.raises((OSError, http.client.HTTPException)):
            gateway.get("/healthz")
        assert is_gateway("127.0.0.1", gateway.port)
    with command(LLAMBO, "gateway", "--http-port", "0", "--tls-cert", str(key)) as refused:
        assert refused.end() != 0
        assert "cannot be used for TLS" in refused.story("")
        assert "`llambo help gateway` shows how such files are made" in refused.story("")


def test_a_gateway_of_another_user_is_recognised(gateway: GatewayProcess) -> None:
    assert is_gateway("0.0.0.0", gateway.port)
    assert not is_gateway("127.0.0.1", 1)


# --- the end -------------------------------------------------------------------------------------------------


def test_it_leaves_when_its_answers_are_given() -> None:
    with (
        Mesh(workers=1, fake=FakeOptions(slots=1, tokens_per_s=50)) as mesh,
        GatewayProcess(mesh.address) as gateway,
        gateway.open("POST", CHAT, chat(max_tokens=30, stream=True)) as response,
    ):
        received = events(response, 3)
        gateway.process.send(signal.SIGTERM)
        received += events(response)
        assert received[-1].endswith(b"data: [DONE]\n")
        assert gateway.process.end() == 0


def test_without_a_broker_it_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with GatewayProcess(address) as gateway:
            assert gateway.get("/healthz") == {"status": "ok"}
            status, reply, headers = gateway.ask("POST", CHAT, chat())
            assert (status, reply["error"]["code"], headers["retry-after"]) == (503, "no_broker", "1")
            # Anybody may ask this: where the broker is does not concern him.
            assert gateway.ask("GET", "/readyz")[:2] == (503, {"status": "the mesh does not answer: no_broker"})


def test_many_at_once_are_all_answered(gateway: GatewayProcess) -> None:
    found: list[str] = []

    def ask(number: int) -> None:
        reply = gateway.post("/v1/completions", {"prompt": f"p{number}", "max_tokens": 10, "seed": 1})
        found.append(reply["choices"][0]["text"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(set(found)) == 40


# --- the WebSocket door ----------------------------------------------------------------------------------------


def messages_until(socket: ClientConnection, id: str, kind: str) -> list[dict[str, Any]]:
    """The messages of one request, up to the first of this kind."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["type"] != kind:
        message = json.loads(socket.recv(TIMEOUT_S))
        if message["id"] == id:
            found.append(message)
    return found


def content(messages: list[dict[str, Any]]) -> str:
    chunks = [message["data"] for message in messages if message["type"] == "event" and message["data"] != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_many_requests_over_one_socket(mesh: Mesh, gateway: GatewayProcess) -> None:
    mesh.until(lambda core: not core.state.requests, "nothing is left of other tests")
    cancelled = mesh.counter("cancelled")
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as socket:
        for id, seed in (("a", 1), ("b", 2)):
            socket.send(json.dumps({"type": "ask", "id": id, "body": chat(max_tokens=10, seed=seed)}))
        received: list[dict[str, Any]] = []
        while sum(message["type"] == "end" for message in received) < 2:
            received.append(json.loads(socket.recv(TIMEOUT_S)))
        for id, seed in (("a", 1), ("b", 2)):
            mine = [message for message in received if message["id"] == id]
            undisturbed = gateway.post(CHAT, chat(max_tokens=10, seed=seed))
            assert content(mine) == undisturbed["choices"][0]["message"]["content"]
        for wrong in ("{", json.dumps({"type": "ask", "id": "c", "body": {}}), json.dumps({"type": "ask", "api": "x"})):
            socket.send(wrong)
            assert json.loads(socket.recv(TIMEOUT_S))["type"] == "error"
        socket.send(json.dumps({"type": "ask", "id": "d", "body": chat(max_tokens=10_000)}))
        messages_until(socket, "d", "event")
        socket.send(json.dumps({"type": "cancel", "id": "d"}))
        messages_until(socket, "d", "end")
    mesh.until(lambda core: core.state.counters.requests.cancelled == cancelled + 1, "it is cancelled")


def test_a_socket_that_broke_is_made_anew_and_misses_nothing(gateway: GatewayProcess) -> None:
    asked = {"type": "ask", "id": "a", "body": chat(max_tokens=40, seed=21)}
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream", subprotocols=[Subprotocol("llambo")]) as socket:
        assert socket.subprotocol == "llambo"
        socket.send(json.dumps(asked))
        received = [json.loads(socket.recv(TIMEOUT_S)) for _ in range(8)]
    with connect(f"ws://127.0.0.1:{gateway.port}/v1/stream") as socket:
        socket.send(json.dumps({**asked, "last_event_id": received[-1]["event_id"]}))
        received += messages_until(socket, "a", "end")
    assert content(received) == gateway.post(CHAT, chat(max_tokens=40, seed=21))["choices"][0]["message"]["content"]
