"""Many workers in one process: real worker cores and real links on sockets of their own, with a fake for an engine.

Each engine makes the tokens of a run at the pace that its seed names, in tokens per second (0: all at once). A token's
text is the time at which it was made, so that its reader knows how long it was on its way.

One thread serves them all, so it polls with epoll: libzmq's own poll looks at every socket each time.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from contextlib import suppress
from heapq import heappop, heappush
from pathlib import Path
from struct import Struct
from typing import Any

import zmq

from bench.peers import Socket
from llambo.mesh.link import sockets
from llambo.mesh.link.link import Link
from llambo.mesh.link.link_core import CloseLink, OpenControl, OpenTokens, Publish, Send
from llambo.mesh.security.keyring import Folder
from llambo.mesh.service import clock
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.identity import PeerKey
from llambo.mesh.wire.timers import NEVER_MS
from llambo.worker.agent import events as e
from llambo.worker.agent.announcement import ProcessIdentity
from llambo.worker.agent.core import WorkerCore
from llambo.worker.config import FakeOptions, WorkerConfig
from llambo.worker.engine import protocol as proto

#: The text of a token: when it was made, on the monotonic clock of this machine.
MADE_AT = Struct(">Q")
#: How long the workers of one process may take to join.
JOIN_S = 120.0


class FakeEngine:
    """The runs of one worker: key to when its next token is due, how many it has, and how many it gets."""

    def __init__(self) -> None:
        self.runs: dict[bytes, list[int]] = {}

    def start(self, start: proto.Start, now_ms: int) -> None:
        first = len(start.prefix)
        self.runs[start.key] = [now_ms, first, start.max_tokens, start.seed]

    def next_ms(self) -> int:
        return min((run[0] for run in self.runs.values()), default=NEVER_MS)

    def step(self, now_ms: int) -> proto.Step:
        outputs = []
        piece = MADE_AT.pack(time.monotonic_ns())
        for key, run in list(self.runs.items()):
            due, at, end, pace = run
            if due > now_ms:
                continue
            count = min(1 + ((now_ms - due) * pace) // 1_000, end - at) if pace else end - at
            run[1] = at + count
            run[0] = due + count * 1_000 // pace if pace else now_ms
            last = at + count >= end
            outputs.append(proto.Output(key, [4711] * count, [piece] * count, "length" if last else None))
            if last:
                del self.runs[key]
        return proto.Step(outputs)


class CrowdWorker:
    """One worker: core and link."""

    def __init__(self, crowd: Crowd, name: str, key: PeerKey | None) -> None:
        slots, node_class = crowd.slots, crowd.node_class
        config = WorkerConfig(
            (crowd.address,), name, model="crowd", fake=FakeOptions(slots=slots), node_class=node_class, key=key
        )
        self.core = WorkerCore(config, ProcessIdentity(os.urandom(8), "crowd", os.getpid()))
        self.engine = FakeEngine()
        self.link = Link(
            crowd.context, crowd.address, token_kind=zmq.XPUB, offset=sockets.WORKER_OFFSET, decoder=codec.to_worker,
            key=key,
        )  # fmt: skip
        self.watched: dict[int, Socket] = {}
        self.up = False
        self.wakes_at = NEVER_MS
        self._crowd = crowd
        self._later: list[Any] = []

    def handle(self, event: Any) -> None:
        now = clock.now_ms()
        self._later = [event]
        while self._later:
            for action in self.core.handle(self._later.pop(0), now):
                self._perform(action, now)
        self.link.flush()
        self._crowd.plan(self, min(self.core.next_wakeup_ms(), self.engine.next_ms()))
        self.up = self.core.links[0].up

    def _perform(self, action: Any, now: int) -> None:
        match action:
            case Send() | Publish():
                self.link.perform(action)
            case OpenControl() | OpenTokens() | CloseLink():
                self.link.perform(action)
                self._crowd.watch(self)
            case e.StartRun(start):
                self.engine.start(start, now)
            case e.StopRun(key):
                self.engine.runs.pop(key, None)
            case e.SpawnEngine():
                self._later.append(proto.Ready([m.ModelInfo("crowd", "crowd")], self._crowd.slots))
            case e.Exit(text):
                raise RuntimeError(f"a worker of the crowd has ended: {text}")
            case _:
                pass

    def wake(self, now: int) -> None:
        if self.engine.next_ms() <= now:
            self.handle(self.engine.step(now))
        if self.core.next_wakeup_ms() <= now:
            self.handle(e.Ticked())

    def read(self) -> None:
        """All that is there. To send clears the signal of what has arrived, so it is also called after that."""
        while ready := [socket for socket in self.watched.values() if not socket.closed and is_readable(socket)]:
            link = self.link
            if link.control in ready:
                for bundle in link.receive_control():
                    self.handle(e.ControlArrived(0, bundle.session, bundle.messages))
            if link.monitor in ready:
                for change in link.receive_changes():
                    self.handle(e.ConnectionChanged(0, change))
            if link.tokens in ready and any(frame[:1] == b"\x01" for frame in link.receive_tokens()):
                self.handle(e.Subscribed(0))


def is_readable(socket: Socket) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


class Crowd:
    def __init__(self, options: dict[str, Any], names: list[str], key: PeerKey | None) -> None:
        self.address: str = options["broker"]
        self.slots: int = options["slots"]
        self.node_class: str = options["node_class"]
        self.context: zmq.Context[Socket] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 65_000)
        self._epoll = select.epoll()
        self._by_fd: dict[int, CrowdWorker] = {}
        self._due: list[tuple[int, int, CrowdWorker]] = []
        self._order = 0
        self.workers = [CrowdWorker(self, name, key) for name in names]

    def plan(self, worker: CrowdWorker, at_ms: int) -> None:
        if at_ms != worker.wakes_at:
            worker.wakes_at = at_ms
            self._order += 1
            heappush(self._due, (at_ms, self._order, worker))

    def watch(self, worker: CrowdWorker) -> None:
        """Its sockets are others now. (A socket that was closed has taken its descriptor out of epoll.)"""
        for fd in worker.watched:
            del self._by_fd[fd]
            with suppress(OSError):
                self._epoll.unregister(fd)
        link = worker.link
        worker.watched = {int(socket.fd): socket for socket in (link.control, link.tokens, link.monitor) if socket}
        for fd in worker.watched:
            self._by_fd[fd] = worker
            self._epoll.register(fd, select.EPOLLIN)

    def run(self, up_within_s: float = 0.0) -> None:
        """For ever; or until all are connected."""
        deadline = time.monotonic() + up_within_s
        while True:
            now = clock.now_ms()
            while self._due and self._due[0][0] <= now:
                at, _, worker = heappop(self._due)
                if worker.wakes_at == at:
                    worker.wakes_at = NEVER_MS
                    worker.wake(now)
                    worker.read()
            if up_within_s:
                missing = sum(not worker.up for worker in self.workers)
                if not missing:
                    return
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{missing} of {len(self.workers)} workers did not join in {up_within_s} s")
            wait = self._due[0][0] - clock.now_ms() if self._due else 1_000
            for fd, _ in self._epoll.poll(max(0, min(wait, 1_000)) / 1_000, 256):
                if fd in self._by_fd:
                    self._by_fd[fd].read()

    def begin(self) -> None:
        for worker in self.workers:
            worker.handle(e.Ticked())


def run(options: dict[str, Any]) -> None:
    """`python -m bench.node crowd`. It begins at SIGUSR1, and prints a line when all its workers are up."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    names = [f"{options['name']}-{number}" for number in range(options["count"])]
    key = Folder(Path(options["keys"])).export("bench") if options.get("keys") else None
    print(json.dumps({"pid": os.getpid()}), flush=True)
    signal.sigwait({signal.SIGUSR1})
    begun = time.monotonic()
    there = Crowd(options, names, key)
    for worker in there.workers:
        worker.handle(e.Ticked())
    there.run(JOIN_S)
    print(json.dumps({"joined_s": time.monotonic() - begun}), flush=True)
    there.run()
