"""A thousand workers on one broker: what they cost idle, under load, when all join at once, and when one is killed.

The broker is the real one at default settings. The workers are fakes (bench/crowd.py): real cores and links on real
sockets, many in one process, whose engines only write down the time. So are the clients (bench/askers.py). What counts
is the broker's processor time, of its loop and of the threads of libzmq; a machine that is busy with other things
changes the times on the wall.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import zmq

from bench.askers import Askers, Tally
from bench.crowd import JOIN_S
from bench.figures import quantile
from bench.keys import keys as keyring
from bench.peers import Socket
from bench.processes import Node
from llambo.mesh.security.keyring import Folder

MIB = 2**20
#: Processes over which the workers are spread.
PARTS = 2


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
    askers = Askers(place.context, place.broker, place.folder, stamped=True)
    with busy(place.options.busy):
        watch = Watch(place.broker)
        tally = askers.flow(place.options.rate, place.options.seconds, 20, "crowd", 100)
        usage = watch.usage()
        askers.drain()
    print(
        f"  {place.options.rate:g} requests/s of 20 tokens: {usage}, {place.broker.rss_bytes() / MIB:.0f} MiB after\n"
        f"    {tally}",
        flush=True,
    )
    askers.close()


def streams(place: Place) -> None:
    askers = Askers(place.context, place.broker, place.folder, stamped=True)
    number, pace = place.options.streams, place.options.pace
    with busy(place.options.busy):
        askers.tally = Tally()
        askers.ask(number, int(pace * (place.options.seconds + 2)), time.monotonic(), "crowd", pace)
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
        askers = Askers(place.context, place.broker, place.folder, 1, stamped=True)
        askers.ask(20, 1_000, time.monotonic(), "crowd@pair", 50)
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
