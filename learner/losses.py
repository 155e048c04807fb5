"""Policy losses as pure functions on flat arrays of response tokens, all [N].

Losses are weighted sums: `weight` carries one token's share of the step (1 / tokens of the step, or 1 /
(sequences x length)), so micro-batches and ranks add up to the step's mean whatever the split.
"""

from dataclasses import dataclass
from typing import get_args

import torch

from learner.config import PolicyLoss
from learner.kl import kl_estimate


@dataclass(frozen=True)
class PolicyLossInputs:
    """What a policy loss sees. Everything but `logprob` and `entropy` is constant."""

    logprob: torch.Tensor
    """Log-probability of the sampled token under the weights being trained."""
    entropy: torch.Tensor
    """Entropy of its distribution."""
    old_logprob: torch.Tensor
    """Log-probability under the learner's weights at the beginning of the step."""
    sampler_logprob: torch.Tensor
    """Log-probability that the sampler reported."""
    advantage: torch.Tensor
    importance: torch.Tensor
    """Truncated importance weight of learner over sampler."""
    weight: torch.Tensor
    """The token's share of the step; 0 in filler batches."""
    reference_logprob: torch.Tensor | None = None
    """Log-probability under the reference, when there is one."""
    trajectory: torch.Tensor | None = None
    """Number of the token's trajectory, all of whose tokens are here; only `gspo` reads it."""
    metric_weight: torch.Tensor | None = None
    """The token's share of the step's diagnostics, where it is not that of the loss."""


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's loss to differentiate and its diagnostics: over micro-batches and ranks, `loss` and
    `sums` add up and of `maxima` the largest counts."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


def reinforce(inputs: PolicyLossInputs) -> torch.Tensor:
    """Per-token loss -w A log p (Williams 1992, eq. 4), with importance weight w for samples of another
    policy."""
    return -inputs.importance * inputs.advantage * inputs.logprob


def ppo_clip(
    inputs: PolicyLossInputs, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> torch.Tensor:
    """Per-token loss -w min(r A, clip(r, 1 - low, 1 + high) A) with r = p / p_old (Schulman et al. 2017, eq.
    7; separate bounds as in DAPO, Yu et al. 2025, eq. 10). With `dual_clip` c, that minimum is at least c A
    where A < 0 (Ye et al. 2020, eq. 5)."""
    ratio = (inputs.logprob - inputs.old_logprob).exp()
    return -inputs.importance * _clipped_gain(ratio, inputs.advantage, clip_low, clip_high, dual_clip)


def gspo(inputs: PolicyLossInputs, clip_low: float, clip_high: float) -> torch.Tensor:
    """Per-token loss -w min(s A, clip(s, 1 - low, 1 + high) A) with the sequence's ratio s (Zheng et al.
    2025, eq. 5).

    In the gradient a token answers for its own part of s (GSPO-token, eq. 14), which with one advantage per
    sequence and a mean over each sequence's tokens is the gradient of s itself, and lets advantages differ
    by token. Raises ValueError without `trajectory`.
    """
    own = inputs.logprob - inputs.logprob.detach()
    ratio = sequence_ratio(inputs) * own.exp()
    return -inputs.importance * _clipped_gain(ratio, inputs.advantage, clip_low, clip_high, None)


@torch.no_grad()
def sequence_ratio(inputs: PolicyLossInputs) -> torch.Tensor:
    """Geometric mean of p / p_old over each token's sequence, [N] (Zheng et al. 2025, eq. 7)."""
    if inputs.trajectory is None:
        raise ValueError('loss = "gspo" needs the trajectory of each token')
    names, sequence = torch.unique(inputs.trajectory, return_inverse=True)
    log_ratio = inputs.logprob - inputs.old_logprob
    total = log_ratio.new_zeros(len(names)).index_add_(0, sequence, log_ratio)
    number = log_ratio.new_zeros(len(names)).index_add_(0, sequence, torch.ones_like(log_ratio))
    return (total / number).exp()[sequence]


def _clipped_gain(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> torch.Tensor:
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is None:
        return gain
    return torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)


def value_loss(
    value: torch.Tensor, old_value: torch.Tensor, target: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Per-token loss of a critic, max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2, all [N]
    (baselines' PPO2; Huang et al. 2022, "37 implementation details of PPO", no. 9). Without a clip
    (V - R)^2 / 2.
    """
    error = (value - target).square()
    if clip is not None:
        bounded = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (bounded - target).square())
    return 0.5 * error


def policy_loss(
    inputs: PolicyLossInputs,
    *,
    loss: PolicyLoss = "reinforce",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    entropy_coef: float = 0.0,
) -> LossOutput:
    """Policy gradient + kl_coef x KL - entropy_coef x entropy, summed with the tokens' weights. Estimates of
    the KL carry the importance weights too: it is the learner's, and the tokens are the sampler's.

    Raises ValueError for an unknown loss.
    """
    if loss == "reinforce":
        policy = reinforce(inputs)
    elif loss == "ppo_clip":
        policy = ppo_clip(inputs, clip_low, clip_high, dual_clip)
    elif loss == "gspo":
        policy = gspo(inputs, clip_low, clip_high)
    else:
        raise ValueError(f"unknown loss {loss!r}; choose one of {', '.join(get_args(PolicyLoss))}")
    w = inputs.weight
    m = w if inputs.metric_weight is None else inputs.metric_weight
    per_token = policy - entropy_coef * inputs.entropy if entropy_coef else policy
    sums: dict[str, torch.Tensor] = {}
    if inputs.reference_logprob is not None:
        pair = inputs.logprob, inputs.reference_logprob
        if kl_coef:
            kl = kl_estimate(*pair, kl_estimator)  # type: ignore[arg-type]
            per_token = per_token + kl_coef * inputs.importance * kl
        sums["kl"] = (m * inputs.importance * kl_estimate(*pair, "k3")).sum()
    total = (w * per_token).sum()
    with torch.no_grad():
        log_ratio = inputs.logprob - inputs.old_logprob
        ratio = sequence_ratio(inputs) if loss == "gspo" else log_ratio.exp()
        highest = float("inf") if dual_clip is None else dual_clip
        clipped = ((inputs.advantage < 0) & ((ratio < 1 - clip_low) | (ratio > highest))) | (
            (inputs.advantage > 0) & (ratio > 1 + clip_high)
        )
        mismatch = (inputs.old_logprob - inputs.sampler_logprob).abs()
        real = (w > 0).to(ratio.dtype)
        sums |= {
            "loss": total,
            "policy_loss": (w * policy).sum(),
            "entropy": (m * inputs.entropy).sum(),
            "clip_fraction": (m * clipped).sum(),
            "ratio_mean": (m * ratio).sum(),
            "approx_kl": (m * (torch.expm1(log_ratio) - log_ratio)).sum(),
            "importance_mean": (m * inputs.importance).sum(),
            "masked_fraction": (m * (inputs.importance == 0)).sum(),
            "mismatch_mean": (m * mismatch).sum(),
        }
        maxima = {
            "ratio_max": (real * ratio).max(),
            "mismatch_max": (real * mismatch).max(),
            "importance_max": (real * inputs.importance).max(),
        }
    return LossOutput(total, {k: v.detach() for k, v in sums.items()}, maxima)
