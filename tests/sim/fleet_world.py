"""A fleet in virtual time: requests come, wait and are served; workers start, finish and fail; hosts go away.

The real cores decide: the autoscaler, the plan and its placement, and the book of crashes. What is imitated is what
they look at. Requests of a class are counted and not followed one by one, and are spread over its ready workers
evenly, as the broker does; so a second of ten thousand workers costs as much as one of ten.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from llambo.fleet.decide import plan
from llambo.fleet.decide.autoscale_core import Autoscaler, ClassLoad
from llambo.fleet.decide.crashes_core import Crashes
from llambo.fleet.decide.plan import Placement
from llambo.fleet.model import Fleet, HostFacts, Node, NodeClass, NodeState, World

#: So often everything is looked at.
STEP_MS = 1_000
#: A worker that drains gives away what it runs, and is gone after this.
LEAVE_MS = 2_000

#: Slots that the requests of a moment would fill, if there were enough.
Load = Callable[[int], float]


@dataclass(slots=True)
class Worker:
    node: Node
    #: The same in its other states.
    ready: Node
    draining: Node
    ready_at: int
    #: It fails then: while it starts, or later; None: it does not.
    dies_at: int | None = None
    leaves_at: int | None = None


@dataclass(slots=True)
class Moment:
    now_ms: int
    load: float
    wanted: int
    there: int
    slots: int
    busy: float
    waiting: float


@dataclass(slots=True)
class Rules:
    """What the world is like."""

    service_ms: int = 8_000
    start_ms: tuple[int, int] = (5_000, 20_000)
    #: Arrivals are by chance, as of many independent clients.
    chance: bool = True
    #: Of those that start, how many in a thousand fail instead.
    bad_starts: int = 0
    #: A worker lives so long on average; 0: for ever.
    life_ms: int = 0
    #: Hosts on which nothing ever gets ready.
    bad_hosts: frozenset[str] = frozenset()
    #: Host, and from when to when it is away, with all that ran there.
    outages: list[tuple[str, int, int]] = field(default_factory=list)


class FleetWorld:
    """One class of workers in `fleet`, and its load."""

    def __init__(self, fleet: Fleet, hosts: dict[str, HostFacts], load: Load, rules: Rules, seed: int) -> None:
        (self.kept,) = fleet.classes.values()
        self.fleet, self.hosts, self.load, self.rules = fleet, hosts, load, rules
        self.chance = random.Random(seed)
        self.scaler = Autoscaler([self.kept])
        self.crashes = Crashes()
        self.workers: dict[str, Worker] = {}
        self.now_ms = 0
        self.busy = self.waiting = 0.0
        self.done = self.came = 0.0
        self.waited_ms = 0
        #: When those that wait have come, and how many then.
        self.waiting_since: deque[list[float]] = deque()
        self.moments: list[Moment] = []
        self.story: list[str] = []
        self.begun = 0
        #: Instants at which something becomes of a worker.
        self.due: list[int] = []
        self.changed = True
        self.missing = False
        self.slots_ready = 0
        self.world = World()
        self.seen = ClassLoad(node_class=self.kept.name, workers=0)

    def begin_with(self, count: int) -> None:
        """All ready, as if they had always been there."""
        made = plan.make(self.fleet, self._world(), plan.Wanted(counts={self.kept.name: count}))
        assert not made.refusals, made.refusals
        for step in made.steps:
            self._spawn(step.name, step.host)
            self.workers[step.name].ready_at = 0
        self.busy = min(self.load(0), len(self.workers) * self.kept.slots)

    def run(self, until_ms: int) -> None:
        while self.now_ms < until_ms:
            self.now_ms += STEP_MS
            self._fail()
            if self.changed:
                self._look()
            self._serve()
            self._decide()
            counted = self.scaler.counts.get(self.kept.name, 0)
            self.moments.append(
                Moment(
                    self.now_ms,
                    self.load(self.now_ms),
                    counted,
                    len(self.workers),
                    self.slots_ready,
                    self.busy,
                    self.waiting,
                )
            )

    # --- what happens ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """A second of requests: some are done, some come, and what waits moves up."""
        share = 1 - math.exp(-STEP_MS / self.rules.service_ms)
        finished = min(self._about(self.busy * share), self.busy)
        came = self._about(self.load(self.now_ms) * share)
        self.done += finished
        self.came += came
        if came:
            self.waiting_since.append([self.now_ms, came])
        present = self.busy - finished + self.waiting + came
        self.busy = min(present, self.slots_ready)
        self.waiting = present - self.busy
        # What runs on a worker that is lost goes to the front again, so the queue may be longer than those in it.
        leave = max(0.0, sum(count for _, count in self.waiting_since) - self.waiting)
        while leave > 0 and self.waiting_since:
            first = self.waiting_since[0]
            taken = min(first[1], leave)
            first[1] -= taken
            leave -= taken
            if first[1] <= 0:
                self.waiting_since.popleft()
        self.waited_ms = self.now_ms - int(self.waiting_since[0][0]) if self.waiting and self.waiting_since else 0

    def _about(self, mean: float) -> float:
        if not self.rules.chance or mean <= 0:
            return max(mean, 0.0)
        if mean > 50:
            return max(0.0, round(self.chance.gauss(mean, math.sqrt(mean))))
        edge, count, product = math.exp(-mean), 0, self.chance.random()
        while product > edge:
            count, product = count + 1, product * self.chance.random()
        return count

    def _fail(self) -> None:
        away = {host for host, since, until in self.rules.outages if since <= self.now_ms < until}
        for host, facts in self.hosts.items():
            if (host in away) != bool(facts.away):
                self.hosts[host] = replace(facts, away="no route to it" if host in away else "")
                self.tell(f"{host} {'is away' if host in away else 'is back'}")
                self.workers = {name: one for name, one in self.workers.items() if one.node.host not in away}
                self.changed = True
        while self.due and self.due[0] <= self.now_ms:
            heappop(self.due)
            self.changed = True
        for name, worker in list(self.workers.items()) if self.changed else ():
            if worker.dies_at is not None and worker.dies_at <= self.now_ms:
                del self.workers[name]
                self.crashes.note_failure(
                    name, self.kept.name, worker.node.host, "ended with status 1", "", self.now_ms
                )
            elif worker.leaves_at is not None and worker.leaves_at <= self.now_ms:
                del self.workers[name]
                self.crashes.note_stopped(name)

    # --- what is done about it -----------------------------------------------------------------------------

    def _decide(self) -> None:
        seen = replace(
            self.seen, busy=round(self.busy), waiting=round(self.waiting), waited_ms=self.waited_ms,
            done=round(self.done),
        )  # fmt: skip
        decisions = self.scaler.handle([seen], self.now_ms)
        for decision in decisions:
            self.tell(f"{decision.was} -> {decision.wanted}: {decision.why}")
        if decisions or self.changed or self.missing:
            # What is done now is seen in the next second.
            self.changed = self._apply()

    def _look(self) -> None:
        """What there is, after something has changed."""
        self.world = world = self._world()
        serving = {node.name: (node.node_class, node.host) for node in world.nodes if node.state is NodeState.READY}
        for name in serving:
            self.crashes.note_ready(name, self.now_ms)
        self.crashes.recovered(serving, self.now_ms)
        counting = sum(node.counts for node in world.nodes)
        room = Placement(world.hosts, world.nodes).fit(self.kept, self.kept.max)
        self.seen = ClassLoad(node_class=self.kept.name, workers=counting, room=room)
        self.missing = counting != self.scaler.counts.get(self.kept.name, counting)
        self.slots_ready = len(serving) * self.kept.slots

    def _apply(self) -> bool:
        wanted = plan.Wanted(
            counts=self.scaler.counts,
            blocked=self.crashes.blocked(self.now_ms),
            probing=self.crashes.probing(self.now_ms),
        )
        made = plan.make(self.fleet, self.world, wanted)
        for step in made.steps:
            worker = self.workers.get(step.name)
            if step.kind is plan.StepKind.SPAWN:
                self._spawn(step.name, step.host)
            elif step.kind is plan.StepKind.RESUME:
                assert worker is not None
                worker.leaves_at = None
            elif worker is not None and worker.leaves_at is None:
                worker.leaves_at = self.now_ms + LEAVE_MS
                heappush(self.due, worker.leaves_at)
        return bool(made)

    def _spawn(self, name: str, host: str) -> None:
        rules, kept = self.rules, self.kept
        self.begun += 1
        ready_at = self.now_ms + self.chance.randint(*rules.start_ms)
        dies_at = None
        if host in rules.bad_hosts or self.chance.randrange(1_000) < rules.bad_starts:
            dies_at = self.chance.randint(self.now_ms + 1, ready_at)
        elif rules.life_ms:
            dies_at = ready_at + int(self.chance.expovariate(1 / rules.life_ms))
        node = Node(
            name=name, node_class=kept.name, host=host, fingerprint=kept.fingerprint(), state=NodeState.STARTING,
            slots=kept.slots, memory_bytes=kept.memory_bytes, cores=kept.cores, begun_ms=self.now_ms,
        )  # fmt: skip
        ready, draining = (replace(node, state=state) for state in (NodeState.READY, NodeState.DRAINING))
        self.workers[name] = Worker(node, ready, draining, ready_at, dies_at)
        for at in (ready_at, dies_at):
            if at is not None:
                heappush(self.due, at)

    # --- what is seen --------------------------------------------------------------------------------------

    def _world(self) -> World:
        nodes = (
            one.draining if one.leaves_at is not None else one.node if one.ready_at > self.now_ms else one.ready
            for one in self.workers.values()
        )
        return World(tuple(nodes), self.hosts)

    def tell(self, text: str) -> None:
        self.story.append(f"{self.now_ms / 1000:8.0f} s  {text}")


def same_hosts(count: int, each: int, kept: NodeClass) -> dict[str, HostFacts]:
    """Hosts with room for `each` of that class."""
    facts = HostFacts(kept.memory_bytes * each, kept.cores * each)
    return {f"host-{number}": facts for number in range(count)}
