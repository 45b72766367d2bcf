"""A grammar that waits for its tag, with pieces and a grammar that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llambo.worker.llama.sampling import LazyGrammar

#: How fast this machine is just now is not what is tried here.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TAG = "<tool_call>"
PIECES = [b"<", b"tool", b"_", b"call", b">", b">\n", b">>", b"call>{", b"<tool_call>", b"x", b"", b" <tool_", b"\xc3"]


class Model:
    def piece(self, token: int) -> bytes:
        return PIECES[token]

    @property
    def tokens_past_tag(self) -> list[tuple[int, bytes]]:
        return [(6, b">>"), (7, b"call>{")]


class Rules:
    """Allows x alone, and remembers what it was asked."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.forbidden: list[int] = []
        self.applied = 0

    def allows(self, token: int) -> bool:
        return PIECES[token] == b"x"

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def apply(self, candidates: Any) -> None:
        self.applied += 1

    def forbid(self, candidates: Any, ids: Sequence[int]) -> None:
        self.forbidden = list(ids)


def lazy() -> tuple[LazyGrammar, Rules]:
    rules = Rules()
    return LazyGrammar(TAG, rules, Model()), rules


@UNHURRIED
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30))
def test_it_wakes_with_the_tag_and_whoever_replays_is_where_the_other_was(tokens: list[int]) -> None:
    one, rules = lazy()
    taken: list[int] = []
    for token in tokens:
        text = b"".join(PIECES[each] for each in taken)
        if TAG.encode() not in text:
            # Before the tag all is allowed but what ends it and goes on
            behind = (text + PIECES[token]).partition(TAG.encode())[2]
            assert one.allows(token) == (not behind.strip())
        if one.allows(token):
            one.accept(token)
            taken.append(token)
        elif not one.active:
            with pytest.raises(ValueError, match="refuses"):
                one.accept(token)
        assert one.active == (TAG.encode() in b"".join(PIECES[each] for each in taken))
    again, replayed = lazy()
    for token in taken:
        again.accept(token)
    assert (again.active, again._tail, replayed.accepted) == (one.active, one._tail, rules.accepted)
    assert all(again.allows(token) == one.allows(token) for token in range(len(PIECES)))


def test_candidates_are_left_alone_until_the_tag_could_end() -> None:
    grammar, rules = lazy()
    grammar.apply(None)
    assert (rules.forbidden, rules.applied) == ([], 0)
    for token in (0, 1, 2):  # <tool_
        grammar.accept(token)
    grammar.apply(None)
    assert rules.forbidden == [7]
    grammar.accept(3)  # call
    grammar.apply(None)
    assert rules.forbidden == [6]
    grammar.accept(5)  # > and the end of the line
    grammar.apply(None)
    assert (grammar.active, rules.applied) == (True, 1)
