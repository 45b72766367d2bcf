"""What a broker can be told, as one immutable value that its core is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llambo.mesh.wire.errors import Code, LlamboError

#: Beats a peer may miss within its lease. With fewer, one delayed packet would end a session.
LEASE_BEATS = 3


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    #: What this broker calls itself in a welcome.
    name: str = "broker"
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
    #: A request that another broker had is kept from dispatch for so long: a worker may run it still.
    adopt_ms: int = 1_000
    #: How long a run that has lost its broker is remembered.
    orphan_ms: int = 30_000
    #: A broker that has begun so recently does not know yet what it will know in a moment: it does not refuse it.
    young_ms: int = 5_000
    #: END overtakes the last tokens by a moment; wait so long before asking for them again.
    tail_grace_ms: int = 10
    #: What must be acknowledged is sent again after so long.
    resend_ms: int = 500
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
    #: How long a finished detached result is kept.
    detached_ms: int = 3_600_000
    #: Ends of finished requests remembered, to answer whoever asks late.
    tombstones: int = 10_000
    #: Engine deaths a request may be aboard of before it is ended, even if none of them could be laid to its charge.
    engine_failures: int = 10
    #: A worker so many times slower than its peers gets no new work for a while; 0: never.
    slow_factor: int = 8
    #: Retries of a model's requests, after refusals and deaths of engines, that nothing has to be paid for.
    retry_reserve: int = 100
    #: Each request that ends well pays for so much of another retry.
    retry_percent: int = 20
    #: Name of the policy that chooses a worker.
    policy: str = "least-loaded"
    #: Where workers publish tokens. The shell fills it in once the socket is bound.
    tokens_in_port: int = 0
    #: Where clients subscribe to tokens. The shell fills it in once the socket is bound.
    tokens_out_port: int = 0
    #: Entries of the events feed that are kept.
    events: int = 1_000
    #: Samples of how the mesh was, one a second, that are kept.
    samples: int = 300

    @classmethod
    def from_settings(cls, values: Mapping[str, Any]) -> BrokerConfig:
        """From the values of `llambo.mesh.settings.settings`; what is no setting keeps its default."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        # Among the settings plain `name` is the worker's.
        known["name"] = values["broker_name"]
        config = cls(**known)
        for lease in ("lease_ms", "client_lease_ms"):
            if known[lease] < LEASE_BEATS * config.heartbeat_ms:
                least = LEASE_BEATS * config.heartbeat_ms
                text = f"{lease} is {known[lease]}, expected at least {least}: {LEASE_BEATS} x heartbeat_ms"
                raise LlamboError(Code.BAD_SETTING, text)
        return config
