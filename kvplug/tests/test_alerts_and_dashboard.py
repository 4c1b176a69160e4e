"""The alert rules and the dashboard: every expression is one, of metrics that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvplug.observe.catalogue import catalogue
from kvplug.observe.metric import Metric, Type

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "configs" / "prometheus" / "kvplug.rules.yaml"
TESTS = ROOT / "configs" / "prometheus" / "kvplug.rules.test.yaml"
DASHBOARD = ROOT / "configs" / "grafana" / "kvplug.json"
VARIABLES = {"$__rate_interval": "5m", "$engine": ".*", "$model": ".*"}


def promtool(*arguments: str | Path) -> str:
    """Run Prometheus' promtool; returns what it says.

    Raises:
        AssertionError: It found something.
    """
    program = shutil.which("promtool")
    if program is None:
        reason = "promtool is not installed: see requirements/servers.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    text = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return [rule for group in text["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def targets() -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target


def selectors(expression: str) -> Iterator[tuple[Metric, str]]:
    """Metrics of an expression, and the labels that it selects them by."""
    for name, labels in re.findall(r"\b(kvplug_\w+)(\{[^}]*\})?", expression):
        found = catalogue().get(name)
        if found is None:
            # Series of a histogram.
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            found = catalogue().get(base)
            assert found is not None, f"{name} is no metric"
            assert found.type is Type.HISTOGRAM, name
        yield found, labels


def check_labels(expression: str) -> None:
    """Check that an expression selects, joins and groups by labels that its metrics have."""
    known = {"engine", "model_name", "le"}
    for metric, selected in selectors(expression):
        known |= set(metric.labels)
        for name, value in re.findall(r'(\w+)\s*=~?"([^"]*)"', selected):
            assert name in {*metric.labels, "engine", "model_name"}, (metric.name, name)
            values = metric.labels.get(name)
            if isinstance(values, tuple):
                assert value in values, (metric.name, value)
    for _, names in re.findall(r"\b(by|without|ignoring|on) ?\(([^)]*)\)", expression):
        assert {name.strip() for name in names.split(",")} <= known, expression


def test_the_rules_are_rules() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES)


def test_each_alert_fires_and_does_not() -> None:
    text = yaml.safe_load(TESTS.read_text(encoding="utf-8"))
    seen: dict[str, set[bool]] = {}
    for test in text["tests"]:
        for one in test["alert_rule_test"]:
            seen.setdefault(one["alertname"], set()).add(bool(one["exp_alerts"]))
    assert seen == {rule["alert"]: {True, False} for rule in rules()}
    assert "SUCCESS" in promtool("test", "rules", TESTS)


@pytest.mark.parametrize("rule", rules(), ids=[rule["alert"] for rule in rules()])
def test_an_alert_is_of_metrics_that_there_are(rule: dict[str, Any]) -> None:
    assert list(selectors(rule["expr"]))
    check_labels(rule["expr"])
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    for name in re.findall(r"`(kvplug_\w+)`", rule["annotations"]["description"]):
        assert name in catalogue()


def test_prometheus_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    expressions = []
    for _, target in targets():
        expression = target["expr"]
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        assert "$" not in expression
        expressions.append(expression)
    records = [{"record": f"a:b:c{i}", "expr": one} for i, one in enumerate(expressions)]
    file = tmp_path / "dashboard.rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": records}]}))
    assert f"{len(records)} rules found" in promtool("check", "rules", file)


@pytest.mark.parametrize(("title", "target"), list(targets()), ids=[t for t, _ in targets()])
def test_a_panel_is_of_metrics_that_there_are(title: str, target: dict[str, Any]) -> None:
    assert list(selectors(target["expr"]))
    check_labels(target["expr"])
    assert 'engine=~"$engine", model_name=~"$model"' in target["expr"]
    metrics = [metric for metric, _ in selectors(target["expr"])]
    labels = {name for metric in metrics for name in metric.labels} | {"engine"}
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def test_counters_are_rates_and_gauges_are_not() -> None:
    for _, target in targets():
        for metric, _ in selectors(target["expr"]):
            rated = f"rate({metric.name}" in target["expr"]
            assert rated == (metric.type is not Type.GAUGE), target["expr"]


def test_the_dashboard_is_what_grafana_imports() -> None:
    model = dashboard()
    assert model["schemaVersion"] >= 38 and model["title"] and model["uid"] == "kvplug"
    assert model["id"] is None, "an id would overwrite another dashboard"
    names = [one["name"] for one in model["templating"]["list"]]
    assert names == ["datasource", "model", "engine"]
    panels = model["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["w"] > 0 and at["h"] > 0
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"timeseries", "stat", "table"}
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["description"].endswith(".")
        assert {"defaults", "overrides"} == set(panel["fieldConfig"]) and panel["options"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(refs) == len(set(refs))
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


def test_the_dashboard_shows_most_of_what_there_is() -> None:
    shown = {metric.name for _, target in targets() for metric, _ in selectors(target["expr"])}
    assert len(shown) > len(catalogue()) / 3
    assert {"kvplug_policy_retired", "kvplug_hit_tokens_total", "kvplug_pool_blocks"} <= shown
