"""What the dashboard shows, as a value: made of a broker's answers, and told as what has changed.

A `Picture` is all of it. `changes` is how one follows from the one before, for whoever saw that; who did not is given
the picture. No clock: the answers have ages, and the caller says when they came.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

#: Rows that are shown at the most; of workers the broker tells no more than 1,000.
REQUESTS_SHOWN = 100
ENDED_SHOWN = 60
EVENTS_SHOWN = 200
SAMPLES_SHOWN = 300
#: Ends that latency is made of.
MEASURED = 200
#: What is told as an age and stays where it is: moments differ by how long the answer took to come.
AGE_TOLERANCE_MS = 1_500

_MESH = (
    "broker", "policy", "workers", "ready", "slots", "busy", "busy_elsewhere", "clients", "running", "waiting",
    "tokens_per_s", "requests_per_s", "models",
)  # fmt: skip
_COUNTERS = ("submitted", "ended", "failed", "cancelled", "moved", "refused", "tokens", "workers_lost", "engine_deaths")
#: Of a row all is told but its ages, which become moments, and what nobody is shown.
_UNTOLD = {"age_ms", "up_ms", "heard_ms", "pid", "pace", "weight"}
#: A worker that was not heard of for less than this is not called silent.
SILENT_MS = 1_000


@dataclass(frozen=True, slots=True)
class Answers:
    """What a broker said in one round. `events` and `recent` are what is new since the round before."""

    status: Row
    workers: list[Row]
    requests: list[Row]
    events: list[Row]
    recent: dict[str, list[Row]]


@dataclass(frozen=True, slots=True)
class Picture:
    mesh: Row = field(default_factory=dict)
    workers: dict[str, Row] = field(default_factory=dict)
    requests: dict[str, Row] = field(default_factory=dict)
    #: The latest last, all three.
    ended: dict[str, Row] = field(default_factory=dict)
    events: dict[int, Row] = field(default_factory=dict)
    samples: dict[int, Row] = field(default_factory=dict)
    latency: Row = field(default_factory=dict)
    #: Why nothing new is known; empty: all of this is from just now.
    problem: str = ""

    @property
    def last_event(self) -> int:
        return max(self.events, default=0)

    @property
    def last_sample(self) -> int:
        return max(self.samples, default=0)


EMPTY = Picture()


def troubled(before: Picture, problem: str) -> Picture:
    """Nothing was answered: the last that was known stays, and says that it is old."""
    return Picture(
        before.mesh, before.workers, before.requests, before.ended, before.events, before.samples, before.latency,
        problem,
    )  # fmt: skip


def is_another(before: Picture, status: Row, now_ms: int) -> bool:
    """Whether this is another broker than the one before, or it has been restarted: its numbers begin anew."""
    if not before.mesh:
        return False
    moved = abs(now_ms - status["up_ms"] - before.mesh["since"]) > 2 * AGE_TOLERANCE_MS
    return bool(moved or status["broker"] != before.mesh["broker"])


def picture(before: Picture, told: Answers, now_ms: int) -> Picture:
    """`now_ms`: since 1970, when the answers came."""
    status = told.status
    mesh = {name: status[name] for name in _MESH}
    mesh["counters"] = {name: status["counters"].get(name, 0) for name in _COUNTERS}
    mesh["since"] = _moment(before.mesh, "since", now_ms - status["up_ms"])
    measured = _latest(before.ended, _ends(told.recent["ended"], now_ms), MEASURED)
    return Picture(
        mesh,
        {row["worker"]: _worker(row, before.workers.get(row["worker"], {}), now_ms) for row in told.workers},
        {row["id"]: _aged(row, before.requests.get(row["id"], {}), now_ms) for row in _first(told.requests)},
        measured,
        _latest(before.events, {row["number"]: _aged(row, {}, now_ms) for row in told.events}, EVENTS_SHOWN),
        _latest(
            before.samples,
            {row["number"]: _aged(row, {}, now_ms) for row in told.recent["samples"]},
            SAMPLES_SHOWN,
        ),
        latency(measured.values()),
    )


def _first(requests: list[Row]) -> list[Row]:
    """Those that run before those that wait, the oldest first."""
    listed = sorted(requests, key=lambda row: (row["state"] == "waiting", row["ahead"], -row["age_ms"]))
    return listed[:REQUESTS_SHOWN]


def _ends(rows: Iterable[Row], now_ms: int) -> dict[str, Row]:
    return {row["id"]: _aged(row, {}, now_ms) for row in rows}


def _latest(before: dict[Any, Row], news: dict[Any, Row], limit: int) -> dict[Any, Row]:
    """What was known stays as it is, so that it is not told again."""
    fresh = {key: row for key, row in news.items() if key not in before}
    if not fresh:
        return before
    kept = {**before, **fresh}
    return dict(list(kept.items())[-limit:])


def _worker(row: Row, before: Row, now_ms: int) -> Row:
    told = _aged(row, before, now_ms)
    told["since"] = _moment(before, "since", now_ms - row["up_ms"])
    told["silent_s"] = row["heard_ms"] // 1_000 if row["heard_ms"] >= SILENT_MS else 0
    return told


def _aged(row: Row, before: Row, now_ms: int) -> Row:
    told = {name: value for name, value in row.items() if name not in _UNTOLD}
    if "age_ms" in row:
        told["at"] = _moment(before, "at", now_ms - row["age_ms"])
    return told


def _moment(before: Row, name: str, at_ms: int) -> int:
    known = before.get(name)
    return known if known is not None and abs(known - at_ms) <= AGE_TOLERANCE_MS else at_ms


# --- latency -----------------------------------------------------------------------------------------------------


def latency(ended: Iterable[Row]) -> Row:
    """Half and nineteen of twenty of the last answers took no longer than this. Without any there is nothing to say."""
    whole = [row for row in ended if row["task"] == "generate" and row["first_ms"] >= 0 and not row["error"]]
    if not whole:
        return {}
    first = sorted(row["first_ms"] for row in whole)
    queued = sorted(row["queued_ms"] for row in whole)
    paces = sorted(pace for row in whole if (pace := _pace(row)))
    return {
        "answers": len(whole),
        "first_ms": _quantile(first, 0.5),
        "first_p95_ms": _quantile(first, 0.95),
        "queued_ms": _quantile(queued, 0.5),
        "queued_p95_ms": _quantile(queued, 0.95),
        "stream_tokens_per_s": round(_quantile(paces, 0.5), 1) if paces else 0,
    }


def _pace(row: Row) -> float:
    """Tokens per second of one stream, after its first token."""
    return (row["tokens"] - 1) * 1_000 / row["decode_ms"] if row["tokens"] > 1 and row["decode_ms"] else 0.0


def _quantile(ordered: list[Any], share: float) -> Any:
    """The smallest of them that no less than this share is below or at."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


