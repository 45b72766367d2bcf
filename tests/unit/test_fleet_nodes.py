"""The state of a node, from what its provider and the mesh report."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from llambo.fleet import hosted
from llambo.fleet.model import NodeRecord, NodeState
from llambo.fleet.node_manager import START_S, node_of
from llambo.mesh.client.client import Client
from llambo.mesh.wire.reports import HoldReply, HostRow, ModelHost, ModelRow, WorkerRow

LONG_AGO, NOW = 0, 10_000_000
LATE_MS = int(START_S * 1000)
RECORD = NodeRecord(name="tiny-0001", node_class="tiny", host="box", fingerprint="f", memory_bytes=1, cores=1.0,
                    slots=4, begun_ms=LONG_AGO)  # fmt: skip


def row(state: str) -> dict[str, WorkerRow]:
    return {"tiny-0001": WorkerRow(state=state, busy=1, busy_elsewhere=1, slots=2)}


def test_what_the_mesh_says_counts() -> None:
    states = {state: node_of(RECORD, row(state), NOW, since_ms=0).state for state in ("ready", "loading", "drained")}
    assert states == {"ready": NodeState.READY, "loading": NodeState.STARTING, "drained": NodeState.DRAINING}
    node = node_of(RECORD, row("ready"), NOW, since_ms=0)
    assert (node.busy, node.slots, node.note) == (2, 2, "")


def test_one_that_never_came_has_failed_and_one_that_was_there_a_moment_ago_has_its_time_to_come_back() -> None:
    assert node_of(RECORD, {}, NOW, since_ms=LONG_AGO).state is NodeState.FAILED
    assert node_of(RECORD, {}, NOW, since_ms=NOW - LATE_MS).state is NodeState.STARTING
    late = node_of(RECORD, {}, NOW, since_ms=NOW - LATE_MS - 1)
    assert (late.state, late.note) == (NodeState.FAILED, "it is not in the mesh after 300 s")
    # Without a broker it is not known.
    assert node_of(RECORD, None, NOW, since_ms=LONG_AGO).state is NodeState.READY


def test_the_note_says_that_a_host_is_away() -> None:
    for workers in (None, {}, row("ready")):
        assert node_of(RECORD, workers, NOW, since_ms=NOW, away="no route").note == "box is away"


class HostClient:
    """Not a client: it plays a mesh with one host, `several-0001`, on which a model has the next state at each look."""

    def __init__(self, **states: list[str]) -> None:
        self.states = states
        self.held: list[str] = []
        self.released: list[str] = []

    async def hosts(self) -> list[HostRow]:
        return [HostRow(host="several-0001")]

    async def models(self) -> list[ModelRow]:
        rows = []
        for size, (model, states) in enumerate(self.states.items(), 1):
            state = states.pop(0) if len(states) > 1 else states[0]
            place = ModelHost(host="several-0001", state=state, bytes=size, note="damaged" if state == "failed" else "")
            rows += [ModelRow(model=name, hosts=[place]) for name in (f"{model}@several", model)]
        return rows

    async def hold_model(self, model: str, **_: Any) -> HoldReply:
        self.held.append(model)
        return HoldReply(model=model)

    async def release_model(self, model: str, **_: Any) -> HoldReply:
        self.released.append(model)
        return HoldReply(model=model)


def proved(client: HostClient) -> str:
    return asyncio.run(hosted.prove(cast(Client, client), "several-0001"))


def test_a_host_is_proved_by_the_smallest_model_and_gives_it_back() -> None:
    client = HostClient(small=["stored", "loading", "ready"], large=["stored"])
    assert proved(client) == ""
    assert client.held == client.released == ["small"]


def test_a_host_on_which_a_model_is_loaded_needs_no_proof_and_one_without_models_has_none() -> None:
    for client in (HostClient(a=["stored"], b=["ready"]), HostClient()):
        assert proved(client) == "" and client.held == []


def test_a_host_that_cannot_load_is_bad() -> None:
    client = HostClient(a=["stored", "loading", "failed"])
    assert proved(client) == "a: damaged" and client.released == ["a"]
    assert proved(HostClient(a=["failed"])) == "a: damaged"
