"""What each identity has here, and what it may have.

An account belongs to a name, not to a key or a session: a name may have two keys while it is rotated, and a client many
sessions. What is counted follows a request on its whole way, so it holds whatever happens to workers and clients:

    queued       it waits, also a second time after its worker was lost
    in flight    it is with a worker
    bytes        its prompt and the room set aside for its answer, from its admission to its end

Limits refuse what is new. What was admitted once is counted and never refused: not when it moves, not when a worker
gives it back to a broker that has just begun. `max_in_flight` refuses nothing at all; see queue.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import ANYONE, Identity

NO_LIMIT = 2**62
MINUTE_MS = 60_000
#: Between these a refused client is told to wait, where the wait is a guess.
RETRY_AFTER_MS = (100, 30_000)
#: What a client says it had with another broker may come to so many times its `max_bytes`. It cannot be checked, and
#: whoever lies should not get far by it; two brokers may each have admitted what the limit allows.
ELSEWHERE = 2
#: A refusal: which of the limits, and what the client is told.
Refusal = tuple[str, ErrorInfo]


class Account:
    __slots__ = (
        "bytes",
        "in_flight",
        "limited",
        "may_fly",
        "name",
        "paid_until",
        "queued",
        "rate",
        "rate_mark",
        "refused",
        "submitted",
        "tokens",
        "who",
    )

    def __init__(self, name: str, who: Identity = ANYONE) -> None:
        self.name = name
        self.queued = self.in_flight = self.bytes = 0
        # --- since it was opened
        self.submitted = self.tokens = 0
        #: Why and how often: the name of a limit, or the code of an error.
        self.refused: Counter[str] = Counter()
        #: Each request pays for its part of a minute; nobody may be paid up for more than one.
        self.paid_until = 0.0
        #: Requests ended per second, smoothed, and what it was computed from.
        self.rate = 0.0
        self.rate_mark = (0, 0)
        self.allow(who)

    def allow(self, who: Identity) -> None:
        self.who = who
        self.may_fly = who.max_in_flight or NO_LIMIT
        #: Whether anything may be refused for being too much. Without keys nobody has to find out.
        self.limited = bool(who.max_queued or who.max_bytes or who.per_minute)

    @property
    def full(self) -> bool:
        """So many are with workers that the next has to wait for one of them."""
        return self.in_flight >= self.may_fly

    @property
    def idle(self) -> bool:
        return not (self.queued or self.in_flight or self.bytes)

    @property
    def ended(self) -> int:
        return self.submitted - self.queued - self.in_flight

    def pay(self, now_ms: int) -> None:
        """A request is taken in. One that was admitted elsewhere may be one too many: that is no debt."""
        if self.who.per_minute:
            paid = max(self.paid_until, now_ms) + MINUTE_MS / self.who.per_minute
            self.paid_until = min(paid, now_ms + MINUTE_MS)

    def refusal(self, prompt_bytes: int, wanted: int, resumed: bool, now_ms: int) -> Refusal | None:
        """Why a request of so many bytes is too much for it now."""
        who = self.who
        if who.max_bytes and wanted > who.max_bytes:
            text = f"a prompt of {prompt_bytes} bytes and room for its answer are {wanted} bytes, {self.name}"
            return "max_bytes", ErrorInfo(Code.TOO_LONG, f"{text} may have {who.max_bytes}: lower max_tokens")
        over = self.bytes + wanted - who.max_bytes * (ELSEWHERE if resumed else 1)
        if who.max_bytes and over > 0:
            text = f"prompts and answers of {self.name} take {self.bytes} bytes, this one {wanted} more;"
            wait_ms = self._until(over / (self.bytes / max(1, self.queued + self.in_flight)))
            return "max_bytes", ErrorInfo(Code.OVER_LIMIT, f"{text} {who.max_bytes} are allowed", wait_ms)
        if resumed:
            return None
        if who.max_queued and self.queued >= who.max_queued:
            text = f"{self.name} has {_requests(self.queued)} waiting, at most {who.max_queued} may"
            return "max_queued", ErrorInfo(Code.OVER_LIMIT, text, self._until(self.queued - who.max_queued + 1))
        early_ms = self._early_ms(now_ms)
        if early_ms > 0:
            text = f"{self.name} may begin {_requests(who.per_minute)} in a minute"
            return "per_minute", ErrorInfo(Code.OVER_LIMIT, text, early_ms)
        return None

    def measure(self, now_ms: int) -> None:
        """Its pace of late, on which the guesses at a wait are based."""
        ended, at = self.rate_mark
        if now_ms > at:
            pace = (self.ended - ended) * 1_000 / (now_ms - at)
            self.rate = pace if not at else 0.5 * self.rate + 0.5 * pace
            self.rate_mark = (self.ended, now_ms)

    def _early_ms(self, now_ms: int) -> int:
        """How much too early another request comes; exact."""
        if not self.who.per_minute:
            return 0
        paid = max(self.paid_until, now_ms) + MINUTE_MS / self.who.per_minute
        # (the sum of a minute's parts is not quite a minute: half a millisecond is nothing)
        return math.ceil(paid - now_ms - MINUTE_MS - 0.5)

    def _until(self, ended: float) -> int:
        """About how long until so many of its requests have ended, at its pace of late."""
        if self.rate <= 0:
            return 1_000
        low, high = RETRY_AFTER_MS
        return int(min(max(ended / self.rate * 1_000, low), high))


def _requests(count: int) -> str:
    return f"{count} request{'s' if count != 1 else ''}"


class Accounts:
    """All of them, by name. Without keys there is one, of nobody."""

    def __init__(self) -> None:
        self.by_name: dict[str, Account] = {}
        #: What the keyring says of each name.
        self._rights: dict[str, Identity] = {}

    def of(self, name: str) -> Account:
        account = self.by_name.get(name)
        if account is None:
            account = self.by_name[name] = Account(name, self._rights.get(name, ANYONE))
        return account

    def allow(self, identities: Mapping[str, Identity]) -> None:
        """The keyring is another one. A name that is gone is held to what it was allowed, as long as anything lives."""
        self._rights = {identity.name: identity for identity in identities.values()}
        for name, who in self._rights.items():
            if name in self.by_name:
                self.by_name[name].allow(who)

    def sweep(self, now_ms: int) -> None:
        """Names that nobody has a key for, and that have nothing here: workers may tell of any number of them."""
        for name, account in list(self.by_name.items()):
            account.measure(now_ms)
            if account.idle and name not in self._rights:
                del self.by_name[name]
