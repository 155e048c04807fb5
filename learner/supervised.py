"""Supervised fine-tuning: one step on examples, token rows of a prompt and the answer it should get.

The one loss of this package that is not made of rewards; `run.method = "sft"` alone asks for it. Examples
are rows of `prompt_ids` and `response_ids` that a caller passes in, packed, split over ranks and normalised
by the step's own token count like a step of the policy gradient, on the same engine.
"""

import time

import pyarrow as pa
import torch
from torch import nn

from learner.batching import rank_batches, token_shares
from learner.config import LearnerConfig
from learner.engine import TrainableModel
from learner.losses import LossOutput
from learner.packing import PackedBatch
from learner.samples import Samples


def cross_entropy(logprob: torch.Tensor, entropy: torch.Tensor, weight: torch.Tensor) -> LossOutput:
    """-sum_t w_t log p(y_t | x, y_<t): the negative log-likelihood of the answers, all inputs [N].

    With w = 1 / tokens of the step it is the mean over the step's answer tokens, the end token included,
    once the parts of all micro-batches and ranks are added up.

    Args:
        logprob: of the answer's tokens under the weights being trained.
        entropy: of their distributions; a diagnostic only.
        weight: each token's share of the step; 0 in filler batches.
    """
    loss = -(weight * logprob).sum()
    return LossOutput(loss, {"nll": loss.detach(), "entropy": (weight * entropy.detach()).sum()}, {})


def supervised_step(
    trainable: TrainableModel, cfg: LearnerConfig, table: pa.Table, lr_factor: float = 1.0
) -> dict[str, float]:
    """One optimizer update on a table of examples, the same on every rank.

    Reads `prompt_ids`, `response_ids` and, where present, `group_id` (rows of one group share their prompt).
    `lr_factor` scales this step's learning rate. Returns nll and entropy before the update (nats per token),
    grad_norm, lr, counts and seconds. Raises ValueError for a table without an answer token.
    """
    began = time.perf_counter()
    samples = Samples.from_table(table)
    if samples.tokens == 0:
        raise ValueError("the examples have no answer token to learn from")
    share = token_shares(samples.groups, samples.offsets, "token")
    batches = rank_batches(samples.groups, cfg, trainable.rank, trainable.ranks)
    chosen = [b.with_columns(share=share).to(trainable.device) for b in batches]
    metrics = trainable.step(chosen, _loss, lr_factor=lr_factor)
    padded = sum(b.input_ids.numel() for b in batches if b.weight.any())
    totals = trainable.reduce({"tokens_computed": torch.tensor(float(padded))}, "sum")
    return {
        **metrics,
        **totals,
        "tokens_response": float(samples.tokens),
        "response_length": samples.tokens / table.num_rows,
        "micro_batches": float(len(batches)),
        "seconds_step": time.perf_counter() - began,
    }


def _loss(model: nn.Module, batch: PackedBatch) -> LossOutput:
    logprob, entropy = model(batch)
    return cross_entropy(logprob, entropy, batch.columns["share"] * batch.weight)
