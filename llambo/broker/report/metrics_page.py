"""The page of metrics: what the meter has measured, what the counters say, and how things stand now.

To make it takes a look at each worker and each running request.
"""

from __future__ import annotations

from typing import Any, get_args

from llambo.broker.records import meter
from llambo.broker.records.registry import CONDITIONS
from llambo.broker.records.state import State
from llambo.mesh.service import prometheus
from llambo.mesh.service.prometheus import Family, Metric, Scalar
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity


def _counter(name: str, text: str) -> Metric:
    return Metric(f"llambo_broker_{name}_total", "counter", text)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"llambo_broker_{name}", "gauge", text, labels)


#: By their names in `Counters`. The meter has those that are missing here, with labels.
COUNTED = {
    "submitted": _counter("requests_submitted", "Requests admitted"),
    "attached": _counter("requests_attached", "Submits of a request that was there already"),
    "dispatched": _counter("dispatches", "Requests given to a worker"),
    "adopted": _counter("adoptions", "Runs of another broker, or of this one before a restart, that were adopted"),
    "chunks": _counter("chunks", "Frames from workers on the token plane"),
    "stale_chunks": _counter("stale_chunks", "Chunks under the key of a dispatch that is over, and dropped"),
    "duplicate_chunks": _counter("duplicate_chunks", "Chunks that came twice, and dropped"),
    "malformed_frames": _counter("malformed_frames", "Malformed frames on the token plane"),
    "gaps": _counter("token_gaps", "Chunks that came before one that is missing"),
    "repaired": _counter("token_repairs", "Requests that missed tokens and asked their worker for them"),
    "replays_asked": _counter("replays_asked", "Times a worker was asked for tokens again"),
    "replays_served": _counter("replays_served", "Times a client was given tokens again"),
    "engine_deaths": _counter("engine_deaths", "Engines that died, as their workers say"),
    "suspected": _counter("requests_suspected", "Times an engine died while it ran a request"),
    "convicted": _counter("requests_convicted", "Requests that were ended because they kill engines"),
    "ejected": _counter("workers_ejected", "Times a worker got no new work for being much slower than its peers"),
    "retries_denied": _counter("retries_denied", "Requests that were not tried again, since too many had failed"),
    "workers_lost": _counter("workers_lost", "Workers that left, or were given up"),
    "clients_lost": _counter("clients_lost", "Clients that fell silent"),
    "problems": _counter("problems", "Messages that could not be read, and hellos that were refused"),
    "unknown_sessions": _counter("unknown_sessions", "Messages under a session that is over, or never was"),
    "forbidden": _counter("forbidden", "Messages that the role of their sender does not allow"),
    "unread": _counter("unread", "Messages of clients that do not read their answers, taken as lost"),
}
#: These the meter has.
METERED = ("refused", "ended", "failed", "cancelled", "moved", "tokens")
SHELL = {
    "dropped_frames": _counter("dropped_frames", "Frames that a peer did not read in time, and were dropped"),
    "doors_refused": _counter("auth_refusals", "Connections refused for their key"),
    "subscriptions_refused": _counter("subscriptions_refused", "Subscriptions that were not granted"),
}
WORKERS = _gauge("workers", "Workers, by state and node class", "state", "class")
READY = _gauge("workers_ready", "Workers that take requests or would if they were less busy")
SERVING = _gauge("model_workers_ready", "Those of them that serve a model", "model")
SLOTS = _gauge("slots", "Requests that workers run at a time at most", "class")
BUSY = _gauge("slots_busy", "Slots taken by requests of this broker", "class")
ELSEWHERE = _gauge("slots_busy_elsewhere", "Slots taken by requests of other brokers", "class")
RATE = _gauge("worker_tokens_per_second", "Tokens a second that workers say they make, together", "class")
RUNNING = _gauge("requests_running", "Requests with a worker", "model", "class")
WAITING = _gauge("requests_waiting", "Requests that wait for a worker", "model")
WAITING_FOR_LOAD = _gauge("requests_waiting_for_load", "Those of them whose model is loaded at no worker", "model")
HOSTED = _gauge("hosted_models", "Models of a host that loads them on demand, by state", "host", "state")
BUDGET = _gauge("host_memory_bytes", "Memory of a host for models", "host", "memory")
USED = _gauge("host_memory_used_bytes", "What its loaded models take", "host", "memory")
PLAIN = {
    "queue_limit": _gauge("queue_requests_limit", "Requests that may wait"),
    "queue": _gauge("queue_bytes", "Prompts that wait"),
    "queue_bytes_limit": _gauge("queue_bytes_limit", "Prompts that may wait, in bytes"),
    "transcripts": _gauge("transcript_bytes", "Bytes set aside for answers that are not finished or not fetched"),
    "transcripts_limit": _gauge("transcript_bytes_limit", "Bytes that may be set aside"),
    "detached": _gauge("detached_bytes", "Finished detached results"),
    "clients": _gauge("clients", "Sessions of clients"),
    "models": _gauge("models", "Models that are served, or are waited for"),
    "turn": _gauge("turn_seconds", "Longest turn of the loop in the last second"),
    "behind": _gauge("behind", "1 while this broker does not keep up and refuses new requests"),
    "up": _gauge("up_seconds", "How long this broker has been running"),
}
_GAUGES = (WORKERS, READY, SERVING, SLOTS, BUSY, ELSEWHERE, RATE, RUNNING, WAITING, WAITING_FOR_LOAD, HOSTED, BUDGET,
           USED, *PLAIN.values())  # fmt: skip
