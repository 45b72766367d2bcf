"""A plan, carried out once: for `llambo fleet apply` and whatever else ends when it is done."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import groupby

from llambo.fleet.decide import plan as planning
from llambo.fleet.decide.plan import Do, Plan, Step
from llambo.fleet.file.versions import Book, Versions
from llambo.fleet.providers.process import Failed
from llambo.fleet.run.keeper import Keeper
from llambo.fleet.run.rolling import Roller
from llambo.fleet.world import World


@dataclass(slots=True)
class Outcome:
    done: list[Step] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    #: Updates that have stopped: how far they came, and why.
    stopped: list[str] = field(default_factory=list)


async def apply(keeper: Keeper, plan: Plan, world: World, versions: Versions) -> Outcome:
    """Step by step, those of one kind together; replacements one class after the other, up to the first bad one."""
    outcome = Outcome()
    after, book = planning.imagine(world, plan.steps, keeper.fleet), versions.read()
    for do, node_class, steps in _groups(plan):
        if do is Do.REPLACE and node_class != "broker":
            wanted = len(after.of(node_class))
            if outcome.stopped or any(step.node_class == node_class for step in _failed(plan, outcome)):
                why = "something before it was bad"
                outcome.stopped.append(f"{len(steps)} {node_class} are left as they were: {why}")
                continue
            roller = Roller(keeper, steps, _marks(keeper), wanted, at_once(keeper, book, node_class))
            await roller.run()
            outcome.failed += roller.failed
            outcome.done += roller.done
            if roller.work.stopped:
                outcome.stopped.append(f"{node_class}: {roller.work.summary()}")
                with versions.changing() as changed:
                    changed.stop(node_class, steps[0].fingerprint, roller.work.stopped)
            continue
        results = await asyncio.gather(*[keeper.carry_out(step) for step in steps])
        bad = [result for result in results if result is not None]
        outcome.failed += bad
        outcome.done += [step for step, result in zip(steps, results, strict=True) if result is None]
        if bad and node_class == "broker":
            break
    return outcome


def at_once(keeper: Keeper, book: Book, node_class: str) -> int:
    """How many may be away."""
    entry = book.classes.get(node_class)
    return (entry.at_once if entry is not None else 0) or keeper.fleet.max_unavailable


def _marks(keeper: Keeper) -> dict[str, str]:
    return {record.name: record.fingerprint for record in keeper.processes.records()}


def _failed(plan: Plan, outcome: Outcome) -> list[Step]:
    names = {failed.name for failed in outcome.failed}
    return [step for step in plan.steps if step.name in names]


def _groups(plan: Plan) -> list[tuple[Do, str, list[Step]]]:
    """Neighbours that are done together: of one kind, and replacements of one class. The broker is alone."""

    def kind(step: Step) -> tuple[Do, str]:
        return step.do, step.node_class if step.do is Do.REPLACE or step.node_class == "broker" else ""

    return [(do, node_class, list(steps)) for (do, node_class), steps in groupby(plan.steps, key=kind)]
