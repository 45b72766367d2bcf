"""Timestamps at the points a request passes, for one request at a time.

The points are put around functions of a running process from outside: the mesh itself has no tracing, so it costs
nothing when tracing is off. Each process writes its own file; monotonic clocks of one host can be compared.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from typing import Any

from llambo.broker import events as be
from llambo.broker.core import BrokerCore
from llambo.broker.server import BrokerServer
from llambo.mesh.client import client_events as ce
from llambo.mesh.client.client_core import ClientCore
from llambo.mesh.link.link import Link
from llambo.mesh.wire import limits, tokens
from llambo.mesh.wire import messages as m
from llambo.worker import engine_child
from llambo.worker.agent import agent as worker_agent
from llambo.worker.agent import events as we
from llambo.worker.agent.core import WorkerCore
from llambo.worker.engine import protocol as proto

#: The folder of the files; inherited by the engine child.
FOLDER = "LLAMBO_BENCH_TRACE"
#: In the order in which a request meets them; where each hop ends, and what happened on it.
POINTS = {
    "asked": "",
    "client said": "client: build, encode, send",
    "broker heard": "to the broker: libzmq, poll, decode",
    "broker said": "broker: admit, choose, encode, send",
    "agent heard": "to the agent: libzmq, poll, decode",
    "agent ordered": "agent: check, encode, write to the pipe",
    "engine heard": "to the engine: pipe, decode",
    "engine began": "engine: from its reader to its decoding thread",
    "engine made": "ENGINE: template, tokens, prefill, sampling",
    "engine said": "engine: encode, write to the pipe",
    "agent got": "to the agent: poll, decode",
    "agent passed": "agent: keep, encode, publish",
    "broker got": "to the broker: libzmq, poll, receive",
    "broker passed": "broker: check, keep, publish",
    "client got": "to the client: libzmq, event loop, receive",
    "read": "client: decode, order, wake the reader",
}
NUMBERS = {name: number for number, name in enumerate(POINTS)}
#: The hop that is not part of the mesh.
ENGINE = NUMBERS["engine made"]
BEGAN = NUMBERS["engine began"]

_RECORD = Struct("<Bq")
#: Towards a client; every chunk is longer.
BEAT_BYTES = limits.TOPIC_BYTES + tokens.BEAT_BYTES
Test = Callable[[tuple[Any, ...]], bool]


def never(_: Any) -> bool:
    return False


class Trace:
    """The file in which this process notes the points."""

    def __init__(self, folder: str) -> None:
        self._fd = os.open(Path(folder, f"{os.getpid()}.trace"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._wrapped: list[tuple[Any, str, Any]] = []

    def close(self) -> None:
        """Restore the functions."""
        for owner, name, function in reversed(self._wrapped):
            setattr(owner, name, function)
        os.close(self._fd)

    def note(self, point: str) -> None:
        now = time.monotonic_ns()
        os.write(self._fd, _RECORD.pack(NUMBERS[point], now))

    def before(self, owner: Any, name: str, point: str, test: Test) -> None:
        """Note the point when the function is called with such arguments."""
        self._wrap(owner, name, point, before=test)

    def after(self, owner: Any, name: str, point: str, test: Test) -> None:
        """... when it returns; whether its arguments are such is asked before."""
        self._wrap(owner, name, point, after=test)

    def giving(self, owner: Any, name: str, point: str, test: Callable[[Any], bool]) -> None:
        """... when it returns something like this."""
        self._wrap(owner, name, point, giving=test)

    def _wrap(self, owner: Any, name: str, point: str, before: Test = never, after: Test = never,
              giving: Callable[[Any], bool] = never) -> None:  # fmt: skip
        function = getattr(owner, name)

        @functools.wraps(function)
        def traced(*arguments: Any, **named: Any) -> Any:
            if before(arguments):
                self.note(point)
            due = after(arguments)
            result = function(*arguments, **named)
            if due or giving(result):
                self.note(point)
            return result

        self._wrapped.append((owner, name, function))
        setattr(owner, name, traced)


def read(folder: str) -> list[tuple[int, int]]:
    """(nanoseconds, point) of all processes, in order of time."""
    files = Path(folder).glob("*.trace")
    return sorted((at, point) for file in files for point, at in _RECORD.iter_unpack(file.read_bytes()))


# --- where the points are --------------------------------------------------------------------------------


def trace_client(folder: str) -> Trace:
    trace = Trace(folder)
    trace.after(Link, "flush", "client said", lambda a: _has(a[0]._outbox._messages, m.InferenceRequest))
    trace.before(ClientCore, "handle", "client got", lambda a: _is(a[1], ce.TokensArrived) and _chunks(a[1].frames))
    return trace


def trace_broker() -> None:
    trace = Trace(os.environ[FOLDER])
    asks, brings = _brings(be.ClientSaid, m.InferenceRequest), be.TokensArrived
    trace.before(BrokerCore, "handle", "broker heard", asks)
    trace.after(
        BrokerServer, "_send", "broker said", lambda a: any(_has(bundle, m.Dispatch) for bundle in a[2].values())
    )
    trace.before(BrokerCore, "handle", "broker got", lambda a: _is(a[1], brings) and _chunks(a[1].frames))
    trace.after(BrokerServer, "_publish", "broker passed", lambda a: any(len(f) > BEAT_BYTES for f in a[1]))


def trace_worker() -> None:
    trace = Trace(os.environ[FOLDER])
    worker_agent.MODULE = "bench.traced_engine"
    trace.before(WorkerCore, "handle", "agent heard", _brings(we.ControlArrived, m.Dispatch))
    trace.after(worker_agent.EngineProcess, "push", "agent ordered", lambda a: a[0].wants_to_write)
    trace.before(WorkerCore, "handle", "agent got", lambda a: _is(a[1], proto.Step) and bool(a[1].outputs))
    trace.after(Link, "_publish", "agent passed", lambda a: _chunks(a[1]))


def trace_engine() -> None:
    from llambo.worker.llama.llama_engine import LlamaEngine  # noqa: PLC0415  # it imports llama.cpp

    trace = Trace(os.environ[FOLDER])
    trace.giving(proto.Unpacker, "feed", "engine heard", bool)
    trace.before(LlamaEngine, "start", "engine began", lambda _: True)
    trace.giving(LlamaEngine, "step", "engine made", bool)
    trace.after(engine_child.Child, "_send", "engine said", lambda a: _is(a[1], proto.Step) and bool(a[1].outputs))


def _brings(event: type, message: type) -> Test:
    return lambda a: _is(a[1], event) and _has(a[1].messages, message)


def _is(event: Any, kind: type) -> bool:
    return type(event) is kind


def _has(messages: Any, kind: type) -> bool:
    return any(type(message) is kind for message, _ in messages)


def _chunks(frames: list[bytes]) -> bool:
    return any(frame[:1] == tokens.CHUNK for frame in frames)
