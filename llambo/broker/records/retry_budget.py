"""Retries have a budget, so that what fails everywhere does not run for ever.

A request that a worker refuses, or whose engine dies, is given to another one. While that is rare it is cheap; when it
is all that happens, each retry makes it worse. So each model has a budget: a refusal costs one retry, the death of an
engine costs one, however many requests it ran. A request that ends well pays in a part of a retry, and what its own
refusals have cost; and a little comes in with time. When the budget is empty, a request that would be retried ends
with BUSY, and an estimate of when to come back.

Workers that are lost cost nothing, nor do engines that were ended from outside: a request moves once for each of them,
and they are gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from llambo.mesh.wire.errors import Code, ErrorInfo

#: What comes in by itself, each second.
PER_S = 1.0
#: A refused client is to wait until so much is there again: it will not be the only one that comes back.
ENOUGH = 10.0


@dataclass(slots=True)
class RetryBudget:
    credit: float
    at_ms: int


class RetryBudgets:
    """By model, where something of it is spent."""

    def __init__(self, reserve: int, percent: int) -> None:
        self.by_model: dict[str, RetryBudget] = {}
        self._reserve = float(reserve)
        self._share = percent / 100

    def spend(self, model: str, now_ms: int) -> bool:
        """One retry. False: there is nothing left for it."""
        budget = self.by_model.get(model)
        if budget is None:
            budget = self.by_model[model] = RetryBudget(self._reserve, now_ms)
        budget.credit = min(self._reserve, budget.credit + (now_ms - budget.at_ms) / 1000 * PER_S)
        budget.at_ms = now_ms
        if budget.credit < 1:
            return False
        budget.credit -= 1
        return True

    def earn(self, model: str, refusals: int) -> None:
        """A request ended well, after so many refusals. A budget that is full again is closed."""
        budget = self.by_model.get(model)
        if budget is not None:
            budget.credit += self._share + refusals
            if budget.credit >= self._reserve:
                del self.by_model[model]

    def denied(self, model: str, why: str) -> ErrorInfo:
        wait_ms = int(max(0.0, ENOUGH - self.by_model[model].credit) / PER_S * 1000)
        text = f"workers refuse or fail requests for {model!r} faster than they answer them; the last time {why}"
        return ErrorInfo(Code.BUSY, text, wait_ms)
