"""Metrics for Prometheus: counters, gauges and histograms, and their text format.

    Metric      what is measured: name with its unit, kind, help, labels. Documents are generated from tables of them
    Family      the values of one metric, by their labels
    Names       the values that a label may have

Clients must not be able to create label values: each label has values from a closed list, or from `Names`, which learns
them from workers and operators only. A family has a bound of its own as well. What is beyond a bound is counted as
"other".

There is no clock in here and no socket. The text is version 0.0.4 of Prometheus' own format.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from llambo.mesh.wire.errors import printable

MEDIA_TYPE = "text/plain; version=0.0.4"
CONTENT_TYPE = f"{MEDIA_TYPE}; charset=utf-8"
OTHER = "other"
#: In place of an empty name: Prometheus treats an empty label as no label.
NONE = "none"
#: Label sets of one metric. A histogram has fewer, because each has a line for every bucket.
SERIES = {"counter": 500, "gauge": 500, "histogram": 200}
#: Bounds of buckets for waits, and for the pause between two tokens, in seconds.
WAITS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PAUSES_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})
_HELP_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n"})
C = TypeVar("C", bound="Series")


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    #: Upper bounds of the buckets, ascending. The last bucket has no bound, and is not listed.
    bounds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert _NAME.fullmatch(self.name), self.name
        assert (self.kind == "counter") == self.name.endswith("_total"), f"{self.name} is a {self.kind}"
        assert all(_NAME.fullmatch(label) and label != "le" for label in self.labels), self.labels
        assert (self.kind == "histogram") == bool(self.bounds), f"{self.name} has bounds {self.bounds}"
        assert list(self.bounds) == sorted(set(self.bounds)), f"the bounds of {self.name} do not ascend"

    def scalars(self) -> Family[Scalar]:
        assert self.kind != "histogram"
        return Family(self, Scalar)

    def histograms(self) -> Family[Histogram]:
        return Family(self, lambda: Histogram(self.bounds))


class Series(Protocol):
    def lines(self, name: str, labels: str) -> list[str]:
        """Its lines of the page."""


class Scalar:
    """One counter or gauge. Its owner adds to `value`, or sets it."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def lines(self, name: str, labels: str) -> list[str]:
        return [f"{name}{_braced(labels)} {_number(self.value)}"]


class Histogram:
    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        #: Observations in each bucket; not cumulative yet.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def lines(self, name: str, labels: str) -> list[str]:
        before, total, lines = f"{labels}," if labels else "", 0, []
        for bound, count in zip(self.bounds, self.counts, strict=False):
            total += count
            lines.append(f'{name}_bucket{{{before}le="{_number(bound)}"}} {total}')
        total += self.counts[-1]
        lines.append(f'{name}_bucket{{{before}le="+Inf"}} {total}')
        lines.append(f"{name}_sum{_braced(labels)} {_number(self.sum)}")
        lines.append(f"{name}_count{_braced(labels)} {total}")
        return lines


class Family(Generic[C]):
    """All values of one metric. A metric without labels has one value from the start."""

    def __init__(self, metric: Metric, make: Callable[[], C]) -> None:
        self.metric = metric
        self._make = make
        self._most = SERIES[metric.kind]
        self._series: dict[tuple[str, ...], C] = {}
        if not metric.labels:
            self._series[()] = make()

    def at(self, *values: str) -> C:
        """The value with these labels. Beyond the bound it is the one that all others share."""
        series = self._series.get(values)
        if series is None:
            assert len(values) == len(self.metric.labels), f"{self.metric.name} has labels {self.metric.labels}"
            if len(self._series) >= self._most - 1:
                values = (OTHER,) * len(values)
            series = self._series.setdefault(values, self._make())
        return series

    @property
    def one(self) -> C:
        """The only value of a metric without labels."""
        return self._series[()]

    def clear(self) -> None:
        """For a gauge whose values are computed anew."""
        self._series.clear()

    def items(self) -> Iterable[tuple[tuple[str, ...], C]]:
        return self._series.items()

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)


class Names:
    """The values of a label: names from trusted sources, up to `most` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def learn(self, name: str) -> None:
        if name not in self._known and len(self._known) < self._most:
            self._known[name] = printable(name) or NONE

    def of(self, name: str) -> str:
        return self._known.get(name, OTHER)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known.values())

    def __len__(self) -> int:
        return len(self._known)


# --- the text ------------------------------------------------------------------------------------------


def page(families: Iterable[Family[Any]]) -> str:
    """The values of all families, in this order."""
    lines: list[str] = []
    for family in families:
        metric = family.metric
        lines.append(f"# HELP {metric.name} {metric.help.translate(_HELP_ESCAPES)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for values, series in family.items():
            labels = _labels(metric.labels, values)
            lines += series.lines(metric.name, labels)
    return "\n".join(lines) + "\n"


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True))


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: float) -> str:
    return repr(round(value, 6))


def table(metrics: Iterable[Metric]) -> str:
    """A table of metrics for the documentation."""
    lines = ["| name | kind | labels | |", "| --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines)
