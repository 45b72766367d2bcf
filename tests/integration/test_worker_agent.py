"""The worker agent with its engine child, as processes, against a test double of a broker on real sockets."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.testing.processes import Process, wait_until_gone
from llambo.worker.config import WorkerConfig, fake_options
from llambo.worker.engine.fake_model import plain_token
from tests.integration.double_broker import TIMEOUT_S, DoubleBroker

StartWorker = Callable[..., Process]


@pytest.fixture
def broker() -> Iterator[DoubleBroker]:
    double = DoubleBroker()
    yield double
    double.close()


@pytest.fixture
def start_worker(broker: DoubleBroker) -> Iterator[StartWorker]:
    """Starts worker processes, and at the end makes sure that nothing of them is left."""
    started: list[Process] = []

    def start(stall_ms: int = 10_000, **fake: Any) -> Process:
        config = WorkerConfig((broker.address,), name="w", fake=fake_options(**fake), stall_ms=stall_ms)
        options = msgspec.json.encode(config).decode()
        started.append(Process("-m", "llambo.testing.node", "worker", options, name="w"))
        return started[-1]

    yield start
    for process in started:
        engines = process.children()
        process.kill()
        for engine in engines:
            wait_until_gone(engine, TIMEOUT_S)


def truth(count: int) -> list[int]:
    return [plain_token(7, b"hello", i) for i in range(count)]


def test_the_life_of_a_dispatch(broker: DoubleBroker, start_worker: StartWorker) -> None:
    # Given a worker that has joined
    worker = start_worker(slots=2, utf8_split=True)
    hello = broker.welcome()
    assert (hello.name, hello.slots, hello.pid) == ("w", 2, worker.pid)
    assert worker.first_line() == "ready"
    # When a request is dispatched
    key = broker.dispatch(1)
    assert broker.expect(m.Accept).id == key[:16]
    end = broker.expect(m.End)
    # Then its tokens and its END arrive, and END is repeated until it is acknowledged
    broker.until(lambda: len(broker.ids(key)) == 20, "20 tokens")
    assert (end.count, end.reason, end.usage.prompt_tokens) == (20, "length", 1)
    assert [chunk.flags for chunk in broker.chunks if chunk.flags] == [tokens.FINAL]
    assert broker.expect(m.End) == end
    assert broker.expect(m.WorkerHeartbeat, claims={key: 20}).seq == 1
    # And any part can be asked for again
    broker.send(m.Replay(key[:16], 5, 15, key[16:]))
    page = broker.expect(m.Page)
    assert (page.first, page.next, page.total) == (5, 15, 20)
    assert tokens.ids_of(page.chunks) == broker.ids(key)[5:15]
    # Until END is acknowledged
    broker.send(m.EndAck([key]))
    broker.expect(m.WorkerHeartbeat, claims={})


def test_many_sequences_a_second_stream_whole(broker: DoubleBroker, start_worker: StartWorker) -> None:
    start_worker(slots=20, burst=3)
    broker.welcome()
    keys = [broker.dispatch(number, max_tokens=200) for number in range(20)]
    broker.until(lambda: all(len(broker.ids(key)) == 200 for key in keys), "200 tokens of each of 20 runs")
    assert all(broker.ids(key) == truth(200) for key in keys)


def test_a_continuation_goes_on_after_its_prefix(broker: DoubleBroker, start_worker: StartWorker) -> None:
    start_worker()
    broker.welcome()
    key = broker.dispatch(1, prefix=truth(8))
    assert broker.expect(m.End).count == 20
    broker.until(lambda: len(broker.ids(key)) == 12, "12 tokens")
    assert broker.chunks[0].first == 8
    assert broker.ids(key) == truth(20)[8:]


def test_cancel_ends_a_long_answer(broker: DoubleBroker, start_worker: StartWorker) -> None:
    start_worker(slots=1, tokens_per_s=200)
    broker.welcome()
    key = broker.dispatch(1, max_tokens=10**6)
    broker.until(lambda: len(broker.ids(key)) > 3, "some tokens")
    broker.send(m.Cancel(key[:16], key[16:]))
    assert broker.expect(m.End).reason == "cancelled"
    other = broker.dispatch(2, max_tokens=3)
    broker.until(lambda: len(broker.ids(other)) == 3, "the tokens of the next request in the only slot")


def test_bad_input_changes_no_run(broker: DoubleBroker, start_worker: StartWorker) -> None:
    start_worker(context_tokens=100, slots=9)
    broker.welcome()
    broker.send_frames([b"junk"])
    broker.send_frames([b"junk", b"more", b"junk"])
    broker.send_frames([codec.MAGIC + broker.session, b"\xc1"])
    broker.send(m.Attach(b"a" * 16))
    broker.dispatch(1, sampling=msgspec.Raw(msgspec.msgpack.encode({"temperature": "hot"})))
    reject = broker.expect(m.Reject)
    assert (reject.error.code, reject.final) == (Code.BAD_REQUEST, True)
    broker.dispatch(2, prompt=b"word " * 90)
    reject = broker.expect(m.Reject)
    assert (reject.error.code, reject.final) == (Code.TOO_LONG, True)
    broker.dispatch(3)
    assert broker.expect(m.End).reason == "length"


def test_a_broker_that_forgot_us_gets_a_new_hello(broker: DoubleBroker, start_worker: StartWorker) -> None:
    # Given a run under one session
    start_worker(tokens_per_s=100)
    broker.welcome()
    old = broker.dispatch(1, max_tokens=10**6)
    broker.until(lambda: len(broker.ids(old)) > 3, "some tokens")
    # When the broker does not know that session any more
    broker.send(m.Problem(ErrorInfo(Code.UNKNOWN_SESSION, "who are you?")))
    # Then the worker joins again without that run, and works
    broker.welcome(b"session2")
    broker.expect(m.WorkerHeartbeat, claims={})
    new = broker.dispatch(2)
    broker.until(lambda: len(broker.ids(new)) == 20, "tokens under the new session")


@pytest.mark.parametrize("fault", ["kill", "crash", "hang"])
def test_an_engine_that_is_lost_is_reported_and_replaced(
    broker: DoubleBroker, start_worker: StartWorker, fault: str
) -> None:
    # Given two runs in an engine
    sick = {} if fault == "kill" else {f"{fault}_at": 50}
    worker = start_worker(slots=4, tokens_per_s=200, stall_ms=1_000, **sick)
    broker.welcome()
    keys = [broker.dispatch(number, max_tokens=10**6) for number in range(2)]
    broker.until(lambda: all(len(broker.ids(key)) > 3 for key in keys), "some tokens of both")
    # When it dies or hangs
    (engine,) = worker.children()
    if fault == "kill":
        os.kill(engine, signal.SIGKILL)
    # Then the broker receives which runs are lost, and a new engine takes the next
    lost = broker.expect(m.EngineLost)
    assert sorted(lost.runs) == sorted(keys)
    assert ("stalled" if fault == "hang" else {"kill": "SIGKILL", "crash": "SIGSEGV"}[fault]) in lost.text
    assert broker.expect(m.WorkerHeartbeat, state="ready", claims={}).engine_restarts == 1
    wait_until_gone(engine, TIMEOUT_S)
    again = broker.dispatch(3)
    broker.until(lambda: len(broker.ids(again)) == 20, "tokens of the new engine")
    assert worker.running


def test_a_deaf_engine_does_not_stop_the_beats(broker: DoubleBroker, start_worker: StartWorker) -> None:
    # Given an engine that hangs
    start_worker(slots=100, hang_at=1)
    broker.welcome()
    broker.dispatch(0)
    broker.until(lambda: len(broker.chunks) == 1, "the last token before it hangs")
    # When it is given more than its pipe takes
    for number in range(1, 50):
        broker.dispatch(number, prompt=b"x" * 100_000)
    # Then the agent goes on
    assert len(broker.expect(m.WorkerHeartbeat, seq=50).claims) == 50


def test_sigterm_drains_first(broker: DoubleBroker, start_worker: StartWorker) -> None:
    # Given a worker with a run
    worker = start_worker(tokens_per_s=100)
    broker.welcome()
    key = broker.dispatch(1, max_tokens=40)
    broker.until(lambda: bool(broker.ids(key)), "a token")
    (engine,) = worker.children()
    # When it gets SIGTERM
    worker.send(signal.SIGTERM)
    # Then it finishes what runs, takes nothing new, and leaves
    broker.expect(m.WorkerHeartbeat, state="draining")
    broker.dispatch(2)
    assert broker.expect(m.Reject).error.code is Code.BUSY
    assert broker.expect(m.End).count == 40
    broker.send(m.EndAck([key]))
    broker.expect(m.Goodbye)
    assert worker.end(TIMEOUT_S) == 0
    wait_until_gone(engine, TIMEOUT_S)
    assert broker.ids(key) == truth(40)


def test_a_second_signal_does_not_wait(broker: DoubleBroker, start_worker: StartWorker) -> None:
    worker = start_worker(tokens_per_s=10)
    broker.welcome()
    broker.dispatch(1, max_tokens=10**6)
    broker.expect(m.Accept)
    worker.send(signal.SIGINT)
    broker.expect(m.WorkerHeartbeat, state="draining")
    worker.send(signal.SIGINT)
    broker.expect(m.Goodbye)
    assert worker.end(TIMEOUT_S) == 0


def test_a_killed_agent_leaves_no_engine(broker: DoubleBroker, start_worker: StartWorker) -> None:
    worker = start_worker()
    broker.welcome()
    broker.dispatch(1, max_tokens=10**6)
    broker.expect(m.Accept)
    (engine,) = worker.children()
    worker.send(signal.SIGKILL)
    wait_until_gone(engine, TIMEOUT_S)


def test_without_a_broker_it_waits_and_a_signal_ends_it(broker: DoubleBroker, start_worker: StartWorker) -> None:
    worker = start_worker()
    broker.expect(m.WorkerHello)
    worker.send(signal.SIGTERM)
    assert worker.end(TIMEOUT_S) == 0
