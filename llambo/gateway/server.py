"""The gateway as a process: a listening socket, and uvicorn with the application.

`TimeoutProtocol` limits the time and the bytes of a request that is still arriving: uvicorn itself waits without limit
for a request to be complete, and stores whatever its head, or the trailers of its body, grow to. Anybody can make use
of that, because no token has been checked by then.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from llambo.gateway.access import Access
from llambo.gateway.app import Gateway, make_app
from llambo.gateway.config import GatewayConfig
from llambo.mesh.service import clock
from llambo.mesh.service.extras import extra_command
from llambo.mesh.service.notify_core import Condition
from llambo.mesh.service.service_manager import Notifier
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.gateway.tracing import OtelTraces

log = logging.getLogger(__name__)

#: The line and the headers of a request; also what lies between the parts of a body, and its trailers.
HEAD_BYTES = 64 * 1024
#: From the start of a connection, or the first byte of a request, until its head is complete; and then to its end.
HEAD_S, BODY_S = 20.0, 120.0
#: What is still read of a body that was answered before its end, in bytes and seconds: a client that sends all of it
#: before it reads would otherwise find its connection reset, and not the answer.
DISCARDED_BYTES, DISCARD_S = 32 * 1024 * 1024, 5.0
#: A connection that acknowledges nothing of what was sent to it for this long is closed.
UNACKNOWLEDGED_S = 60.0
#: Bytes of a connection that the kernel stores and has not sent.
UNSENT_BYTES = 128 * 1024
BACKLOG = 2_048
#: How long the application may take to notice that its connections were closed.
CLOSE_S = 2
#: How long a connection without a request stays open.
IDLE_S = 75


#: At most one line about connections that do not speak HTTP in this time: anybody can open as many as they like.
STRANGERS_MS = 60_000
#: The logger of connections. uvicorn's warnings to it, one for each request that is wrong, are not shown.
_CONNECTIONS = logging.getLogger("uvicorn.error.connections")
_CONNECTIONS.setLevel(logging.ERROR)


class Strangers:
    """Connections that sent what is not valid HTTP: they are counted, and reported with their number."""

    def __init__(self) -> None:
        self._more, self._quiet_until = 0, 0

    def report(self, peer: str, data: bytes, now_ms: int) -> None:
        if now_ms < self._quiet_until:
            self._more += 1
            return
        more = f", as did {self._more} connections since the last such line" if self._more else ""
        # With this byte ZeroMQ begins a connection.
        zeromq = "; it is a peer of a mesh; a broker has another port, 7330 by default" if data[:1] == b"\xff" else ""
        log.warning("%s has sent what is not valid HTTP%s%s", peer, more, zeromq)
        self._more, self._quiet_until = 0, now_ms + STRANGERS_MS


class _ResponseTransport:
    """What one response needs of its connection, which may be closed later than the response asks for."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


