"""The orchestrator. While it holds the lease (`Leadership`) it looks every second, decides, and starts what was
decided, without waiting for it.

    look -> what has ended -> crashes ---------+
         -> busy slots, queue -> autoscaler ---+-> plan -> steps, each a task of its own

A node with a step under way is left alone by later plans until the step is done. Changed settings reach one class after
the other (see `updates`). After a worker that is bad with new settings, no other worker gets them until the file
changes again or they are rolled back; a worker that has to be started meanwhile gets the settings before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec

from llambo.fleet.decide import plan as planning
from llambo.fleet.decide.autoscale_core import Autoscaler, LoadObserver, promised_models
from llambo.fleet.decide.crashes_core import LOOP, Crashes
from llambo.fleet.decide.plan import Plan, PlanStep, StepKind, Wanted
from llambo.fleet.model import BROKER, Fleet, NodeFailed, NodeState
from llambo.fleet.node_manager import NodeManager, Report, Snapshot
from llambo.fleet.updates import ClassUpdate, max_unavailable
from llambo.fleet.versions import Versions, VersionsFile, as_version
from llambo.mesh.client.client import Client
from llambo.mesh.link import sockets
from llambo.mesh.link.sockets import endpoint
from llambo.mesh.service import clock
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.reports import LeaseReply

#: Between two looks.
LOOK_S = 1.0
#: A changed model file counts when it has not changed for so long: it may still be being copied.
STILL_S = 10.0
#: How many events `llambo fleet status` can show.
EVENTS = 50
#: The state for other processes, in the fleet's folder; written when something has changed.
STATE_FILE = "run.json"


class Inputs(Protocol):
    """What an operator can change while the orchestrator runs."""

    def changed(self) -> Fleet | None:
        """The file, if it has changed. LlamboError: it is wrong."""

    def counts(self) -> dict[str, int]:
        """How many workers of each class were asked for, within the bounds of the file."""

    def store_counts(self, counts: Mapping[str, int]) -> None: ...


@dataclass(slots=True)
class _Scaling:
    autoscaler: Autoscaler
    observer: LoadObserver = field(default_factory=LoadObserver)
    #: As they were read or stored last.
    counts: dict[str, int] = field(default_factory=dict)


class StateEvent(msgspec.Struct, frozen=True):
    #: Wall clock.
    at_ms: int
    text: str


class LoopState(msgspec.Struct, frozen=True, kw_only=True):
    """A class that keeps failing on a host. `again_ms`: when the next one is tried, by the wall clock."""

    node_class: str = msgspec.field(name="class")
    host: str
    failures: int
    node: str
    how: str
    log_tail: str = msgspec.field(name="words")
    again_ms: int


class OrchestratorState(msgspec.Struct, frozen=True, kw_only=True):
    """What `llambo fleet status` shows about an orchestrator that runs."""

    pid: int
    wanted: dict[str, int] = {}
    #: Classes whose load needs more workers than they may have, and what limits them.
    held: dict[str, str] = {}
    refused: tuple[str, ...] = ()
    #: The update that is under way; empty: none.
    update: str = ""
    loops: list[LoopState] = []
    events: list[StateEvent] = []


class _StateFile:
    def __init__(self, path: Path) -> None:
        self.events: deque[StateEvent] = deque(maxlen=EVENTS)
        self.refused: tuple[str, ...] = ()
        self._path = path
        self._written = b""

    def add_event(self, text: str) -> None:
        self.events.append(StateEvent(clock.wall_ms(), text))

    def write(self, autoscaler: Autoscaler, crashes: Crashes, update: str, now_ms: int) -> None:
        loops = [
            LoopState(
                node_class=one.node_class, host=one.host, failures=one.failures, node=one.node, how=one.how,
                log_tail=one.log_tail, again_ms=clock.wall_ms() + one.again_in_ms,
            )
            for one in crashes.loops(now_ms)
        ]  # fmt: skip
        state = OrchestratorState(
            pid=os.getpid(), wanted=dict(autoscaler.counts), held=dict(autoscaler.limited), refused=self.refused,
            update=update, loops=loops, events=list(self.events),
        )  # fmt: skip
        if (text := msgspec.json.encode(state)) != self._written:
            draft = self._path.with_suffix(".new")
            draft.write_bytes(text)
            draft.replace(self._path)
            self._written = text

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def read_state(folder: Path) -> OrchestratorState | None:
    """What an orchestrator has written there; None: none runs. One that was killed leaves its file behind."""
    try:
        return msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=OrchestratorState)
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


class Orchestrator:
    def __init__(self, inputs: Inputs, manager: NodeManager, folder: Path, report: Report) -> None:
        self._inputs = inputs
        self._fleet = fleet = manager.fleet
        self._manager = manager
        manager.report, manager.on_stopping = self.report, self._note_stopping
        self._report = report
        self._state = _StateFile(folder / STATE_FILE)
        self._versions_file = VersionsFile(folder)
        self._versions = Versions()
        self._scaling = _Scaling(Autoscaler(fleet.classes.values()))
        self._leadership = Leadership(manager.connect)
        #: As reported last; None: not yet.
        self._led: bool | None = None
        self._crashes = Crashes()
        self._update: ClassUpdate | None = None
        #: Steps under way by node, and the update.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: Hosts that could not be reached at the last look, and why.
        self._away: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Steps under way are finished; nodes keep running."""
        try:
            while not stop.is_set():
                if await self._may_act():
                    await self.turn()
                try:
                    async with asyncio.timeout(LOOK_S):
                        await stop.wait()
                except TimeoutError:
                    continue
            if self._update is not None:
                self._update.work.stop("the orchestrator was stopped")
            if self._tasks:
                self.report(f"{len(self._tasks)} steps are under way, and are finished first")
            await asyncio.gather(*self._tasks.values())
        finally:
            await self._leadership.give_back()
            for task in self._tasks.values():
                task.cancel()
            self._state.remove()

    async def _may_act(self) -> bool:
        """The lease is ours; or there is no broker to grant it, because the broker belongs to this fleet."""
        leadership = self._leadership
        await leadership.renew(self._manager.address, promised_models(self._fleet), acting=bool(self._led))
        leads = leadership.leads or (not leadership.answered and self._fleet.broker is not None)
        if leads != self._led:
            self._led = leads
            self._report("leads from now on" if leads else f"stands by: {leadership.why}")
        return leads

    async def turn(self) -> None:
        leadership = self._leadership
        led = leadership.leads
        snapshot = await self._manager.look()
        if led and not leadership.leads and not await self._may_act():
            return  # the look took so long that another orchestrator leads now
        now_ms = clock.now_ms()
        for name in [name for name, task in self._tasks.items() if task.done()]:
            self._tasks.pop(name).result()  # raises a bug of ours
        self._read_inputs(now_ms)
        self._report_hosts(snapshot.away())
        await self._handle_ended(snapshot, now_ms)
        self._scale(snapshot, now_ms)
        with self._versions_file.changing() as versions:
            self._manager.fleet = versions.note(self._fleet, snapshot.world, STILL_S)
            fingerprints = versions.fingerprints(self._manager.fleet, STILL_S)
        self._versions = versions
        wanted = Wanted(
            counts=dict(self._scaling.autoscaler.counts),
            fingerprints=fingerprints,
            blocked=self._crashes.blocked(now_ms),
            probing=self._crashes.probing(now_ms),
        )
        self._start(planning.make(self._manager.fleet, snapshot.world, wanted))
        update = f"{self._update.node_class}: {self._update.work.summary()}" if self._update else ""
        self._state.write(self._scaling.autoscaler, self._crashes, update, now_ms)

    def report(self, text: str) -> None:
        self._state.add_event(text)
        self._leadership.add_event(text)
        self._report(text)

    # --- inside ----------------------------------------------------------------------------------------

    def _read_inputs(self, now_ms: int) -> None:
        try:
            fleet = self._inputs.changed()
        except LlamboError as error:
            self.report(f"the changed file is not used: {error.text}")
            fleet = None
        if fleet is not None:
            self._fleet = fleet
            self._scaling.autoscaler.set_classes(fleet.classes.values())
            for node_class in fleet.classes:
                self._crashes.reset(node_class)
            self.report("the file has changed")
        for name, count in self._inputs.counts().items():
            if count != self._scaling.counts.get(name):
                self._scaling.autoscaler.operator_wants(name, count, now_ms)
                self._scaling.counts[name] = count
                self.report(f"{name}: an operator wants {count}")

    def _report_hosts(self, away: dict[str, str]) -> None:
        for name in sorted(away.keys() - self._away.keys()):
            self.report(f"{name} is away: {away[name]}")
        for name in sorted(self._away.keys() - away.keys()):
            self.report(f"{name} is back")
        self._away = away

    def _scale(self, snapshot: Snapshot, now_ms: int) -> None:
        scaling = self._scaling
        if snapshot.workers is not None:
            loads = scaling.observer.loads(self._fleet, snapshot.world, snapshot.workers, snapshot.requests)
            for decision in scaling.autoscaler.handle(loads, now_ms):
                what = "scaling up" if decision.more > 0 else "scaling down"
                self.report(f"{decision.node_class}: {what} from {decision.was} to {decision.wanted}: {decision.why}")
        counts = dict(scaling.autoscaler.counts)
        if counts and counts != scaling.counts:
            self._inputs.store_counts(counts)
            scaling.counts = counts

    async def _handle_ended(self, snapshot: Snapshot, now_ms: int) -> None:
        ready = {
            node.name: (node.node_class, node.host) for node in snapshot.world.nodes if node.state is NodeState.READY
        }  # fmt: skip
        for name in ready:
            self._crashes.note_ready(name, now_ms)
        for node_class, host in self._crashes.recovered(ready, now_ms):
            self.report(f"{node_class} on {host} has recovered")
        ended = [record for record in snapshot.ended if record.name not in self._tasks]
        for record, failed in zip(ended, await self._manager.forget_ended(ended), strict=True):
            self.report(f"{failed}")
            self._note_failure(failed, record.node_class, record.host)
            if self._update is not None:
                self._update.died(failed)

    def _note_stopping(self, name: str) -> None:
        self._crashes.note_stopped(name)

    def _note_failure(self, failed: NodeFailed, node_class: str, host: str) -> None:
        now_ms = clock.now_ms()
        self._crashes.note_failure(failed.name, node_class, host, failed.how, failed.log_tail, now_ms)
        for loop in self._crashes.loops(now_ms):
            if (loop.node_class, loop.host, loop.node) == (node_class, host, failed.name) and loop.failures >= LOOP:
                again = f"again in {loop.again_in_ms / 1000:.0f} s"
                self.report(f"{node_class} keeps failing on {host}, {loop.failures} times in a row; {again}")

    def _start(self, plan: Plan) -> None:
        """The steps of nodes that have none under way. The broker comes first, and alone."""
        outdated: list[PlanStep] = []
        updating = self._update.under_way if self._update is not None else set()
        for step in map(self._as_before, plan.steps):
            if step.name in self._tasks or step.name in updating:
                continue
            if step.kind is StepKind.REPLACE and step.node_class != BROKER:
                if not self._versions.stopped(step.node_class, step.fingerprint):
                    outdated.append(step)
                continue
            if step.node_class != BROKER and BROKER in self._tasks:
                continue
            task = asyncio.create_task(self._carry_out(step), name=f"{step.kind.value} {step.name}")
            self._tasks[step.name] = task
            if step.node_class == BROKER:
                break
        if outdated and self._update is None and BROKER not in self._tasks:
            self._start_update([step for step in outdated if step.node_class == outdated[0].node_class])
        refused = tuple(f"{one.count} of {one.node_class} cannot be: {one.why}" for one in plan.refusals)
        # The texts contain remaining seconds, so only their number shows that something is new.
        if len(refused) != len(self._state.refused):
            for text in refused:
                self.report(text)
        self._state.refused = refused

    def _as_before(self, step: PlanStep) -> PlanStep:
        """While an update is stopped, new workers get the settings before it."""
        known, spec = self._versions.of(step.node_class), self._fleet.classes.get(step.node_class)
        stopped = step.kind is StepKind.SPAWN and self._versions.stopped(step.node_class, step.fingerprint)
        if not stopped or spec is None or known.before is None:
            return step
        before = as_version(spec, known.before)
        fingerprint = self._versions.fingerprint(before, self._fleet, STILL_S)
        self._manager.older[fingerprint] = before
        return replace(step, fingerprint=fingerprint)

    def _start_update(self, steps: list[PlanStep]) -> None:
        node_class = steps[0].node_class
        count = self._scaling.autoscaler.counts.get(node_class, len(steps))
        at_once = max_unavailable(self._manager, self._versions, node_class)
        update = ClassUpdate(self._manager, steps, count, at_once)
        self._update = update
        self.report(f"{node_class}: {len(steps)} are replaced, {update.work.max_unavailable} at a time")
        self._tasks[f"update of {node_class}"] = asyncio.create_task(self._run_update(update, steps))

    async def _run_update(self, update: ClassUpdate, steps: list[PlanStep]) -> None:
        try:
            await update.run()
        finally:
            self._update = None
        self.report(f"{update.node_class}: {update.work.summary()}")
        if update.work.stopped and update.failed:
            with self._versions_file.changing() as versions:
                versions.stop(update.node_class, steps[0].fingerprint, update.work.stopped)
        hosts = {step.name: step.host for step in steps}
        for failed in update.failed:
            self._note_failure(failed, update.node_class, hosts[failed.name])

    async def _carry_out(self, step: PlanStep) -> None:
        failed = await self._manager.carry_out(step)
        if failed is not None:
            self._note_failure(failed, step.node_class, step.host)


