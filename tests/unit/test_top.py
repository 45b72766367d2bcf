"""What `llambo top` makes of a snapshot: rows, order, curves. The screen itself is in tests/integration/test_top.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
import pytest
from click.testing import CliRunner

from llambo.cli import main
from llambo.cli.kit.failure import Exit
from llambo.cli.kit.tables import one_line
from llambo.cli.top.top_app import Gatherer
from llambo.cli.top.top_core import (
    BARS,
    HOSTS,
    REQUEST_COLUMNS,
    WORKER_COLUMNS,
    Curves,
    SortOrder,
    arranged,
    curve,
    headings,
    host_lines,
    request_row,
    shown_event,
    summary_line,
    worker_row,
)
from llambo.mesh.service.extras import extra_command
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.reports import (
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
from tests.unit.broker_bench import Bench

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

T = TypeVar("T")


def asked(bench: Bench, what: str, kind: type[T]) -> T:
    """The answer of a real broker core."""
    client = bench.client(b"asks")
    client.send(m.Query(1, what))
    return msgspec.msgpack.decode(client.received(m.Result)[-1].data, type=kind)


def busy_bench() -> Bench:
    """Two workers with a slot each, four requests: two run, two wait."""
    bench = Bench()
    bench.worker("w-b", slots=1)
    bench.worker("w-a", slots=1)
    client = bench.client(b"c")
    for number in range(4):
        client.submit(number, priority="batch" if number == 3 else "normal")
    return bench


def texts(rows: list[Any], column: int) -> list[str]:
    return [row.cells[column].text for row in rows]


# --- rows ----------------------------------------------------------------------------------------------


def test_each_worker_is_a_row_of_what_the_broker_says_of_it() -> None:
    rows = arranged(map(worker_row, asked(busy_bench(), "workers", list[WorkerRow])), "", SortOrder())
    assert [row.key for row in rows] == texts(rows, 0) == ["w-a", "w-b"]
    assert all(len(row.cells) == len(WORKER_COLUMNS) for row in rows)
    assert texts(rows, WORKER_COLUMNS.index("busy")) == ["1/1", "1/1"]


def test_each_request_is_a_row_known_by_its_whole_id() -> None:
    bench = busy_bench()
    found = asked(bench, "requests", list[RequestRow])
    rows = [request_row(row) for row in found]
    assert [row.key for row in rows] == [request.id for request in found]
    assert all(len(row.cells) == len(REQUEST_COLUMNS) and row.key.startswith(row.cells[0].text) for row in rows)
    assert sorted(texts(rows, 1)) == ["dispatched", "dispatched", "waiting", "waiting"]
    assert {row.cells[1].colour for row in rows} == {"green", "yellow"}
    assert sorted(texts(rows, REQUEST_COLUMNS.index("note"))) == ["", "", "0 ahead", "1 ahead"]


def worker(**more: Any) -> WorkerRow:
    return WorkerRow(**{"worker": "w", "state": "ready", "slots": 4, "models": ["tiny"], "host": "h", **more})


def test_what_a_worker_has_to_say_is_in_its_row() -> None:
    row = worker_row(worker(state="loading", percent=40, busy_elsewhere=2, slow="12 of 60 tokens/s", node_class="gpu",
                            note="n", engine_restarts=3))  # fmt: skip
    shown = dict(zip(WORKER_COLUMNS, row.cells, strict=True))
    assert (shown["state"].text, shown["state"].colour) == ("loading 40 %", "yellow")
    assert (shown["busy"].text, shown["busy"].sort_key) == ("0+2/4", 2)
    assert shown["note"].text == "gpu, slow: 12 of 60 tokens/s, n, engine restarted 3 times"


def test_no_text_of_others_gives_orders_or_takes_a_second_line() -> None:
    row = worker_row(worker(worker="w\x1b[2J", host="a\nb", note="\x9b31m [red]x[/red]"))
    assert row.key == "w\x1b[2J"  # by this name it is drained
    assert "\x1b" not in row.cells[0].text
    assert row.cells[WORKER_COLUMNS.index("host")].text == "a b"
    assert row.cells[WORKER_COLUMNS.index("note")].text == "\ufffd31m [red]x[/red]"
    assert one_line("a\tb\r\n c") == "a b\ufffd c"


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [("", ["a", "b", "c"]), ("GPU", ["a", "c"]), ("gpu ready", ["a"]), ("gpu nothing", []), ("  ", ["a", "b", "c"])],
)
def test_a_filter_keeps_rows_that_have_all_its_words(wanted: str, kept: list[str]) -> None:
    workers = [worker(worker="c", note="gpu", state="slow"), worker(worker="b"), worker(worker="a", host="GPU")]
    rows = [worker_row(each) for each in workers]
    assert [row.key for row in arranged(rows, wanted, SortOrder())] == kept


def test_numbers_are_sorted_as_numbers_and_equals_by_name() -> None:
    rows = [worker_row(worker(worker=name, done=count)) for name, count in (("b", 9), ("c", 10), ("a", 9))]
    done = WORKER_COLUMNS.index("done")
    assert [row.key for row in arranged(rows, "", SortOrder(done))] == ["a", "b", "c"]
    assert [row.key for row in arranged(rows, "", SortOrder(done, descending=True))] == ["c", "a", "b"]


def test_the_column_that_sorts_is_marked_and_none_changes_its_width() -> None:
    assert headings(("a", "b"), SortOrder(1)) == ["a ", "b▲"]
    assert headings(("a", "b"), SortOrder(0, descending=True)) == ["a▼", "b "]


# --- curves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "width", "top", "drawn"),
    [
        ([], 3, 0, "   "),
        ([0, 0], 3, 0, " ▁▁"),
        ([0, 4, 8], 3, 0, "▁▅█"),
        ([0, 4, 8], 2, 0, "▅█"),
        ([1, 1000], 2, 0, "▂█"),
        ([2, 4], 2, 8, "▃▅"),
        ([16], 1, 8, "█"),
        ([5], 0, 0, ""),
    ],
)
def test_a_curve_is_bars(values: list[float], width: int, top: float, drawn: str) -> None:
    assert curve(values, width, top) == drawn
    assert set(drawn) <= {*BARS, " "}


def test_gauges_fit_the_width_and_end_in_the_value_of_now() -> None:
    status, curves = asked(busy_bench(), "status", MeshStatus), Curves()
    curves.samples.extend(SampleRow(tokens_per_s=9.5, waiting=2, busy=at % 3) for at in range(1_000))
    for width in (80, 200):
        lines = curves.gauges(status, width)
        assert max(map(len, lines)) == width
        assert [text.rsplit("  ", 1)[1] for text in lines] == [
            "0.0, 0.0 requests/s", "2 waiting, 2 running", "2 of 2 busy",
        ]  # fmt: skip
        assert set(lines[2].rsplit("  ", 1)[0][-9:]) == {"▁", "▅", "█"}
    assert all(bar not in curves.gauges(status, 10)[0] for bar in BARS)
    curves.samples.clear()
    assert all(bar not in curves.gauges(status, 80)[0] for bar in BARS)
    assert summary_line(status).startswith("2 of 2 workers ready")


def test_an_event_has_the_time_at_which_it_happened() -> None:
    event = shown_event(EventRow(number=7, age_ms=1_500, kind="worker\x1blost", text="w\n1"), now_s=100.0)
    assert event == (7, 98.5, "worker\ufffdlost", "w 1")


class TwoBrokers:
    """A client whose broker is replaced by another one while it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.numbers = [1, 2, 3]
        self.meanwhile: Callable[[], None] = lambda: None

    async def status(self) -> MeshStatus:
        self.meanwhile()
        return MeshStatus()

    async def workers(self) -> list[Any]:
        return []

    requests = workers

    async def recent(self, since: int) -> Recent:
        return Recent(samples=[SampleRow(number=number) for number in self._since("recent", since)])

    async def events(self, since: int) -> list[EventRow]:
        return [EventRow(number=number) for number in self._since("events", since)]

    def _since(self, what: str, since: int) -> list[int]:
        self.asked.append((what, since))
        return [number for number in self.numbers if number > since]


