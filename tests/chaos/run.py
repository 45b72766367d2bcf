"""One run: the processes start, faults begin and end, all requests are finished, and then the history is read."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from llambo import Client, LlamboError
from tests.chaos import checker, hosts, http_check, leaks, promises, report
from tests.chaos.checker import Wrong
from tests.chaos.history import Journal, Line, read
from tests.chaos.injector import Injector
from tests.chaos.plan import Plan, schedule
from tests.chaos.world import World


async def disturb(plan: Plan, folder: Path) -> None:
    """Writes the history into this folder."""
    journal = Journal(folder / "harness.jsonl", "harness")
    journal.write("plan", **asdict(plan))
    world = World(plan, folder, journal)
    try:
        await world.begin()
        begun = time.monotonic()
        await Injector(world).run(schedule(plan))
        await asyncio.sleep(max(0.0, begun + plan.minutes * 60 - time.monotonic()))
        journal.write("calm")
        await world.finish()
        await _ask_why(plan, folder, world)
    finally:
        await world.end()
        journal.write("over")
        journal.close()


async def _ask_why(plan: Plan, folder: Path, world: World) -> None:
    """While the brokers are still there to be asked: what do they know of the first requests that went wrong?"""
    found = checker.judge(read(folder), style=plan.style if plan.engine == "fake" else "", split=True)
    for wrong in [wrong for wrong in found.wrong if wrong.id][:3]:
        for number, broker in enumerate(world.brokers):
            story: Any
            try:
                async with Client(world.address(number), query_ms=2_000) as client:
                    story = msgspec.to_builtins((await client.why(wrong.id)).story)
            except LlamboError as error:
                story = [{"at_ms": 0, "what": "nothing", "detail": error.text}]
            world.journal.write("knows", id=wrong.id, broker=broker.name, story=story)


def examine(plan: Plan, folder: Path, seconds: float) -> tuple[report.Totals, list[Wrong], list[str], list[str]]:
    """Totals, findings, growth, and the story of the first finding."""
    lines = list(read(folder))
    streams = checker.judge(lines, style=plan.style if plan.engine == "fake" else "", split=True)
    harness = [line for line in lines if line["who"] == "harness"]
    times = promises.judge(harness, lease_ms=plan.lease_ms, stall_ms=plan.stall_ms)
    leaked = leaks.judge(lines, folder, fake=plan.engine == "fake")
    over_http = http_check.judge(lines)
    models = hosts.judge(lines, streams, plan.budget_mib * hosts.MIB, plan.queue_ms) if plan.models else hosts.Found()
    if plan.gateways:
        # Brokers that stand still notice nothing in time; what is left over, and what is broken, counts.
        times.wrong = [wrong for wrong in times.wrong if wrong.sort != promises.LATE]
    wrong = [*streams.wrong, *times.wrong, *leaked, *over_http.wrong, *models.wrong]
    story = report.story(wrong[0], lines, _whys(lines, wrong[0])) if wrong else []
    return (
        report.totals(plan, streams, [*times.wrong, *models.wrong], times, seconds)
        | {"wrong leak": len(leaked)}
        | report.http_totals(over_http)
        | hosts.totals(models),
        wrong,
        report.slopes(harness),
        story,
    )


def _whys(lines: list[Line], wrong: Wrong) -> dict[str, list[dict[str, Any]]]:
    return {str(line.get("broker", line["who"])): line["story"] for line in lines
            if line["e"] in ("why", "knows") and line["id"] == wrong.id and wrong.id}  # fmt: skip


def append_totals(path: Path, totals: report.Totals) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(totals) + "\n")
