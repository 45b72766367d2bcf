"""Responses that are stored, so that a caller can fetch them again, or continue their conversation by their id.

They are in the memory of this gateway only, and each identity sees only its own. The memory of each identity and of all
together is bounded; the oldest responses are dropped first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from llambo.gateway.answers.api import JsonObject, encode
from llambo.mesh.wire.conversation import ChatMessage
from llambo.mesh.wire.errors import Code, LlamboError

#: Limits for one identity.
STORED_RESPONSES = 1_000
STORED_BYTES = 16 * 1024 * 1024
#: Limit for all together. Beyond it the identity that uses most loses its oldest response.
ALL_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """The body, and the conversation up to its end, both as JSON."""

    body: bytes
    conversation: bytes

    @property
    def size(self) -> int:
        return len(self.body) + len(self.conversation)


@dataclass(slots=True)
class _OfIdentity:
    responses: dict[str, StoredResponse] = field(default_factory=dict)
    size: int = 0

    def put(self, id: str, stored: StoredResponse) -> None:
        self.take(id)
        self.responses[id] = stored
        self.size += stored.size

    def take(self, id: str) -> StoredResponse | None:
        stored = self.responses.pop(id, None)
        self.size -= stored.size if stored is not None else 0
        return stored

    def take_oldest(self) -> None:
        self.take(next(iter(self.responses)))


class ResponseStore:
    def __init__(
        self, *, responses: int = STORED_RESPONSES, bytes: int = STORED_BYTES, all_bytes: int = ALL_BYTES
    ) -> None:
        self._responses, self._bytes, self._all_bytes = responses, bytes, all_bytes
        self._by_owner: dict[str, _OfIdentity] = {}

    def __len__(self) -> int:
        return sum(len(theirs.responses) for theirs in self._by_owner.values())

    @property
    def size(self) -> int:
        return sum(theirs.size for theirs in self._by_owner.values())

    def put(self, owner: str, body: JsonObject, conversation: list[ChatMessage]) -> None:
        """A response that is larger than the limits is not stored; then it is as unknown as one that was dropped."""
        stored = StoredResponse(encode(body), encode(conversation))
        if stored.size > min(self._bytes, self._all_bytes):
            return
        theirs = self._by_owner.setdefault(owner, _OfIdentity())
        theirs.put(body["id"], stored)
        while len(theirs.responses) > self._responses or theirs.size > self._bytes:
            theirs.take_oldest()
        while self.size > self._all_bytes:
            max(self._by_owner.values(), key=lambda each: each.size).take_oldest()

    def body(self, owner: str, id: str) -> bytes:
        return self._get(owner, id).body

    def conversation(self, owner: str, id: str) -> list[ChatMessage]:
        return msgspec.json.decode(self._get(owner, id).conversation, type=list[ChatMessage])

    def delete(self, owner: str, id: str) -> JsonObject:
        self._get(owner, id)
        theirs = self._by_owner[owner]
        theirs.take(id)
        if not theirs.responses:
            del self._by_owner[owner]
        return {"id": id, "object": "response", "deleted": True}

    def _get(self, owner: str, id: str) -> StoredResponse:
        theirs = self._by_owner.get(owner)
        stored = theirs.responses.get(id) if theirs is not None else None
        if stored is None:
            raise LlamboError(Code.UNKNOWN_REQUEST, f"no response {id[:80]!r} is stored here")
        return stored
