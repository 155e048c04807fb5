"""Gumbel-Softmax with settings of other sections that make no sense of it."""

import pytest

from services.config import ConfigError, load

ON = ["--policy.model=some/model", "--data.demonstrations=d.jsonl", "--learner.gumbel.weight=1"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["--discriminator.model=another/model"], ["another/model", "vocabulary", "discriminator.model"]),
        (["--discriminator.body=encoder"], ["discriminator.body", "vocabulary"]),
        (["--learner.gumbel.max_tokens=65"], ["learner.gumbel.max_tokens = 65", "sampling.max_tokens = 64"]),
        (
            ["--learner.gumbel.policy_gradient_weight=0", "--discriminator.reward.user_reward=m:f"],
            ["policy_gradient_weight", "user_reward"],
        ),
        (["--learner.zero_stage=3"], ["learner: gumbel.weight", "zero_stage 1 or 2"]),
    ],
)
def test_contradictions_are_refused_with_the_reason(overrides, names):
    with pytest.raises(ConfigError) as refused:
        load(None, [*ON, *overrides])
    assert all(name in str(refused.value) for name in names), refused.value


def test_the_same_model_by_name_is_the_same_vocabulary():
    config = load(None, [*ON, "--discriminator.model=some/model", "--learner.lora.rank=4"])
    assert config.learner.gumbel.weight == 1


def test_off_by_default_and_then_nothing_is_asked_of_the_rest():
    config = load(None, [*ON[:2], "--discriminator.model=another/model", "--discriminator.body=encoder"])
    assert config.learner.gumbel.weight == 0
