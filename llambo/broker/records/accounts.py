"""What each identity has in use on this broker, and its limits.

An account belongs to a name, not to a key or a session: a name may have two keys while it is rotated, and a client many
sessions. What is counted follows a request on its whole way, so it holds whatever happens to workers and clients:

    queued       it waits, also a second time after its worker was lost
    in flight    it is with a worker
    bytes        its prompt and the room set aside for its answer, from its admission to its end

Limits refuse what is new. What this broker has admitted is counted and not refused when it moves. What another broker
has admitted, or this one before a restart, is refused only for bytes: over `max_bytes` (see ELSEWHERE), and where this
broker has no room. Its client or worker has to prove it (seals.py); otherwise it is new. `max_in_flight` refuses
nothing at all: requests above it are passed over (fair_share.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from llambo.mesh.wire.errors import Code, ErrorInfo
from llambo.mesh.wire.identity import ANYONE, Identity

NO_LIMIT = 2**62
MINUTE_MS = 60_000
#: Between these is the wait of a refused client, where it is an estimate.
RETRY_AFTER_MS = (100, 30_000)
#: With what another broker has admitted an identity may come to so many times its limits: two brokers may each have
#: admitted what they allow.
ELSEWHERE = 2
#: A refusal: which of the limits, and the error for the client.
Refusal = tuple[str, ErrorInfo]


class EndRate:
    """Requests ended per second, smoothed, from which waits are estimated."""

    __slots__ = ("_at_ms", "_ended", "per_s")

    def __init__(self) -> None:
        self.per_s = 0.0
        self._ended = self._at_ms = 0

    def measure(self, ended: int, now_ms: int) -> None:
        """`ended`: how many have ended since the start."""
        if now_ms > self._at_ms:
            rate = (ended - self._ended) * 1_000 / (now_ms - self._at_ms)
            self.per_s = rate if not self._at_ms else 0.5 * self.per_s + 0.5 * rate
            self._ended, self._at_ms = ended, now_ms

    def wait_ms(self, ended: float) -> int:
        """About how long until so many have ended."""
        if self.per_s <= 0:
            return 1_000
        low, high = RETRY_AFTER_MS
        return int(min(max(ended / self.per_s * 1_000, low), high))


class Account:
    __slots__ = (
        "bytes",
        "end_rate",
        "in_flight",
        "limited",
        "max_in_flight",
        "name",
        "paid_until",
        "queued",
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
        #: Each request pays for its part of a minute; an account is paid up for one minute at most.
        self.paid_until = 0.0
        self.end_rate = EndRate()
        self.allow(who)

    def allow(self, who: Identity) -> None:
        self.who = who
        self.max_in_flight = who.max_in_flight or NO_LIMIT
        #: Whether anything may be refused for being too much. Without keys it is never computed.
        self.limited = bool(who.max_queued or who.max_bytes or who.per_minute)

    @property
    def full(self) -> bool:
        """As many as it may have are with workers: the next has to wait for one of them."""
        return self.in_flight >= self.max_in_flight

    @property
    def idle(self) -> bool:
        return not (self.queued or self.in_flight or self.bytes)

    @property
    def ended(self) -> int:
        return self.submitted - self.queued - self.in_flight

    def pay(self, now_ms: int) -> None:
        """A request is admitted. One that was admitted elsewhere may be one too many: that leaves no debt."""
        if self.who.per_minute:
            paid = max(self.paid_until, now_ms) + MINUTE_MS / self.who.per_minute
            self.paid_until = min(paid, now_ms + MINUTE_MS)

    def refusal(self, prompt_bytes: int, wanted: int, admitted: bool, now_ms: int) -> Refusal | None:
        """Why a request of so many bytes is too much for it now. `admitted`: by another broker."""
        who = self.who
        if who.max_bytes and wanted > who.max_bytes:
            text = f"a prompt of {prompt_bytes} bytes and room for its answer are {wanted} bytes, {self.name}"
            return "max_bytes", ErrorInfo(Code.TOO_LONG, f"{text} may have {who.max_bytes}: lower max_tokens")
        over = self.bytes + wanted - who.max_bytes * (ELSEWHERE if admitted else 1)
        if who.max_bytes and over > 0:
            text = f"prompts and answers of {self.name} take {self.bytes} bytes, this one {wanted} more;"
            wait_ms = self._until(over / (self.bytes / max(1, self.queued + self.in_flight)))
            return "max_bytes", ErrorInfo(Code.OVER_LIMIT, f"{text} {who.max_bytes} are allowed", wait_ms)
        if admitted:
            return None
        if who.max_queued and self.queued >= who.max_queued:
            text = f"{self.name} has {_requests(self.queued)} waiting, at most {who.max_queued} may"
            return "max_queued", ErrorInfo(Code.OVER_LIMIT, text, self._until(self.queued - who.max_queued + 1))
        early_ms = self._early_ms(now_ms)
        if early_ms > 0:
            text = f"{self.name} may begin {_requests(who.per_minute)} in a minute"
            return "per_minute", ErrorInfo(Code.OVER_LIMIT, text, early_ms)
        return None

    def _early_ms(self, now_ms: int) -> int:
        """How much too early another request comes; exact."""
        if not self.who.per_minute:
            return 0
        paid = max(self.paid_until, now_ms) + MINUTE_MS / self.who.per_minute
        # (the sum of a minute's parts is not quite a minute: half a millisecond is nothing)
        return math.ceil(paid - now_ms - MINUTE_MS - 0.5)

    def _until(self, ended: float) -> int:
        """About how long until so many of its requests have ended, at its recent pace."""
        return self.end_rate.wait_ms(ended)


def _requests(count: int) -> str:
    return f"{count} request{'s' if count != 1 else ''}"


class Accounts:
    """All of them, by name. Without keys there is one, with an empty name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Account] = {}
        #: What the keyring allows each name.
        self._rights: dict[str, Identity] = {}

    def of(self, name: str) -> Account:
        account = self.by_name.get(name)
        if account is None:
            account = self.by_name[name] = Account(name, self._rights.get(name, ANYONE))
        return account

    def allow(self, identities: Mapping[str, Identity]) -> None:
        """The keyring has changed. A name that is gone has its old limits for as long as anything of it lives."""
        self._rights = {identity.name: identity for identity in identities.values()}
        for name, who in self._rights.items():
            if name in self.by_name:
                self.by_name[name].allow(who)

    def allowed(self, name: str) -> Identity | None:
        """What the keyring allows this name now; None: it has no key."""
        return self._rights.get(name)

    def sweep(self, now_ms: int) -> None:
        """Forget names without a key that have nothing here: workers may announce any number of them."""
        for name, account in list(self.by_name.items()):
            account.end_rate.measure(account.ended, now_ms)
            if account.idle and name not in self._rights:
                del self.by_name[name]
