"""The identity of a peer, and what it may do.

With keys each connection proves that it has one, and the keyring has its identity. Without keys every peer that reaches
the ports is `ANYONE`, and may do everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llambo.mesh.wire import limits
from llambo.mesh.wire.messages import Priority

Role = Literal["client", "worker", "admin", "anyone"]

#: The ZAP domains of a broker: ZeroMQ passes one when it asks whether to accept a connection.
CLIENT_DOMAIN, WORKER_DOMAIN = "llambo.client", "llambo.worker"
#: Highest first. An identity may not use those before its `priority_max`.
PRIORITIES: tuple[Priority, ...] = ("interactive", "normal", "batch")


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """The entry of one key in the keyring. A limit of 0 means that there is none."""

    name: Annotated[str, Meta(max_length=limits.NAME_CHARS)]
    role: Role
    #: Requests on workers at a time.
    max_in_flight: Annotated[int, Meta(ge=0)] = 0
    #: Requests in the queue at a time.
    max_queued: Annotated[int, Meta(ge=0)] = 0
    #: Bytes of prompts and answers in memory at a time.
    max_bytes: Annotated[int, Meta(ge=0)] = 0
    #: New requests in a minute.
    per_minute: Annotated[int, Meta(ge=0)] = 0
    priority_max: Priority = "interactive"
    #: Patterns for the models it may use; empty: all.
    models: tuple[str, ...] = ()

    @property
    def may_ask(self) -> bool:
        return self.role != "worker"

    @property
    def may_serve(self) -> bool:
        return self.role in ("worker", "anyone")

    @property
    def may_manage(self) -> bool:
        """May drain workers, and see and cancel the requests of others."""
        return self.role in ("admin", "anyone")

    def owns(self, owner: str) -> bool:
        """True if it may see what belongs to `owner`."""
        return self.may_manage or owner == self.name

    def may_be_called(self, worker: str) -> bool:
        """True if it may run a worker with this name: the name of its key, or that name and more after a dash."""
        return self.role == "anyone" or worker == self.name or worker.startswith(self.name + "-")

    def may_use(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    def may_come_as(self, priority: Priority) -> bool:
        return PRIORITIES.index(priority) >= PRIORITIES.index(self.priority_max)


ANYONE = Identity("", "anyone")


@dataclass(frozen=True, slots=True)
class Pair:
    """A key pair. The secret half is not shown in logs or tracebacks."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class PeerKey:
    """The key of a client or worker."""

    address: str
    #: The public key of the broker, which proves that it has the secret half.
    broker: str
    name: str
    role: Role
    pair: Pair
