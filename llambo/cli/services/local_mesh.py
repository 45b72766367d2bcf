"""A broker and its workers as children: started in order, kept, stopped in order."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llambo.cli.kit.exits import Exit
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.following import end_signals
from llambo.cli.kit.standard import tell
from llambo.mesh.link.sockets import DEFAULT_PORT, endpoint, reachable

# --- Child processes that are kept alive until they are told to stop. ---
#
# What a child prints is passed on with its name before it. One that dies is started again, after a pause that doubles
# while it keeps dying. Each has a process group of its own: a Ctrl-C on the terminal reaches the parent alone, which
# then stops its children in order.

#: The pause before a child that died is started again: from the first to the last. It is short again after it has
#: lived for the last one.
BACKOFF_S = (0.5, 8.0)
#: How long a child gets after SIGTERM, before it is told again, and then before SIGKILL.
STOP_S = (5.0, 2.0)
#: The longest line that is passed on in one piece.
LINE_BYTES = 64 * 1024


class Child:
    """One child and its successors. `started` is what it said when it was ready for the first time."""

    def __init__(self, name: str, command: Sequence[str], say: Callable[[str], None], show: Callable[[str], None]):
        self.name = name
        self.process: Process | None = None
        self.started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopping = asyncio.Event()
        self._command = list(command)
        self._say = say
        self._show = show

    def add(self, *words: str) -> None:
        """To the command of its successors: what this one has found out."""
        self._command += words

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    async def keep(self) -> int:
        """Run it, again and again until `stop`. The exit status of one that died before it was ever ready."""
        loop, pause_s = asyncio.get_running_loop(), BACKOFF_S[0]
        while True:
            began = loop.time()
            code = await self._live()
            if self.stopping.is_set() or not self.started.done():
                return code
            if loop.time() - began > BACKOFF_S[1]:
                pause_s = BACKOFF_S[0]
            self._say(f"{self.name} {how_it_ended(code)}; it starts again in {pause_s:g} s")
            if await self._told_to_stop(pause_s):
                return code
            pause_s = min(2 * pause_s, BACKOFF_S[1])

    async def stop(self) -> None:
        """Ask, ask again, insist."""
        self.stopping.set()
        if self.process is None or self.process.returncode is not None:
            return
        for number, patience_s in ((signal.SIGTERM, STOP_S[0]), (signal.SIGTERM, STOP_S[1]), (signal.SIGKILL, None)):
            try:
                self.process.send_signal(number)
                async with asyncio.timeout(patience_s):
                    await self.process.wait()
                    return
            except TimeoutError:
                self._say(f"{self.name} is still there; it is told again")
            except ProcessLookupError:
                return

    # --- inside --------------------------------------------------------------------------------------

    async def _live(self) -> int:
        ours, theirs = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, "--notify-fd", str(theirs), "--parent", str(os.getpid()),
                stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, pass_fds=[theirs], process_group=0, limit=LINE_BYTES,
            )  # fmt: skip
        finally:
            os.close(theirs)
        if self.stopping.is_set():  # since before it was there to be told
            self.process.kill()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hear(ours))
            tasks.create_task(self._pass_on(self.process))
            return await self.process.wait()

    async def _hear(self, descriptor: int) -> None:
        """The one line it says when it is ready; the end of the pipe if it never is."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
        )
        line = (await reader.readline()).decode().strip()
        transport.close()
        if not line:
            return
        if self.started.done():
            self._say(f"{self.name} is ready again, pid {self.pid}")
        else:
            self.started.set_result(line)

    async def _pass_on(self, process: Process) -> None:
        assert process.stdout is not None, "it was started with a pipe"
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the limit: what there was of it is gone
                continue
            if not line:
                return
            self._show(f"{self.name:<8} | {line.decode('utf-8', 'replace').rstrip()}")

    async def _told_to_stop(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                return await self.stopping.wait()
        except TimeoutError:
            return False


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


#: A body that anybody can send.
CHAT = '{"messages": [{"role": "user", "content": "What is AI?"}]}'


@dataclass(frozen=True, slots=True)
class Plan:
    host: str
    broker: list[str]
    #: Name and command of each.
    workers: list[tuple[str, list[str]]]
    #: None: no HTTP.
    gateway: list[str] | None = None
    #: Why there is none, if somebody should know.
    gateway_note: str = ""


async def run(plan: Plan) -> int:
    """Until SIGINT, SIGTERM or SIGHUP. Children do not outlive it, however it ends."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = end_signals()
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    fleet = Fleet(plan)
    work = asyncio.create_task(fleet.run())
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            say("stopping")
            # From here on a Ctrl-C means: now.
            for number in numbers:
                loop.add_signal_handler(number, fleet.hurry)
    finally:
        waiting.cancel()
        # First, so that it starts nothing more. Its children are kept by tasks of their own.
        work.cancel()
        await fleet.stop()
    with suppress(asyncio.CancelledError):
        await work
    if not stop.is_set() and fleet.failure is not None:
        raise fleet.failure
    say("stopped")
    return Exit.OK


class Fleet:
    def __init__(self, plan: Plan) -> None:
        self.failure: Failure | None = None
        self._plan = plan
        self._broker = Child("broker", plan.broker, say, show)
        self._workers: list[Child] = []
        self._gateway: Child | None = None
        self._keeping: set[asyncio.Task[int]] = set()

    async def run(self) -> None:
        """Start everything and wait; ends only if something cannot be started."""
        port = await self._start(self._broker)
        if port is None:
            return
        self._broker.add("--port", port)  # those who know it look for it there
        address = endpoint(reachable(self._plan.host), int(port))
        say(f"broker at {address}, pid {self._broker.pid}")
        self._workers = [
            Child(name, [*command, "--broker", address], say, show) for name, command in self._plan.workers
        ]
        if self._plan.gateway is not None:
            self._gateway = Child("gateway", [*self._plan.gateway, "--broker", address], say, show)
        started = await asyncio.gather(
            self._start_gateway(self._gateway), *[self._start_worker(worker) for worker in self._workers]
        )
        if None in started:
            return
        invite(address, len(self._workers), http=started[0] or "")
        if self._plan.gateway_note:
            say(self._plan.gateway_note)
        await asyncio.wait(self._keeping)

    async def _start_worker(self, worker: Child) -> str | None:
        name = await self._start(worker)
        if name is not None:
            say(f"{name} is ready, pid {worker.pid}")
        return name

    async def _start_gateway(self, gateway: Child | None) -> str | None:
        """Where it is reached; empty if there is none."""
        if gateway is None:
            return ""
        port = await self._start(gateway)
        if port is None:
            return None
        gateway.add("--http-port", port)
        return f"http://127.0.0.1:{port}"

    async def _start(self, child: Child) -> str | None:
        """What it says when it is ready. None, with `failure` set, if it ended before."""
        keeping = asyncio.create_task(child.keep())
        self._keeping.add(keeping)
        news: list[asyncio.Future[Any]] = [keeping, child.started]
        await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
        if child.started.done():
            return child.started.result()
        code = keeping.result()
        hint = "its last words are above"
        if child is self._gateway:
            hint += "; --http-port 0 takes any free port, --no-http does without it"
        self.failure = Failure(f"{child.name} {how_it_ended(code)} before it was ready", hint, max(code, Exit.ERROR))
        return None

    async def stop(self) -> None:
        """Workers before the broker: what they still have to say goes to a broker that is there."""
        for child in self._children():
            child.stopping.set()  # from now on it is no news that one of them ends
        if self._gateway is not None:
            await self._gateway.stop()
        await asyncio.gather(*[worker.stop() for worker in self._workers])
        await self._broker.stop()
        await asyncio.gather(*self._keeping)

    def _children(self) -> list[Child]:
        return [*([self._gateway] if self._gateway else []), *self._workers, self._broker]

    def hurry(self) -> None:
        for child in self._children():
            if child.process is not None and child.process.returncode is None:
                child.process.kill()


def invite(address: str, workers: int, http: str = "") -> None:
    which = "" if address == endpoint("127.0.0.1", DEFAULT_PORT) else f" --broker {address}"
    say(f"{workers} worker{'s are' if workers != 1 else ' is'} ready; in another terminal try:")
    for words in ('send "What is AI?"', "status", "workers"):
        tell(f"    llambo{which} {words}", err=False)
    if http:
        tell(f"    curl {http}/v1/chat/completions -d '{CHAT}'", err=False)
        say(f"the dashboard is at {http}/")
    say("Ctrl-C stops everything")


def say(text: str) -> None:
    tell(f"llambo up: {text}", err=False)


def show(line: str) -> None:
    tell(line)
