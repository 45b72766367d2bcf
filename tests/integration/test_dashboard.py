"""What the dashboard is served and sent, without a browser: which roles, how much, and what slow viewers miss."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from llambo.gateway.dashboard import routes
from llambo.gateway.dashboard.routes import Watches
from llambo.mesh.client.client import Client
from llambo.mesh.security import api_tokens
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.testing.mesh import Mesh, key_folder
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess, chat, data_of, events

LIVE, DRAIN, CANCEL = "/board/live", "/board/drain", "/board/cancel"
JSON = {"content_type": "application/json"}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(workers=1, fake=FakeOptions(slots=4, tokens_per_s=200)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def gateway(mesh: Mesh) -> Iterator[GatewayProcess]:
    with GatewayProcess(mesh.address) as gateway:
        yield gateway


# --- what is served ------------------------------------------------------------------------------------------


def test_the_page_forbids_what_it_does_not_need(gateway: GatewayProcess) -> None:
    status, page, headers = gateway.ask("GET", "/")
    assert status == 200 and b"<title>llambo</title>" in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    for text in (b"http://", b"https://", b"style=", b"onclick"):
        assert text not in page, f"the page has {text!r} in it"


def test_what_a_browser_has_already_is_not_sent_again(gateway: GatewayProcess) -> None:
    status, script, headers = gateway.ask("GET", "/board/main.js")
    assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8") and script
    assert gateway.ask("GET", "/board/main.js", if_none_match=headers["etag"])[:2] == (304, b"")


@pytest.mark.parametrize("path", ["/board/none.js", "/board/..%2Fboard.py", "/board/%2e%2e/board.py", "/board/"])
def test_nothing_but_the_page_is_served(gateway: GatewayProcess, path: str) -> None:
    assert gateway.ask("GET", path)[0] == 404


# --- what is sent --------------------------------------------------------------------------------------------


def test_a_picture_and_then_what_changes(mesh: Mesh, gateway: GatewayProcess) -> None:
    with gateway.open("GET", LIVE) as response:
        assert response.status == 200 and response.getheader("content-type", "").startswith("text/event-stream")
        (first,) = map(data_of, events(response, 1))
        assert first["whole"] and [row["worker"] for row in first["workers"]["set"]] == ["w0"]
        id = gateway.post("/v1/chat/completions", chat(max_tokens=3))["id"].rpartition("-")[2]
        ended: list[str] = []
        while id not in ended:
            change = data_of(events(response, 1)[0])
            assert "whole" not in change, "it was sent everything again"
            ended += [row["id"] for row in change.get("ended", [])]
    story = gateway.get(f"/board/requests/{id[:12]}")
    assert [story["id"], story["state"], story["tokens"]] == [id, "ended", 3]


def test_a_gateway_that_stops_lets_its_viewers_go(mesh: Mesh) -> None:
    """Or it would wait for them for as long as it waits for answers."""
    with GatewayProcess(mesh.address, "--leave-ms", "600000") as gateway, gateway.open("GET", LIVE) as response:
        events(response, 1)
        assert gateway.stop() == 0
        assert data_of(events(response)[-1])["over"]["text"] == "the gateway is stopping"


async def test_viewers_share_one_watch_and_the_slow_ones_miss_only_what_is_old(mesh: Mesh) -> None:
    asked = 0
    watches = Watches(lambda: False)
    async with mesh.client() as client:

        async def connect() -> Client:
            nonlocal asked
            asked += 1
            return client

        async with (
            client.stream("news, five times a second", max_tokens=4_000),
            watches.viewing("", connect) as first,
            watches.viewing("", connect) as second,
        ):
            assert first is second
            quick, slow = first.events(), second.events()
            assert content_of(await anext(slow))["whole"]
            assert content_of(await anext(quick))["whole"]
            for _ in range(3):
                assert "whole" not in content_of(await anext(quick))
            # It is given all at once, and then it goes on with the changes.
            assert content_of(await anext(slow))["whole"]
            assert "whole" not in content_of(await anext(slow))
        rounds = asked
        assert not first.viewers and watches.viewers == 0
        # Without a viewer there are no queries: no task that sends them is left on the loop.
        assert [task for task in asyncio.all_tasks() if "_query_loop" in repr(task)] == []
        assert asked == rounds


async def test_viewers_are_bounded(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "VIEWERS", 3)
    watches = Watches(lambda: False)
    async with mesh.client() as client, AsyncExitStack() as stack:

        async def connect() -> Client:
            return client

        for _ in range(3):
            await stack.enter_async_context(watches.viewing("", connect))
        with pytest.raises(LlamboError) as refused:
            await stack.enter_async_context(watches.viewing("other", connect))
        assert refused.value.code is Code.BUSY


def content_of(event: bytes) -> dict[str, Any]:
    return dict(json.loads(event.removeprefix(b"data: ")))


# --- permissions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        (DRAIN, {"worker": "w0"}, {}, 415),
        (DRAIN, b'{"worker": "w0"}', {"content_type": "text/plain"}, 415),
        (DRAIN, {"worker": "no-such-worker"}, JSON, 404),
        (DRAIN, {"worker": 5}, JSON, 400),
        (DRAIN, {}, JSON, 400),
        (CANCEL, {"id": "zzzz"}, JSON, 400),
        (CANCEL, {"id": "00" * 16}, JSON, 404),
    ],
)
def test_what_is_wrong_is_refused(
    mesh: Mesh, gateway: GatewayProcess, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    """Above all what a page of another site could send in its visitor's name."""
    assert gateway.ask("POST", path, body, **headers)[0] == status
    assert not mesh.look(lambda core: core.state.registry.drained)


def test_with_keys_only_admins(tmp_path: Path) -> None:
    folder = key_folder(tmp_path / "keys", boss="admin", viewer="client", gateway="client")
    viewer, boss = (f"Bearer {api_tokens.issue(folder, name, 0)}" for name in ("viewer", "boss"))
    with (
        Mesh(workers=1, keys=folder) as mesh,
        GatewayProcess(mesh.address, "--http-keys", str(folder.path)) as gateway,
    ):
        assert gateway.ask("GET", "/")[0] == 200
        wrong = "Bearer sk-llambo-wrong"
        for method, path, body in (
            ("GET", LIVE, None),
            ("GET", "/board/requests/00000000", None),
            ("POST", DRAIN, {"worker": "w0"}),
            ("POST", CANCEL, {"id": "00000000"}),
        ):
            for token, status in ((wrong, 401), (viewer, 403)):
                assert gateway.ask(method, path, body, authorization=token, **JSON)[0] == status
            assert gateway.ask(method, path, body, **JSON)[0] == 401
        assert not mesh.look(lambda core: core.state.registry.drained)
        assert gateway.post(DRAIN, {"worker": "w0"}, authorization=boss, **JSON)["draining"]
        with gateway.open("GET", LIVE, authorization=boss) as response:
            events(response, 1)
            api_tokens.withdraw(folder, "boss")
            # What was revoked sees nothing more, also of a stream that it has open.
            over = data_of(events(response)[-1])["over"]
        assert over["status"] == 401
