"""Adapters: merged export equals the adapter forward, the base is the reference, and only adapters train."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from two_ranks import run_two_ranks
from zero_worker import two_updates, whole_weights, zero_stages

from learner import lora
from learner.config import LearnerConfig
from learner.packing import pack
from learner.policy import PolicyLearner
from learner.samples import Samples

SETTINGS = {"lr": 1e-2, "kl_coef": 0.1, "device": "cpu", "lora": {"rank": 4, "alpha": 8}}


@pytest.mark.parametrize("stage", [1, 3])
def test_merged_export_equals_adapter_forward(tiny_model, uneven_table, tmp_path, stage):
    learner = PolicyLearner(
        str(tiny_model), LearnerConfig(zero_stage=stage, **SETTINGS), model_dtype="float32"
    )
    before = learner.response_logprobs(uneven_table)
    first = learner.train_step(uneven_table, 0)
    learner.train_step(uneven_table, 1)
    after = learner.response_logprobs(uneven_table)
    assert first["kl"] == pytest.approx(0, abs=1e-7)
    assert max(abs(a - b).max() for a, b in zip(after, before, strict=True)) > 1e-2
    learner.export(tmp_path / "merged")
    plain = PolicyLearner(
        str(tmp_path / "merged"), LearnerConfig(kl_coef=0, device="cpu"), model_dtype="float32"
    )
    for a, b in zip(after, plain.response_logprobs(uneven_table), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), atol=1e-5, rtol=0)


def test_reference_is_the_base_model(tiny_model, uneven_table):
    learner = PolicyLearner(str(tiny_model), LearnerConfig(**SETTINGS), model_dtype="float32")
    assert learner.reference is None
    before = learner.response_logprobs(uneven_table)
    learner.train_step(uneven_table, 0)
    samples = Samples.from_table(uneven_table)
    batches = pack(samples.groups, pack_length=64, micro_batch_tokens=512, keep_last=False)
    reference = learner._reference_logprobs(batches, samples.tokens)
    expected = torch.cat([torch.from_numpy(b) for b in before])
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=0)
    trainable = {name for name, p in learner.module.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)


def test_lora_state_continues_bit_for_bit(tiny_model, uneven_table, tmp_path):
    learner = PolicyLearner(str(tiny_model), LearnerConfig(**SETTINGS), model_dtype="float32")
    learner.train_step(uneven_table, 0)
    learner.save(tmp_path / "state")
    learner.train_step(uneven_table, 1)
    again = PolicyLearner(str(tiny_model), LearnerConfig(**SETTINGS), model_dtype="float32", seed=5)
    again.load(tmp_path / "state")
    again.train_step(uneven_table, 1)
    for a, b in zip(learner.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_off_restores_training(tiny_model):
    model = lora.attach(
        AutoModelForCausalLM.from_pretrained(tiny_model), LearnerConfig(**SETTINGS).lora, sent=torch.float32
    )
    trainable = [p.requires_grad for p in model.parameters()]
    with lora.adapters_off(model):
        pass
    assert [p.requires_grad for p in model.parameters()] == trainable
    names = {lora.merged_name(name) for name, _ in model.named_parameters()} - {None}
    assert names == {name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()}


def test_two_ranks_change_nothing_and_send_merged_weights(tiny_model, uneven_table, tmp_path):
    settings = SETTINGS | {"eps": 1e-3, "grad_clip": 0.5}
    learner, metrics = two_updates(tiny_model, uneven_table, **settings)
    split = settings | {"pack_length": 24, "micro_batch_tokens": 48}
    job = {"model": str(tiny_model), "table": uneven_table, "stages": [2, 3], "settings": split}
    expected = whole_weights(learner)
    for stage, (weights, ranks_metrics, _) in run_two_ranks(job, tmp_path, zero_stages).items():
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-5, msg=f"{stage}: {name}")
        assert ranks_metrics[1]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_an_adapted_layer_computes_with_the_weight_that_is_sent(dtype, sent):
    layer = adapted_layer(dtype, sent)
    x = torch.randn(3, 5, 48, dtype=dtype)
    weight = lora.merged_weight(layer)
    assert torch.equal(weight, weight.to(sent).to(dtype)), "nothing is left to round when it is sent"
    expected = torch.nn.functional.linear(x, weight, layer.get_base_layer().bias)
    assert torch.equal(layer(x), expected)
    with lora.adapters_off(layer):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_a_fold_in_bfloat16_rounds_once():
    layer = adapted_layer(torch.bfloat16, torch.bfloat16)
    a, b = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    exact = layer.get_base_layer().weight.double() + layer.scaling["default"] * b @ a
    torch.testing.assert_close(lora.merged_weight(layer).double(), exact, rtol=2**-8 * 1.01, atol=0)


def test_gradients_are_those_of_an_adapter_beside_its_layer():
    layer = adapted_layer(torch.float64, torch.float64)
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    x = torch.randn(3, 5, 48, dtype=torch.float64, requires_grad=True)

    def beside(x):
        return layer.get_base_layer()(x) + layer.scaling["default"] * (x @ a.T @ b.T)

    found, expected = (torch.autograd.grad(f(x).square().sum(), (x, a, b)) for f in (layer, beside))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)

    def penalty(f):  # as R1 has it: a derivative of a derivative
        (slope,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (a, b))

    for one, other in zip(penalty(layer), penalty(beside), strict=True):
        torch.testing.assert_close(one, other)


def adapted_layer(dtype, sent):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 32))
    model.config = None
    adapter = LearnerConfig(**SETTINGS).lora.model_copy(update={"target_modules": ["0"]})
    (_, layer), *_ = lora.adapters(lora.attach(model, adapter, sent=sent))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer.to(dtype)
