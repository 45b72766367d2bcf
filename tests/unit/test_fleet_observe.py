"""What the autoscaler gets of the broker's answers, and the settings nodes are started with."""

from __future__ import annotations

import sys
from typing import Any

from llambo.fleet import node_manager
from llambo.fleet.decide.autoscale_core import LoadObserver, promised_models
from llambo.fleet.hosted import rows_of
from llambo.fleet.model import Fleet, HostedRow, HostFacts, Node, NodeState, World
from llambo.fleet.reader import parse
from llambo.mesh.wire.reports import HostRow, ModelHost, ModelRow, RequestRow, WorkerRow

TWO = """
[classes.tiny]
model = "/srv/models/small.gguf"
memory = "1GiB"
slots = 2
max = 9
[classes.wide]
model = "small"
memory = "2GiB"
slots = 6
max = 9
[classes.other]
engine = "fake"
memory = "1GiB"
max = 9
"""


def a_worker(name: str, **more: Any) -> WorkerRow:
    return WorkerRow(worker=name, models=["small"], **more)


def a_node(name: str, node_class: str, state: NodeState = NodeState.READY) -> Node:
    return Node(name=name, node_class=node_class, host="here", fingerprint="x", state=state, memory_bytes=1 << 30)


def waits(model: str, age_ms: int) -> RequestRow:
    return RequestRow(state="waiting", model=model, age_ms=age_ms)


def look(fleet: Fleet, nodes: list[Node], workers: list[WorkerRow], requests: list[RequestRow]) -> Any:
    world = World(tuple(nodes), {"here": HostFacts(10 << 30, 100)})
    found = LoadObserver().loads(fleet, world, {worker.worker: worker for worker in workers}, requests)
    return {one.node_class: one for one in found}


def test_those_that_wait_are_shared_out_by_slots() -> None:
    nodes = [a_node("tiny-0001", "tiny"), a_node("wide-0001", "wide")]
    workers = [a_worker("tiny-0001", busy=1, busy_elsewhere=1), a_worker("wide-0001", busy=6)]
    requests = [waits("small", 900)] * 8 + [RequestRow(state="running", model="small", age_ms=9_999)]
    seen = look(parse(TWO), nodes, workers, requests)
    assert [(one.busy, one.waiting, one.waited_ms, one.workers) for one in seen.values()] == [
        (2, 2, 900, 1), (6, 6, 900, 1), (0, 0, 0, 0),
    ]  # fmt: skip
    assert [one.room for one in seen.values()] == [8, 4, 8]


def test_where_there_is_no_worker_the_first_class_with_that_model_is_meant() -> None:
    seen = look(parse(TWO), [], [], [waits("small", 100), waits("fake", 300), waits("strange", 9_999)])
    assert [(one.waiting, one.waited_ms) for one in seen.values()] == [(1, 100), (0, 0), (1, 300)]


def test_one_that_drains_is_busy_and_counts_no_more() -> None:
    nodes = [a_node("tiny-0001", "tiny", NodeState.DRAINING), a_node("tiny-0002", "tiny", NodeState.STARTING)]
    seen = look(parse(TWO), nodes, [a_worker("tiny-0001", busy=2)], [])["tiny"]
    assert (seen.workers, seen.busy) == (1, 2)


def test_what_is_done_never_falls() -> None:
    fleet, observer = parse(TWO), LoadObserver()
    world = World((a_node("tiny-0001", "tiny"), a_node("tiny-0002", "tiny")), {})
    counted = []
    for done in ([5, 1], [9, 1], [2, 4], [2]):
        workers = {f"tiny-000{n}": a_worker(f"tiny-000{n}", done=count) for n, count in enumerate(done, 1)}
        counted.append(observer.loads(fleet, world, workers, [])[0].done)
    assert counted == [6, 10, 15, 15]


