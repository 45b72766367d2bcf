"""A broker's answers to queries as typed rows: old and new versions read each other's, and their printed table."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llambo.broker.report import queries
from llambo.cli.commands.status import show_identities
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import reports
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.reports import MeshStatus
from tests.unit.broker_bench import Bench, Client, request_id, small_mesh


def answer(client: Client, what: str, argument: str = "") -> bytes:
    client.send(m.Query(1, what, argument))
    return client.received_last(m.Result)[-1].data


def busy_mesh() -> Client:
    bench, worker, client = small_mesh(client_lease_ms=60_000, lease_ms=60_000)
    client.submit(1)
    worker.publish(worker.chunk(0, 5, 6))
    worker.end(2)
    client.submit(2)
    bench.pass_time(2_000)
    return client


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("status", reports.MeshStatus),
        ("workers", list[reports.WorkerRow]),
        ("models", list[reports.ModelRow]),
        ("requests", list[reports.RequestRow]),
        ("events", list[reports.EventRow]),
        ("recent", reports.Recent),
    ],
)
def test_a_row_has_every_field_that_the_broker_sends(what: str, kind: Any) -> None:
    data = answer(busy_mesh(), what)
    assert msgspec.to_builtins(msgspec.msgpack.decode(data, type=kind)) == msgspec.msgpack.decode(data)


def test_a_story_of_a_live_request_and_of_one_that_has_ended() -> None:
    client = busy_mesh()
    live, ended = (answer(client, "why", request_id(number).hex()) for number in (2, 1))
    story = msgspec.msgpack.decode(live, type=reports.RequestStory)
    assert (story.state, story.worker, story.story[0].what) == ("dispatched", "w", "submitted")
    assert "reason" not in msgspec.msgpack.decode(live)
    story = msgspec.msgpack.decode(ended, type=reports.RequestStory)
    assert (story.state, story.tokens, story.reason) == ("ended", 2, "length")
    assert "age_ms" not in msgspec.msgpack.decode(ended)


def test_the_last_request_of_an_identity() -> None:
    # Given two identities, and a request of each that has ended, and a later one
    bench = Bench()
    bench.keys(Identity("w", "worker"), Identity("alice", "client"), Identity("boss", "admin"))
    worker = bench.worker(user="w", slots=8)
    alice, boss = bench.client(b"a", "alice"), bench.client(b"b", "boss")

    def last(client: Client) -> bytes:
        return bytes.fromhex(msgspec.msgpack.decode(answer(client, "why", "last"), type=reports.RequestStory).id)

    for client in (alice, boss):
        client.send(m.Query(1, "why", "last"))
        assert client.problems[-1].error.code is Code.UNKNOWN_REQUEST
    alice.submit(1)
    bench.pass_time(10)
    alice.submit(2)
    bench.pass_time(10)
    boss.submit(3)
    # Then each gets its own, whether it runs or has ended, in the order in which they were sent
    assert (last(alice), last(boss)) == (request_id(2), request_id(3))
    alice.send(m.Cancel(request_id(2)))
    bench.pass_time(10)
    alice.send(m.Cancel(request_id(1)))
    assert (last(alice), last(boss)) == (request_id(2), request_id(3))
    worker.send(m.Goodbye())


def test_the_last_request_is_one_for_output_and_no_question_about_the_model() -> None:
    bench, _, client = small_mesh(client_lease_ms=60_000, lease_ms=60_000)

    def last() -> bytes:
        return bytes.fromhex(msgspec.msgpack.decode(answer(client, "why", "last"), type=reports.RequestStory).id)

    client.submit(1, task="model_info")
    assert last() == request_id(1)
    bench.pass_time(10)
    client.submit(2, task="embed")
    bench.pass_time(10)
    client.submit(3, task="tokenize")
    assert last() == request_id(2)


def test_what_is_no_id_has_a_hint_that_fits() -> None:
    client = busy_mesh()
    client.send(m.Query(1, "why", "what"))
    error = LlamboError.of(client.problems[-1].error)
    assert (error.code, error.hint) == (Code.BAD_REQUEST, queries.FIND_HINT)


def test_fields_of_other_versions() -> None:
    newer = msgspec.msgpack.encode([{"worker": "w1", "busy": 2, "busy_elsewhere": 1, "class": "big", "colour": "blue"}])
    (row,) = msgspec.msgpack.decode(newer, type=list[reports.WorkerRow])
    assert (row.worker, row.busy, row.busy_slots, row.node_class, row.note) == ("w1", 2, 3, "big", "")
    older = msgspec.msgpack.encode({"broker": "b", "busy": 1})
    assert msgspec.msgpack.decode(older, type=reports.MeshStatus) == reports.MeshStatus(broker="b", busy=1)


def test_what_each_has_of_what_it_may_have(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench()
    bench.keys(
        Identity("gpu", "worker"),
        Identity("boss", "admin"),
        Identity("friend", "client", max_in_flight=1, max_queued=2, max_bytes=2**20, priority_max="normal"),
        Identity("laptop", "client"),
    )
    bench.worker("gpu", slots=2, user="gpu")
    friend, laptop = bench.client(b"g", user="friend"), bench.client(b"l", user="laptop")
    for number in range(4):
        friend.submit(number)
    friend.submit(9, priority="interactive")
    laptop.submit(10)
    boss = bench.client(b"b", user="boss")
    boss.send(m.Query(1, "status"))
    show_identities(msgspec.msgpack.decode(boss.received(m.Result)[-1].data, type=MeshStatus).identities)
    boss_line, friend_line, laptop_line = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]]
    assert boss_line == "boss 0 0 0 B 0 0 0"
    assert friend_line == "friend 1/1 2/2 6.765 KiB/1 MiB 3 0 2: 1 max_queued, 1 priority_max"
    assert laptop_line == "laptop 1 0 2.255 KiB 1 0 0"
