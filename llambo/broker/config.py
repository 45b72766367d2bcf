"""The settings of a broker, as one immutable value that its core is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from llambo.mesh.wire.errors import Code, LlamboError

#: Heartbeats a peer may miss within its lease. With fewer, one delayed packet would end a session.
LEASE_BEATS = 3
#: With many sessions each has longer intervals: while nothing runs by so much for each session, with an upper bound.
IDLE_EACH_MS, IDLE_MS = 10, 5_000
#: While something runs, one millisecond for so many, up to this part of the lease.
BUSY_SESSIONS, BUSY_PART = 2, 4


class Intervals(NamedTuple):
    """Intervals of heartbeats: to a worker with runs, from it, and both ways while it has none."""

    ping_ms: int
    beat_ms: int
    idle_ms: int


@dataclass(frozen=True, slots=True)
class Timing:
    #: Pause between two heartbeats to each peer, on both planes.
    heartbeat_ms: int = 200
    #: Pause between two small messages to each worker: a send to a dead one fails at once, so this bounds a stall.
    ping_ms: int = 100
    #: A worker that was silent for so long is given up and its requests move.
    lease_ms: int = 2_000
    #: A client that was silent for so long is gone; its requests are cancelled unless they are detached.
    client_lease_ms: int = 10_000
    #: A worker whose route is gone and that has not come back within this is given up before its lease is out.
    reconnect_grace_ms: int = 300
    #: A request that another broker had is not dispatched for so long: a worker may still run it.
    adopt_ms: int = 1_000
    #: How long a run that has lost its broker is remembered.
    orphan_ms: int = 30_000
    #: The startup grace: for so long after its start a broker defers what it would refuse as unknown.
    startup_grace_ms: int = 5_000
    #: END overtakes the last tokens by a moment; wait so long before asking for them again.
    tail_grace_ms: int = 10
    #: What must be acknowledged is sent again after so long.
    resend_ms: int = 500
    #: How much longer each session makes the interval of workers without runs.
    idle_each_ms: int = IDLE_EACH_MS

    def pace(self, sessions: int) -> Intervals:
        busy_ms = min(sessions // BUSY_SESSIONS, self.lease_ms // BUSY_PART)
        idle_ms = min(sessions * self.idle_each_ms, IDLE_MS)
        beat_ms = max(self.heartbeat_ms, busy_ms)
        return Intervals(max(self.ping_ms, busy_ms), beat_ms, max(beat_ms, idle_ms))


@dataclass(frozen=True, slots=True)
class Bounds:
    #: Requests that may wait. More are refused as busy.
    queue_requests: int = 1_000
    #: Prompt bytes that may wait, together.
    queue_bytes: int = 64 * 2**20
    #: Longest wait in the queue.
    queue_ms: int = 600_000
    #: How long a request waits when no worker serves its model.
    hold_ms: int = 30_000
    #: Bytes of transcripts, reserved when a request is admitted.
    transcript_bytes: int = 256 * 2**20
    #: Bytes of finished detached results; the oldest go first.
    detached_bytes: int = 64 * 2**20
    #: How long a finished detached result is stored.
    detached_ms: int = 3_600_000
    #: Ends of finished requests remembered, to answer late questions.
    tombstones: int = 10_000
    #: Bytes sent to one peer on control that it is not known to have read.
    backlog_bytes: int = 4 * 2**20
    #: Entries of the events feed.
    events: int = 1_000
    #: Samples of the state of the mesh, one a second.
    samples: int = 300


@dataclass(frozen=True, slots=True)
class Faults:
    #: Engine deaths a request may be part of before it is ended, even if it was never proved to be the cause.
    engine_failures: int = 10
    #: A worker so many times slower than its peers gets no new work for a while; 0: never.
    slow_factor: int = 8
    #: A worker that has just joined or loaded is not compared for so long: its machine may be busy with its start.
    settle_ms: int = 10_000
    #: Retries of a model's requests, after refusals and deaths of engines, that are free.
    retry_reserve: int = 100
    #: Each request that ends well pays for this much of another retry.
    retry_percent: int = 20


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    #: What this broker calls itself in a welcome.
    name: str = "broker"
    #: Name of the policy that chooses a worker.
    policy: str = "least-loaded"
    #: Where workers publish tokens, and where clients subscribe. The shell fills them in once the sockets are bound.
    tokens_in_port: int = 0
    tokens_out_port: int = 0
    #: The key of `records/seals.py`, which the shell derives; empty: the mesh has no keys.
    marks_key: bytes = field(default=b"", repr=False)
    timing: Timing = field(default_factory=Timing)
    bounds: Bounds = field(default_factory=Bounds)
    faults: Faults = field(default_factory=Faults)

    @classmethod
    def of(cls, **values: Any) -> BrokerConfig:
        """From the names of the fields, whichever part they are in. What is left out has its default."""
        parts: dict[str, Any] = {"timing": Timing, "bounds": Bounds, "faults": Faults}
        for name, part in parts.items():
            own = {known.name for known in fields(part)}
            parts[name] = part(**{key: values.pop(key) for key in own & values.keys()})
        return cls(**values, **parts)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any]) -> BrokerConfig:
        """From the values of `llambo.mesh.settings.settings`; fields without a setting have their defaults."""
        known = {known.name for part in (cls, Timing, Bounds, Faults) for known in fields(part)} & values.keys()
        # Among the settings plain `name` is the worker's.
        chosen = {name: values[name] for name in known} | {"name": values["broker_name"]}
        if "young_ms" in values:
            chosen["startup_grace_ms"] = values["young_ms"]  # its older name
        config = cls.of(**chosen)
        for lease in ("lease_ms", "client_lease_ms"):
            least = LEASE_BEATS * config.timing.heartbeat_ms
            if values[lease] < least:
                text = f"{lease} is {values[lease]}, expected at least {least}: {LEASE_BEATS} x heartbeat_ms"
                raise LlamboError(Code.BAD_SETTING, text)
        return config
