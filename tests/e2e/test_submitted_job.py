"""A run as a job of a real Ray cluster that `rlgaf up` started, submitted by processes of their own: stopped
with Ctrl-C, resubmitted, resumed to its end, its metrics scraped on the way; a token is required throughout.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from free_ports import free_ports
from launching import ROOT, START_S, environment

from services.metric_names import HAPPENED, METRICS

pytestmark = pytest.mark.e2e
STEPS = 40


@dataclass(frozen=True)
class Head:
    """A running cluster and how to reach it."""

    gcs: int
    address: str
    metrics: str
    variables: dict[str, str]

    def submit(self, *words: str, log: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "services.cli", "submit", *words, "--address", self.address]
        with log.open("w") as out:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.variables, stdout=out, stderr=subprocess.STDOUT, text=True
            )

    def scraped(self) -> dict[str, float]:
        """One value of each rlgaf metric that the node exports, by name without suffixes of histograms."""
        page = urllib.request.urlopen(self.metrics, timeout=10).read().decode()
        found = re.findall(r"^ray_(rlgaf_\w+)\{.*\} (\S+)$", page, re.MULTILINE)
        return {re.sub("_(bucket|sum|count)$", "", name): float(value) for name, value in found}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    gcs, dashboard, client, metrics = free_ports(4)
    home = tmp_path_factory.mktemp("home")
    variables = environment() | {"HOME": str(home), "RAY_metrics_report_interval_ms": "1000"}
    variables.pop("XDG_STATE_HOME", None)
    ports = {"port": gcs, "dashboard-port": dashboard, "client-port": client, "metrics-port": metrics}
    rlgaf = [sys.executable, "-m", "services.cli"]
    options = [f"--{name}={port}" for name, port in ports.items()]
    up = subprocess.run(
        [*rlgaf, "up", *options, "--cpus=8", "--object-store-mib=200"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert up.returncode == 0, up.stderr
    assert f"http://127.0.0.1:{dashboard}" in up.stdout
    yield Head(gcs, f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", variables)
    down = subprocess.run([*rlgaf, "down", f"--port={gcs}"], cwd=ROOT, env=variables, capture_output=True)
    assert down.returncode == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", dashboard), timeout=5)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, configuration: Path, tiny_demonstrations: Path) -> Path:
    """A working directory with TOML and data; the run is written elsewhere."""
    root = tmp_path_factory.mktemp("project")
    shutil.copy(tiny_demonstrations, root / "answers.jsonl")
    text = configuration.read_text().replace(str(tiny_demonstrations), "answers.jsonl")
    text = re.sub("steps = 8", f"steps = {STEPS}", text)
    text = re.sub('output = ".*"', f'output = "{tmp_path_factory.mktemp("runs")}"', text)
    (root / "run.toml").write_text(text)
    return root


def rows(project: Path) -> list[dict[str, object]]:
    """The steps' metrics, without the base's evaluation."""
    folder = re.search('output = "(.*)"', (project / "run.toml").read_text())
    assert folder is not None
    file = Path(folder[1]) / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()[1:]] if file.exists() else []


def test_the_token_is_required(head, project, tmp_path):
    log = tmp_path / "log"
    for variables in ({"RAY_AUTH_TOKEN": "wrong"}, {"HOME": str(tmp_path)}):
        other = Head(head.gcs, head.address, head.metrics, head.variables | variables)
        process = other.submit(str(project / "run.toml"), "--working-dir", str(project), log=log)
        assert process.wait(timeout=120) == 2
        assert "asks for a token and" in log.read_text()


def test_the_drivers_exit_code_and_words_come_back(head, project, tmp_path):
    """An absolute path that the cluster's nodes lack is found by the driver only."""
    log = tmp_path / "log"
    words = ["--working-dir", str(project), "--data.demonstrations=/absent/d.jsonl"]
    assert head.submit(str(project / "run.toml"), *words, log=log).wait(timeout=300) == 2
    text = log.read_text()
    assert "note: data.demonstrations = /absent/d.jsonl must exist on the cluster's nodes" in text
    assert "rlgaf: /absent/d.jsonl" in text
    assert "the job failed with exit code 2" in text


def test_train_stop_with_control_c_resubmit_and_resume(head, project, tmp_path):
    words = [str(project / "run.toml"), "--working-dir", str(project)]
    first = tmp_path / "first.log"
    process = head.submit(*words, log=first)
    seen: set[str] = set()
    deadline = time.monotonic() + START_S
    while len(rows(project)) < 6 or "rlgaf_rollout_workers_healthy" not in seen:
        assert process.poll() is None, first.read_text()
        assert time.monotonic() < deadline, first.read_text()
        seen |= set(head.scraped())
        time.sleep(0.5)

    second = tmp_path / "second.log"  # while it runs, nobody else may write into its folder
    assert head.submit(*words, "--auto-resume", log=second).wait(timeout=120) == 2
    assert "writes to" in second.read_text()

    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    text = first.read_text()
    assert "stopping after this step with a checkpoint" in text
    done = len(rows(project))
    assert f"stopped at step {done}; go on with --resume" in text
    assert done < STEPS

    process = head.submit(*words, "--resume", log=second)
    while process.poll() is None:
        seen |= set(head.scraped())
        time.sleep(0.5)
    assert process.returncode == 0, second.read_text()
    assert f"resuming from step {done}\n" in second.read_text()
    assert [row["step"] for row in rows(project)] == list(range(1, STEPS + 1))
    always = {metric.name for metric in METRICS if metric.when != HAPPENED}
    assert always <= seen <= {metric.name for metric in METRICS}


def test_the_cluster_is_used_by_a_plain_rlgaf_train(head, project, tmp_path):
    """RAY_ADDRESS: the driver is a process here, its actors are the cluster's; bad input ends it before."""
    words = ["train", str(project / "run.toml"), "--run.name=plain", "--rollout.workers=99"]
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", *words],
        cwd=project,
        env=head.variables
        | {"RAY_ADDRESS": f"127.0.0.1:{head.gcs}", "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "the Ray cluster has 8" in done.stderr


def test_a_run_waits_for_a_cluster_that_grows(head, project):
    """This one never does: a plan beyond its limit is refused at once, one within it after the wait."""
    for workers, words in (
        (99, "the cluster at its largest has 50"),
        (30, "3 s after it was asked to grow, has 8"),
    ):
        variables = {
            "RAY_ADDRESS": f"127.0.0.1:{head.gcs}",
            "RAY_AUTH_MODE": "token",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "services.cli",
                "train",
                str(project / "run.toml"),
                "--run.name=grows",
                f"--rollout.workers={workers}",
            ],
            cwd=project,
            env=head.variables | variables | {"RLGAF_AUTOSCALED": "0 50 3"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2
        assert words in done.stderr
        assert ("waiting for machines: 8 of" in done.stdout) == (workers == 30)
