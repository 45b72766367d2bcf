"""What the dashboard shows, as a value made of a broker's answers, and as the changes from one value to the next.

A `Picture` is all of it. `changes` leads from one picture to the next for a viewer that has seen the first; a viewer
that has not is given the whole picture. There is no clock here: rows have ages, and the caller says when they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from llambo.mesh.wire.naming import is_listed_otherwise
from llambo.mesh.wire.reports import (
    EndedRow,
    EventRow,
    HostRow,
    MemoryRow,
    MeshStatus,
    ModelHost,
    ModelRow,
    Recent,
    RequestRow,
    SampleRow,
    WorkerRow,
)

#: Rows that are shown at most. Of workers the broker reports no more than 1,000.
REQUESTS_SHOWN = 100
ENDED_SHOWN = 60
EVENTS_SHOWN = 200
SAMPLES_SHOWN = 300
#: Ended requests from which latency is computed.
MEASURED = 200
#: A moment computed from an age moves with the time that the answer took. Within this it counts as the same moment.
AGE_TOLERANCE_MS = 1_500
#: A worker is called silent when a message of it is overdue by more than this.
SILENT_MS = 1_000
_COUNTERS = ("submitted", "ended", "failed", "cancelled", "moved", "refused", "tokens", "workers_lost", "engine_deaths")


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the page gets of a row: ages are replaced by moments, in milliseconds since 1970."""


class ModelView(View, frozen=True, kw_only=True):
    model: str
    #: As `ModelRow.state`.
    state: str
    kind: str
    workers: int
    slots: int
    waiting: int
    fake: bool
    note: str


class HostedView(View, frozen=True, kw_only=True):
    """A model at a host that loads it on demand."""

    #: The model and the host.
    id: str
    model: str
    host: str
    kind: str
    state: str
    percent: int
    bytes: int
    pinned: bool
    holders: list[str]
    note: str
    loads: int
    in_use: bool
    #: When it was used last; 0: it is not loaded.
    used: int


class HostView(View, frozen=True, kw_only=True):
    host: str
    memory: dict[str, MemoryRow]


class MeshView(View, frozen=True, kw_only=True):
    broker: str
    policy: str
    workers: int
    ready: int
    slots: int
    busy_slots: int
    clients: int
    running: int
    waiting: int
    tokens_per_s: float
    requests_per_s: float
    #: The broker does not keep up, and refuses new requests.
    behind: bool
    models: list[ModelView]
    counters: dict[str, int]
    #: When the broker started.
    since: int


class WorkerView(View, frozen=True, kw_only=True):
    worker: str
    state: str
    node_class: str = msgspec.field(name="class")
    host: str
    models: list[str]
    slots: int
    busy_slots: int
    tokens_per_s: float
    done: int
    engine_restarts: int
    percent: int
    note: str
    slow: str
    library: str
    since: int
    silent_s: int


class RequestView(View, frozen=True, kw_only=True):
    id: str
    state: str
    model: str
    task: str
    priority: str
    worker: str
    tokens: int
    max_tokens: int
    moves: int
    ahead: int
    queued_ms: int
    detached: bool
    at: int


class EndedView(View, frozen=True, kw_only=True):
    id: str
    model: str
    task: str
    worker: str
    tokens: int
    prompt_tokens: int
    moves: int
    reason: str
    error: str
    queued_ms: int
    first_ms: int
    decode_ms: int
    total_ms: int
    at: int


class EventView(View, frozen=True, kw_only=True):
    number: int
    kind: str
    text: str
    worker: str
    warning: bool
    at: int


class SampleView(View, frozen=True, kw_only=True):
    number: int
    tokens_per_s: float
    running: int
    waiting: int
    busy: int
    slots: int
    ready: int
    workers: int
    ended: int
    failed: int
    first_ms: int
    at: int


class Latency(View, frozen=True, kw_only=True, omit_defaults=True):
    """The median and the 95th percentile of the last answers. Empty if there are none."""

    answers: int = 0
    first_ms: int | None = None
    first_p95_ms: int | None = None
    queued_ms: int | None = None
    queued_p95_ms: int | None = None
    stream_tokens_per_s: float = 0.0