# --- what has changed --------------------------------------------------------------------------------------------


def whole(now: Picture, now_ms: int) -> Row:
    """For who has seen nothing yet."""
    return {
        "now": now_ms,
        "whole": True,
        "mesh": now.mesh,
        "workers": {"set": list(now.workers.values()), "gone": []},
        "requests": {"set": list(now.requests.values()), "gone": []},
        "ended": list(now.ended.values())[-ENDED_SHOWN:],
        "events": list(now.events.values()),
        "samples": list(now.samples.values()),
        "latency": now.latency,
        "problem": now.problem,
    }


def changes(before: Picture, now: Picture, now_ms: int) -> Row | None:
    """For who has seen `before`. None: it is the same."""
    said: Row = {}
    if mesh := {name: value for name, value in now.mesh.items() if before.mesh.get(name) != value}:
        said["mesh"] = mesh
    for name, was, rows in (
        ("workers", before.workers, now.workers),
        ("requests", before.requests, now.requests),
    ):
        if told := _rows(was, rows, "worker" if name == "workers" else "id"):
            said[name] = told
    for name, seen, all_rows, limit in (
        ("ended", before.ended, now.ended, ENDED_SHOWN),
        ("events", before.events, now.events, EVENTS_SHOWN),
        ("samples", before.samples, now.samples, SAMPLES_SHOWN),
    ):
        if fresh := [row for key, row in all_rows.items() if key not in seen]:
            said[name] = fresh[-limit:]
    if now.latency != before.latency:
        said["latency"] = now.latency
    if now.problem != before.problem:
        said["problem"] = now.problem
    return {"now": now_ms, **said} if said else None


def _rows(before: dict[str, Row], now: dict[str, Row], key: str) -> Row | None:
    """Of each row what is different; a new one whole."""
    changed = []
    for name, row in now.items():
        was = before.get(name, {})
        if row != was:
            changed.append({key: name, **{field: value for field, value in row.items() if was.get(field) != value}})
    gone = [name for name in before if name not in now]
    return {"set": changed, "gone": gone} if changed or gone else None
