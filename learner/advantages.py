"""From token rewards to advantages and importance weights, on flat arrays of a step's response tokens.

Tokens of trajectory i are `offsets[i]:offsets[i+1]`; empty trajectories are allowed.
"""

from typing import Literal

import torch


def discounted_returns(rewards: torch.Tensor, offsets: torch.Tensor, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma G_{t+1} within each trajectory, [N] (Sutton & Barto 2018, eq. 3.9)."""
    lengths = offsets.diff()
    if len(rewards) == 0:
        return rewards.clone()
    width = int(lengths.max())
    column = torch.arange(width)
    real = column < lengths[:, None]
    # Rows are aligned left and end in zeros, which add nothing to a return.
    table = torch.zeros(len(lengths), width, dtype=rewards.dtype)
    table[real] = rewards
    running = torch.zeros(len(lengths), dtype=rewards.dtype)
    for t in range(width - 1, -1, -1):
        running = table[:, t] + gamma * running
        table[:, t] = running
    return table[real]


def advantages(
    returns: torch.Tensor,
    offsets: torch.Tensor,
    groups: torch.Tensor,
    *,
    baseline: Literal["none", "batch", "group"],
    whiten: bool = False,
) -> torch.Tensor:
    """Returns [N] minus a baseline: nothing, or the mean over the step's ("batch") or the prompt's ("group")
    trajectories.

    That mean gives every trajectory the same weight, whatever its length: it averages each trajectory's mean
    return, so with one reward at the end and gamma = 1 it is the mean reward of GRPO without the division by
    a standard deviation (Liu et al. 2025, "Understanding R1-Zero-like training"). `groups` [trajectories] are
    integer ids. `whiten` centres and divides by the standard deviation over the step's tokens.
    """
    lengths = offsets.diff()
    trajectory = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    result = returns.clone()
    if baseline != "none" and len(returns):
        key = groups if baseline == "group" else torch.zeros_like(groups)
        _, key = torch.unique(key, return_inverse=True)
        share = (1.0 / lengths.clamp_min(1).to(returns.dtype))[trajectory]
        total = _sum_by(returns * share, key[trajectory])
        number = _sum_by(share, key[trajectory])
        result -= (total / number)[key[trajectory]]
    if whiten and len(result):
        result = (result - result.mean()) / (result.std(unbiased=False) + 1e-8)
    return result


def _sum_by(values: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.zeros(int(key.max()) + 1, dtype=values.dtype).index_add_(0, key, values)


def importance_weights(old: torch.Tensor, sampler: torch.Tensor, cap: float | None) -> torch.Tensor:
    """min(p_learner / p_sampler, cap) per token, detached; ones without a cap (Ionides 2008, "Truncated
    importance sampling")."""
    if cap is None:
        return torch.ones_like(old)
    return (old - sampler).detach().exp().clamp(max=cap)
