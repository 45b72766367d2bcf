"""What is counted and measured: numbers since the start, times for the metrics, a sample a second, the rate of ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from llambo.broker.events import Counted
from llambo.broker.records.accounts import EndRate
from llambo.broker.records.meter import Meter

_SHOWN = {"killers": "convicted"}


@dataclass(slots=True)
class RequestCounters:
    submitted: int = 0
    attached: int = 0
    refused: int = 0
    dispatched: int = 0
    ended: int = 0
    failed: int = 0
    cancelled: int = 0
    moved: int = 0
    adopted: int = 0


@dataclass(slots=True)
class TokenCounters:
    tokens: int = 0
    #: All frames that came as tokens, from the token plane and in pages: beats, stale and malformed ones as well.
    chunks: int = 0
    stale_chunks: int = 0
    duplicate_chunks: int = 0
    malformed_frames: int = 0
    gaps: int = 0
    repaired: int = 0
    replays_asked: int = 0
    replays_served: int = 0


@dataclass(slots=True)
class FaultCounters:
    engine_deaths: int = 0
    suspected: int = 0
    #: Requests that were proved to kill engines. Shown as "convicted", its older name.
    killers: int = 0
    ejected: int = 0
    retries_denied: int = 0


@dataclass(slots=True)
class PeerCounters:
    workers_lost: int = 0
    clients_lost: int = 0
    problems: int = 0
    unknown_sessions: int = 0
    forbidden: int = 0
    #: Messages of clients that do not read their answers: they count as lost.
    unread: int = 0


@dataclass(slots=True)
class Counters:
    requests: RequestCounters = field(default_factory=RequestCounters)
    tokens: TokenCounters = field(default_factory=TokenCounters)
    faults: FaultCounters = field(default_factory=FaultCounters)
    peers: PeerCounters = field(default_factory=PeerCounters)

    def flat(self) -> dict[str, int]:
        parts = (getattr(self, part.name) for part in fields(self))
        values = {one.name: getattr(part, one.name) for part in parts for one in fields(part)}
        return {_SHOWN.get(name, name): value for name, value in values.items()}


@dataclass(slots=True)
class Load:
    """How the shell's loop keeps up: load.py."""

    #: The longest turn since the last tick, and in the current second; how long messages are unread.
    turn_ms: int = 0
    longest_ms: int = 0
    unread_ms: int = 0
    #: The limit of descriptors, while there are none for more peers; else 0.
    crowded: int = 0
    #: It does not keep up; since when the last ticks say the same.
    behind: bool = False
    since: int = 0
    #: Requests refused since it fell behind; whether and when that was reported.
    refused: int = 0
    reported: bool = False
    reported_at: int = 0
    #: `longest_ms` of the second before.
    last_second_ms: int = 0

    def begin_second(self) -> None:
        self.last_second_ms, self.longest_ms = self.longest_ms, 0


class Sample(NamedTuple):
    """The mesh at one moment, of which there is one a second: history.py."""

    number: int
    at_ms: int
    tokens_per_s: float
    running: int
    waiting: int
    busy: int
    slots: int
    ready: int
    workers: int
    ended: int
    failed: int
    first_ms: int


class Measurements:
    def __init__(self, samples: int) -> None:
        self.meter = Meter()
        self.samples: deque[Sample] = deque(maxlen=samples)
        #: Of all requests together: what retry-after is estimated from.
        self.end_rate = EndRate()
        #: What the shell has counted.
        self.shell = Counted()
        self.load = Load()
