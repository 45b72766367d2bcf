"""What a run of the harness does to its mesh and when: a pure function of its options. One seed, one schedule.

Each kind of fault has a clock of its own, so that taking one out leaves the times of the others alone. A victim gets
time to recover before it is hit again, and one worker at least is always left in peace: a mesh without any worker
keeps no promise but to wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

#: A fault and what it is aimed at.
TARGETS: dict[str, str] = {
    "kill": "worker",  # kill -9 of the agent, of the engine child, or of both
    "stop": "worker",  # SIGSTOP of the agent for longer than its lease, then SIGCONT
    "hang": "worker",  # the engine child is stopped for good: a decode that never returns
    "link": "far worker",  # its network interface is down for a while
    "cut": "near worker",  # its connections are reset
    "hold": "near worker",  # a pulled cable: connections stay, nothing passes
    "halfopen": "near worker",  # nothing passes from the worker to the broker, all passes the other way
    "delay": "near worker",  # whatever passes comes later
    "throttle": "near worker",  # little passes
    "broker": "broker",  # SIGTERM or kill -9, and the same ports again
    "drain": "worker",  # llambo drain, and its undo when it is empty
    "move": "worker",  # llambo drain --move, and its undo when it is empty
    "rolling": "fleet",  # SIGTERM of each worker in turn, the next one when the new one has joined
    "client": "client",  # kill -9 of a client, and another one in its place
    "term": "worker",  # SIGTERM of a worker, and another one in its place
    "poison": "fleet",  # a request that kills whatever engine runs it, among others that do not
    "broker-stop": "broker",  # SIGSTOP of a broker for a while, then SIGCONT
    "gateway": "gateway",  # SIGTERM or kill -9 of a gateway, and the same port again
    "gateway-stop": "gateway",  # SIGSTOP of a gateway for a while, then SIGCONT
    "gateway-cut": "gateway",  # its connections to brokers are reset
}
#: How often a minute, unless set.
RATES: dict[str, float] = {
    "kill": 6, "stop": 3, "hang": 2, "link": 2, "cut": 2, "hold": 1, "halfopen": 1, "delay": 1, "throttle": 1,
    "broker": 1, "drain": 1, "move": 1, "rolling": 0.25, "client": 1, "poison": 0.5,
}  # fmt: skip
#: The same for faults of a mesh with gateways.
GATEWAY_RATES: dict[str, float] = {"broker-stop": 1, "gateway": 4, "gateway-stop": 2, "gateway-cut": 2}
#: And of hosts, which load models on demand.
HOST_RATES: dict[str, float] = {"term": 2}
#: All of them.
USUAL = {**RATES, **GATEWAY_RATES, **HOST_RATES}
#: What one more fault on the same victim has to wait for after the last one is over.
RECOVERY_MS: dict[str, int] = {"worker": 4_000, "broker": 5_000, "client": 1_000, "fleet": 2_000, "gateway": 3_000}
#: No fault begins before all workers have work, and none in the last moments.
QUIET_MS = 2_000
KINDS = ("agent", "engine", "both")


@dataclass(frozen=True, slots=True)
class Fault:
    """`what` is the variety, `amount` what it takes: bytes per second, milliseconds of delay."""

    number: int
    at_ms: int
    kind: str
    victim: int
    length_ms: int = 0
    what: str = ""
    amount: int = 0


@dataclass(frozen=True)
class Plan:
    """All that makes one run differ from another."""

    seed: int = 1
    minutes: float = 1.0
    #: Kind to how often a minute.
    faults: dict[str, float] = field(default_factory=dict)
    brokers: int = 1
    #: With gateways clients are readers over HTTP (`http_load.py`).
    gateways: int = 0
    workers: int = 4
    clients: int = 2
    #: Streams that each client keeps going.
    streams: int = 15
    tokens: tuple[int, int] = (20, 80)
    tokens_per_s: float = 25.0
    engine: str = "fake"
    style: str = "plain"
    slots: int = 32
    lease_ms: int = 2_000
    stall_ms: int = 2_000
    drain_ms: int = 10_000
    #: How a broker is ended: term, kill, or either.
    broker_ends: tuple[str, ...] = ("term", "kill")
    #: All workers in namespaces (`far`), all behind proxies (`near`), or what the faults need.
    places: str = "mixed"
    #: Which of several brokers is never harmed.
    spared_broker: int = -1
    #: MiB of each model; none: a worker has one model, and that from its start. With models workers are hosts.
    models: tuple[int, ...] = ()
    #: Of each host, how long a model of 40 MiB takes to load, and how long a request may wait.
    budget_mib: int = 0
    load_ms: int = 0
    queue_ms: int = 600_000

    def place(self, worker: int) -> str:
        """far: a namespace of its own; near: behind a proxy; here: neither."""
        if self.places != "mixed":
            return self.places
        wanted = {TARGETS[kind].split()[0] for kind in self.faults} & {"far", "near"}
        order = [place for place in ("far", "near") if place in wanted]
        return order[worker % len(order)] if order else "here"


class _Calendar:
    """Which targets are under a fault, and until when."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.busy: dict[str, list[tuple[int, int]]] = {}

    def _free(self, name: str, start: int, end: int) -> bool:
        return all(end <= begun or over <= start for begun, over in self.busy.get(name, []))

    def victim(self, fault: Fault, random: Random) -> int | None:
        """A target without another fault in that time; None if there is none."""
        target = TARGETS[fault.kind]
        group = target.split()[-1]
        until = fault.at_ms + fault.length_ms + RECOVERY_MS[group]
        names = self._names(target)
        free = [name for name in names if self._free(name, fault.at_ms, until)]
        if group == "worker":
            at_peace = [w for w in range(self._plan.workers) if self._free(f"worker {w}", fault.at_ms, until)]
            if len(at_peace) < 2 or not self._free("fleet 0", fault.at_ms, until):
                return None
        if not free:
            return None
        name = random.choice(free)
        self.busy.setdefault(name, []).append((fault.at_ms, until))
        if group == "fleet":
            for worker in range(self._plan.workers):
                self.busy.setdefault(f"worker {worker}", []).append((fault.at_ms, until))
        return int(name.split()[-1])

    def _names(self, target: str) -> list[str]:
        plan = self._plan
        match target:
            case "worker":
                return [f"worker {worker}" for worker in range(plan.workers)]
            case "far worker" | "near worker":
                place = target.split()[0]
                return [f"worker {worker}" for worker in range(plan.workers) if plan.place(worker) == place]
            case "broker":
                return [f"broker {broker}" for broker in range(plan.brokers) if broker != plan.spared_broker]
            case "client":
                return [f"client {client}" for client in range(plan.clients)]
            case "gateway":
                return [f"gateway {gateway}" for gateway in range(plan.gateways)]
            case _:
                return ["fleet 0"]


