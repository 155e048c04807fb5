"""The update as the policy learner makes it: its objective, what it leaves alone, and no split matters."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from gumbel_worker import gumbel_learner, gumbel_stages, gumbel_updates, vocabulary_of
from linear_judge import LinearJudge
from pydantic import ValidationError
from test_recipe_splits import COMMON, FEW, SPLIT, UNSPLIT, assert_same_updates
from two_ranks import run_two_ranks
from zero_worker import whole_weights

from learner.config import LearnerConfig
from learner.drawing import draw_responses
from learner.gumbel_update import repetition
from learner.policy import PolicyLearner
from learner.samples import Samples

MIXED = {"weight": 0.5, "samples": 3, "max_tokens": 5, "tau_steps": 4}
ALONE = MIXED | {"policy_gradient_weight": 0.0, "weight": 1.0, "objective": "logit"}
PLAIN = {"device": "cpu", "kl_coef": 0.0, "gamma": 0.0, "importance_cap": None}


@pytest.fixture
def judged_table(uneven_table):
    """The table as it comes from scoring: with prompt texts and one judge's version."""
    rows = len(uneven_table)
    texts = [f"prompt {group}" for group in uneven_table["group_id"].to_pylist()]
    table = uneven_table.append_column("prompt_text", pa.array(texts))
    return table.append_column("disc_version", pa.array([4] * rows, pa.int32()))