TABLE: tuple[Metric, ...] = (*meter.TABLE, *COUNTED.values(), *SHELL.values(), *_GAUGES)


def page(state: State, now_ms: int) -> str:
    families: list[Family[Any]] = []
    counters = state.counters.flat()
    for request in state.running.values():
        state.measured.meter.count(request)
    families += state.measured.meter.families.values()
    families += [_one(metric, counters[name]) for name, metric in COUNTED.items()]
    families += [_one(metric, getattr(state.measured.shell, name)) for name, metric in SHELL.items()]
    families += _workers(state)
    families += _requests(state)
    families += _hosts(state)
    families += [_one(PLAIN[name], value) for name, value in _plain(state, now_ms).items()]
    return prometheus.page(families)


def asked(state: State, argument: str, now_ms: int, who: Identity) -> dict[str, Any]:
    """The query."""
    return {"page": page(state, now_ms)}


def _one(metric: Metric, value: float) -> Family[Scalar]:
    family = metric.scalars()
    family.one.value = value
    return family


def _workers(state: State) -> list[Family[Scalar]]:
    """With zeros for all labels that could be: an alert on a number that is not there never fires."""
    kinds = WORKERS, READY, SERVING, SLOTS, BUSY, ELSEWHERE, RATE
    workers, ready, serving, slots, busy, elsewhere, rate = (kind.scalars() for kind in kinds)
    models, classes = state.measured.meter.models, state.measured.meter.classes
    for node_class in classes:
        for condition in CONDITIONS:
            workers.at(condition, node_class)
        for family in (slots, busy, elsewhere, rate):
            family.at(node_class)
    for model in models:
        serving.at(model)
    for worker in state.registry.workers.values():
        node_class, condition = classes.of(worker.hello.node_class), worker.condition
        workers.at(condition, node_class).value += 1
        slots.at(node_class).value += worker.slots
        busy.at(node_class).value += len(worker.claims)
        elsewhere.at(node_class).value += worker.busy
        rate.at(node_class).value += worker.last.rate
        if condition in ("ready", "trial"):
            ready.one.value += 1
            for model in dict.fromkeys(map(models.of, worker.serving.models)):
                serving.at(model).value += 1
    return [workers, ready, serving, slots, busy, elsewhere, rate]


def _requests(state: State) -> list[Family[Scalar]]:
    running, waiting, for_load = RUNNING.scalars(), WAITING.scalars(), WAITING_FOR_LOAD.scalars()
    models, classes = state.measured.meter.models, state.measured.meter.classes
    for model in models:
        waiting.at(model)
        for_load.at(model)
    for labels in state.measured.meter.families[meter.TOKENS.name]:
        running.at(*labels)
    for request in state.running.values():
        worker = request.run.worker
        node_class = worker.hello.node_class if worker is not None else ""
        running.at(models.of(request.model), classes.of(node_class)).value += 1
    for lane, line in state.queue.lines.items():
        # What waits to be adopted stands in one line, without a model.
        waiting.at(models.of(lane.model)).value += line.count
        if lane.model in state.hosts.waits:
            for_load.at(models.of(lane.model)).value += line.count
    return [running, waiting, for_load]


def _hosts(state: State) -> list[Family[Scalar]]:
    hosted, budget, used = HOSTED.scalars(), BUDGET.scalars(), USED.scalars()
    for host in state.hosts.sessions.values():
        for each in get_args(m.HostedState):
            hosted.at(host.name, each)
        for model in host.models.values():
            hosted.at(host.name, model.state).value += 1
        for name, memory in host.memory.items():
            budget.at(host.name, name).value += memory.bytes
            used.at(host.name, name).value += memory.used
    return [hosted, budget, used]


def _plain(state: State, now_ms: int) -> dict[str, float]:
    bounds = state.config.bounds
    return {
        "queue_limit": bounds.queue_requests,
        "queue": state.queue.bytes,
        "queue_bytes_limit": bounds.queue_bytes,
        "transcripts": state.held_bytes,
        "transcripts_limit": bounds.transcript_bytes,
        "detached": state.archive.detached_bytes,
        "clients": len(state.registry.clients),
        "models": len(state.models_shown(now_ms)),
        "turn": state.measured.load.last_second_ms / 1_000,
        "behind": state.measured.load.behind,
        "up": (now_ms - state.wakeups.started_at) / 1000 if state.wakeups.started_at >= 0 else 0.0,
    }
