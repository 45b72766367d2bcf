"""`llambo fleet status` and `logs`: what there is, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.fleet.fleet_site import fleet_options, run, site
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.output import duration, number, show_json, size, table
from llambo.mesh.service import clock
from llambo.mesh.wire.errors import printable

if TYPE_CHECKING:
    from llambo.fleet.run.keeper import Keeper

STATUS_EXAMPLES = """
llambo fleet status
llambo fleet status --json | jq '.classes[] | select(.ready < .min)'
"""
LOGS_EXAMPLES = """
llambo fleet logs tiny-0001
llambo fleet logs tiny-0001 --lines 200
"""
CLASS_COLUMNS = ("class", "there", "ready", "starting", "draining", "min", "max", "busy", "memory")
#: Of what has happened.
SHOWN = 10
NODE_COLUMNS = ("node", "class", "host", "state", "busy", "pid", "up", "note")


@click.command(cls=Command, examples=STATUS_EXAMPLES)
@fleet_options
@json_option
@client_options
@pass_common
def status(common: Common, file: Path, state: Path | None, as_json: bool) -> None:
    """Show how many there are of each class, and each node.

    \b
    starting   it loads its model, or has not reached the broker yet
    ready      it works
    draining   it finishes what it runs; apply ends it or takes it back
    failed     it runs and never got into the mesh; apply ends it
    ended      it has ended by itself; apply begins another one
    """
    here = site(common, file, state)
    keeper = here.keeper(lambda text: None)
    seen = run(keeper.look())
    found = _found(here, keeper, seen)
    if as_json:
        show_json(found)
        return
    if seen.workers is None:
        click.echo(f"the broker at {keeper.address} does not answer: what is known is what runs", err=True)
    table(CLASS_COLUMNS, [_class_row(row) for row in found["classes"]], nothing="")
    click.echo()
    nothing = "nothing runs: `llambo fleet apply` begins it"
    table(NODE_COLUMNS, [_node_row(row) for row in found["nodes"]], nothing=nothing, fixed=2)
    for row in found["updates"]:
        click.echo(printable(f"\n{row['class']}: {row['note']}"))
    for name, why in found["away"].items():
        click.echo(printable(f"{name} is away: {why}"))
    if found["orchestrator"]:
        _show_news(found["orchestrator"])


@click.command(cls=Command, examples=LOGS_EXAMPLES)
@click.argument("node", metavar="NODE")
@click.option("--lines", metavar="NUMBER", type=click.IntRange(1), default=50, show_default=True, help="So many.")
@fleet_options
@client_options
@pass_common
def logs(common: Common, node: str, lines: int, file: Path, state: Path | None) -> None:
    """Show the end of what a node has said, also of one that is gone."""
    here = site(common, file, state)
    text = run(_log_of(here.keeper(lambda text: None), Path(node).name))
    if text is None:
        raise Failure(f"there is no log of {node!r}", "`llambo fleet status` lists the nodes", Exit.ERROR)
    for line in text.splitlines()[-lines:]:
        click.echo(printable(line))


async def _log_of(keeper: Keeper, node: str) -> str | None:
    """Where its provider keeps it: in a file of ours, or in its host's journal."""
    try:
        return keeper.processes.processes.log(node).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        await keeper.processes.refresh()
        known = any(record.name == node for record in keeper.processes.records())
        return await keeper.processes.fetch_words(node) if known else None


def _found(here: Any, keeper: Any, seen: Any) -> dict[str, Any]:
    from llambo.fleet.run.orchestrator import read_news

    book = here.versions().read()
    marks = book.marks(book.note(here.fleet, seen.world))
    nodes = [
        {
            "node": node.name, "class": node.node_class, "host": node.host, "state": node.state.value,
            "busy": node.busy, "slots": node.slots, "pid": keeper.processes.pid(node.name) or 0,
            "begun_ms": node.begun_ms, "current": marks.get(node.node_class) == node.fingerprint, "note": node.note,
        }
        for node in seen.world.nodes
    ]  # fmt: skip
    nodes += [
        {
            "node": record.name, "class": record.node_class, "host": record.host, "state": "ended", "busy": 0,
            "slots": record.slots, "pid": 0, "begun_ms": record.begun_ms, "current": True,
            "note": _last_line(keeper.processes.words(record.name)),
        }
        for record in seen.ended
    ]  # fmt: skip
    return {
        "fleet": here.fleet.name,
        "broker": keeper.address,
        "answers": seen.workers is not None,
        "state": str(here.state),
        "orchestrator": read_news(here.state) if here.orchestrator() else None,
        "updates": _updates(book, marks),
        "classes": [_class(kept, nodes, seen) for kept in here.fleet.kept()],
        "away": seen.away(),
        "nodes": sorted(nodes, key=lambda row: str(row["node"])),
    }


def _updates(book: Any, marks: dict[str, str]) -> list[dict[str, str]]:
    """What is not as the file says, and why."""
    found = []
    for name, mark in marks.items():
        if why := book.stopped(name, mark):
            found.append({"class": name, "note": f"its update has stopped: {why}"})
        elif name in book.classes and book.classes[name].refused:
            found.append({"class": name, "note": "its settings in the file were taken back; the ones before are kept"})
    return found


def _show_news(news: dict[str, Any]) -> None:

    click.echo(f"\nan orchestrator keeps it, pid {news['pid']}")
    for name, why in news["held"].items():
        click.echo(f"{name} should be more by its load, but {why}")
    if news.get("update"):
        click.echo(printable(f"an update is under way, {news['update']}"))
    for text in news["refused"]:
        click.echo(printable(text))
    now_ms = clock.wall_ms()
    for loop in news["loops"]:
        again = duration(max(0, loop["again_ms"] - now_ms))
        text = f"{loop['class']} keeps failing on {loop['host']}: {loop['failures']} times in a row, again in {again}; "
        click.echo(printable(f"{text}{loop['node']} {loop['how']}; its last words:"))
        for line in loop["words"].splitlines():
            click.echo(printable(f"    {line}"))
    for event in news["events"][-SHOWN:]:
        click.echo(printable(f"{duration(max(0, now_ms - event['at_ms'])):>8} ago  {event['text']}"))


def _class(kept: Any, nodes: list[dict[str, Any]], seen: Any) -> dict[str, Any]:
    own = [row for row in nodes if row["class"] == kept.name]
    states = {state: sum(row["state"] == state for row in own) for state in ("ready", "starting", "draining", "ended")}
    return {
        "class": kept.name,
        "there": len(own) - states["ended"],
        **states,
        "min": kept.min,
        "max": kept.max,
        "busy": sum(row["busy"] for row in own),
        "slots": 0 if kept.is_broker else sum(row["slots"] for row in own if row["state"] == "ready"),
        "memory_bytes": sum(node.memory_bytes for node in seen.world.of(kept.name)),
    }


def _class_row(row: dict[str, Any]) -> tuple[Any, ...]:
    told = (row["there"], row["ready"], row["starting"], row["draining"], row["min"], row["max"])
    busy = f"{row['busy']}/{row['slots']}" if row["slots"] else "-"
    return (row["class"], *map(number, told), number(busy), number(size(row["memory_bytes"])))


def _node_row(row: dict[str, Any]) -> tuple[Any, ...]:

    note = row["note"] if row["current"] else ", ".join(filter(None, ["old settings", row["note"]]))
    up = duration(max(0, clock.wall_ms() - row["begun_ms"]))
    busy = f"{row['busy']}/{row['slots']}" if row["slots"] else "-"
    return row["node"], row["class"], row["host"], row["state"], number(busy), number(row["pid"]), up, note


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
