"""The condition of a worker, as it is reported to its service manager."""

from __future__ import annotations

from llambo.mesh.service.notify_core import Condition
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.codec import NO_SESSION
from llambo.worker.agent import events as e
from llambo.worker.agent.agent import condition
from llambo.worker.engine import protocol as proto
from tests.unit.test_worker_core import MODELS, SESSION, Rig, joined, key_of, loaded, running

BROKERS = ("tcp://box:7330",)


def of(rig: Rig) -> Condition:
    return condition(rig.core, BROKERS, rig.now)


def test_it_is_ready_when_the_model_is_loaded_and_the_token_plane_proved_and_not_before() -> None:
    rig = Rig(model="tiny.gguf").on(e.Ticked())
    assert of(rig) == Condition("starting the engine")
    rig.on(proto.Progress("loading tiny: 43 %", percent=43))
    assert of(rig) == Condition("loading tiny: 43 %")
    rig.on(proto.Ready(MODELS, 4))
    assert of(rig) == Condition("looking for a broker at tcp://box:7330")
    rig.receive(m.Welcome(SESSION, 7332, broker="b"), session=NO_SESSION)
    assert of(rig) == Condition("joining broker b")
    rig.wait(200).on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    assert of(rig) == Condition("idle, 4 slots", ready=True)


def test_a_broker_that_welcomes_is_not_enough() -> None:
    rig = Rig().on(e.Ticked()).receive(m.Welcome(SESSION, 7332), session=NO_SESSION)
    rig.on(e.Subscribed(0)).receive(m.BrokerHeartbeat(1, echo=2))
    assert rig.core.links[0].up
    assert not of(rig).ready


def test_it_says_how_busy_it_is() -> None:
    rig = running(1, 2)
    for number in range(20):
        rig.alive(100).step(key_of(1), [2 * number, 2 * number + 1]).step(key_of(2), [number])
    assert of(rig) == Condition("busy 2/4, 30 tok/s", ready=True)


def test_without_its_broker_it_says_so() -> None:
    rig = running(1)
    for token in range(6):
        rig.wait(500).step(key_of(1), [token])
    condition = of(rig)
    assert condition.status.startswith("looking for a broker at tcp://box:7330 (")
    assert condition.status.endswith("; 1 requests go on without one")
    assert condition.ready, "it stays ready, although it has no broker now"


def test_it_is_well_only_while_decoding_goes_on() -> None:
    rig = running(1)
    for _ in range(5):
        rig.alive(900).step(key_of(1), [1])
        assert of(rig).well
    # Given an engine that is silent for so long that it is to be killed
    rig.alive(1_100)
    assert rig.take(e.KillEngine)
    # Then the watchdog is not fed until it is gone, however long that takes
    assert not of(rig).well
    rig.alive(20_000)
    assert not of(rig).well
    rig.on(e.EngineDied("the engine was ended by SIGKILL"))
    assert of(rig).well


def test_an_engine_without_work_may_be_silent() -> None:
    rig = joined().alive(60_000)
    assert of(rig) == Condition("idle, 4 slots", ready=True)


def test_what_keeps_it_from_working_is_its_status() -> None:
    rig = running(1).on(e.EngineDied("the engine was ended by SIGSEGV"))
    assert of(rig).status == "the engine was ended by SIGSEGV; a new engine in 250 ms"
    assert joined().receive(m.Drain()).core.drain.drained
    assert of(joined().receive(m.Drain())).status == "idle, 4 slots; drained: no new work"


def test_it_leaves() -> None:
    rig = running(1).on(e.StopRequested())
    assert of(rig) == Condition("stopping, 1 still running", ready=True, leaving=True)
    rig = loaded().on(e.StopRequested())
    assert rig.core.exited
    assert of(rig).leaving
