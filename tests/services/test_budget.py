"""Token accounts against hand counts, and the learner's passes against what its step really calls."""

import pyarrow as pa
import pytest
import torch

from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from services.budget import Budget, packed_tokens, policy_passes, response_tokens

TABLE = pa.table(
    {
        "group_id": ["a", "a", "b"],
        "prompt_ids": [[1, 2, 3], [1, 2, 3], [4]],
        "response_ids": [[5, 6], [7], [8, 9, 10, 11]],
    }
)


def test_a_prompt_counts_once_for_its_group():
    assert response_tokens(TABLE) == 7
    assert packed_tokens(TABLE) == 7 + 3 + 1
    assert packed_tokens(TABLE.slice(0, 0)) == response_tokens(TABLE.slice(0, 0)) == 0


def test_a_run_adds_up_and_survives_a_checkpoint():
    budget = Budget()
    budget.generated(TABLE)
    budget.learned(TABLE, trained=2, forward=3)
    budget.discriminated({"tokens_trained": 30.0, "accuracy": 0.5})
    budget.discriminated({"steps": 0.0})
    budget.drawn({"gumbel_tokens": 50.0, "gumbel_kept_tokens": 20.0})
    budget.drawn({"loss": 1.0})
    expected = {
        "rollout_tokens": 7, "learner_tokens": 42, "learner_forward_tokens": 83, "discriminator_tokens": 50
    }  # fmt: skip
    assert budget.state() == expected
    assert Budget(**budget.state()) == budget


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.0},
        {"kl_coef": 0.1},
        {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
        {"loss": "ppo_clip", "epochs": 2, "kl_coef": 0.0},
        {"loss": "ppo_clip", "epochs": 2, "minibatches": 2, "advantage": "gae", "kl_coef": 0.1},
    ],
)
def test_passes_are_those_that_a_step_makes(settings, tiny_model):
    """Counted by hooks on policy, reference and critic: response tokens with and without gradients."""
    rows = {
        "group_id": ["a", "a", "b", "b"],
        "prompt_ids": [[9, 8, 7]] * 2 + [[6, 5]] * 2,
        "response_ids": [[10, 11], [12, 13], [14, 15], [16, 17]],
        "response_logprobs": [[-5.0, -5.0]] * 4,
        "token_rewards": [[0.0, 1.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.0]],
    }
    config = LearnerConfig(device="cpu", **settings)
    learner = PolicyLearner(str(tiny_model), config, model_dtype="float32")
    seen = {True: 0, False: 0}

    def count(module, inputs):
        seen[torch.is_grad_enabled()] += len(inputs[0].target)

    modules = [learner.trainable.module]
    modules += [learner.reference] if learner.reference is not None else []
    modules += [learner.critic.trainable.module] if learner.critic is not None else []
    for module in modules:
        module.register_forward_pre_hook(count)
    learner.train_step(pa.table(rows), 0)
    trained, forward = policy_passes(config)
    assert seen == {True: trained * 8, False: forward * 8}
