"""Questions about the mesh, answered from the state as msgpack maps.

status     the whole picture in numbers           workers   one entry each
models     name, workers, slots, waiting, hosts   requests  the live ones
hosts      those that load models on demand
why ID     the story of one request               find ID   full ids for a unique prefix
events N   what happened after number N           metrics   the page for Prometheus
recent N   samples of each second, and what has ended, after sample N
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain, islice
from typing import Any

import msgspec

from llambo.broker.records.accounts import Account
from llambo.broker.records.archive import EndedRequest
from llambo.broker.records.hosts import HostEntry
from llambo.broker.records.registry import ClientEntry, WorkerEntry
from llambo.broker.records.request import AWAITING_RUN, Request, RequestState
from llambo.broker.records.state import State
from llambo.broker.report import history, metrics_page
from llambo.broker.requests import same_model
from llambo.mesh.wire import limits, reports
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo, LlamboError
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import is_fake
from llambo.mesh.wire.timers import NEVER_MS

#: Bytes of an answer in one message.
RESULT_PAGE_BYTES = 512 * 1024
#: Entries of a listing; more could not be read anyway.
LISTED = 1_000
#: In place of an id.
LAST = "last"
#: Tasks beside requests.
ASIDE: tuple[m.Task, ...] = ("model_info", "tokenize", "detokenize")
FIND_HINT = "`llambo requests` lists the live ones, and `llambo why` shows the last one that was sent"
#: Variants of a model in a listing, and workers of each.
VARIANTS, VARIANT_NAMES = 8, 8


def answer(state: State, client: ClientEntry, asked: m.Query, blob: bytes, now_ms: int) -> None:
    rule = QUERIES.get(asked.what)
    try:
        if rule is None:
            known = ", ".join(QUERIES)
            raise LlamboError(Code.BAD_REQUEST, f"nothing is known about {asked.what!r}; ask for: {known}")
        data = msgspec.msgpack.encode(rule(state, asked.argument, now_ms, client.identity))
    except LlamboError as error:
        state.to_client(client, m.Problem(error.info(), b"", asked.query))
        return
    send(state, client, asked.query, data)


def send(state: State, client: ClientEntry, query: int, data: bytes) -> None:
    if len(data) > limits.RESULT_BYTES:
        error = ErrorInfo(Code.INTERNAL, f"the answer has {len(data)} bytes, {limits.RESULT_BYTES} are allowed")
        state.to_client(client, m.Problem(error, b"", query))
        return
    parts = [data[at : at + RESULT_PAGE_BYTES] for at in range(0, len(data), RESULT_PAGE_BYTES)]
    for number, part in enumerate(parts):
        state.to_client(client, m.Result(query, number, len(parts), part))


# --- snapshots -----------------------------------------------------------------------------------------


def status(state: State, argument: str, now_ms: int, who: Identity) -> reports.MeshStatus:
    workers = state.registry.workers.values()
    return reports.MeshStatus(
        broker=state.config.name,
        workers=len(workers),
        up_ms=now_ms - state.wakeups.started_at,
        ready=history.ready(workers),
        slow=[worker.name for worker in workers if worker.speed.ejected],
        loading={worker.name: worker.last.percent for worker in workers if worker.state == "starting"},
        slots=sum(worker.slots for worker in workers),
        busy=sum(len(worker.claims) for worker in workers),
        busy_elsewhere=sum(worker.busy for worker in workers),
        clients=len(state.registry.clients),
        running=len(state.running),
        waiting=state.queue.count,
        waiting_bytes=state.queue.bytes,
        tokens_per_s=round(sum(worker.last.rate for worker in workers), 1),
        requests_per_s=round(state.measured.end_rate.per_s, 1),
        transcript_bytes=state.held_bytes,
        detached_bytes=state.archive.detached_bytes,
        remembered=len(state.archive.ended),
        turn_ms=state.measured.load.last_second_ms,
        behind=state.measured.load.behind,
        policy=state.config.policy,
        models=models(state, "", now_ms, who),
        identities=identities(state, who),
        counters=state.counters.flat(),
    )


def identities(state: State, who: Identity) -> list[reports.AccountRow]:
    """Usage and limits: of all identities for an admin, its own for a client. Without keys there are none."""
    if state.access.identities is None:
        return []
    accounts = state.access.accounts
    own = accounts.of(who.name)  # it may not have asked for anything yet
    listed = sorted(accounts.by_name.values(), key=lambda account: account.name) if who.may_manage else [own]
    return [_identity(account) for account in listed[:LISTED]]


def _identity(account: Account) -> reports.AccountRow:
    who = account.who
    return reports.AccountRow(
        identity=account.name,
        role=who.role,
        in_flight=account.in_flight,
        queued=account.queued,
        bytes=account.bytes,
        submitted=account.submitted,
        ended=account.ended,
        tokens=account.tokens,
        refused=account.refused.total(),
        refused_for=dict(account.refused),
        max_in_flight=who.max_in_flight,
        max_queued=who.max_queued,
        max_bytes=who.max_bytes,
        per_minute=who.per_minute,
    )


def models(state: State, argument: str, now_ms: int, who: Identity) -> list[reports.ModelRow]:
    listed = []
    waiting = _waiting(state)
    for model in list(filter(who.may_use, state.models_shown(now_ms)))[:LISTED]:
        serving = [worker for worker in state.registry.workers.values() if model in worker.serving.models]
        listed.append(
            reports.ModelRow(
                model=model,
                workers=len(serving),
                loading=sum(worker.state == "starting" for worker in serving),
                slots=sum(worker.slots for worker in serving),
                waiting=waiting[model],
                fake=any(is_fake(worker.serving.fingerprints.get(model, "")) for worker in serving),
                variants=_variants(model, serving),
                kind=state.models.kinds.get(model, ""),
                hosts=[_model_at(host, there, now_ms, who) for host, there in state.hosts.at(model)][:LISTED],
                note=state.hosts.note(model),
            )
        )
    return listed


def _model_at(host: HostEntry, model: m.HostedModel, now_ms: int, who: Identity) -> reports.ModelHost:
    usage = host.usage.get(model.name)
    own = [each for each in model.holders if who.owns(each.partition("/")[0])]
    loaded = model.state == "ready" and usage is not None
    return reports.ModelHost(
        host=host.name,
        state=model.state,
        percent=model.percent,
        bytes=sum(model.needs.values()),
        needs=model.needs,
        pinned=model.pinned,
        holders=own,
        held=len(model.holders),
        worker=model.worker,
        note=model.note,
        retry_ms=max(0, usage.retry_at - now_ms) if usage is not None and usage.retry_at < NEVER_MS else 0,
        loads=model.loads,
        load_ms=model.load_ms,
        idle_ms=now_ms - usage.used_at if usage is not None and loaded else -1,
    )


def hosts(state: State, argument: str, now_ms: int, who: Identity) -> list[reports.HostRow]:
    found = sorted(state.hosts.sessions.values(), key=lambda host: host.name)
    return [_host(host, now_ms, who) for host in found if argument in ("", host.name)][:LISTED]


def _host(host: HostEntry, now_ms: int, who: Identity) -> reports.HostRow:
    return reports.HostRow(
        host=host.name,
        machine=host.hello.host,
        pid=host.hello.pid,
        node_class=host.hello.node_class,
        memory={
            name: reports.MemoryRow(budget=memory.bytes, used=memory.used, helpers=memory.helpers)
            for name, memory in host.memory.items()
        },
        models=len(host.models),
        loaded=[name for name, model in host.models.items() if model.state == "ready" and who.may_use(name)],
        load=list(filter(who.may_use, host.wishes.load)),
        evict=list(filter(who.may_use, host.wishes.evict)),
        heard_ms=now_ms - host.link.heard_at,
        up_ms=now_ms - host.link.joined_at,
        software=host.hello.software,
    )


def _waiting(state: State) -> Counter[str]:
    """In all lanes, by model."""
    waiting: Counter[str] = Counter()
    for lane, line in state.queue.lines.items():
        if lane == AWAITING_RUN:
            waiting.update(request.model for request in line)
        else:
            waiting[lane.model] += line.count
    return waiting


def _variants(model: str, serving: list[WorkerEntry]) -> list[reports.ModelVariant]:
    """None if all are alike."""
    alike: dict[str, list[str]] = {}
    for worker in serving:
        if model in worker.serving.fingerprints:
            alike.setdefault(worker.serving.fingerprints[model], []).append(worker.name)
    if len(alike) < 2:
        return []
    found = sorted((sorted(names)[:VARIANT_NAMES], fingerprint) for fingerprint, names in alike.items())
    return [reports.ModelVariant(fingerprint=fingerprint, workers=names) for names, fingerprint in found[:VARIANTS]]


def workers(state: State, argument: str, now_ms: int, who: Identity) -> list[reports.WorkerRow]:
    one = state.registry.worker_names.get(argument)
    listed = state.registry.workers.values() if not argument else [one] if one is not None else []
    found = sorted(listed, key=lambda worker: worker.name)
    return [_worker(worker, now_ms, who) for worker in found[:LISTED]]


def _worker(worker: WorkerEntry, now_ms: int, who: Identity) -> reports.WorkerRow:
    return reports.WorkerRow(
        worker=worker.name,
        state=worker.condition,
        node_class=worker.hello.node_class,
        host=worker.hello.host,
        pid=worker.hello.pid,
        models=[model for model in worker.serving.models if who.may_use(model)],
        slots=worker.slots,
        busy=len(worker.claims),
        busy_elsewhere=worker.busy,
        tokens_per_s=round(worker.last.rate, 1),
        pace=round(worker.speed.pace, 1),
        weight=1 / worker.speed.idle_load,
        done=worker.done,
        engine_restarts=worker.last.engine_restarts,
        heard_ms=now_ms - worker.link.heard_at,
        interval_ms=worker.link.idle_ms if worker.hello.paced and not worker.claims else 0,
        up_ms=now_ms - worker.link.joined_at,
        percent=worker.last.percent,
        note=worker.last.note,
        slow=worker.speed.note,
        library=worker.last.library or worker.hello.library,
        fingerprints={
            model: fingerprint for model, fingerprint in worker.serving.fingerprints.items() if who.may_use(model)
        },
    )


def requests(state: State, argument: str, now_ms: int, who: Identity) -> list[reports.RequestRow]:
    return [
        _request(state, request, now_ms)
        for request in islice((one for one in state.requests.values() if who.owns(one.owner)), LISTED)
    ]


def _request(state: State, request: Request, now_ms: int) -> reports.RequestRow:
    waits = request.state is RequestState.WAITING
    return reports.RequestRow(
        id=request.id.hex(),
        state=request.state.value,
        model=request.model,
        task=request.task,
        priority=request.asked.priority,
        worker=request.run.worker.name if request.run.worker else "",
        tokens=request.transcript.next_index,
        max_tokens=request.asked.max_tokens,
        moves=request.run.moves,
        ahead=state.queue.ahead(request) if waits else 0,
        queued_ms=request.place.queued_ms,
        age_ms=now_ms - request.submitted_at,
        detached=request.asked.detached,
        waits_for=same_model.waits_for(state, request) if waits else "",
    )


def why(state: State, argument: str, now_ms: int, who: Identity) -> dict[str, Any]:
    """The story of one request, live or remembered: `reports.RequestStory` without the fields that it does not have."""
    id = _found(state, argument, who)
    request = state.requests.get(id)
    if request is not None:
        row = msgspec.structs.asdict(_request(state, request, now_ms))
        story = request.story
    else:
        ended = state.archive.ended[id]
        story = ended.story
        end = ended.end
        row = {
            "id": id.hex(),
            "state": "ended",
            "model": ended.model,
            "worker": end.worker,
            "tokens": end.count,
            "moves": end.moves,
            "reason": end.reason,
            "error": end.error.text if end.error else "",
            "kept": ended.transcript is not None,
        }
    start = story[0][0] if story else now_ms
    row["story"] = [{"at_ms": at - start, "what": what, "detail": detail} for at, what, detail in story]
    return row


def story(state: State, id: bytes) -> list[tuple[int, str, str]]:
    """What happened to a request and when."""
    request = state.requests.get(id)
    if request is not None:
        return request.story
    ended = state.archive.get(id)
    return ended.story if ended else []


def find(state: State, argument: str, now_ms: int, who: Identity) -> dict[str, Any]:
    id = _found(state, argument, who)
    ended = state.archive.get(id)
    stored = id in state.requests or (ended is not None and ended.transcript is not None and not ended.abandoned)
    return {"id": id.hex(), "stored": stored}


def _found(state: State, argument: str, who: Identity) -> bytes:
    prefix = argument.strip().lower()
    if prefix == LAST:
        return _latest(state, who)
    if len(prefix) < 4 or any(digit not in "0123456789abcdef" for digit in prefix):
        text = f"{argument!r} is not an id: at least four hex digits are needed"
        raise LlamboError(Code.BAD_REQUEST, text, hint=FIND_HINT)
    if len(prefix) == 2 * limits.REQUEST_ID_BYTES:
        id = bytes.fromhex(prefix)
        known = state.requests.get(id) or state.archive.get(id)
        if known is not None and who.owns(known.owner):
            return id
    pools: tuple[Mapping[bytes, Request | EndedRequest], ...] = (state.requests, state.archive.ended)
    found = [
        id for pool in pools for id, known in pool.items() if id.hex().startswith(prefix) and who.owns(known.owner)
    ]
    if not found:
        raise LlamboError(Code.UNKNOWN_REQUEST, f"no request {argument} is known here")
    if len(found) > 1:
        text = f"{len(found)} requests begin with {argument}"
        raise LlamboError(Code.BAD_REQUEST, text, hint=f"give more digits; {FIND_HINT}")
    return found[0]


def _latest(state: State, who: Identity) -> bytes:
    """The request of this identity that was submitted last, live or remembered. Without keys all have one identity.

    One for a model's output goes before those that programs make on their own, such as a chat that counts tokens.
    """
    live = (
        (one.task not in ASIDE, one.submitted_at, id) for id, one in state.requests.items() if one.owner == who.name
    )
    ended = (
        (one.task not in ASIDE, one.story[0][0] if one.story else one.ended_at, id)
        for id, one in state.archive.ended.items()
        if one.owner == who.name
    )
    _, _, id = max(chain(live, ended), default=(False, 0, b""))
    if not id:
        raise LlamboError(Code.UNKNOWN_REQUEST, "no request of yours is known here", hint=FIND_HINT)
    return id


def events(state: State, argument: str, now_ms: int, who: Identity) -> list[reports.EventRow]:
    since = int(argument) if argument.isdigit() else 0
    return [
        reports.EventRow(
            number=event.number,
            age_ms=now_ms - event.at_ms,
            kind=event.kind,
            text=event.text,
            worker=event.worker,
            warning=event.warning,
        )
        for event in state.journal.entries
        if event.number > since
    ]


QUERIES: dict[str, Callable[[State, str, int, Identity], Any]] = {
    "status": status,
    "workers": workers,
    "models": models,
    "hosts": hosts,
    "requests": requests,
    "why": why,
    "find": find,
    "events": events,
    "recent": history.recent,
    "metrics": metrics_page.asked,
}
