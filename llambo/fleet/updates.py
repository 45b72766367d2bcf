"""Changes carried out: the workers of a class replaced one after the other, and all steps of a plan.

`rolling_core` decides about an update. Its actions are carried out by the node manager here, and the results go back to
it as events. A worker is ready when its process has reported so (its engine has passed its own test by then) and the
broker lists it as ready. It is proved when it answers: short requests go to its class until it has answered one, or has
completed a request of another client. A host is proved when a model is loaded there. A bad worker is ended, so that it
gets no requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from llambo.fleet import hosted
from llambo.fleet.decide import plan as planning
from llambo.fleet.decide.plan import Plan, PlanStep, StepKind
from llambo.fleet.decide.rolling_core import (
    TEST_MS,
    UNDER_WAY,
    Action,
    Event,
    NodeDied,
    NodeReady,
    NodeStopped,
    NodeTested,
    OthersCounted,
    Phase,
    ProveNode,
    ReportProgress,
    RollingUpdate,
    StartNode,
    StopNode,
    TimePassed,
    update_of,
)
from llambo.fleet.model import BROKER, NodeFailed, NodeState, World
from llambo.fleet.node_manager import NodeManager, Snapshot
from llambo.fleet.versions import Versions, VersionsFile
from llambo.mesh.service import clock
from llambo.mesh.wire.errors import LlamboError

#: Between two looks.
LOOK_S = 0.3
#: How long the update waits while too many others of the class do not work.
UNAVAILABLE_MS = 60_000
PROMPT, TOKENS = "Say yes.", 4
#: Between two test requests, of which another worker has answered the first.
AGAIN_S = 0.1


class ClassUpdate:
    """One class. `wanted`: how many workers it is to have."""

    def __init__(self, manager: NodeManager, steps: list[PlanStep], wanted: int, at_once: int) -> None:
        self.node_class = steps[0].node_class
        self.work: RollingUpdate = update_of(
            ((one.name, one.node_class, one.fingerprint) for one in steps), manager.providers.fingerprints(), at_once
        )
        self.work.settle_ms = manager.fleet.settle_ms
        self.failed: list[NodeFailed] = []
        self._manager = manager
        self._wanted = wanted
        self._steps = {step.name: step for step in steps}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        #: What a task of ours raised.
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_since_ms = clock.now_ms()

    @property
    def under_way(self) -> set[str]:
        return {node.name for node in self.work.nodes if node.phase in UNDER_WAY}

    @property
    def done(self) -> list[PlanStep]:
        return [self._steps[node.name] for node in self.work.nodes if node.phase is Phase.PROVED]

    def died(self, failed: NodeFailed) -> None:
        """The orchestrator has found it ended."""
        self._events.put_nowait(NodeDied(failed.name, failed.how))

    async def run(self) -> None:
        try:
            while not self.work.over:
                self._compare(await self._manager.look())
                self._handle(TimePassed())
                self._stop_if_waiting_too_long()
                for event in await self._next_events():
                    self._handle(event)
            # A bad worker has ended before the next look.
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            for name in self._steps:
                self._manager.end_step(name)

    # --- inside ----------------------------------------------------------------------------------------

    async def _next_events(self) -> list[Event]:
        """Those of the next `LOOK_S`. Raises what a task of ours raised."""
        found: list[Event] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                found.append(await self._events.get())
        while not self._events.empty():
            found.append(self._events.get_nowait())
        if self._error is not None:
            raise self._error
        return found

    def _compare(self, snapshot: Snapshot) -> None:
        running = self._manager.providers.fingerprints()
        # Drop nodes that have been ended, or have been started with the new settings, by other steps.
        self.work.nodes = [
            node
            for node in self.work.nodes
            if node.phase is not Phase.OLD or running.get(node.name, node.after) != node.after
        ]
        for node in self.work.nodes:
            if node.phase in (Phase.SETTLING, Phase.TESTING, Phase.PROVED):
                if node.name in running and self._manager.providers.pid(node.name) is None:
                    how = self._manager.providers.how_it_ended(node.name)
                    self.failed.append(NodeFailed(node.name, how, self._manager.providers.log_tail(node.name)))
                    self._events.put_nowait(NodeDied(node.name, how))
            elif node.phase is Phase.STARTING and self._started(node.name, running):
                row = (snapshot.workers or {}).get(node.name)
                if row is not None and row.state not in ("loading", "joining"):
                    self._events.put_nowait(NodeReady(node.name))
        working = sum(
            node.state is NodeState.READY and node.name not in self.under_way
            for node in snapshot.world.of(self.node_class)
        )
        missing = max(0, self._wanted - working - len(self.under_way))
        self._handle(OthersCounted(self.node_class, missing))

    def _started(self, name: str, running: dict[str, str]) -> bool:
        """Its process has reported that it is ready."""
        starting = any(task.get_name() == f"start {name}" for task in self._tasks)
        return running.get(name) == self._steps[name].fingerprint and not starting

    def _stop_if_waiting_too_long(self) -> None:
        now_ms = clock.now_ms()
        if self.under_way:
            self._idle_since_ms = now_ms
        elif now_ms - self._idle_since_ms > UNAVAILABLE_MS:
            self.work.stop(f"too few of {self.node_class} have worked for {UNAVAILABLE_MS // 1000} s")

    def _handle(self, event: Event) -> None:
        bad = {node.name for node in self.work.nodes if node.phase is Phase.BAD}
        for action in self.work.handle(event, clock.now_ms()):
            self._perform(action)
        for node in self.work.nodes:
            if node.phase is Phase.PROVED:
                self._manager.end_step(node.name)
            elif node.phase is Phase.BAD and node.name not in bad:
                if not any(failed.name == node.name for failed in self.failed):
                    log_tail = self._manager.providers.log_tail(node.name)
                    self.failed.append(NodeFailed(node.name, node.why, log_tail))
                self._task(f"end {node.name}", self._end(node.name))

    def _perform(self, action: Action) -> None:
        match action:
            case StopNode(name):
                self._manager.begin_step(self._steps[name])
                self._task(f"stop {name}", self._stop(name))
            case StartNode(name):
                self._task(f"start {name}", self._start(name))
            case ProveNode(name):
                self._task(f"prove {name}", self._prove(name))
            case ReportProgress(text):
                self._manager.report(text)

    def _task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
            self._events.put_nowait(TimePassed())

    async def _stop(self, name: str) -> None:
        try:
            await self._manager.retire(self._steps[name])
        except NodeFailed as failed:
            # If its host is away, for example. Then it cannot be started there either, which ends the update.
            self._manager.report(f"{failed}")
        self._events.put_nowait(NodeStopped(name))

    async def _start(self, name: str) -> None:
        try:
            await self._manager.spawn(self._steps[name])
        except NodeFailed as failed:
            self.failed.append(failed)
            self._events.put_nowait(NodeDied(name, failed.how))

    async def _end(self, name: str) -> None:
        if name in self._manager.providers.fingerprints():
            step = self._steps[name]
            try:
                await self._manager.retire(PlanStep(StepKind.RETIRE, name, step.node_class, step.host, "it is bad"))
            except NodeFailed as failed:
                self._manager.report(f"{failed}")
        self._manager.end_step(name)

    async def _prove(self, name: str) -> None:
        try:
            async with asyncio.timeout(TEST_MS / 1000 * 0.9):
                problem = await self._test(name)
        except TimeoutError:
            problem = "it has answered nothing"
        except LlamboError as error:
            problem = error.text
        self._events.put_nowait(NodeTested(name, problem))

    async def _test(self, name: str) -> str:
        """The problem; empty: it works."""
        spec = self._manager.spec_of(self._steps[name])
        async with self._manager.mesh() as client:
            if spec is not None and spec.is_host:
                return await hosted.prove(client, name)
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


# --- A whole plan, once: for `llambo fleet apply`. ---


@dataclass(slots=True)
class Outcome:
    done: list[PlanStep] = field(default_factory=list)
    failed: list[NodeFailed] = field(default_factory=list)
    #: Updates that have stopped: how far they came, and why.
    stopped: list[str] = field(default_factory=list)


async def apply(manager: NodeManager, plan: Plan, world: World, file: VersionsFile) -> Outcome:
    """Steps of one kind together, in the order of the plan; replacements class by class, up to the first bad worker."""
    outcome = Outcome()
    after, versions = planning.imagine(world, plan.steps, manager.fleet), file.read()
    for kind, node_class, steps in _groups(plan):
        if kind is StepKind.REPLACE and node_class != BROKER:
            failed = {one.name for one in outcome.failed}
            if outcome.stopped or any(step.name in failed and step.node_class == node_class for step in plan.steps):
                text = f"{len(steps)} {node_class} are left as they were: an earlier step has failed"
                outcome.stopped.append(text)
                continue
            at_once = max_unavailable(manager, versions, node_class)
            update = ClassUpdate(manager, steps, len(after.of(node_class)), at_once)
            await update.run()
            outcome.failed += update.failed
            outcome.done += update.done
            if update.work.stopped:
                outcome.stopped.append(f"{node_class}: {update.work.summary()}")
                with file.changing() as changed:
                    changed.stop(node_class, steps[0].fingerprint, update.work.stopped)
            continue
        results = await asyncio.gather(*[manager.carry_out(step) for step in steps])
        bad = [result for result in results if result is not None]
        outcome.failed += bad
        outcome.done += [step for step, result in zip(steps, results, strict=True) if result is None]
        if bad and node_class == BROKER:
            break
    return outcome


def max_unavailable(manager: NodeManager, versions: Versions, node_class: str) -> int:
    """Of the last rolling restart of the class, if it set one; otherwise that of the file."""
    known = versions.classes.get(node_class)
    return (known.at_once if known is not None else 0) or manager.fleet.max_unavailable


def _groups(plan: Plan) -> list[tuple[StepKind, str, list[PlanStep]]]:
    """Neighbours that are carried out together: of one kind, and replacements of one class. The broker is alone."""

    def key(step: PlanStep) -> tuple[StepKind, str]:
        alone = step.kind is StepKind.REPLACE or step.node_class == BROKER
        return step.kind, step.node_class if alone else ""

    return [(kind, node_class, list(steps)) for (kind, node_class), steps in groupby(plan.steps, key=key)]