def test_each_look_asks_for_what_is_new_and_a_new_broker_for_everything() -> None:
    client = TwoBrokers()
    gatherer = Gatherer(cast("Client", client))

    def look() -> tuple[list[int], list[int]]:
        found = asyncio.run(gatherer.look())
        return [sample.number for sample in found.samples], [event.number for event in found.events]

    assert look() == ([1, 2, 3], [1, 2, 3])
    assert look() == ([], [])
    client.numbers.append(4)
    assert look() == ([4], [4])
    client.numbers = [1, 2, 3, 4, 5]  # of another broker, which answers the query to the first one
    client.meanwhile = gatherer.forget
    assert look() == ([], [])
    client.meanwhile = lambda: None
    assert look() == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert client.asked[-2:] == [("recent", 0), ("events", 0)]


# --- the command ---------------------------------------------------------------------------------------


def test_without_textual_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main.main, ["top"], prog_name="llambo")
    assert done.exit_code == Exit.USAGE
    assert done.stderr == (
        f"llambo: Textual, which llambo top needs, is not installed\n  {extra_command('top')}\n"
    )  # fmt: skip


def test_without_a_terminal_it_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    done = CliRunner().invoke(main.main, ["top"], prog_name="llambo")
    assert done.exit_code == Exit.USAGE
    assert "`llambo status`" in done.stderr


def test_a_line_for_each_host_with_what_is_in_its_memory() -> None:
    def at(state: str, **fields: Any) -> ModelHost:
        return ModelHost(**{"host": "box", "state": state, **fields})

    models = [
        ModelRow(model="a", hosts=[at("ready")]),
        ModelRow(model="b", hosts=[at("loading", percent=41), at("ready", host="other")]),
        ModelRow(model="c", hosts=[at("stored")]),
        ModelRow(model="a@big", hosts=[at("ready")]),
    ]
    hosts = [HostRow(host="box", memory={"ram": MemoryRow(budget=100 * 2**20, used=75 * 2**20)}), HostRow(host="idle")]
    assert host_lines(models, hosts, 80) == [
        "box  █████████░░░  75 MiB of 100 MiB: a, b 41 %",
        "idle  ░░░░░░░░░░░░  0 B of 0 B: no model is loaded",
    ]
    assert [len(line) for line in host_lines(models, hosts, 20)] == [20, 20]
    assert len(host_lines(models, hosts * 5, 80)) == HOSTS