def schedule(plan: Plan) -> list[Fault]:
    """In the order of time. What finds no victim is put off, and dropped when the time is over."""
    wanted: list[Fault] = []
    for kind, rate in sorted(plan.faults.items()):
        random = Random(f"{plan.seed}/{kind}")
        for at_ms in _times(random, rate, plan.minutes):
            wanted.append(_draw(random, plan, kind, at_ms))
    calendar, chosen = _Calendar(plan), []
    end = plan.minutes * 60_000 - QUIET_MS
    waiting = sorted(wanted, key=lambda fault: (fault.at_ms, fault.kind))
    while waiting:
        fault = waiting.pop(0)
        random = Random(f"{plan.seed}/{fault.kind}/{fault.at_ms}/victim")
        victim = calendar.victim(fault, random)
        if victim is not None:
            chosen.append(replace(fault, victim=victim))
        elif fault.at_ms + 250 < end:
            waiting.append(replace(fault, at_ms=fault.at_ms + 250))
            waiting.sort(key=lambda later: (later.at_ms, later.kind))
    chosen.sort(key=lambda fault: (fault.at_ms, fault.kind))
    return [replace(fault, number=number) for number, fault in enumerate(chosen)]


def _times(random: Random, rate: float, minutes: float) -> list[int]:
    """As many as the rate says, each somewhere in its own share of the time."""
    count = round(rate * minutes)
    begin, end = QUIET_MS, minutes * 60_000 - QUIET_MS
    if count <= 0 or end <= begin:
        return []
    share = (end - begin) / count
    return [int(begin + share * (number + random.random())) for number in range(count)]


