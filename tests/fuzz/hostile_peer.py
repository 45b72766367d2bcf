"""What hostile peers over real sockets have in common, and how a run of theirs is judged."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from llambo.mesh.client.client import Client
from llambo.mesh.wire import codec
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code
from llambo.mesh.wire.identity import PeerKey
from llambo.testing.mesh import Mesh
from tests.fuzz import honest, plausible
from tests.fuzz.mutator import Mutator
from tests.fuzz.target import Frames
from tests.fuzz.targets import Bodies, chunk_mutant
from tests.unit import samples

#: A process that takes no message for so long hangs.
HANG_S = 30.0
HANG_MS = int(HANG_S * 1_000)
#: Replies are read after so many messages, and this often a peer begins anew.
LISTEN_EVERY = 16
ANEW_EVERY = 3_000
#: How seldom a message is sent that ends the session or the work of the target, since nothing is tested after it.
ENDS_IT = 0.0005
MODEL = "tiny"

Said = tuple[m.Message, bytes | None]


@dataclass
class Report:
    role: str
    sent: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    sessions: int = 0
    tallies: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: What was not as it should be.
    wrong: list[str] = field(default_factory=list)

    def show(self) -> str:
        total = self.sent.total()
        pace = total / self.seconds
        lines = [
            f"live {self.role}: {total:,} mutated messages in {self.seconds:.0f} s, {pace:,.0f} a second",
            f"{dict(self.sent)} in {self.sessions:,} sessions",
            honest.show(self.tallies),
            *(f"FINDING {text}" for text in self.wrong),
            f"findings: {len(self.wrong)}",
        ]
        return "\n".join(lines)


class HostilePeer:
    """What hostile peers have in common: a seed, live ids, and messages that are almost right."""

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)
        self.mutator = Mutator(self.chance)
        self.bodies = {name: Bodies(name) for name in samples.CODECS}
        self.session = codec.NO_SESSION
        self.alive: list[bytes] = []

    def remember(self, *values: Any) -> None:
        self.mutator.pool = [*self.mutator.pool[-60:], *(value for value in values if value)]

    def message(self, direction: str, say: Callable[[], Said]) -> Frames:
        """Half plausible, half a sample with something in it changed."""
        if self.chance.random() < 0.5:
            return plausible.frames(self.mutator, self.session, [say()])
        bodies = self.bodies[direction]
        frames = bodies.mutate(self.mutator, self.chance.choice(bodies.seeds))
        return [codec.MAGIC + self.session, *frames[1:]] if frames and self.chance.random() < 0.95 else frames

    def chunk(self) -> bytes:
        key = (self.chance.choice(self.alive) if self.alive else bytes(24))[:24].ljust(24, b"d")
        frame = self.chance.choice(plausible.chunks(key, self.chance.choice((1, 3))))
        return frame if self.chance.random() < 0.3 else chunk_mutant(self.mutator, [frame])[0]


def wait_to_send(socket: zmq.Socket[bytes], frames: Sequence[bytes], what: str) -> None:
    """It is taken in time, or this is a hang. A message without frames cannot be sent at all."""
    if not frames:
        return
    assert socket.poll(int(HANG_S * 1_000), zmq.POLLOUT), f"{what} takes nothing for {HANG_S} s"
    socket.send_multipart(list(frames), zmq.DONTWAIT)


def ends(frames: Frames, decoder: codec.Codec[Any]) -> bool:
    """Whether it ends the session or the work under attack, as the protocol allows."""
    ends = (m.Goodbye, m.Drain, m.ClientHello, m.WorkerHello, m.HostHello, m.Welcome)
    return any(
        isinstance(message, ends)
        or (isinstance(message, m.Problem) and message.error.code is Code.UNKNOWN_SESSION)
        # Any client may drain a worker by its name, so the name of the honest one is left out.
        or (isinstance(message, m.DrainWorker) and message.worker == "w0")
        for message, _ in decoder.decode(frames).messages
    )


def send_all(
    report: Report, watched: honest.Honest, count: int, senders: Sequence[Callable[[Counter[str]], None]]
) -> None:
    began = time.monotonic()
    watched.mark("during")
    try:
        while report.sent.total() < count:
            for send_one in senders:
                send_one(report.sent)
    except AssertionError as error:
        report.wrong.append(str(error))
    report.seconds = time.monotonic() - began
    watched.mark("after")


async def status(mesh: Mesh, key: PeerKey | None = None) -> Any:
    """Everything that was sent before has been read when this is answered."""
    async with Client(mesh.address, key=key or "", connect_ms=HANG_MS, query_ms=HANG_MS) as client:
        return await client.status()


def judge(report: Report, mesh: Mesh) -> None:
    faults = honest.faults_of(report.tallies)
    if faults:
        report.wrong.append(f"{faults} honest requests failed")
    if not all(tally["answers"] for name, tally in report.tallies.items() if name == "during"):
        report.wrong.append("no honest request was answered during it")
    for process in (*mesh.workers, *([mesh.process] if mesh.process else [])):
        if "Traceback" in process.log():
            report.wrong.append(f"{process.name} wrote:\n{process.log()[-2_000:]}")
