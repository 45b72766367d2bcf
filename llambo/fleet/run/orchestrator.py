"""The orchestrator: as long as it has the lease (see `leadership`) it looks every second, decides, and has done what
was decided, without waiting for it.

    look -> what has died -> the book of crashes --+
         -> busy, waiting -> the autoscaler -------+-> plan -> steps, each a task of its own

What a step is about is left alone by later plans until it is done. Settings that are others now are brought to one
class after the other (see `rolling`). After a worker that is bad with them no other gets them, until the file is
changed again or they are taken back; whoever has to be begun meanwhile gets those before.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from llambo.fleet.decide import plan as planning
from llambo.fleet.decide.autoscale_core import Autoscaler
from llambo.fleet.decide.crashes_core import LOOP, Crashes
from llambo.fleet.decide.plan import Do, Plan, Step, Wanted
from llambo.fleet.file.versions import Book, Versions, as_version
from llambo.fleet.model import Fleet
from llambo.fleet.providers.process import Failed
from llambo.fleet.run.applying import at_once
from llambo.fleet.run.keeper import Keeper, Seen
from llambo.fleet.run.leadership import Leadership
from llambo.fleet.run.observe import Observer, promised
from llambo.fleet.run.rolling import Roller
from llambo.fleet.world import NodeState
from llambo.mesh.service import clock
from llambo.mesh.wire.errors import LlamboError

#: Between two looks.
LOOK_S = 1.0
#: A model's file that is being copied is not taken for another model before it is whole.
STILL_S = 10.0
#: What is told by `llambo fleet status`.
EVENTS = 50
#: Written whenever something has changed.
NEWS = "run.json"

Tell = Callable[[str], None]


class Paper(Protocol):
    """What is written down about the fleet, by people and by us."""

    def changed(self) -> Fleet | None:
        """The file, if it is another one than the last time. LlamboError: it is wrong."""

    def counts(self) -> dict[str, int]:
        """How many somebody has said, as far as the file allows it."""

    def remember(self, counts: Mapping[str, int]) -> None: ...


class Orchestrator:
    def __init__(self, paper: Paper, keeper: Keeper, folder: Path, tell: Tell) -> None:
        self._paper = paper
        self._fleet = fleet = keeper.fleet
        self._keeper = keeper
        self._news = folder / NEWS
        self._versions = Versions(folder)
        self._book = Book()
        self._marks: dict[str, str] = {}
        self._roller: Roller | None = None
        #: As they were read or written last.
        self._counts: dict[str, int] = {}
        self._tell_outside = tell
        keeper.tell = self.tell
        self._scaler = Autoscaler(fleet.classes.values())
        self._observer = Observer()
        self._lead = Leadership(keeper.connect)
        self._led: bool | None = None
        self._crashes = Crashes()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._events: deque[tuple[int, str]] = deque(maxlen=EVENTS)
        self._refused: tuple[str, ...] = ()
        self._away: dict[str, str] = {}
        self._written = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Until it is told to stop. Steps under way are seen through; nodes go on without it."""
        try:
            while not stop.is_set():
                if await self._may_act():
                    await self.turn()
                try:
                    async with asyncio.timeout(LOOK_S):
                        await stop.wait()
                except TimeoutError:
                    continue
            if self._roller is not None:
                self._roller.work.stop("the orchestrator was told to end")
            if self._tasks:
                self.tell(f"{len(self._tasks)} steps are under way, and are seen through")
            await asyncio.gather(*self._tasks.values())
        finally:
            await self._lead.give_back()
            for task in self._tasks.values():
                task.cancel()
            self._news.unlink(missing_ok=True)

    async def _may_act(self) -> bool:
        """Whether the lease is ours; or there is no broker to ask for it, because we are the one who keeps it."""
        await self._lead.renew(self._keeper.address, promised(self._fleet), acting=bool(self._led))
        leads = self._lead.leads or (not self._lead.asked and self._fleet.broker is not None)
        if leads != self._led:
            self._led = leads
            self._tell_outside("keeps it from now on" if leads else f"stands by: {self._lead.why}")
        return leads

    async def turn(self) -> None:
        led = self._lead.leads
        seen = await self._keeper.look()
        if led and not self._lead.leads and not await self._may_act():
            return  # it took so long that somebody else keeps it now
        now_ms = clock.now_ms()
        for name in [name for name, task in self._tasks.items() if task.done()]:
            self._tasks.pop(name).result()  # a fault of ours is not to be overlooked
        self._read(now_ms)
        self._heed_hosts(seen.away())
        await self._heed_the_dead(seen, now_ms)
        if seen.workers is not None:
            observed = self._observer.seen(self._fleet, seen.world, seen.workers, seen.requests)
            for decision in self._scaler.handle(observed, now_ms):
                what = "scaling up" if decision.more > 0 else "scaling down"
                self.tell(f"{decision.node_class}: {what} from {decision.was} to {decision.wanted}: {decision.why}")
        if (counts := dict(self._scaler.counts)) != self._counts and counts:
            self._paper.remember(counts)
            self._counts = counts
        with self._versions.changing() as book:
            self._keeper.fleet = book.note(self._fleet, seen.world, STILL_S)
            self._marks = book.marks(self._keeper.fleet, STILL_S)
        self._book = book
        wanted = Wanted(
            counts=counts,
            fingerprints=self._marks,
            barred=self._crashes.barred(now_ms),
            probed=self._crashes.probed(now_ms),
        )
        self._begin(planning.make(self._keeper.fleet, seen.world, wanted))
        self._write(now_ms)

    def tell(self, text: str) -> None:
        self._events.append((clock.wall_ms(), text))
        self._lead.tell(text)
        self._tell_outside(text)

    # --- inside ----------------------------------------------------------------------------------------

    def _read(self, now_ms: int) -> None:
        """What people have written since."""
        try:
            fleet = self._paper.changed()
        except LlamboError as error:
            self.tell(f"the file is left as it was: {error.text}")
            fleet = None
        if fleet is not None:
            self._fleet = fleet
            self._scaler.told(fleet.classes.values())
            for node_class in fleet.classes:
                self._crashes.forgive(node_class)
            self.tell("the file has changed")
        for name, count in self._paper.counts().items():
            if count != self._counts.get(name):
                self._scaler.operator_wants(name, count, now_ms)
                self._counts[name] = count
                self.tell(f"{name}: {count} are wanted, somebody says")

    def _heed_hosts(self, away: dict[str, str]) -> None:
        for name in sorted(away.keys() - self._away.keys()):
            self.tell(f"{name} is away: {away[name]}")
        for name in sorted(self._away.keys() - away.keys()):
            self.tell(f"{name} is back")
        self._away = away

    async def _heed_the_dead(self, seen: Seen, now_ms: int) -> None:
        ready = {
            node.name: (node.node_class, node.host) for node in seen.world.nodes if node.state is NodeState.READY
        }  # fmt: skip
        for name in ready:
            self._crashes.ready(name, now_ms)
        for node_class, host in self._crashes.lasted(ready, now_ms):
            self.tell(f"{node_class} on {host} has recovered")
        ended = [record for record in seen.ended if record.name not in self._tasks]
        for record, failed in zip(ended, await self._keeper.bury(ended), strict=True):
            self.tell(f"{failed}")
            self._failed(failed, record.node_class, record.host, now_ms)
            if self._roller is not None:
                self._roller.died(failed)

    def _failed(self, failed: Failed, node_class: str, host: str, now_ms: int) -> None:
        self._crashes.died(failed.name, node_class, host, failed.how, failed.words, now_ms)
        for loop in self._crashes.loops(now_ms):
            if (loop.node_class, loop.host, loop.node) == (node_class, host, failed.name) and loop.failures >= LOOP:
                again = f"again in {loop.again_in_ms / 1000:.0f} s"
                self.tell(f"{node_class} keeps failing on {host}, {loop.failures} times in a row; {again}")

    def _begin(self, found: Plan) -> None:
        old: list[Step] = []
        rolled = self._roller.under_way if self._roller is not None else set()
        for step in map(self._as_before, found.steps):
            if step.name in self._tasks or step.name in rolled:
                continue
            if step.do is Do.REPLACE and step.node_class != "broker":
                if not self._book.stopped(step.node_class, step.fingerprint):
                    old.append(step)
                continue
            if step.node_class != "broker" and "broker" in self._tasks:
                continue  # it comes first
            task = asyncio.create_task(self._carry_out(step), name=f"{step.do.value} {step.name}")
            self._tasks[step.name] = task
            if step.node_class == "broker":
                break
        if old and self._roller is None and "broker" not in self._tasks:
            self._roll([step for step in old if step.node_class == old[0].node_class])
        refused = tuple(f"{one.count} of {one.node_class} cannot be: {one.why}" for one in found.refusals)
        # Seconds that are left are counted down in them, which is no news.
        if len(refused) != len(self._refused):
            for text in refused:
                self.tell(text)
        self._refused = refused

    def _as_before(self, step: Step) -> Step:
        """What is begun while an update stands still is begun as it was before that."""
        entry, kept = self._book.of(step.node_class), self._fleet.classes.get(step.node_class)
        stopped = step.do is Do.SPAWN and self._book.stopped(step.node_class, step.fingerprint)
        if not stopped or kept is None or entry.before is None:
            return step
        before = as_version(kept, entry.before)
        mark = self._book.mark(before, self._fleet, STILL_S)
        self._keeper.older[mark] = before
        return replace(step, fingerprint=mark)

    def _roll(self, steps: list[Step]) -> None:
        node_class = steps[0].node_class
        marks = {record.name: record.fingerprint for record in self._keeper.processes.records()}
        count = self._scaler.counts.get(node_class, len(steps))
        roller = Roller(self._keeper, steps, marks, count, at_once(self._keeper, self._book, node_class))
        self._roller = roller
        self.tell(f"{node_class}: {len(steps)} are replaced, {roller.work.max_unavailable} at a time")
        self._tasks[f"update of {node_class}"] = asyncio.create_task(self._rolled(roller, steps))

    async def _rolled(self, roller: Roller, steps: list[Step]) -> None:
        try:
            await roller.run()
        finally:
            self._roller = None
        self.tell(f"{roller.node_class}: {roller.work.summary()}")
        if roller.work.stopped and roller.failed:
            with self._versions.changing() as book:
                book.stop(roller.node_class, steps[0].fingerprint, roller.work.stopped)
        hosts = {step.name: step.host for step in steps}
        for failed in roller.failed:
            self._failed(failed, roller.node_class, hosts[failed.name], clock.now_ms())

    async def _carry_out(self, step: Step) -> None:
        failed = await self._keeper.carry_out(step)
        if failed is not None:
            self._failed(failed, step.node_class, step.host, clock.now_ms())

    def _write(self, now_ms: int) -> None:
        news: dict[str, Any] = {
            "pid": os.getpid(),
            "wanted": dict(self._scaler.counts),
            "held": dict(self._scaler.held),
            "refused": list(self._refused),
            "update": f"{self._roller.node_class}: {self._roller.work.summary()}" if self._roller else "",
            "loops": [
                {"class": one.node_class, "host": one.host, "failures": one.failures, "node": one.node,
                 "how": one.how, "words": one.words, "again_ms": clock.wall_ms() + one.again_in_ms}
                for one in self._crashes.loops(now_ms)
            ],
            "events": [{"at_ms": at_ms, "text": text} for at_ms, text in self._events],
        }  # fmt: skip
        if (text := json.dumps(news)) != self._written:
            draft = self._news.with_suffix(".new")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._news)
            self._written = text


def read_news(folder: Path) -> dict[str, Any] | None:
    """What the orchestrator that runs has written; None: there is none."""
    try:
        news = json.loads((folder / NEWS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return news if isinstance(news, dict) else None
