"""The logprob of a token: compared with a plain computation, and at the edges."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from llambo.mesh.wire import limits, tokens
from llambo.worker.llama.sampling import logprob_of


def piece(id: int) -> bytes:
    return b"<%d>" % id


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_it_is_the_log_softmax_of_the_logits(count: int) -> None:
    chance = random.Random(count)
    for size in (3, 50, 40_000):
        logits = np.array([chance.gauss(0, 4) for _ in range(size)], np.float32)
        before, token = logits.copy(), chance.randrange(size)
        logprob = logprob_of(logits, token, count, piece)
        total = math.log(math.fsum(math.exp(value) for value in logits.tolist()))
        assert logprob.logprob == pytest.approx(logits[token] - total, abs=1e-4)
        order = sorted(range(size), key=lambda id: (-logits[id], id))[:count]
        assert [top.id for top in logprob.top] == order
        assert [top.piece for top in logprob.top] == [piece(id) for id in order]
        assert [top.logprob for top in logprob.top] == pytest.approx([logits[id] - total for id in order], abs=1e-4)
        assert (logits == before).all(), "the row belongs to the engine"


def test_of_equals_the_lower_id_comes_first() -> None:
    logprob = logprob_of(np.zeros(1_000, np.float32), 999, 4, piece)
    assert [top.id for top in logprob.top] == [0, 1, 2, 3]
    assert logprob.logprob == pytest.approx(-math.log(1_000))


def test_what_is_ruled_out_and_what_is_certain_are_numbers_all_the_same() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[4] = 3.0
    logprob = logprob_of(logits, 4, 2, piece)
    assert (logprob.logprob, logprob.top[0].logprob) == (0.0, 0.0)
    assert logprob.top[1].logprob == tokens.LOWEST_LOGPROB
    frame = tokens.encode_chunk(bytes(24), 0, [4], [b"x"], 0, [logprob])
    found = tokens.decode_chunk(frame)
    assert found is not None and found.body.logprobs == [logprob]


def test_the_longest_pieces_are_cut() -> None:
    logprob = logprob_of(np.zeros(3, np.float32), 0, 3, lambda id: b"x" * 1_000)
    assert [len(top.piece) for top in logprob.top] == [limits.LOGPROB_PIECE_BYTES] * 3
