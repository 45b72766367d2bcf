"""From what the broker tells to what the autoscaler is shown. Pure, but for what each worker had finished before.

The broker counts requests by model. If several classes serve one model, those that wait are shared out among them by
their slots; if none of them has any, they are the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from llambo.fleet.autoscale_core import Seen
from llambo.fleet.model import Fleet, NodeClass
from llambo.fleet.placement import Placement
from llambo.fleet.world import World


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
            mine = [request for request in waits if request["model"] in models]
            share = _share(kept, fleet, world, workers, models)
            found.append(
                Seen(
                    node_class=kept.name,
                    workers=sum(node.counts for node in nodes),
                    busy=sum(worker["busy"] + worker["busy_elsewhere"] for worker in own),
                    waiting=round(len(mine) * share),
                    waited_ms=max((request["age_ms"] for request in mine), default=0) if share else 0,
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
    return told or {model or ("fake" if settings.get("engine") == "fake" else "smollm2")}


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
