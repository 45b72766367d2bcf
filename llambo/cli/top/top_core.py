"""What `llambo top` shows, as plain values: a snapshot of the mesh in, rows and lines out. No clock, no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llambo.cli.kit.tables import busy_text, duration, one_line, request_note, size, worker_note
from llambo.mesh.wire.naming import is_listed_otherwise
from llambo.mesh.wire.reports import (
    EventRow,
    HostRow,
    MeshStatus,
    ModelHost,
    ModelRow,
    RequestRow,
    SampleRow,
    WorkerRow,
)

#: Samples in a curve. A broker takes one a second, and remembers five minutes of them.
SAMPLES = 300
BARS = "▁▂▃▄▅▆▇█"
#: Lines for hosts, and characters of the bar in each.
HOSTS, BAR = 4, 12
#: Digits of a request's id that are shown.
ID_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the broker answered at one time."""

    status: MeshStatus
    workers: list[WorkerRow]
    requests: list[RequestRow]
    #: Samples and events since the snapshot before.
    samples: list[SampleRow]
    events: list[EventRow]
    #: Why events may not be read; empty if they may.
    no_events: str = ""
    #: Those that load models on demand.
    hosts: list[HostRow] = field(default_factory=list)


# --- tables ----------------------------------------------------------------------------------------------


class TableCell(NamedTuple):
    text: str
    sort_key: float | str
    #: A colour. It never says more than the text.
    colour: str = ""


@dataclass(frozen=True, slots=True)
class TableRow:
    #: The full name of what the row is about: a worker's name, a request's id.
    key: str
    cells: tuple[TableCell, ...]


@dataclass(frozen=True, slots=True)
class SortOrder:
    column: int = 0
    descending: bool = False


WORKER_COLUMNS = ("worker", "state", "busy", "tokens/s", "done", "models", "up", "heard", "host", "note")
REQUEST_COLUMNS = ("id", "state", "worker", "tokens", "age", "model", "class", "moves", "note")

_COLOURS = {
    **dict.fromkeys(("ready", "running", "dispatched", "completing"), "green"),
    **dict.fromkeys(("loading", "joining", "trial", "waiting", "draining", "drained"), "yellow"),
    **dict.fromkeys(("mending", "slow"), "red"),
}


def worker_row(row: WorkerRow) -> TableRow:
    cells = (
        _text_cell(row.worker),
        _state_cell(f"{row.state} {row.percent} %" if row.state == "loading" else row.state),
        TableCell(busy_text(row), row.busy_slots),
        TableCell(f"{row.tokens_per_s:.1f}", row.tokens_per_s),
        TableCell(str(row.done), row.done),
        _text_cell(",".join(row.plain_models)),
        TableCell(duration(row.up_ms), row.up_ms),
        TableCell(f"{duration(row.heard_ms)} ago", row.heard_ms),
        _text_cell(row.host),
        _text_cell(worker_note(row)),
    )
    return TableRow(row.worker, cells)


def request_row(row: RequestRow) -> TableRow:
    cells = (
        TableCell(row.id[:ID_DIGITS], row.id),
        _state_cell(row.state),
        _text_cell(row.worker),
        TableCell(f"{row.tokens}/{row.max_tokens}", row.tokens),
        TableCell(duration(row.age_ms), row.age_ms),
        _text_cell(row.model),
        _text_cell(row.priority),
        TableCell(str(row.moves), row.moves),
        _text_cell(request_note(row)),
    )
    return TableRow(row.id, cells)


def _text_cell(text: str) -> TableCell:
    return TableCell(shown := one_line(text), shown.lower())


def _state_cell(state: str) -> TableCell:
    return TableCell(one_line(state), state, _COLOURS.get(state.split(" ")[0], ""))


def arranged(rows: Iterable[TableRow], filter_text: str, order: SortOrder) -> list[TableRow]:
    """The rows that contain each word of the filter, sorted. Rows that compare equal are sorted by name."""
    words = filter_text.lower().split()
    shown = [row for row in rows if all(any(word in cell.text.lower() for cell in row.cells) for word in words)]
    shown.sort(key=lambda row: row.key)
    shown.sort(key=lambda row: row.cells[order.column].sort_key, reverse=order.descending)
    return shown


