"""Fixtures shared by all tests: a tiny causal LM with a byte-level tokenizer, made on the spot, and tiny
demonstrations.
"""

import json
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that runs them in the background has the tests and their children ignore the Ctrl-C that some send.
signal.signal(signal.SIGINT, signal.default_int_handler)

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "the cat sat on the mat and the dog lay by the door",
    "a small tool that reads mail and prints the news of the day",
    "she sells sea shells; naïve façade — 東京 and Größe",
    "write one line about the package: a library for reading images",
]


def build_tiny_model(folder: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0) -> Path:
    """Write a random Llama (vocab ~380, head size 32, context 256) with tokenizer and chat template to
    `folder`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", EOS, "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token="<|pad|>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL with 160 demonstrations: prompt "say <noun> <i>", response "the <noun> sat on the mat"."""
    nouns = ["cat", "dog", "door", "mail", "tool", "mat", "news", "day"]
    path = tmp_path_factory.mktemp("data") / "demonstrations.jsonl"
    with path.open("w") as file:
        for i in range(160):
            noun = nouns[i % len(nouns)]
            row = {"prompt": f"say {noun} {i}: ", "response": f"the {noun} sat on the mat"}
            file.write(json.dumps(row) + "\n")
    return path
