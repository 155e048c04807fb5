"""A real Prometheus as a process of its own, and its HTTP API.

with Prometheus(binary, folder, rules, [scrape_config]) as server:
    server.query('ray_rlgaf_step{run="a"}')     # [({"run": "a", …}, 3.0)]
"""

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from free_ports import free_ports

READY_S = 120.0
EVERY = "1s"
"""Interval of scrapes and of the rules' evaluation."""


class Prometheus:
    """Runs within a `with` block; its configuration, data and log lie in `folder`."""

    def __init__(self, binary: Path, folder: Path, rules: Path, scrape_configs: list[dict[str, Any]]) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        (port,) = free_ports(1)
        self._address = f"127.0.0.1:{port}"
        folder.mkdir(parents=True)
        settings = {
            "global": {"evaluation_interval": EVERY},
            "rule_files": [str(rules)],
            "scrape_configs": scrape_configs,
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        self._command = [
            str(binary),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]

    def __enter__(self) -> Self:
        with (self._folder / "log").open("w") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + READY_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end()
                words = (self._folder / "log").read_text()[-2000:]
                raise RuntimeError(f"Prometheus did not come up: {words}")
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every element of the answer, now."""
        found = self._get("query", query=expression)["result"]
        return [(element["metric"], float(element["value"][1])) for element in found]

    def label_values(self, selector: str, label: str = "__name__") -> set[str]:
        """Values of a label, or names, of all series like this until now."""
        return set(self._get(f"label/{label}/values", **{"match[]": selector}))

    def firing(self) -> set[str]:
        """Alerts that fire."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def rules(self) -> dict[str, dict[str, Any]]:
        """Every rule by name: `health`, `lastError`, `lastEvaluation` and the rest of what the API says."""
        return {rule["name"]: rule for group in self._get("rules")["groups"] for rule in group["rules"]}

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped: `health`, `lastError`, `labels` and the rest of what the API says."""
        return self._get("targets")["activeTargets"]

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path} {parameters}: {error.read().decode()}") from None

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)
