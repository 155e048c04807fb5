"""A step's result does not depend on how it is split: micro-batches, ranks, ZeRO stages. State survives a
reload exactly."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from two_ranks import run_two_ranks
from zero_worker import two_updates, whole_weights, zero_stages

from learner.config import LearnerConfig, OptimizerConfig
from learner.engine import TrainableModel, default_param_groups, schedule_factor
from learner.losses import LossOutput
from learner.policy import PolicyLearner

# A large epsilon keeps AdamW smooth: near a zero gradient its usual step is the sign of rounding noise.
SETTINGS = {
    "lr": 1e-2,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "grad_clip": 0.5,
    "kl_coef": 0.1,
    "entropy_coef": 0.01,
    "gamma": 0.5,
    "baseline": "group",
    "device": "cpu",
}
UNSPLIT = {"pack_length": 512, "micro_batch_tokens": 8192}
SPLIT = {"pack_length": 24, "micro_batch_tokens": 48, "logits_chunk": 7}


def assert_same(actual, expected, tolerance=2e-6):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, atol=tolerance, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def reference_update(tiny_model, uneven_table):
    learner, metrics = two_updates(tiny_model, uneven_table, **SETTINGS, **UNSPLIT)
    assert metrics[0]["micro_batches"] == 1
    return uneven_table, whole_weights(learner), metrics


def by_plain_pytorch(tiny_model, table):
    """The same two updates with a padded loop over single sequences, autograd and torch's AdamW."""
    from learner.advantages import advantages, discounted_returns
    from learner.samples import Samples, flat_column, ragged

    model, base = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    samples = Samples.from_table(table)
    returns = discounted_returns(flat_column(table, "token_rewards", samples), samples.offsets, 0.5)
    adv = advantages(returns, samples.offsets, samples.group_index, baseline="group")
    sampler = flat_column(table, "response_logprobs", samples)
    optimizer = torch.optim.AdamW(default_param_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
    norms = []
    for _ in range(2):
        total = 0.0
        for i, (p, r) in enumerate(
            zip(ragged(table, "prompt_ids"), ragged(table, "response_ids"), strict=True)
        ):
            ids = torch.tensor([[*p.tolist(), *r.tolist()]])
            rows, target = torch.arange(len(p) - 1, ids.shape[1] - 1), torch.tensor(r).long()
            log_p = torch.log_softmax(model(ids).logits[0], -1)[rows]
            with torch.no_grad():
                ref = torch.log_softmax(base(ids).logits[0], -1)[rows, target]
            chosen, part = (
                log_p[torch.arange(len(r)), target],
                slice(samples.offsets[i], samples.offsets[i + 1]),
            )
            weight = (chosen - sampler[part]).detach().exp().clamp(max=2.0)
            entropy = -(log_p.exp() * log_p).sum(-1)
            gain = adv[part] * chosen - 0.1 * (chosen - ref) ** 2 / 2
            total -= (weight * gain + 0.01 * entropy).sum()
        (total / samples.tokens).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), norms


def test_one_unsplit_batch_equals_plain_pytorch(tiny_model, reference_update):
    table, weights, metrics = reference_update
    expected, norms = by_plain_pytorch(tiny_model, table)
    assert_same(weights, {name: p.detach() for name, p in expected.items()}, tolerance=1e-5)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    assert norms[0] > 0.5, "clipping is part of what is compared"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_and_zero_stages_change_nothing(tiny_model, reference_update, stage):
    table, weights, metrics = reference_update
    learner, split = two_updates(tiny_model, table, zero_stage=stage, **SETTINGS, **SPLIT)
    assert split[0]["micro_batches"] > 3
    assert_same(whole_weights(learner), weights)
    for name in ("loss", "kl", "entropy", "grad_norm", "mismatch_max", "importance_mean"):
        assert split[1][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-6)


def test_unpacked_rows_change_nothing(tiny_model, reference_update):
    table, weights, _ = reference_update
    learner, _ = two_updates(tiny_model, table, packing=False, **SETTINGS, **UNSPLIT)
    assert_same(whole_weights(learner), weights)


def test_gradient_checkpointing_changes_nothing(tiny_model, reference_update):
    table, weights, _ = reference_update
    learner, _ = two_updates(tiny_model, table, gradient_checkpointing=True, **SETTINGS, **SPLIT)
    assert_same(whole_weights(learner), weights)


