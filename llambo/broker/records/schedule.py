"""Which worker gets a request. It follows from the request and the pool of its lane, and changes only that pool.

A pool holds the workers that could start something now: `pool.free`, any of them in O(1), and the least loaded one.
"""

from __future__ import annotations

from collections.abc import Callable

from llambo.broker.records.pools import Pool
from llambo.broker.records.registry import WorkerEntry
from llambo.broker.records.request import Request

Policy = Callable[[Request, Pool], WorkerEntry | None]


def least_loaded(request: Request, pool: Pool) -> WorkerEntry | None:
    """The smallest share of busy slots, by its speed; among equals the one whose last turn is longest ago."""
    return pool.least_loaded()


def round_robin(request: Request, pool: Pool) -> WorkerEntry | None:
    """Each in turn, of any size."""
    if not pool.free:
        return None
    pool.cursor = (pool.cursor + 1) % len(pool.free)
    return pool.free[pool.cursor]


def random(request: Request, pool: Pool) -> WorkerEntry | None:
    """Any. The chance comes from the request's id, which its client drew."""
    if not pool.free:
        return None
    draw = int.from_bytes(request.id[-6:], "big") + request.run.attempt
    return pool.free[draw % len(pool.free)]


POLICIES: dict[str, Policy] = {"least-loaded": least_loaded, "round-robin": round_robin, "random": random}
