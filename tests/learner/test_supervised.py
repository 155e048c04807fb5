"""Supervised steps: the loss against a plain loop, the same update under any split, snapshots, early
stopping."""

import pytest
import torch
from supervised_worker import check_snapshot, supervised_stages, two_supervised_updates
from transformers import AutoModelForCausalLM
from two_ranks import run_two_ranks
from zero_worker import whole_weights

from learner.config import LearnerConfig
from learner.early_stopping import EarlyStopping
from learner.engine import default_param_groups
from learner.policy import PolicyLearner
from learner.rank import LearnerRank
from learner.snapshot import Snapshot
from learner.supervised import cross_entropy, supervised_step
from rollout.config import PolicyConfig, RolloutConfig

# A large epsilon keeps AdamW smooth: near a zero gradient its usual step is the sign of rounding noise.
SETTINGS = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "grad_clip": 0.5, "device": "cpu"}
UNSPLIT = {"pack_length": 512, "micro_batch_tokens": 8192}
SPLIT = {"pack_length": 24, "micro_batch_tokens": 24, "logits_chunk": 7}
FEW = {"pack_length": 48, "micro_batch_tokens": 96}


@pytest.fixture
def examples(make_table):
    """Answers of unequal lengths, two prompts with several, one answer without a token."""
    sizes = [(9, [5, 3]), (4, [7]), (17, [2, 6, 4]), (3, [11]), (6, [1]), (5, [0])]
    return make_table(sizes, scored=False)


