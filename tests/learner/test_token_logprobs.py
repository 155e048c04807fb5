"""Chunked log-probabilities and entropies against plain autograd."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.logprobs import ScoredModel, token_logprobs


def plain(hidden, weight, bias, target, temperature):
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias).float() / temperature, -1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk", [3, 7, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_match_autograd(chunk, temperature, with_bias):
    torch.manual_seed(0)
    n, d, v = 17, 6, 31
    target, upstream = torch.randint(v, (n,)), torch.randn(2, n)
    leaves = [torch.randn(n, d), torch.randn(v, d)] + ([torch.randn(v)] if with_bias else [])
    outputs = []
    for kind in ("plain", "chunked"):
        hidden, weight, *rest = (leaf.clone().requires_grad_() for leaf in leaves)
        bias = rest[0] if rest else None
        if kind == "plain":
            logprob, entropy = plain(hidden, weight, bias, target, temperature)
        else:
            logprob, entropy = token_logprobs(
                hidden, weight, bias, target, temperature=temperature, chunk=chunk
            )
        (upstream[0] @ logprob + upstream[1] @ entropy).backward()
        outputs.append([logprob, entropy, hidden.grad, weight.grad, *(r.grad for r in rest)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_frozen_head_still_passes_gradients_to_hidden_states():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    logprob, _ = token_logprobs(hidden, weight, None, torch.tensor([0, 1, 2, 3]), chunk=2)
    logprob.sum().backward()
    reference = hidden.detach().clone().requires_grad_()
    plain(reference, weight, None, torch.tensor([0, 1, 2, 3]), 1.0)[0].sum().backward()
    torch.testing.assert_close(hidden.grad, reference.grad)


def test_softmax_is_fp32_for_bfloat16_models():
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    target = torch.arange(8)
    logprob, entropy = token_logprobs(hidden, weight, None, target)
    assert logprob.dtype == entropy.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight).float()
    torch.testing.assert_close(logprob, torch.log_softmax(logits, -1)[target, target])


def test_impossible_tokens_do_not_poison_the_entropy():
    bias = torch.tensor([0.0, float("-inf"), 0.0])
    logprob, entropy = token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), bias, torch.tensor([0]))
    assert entropy.item() == pytest.approx(0.6931472)
    assert logprob.item() == pytest.approx(-0.6931472)


def test_model_with_transformed_logits_is_refused():
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )

    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    with pytest.raises(ValueError, match="transforms its logits"):
        ScoredModel(Scaled(config))
