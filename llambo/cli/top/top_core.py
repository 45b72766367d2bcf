"""What `llambo top` shows, as plain values: a snapshot of the mesh in, rows and lines out. No clock, no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llambo.cli.kit.output import duration
from llambo.mesh.wire.errors import printable

#: So many samples are kept for the curves. A broker takes one in a second, and remembers five minutes of them.
REMEMBERED = 300
BARS = "▁▂▃▄▅▆▇█"
#: Digits of a request's id that are shown.
ID_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the broker has answered at one time."""

    status: dict[str, Any]
    workers: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    #: The broker's samples, and what happened, since the last look.
    samples: list[dict[str, Any]]
    events: list[dict[str, Any]]
    #: Why there are no events, if that is not for want of any.
    no_events: str = ""


class Cell(NamedTuple):
    text: str
    #: What it is sorted by.
    value: float | str
    #: green, yellow or red, where that says something; the text says it as well.
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    #: What it is about, whole: a worker's name, a request's id.
    key: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """How a table is sorted: by which column, and whether the highest comes first."""

    column: int = 0
    falling: bool = False


WORKER_COLUMNS = ("worker", "state", "busy", "tokens/s", "done", "models", "up", "heard", "host", "note")
REQUEST_COLUMNS = ("id", "state", "worker", "tokens", "age", "model", "class", "moves", "note")

_TONES = {
    "ready": "green",
    "running": "green",
    "dispatched": "green",
    "completing": "green",
    "loading": "yellow",
    "joining": "yellow",
    "trial": "yellow",
    "waiting": "yellow",
    "draining": "yellow",
    "drained": "yellow",
    "mending": "red",
    "slow": "red",
}


def line(text: object) -> str:
    """What somebody else has said, on one line and without orders to the terminal."""
    return " ".join(printable(str(text)).split())


def worker_rows(found: Iterable[dict[str, Any]]) -> list[Row]:
    return [Row(row["worker"], _worker(row)) for row in found]


def _worker(row: dict[str, Any]) -> tuple[Cell, ...]:
    elsewhere = row.get("busy_elsewhere", 0)
    busy = f"{row['busy']}{f'+{elsewhere}' if elsewhere else ''}/{row['slots']}"
    state = f"{row['state']} {row['percent']} %" if row["state"] == "loading" else row["state"]
    slow = f"slow: {row['slow']}" if row.get("slow") else ""
    restarts = f"engine restarted {row['engine_restarts']} times" if row["engine_restarts"] else ""
    return (
        _text(row["worker"]),
        _state(state),
        Cell(busy, row["busy"] + elsewhere),
        Cell(f"{row['tokens_per_s']:.1f}", row["tokens_per_s"]),
        Cell(str(row["done"]), row["done"]),
        _text(",".join(row["models"])),
        Cell(duration(row["up_ms"]), row["up_ms"]),
        Cell(f"{duration(row['heard_ms'])} ago", row["heard_ms"]),
        _text(row["host"]),
        _text(", ".join(filter(None, (row["class"], slow, row["note"], restarts)))),
    )


def request_rows(found: Iterable[dict[str, Any]]) -> list[Row]:
    return [Row(row["id"], _request(row)) for row in found]


def _request(row: dict[str, Any]) -> tuple[Cell, ...]:
    notes = (f"{row['ahead']} ahead" if row["state"] == "waiting" else "", "detached" if row["detached"] else "")
    return (
        Cell(row["id"][:ID_DIGITS], row["id"]),
        _state(row["state"]),
        _text(row["worker"]),
        Cell(f"{row['tokens']}/{row['max_tokens']}", row["tokens"]),
        Cell(duration(row["age_ms"]), row["age_ms"]),
        _text(row["model"]),
        _text(row["priority"]),
        Cell(str(row["moves"]), row["moves"]),
        _text(", ".join(filter(None, notes))),
    )


def _text(text: str) -> Cell:
    return Cell(shown := line(text), shown.lower())


def _state(state: str) -> Cell:
    return Cell(line(state), state, _TONES.get(state.split()[0], ""))


def arranged(rows: Iterable[Row], wanted: str, order: Order) -> list[Row]:
    """Those in which each word of `wanted` is found, sorted. Equal ones stay in the order of their names."""
    words = wanted.lower().split()
    kept = [row for row in rows if all(any(word in cell.text.lower() for cell in row.cells) for word in words)]
    kept.sort(key=lambda row: row.key)
    kept.sort(key=lambda row: row.cells[order.column].value, reverse=order.falling)
    return kept


def headings(columns: Sequence[str], order: Order) -> list[str]:
    """The column that sorts is marked; the others have room for the mark."""
    mark = "▼" if order.falling else "▲"
    return [f"{name}{mark if at == order.column else ' '}" for at, name in enumerate(columns)]


# --- curves ----------------------------------------------------------------------------------------------


def curve(values: Sequence[float], width: int, top: float = 0) -> str:
    """The last `width` of them as bars; `top` is a full one, or else the highest."""
    shown = list(values)[-width:] if width > 0 else []
    highest = max(top, *shown, 0) if shown else 0
    bars = "".join(BARS[_level(value, highest)] for value in shown)
    return bars.rjust(width)


def _level(value: float, highest: float) -> int:
    """What is not nothing is seen to be more than nothing."""
    if value <= 0 or highest <= 0:
        return 0
    return max(1, min(len(BARS) - 1, round(value / highest * (len(BARS) - 1))))


@dataclass(slots=True)
class Curves:
    """What the broker has measured, second by second."""

    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    queue: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    busy: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, samples: Iterable[dict[str, Any]]) -> None:
        for sample in samples:
            self.tokens.append(sample["tokens_per_s"])
            self.queue.append(sample["waiting"])
            self.busy.append(sample["busy"])

    def clear(self) -> None:
        for measured in (self.tokens, self.queue, self.busy):
            measured.clear()


def busy(status: dict[str, Any]) -> int:
    return int(status["busy"] + status.get("busy_elsewhere", 0))


def gauges(status: dict[str, Any], curves: Curves, width: int) -> list[str]:
    """Three lines: a name, a curve, the value of now."""
    told = (
        ("tokens/s", curves.tokens, 0, f"{status['tokens_per_s']:.1f}, {status['requests_per_s']:.1f} requests/s"),
        ("queue", curves.queue, 0, f"{status['waiting']} waiting, {status['running']} running"),
        ("slots", curves.busy, status["slots"], f"{busy(status)} of {status['slots']} busy"),
    )
    names, values = max(len(name) for name, *_ in told), max(len(value) for *_, value in told)
    drawn = max(0, width - names - values - 4)
    return [f"{name:<{names}}  {curve(measured, drawn, top)}  {value}" for name, measured, top, value in told]


def facts(status: dict[str, Any]) -> str:
    counters = status["counters"]
    so_far = ", ".join(f"{counters[name]} {name}" for name in ("ended", "failed", "moved", "refused"))
    return f"{status['ready']} of {status['workers']} workers ready, {status['clients']} clients; {so_far}"


# --- events ----------------------------------------------------------------------------------------------


class Happened(NamedTuple):
    number: int
    #: Seconds since 1970.
    at_s: float
    kind: str
    text: str


def happened(events: Iterable[dict[str, Any]], now_s: float) -> list[Happened]:
    return [
        Happened(event["number"], now_s - event["age_ms"] / 1_000, line(event["kind"]), line(event["text"]))
        for event in events
    ]
