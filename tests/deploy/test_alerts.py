"""Alert rules and dashboard: known metrics only, valid queries, each alert with a case that fires and one
that does not."""

import json
import re
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from fetched_tools import promtool
from monitoring import ALERTS, DASHBOARD, RULES, exported, named, queries

from services.metric_names import METRICS
from services.watching.alarms import CHECKS

CASES = yaml.safe_load((Path(__file__).parent / "alert_cases.yaml").read_text())


def test_rules_and_dashboard_name_documented_metrics_only() -> None:
    rules = {name for rule in ALERTS.values() for name in named(rule["expr"])}
    shown = {name for _, query in queries() for name in named(query)}
    assert rules
    assert rules | shown <= exported()
    assert named(json.dumps(DASHBOARD["templating"])) <= exported()


def test_the_dashboard_shows_every_metric() -> None:
    shown = {re.sub("_(sum|count|bucket)$", "", name) for _, query in queries() for name in named(query)}
    missing = {metric.exported for metric in METRICS} - shown
    assert not missing


def test_alarms_in_rules_exist() -> None:
    patterns = re.findall(r'alarm[=!]~?"([^"]+)"', RULES.read_text())
    assert {alarm for pattern in patterns for alarm in pattern.split("|")} <= set(CHECKS)


def test_every_alert_has_both_cases() -> None:
    fires, quiet = set(), set()
    for test in CASES["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else quiet).add(case["alertname"])
    assert fires == quiet == set(ALERTS)


def in_two_namespaces(cases: dict[str, Any]) -> dict[str, Any]:
    """Each alert's case that fires and its quiet one side by side, as runs of one name in two namespaces."""

    def put(series: list[dict[str, Any]], namespace: str) -> list[dict[str, Any]]:
        return [
            one | {"series": one["series"].replace("{", f'{{namespace="{namespace}",', 1)} for one in series
        ]

    quiet = {
        case["alertname"]: test["input_series"]
        for test in cases["tests"]
        for case in test["alert_rule_test"]
        if not case["exp_alerts"]
    }
    beside = deepcopy([test for test in cases["tests"] if test["alert_rule_test"][0]["exp_alerts"]])
    for test in beside:
        (case,) = test["alert_rule_test"]
        test["input_series"] = [
            *put(test["input_series"], "loud"),
            *put(quiet[case["alertname"]], "quiet"),
        ]
        for alert in case["exp_alerts"]:
            alert["exp_labels"]["namespace"] = "loud"
    return cases | {"tests": beside}


@pytest.mark.parametrize("cases", [CASES, in_two_namespaces(CASES)], ids=["one run", "two namespaces"])
def test_rules_pass_promtool(tmp_path: Path, cases: dict[str, Any]) -> None:
    tool = promtool()
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    done = subprocess.run(
        [tool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_tells_namespaces_apart() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            groupings = re.findall(r"(?:by|on) \(([^)]*)\)", target["expr"])
            assert all(grouping.startswith("namespace, ") for grouping in groupings), target["expr"]
            assert target["legendFormat"].startswith("{{namespace}} ")


def test_dashboard_queries_parse(tmp_path: Path) -> None:
    tool = promtool()
    rules = [{"record": f"query:{i}", "expr": query} for i, (_, query) in enumerate(queries())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([tool, "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
