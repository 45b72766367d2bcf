"""`llambo gateway`: HTTP, for programs that use OpenAI's or Anthropic's APIs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, address_of, key_of, pass_common
from llambo.cli.kit.failure import missing
from llambo.cli.kit.flags import config_option, settings_options, verbosity
from llambo.cli.kit.std_streams import print_notice
from llambo.cli.services.service import child_options, gateway_folder, gateway_key, prepare_process, report_ready, serve
from llambo.mesh.settings.settings_table import of_roles

if TYPE_CHECKING:
    from llambo.mesh.service.service_manager import Notifier
    from llambo.mesh.settings.settings import Settings

EXAMPLES = """
llambo gateway                                    for this machine, port 7340
llambo gateway --http-keys /etc/llambo/keys --http-bind 0.0.0.0 \\
    --tls-cert box.pem --tls-key box-key.pem          for the network
curl http://127.0.0.1:7340/v1/models
"""


@click.command(cls=Command, examples=EXAMPLES)
@child_options
@settings_options(of_roles("gateway"), heading="Settings")
@config_option()
@verbosity("Log to stderr, also each request; twice for more.")
@pass_common
def gateway(common: Common, parent: int | None, notify_fd: int | None) -> None:
    """Serve HTTP in front of a mesh: OpenAI's and Anthropic's APIs, metrics, and a dashboard.

    With keys (--http-keys) a program has to send an API token, which `llambo keys token NAME` makes; its requests
    then belong to that name. SIGTERM and Ctrl-C let open answers finish; a second one ends them.
    """
    prepare_process(parent, connections=True)
    settings = common.settings
    click.get_current_context().exit(serve(lambda notifier: _serve(settings, notify_fd, notifier)))


def _serve(settings: Settings, notify_fd: int | None, notifier: Notifier) -> int:
    try:
        from llambo.gateway.server import run_gateway
    except ImportError as error:
        raise missing(f"{error.name}, which the gateway needs,", "gateway") from error
    from llambo.gateway.access import Access
    from llambo.gateway.config import GatewayConfig

    config = GatewayConfig.from_settings(settings.values)
    key = key_of(settings)
    folder = gateway_folder(settings)
    if folder is not None and key is None:
        key = gateway_key(folder)
    access = Access(address_of(settings, key), folder, key)
    scheme = "https" if config.tls_cert else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host

    def announce(port: int) -> None:
        if not report_ready(notify_fd, str(port)):
            print_notice(f"llambo gateway: {scheme}://{host}:{port}/, in front of the mesh at {access.address}")

    return run_gateway(config, access, announce, notifier)
