"""The base policy: a small Llama trained to the base distribution, and what it is measured to be.

Training sentences are drawn fresh, so there is nothing to over-fit: the loss approaches the entropy of the
spelled language. Head size 32 is one that vLLM's CPU attention has.

The second head does not depend on the first in the base language, and a small network learns to forget the
first before it writes the second: with a library's usual initialisation the gradients of log p(b0 | first
head) for two first heads have a cosine of .99. Whatever one mode teaches then moves all modes alike:
supervised training loses ground for a hundred steps before it finds the pairs, and a policy gradient loses
the modes for good. Wide embeddings and a wide output layer of its own leave that cosine at .65; a large model
tells its contexts apart too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.known_modes.language import (
    BASE,
    BEGIN,
    END,
    EXPERT,
    LONGEST,
    Distribution,
    Sentence,
    parse_text,
)
from examples.known_modes.measures import (
    length_tv,
    mode_frequencies,
    mode_tv,
    modes_kept,
    slot_tv,
    valid_rate,
)
from examples.known_modes.tokenizer import CONTEXT, Form, build_tokenizer, spell, vocabulary_size

if TYPE_CHECKING:
    import torch

HIDDEN, LAYERS, HEADS = 64, 2, 2
EMBEDDING_STD, OUTPUT_STD = 1.0, 0.7
_IGNORED = -100


@dataclass(frozen=True)
class BaseTraining:
    """How the base is trained; with the seed and the machine this fixes its weights."""

    form: Form = "plain"
    split: float = 0.5
    """Form "merged": share of the pairs that the base spells as two tokens."""
    seed: int = 0
    steps: int = 2000
    batch: int = 128
    lr: float = 2e-3
    threads: int = 1


def new_model(form: Form, seed: int) -> Any:
    """An untrained LlamaForCausalLM of 86,000 parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    # No padding token: torch would never move the embedding of token 0, and that is the end token too.
    config = LlamaConfig(
        vocab_size=vocabulary_size(form),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(model.lm_head.weight, std=OUTPUT_STD)
    return model


def train_base(options: BaseTraining, say: Callable[[str], None] = print) -> tuple[Any, float]:
    """Train a new model on base sentences; returns it and the mean loss of the last tenth, nats per token.

    AdamW with linear warm-up over a twentieth of the steps and a cosine to zero.
    """
    import torch

    torch.set_num_threads(options.threads)
    model = new_model(options.form, options.seed)
    rng = np.random.default_rng([options.seed, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, options.steps // 20)
    losses = []
    for step in range(options.steps):
        done = (step - warm) / max(1, options.steps - warm)
        scale = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * scale
        drawn = BASE.sample(options.batch, rng)
        rows = [spell(sentence, options.form, rng, options.split) for sentence in drawn]
        loss = _token_losses(model, rows).sum() / sum(map(len, rows))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            say(f"  step {step + 1}: {np.mean(losses[-100:]):.4f} nats per token")
    return model.eval(), float(np.mean(losses[-max(1, options.steps // 10) :]))


def save_base(model: Any, form: Form, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    build_tokenizer(form).save_pretrained(folder)


def sample_tokens(model: Any, count: int, seed: int) -> list[list[int]]:
    """`count` responses of a model to the begin token, end token included where it came in time."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), BEGIN)
    ended = torch.zeros(count, dtype=torch.bool)
    with torch.inference_mode():
        for _ in range(LONGEST):
            probabilities = model(input_ids=ids).logits[:, -1].float().softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            ids = torch.cat([ids, token.masked_fill(ended, END)[:, None]], 1)
            ended |= token == END
            if ended.all():
                break
    rows = []
    for row in ids[:, 1:].tolist():
        rows.append(row[: row.index(END) + 1] if END in row else row)
    return rows


def sentence_nll(model: Any, sentences: list[Sentence], form: Form) -> float:
    """Mean negative log-likelihood of sentences in their canonical spelling, nats per sentence."""
    import torch

    with torch.inference_mode():
        return float(_token_losses(model, [spell(s, form) for s in sentences]).sum()) / len(sentences)


def validate(model: Any, form: Form, count: int = 4096, seed: int = 0) -> dict[str, float]:
    """How far a model is from the base and from the expert, on `count` samples of each."""
    tokenizer = build_tokenizer(form)
    rows = sample_tokens(model, count, seed)
    sentences = [parse_text(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    frequencies = mode_frequencies(sentences)

    def gap(target: Distribution) -> float:
        fresh = target.sample(count, np.random.default_rng([seed, 1]))
        return sentence_nll(model, fresh, form) + float(
            np.mean([math.log(target.probability(s)) for s in fresh])
        )

    return {
        "valid": valid_rate(sentences),
        "base_mode_tv": mode_tv(frequencies, BASE),
        "base_slot_tv": slot_tv(sentences, BASE),
        "base_length_tv": length_tv(sentences, BASE),
        "base_nll_gap": gap(BASE),
        "expert_mode_tv": mode_tv(frequencies, EXPERT),
        "expert_modes_kept": float(modes_kept(frequencies, EXPERT)),
        "expert_nll_gap": gap(EXPERT),
        "canonical_rate": _canonical_rate(rows, tokenizer),
    }


def _canonical_rate(rows: list[list[int]], tokenizer: Any) -> float:
    """Share of responses whose text encodes to the sampled ids."""
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum([*ids, END] == row for ids, row in zip(again, rows, strict=True)) / len(rows)


def _token_losses(model: Any, rows: list[list[int]]) -> "torch.Tensor":
    """Cross-entropy of every token of every row after the begin token, flat; padding is left out."""
    import torch

    width = max(map(len, rows))
    padded = torch.tensor([row + [_IGNORED] * (width - len(row)) for row in rows])
    inputs = torch.cat([torch.full((len(rows), 1), BEGIN), padded[:, :-1].clamp(min=END)], 1)
    logits = model(input_ids=inputs).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), padded.flatten(), ignore_index=_IGNORED, reduction="none"
    )
