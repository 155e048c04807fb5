"""Responses drawn inside the learner, token by token with a key-value cache, by the Gumbel-max rule.

Token t of sample i is argmax(logits / temperature + noise) with the noise of `learner.gumbel.gumbel_noise`
for (seed, step, i, t), so what is drawn does not depend on what else is in the batch, and a later pass can
ask for the very same noise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from learner.gumbel import gumbel_noise
from learner.logprobs import ScoredModel

STEPWISE = "sdpa"
"""Attention for one new token at a time, whatever packed rows run with."""


@dataclass(frozen=True)
class Drawn:
    """One response; `ended` tells whether its last token is an end token (else the limit cut it)."""

    ids: np.ndarray
    ended: bool


@torch.no_grad()
def draw_responses(
    model: ScoredModel,
    prompts: Sequence[tuple[int, np.ndarray]],
    *,
    samples: int,
    max_tokens: int,
    end_ids: frozenset[int],
    seed: tuple[int, int],
    budget: int,
) -> list[list[Drawn]]:
    """`samples` responses to each prompt, at the model's own sampling temperature.

    Args:
        model: whole weights on this rank; put into evaluation mode.
        prompts: (number, token ids); sample j of prompt number n is drawn with the noise of
            n * samples + j.
        samples: responses to a prompt.
        max_tokens: most tokens of a response, its end token included.
        end_ids: tokens that end a response.
        seed: run seed and step.
        budget: most tokens, padding included, in the cache at one time (a single prompt's samples still run).
    """
    model.eval()
    longest = max((len(ids) for _, ids in prompts), default=0)
    together = max(1, budget // (samples * (longest + max_tokens)))
    drawn: list[list[Drawn]] = []
    with _stepwise_attention(model):
        for begin in range(0, len(prompts), together):
            some = prompts[begin : begin + together]
            numbers = [number * samples + j for number, _ in some for j in range(samples)]
            tokens = _decode(
                model, [ids for _, ids in some], samples, numbers, max_tokens, end_ids, seed
            ).tolist()
            rows = [_until_end(row, end_ids) for row in tokens]
            drawn += [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return drawn


def _decode(
    model: ScoredModel,
    prompts: list[np.ndarray],
    samples: int,
    numbers: list[int],
    max_tokens: int,
    end_ids: frozenset[int],
    seed: tuple[int, int],
) -> Tensor:
    """Tokens [B, t <= max_tokens] of B = prompts x samples rows; what follows a row's end means nothing."""
    body: Any = model.model.get_decoder()
    device = model.head.weight.device
    ids, mask = _left_padded(prompts, device)
    # A prompt is read once; its samples share what it left in the cache until they write to it.
    out = body(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True)
    cache = out.past_key_values
    cache.batch_repeat_interleave(samples)
    mask = mask.repeat_interleave(samples, 0)
    states = out.last_hidden_state[:, -1].repeat_interleave(samples, 0)
    ends = torch.tensor(sorted(end_ids), device=device)
    open_rows = torch.ones(len(numbers), dtype=torch.bool, device=device)
    drawn: list[Tensor] = []
    while True:
        logits = linear(states, model.head.weight, model.head.bias).float() / model.temperature
        for row in open_rows.nonzero()[:, 0].tolist():
            key = (*seed, numbers[row], len(drawn))
            logits[row] += gumbel_noise(key, logits.shape[1], device)
        drawn.append(logits.argmax(-1))
        open_rows &= ~torch.isin(drawn[-1], ends)
        if len(drawn) == max_tokens or not open_rows.any():
            return torch.stack(drawn, dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        states = body(
            input_ids=drawn[-1][:, None],
            attention_mask=mask,
            position_ids=_positions(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


def _left_padded(prompts: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts [B, P], padded in front so that all end together, and their mask."""
    longest = max(len(ids) for ids in prompts)
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _until_end(tokens: list[int], end_ids: frozenset[int]) -> Drawn:
    for place, token in enumerate(tokens):
        if token in end_ids:
            return Drawn(np.array(tokens[: place + 1]), True)
    return Drawn(np.array(tokens), False)


@contextmanager
def _stepwise_attention(model: ScoredModel) -> Iterator[None]:
    """Within this block the model attends with `STEPWISE`: kernels for packed rows compile for each
    length."""
    config: Any = model.model.get_decoder().config
    packed = config._attn_implementation
    config._attn_implementation = STEPWISE
    try:
        yield
    finally:
        config._attn_implementation = packed
