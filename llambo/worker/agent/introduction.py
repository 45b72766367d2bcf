"""What a worker says of itself: in its hello, and in heartbeats where the hello was said too early to know.

A worker says hello while its engine loads, so that it is seen and what is asked of its model waits for it. All it
knows then is a name. Until the next hello, which knows more, its heartbeats carry what the engine turned out to serve:
each of them says everything, so it does not matter which is lost. An engine that comes back with another model is
told in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.naming import in_class
from llambo.worker.agent.engine_life import EngineLife
from llambo.worker.config import WorkerConfig

# --- Who this worker process is. ---


@dataclass(frozen=True, slots=True)
class Identity:
    #: Random bytes: the same name with other ones is a worker that has restarted.
    incarnation: bytes
    host: str = ""
    pid: int = 0
    software: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    models: list[m.ModelInfo]
    slots: int


class Introduction:
    def __init__(self, config: WorkerConfig, identity: Identity, engine: EngineLife) -> None:
        self._config = config
        self._identity = identity
        self._engine = engine
        #: By link: the greeting, and what its hello said.
        self._said: dict[int, tuple[int, Serving, m.WorkerState]] = {}

    def serving(self) -> Serving:
        ready = self._engine.ready
        if ready is None:
            return Serving(self._named([m.ModelInfo(self._config.model_name)]), self._config.slots)
        return Serving(self._named(ready.models), ready.slots)

    def _named(self, models: list[m.ModelInfo]) -> list[m.ModelInfo]:
        """Under their own names, and those of our class."""
        named = [(model, in_class(model.name, self._config.node_class)) for model in models]
        more = [msgspec.structs.replace(model, name=name) for model, name in named if name != model.name]
        return [*models, *more][: limits.MODELS_PER_WORKER]

    def serves(self, model: str) -> bool:
        return any(model == each.name for each in self.serving().models)

    def news(self, link: int) -> Serving | None:
        """What it serves, if its hello on this link said something else."""
        serving = self.serving()
        said = self._said.get(link)
        return None if said is not None and said[1] == serving else serving

    def hello(self, link: int, greeting: int, state: m.WorkerState) -> m.WorkerHello:
        said = self._said.get(link)
        if said is None or said[0] != greeting:
            # Said again, it says the same: a broker reads only the first of them that arrives.
            said = self._said[link] = (greeting, self.serving(), state)
        identity = self._identity
        return m.WorkerHello(
            name=self._config.name,
            incarnation=identity.incarnation,
            models=said[1].models,
            slots=said[1].slots,
            software=identity.software,
            node_class=self._config.node_class,
            host=identity.host,
            pid=identity.pid,
            state=said[2],
        )
