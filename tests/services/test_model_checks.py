"""Models that a run could not use are refused by their configuration alone, with a remedy that is true."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rollout.data import DataError
from rollout.templates import load_tokenizer
from services.config import load
from services.model_checks import check_other_models, check_policy

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TYPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 40},
    "qwen2": LLAMA | {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": LLAMA | {"sliding_window": 256},
    "gemma3_text": LLAMA | {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": LLAMA | {"logit_scale": 0.1},
    "granite": LLAMA | {"logits_scaling": 8.0},
    "qwen3_moe": LLAMA | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "jamba": LLAMA | {"num_experts": 2},
    "bert": LLAMA,
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 32},
    "roberta": LLAMA | {"max_position_embeddings": 66, "pad_token_id": 1},
}
ARCHITECTURES = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path):
    """A folder with a model's configuration and a tokenizer of 380 tokens or so, without weights."""

    def made(kind: str, **fields: Any) -> Path:
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in tiny_model.glob("tokenizer*"):
            shutil.copy(file, folder)
        said = {"model_type": kind, "vocab_size": 400, "max_position_embeddings": 256}
        said |= {"architectures": [ARCHITECTURES.get(kind, "ForCausalLM")]}
        said |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0} | TYPES.get(kind, {}) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
        return folder

    return made


def check(model: Path, *words: str) -> None:
    limits = ["--data.max_prompt_tokens=32", "--sampling.max_tokens=16"]
    config = load(None, [f"--policy.model={model}", "--data.demonstrations=d", *limits, *words])
    check_policy(config, load_tokenizer(config.policy))
    check_other_models(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_usable_model_passes(make, kind):
    check(make(kind))
    check(make(kind), "--learner.lora.rank=4", "--discriminator.lora.rank=4", "--discriminator.level=token")


@pytest.mark.parametrize(
    ("kind", "fields", "words", "message"),
    [
        ("llama", {"model_type": None}, [], "config.json has no model_type"),
        ("nonesuch", {}, [], "config.json has model_type 'nonesuch'"),
        ("t5", {}, [], "'t5' is not a causal language model"),
        ("bert", {}, [], "attends in both directions"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, [], "quantised"),
        ("llama", {"vocab_size": 300}, [], r"vocabulary mismatch: .*embedding 300 rows"),
        (
            "llama",
            {"max_position_embeddings": 40},
            [],
            r"= 48 is more than .*\(40\).* at most 24",
        ),
        ("llama", {}, ["--rollout.max_model_len=300"], r"rollout\.max_model_len = 300 .*\(256\)"),
        ("gemma2", {}, [], "gemma2 transforms its logits"),
        ("cohere", {}, [], "cohere transforms its logits"),
        ("granite", {}, [], "granite transforms its logits"),
        ("gpt2", {}, ["--learner.lora.rank=2", '--learner.lora.target_modules=["wte"]'], r"^learner\.lora\."),
        (
            "gpt2",
            {},
            ["--discriminator.lora.rank=2", '--discriminator.lora.target_modules=["q_proj"]'],
            r"^discriminator\.lora\.target_modules: GPT2Model has no module 'q_proj'",
        ),
        (
            "qwen3_moe",
            {},
            ["--learner.lora.rank=2"],
            r"^learner\.lora\..*set it to \[.q_proj",
        ),
    ],
)
def test_an_unusable_model_is_refused_before_anything_starts(make, kind, fields, words, message):
    with pytest.raises(DataError, match=message) as refusal:
        check(make(kind, **fields), *words)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mistral", r"= 48 is more than the model's sliding window of 40"),
        ("qwen2", r"= 48 is more than the model's sliding window of 40"),
        ("gemma3_text", r"= 48 is more than the model's sliding window of 40"),
        ("gpt_neo", "not full attention throughout"),
        ("bloom", "takes no position ids"),
        ("mpt", "takes no position ids"),
        ("mamba", "takes no position ids"),
        ("jamba", "linear_attention"),
    ],
)
def test_what_cannot_be_packed_names_the_remedy_and_the_remedy_is_true(make, kind, message):
    model, llama = make(kind), make("llama")
    with pytest.raises(DataError, match=r"^policy\.model.*" + message + r".*packing = false"):
        check(model, f"--discriminator.model={llama}")
    check(model, f"--discriminator.model={llama}", "--learner.packing=false")
    with pytest.raises(
        DataError, match=r"^discriminator\.model.*" + message.partition("=")[0] + ".*packing = false"
    ):
        check(llama, f"--discriminator.model={model}")
    check(llama, f"--discriminator.model={model}", "--discriminator.packing=false")


def test_positions_behind_the_padding_index_are_counted(make, tiny_model):
    from discriminator.config import DiscriminatorConfig
    from discriminator.model import load_canonicaliser

    model = make("roberta")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    check(make("llama"), f"--discriminator.model={model}")
    canonical = load_canonicaliser(DiscriminatorConfig(), str(model))
    assert canonical.max_prompt + canonical.max_response == 64


def test_a_bidirectional_discriminator_judges_no_prefixes(make):
    with pytest.raises(DataError, match=r'discriminator\.model.*bidirectional.*level = "sequence"'):
        check(make("llama"), f"--discriminator.model={make('bert')}", "--discriminator.level=token")
