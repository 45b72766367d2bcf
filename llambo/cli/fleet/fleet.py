"""`llambo fleet`: as many workers as fleet.toml says. Here are the commands that change a fleet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from llambo.cli.fleet.site import FILE_OPTION, no_report, pass_site, report, run
from llambo.cli.kit.command import Command, Group
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.tables import show_json

if TYPE_CHECKING:
    from llambo.cli.fleet.site import Site
    from llambo.fleet.decide.plan import Plan, PlanStep
    from llambo.fleet.model import NodeFailed
    from llambo.fleet.updates import Outcome
    from llambo.mesh.wire.reports import DrainReply

EXAMPLES = """
llambo fleet init                        a fleet.toml to start from
llambo fleet plan                        what apply would do, and why
llambo fleet apply                       make it so
llambo fleet status
llambo fleet scale tiny=10 medium=0
"""
INIT_EXAMPLES = """
llambo fleet init
llambo fleet init --file home.toml
"""
#: What `init` writes: it works as it is, on a machine with SmolLM2.
TEMPLATE = """\
# The workers that `llambo fleet apply` runs. docs/fleets.md has every key.

[fleet]
name = "fleet"

[hosts.here]                  # this machine; others: provider = "systemd", address = "root@box"

[broker]                      # without this table the broker is not managed

