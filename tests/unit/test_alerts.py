"""The alerts and the dashboard ask for metrics that exist, by labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llambo.broker.report import metrics_page as broker
from llambo.gateway import gateway_metrics as gateway
from llambo.mesh.service import host
from llambo.mesh.service.prometheus import Metric

DOCS = Path(__file__).resolve().parents[2] / "docs"
METRICS: dict[str, Metric] = {metric.name: metric for metric in (*broker.TABLE, *gateway.TABLE, *host.PROCESS_METRICS)}
#: What Prometheus adds to whatever it scrapes.
ADDED = {"job", "instance"}
_NAME = re.compile(r"\b(?:llambo_|process_)\w+")
_USED = re.compile(r"\b((?:llambo_|process_)\w+)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_BY = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


def alerts() -> list[dict[str, Any]]:
    document = yaml.safe_load((DOCS / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard() -> Any:
    return json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))


def expressions() -> list[str]:
    found = [rule["expr"] for rule in alerts()]
    found += [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    found += [each["definition"] for each in dashboard()["templating"]["list"] if each["type"] == "query"]
    return found


def metric_of(name: str) -> Metric:
    """Accepts the names of a histogram's series, too."""
    metric = METRICS.get(name) or METRICS.get(re.sub(r"_(bucket|sum|count)$", "", name))
    assert metric is not None, f"there is no metric {name}"
    assert (name != metric.name) == (metric.kind == "histogram"), f"{name} is a {metric.kind}"
    return metric


def test_there_are_some() -> None:
    assert len(alerts()) >= 12 and len(expressions()) > 60


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_what_is_asked_for_exists(expression: str) -> None:
    used = [(metric_of(name), matchers) for name, matchers in _USED.findall(expression)]
    assert used or expression.startswith(("up{", "absent(up{"))
    labels = set[str](ADDED)
    for metric, matchers in used:
        own = {*metric.labels, *ADDED, *(["le"] if metric.kind == "histogram" else [])}
        labels |= own
        assert set(_MATCHER.findall(matchers)) <= own, f"{metric.name} has labels {own}"
    for group in _BY.findall(expression):
        assert {each.strip() for each in group.split(",")} <= labels, f"grouped by {group}"
    for metric, _ in used:
        if metric.kind != "gauge":
            assert re.search(rf"(rate|increase)\({metric.name}", expression), f"{metric.name} only ever goes up"
    assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_every_label_in_a_summary_is_one_of_its_alert() -> None:
    for rule in alerts():
        text = " ".join(rule["annotations"].values())
        grouped = _BY.search(rule["expr"].removeprefix("histogram_quantile"))
        by_sum = "sum by" in rule["expr"]
        for label in re.findall(r"\$labels\.(\w+)", text):
            if by_sum and grouped is not None:
                assert label in [each.strip() for each in grouped[1].split(",")], f"{rule['alert']}: {label}"
            else:
                metric = metric_of(_NAME.findall(rule["expr"])[0]) if _NAME.search(rule["expr"]) else None
                assert label in ADDED or (metric is not None and label in metric.labels), f"{rule['alert']}: {label}"


def test_alerts_are_what_prometheus_reads() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical") and rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert all("id" not in panel or panel["type"] in ("row", "stat", "timeseries") for panel in board["panels"])
    names = {each["name"] for each in board["templating"]["list"]}
    asked = set(re.findall(r"\$\{?([a-z]+)\b", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert asked <= names, f"{asked - names} are no variables"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, f"{panel['title']} overlaps another"
        taken |= cells
