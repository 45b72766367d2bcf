"""`llambo-broker`: four ports in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.failure import Exit, Failure, check_name
from llambo.cli.kit.flags import config_option, settings_options, verbosity
from llambo.cli.kit.std_streams import print_notice
from llambo.cli.services.service import child_options, folder_of, prepare_process, report_ready, serve
from llambo.mesh.settings.settings_table import of_roles
from llambo.mesh.wire.errors import LlamboError

if TYPE_CHECKING:
    from llambo.mesh.service.service_manager import Notifier
    from llambo.mesh.settings.settings import Settings

EXAMPLES = """
llambo-broker                                     for this machine
llambo-broker --bind 0.0.0.0 --keys /etc/llambo/keys   for the network
llambo-broker --port 9000 --queue-requests 200
llambo-broker --metrics 127.0.0.1:9330            for Prometheus
llambo-worker --broker tcp://box:7330             then, on other machines
llambo --broker tcp://box:7330 send hello
"""


@click.command(
    cls=Command, examples=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)  # fmt: skip
@child_options
@settings_options(of_roles("broker"), heading="Settings")
@config_option()
@verbosity("Log to stderr; twice for more.")
@pass_common
def main(common: Common, parent: int | None, notify_fd: int | None) -> None:
    """Run a broker. Clients and workers connect to it; it makes no connections of its own.

    It listens on the given port and the three after it, or on the sockets that systemd passes to it. SIGTERM and
    Ctrl-C end it.
    """
    prepare_process(parent, connections=True)
    settings = common.settings
    click.get_current_context().exit(serve(lambda notifier: _serve(settings, notify_fd, notifier)))


def _serve(settings: Settings, notify_fd: int | None, notifier: Notifier) -> int:
    import os

    from llambo.broker.config import BrokerConfig
    from llambo.broker.server import run_broker
    from llambo.mesh.link.sockets import endpoint
    from llambo.mesh.service.service_manager import inherited

    config = BrokerConfig.from_settings(settings.values)
    check_name(settings.text("broker_name"), "--name")
    given = inherited(os.environ, os.getpid())
    host, started = given.host if given else settings.text("bind"), False
    folder = folder_of(settings, host)
    metrics_at = settings.text("metrics")
    server = None
    if metrics_at:
        from llambo.broker.report.metrics_http import MetricsServer, token_in

        server = MetricsServer(metrics_at, token_in(settings.text("metrics_token")))

    def announce(port: int) -> None:
        nonlocal started
        started = True
        if not report_ready(notify_fd, str(port)):
            print_notice(f"llambo-broker: listening at {endpoint(host, port)}")
            if server is not None:
                print_notice(f"llambo-broker: metrics at {server.url}")

    try:
        return run_broker(
            config,
            host,
            settings.number("port"),
            announce,
            inherited=given,
            notifier=notifier,
            keys=folder,
            metrics=server,
        )
    except LlamboError as error:
        if started:
            raise
        hint = "is a broker running there already? `llambo status` shows it; --port 0 takes any free ports"
        raise Failure(error.text, hint, Exit.ERROR) from error


if __name__ == "__main__":
    main(prog_name="llambo-broker")