# --- One orchestrator at a time: the one that holds the lease of every broker that answers. ---
#
# Another orchestrator stands by, asks again every second, and takes over when the lease is free. If the broker belongs
# to the fleet itself and does not run yet, there is none to ask; then the lock on the folder (`Site.lock`) separates
# two orchestrators of one machine. The orchestrator's events are sent along, into the event feed of the mesh.

#: The name of the lease, and the kind of the events that come with it.
LEASE = "fleet"
#: How many events fit into one message, and characters of each.
LEASE_EVENTS, EVENT_CHARS = 64, 256


class Leadership:
    def __init__(self, connect: Callable[[str], Client]) -> None:
        self._connect = connect
        self._holder = secrets.token_bytes(16)
        self._clients: dict[str, Client] = {}
        self._until = 0.0
        self._unsent: list[str] = []
        #: Why the lease is not ours.
        self.why = ""
        #: How many brokers have answered the last time.
        self.answered = 0

    @property
    def leads(self) -> bool:
        """By our own clock, which started the lease before the brokers did."""
        return time.monotonic() < self._until

    def add_event(self, text: str) -> None:
        self._unsent = [*self._unsent, text[:EVENT_CHARS]][-LEASE_EVENTS:]

    async def renew(self, address: str, promised: Iterable[str], *, acting: bool) -> None:
        """Ask every broker of this address. `promised`: models whose workers are started when a request asks for them.

        `acting`: we have acted until now, with a lease, or without one because no broker answered.
        """
        began, events = time.monotonic(), self._unsent
        models = sorted(promised)[: limits.PROMISED_MODELS]
        lease = m.Lease(0, LEASE, self._holder, limits.LEASE_MS, renewal=acting, promised=models, events=events)
        answers = []
        for host, port in sockets.split_all(address):
            answer = await self._ask(endpoint(host, port), lease)
            answers += [answer] if answer is not None else []
        self.answered = len(answers)
        denied = [answer.by for answer in answers if not answer.granted]
        if denied:
            self._until = 0.0
            self.why = f"{denied[0]} has the lease" if denied[0] else "a broker that has just started grants none yet"
        elif answers:
            self._until = began + limits.LEASE_MS / 1_000
            self._unsent = self._unsent[len(events) :]
        else:
            self.why = "no broker answers"

    async def give_back(self) -> None:
        for client in self._clients.values():
            # If this fails, the lease expires soon.
            with contextlib.suppress(LlamboError):
                await client.lease(m.Lease(0, LEASE, self._holder, 0, events=self._unsent))
            await client.close()
        self._clients.clear()
        self._until = 0.0

    async def _ask(self, address: str, lease: m.Lease) -> LeaseReply | None:
        """None: that broker does not answer."""
        client = self._clients.get(address)
        try:
            if client is None:
                client = self._connect(address)
                await client.connect()
                self._clients[address] = client
            return await client.lease(lease)
        except LlamboError as error:
            if not error.retryable:
                raise  # as for a key that is not an admin's
            lost = self._clients.pop(address, None)
            if lost is not None:
                await lost.close()
            return None
