"""JSON schemas and calls of tools, followed token by token by llguidance.

A guide is a function of the tokens it has accepted. A worker that continues an answer accepts its tokens again and is
where the other was, also in the middle of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from llambo.worker.llama.llama import Model, view_of

#: Compiled grammars that are stored: in a chat the same tools come again and again.
COMPILED = 8


class _Vocabulary:
    """The attributes that llguidance reads of a tokenizer. A control token is never text: a byte that is not
    UTF-8 marks its name. The tags of calls are text, also where a model has a token for each."""

    bos_token_id = None

    def __init__(self, model: Model) -> None:
        self.model = model
        pieces = [model.piece(token) for token in range(model.tokens)]
        self.eos_token_id = model.endings[0]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        self.tokens: Sequence[bytes] = [
            piece or b"\xff" + model.name(token).encode() for token, piece in enumerate(pieces)
        ]

    def __call__(self, text: bytes) -> list[int]:
        return self.model.tokenize(text, special=False)


class Guide:
    """A grammar that follows an answer."""

    def __init__(self, matcher: LLMatcher, model: Model) -> None:
        self._matcher = matcher
        self._model = model
        self._bits = allocate_token_bitmask(1, model.tokens)
        self._allowed: NDArray[np.bool_] | None = None

    def allows(self, token: int) -> bool:
        if self._model.ends(token):
            return self._matcher.is_accepting()
        return bool(self._matcher.validate_tokens([token]))

    def accept(self, token: int) -> None:
        if not self.allows(token):
            raise ValueError("the grammar refuses this token")
        if not self._model.ends(token):
            self._matcher.consume_token(token)
            self._allowed = None

    def apply(self, candidates: Any) -> None:
        found = view_of(candidates)
        found["logit"][~self._mask()[found["id"]]] = -np.inf

    def _mask(self) -> NDArray[np.bool_]:
        if self._allowed is None:
            fill_next_token_bitmask(self._matcher, self._bits)
            self._allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little").astype(bool)
            self._allowed[self._model.endings] = self._matcher.is_accepting()
        return self._allowed


class Guides:
    """The guides of a model. What all of them share is made when the first is wanted."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._compiled = lru_cache(COMPILED)(self._compile)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._model)), eos_token=self._model.endings)

    def guide(self, lark: str) -> Guide:
        """`lark` is a grammar of `worker/llama/grammar.py`. Raises ValueError."""
        return Guide(self._compiled(lark).deep_copy(), self._model)

    def _compile(self, lark: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, lark, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the schemas make a grammar that cannot be used: {matcher.get_error().splitlines()[0]}")
        return matcher
