"""A worker dies by `kill -9` in the middle of many streams, and no client notices more than a short stall.

The long version is `python -m bench kills`.
"""

from __future__ import annotations

from bench import kills


def test_killing_agents_and_engines_costs_no_client_a_token() -> None:
    outcome = kills.run(kills=3, streams=30)

    assert outcome.streams == 90
    assert all(outcome.stalls_ms.values()), "each kill should have moved some of the streams"
    assert not outcome.errors
    assert (outcome.lost, outcome.duplicated, outcome.wrong) == (0, 0, 0)
    assert not outcome.orphans
