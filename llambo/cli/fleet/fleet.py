"""`llambo fleet`: keeps as many workers as fleet.toml says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.fleet.fleet_site import fleet_options, run, site
from llambo.cli.kit.command import Command, Group
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.flags import client_options, json_option
from llambo.cli.kit.output import show_json
from llambo.cli.kit.standard import tell
from llambo.mesh.wire.errors import printable

if TYPE_CHECKING:
    from llambo.cli.fleet.fleet_site import Site
    from llambo.fleet.decide.plan import Plan, Step
    from llambo.fleet.providers.process import Failed
    from llambo.fleet.run.applying import Outcome
    from llambo.fleet.run.keeper import Keeper

EXAMPLES = """
llambo fleet plan                        what apply would do, and why
llambo fleet apply                       make it so
llambo fleet status
llambo fleet scale tiny=10 medium=0
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
llambo fleet spawn --count 100 --class tiny
"""
DOWN_EXAMPLES = """
llambo fleet down
"""


@click.group(
    cls=Group,
    lazy={name: f"llambo.cli.fleet.fleet:{name}" for name in ("plan", "apply")}
    | {name: f"llambo.cli.fleet.fleet_look:{name}" for name in ("status", "logs")}
    | {name: f"llambo.cli.fleet.fleet:{name}" for name in ("scale", "spawn")}
    | {
        name: f"llambo.cli.fleet.fleet_roll:{name.replace('-', '_')}"
        for name in ("rolling-restart", "rollback", "drain")
    }
    | {"run": "llambo.cli.fleet.fleet_run:run_fleet", "down": "llambo.cli.fleet.fleet:down"},
    examples=EXAMPLES,
)
def fleet() -> None:
    """Keep as many workers as fleet.toml says, here and on other hosts."""


@click.command(cls=Command, examples=PLAN_EXAMPLES)
@fleet_options
@json_option
@client_options
@pass_common
def plan(common: Common, file: Path, state: Path | None, as_json: bool) -> None:
    """Show the difference between the file and what runs: what `apply` would do, and why.

    The exit status is 0 also if there is something to do.
    """
    here = site(common, file, state)
    found, away = run(_plan(here, here.keeper(_say)))
    if as_json:
        show_json(_as_json(found) | {"away": away})
        return
    _show(found)
    for name, why in away.items():
        click.echo(printable(f"{name} is away: {why}"))


@click.command(cls=Command, examples=APPLY_EXAMPLES)
@fleet_options
@json_option
@client_options
@pass_common
def apply(common: Common, file: Path, state: Path | None, as_json: bool) -> None:
    """Make it so. What runs already is left as it is; a second `apply` does nothing.

    Workers that have to go are drained first, and what they run goes elsewhere. Those with other settings are replaced
    one after the other; the first bad one ends that, and `rollback` takes it back. A Ctrl-C leaves what is done as it
    is; the next `apply` goes on.
    """
    here = site(common, file, state)
    make_it_so(here, as_json)


@click.command(cls=Command, examples=SCALE_EXAMPLES)
@click.argument("counts", metavar="CLASS=COUNT...", nargs=-1, required=True)
@fleet_options
@json_option
@client_options
@pass_common
def scale(common: Common, counts: tuple[str, ...], file: Path, state: Path | None, as_json: bool) -> None:
    """Have so many of a class, within its `min` and `max`. `apply` keeps to it from then on."""
    here = site(common, file, state)
    wanted = dict(_count(word) for word in counts)
    if pid := here.orchestrator():
        here.want(wanted)
        _say(f"told to the orchestrator, pid {pid}: `llambo fleet status` shows how far it is")
        return
    make_it_so(here, as_json, lambda: wanted)


@click.command(cls=Command, examples=SPAWN_EXAMPLES)
@click.option("--count", metavar="NUMBER", type=click.IntRange(1), default=1, show_default=True, help="So many more.")
@click.option("--class", "node_class", metavar="CLASS", required=True, help="Of which class.")
@fleet_options
@json_option
@client_options
@pass_common
def spawn(
    common: Common, count: int, node_class: str, file: Path, state: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Have so many more of a class than there are."""
    here = site(common, file, state)
    here.node_class(node_class)

    def wanted() -> dict[str, int]:
        there = run(here.keeper(_say).look()).world.of(node_class)
        return {node_class: sum(node.counts for node in there) + count}

    make_it_so(here, as_json, wanted)


