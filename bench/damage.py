"""Models, templates and grammars that mean harm, each met by a real agent with its engine child.

python -m bench.damage [--models N] [--first SEED] [--jobs N] [--story]

    models      small models with something wrong in them (bench/tiny_model.py), one after the other under the same
                agent: it has to survive all of them. Each is refused with a reason, or serves and is asked something.
                An engine child may die of one; that is a reason as well.
    templates   twenty chat templates, the same way; those that load are asked through them.
    grammars    grammars and schemas, asked of a model that is well: an answer, or an error with a reason.

All the while a worker with a model that is well is asked for the same greedy answer, and has to give it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from bench import hostile, tiny_model
from bench.processes import ROOT, Node, children
from llambo import LlamboError, SyncClient
from llambo.mesh.client.client import Options
from llambo.worker.config import WorkerConfig
from llambo.worker.engine.engine_options import LlamaKnobs

KNOBS = LlamaKnobs(slots=2, context=256, threads=1, batch=64)
#: An engine that is silent for so long is killed by its agent, while it loads and while it decodes.
LOAD_MS, STALL_MS = 20_000, 8_000
#: A new engine comes at once: there are many to try.
BACKOFF_MS = 20
#: Nothing takes longer, or the agent hangs.
PATIENCE_S = 60.0
AGENT = """
import logging, os, sys
import msgspec
from llambo.worker.agent.agent import run_worker
from llambo.worker.config import WorkerConfig
from llambo.mesh.service.host import end_with_parent

