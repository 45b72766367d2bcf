"""What is sent to the dashboard: a page that follows the changes shows the same as one just opened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from llambo.gateway.dashboard.watch_core import (
    EMPTY,
    ENDED_SHOWN,
    MEASURED,
    REQUESTS_SHOWN,
    Answers,
    EndedView,
    Picture,
    changes,
    first_requests,
    is_another,
    latency,
    picture,
    whole,
)
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import reports
from tests.unit.broker_bench import Bench, Client, small_mesh
from tests.unit.test_hosts import model as hosted

NOW = 1_800_000_000_000


def answers(client: Client, before: Picture = EMPTY) -> Answers:
    """A broker's answers in one round."""

    def ask(what: str, argument: str = "") -> bytes:
        client.send(m.Query(1, what, argument))
        return client.received_last(m.Result)[-1].data

    return Answers(
        msgspec.msgpack.decode(ask("status"), type=reports.MeshStatus),
        msgspec.msgpack.decode(ask("workers"), type=list[reports.WorkerRow]),
        msgspec.msgpack.decode(ask("requests"), type=list[reports.RequestRow]),
        msgspec.msgpack.decode(ask("events", str(before.last_event)), type=list[reports.EventRow]),
        msgspec.msgpack.decode(ask("recent", str(before.last_sample)), type=reports.Recent),
        msgspec.msgpack.decode(ask("hosts"), type=list[reports.HostRow]),
    )


class Viewer:
    """What a page makes of the messages (gateway/static/mesh.js does the same)."""

    def __init__(self) -> None:
        self.mesh: dict[str, Any] = {}
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in ("workers", "requests", "hosted", "hosts")}
        self.lists: dict[str, list[Any]] = {"ended": [], "events": [], "samples": []}
        self.rest: dict[str, Any] = {"latency": {}, "problem": ""}

    def take(self, message: dict[str, Any] | None) -> None:
        if message is None:
            return
        message = msgspec.to_builtins(message)
        if message.get("whole"):
            self.__init__()  # type: ignore[misc]
        self.mesh |= message.get("mesh", {})
        for kind, key in (("workers", "worker"), ("requests", "id"), ("hosted", "id"), ("hosts", "host")):
            rows = message.get(kind, {"set": [], "gone": []})
            for row in rows["set"]:
                self.rows[kind].setdefault(row[key], {}).update(row)
            for name in rows["gone"]:
                del self.rows[kind][name]
        for kind, known in self.lists.items():
            known += message.get(kind, [])
        self.lists["ended"] = self.lists["ended"][-ENDED_SHOWN:]
        self.rest |= {name: message[name] for name in self.rest if name in message}


STEPS = st.lists(
    st.sampled_from(["submit", "token", "end", "join", "leave", "cancel", "second", "trouble"]), max_size=30
)


@settings(max_examples=60)
@given(steps=STEPS)
def test_who_follows_sees_what_is_there(steps: list[str]) -> None:
    bench = Bench(lease_ms=10**9, client_lease_ms=10**9)
    workers, client = [bench.worker("w0")], bench.client()
    viewer, before = Viewer(), EMPTY
    for number, step in enumerate(steps):
        last = workers[-1] if workers else None
        match step:
            case "submit":
                client.submit(number)
            case "token" if last and last.dispatches:
                last.publish(last.chunk(0, number))
            case "end" if last and last.dispatches:
                last.end(1)
            case "join":
                workers.append(bench.worker(f"w{number}", slots=number))
            case "leave" if last:
                workers.pop().send(m.Goodbye("enough"))
            case "cancel" if bench.state.requests:
                client.send(m.Cancel(next(iter(bench.state.requests))))
            case "second":
                bench.pass_time(1_000)
        now_ms = NOW + bench.now_ms
        if step == "trouble":
            now = replace(before, problem="silence")
        else:
            now = picture(before, answers(client, before), now_ms)
        viewer.take(changes(before, now, now_ms))
        before = now
    late = Viewer()
    late.take(whole(before, NOW))
    assert vars(viewer) == vars(late)


def test_without_changes_nothing_is_sent() -> None:
    bench, _, client = small_mesh()
    before = picture(EMPTY, answers(client), NOW)
    bench.now_ms += 3
    # The same moment, reported a little later.
    assert changes(before, picture(before, answers(client, before), NOW + 5), NOW + 5) is None


