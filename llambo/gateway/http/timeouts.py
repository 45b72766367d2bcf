"""Limits on the time and the bytes of a request that is still arriving.

uvicorn waits without limit for a request to be complete, and stores whatever its head, or the trailers of its body,
grow to. Anybody can make use of that, because no token has been checked by then.
"""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

#: The line and the headers of a request; also what lies between the parts of a body, and its trailers.
HEAD_BYTES = 64 * 1024
#: From the start of a connection, or the first byte of a request, until its head is complete; and then to its end.
HEAD_S, BODY_S = 20.0, 120.0
#: A connection that acknowledges nothing of what was sent to it for this long is closed.
UNACKNOWLEDGED_S = 60.0


class TimeoutProtocol(HttpToolsProtocol):
    _timer: asyncio.TimerHandle | None = None
    #: Bytes since the request began that belong to no body.
    _head_bytes = 0
    _in_request = _got_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._got_body = False
        super().data_received(data)
        if self.transport.is_closing():
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
        self._head_bytes = 0
        self._start_timer(BODY_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._got_body = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_request = False
        self._stop_timer()
        super().on_message_complete()

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
        if self._idle:
            head = STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head)
            self.transport.close()
        else:
            self.transport.abort()


def set_tcp_user_timeout(listener: socket.socket, seconds: float = UNACKNOWLEDGED_S) -> None:
    """The kernel closes connections that acknowledge nothing. They inherit the option from the listening socket."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1_000))
