"""Narrowing on the vocabulary of a real model: the short way leaves what the long way leaves."""

from __future__ import annotations

import numpy as np
import pytest

from llambo.mesh.wire.messages import Sampling
from llambo.worker.llama import llama
from llambo.worker.models import model_files


@pytest.fixture(scope="module")
def model() -> llama.Model:
    return llama.Model(str(model_files.find("smollm2")), safe=True)


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_what_is_near_the_best_gives_the_same_candidates_as_all(model: llama.Model, spread: float) -> None:
    shared, chance = llama.shared_candidates(model), np.random.default_rng(1)
    for _ in range(40):
        options = Sampling(
            top_k=int(chance.integers(1, 200)),
            top_p=float(chance.choice([1.0, 0.95, 0.5])),
            min_p=float(chance.choice([0.0, 0.05])),
            typical_p=float(chance.choice([1.0, 0.9])),
        )
        logits = chance.normal(0, spread, model.tokens).astype(np.float32)
        logits[chance.integers(0, model.tokens, 50)] = -np.inf
        # A chain whose first step is the same top-k, but which is given everything
        short = llama.Candidates(model, options, shared, [])
        long = llama.Candidates(model, options, shared, [])
        long._top_k = 0
        (ids, left), (all_ids, all_left) = short.narrow(logits, None), long.narrow(logits, None)
        order, all_order = np.argsort(ids), np.argsort(all_ids)
        assert ids[order].tolist() == all_ids[all_order].tolist()
        assert left[order].tolist() == all_left[all_order].tolist()


def test_a_vocabulary_without_k_good_ones_is_taken_as_a_whole(model: llama.Model) -> None:
    logits = np.full(model.tokens, -50.0, np.float32)
    logits[[7, 8]] = 3.0
    candidates = llama.Candidates(model, Sampling(top_k=5, top_p=1.0, min_p=0.0), llama.shared_candidates(model), [])
    ids, _ = candidates.narrow(logits, None)
    assert len(ids) == 5
    assert {7, 8} < set(ids.tolist())
