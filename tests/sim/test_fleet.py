"""The autoscaler over simulated nodes. `python -m tests.sim.fleet --nodes 10000` does it with more of them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.sim.fleet import HEAD, of, run


@pytest.mark.parametrize("name", of(100))
def test_it_turns_no_more_often_than_the_load_and_serves_it(name: str) -> None:
    outcome = run(name, 100)
    assert not outcome.wrong, "\n".join([HEAD, outcome.line(), *outcome.world.story])
    # Between `low` and `high` there may be four times as many workers as are needed, and no more for long.
    assert outcome.cost < 4, outcome.line()


def test_a_thousand_nodes_as_planned() -> None:
    outcome = run("as planned", 1_000)
    story = "\n".join(outcome.world.story)
    assert not outcome.wrong, story
    wanted = [moment.wanted for moment in outcome.world.moments]
    changes = [after - before for before, after in pairwise(wanted) if after != before]
    assert wanted[0] == 100 and 450 <= sum(change for change in changes if change > 0) <= 550, story
    assert [change for change in changes if change < 0] == [-200], story
