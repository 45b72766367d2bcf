"""Hostile models, templates and grammars: no agent ends by them, nothing hangs, and other requests are not disturbed.

The long version, with 500 models, is `python -m bench.damage`.
"""

from __future__ import annotations

from bench import damage
from bench.damage import Outcome


def check(outcome: Outcome, tried: int) -> None:
    assert outcome.lost == []
    assert outcome.changed == []
    assert len(outcome.tried) == outcome.asked == tried
    assert all(each.text or each.verdict == "serves" for each in outcome.tried), "every refusal has a reason"


def test_damaged_models_are_refused_or_serve() -> None:
    outcome = damage.models(first=6, count=6, jobs=1)
    check(outcome, 6)
    assert {"refused", "serves"} <= set(outcome.verdicts)


def test_hostile_templates_are_refused() -> None:
    names = ("subclasses", "doubling text", "padding by percent", "a lot of nothing", "endless recursion")
    outcome = damage.templates(names)
    check(outcome, len(names))
    assert outcome.verdicts == {"refused": 4, "answers with an error": 1}, outcome.tried


def test_grammar_bombs_are_refused_or_kept() -> None:
    names = ("nonsense", "left recursion", "repeated repetitions", "stars of stars", "a long text", "many choices",
             "a schema of itself", "nested 5000 deep")  # fmt: skip
    outcome = damage.grammars(names)
    check(outcome, len(names))
    assert outcome.verdicts == {"refused": 7, "serves": 1}
