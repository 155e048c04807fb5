"""Alert rules and dashboard: known metrics only, valid queries, each alert with a case that fires and one
that does not."""

import json
import re
import subprocess
from pathlib import Path

import yaml
from fetched_tools import promtool
from monitoring import ALERTS, DASHBOARD, RULES, exported, named, queries

from services.metric_names import METRICS
from services.watching.alarms import CHECKS

CASES = Path(__file__).parent / "alert_cases.yaml"


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
    for test in yaml.safe_load(CASES.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else quiet).add(case["alertname"])
    assert fires == quiet == set(ALERTS)


def test_rules_pass_promtool(tmp_path: Path) -> None:
    tool = promtool()
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    (tmp_path / "cases.yaml").write_text(CASES.read_text())
    done = subprocess.run(
        [tool, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_queries_parse(tmp_path: Path) -> None:
    tool = promtool()
    rules = [{"record": f"query:{i}", "expr": query} for i, (_, query) in enumerate(queries())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([tool, "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
