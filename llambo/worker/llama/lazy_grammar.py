"""A grammar that begins to hold when a tag has been written: until then plain text costs next to nothing.

llama.cpp has such grammars, too. For each token they search all that was written, and one that ends the tag and goes on
with something the grammar refuses ends the process. Here the search is for one tag in a few bytes, and such a token
is not allowed in the first place. Nothing is remembered but these bytes and the grammar,
so whoever continues an answer accepts its tokens again, and is where the other was, also in the middle of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llambo.worker.llama.sampling import Grammar


class Native(Grammar, Protocol):
    """A grammar of llama.cpp's."""

    def forbid(self, candidates: Any, ids: Sequence[int]) -> None: ...


class Pieces(Protocol):
    """What is needed of a model."""

    @property
    def beyond_tags(self) -> list[tuple[int, bytes]]: ...

    def piece(self, token: int) -> bytes: ...


class LazyGrammar:
    """`grammar` is for what comes behind the tag, but for blanks that come with its end."""

    def __init__(self, tag: str, grammar: Native, model: Pieces) -> None:
        self._tag = tag.encode()
        self._grammar = grammar
        self._model = model
        self._tail = b""
        self.awake = False

    def allows(self, token: int) -> bool:
        if self.awake:
            return self._grammar.allows(token)
        return not self._goes_beyond(self._model.piece(token))

    def accept(self, token: int) -> None:
        if self.awake:
            self._grammar.accept(token)
            return
        piece = self._model.piece(token)
        if self._goes_beyond(piece):
            raise ValueError("the grammar refuses this token")
        text = self._tail + piece
        self.awake = self._tag in text
        self._tail = text[-len(self._tag) + 1 :]

    def apply(self, candidates: Any) -> None:
        if self.awake:
            self._grammar.apply(candidates)
        else:
            ids = [token for token, piece in self._model.beyond_tags if self._goes_beyond(piece)]
            self._grammar.forbid(candidates, ids)

    def _goes_beyond(self, piece: bytes) -> bool:
        """The tag would end within this piece, and something other than blanks would follow."""
        _, tag, behind = (self._tail + piece).partition(self._tag)
        return bool(tag and behind.strip())
