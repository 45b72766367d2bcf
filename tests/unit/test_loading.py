"""`llambo models`, `load` and `unload`, and what a request waits for: how they show what a broker reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import pytest

from llambo.cli.commands import loading, models
from llambo.cli.kit.answer_views import JsonView, StdoutWriter, TextView
from llambo.cli.kit.progress import Progress
from llambo.mesh.client import model_loading
from llambo.mesh.client.answer_stream import Stream
from llambo.mesh.wire.errors import Code, LlamboError
from llambo.mesh.wire.reports import HoldReply, HostRow, MemoryRow, ModelHost, ModelRow, waiting

MIB = 2**20


def at(state: str, **fields: Any) -> ModelHost:
    return ModelHost(**{"host": "box", "state": state, "bytes": 40 * MIB, "needs": {"ram": 40 * MIB}, **fields})


ROWS = [
    ModelRow(model="a", workers=1, slots=4, hosts=[at("ready", idle_ms=3_000, holders=["ann"], held=2, pinned=True)]),
    ModelRow(
        model="b", workers=1, loading=1, waiting=2, note="loading b on box, 41 %", hosts=[at("loading", percent=41)]
    ),
    ModelRow(
        model="c", waiting=1, note="for memory on box: what is loaded there is in use or held", hosts=[at("stored")]
    ),
    ModelRow(model="d", hosts=[at("failed", note="out of memory", retry_ms=5_000), at("stored", host="box2")]),
    ModelRow(model="d@big", hosts=[at("stored", host="box2")]),
    ModelRow(model="d+pirate", hosts=[at("stored", host="box2")]),
    ModelRow(model="e", workers=2, slots=8),
]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("for memory on box", "waiting for memory on box"),
        ("until a is unloaded on box for c", "waiting until a is unloaded on box for c"),
        ("a worker that serves x", "waiting for a worker that serves x"),
        ("loading b on box, 41 %", "loading b on box, 41 %"),
        ("box is about to load a", "box is about to load a"),
    ],
)
def test_what_a_request_waits_for_is_a_sentence(what: str, text: str) -> None:
    assert waiting(what) == text


def test_a_model_has_the_best_of_its_states() -> None:
    assert [row.state for row in ROWS] == ["ready", "loading", "stored", "stored", "stored", "stored", "ready"]
    assert ModelRow(model="x", hosts=[at("failed")]).state == "failed"
    assert ModelRow(model="x").state == "lost"


def test_models_at_hosts_are_listed_with_why_and_who(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"CUDA0": MemoryRow(budget=200 * MIB, used=0), "ram": MemoryRow(budget=100 * MIB, used=80 * MIB)}
    models.show_models(ROWS)
    models.show_hosts(ROWS, [HostRow(host="box", memory=memory, models=4, loaded=["a"])])
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[:4] == [
        "SERVED KIND WORKERS SLOTS WAITING STATE",
        "a - 1 4 0 ready",
        "b - 1 0 2 loading, 41 % on box",
        "c - 0 0 1 stored; waiting for memory on box: what is loaded there is in use or held",
    ]
    table = shown[shown.index("") + 1 :]
    assert table == [
        "MODEL HOST STATE SIZE LOADS USED HELD BY",
        "a box ready 40 MiB 0 3.0 s ago pinned, ann, 1 more",
        "b box loading 41 % 40 MiB 0 - -",
        "c box stored 40 MiB 0 - -",
        "d box failed 40 MiB 0 - -",
        "d box2 stored 40 MiB 0 - -",
        "",
        "d on box: out of memory; next try in 5.0 s",
        "box: 80 MiB of 100 MiB, 0 B of 200 MiB of CUDA0 in use, 1 of 4 models loaded",
    ]


def test_without_hosts_the_list_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    models.show_models(ROWS[-1:])
    models.show_hosts(ROWS[-1:], [])
    assert capsys.readouterr().out.split() == ["SERVED", "KIND", "WORKERS", "SLOTS", "WAITING", "e", "-", "2", "8", "0"]


# --- load and unload -----------------------------------------------------------------------------------


class PlayedMesh:
    """Not a mesh: it plays a client of one, whose rows of the model come one after another."""

    def __init__(self, rows: Sequence[ModelRow]) -> None:
        self._rows = list(rows)
        self.orders: list[tuple[str, str, str]] = []

    async def models(self) -> list[ModelRow]:
        return [self._rows.pop(0) if len(self._rows) > 1 else self._rows[0]]

    async def hold_model(self, model: str, *, host: str = "", **_: Any) -> HoldReply:
        self.orders.append(("hold", model, host))
        return HoldReply(model=model, host=host, state="stored", holder="ann")

    async def release_model(self, model: str, *, host: str = "", holder: str = "") -> HoldReply:
        self.orders.append(("release", model, holder))
        return HoldReply(model=model, host=host, state="ready", holder=holder)


def until_ready(mesh: PlayedMesh) -> HoldReply:
    return asyncio.run(model_loading.load_model(mesh, "a", show=Progress().show))  # type: ignore[arg-type]


def states(monkeypatch: pytest.MonkeyPatch, *hosts: ModelHost) -> PlayedMesh:
    for module in (loading, model_loading):
        monkeypatch.setattr(module, "ASK_S", 0.0)
    return PlayedMesh([ModelRow(model="a", hosts=[host]) for host in hosts])


def test_load_says_how_far_it_is_and_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a model that failed long ago, and is loaded now
    mesh = states(monkeypatch, at("failed", note="old"), at("loading", percent=41), at("ready", holders=["ann"]))
    found = until_ready(mesh)
    assert (found.state, found.host, mesh.orders) == ("ready", "box", [("hold", "a", "")])
    assert capsys.readouterr().err.splitlines()[0] == "waiting until a is loaded"


def test_load_says_why_not_and_gives_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = states(monkeypatch, at("loading"), at("failed", note="the file is damaged", retry_ms=5_000))
    with pytest.raises(LlamboError) as raised:
        until_ready(mesh)
    assert raised.value.code is Code.ENGINE_FAILED
    assert raised.value.text == "'a' could not be loaded on box: the file is damaged"
    assert raised.value.retry_after_ms == 5_000
    assert mesh.orders[1:] == [("release", "a", "ann")]


def test_unload_waits_until_the_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = states(monkeypatch, at("ready"), at("unloading"), at("stored"), at("ready"))
    given = HoldReply(model="a", state="ready")
    found = asyncio.run(loading._until_unloaded(mesh, given, {"box"}, Progress(hidden=True)))  # type: ignore[arg-type]
    assert found.state == "stored"
    assert len(mesh._rows) == 1  # what came after it was not waited for


# --- what a request waits for --------------------------------------------------------------------------


def test_a_stream_shows_its_note_in_place_of_its_place() -> None:
    read, write = os.pipe()
    stream = Stream(b"i" * 16, lambda event: None, mine=True)

    async def run() -> None:
        with contextlib.closing(StdoutWriter(write)) as out:
            view = JsonView(out, stream)
            stream.on_place = view.placed
            stream._set_place(2, "b", fake=False)
            stream._set_note("loading b on box, 41 %")
            stream._set_note("")
            await out.flush()

    asyncio.run(run())
    lines = [json.loads(line) for line in os.read(read, 65_536).splitlines()]
    assert [line.get("note") for line in lines] == [None, "loading b on box, 41 %", None]
    assert [line["type"] for line in lines] == ["accepted", "waiting", "waiting"]


def test_in_a_pipe_not_every_percent_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Stream(b"i" * 16, lambda event: None, mine=True)

    async def run() -> None:
        with contextlib.closing(StdoutWriter(1)) as out:
            view = TextView(out, stream)
            for note in (
                "loading b on box, 4 %, about 9 s",
                "loading b on box, 41 %, about 5 s",
                "loading c on box, 1 %",
            ):
                view.stalled(note, 3.0)

    asyncio.run(run())
    assert capsys.readouterr().err.splitlines() == [
        "llambo: loading b on box, 4 %, about 9 s",
        "llambo: loading c on box, 1 %",
    ]