def drawn_by(learner, table, step=0):
    """The responses of a step, by prompt."""
    settings = learner.cfg.gumbel
    groups = Samples.from_table(table).groups
    return draw_responses(
        learner.trainable.module,
        [(number, group.prompt) for number, group in enumerate(groups)],
        samples=settings.samples,
        max_tokens=settings.max_tokens,
        end_ids=learner.gumbel.judge.end_ids,
        seed=(learner.seed, step),
        budget=10**6,
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_objective_and_counts_are_those_of_what_was_drawn(tiny_model, judged_table, level):
    judge = LinearJudge(vocabulary_of(tiny_model), level, strict=True)
    learner = gumbel_learner(tiny_model, judge, **PLAIN, gumbel=MIXED)
    responses = [r for several in drawn_by(learner, judged_table) for r in several]
    metrics = learner.train_step(judged_table, 0)
    kept = [r for r in responses if len(r.ids) % 2 == 0]
    assert 0 < len(kept) < len(responses) == 15
    b = judge.token_scores().double().numpy()
    scores = [np.cumsum(b[r.ids]) for r in kept]
    soft_plus = [np.logaddexp(0, s) for s in scores]
    want = [s[-1] if level == "sequence" else s.mean() for s in soft_plus]
    assert metrics["gumbel_objective"] == pytest.approx(np.mean(want), rel=1e-4)
    assert metrics["gumbel_score"] == pytest.approx(np.mean([s[-1] for s in scores]), rel=1e-4, abs=1e-5)
    assert metrics["gumbel_masked"] == pytest.approx(1 - len(kept) / 15)
    assert metrics["gumbel_truncated"] == pytest.approx(np.mean([not r.ended for r in responses]))
    assert metrics["gumbel_length"] == pytest.approx(np.mean([len(r.ids) for r in responses]))
    assert metrics["gumbel_tau"] == 1.0
    assert metrics["gumbel_mismatch"] == 0
    assert 0 < metrics["gumbel_grad_share"] < 1
    without = PolicyLearner(str(tiny_model), LearnerConfig(**PLAIN), model_dtype="float32", temperature=0.8)
    policy_loss = without.train_step(judged_table, 0)["loss"]
    assert metrics["loss"] == pytest.approx(policy_loss - 0.5 * np.mean(want), rel=1e-4)
    assert judge.held == [4]


def test_alone_the_judges_score_rises_and_the_judge_stays(tiny_model, judged_table):
    judge = LinearJudge(vocabulary_of(tiny_model))
    before = {name: p.detach().clone() for name, p in judge.named_parameters()}
    learner = gumbel_learner(tiny_model, judge, **PLAIN, lr=3e-3, gumbel=ALONE | {"samples": 8})
    metrics = [learner.train_step(judged_table, step) for step in range(12)]
    scores = [m["gumbel_score"] for m in metrics]
    spread = float(judge.token_scores().std())
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 1.5 * spread
    assert all(m["gumbel_grad_share"] == 1 for m in metrics)
    assert [m["gumbel_tau"] for m in metrics[:5]] == pytest.approx([0.5 ** (s / 4) for s in range(5)])
    for name, parameter in judge.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_alone_ignores_rewards_and_mixed_does_not(tiny_model, judged_table):
    place = judged_table.column_names.index("token_rewards")
    turned = [[-r for r in row] for row in judged_table["token_rewards"].to_pylist()]
    other = judged_table.set_column(place, "token_rewards", pa.array(turned, pa.list_(pa.float32())))
    for settings, same in ((ALONE, True), (MIXED, False)):
        weights = []
        for table in (judged_table, other):
            learner = gumbel_learner(tiny_model, **PLAIN, gumbel=settings)
            learner.train_step(table, 0)
            weights.append(whole_weights(learner))
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == same


def test_all_left_out_is_no_step_of_the_judge(tiny_model, judged_table):
    judge = LinearJudge(vocabulary_of(tiny_model))
    judge.prompt_of = lambda *_, **__: None
    learner = gumbel_learner(tiny_model, judge, **PLAIN, gumbel=ALONE)
    start = whole_weights(learner)
    metrics = learner.train_step(judged_table, 0)
    assert metrics["gumbel_masked"] == 1
    assert metrics["gumbel_objective"] == metrics["grad_norm"] == 0
    assert all(torch.equal(start[name], tensor) for name, tensor in whole_weights(learner).items())


def test_micro_batches_packing_and_zero_stages_change_nothing(tiny_model, judged_table):
    settings = COMMON | {"kl_coef": 0.05, "gumbel": MIXED}
    whole = gumbel_updates(tiny_model, judged_table, **settings, **UNSPLIT)
    assert 0 < whole[1][0]["gumbel_masked"] < 1
    for other in ({"zero_stage": 1}, {"zero_stage": 2}, {"packing": False}):
        split = gumbel_updates(tiny_model, judged_table, **settings, **SPLIT, **other)
        assert_same_updates(split, whole)


def test_two_ranks_change_nothing(tiny_model, judged_table, tmp_path):
    settings = COMMON | {"gumbel": MIXED}
    whole = gumbel_updates(tiny_model, judged_table, **settings, **UNSPLIT)
    assert 0 < whole[1][0]["gumbel_masked"] < 1
    job = {"model": str(tiny_model), "table": judged_table, "stages": [2], "settings": settings | FEW}
    assert_same_updates(run_two_ranks(job, tmp_path, gumbel_stages)[2], whole)


def test_a_reload_continues_exactly(tiny_model, judged_table, tmp_path):
    settings = PLAIN | {"lr": 1e-3, "gumbel": MIXED}
    learner = gumbel_learner(tiny_model, **settings)
    learner.train_step(judged_table, 0)
    learner.save(tmp_path)
    told = learner.train_step(judged_table, 1)
    again = gumbel_learner(tiny_model, **settings)
    again.load(tmp_path)
    torch.manual_seed(123)
    repeated = again.train_step(judged_table, 1)
    assert {k: v for k, v in told.items() if "seconds" not in k} == {
        k: v for k, v in repeated.items() if "seconds" not in k
    }
    after, resumed = whole_weights(learner), whole_weights(again)
    assert all(torch.equal(after[name], resumed[name]) for name in after)


def test_adapters_alone_are_trained_with_lora(tiny_model, judged_table):
    settings = PLAIN | {"lr": 1e-2, "lora": {"rank": 4}, "gumbel": ALONE | {"samples": 8}}
    learner = gumbel_learner(tiny_model, LinearJudge(vocabulary_of(tiny_model)), **settings)
    scores = [learner.train_step(judged_table, step)["gumbel_score"] for step in range(12)]
    assert np.mean(scores[-3:]) > np.mean(scores[:3])


def test_off_changes_nothing(tiny_model, judged_table):
    """The defaults need neither a judge nor its columns."""
    results = []
    for table in (judged_table, judged_table.drop_columns(["prompt_text", "disc_version"])):
        learner = PolicyLearner(str(tiny_model), LearnerConfig(**PLAIN), model_dtype="float32")
        metrics = learner.train_step(table, 0)
        assert not any(name.startswith("gumbel") for name in metrics)
        results.append(whole_weights(learner))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_what_cannot_be_judged_is_refused(tiny_model, judged_table):
    place = judged_table.column_names.index("disc_version")
    mixed = pa.array([4] * (len(judged_table) - 1) + [5], pa.int32())
    learner = gumbel_learner(tiny_model, **PLAIN, gumbel=MIXED)
    with pytest.raises(ValueError, match=r"versions \[4, 5\]"):
        learner.train_step(judged_table.set_column(place, "disc_version", mixed), 0)
    with pytest.raises(ValueError, match=r"vocabulary has .* the judge's 11"):
        gumbel_learner(tiny_model, LinearJudge(11), **PLAIN, gumbel=MIXED)
    with pytest.raises(ValueError, match="a judge is needed"):
        PolicyLearner(str(tiny_model), LearnerConfig(**PLAIN, gumbel=MIXED), model_dtype="float32")
    with pytest.raises(ValueError, match=r"gumbel\.max_tokens"):
        gumbel_learner(tiny_model, **PLAIN, gumbel=MIXED | {"max_tokens": None}).train_step(judged_table, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 3, "gumbel": MIXED}, "ZeRO-3"),
        ({"loss": "ppo_clip", "epochs": 2, "gumbel": MIXED}, "epochs = 1 and minibatches = 1"),
        ({"kl_in": "reward", "kl_estimator": "k1", "gumbel": ALONE}, "the KL too"),
        ({"advantage": "gae", "gumbel": ALONE}, "critic"),
        ({"gumbel": {"policy_gradient_weight": 0}}, r"gumbel\.weight = 0 switches off"),
        ({"gumbel": {"weight": 1, "objective": "wasserstein"}}, "'neg_log_one_minus_d', 'log_d', 'logit'"),
        ({"gumbel": {"weight": 1, "tau_end": 0}}, "greater than 0"),
        ({"gumbel": {"weight": 1, "tau": 1}}, "Extra inputs"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        LearnerConfig(**settings)


def test_repetition_counts_trigrams_seen_before():
    assert repetition([1, 2, 3, 4]) == 0
    assert repetition([1, 2]) == 0
    assert repetition([5] * 7) == pytest.approx(4 / 5)
    assert repetition(np.array([1, 2, 3, 1, 2, 3])) == pytest.approx(1 / 4)
