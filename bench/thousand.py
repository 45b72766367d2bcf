"""A thousand workers on one broker: what they cost idle, under load, when all join at once, and when one is killed.

The broker is the real one at default settings. The workers are fakes (bench/crowd.py): real cores and links on real
sockets, many in one process, whose engines only write down the time. So are the clients, which repair nothing: tokens
that they miss are counted, and a real client would fetch them. What counts is the broker's processor time, of its loop
and of the threads of libzmq; a machine that is busy with other things changes the times on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import msgspec
import zmq

from bench.crowd import JOIN_S, MADE_AT
from bench.figures import quantile
from bench.keys import keys as keyring
from bench.peers import BEAT_S, FakeClient, Socket, request_ids
from bench.processes import Node
from llambo.mesh.security.keyring import Folder
from llambo.mesh.wire import limits, reports, tokens
from llambo.mesh.wire import messages as m

MIB = 2**20
#: Processes over which the workers are spread.
PARTS = 2
SESSIONS = 8
PROMPT = b"How many are you?"
#: After the last submit.
LATE_S = 20.0


class Crew:
    """Processes with workers, which begin together. (They inherit the limit of descriptors, as the broker does.)"""

    _numbers = count()

    def __init__(
        self, broker: Node, workers: int, folder: Folder | None, *, slots: int = 4, node_class: str = ""
    ) -> None:
        self.parts: list[Node] = []
        for part in range(min(PARTS, workers)):
            share = workers // PARTS + (part < workers % PARTS)
            options = {
                "broker": broker.address,
                "name": f"bench-{next(self._numbers)}",
                "count": share,
                "slots": slots,
                "node_class": node_class,
            }
            self.parts.append(Node("crowd", options | ({"keys": str(folder.path)} if folder else {})))
        self.begun = time.monotonic()
        for node in self.parts:
            node.send(signal.SIGUSR1)

    def joined_s(self) -> float:
        """How long it took until all were connected on both planes."""
        return max(float(node.line(r'"joined_s": ([0-9.]+)', JOIN_S + 30)[1]) for node in self.parts)

    def close(self) -> None:
        for node in self.parts:
            node.kill()


@dataclass
class Usage:
    """Of a broker between two moments, in % of one core; `waited`: how long its loop was runnable and did not run."""

    main: float
    zmq: float
    waited: float
    rss_bytes: int

    def __str__(self) -> str:
        text = f"loop {self.main:5.1f} % + libzmq {self.zmq:5.1f} % of a core (loop waited {self.waited:4.1f} %)"
        return f"{text}, {self.rss_bytes / MIB:.0f} MiB"


class Watch:
    def __init__(self, broker: Node) -> None:
        self._broker = broker
        self._before = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        schedstat = Path(f"/proc/{self._broker.pid}/task/{self._broker.pid}/schedstat").read_text()
        return (time.monotonic(), *self._broker.cpu_s(), int(schedstat.split()[1]) / 1e9)

    def usage(self) -> Usage:
        wall, main, other, waited = (b - a for a, b in zip(self._before, self._now(), strict=True))
        return Usage(100 * main / wall, 100 * other / wall, 100 * waited / wall, self._broker.rss_bytes())


@dataclass
class Tally:
    """Times in milliseconds."""

    asked: int = 0
    done: int = 0
    refused: int = 0
    without_retry_after: int = 0
    failed: int = 0
    #: Tokens that the END counts, and those that did not come on the token plane.
    tokens: int = 0
    missing: int = 0
    accepted_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    done_at: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        rows = ((name, getattr(self, f"{name}_ms")) for name in ("accepted", "first", "token"))
        times = ", ".join(f"{name} {quantile(all, 0.5):.1f} / {quantile(all, 0.99):.0f}" for name, all in rows)
        counts = f"{self.asked} asked, {self.done} done, {self.refused} refused, {self.failed} failed"
        return f"{counts}; {self.tokens} tokens, {self.missing} missed; ms p50 / p99: {times}"


@dataclass(slots=True)
class Asked:
    at: float
    got: int = 0
    #: As its END counts it.
    count: int = 0


class Askers:
    """Some client sessions, and all their requests."""

    def __init__(
        self, context: zmq.Context[Socket], broker: Node, folder: Folder | None, sessions: int = SESSIONS
    ) -> None:
        self.tally = Tally()
        self.live: dict[bytes, Asked] = {}
        #: Those with an END that has overtaken tokens.
        self._short: dict[bytes, Asked] = {}
        #: The longest pause between two tokens of each stream, if it is kept.
        self.stalls: dict[bytes, float] = {}
        self._last: dict[bytes, float] = {}
        key = folder.export("client") if folder else None
        self._clients = [FakeClient(context, broker.port, key) for _ in range(sessions)]
        self._turn = 0
        self._beat_at = 0.0
        self._poller = zmq.Poller()
        self._by_socket: dict[object, FakeClient] = {}
        for client in self._clients:
            for socket in (client.control, client.tokens):
                self._poller.register(socket, zmq.POLLIN)
                self._by_socket[socket] = client

    def ask(self, count: int, tokens: int, pace: int, due: float, model: str = "crowd") -> None:
        """So many requests of `tokens` tokens, `pace` a second. Their times count from when they were due."""
        for id in request_ids(os.urandom(16 * count)):
            self._turn += 1
            self.live[id] = Asked(due)
            self.tally.asked += 1
            request = m.InferenceRequest(id, model, tokens, seed=pace)
            self._clients[self._turn % len(self._clients)].send_all([(request, PROMPT)])

    def poll(self, wait_s: float) -> None:
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + BEAT_S
            for client in self._clients:
                client.send_all([(m.ClientHeartbeat(), None)])
        for socket, _ in self._poller.poll(max(0, int(wait_s * 1_000) + 1)):
            client = self._by_socket[socket]
            if socket is client.tokens:
                self._tokens(client.receive_tokens())
            else:
                self._control(client)

    def _tokens(self, frames: list[bytes]) -> None:
        now_ns = time.monotonic_ns()
        for frame in frames:
            chunk = tokens.decode_chunk(frame[limits.TOPIC_BYTES :])
            if chunk is None:
                continue  # a beat
            id = chunk.id
            asked = self.live.get(id) or self._short.get(id)
            if asked is None:
                continue
            if not asked.got:
                self.tally.first_ms.append(now_ns / 1e6 - asked.at * 1e3)
            asked.got += len(chunk.body.ids)
            if asked.got == asked.count:
                del self._short[id]
            self.tally.token_ms += [(now_ns - MADE_AT.unpack(piece)[0]) / 1e6 for piece in chunk.body.pieces]
            if id in self._last:
                self.stalls[id] = max(self.stalls.get(id, 0.0), now_ns / 1e9 - self._last[id])
            self._last[id] = now_ns / 1e9

    def _control(self, client: FakeClient) -> None:
        ended: list[bytes] = []
        tally = self.tally
        received = client.receive()
        now = time.monotonic()
        for message, _ in received:
            if type(message) is m.End:
                ended.append(message.id)
                asked = self.live.pop(message.id, None)
                self._last.pop(message.id, None)
                if asked is not None:
                    tally.done += message.error is None
                    tally.failed += message.error is not None
                    tally.tokens += message.count
                    asked.count = message.count
                    if asked.got < asked.count:
                        self._short[message.id] = asked
                    tally.done_at.append(now)
            elif type(message) is m.Accepted and message.id in self.live:
                tally.accepted_ms.append((now - self.live[message.id].at) * 1e3)
            elif type(message) is m.Problem and self.live.pop(message.id, None) is not None:
                tally.refused += 1
                tally.without_retry_after += not message.error.retry_after_ms
        if ended:
            client.send_all([(m.EndAck(ended), None)])

    def rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.poll(0.05)

    def flow(
        self, per_s: float, seconds: float, length: int, pace: int, each: Callable[[], None] = lambda: None
    ) -> Tally:
        """Requests at fixed moments, whatever happens to those before."""
        self.tally = tally = Tally()
        begun = due = time.monotonic()
        while due < begun + seconds:
            now = time.monotonic()
            while due <= now:
                self.ask(1, length, pace, due)
                due += 1 / per_s
            self.poll(min(due - time.monotonic(), 0.05))
            each()
        return tally

    def drain(self) -> None:
        until = time.monotonic() + LATE_S
        while self.live and time.monotonic() < until:
            self.poll(0.05)
        self.rest(0.2)
        self.tally.missing = sum(asked.count - asked.got for asked in self._short.values())
        self._short.clear()

    def events(self) -> list[reports.EventRow]:
        client = self._clients[0]
        client.send_all([(m.Query(1, "events"), None)])
        data = b""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            client.control.poll(100)
            for message, _ in client.receive():
                if type(message) is m.Result:
                    data += message.data
                    if message.page + 1 == message.pages:
                        return msgspec.msgpack.decode(data, type=list[reports.EventRow])
        raise RuntimeError("no answer to a query")

    def close(self) -> None:
        for client in self._clients:
            client.close()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never rest."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def overflows() -> int:
    """SYNs that this machine has dropped because a backlog was full."""
    lines = [line.split() for line in Path("/proc/net/netstat").read_text().splitlines() if line.startswith("TcpExt")]
    return int(dict(zip(*lines, strict=True))["ListenOverflows"])


class Place:
    """A broker, its workers, and a way to ask."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack, folder: Folder | None, workers: int) -> None:
        self.options, self.folder = options, folder
        self.context: zmq.Context[Socket] = zmq.Context()
        stack.callback(self.context.destroy, linger=0)
        settings = json.loads(options.settings)
        self.broker = stack.enter_context(Node("broker", settings | ({"keys": str(folder.path)} if folder else {})))
        before, watch = overflows(), Watch(self.broker)
        self.crew = Crew(self.broker, workers, folder)
        stack.callback(self.crew.close)
        took = self.crew.joined_s()
        print(
            f"  {workers} joined at once in {took:.2f} s, {overflows() - before} SYNs dropped: {watch.usage()}",
            flush=True,
        )