def _draw(random: Random, plan: Plan, kind: str, at_ms: int) -> Fault:
    fault = Fault(0, at_ms, kind, 0)
    match kind:
        case "kill":
            return replace(fault, what=random.choice(KINDS))
        case "stop":
            # Past the lease, so that it wakes up as a zombie: its connections are still there (its kernel has answered
            # for it), and its first messages are received, and refused.
            return replace(fault, length_ms=plan.lease_ms + random.randint(200, 700))
        case "hang":
            return replace(fault, length_ms=plan.stall_ms)
        case "link":
            return replace(fault, length_ms=random.choice((800, 2_500, 4_000, 8_000)))
        case "cut":
            return replace(fault, what=random.choice(("both", "control", "tokens")))
        case "hold" | "halfopen":
            return replace(fault, length_ms=random.choice((600, 1_200, 3_000, 5_000)),
                           what=random.choice(("both", "both", "control", "tokens")))  # fmt: skip
        case "delay":
            return replace(fault, length_ms=random.randint(2_000, 6_000), amount=random.randint(100, 900))
        case "throttle":
            return replace(fault, length_ms=random.randint(2_000, 6_000), amount=random.choice((5_000, 20_000)))
        case "broker":
            return replace(fault, what=random.choice(plan.broker_ends), length_ms=random.choice((0, 0, 500, 2_000)))
        case "broker-stop" | "gateway-stop":
            return replace(fault, length_ms=random.choice((500, 2_500, 6_000, 14_000)))
        case "gateway":
            return replace(
                fault, what=random.choice(("kill", "kill", "term")), length_ms=random.choice((0, 500, 3_000))
            )
        case "gateway-cut":
            return replace(fault, what=random.choice(("both", "control", "tokens")))
        case "drain" | "move":
            return replace(fault, length_ms=4_000)
        case "term":
            return replace(fault, length_ms=plan.drain_ms)
        case "rolling":
            return replace(fault, length_ms=4_000 * plan.workers)
        case _:
            return fault


# --- what is asked for -------------------------------------------------------------------------------

#: The shows, each by one command. `minutes` is what the whole count takes.
PRESETS: dict[str, dict[str, Any]] = {
    "kills": {"minutes": 18.0, "faults": {"kill": 60.0}, "workers": 6, "tokens": (30, 60), "streams": 20},
    "broker": {"minutes": 12.0, "faults": {"broker": 9.0}, "streams": 100, "tokens": (60, 140), "slots": 128},
    "two-brokers": {"minutes": 6.0, "faults": {"broker": 9.0}, "brokers": 2, "broker_ends": ("kill",)},
    "freeze": {"minutes": 9.0, "faults": {"stop": 12.0}, "lease_ms": 700, "style": "wander",
               "tokens_per_s": 50.0, "tokens": (100, 300)},
    "hang": {"minutes": 9.0, "faults": {"hang": 6.0}},
    "links": {"minutes": 12.0, "faults": {"link": 9.0}, "places": "far"},
    "rolling": {"minutes": 12.0, "faults": {"rolling": 2.2}},
    "move": {"minutes": 9.0, "faults": {"move": 3.0}},
    "poison": {"minutes": 1.0, "faults": {"poison": 6.0}},
    "mixed": {"minutes": 30.0, "faults": dict(RATES)},
    "http": {"minutes": 30.0, "gateways": 2, "workers": 4, "clients": 2, "streams": 24, "tokens": (40, 160),
             "tokens_per_s": 40.0, "slots": 32,
             "faults": {"kill": 6.0, "stop": 2.0, "cut": 2.0, "broker": 2.0, **GATEWAY_RATES}},
    "models": {"minutes": 20.0, "brokers": 2, "workers": 4, "clients": 2, "streams": 10, "tokens": (10, 60),
               "slots": 2, "tokens_per_s": 80.0, "models": (40, 44, 48, 40, 56, 40, 44, 60, 40, 48), "budget_mib": 130,
               "load_ms": 300, "queue_ms": 60_000, "drain_ms": 5_000,
               "faults": {"kill": 10.0, "broker": 2.0, "client": 1.0, **HOST_RATES}},
    "llama": {"minutes": 10.0, "engine": "llama", "workers": 2, "clients": 2, "streams": 3, "slots": 8,
              "tokens": (20, 60), "stall_ms": 5_000,
              "faults": {"kill": 2.0, "stop": 1.0, "hang": 1.0, "cut": 1.0, "drain": 0.5, "client": 0.5}},
}  # fmt: skip


def parse_faults(text: str) -> dict[str, float]:
    """`kill,stop=3`: names, and how often a minute where that is not to be the usual."""
    faults: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        name, _, rate = word.partition("=")
        if name not in TARGETS:
            raise ValueError(f"there is no fault {name!r}; there is: {', '.join(TARGETS)}")
        faults[name] = float(rate) if rate else USUAL[name]
    return faults
