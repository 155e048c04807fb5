"""The training step as a whole: what it reads, what it refuses, and that it learns."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from learner.pretrained import mean_nll
from learner.samples import Samples
from rollout.config import PolicyConfig

CPU = {"device": "cpu", "kl_coef": 0.0}


def replace_column(table, name, rows):
    return table.set_column(table.column_names.index(name), name, pa.array(rows, pa.list_(pa.float32())))


def learner_for(model, **settings):
    return PolicyLearner(str(model), LearnerConfig(**(CPU | settings)), model_dtype="float32")


def test_rewarded_responses_become_likelier(tiny_model, uneven_table):
    lengths = [len(r) for r in uneven_table["response_ids"].to_pylist()]
    rewards = [[float(i % 2)] * n for i, n in enumerate(lengths)]
    table = replace_column(uneven_table, "token_rewards", rewards)
    learner = learner_for(tiny_model, lr=3e-3, gamma=0.0, importance_cap=None)
    before = learner.response_logprobs(table)
    for step in range(4):
        learner.train_step(table, step)
    gain = [float((a - b).mean()) for a, b in zip(learner.response_logprobs(table), before, strict=True)]
    assert np.mean(gain[1::2]) > 0 > np.mean(gain[::2])


def test_on_policy_metrics_are_exact(tiny_model, uneven_table):
    learner = learner_for(tiny_model, kl_coef=0.1)
    own = [row.tolist() for row in learner.response_logprobs(uneven_table)]
    metrics = learner.train_step(replace_column(uneven_table, "response_logprobs", own), 0)
    for name, value in {"ratio_mean": 1, "ratio_max": 1, "importance_mean": 1, "clip_fraction": 0}.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["mismatch_max"] < 1e-5
    assert metrics["tokens_response"] == sum(len(r) for r in own)
    assert {
        "seconds_pack",
        "seconds_reference_logprobs",
        "seconds_update",
        "grad_norm",
        "lr",
    } <= metrics.keys()


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_loss_is_the_mean_that_is_configured(tiny_model, uneven_table, normalise):
    learner = learner_for(tiny_model, normalise=normalise, gamma=0.0, baseline="none", importance_cap=None)
    logprobs = learner.response_logprobs(uneven_table)
    per_token = [
        -r * lp
        for r, lp in zip(map(np.array, uneven_table["token_rewards"].to_pylist()), logprobs, strict=True)
    ]
    expected = (
        np.concatenate(per_token).mean() if normalise == "token" else np.mean([x.mean() for x in per_token])
    )
    assert learner.train_step(uneven_table, 0)["loss"] == pytest.approx(expected, rel=1e-4)


def test_temperature_divides_the_logits(tiny_model, uneven_table):
    cfg = LearnerConfig(**CPU)
    learner = PolicyLearner(str(tiny_model), cfg, temperature=0.5, model_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    row = uneven_table.slice(3, 1)
    prompt, response = row["prompt_ids"][0].as_py(), row["response_ids"][0].as_py()
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0] / 0.5, -1)
    expected = [float(log_p[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]
    assert learner.response_logprobs(row)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_ppo_with_epochs_and_minibatches(tiny_model, uneven_table):
    learner = learner_for(tiny_model, loss="ppo_clip", epochs=2, minibatches=2, lr=1e-3, importance_cap=None)
    metrics = learner.train_step(uneven_table, 0)
    assert learner.trainable.updates == 4
    assert metrics["ratio_max"] > 1.0
    assert metrics["seconds_old_logprobs"] > 0


def test_kl_in_reward_equals_a_reward_by_hand(tiny_model, uneven_table):
    settings = {
        "kl_in": "reward",
        "kl_estimator": "k1",
        "baseline": "none",
        "gamma": 0.0,
        "importance_cap": None,
    }
    learner = learner_for(tiny_model, **(settings | {"kl_coef": 0.5, "lr": 1e-2}))
    start = learner.response_logprobs(uneven_table)
    learner.train_step(uneven_table, 0)
    now = learner.response_logprobs(uneven_table)
    rewards = [np.array(r) for r in uneven_table["token_rewards"].to_pylist()]
    expected = np.concatenate(
        [-(r - 0.5 * (n - s)) * n for r, n, s in zip(rewards, now, start, strict=True)]
    ).mean()
    assert learner.train_step(uneven_table, 1)["loss"] == pytest.approx(expected, rel=1e-3)


def test_reinforce_plus_plus_whitens_returns_with_the_kl_in_them(tiny_model, uneven_table):
    """Hu et al. 2025: r_t = R at the last token - beta k1, G_t summed to the end, whitened over the step."""
    last = [[0.0] * (len(row) - 1) + [row[-1]] for row in uneven_table["token_rewards"].to_pylist()]
    table = replace_column(uneven_table, "token_rewards", last)
    published = {"advantage": "reinforce_plus_plus", "kl_in": "reward", "kl_estimator": "k1", "gamma": 1.0}
    learner = learner_for(tiny_model, **published, kl_coef=0.5, lr=1e-2, importance_cap=None)
    start = learner.response_logprobs(table)
    learner.train_step(table, 0)
    now = learner.response_logprobs(table)
    returns = np.concatenate(
        [
            np.cumsum((np.array(r) - 0.5 * (n - s))[::-1])[::-1]
            for r, n, s in zip(last, now, start, strict=True)
        ]
    )
    advantage = (returns - returns.mean()) / returns.std()
    expected = (-advantage * np.concatenate(now)).mean()
    assert learner.train_step(table, 1)["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("absorbing_end", [False, True])
def test_what_a_response_earns_as_a_whole_is_earned_by_every_token(tiny_model, uneven_table, absorbing_end):
    whole = np.linspace(-1.0, 2.0, len(uneven_table)).astype(np.float32)
    nothing = [[0.0] * len(ids) for ids in uneven_table["response_ids"].to_pylist()]
    table = replace_column(uneven_table, "token_rewards", nothing)
    last = table.column_names.index("last_reward")
    table = table.set_column(last, "last_reward", pa.array([0.0] * len(table), pa.float32()))
    table = table.append_column("response_reward", pa.array(whole))
    settings = {"gamma": 0.25, "absorbing_end": absorbing_end, "baseline": "none", "importance_cap": None}
    learner = learner_for(tiny_model, **settings)
    logprobs = learner.response_logprobs(table)
    expected = np.concatenate([-r * row for r, row in zip(whole, logprobs, strict=True)]).mean()
    metrics = learner.train_step(table, 0)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["reward_mean"] == pytest.approx(whole.mean()), "once a response, as in reward/mean"
    broken = table.set_column(
        table.column_names.index("response_reward"), "response_reward", pa.array(whole * np.nan)
    )
    with pytest.raises(ValueError, match="response_reward holds values that are not finite"):
        learner.train_step(broken, 1)


def test_bad_tables_are_refused(tiny_model, uneven_table, make_table):
    learner = learner_for(tiny_model)
    short = replace_column(uneven_table, "token_rewards", [[0.0]] * len(uneven_table))
    with pytest.raises(ValueError, match="row 0: token_rewards has 1 entries for a response of 5 tokens"):
        learner.train_step(short, 0)
    rewards = uneven_table["token_rewards"].to_pylist()
    rewards[2][1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        learner.train_step(replace_column(uneven_table, "token_rewards", rewards), 0)
    with pytest.raises(ValueError, match="no response token"):
        learner.train_step(make_table([(4, [0, 0])]), 0)


def test_answers_without_groups_and_empty_ones_are_scored(tiny_model, make_table):
    learner = learner_for(tiny_model)
    table = make_table([(5, [3]), (4, [0]), (6, [2])], scored=False).drop_columns(
        ["group_id", "trajectory_id"]
    )
    assert [len(r) for r in learner.response_logprobs(table)] == [3, 0, 2]
    samples = Samples.from_table(table.slice(1, 2))
    assert samples.offsets.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_estimator": "k1"}, "zero gradient"),
        ({"kl_in": "reward"}, 'set kl_estimator = "k1"'),
        ({"epochs": 2}, "on-policy"),
        ({"loss": "dpo"}, "'reinforce', 'ppo_clip' or 'gspo'"),
        ({"advantage": "vtrace"}, "'grpo', 'dr_grpo', 'reinforce_plus_plus' or 'gae'"),
        ({"advantage": "rloo", "baseline": "group"}, "brings its own"),
        ({"advantage": "grpo", "whiten": True}, "drop whiten"),
        ({"advantage": "dr_grpo"}, 'set normalise = "constant"'),
        ({"advantage": "reinforce_plus_plus"}, 'set kl_in = "reward"'),
        ({"constant_length": 9}, 'read with normalise = "constant"'),
        ({"dual_clip": 3}, "dual_clip bounds"),
        ({"loss": "ppo_clip", "dual_clip": 1.1}, "clip range"),
        ({"loss": "gspo"}, 'set normalise = "sequence"'),
        ({"importance": "masked", "importance_cap": None}, "needs importance_cap"),
        ({"importance_floor": 0.5}, "lower bound of importance"),
        ({"importance": "masked", "importance_floor": 3}, "put 1 between them"),
        ({"kl_target": 0.1, "kl_coef": 0}, "leaves 0 at 0"),
        ({"pack_length": 9000}, "micro_batch_tokens"),
        ({"warmup_steps": 5, "schedule_steps": 5}, "warm-up"),
        ({"learning_rate": 1}, "Extra inputs"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        LearnerConfig(**settings)


def test_estimators_that_compare_responses_say_so():
    said = {
        name: LearnerConfig(advantage=name, kl_coef=0, normalise="constant").needs_groups
        for name in ("return", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "gae")
    }
    assert [name for name, needs in said.items() if needs] == ["rloo", "grpo", "dr_grpo"]
    assert LearnerConfig(baseline="group").needs_groups


def test_a_constant_length_counts_for_every_sequence(tiny_model, uneven_table):
    settings = {"normalise": "constant", "constant_length": 20, "importance_cap": None}
    learner = learner_for(tiny_model, gamma=0.0, baseline="none", **settings)
    logprobs = learner.response_logprobs(uneven_table)
    rewards = uneven_table["token_rewards"].to_pylist()
    sums = [-float(np.dot(r, lp)) for r, lp in zip(rewards, logprobs, strict=True)]
    metrics = learner.train_step(uneven_table, 0)
    assert metrics["loss"] == pytest.approx(sum(sums) / (20 * len(sums)), rel=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5), "diagnostics are means over tokens"
    with pytest.raises(ValueError, match="constant_length"):
        learner_for(tiny_model, normalise="constant").train_step(uneven_table, 0)


def test_the_weight_of_the_kl_follows_its_target(tiny_model, uneven_table):
    learner = learner_for(tiny_model, kl_coef=0.1, kl_target=1e-3, lr=1e-2)
    metrics = [learner.train_step(uneven_table, step) for step in range(3)]
    assert metrics[0]["kl"] < 1e-6
    assert min(m["kl"] for m in metrics[1:]) > 1.2e-3
    expected = [0.1, 0.1 * 0.98, 0.1 * 0.98 * 1.02]
    assert [m["kl_coef"] for m in metrics] == pytest.approx(expected)
    fixed = learner_for(tiny_model, kl_coef=0.1, lr=1e-2)
    assert [fixed.train_step(uneven_table, step)["kl_coef"] for step in range(2)] == [0.1, 0.1]


def test_masked_tokens_do_not_pass_for_tokens_without_kl(tiny_model, uneven_table):
    """With half of the tokens masked the KL of the others alone is what the target is compared with."""
    settings = {
        "kl_coef": 0.1,
        "kl_estimator": "k2",
        "lr": 1e-2,
        "importance": "masked",
        "importance_cap": 2.0,
    }
    learner = learner_for(tiny_model, **settings, importance_floor=0.5, kl_target=1.0)
    learner.train_step(uneven_table, 0)
    own = learner.response_logprobs(uneven_table)
    shifted = [(row + np.log(10) * (np.arange(len(row)) % 2)).tolist() for row in own]
    table = replace_column(uneven_table, "response_logprobs", shifted)
    metrics = learner.train_step(table, 1, lr_factor=0.0)
    share = metrics["importance_mean"]
    assert 0.3 < share < 0.7
    target = metrics["kl"] / share / 1.1  # the kept tokens' KL is a tenth above it, the plain mean far below
    learner.cfg = learner.cfg.model_copy(update={"kl_target": target})
    before = learner.kl_coef
    learner.train_step(table, 2)
    assert learner.kl_coef == pytest.approx(before * 1.01)


def test_a_step_left_out_leaves_no_trace(tiny_model, uneven_table):
    """Neither in the weights nor in the moments, the critic, the schedule and the KL's weight."""
    settings = {"lr": 1e-2, "kl_coef": 0.1, "kl_target": 0.01, "advantage": "gae", "lr_schedule": "linear"}
    one, other = (learner_for(tiny_model, **settings, schedule_steps=9) for _ in range(2))
    one.train_step(uneven_table, 0)
    other.train_step(uneven_table, 0)
    left_out = other.train_step(uneven_table, 1, lr_factor=0.0)
    assert (left_out["lr"], left_out["grad_norm"]) == (0.0, 0.0)
    assert left_out["kl"] > 0
    metrics = one.train_step(uneven_table, 2), other.train_step(uneven_table, 2)
    for name in ("loss", "grad_norm", "kl_coef", "lr", "critic_loss"):
        assert metrics[0][name] == metrics[1][name], name


