"""The trainer with the real DeepSpeed engine, one rank: it learns, repeats itself, resumes and publishes."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from judging import judged, small

from discriminator.calibration import calibration, calibration_error
from discriminator.draws import demonstration_rows, rollout_batches
from discriminator.health import HealthReading, HealthState
from discriminator.losses import balanced_weights
from discriminator.model import group_encoded
from discriminator.scorer import Scorer
from discriminator.trainer import DiscriminatorTrainer
from discriminator.versions import state_checksum

NOUNS = ["cat", "dog", "door", "mail", "tool", "mat", "news", "day"]


def demonstrations(begin: int, end: int) -> pa.Table:
    return judged([(f"say {i}: ", f"the {NOUNS[i % 8]} sat on the mat") for i in range(begin, end)])


def rollouts(begin: int, end: int, samples: int = 2) -> pa.Table:
    """Same words, another order: no length or end-token shortcut."""
    rows = [(i, NOUNS[(i + s) % 8]) for i in range(begin, end) for s in range(samples)]
    return judged([(f"say {i}: ", f"the mat sat on the {noun}") for i, noun in rows])


def others(begin: int, end: int) -> pa.Table:
    """Other words."""
    return judged([(f"say {i}: ", f"a {NOUNS[i % 8]} lay by one big dog") for i in range(begin, end)])


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "causal"),
        ({"level": "token", "dropout": 0.1}, "causal"),
        ({"lora": {"rank": 4}, "lr": 5e-3}, "causal"),
        ({}, "encoder"),
    ],
)
def test_held_out_accuracy_rises_on_a_separable_task(
    fields, kind, tiny_model: Path, tiny_encoder: Path
) -> None:
    model = tiny_model if kind == "causal" else tiny_encoder
    trainer = DiscriminatorTrainer(small(**fields), str(model), seed=1)
    train, fresh = rollouts(0, 80), rollouts(80, 120, 1)
    if kind == "encoder":  # with random weights it pools letters: a difference in order is beyond it
        train, fresh = others(0, 80), others(80, 120)
    before = trainer.evaluate(demonstrations(80, 120), fresh, step=-1)
    after = trainer.warm_up(train, demonstrations(0, 80), demonstrations(80, 120), fresh)
    assert before["accuracy"] <= 0.8
    assert after["accuracy"] >= 0.9
    assert after["margin"] > before["margin"]
    assert 0 < after["steps"] < 100


def test_same_seed_same_weights_and_resume_equals_unbroken(tiny_model: Path, tmp_path: Path) -> None:
    config = small(dropout=0.2, batch_size=8, min_demonstrations=6)
    train = (rollouts(0, 20), demonstrations(0, 20))

    def fresh() -> DiscriminatorTrainer:
        return DiscriminatorTrainer(config, str(tiny_model), seed=3)

    unbroken = fresh()
    unbroken.update(*train, step=0)
    unbroken.publish()
    unbroken.save(tmp_path / "checkpoint")
    torch.manual_seed(999)  # the global generator must not matter
    metrics = unbroken.update(*train, step=1)
    expected = unbroken.publish()

    resumed = fresh()
    resumed.load(tmp_path / "checkpoint")
    assert resumed.version == 0
    assert resumed.update(*train, step=1) == metrics
    got = resumed.publish()
    assert expected is not None
    assert got is not None
    assert got.version == expected.version == 1
    assert got.checksum == expected.checksum == state_checksum(got.state)
    assert metrics["steps"] == config.steps_per_policy_step

    other = fresh()
    other.update(*train, step=0)
    other.update(*train, step=2)
    changed = other.publish()
    assert changed is not None
    assert changed.checksum != got.checksum, "another step draws other rows"


def test_loss_and_gradient_do_not_depend_on_the_packing(tiny_model: Path) -> None:
    states = []
    for fields in ({}, {"packing": False}, {"pack_length": 64, "micro_batch_tokens": 64}):
        trainer = DiscriminatorTrainer(small(weight_decay=0.0, **fields), str(tiny_model), seed=0)
        metrics = trainer.update(rollouts(0, 10), demonstrations(0, 10), step=0)
        states.append((metrics["loss"], metrics["grad_norm"]))
    np.testing.assert_allclose(states, np.broadcast_to(states[0], (3, 2)), rtol=1e-4)


@pytest.mark.parametrize("lora", [{}, {"rank": 4}])
def test_published_version_scores_like_the_trainer(lora, tiny_model: Path) -> None:
    config = small(lora=lora)
    trainer = DiscriminatorTrainer(config, str(tiny_model), seed=0)
    first = trainer.publish()
    trainer.update(rollouts(0, 10), demonstrations(0, 10), step=0)
    second = trainer.publish()
    again = trainer.publish()
    assert first is not None
    assert second is not None
    assert again is not None
    assert (first.version, second.version, again.version) == (0, 1, 1)
    assert again.checksum == second.checksum != first.checksum
    scorer = Scorer(config, str(tiny_model))
    scorer.ensure(1, lambda _: (second.checksum, second.state))
    table = rollouts(0, 5)
    answers = scorer.score(
        1, table["prompt_text"].to_pylist(), [[(text, True)] for text in table["response_text"].to_pylist()]
    )
    np.testing.assert_allclose([a[0].scores[-1] for a in answers], trainer.scores(table), atol=1e-4)


def test_swapping_the_sides_mirrors_the_scores(tiny_model: Path) -> None:
    """Nothing but the label tells the sides apart: the same texts give the same scores from either table."""
    trainer = DiscriminatorTrainer(small(label_smoothing=0.0), str(tiny_model), seed=0)
    forward = trainer.evaluate(demonstrations(0, 20), rollouts(0, 20, 1), step=0)
    swapped = trainer.evaluate(rollouts(0, 20, 1), demonstrations(0, 20), step=0)
    assert forward["score_demonstration"] == pytest.approx(swapped["score_rollout"], abs=1e-4)
    assert forward["margin"] == pytest.approx(-swapped["margin"], abs=1e-4)
    assert forward["accuracy"] == pytest.approx(1 - swapped["accuracy"], abs=1e-6)


def test_health_gate_decides_the_number_of_steps(tiny_model: Path) -> None:
    trainer = DiscriminatorTrainer(small(), str(tiny_model), seed=0)
    trainer.publish()
    trainer.gate.observe(0, HealthReading(accuracy=1.0, margin=3.0, saturation=0.0))
    assert trainer.update(rollouts(0, 10), demonstrations(0, 10), step=0) == {"steps": 0.0, "health": 2.0}
    kept = trainer.publish()
    assert kept is not None
    assert kept.version == 0
    assert trainer.gate.state is HealthState.PAUSED


def test_a_step_takes_the_demonstrations_of_its_prompts() -> None:
    table = demonstrations(0, 40)
    rng = np.random.default_rng(0)
    draw = partial(demonstration_rows, demonstrations=table, paired=True, at_least=6, rng=rng)
    assert draw(rollouts(5, 13)).tolist() == list(range(5, 13))
    topped_up = draw(rollouts(5, 7, samples=8))
    assert len(topped_up) == 6
    assert {5, 6} <= set(topped_up.tolist())


def test_a_steps_rollouts_come_in_whole_groups_and_all_are_used() -> None:
    plan = rollout_batches(rollouts(0, 10, samples=4), 4, 16, np.random.default_rng(0))
    assert sorted(np.concatenate(plan[:2]).tolist()) != list(range(40))
    assert all(len(set(rows.tolist())) == 16 and len({r // 4 for r in rows.tolist()}) == 4 for rows in plan)


EVERYTHING = {
    "loss": "bradley_terry",
    "reward": {"form": "bradley_terry"},
    "gradient_penalty": 0.5,
    "spectral_norm": 0.05,
    "score_centring": 0.3,
    "perturbed_fraction": 0.25,
}


@pytest.mark.parametrize(
    "objective",
    [
        EVERYTHING,
        {"length_matched": True, "length_bins": 3},
        {"loss": "wasserstein", "gradient_penalty": 0.5, "level": "token", "reward": {"form": "logit"}},
    ],
)
def test_every_objective_survives_any_packing(objective, tiny_model: Path) -> None:
    seen = []
    for fields in ({}, {"packing": False}, {"pack_length": 64, "micro_batch_tokens": 64}):
        trainer = DiscriminatorTrainer(
            small(steps_per_policy_step=1, **objective, **fields), str(tiny_model), seed=0
        )
        metrics = trainer.update(rollouts(0, 10), demonstrations(2, 12), step=0)
        seen.append([metrics[name] for name in sorted(metrics)])
    np.testing.assert_allclose(seen, np.broadcast_to(seen[0], np.shape(seen)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        {"loss": "bradley_terry", "reward": {"form": "bradley_terry"}},
        {"loss": "hinge", "reward": {"form": "logit"}},
        {"loss": "least_squares", "perturbed_fraction": 0.5, "reward": {"form": "logit"}},
        {"loss": "wasserstein", "spectral_norm": 2.0, "gradient_penalty": 0.01, "score_centring": 0.1},
    ],
)
def test_every_loss_learns_to_tell_the_sides_apart(objective, tiny_model: Path) -> None:
    trainer = DiscriminatorTrainer(small(**objective), str(tiny_model), seed=1)
    held = (demonstrations(80, 120), rollouts(80, 120, 1))
    after = trainer.warm_up(rollouts(0, 80), demonstrations(0, 80), *held)
    assert after["accuracy"] >= 0.9
    assert after["margin"] > 0


@pytest.mark.parametrize("kind", ["dropout", "token_dropout"])
def test_dropout_is_the_same_in_the_first_pass(kind: str, tiny_model: Path) -> None:
    """Otherwise the pairwise gradient would be taken at other scores than it is applied to."""
    config = small(loss="bradley_terry", reward={"form": "logit"}, batch_size=8, **{kind: 0.5})
    trainer = DiscriminatorTrainer(config, str(tiny_model), seed=0)
    seen: list[torch.Tensor] = []
    trainer.module.register_forward_hook(lambda _, __, scores: seen.append(scores.detach().clone()))
    trainer._train(rollouts(0, 4), demonstrations(0, 4), 0, 0)
    half = len(seen) // 2
    assert half >= 1
    for first, second in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_token_dropout_hides_response_tokens_in_training_only(
    kind: str, tiny_model: Path, tiny_encoder: Path
) -> None:
    model = tiny_model if kind == "causal" else tiny_encoder
    trainer = DiscriminatorTrainer(small(token_dropout=0.25), str(model), seed=0)
    module = trainer.module
    encoded = trainer._encode(rollouts(0, 80))
    batch = trainer._batches(group_encoded(encoded))[0]
    shown = module._with_holes(batch, torch.ones(*batch.input_ids.shape, 3)).flatten(0, 1)
    hidden = torch.zeros(len(shown), dtype=torch.bool)
    hidden[batch.position] = shown[batch.position, 0] == 0
    assert bool((shown[~hidden] == 1).all())  # no prompt token among them
    assert 0.15 < hidden[batch.position].float().mean().item() < 0.35
    module.eval()
    still = [module(batch).detach() for _ in range(2)]
    module.train()
    moved = module(batch).detach()
    torch.testing.assert_close(still[0], still[1], atol=0, rtol=0)
    assert bool((moved != still[0]).any())


def test_transitions_are_told_once_and_the_policy_can_be_paused(tiny_model: Path) -> None:
    fields = {"health": {"pause_policy": True, "policy_pause_accuracy": 0.54}, "loss": "bce"}
    trainer = DiscriminatorTrainer(small(**fields), str(tiny_model), seed=0)
    same = demonstrations(0, 20)
    trainer.evaluate(same, same, step=3)  # the same texts on both sides: accuracy is one half
    told = trainer.take_transitions()
    assert [(t["side"], t["step"], t["after"]) for t in told] == [
        ("discriminator", 3, "boost"),
        ("policy", 3, "paused"),
    ]
    assert "accuracy 0.500 < 0.54" in told[1]["reason"]
    assert trainer.take_transitions() == []
    assert trainer.update(rollouts(0, 10), demonstrations(0, 10), step=3)["policy_factor"] == 0.0


def test_missing_columns_and_empty_sides_are_named(tiny_model: Path) -> None:
    trainer = DiscriminatorTrainer(small(), str(tiny_model), seed=0)
    with pytest.raises(ValueError, match="finish_reason"):
        trainer.update(rollouts(0, 4).drop_columns(["finish_reason"]), demonstrations(0, 4), step=0)
    with pytest.raises(ValueError, match="no demonstrations"):
        trainer.update(rollouts(0, 4), demonstrations(0, 0), step=0)
    with pytest.raises(ValueError, match="no rollouts"):
        trainer.update(rollouts(0, 0), demonstrations(0, 4), step=0)


def test_calibration_error_of_known_cases() -> None:
    side = torch.tensor([True, True, True, False])
    weight = torch.full((4,), 0.25)
    calibrated = torch.full((4,), float(np.log(3.0)))  # D = .75, and three of four are demonstrations
    assert calibration_error(calibrated, side, weight) == pytest.approx(0.0, abs=1e-6)
    certain = torch.tensor([50.0, 50.0, -50.0, -50.0])
    assert calibration_error(certain, side, weight) == pytest.approx(0.25)
    assert calibration_error(torch.zeros(4), side, balanced_weights(side)) == pytest.approx(0.0, abs=1e-6)


def test_comparisons_are_calibrated_as_outcomes() -> None:
    """Three of four comparisons won at a lead of log 3: the stated .75 is the frequency."""
    lead = float(np.log(3.0))
    sequence = torch.tensor([lead, lead, lead, 0.0, 0.0, 0.0, 0.0, lead])
    side = torch.tensor([True, True, True, True, False, False, False, False])
    prompt = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    arguments = (sequence, side, balanced_weights(side), prompt)
    assert calibration("bradley_terry", *arguments) == pytest.approx(0.0, abs=1e-6)
    shifted = (sequence + 7.0, *arguments[1:])
    assert calibration("bradley_terry", *shifted) == pytest.approx(0.0, abs=1e-6)
    assert calibration("wasserstein", *shifted) == pytest.approx(calibration("wasserstein", *arguments))
