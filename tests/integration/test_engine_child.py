"""The engine child as a real process: it streams, and it is gone when it should be."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llambo.testing.processes import wait_until_gone
from llambo.worker.agent.agent import EngineProcess
from llambo.worker.config import FakeFaults, FakeOptions
from llambo.worker.engine import protocol as proto
from llambo.worker.engine.fake_model import plain_token

TIMEOUT_S = 30.0


@contextmanager
def engine(options: FakeOptions) -> Iterator[EngineProcess]:
    child = EngineProcess(proto.Configure("fake", "fake", options))
    try:
        yield child
    finally:
        child.reap()


def listen(child: EngineProcess) -> Iterator[proto.EngineMessage]:
    """What the child says until it is gone or the deadline is over."""
    deadline = time.monotonic() + TIMEOUT_S
    story: list[proto.EngineMessage] = []
    while True:
        child.push()
        want = [child] if child.wants_to_write else []
        readable, _, _ = select.select([child], want, [], max(0.0, deadline - time.monotonic()))
        assert readable or time.monotonic() < deadline, f"nothing within {TIMEOUT_S} s after {story[-5:]}"
        messages = child.read() if readable else []
        if messages is None:
            return
        for message in messages:
            story.append(message)
            yield message


def start(number: int = 0, max_tokens: int = 50, prompt: bytes = b"hello") -> proto.Start:
    return proto.Start(bytes([number]) * 24, prompt, max_tokens, 7)


def test_it_streams_one_message_a_step() -> None:
    with engine(FakeOptions(slots=3)) as child:
        # Given a child with three sequences
        for number in range(3):
            child.order(start(number))
        ids: dict[bytes, list[int]] = {}
        ended, steps = 0, 0
        # When it speaks
        for message in listen(child):
            if isinstance(message, proto.Step):
                steps += 1
                for output in message.outputs:
                    ids.setdefault(output.key, []).extend(output.ids)
                    ended += output.end == "length"
            if ended == 3:
                break
        # Then every sequence has its tokens, and they shared the steps
        assert list(ids.values()) == [[plain_token(7, b"hello", i) for i in range(50)]] * 3
        assert steps < 120


def test_the_key_of_its_worker_is_not_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMBO_KEY", "a secret")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/secrets")
    with engine(FakeOptions()) as child:
        assert isinstance(next(listen(child)), proto.Ready | proto.Progress)  # it runs, and so this is what it has
        names = {line.partition(b"=")[0] for line in Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")}
    assert b"PATH" in names
    assert not names & {b"LLAMBO_KEY", b"CREDENTIALS_DIRECTORY"}


def test_it_says_what_it_serves_first_and_refuses_what_it_cannot() -> None:
    with engine(FakeOptions(slots=2, context_tokens=10)) as child:
        child.order(start(max_tokens=10))
        messages = listen(child)
        ready, refused = next(messages), next(messages)
        assert isinstance(ready, proto.Ready)
        assert (ready.slots, ready.models[0].name) == (2, "fake")
        assert isinstance(refused, proto.Refused)
        assert refused.final


def test_a_stopped_sequence_frees_its_slot_for_the_next_order() -> None:
    with engine(FakeOptions(slots=1, ttft_ms=60_000)) as child:
        child.order(start(1))
        child.order(proto.Stop(start(1).key))
        child.order(start(2, max_tokens=0))
        child.order(proto.Stop(start(2).key))
        child.order(start(3))
        messages = listen(child)
        assert isinstance(next(messages), proto.Ready)
        # An empty step is a sign of life of the third; a refusal would have come before it.
        assert next(messages) == proto.Step()


def test_a_crash_is_noticed_and_named() -> None:
    with engine(FakeOptions(faults=FakeFaults(crash_at=5))) as child:
        child.order(start())
        steps = [m for m in listen(child) if isinstance(m, proto.Step)]
        assert sum(len(output.ids) for step in steps for output in step.outputs) == 5
        assert child.reap() == ("the engine was ended by SIGSEGV", False)


def test_a_hang_is_silent_until_it_is_killed() -> None:
    with engine(FakeOptions(faults=FakeFaults(hang_at=5))) as child:
        child.order(start())
        tokens = 0
        for message in listen(child):
            tokens += sum(len(output.ids) for output in message.outputs) if isinstance(message, proto.Step) else 0
            if tokens == 5:
                break
        # More than the pipe holds: the orders wait on our side, and nothing blocks.
        for number in range(100):
            child.order(start(number, prompt=b"x" * 100_000))
            child.push()
        assert child.wants_to_write
        child.kill()
        assert list(listen(child)) == []
        assert child.reap() == ("the engine was ended by SIGKILL", True)


def test_a_closed_pipe_ends_it() -> None:
    with engine(FakeOptions()) as child:
        assert isinstance(next(listen(child)), proto.Ready)
        with socket.socket(fileno=os.dup(child.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)
        wait_until_gone(child.pid, TIMEOUT_S)


def test_signals_for_the_group_do_not_end_it() -> None:
    with engine(FakeOptions(tokens_per_s=1_000)) as child:
        messages = listen(child)
        next(messages)
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
        child.order(start())
        assert isinstance(next(messages), proto.Step)


AGENT = """
import signal, sys
from llambo.worker.engine import protocol as proto
from llambo.worker.agent.agent import EngineProcess
from llambo.worker.config import FakeFaults, FakeOptions

child = EngineProcess(proto.Configure("fake", "fake", FakeOptions(faults=FakeFaults(hang_at=int(sys.argv[1])))))
child.order(proto.Start(bytes(24), b"hello", 10**6, 7))
child.push()
seen = 0
while not seen:
    for message in child.read() or []:
        seen += isinstance(message, proto.Step)
print(child.pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("hang_at", [0, 1], ids=["decoding", "hanging"])
def test_it_dies_with_an_agent_that_is_killed(hang_at: int) -> None:
    # Given an agent with an engine that decodes without end, or hangs
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(hang_at)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert agent.stdout is not None
    with agent.stdout:
        try:
            readable, _, _ = select.select([agent.stdout], [], [], TIMEOUT_S)
            assert readable, "the agent did not start its engine"
            engine_pid = int(agent.stdout.readline())
        finally:
            # When the agent is killed
            agent.kill()
            agent.wait(TIMEOUT_S)
    # Then its engine is gone too
    wait_until_gone(engine_pid, TIMEOUT_S)


def test_an_engine_without_its_agent_does_not_begin() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llambo.worker.engine_child", "--fd", "0", "--parent", "1"],
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\3abc"])
def test_nonsense_on_the_pipe_is_an_error_and_not_a_guess(data: bytes) -> None:
    with pytest.raises(proto.BadFrame):
        proto.from_engine().feed(data)


def test_messages_survive_any_cut_of_the_stream() -> None:
    messages = [proto.Ready([], 1), proto.Step([proto.Output(b"k", [1], [b"p"], "stop")]), proto.Progress("x")]
    stream = b"".join(map(proto.pack, messages))
    for size in range(1, len(stream)):
        unpacker = proto.from_engine()
        cuts = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [message for cut in cuts for message in unpacker.feed(cut)] == messages
