"""The gateway as a process: a listening socket, and uvicorn with the application."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from llambo.gateway.access import Access
from llambo.gateway.app import Gateway, make_app
from llambo.gateway.config import GatewayConfig
from llambo.gateway.http.timeouts import TimeoutProtocol, set_tcp_user_timeout
from llambo.gateway.observe.tracing import traces_of
from llambo.mesh.service import clock
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Notifier
from llambo.mesh.wire.errors import Code, LlamboError

log = logging.getLogger(__name__)

BACKLOG = 2_048
#: How long a connection without a request stays open.
IDLE_S = 75


class _Server(uvicorn.Server):
    """uvicorn's own signal handlers would raise each signal again after it has stopped."""

    def __init__(
        self, config: uvicorn.Config, gateway: Gateway, announce: Callable[[], None], notifier: Notifier
    ) -> None:
        super().__init__(config)
        self._gateway, self._announce, self._notifier = gateway, announce, notifier

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second from the event loop that answers requests."""
        now_ms = clock.now_ms()
        if now_ms >= self._notifier.next_wakeup_ms() or self.should_exit:
            open_now = len(self._gateway.feeds)
            status = f"{open_now or 'no'} answer{'s' * (open_now != 1)} in progress"
            self._notifier.update(Condition(status, ready=True, leaving=self.should_exit), now_ms)
        return await super().on_tick(counter)

    def _stop(self) -> None:
        """The first signal lets open requests finish; the second stops at once."""
        self.force_exit = self.should_exit
        self.should_exit = self._gateway.stopping = True


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise LlamboError(Code.BAD_SETTING, f"cannot listen on {host}:{port}: {why}") from error


def check_tls(cert: str, key: str) -> None:
    """Without this check uvicorn would end with a traceback."""
    if not cert:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as error:
        files = f"{cert} and {key}" if key else cert
        raise LlamboError(Code.BAD_SETTING, f"{files} cannot be used for TLS: {error.strerror or error}") from error


def run_gateway(
    config: GatewayConfig, access: Access, announce: Callable[[int], None], notifier: Notifier | None = None
) -> int:
    """Serve until SIGTERM or SIGINT. `announce` is called with the port once requests are answered."""
    check_tls(config.tls_cert, config.tls_key)
    listener = listen(config.host, config.port)
    set_tcp_user_timeout(listener)
    port = int(listener.getsockname()[1])
    # Its debug messages contain the headers of WebSockets, and those contain tokens.
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    gateway = Gateway(config, access)
    gateway.add_traces(traces_of(os.environ))
    settings = uvicorn.Config(
        make_app(gateway),
        loop="uvloop",
        http=TimeoutProtocol,
        ws="websockets-sansio",
        ws_max_size=config.body_bytes,
        # Compression would cost some hundred kB for each connection, and the messages are short.
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=max(1, config.leave_ms // 1_000),
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
    )
    with listener:
        _Server(settings, gateway, lambda: announce(port), notifier or Notifier()).run(sockets=[listener])
    log.info("gateway stopped")
    return 0
