"""How long, and how much, the gateway listens to who has not yet finished what he asks.

uvicorn waits for ever for a request to be whole, and keeps whatever its head, or the trailers of its body, grow to.
Whoever comes may do that, as nobody has asked for a token by then.
"""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

#: A request's line and its headers; also what is between the parts of a body, and its trailers.
HEAD_BYTES = 64 * 1024
#: From a connection's beginning, or a request's first byte, until its head is there; and from there to its end.
HEAD_S, BODY_S = 20.0, 120.0
#: Whoever takes nothing of what is sent to him for so long is cut off.
TAKES_NOTHING_S = 60.0


class PatientProtocol(HttpToolsProtocol):
    _limit: asyncio.TimerHandle | None = None
    #: Bytes that came since the request began and are part of no body.
    _said = 0
    _in_request = _body_came = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._within(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unlimited()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._body_came = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._limit is None and not self._idle:
            return
        if self._limit is None:  # empty lines begin no request, and would keep the connection for ever
            self._within(HEAD_S)
        if self._in_request and not self._body_came:
            self._said += len(data)
            if self._said > HEAD_BYTES:
                self._refuse(431)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request, self._said = True, 0
        self._within(HEAD_S)

    def on_headers_complete(self) -> None:
        self._said = 0
        self._within(BODY_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_came = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_request = False
        self._unlimited()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._unlimited()
        super().handle_websocket_upgrade()

    def _within(self, seconds: float) -> None:
        self._unlimited()
        self._limit = self.loop.call_later(seconds, self._too_late, seconds)

    def _unlimited(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _too_late(self, seconds: float) -> None:
        if self.flow.read_paused:  # it is us who do not listen
            self._within(seconds)
            return
        self._refuse(408)

    def _refuse(self, status: int) -> None:
        """In the middle of a request there is somebody who answers it; he is told that the client has gone."""
        self._unlimited()
        if self._idle:
            head = STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head)
            self.transport.close()
        else:
            self.transport.abort()


def cut_off_who_takes_nothing(listener: socket.socket, seconds: float = TAKES_NOTHING_S) -> None:
    """The kernel does it, whoever writes: connections have this from the socket they come through."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1_000))
