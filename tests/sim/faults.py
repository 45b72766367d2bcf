"""What may go wrong, and how often: the documented fault model of the simulator.

    token plane    frames are lost, repeated and reordered at random
    control plane  order is kept; a cut loses everything in flight, and in harsh runs 30 % of bundles are lost too
    links          delay; cuts that both ends notice; partitions that neither end notices; a dead token plane alone
    broker         dies or is stopped, and begins again without a memory
    brokers        one world in four has two: either may die, or be alive and out of reach, of all or of a client
    processes      workers crash (noticed or not), freeze and wake as zombies, or stop in order; engines crash
                   and hang; workers are drained, or emptied; clients vanish, and some read nothing for a while
    poison         a request kills every engine that runs it; sometimes two do
    overload       some brokers have a queue of three, and refuse what does not fit
    keys           in one world of five clients have some, and limits with them, which may change (keys.py)
    clocks         every node's clock is off by its own, large, amount

One run in eight is calm: no faults at all, so that work done for nothing shows. After `FAULTS_END_MS` all
faults are off, processes that are to restart have restarted, and from then on progress is required.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

#: Faults may begin until then; all are over by then.
FAULTS_END_MS = 6_000
#: By then everything must have ended, every END be acknowledged, every worker be idle. One slow worker may be all
#: that is left of the mesh, with ten long answers to give: most runs settle within seconds, and stop there.
SETTLED_MS = 150_000


@dataclass(frozen=True)
class Plan:
    """One run's faults, all drawn from its seed."""

    calm: bool
    harsh: bool
    token_loss: float
    token_repeat: float
    token_late: float
    control_loss: float
    workers: int
    clients: int
    requests: int
    style: str
    burst: int
    engine_crashes: bool
    engine_hangs: bool
    queue: int
    brokers: int
    #: Requests that kill whatever engine makes their sixth token.
    poison: int
    #: (at, kind, who, how long)
    incidents: tuple[tuple[int, str, int, int], ...]


WORKER_INCIDENTS = (
    "crash",
    "power loss",
    "freeze",
    "freeze",
    "cut",
    "partition",
    "tokens down",
    "engine crash",
    "leave",
    "drain",
    "move",
)
CLIENT_INCIDENTS = ("cut", "partition", "tokens down", "vanish", "freeze", "stall")


def draw(random: Random, brokers: int = 0) -> Plan:
    """`brokers`: so many, whatever the seed says."""
    calm = random.random() < 0.125
    harsh = not calm and random.random() < 0.3
    workers = random.randint(2, 4)
    clients = random.randint(1, 3)
    incidents: list[tuple[int, str, int, int]] = []
    for _ in range(0 if calm else random.randint(0, 6)):
        at = random.randint(200, FAULTS_END_MS - 1_500)
        length = random.choice((30, 200, 700, 1_400))
        if random.random() < 0.75:
            incidents.append((at, random.choice(WORKER_INCIDENTS), random.randrange(workers), length))
        else:
            incidents.append((at, "client " + random.choice(CLIENT_INCIDENTS), random.randrange(clients), length))
    if not calm and random.random() < 0.3:
        # Frozen beyond its lease in the middle of its work, while its engine runs on: a zombie when it wakes.
        for _ in range(2):
            incidents.append((random.randint(1_000, 3_500), "freeze", random.randrange(workers), 1_400))
    if not calm and random.random() < 0.25:
        for _ in range(random.choice((1, 1, 2))):
            kind = random.choice(("broker crash", "broker restart"))
            incidents.append((random.randint(400, FAULTS_END_MS - 1_500), kind, 0, random.choice((30, 300, 1_200))))
    brokers = brokers or (2 if random.random() < 0.25 else 1)
    if brokers > 1 and not calm:
        for _ in range(random.randint(0, 4)):
            at, length = random.randint(400, FAULTS_END_MS - 1_500), random.choice((30, 300, 1_200))
            kind = random.choice(("broker crash", "broker crash", "broker restart", "broker partition", "client lost"))
            incidents.append((at, kind, random.randrange(clients if kind == "client lost" else brokers), length))
        if random.random() < 0.5:
            # Away and back: a client loses sight of its broker, goes to the other, and that one dies as well.
            at, who, length = random.randint(400, 1_800), random.randrange(clients), random.choice((30, 300, 700))
            incidents.append((at, "client lost", who, length))
            incidents.append((at + random.randint(2_300, 4_000), "client bereft", who, random.choice((300, 1_200))))
    poison = random.choice((1, 1, 1, 2)) if not calm and random.random() < 0.25 else 0
    if not calm and random.random() < 0.2:
        # Engines are killed from outside, one after the other: the requests of the first run on the next.
        at = random.randint(400, FAULTS_END_MS - 2_000)
        incidents += [(at + 25 * turn, "engine crash", turn % workers, 30) for turn in range(2 * workers)]
    if not calm and random.random() < 0.2:
        # One worker after the other, as before an update of each: what runs goes from one to the next.
        at = random.randint(1_000, 2_500)
        for worker in range(workers):
            incidents.append((at + 600 * worker, "move", worker, 500))
    lossy = not calm and random.random() < 0.7
    return Plan(
        calm=calm,
        harsh=harsh,
        token_loss=random.choice((0.01, 0.05, 0.2)) if lossy else 0.0,
        token_repeat=random.choice((0.0, 0.02)) if lossy else 0.0,
        token_late=random.choice((0.0, 0.05)) if lossy else 0.0,
        control_loss=0.3 if harsh else 0.0,
        workers=workers,
        clients=clients,
        requests=random.randint(4, 14),
        style="plain" if random.random() < 0.1 else "wander",
        burst=random.choice((1, 1, 3)),
        engine_crashes=not calm and random.random() < 0.15,
        engine_hangs=not calm and random.random() < 0.1,
        brokers=brokers,
        queue=3 if random.random() < 0.1 else 1_000,
        poison=poison,
        incidents=tuple(incidents),
    )
