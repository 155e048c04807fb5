import subprocess
import sys

import pytest

from discriminator.config import DiscriminatorConfig
from discriminator.reward_config import RewardConfig


def test_defaults_follow_the_calibration() -> None:
    config = DiscriminatorConfig()
    assert (config.loss, config.label_smoothing, config.level) == ("bce", 0.1, "sequence")
    assert (config.reward.form, config.reward.clip) == ("neg_log_one_minus_d", 5.0)
    assert config.weight_decay > 0
    assert 1 <= config.steps_per_policy_step <= 3
    assert config.buffer.replay_fraction == 0


BT = {"loss": "bradley_terry"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buffer": {"replay_fraction": 0.5}}, "replay_fraction"),
        ({"body": "encoder", "level": "token"}, "causal"),
        ({"pack_length": 9000}, "micro_batch_tokens"),
        ({"steps_per_policy_step": 4}, "steps_per_policy_step"),
        ({"unknown": 1}, "unknown"),
        ({"loss": "cross"}, "'bce', 'hinge', 'least_squares', 'bradley_terry' or 'wasserstein'"),
        ({"reward": {"form": "gail"}}, "'bradley_terry' or 'relativistic'"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "no targets"),
        ({"loss": "wasserstein", "reward": {"form": "logit"}}, "gradient_penalty or spectral_norm"),
        ({"gradient_penalty": 1.0, "zero_stage": 3}, "ZeRO-3"),
        ({"gradient_penalty": 1.0, "gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"reward": {"form": "bradley_terry"}}, 'use "logit"'),
        ({"loss": "bradley_terry"}, "zero of the scores"),
        ({"loss": "wasserstein", "spectral_norm": 1.0}, "zero of the scores"),
        (BT | {"reward": {"form": "bradley_terry"}, "length_matched": True}, "one distribution of lengths"),
        ({"loss": "hinge"}, "no probability"),
        ({"loss": "least_squares", "reward": {"form": "prob"}}, "no probability"),
        ({"reward": {"length_control": "deviation"}}, "length_target"),
        (
            {"reward": {"length_control": "deviation", "length_target": 9, "length_coefficient": 0}},
            "without effect",
        ),
        ({"reward": {"length_target": 10}}, "length_control"),
        ({"reward": {"length_control": "deviation", "length_target": 9, "length_slack": 2}}, "overlong"),
        ({"reward": {"length_control": "overlong", "length_target": 9, "length_slack": 10}}, "exceeds"),
        ({"reward": {"user_reward": "my_module"}}, "package.module:function"),
        ({"reward": {"user_reward": "ftp://host:80"}}, "package.module:function"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "smoothing"),
    [
        ({}, 0.1),
        ({"loss": "least_squares", "reward": {"form": "logit"}}, 0.1),
        ({"loss": "hinge", "reward": {"form": "logit"}}, 0.0),
        ({"loss": "bradley_terry", "reward": {"form": "bradley_terry"}}, 0.0),
        ({"loss": "bradley_terry", "score_centring": 0.1, "label_smoothing": 0.2}, 0.2),
        ({"loss": "wasserstein", "gradient_penalty": 1.0, "reward": {"form": "relativistic"}}, 0.0),
    ],
)
def test_sound_combinations_and_their_smoothing(fields, smoothing) -> None:
    config = DiscriminatorConfig(**fields)
    assert config.label_smoothing == smoothing
    assert DiscriminatorConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("fields", "clip"),
    [
        (BT | {"reward": {"form": "bradley_terry"}}, None),
        (BT | {"reward": RewardConfig(form="logit")}, None),
        ({"loss": "wasserstein", "spectral_norm": 1.0, "reward": {"form": "logit"}}, None),
        (BT | {"reward": {"form": "bradley_terry"}, "score_centring": 0.1}, None),
        (BT | {"reward": {"form": "bradley_terry", "clip": 3.0}}, 3.0),
        (BT | {"reward": RewardConfig(form="bradley_terry", clip=5.0)}, 5.0),
        (BT | {"reward": {"form": "relativistic"}}, 5.0),
        (BT | {"score_centring": 0.1}, 5.0),
        ({"reward": {"form": "logit"}}, 5.0),
        ({"reward": {"form": "logit", "clip": "none"}}, None),
        ({}, 5.0),
    ],
)
def test_a_score_without_a_zero_is_not_clipped_around_it_unless_said(fields, clip) -> None:
    config = DiscriminatorConfig(**fields)
    assert config.reward.clip == clip
    assert DiscriminatorConfig(**config.model_dump()) == config


def test_import_is_light() -> None:
    code = "import sys, discriminator.config; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
