"""Every kind of attention that the checks let through is computed as transformers computes it by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from learner.attention import ON_CPU, attention_implementation, longest_packable
from learner.logprobs import ScoredModel
from learner.packing import make_groups, pack, unpacked

PROMPT = np.arange(3, 12)
RESPONSES = [np.arange(20, 27), np.arange(30, 41), np.arange(40, 44)]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "head_dim": 8,
    "rotary_dim": 8,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "word_embed_proj_dim": 32,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
}
"""Sizes by the names that configurations use; each takes those that it has."""


def tiny(kind: str, **fields: Any) -> PreTrainedModel:
    """A random model of a type, with weights large enough for attention to matter."""
    known = AutoConfig.for_model(kind).get_text_config()
    sizes = {name: size for name, size in SMALL.items() if getattr(known, name, None) is not None}
    if kind == "falcon":
        del sizes["head_dim"]  # a property of the others
    if kind == "gpt_neo":
        sizes["attention_types"] = [[["global", "local"], 2]]
    config = type(known)(**sizes | {"pad_token_id": 0} | fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@torch.no_grad()
def by_transformers(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities of all response tokens, a response at a time, without mask or padding."""
    rows = []
    for response in RESPONSES:
        ids = torch.tensor(np.concatenate([PROMPT, response]))[None]
        logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
        rows.append(logprobs[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0])
    return torch.cat(rows)


@torch.no_grad()
def by_the_learner(model: PreTrainedModel, packing: bool) -> torch.Tensor:
    empty = type(model)._from_config(model.config, attn_implementation="eager")
    implementation = attention_implementation("cpu", empty)
    loaded = AutoModelForCausalLM.from_config(model.config, attn_implementation=implementation).eval()
    loaded.load_state_dict(model.state_dict())
    groups = make_groups([PROMPT] * len(RESPONSES), RESPONSES, [0] * len(RESPONSES))
    batches = (
        pack(groups, pack_length=64, micro_batch_tokens=512)
        if packing
        else unpacked(groups, micro_batch_tokens=512)
    )
    flat = torch.zeros(sum(map(len, RESPONSES)))
    scored = ScoredModel(loaded, packing=packing)
    for batch in batches:
        batch.scatter(scored(batch)[0], flat)
    return flat


WINDOW = {"sliding_window": 6}
KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "any"),
    ("gpt2", {}, "any"),
    ("gpt_neox", {}, "any"),
    ("opt", {}, "any"),
    ("falcon", {}, "any"),
    ("gptj", {}, "any"),
    ("olmoe", {}, "any"),
    ("stablelm", {}, "any"),
    ("qwen3_moe", {}, "any"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 4}, "any"),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 5.0}, "any"),
    ("mistral", WINDOW, "unpacked"),
    ("gemma3_text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}, "unpacked"),
    ("qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 2}, "unpacked"),
    ("gpt_neo", {"window_size": 6, "attention_types": [[["global", "local"], 2]]}, "unpacked"),
    ("bloom", {}, "unpacked"),
    ("mpt", {}, "unpacked"),
    ("mamba", {}, "unpacked"),
    ("gemma2", {"final_logit_softcapping": 3.0}, "refused"),
    ("granite", {"logits_scaling": 8.0}, "refused"),
    ("cohere", {}, "refused"),
    ("bert", {}, "refused"),
]


@pytest.mark.parametrize(("kind", "fields", "how"), KINDS, ids=[f"{k}-{how}" for k, _, how in KINDS])
def test_likelihoods_are_those_of_transformers_or_refused(kind, fields, how):
    judge(tiny(kind, **fields), how)


def judge(model: PreTrainedModel, how: str = "") -> None:
    """Compare each form that is not refused; with `how` also that the right ones are."""
    exact = by_transformers(model)
    forms = []
    for packing in (True, False):
        try:
            if packing and (limit := longest_packable(model.config, model.get_decoder())) is not None:
                longest = len(PROMPT) + max(map(len, RESPONSES))
                if limit < longest:
                    raise ValueError(f"sliding window of {limit}")
            found = by_the_learner(model, packing)
        except ValueError:
            continue
        forms.append(packing)
        torch.testing.assert_close(found, exact, atol=2e-4, rtol=1e-4, msg=f"packing={packing}")
    if how:
        assert forms == {"any": [True, False], "unpacked": [False], "refused": []}[how]


UNTRIED = {"blt", "phi4_multimodal", "cpmant", "openai-gpt", "xlm"}
UNMADE = (
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    StrictDataclassError,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_so_are_those_of_every_class_that_can_be_made_small(kind):
    if kind in UNTRIED:
        pytest.skip("minutes to make, or nothing that vLLM runs")
    try:
        model = tiny(kind)
        by_transformers(model)
    except (*UNMADE, StrictDataclassError) as error:
        pytest.skip(f"not by these sizes: {error}")
    judge(model)


@pytest.mark.parametrize(
    ("kind", "device", "twice", "expected"),
    [
        ("llama", "cuda", False, "flex_attention"),
        ("llama", "cpu", False, ON_CPU),
        ("llama", "cuda", True, "sdpa"),
        ("gpt2", "cuda", False, "sdpa"),
        ("gpt2", "cpu", False, ON_CPU),
        ("olmoe", "cuda", False, "sdpa"),
        ("stablelm", "cuda", False, "sdpa"),
        ("falcon", "cuda", False, "sdpa"),
        ("falcon", "cpu", False, "sdpa"),
        ("gptj", "cuda", False, "eager"),
        ("gptj", "cpu", False, "eager"),
        ("gemma2", "cuda", False, "flex_attention"),
        ("gemma2", "cpu", False, "eager"),
        ("gpt_oss", "cuda", False, "flex_attention"),
        ("gpt_oss", "cpu", False, "eager"),
    ],
)
def test_attention_is_one_that_the_class_has(kind, device, twice, expected):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=1))
    assert attention_implementation(device, model, twice=twice) == expected
    if expected != ON_CPU:
        assert model.get_correct_attn_implementation(expected) == expected
