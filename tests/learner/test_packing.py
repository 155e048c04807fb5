"""Packing keeps every token once, in its place, and gives the same numbers as unpacked rows."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from learner.attention import block_mask, dense_mask, longest_packable, sdpa_in_float32
from learner.logprobs import ScoredModel
from learner.packing import filler, make_groups, pack, packed_length, split_for_ranks, unpacked
from learner.samples import Samples


def groups_of(table):
    return Samples.from_table(table).groups


def gqa_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=300,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=128,
        **sizes,
        **changes,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def flat_logprobs(model, batches, tokens):
    out = torch.zeros(2, tokens)
    for batch in batches:
        logprob, entropy = model(batch)
        out = out.index_copy(1, batch.flat, torch.stack([logprob, entropy]))
    return out


@pytest.mark.parametrize("keep_last", [True, False])
@pytest.mark.parametrize(("pack_length", "budget"), [(16, 16), (40, 64), (64, 4096)])
def test_packed_equals_unpacked_in_logprobs_loss_and_gradients(uneven_table, pack_length, budget, keep_last):
    samples = Samples.from_table(uneven_table)
    packed = pack(samples.groups, pack_length=pack_length, micro_batch_tokens=budget, keep_last=keep_last)
    plain = unpacked(samples.groups, micro_batch_tokens=budget, keep_last=keep_last)
    coefficient = torch.randn(samples.tokens, generator=torch.Generator().manual_seed(1))
    results = []
    for packing, batches in ((True, packed), (False, plain)):
        model = ScoredModel(gqa_llama(), packing=packing)
        logprob, entropy = flat_logprobs(model, batches, samples.tokens)
        loss = (coefficient * logprob).mean() + 0.1 * entropy.mean()
        loss.backward()
        results.append(
            (logprob.detach(), entropy.detach(), loss.item(), [p.grad for p in model.parameters()])
        )
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=0)
    assert results[0][2] == pytest.approx(results[1][2], abs=1e-5)
    for a, b in zip(results[0][3], results[1][3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_packed_equals_transformers_one_sequence_at_a_time(uneven_table):
    samples = Samples.from_table(uneven_table)
    model = gqa_llama()
    packed = pack(samples.groups, pack_length=48, micro_batch_tokens=96)
    actual, _ = flat_logprobs(ScoredModel(model), packed, samples.tokens)
    for group in samples.groups:
        for response, start in zip(group.responses, group.starts, strict=True):
            ids = torch.from_numpy(np.concatenate([group.prompt, response]))[None]
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
            rows = torch.arange(len(group.prompt) - 1, ids.shape[1] - 1)
            expected = log_p[rows, torch.from_numpy(response)]
            torch.testing.assert_close(actual[start : start + len(response)], expected, atol=1e-5, rtol=0)


def test_every_response_token_appears_once_at_its_position(uneven_table):
    groups = groups_of(uneven_table)
    batches = pack(groups, pack_length=20, micro_batch_tokens=50)
    flat = torch.cat([b.flat for b in batches])
    assert flat.sort().values.tolist() == list(range(sum(len(r) for g in groups for r in g.responses)))
    for b in batches:
        assert torch.equal(b.input_ids.flatten()[b.position], b.target)
        assert torch.equal(b.position_ids.flatten()[b.position], b.position_ids.flatten()[b.source] + 1)
        assert not b.padding().flatten()[b.source].any()


def test_budgets_hold_and_long_groups_are_split(uneven_table):
    groups = groups_of(uneven_table)
    batches = pack(groups, pack_length=30, micro_batch_tokens=60)
    assert all(b.input_ids.numel() <= 60 and b.shape[1] <= 30 for b in batches)
    assert max(packed_length(g) for g in groups) > 30
    long = pack(groups, pack_length=8, micro_batch_tokens=8)
    assert max(b.shape[1] for b in long) <= 26  # the longest prompt plus response: 17 + 9


def test_packing_computes_a_prompt_once(make_table):
    groups = groups_of(make_table([(80, [24] * 8)] * 4))
    packed = pack(groups, pack_length=512, micro_batch_tokens=4096, keep_last=False)
    assert sum(b.input_ids.numel() for b in packed) == 4 * (80 + 8 * 23)


def test_empty_responses_take_no_part(make_table):
    table = make_table([(5, [0, 3, 0]), (4, [0]), (6, [2])])
    samples = Samples.from_table(table)
    batches = pack(samples.groups, pack_length=16, micro_batch_tokens=64, keep_last=False)
    assert sorted(torch.cat([b.flat for b in batches]).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(set(torch.cat([b.trajectory for b in batches]).tolist())) == [1, 4]


def test_empty_prompt_and_mixed_group_are_refused():
    one = np.array([1])
    with pytest.raises(ValueError, match="empty prompt"):
        make_groups([np.array([], dtype=np.int32)], [one], ["a"])
    with pytest.raises(ValueError, match="two different prompts"):
        make_groups([one, np.array([2])], [one, one], ["a", "a"])


def test_mask_by_a_slow_loop_and_both_forms_agree(uneven_table):
    batch = pack(groups_of(uneven_table), pack_length=60, micro_batch_tokens=240)[0]
    allowed = dense_mask(batch, torch.float32)[:, 0] == 0
    rows, width = batch.shape
    for r in range(rows):
        g, s = batch.group_ids[r].tolist(), batch.response_ids[r].tolist()
        for q in range(width):
            for k in range(width):
                expected = k <= q and g[q] == g[k] and (s[k] == 0 or s[k] == s[q])
                assert bool(allowed[r, q, k]) == expected
    blocks = block_mask(batch)
    q, k = torch.arange(width)[:, None], torch.arange(width)
    for r in range(rows):
        assert torch.equal(blocks.mask_mod(torch.tensor(r), torch.tensor(0), q, k), allowed[r])


def test_padding_gives_no_nan(make_table):
    table = make_table([(20, [9, 9]), (3, [1])])
    model = ScoredModel(gqa_llama())
    (batch,) = pack(groups_of(table), pack_length=38, micro_batch_tokens=500)
    assert batch.padding().any()
    logprob, _ = model(batch)
    logprob.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_ranks_get_balanced_shares(uneven_table):
    groups = groups_of(uneven_table)
    shares = split_for_ranks(groups, 2)
    loads = [sum(packed_length(g) for g in share) for share in shares]
    assert sum(len(s) for s in shares) == len(groups)
    assert abs(loads[0] - loads[1]) <= max(packed_length(g) for g in groups)
    assert split_for_ranks(groups[:1], 3)[1:] == [[], []]


def test_filler_runs_and_weighs_nothing():
    logprob, entropy = ScoredModel(gqa_llama())(filler())
    assert torch.isfinite(logprob).all()
    assert torch.isfinite(entropy).all()
    assert filler().weight.sum() == 0


def test_models_that_cannot_be_packed_are_refused():
    model = gqa_llama()
    assert longest_packable(model.config, model.get_decoder()) is None
    model.config.sliding_window = 8
    assert longest_packable(model.config, model.get_decoder()) == 8
    model.config.layer_types = ["linear_attention"]
    with pytest.raises(ValueError, match="packing = false"):
        longest_packable(model.config, model.get_decoder())


def test_sequence_beyond_the_sliding_window_is_refused(uneven_table):
    model = gqa_llama()
    model.config.sliding_window = 8
    scored = ScoredModel(model)
    with pytest.raises(ValueError, match="sliding window of 8"):
        scored(pack(groups_of(uneven_table), pack_length=64, micro_batch_tokens=512)[0])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 0.0), (torch.bfloat16, 0.05)])
def test_attention_on_the_cpu_is_sdpa_computed_in_float32(dtype, within):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 9, 16).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(~torch.ones(9, 9).bool().tril(), -torch.inf)
    layer = torch.nn.Module()
    results = []
    for attend in (sdpa_in_float32, sdpa_attention_forward):
        out, _ = attend(layer, query, key, value, mask)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=within, atol=within)
