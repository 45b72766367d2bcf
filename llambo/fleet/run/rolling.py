"""Leads an update through as `rolling_core` says: what it orders is done by the keeper, and what comes of it is told.

A worker is ready when its process has said so (its engine has passed its own test by then) and the mesh has it as
ready. It is proved when it answers: short requests go to its class until one was answered by it, or it has done
somebody else's. One that is bad is ended, so that nobody is given to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from llambo.fleet.decide.plan import Do, Step
from llambo.fleet.decide.rolling_core import (
    TEST_MS,
    UNDER_WAY,
    Away,
    Begin,
    Died,
    Fact,
    Leave,
    Left,
    Order,
    Ready,
    Rolling,
    Tell,
    TimePassed,
    Tried,
    Try,
    of_plan,
)
from llambo.fleet.decide.rolling_core import Step as Phase
from llambo.fleet.providers.process import Failed
from llambo.fleet.run.keeper import Keeper, Seen
from llambo.fleet.world import NodeState
from llambo.mesh.service import clock
from llambo.mesh.wire.errors import LlamboError

#: Between two looks.
LOOK_S = 0.3
#: Others of the class may be away for so long before it is given up to wait for them.
AWAY_MS = 60_000
PROMPT, TOKENS = "Say yes.", 4
#: Between two requests, of which the first has gone to somebody else.
AGAIN_S = 0.1


class Roller:
    """One class. `wanted`: how many there are to be of it."""

    def __init__(self, keeper: Keeper, steps: list[Step], marks: dict[str, str], wanted: int, at_once: int) -> None:
        """`marks`: what each runs now."""
        fleet = keeper.fleet
        self.node_class = steps[0].node_class
        self.work: Rolling = of_plan(((one.name, one.node_class, one.fingerprint) for one in steps), marks, at_once)
        self.work.settle_ms = fleet.settle_ms
        self.failed: list[Failed] = []
        self._keeper = keeper
        self._wanted = wanted
        self._steps = {step.name: step for step in steps}
        self._facts: asyncio.Queue[Fact | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_since_ms = clock.now_ms()

    @property
    def under_way(self) -> set[str]:
        return {node.name for node in self.work.nodes if node.step in UNDER_WAY}

    @property
    def done(self) -> list[Step]:
        return [self._steps[node.name] for node in self.work.nodes if node.step is Phase.PROVED]

    def died(self, failed: Failed) -> None:
        """Somebody else has found it dead."""
        self._facts.put_nowait(Died(failed.name, failed.how))

    async def run(self) -> None:
        try:
            while not self.work.over:
                self._look_at(await self._keeper.look())
                self._handle(TimePassed())
                self._give_up_waiting()
                for fact in await self._news():
                    self._handle(fact)
            # Who was ended for being bad is gone before anybody looks again.
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            for name in self._steps:
                self._keeper.leave_alone(name)

    # --- inside ----------------------------------------------------------------------------------------

    async def _news(self) -> list[Fact]:
        """What has come within a moment."""
        found: list[Fact | BaseException] = []
        try:
            async with asyncio.timeout(LOOK_S):
                found.append(await self._facts.get())
        except TimeoutError:
            pass
        while not self._facts.empty():
            found.append(self._facts.get_nowait())
        for fact in found:
            if isinstance(fact, BaseException):
                raise fact
        return [fact for fact in found if not isinstance(fact, BaseException)]

    def _look_at(self, seen: Seen) -> None:
        marks = {record.name: record.fingerprint for record in self._keeper.processes.records()}
        # Others may have ended one, or have begun it as it shall be.
        self.work.nodes = [
            node
            for node in self.work.nodes
            if node.step is not Phase.OLD or marks.get(node.name, node.after) != node.after
        ]
        for node in self.work.nodes:
            if node.step in (Phase.SETTLING, Phase.TESTED, Phase.PROVED):
                if node.name in marks and self._keeper.processes.pid(node.name) is None:
                    how = self._keeper.processes.how_it_ended(node.name)
                    self.failed.append(Failed(node.name, how, self._keeper.processes.words(node.name)))
                    self._facts.put_nowait(Died(node.name, how))
            elif node.step is Phase.BEGUN and self._begun(node.name):
                told = (seen.workers or {}).get(node.name)
                if told is not None and told["state"] not in ("loading", "joining"):
                    self._facts.put_nowait(Ready(node.name))
        working = sum(
            node.state is NodeState.READY and node.name not in self.under_way
            for node in seen.world.of(self.node_class)
        )  # fmt: skip
        missing = max(0, self._wanted - working - len(self.under_way))
        self._handle(Away(self.node_class, missing))

    def _begun(self, name: str) -> bool:
        """Its process has said that it is ready."""
        return any(
            record.name == name and record.fingerprint == self._steps[name].fingerprint
            for record in self._keeper.processes.records()
        ) and not any(task.get_name() == f"begin {name}" for task in self._tasks)

    def _give_up_waiting(self) -> None:
        now_ms = clock.now_ms()
        if self.under_way:
            self._idle_since_ms = now_ms
        elif now_ms - self._idle_since_ms > AWAY_MS:
            self.work.stop(f"too few of {self.node_class} have worked for {AWAY_MS // 1000} s")

    def _handle(self, fact: Fact) -> None:
        bad = {node.name for node in self.work.nodes if node.step is Phase.BAD}
        for order in self.work.handle(fact, clock.now_ms()):
            self._do(order)
        for node in self.work.nodes:
            if node.step is Phase.PROVED:
                self._keeper.leave_alone(node.name)
            elif node.step is Phase.BAD and node.name not in bad:
                if not any(failed.name == node.name for failed in self.failed):
                    self.failed.append(Failed(node.name, node.why, self._keeper.processes.words(node.name)))
                self._task(f"end {node.name}", self._end(node.name))

    def _do(self, order: Order) -> None:
        match order:
            case Leave(name):
                self._keeper.see_to(self._steps[name])
                self._task(f"leave {name}", self._leave(name))
            case Begin(name):
                self._task(f"begin {name}", self._begin(name))
            case Try(name):
                self._task(f"try {name}", self._try(name))
            case Tell(text):
                self._keeper.tell(text)

    def _task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._facts.put_nowait(error)

    async def _leave(self, name: str) -> None:
        try:
            await self._keeper.retire(self._steps[name])
        except Failed as failed:
            # Its host is away, for one: it cannot be begun there either, and that is what ends the update.
            self._keeper.tell(f"{failed}")
        self._facts.put_nowait(Left(name))

    async def _begin(self, name: str) -> None:
        try:
            await self._keeper.spawn(self._steps[name])
        except Failed as failed:
            self.failed.append(failed)
            self._facts.put_nowait(Died(name, failed.how))

    async def _end(self, name: str) -> None:
        if any(record.name == name for record in self._keeper.processes.records()):
            step = self._steps[name]
            try:
                await self._keeper.retire(Step(Do.RETIRE, name, step.node_class, step.host, "it is bad"))
            except Failed as failed:
                self._keeper.tell(f"{failed}")
        self._keeper.leave_alone(name)

    async def _try(self, name: str) -> None:
        try:
            async with asyncio.timeout(TEST_MS / 1000 * 0.9):
                wrong = await self._answers(name)
        except TimeoutError:
            wrong = "it has answered nothing"
        except LlamboError as error:
            wrong = error.text
        self._facts.put_nowait(Tried(name, wrong))

    async def _answers(self, name: str) -> str:
        async with self._keeper.mesh() as client:
            while True:
                found = await client.workers(name)
                if not found:
                    return "it has left the mesh"
                if found[0].done or found[0].tokens_per_s:
                    return ""
                try:
                    await client.generate(
                        PROMPT, model=f"@{self.node_class}", max_tokens=TOKENS, priority="interactive"
                    )
                except LlamboError as error:
                    if not error.retryable:
                        raise
                await asyncio.sleep(AGAIN_S)