def test_a_step_that_is_not_finite_leaves_no_trace(tiny_model, uneven_table):
    """Neither in the weights nor in the moments, the critic, the schedule and the KL's weight."""
    settings = {"lr": 1e-2, "kl_coef": 0.1, "kl_target": 0.01, "advantage": "gae", "lr_schedule": "linear"}
    one, other = (learner_for(tiny_model, **settings, schedule_steps=9) for _ in range(2))
    huge = replace_column(uneven_table, "token_rewards", [
        [3e38] * len(row) for row in uneven_table["token_rewards"].to_pylist()
    ])  # fmt: skip
    one.train_step(uneven_table, 0)
    other.train_step(uneven_table, 0)
    left_out = other.train_step(huge, 1)
    assert (left_out["skipped"], left_out["critic_skipped"]) == (1.0, 1.0)
    metrics = one.train_step(uneven_table, 2), other.train_step(uneven_table, 2)
    for name in ("loss", "grad_norm", "kl_coef", "lr", "critic_loss", "skipped"):
        assert metrics[0][name] == metrics[1][name], name


def test_the_largest_of_several_updates_is_told(tiny_model, uneven_table):
    learner = learner_for(tiny_model, loss="ppo_clip", epochs=3, lr=1e-2)
    update, updates = learner.trainable.step, []
    learner.trainable.step = lambda *words, **more: updates.append(update(*words, **more)) or updates[-1]
    metrics = learner.train_step(uneven_table, 0)
    assert metrics["ratio_max"] == max(each["ratio_max"] for each in updates) > updates[0]["ratio_max"]
    assert metrics["loss"] == pytest.approx(sum(each["loss"] for each in updates) / 3)


