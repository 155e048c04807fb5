"""Method presets: what they set, and that the user's words stand."""

import pytest

from services.config import Config, ConfigError, field_paths, load
from services.methods import PRESETS, UNREAD_BY_SFT, method_title, not_read
from services.plan import resource_plan

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
    with pytest.raises(ConfigError, match=r"run\.method.*'rlgaf', 'gad', 'sft' or 'rlhf'"):
        load(None, [*NEEDED, "--run.method=ppo"])


def test_a_section_that_is_no_section_is_still_refused():
    with pytest.raises(ConfigError, match="discriminator"):
        load(None, [*NEEDED, "--run.method=gad", "--discriminator=3"])


def test_rlhf_is_a_frozen_reward_model_and_ppo_with_a_critic():
    config = load(None, [*NEEDED, "--run.method=rlhf", "--learner.kl_coef=0.2"])
    judge, learner = config.discriminator, config.learner
    assert judge.frozen
    assert judge.loss == judge.reward.form == "bradley_terry"
    assert (judge.warmup_accuracy, judge.warmup_patience) == (1.0, 5)
    assert (learner.loss, learner.advantage, learner.kl_in, learner.kl_coef) == (
        "ppo_clip", "gae", "reward", 0.2
    )  # fmt: skip


def test_rlhf_is_called_so_with_preference_data_alone():
    without = load(None, [*NEEDED, "--run.method=rlhf"])
    pairs = load(None, [*NEEDED, "--run.method=rlhf", "--data.preferences=p.jsonl"])
    assert method_title(without) == "frozen reward model"
    assert method_title(pairs) == "rlhf"
    assert method_title(load(None, [*NEEDED, "--discriminator.frozen=true"])) == "rlgaf, discriminator frozen"
    assert [method_title(load(None, [*NEEDED, f"--run.method={m}"])) for m in ("rlgaf", "gad", "sft")] == [
        "rlgaf", "gad", "sft"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["--run.method=sft", "--sampling.temperature=0.7"], r"sampling\.temperature = 0\.7"),
        (["--run.method=sft", "--run.max_policy_lag=1"], r"run\.max_policy_lag.*sft"),
        (["--run.method=sft", "--data.preferences=p"], r'data\.preferences is read by run\.method = "rlhf"'),
        (["--data.preferences=p"], r'data\.preferences .* not by "rlgaf"'),
        (["--run.method=rlhf", "--discriminator.frozen=false"], r"discriminator\.frozen = false"),
        (["--run.method=rlhf", "--data.demonstrations="], r"data\.preferences, or on data\.demonstrations"),
        (["--discriminator.frozen=true", "--discriminator.warmup_max_steps=0"], "untrained head"),
        (["--discriminator.frozen=true", "--discriminator.health.pause_policy=true"], "pause_policy"),
        (
            ["--run.method=rlhf", "--data.preferences=p", "--discriminator.loss=bce",
             "--discriminator.reward.form=logit"],
            r'discriminator\.loss = "bce" looks at single answers',
        ),
        (["--run.method=rlhf", "--data.preferences=p", "--discriminator.length_matched=true"], "in pairs"),
        (["--run.method=rlhf", "--data.preferences=p", "--discriminator.perturbed_fraction=0.5"], "no pair"),
    ],
)  # fmt: skip
def test_what_contradicts_a_method_is_refused_with_the_reason(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        load(None, [*NEEDED, *overrides])


def test_sft_without_a_scoring_service_serves_no_scores(monkeypatch):
    monkeypatch.setenv("RLGAF_SCORE_TOKEN", "secret")
    with pytest.raises(ConfigError, match=r"discriminator\.scoring\.http.*no discriminator"):
        load(None, [*NEEDED, "--run.method=sft", "--discriminator.scoring.http=true"])


def test_one_file_serves_every_method_and_what_is_not_read_is_named(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "[learner]\nlr = 1e-4\nkl_coef = 0.1\n[learner.sft]\npatience = 2\n[discriminator]\nlr = 1e-3\n"
    )
    assert not_read(load(file, [*NEEDED, "--run.method=sft"])) == ["discriminator", "learner.kl_coef"]
    assert not_read(load(file, NEEDED)) == ["learner.sft"]
    assert not_read(load(None, [*NEEDED, "--run.method=sft"])) == []
    assert set(UNREAD_BY_SFT) <= field_paths().keys()


@pytest.mark.parametrize("method", ["rlgaf", "sft", "rlhf"])
def test_a_supervised_run_plans_no_judge(method):
    plan = resource_plan(load(None, [*NEEDED, f"--run.method={method}"]), gpus=0, cores=2)
    judges = [] if method == "sft" else ["discriminator", "scoring"]
    assert [role.name for role in plan.roles] == ["rollout", "learner", *judges]
    assert plan.cpus == 0.5 * len(plan.roles)
