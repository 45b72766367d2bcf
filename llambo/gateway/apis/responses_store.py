"""Responses that were kept, so that one may be fetched again, or gone on with by its id.

They are in the memory of this gateway alone, and nobody sees another one's. Both are bounded, and the oldest go first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from llambo.gateway.answers.asking import encode
from llambo.mesh.wire.errors import Code, LlamboError

#: Of one identity.
KEPT_RESPONSES = 1_000
KEPT_BYTES = 16 * 1024 * 1024
#: Of all together. Beyond it the one who has most loses his oldest.
ALL_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Kept:
    """The body as it was answered, and the conversation up to its end."""

    body: bytes
    said: bytes

    @property
    def size(self) -> int:
        return len(self.body) + len(self.said)


@dataclass(slots=True)
class _Shelf:
    kept: dict[str, Kept] = field(default_factory=dict)
    size: int = 0

    def put(self, id: str, kept: Kept) -> None:
        self.take(id)
        self.kept[id] = kept
        self.size += kept.size

    def take(self, id: str) -> Kept | None:
        kept = self.kept.pop(id, None)
        self.size -= kept.size if kept is not None else 0
        return kept

    def take_oldest(self) -> None:
        self.take(next(iter(self.kept)))


class Store:
    def __init__(self, *, responses: int = KEPT_RESPONSES, bytes: int = KEPT_BYTES, all_bytes: int = ALL_BYTES) -> None:
        self._responses, self._bytes, self._all_bytes = responses, bytes, all_bytes
        self._shelves: dict[str, _Shelf] = {}

    def __len__(self) -> int:
        return sum(len(shelf.kept) for shelf in self._shelves.values())

    @property
    def size(self) -> int:
        return sum(shelf.size for shelf in self._shelves.values())

    def keep(self, owner: str, body: dict[str, Any], said: list[dict[str, Any]]) -> None:
        """One that is too large to be kept is not: then it is unknown like any other that has gone."""
        kept = Kept(encode(body), encode(said))
        if kept.size > min(self._bytes, self._all_bytes):
            return
        shelf = self._shelves.setdefault(owner, _Shelf())
        shelf.put(body["id"], kept)
        while len(shelf.kept) > self._responses or shelf.size > self._bytes:
            shelf.take_oldest()
        while self.size > self._all_bytes:
            max(self._shelves.values(), key=lambda each: each.size).take_oldest()

    def body(self, owner: str, id: str) -> bytes:
        return self._get(owner, id).body

    def said(self, owner: str, id: str) -> list[dict[str, Any]]:
        """A copy, to go on with."""
        return msgspec.json.decode(self._get(owner, id).said, type=list[dict[str, Any]])

    def delete(self, owner: str, id: str) -> dict[str, Any]:
        self._get(owner, id)
        shelf = self._shelves[owner]
        shelf.take(id)
        if not shelf.kept:
            del self._shelves[owner]
        return {"id": id, "object": "response", "deleted": True}

    def _get(self, owner: str, id: str) -> Kept:
        shelf = self._shelves.get(owner)
        kept = shelf.kept.get(id) if shelf is not None else None
        if kept is None:
            raise LlamboError(Code.UNKNOWN_REQUEST, f"no response {id[:80]!r} is kept here")
        return kept
