"""Every estimator and loss gives the same updates whatever the packing, the micro-batches, the ZeRO stage and
the number of ranks."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from recipe_worker import recipe_updates
from two_ranks import run_two_ranks
from zero_worker import two_updates, whole_weights, zero_stages

# A large epsilon keeps AdamW smooth: near a zero gradient its usual step is the sign of rounding noise.
COMMON = {"lr": 1e-2, "eps": 1e-3, "grad_clip": 0.5, "gamma": 0.5, "device": "cpu"}
UNSPLIT = {"pack_length": 512, "micro_batch_tokens": 8192}
SPLIT = {"pack_length": 24, "micro_batch_tokens": 48, "logits_chunk": 7}
FEW = {"pack_length": 48, "micro_batch_tokens": 96}
RECIPES = {
    "gspo with grpo": {
        "loss": "gspo",
        "advantage": "grpo",
        "normalise": "sequence",
        "clip_low": 0.03,
        "clip_high": 0.04,
        "epochs": 2,
        "minibatches": 2,
        "kl_estimator": "k3",
    },
    "ppo with a critic": {
        "loss": "ppo_clip",
        "advantage": "gae",
        "whiten": True,
        "dual_clip": 1.5,
        "clip_high": 0.3,
        "epochs": 2,
        "minibatches": 2,
        "critic": {"lr": 1e-2},
    },
    "dr_grpo, masked": {
        "advantage": "dr_grpo",
        "normalise": "constant",
        "constant_length": 11,
        "importance": "masked",
        "importance_floor": 0.7,
    },
    "rloo, adaptive, absorbing end": {
        "advantage": "rloo",
        "absorbing_end": True,
        "kl_coef": 0.1,
        "kl_target": 0.01,
        "entropy_coef": 0.01,
    },
    "reinforce_plus_plus": {
        "advantage": "reinforce_plus_plus",
        "kl_coef": 0.1,
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
}
UNTOUCHED = {"seconds", "tokens_computed", "micro_batches"}


def assert_same_updates(actual, expected):
    """Weights and metrics, except for what tells how the work was split."""
    (weights, metrics), (want_weights, want_metrics) = actual, expected
    for name, tensor in want_weights.items():
        torch.testing.assert_close(
            weights[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for step, (got, want) in enumerate(zip(metrics, want_metrics, strict=True)):
        assert got.keys() == want.keys()
        for name, value in want.items():
            if not any(name.startswith(word) for word in UNTOUCHED):
                assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-5), f"{name} of step {step}"


@pytest.fixture(scope="module")
def unsplit(tiny_model, uneven_table) -> Callable[[str], tuple[dict, list]]:
    """Weights and metrics of a recipe's two updates by one process in one piece."""

    @cache
    def of(name: str) -> tuple[dict, list]:
        learner, metrics = two_updates(tiny_model, uneven_table, **COMMON, **RECIPES[name], **UNSPLIT)
        return whole_weights(learner), metrics

    return of


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_packing_and_zero_stages_change_nothing(tiny_model, uneven_table, unsplit, name):
    settings = COMMON | RECIPES[name]
    whole = unsplit(name)
    expected = whole[1]
    if "clip_high" in settings:
        assert max(m["clip_fraction"] for m in expected) > 0, "clipping is part of what is compared"
    if "importance_floor" in settings:
        assert 0 < expected[0]["masked_fraction"] < 1
    for stage in (1, 2, 3):
        learner, metrics = two_updates(tiny_model, uneven_table, zero_stage=stage, **settings, **SPLIT)
        assert metrics[0]["micro_batches"] > 3
        assert_same_updates((whole_weights(learner), metrics), whole)
    learner, metrics = two_updates(tiny_model, uneven_table, packing=False, **settings, **SPLIT)
    assert_same_updates((whole_weights(learner), metrics), whole)


def test_two_ranks_change_nothing(tiny_model, uneven_table, unsplit, tmp_path):
    """Each recipe, the ZeRO stages taking turns."""
    recipes = {
        name: COMMON | recipe | FEW | {"zero_stage": 1 + index % 3}
        for index, (name, recipe) in enumerate(RECIPES.items())
    }
    job = {"model": str(tiny_model), "table": uneven_table, "recipes": recipes}
    split = run_two_ranks(job, tmp_path, recipe_updates)
    assert split.keys() == RECIPES.keys()
    for name, updates in split.items():
        assert_same_updates(updates, unsplit(name))


def test_two_ranks_change_nothing_and_resume_exactly_under_zero_3(tiny_model, uneven_table, tmp_path):
    """What is whole-sequence, whole-step or stateful at once: GSPO, critic and adaptive KL. The ranks also
    check that a reload continues exactly."""
    settings = COMMON | RECIPES["gspo with grpo"] | {"advantage": "gae", "kl_target": 0.01, "epochs": 1}
    learner, metrics = two_updates(tiny_model, uneven_table, **settings, **UNSPLIT)
    job = {"model": str(tiny_model), "table": uneven_table, "stages": [3], "settings": settings | FEW}
    weights, split, _ = run_two_ranks(job, tmp_path, zero_stages)[3]
    assert_same_updates((weights, split), (whole_weights(learner), metrics))
