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
        (["--run.method=gad"], ['gumbel.objective = "neg_log_one_minus_d"', '"bradley_terry"', '"logit"']),
        (
            ["--discriminator.loss=wasserstein", "--discriminator.spectral_norm=1",
             "--discriminator.reward.form=logit", "--learner.gumbel.objective=prob"],
            ['gumbel.objective = "prob"', '"wasserstein"', "score_centring"],
        ),
        (["--learner.zero_stage=3"], ["learner: gumbel.weight", "zero_stage 1 or 2"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_reason(overrides, names):
    with pytest.raises(ConfigError) as refused:
        load(None, [*ON, *overrides])
    assert all(name in str(refused.value) for name in names), refused.value


def test_the_same_model_by_name_is_the_same_vocabulary():
    config = load(None, [*ON, "--discriminator.model=some/model", "--learner.lora.rank=4"])
    assert config.learner.gumbel.weight == 1


@pytest.mark.parametrize("more", ["--learner.gumbel.objective=logit", "--discriminator.score_centring=0.1"])
def test_scores_whose_zero_is_open_serve_what_does_not_bend_there_or_are_centred(more):
    assert load(None, [*ON, "--run.method=gad", more]).discriminator.loss == "bradley_terry"


def test_off_by_default_and_then_nothing_is_asked_of_the_rest():
    config = load(None, [*ON[:2], "--discriminator.model=another/model", "--discriminator.body=encoder"])
    assert config.learner.gumbel.weight == 0
