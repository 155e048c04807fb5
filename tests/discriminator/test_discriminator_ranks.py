"""Two ranks, with weights sharded by ZeRO-3 too, do what one rank does, whatever the objective."""

from pathlib import Path

import pytest
import torch
from discriminator_rank import all_trainers
from judging import judged, small
from two_ranks import run_two_ranks

from discriminator.trainer import DiscriminatorTrainer

OBJECTIVES = {
    "bce": ({"level": "token", "lora": {"rank": 2}, "length_matched": True}, (1, 3)),
    "bradley_terry": (
        {
            "loss": "bradley_terry",
            "reward": {"form": "relativistic"},
            "gradient_penalty": 0.1,
            "score_centring": 0.2,
            "perturbed_fraction": 0.25,
        },
        (1, 2),
    ),
    "hinge": ({"loss": "hinge", "reward": {"form": "logit"}}, (3,)),
    "least_squares": ({"loss": "least_squares", "level": "token", "reward": {"form": "logit"}}, (2,)),
    "wasserstein": ({"loss": "wasserstein", "reward": {"form": "logit"}, "spectral_norm": 0.05}, (3,)),
}
"""Settings by name, and the ZeRO stages under which they run."""


def test_two_ranks_equal_one(tiny_model: Path, tmp_path: Path) -> None:
    demonstrations = judged([(f"say {i}: ", f"the cat sat on mat {i}") for i in range(9)])
    rollouts = judged([(f"say {i}: ", f"a dog lay by {s} the door") for i in range(9) for s in range(3)])
    # A large epsilon keeps AdamW smooth: near a zero gradient its usual step is the sign of rounding noise.
    configs = {
        name: small(eps=1e-3, batch_size=12, min_demonstrations=7, **objective)
        for name, (objective, _) in OBJECTIVES.items()
    }
    trainers = {
        f"{name}-{stage}": configs[name].model_dump() | {"zero_stage": stage}
        for name, (_, stages) in OBJECTIVES.items()
        for stage in stages
    }
    job = {
        "model": str(tiny_model),
        "trainers": trainers,
        "rollouts": rollouts,
        "demonstrations": demonstrations,
    }
    results = run_two_ranks(job, tmp_path, all_trainers)
    assert results.keys() == trainers.keys()
    for name, config in configs.items():
        single = DiscriminatorTrainer(config, str(tiny_model), seed=0)
        metrics = single.update(rollouts, demonstrations, step=0)
        evaluation = single.evaluate(demonstrations, rollouts, step=0)
        published = single.publish()
        assert published is not None
        for stage in OBJECTIVES[name][1]:
            split_metrics, split_evaluation, state = results[f"{name}-{stage}"]
            assert split_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5), f"{name} under ZeRO-{stage}"
            assert split_evaluation == pytest.approx(evaluation, rel=1e-3, abs=1e-4)
            assert state.keys() == published.state.keys()
            for weight, tensor in published.state.items():
                torch.testing.assert_close(state[weight], tensor, atol=2e-5, rtol=0)
