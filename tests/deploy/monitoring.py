"""The chart's alert rules and dashboard, and what they ask Prometheus."""

import json
import re
from typing import Any

import yaml
from chart import CHART

from services.metric_names import METRICS

RULES = CHART / "files" / "rules.yaml"
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text())
ALERTS = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}


def exported() -> set[str]:
    """Names that a scrape of a run holds."""
    names = set()
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.exported + end for end in ends}
    return names


def queries(run: str = ".*") -> list[tuple[str, str]]:
    """(panel, query) for every query of the dashboard, as Grafana asks it when `run` is selected.

    Raises:
        ValueError: a query has a variable that is not known here.
    """
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$run", run)
            if "$" in query:
                raise ValueError(f"panel {panel['title']!r} has an unknown variable: {query}")
            found.append((panel["title"], query))
    return found


def named(text: str) -> set[str]:
    """rlgaf's metrics in a text."""
    return set(re.findall(r"ray_rlgaf_\w+", text))


def scrape_config(
    monitor: dict[str, Any], namespace: str, pod: dict[str, Any], address: str, interval: str
) -> dict[str, Any]:
    """Prometheus' configuration as its operator makes it of a PodMonitor, for one pod of its namespace (a
    template) of which the port that the monitor names is at `address`.

    Raises:
        ValueError: the monitor does not select the pod, or the pod lacks the port.
    """
    labels, spec = pod["metadata"]["labels"], monitor["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    if not spec["selector"]["matchLabels"].items() <= labels.items():
        raise ValueError(f"the PodMonitor does not select a pod with the labels {labels}")
    (container,) = pod["spec"]["containers"]
    if endpoint["port"] not in {port["name"] for port in container["ports"]}:
        raise ValueError(f"container {container['name']} has no port {endpoint['port']}")
    name = monitor["metadata"]["name"]
    known = {"namespace": namespace, "container": container["name"], "pod": f"{name}-0"}
    taken = {re.sub(r"\W", "_", label): labels[label] for label in spec["podTargetLabels"] if label in labels}
    return {
        "job_name": f"podMonitor/{namespace}/{name}/0",
        "honor_labels": endpoint.get("honorLabels", False),
        "metrics_path": endpoint.get("path", "/metrics"),
        "scrape_interval": interval,
        "static_configs": [
            {
                "targets": [address],
                "labels": {"job": f"{namespace}/{name}", "endpoint": endpoint["port"]} | known | taken,
            }
        ],
    }
