"""A real Prometheus scrapes a run of the tiny model on a cluster of `rlgaf up`, configured as the chart's
PodMonitor would have it: every documented metric is there with the value of metrics.jsonl, every query of the
dashboard is answered, every alert rule is evaluated. On the way a rollout worker is killed under a weight
sync, so that the metrics and the alert of that are there too.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from chart import EXAMPLES, NAMESPACE, groups, one, render
from fetched_tools import prometheus
from free_ports import free_ports
from launching import ROOT, START_S, environment, steps_done
from monitoring import ALERTS, DASHBOARD, RULES, exported, queries, scrape_config
from scraping import EVERY, Prometheus

from services.jobs.cluster import LOCAL, LocalCluster, Ports, down, up
from services.metric_names import METRICS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RUN, STEPS = "scraped", 14
KILL_AFTER, STALL_S = 5, 8.0
"""The worker dies after this step; generation of the next one is done after so many seconds for certain."""
KIND = next(path for path in EXAMPLES if path.stem == "kind-cpu")


@dataclass
class Seen:
    """What Prometheus knew while the run was going on, and what the run wrote."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    """Queries of the dashboard that had a finite value in their answer."""
    fired: set[str] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)
    """What the dashboard's variable offered."""
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)

    def look(self, server: Prometheus) -> None:
        """Ask for all of it once more."""
        self.names |= server.label_values(f'{{run="{RUN}"}}')
        self.fired |= server.firing()
        self.runs |= server.label_values(*variable())
        for _, query in queries(RUN):
            if query not in self.answered and any(math.isfinite(value) for _, value in server.query(query)):
                self.answered.add(query)


def variable() -> tuple[str, str]:
    """Selector and label of the dashboard's variable `run`."""
    (found,) = (item for item in DASHBOARD["templating"]["list"] if item["name"] == "run")
    metric, label = found["query"]["query"].removeprefix("label_values(").removesuffix(")").split(", ")
    return metric, label


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    ports = Ports(*free_ports(4))
    own = environment() | {
        "XDG_STATE_HOME": str(tmp_path_factory.mktemp("state")),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path_factory.mktemp("token") / "token"),
        "RAY_AUTH_MODE": "token",
        "RAY_metrics_report_interval_ms": "1000",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in own.items():
            patch.setenv(name, value)
        yield up(ports, cpus=8, object_store_mib=200)
        assert down(ports.gcs)


@pytest.fixture(scope="module")
def server(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    manifests = render("-f", str(KIND))
    head = dict(groups(manifests))["head"]["template"]
    address = f"{LOCAL}:{cluster.ports.metrics}"
    scraped = scrape_config(one(manifests, "PodMonitor"), NAMESPACE, head, address, EVERY)
    folder = tmp_path_factory.mktemp("prometheus") / "server"
    with Prometheus(prometheus(), folder, RULES, [scraped]) as running:
        yield running


@pytest.fixture(scope="module")
def seen(server: Prometheus, cluster: LocalCluster, configuration: Path) -> Seen:
    """The whole run, watched."""
    found, log = Seen(), configuration.parent / f"{RUN}.log"
    metrics = configuration.parent / RUN / "metrics.jsonl"
    words = [f"--run.name={RUN}", f"--run.steps={STEPS}", "--evaluation.every=4"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "train", str(configuration), *words],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": f"{LOCAL}:{cluster.ports.gcs}"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline, killed = time.monotonic() + START_S, False
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            if not killed and steps_done(metrics.parent) >= KILL_AFTER:
                kill_a_worker_before_a_sync(cluster)
                killed = True
            found.look(server)
            time.sleep(0.1 if not killed else 1.0)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert killed
    found.rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found.rules, found.targets = server.rules(), server.targets()
    return found


def kill_a_worker_before_a_sync(cluster: LocalCluster) -> None:
    """Kill the rollout worker when it has nothing to do and the next thing that it takes part in is a sync.

    The trainers are held meanwhile: the loop cannot learn, and waits with the generated batch.
    """
    trainers = actors(cluster, "RayTrainWorker")
    assert trainers
    for trainer in trainers:
        trainer.suspend()
    time.sleep(STALL_S)
    (worker,) = actors(cluster, "RolloutWorker")
    worker.kill()
    worker.wait(timeout=30)
    for trainer in trainers:
        trainer.resume()


def actors(cluster: LocalCluster, name: str) -> list[psutil.Process]:
    """Processes of the cluster's actors of a class."""
    running = psutil.Process(cluster.pid).children(recursive=True)
    alive = [process for process in running if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if f"ray::{name}" in " ".join(process.cmdline())]


def test_every_documented_metric_is_scraped(seen: Seen) -> None:
    assert {name for name in seen.names if name.startswith("ray_rlgaf_")} == exported()


def test_every_query_of_the_dashboard_is_answered(seen: Seen) -> None:
    missing = [(panel, query) for panel, query in queries(RUN) if query not in seen.answered]
    assert not missing
    assert seen.runs == {RUN}


def test_every_rule_is_evaluated(seen: Seen) -> None:
    assert set(seen.rules) == set(ALERTS)
    for name, rule in seen.rules.items():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), name
        assert not rule["lastEvaluation"].startswith("0001"), f"{name} was never evaluated"