[classes.small]
model = "smollm2"             # or a GGUF file
slots = 4                     # requests at a time, of one worker
memory = "800MiB"             # of one worker
cores = 0.5                   # so that workers may share cores
min = 1
max = 2
"""
PLAN_EXAMPLES = """
llambo fleet plan
llambo fleet plan --file home.toml --json | jq -r '.steps[].name'
"""
APPLY_EXAMPLES = """
llambo fleet apply
llambo fleet apply --file home.toml
"""
SCALE_EXAMPLES = """
llambo fleet scale tiny=10
llambo fleet scale tiny=0 medium=2
"""
SPAWN_EXAMPLES = """
llambo fleet spawn tiny
llambo fleet spawn tiny --count 100
"""
DOWN_EXAMPLES = """
llambo fleet down
"""
RESTART_EXAMPLES = """
llambo fleet rolling-restart
llambo fleet rolling-restart --class tiny --max-unavailable 2
"""
ROLLBACK_EXAMPLES = """
llambo fleet rollback
llambo fleet rollback --class tiny
llambo fleet rollback --class tiny --undo    try the file's settings again
"""
DRAIN_EXAMPLES = """
llambo fleet drain tiny-0001
llambo fleet drain tiny-0001 --undo
"""
RUN_EXAMPLES = """
llambo fleet run
llambo fleet run --file home.toml
"""


@click.group(
    cls=Group,
    lazy={name: f"llambo.cli.fleet.fleet:{name}" for name in ("init", "plan", "apply")}
    | {name: f"llambo.cli.fleet.fleet_status:{name}" for name in ("status", "logs")}
    | {name: f"llambo.cli.fleet.fleet:{name}" for name in ("scale", "spawn")}
    | {"rolling-restart": "llambo.cli.fleet.fleet:rolling_restart"}
    | {name: f"llambo.cli.fleet.fleet:{name}" for name in ("rollback", "drain")}
    | {"run": "llambo.cli.fleet.fleet:run_orchestrator", "down": "llambo.cli.fleet.fleet:down"},
    examples=EXAMPLES,
)
def fleet() -> None:
    """Run as many workers as fleet.toml says, here and on other hosts."""


@click.command(cls=Command, examples=INIT_EXAMPLES)
@FILE_OPTION
def init(file: Path) -> None:
    """Write a fleet.toml to start from: a broker and a worker with SmolLM2 on this machine."""
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(TEMPLATE)
    except FileExistsError as error:
        raise Failure(f"{file} exists already", "`llambo fleet plan` shows what it asks for", Exit.USAGE) from error
    except OSError as error:
        raise Failure(f"{file} cannot be written: {error.strerror}") from error
    report(f"{file} is written: edit it, then `llambo fleet plan` and `llambo fleet apply`")


@click.command(cls=Command, examples=PLAN_EXAMPLES)
@pass_site()
def plan(here: Site, as_json: bool) -> None:
    """Show the difference between the file and what runs: what `apply` would do, and why.

    The exit status is 0 also if there is something to do.
    """
    found, away = run(_plan(here))
    if as_json:
        show_json(_as_json(found) | {"away": away})
        return
    _show(found)
    for name, why in away.items():
        click.echo(f"{name} is away: {why}")


@click.command(cls=Command, examples=APPLY_EXAMPLES)
@pass_site()
def apply(here: Site, as_json: bool) -> None:
    """Carry out the plan. What runs already is left as it is; a second `apply` does nothing.

    Workers that have to end are drained first, and their requests move to others. Those with old settings are
    replaced one after the other; the first bad one stops that, and `rollback` takes it back. A Ctrl-C leaves what is
    done as it is; the next `apply` goes on.
    """
    make_it_so(here, as_json)


@click.command(cls=Command, examples=SCALE_EXAMPLES)
@click.argument("counts", metavar="CLASS=COUNT...", nargs=-1, required=True)
@pass_site()
def scale(here: Site, counts: tuple[str, ...], as_json: bool) -> None:
    """Set the number of workers of a class, within its `min` and `max`. A later `apply` does not change it."""
    wanted = dict(_count(word) for word in counts)
    if pid := here.orchestrator():
        here.ask_for(wanted)
        _say_passed_on(pid)
        return
    make_it_so(here, as_json, lambda: wanted)


@click.command(cls=Command, examples=SPAWN_EXAMPLES)
@click.option("--count", metavar="NUMBER", type=click.IntRange(1), default=1, show_default=True, help="How many more.")
@click.argument("named", required=False, metavar="[CLASS]")
@click.option("--class", "node_class", metavar="CLASS", help="The same as CLASS.")
@pass_site()
def spawn(here: Site, count: int, named: str | None, node_class: str | None, as_json: bool) -> None:
    """Start more workers of CLASS than there are."""
    if bool(named) == bool(node_class):
        raise click.UsageError(f"name one class; there is: {', '.join(here.fleet.classes)}")
    node_class = named or node_class or ""
    here.node_class(node_class)

    def wanted() -> dict[str, int]:
        nodes = run(here.node_manager(report).look()).world.of(node_class)
        return {node_class: sum(node.counts for node in nodes) + count}

    make_it_so(here, as_json, wanted)


@click.command("rolling-restart", cls=Command, examples=RESTART_EXAMPLES)
@click.option("--class", "node_class", metavar="CLASS", help="Only this one.  [default: all]")
@click.option(
    "--max-unavailable", metavar="NUMBER", type=click.IntRange(1), help="At a time.  [default: as the file says]"
)
@pass_site()
def rolling_restart(here: Site, node_class: str | None, max_unavailable: int | None, as_json: bool) -> None:
    """Restart all workers, a few at a time, one class after the other.

    Their requests move to other workers. The next worker is restarted when the one before it works and has answered;
    the first bad one stops it. After a Ctrl-C the next `apply` goes on.
    """
    with here.versions().changing() as versions:
        for name in _classes(here, node_class):
            versions.restart(name, max_unavailable or 0)
    _apply_or_pass_on(here, as_json)


@click.command(cls=Command, examples=ROLLBACK_EXAMPLES)
@click.option("--class", "node_class", metavar="CLASS", help="Only this one.  [default: all]")
@click.option("--undo", is_flag=True, help="Use the settings of the file again.")
@pass_site()
def rollback(here: Site, node_class: str | None, undo: bool, as_json: bool) -> None:
    """Go back to the settings that were in force before the last update.

    The file stays as it is; its settings for the class are not used until they change.
    """
    names = _classes(here, node_class)
    with here.versions().changing() as versions:
        if undo:
            for name in names:
                versions.of(name).refused = ""
        elif not [name for name in names if versions.roll_back(name)]:
            raise Failure("there is nothing to go back to", "no update has changed these settings", Exit.ERROR)
    _apply_or_pass_on(here, as_json)


@click.command(cls=Command, examples=DRAIN_EXAMPLES)
@click.argument("node", metavar="NODE")
@click.option("--undo", is_flag=True, help="Let it work again.")
@pass_site()
def drain(here: Site, node: str, undo: bool, as_json: bool) -> None:
    """Give a node no new work; its running requests move to others. It keeps running until the next `apply`.

    `llambo drain` waits until it runs nothing. Of a node with several models it holds for those that are loaded: others
    are still loaded there when they are asked for. To take such a node away, lower `max` of its class and `apply`.
    """
    found, workers = run(_drain(here, node, undo))
    if not workers and found.draining:
        hint = "it loads one when that is asked for; to take the node away: a lower `max`, and `llambo fleet apply`"
        raise Failure(f"{node} has no model loaded, so it has no worker to drain", hint)
    if as_json:
        show_json(msgspec.structs.asdict(found))
    elif found.draining and workers != [node]:
        report(f"{', '.join(workers)}: no new work; {node} still loads other models when they are asked for")
    else:
        report(f"{node} takes no new work" if found.draining else f"{node} works again")


@click.command("run", cls=Command, examples=RUN_EXAMPLES)
@pass_site(with_json=False)
def run_orchestrator(here: Site) -> None:
    """Keep the fleet as the file says, and scale it with its load, until Ctrl-C.

    Workers that die are started again; a class that keeps failing is tried less and less often. The workers outlive
    this process, and the next one takes them over.
    """
    with here.lock():
        asyncio.run(_orchestrate(here))


@click.command(cls=Command, examples=DOWN_EXAMPLES)
@pass_site()
def down(here: Site, as_json: bool) -> None:
    """End everything of this fleet: first the workers, then the broker. Their running requests are lost."""
    from llambo.fleet.decide.plan import Plan, PlanStep, StepKind
    from llambo.fleet.updates import apply as carry_out

    with here.lock():
        manager = here.node_manager(no_report if as_json else report)
        snapshot = run(manager.look())
        nodes = sorted(snapshot.world.nodes, key=lambda node: node.node_class == "broker")
        steps = [PlanStep(StepKind.RETIRE, node.name, node.node_class, node.host, "all of it ends") for node in nodes]
        run(manager.forget_ended(snapshot.ended))
        run(carry_out(manager, Plan(tuple(steps)), snapshot.world, here.versions()))
    if as_json:
        show_json({"ended": [step.name for step in steps]})
    else:
        report(f"{len(steps)} ended" if steps else "nothing ran")


# --- inside --------------------------------------------------------------------------------------------


async def _plan(here: Site) -> tuple[Plan, dict[str, str]]:
    from llambo.fleet.decide import plan as planning

    manager = here.node_manager(report)
    snapshot = await manager.look()
    wanted = here.wanted(manager, snapshot.world, write=False)
    return planning.make(manager.fleet, snapshot.world, wanted), snapshot.away()


def make_it_so(here: Site, as_json: bool, counts: Callable[[], dict[str, int]] = dict) -> None:
    from llambo.fleet.decide import plan as planning
    from llambo.fleet.updates import apply

    began = time.monotonic()
    with here.lock():
        manager = here.node_manager(no_report if as_json else report)
        if asked := counts():
            here.ask_for(asked)

        async def work() -> tuple[Plan, dict[str, str], list[NodeFailed], Outcome]:
            snapshot = await manager.look()
            for name, why in snapshot.away().items():
                manager.report(f"{name} is away: {why}")
            wanted = here.wanted(manager, snapshot.world, write=True)
            found = planning.make(manager.fleet, snapshot.world, wanted)
            ended = await manager.forget_ended(snapshot.ended)
            return found, snapshot.away(), ended, await apply(manager, found, snapshot.world, here.versions())

        found, away, ended, outcome = run(work())
    if as_json:
        result = _as_json(found) | {"done": len(outcome.done), "stopped": outcome.stopped, "away": away}
        lists = {"failed": outcome.failed, "ended": ended}
        show_json(result | {name: [_failure(one) for one in nodes] for name, nodes in lists.items()})
    else:
        for one in ended:
            report(f"{one} by itself before this; the end of its log:{_log(one)}")
        for one in outcome.failed:
            report(f"{one}; the end of its log:{_log(one)}")
        for text in outcome.stopped:
            report(f"the update has stopped, {text}")
        for refusal in found.refusals:
            report(f"{refusal.count} of {refusal.node_class} cannot be: {refusal.why}")
        took = time.monotonic() - began
        report(f"{_summary(outcome.done) or 'nothing done'} in {took:.1f} s" if found else "nothing to do")
        if here.fleet.classes and not outcome.failed:
            report(f"the mesh is at {manager.address}; try: llambo{here.broker_flag(manager.address)} send hello")
    if outcome.failed or outcome.stopped or found.refusals:
        click.get_current_context().exit(Exit.ERROR)


def _apply_or_pass_on(here: Site, as_json: bool) -> None:
    """An orchestrator that runs finds the change in the folder of state."""
    if pid := here.orchestrator():
        _say_passed_on(pid)
        return
    make_it_so(here, as_json)


def _say_passed_on(pid: int) -> None:
    report(f"passed on to the orchestrator, pid {pid}: `llambo fleet status` shows the progress")


async def _drain(here: Site, node: str, undo: bool) -> tuple[DrainReply, list[str]]:
    manager = here.node_manager(report)
    await manager.providers.refresh()
    found = next((record for record in manager.providers.records() if record.name == node), None)
    if found is None or found.node_class == "broker":
        raise Failure(f"there is no worker {node!r} in this fleet", "`llambo fleet status` lists them", Exit.ERROR)
    return await manager.drain(node, undo=undo)


async def _orchestrate(here: Site) -> None:
    from llambo.cli.kit.follow import end_signals
    from llambo.fleet.orchestrator import Orchestrator

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in end_signals():
        loop.add_signal_handler(number, stop.set)
    async with here.node_manager(report) as manager:
        orchestrator = Orchestrator(here, manager, here.state, report)
        report(f"runs {here.fleet.name}, as in {here.file}")
        await orchestrator.run(stop)
    these = "the broker and the workers" if here.fleet.broker is not None else "the workers"
    report(f"stopped; {these} keep running: `llambo fleet down{here.flags}` ends them")


def _classes(here: Site, one: str | None) -> list[str]:
    return [here.node_class(one).name] if one else list(here.fleet.classes)


def _show(found: Plan) -> None:
    widths = [max((len(text) for text in texts), default=0) for texts in zip(*_rows(found), strict=True)]
    for row in _rows(found):
        click.echo("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    for refusal in found.refusals:
        click.echo(f"{refusal.count} of {refusal.node_class} cannot be: {refusal.why}")
    if not found.steps:
        click.echo("nothing to do")


def _rows(found: Plan) -> list[tuple[str, str, str, str]]:
    return [(step.kind.value, step.name, step.host, step.why) for step in found.steps]


def _as_json(found: Plan) -> dict[str, object]:
    return {
        "steps": [
            {"do": step.kind.value, "name": step.name, "class": step.node_class, "host": step.host, "why": step.why}
            for step in found.steps
        ],
        "refused": [{"class": one.node_class, "count": one.count, "why": one.why} for one in found.refusals],
    }


def _failure(one: NodeFailed) -> dict[str, str]:
    return {"name": one.name, "how": one.how, "words": one.log_tail}


def _log(one: NodeFailed) -> str:
    from llambo.fleet.decide.crashes_core import log_tail

    return "".join(f"\n    {line}" for line in log_tail(one.log_tail).splitlines()) or " it is empty"


def _summary(done: list[PlanStep]) -> str:
    verbs = {"spawn": "spawned", "resume": "resumed", "retire": "retired", "replace": "replaced"}
    counts = {kind: sum(step.kind.value == kind for step in done) for kind in verbs}
    return ", ".join(f"{count} {verbs[kind]}" for kind, count in counts.items() if count)


def _count(word: str) -> tuple[str, int]:
    name, equals, count = word.partition("=")
    if not equals or not count.isdecimal():
        raise Failure(f"{word!r} is not CLASS=COUNT", "as in `llambo fleet scale tiny=10`", Exit.USAGE)
    return name, int(count)
