"""Method presets and a file's own settings for a method: what they set, and that the user's words stand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from discriminator.draws import demonstration_rows
from discriminator.losses import balanced_weights, pair_weights
from services.config import Config, ConfigError, field_paths, load
from services.methods import PRESETS, UNREAD_BY_SFT, method_title, not_read
from services.plan import resource_plan

ROOT = Path(__file__).parents[2]
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
        (["--run.method=rlhf", "--data.preferences=p", "--discriminator.length_matched=true"], "of lengths"),
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
        "[discriminator.canonical]\nwhitespace = 'outer'\nmax_prompt_tokens = 9\n"
    )
    assert not_read(load(file, [*NEEDED, "--run.method=sft"])) == [
        "discriminator.lr", "learner.kl_coef"
    ]  # fmt: skip
    assert not_read(load(file, NEEDED)) == ["learner.sft"]
    assert not_read(load(None, [*NEEDED, "--run.method=sft"])) == []
    assert set(UNREAD_BY_SFT) <= field_paths().keys()


@pytest.mark.parametrize(
    ("words", "unread"),
    [
        (["--learner.clip_low=0.1", "--learner.clip_high=0.3"], ["learner.clip_low", "learner.clip_high"]),
        (["--learner.clip_low=0.1", "--learner.loss=ppo_clip", "--learner.epochs=2"], []),
        (["--learner.clip_low=0.1", "--learner.loss=ppo_clip"], ["learner.clip_low"]),
        (["--learner.kl_coef=0", "--learner.kl_in=reward"], ["learner.kl_in"]),
        (["--learner.gumbel.objective=logit"], ["learner.gumbel.objective"]),
        (["--learner.gumbel.objective=logit", "--learner.gumbel.weight=0.1"], []),
        (["--discriminator.reward.user_weight=2", "--discriminator.reward.length_coefficient=3"],
         ["discriminator.reward.length_coefficient", "discriminator.reward.user_weight"]),
        (["--discriminator.health.policy_slow_factor=0.1"], ["discriminator.health.policy_slow_factor"]),
        (["--discriminator.health.enabled=false", "--discriminator.health.extra_steps=3"],
         ["discriminator.health.extra_steps"]),
        (["--discriminator.frozen=true", "--discriminator.buffer.replay_fraction=0.2"],
         ["discriminator.buffer"]),
        (["--learner.gae_lambda=0.9", "--learner.critic.lr=1e-4"], ["learner.gae_lambda", "learner.critic"]),
        (["--learner.gae_lambda=0.9", "--learner.advantage=gae"], []),
        (["--learner.kl_gain=0.2"], ["learner.kl_gain"]),
        (["--discriminator.frozen=true", "--discriminator.health.extra_steps=2",
          "--discriminator.steps_per_policy_step=3"],
         ["discriminator.health", "discriminator.steps_per_policy_step"]),
        (["--run.method=gad"], []),
        (["--run.method=rlhf"], []),
    ],
)  # fmt: skip
def test_settings_that_the_others_leave_without_effect_are_named(words, unread):
    assert not_read(load(None, [*NEEDED, *words])) == unread


OWN = """
[run]
method = "gad"
steps = 5
[learner]
lr = 1e-4
kl_coef = 0.0
lora = {rank = 8, alpha = 4}
[method.rlhf.run]
steps = 7
[method.rlhf.learner]
kl_coef = 0.2
lora = {rank = 2}
[method.rlhf.data]
preferences = "pairs.jsonl"
"""


def test_what_a_file_says_for_one_method_goes_before_the_rest_and_after_the_command_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(OWN)
    other, own = load(file, NEEDED), load(file, [*NEEDED, "--run.method=rlhf"])
    assert (other.run.steps, other.learner.kl_coef, other.learner.lora.rank) == (5, 0.0, 8)
    assert other.data.preferences == ""
    assert (own.run.steps, own.learner.kl_coef, own.learner.lr) == (7, 0.2, 1e-4)
    assert (own.learner.lora.rank, own.learner.lora.alpha) == (2, 4)
    assert (own.learner.kl_in, method_title(own)) == ("reward", "rlhf")
    said = ["--run.method=rlhf", "--run.steps=9", "--learner.lora={alpha = 3}"]
    told = load(file, [*NEEDED, *said])
    assert (told.run.steps, told.learner.kl_coef) == (9, 0.2)
    assert (told.learner.lora.rank, told.learner.lora.alpha) == (0, 3), "a section that is given is whole"
    file.write_text(OWN.replace('"gad"', '"rlhf"'))
    assert load(file, NEEDED) == own


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[method.rlfh.run]\nsteps = 3", r"unknown method rlfh in \[method\.rlfh\].*rlgaf, gad, sft, rlhf"),
        ("[method.sft]\nsteps = 3", r"field method\.sft\.steps; did you mean method\.sft\.run\.steps"),
        ("[method.sft.run]\nstepz = 3", r"method\.sft\.run\.stepz; did you mean method\.sft\.run\.steps"),
        ("[method.sft]\nrun = 3", r"method\.sft\.run is a section; write \[method\.sft\.run\]"),
        ("[method]\nsft = 3", r"method\.sft is no field; write \[method\.sft\.run\]"),
        ("[method.sft.run]\nmethod = 'gad'", r"method\.sft\.run\.method: the table is already one method's"),
        ("method = 'sft'", r"unknown field method; did you mean run\.method"),
    ],
)
def test_an_unknown_field_for_one_method_is_refused_whatever_the_method(tmp_path, toml, message):
    file = tmp_path / "run.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=message):
        load(file, NEEDED)


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("example", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_example_serves_every_method(example, method):
    config = load(example, [f"--run.method={method}"])
    sft = config.learner.sft
    assert sft.check_every * sft.patience < config.run.steps or method != "sft", "it can stop early"
    if method == "rlhf":
        assert config.learner.kl_coef >= 0.05
        assert config.discriminator.warmup_max_steps >= 60
    if method == "gad":
        assert config.sampling.group_size == 8
        assert config.learner.advantage == "grpo"


@pytest.mark.parametrize("method", ["gad", "rlhf"])
@pytest.mark.parametrize("example", [None, *sorted((ROOT / "examples").glob("*.toml"))])
def test_gad_and_a_reward_model_compare_answers_to_one_prompt_alone(method, example):
    judge = load(example, [*NEEDED, f"--run.method={method}"]).discriminator
    rollouts = pa.table({"prompt_id": [f"p{row // 4}" for row in range(32)]})
    written = pa.table({"prompt_id": [f"p{row}" for row in range(200)]})
    rows = demonstration_rows(
        rollouts,
        written,
        paired=judge.pair_demonstrations,
        at_least=judge.min_demonstrations,
        rng=np.random.default_rng(0),
    )
    prompts = torch.tensor([*rows, *(row // 4 for row in range(32))])
    sides = torch.arange(len(prompts)) < len(rows)
    pairs = pair_weights(sides, balanced_weights(sides), prompts)
    assert pairs[prompts[:, None] == prompts[None, :]].sum() == pytest.approx(1.0)
    assert judge.frozen or not judge.health.enabled, "its readings compare answers across prompts"


@pytest.mark.parametrize("method", ["rlgaf", "sft", "rlhf"])
def test_a_supervised_run_plans_no_judge(method):
    plan = resource_plan(load(None, [*NEEDED, f"--run.method={method}"]), gpus=0, cores=2)
    judges = [] if method == "sft" else ["discriminator", "scoring"]
    assert [role.name for role in plan.roles] == ["rollout", "learner", *judges]
    assert plan.cpus == 0.5 * len(plan.roles)
