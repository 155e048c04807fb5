"""Policy losses as pure functions on flat arrays of response tokens, all [N].

Losses are weighted sums: `weight` carries one token's share of the step (1 / tokens of the step, or 1 /
(sequences x length)), so micro-batches and ranks add up to the step's mean whatever the split.
"""

from dataclasses import dataclass

import torch

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
    """Log-probability under the reference, when the KL is part of the loss."""


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


def ppo_clip(inputs: PolicyLossInputs, clip_low: float, clip_high: float) -> torch.Tensor:
    """Per-token loss -w min(r A, clip(r, 1 - low, 1 + high) A) with r = p / p_old (Schulman et al. 2017, eq.
    7; separate bounds as in DAPO, Yu et al. 2025, eq. 10)."""
    ratio = (inputs.logprob - inputs.old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -inputs.importance * torch.minimum(ratio * inputs.advantage, clipped * inputs.advantage)


def policy_loss(
    inputs: PolicyLossInputs,
    *,
    loss: str = "reinforce",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    entropy_coef: float = 0.0,
) -> LossOutput:
    """Policy gradient + kl_coef x KL - entropy_coef x entropy, summed with the tokens' weights.

    Raises ValueError for an unknown loss.
    """
    if loss == "reinforce":
        policy = reinforce(inputs)
    elif loss == "ppo_clip":
        policy = ppo_clip(inputs, clip_low, clip_high)
    else:
        raise ValueError(f'unknown loss {loss!r}; choose "reinforce" or "ppo_clip"')
    w = inputs.weight
    per_token = policy - entropy_coef * inputs.entropy if entropy_coef else policy
    sums: dict[str, torch.Tensor] = {}
    if inputs.reference_logprob is not None:
        kl = kl_estimate(inputs.logprob, inputs.reference_logprob, kl_estimator)  # type: ignore[arg-type]
        if kl_coef:
            per_token = per_token + kl_coef * kl
        sums["kl"] = (w * kl_estimate(inputs.logprob, inputs.reference_logprob, "k3")).sum()
    total = (w * per_token).sum()
    with torch.no_grad():
        log_ratio = inputs.logprob - inputs.old_logprob
        ratio = log_ratio.exp()
        clipped = ((ratio < 1 - clip_low) & (inputs.advantage < 0)) | (
            (ratio > 1 + clip_high) & (inputs.advantage > 0)
        )
        mismatch = (inputs.old_logprob - inputs.sampler_logprob).abs()
        real = (w > 0).to(ratio.dtype)
        sums |= {
            "loss": total,
            "policy_loss": (w * policy).sum(),
            "entropy": (w * inputs.entropy).sum(),
            "clip_fraction": (w * clipped).sum(),
            "ratio_mean": (w * ratio).sum(),
            "approx_kl": (w * (torch.expm1(log_ratio) - log_ratio)).sum(),
            "importance_mean": (w * inputs.importance).sum(),
            "mismatch_mean": (w * mismatch).sum(),
        }
        maxima = {
            "ratio_max": (real * ratio).max(),
            "mismatch_max": (real * mismatch).max(),
            "importance_max": (real * inputs.importance).max(),
        }
    return LossOutput(total, {k: v.detach() for k, v in sums.items()}, maxima)
