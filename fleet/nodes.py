"""How a node is: what its provider knows of it and what the mesh says, put together. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llambo.fleet.process import Record
from llambo.fleet.world import Node, NodeState

#: A node that is not ready after so long has failed: it loads its model meanwhile.
START_S = 300.0


def node_of(
    record: Record, workers: Mapping[str, dict[str, Any]] | None, now_ms: int, *, since_ms: int, away: str = ""
) -> Node:
    """`since_ms`: when it was begun, or was in the mesh last: from then on it has its time to come. `away`: why its
    host cannot be asked; what is known of it is what was known last."""
    told = (workers or {}).get(record.name)
    state, note = NodeState.READY, f"{record.host} is away" if away else ""
    if told is not None:
        if told["state"] in ("draining", "drained"):
            state = NodeState.DRAINING
        elif told["state"] in ("loading", "joining"):
            state = NodeState.STARTING
    elif workers is not None and record.node_class != "broker":
        # It lives, and the mesh has not heard of it.
        late = now_ms - since_ms > START_S * 1000
        state = NodeState.FAILED if late else NodeState.STARTING
        note = note or (f"it is not in the mesh after {START_S:g} s" if late else "")
    return Node(
        name=record.name, node_class=record.node_class, host=record.host, fingerprint=record.fingerprint, state=state,
        busy=told["busy"] + told["busy_elsewhere"] if told else 0, slots=told["slots"] if told else record.slots,
        memory_bytes=record.memory_bytes, cores=record.cores, begun_ms=record.begun_ms, note=note,
    )  # fmt: skip
