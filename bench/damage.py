"""Malformed models and hostile templates and grammars, each loaded by a real agent with its engine child.

python -m bench.damage [--models N] [--first SEED] [--jobs N] [--story]

    models      small damaged models (bench/tiny_model.py), one after the other under the same
                agent: it has to survive all of them. Each is refused with a reason, or serves a request.
                An engine child may die of one; that counts as a reason.
    templates   twenty chat templates, the same way; those that load are asked through them.
    grammars    grammars and schemas, asked of an intact model: an answer, or an error with a reason.

Meanwhile a worker with an intact model is asked for the same greedy answer, and has to give it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from bench import hostile, tiny_model
from bench.processes import ROOT, Node
from llambo import LlamboError, SyncClient
from llambo.mesh.client.client import Options
from llambo.testing.processes import Process
from llambo.worker.config import LlamaOptions, WorkerConfig

OPTIONS = LlamaOptions(slots=2, context=256, threads=1, batch=64)
#: An engine that is silent for so long is killed by its agent, while it loads and while it decodes. Longer than a busy
#: machine needs, so that only an engine that hangs is killed.
LOAD_MS, STALL_MS = 40_000, 30_000
#: A new engine is started at once: there are many to try.
BACKOFF_MS = 20
#: If an attempt takes longer the agent hangs.
LIMIT_S = 60.0


#: What a line in the log of the agent begins with.
TIME = re.compile(r"\d+\.\d+")


class AgentLost(Exception):
    """The agent died or hangs, which must not happen."""


@dataclass
class Tried:
    """The result of one attempt."""

    what: str
    verdict: str
    text: str = ""


@dataclass
class Outcome:
    tried: list[Tried] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    #: How often the intact model was asked, and each time it did not answer as before.
    asked: int = 0
    changed: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(each.verdict for each in self.tried)

    @property
    def wrong(self) -> int:
        silent = sum(not each.text for each in self.tried if each.verdict != "serves")
        return len(self.lost) + len(self.changed) + silent


class Agent:
    """An agent whose model is replaced under it, again and again."""

    def __init__(self, name: str, port: int, folder: Path) -> None:
        self.name = name
        self.path = folder / f"{name}.gguf"
        self._port = port
        self._address = f"tcp://127.0.0.1:{port}"
        self.put(tiny_model.whole())
        config = WorkerConfig(
            (self._address,), name=name, engine="llama", model=str(self.path), llama=OPTIONS, load_ms=LOAD_MS,
            stall_ms=STALL_MS, backoff_ms=BACKOFF_MS,
        )  # fmt: skip
        words = ["-m", "llambo.testing.node", "worker", msgspec.json.encode(config).decode(), str(os.getpid())]
        self._process = Process(*words, name=name, cwd=ROOT)
        self._read = 0
        verdict = self.load(0.0)
        if verdict.verdict != "serves":
            self.close()
            raise AgentLost(f"{name} does not serve a whole model: {verdict}")

    def put(self, content: bytes) -> float:
        """Replace the model file; returns the time."""
        part = self.path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(self.path)
        return time.time()

    def replace(self, content: bytes) -> Tried:
        since = self.put(content)
        self._kill_engine()
        return self.load(since)

    def _kill_engine(self) -> None:
        for engine in self._process.children():
            with suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)

    def load(self, since: float) -> Tried:
        """The result of the first engine that was started after that time."""
        started = False
        try:
            for text in self._process.follow(self._read, LIMIT_S):
                self._read += 1
                moment, _, line = text.partition(" ")
                if not TIME.fullmatch(moment):
                    continue  # a line of the engine child itself
                if line.startswith("engine: starting"):
                    started = started or float(moment) > since
                elif line.startswith("engine: ready"):
                    if started:
                        break
                    if float(moment) > since:  # it was being started when the others were killed: the next one counts
                        self._kill_engine()
                elif started and line.startswith("engine: "):
                    died = "was ended by" in line or "stalled" in line or "exited with status 1" in line
                    return Tried("", "engine died" if died else "refused", line.removeprefix("engine: "))
        except AssertionError as error:
            raise AgentLost(str(error)) from None
        return Tried("", "serves")

    def ask(self, **options: object) -> str:
        """Empty if it answers, or else the error."""
        settings: Options = {"model": self.name, "max_tokens": 8, "seed": 1, "deadline_ms": int(1000 * LIMIT_S)}
        settings.update(options)  # type: ignore[typeddict-item]
        with SyncClient(self._address) as client:
            try:
                client.generate("Hello", **settings)
            except LlamboError as error:
                return f"{error.code}: {error.text}"
        return ""

    def alive(self) -> bool:
        return self._process.running

    def story(self) -> str:
        return " | ".join(self._process.err[-10:])

    def close(self) -> None:
        self._process.kill()


class IntactWorker:
    """A worker with an intact model, which must keep giving the same answer."""

    def __init__(self, port: int, folder: Path) -> None:
        path = folder / "intact.gguf"
        path.write_bytes(tiny_model.whole())
        options = {"broker": f"tcp://127.0.0.1:{port}", "name": "intact", "engine": "llama", "model": str(path)}
        self._node = Node("worker", {**options, "llama": asdict(OPTIONS)})
        self._client = SyncClient(f"tcp://127.0.0.1:{port}")
        self._client.connect()
        self._lock = threading.Lock()
        self._truth = self._answer()

    def _answer(self) -> list[int]:
        return self._client.generate("Hello", model="intact", temperature=0.0, max_tokens=8, deadline_ms=30_000).ids

    def check(self, outcome: Outcome, after: str) -> None:
        with self._lock:
            outcome.asked += 1
            try:
                ids = self._answer()
            except LlamboError as error:
                outcome.changed.append(f"after {after}: {error}")
            else:
                if ids != self._truth:
                    outcome.changed.append(f"after {after}: another answer")

    def close(self) -> None:
        self._client.close()
        self._node.kill()


@contextmanager
def meshed() -> Iterator[tuple[int, Path, IntactWorker]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = stack.enter_context(Node("broker")).port
        intact = IntactWorker(port, folder)
        stack.callback(intact.close)
        yield port, folder, intact


# --- what is tried ------------------------------------------------------------------------------------------


def try_one(agent: Agent, what: str, content: bytes, form: str = "text") -> Tried:
    tried = agent.replace(content)
    tried.what = what
    if tried.verdict == "serves" and (error := agent.ask(form=form)):
        tried.verdict, tried.text = "answers with an error", error
    return tried


def models(first: int, count: int, jobs: int) -> Outcome:
    outcome = Outcome()
    with meshed() as (port, folder, intact):

        def share(number: int) -> None:
            agent = Agent(f"agent{number}", port, folder)
            for seed in range(first + number, first + count, jobs):
                what, content = tiny_model.mutant(seed)
                what = f"seed {seed}: {what}"
                try:
                    outcome.tried.append(try_one(agent, what, content))
                except AgentLost as lost:
                    outcome.lost.append(f"{what}: {lost}")
                    agent.close()
                    agent = Agent(f"agent{number}", port, folder)
                intact.check(outcome, what)
                if len(outcome.tried) % 50 == 0:
                    print(f"  {len(outcome.tried)}: {dict(outcome.verdicts)}", file=sys.stderr, flush=True)
            if not agent.alive():
                outcome.lost.append(f"agent{number} in the end")
            agent.close()

        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(share, number) for number in range(jobs)]:
                done.result()
    return outcome


def one_by_one(names: Collection[str], attempt: Callable[[Agent, str], Tried]) -> Outcome:
    """All with one agent, which is replaced when it is lost."""
    outcome = Outcome()
    with meshed() as (port, folder, intact):
        agent = Agent("agent", port, folder)
        for name in names:
            try:
                outcome.tried.append(attempt(agent, name))
                if not agent.alive():
                    raise AgentLost(agent.story())
            except AgentLost as lost:
                outcome.lost.append(f"{name}: {lost}")
                agent.close()
                agent = Agent("agent", port, folder)
            intact.check(outcome, name)
        agent.close()
    return outcome


def templates(names: Collection[str] = ()) -> Outcome:
    def attempt(agent: Agent, name: str) -> Tried:
        return try_one(agent, name, tiny_model.whole(hostile.TEMPLATES[name]), form="user")

    return one_by_one(names or hostile.TEMPLATES, attempt)


def grammars(names: Collection[str] = ()) -> Outcome:
    def attempt(agent: Agent, name: str) -> Tried:
        error = agent.ask(sampling=hostile.GRAMMARS[name], max_tokens=24)
        return Tried(name, "serves" if not error else "engine died" if "engine died" in error else "refused", error)

    return one_by_one(names or hostile.GRAMMARS, attempt)


# --- all of it ----------------------------------------------------------------------------------------------


def report(name: str, outcome: Outcome, seconds: float, story: bool) -> None:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in outcome.verdicts.most_common())
    print(f"{name}: {len(outcome.tried)} tried in {seconds:.0f} s: {verdicts}")
    print(
        f"  {len(outcome.lost)} agents lost; the intact model answered {outcome.asked - len(outcome.changed)} "
        f"of {outcome.asked} times as before"
    )
    for line in (*outcome.lost, *outcome.changed):
        print(f"  ! {line}")
    for tried in outcome.tried:
        if not tried.text and tried.verdict != "serves":
            print(f"  ! {tried.what}: {tried.verdict}, without a reason")
        elif story:
            print(f"  {tried.verdict:>22}  {tried.what}  {tried.text[:150]}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--story", action="store_true", help="print the result of each")
    parser.add_argument("--part", choices=("models", "templates", "grammars"))
    options = parser.parse_args(arguments)
    wrong = 0
    parts: dict[str, Callable[[], Outcome]] = {
        "models": lambda: models(options.first, options.models, options.jobs),
        "templates": templates,
        "grammars": grammars,
    }
    for name, part in parts.items():
        if options.part in (None, name):
            began = time.monotonic()
            outcome = part()
            report(name, outcome, time.monotonic() - began, options.story or name != "models")
            wrong += outcome.wrong
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
