"""`llambo-worker`: one or more per host."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import click

from llambo.cli.child import adopt, child_options, notify
from llambo.cli.command import Command
from llambo.cli.common import Common, config_option, pass_common, verbosity
from llambo.cli.exits import Exit
from llambo.cli.failure import Failure, check_name
from llambo.cli.options import settings_options
from llambo.mesh.settings_table import SECTIONS

if TYPE_CHECKING:
    from llambo.mesh.settings import Settings
    from llambo.worker.config import WorkerConfig

EXAMPLES = """
llambo-worker                                     an engine without a model
llambo-worker --broker tcp://box:7330 --name tiny-01
llambo-worker --fake-tokens-per-s 40 --fake-ttft-ms 200
llambo-worker --fake-crash-at 100                 see how the mesh goes on
"""

ENGINES = ("fake",)
FAKE_HEADING = "The fake engine"
FAKE_SETTINGS = tuple(SECTIONS["fake"].values())
WORKER_SETTINGS = tuple(SECTIONS["worker"].values())


@click.command(
    cls=Command, examples=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)  # fmt: skip
@child_options
@settings_options(["broker", *WORKER_SETTINGS], heading="Settings")
@settings_options(FAKE_SETTINGS, heading=FAKE_HEADING)
@settings_options(["log_level"])
@config_option()
@verbosity("Log to stderr; twice for more.")
@pass_common
def main(common: Common, parent: int | None, notify_fd: int | None) -> None:
    """Run a worker: it joins a broker, waits for it when there is none, and stays.

    SIGTERM and Ctrl-C let it finish what it runs, for at most --drain-ms; a second one ends it at once.
    """
    adopt(parent)
    from llambo.worker.agent import run_worker

    config = worker_config(common.settings)

    def on_ready() -> None:
        if not notify(notify_fd, config.name):
            click.echo(f"llambo-worker: {config.name} is ready, at {config.brokers[0]}", err=True)

    click.get_current_context().exit(run_worker(config, on_ready))


def worker_config(settings: Settings) -> WorkerConfig:
    from llambo.mesh.sockets import split
    from llambo.worker.config import WorkerConfig, default_name
    from llambo.worker.knobs import FakeKnobs

    engine = settings.text("engine")
    if engine not in ENGINES:
        raise Failure(f"there is no engine {engine!r}", f"this release has: {', '.join(ENGINES)}", Exit.USAGE)
    split(settings.text("broker"))  # a bad address is an error now, not a connection that never comes
    of_fake = {knob.name for knob in fields(FakeKnobs)}
    knobs = {row.key: settings[row.name] for row in FAKE_SETTINGS if row.key in of_fake}
    return WorkerConfig(
        brokers=(settings.text("broker"),),
        name=check_name(settings.text("name"), "--name") or default_name(),
        engine=engine,
        model=settings.text("model") or "fake",
        # The table of settings has checked each value against its kind and its choices.
        fake=FakeKnobs(slots=settings.number("slots"), **knobs),  # type: ignore[arg-type]
        node_class=settings.text("node_class"),
        drain_ms=settings.number("drain_ms"),
        stall_ms=settings.number("stall_ms"),
    )


if __name__ == "__main__":
    main(prog_name="llambo-worker")
