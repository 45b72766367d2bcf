"""A short run of the simulator; `make sim` and `make soak` run the long ones."""

from __future__ import annotations

from tests.sim.runner import Tally, run_seed

SEEDS = 100
HOST_SEEDS = 20


def test_the_whole_fault_model_loses_nothing() -> None:
    tally = Tally()
    for seed in range(SEEDS):
        tally.add(run_seed((seed, 2)))
    stories = "\n".join(f"seed {bad.seed}: {bad.wrong}\n" + "\n".join(bad.story) for bad in tally.bad[:3])
    assert not tally.bad, f"{tally.summary(0)}\n{stories}"
    # The run would prove little if nothing had happened in it.
    assert tally.moves > SEEDS / 2
    assert tally.stale > SEEDS / 10
    assert tally.repaired > SEEDS / 2
    assert tally.poisoned > SEEDS / 20
    assert tally.duplicates_per_token <= 0.2, tally.summary(0)


def test_models_are_loaded_on_demand() -> None:
    tally = Tally()
    for seed in range(HOST_SEEDS):
        tally.add(run_seed((seed, 2), hosts=True))
    stories = "\n".join(f"seed {bad.seed}: {bad.wrong}\n" + "\n".join(bad.story) for bad in tally.bad[:3])
    assert not tally.bad, f"{tally.summary(0)}\n{stories}"
    assert tally.loads > 2 * HOST_SEEDS
    assert tally.unloads > HOST_SEEDS
    assert tally.refused > HOST_SEEDS / 10


def test_one_seed_is_one_history() -> None:
    first, second = run_seed((7, 1)), run_seed((7, 1))
    assert first == second
    assert first.tokens > 0
