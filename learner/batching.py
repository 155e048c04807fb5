"""How a step's groups become updates and micro-batches: by rules that every rank computes alike.

So that no rank waits for another, ranks have the same number of micro-batches, and a token's share of an
update's loss counts the tokens and sequences of all ranks.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from learner.config import LearnerConfig
from learner.packing import Group, PackedBatch, pack, pad_batches, split_for_ranks, unpacked


@dataclass(frozen=True)
class Minibatch:
    """The groups of one optimizer update, and this rank's micro-batches of them."""

    groups: list[Group]
    batches: list[PackedBatch]


def make_batches(groups: list[Group], cfg: LearnerConfig) -> list[PackedBatch]:
    """Micro-batches as configured, without the responses' last tokens, which predict nothing."""
    if not cfg.packing:
        return unpacked(groups, micro_batch_tokens=cfg.micro_batch_tokens, keep_last=False)
    return pack(
        groups, pack_length=cfg.pack_length, micro_batch_tokens=cfg.micro_batch_tokens, keep_last=False
    )


def rank_batches(groups: list[Group], cfg: LearnerConfig, rank: int, ranks: int) -> list[PackedBatch]:
    """One rank's micro-batches, as many as on every other rank."""
    packed = [make_batches(share, cfg) for share in split_for_ranks(groups, ranks)]
    return pad_batches(packed[rank], max(len(p) for p in packed))


def minibatches(
    groups: list[Group],
    batches: list[PackedBatch],
    cfg: LearnerConfig,
    *,
    rank: int,
    ranks: int,
    seed: list[int],
) -> list[Minibatch]:
    """The step's updates: every group once an epoch, in an order that depends only on `seed` and epoch.

    `batches` are this rank's of all groups. Raises ValueError when there are fewer groups than minibatches.
    """
    if cfg.minibatches == 1:
        return [Minibatch(groups, batches)] * cfg.epochs
    if len(groups) < cfg.minibatches:
        raise ValueError(f"{len(groups)} groups cannot fill {cfg.minibatches} minibatches; lower minibatches")
    result = []
    for epoch in range(cfg.epochs):
        order = np.random.default_rng([*seed, epoch]).permutation(len(groups))
        for part in np.array_split(order, cfg.minibatches):
            chosen = [groups[i] for i in sorted(part)]
            result.append(Minibatch(chosen, rank_batches(chosen, cfg, rank, ranks)))
    return result


def token_shares(
    groups: list[Group],
    offsets: torch.Tensor,
    normalise: Literal["token", "sequence", "constant"],
    constant_length: int | None = None,
) -> torch.Tensor:
    """Each token's share of an update's loss, in the step's flat order: 1 / tokens of `groups`, 1 / (their
    sequences x the sequence's length), or 1 / (sequences x `constant_length`) (Liu et al. 2025,
    "Understanding R1-Zero-like training", sec. 3.2).

    The first two add up to one over the tokens of `groups`. Raises ValueError for "constant" without a
    length.
    """
    rows = torch.from_numpy(np.concatenate([group.rows for group in groups]))
    lengths = offsets.diff()
    sequences = int((lengths[rows] > 0).sum())
    if normalise == "token":
        share = torch.full(lengths.shape, 1.0 / int(lengths[rows].sum()))
    elif normalise == "sequence":
        share = 1.0 / (lengths.clamp_min(1) * sequences)
    elif constant_length is None:
        raise ValueError('normalise = "constant" needs constant_length, the length every sequence counts for')
    else:
        share = torch.full(lengths.shape, 1.0 / (sequences * constant_length))
    return torch.repeat_interleave(share.float(), lengths)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: list[PackedBatch], tokens: int, device: torch.device, outputs: int
) -> torch.Tensor:
    """A model's per-token outputs in flat order on CPU, [outputs, tokens], gathered from all ranks.

    `model` maps a packed batch to a tuple of `outputs` tensors [N]. Collective.
    """
    model.eval()
    flat = torch.zeros(outputs, tokens, device=device)
    for batch in batches:
        for row, values in zip(flat, model(batch.to(device)), strict=True):
            batch.scatter(values, row)
    torch.distributed.all_reduce(flat)
    return flat.cpu()
