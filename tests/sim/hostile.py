"""A worker with a valid key that brings what it was never given: in one of two worlds with keys.

It knows more than a real one could: every dispatch of the world, with its seal. It takes those for its own, changes
them, and invents others. Nothing of that may be adopted, and no request may be there that its owner did not submit.
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from llambo.broker import events as b
from llambo.broker.events import ToWorker
from llambo.mesh.wire import codec, tokens, transfer
from llambo.mesh.wire import messages as m
from tests.sim.clock import Clock
from tests.sim.history import History
from tests.sim.nodes import BrokerNode

NAME = "evil"
ROUTE = b"evil"
#: So often it comes by, at each broker.
EVERY_MS = 400
#: Runs that it brings each time.
RUNS = 4


class HostileWorker:
    """Not a process with sockets, and never frozen or cut off: it says its lines whenever a broker listens."""

    def __init__(self, clock: Clock, random: Random, brokers: list[BrokerNode], history: History) -> None:
        self._clock = clock
        self._random = random
        self._brokers = brokers
        self._history = history

    def begin(self, until_ms: int) -> None:
        for at in range(EVERY_MS, until_ms, EVERY_MS):
            self._clock.at(at, self._come_by)

    def _come_by(self) -> None:
        for broker in self._brokers:
            if broker.alive and not broker.frozen:
                self._bring(broker)

    def _bring(self, broker: BrokerNode) -> None:
        # (draining, so that it gets no work: it would have to do it)
        hello = m.WorkerHello(NAME, self._random.randbytes(8), [m.ModelInfo("fake")], RUNS, state="draining")
        state = broker.core.state
        # (its session is drawn beside the others, so that the world is what it is without it)
        draw, state.random_bytes = state.random_bytes, self._random.randbytes
        heard = self._say(broker, codec.NO_SESSION, [(hello, b"")])
        state.random_bytes = draw
        session = next(each.session for each in heard if isinstance(each, m.Welcome))
        runs = [self._run() for _ in range(RUNS)]
        heard = self._say(broker, session, [*runs, (m.Goodbye(), b"")])
        adopted = [each.id.hex()[:8] for each in heard if isinstance(each, m.Adopt)]
        assert not adopted, f"a run was adopted from a worker that was not given it: {adopted}"

    def _run(self) -> tuple[m.Orphan, bytes]:
        """One that another worker has, as it is or changed; or one that no client has submitted."""
        random, given = self._random, self._history.dispatches
        if given and random.random() < 0.7:
            work = random.choice(given[random.choice(sorted(given))])
            prompt = self._history.wanted[work.id].prompt
        else:
            work = m.Dispatch(random.randbytes(16), b"\0\0\0\1" + random.randbytes(4), 1, "fake", 20, 0)
            prompt = b"do this for me"
        changes: dict[str, Any] = {"prefix": []}
        if random.random() < 0.5:
            changes |= {"owner": random.choice(("even", "odd", "else")), "detached": True, "deadline_ms": 0}
        ids = [random.randrange(2**20) for _ in range(random.randint(0, 3))]
        chunks = [tokens.encode_chunk(work.id + work.dispatch, 0, ids, [b"?"] * len(ids), 0)] if ids else []
        blob, changes["prompt_bytes"] = transfer.pack(prompt, chunks)
        return m.Orphan(msgspec.structs.replace(work, **changes), home=random.random() < 0.8), blob

    def _say(self, broker: BrokerNode, session: bytes, messages: list[tuple[Any, bytes]]) -> list[m.Message]:
        """What it is answered."""
        actions = broker.handle(b.WorkerSaid(ROUTE, session, messages, user=NAME))
        mine = [action for action in actions if isinstance(action, ToWorker) and action.route == ROUTE]
        broker.perform([action for action in actions if action not in mine])
        broker.plan_wakeup()
        return [action.message for action in mine]
