"""What a worker reports to brokers about itself: who it is, which models it serves.

A worker says hello while its engine is still loading, so that brokers know it and requests for its model wait for it.
At that time only the name of the model is known. Until the next hello, which has all of it, heartbeats carry what the
engine serves: each of them in full, so it does not matter which one is lost. An engine that comes back with another
model is announced in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llambo.mesh.wire import limits
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.naming import in_class, with_adapter
from llambo.worker.agent.engine_life import EngineLife
from llambo.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    #: Random bytes. Another value under the same name is a worker that has restarted.
    incarnation: bytes
    host: str = ""
    pid: int = 0
    software: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    models: list[m.ModelInfo]
    slots: int
    library: str = ""


class Announcement:
    def __init__(self, config: WorkerConfig, identity: ProcessIdentity, engine: EngineLife) -> None:
        self._config = config
        self._identity = identity
        self._engine = engine
        #: The last hello on each link, by the greeting that it belongs to.
        self._sent: dict[int, tuple[int, m.WorkerHello]] = {}

    def serving(self) -> Serving:
        ready = self._engine.ready
        if ready is None:
            name = self._config.model_name
            names = [name, *(with_adapter(name, adapter.name) for adapter in self._config.adapters)]
            return Serving(self._with_class([m.ModelInfo(name) for name in names]), self._config.slots)
        return Serving(self._with_class(ready.models), ready.slots, ready.library[: limits.NAME_CHARS])

    def _with_class(self, models: list[m.ModelInfo]) -> list[m.ModelInfo]:
        """Each model under its own name and under the name of our class."""
        named = [(model, in_class(model.name, self._config.node_class)) for model in models]
        more = [msgspec.structs.replace(model, name=name) for model, name in named if name != model.name]
        return [*models, *more][: limits.MODELS_PER_WORKER]

    def serves(self, model: str) -> bool:
        return any(model == each.name for each in self.serving().models)

    def update_for(self, link: int) -> Serving | None:
        """What is served, if the hello on this link had other contents."""
        serving, (_, hello) = self.serving(), self._sent.get(link, (0, None))
        same = hello is not None and serving == Serving(hello.models, hello.slots, hello.library)
        return None if same else serving

    def hello(self, link: int, greeting: int, state: m.WorkerState, *, ordered: bool) -> m.WorkerHello:
        """A repeated hello has the same content: a broker reads only the first that arrives."""
        number, hello = self._sent.get(link, (0, None))
        if hello is None or number != greeting:
            serving, identity = self.serving(), self._identity
            hello = m.WorkerHello(
                name=self._config.name,
                incarnation=identity.incarnation,
                models=serving.models,
                slots=serving.slots,
                software=identity.software,
                node_class=self._config.node_class,
                host=identity.host,
                pid=identity.pid,
                state=state,
                library=serving.library,
                paced=True,
                ordered=ordered,
            )
            self._sent[link] = greeting, hello
        return hello