def test_masked_importance_sampling_leaves_tokens_out(tiny_model, uneven_table):
    """Half of the tokens were ten times likelier for the sampler: they alone are masked."""
    settings = {"importance": "masked", "importance_floor": 0.5, "gamma": 0.0, "baseline": "none"}
    learner = learner_for(tiny_model, **settings)
    own = learner.response_logprobs(uneven_table)
    odd = [np.arange(len(row)) % 2 for row in own]
    shifted = [(row + np.log(10) * o).tolist() for row, o in zip(own, odd, strict=True)]
    metrics = learner.train_step(replace_column(uneven_table, "response_logprobs", shifted), 0)
    rewards = [np.array(r) for r in uneven_table["token_rewards"].to_pylist()]
    kept = [-(1 - o) * r * lp for o, r, lp in zip(odd, rewards, own, strict=True)]
    assert metrics["loss"] == pytest.approx(np.concatenate(kept).mean(), rel=1e-3)
    assert metrics["masked_fraction"] == pytest.approx(np.concatenate(odd).mean())


def test_mean_nll_is_that_of_the_loaded_policy(tiny_model, uneven_table):
    learner = learner_for(tiny_model)
    rows = learner.response_logprobs(uneven_table)
    assert learner.response_nll(uneven_table) == pytest.approx([-row.sum() for row in rows], rel=1e-5)
    policy = PolicyConfig(model=str(tiny_model), dtype="float32")
    actual = mean_nll(policy, LearnerConfig(**CPU), uneven_table)
    assert actual == pytest.approx(-np.concatenate(rows).mean(), rel=1e-5)
