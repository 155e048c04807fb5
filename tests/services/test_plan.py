"""The resource plan: its arithmetic and what it says when there is not enough."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from services import plan as planning
from services.config import ConfigError, load
from services.plan import local_gpus, machine_gpus, resource_plan

NEEDED = ["--policy.model=m", "--data.demonstrations=d.jsonl"]


def plan(*overrides: str, gpus: int = 0, cores: int = 8):
    return resource_plan(load(None, [*NEEDED, *overrides]), gpus=gpus, cores=cores)


def test_the_default_plan_fits_two_cores():
    default = plan(cores=2)
    assert (default.cpus, default.gpus) == (2.0, 0)
    assert set(default.devices.values()) == {"cpu"}
    default.check(2.0, 0, "this machine")


def test_sums_are_counts_times_shares():
    large = plan(
        "--rollout.workers=3",
        "--rollout.cpus_per_worker=2",
        "--learner.ranks=4",
        "--learner.cpus_per_rank=1.5",
        "--discriminator.ranks=2",
        "--discriminator.cpus_per_rank=1",
        "--discriminator.scoring.replicas=2",
        "--discriminator.scoring.cpus=0.25",
    )
    assert large.cpus == 3 * 2 + 4 * 1.5 + 2 * 1 + 2 * 0.25
    assert [role.count for role in large.roles] == [3, 4, 2, 2]


def test_threads_share_the_cores_among_the_processes_of_a_role():
    shared = plan("--rollout.workers=3", "--learner.ranks=16", "--discriminator.threads=5")
    assert shared.role("rollout").threads == 8 // 3
    assert shared.role("learner").threads == 1
    assert shared.role("discriminator").threads == 5


def test_gpus_go_to_every_role_that_computes():
    gpu = plan("--rollout.workers=2", "--rollout.tensor_parallel=4", "--learner.ranks=2", gpus=8)
    assert gpu.gpus == 2 * 4 + 2 + 1 + 1
    assert set(gpu.devices.values()) == {"cuda"}
    assert (
        plan("--rollout.device=cpu", "--learner.device=cpu", "--discriminator.device=cpu", gpus=8).gpus == 0
    )
    mixed = plan("--discriminator.device=cpu", gpus=8)
    assert mixed.gpus == 2
    assert mixed.devices == {"rollout": "cuda", "learner": "cuda", "discriminator": "cpu"}


def test_weights_cannot_travel_between_kinds_of_device():
    with pytest.raises(ConfigError, match=r"rollout\.device is cpu and learner\.device cuda"):
        plan("--rollout.device=cpu", gpus=2)


def test_too_few_cpus_names_numbers_fields_and_place():
    with pytest.raises(ConfigError) as refused:
        plan("--rollout.workers=4", "--rollout.cpus_per_worker=2").check(4.0, 0, "this machine")
    message = str(refused.value)
    for part in (
        "needs 9.5 CPUs",
        "this machine has 4",
        "rollout.workers (4 x 2)",
        "learner.ranks (1 x 0.5)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("words", "have", "needs", "ways"),
    [
        ([], 1, 4, 'discriminator.device = "cpu" (needs 2 fewer)'),
        (["--learner.ranks=4", "--discriminator.device=cpu"], 2, 5, "learner.ranks (4 x 1)"),
        (["--run.method=sft"], 1, 2, "rollout.workers (1 x 1), learner.ranks (1 x 1)"),
    ],
)
def test_too_few_gpus_name_the_ways_out(monkeypatch, words, have, needs, ways):
    monkeypatch.setattr(planning, "cpu_torch", lambda: False)
    with pytest.raises(ConfigError) as refused:
        plan(*words, gpus=have).check(64.0, have, "this machine")
    message = str(refused.value)
    assert f"needs {needs} GPUs and this machine has {have}; each process takes its own" in message
    assert ways in message
    assert "DEVICE=cpu" in message
    assert ("discriminator" in message) == (words == [])


def test_a_cpu_torch_uses_no_gpu_and_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert (machine_gpus(), local_gpus()) == (2, 0)
    with pytest.raises(ConfigError, match=r"needs 2 GPUs and this machine has 0; this torch is a CPU build"):
        plan("--run.method=sft", "--rollout.device=cuda", "--learner.device=cuda").check(
            64.0, 0, "this machine"
        )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")
    assert local_gpus() == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_gpus_only_where_the_default_plan_has_enough(tmp_path):
    for gpus in range(plan(gpus=1).gpus + 1):
        lines = "".join(f"echo 'GPU {i}: A'\necho '  MIG 1g Device 0'\n" for i in range(gpus))
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{lines}")
        smi.chmod(0o755)
        told = subprocess.run(
            ["make", "--dry-run", "--always-make", "setup"],
            cwd=Path(__file__).parents[2],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"-r requirements/{'gpu' if gpus == plan(gpus=1).gpus else 'cpu'}.txt" in told, gpus


def test_exactly_enough_is_enough():
    small = plan()
    small.check(small.cpus, 0, "this machine")
    with pytest.raises(ConfigError):
        small.check(small.cpus - 0.01, 0, "this machine")


def test_lines_name_every_role_and_the_sum():
    lines = plan("--learner.zero_stage=3").lines()
    assert [line.split()[0] for line in lines] == ["rollout", "learner", "discriminator", "scoring", "total"]
    assert "ZeRO-3" in lines[1]
    assert "2 CPU, 0 GPU" in lines[-1]


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,2,3", 3)])
def test_visible_devices_limit_the_gpus(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_gpus() == count


@pytest.mark.parametrize(
    ("asked", "gpus", "vector_units", "planned"),
    [
        ("auto", 0, False, "float32"),
        ("auto", 0, True, "bfloat16"),
        ("auto", 2, False, "bfloat16"),
        ("bfloat16", 0, False, "bfloat16"),
        ("float32", 2, True, "float32"),
    ],
)
def test_auto_computes_in_bfloat16_where_the_hardware_does(monkeypatch, asked, gpus, vector_units, planned):
    monkeypatch.setattr(planning, "cpu_computes_bfloat16", lambda: vector_units)
    config = load(None, [*NEEDED, f"--policy.dtype={asked}"])
    found = resource_plan(config, gpus=gpus, cores=2)
    assert found.settle(config).policy.dtype == found.dtype == planned
    assert planned in found.lines()[-1]
