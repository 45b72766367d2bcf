"""What was sent to a peer on control, as far as it is not known to be read.

ZeroMQ stores messages for a peer that does not read, bounded in number and not in bytes, and most answers are larger
than their questions. So a peer to which much was sent is asked for a receipt. While too much has none, a client's
questions count as lost, and a worker gets no dispatch: whatever is lost on control is sent again by a rule of its own,
so a peer that reads later is served later.

The receipt needs no message of its own. A client acknowledges the END of a request that it does not know, and a worker
answers the cancel of a run that it does not have with an END. The id is random, so only a peer that has read it can
name it. A client that gives no incarnation may be one of the simplest kind, which takes any END for its own. It is not
asked. Its first acknowledgement of an END is a receipt for it, and a heartbeat one for a little: what bounds it in the
end is the queue of its connection (`sockets.CLIENT_HWM`). Nor is a host asked, which is sent little: each of its
heartbeats names the last message that it has read.
"""

from __future__ import annotations

from llambo.mesh.wire import messages as m

#: A peer is asked for a receipt when so much of its limit was sent, one of so many parts. When all of it was sent it
#: gets no more answers. The last one, of 4 MiB at most (limits.RESULT_BYTES), may go beyond the limit.
RECEIPT_PARTS = 4
#: What a heartbeat of a client that is asked for no receipts counts for.
HEARTBEAT_BYTES = 64 * 1024
#: What any message counts for, and each entry of a heartbeat.
MESSAGE_BYTES = 256
ENTRY_BYTES = 24


class Backlog:
    """`receipt`: the id that the peer was asked to name; empty: none."""

    __slots__ = ("_asked_bytes", "_paid_at", "bytes", "limit", "much_bytes", "receipt")

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.limit = limit
        self.much_bytes = limit // RECEIPT_PARTS
        self.receipt = b""
        self._asked_bytes = 0
        self._paid_at = 0

    @property
    def full(self) -> bool:
        return self.bytes >= self.limit

    @property
    def much(self) -> bool:
        return self.bytes >= self.much_bytes

    @property
    def wants_receipt(self) -> bool:
        return self.much and not self.receipt

    def ask(self, receipt: bytes) -> bytes:
        """For all that was sent until now."""
        self.receipt, self._asked_bytes = receipt, self.bytes
        return receipt

    def confirm(self) -> bool:
        """The peer has named the receipt. True if it is to be asked for another one."""
        self.bytes -= self._asked_bytes
        self.receipt = b""
        return self.much

    def acknowledged(self) -> None:
        """An END, by a client that is asked for no receipts."""
        self.bytes = max(0, self.bytes - MESSAGE_BYTES)

    def heartbeat(self, number: int) -> None:
        """Once for each of our own heartbeats, however many the peer sends."""
        if number > self._paid_at:
            self._paid_at = number
            self.bytes = max(0, self.bytes - HEARTBEAT_BYTES)


#: Messages whose size varies: `size_of`. Any other counts for MESSAGE_BYTES.
SIZED = frozenset({m.Accepted, m.Page, m.Result, m.BrokerHeartbeat, m.Problem})


def size_of(message: m.Message) -> int:
    """About its bytes on the wire. Exact where it may be large."""
    match message:
        case m.Accepted():
            return 0  # no larger than its request
        case m.Page():
            return MESSAGE_BYTES + sum(map(len, message.chunks))
        case m.Result():
            return MESSAGE_BYTES + len(message.data)
        case m.BrokerHeartbeat():
            notes = sum(map(len, message.notes.values()))
            return MESSAGE_BYTES + notes + ENTRY_BYTES * (len(message.progress) + len(message.waiting))
        case m.PlaceModels():
            return MESSAGE_BYTES + sum(map(len, message.load)) + sum(map(len, message.evict))
        case m.Problem():
            return MESSAGE_BYTES + len(message.error.text)
        case _:
            return MESSAGE_BYTES
