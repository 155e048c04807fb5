"""What a run asks an autoscaler for, and what it never asks for; test_submitted_job.py waits for real."""

import pytest

from services import autoscaling
from services.autoscaling import Largest, bring_up, bundles, largest
from services.config import ConfigError, load
from services.plan import ResourcePlan, resource_plan


def plan(*overrides: str, gpus: int) -> ResourcePlan:
    return resource_plan(load(None, ["--policy.model=m", "--data.demonstrations=d", *overrides]), gpus=gpus)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(autoscaling.VARIABLE, raising=False)
    assert largest() is None
    monkeypatch.setenv(autoscaling.VARIABLE, "32 128 1800")
    assert largest() == Largest(gpus=32, cpus=128.0, seconds=1800.0)
    for wrong in ("32 128", "many 128 1800"):
        monkeypatch.setenv(autoscaling.VARIABLE, wrong)
        with pytest.raises(ConfigError, match=r"RLGAF_AUTOSCALED = .* as in '32 128 1800'"):
            largest()


def test_the_autoscaler_is_asked_for_each_process_of_the_plan() -> None:
    large = plan("--rollout.workers=3", "--rollout.tensor_parallel=2", "--learner.ranks=2", gpus=16)
    asked = bundles(large)
    assert sorted(bundle["GPU"] for bundle in asked) == [1, 1, 1, 1, 2, 2, 2]
    assert sum(bundle["CPU"] for bundle in asked) == large.cpus
    assert bundles(plan(gpus=0)) == [{"CPU": 0.5}] * 4


def test_a_plan_beyond_the_largest_cluster_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="the plan needs 12 GPUs and the cluster at its largest has 8"):
        bring_up(plan("--rollout.workers=9", gpus=8), Largest(8, 64.0, 3600.0), print)