end_with_parent(int(sys.argv[2]))
logging.basicConfig(level=logging.INFO, format="%(created)f %(message)s")
sys.exit(run_worker(msgspec.json.decode(sys.argv[1], type=WorkerConfig)))
"""


class AgentLost(Exception):
    """The agent died or hangs: what must not be."""


@dataclass
class Tried:
    """What became of one thing that means harm."""

    what: str
    verdict: str
    text: str = ""


@dataclass
class Outcome:
    tried: list[Tried] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    #: How often the model that is well was asked, and how often it was not well.
    asked: int = 0
    unwell: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(each.verdict for each in self.tried)

    @property
    def wrong(self) -> int:
        silent = sum(not each.text for each in self.tried if each.verdict != "serves")
        return len(self.lost) + len(self.unwell) + silent


class Ward:
    """An agent whose model is replaced under it, again and again."""

    def __init__(self, name: str, port: int, folder: Path) -> None:
        self.name = name
        self.path = folder / f"{name}.gguf"
        self._port = port
        self._address = f"tcp://127.0.0.1:{port}"
        self.put(tiny_model.whole())
        config = WorkerConfig(
            (self._address,), name=name, engine="llama", model=str(self.path), llama=KNOBS, load_ms=LOAD_MS,
            stall_ms=STALL_MS, backoff_ms=BACKOFF_MS,
        )  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", AGENT, msgspec.json.encode(config).decode(), str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
        )
        self._lines: SimpleQueue[tuple[float, str]] = SimpleQueue()
        self._story: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        verdict = self.load(0.0)
        if verdict.verdict != "serves":
            self.close()
            raise AgentLost(f"{name} does not serve a whole model: {verdict}")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            moment, _, said = text.partition(" ")
            with suppress(ValueError):  # the engine child writes there, too
                self._lines.put((float(moment), said))

    def put(self, content: bytes) -> float:
        """A new file in place of the old one; since when it is there."""
        part = self.path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(self.path)
        return time.time()

    def replace(self, content: bytes) -> Tried:
        since = self.put(content)
        for engine in children(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        return self.load(since)

    def load(self, since: float) -> Tried:
        """What became of the first engine that was started after the file was there."""
        deadline, started = time.monotonic() + PATIENCE_S, False
        while True:
            if self._process.poll() is not None:
                raise AgentLost(f"{self.name} ended with status {self._process.returncode}: {self.story()}")
            try:
                moment, line = self._lines.get(timeout=min(1.0, max(0.01, deadline - time.monotonic())))
            except Empty:
                if time.monotonic() > deadline:
                    raise AgentLost(f"{self.name} said nothing for {PATIENCE_S} s: {self.story()}") from None
                continue
            self._story = [*self._story[-9:], line]
            if line.startswith("engine: starting"):
                started = started or moment > since
            elif started and line.startswith("engine: ready"):
                return Tried("", "serves")
            elif started and line.startswith("engine: "):
                died = "was ended by" in line or "stalled" in line or "exited with status 1" in line
                return Tried("", "engine died" if died else "refused", line.removeprefix("engine: "))

    def ask(self, **options: object) -> str:
        """Nothing if it answers, or the error."""
        settings: Options = {"model": self.name, "max_tokens": 8, "seed": 1, "deadline_ms": int(1000 * PATIENCE_S)}
        settings.update(options)  # type: ignore[typeddict-item]
        with SyncClient(self._address) as client:
            try:
                client.generate("Hello", **settings)
            except LlamboError as error:
                return f"{error.code}: {error.text}"
        return ""

    def alive(self) -> bool:
        return self._process.poll() is None

    def story(self) -> str:
        return " | ".join(self._story)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stderr is not None
        self._process.stderr.close()


class Well:
    """The worker that has nothing to do with it."""

    def __init__(self, port: int, folder: Path) -> None:
        path = folder / "well.gguf"
        path.write_bytes(tiny_model.whole())
        self._knobs = {"slots": 2, "context": 256, "threads": 1, "batch": 64}
        options = {"broker": f"tcp://127.0.0.1:{port}", "name": "well", "engine": "llama", "model": str(path)}
        self._node = Node("worker", {**options, "llama": self._knobs})
        self._client = SyncClient(f"tcp://127.0.0.1:{port}")
        self._client.connect()
        self._lock = threading.Lock()
        self._truth = self._answer()

    def _answer(self) -> list[int]:
        return self._client.generate("Hello", model="well", temperature=0.0, max_tokens=8, deadline_ms=30_000).ids

    def check(self, outcome: Outcome, after: str) -> None:
        with self._lock:
            outcome.asked += 1
            try:
                ids = self._answer()
            except LlamboError as error:
                outcome.unwell.append(f"after {after}: {error}")
            else:
                if ids != self._truth:
                    outcome.unwell.append(f"after {after}: another answer")

    def close(self) -> None:
        self._client.close()
        self._node.end()


@contextmanager
def meshed() -> Iterator[tuple[int, Path, Well]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = stack.enter_context(Node("broker")).told["ports"][0]
        well = Well(port, folder)
        stack.callback(well.close)
        yield port, folder, well


# --- what is tried ------------------------------------------------------------------------------------------


def try_one(ward: Ward, what: str, content: bytes, form: str = "text") -> Tried:
    tried = ward.replace(content)
    tried.what = what
    if tried.verdict == "serves" and (error := ward.ask(form=form)):
        tried.verdict, tried.text = "answers with an error", error
    return tried


def models(first: int, count: int, jobs: int) -> Outcome:
    outcome = Outcome()
    with meshed() as (port, folder, well):

        def share(number: int) -> None:
            ward = Ward(f"ward{number}", port, folder)
            for seed in range(first + number, first + count, jobs):
                what, content = tiny_model.mutant(seed)
                what = f"seed {seed}: {what}"
                try:
                    outcome.tried.append(try_one(ward, what, content))
                except AgentLost as lost:
                    outcome.lost.append(f"{what}: {lost}")
                    ward.close()
                    ward = Ward(f"ward{number}", port, folder)
                well.check(outcome, what)
                if len(outcome.tried) % 50 == 0:
                    print(f"  {len(outcome.tried)}: {dict(outcome.verdicts)}", file=sys.stderr, flush=True)
            if not ward.alive():
                outcome.lost.append(f"ward{number} in the end")
            ward.close()

        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(share, number) for number in range(jobs)]:
                done.result()
    return outcome


def templates(names: Collection[str] = ()) -> Outcome:
    outcome = Outcome()
    with meshed() as (port, folder, well):
        ward = Ward("ward", port, folder)
        for name in names or hostile.TEMPLATES:
            source = hostile.TEMPLATES[name]
            try:
                outcome.tried.append(try_one(ward, name, tiny_model.whole(source), form="user"))
            except AgentLost as lost:
                outcome.lost.append(f"{name}: {lost}")
                ward.close()
                ward = Ward("ward", port, folder)
            well.check(outcome, name)
        ward.close()
    return outcome


def grammars(names: Collection[str] = ()) -> Outcome:
    outcome = Outcome()
    with meshed() as (port, folder, well):
        ward = Ward("ward", port, folder)
        for name in names or hostile.GRAMMARS:
            sampling = hostile.GRAMMARS[name]
            error = ward.ask(sampling=sampling, max_tokens=24)
            verdict = "serves" if not error else "engine died" if "engine died" in error else "refused"
            outcome.tried.append(Tried(name, verdict, error))
            if not ward.alive():
                outcome.lost.append(f"{name}: {ward.story()}")
                ward.close()
                ward = Ward("ward", port, folder)
            well.check(outcome, name)
        ward.close()
    return outcome


# --- all of it ----------------------------------------------------------------------------------------------


def report(name: str, outcome: Outcome, seconds: float, story: bool) -> None:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in outcome.verdicts.most_common())
    print(f"{name}: {len(outcome.tried)} tried in {seconds:.0f} s: {verdicts}")
    print(
        f"  {len(outcome.lost)} agents lost; the model beside them answered {outcome.asked - len(outcome.unwell)} "
        f"of {outcome.asked} times as ever"
    )
    for line in (*outcome.lost, *outcome.unwell):
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
    parser.add_argument("--story", action="store_true", help="tell what became of each")
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
