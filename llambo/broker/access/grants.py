"""Which client may subscribe to which topic on the token plane.

libzmq gives a grant to the pipe of the last event it handed out. A frame sent upstream that is no
subscription at all makes it lose step, and a grant given then would go to the pipe of another peer. So after
any such frame every grant is refused until the socket has been drained: then it is in step again. Refused
clients subscribe again when their token plane turns out to be silent.
"""

from __future__ import annotations

from collections.abc import Mapping

from llambo.broker.records.registry import ClientEntry
from llambo.mesh.wire import limits

SUBSCRIBE, UNSUBSCRIBE = 1, 0


class SubscriptionGrants:
    """Decides on each upstream frame of the XPUB socket, in the order they are read."""

    def __init__(self, topics: Mapping[bytes, ClientEntry]) -> None:
        self.refused = 0
        self.junk = 0
        self._topics = topics
        self._out_of_step = False

    def admit(self, frame: bytes, user: str = "") -> bytes | None:
        """The topic to grant to the sender of this frame, whose key is `user`, or None."""
        if not frame or frame[0] not in (SUBSCRIBE, UNSUBSCRIBE):
            self.junk += 1
            self._out_of_step = True
            return None
        if frame[0] == UNSUBSCRIBE:
            return None
        topic = frame[1:]
        client = self._topics.get(topic)
        if self._out_of_step or len(topic) != limits.TOPIC_BYTES or client is None or client.link.user != user:
            self.refused += 1
            return None
        return topic

    def drained(self) -> None:
        """The socket had nothing more to read."""
        self._out_of_step = False
