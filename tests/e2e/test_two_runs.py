"""Two runs of one name on one Ray cluster: each has the numbers that it has alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from launching import ROOT, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

COMPARED = ("reward/score_mean", "reward/mean", "policy/loss", "discriminator/loss", "discriminator/accuracy")


def begin(configuration: Path, output: Path, seed: int) -> "subprocess.Popen[str]":
    """A driver on the cluster of this process; every run has the same name."""
    words = {
        "run.name": "twin",
        "run.output": output,
        "run.seed": seed,
        "run.exact": "true",
        "run.steps": 2,
        "evaluation.every": 2,
    }
    output.mkdir()
    with (output / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "services.cli", "train", str(configuration)]
            + [f"--{field}={value}" for field, value in words.items()],
            cwd=ROOT,
            env=environment() | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def numbers(process: "subprocess.Popen[str]", output: Path) -> list[dict[str, Any]]:
    """What the steps of a run came to."""
    assert process.wait(timeout=400) == 0, (output / "log").read_text()
    rows = [json.loads(line) for line in (output / "twin" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    return [{name: row[name] for name in COMPARED} for row in rows[1:]]


@pytest.mark.timeout(1500)
def test_two_runs_of_one_name_have_the_numbers_that_each_has_alone(
    ray_cluster: None, configuration: Path, tmp_path: Path
) -> None:
    folders = {seed: tmp_path / f"together-{seed}" for seed in (0, 1)}
    processes = {seed: begin(configuration, folder, seed) for seed, folder in folders.items()}
    together = {seed: numbers(processes[seed], folder) for seed, folder in folders.items()}
    assert together[0] != together[1]
    for seed in (0, 1):
        folder = tmp_path / f"alone-{seed}"
        assert numbers(begin(configuration, folder, seed), folder) == together[seed]