def test_only_what_is_different_of_a_worker_is_sent() -> None:
    _, worker, client = small_mesh()
    before = picture(EMPTY, answers(client), NOW)
    worker.beat(rate=5.0)
    update = changes(before, picture(before, answers(client, before), NOW), NOW)
    assert update is not None
    assert update["workers"] == {"set": [{"worker": "w", "tokens_per_s": 5.0}], "gone": []}


def test_a_model_that_is_loaded_moves_its_bar_only() -> None:
    bench = Bench(lease_ms=10**9, client_lease_ms=10**9)
    client, host = bench.client(), bench.host("box", hosted("a"), hosted("b", "loading", percent=4))
    before = picture(EMPTY, answers(client), NOW)
    assert [(row.id, row.state, row.used) for row in before.hosted.values()] == [
        ("a box", "stored", 0),
        ("b box", "loading", 0),
    ]
    assert list(before.hosts) == ["box"]
    host.report(hosted("a"), hosted("b", "loading", percent=41))
    now = picture(before, answers(client, before), NOW)
    update = changes(before, now, NOW)
    assert update is not None
    assert update["hosted"] == {"set": [{"id": "b box", "percent": 41}], "gone": []}
    assert "hosts" not in update
    # The time since its last use goes on without a message
    host.report(hosted("a"), hosted("b", "ready"))
    before = picture(now, answers(client, now), NOW)
    bench.now_ms += 500
    assert "hosted" not in (changes(before, picture(before, answers(client, before), NOW + 500), NOW + 500) or {})


def test_another_broker_is_not_taken_for_the_same() -> None:
    bench = Bench()
    client = bench.client()
    bench.now_ms += 60_000
    seen = picture(EMPTY, answers(client), NOW)
    status = answers(client).status
    assert not is_another(EMPTY, status, NOW)
    assert not is_another(seen, structs.replace(status, up_ms=status.up_ms + 2_000), NOW + 2_000)
    assert is_another(seen, structs.replace(status, up_ms=500), NOW + 2_000)
    assert is_another(seen, structs.replace(status, broker="shed"), NOW)


def test_what_is_kept_is_bounded_and_those_that_run_come_first() -> None:
    bench = Bench(client_lease_ms=10**9, backlog_bytes=2**30)
    bench.worker(slots=1)
    client = bench.client()
    for number in range(REQUESTS_SHOWN + 20):
        client.submit(number)
    seen = picture(EMPTY, answers(client), NOW)
    assert len(seen.requests) == REQUESTS_SHOWN
    assert [row.state for row in seen.requests.values()][:2] == ["dispatched", "waiting"]
    for number in range(MEASURED):
        client.submit(1_000 + number)
        client.send(m.Cancel((1_000 + number).to_bytes(16, "big")))
        seen = picture(seen, answers(client, seen), NOW)
    assert len(seen.ended) <= MEASURED
    assert len(whole(seen, NOW)["ended"]) == ENDED_SHOWN


def test_those_that_wait_have_a_share_of_the_list() -> None:
    rows = [reports.RequestRow(id=str(number), state="running", age_ms=number) for number in range(2 * REQUESTS_SHOWN)]
    rows += [reports.RequestRow(id=f"w{number}", state="waiting", ahead=number) for number in range(REQUESTS_SHOWN)]
    listed = first_requests(rows)
    assert len(listed) == REQUESTS_SHOWN
    assert [row.id for row in listed if row.state == "waiting"] == [f"w{n}" for n in range(REQUESTS_SHOWN // 4)]
    assert [row.state for row in first_requests(rows[-5:])] == ["waiting"] * 5


def ended(**fields: Any) -> EndedView:
    row = {"task": "generate", "tokens": 11, "error": "", "queued_ms": 0, "first_ms": 50, "decode_ms": 1_000}
    rest: dict[str, Any] = dict.fromkeys(("prompt_tokens", "moves", "total_ms", "at"), 0)
    rest |= dict.fromkeys(("id", "model", "worker", "reason"), "")
    return msgspec.convert({**rest, **row, **fields}, EndedView)


def test_latency_is_that_of_answers_that_came() -> None:
    assert msgspec.to_builtins(latency([])) == {}
    assert latency([ended(error="no"), ended(first_ms=-1), ended(task="embed")]) == latency([])
    found = latency([ended(first_ms=10 * number, queued_ms=number) for number in range(1, 101)])
    assert (found.first_ms, found.first_p95_ms) == (500, 950)
    assert (found.queued_ms, found.queued_p95_ms) == (50, 95)
    assert (found.answers, found.stream_tokens_per_s) == (100, 10.0)