def idle(place: Place) -> None:
    time.sleep(3)
    watch = Watch(place.broker)
    time.sleep(place.options.seconds)
    print(f"  idle: {watch.usage()}", flush=True)


def load(place: Place) -> None:
    askers = Askers(place.context, place.broker, place.folder)
    with busy(place.options.busy):
        watch = Watch(place.broker)
        tally = askers.flow(place.options.rate, place.options.seconds, 20, 100)
        usage = watch.usage()
        askers.drain()
    print(
        f"  {place.options.rate:g} requests/s of 20 tokens: {usage}, {place.broker.rss_bytes() / MIB:.0f} MiB after\n"
        f"    {tally}",
        flush=True,
    )
    askers.close()


def streams(place: Place) -> None:
    askers = Askers(place.context, place.broker, place.folder)
    number, pace = place.options.streams, place.options.pace
    with busy(place.options.busy):
        askers.tally = Tally()
        askers.ask(number, int(pace * (place.options.seconds + 2)), pace, time.monotonic())
        askers.rest(2)
        askers.tally.token_ms.clear()
        watch, begun = Watch(place.broker), time.monotonic()
        askers.rest(place.options.seconds - 1)
        usage, rate = watch.usage(), len(askers.tally.token_ms) / (time.monotonic() - begun)
        askers.drain()
    print(f"  {number} streams x {pace}/s, {rate:,.0f} tokens/s came: {usage}\n    {askers.tally}", flush=True)
    askers.close()


