"""Keys for a world: in one of five its peers have some, and limits with them.

They are drawn beside the plan, so that a world is what it was without them. All clients are admins here, so that they
may attach to each other's requests and drain workers as in any world; limits are the same for admins. Not so where a
hostile worker is (hostile.py): there each client has only what is its own.
"""

from __future__ import annotations

from random import Random

from llambo.mesh.wire.identity import Identity
from tests.sim.faults import FAULTS_END_MS, Plan

#: One world of so many has keys; 0: none.
ONE_OF = 5
#: Enough for the largest request of a world; some have to wait until others are done.
BYTES = (0, 0, 0, 1_500_000)


class Keys:
    def __init__(self, seed: int, plan: Plan, one_of: int = ONE_OF) -> None:
        random = Random(f"keys of {seed}")
        drawn = random.random()
        self.there = one_of > 0 and drawn < 1 / one_of
        #: A worker's key is in the wrong hands.
        self.hostile = self.there and Random(f"hostile in {seed}").random() < 0.5
        #: Of what brokers seal.
        self.marks = b"of all brokers" if self.there else b""
        #: Requests, as a multiple of other worlds: with fewer no request would have to wait.
        self.crowd = 3 if self.there else 1
        #: By the names of wires, which stand for public keys.
        self.now: dict[str, Identity] | None = self._draw(random, plan) if self.there else None
        self.later = self._draw(random, plan)
        #: By the names of clients, which stand for public keys.
        self.names = {key: identity.name for key, identity in self.later.items()}
        self.change_at = random.randint(500, FAULTS_END_MS) if self.there and random.random() < 0.5 else 0

    def _draw(self, random: Random, plan: Plan) -> dict[str, Identity]:
        keys = {f"w{number}": Identity(f"w{number}", "worker") for number in range(plan.workers)}
        if self.hostile:
            keys["evil"] = Identity("evil", "worker")
        people = [
            Identity(
                name,
                "client" if self.hostile else "admin",
                max_in_flight=random.choice((0, 1, 2, 4)),
                max_queued=random.choice((0, 0, 2, 5)),
                max_bytes=random.choice(BYTES),
                per_minute=random.choice((0, 0, 6, 60)),
            )
            for name in ("even", "odd")
        ]
        # The third client has a key of its own, and the name of the first.
        return keys | {f"c{number}": people[number % 2] for number in range(plan.clients)}
