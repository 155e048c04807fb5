"""The resource plan: its arithmetic and what it says when there is not enough."""

import pytest

from services import plan as planning
from services.config import ConfigError, load
from services.plan import local_gpus, resource_plan

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


def test_too_few_gpus_names_those_who_ask():
    with pytest.raises(ConfigError) as refused:
        plan("--learner.ranks=4", "--discriminator.device=cpu", gpus=2).check(64.0, 2, "the Ray cluster")
    message = str(refused.value)
    assert "needs 5 GPUs and the Ray cluster has 2" in message
    assert "learner.ranks (4 x 1)" in message
    assert "discriminator.ranks" not in message


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
    assert local_gpus() == count


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
    monkeypatch.setattr(planning, "_cpu_computes_bfloat16", lambda: vector_units)
    config = load(None, [*NEEDED, f"--policy.dtype={asked}"])
    found = resource_plan(config, gpus=gpus, cores=2)
    assert found.settle(config).policy.dtype == found.dtype == planned
    assert planned in found.lines()[-1]
