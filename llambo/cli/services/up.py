"""`llambo up`: a whole mesh on this machine. Its processes are children: started in order, restarted, stopped in order.

Start order: the broker, then workers and gateway together. Stop order: the gateway, the workers, the broker, so that
what the workers still have to report reaches a broker.

A child's output is passed on with its name before each line. A child that dies is restarted after a pause, which
doubles while it keeps dying. Each child has a process group of its own, so a Ctrl-C on the terminal reaches only the
parent, which then stops the children in order. The kernel kills children whose parent died.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.download_view import download_missing
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.flags import config_option, fake_options, settings_options, verbosity
from llambo.cli.kit.follow import end_signals
from llambo.cli.kit.std_streams import print_notice
from llambo.cli.services.service import WORKERS, folder_of, worker_key
from llambo.cli.services.worker import default_is_here, engine_and_model, hosted_names, lacks_models, worker_config
from llambo.mesh.link.sockets import DEFAULT_PORT, endpoint, is_loopback, local_endpoint, split, split_all
from llambo.mesh.security import keys
from llambo.mesh.security.keyring import ISSUED
from llambo.mesh.service.extras import extra_command
from llambo.mesh.service.host import exit_text, free_memory_bytes, ready_line
from llambo.mesh.settings.settings import Settings
from llambo.mesh.settings.settings_table import BY_NAME, of_roles
from llambo.mesh.wire.messages import Kind
from llambo.mesh.wire.timers import backoff_ms

EXAMPLES = """
llambo up                                SmolLM2, or else all that is here
llambo up --model ~/models/x.gguf
llambo up --model hf:ORG/REPO            on a terminal: downloads it first
llambo up --models ~/models              loads each when it is asked for
llambo up --models all                   those here, and downloads
llambo up --workers 3 --engine fake      without a model: words are made up
llambo up --port 0                       on any free ports
llambo up --bind 0.0.0.0 --keys keys     for other machines too: `llambo keys`
"""

BROKER_SETTINGS = ("policy", "bind", "port", "keys", "metrics")
FAKE = "the engine is the fake one: no model runs, and its words are made up"
WORKER_SETTINGS = (
    "model",
    "models",
    "memory_bytes",
    "model_ttl_ms",
    "share",
    "engine",
    "node_class",
    "slots",
    "ctx",
    "threads",
    "gpu_layers",
    "kv_type",
    "flash_attn",
)
#: The pause before a restart: the first one, and the longest. After a child has lived for the longest, the row of
#: failures starts over.
PAUSE_MS = (500, 8_000)
#: How long a child gets after SIGTERM before it is sent again, and then before SIGKILL.
STOP_S = (5.0, 2.0)
#: The longest line of output that is passed on in one piece.
LINE_BYTES = 64 * 1024
#: Small models for a machine that has none: the free memory that each needs with the default slots, its name, its size.
TO_BEGIN_WITH = (
    (4 << 30, "hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF", "1.1 GB"),
    (0, "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF", "0.5 GB"),
)
#: What a model is good for, by its kind: the words of a command, a path and a body.
FIRST: dict[Kind, tuple[str, str, str]] = {
    "generate": (
        'send "What is AI?"', "/v1/chat/completions", '{"messages": [{"role": "user", "content": "What is AI?"}]}'
    ),
    "embed": ('embed --compare "a cat" "a kitten" "a bond"', "/v1/embeddings", '{"input": "a cat"}'),
    "rerank": ('rerank "cats" "a cat" "a bond"', "/v1/rerank", '{"query": "cats", "documents": ["a cat", "a bond"]}'),
}  # fmt: skip


@click.command(cls=Command, examples=EXAMPLES)
@click.option(
    "--workers", type=click.IntRange(1, 64), metavar="NUMBER", default=1, show_default=True,
    help="How many workers. Each has the model in memory.",
)  # fmt: skip
@click.argument("named", metavar="[MODEL]", required=False)
@settings_options([*WORKER_SETTINGS, *BROKER_SETTINGS, "http_port"])
@click.option("--no-http", is_flag=True, help="Without the gateway.")
@fake_options
@config_option()
@verbosity("Log to stderr; twice for more.")
@pass_common
def up(common: Common, named: str | None, workers: int, no_http: bool) -> None:
    """Run a broker, workers and a gateway on this machine, until Ctrl-C. MODEL is the same as --model MODEL.

    Without a model it serves SmolLM2, if that is installed, and otherwise each model of this machine that is asked for
    (--models all), also those that `llambo pull` downloads later.

    A process that dies is restarted. Ctrl-C gives the workers a moment to finish; a second one kills everything.
    """
    if named is not None and common.flags.setdefault("model", named) != named:
        raise click.UsageError(f"two models are named, {named} and {common.flags['model']}; `llambo up` serves one")
    if workers > 1 and hosted_names(common.settings):
        raise click.UsageError(f"--workers {workers} and --models: one process loads all of these models")
    if common.settings.text("engine") != "fake":
        if sys.stderr.isatty():
            download_missing(common.settings)
        if workers == 1 and not any(common.settings.text(name) for name in ("model", "models", "lora")):
            _serve_what_is_here(common)
    # A wrong setting is reported here once, and not by each child.
    worker_config(common.settings, "llambo up")
    click.get_current_context().exit(asyncio.run(run(commands(common, workers, http=not no_http))))


def _serve_what_is_here(common: Common) -> None:
    """Unless there is the model of a worker that is given none."""
    from llambo.worker.host.catalogue import ALL

    if not default_is_here(common.settings):
        common.flags["models"] = ALL
        common.settings = replace(common.settings, values={**common.settings.values, "models": ALL})


# --- The commands of the children. ---


@dataclass(frozen=True, slots=True)
class MeshCommands:
    host: str
    broker: list[str]
    #: Name and command of each.
    workers: list[tuple[str, list[str]]]
    #: None: no HTTP.
    gateway: list[str] | None = None
    #: Why there is no gateway, if the user did not ask for that.
    gateway_note: str = ""
    #: The workers have the fake engine.
    fake: bool = False
    #: The folder of keys; None: clients need none.
    keys: Path | None = None
    #: The worker loads models when they are asked for.
    on_demand: bool = False
    #: And there is none yet.
    no_model: bool = False
    #: The model is the one that is served if none is named.
    is_default: bool = False
    kind: Kind = "generate"


def commands(common: Common, workers: int, *, http: bool = True) -> MeshCommands:
    """Children get the flags of `llambo up`, and read other settings from where `llambo up` read them."""
    from llambo.mesh.service.host import physical_cores

    settings, flags = common.settings, common.flags
    shared = ["--config", common.config] if common.config else []
    shared += ["-v"] * common.verbose
    broker_flags = {name: value for name, value in flags.items() if BY_NAME[name] in of_roles("broker")}
    worker_flags = {
        name: value for name, value in flags.items() if BY_NAME[name] in of_roles("worker") and name != "broker"
    }  # fmt: skip
    engine, model, _ = engine_and_model(settings)
    if not settings.number("threads") and engine == "llama":
        # Threads of one engine wait for each other by spinning: more of them than cores would slow all down.
        worker_flags["threads"] = max(1, physical_cores() // workers)
    gateway, note = _gateway(common, shared) if http else (None, "")
    folder = folder_of(settings, settings.text("bind"), "llambo up")
    if folder is not None:
        worker_flags["key"] = str(worker_key(folder))
        gateway = [*gateway, "--http-keys", str(folder.path)] if gateway else None
    return MeshCommands(
        host=settings.text("bind"),
        broker=[*_module("broker"), *shared, *_as_arguments(broker_flags)],
        workers=[(name, [*_module("worker"), *shared, *_as_arguments(worker_flags), "--name", name])
                 for name in (f"{WORKERS}-{number}" for number in range(1, workers + 1))],
        gateway=gateway,
        gateway_note=note,
        fake=engine == "fake",
        keys=folder.path.absolute() if folder is not None else None,
        on_demand=bool(hosted_names(settings)),
        is_default=engine != "fake" and not settings.text("model") and not hosted_names(settings),
        no_model=engine != "fake" and lacks_models(settings),
        kind=_kind_of(settings, engine, model),
    )  # fmt: skip


def _kind_of(settings: Settings, engine: str, model: str) -> Kind:
    """By the header of its file. What is wrong with that is reported by its worker."""
    if engine == "fake":
        return settings.text("fake_kind")  # type: ignore[return-value]  # the table of settings has the choices
    from llambo.worker.models import gguf, model_files
    from llambo.worker.models.purpose import purpose_of

    try:
        return purpose_of(gguf.read(str(model_files.find(model)))).kind
    except (gguf.BadModelFile, model_files.NoSuchModel, OSError):
        return "generate"


def _gateway(common: Common, shared: list[str]) -> tuple[list[str] | None, str]:
    """Its command; or None, and why."""
    from importlib.util import find_spec

    if find_spec("litestar") is None or find_spec("uvicorn") is None:
        return None, f"no HTTP and no dashboard: {extra_command('gateway')} brings both"
    # A user who lets the broker take any port probably has another mesh running, whose gateway has the usual port.
    port = 0 if common.settings.number("port") == 0 and "http_port" not in common.flags else None
    default = {} if port is None else {"http_port": port}
    flags = {name: value for name, value in common.flags.items() if name == "http_port"}
    return [sys.executable, "-m", "llambo.cli", "gateway", *shared, *_as_arguments({**default, **flags})], ""


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", f"llambo.cli.services.{name}"]


def _as_arguments(flags: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        words += [BY_NAME[name].flag, BY_NAME[name].show(value)]
    return words


# --- One child. ---


class Child:
    """A process and its successors. `started` is the line that the first one wrote when it was ready."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process: Process | None = None
        self.started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopping = asyncio.Event()
        self._command = list(command)

    def add_arguments(self, *words: str) -> None:
        """For its successors: the port that this one was given."""
        self._command += words

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    async def supervise(self) -> int:
        """Run it again and again until `stop`. Returns the exit status; earlier if it died before it was ever ready."""
        loop, failures = asyncio.get_running_loop(), 1
        while True:
            began = loop.time()
            code = await self._run_once()
            if self.stopping.is_set() or not self.started.done():
                return code
            failures = 2 if (loop.time() - began) * 1_000 > PAUSE_MS[1] else failures + 1
            pause_s = backoff_ms(failures, *PAUSE_MS) / 1_000
            report(f"{self.name} {exit_text(code)}; it starts again in {pause_s:g} s")
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self.stopping.wait()
                    return code

    async def stop(self) -> None:
        """SIGTERM, SIGTERM again, SIGKILL. A worker finishes its runs after the first one."""
        self.stopping.set()
        if self.process is None or self.process.returncode is not None:
            return
        for number, wait_s in ((signal.SIGTERM, STOP_S[0]), (signal.SIGTERM, STOP_S[1]), (signal.SIGKILL, None)):
            try:
                self.process.send_signal(number)
                async with asyncio.timeout(wait_s):
                    await self.process.wait()
                    return
            except TimeoutError:
                report(f"{self.name} has not ended yet; it gets another signal")
            except ProcessLookupError:
                return

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()

    # --- inside --------------------------------------------------------------------------------------

    async def _run_once(self) -> int:
        ours, theirs = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self._command, "--notify-fd", str(theirs), "--parent", str(os.getpid()),
                stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, pass_fds=[theirs], process_group=0, limit=LINE_BYTES,
            )  # fmt: skip
        finally:
            os.close(theirs)
        if self.stopping.is_set():  # `stop` was called while it was being started, and found no process
            self.process.kill()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._wait_ready(ours))
            tasks.create_task(self._pass_on(self.process))
            return await self.process.wait()

    async def _wait_ready(self, descriptor: int) -> None:
        line = await ready_line(descriptor)
        if line and self.started.done():
            report(f"{self.name} is ready again, pid {self.pid}")
        elif line:
            self.started.set_result(line)

    async def _pass_on(self, process: Process) -> None:
        assert process.stdout is not None, "it was started with a pipe"
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the limit: that part of it is dropped
                continue
            if not line:
                return
            print_notice(f"{self.name:<8} | {line.decode('utf-8', 'replace').rstrip()}")