def headings(columns: Sequence[str], order: SortOrder) -> list[str]:
    """The sorted column has a mark; the others have a space of the same width."""
    mark = "▼" if order.descending else "▲"
    return [f"{name}{mark if at == order.column else ' '}" for at, name in enumerate(columns)]


# --- curves ----------------------------------------------------------------------------------------------


def curve(values: Sequence[float], width: int, full: float = 0) -> str:
    """The last `width` values as bars. The full bar is `full`, or the highest value if that is more."""
    shown = list(values)[-width:] if width > 0 else []
    highest = max(full, *shown, 0) if shown else 0
    bars = "".join(BARS[_level(value, highest)] for value in shown)
    return bars.rjust(width)


def _level(value: float, highest: float) -> int:
    """A value above 0 is never drawn as 0."""
    if value <= 0 or highest <= 0:
        return 0
    return max(1, min(len(BARS) - 1, round(value / highest * (len(BARS) - 1))))


@dataclass(slots=True)
class Curves:
    """What the broker has measured, second by second."""

    samples: deque[SampleRow] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    def gauges(self, status: MeshStatus, width: int) -> list[str]:
        """Three lines: a name, a curve, and the present value."""
        samples = self.samples
        lines: tuple[tuple[str, list[float], int, str], ...] = (
            ("tokens/s", [one.tokens_per_s for one in samples], 0,
             f"{status.tokens_per_s:.1f}, {status.requests_per_s:.1f} requests/s"),
            ("queue", [one.waiting for one in samples], 0, f"{status.waiting} waiting, {status.running} running"),
            ("slots", [one.busy for one in samples], status.slots, f"{status.busy_slots} of {status.slots} busy"),
        )  # fmt: skip
        names, values = max(len(name) for name, *_ in lines), max(len(value) for *_, value in lines)
        drawn = max(0, width - names - values - 4)
        return [f"{name:<{names}}  {curve(measured, drawn, full)}  {value}" for name, measured, full, value in lines]


def host_lines(models: Sequence[ModelRow], hosts: Sequence[HostRow], width: int) -> list[str]:
    """A line for each host: how full its memory is, and the models in it, with how far those are that are loaded."""
    lines = []
    names = {row.model for row in models}
    for host in hosts[:HOSTS]:
        held = [
            _loaded(row.model, there)
            for row in models if not is_listed_otherwise(row.model, names)
            for there in row.hosts if there.host == host.host and there.state not in ("stored", "failed")
        ]  # fmt: skip
        used, budget = (sum(getattr(each, what) for each in host.memory.values()) for what in ("used", "budget"))
        filled = round(BAR * used / budget) if budget else 0
        bar = f"{'█' * filled}{'░' * (BAR - filled)}"
        text = one_line(
            f"{host.host}  {bar}  {size(used)} of {size(budget)}: {', '.join(held) or 'no model is loaded'}"
        )
        lines.append(text if len(text) <= width else f"{text[: width - 1]}…")
    if len(hosts) > HOSTS:
        lines[-1] = f"and {len(hosts) - HOSTS + 1} more hosts: `llambo models`"
    return lines


def _loaded(model: str, there: ModelHost) -> str:
    if there.state == "loading":
        return f"{model} {there.percent} %"
    return f"{model} (unloading)" if there.state == "unloading" else model


def summary_line(status: MeshStatus) -> str:
    so_far = ", ".join(f"{status.counters.get(name, 0)} {name}" for name in ("ended", "failed", "moved", "refused"))
    return f"{status.ready} of {status.workers} workers ready, {status.clients} clients; {so_far}"


# --- events ----------------------------------------------------------------------------------------------


class ShownEvent(NamedTuple):
    number: int
    #: Seconds since 1970.
    at_s: float
    kind: str
    text: str


def shown_event(event: EventRow, now_s: float) -> ShownEvent:
    return ShownEvent(event.number, now_s - event.age_ms / 1_000, one_line(event.kind), one_line(event.text))
