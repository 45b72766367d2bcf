"""Choosing a token without a model: logits are invented, and numpy stands in for native code."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from llambo.mesh.wire.messages import Sampling
from llambo.worker.llama import sampling
from llambo.worker.llama.sampling import DeadEnd, Grammar, Ids, Logits, Sampler, softmax

WORDS = 50


class Narrow:
    """Top-k alone."""

    def __init__(self, top_k: int = WORDS) -> None:
        self.top_k = top_k
        self.accepted: list[int] = []

    def narrow(self, logits: Logits, grammar: Grammar | None) -> tuple[Ids, Logits]:
        ids, left = self.mask(logits, grammar) if grammar is not None else self._all(logits)
        best = np.argsort(-left, kind="stable")[: self.top_k]
        return ids[best], left[best]

    def mask(self, logits: Logits, grammar: Grammar) -> tuple[Ids, Logits]:
        ids, left = self._all(logits)
        left[[not grammar.allows(int(token)) for token in ids]] = -np.inf
        return ids, left

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def _all(self, logits: Logits) -> tuple[Ids, Logits]:
        return np.arange(len(logits), dtype=np.int32), logits.copy()


class Only:
    """A grammar of single tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def allows(self, token: int) -> bool:
        return token in self.tokens

    def accept(self, token: int) -> None:
        assert self.allows(token)

    def apply(self, candidates: Any) -> None:
        raise AssertionError("there are no native candidates here")


def logits_of(seed: int = 1) -> Logits:
    return np.random.default_rng(seed).normal(0, 2, WORDS).astype(np.float32)


def sampler(options: Sampling, seed: int = 1, history: list[int] | None = None, grammar: Grammar | None = None,
            banned: list[int] | None = None) -> Sampler:  # fmt: skip
    return Sampler(options, seed, Narrow(), history=history or [], grammar=grammar, banned=banned)


def test_without_temperature_it_is_the_likeliest() -> None:
    logits = logits_of()
    assert sampler(Sampling(temperature=0.0)).choose(logits, 0) == int(logits.argmax())


def test_chance_follows_the_probabilities() -> None:
    logits = logits_of()
    options = Sampling(temperature=1.0)
    seen = Counter(sampler(options, seed).choose(logits, 3) for seed in range(20_000))
    shares = softmax(logits)
    for token in range(WORDS):
        expected = 20_000 * shares[token]
        assert abs(seen[token] - expected) < 5 * np.sqrt(expected) + 5


def test_indices_are_independent_of_each_other() -> None:
    logits = logits_of()
    options = Sampling(temperature=1.0)
    seen = Counter(sampler(options, 7).choose(logits, index) for index in range(20_000))
    expected = 20_000 * softmax(logits)
    assert all(abs(seen[token] - expected[token]) < 5 * np.sqrt(expected[token]) + 5 for token in range(WORDS))


def test_a_small_difference_of_logits_changes_few_choices() -> None:
    """Workers whose steps differ round differently; a stream that moves should still give the same tokens."""
    noise = np.random.default_rng(2).normal(0, 1e-4, WORDS).astype(np.float32)
    options = Sampling(temperature=1.0)
    pairs = [(sampler(options, s).choose(logits_of(), 0), sampler(options, s).choose(logits_of() + noise, 0))
             for s in range(3_000)]  # fmt: skip
    assert sum(one != other for one, other in pairs) <= 5


def test_the_number_of_a_token_does_not_depend_on_the_others() -> None:
    whole = sampling.gumbel(5, 9, np.arange(100, dtype=np.int32))
    some = sampling.gumbel(5, 9, np.array([70, 3], np.int32))
    assert (some == whole[[70, 3]]).all()
    assert np.isfinite(sampling.gumbel(2**63 - 1, 2**31, np.arange(100_000, dtype=np.int32))).all()


def test_penalties_look_at_the_window() -> None:
    logits = np.zeros(WORDS, np.float32)
    logits[[1, 2]] = 5.0, 4.0
    options = Sampling(temperature=0.0, repeat_penalty=2.0, penalty_last_n=2)
    assert sampler(options, history=[1, 9, 9]).choose(logits, 0) == 1
    assert sampler(options, history=[9, 9, 1]).choose(logits, 0) == 2
    counted = Sampling(temperature=0.0, frequency_penalty=0.6, penalty_last_n=-1)
    assert sampler(counted, history=[1]).choose(logits, 0) == 1
    assert sampler(counted, history=[1, 1]).choose(logits, 0) == 2
    present = Sampling(temperature=0.0, presence_penalty=1.5)
    assert sampler(present, history=[1]).choose(logits, 0) == 2
    # The row belongs to the engine
    assert logits[1] == 5.0


def test_biases_and_bans() -> None:
    logits = logits_of()
    best = int(logits.argmax())
    assert sampler(Sampling(temperature=0.0, logit_bias={3: 100.0})).choose(logits, 0) == 3
    assert sampler(Sampling(temperature=0.0), banned=[best]).choose(logits, 0) != best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_has_the_last_word(temperature: float) -> None:
    chosen = sampler(Sampling(temperature=temperature), grammar=Only(7)).choose(logits_of(), 0)
    assert chosen == 7
    with pytest.raises(DeadEnd):
        sampler(Sampling(temperature=temperature), grammar=Only()).choose(logits_of(), 0)


def test_xtc_leaves_out_the_likeliest_and_keeps_one() -> None:
    logits = np.full(WORDS, -20.0, np.float32)
    logits[[1, 2, 3]] = 3.0, 2.9, 2.8
    options = Sampling(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.1)
    assert {sampler(options, seed).choose(logits, 0) for seed in range(200)} == {3}


def test_mirostat_keeps_the_surprise_near_its_aim() -> None:
    options = Sampling(temperature=1.0, mirostat=2, mirostat_tau=2.0)
    one = sampler(options, 3)
    surprises = []
    for index in range(600):
        logits = logits_of(index)
        token = one.choose(logits, index)
        surprises.append(-np.log2(softmax(logits)[token]))
    assert abs(float(np.mean(surprises[100:])) - 2.0) < 0.8


def test_whatever_is_chosen_is_accepted() -> None:
    narrow = Narrow()
    history = [5]
    one = Sampler(Sampling(temperature=0.0), 1, narrow, history=history)
    token = one.choose(logits_of(), 0)
    assert (narrow.accepted, history) == ([token], [5, token])
