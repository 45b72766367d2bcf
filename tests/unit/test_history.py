"""A broker's report of the last minutes: a sample a second, and requests that ended."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec

from llambo.broker.config import Bounds
from llambo.broker.report.history import ENDED_LISTED
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity, Role
from tests.unit.broker_bench import Bench, Client, request_id, small_mesh


def recent(client: Client, since: str = "") -> dict[str, Any]:
    client.send(m.Query(1, "recent", since))
    return dict(msgspec.msgpack.decode(client.received_last(m.Result)[-1].data))


def test_a_sample_a_second_says_how_the_mesh_was() -> None:
    bench, worker, client = small_mesh(slots=1, lease_ms=60_000, client_lease_ms=60_000)
    worker.beat(rate=12.34)
    client.submit(1)
    client.submit(2)
    bench.pass_time(3_000)
    samples = recent(client)["samples"]
    assert [sample["number"] for sample in samples] == list(range(1, len(samples) + 1))
    ages = [sample["age_ms"] for sample in samples]
    assert {before - after for before, after in pairwise(ages)} == {1_000}
    last = samples[-1]
    wanted = {"running": 1, "waiting": 1, "busy": 1, "slots": 1, "ready": 1, "workers": 1, "tokens_per_s": 12.3}
    assert {name: last[name] for name in wanted} == wanted
    assert last["first_ms"] == 0


def test_only_what_came_after_a_sample_is_sent() -> None:
    bench, worker, client = small_mesh(client_lease_ms=60_000)
    client.submit(1)
    worker.publish(worker.chunk(0, 5, 6))
    worker.end(2)
    bench.pass_time(1_000)
    seen = recent(client)["samples"][-1]["number"]
    assert recent(client, str(seen)) == {"samples": [], "ended": []}
    bench.pass_time(1_000)
    again = recent(client, str(seen))
    assert [sample["number"] for sample in again["samples"]] == [seen + 1]
    assert again["ended"] == []


def test_an_ended_request_is_listed_with_its_times() -> None:
    bench, worker, client = small_mesh(slots=1, client_lease_ms=60_000)
    client.submit(0)
    id = client.submit(1)
    bench.now_ms += 250
    worker.publish(worker.chunk(0, 5))
    worker.end(1)
    bench.now_ms += 15
    worker.publish(worker.chunk(0, 5, 6))
    bench.now_ms += 40
    dispatch = worker.dispatches[-1]
    usage = m.Usage(prompt_tokens=7, prefill_ms=30.4, decode_ms=9.0)
    worker.send(m.End(dispatch.id, 2, "length", dispatch.dispatch, usage))
    (ended,) = recent(client)["ended"][1:]
    assert ended == {
        "id": id.hex(), "model": "m", "task": "generate", "worker": "w", "tokens": 2, "prompt_tokens": 7, "moves": 0,
        "reason": "length", "error": "", "queued_ms": 250, "first_ms": 265, "decode_ms": 9, "total_ms": 305,
        "age_ms": 0,
    }  # fmt: skip
    bench.pass_time(1_000)
    samples = recent(client)["samples"][-2:]
    assert 265 in [sample["first_ms"] for sample in samples]


def test_it_is_bounded_and_the_latest_comes_last() -> None:
    bench, _, client = small_mesh(client_lease_ms=10_000_000)
    for number in range(ENDED_LISTED + 5):
        client.submit(number)
        client.send(m.Cancel(request_id(number)))
    bench.pass_time((Bounds().samples + 10) * 1_000)
    recently = recent(bench.client(b"reader"))  # the other one has read nothing for an hour, and gets no answer
    assert len(recently["samples"]) == Bounds().samples
    assert [ended["id"] for ended in recently["ended"]] == [
        request_id(number).hex() for number in range(5, ENDED_LISTED + 5)
    ]


def test_requests_of_others_are_not_listed() -> None:
    bench = Bench(client_lease_ms=60_000)
    names: dict[str, Role] = {"boss": "admin", "visitor": "client", "other": "client", "w": "worker"}
    bench.keys(*(Identity(name, role) for name, role in names.items()))
    bench.worker("w", user="w")
    visitor, other = bench.client(b"g", user="visitor"), bench.client(b"o", user="other")
    boss = bench.client(b"b", user="boss")
    id = visitor.submit(1)
    visitor.send(m.Cancel(id))
    assert [ended["id"] for ended in recent(visitor)["ended"]] == [id.hex()]
    assert recent(other)["ended"] == []
    assert [ended["id"] for ended in recent(boss)["ended"]] == [id.hex()]