NO_LATENCY = Latency()
Key = TypeVar("Key", str, int)
V = TypeVar("V", bound=View)
Aged = TypeVar("Aged", EndedRow, EventRow, SampleRow)
Number = TypeVar("Number", int, float)
#: What is sent to a viewer, as JSON.
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """A broker's answers in one round. `events` and `recent` are what is new since the round before."""

    status: MeshStatus
    workers: list[WorkerRow]
    requests: list[RequestRow]
    events: list[EventRow]
    recent: Recent
    hosts: list[HostRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Picture:
    #: None: nothing is known yet.
    mesh: MeshView | None = None
    workers: dict[str, WorkerView] = field(default_factory=dict)
    requests: dict[str, RequestView] = field(default_factory=dict)
    hosted: dict[str, HostedView] = field(default_factory=dict)
    hosts: dict[str, HostView] = field(default_factory=dict)
    #: The latest is last, in all three.
    ended: dict[str, EndedView] = field(default_factory=dict)
    events: dict[int, EventView] = field(default_factory=dict)
    samples: dict[int, SampleView] = field(default_factory=dict)
    latency: Latency = NO_LATENCY
    #: Why nothing new is known; empty: all of this is current.
    problem: str = ""

    @property
    def last_event(self) -> int:
        return max(self.events, default=0)

    @property
    def last_sample(self) -> int:
        return max(self.samples, default=0)


EMPTY = Picture()


def is_another(before: Picture, status: MeshStatus, now_ms: int) -> bool:
    """True if this is not the broker of the picture before, or if it was restarted: its numbers begin again."""
    if before.mesh is None:
        return False
    moved = abs(now_ms - status.up_ms - before.mesh.since) > 2 * AGE_TOLERANCE_MS
    return moved or status.broker != before.mesh.broker


def picture(before: Picture, answers: Answers, now_ms: int) -> Picture:
    """`now_ms`: since 1970, when the answers came."""
    status, recent = answers.status, answers.recent
    mesh = _view(
        MeshView, status, counters={name: status.counters.get(name, 0) for name in _COUNTERS},
        models=[_view(ModelView, row) for row in status.models],
        since=_moment(before.mesh.since if before.mesh else None, now_ms - status.up_ms),
    )  # fmt: skip
    ended = _latest(before.ended, recent.ended, lambda row: row.id, MEASURED, EndedView, now_ms)
    return Picture(
        mesh=mesh,
        workers={row.worker: _worker(row, before.workers.get(row.worker), now_ms) for row in answers.workers},
        requests={
            row.id: _request(row, before.requests.get(row.id), now_ms) for row in first_requests(answers.requests)
        },
        hosted=_hosted(status.models, before.hosted, now_ms),
        hosts={row.host: _view(HostView, row) for row in answers.hosts},
        ended=ended,
        events=_latest(before.events, answers.events, lambda row: row.number, EVENTS_SHOWN, EventView, now_ms),
        samples=_latest(before.samples, recent.samples, lambda row: row.number, SAMPLES_SHOWN, SampleView, now_ms),
        latency=latency(ended.values()),
    )


def first_requests(requests: list[RequestRow]) -> list[RequestRow]:
    """Those that run before those that wait, the oldest first. A quarter is for those that wait, if there are many."""
    listed = sorted(requests, key=lambda row: (row.state == "waiting", row.ahead, -row.age_ms))
    waiting = [row for row in listed if row.state == "waiting"]
    running = listed[: len(listed) - len(waiting)]
    held = min(len(waiting), max(REQUESTS_SHOWN // 4, REQUESTS_SHOWN - len(running)))
    return [*running[: REQUESTS_SHOWN - held], *waiting[:held]]


def _latest(
    before: dict[Key, V], rows: Iterable[Aged], key_of: Callable[[Aged], Key], limit: int, kind: type[V], now_ms: int
) -> dict[Key, V]:
    """Rows that were known keep their views, so that they are not sent again."""
    fresh = {key: _view(kind, row, at=now_ms - row.age_ms) for row in rows if (key := key_of(row)) not in before}
    return dict(list({**before, **fresh}.items())[-limit:]) if fresh else before


def _worker(row: WorkerRow, before: WorkerView | None, now_ms: int) -> WorkerView:
    since = _moment(before.since if before else None, now_ms - row.up_ms)
    silent = row.heard_ms >= SILENT_MS + row.interval_ms
    return _view(WorkerView, row, since=since, silent_s=row.heard_ms // 1_000 if silent else 0)


def _hosted(rows: list[ModelRow], before: Mapping[str, HostedView], now_ms: int) -> dict[str, HostedView]:
    """A model that is listed again with its class or an adapter takes no more memory."""
    names = {row.model for row in rows}
    found = {}
    for row in rows:
        for there in row.hosts if not is_listed_otherwise(row.model, names) else ():
            id = f"{row.model} {there.host}"
            found[id] = _at_host(id, row, there, before.get(id), now_ms)
    return found


def _at_host(id: str, row: ModelRow, there: ModelHost, before: HostedView | None, now_ms: int) -> HostedView:
    known = before.used if before is not None and before.used and there.idle_ms else None
    used = 0 if there.idle_ms < 0 else _moment(known, now_ms - there.idle_ms)
    return _view(
        HostedView, there, id=id, model=row.model, kind=row.kind, in_use=not there.idle_ms,
        used=before.used if before is not None and before.in_use and not there.idle_ms else used,
    )  # fmt: skip


def _request(row: RequestRow, before: RequestView | None, now_ms: int) -> RequestView:
    return _view(RequestView, row, at=_moment(before.at if before else None, now_ms - row.age_ms))


def _view(kind: type[V], row: msgspec.Struct, /, **computed: Any) -> V:
    """The fields that the view has; those that the row does not have are `computed`."""
    return kind(**{name: getattr(row, name) for name in kind.__struct_fields__ if name not in computed}, **computed)


def _moment(known: int | None, at_ms: int) -> int:
    return known if known is not None and abs(known - at_ms) <= AGE_TOLERANCE_MS else at_ms


def latency(ended: Iterable[EndedView]) -> Latency:
    answers = [row for row in ended if row.task == "generate" and row.first_ms >= 0 and not row.error]
    if not answers:
        return NO_LATENCY
    first = sorted(row.first_ms for row in answers)
    queued = sorted(row.queued_ms for row in answers)
    paces = sorted(pace for row in answers if (pace := _pace(row)))
    return Latency(
        answers=len(answers),
        first_ms=_quantile(first, 0.5),
        first_p95_ms=_quantile(first, 0.95),
        queued_ms=_quantile(queued, 0.5),
        queued_p95_ms=_quantile(queued, 0.95),
        stream_tokens_per_s=round(_quantile(paces, 0.5), 1) if paces else 0.0,
    )


def _pace(row: EndedView) -> float:
    """Tokens per second of one stream, after its first token."""
    return (row.tokens - 1) * 1_000 / row.decode_ms if row.tokens > 1 and row.decode_ms else 0.0


def _quantile(ordered: list[Number], share: float) -> Number:
    """The smallest value such that at least this share of the values are not larger."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def whole(now: Picture, now_ms: int) -> Message:
    """For a viewer that has seen nothing yet."""
    return {
        "now": now_ms,
        "whole": True,
        "mesh": now.mesh or {},
        "workers": {"set": list(now.workers.values()), "gone": []},
        "requests": {"set": list(now.requests.values()), "gone": []},
        "hosted": {"set": list(now.hosted.values()), "gone": []},
        "hosts": {"set": list(now.hosts.values()), "gone": []},
        "ended": list(now.ended.values())[-ENDED_SHOWN:],
        "events": list(now.events.values()),
        "samples": list(now.samples.values()),
        "latency": now.latency,
        "problem": now.problem,
    }


def changes(before: Picture, now: Picture, now_ms: int) -> Message | None:
    """For a viewer that has seen `before`. None: nothing has changed."""
    message: Message = {
        "mesh": _changed(before.mesh, now.mesh),
        "workers": _changed_rows(before.workers, now.workers, "worker"),
        "requests": _changed_rows(before.requests, now.requests, "id"),
        "hosted": _changed_rows(before.hosted, now.hosted, "id"),
        "hosts": _changed_rows(before.hosts, now.hosts, "host"),
        "ended": _fresh(before.ended, now.ended)[-ENDED_SHOWN:],
        "events": _fresh(before.events, now.events),
        "samples": _fresh(before.samples, now.samples),
    }
    message = {name: value for name, value in message.items() if value}
    if now.latency != before.latency:
        message["latency"] = now.latency
    if now.problem != before.problem:
        message["problem"] = now.problem
    return {"now": now_ms, **message} if message else None


def _fresh(before: Mapping[Key, V], now: Mapping[Key, V]) -> list[V]:
    return [row for key, row in now.items() if key not in before]


def _changed_rows(before: Mapping[str, V], now: Mapping[str, V], key: str) -> Message | None:
    """The changed fields of each row; all fields of a new one."""
    changed = [{key: name, **_changed(before.get(name), row)} for name, row in now.items() if row != before.get(name)]
    gone = [name for name in before if name not in now]
    return {"set": changed, "gone": gone} if changed or gone else None


def _changed(before: View | None, now: View | None) -> Message:
    was, fields = ({} if view is None else msgspec.to_builtins(view) for view in (before, now))
    return {name: value for name, value in fields.items() if name not in was or was[name] != value}