def test_two_ranks_with_an_uneven_split_change_nothing(tiny_model, reference_update, tmp_path):
    table, weights, metrics = reference_update
    single, _ = two_updates(tiny_model, table, **SETTINGS, **UNSPLIT)
    expected_logprobs = single.response_logprobs(table)
    single.save(tmp_path / "one")
    stages = [1, 2, 3]
    job = {"model": str(tiny_model), "table": table, "stages": stages, "settings": SETTINGS | SPLIT}
    results = run_two_ranks(job | {"saved": tmp_path / "one"}, tmp_path, zero_stages)
    whole = whole_weights(single)
    single.train_step(table, 2)
    next_weights = whole_weights(single)
    for stage in stages:
        loaded, after = results.pop(f"from one, {stage}")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
        assert_same(after, next_weights)
        single.load(tmp_path / f"state-{stage}")
        back = whole_weights(single)
        assert all(torch.equal(back[name], tensor) for name, tensor in results[stage][0].items())
        single.train_step(table, 2)
        assert_same(whole_weights(single), next_weights)
    for stage, (actual, split, logprobs) in results.items():
        assert_same(actual, weights)
        assert split[1]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-4), f"stage {stage}"
        for a, b in zip(logprobs, expected_logprobs, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), atol=1e-4, rtol=0)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"export-{stage}")
        assert sum(p.numel() for p in exported.parameters()) == sum(w.numel() for w in weights.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_load_continues_bit_for_bit(tiny_model, uneven_table, tmp_path, dtype):
    settings = SETTINGS | UNSPLIT | {"compute_dtype": dtype, "lr_schedule": "cosine", "schedule_steps": 5}
    learner, _ = two_updates(tiny_model, uneven_table, **settings)
    learner.save(tmp_path / "state")
    expected = learner.train_step(uneven_table, 2)
    draw = torch.rand(3)
    again = PolicyLearner(str(tiny_model), LearnerConfig(**settings), model_dtype="float32")
    again.load(tmp_path / "state")
    actual = again.train_step(uneven_table, 2)
    same = {k: v for k, v in expected.items() if not k.startswith("seconds")}
    assert same == {k: v for k, v in actual.items() if not k.startswith("seconds")}
    assert torch.equal(draw, torch.rand(3))
    left, right = whole_weights(learner), whole_weights(again)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_loading_an_empty_folder_says_so(tiny_model, tmp_path):
    learner = PolicyLearner(str(tiny_model), LearnerConfig(kl_coef=0, device="cpu"), model_dtype="float32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no engine state"):
        learner.load(tmp_path / "empty")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_updates_too_small_for_bfloat16_are_not_lost(stage):
    """Weight 1.0 with steps of 1e-4: bfloat16 resolves 2^-8 below 1, so without fp32 masters it would never
    move."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return (x @ self.weight).sum()

    cfg = OptimizerConfig(lr=1e-4, zero_stage=stage, grad_clip=0, device="cpu")
    model = TrainableModel(One(), cfg, dtype=torch.bfloat16)

    def loss(module, batch):
        out = module(batch)
        return LossOutput(out, {"loss": out.detach()}, {})

    for _ in range(100):
        model.step([torch.ones(1, 4, dtype=torch.bfloat16)], loss)
    with model.gathered():
        weight = model.module.weight.detach().float()
    # AdamW moves by lr at each step under a constant gradient: 1 - 100 * 1e-4.
    torch.testing.assert_close(weight, torch.full((4, 4), 0.99), atol=2e-3, rtol=0)


def test_rotary_frequencies_are_not_rounded(tiny_model):
    """The sampler, the scorer and whoever loads the export compute with them in fp32."""
    learner = PolicyLearner(str(tiny_model), LearnerConfig(device="cpu"), model_dtype="bfloat16")
    wanted = [buffer for name, buffer in learner.module.named_buffers() if name.endswith("inv_freq")]
    assert wanted
    assert {buffer.dtype for buffer in wanted} == {torch.float32}
    assert {param.dtype for param in learner.module.parameters()} == {learner.dtype}


def test_gradients_of_micro_batches_are_added_in_fp32():
    """A gradient of 256 and 64 of 1/2: in bfloat16 each half would vanish in the sum."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x):
            return (x * self.weight).sum()

    for stage in (1, 2, 3):
        cfg = OptimizerConfig(lr=1e-4, zero_stage=stage, grad_clip=0, device="cpu")
        model = TrainableModel(Linear(), cfg, dtype=torch.bfloat16)
        parts = [torch.tensor([[256.0]])] + [torch.tensor([[0.5]])] * 64
        out = model.step([p.bfloat16() for p in parts], lambda m, x: LossOutput(m(x), {}, {}))
        assert out["grad_norm"] == pytest.approx(288.0), f"stage {stage}"


def test_schedules():
    cosine = OptimizerConfig(lr_schedule="cosine", warmup_steps=2, schedule_steps=6)
    assert [round(schedule_factor(cosine, i), 4) for i in range(8)] == [
        0.5,
        1.0,
        1.0,
        0.8536,
        0.5,
        0.1464,
        0.0,
        0.0,
    ]
    linear = OptimizerConfig(lr_schedule="linear", schedule_steps=4)
    assert [schedule_factor(linear, i) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="schedule_steps"):
        schedule_factor(OptimizerConfig(lr_schedule="linear"), 0)


def test_a_rank_on_the_cpu_stays_there_whatever_the_driver_uses():
    """Ranks inherit the driver's environment, which names the device that other ranks have."""
    code = (
        "import torch; from learner.engine import ensure_process_group, load_deepspeed\n"
        "ensure_process_group(torch.device('cpu')); load_deepspeed(torch.device('cpu'))\n"
        "from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_name())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "cpu"
