"""Hosts, which run workers on demand: what each has reported, and what is wanted of it.

A host holds the truth about its models, its memory, and who holds what. A broker has a copy, as of the last report, and
besides only what is not confirmed yet: wishes and holds. The rules are in `broker/placement/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from llambo.broker.records.backlog import Backlog
from llambo.broker.records.registry import Beats, Session, Sessions, WorkerEntry
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import Identity
from llambo.mesh.wire.naming import in_class, with_adapter

#: Before the first report.
NO_REVISION = 0


class Wishes(NamedTuple):
    """What is to be loaded at a host, and what may be unloaded for it, each in this order."""

    load: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()


@dataclass(slots=True)
class ModelUse:
    """What a broker has seen of one model at one host."""

    #: When it was used last, and when its worker had been given its last request.
    used_at: int = 0
    turn: int = 0
    #: When the last load failed, and when it may be tried again; 0: it did not fail, or was loaded since.
    failed_at: int = 0
    retry_at: int = 0


class HostEntry:
    """A host, from its welcome until it is lost."""

    __slots__ = (
        "backlog",
        "beats",
        "files",
        "files_sent",
        "hello",
        "link",
        "memory",
        "models",
        "revision",
        "sent",
        "sent_route",
        "sent_seq",
        "session",
        "usage",
        "wishes",
    )

    def __init__(self, hello: m.HostHello, link: Session, backlog: Backlog) -> None:
        self.hello = hello
        self.link = link
        self.session = link.welcome.session
        self.backlog = backlog
        self.beats = Beats()
        self.revision = NO_REVISION
        #: By the name that the host uses.
        self.models: dict[str, m.HostedModel] = {}
        self.memory: dict[str, m.Memory] = {}
        #: Of models by the name of their source, as reported; and the orders and grants that it was sent last.
        self.files: dict[str, m.HostedFile] = {}
        self.files_sent: tuple[list[m.FileOrder], list[m.FileGrant]] = ([], [])
        self.usage: dict[str, ModelUse] = {}
        #: What is wanted of it, and what it was sent last: over which route, with which sequence number.
        self.wishes = self.sent = Wishes()
        self.sent_route = b""
        self.sent_seq = 0

    @property
    def name(self) -> str:
        return self.hello.name

    def names_of(self, model: m.HostedModel) -> list[str]:
        """All that it can be asked for by: alone and with each adapter, and each once more under the host's class."""
        names = [model.name, *(with_adapter(model.name, adapter) for adapter in model.adapters)]
        return [*names, *(in_class(name, self.hello.node_class) for name in names)]


@dataclass(slots=True)
class PendingHold:
    """A client's order to hold a model, or to give it back, until the host reports that it has been carried out."""

    #: As it was asked for.
    model: str
    #: Empty, with `undo`: all of them, and the model is unloaded.
    holder: str
    since: int
    who: Identity
    ttl_ms: int = 0
    pin: bool = False
    undo: bool = False
    #: Empty: none is chosen yet. `named`: by the client.
    host: str = ""
    named: bool = False
    #: Of the last message about it; 0: none was sent.
    seq: int = 0


@dataclass(slots=True)
class Pull:
    """Hosts that are to have the files of a model."""

    ref: str
    since: int
    #: When a client has asked for it, or about it, last.
    asked_at: int = 0
    #: Rises when it is asked for anew: a host that has failed tries again.
    attempt: int = 0
    hosts: set[str] = field(default_factory=set)
    #: The host that downloads it from outside; and that it does so although others have it, whose bytes are wrong.
    outside: str = ""
    lost_at: int = 0
    because_stuck: bool = False
    #: The hosts that have all of it and give it away, and when the last of them came.
    whole: frozenset[str] = frozenset()
    whole_at: int = 0
    #: By the sessions of the host that gives and of the one that gets.
    tickets: dict[tuple[bytes, bytes], bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Wait:
    """What requests for a model wait for. The story of a request has the text; `note` also has the progress."""

    text: str
    percent: int = -1
    left_ms: int = 0
    #: Only the worker is missing, which has to join.
    joins: bool = False

    @property
    def note(self) -> str:
        if self.percent < 0:
            return self.text
        left = f", about {max(1, round(self.left_ms / 1_000))} s" if self.left_ms else ""
        return f"{self.text}, {self.percent} %{left}"


@dataclass(slots=True)
class Hosts:
    sessions: Sessions[HostEntry] = field(default_factory=Sessions)
    by_name: dict[str, HostEntry] = field(default_factory=dict)
    #: Every name that can be asked for, to the hosts that have it, and the name that they use.
    having: dict[str, dict[str, str]] = field(default_factory=dict)
    #: By the name that is asked for: of each model whose requests wait for more than a slot.
    waits: dict[str, Wait] = field(default_factory=dict)
    holds: list[PendingHold] = field(default_factory=list)
    #: By the name of the model at its source.
    pulls: dict[str, Pull] = field(default_factory=dict)
    #: When they are looked at again.
    pulls_at: int = 0
    #: Since when requests have waited for each name without a pause.
    asked_since: dict[str, int] = field(default_factory=dict)
    #: Workers, by session, that are to get no new requests, because another model is to have the memory of theirs.
    yielding: dict[bytes, WorkerEntry] = field(default_factory=dict)
    #: Something has changed that placement depends on.
    changed: bool = False
    #: When placement was decided last.
    decided_at: int = 0

    def add(self, host: HostEntry) -> None:
        self.sessions.add(host)
        self.by_name[host.name] = host

    def remove(self, host: HostEntry) -> None:
        self.sessions.remove(host)
        del self.by_name[host.name]

    def at(self, model: str) -> Iterator[tuple[HostEntry, m.HostedModel]]:
        """The hosts that have this model, under a name that can be asked for."""
        for host, name in self.having.get(model, {}).items():
            yield self.by_name[host], self.by_name[host].models[name]

    def note(self, model: str) -> str:
        wait = self.waits.get(model)
        return wait.note if wait is not None else ""