@click.command(cls=Command, examples=DOWN_EXAMPLES)
@fleet_options
@json_option
@client_options
@pass_common
def down(common: Common, file: Path, state: Path | None, as_json: bool) -> None:
    """End everything of this fleet: first the workers, then the broker. What they run is lost."""
    from llambo.fleet.decide.plan import Do, Plan, Step
    from llambo.fleet.run.applying import apply as carry_out

    here = site(common, file, state)
    with here.alone():
        keeper = here.keeper(_quiet if as_json else _say)
        seen = run(keeper.look())
        nodes = sorted(seen.world.nodes, key=lambda node: node.node_class == "broker")
        steps = [Step(Do.RETIRE, node.name, node.node_class, node.host, "all of it ends") for node in nodes]
        run(keeper.bury(seen.ended))
        run(carry_out(keeper, Plan(tuple(steps)), seen.world, here.versions()))
    if as_json:
        show_json({"ended": [step.name for step in steps]})
    else:
        _say(f"{len(steps)} ended" if steps else "nothing ran")


# --- inside --------------------------------------------------------------------------------------------


async def _plan(here: Site, keeper: Keeper) -> tuple[Plan, dict[str, str]]:
    from llambo.fleet.decide import plan as planning

    seen = await keeper.look()
    wanted = here.settle(keeper, seen.world, write=False)
    return planning.make(keeper.fleet, seen.world, wanted), seen.away()


def make_it_so(here: Site, as_json: bool, counts: Callable[[], dict[str, int]] = dict) -> None:
    from llambo.fleet.decide import plan as planning
    from llambo.fleet.run.applying import apply

    began = time.monotonic()
    with here.alone():
        keeper = here.keeper(_quiet if as_json else _say)
        if wanted := counts():
            here.want(wanted)

        async def work() -> tuple[Plan, dict[str, str], list[Failed], Outcome]:
            seen = await keeper.look()
            for name, why in seen.away().items():
                keeper.tell(f"{name} is away: {why}")
            wanted = here.settle(keeper, seen.world, write=True)
            found = planning.make(keeper.fleet, seen.world, wanted)
            buried = await keeper.bury(seen.ended)
            return found, seen.away(), buried, await apply(keeper, found, seen.world, here.versions())

        found, away, buried, outcome = run(work())
    if as_json:
        told = _as_json(found) | {"done": len(outcome.done), "stopped": outcome.stopped, "away": away}
        lists = {"failed": outcome.failed, "ended": buried}
        show_json(told | {name: [_failure(one) for one in found] for name, found in lists.items()})
    else:
        for one in buried:
            _say(f"{one} by itself before this; its last words:{_words(one)}")
        for one in outcome.failed:
            _say(f"{one}; its last words:{_words(one)}")
        for text in outcome.stopped:
            _say(f"the update has stopped, {text}")
        for refusal in found.refusals:
            _say(f"{refusal.count} of {refusal.node_class} cannot be: {refusal.why}")
        took = time.monotonic() - began
        _say(f"{_summary(outcome.done) or 'nothing done'} in {took:.1f} s" if found else "nothing to do")
    if outcome.failed or outcome.stopped or found.refusals:
        click.get_current_context().exit(Exit.ERROR)


def _show(found: Plan) -> None:
    widths = [max((len(text) for text in texts), default=0) for texts in zip(*_rows(found), strict=True)]
    for row in _rows(found):
        click.echo(printable("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()))
    for refusal in found.refusals:
        click.echo(printable(f"{refusal.count} of {refusal.node_class} cannot be: {refusal.why}"))
    if not found.steps:
        click.echo("nothing to do")


def _rows(found: Plan) -> list[tuple[str, str, str, str]]:
    return [(step.do.value, step.name, step.host, step.why) for step in found.steps]


def _as_json(found: Plan) -> dict[str, Any]:
    return {
        "steps": [
            {"do": step.do.value, "name": step.name, "class": step.node_class, "host": step.host, "why": step.why}
            for step in found.steps
        ],
        "refused": [{"class": one.node_class, "count": one.count, "why": one.why} for one in found.refusals],
    }


def _failure(one: Failed) -> dict[str, str]:
    return {"name": one.name, "how": one.how, "words": one.words}


def _words(one: Failed) -> str:
    from llambo.fleet.decide.crashes_core import last_words

    return "".join(f"\n    {line}" for line in last_words(one.words).splitlines()) or " none"


def _summary(done: list[Step]) -> str:
    verbs = {"spawn": "spawned", "resume": "taken back", "retire": "retired", "replace": "replaced"}
    counts = {do: sum(step.do.value == do for step in done) for do in verbs}
    return ", ".join(f"{count} {verbs[do]}" for do, count in counts.items() if count)


def _count(word: str) -> tuple[str, int]:
    name, equals, count = word.partition("=")
    if not equals or not count.isdecimal():
        raise Failure(f"{word!r} is no CLASS=COUNT", "as in `llambo fleet scale tiny=10`", Exit.USAGE)
    return name, int(count)


def _say(text: str) -> None:
    tell(f"fleet: {printable(text)}", err=False)


def _quiet(text: str) -> None:
    """What is said on the way is no part of the JSON."""
