"""Reads a page of metrics with Prometheus' own parser, and checks it against its rules."""

from __future__ import annotations

import math
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
Samples = dict[str, dict[Labels, float]]
#: The parser takes the ends off these names; what is counted has one of them.
_COUNTED = ("_total", "_bucket", "_sum", "_count")


def check_page(text: str) -> Samples:
    """Each sample by its name and labels. Fails where promtool would complain, and where Prometheus would drop one."""
    assert text.endswith("\n")
    samples: Samples = {}
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a metric has two blocks"
    for family in families:
        assert family.documentation, f"{family.name} has no help"
        assert family.type in ("counter", "gauge", "histogram"), f"{family.name} is {family.type}"
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            assert "" not in sample.labels.values(), f"{sample.name} has an empty label: {key}"
            assert key not in samples.setdefault(sample.name, {}), f"{sample.name}{key} is listed twice"
            assert math.isfinite(sample.value), f"{sample.name}{key} is {sample.value}"
            samples[sample.name][key] = sample.value
            if family.type == "counter":
                assert sample.name.endswith("_total") and sample.value >= 0
            elif family.type == "histogram":
                assert sample.name.endswith(_COUNTED[1:]) and sample.value >= 0
            else:
                assert not sample.name.endswith(_COUNTED), f"a gauge is called {sample.name}"
        if family.type == "histogram":
            _check_histogram(family.name, samples)
    return samples


def _check_histogram(name: str, samples: Samples) -> None:
    buckets: dict[Labels, list[tuple[float, float]]] = {}
    for key, value in samples.get(f"{name}_bucket", {}).items():
        others = dict(key)
        bound = float(others.pop("le"))
        buckets.setdefault(tuple(sorted(others.items())), []).append((bound, value))
    assert buckets.keys() == samples.get(f"{name}_count", {}).keys() == samples.get(f"{name}_sum", {}).keys()
    for labels, each in buckets.items():
        assert all(low[0] < high[0] and low[1] <= high[1] for low, high in pairwise(each)), f"{name}{labels}: {each}"
        assert each[-1] == (math.inf, samples[f"{name}_count"][labels]), f"{name}{labels} does not add up"


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name][tuple(sorted(labels.items()))]
