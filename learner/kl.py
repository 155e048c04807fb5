"""Per-token estimators of KL(policy || reference) from samples of the policy, and the control of its weight.

With r = p_ref(token) / p_policy(token) (Schulman, "Approximating KL Divergence", 2020):
k1 = -log r (unbiased, may be negative), k2 = (log r)^2 / 2 (low variance, biased),
k3 = r - 1 - log r (unbiased, never negative).
Differentiated as a loss on on-policy samples, k2 has the gradient of the KL in expectation, k3 one of its
reverse direction to first order, and k1 none.
"""

from typing import Literal

import torch


def kl_estimate(
    logprob: torch.Tensor, reference: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Estimate per token, shapes [N]; differentiable in `logprob`."""
    log_r = reference - logprob
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return 0.5 * log_r.square()
    return torch.expm1(log_r) - log_r


def adapted_coefficient(coefficient: float, kl: float, target: float, gain: float = 0.1) -> float:
    """Next weight of the KL after a step that measured `kl`: coefficient (1 + gain e) with
    e = clip(kl / target - 1, -0.2, 0.2) (Ziegler et al. 2019, sec. 2.2)."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + gain * error)
