"""Models on demand as their users see them: by the commands, over HTTP, on the bridge and on the dashboard.

A host with memory for two of three models, fake ones that really take it.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llambo import SyncClient
from llambo.cli.kit.failure import Exit
from llambo.mesh.security import api_tokens
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.reports import ModelHost
from llambo.testing.commands import Commands
from llambo.testing.mesh import Mesh, key_folder
from llambo.testing.processes import TIMEOUT_S
from llambo.testing.terminal import Terminal
from tests.integration.gateway_process import GatewayProcess, chat

MODELS = "a:40:200ms,b:40:200ms,c:40:1500ms,big:400"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=0) as mesh:
        mesh.spawn_host("box", MODELS, "--memory-bytes", "100MiB", "--min-loaded-ms", "0").line("is ready")
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(mesh: Mesh) -> Iterator[SyncClient]:
    with SyncClient(mesh.address) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_is_loaded(client: SyncClient) -> None:
    for name in "abc":
        client.release_model(name)
    until(lambda: {row.state for row in at_box(client).values()} <= {"stored", "failed"}, "nothing is loaded")


@pytest.fixture
def ask(mesh: Mesh) -> Commands:
    return Commands(mesh.address)


def at_box(client: SyncClient) -> dict[str, ModelHost]:
    return {row.model: row.hosts[0] for row in client.models()}


def until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_task_says_what_it_waits_for(ask: Commands) -> None:
    done = ask.llambo("tokens", "-m", "c", "hi")
    assert done.code == 0 and "loading c on box" in done.err, done.story


def test_a_chat_says_what_its_first_question_waits_for(ask: Commands) -> None:
    """It asks for the context of the model before it sends the question."""
    with Terminal("chat", "--private", "--model", "c", env={"LLAMBO_BROKER": ask.address}) as chat:
        chat.until("/help lists the commands")
        chat.enter("hi")
        chat.expect("loading c on box")
        chat.expect(r"\d+ tokens, [\d.]+ tokens/s")


def test_load_unload_and_what_is_listed(ask: Commands, client: SyncClient) -> None:
    assert "a is loaded on box, and stays until `llambo unload a`" in ask.ok("load", "a").out
    assert "b is loaded on box, and stays for 30 min" in ask.ok("load", "b", "--on", "box", "--ttl", "30m").out
    listed = [" ".join(line.split()) for line in ask.ok("models").out.splitlines()]
    assert any(line.startswith("a box ready 40 MiB") and line.endswith(" anyone") for line in listed), listed
    assert "box: 80 MiB of 100 MiB in use, 2 of 4 models loaded" in listed
    # What is held makes no room; a request waits, says why, and is served as soon as there is room
    with ask.start("send", "--json", "--model", "c", "--max-tokens", "3", "hi") as sending:
        sending.line('"note": "waiting for memory on box')
        ask.ok("unload", "a")
        assert sending.end() == Exit.OK, sending.story("the answer")
        assert any("loading c on box" in str(line.get("note")) for line in sending.objects())
    assert [at_box(client)[name].state for name in "abc"] == ["stored", "ready", "ready"]


def test_what_cannot_be_loaded_says_why(ask: Commands, client: SyncClient) -> None:
    failed = ask.llambo("load", "big")
    assert failed.code == Exit.ENGINE, failed.story
    assert "needs 400 MiB of ram, and the budget is 100 MiB" in " ".join(failed.err.split())
    assert ask.llambo("load", "nope").code == Exit.REFUSED
    assert ask.llambo("load", "a", "--on", "nowhere").code == Exit.UNKNOWN_ID
    assert at_box(client)["big"].holders == []


def test_the_calls_of_llama_server(client: SyncClient, gateway: GatewayProcess) -> None:
    def status(name: str) -> str:
        return next(str(row["status"]["value"]) for row in gateway.get("/models")["data"] if row["id"] == name)

    assert gateway.get("/readyz") == {"status": "ok"}  # nothing is loaded, and would be
    assert [row["id"] for row in gateway.get("/v1/models")["data"]] == ["a", "b", "big", "c"]
    assert gateway.post("/models/load", {"model": "a"})["success"] is True
    until(lambda: status("a") == "loaded", "a is loaded")
    assert at_box(client)["a"].holders == ["anyone"]
    assert gateway.post("/models/unload", {"model": "a"})["success"] is True
    until(lambda: status("a") == "unloaded", "a is unloaded")
    code, reply, _ = gateway.ask("POST", "/models/load", {"model": "nope"})
    assert (code, reply["error"]["code"]) == (404, "model_not_found")
    # A stream says what is loaded for it, in comments, which are no events
    with gateway.open("POST", "/v1/chat/completions", chat(model="c", max_tokens=3, stream=True)) as response:
        received = response.read()
    assert b": loading c on box, " in received, received
    assert received.index(b": loading c") < received.index(b"data: ")
    assert received.rstrip().endswith(b"data: [DONE]")


def test_a_token_may_load_what_its_key_may_ask(tmp_path: Path) -> None:
    folder = key_folder(tmp_path / "keys", boss="admin", ann="client", gateway="client")
    folder.add(Identity("bob", "client", models=("b",)), int(time.time()))
    ann, bob, boss = (
        {"authorization": f"Bearer {api_tokens.issue(folder, name, 0)}"} for name in ("ann", "bob", "boss")
    )
    with Mesh(workers=0, keys=folder) as mesh:
        mesh.spawn_host("box", "a:40,b:40", "--memory-bytes", "100MiB", "--min-loaded-ms", "0").line("is ready")
        with (
            GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway,
            SyncClient(mesh.address, key=folder.export("boss")) as client,
        ):

            def load(token: dict[str, str], what: str = "load", **fields: Any) -> int:
                return gateway.ask("POST", f"/models/{what}", {"model": "a", **fields}, **token)[0]

            until(lambda: {row.model for row in client.models()} == {"a", "b"}, "the models are known")
            assert load({}) == 401
            assert load(bob) in (403, 404)
            assert load(ann, pin=True) == 403
            assert load(ann) == 200
            until(lambda: at_box(client)["a"].state == "ready", "a is loaded")
            # What ann gives back, the admin holds still
            assert load(boss, pin=True) == 200
            until(lambda: at_box(client)["a"].pinned, "a is pinned")
            assert load(ann, "unload") == 200
            until(lambda: at_box(client)["a"].holders == ["boss"], "ann has given it back")
            assert at_box(client)["a"].state == "ready"
            assert [row["id"] for row in gateway.get("/models", **bob)["data"]] == ["b"]
            assert load(boss, "unload") == 200
            until(lambda: at_box(client)["a"].state == "stored", "a is unloaded")


def test_the_dashboard_loads_and_unloads(client: SyncClient, gateway: GatewayProcess) -> None:
    order = {"model": "a", "host": "box"}
    assert gateway.ask("POST", "/board/load", order, content_type="text/plain")[0] == 415
    assert gateway.post("/board/load", {**order, "pin": True}, content_type="application/json")["host"] == "box"
    until(lambda: at_box(client)["a"].state == "ready", "a is loaded")
    assert at_box(client)["a"].pinned is True
    with gateway.open("GET", "/board/live") as live:
        shown = json.loads(live.readline().removeprefix(b"data: "))
    assert next((row["model"], row["state"]) for row in shown["hosted"]["set"]) == ("a", "ready")
    assert shown["hosts"]["set"][0]["memory"]["ram"]["used"] == 40 * 2**20
    gateway.post("/board/load", {**order, "undo": True}, content_type="application/json")
    until(lambda: at_box(client)["a"].state == "stored", "a is unloaded")


def test_a_connection_of_the_bridge_holds_what_it_has_loaded(ask: Commands, client: SyncClient, tmp_path: Path) -> None:
    path = str(tmp_path / "b.sock")

    def held() -> list[int]:
        return [at_box(client)[name].held for name in "ab"]

    with ask.start("bridge", "--socket", path) as bridge:
        bridge.line("listening at")
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(TIMEOUT_S)
            peer.connect(path)
            with peer.makefile("rw") as lines:

                def say(line: str) -> dict[str, Any]:
                    print(line, file=lines, flush=True)
                    return dict(json.loads(lines.readline()))

                assert [say(f"LOAD {name}")["message"] for name in "ab"] == ["loaded", "loaded"]
                assert held() == [1, 1]
                loaded = say("STATUS")["data"]["loaded"]
                assert [(row["model"], row["state"], row["host"]) for row in loaded] == [
                    ("a", "ready", "box"), ("b", "ready", "box"),
                ]  # fmt: skip
                assert say('INFER {"prompt": "hi", "max_tokens": 2}')["data"]["model"] == "b"
                assert say("FREE a")["data"] == {"model": "a"}
                until(lambda: held() == [0, 1], "a is given back")
                assert say("LOAD big")["data"]["code"] == "engine_failed"
        until(lambda: held() == [0, 0], "what a connection held is given back when it is gone")
