"""Adapters: merged export equals the adapter forward, the base is the reference, and only adapters train."""

import copy

import pytest
import torch
from peft import LoraConfig as PeftLora
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D
from two_ranks import run_two_ranks
from zero_worker import two_updates, whole_weights, zero_stages

from learner import lora
from learner.config import LearnerConfig, LoraConfig
from learner.packing import pack
from learner.policy import PolicyLearner
from learner.samples import Samples

ENDS = {"eos_token_id": 1, "bos_token_id": 0}
SETTINGS = {"lr": 1e-2, "kl_coef": 0.1, "device": "cpu", "lora": {"rank": 4, "alpha": 8}}


@pytest.fixture
def tiny_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, **ENDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_gpt2"])
def test_merged_export_equals_adapter_forward(request, uneven_table, tmp_path, kind, stage):
    settings, model = LearnerConfig(zero_stage=stage, **SETTINGS), request.getfixturevalue(kind)
    learner = PolicyLearner(str(model), settings, model_dtype="float32")
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
    names = [weight.name for weight in lora.plain_weights(model)]
    assert names == [name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()]


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


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    ("dtype", "sent"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_an_adapted_layer_computes_with_the_weight_that_is_sent(dtype, sent, kind):
    layer = adapted_layer(dtype, sent, kind)
    x = torch.randn(3, 5, 48, dtype=dtype)
    weight = lora.merged_weight(layer)
    assert torch.equal(weight, weight.to(sent).to(dtype)), "nothing is left to round when it is sent"
    assert weight.shape == layer.get_base_layer().weight.shape
    rows_out = weight.T if kind is Conv1D else weight
    assert torch.equal(layer(x), nn.functional.linear(x, rows_out, layer.get_base_layer().bias))
    with lora.adapters_off(layer):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_fold_in_bfloat16_rounds_once(kind):
    layer = adapted_layer(torch.bfloat16, torch.bfloat16, kind)
    a, b = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    delta = layer.scaling["default"] * b @ a
    exact = layer.get_base_layer().weight.double() + (delta.T if kind is Conv1D else delta)
    torch.testing.assert_close(lora.merged_weight(layer).double(), exact, rtol=2**-8 * 1.01, atol=0)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_gradients_are_those_of_an_adapter_beside_its_layer(kind):
    layer = adapted_layer(torch.float64, torch.float64, kind)
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


def adapted_layer(dtype, sent, kind):
    torch.manual_seed(0)
    base = kind(48, 32) if kind is nn.Linear else kind(32, 48)
    layer = lora.FoldedLayer(base, "default", PeftLora(), r=4, lora_alpha=8)
    layer.sent = sent
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    torch.nn.init.normal_(base.bias)
    return layer.to(dtype)


SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"intermediate_size": 32, "num_key_value_heads": 1, "eos_token_id": 1, "bos_token_id": 0}
MODELS = {
    "llama, tied head": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **ENDS),
    "falcon": FalconConfig(**SIZES, **ENDS),
    "opt": OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, **ENDS),
    "qwen3_moe": Qwen3MoeConfig(
        **LLAMA, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ),
    "bert": BertConfig(**SIZES, intermediate_size=32),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", [False, True], ids=["policy", "body"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_is_what_the_plain_model_computes_with_what_leaves(name, body, sent):
    """The policy's walk for the wire and exports, and the one of a body that is published."""
    kind = AutoModel if body or name == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    targets = ATTENTION if "moe" in name else "all-linear"
    plain = kind.from_config(MODELS[name]).eval()
    adapted = lora.attach(copy.deepcopy(plain), LoraConfig(rank=4, target_modules=targets), sent=sent).eval()
    for _, layer in lora.adapters(adapted):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    weights = {weight.name: weight.value() for weight in lora.plain_weights(adapted)}
    assert list(weights) == [name for name, _ in plain.named_parameters()]
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        base, found = plain(ids)[0], adapted(ids)[0]
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name].to(sent))
        torch.testing.assert_close(found, plain(ids)[0], rtol=1e-5, atol=1e-5)
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("gpt2", ["wte"], r'into transformer\.wte \(Embedding\).*\["c_attn", "c_proj", "c_fc"\]'),
        ("llama", ["q_proj", "lm_head"], r"into lm_head \(Linear\)"),
        ("llama, tied head", ["lm_head"], r"into lm_head \(Linear\)"),
        ("llama, tied head", ["embed_tokens"], r"into model\.embed_tokens \(Embedding\)"),
        ("llama", ["q_proj", "c_attn"], r"LlamaForCausalLM has no module 'c_attn'.*\[\"q_proj\""),
        ("llama", ["self_attn"], r"into model\.layers\.0\.self_attn \(LlamaAttention\)"),
        ("llama", ["norm"], r"into model\.norm \(LlamaRMSNorm\)"),
        ("qwen3_moe", "all-linear", r'experts \(Qwen3MoeExperts\).*set it to \["q_proj", "k_proj", "v_proj"'),
        ("qwen3_moe", ["gate"], r"gate \(Qwen3MoeTopKRouter\)"),
        ("qwen3_moe", ["down_proj"], r"no module 'down_proj'"),
    ],
)
def test_what_cannot_be_folded_is_refused_without_weights(name, targets, message):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name])
    with pytest.raises(ValueError, match=r"^lora\.target_modules: .*" + message):
        lora.attach(model, LoraConfig(rank=2, target_modules=targets), sent=torch.float32)


def test_a_weight_that_two_modules_share_is_refused():
    model = AutoModel.from_config(MODELS["llama"])
    model.layers[1].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"into layers\.0\.mlp\.up_proj \(Linear\)"):
        lora.attach(model, LoraConfig(rank=2), sent=torch.float32)
