"""`llambo bridge`: a socket for small programs, and for netcat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, connect
from llambo.cli.kit.flags import client_options, settings_options
from llambo.cli.kit.follow import end_signals
from llambo.cli.kit.std_streams import print_notice
from llambo.cli.services.service import raise_descriptor_limit

if TYPE_CHECKING:
    from llambo.bridge.server import Listener
    from llambo.mesh.settings.settings import Settings

EXAMPLES = """
llambo bridge                             prints where it listens
llambo bridge --socket ./b.sock --quit-stops
nc -U ./b.sock                            then type PING
printf 'INFER What is AI?\\n' | nc -N -U ./b.sock | jq -r .data.text
llambo bridge --tcp 7350                  for programs without Unix sockets
"""

SETTINGS = (
    "bridge_socket",
    "bridge_tcp",
    "bridge_connections",
    "bridge_in_flight",
    "bridge_line_bytes",
    "bridge_leave_ms",
    "connect_ms",
)


@click.command(cls=Command, examples=EXAMPLES)
@click.option("--quit-stops", is_flag=True, help="QUIT ends the bridge, and not just its connection.")
@settings_options(SETTINGS)
@client_options
def bridge(common: Common, quit_stops: bool) -> None:
    """Listen on a Unix socket for commands, one a line, and answer each in a line of JSON.

    \b
    PING                     is the bridge there?
    STATUS                   the mesh in numbers
    LOAD MODEL, FREE MODEL   load it for this connection; give it back
    INFER PROMPT             the whole answer
    INFER_STREAM PROMPT      the answer as it comes, a line for each piece
    BINARY                   msgpack objects from now on, in both directions
    QUIT                     end this connection

    Instead of a plain PROMPT there may be a JSON object with options. Only this user can open the socket. The format
    is described in docs/bridge.md. SIGTERM and Ctrl-C let answers finish; a second one ends them.
    """
    import asyncio

    raise_descriptor_limit()
    listener = _listen(common.settings)
    try:
        asyncio.run(_run(common, listener, quit_stops))
    finally:
        listener.close()


def _listen(settings: Settings) -> Listener:
    from llambo.bridge.server import default_path, open_tcp, open_unix

    if settings.number("bridge_tcp") >= 0:
        return open_tcp(settings.number("bridge_tcp"))
    path = settings.text("bridge_socket")
    return open_unix(Path(path).expanduser() if path else default_path(os.environ))


async def _run(common: Common, listener: Listener, quit_stops: bool) -> None:
    import asyncio

    from llambo.bridge.connection import ConnectionLimits
    from llambo.bridge.server import Bridge, BridgeLimits

    settings, loop = common.settings, asyncio.get_running_loop()
    of_each = ConnectionLimits(settings.number("bridge_line_bytes"), settings.number("bridge_in_flight"), quit_stops)
    limits = BridgeLimits(settings.number("bridge_connections"), settings.number("bridge_leave_ms"))
    async with connect(common) as client:
        client.on_link = _report_link
        running = Bridge(client, listener, of_each, limits)
        for number in end_signals():
            loop.add_signal_handler(number, running.stop)
        await running.run(lambda: print_notice(f"llambo bridge: listening at {listener.where}; try: {listener.hint}"))
        print_notice("llambo bridge: stopped")


def _report_link(lost: str) -> None:
    text = f"lost the broker ({lost}); trying again" if lost else "the broker is back"
    print_notice(f"llambo bridge: {text}")
