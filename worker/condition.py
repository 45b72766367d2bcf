"""How a worker is, in the words of its service manager: read from the core, which knows nothing of managers.

It is ready when it can be of use: welcomed by a broker, its model loaded and tried, its token plane proved. It is well
as long as what it should be doing goes on: an engine that has sequences and is silent for `stall_ms` is killed by the
core, and until that has worked the watchdog is not fed. So a worker that cannot get rid of its engine is ended as a
whole. That the loop turns is shown by its asking at all.
"""

from __future__ import annotations

from llambo.mesh.herald_core import Condition
from llambo.mesh.link_core import LinkCore
from llambo.worker.core import WorkerCore
from llambo.worker.engine_life import EngineState


def condition(core: WorkerCore, brokers: tuple[str, ...], now_ms: int) -> Condition:
    leaving = core.exited or core.leaving.leaves
    return Condition(
        _status(core, brokers, leaving),
        ready=core.ready_said,
        well=core.engine.goes_on(now_ms, core.runs.active > 0),
        leaving=leaving,
    )


def _status(core: WorkerCore, brokers: tuple[str, ...], leaving: bool) -> str:
    active = core.runs.active
    if leaving:
        return f"stopping, {active} still running" if active else "stopping"
    engine = core.engine
    if not engine.is_ready:
        doing = "starting the engine" if engine.state is not EngineState.DOWN else "without an engine"
        return engine.note or doing
    links = list(core.links.values())
    up = [link for link in links if link.up]
    if not any(link.welcomed for link in links):
        return _searching(core, brokers, links)
    if not up and not core.ready_said:
        return f"joining {_broker(next(link for link in links if link.welcomed))}"
    slots = engine.ready.slots if engine.ready is not None else 0
    parts = [f"busy {active}/{slots}, {core.rate.last:.0f} tok/s" if active else f"idle, {slots} slots"]
    if core.leaving.drained:
        parts.append("drained: no new work")
    if len(up) < len(links):
        parts.append("the token plane is being mended" if len(links) == 1 else f"{len(up)} of {len(links)} brokers")
    return "; ".join(parts)


def _searching(core: WorkerCore, brokers: tuple[str, ...], links: list[LinkCore]) -> str:
    why = next((link.problem for link in links if link.problem), "")
    kept = f"; {core.runs.active} requests go on without one" if core.runs.active else ""
    return f"looking for a broker at {', '.join(brokers)}{f' ({why})' if why else ''}{kept}"


def _broker(link: LinkCore) -> str:
    return f"broker {link.broker}" if link.broker else "a broker"
