"""From what the broker tells to what the autoscaler is shown. Pure, but for what each worker had finished before.

The broker counts requests by model. If several classes serve one model, those that wait are shared out among them by
their slots; if none of them has any, they are the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from llambo.fleet.decide.autoscale_core import Seen
from llambo.fleet.decide.placement import Placement
from llambo.fleet.model import Fleet, NodeClass
from llambo.fleet.world import World
from llambo.mesh.wire.naming import class_of, in_class


@dataclass(slots=True)
class Observer:
    #: By worker: what it had finished when it was looked at last; by class: all together.
    _of_worker: dict[str, int] = field(default_factory=dict)
    _of_class: dict[str, int] = field(default_factory=dict)

    def seen(
        self, fleet: Fleet, world: World, workers: Mapping[str, dict[str, Any]], requests: list[dict[str, Any]]
    ) -> list[Seen]:
        """`workers`, `requests`: as the broker lists them."""
        waits = [request for request in requests if request["state"] == "waiting"]
        room, found = Placement(world.hosts, world.nodes), []
        for kept in fleet.classes.values():
            nodes = world.of(kept.name)
            own = [workers[node.name] for node in nodes if node.name in workers]
            models = _models(kept, own)
            # Who has asked for this class means it; the others are shared out.
            own_waits = [request for request in waits if class_of(request["model"]) == kept.name]
            share = _share(kept, fleet, world, workers, models)
            others = [one for one in waits if one["model"] in models and not class_of(one["model"])] if share else []
            found.append(
                Seen(
                    node_class=kept.name,
                    workers=sum(node.counts for node in nodes),
                    busy=sum(worker["busy"] + worker["busy_elsewhere"] for worker in own),
                    waiting=len(own_waits) + round(len(others) * share),
                    waited_ms=max((request["age_ms"] for request in (*own_waits, *others)), default=0),
                    done=self._done(kept.name, own),
                    room=room.fit(kept, kept.max),
                )
            )
        return found

    def _done(self, node_class: str, workers: list[dict[str, Any]]) -> int:
        """It never falls, although a worker that is begun again counts from nothing."""
        total = self._of_class.get(node_class, 0)
        for worker in workers:
            before = self._of_worker.get(worker["worker"], 0)
            total += worker["done"] - before if worker["done"] >= before else worker["done"]
            self._of_worker[worker["worker"]] = worker["done"]
        self._of_class[node_class] = total
        return total


def _models(kept: NodeClass, workers: list[dict[str, Any]]) -> set[str]:
    """What they say themselves; if there are none, what they will say."""
    told = {model for worker in workers for model in worker["models"]}
    settings = kept.settings.get("worker", {})
    model = PurePath(str(settings.get("model", ""))).name.removesuffix(".gguf")
    name = model or ("fake" if settings.get("engine") == "fake" else "smollm2")
    return told or {name, in_class(name, kept.name)}


def promised(fleet: Fleet) -> set[str]:
    """Models that somebody may ask for though no worker has them yet: of the classes that may be down to none."""
    return {model for kept in fleet.classes.values() if kept.min == 0 and kept.max for model in _models(kept, [])}


def _share(
    kept: NodeClass, fleet: Fleet, world: World, workers: Mapping[str, dict[str, Any]], models: set[str]
) -> float:
    slots: dict[str, int] = {}
    for one in fleet.classes.values():
        nodes = [node for node in world.of(one.name) if node.counts]
        if _models(one, [workers[node.name] for node in nodes if node.name in workers]) & models:
            slots[one.name] = len(nodes) * one.slots
    total = sum(slots.values())
    if not total:
        return float(next(iter(slots)) == kept.name)
    return slots[kept.name] / total
