"""A reward model from preference pairs: a step's loss by hand, what it learns, early stopping, freezing."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from judging import judged, small

from discriminator.canonical import JUDGED_COLUMNS
from discriminator.config import CanonicalConfig
from discriminator.preferences import for_preferences, preference_sides
from discriminator.scorer import Scorer
from discriminator.trainer import DiscriminatorTrainer
from rollout.config import PolicyConfig
from rollout.templates import load_tokenizer

NOUNS = ["cat", "dog", "door", "mail", "tool", "mat", "news", "day"]
RANKING = {
    "loss": "bradley_terry",
    "reward": {"form": "bradley_terry"},
    "score_centring": 0.01,
    "batch_size": 8,
    "warmup_eval_every": 2,
}


def pairs(begin: int, end: int) -> pa.Table:
    """Two pairs a prompt: the mat is preferred in one order of words, whatever the noun."""
    rows = []
    for i in range(begin, end):
        for s in range(2):
            noun = NOUNS[(i + s) % 8]
            rows.append(
                {
                    "prompt_text": f"say {i}: ",
                    "chosen": f"the {noun} sat on the mat",
                    "rejected": f"the mat sat on the {noun} {s}",
                }
            )
    return pa.Table.from_pylist(rows)


def sides(model: Path, begin: int, end: int, max_tokens: int = 32):
    tokenizer = load_tokenizer(PolicyConfig(model=str(model)))
    return preference_sides(pairs(begin, end), tokenizer, CanonicalConfig(), max_tokens=max_tokens)


def test_sides_are_pairs_in_the_discriminators_spelling(tiny_model):
    both = sides(tiny_model, 0, 3)
    assert both.chosen.column_names == both.rejected.column_names == list(JUDGED_COLUMNS)
    assert both.chosen["prompt_id"].equals(both.rejected["prompt_id"])
    assert len(set(both.chosen["prompt_id"].to_pylist())) == 6, "a pair is a prompt of its own"
    assert both.chosen["prompt_text"].to_pylist() == [f"say {i}: " for i in (0, 0, 1, 1, 2, 2)]
    assert set(sides(tiny_model, 0, 3, max_tokens=3).chosen["finish_reason"].to_pylist()) == {"length"}


def test_a_step_minimises_the_mean_of_its_own_pairs(tiny_model):
    """The loss of one step against -log sigmoid of scores that another module computed, pair by pair."""
    steady = {"score_centring": 0.0, "steps_per_policy_step": 1, "health": {"enabled": False}}
    config = for_preferences(small(**RANKING | steady))
    both = sides(tiny_model, 0, 4)
    trainer = DiscriminatorTrainer(config, str(tiny_model), seed=2)
    for step in range(2):  # after the first, scores differ from the head's initial zero
        lead = torch.tensor(trainer.scores(both.chosen)) - torch.tensor(trainer.scores(both.rejected))
        expected = float(torch.nn.functional.softplus(-lead).mean())
        metrics = trainer.update(both.rejected, both.chosen, step)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
        assert metrics["accuracy"] == pytest.approx(float((lead > 0).float().mean()), abs=1e-6)
    assert abs(float(lead.mean())) > 1e-3


def test_a_reward_model_ranks_held_out_pairs(tiny_model):
    config = small(**RANKING, warmup_accuracy=1.0, warmup_patience=5, warmup_max_steps=60)
    train, held = sides(tiny_model, 0, 40), sides(tiny_model, 40, 60)
    trainer = DiscriminatorTrainer(for_preferences(config), str(tiny_model), seed=1)
    found = trainer.warm_up(train.rejected, train.chosen, held.chosen, held.rejected)
    assert found["accuracy"] >= 0.9
    scores = zip(trainer.scores(held.chosen), trainer.scores(held.rejected), strict=True)
    assert found["accuracy"] == pytest.approx(sum(c > r for c, r in scores) / 40, abs=1e-6)
    tokens = found["tokens_trained"] / found["steps"]  # a step: eight pairs of about ten tokens a side
    assert 8 * 2 * 5 < tokens < 8 * 2 * 40


def test_patience_ends_the_warm_up_at_its_best_weights(tiny_model):
    """Judged by pairs the other way round, training only makes it worse: the first look is the best one."""
    fields = RANKING | {"warmup_max_steps": 60, "warmup_accuracy": 1.0, "warmup_eval_every": 4}
    train, held = sides(tiny_model, 0, 40), sides(tiny_model, 40, 60)
    tables = (train.rejected, train.chosen, held.rejected, held.chosen)

    def warmed_up(**more):
        trainer = DiscriminatorTrainer(for_preferences(small(**fields | more)), str(tiny_model), seed=1)
        return trainer, trainer.warm_up(*tables)

    trainer, found = warmed_up(warmup_patience=2)
    _, first = warmed_up(warmup_max_steps=4)
    _, last = warmed_up(warmup_max_steps=12)
    assert found["steps"] == 12, "a look after 4 steps, and two more"
    assert last["margin"] < first["margin"] - 0.01
    for name in ("accuracy", "margin", "calibration"):
        assert found[name] == pytest.approx(first[name], abs=1e-6)
    now = trainer._evaluate(held.rejected, held.chosen)
    assert now["margin"] == pytest.approx(first["margin"], abs=1e-6)


def test_a_frozen_discriminator_reports_and_stays(tiny_model):
    config = small(**RANKING, frozen=True, warmup_max_steps=2)
    demonstrations = judged([(f"say {i}: ", f"the {NOUNS[i % 8]} sat") for i in range(20)])
    rollouts = judged([(f"say {i}: ", f"a {NOUNS[i % 8]} lay") for i in range(20)])
    trainer = DiscriminatorTrainer(config, str(tiny_model), seed=1)
    trainer.warm_up(rollouts, demonstrations, demonstrations, rollouts)
    first = trainer.publish()
    assert not trainer.changed  # so that a rank gives the store the same object again
    before = trainer.scores(rollouts)
    for step in range(3):
        held = trainer.evaluate(demonstrations, rollouts, step)
        assert 0 <= held["accuracy"] <= 1
        assert trainer.update(rollouts, demonstrations, step) == {"steps": 0.0}
    assert trainer.take_transitions() == []
    assert trainer.scores(rollouts) == before
    again = trainer.publish()
    assert (again.version, again.checksum) == (first.version, first.checksum)


def test_the_scorer_serves_what_was_trained(tiny_model):
    config = for_preferences(small(**RANKING))
    both = sides(tiny_model, 0, 4)
    trainer = DiscriminatorTrainer(config, str(tiny_model), seed=1)
    trainer.update(both.rejected, both.chosen, 0)
    published = trainer.publish()
    scorer = Scorer(config, str(tiny_model), model_dtype="float32")
    scorer.ensure(0, lambda version: (published.checksum, published.state))
    texts = [(text, True) for text in both.chosen["response_text"].to_pylist()[:2]]
    [scored] = scorer.score(0, ["say 0: "], [texts])
    assert [float(s.scores[-1]) for s in scored] == pytest.approx(trainer.scores(both.chosen)[:2], abs=1e-4)
