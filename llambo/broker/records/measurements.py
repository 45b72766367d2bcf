"""What is measured besides the counters: times for the metrics, a sample a second, the rate of ends."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from llambo.broker.events import Counted
from llambo.broker.records.accounts import EndRate
from llambo.broker.records.meter import Meter


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
