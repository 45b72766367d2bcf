"""`python -m tests.sim.fleet --nodes 10000`: the autoscaler over simulated nodes, and how well it did.

Each scenario is a load as a function of time. What is owed:

- It turns round at most once for each time that the load does.
- Its cost stays near that of an oracle, who knows the load beforehand and has exactly as many workers as keep it at
  `high`, at once and without a start; the figures are printed.
- When the load has settled it is served: nothing waits.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from llambo.fleet.model import Fleet, HostFacts, NodeClass, Scaling
from tests.sim.fleet_world import FleetWorld, Load, Rules, same_hosts

MINUTE = 60_000
HOUR = 60 * MINUTE
SLOTS = 4
#: Workers on a host.
EACH = 25


@dataclass(slots=True)
class Scenario:
    load: Load
    #: How often the load turns round, at most.
    turns: int
    until_ms: int
    rules: Rules = field(default_factory=Rules)
    scaling: Scaling = field(default_factory=Scaling)
    #: Workers at the beginning, of which those of the load would be a part.
    start: int = 0
    least: int = 1
    #: The first instant from which nothing may wait.
    served_ms: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    world: FleetWorld
    turns: int
    allowed: int
    #: Worker-seconds for one of the oracle's, and how long a request waited on average.
    cost: float
    wait_ms: float
    most: int
    wrong: list[str]
    seconds: float

    def line(self) -> str:
        return (
            f"{self.name:<14} {self.most:>7} {self.turns:>5} of {self.allowed:<3} {self.cost:>6.2f} "
            f"{self.wait_ms / 1000:>8.2f} s {self.world.begun:>8} {self.seconds:>7.1f} s  "
            f"{'; '.join(self.wrong) or 'ok'}"
        )


HEAD = f"{'scenario':<14} {'largest':>7} {'turns':>9}    {'cost':>6} {'mean wait':>10} {'begun':>8} {'took':>9}"


def steps(*parts: tuple[int, float]) -> Load:
    """Level after level: until when, and what."""
    return lambda now_ms: next((level for until, level in parts if now_ms < until), parts[-1][1])


def daily(nodes: int) -> Load:
    """From a tenth to six tenths of all slots and back, once a day; a day lasts eight hours here."""
    top = 0.6 * nodes * SLOTS
    return lambda now_ms: top * (7 - 5 * math.cos(2 * math.pi * now_ms / (8 * HOUR))) / 12


def spikes(nodes: int) -> Load:
    """A tenth of the slots, and for ten minutes of each hour half of them."""
    return lambda now_ms: nodes * SLOTS * (0.5 if HOUR // 2 <= now_ms % HOUR < HOUR // 2 + 10 * MINUTE else 0.1)


def of(nodes: int) -> dict[str, Callable[[], Scenario]]:
    slots = nodes * SLOTS
    third, half = slots / 3, 0.4 * slots
    hosts = max(2, nodes // EACH + 1)
    return {
        "still": lambda: Scenario(lambda _: third, 0, 2 * HOUR, start=round(third / SLOTS / 0.5)),
        # A tenth of the workers at 30 %, then so much that it takes five times as many more, then less than a fifth.
        "as planned": lambda: Scenario(
            steps((HOUR, 0.03 * slots), (2 * HOUR, 0.31 * slots), (3 * HOUR, 0.105 * slots)), 1, 3 * HOUR,
            Rules(chance=False), Scaling(shrink_by=nodes // 5), start=nodes // 10, served_ms=HOUR + 10 * MINUTE,
        ),
        "daily": lambda: Scenario(daily(nodes), 3, 16 * HOUR, start=nodes // 5),
        "spikes": lambda: Scenario(spikes(nodes), 8, 4 * HOUR, start=nodes // 5),
        "slow starts": lambda: Scenario(
            steps((HOUR, slots / 10), (2 * HOUR, half), (4 * HOUR, slots / 20)), 2, 4 * HOUR,
            Rules(start_ms=(2 * MINUTE, 4 * MINUTE)), start=nodes // 5, served_ms=90 * MINUTE,
        ),
        "short requests": lambda: Scenario(
            steps((HOUR, slots / 10), (2 * HOUR, half), (4 * HOUR, slots / 20)), 2, 4 * HOUR, Rules(service_ms=500),
            start=nodes // 5, served_ms=HOUR + 10 * MINUTE,
        ),
        "failing hosts": lambda: Scenario(
            lambda _: third, 0, 3 * HOUR,
            Rules(
                bad_hosts=frozenset({"host-0"}),
                outages=[(f"host-{one}", 30 * MINUTE, HOUR) for one in range(1, max(2, hosts // 5))],
            ),
            start=0, served_ms=2 * HOUR,
        ),
        "flapping": lambda: Scenario(
            lambda _: third, 0, 2 * HOUR,
            Rules(life_ms=20 * MINUTE * max(1, nodes // 1000), bad_starts=200), start=0, served_ms=HOUR,
        ),
        "from zero": lambda: Scenario(
            steps((10 * MINUTE, 0), (HOUR, third), (3 * HOUR, 0)), 2, 3 * HOUR, least=0, served_ms=30 * MINUTE,
        ),
    }  # fmt: skip


def fleet_of(nodes: int, scenario: Scenario) -> tuple[Fleet, dict[str, HostFacts]]:
    """Hosts have room for a quarter more than the class may have."""
    names = [f"host-{number}" for number in range(max(2, nodes // EACH * 5 // 4 + 1))]
    kept = NodeClass(
        name="tiny", slots=SLOTS, memory_bytes=600 << 20, cores=1.0, hosts=tuple(names), min=scenario.least, max=nodes,
        scaling=scenario.scaling,
    )  # fmt: skip
    return Fleet(classes={"tiny": kept}), same_hosts(len(names), EACH, kept)


def run(name: str, nodes: int, seed: int = 0) -> Outcome:
    began = time.perf_counter()
    scenario = of(nodes)[name]()
    fleet, hosts = fleet_of(nodes, scenario)
    world = FleetWorld(fleet, hosts, scenario.load, scenario.rules, seed)
    if scenario.start:
        world.begin_with(scenario.start)
    world.run(scenario.until_ms)
    return judge(name, world, scenario, time.perf_counter() - began)


def judge(name: str, world: FleetWorld, scenario: Scenario, seconds: float) -> Outcome:
    kept = world.kept
    oracle = sum(max(kept.min, math.ceil(100 * one.load / (kept.scaling.high_percent * kept.slots)))
                 for one in world.moments)  # fmt: skip
    cost = sum(one.there for one in world.moments) / max(oracle, 1)
    wait_ms = 1_000 * sum(one.waiting for one in world.moments) / max(world.came, 1)
    turned = turns([one.wanted for one in world.moments])
    wrong = []
    if turned > scenario.turns:
        wrong.append(f"it turned {turned} times")
    if most := max((one.wanted for one in world.moments), default=0) > kept.max:
        wrong.append(f"{most} are more than {kept.max}")
    late = [one for one in world.moments if scenario.served_ms and one.now_ms >= scenario.served_ms and one.waiting]
    if len(late) > len(world.moments) // 100:
        wrong.append(f"something waits in {len(late)} seconds, from {late[0].now_ms / 1000:g} s on")
    largest = max(one.there for one in world.moments)
    return Outcome(name, world, turned, scenario.turns, cost, wait_ms, largest, wrong, seconds)


def turns(wanted: list[int]) -> int:
    """How often the number went up after it had gone down, or down after up."""
    changes = [after - before for before, after in pairwise(wanted) if after != before]
    return sum((one > 0) != (other > 0) for one, other in pairwise(changes))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.fleet")
    parser.add_argument("--nodes", type=int, default=1_000, help="most workers of the class")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each scenario")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", metavar="SCENARIO", choices=list(of(10)), help="one scenario")
    parser.add_argument("--story", action="store_true", help="print what was decided, and why")
    args = parser.parse_args()
    print(HEAD)
    bad = 0
    for seed in range(args.first, args.first + args.seeds):
        for name in [args.only] if args.only else of(args.nodes):
            outcome = run(name, args.nodes, seed)
            print(outcome.line(), flush=True)
            bad += bool(outcome.wrong)
            if args.story:
                print("\n".join(outcome.world.story[:200]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
