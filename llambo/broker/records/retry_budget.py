"""Retries have a budget, so that what fails everywhere does not run for ever.

A request that a worker refuses, or whose engine dies, is given to another one. While that is rare it costs nobody
anything; when it is all that happens, each retry makes it worse. So each model has an account: a refusal costs one,
the death of an engine costs one, however many were aboard. A request that ends well pays in a share of one, and what
its own refusals have cost; and a little comes in with time. When the account is empty, who would be retried is told
that the mesh is busy, and when to come back.

Workers that are lost cost nothing, nor do engines that were ended from outside: who moves because of them moves once
for each of them, and they are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llambo.mesh.wire.errors import Code, ErrorInfo

if TYPE_CHECKING:
    from llambo.broker.records.request import Request
    from llambo.broker.records.state import State

#: What comes in by itself, each second.
PER_S = 1.0
#: Who is refused is told to wait until so much is there again: he will not be the only one who comes.
ENOUGH = 10.0


@dataclass(slots=True)
class Budget:
    credit: float
    at_ms: int


def spend(state: State, model: str, now_ms: int) -> bool:
    """One retry. False: there is nothing left for it."""
    reserve = float(state.config.retry_reserve)
    budget = state.budgets.get(model)
    if budget is None:
        budget = state.budgets[model] = Budget(reserve, now_ms)
    budget.credit = min(reserve, budget.credit + (now_ms - budget.at_ms) / 1000 * PER_S)
    budget.at_ms = now_ms
    if budget.credit < 1:
        state.counters.retries_denied += 1
        return False
    budget.credit -= 1
    return True


def earn(state: State, request: Request) -> None:
    """It ended well. An account that is full again is closed."""
    budget = state.budgets.get(request.model)
    if budget is not None:
        budget.credit += state.config.retry_percent / 100 + request.refusals
        if budget.credit >= state.config.retry_reserve:
            del state.budgets[request.model]


def denied(state: State, request: Request, why: str) -> ErrorInfo:
    credit = state.budgets[request.model].credit
    wait_ms = int(max(0.0, ENOUGH - credit) / PER_S * 1000)
    text = f"workers refuse or fail requests for {request.model!r} faster than they answer them; the last time {why}"
    return ErrorInfo(Code.BUSY, text, wait_ms)