def by_hand(model, table):
    """Two updates of a loop over single sequences with torch's cross-entropy and AdamW: weights and
    losses."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(default_param_groups(network, 0.1), lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
    rows = table.to_pylist()
    tokens = sum(len(row["response_ids"]) for row in rows)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            prompt, answer = row["prompt_ids"], row["response_ids"]
            if answer:
                logits = network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        losses.append(float(total.detach()) / tokens)
    return dict(network.named_parameters()), losses


def assert_close(weights, expected):
    for name, tensor in expected.items():
        if name in weights:
            torch.testing.assert_close(
                weights[name], tensor.detach(), atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_two_updates_equal_plain_pytorch(tiny_model, examples):
    expected, losses = by_hand(tiny_model, examples)
    _, metrics, weights, _ = two_supervised_updates(tiny_model, examples, **SETTINGS, **UNSPLIT)
    assert [m["nll"] for m in metrics] == pytest.approx(losses, rel=1e-5)
    assert metrics[1]["nll"] < metrics[0]["nll"]
    assert metrics[0]["tokens_response"] == 39
    assert weights[1].keys() <= expected.keys()
    assert_close(weights[1], expected)


@pytest.mark.parametrize("split", [{"zero_stage": s} for s in (1, 2, 3)] + [{"packing": False}], ids=str)
def test_packing_micro_batches_and_zero_stages_change_nothing(tiny_model, examples, split):
    _, whole, expected, _ = two_supervised_updates(tiny_model, examples, **SETTINGS, **UNSPLIT)
    learner, metrics, weights, kept = two_supervised_updates(
        tiny_model, examples, **SETTINGS, **SPLIT, **split
    )
    assert metrics[0]["micro_batches"] > 2
    assert_close(weights[1], expected[1])
    for got, want in zip(metrics, whole, strict=True):
        for name in ("nll", "entropy", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-4)
    check_snapshot(learner, examples, metrics, weights, kept)


def test_two_ranks_change_nothing_and_snapshots_come_back(tiny_model, examples, tmp_path):
    _, whole, expected, _ = two_supervised_updates(tiny_model, examples, **SETTINGS, **UNSPLIT)
    job = {"model": str(tiny_model), "table": examples, "stages": [1, 2, 3], "settings": SETTINGS | FEW}
    for weights, metrics in run_two_ranks(job, tmp_path, supervised_stages).values():
        assert_close(weights, expected[1])
        for got, want in zip(metrics, whole, strict=True):
            assert got["nll"] == pytest.approx(want["nll"], rel=1e-4)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_adapters_alone_are_trained_and_kept(tiny_model, examples):
    learner, metrics, weights, kept = two_supervised_updates(
        tiny_model, examples, lora={"rank": 4}, **SETTINGS, **UNSPLIT
    )
    assert metrics[1]["nll"] < metrics[0]["nll"]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    check_snapshot(learner, examples, metrics, weights, kept)


def test_a_snapshot_goes_through_a_file_and_belongs_to_its_model(tiny_model, examples, tmp_path):
    learner, metrics, weights, kept = two_supervised_updates(tiny_model, examples, **SETTINGS, **UNSPLIT)
    kept.save(tmp_path / "kept")
    read = Snapshot()
    read.load(tmp_path / "kept", learner.trainable)
    check_snapshot(learner, examples, metrics, weights, read)
    with pytest.raises(ValueError, match="no snapshot"):
        Snapshot().restore(learner.trainable)


def test_half_precision_weights_come_back_with_their_masters(tiny_model, examples):
    cfg = LearnerConfig(kl_coef=0.0, compute_dtype="bfloat16", **SETTINGS, **UNSPLIT)
    learner = PolicyLearner(str(tiny_model), cfg, model_dtype="bfloat16")
    nll = [supervised_step(learner.trainable, cfg, examples)["nll"]]
    kept = Snapshot()
    kept.take(learner.trainable)
    nll += [supervised_step(learner.trainable, cfg, examples)["nll"] for _ in range(2)]
    kept.restore(learner.trainable)
    still = [supervised_step(learner.trainable, cfg, examples, lr_factor=0.0)["nll"] for _ in range(2)]
    assert still == [nll[1]] * 2
    assert nll[2] < nll[1]


def test_the_loss_is_a_weighted_sum_of_surprise():
    torch.manual_seed(0)
    logprob = -torch.rand(7, requires_grad=True)
    weight = torch.tensor([0.25, 0.25, 0.0, 0.5, 0.0, 0.0, 0.0])
    out = cross_entropy(logprob, torch.arange(7.0), weight)
    expected = -(0.25 * logprob[0] + 0.25 * logprob[1] + 0.5 * logprob[3])
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()))
    assert float(out.sums["entropy"]) == pytest.approx(0.25 + 1.5)
    (gradient,) = torch.autograd.grad(out.loss, logprob)
    assert torch.equal(gradient, -weight)


def test_examples_without_a_token_are_refused(tiny_model, make_table):
    learner = PolicyLearner(str(tiny_model), LearnerConfig(kl_coef=0.0, device="cpu"), model_dtype="float32")
    with pytest.raises(ValueError, match="no answer token"):
        supervised_step(learner.trainable, learner.cfg, make_table([(4, [0]), (3, [0])], scored=False))


def test_early_stopping_waits_for_its_patience_and_survives_a_checkpoint():
    stopping = EarlyStopping(patience=2)
    seen = [stopping.observe(step, value) for step, value in enumerate([-3.0, -2.0, -2.0, -1.5, -1.6])]
    assert seen == [True, True, False, True, False]
    assert (stopping.best, stopping.best_step, stopping.exhausted) == (-1.5, 3, False)
    again = EarlyStopping(patience=2)
    again.load_state(stopping.state())
    assert not again.observe(5, float("nan"))
    assert again.exhausted
    assert (again.best, again.best_step) == (-1.5, 3)
    fresh = EarlyStopping(patience=2)
    fresh.load_state(EarlyStopping(patience=2).state())
    assert fresh.observe(0, -1e9)


def test_a_checkpoint_holds_the_kept_weights_too(tiny_model, examples, tmp_path):
    def rank():
        config = LearnerConfig(kl_coef=0.0, **SETTINGS)
        policy = PolicyConfig(model=str(tiny_model), dtype="float32")
        return LearnerRank(
            rank=0, ranks=1, learner=config, policy=policy, rollout=RolloutConfig(), temperature=1.0, seed=0
        )

    first = rank()
    supervised_step(first.learner.trainable, first.learner.cfg, examples)
    first.keep()
    best = whole_weights(first.learner)
    supervised_step(first.learner.trainable, first.learner.cfg, examples)
    first.save(str(tmp_path / "learner"))
    second = rank()
    second.load(str(tmp_path / "learner"))
    later = whole_weights(second.learner)
    assert any(not torch.equal(later[name], tensor) for name, tensor in best.items())
    second.restore()
    restored = whole_weights(second.learner)
    assert all(torch.equal(restored[name], tensor) for name, tensor in best.items())
