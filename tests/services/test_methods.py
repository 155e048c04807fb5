"""Method presets: what they set, and that the user's words stand."""

import pytest

from services.config import Config, ConfigError, load
from services.methods import PRESETS

NEEDED = ["--policy.model=m", "--data.demonstrations=d.jsonl"]


def test_gad_is_bradley_terry_and_grpo():
    config = load(None, [*NEEDED, "--run.method=gad"])
    assert config.discriminator.loss == config.discriminator.reward.form == "bradley_terry"
    assert config.discriminator.level == "sequence"
    assert config.discriminator.label_smoothing == 0
    assert (config.learner.advantage, config.sampling.group_size, config.learner.kl_coef) == ("grpo", 8, 1e-3)


def test_what_the_user_says_stands_beside_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[run]\nmethod = 'gad'\n[discriminator.reward]\nclip = 3.0\n[learner]\nlr = 2e-6\n")
    config = load(file, [*NEEDED, "--sampling.group_size=4"])
    assert config.sampling.group_size == 4
    assert (config.discriminator.reward.form, config.discriminator.reward.clip) == ("bradley_terry", 3.0)
    assert (config.learner.advantage, config.learner.lr) == ("grpo", 2e-6)


def test_rlgaf_is_the_defaults():
    assert load(None, NEEDED) == load(None, [*NEEDED, "--run.method=rlgaf"])
    assert PRESETS["rlgaf"] == {}
    assert isinstance(load(None, NEEDED), Config)


def test_an_unknown_method_lists_those_that_exist():
    with pytest.raises(ConfigError, match=r"run\.method.*'rlgaf' or 'gad'"):
        load(None, [*NEEDED, "--run.method=ppo"])


def test_a_section_that_is_no_section_is_still_refused():
    with pytest.raises(ConfigError, match="discriminator"):
        load(None, [*NEEDED, "--run.method=gad", "--discriminator=3"])