def test_a_broken_sync_is_counted_and_fires(seen: Seen, server: Prometheus) -> None:
    assert seen.rows[-1]["rollout/sync_failures"] == seen.rows[-1]["rollout/replacements"] == 1
    for name in ("sync_failures", "rollout_replacements"):
        ((_, value),) = server.query(f'ray_rlgaf_{name}_total{{run="{RUN}"}}')
        assert value == 1
    assert "RlgafSyncFailures" in seen.fired
    assert not seen.fired & {"RlgafStalled", "RlgafNotFinite", "RlgafWorkersReplaced"}


def test_the_target_has_the_labels_of_a_pod(seen: Seen, server: Prometheus) -> None:
    (target,) = seen.targets
    assert (target["health"], target["lastError"]) == ("up", "")
    ((labels, _),) = server.query(f'ray_rlgaf_tokens_total{{run="{RUN}"}}')
    assert labels["job"] == f"{NAMESPACE}/demo-rlgaf"
    assert labels["app_kubernetes_io_instance"] == "demo"
    assert labels["app_kubernetes_io_component"] == "head"
    assert not [name for name in labels if name.startswith("exported_")], "one of Ray's labels is hidden"


def test_gauges_are_the_last_rows(seen: Seen, server: Prometheus) -> None:
    """The newest value of each key of metrics.jsonl."""
    checked = 0
    for metric in METRICS:
        keys = {"": metric.key} if metric.key else metric.series
        for label, key in keys.items() if metric.kind == "gauge" else ():
            (wanted,) = [row[key] for row in seen.rows if row.get(key) is not None][-1:]
            selector = f'run="{RUN}"' + (f',{metric.label}="{label}"' if metric.label else "")
            ((_, value),) = server.query(f"last_over_time({metric.exported}{{{selector}}}[30m])")
            assert value == pytest.approx(wanted * metric.scale, rel=1e-9, abs=1e-12), (metric.name, label)
            checked += 1
    assert checked > 30


def test_counters_are_the_sums_of_the_rows(seen: Seen, server: Prometheus) -> None:
    def counted(name: str, label: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in server.query(f'{name}{{run="{RUN}"}}')}

    phases = {key for row in seen.rows for key in row if key.startswith("seconds/")}
    spent = {key.split("/")[1]: [row[key] for row in seen.rows if key in row] for key in phases}
    assert counted("ray_rlgaf_phase_spent_seconds_total", "phase") == pytest.approx(
        {phase: sum(seconds) for phase, seconds in spent.items()}, rel=1e-9
    )
    assert counted("ray_rlgaf_phase_seconds_count", "phase") == {
        phase: len(seconds) for phase, seconds in spent.items()
    }
    outcomes = counted("ray_rlgaf_responses_total", "outcome")
    for outcome in ("submitted", "trained", "dropped", "failed"):
        assert outcomes.get(outcome, 0) == seen.rows[-1][f"responses/{outcome}"]
    assert counted("ray_rlgaf_tokens_total", "run") == {
        RUN: sum(row["policy/tokens_response"] for row in seen.rows[1:])
    }
