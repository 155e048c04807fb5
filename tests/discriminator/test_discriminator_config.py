import subprocess
import sys

import pytest

from discriminator.config import DiscriminatorConfig


def test_defaults_follow_the_calibration() -> None:
    config = DiscriminatorConfig()
    assert (config.loss, config.label_smoothing, config.level) == ("bce", 0.1, "sequence")
    assert (config.reward.form, config.reward.clip) == ("neg_log_one_minus_d", 5.0)
    assert config.weight_decay > 0
    assert 1 <= config.steps_per_policy_step <= 3
    assert config.buffer.replay_fraction == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buffer": {"replay_fraction": 0.5}}, "replay_fraction"),
        ({"body": "encoder", "level": "token"}, "causal"),
        ({"pack_length": 9000}, "micro_batch_tokens"),
        ({"steps_per_policy_step": 4}, "steps_per_policy_step"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**fields)


def test_import_is_light() -> None:
    code = "import sys, discriminator.config; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