# --- All of them. ---


async def run(made: MeshCommands) -> int:
    """Until SIGINT, SIGTERM or SIGHUP."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = end_signals()
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    mesh = LocalMesh(made)
    work = asyncio.create_task(mesh.run())
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            report("stopping")
            # From here on a Ctrl-C kills.
            for number in numbers:
                loop.add_signal_handler(number, mesh.kill)
    finally:
        waiting.cancel()
        # Before `stop`, so that it starts nothing more. Its children are supervised by tasks of their own.
        work.cancel()
        await mesh.stop()
    with suppress(asyncio.CancelledError):
        await work
    if not stop.is_set() and mesh.failure is not None:
        raise mesh.failure
    report("stopped")
    return Exit.OK


class LocalMesh:
    def __init__(self, made: MeshCommands) -> None:
        self.failure: Failure | None = None
        self._commands = made
        self._broker = Child("broker", made.broker)
        self._workers: list[Child] = []
        self._gateway: Child | None = None
        self._supervising: set[asyncio.Task[int]] = set()

    async def run(self) -> None:
        """Start everything and wait. Returns only if something could not be started."""
        port = await self._start(self._broker)
        if port is None:
            return
        self._broker.add_arguments("--port", port)  # workers and clients look for its successor there
        address = local_endpoint(self._commands.host, int(port))
        report(f"broker at {address}, pid {self._broker.pid}")
        self._workers = [Child(name, [*command, "--broker", address]) for name, command in self._commands.workers]
        if self._commands.gateway is not None:
            self._gateway = Child("gateway", [*self._commands.gateway, "--broker", address])
        url, *names = await asyncio.gather(
            self._start_gateway(self._gateway), *[self._start_worker(worker) for worker in self._workers]
        )
        if url is None or None in names:
            return
        show_first_commands(address, self._commands, url)
        await asyncio.wait(self._supervising)

    async def _start_worker(self, worker: Child) -> str | None:
        name = await self._start(worker)
        if name is not None:
            report(f"{name} is ready, pid {worker.pid}")
        return name

    async def _start_gateway(self, gateway: Child | None) -> str | None:
        """Its URL; empty if there is no gateway; None if it could not be started."""
        if gateway is None:
            return ""
        port = await self._start(gateway)
        if port is None:
            return None
        gateway.add_arguments("--http-port", port)
        return f"http://127.0.0.1:{port}"

    async def _start(self, child: Child) -> str | None:
        """Its readiness line. None, with `failure` set, if it ended before that."""
        supervising = asyncio.create_task(child.supervise())
        self._supervising.add(supervising)
        first: list[asyncio.Future[int] | asyncio.Future[str]] = [supervising, child.started]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if child.started.done():
            return child.started.result()
        code = supervising.result()
        hint = "the reason is in its last lines above; `llambo doctor` looks for more"
        if child is self._gateway:
            hint += "; --no-http does without HTTP"
        self.failure = Failure(f"{child.name} {exit_text(code)} before it was ready", hint, max(code, Exit.ERROR))
        return None

    async def stop(self) -> None:
        for child in self._children():
            child.stopping.set()  # from now on a child that ends is expected
        if self._gateway is not None:
            await self._gateway.stop()
        await asyncio.gather(*[worker.stop() for worker in self._workers])
        await self._broker.stop()
        await asyncio.gather(*self._supervising)

    def kill(self) -> None:
        for child in self._children():
            child.kill()

    def _children(self) -> list[Child]:
        return [*([self._gateway] if self._gateway else []), *self._workers, self._broker]


def show_first_commands(address: str, made: MeshCommands, url: str) -> None:
    workers = len(made.workers)
    flag = "" if address == endpoint("127.0.0.1", DEFAULT_PORT) else f" --broker {address}"
    if made.no_model:
        report("there is no model on this machine yet; in another terminal:")
    elif made.on_demand:
        report("models are loaded when they are asked for; in another terminal try:")
    else:
        report(f"{workers} worker{'s are' if workers != 1 else ' is'} ready; in another terminal try:")
    token = ""
    if made.keys is not None:
        # The address in the key is for other machines; this one may not be able to resolve it.
        print_notice(f"    export LLAMBO_KEY={made.keys / ISSUED / 'admin.key'} LLAMBO_BROKER={address}", err=False)
        flag, token = "", ' -H "Authorization: Bearer $TOKEN"'
    first, path, body = FIRST[made.kind]
    if made.no_model:
        _, name, size = next(each for each in TO_BEGIN_WITH if free_memory_bytes() >= each[0])
        shown = (f"pull {name}   # {size}; or another one: `llambo help models`", f"chat --model {name}")
    else:
        asking = ("models", 'send --model NAME "What is AI?"') if made.on_demand else (first,)
        shown = (*asking, "status", "workers")
    for words in shown:
        print_notice(f"    llambo{flag} {words}", err=False)
    if url and made.keys is not None:
        print_notice(
            f"    TOKEN=$(llambo keys token admin --keys {made.keys})   # once: each call makes another", err=False
        )
    if url and not made.no_model:
        print_notice(f"    curl {url}{path}{token} -d '{body}'", err=False)
    if made.is_default:
        report("`llambo up --models all` serves all models of this machine, also those that `llambo pull` will bring")
    if url:
        report(f"the dashboard is at {url}/")
    if made.keys is not None and not is_loopback(made.host):
        show_elsewhere(made.keys / ISSUED, address, first)
    if made.gateway_note:
        report(made.gateway_note)
    if made.fake:
        report(FAKE)
    report("Ctrl-C stops everything")


def show_elsewhere(issued: Path, address: str, first: str) -> None:
    """The keys contain the broker's address for other machines. The port may have been chosen for this run."""
    (host, at), *_ = split_all(keys.read(issued / "admin.key").address)
    port = split(address)[1]
    flag = "" if at == port else f" --broker {endpoint(host, port)}"
    report(f"on other machines, with copies of admin.key and {WORKERS}.key from {issued}:")
    print_notice(f"    llambo --key admin.key{flag} {first}", err=False)
    print_notice(f"    llambo-worker --key {WORKERS}.key{flag} --model FILE.gguf", err=False)


def report(text: str) -> None:
    print_notice(f"llambo up: {text}", err=False)
