"""The run's own scoring beside 256 clients of the endpoint, as a ratio of its time alone."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import many_clients
import pytest
import ray
import torch

from discriminator.config import DiscriminatorConfig, ScoringConfig
from discriminator.model import load_discriminator
from discriminator.versions import VersionStore, state_checksum
from services.endpoint import open_door
from services.scoring import deploy

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

OWN = [
    (f"say cat {i}: ", [("the cat sat on the mat and the dog lay by the door", True)] * 8) for i in range(16)
]


def own_seconds(handle: Any, duration: float) -> list[float]:
    """How long each of the run's own requests takes."""
    seconds: list[float] = []
    end = time.monotonic() + duration
    while (began := time.monotonic()) < end:
        handle.measured_score.remote(0, OWN).result(timeout_s=300)
        seconds.append(time.monotonic() - began)
        time.sleep(0.1)
    return seconds


def test_the_runs_scoring_takes_less_than_twice_its_time_beside_256_clients(
    ray_cluster: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLGAF_TEST_TOKEN", many_clients.TOKEN)
    scoring = ScoringConfig(http=True, http_port=0, http_token="RLGAF_TEST_TOKEN")
    config = DiscriminatorConfig(scoring=scoring, device="cpu")
    module = load_discriminator(config, str(tiny_model), device="cpu", dtype=torch.float32, seed=3)
    state = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    store: Any = ray.remote(VersionStore).options(num_cpus=0).remote()
    ray.get(store.publish.remote(0, state_checksum(state), [ray.put(state)]))
    handle = deploy("scoring-load", config, str(tiny_model), "float32", store, threads=1, use_gpu=False)
    door, url = open_door(handle, scoring)
    port = url.split(":")[2].split("/")[0]
    own_seconds(handle, 2)
    alone = own_seconds(handle, 15)
    clients = subprocess.Popen(
        ["nice", "-n", "15", sys.executable, many_clients.__file__, port, "30"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert clients.stdout is not None
    assert clients.stdout.readline() == "asking\n"
    time.sleep(3)
    beside = own_seconds(handle, 20)
    answered = json.loads(clients.communicate(timeout=200)[0].splitlines()[-1])
    ray.kill(door)
    ratio = statistics.mean(beside) / statistics.mean(alone)
    print(f"alone {statistics.mean(alone):.4f} s, beside {statistics.mean(beside):.4f} s: {ratio:.2f}")
    print(f"worst {max(alone):.4f} and {max(beside):.4f} s; {answered}")
    assert answered["200"] > 0
    assert set(answered) <= {"200", "503"}
    assert ratio < 2
    assert max(beside) < 10 * statistics.mean(alone), "no request of the run waits for a crowd"