def test_settings_become_the_words_of_a_command() -> None:
    fleet = parse(TWO + 'fake.tokens_per_s = 5\n[broker]\nport = 7400\nqueue_bytes = "1MiB"\n')
    other, broker = fleet.classes["other"], fleet.broker
    assert broker is not None
    assert node_manager.command_of(other, "other-0001", broker="tcp://x:1", key="/k/other.key") == [
        sys.executable, "-m", "llambo.cli.services.worker", "--engine", "fake", "--threads", "1",
        "--fake-tokens-per-s", "5.0",
        "--name", "other-0001", "--class", "other", "--broker", "tcp://x:1", "--key", "/k/other.key",
    ]  # fmt: skip
    assert node_manager.command_of(broker, "broker", keys="/k") == [
        sys.executable, "-m", "llambo.cli.services.broker", "--port", "7400", "--queue-bytes", "1MiB", "--keys", "/k",
    ]  # fmt: skip


SEVERAL = """
[classes.several]
engine = "fake"
models = ["a:40", "b:40:20ms", "c:40"]
memory = "100MiB"
slots = 4
min = 1
max = 9
"""


def hosted(**workers: WorkerRow) -> dict[str, HostedRow]:
    """The row of a node with the models a, b and c. `workers`: those of its loaded models."""
    places = {
        model: ModelHost(host="several-0001", state="ready" if model in workers else "stored",
                         worker=f"several-0001-{model}" if model in workers else "")
        for model in "abc"
    }  # fmt: skip
    models = [
        ModelRow(model=name, hosts=[place]) for model, place in places.items() for name in (model, f"{model}@several")
    ]
    rows = {f"several-0001-{model}": row for model, row in workers.items()}
    return rows_of([HostRow(host="several-0001", models=3, loaded=list(workers))], models, rows)


def test_a_host_is_a_row_among_workers() -> None:
    (row,) = hosted(a=WorkerRow(worker="several-0001-a", state="ready", slots=4, busy=1, busy_elsewhere=2)).values()
    assert (row.worker, row.state, row.slots, row.busy_slots) == ("several-0001", "ready", 4, 3)
    assert row.workers == ["several-0001-a"] and row.note == "1 of 3 models loaded"
    assert row.models == ["a", "a@several", "b", "b@several", "c", "c@several"]
    (empty,) = hosted().values()
    assert (empty.state, empty.slots, empty.busiest) == ("ready", 0, 0.0)
    (drained,) = hosted(a=WorkerRow(worker="several-0001-a", state="drained", slots=4)).values()
    assert drained.state == "drained"


def test_a_class_of_hosts_is_as_busy_as_the_busiest_model_of_each() -> None:
    fleet = parse(SEVERAL)
    nodes = [a_node("several-0001", "several")]
    workers = {
        "a": WorkerRow(worker="several-0001-a", state="ready", slots=4, busy=4, done=7),
        "b": WorkerRow(worker="several-0001-b", state="ready", slots=4, busy=1, done=2),
    }
    rows = [*workers.values(), *hosted(**workers).values()]
    requests = [waits("c", 900), waits("a@several", 300), waits("strange", 9_999)]
    seen = look(fleet, nodes, rows, requests)["several"]
    assert (seen.busy, seen.waiting, seen.waited_ms, seen.done, seen.workers) == (4, 2, 900, 9, 1)


def test_what_was_done_does_not_count_again_when_a_model_is_unloaded() -> None:
    fleet, observer = parse(SEVERAL), LoadObserver()
    world, counted = World((a_node("several-0001", "several"),), {}), []
    for done in ({"a": 5, "b": 3}, {"a": 6}, {"a": 6, "b": 1}):
        workers = {model: WorkerRow(worker=f"several-0001-{model}", done=count) for model, count in done.items()}
        rows = {row.worker: row for row in (*workers.values(), *hosted(**workers).values())}
        counted.append(observer.loads(fleet, world, rows, [])[0].done)
    assert counted == [8, 9, 10]


def test_a_host_is_started_with_its_models_and_its_memory() -> None:
    spec = parse(SEVERAL).classes["several"]
    command = node_manager.command_of(spec, "several-0001", broker="tcp://box:7330")
    assert command[command.index("--models") + 1] == "a:40,b:40:20ms,c:40"
    assert command[command.index("--memory-bytes") + 1] == "100MiB"
    assert node_manager.environ(spec, broker="tcp://box:7330")["LLAMBO_MODELS"] == "a:40,b:40:20ms,c:40"
    assert promised_models(parse(SEVERAL.replace("min = 1", ""))) >= {"a", "b@several", "c"}