def kill(place: Place) -> None:
    """A worker with streams is killed beside all others. Its class has two, so that the other one continues them."""
    noticed, stalls = [], []
    for _ in range(place.options.kills):
        pair = Crew(place.broker, 2, place.folder, slots=64, node_class="pair")
        pair.joined_s()
        askers = Askers(place.context, place.broker, place.folder, 1)
        askers.ask(20, 1_000, 50, time.monotonic(), "crowd@pair")
        askers.rest(1.5)
        askers.stalls.clear()
        killed = time.monotonic()
        pair.parts[0].kill()
        askers.rest(2.5)
        stalls.append(max(askers.stalls.values()) * 1e3)
        lost = next(event for event in reversed(askers.events()) if event.kind == "worker lost")
        noticed.append((time.monotonic() - lost.age_ms / 1e3 - killed) * 1e3)
        askers.close()
        pair.close()
    print(f"  a worker killed {len(noticed)} times: noticed after {quantile(noticed, 0.5):.0f} ms at p50, "
          f"{max(noticed):.0f} at most; longest stall of a stream {quantile(stalls, 0.5):.0f}, {max(stalls):.0f} ms",
          flush=True)  # fmt: skip


PHASES: dict[str, Callable[[Place], None]] = {"idle": idle, "load": load, "streams": streams, "kill": kill}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench thousand", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second of the phase `load`")
    parser.add_argument("--streams", type=int, default=1_000, help="of the phase `streams`")
    parser.add_argument("--pace", type=int, default=10, help="tokens a second of each of them")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="processes that never rest, beside the loads")
    parser.add_argument("--keys", action="store_true")
    parser.add_argument("--settings", default="{}", help="of the broker, as JSON")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    for workers in options.workers:
        print(f"thousand: {workers} fake workers, {'with' if options.keys else 'without'} keys", flush=True)
        with ExitStack() as stack:
            folder = stack.enter_context(keyring() if options.keys else nullcontext())
            place = Place(options, stack, folder, workers)
            for phase in options.phases:
                PHASES[phase](place)
    return 0
