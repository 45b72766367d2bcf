"""Which model is to be loaded where, what may be unloaded for it, what its requests wait for: a pure function.

Models have their turn in the order in which they were asked for; those that no worker serves come before second copies.
For each, in this order:

    a worker is free, or the model is being loaded   nothing more
    a host has room for it                           load it there
    idle models that are loaded elsewhere as well    load it where these can be unloaded for it
    idle models                                      load it where those can be unloaded that are idle for longest
    models that are in use, if it has waited long    their workers get no new requests until it has had its turn
    otherwise                                        wait

A second copy gets only room that is free. What was wished for before stays where it is as long as that is no worse than
another host by this list. The host has the last word: it keeps to its budget and unloads nothing that is in use, pinned
or held, so that brokers that want different things end in something that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llambo.broker.records.hosts import Wait, Wishes
from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m

#: By kind of memory.
Amounts = dict[str, int]
#: The number of loaded models is limited like a kind of memory of this name, of which each takes one.
_PLACES = ""


@dataclass(frozen=True)
class Asked:
    """A model that requests wait for, or that a client holds and no host has confirmed yet."""

    name: str
    #: Since when.
    since: int = 0
    #: Requests wait, and no worker has a free slot for them.
    waiting: bool = True
    #: A worker serves it. Then this is about a second copy.
    served: bool = False
    #: It has waited so long that models in use have to make room.
    due: bool = False
    #: Only at this host; empty: at any.
    at: str = ""
    #: Whether those who ask may have that other model unloaded: it is not for a key that may not use it.
    may_evict: Callable[[str], bool] = field(default=lambda model: True, compare=False)


@dataclass
class HostView:
    """A host, as it has reported itself, and how its models are used."""

    name: str
    #: By every name that can be asked for.
    models: dict[str, m.HostedModel]
    memory: dict[str, m.Memory]
    #: Of the models that are loaded: when each that is idle was used last, and which are in use.
    idle_since: dict[str, int] = field(default_factory=dict)
    in_use: frozenset[str] = frozenset()
    #: Models whose load has failed, and is not to be tried now.
    failed: frozenset[str] = frozenset()
    #: What was wished for here before.
    wished: frozenset[str] = frozenset()


@dataclass
class Decision:
    wishes: dict[str, Wishes] = field(default_factory=dict)
    #: By host: models in use that are to get no new requests.
    yields: dict[str, list[str]] = field(default_factory=dict)
    #: By the name that is asked for: what its requests wait for.
    waits: dict[str, Wait] = field(default_factory=dict)
    #: Where each of those is, or will be.
    places: dict[Asked, str] = field(default_factory=dict)
    #: Those that no host can load, or not now.
    hopeless: list[Asked] = field(default_factory=list)


class _Way(NamedTuple):
    """A way to load a model at a host. The smallest is the best."""

    unloads: bool
    moved: bool
    #: 0: there is room; 1: models are unloaded that have a twin; 2: idle ones; 3: ones that are in use now.
    grade: int
    #: When the victim was used that was used last.
    used: int
    load_ms: int
    host: str
    victims: tuple[str, ...] = ()


def could_have(model: m.HostedModel, memory: Mapping[str, m.Memory]) -> bool:
    """It fits if nothing else is loaded."""
    return all(name in memory and amount <= memory[name].bytes for name, amount in model.needs.items())


class _Room:
    """The memory of one host, as it will be when all has been done that is decided so far."""

    def __init__(self, host: HostView) -> None:
        self.host = host
        self.load: list[str] = []
        self.evict: list[str] = []
        self.free = {name: memory.bytes - memory.used for name, memory in host.memory.items()}
        self.free[_PLACES] = limits.LOADED_PER_HOST
        self.helpers: Amounts = dict.fromkeys(host.memory, 0)
        for model in {model.name: model for model in host.models.values()}.values():
            if model.state == "unloading":
                _add(self.free, model.needs)
            elif model.state in ("loading", "ready"):
                self.free[_PLACES] -= 1
                self.helped(model)

    def helped(self, model: m.HostedModel, times: int = 1) -> None:
        if model.kind != "generate":
            _add(self.helpers, model.needs, times)

    def take(self, model: m.HostedModel, way: _Way) -> None:
        self.load.append(model.name)
        self.evict += way.victims
        for victim in way.victims:
            there = self.host.models[victim]
            _add(self.free, _needs(there))
            self.helped(there, -1)
        _add(self.free, _needs(model), -1)
        self.helped(model)

    def victims(self, model: m.HostedModel, candidates: Iterable[str]) -> list[str]:
        """As many of the candidates, from the first, as have to be unloaded; none if all are not enough."""
        free, helpers, chosen = dict(self.free), dict(self.helpers), list[str]()
        wanted = _needs(model)
        for name in candidates:
            there = self.host.models[name]
            if _fits(wanted, free) or not self._is_spare(there, model, helpers):
                continue
            chosen.append(name)
            _add(free, _needs(there))
            if there.kind != "generate":
                _add(helpers, there.needs, -1)
        if not _fits(wanted, free):
            return []
        for name in reversed(chosen[:-1]):  # what turns out not to be needed stays
            needs = _needs(self.host.models[name])
            if all(free.get(kind, 0) - amount >= wanted.get(kind, 0) for kind, amount in needs.items()):
                chosen.remove(name)
                _add(free, needs, -1)
        return chosen

    def _is_spare(self, there: m.HostedModel, model: m.HostedModel, helpers: Amounts) -> bool:
        """Embed and rerank models are not unloaded for one that generates while they have no more than their share."""
        if there.kind == "generate" or model.kind != "generate":
            return True
        return any(helpers[kind] > memory.helpers for kind, memory in self.host.memory.items())


def _add(amounts: Amounts, needs: Mapping[str, int], times: int = 1) -> None:
    for name, amount in needs.items():
        amounts[name] = amounts.get(name, 0) + times * amount


def _needs(model: m.HostedModel) -> Amounts:
    return {**model.needs, _PLACES: 1}


def _fits(needs: Mapping[str, int], free: Amounts) -> bool:
    return all(amount <= free.get(name, -1) for name, amount in needs.items())


class _Decider:
    def __init__(self, asked: Sequence[Asked], hosts: Iterable[HostView]) -> None:
        self.rooms = {host.name: _Room(host) for host in hosts}
        self.asked = {each.name for each in asked}
        self.decision = Decision()

    def decide(self, asked: Asked) -> None:
        name, decision = asked.name, self.decision
        there = [
            (room, model)
            for room in self.rooms.values()
            if (model := room.host.models.get(name)) is not None and asked.at in ("", room.host.name)
        ]
        for room, model in there:
            if model.state == "ready" and not (asked.served and asked.waiting):
                decision.places[asked] = room.host.name
                if asked.waiting:
                    decision.waits[name] = Wait(f"for the worker of {name} on {room.host.name} to join", joins=True)
                return
        if asked.served and not asked.waiting:
            return
        for room, model in there:
            if model.state == "loading" or model.name in room.load:
                decision.places[asked] = room.host.name
                if model.state == "loading":
                    left_ms = model.load_ms * (100 - model.percent) // 100
                    decision.waits[name] = Wait(f"loading {name} on {room.host.name}", model.percent, left_ms)
                return
        self._place(asked, there)

    def _place(self, asked: Asked, there: list[tuple[_Room, m.HostedModel]]) -> None:
        name, decision = asked.name, self.decision
        able = [
            (room, model)
            for room, model in there
            if could_have(model, room.host.memory) and model.name not in room.host.failed
        ]
        ways = [(way, room, model) for room, model in able if (way := self._way(room, model, asked)) is not None]
        best: _Way | None = None
        if ways:
            best, room, model = min(ways, key=lambda each: each[0])
            self._take(asked, best, room, model)
        if asked.served:
            return
        if best is not None and best.victims:
            decision.waits[name] = Wait(f"until {', '.join(best.victims)} is unloaded on {best.host} for {name}")
        elif best is not None:
            decision.waits[name] = Wait(f"{best.host} is about to load {name}")
        elif able:
            where = ", ".join(sorted(room.host.name for room, _ in able))
            decision.waits[name] = Wait(f"for memory on {where}: what is loaded there is in use or held")
        else:
            decision.hopeless.append(asked)

    def _take(self, asked: Asked, way: _Way, room: _Room, model: m.HostedModel) -> None:
        room.take(model, way)
        self.decision.places[asked] = way.host
        if way.grade == 3:
            in_use = [victim for victim in way.victims if victim in room.host.in_use]
            self.decision.yields.setdefault(way.host, []).extend(in_use)

    def _way(self, room: _Room, model: m.HostedModel, asked: Asked) -> _Way | None:
        """The best way to load it at this host; None: there is none now."""
        host = room.host
        if model.state not in ("stored", "failed"):
            return None
        moved = model.name not in host.wished
        if _fits(_needs(model), room.free):
            return _Way(False, moved, 0, 0, model.load_ms, host.name)
        if asked.served:
            return None
        idle = [name for name in host.idle_since if self._may_go(room, name, asked)]
        idle.sort(key=lambda name: (not self._has_twin(name, host.name), host.idle_since[name], name))
        victims = room.victims(model, idle)
        if victims:
            grade = 1 if all(self._has_twin(name, host.name) for name in victims) else 2
            used = max(host.idle_since[name] for name in victims)
            return _Way(True, moved, grade, used, model.load_ms, host.name, tuple(victims))
        if asked.due:
            in_use = sorted(name for name in host.in_use if self._may_go(room, name, asked))
            victims = room.victims(model, [*idle, *in_use])
            if victims:
                return _Way(True, moved, 3, 0, model.load_ms, host.name, tuple(victims))
        return None

    def _may_go(self, room: _Room, name: str, asked: Asked) -> bool:
        there = room.host.models[name]
        if there.state != "ready" or there.pinned or there.holders or name in room.evict:
            return False
        if name in room.host.idle_since and not asked.due and self._is_asked(there, room.host):
            return False  # it is about to get its requests
        return asked.may_evict(name)

    def _is_asked(self, model: m.HostedModel, host: HostView) -> bool:
        return any(host.models.get(name) is model for name in self.asked)

    def _has_twin(self, model: str, host: str) -> bool:
        """It is loaded at another host as well, and stays there."""
        return any(
            other != host
            and (there := room.host.models.get(model)) is not None
            and there.state == "ready"
            and model not in room.evict
            for other, room in self.rooms.items()
        )


def decide(asked: Sequence[Asked], hosts: Iterable[HostView]) -> Decision:
    decider = _Decider(asked, hosts)
    for each in sorted(asked, key=lambda each: (each.served, each.since, each.name)):
        decider.decide(each)
    for name, room in decider.rooms.items():
        decider.decision.wishes[name] = Wishes(tuple(room.load), tuple(room.evict))
    return decider.decision
