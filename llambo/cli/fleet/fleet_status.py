"""`llambo fleet status` and `logs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from llambo.cli.fleet.site import no_report, pass_site, run
from llambo.cli.kit.command import Command
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.tables import NumberText, Row, duration, number, show_json, size, table
from llambo.mesh.service import clock

if TYPE_CHECKING:
    from llambo.cli.fleet.site import Site
    from llambo.fleet.model import NodeClass
    from llambo.fleet.node_manager import NodeManager, Snapshot
    from llambo.fleet.orchestrator import OrchestratorState
    from llambo.fleet.versions import Versions

STATUS_EXAMPLES = """
llambo fleet status
llambo fleet status --json | jq '.classes[] | select(.ready < .min)'
"""
LOGS_EXAMPLES = """
llambo fleet logs tiny-0001
llambo fleet logs tiny-0001 --lines 200
"""
CLASS_COLUMNS = ("class", "wanted", "there", "ready", "starting", "draining", "min", "max", "busy", "memory")
#: How many events are shown.
SHOWN = 10
NODE_COLUMNS = ("node", "class", "host", "state", "busy", "pid", "up", "note")


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """A node, as `--json` prints it."""

    node: str
    node_class: str = msgspec.field(name="class")
    host: str
    #: A state of the world, or `ended`.
    state: str
    busy: int = 0
    slots: int
    pid: int = 0
    begun_ms: int
    #: Its settings are those in force.
    current: bool = True
    note: str


class ClassRow(msgspec.Struct, frozen=True, kw_only=True):
    node_class: str = msgspec.field(name="class")
    wanted: int = 0
    there: int
    ready: int
    starting: int
    draining: int
    ended: int
    min: int
    max: int
    busy: int
    slots: int
    memory_bytes: int


class UpdateRow(msgspec.Struct, frozen=True):
    node_class: str = msgspec.field(name="class")
    note: str


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    fleet: str
    broker: str
    #: The broker answers.
    answers: bool
    state: str
    orchestrator: OrchestratorState | None
    updates: list[UpdateRow]
    classes: list[ClassRow]
    away: dict[str, str]
    nodes: list[NodeRow]


@click.command(cls=Command, examples=STATUS_EXAMPLES)
@pass_site()
def status(here: Site, as_json: bool) -> None:
    """Show how many there are of each class, and each node.

    \b
    starting   it loads its model, or has not reached the broker yet
    ready      it works
    draining   it finishes its requests; apply ends or resumes it
    failed     it runs and has never joined the mesh; apply ends it
    ended      it has ended by itself; apply starts another one
    """
    manager = here.node_manager(no_report)
    snapshot = run(manager.look())
    found = _found(here, manager, snapshot)
    if as_json:
        show_json(msgspec.to_builtins(found))
        return
    if snapshot.workers is None:
        click.echo(f"the broker at {manager.address} does not answer: only the processes are shown", err=True)
    table(CLASS_COLUMNS, [_class_cells(row) for row in found.classes])
    click.echo()
    nothing = "nothing runs: `llambo fleet apply` starts it"
    table(NODE_COLUMNS, [_node_cells(row) for row in found.nodes], nothing=nothing, fixed=2)
    for row in found.updates:
        click.echo(f"\n{row.node_class}: {row.note}")
    for name, why in found.away.items():
        click.echo(f"{name} is away: {why}")
    if found.orchestrator is not None:
        _show_orchestrator(found.orchestrator)


@click.command(cls=Command, examples=LOGS_EXAMPLES)
@click.argument("node", metavar="NODE")
@click.option("--lines", metavar="NUMBER", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@pass_site(with_json=False)
def logs(here: Site, node: str, lines: int) -> None:
    """Show the end of the log of a node, also of one that has ended."""
    text = run(_log_of(here.node_manager(no_report), Path(node).name))
    if text is None:
        raise Failure(f"there is no log of {node!r}", "`llambo fleet status` lists the nodes", Exit.ERROR)
    for line in text.splitlines()[-lines:]:
        click.echo(line)


async def _log_of(manager: NodeManager, node: str) -> str | None:
    """From a file on this machine, or from the journal of its host."""
    try:
        return manager.providers.processes.log(node).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        await manager.providers.refresh()
        known = any(record.name == node for record in manager.providers.records())
        return await manager.providers.fetch_log_tail(node) if known else None


def _found(here: Site, manager: NodeManager, snapshot: Snapshot) -> FleetStatus:
    from llambo.fleet.orchestrator import read_state

    versions = here.versions().read()
    fingerprints = versions.fingerprints(versions.note(here.fleet, snapshot.world))
    nodes = [
        NodeRow(
            node=node.name, node_class=node.node_class, host=node.host, state=node.state.value, busy=node.busy,
            slots=node.slots, pid=manager.providers.pid(node.name) or 0, begun_ms=node.begun_ms,
            current=fingerprints.get(node.node_class) == node.fingerprint, note=node.note,
        )
        for node in snapshot.world.nodes
    ]  # fmt: skip
    nodes += [
        NodeRow(
            node=record.name, node_class=record.node_class, host=record.host, state="ended", slots=record.slots,
            begun_ms=record.begun_ms, note=_log_ends(manager.providers.log_tail(record.name)),
        )
        for record in snapshot.ended
    ]  # fmt: skip
    return FleetStatus(
        fleet=here.fleet.name,
        broker=manager.address,
        answers=snapshot.workers is not None,
        state=str(here.state),
        orchestrator=read_state(here.state) if here.orchestrator() else None,
        updates=list(_updates(versions, fingerprints)),
        classes=[_class(spec, here.counts(), nodes, snapshot) for spec in here.fleet.all_classes()],
        away=snapshot.away(),
        nodes=sorted(nodes, key=lambda row: row.node),
    )


def _updates(versions: Versions, fingerprints: dict[str, str]) -> Iterator[UpdateRow]:
    """Classes whose workers do not have the settings of the file, and why."""
    for name, fingerprint in fingerprints.items():
        if why := versions.stopped(name, fingerprint):
            yield UpdateRow(name, f"its update has stopped: {why}")
        elif name in versions.classes and versions.classes[name].refused:
            yield UpdateRow(name, "its settings in the file were rolled back; those before are in force")


def _show_orchestrator(state: OrchestratorState) -> None:
    now_ms = clock.wall_ms()
    lines = [f"an orchestrator runs, pid {state.pid}"]
    lines += [f"{name} needs more workers for its load, but {why}" for name, why in state.held.items()]
    lines += [f"an update is under way, {state.update}"] if state.update else []
    lines += state.refused
    for loop in state.loops:
        often = f"{loop.failures} times in a row, again in {duration(max(0, loop.again_ms - now_ms))}"
        lines.append(
            f"{loop.node_class} keeps failing on {loop.host}: {often}; {loop.node} {loop.how}; the end of its log:"
        )
        lines += [f"    {line}" for line in loop.log_tail.splitlines()]
    for event in state.events[-SHOWN:]:
        lines.append(f"{duration(max(0, now_ms - event.at_ms)):>8} ago  {event.text}")
    click.echo()
    for line in lines:
        click.echo(line)


def _class(spec: NodeClass, counts: dict[str, int], nodes: list[NodeRow], snapshot: Snapshot) -> ClassRow:
    own = [row for row in nodes if row.node_class == spec.name]
    states = Counter(row.state for row in own)
    there = len(own) - states["ended"]
    return ClassRow(
        node_class=spec.name,
        # Without a count of its own, `apply` keeps those that are there, within the bounds.
        wanted=counts.get(spec.name, max(spec.min, min(there, spec.max))),
        there=there,
        ready=states["ready"],
        starting=states["starting"],
        draining=states["draining"],
        ended=states["ended"],
        min=spec.min,
        max=spec.max,
        busy=sum(row.busy for row in own),
        slots=0 if spec.is_broker else sum(row.slots for row in own if row.state == "ready"),
        memory_bytes=sum(node.memory_bytes for node in snapshot.world.of(spec.name)),
    )


def _class_cells(row: ClassRow) -> Row:
    counts = (row.wanted, row.there, row.ready, row.starting, row.draining, row.min, row.max)
    return (row.node_class, *map(number, counts), _busy(row), number(size(row.memory_bytes)))


def _node_cells(row: NodeRow) -> Row:
    note = row.note if row.current else ", ".join(filter(None, ["old settings", row.note]))
    up = duration(max(0, clock.wall_ms() - row.begun_ms))
    return row.node, row.node_class, row.host, row.state, _busy(row), number(row.pid), up, note


def _busy(row: ClassRow | NodeRow) -> NumberText:
    return number(f"{row.busy}/{row.slots}" if row.slots else "-")


def _log_ends(text: str) -> str:
    """How a process ended that another one had started is not known; its last words may say it, or something else."""
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return f"its log ends: {last}" if last else "its log is empty: it was probably killed"