class TimeoutProtocol(HttpToolsProtocol):
    _strangers = Strangers()
    _data = b""
    _timer: asyncio.TimerHandle | None = None
    #: Bytes since the request began that belong to no body.
    _head_bytes = 0
    _in_request = _in_body = _got_body = False
    #: Bytes of a body that was answered already; None: there is no such body.
    _discarded: int | None = None
    _close_after_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.logger = _CONNECTIONS
        self._start_timer(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._got_body, self._data = False, data[:1]
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # it is a WebSocket now
            return
        if self._timer is None and not self._idle:
            return
        if self._timer is None:  # empty lines begin no request, and would keep the connection open without limit
            self._start_timer(HEAD_S)
        if self._in_request and not self._got_body:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request, self._head_bytes = True, 0
        self._start_timer(HEAD_S)

    def on_headers_complete(self) -> None:
        if self._is_ambiguous():
            raise ValueError("a head that two servers may read differently")  # uvicorn sends a 400, and closes
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self._refuse(431)  # it came in one piece
            raise ValueError("a head that is too large")
        self._head_bytes, self._in_body = 0, True
        self._start_timer(BODY_S)
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # it is no WebSocket
            self.cycle.transport = _ResponseTransport(self.transport, self._close)  # type: ignore[assignment]

    def _is_ambiguous(self) -> bool:
        """What the parser lets through: two hosts, other codings than `chunked`, and chunks before HTTP/1.1."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        return (
            hosts > 1 or (codings not in ([], [b"chunked"])) or bool(codings and self.parser.get_http_version() < "1.1")
        )

    def on_body(self, body: bytes) -> None:
        self._got_body = True
        super().on_body(body)
        if self._discarded is not None:
            self._discarded += len(body)
            if self._discarded > DISCARDED_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        self._in_request = self._in_body = False
        self._discarded = None
        self._stop_timer()
        super().on_message_complete()
        if self._close_after_body:
            self.transport.close()

    def _close(self) -> None:
        """The response is complete, and its connection is not to be used again."""
        if self._in_body and self.cycle.response_complete:
            self._close_after_body = True
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        if self._in_body and self.cycle.response_complete:  # otherwise it is the body of a later request
            self._discarded = 0
            self._start_timer(DISCARD_S)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():  # refused already
            self._strangers.report(self.client[0] if self.client else "a client", self._data, clock.now_ms())
            super().send_400_response(msg)

    def handle_websocket_upgrade(self) -> None:
        self._stop_timer()
        super().handle_websocket_upgrade()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._timed_out, seconds)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self, seconds: float) -> None:
        if self.flow.read_paused:  # the delay is ours: we do not read at present
            self._start_timer(seconds)
            return
        self._refuse(408)

    def _refuse(self, status: int) -> None:
        """While the application handles a request, it learns of the end as of any connection that the client closes."""
        self._stop_timer()
        if self._discarded is not None:
            self.transport.close()
        elif self._idle:
            head = STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head)
            self.transport.close()
        else:
            self.transport.abort()


def set_tcp_unsent_limit(listener: socket.socket) -> None:
    """The kernel takes no more than this ahead of what it has sent: for a client that does not read, that is little."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def set_tcp_user_timeout(listener: socket.socket, seconds: float = UNACKNOWLEDGED_S) -> None:
    """The kernel closes connections that acknowledge nothing. They inherit the option from the listening socket."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1_000))


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
        loop = asyncio.get_running_loop()
        if self.should_exit:
            self._close_all()
            loop.call_later(CLOSE_S, setattr, self, "force_exit", True)
        else:
            loop.call_later(max(1.0, self._gateway.config.leave_ms / 1_000), self._close_all)
        self.should_exit = self._gateway.stopping = True

    def _close_all(self) -> None:
        """As if the clients had closed their connections. A reader of a stream sees that it is not whole, and goes on
        at another gateway. (uvicorn cancels what is left later, with a traceback for each.)
        """
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter for the log of uvicorn, which closes a WebSocket for invalid UTF-8, and logs that as an error."""
    if record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError):
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        hint = "--http-port NUMBER takes another port, --http-port 0 any free one" if _is_taken(error) else ""
        raise LlamboError(Code.BAD_SETTING, f"cannot listen on {host}:{port}: {why}", hint=hint) from error


def _is_taken(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def check_tls(cert: str, key: str) -> None:
    """Without this check uvicorn would end with a traceback."""
    if not cert:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as error:
        files = f"{cert} and {key}" if key else cert
        text = f"{files} cannot be used for TLS: {error.strerror or error}"
        hint = "`llambo help gateway` shows how such files are made"
        raise LlamboError(Code.BAD_SETTING, text, hint=hint) from error


def traces_of(environ: Mapping[str, str]) -> OtelTraces | None:
    """None: the standard variables of OpenTelemetry do not say where to send traces.

    `OTEL_EXPORTER_OTLP_ENDPOINT` does, or `OTEL_TRACES_EXPORTER=otlp` for a collector on this host. Raises LlamboError
    if the variables ask for what is not supported, or if the extra `otel` is not installed.
    """
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    where = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or named == "none" or not (where or named):
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if named not in ("", "otlp") or protocol not in (None, "", "http/protobuf"):
        text = f"traces are sent by OTLP over HTTP only, not by {named or 'otlp'} over {protocol or 'http/protobuf'}"
        raise LlamboError(Code.BAD_SETTING, text)
    try:
        from llambo.gateway import tracing  # noqa: PLC0415  # an optional dependency
    except ImportError as error:
        text = f"traces are requested (OTEL_...), but the package {error.name} is missing"
        raise LlamboError(Code.BAD_SETTING, f"{text}", hint=extra_command("otel")) from error
    log.info("traces are sent to %s", where or "the collector on this host")
    is_named = "OTEL_SERVICE_NAME" in environ or "service.name" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return tracing.sender(is_named)


def run_gateway(
    config: GatewayConfig, access: Access, announce: Callable[[int], None], notifier: Notifier | None = None
) -> int:
    """Serve until SIGTERM or SIGINT. `announce` is called with the port once requests are answered."""
    check_tls(config.tls_cert, config.tls_key)
    listener = listen(config.host, config.port)
    set_tcp_user_timeout(listener)
    set_tcp_unsent_limit(listener)
    port = int(listener.getsockname()[1])
    # Its debug messages contain the headers of WebSockets, and those contain tokens.
    logging.getLogger("uvicorn.error").setLevel(max(logging.INFO, logging.getLogger().level))
    logging.getLogger("uvicorn.error").addFilter(without_traceback)
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
        timeout_graceful_shutdown=max(1, config.leave_ms // 1_000) + CLOSE_S,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
    )
    with listener:
        _Server(settings, gateway, lambda: announce(port), notifier or Notifier()).run(sockets=[listener])
    log.info("gateway stopped")
    return 0
