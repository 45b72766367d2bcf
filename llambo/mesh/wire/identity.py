"""Who somebody is, and what that allows.

With keys each connection proves one, and its identity is what the keyring says of it. Without keys everybody who
reaches the ports is `ANYONE`, and may do everything.
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

#: The two doors of a broker, as ZeroMQ calls them when it asks whether to let somebody in (ZAP domains).
CLIENT_DOMAIN, WORKER_DOMAIN = "llambo.client", "llambo.worker"
#: What comes first, first: an identity may be kept from what is before its `priority_max`.
PRIORITIES: tuple[Priority, ...] = ("interactive", "normal", "batch")


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the keyring says of one key. A limit of 0 is none."""

    name: Annotated[str, Meta(max_length=limits.NAME_CHARS)]
    role: Role
    #: Requests with a worker at a time, and waiting at a time.
    max_in_flight: Annotated[int, Meta(ge=0)] = 0
    max_queued: Annotated[int, Meta(ge=0)] = 0
    #: Bytes of prompts and answers held for it at a time.
    max_bytes: Annotated[int, Meta(ge=0)] = 0
    #: New requests in a minute.
    per_minute: Annotated[int, Meta(ge=0)] = 0
    priority_max: Priority = "interactive"
    #: Patterns; with none it may use all.
    models: tuple[str, ...] = ()

    @property
    def may_ask(self) -> bool:
        return self.role != "worker"

    @property
    def may_serve(self) -> bool:
        return self.role in ("worker", "anyone")

    @property
    def may_manage(self) -> bool:
        """Drain workers, and see and cancel what others have asked."""
        return self.role in ("admin", "anyone")

    def owns(self, owner: str) -> bool:
        """Whether what belongs to `owner` is for its eyes."""
        return self.may_manage or owner == self.name

    def may_be_called(self, worker: str) -> bool:
        """A worker's name belongs to its key: its own name, or that and more after a dash."""
        return self.role == "anyone" or worker == self.name or worker.startswith(self.name + "-")

    def may_use(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    def may_come_as(self, priority: Priority) -> bool:
        return PRIORITIES.index(priority) >= PRIORITIES.index(self.priority_max)


ANYONE = Identity("", "anyone")


@dataclass(frozen=True, slots=True)
class Pair:
    """A key pair. The secret half does not show up in logs or tracebacks."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class PeerKey:
    """What a client or a worker holds."""

    address: str
    #: The broker's public key: whoever answers has to have its secret half.
    broker: str
    name: str
    role: Role
    pair: Pair
