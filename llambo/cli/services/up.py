"""`llambo up`: a whole mesh on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, config_option, pass_common, verbosity
from llambo.cli.kit.flags import settings_options
from llambo.cli.kit.keyfile import WORKERS, folder_of, worker_key
from llambo.cli.services.worker import FAKE_HEADING, FAKE_SETTINGS, engine_and_model, worker_config
from llambo.mesh.settings.settings_table import BY_NAME, of_roles

if TYPE_CHECKING:
    from llambo.cli.services.local_mesh import Plan

EXAMPLES = """
llambo up                                     a broker and two workers
llambo up --workers 1 --model ~/models/x.gguf
llambo up --workers 3 --engine fake
llambo up --port 0                            on whatever ports are free
llambo up --engine fake --fake-tokens-per-s 40  slow enough to watch
"""

BROKER_SETTINGS = ("bind", "port", "keys", "metrics")
NO_HTTP = "no HTTP: pip install 'llambo[gateway]' brings it"
WORKER_SETTINGS = ("engine", "model", "slots", "ctx", "threads")


@click.command(cls=Command, examples=EXAMPLES)
@click.option(
    "--workers", type=click.IntRange(1, 64), metavar="NUMBER", default=2, show_default=True, help="How many workers."
)
@settings_options([*WORKER_SETTINGS, *BROKER_SETTINGS, "http_port"])
@click.option("--no-http", is_flag=True, help="Without the gateway.")
@settings_options(FAKE_SETTINGS, heading=FAKE_HEADING)
@config_option()
@verbosity("Log to stderr; twice for more.")
@pass_common
def up(common: Common, workers: int, no_http: bool) -> None:
    """Run a broker, workers and a gateway on this machine, until Ctrl-C.

    What dies is started again. Ctrl-C lets the workers finish for a moment; a second one hurries them.
    """
    import asyncio

    from llambo.cli.services.local_mesh import run

    # What is wrong with a setting is said here, and not by each child.
    worker_config(common.settings)
    click.get_current_context().exit(asyncio.run(run(plan(common, workers, http=not no_http))))


def plan(common: Common, workers: int, *, http: bool = True) -> Plan:
    """The commands of the children. They are told what we were told, and find the rest where we found it."""
    from llambo.cli.services.local_mesh import Plan
    from llambo.mesh.service.host import physical_cores

    settings, flags = common.settings, common.flags
    shared = ["--config", common.config] if common.config else []
    shared += ["-v"] * common.verbose
    broker_flags = {name: value for name, value in flags.items() if BY_NAME[name] in of_roles("broker")}
    worker_flags = {
        name: value for name, value in flags.items() if BY_NAME[name] in of_roles("worker") and name != "broker"
    }  # fmt: skip
    if not settings.number("threads") and engine_and_model(settings)[0] == "llama":
        # Threads of one engine wait for each other by spinning: more of them than cores would slow all down.
        worker_flags["threads"] = max(1, physical_cores() // workers)
    gateway, note = _gateway(common, shared) if http else (None, "")
    folder = folder_of(settings, settings.text("bind"))
    if folder is not None:
        worker_flags["key"] = str(worker_key(folder))
        gateway = [*gateway, "--http-keys", str(folder.path)] if gateway else None
    return Plan(
        host=settings.text("bind"),
        broker=[*_module("broker"), *shared, *_said(broker_flags)],
        workers=[(name, [*_module("worker"), *shared, *_said(worker_flags), "--name", name])
                 for name in (f"{WORKERS}-{number}" for number in range(1, workers + 1))],
        gateway=gateway,
        gateway_note=note,
    )  # fmt: skip


def _gateway(common: Common, shared: list[str]) -> tuple[list[str] | None, str]:
    """Its command; or why there is none."""
    from importlib.util import find_spec

    if find_spec("litestar") is None or find_spec("uvicorn") is None:
        return None, NO_HTTP
    # Who lets the broker take any port has reason to fear for the gateway's, too.
    port = 0 if common.settings.number("port") == 0 and "http_port" not in common.flags else None
    told = {} if port is None else {"http_port": port}
    flags = {name: value for name, value in common.flags.items() if name == "http_port"}
    return [sys.executable, "-m", "llambo.cli", "gateway", *shared, *_said({**told, **flags})], ""


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", f"llambo.cli.services.{name}"]


def _said(flags: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in flags.items():
        words += [BY_NAME[name].flag, BY_NAME[name].show(value)]
    return words
