"""From token rewards to advantages and importance weights, on flat arrays of a step's response tokens.

Tokens of trajectory i are `offsets[i]:offsets[i+1]`; empty trajectories are allowed. Everything here sees the
whole step on every rank, so no advantage depends on how the step is split.

Estimators were published for one reward per response. Here a trajectory's score R_i is the mean of its
tokens' returns, which is that reward when it comes at the end and gamma = 1; a token's advantage is its own
return set against the scores of the prompt's group.
"""

from typing import Literal, get_args

import torch

from learner.config import Advantage


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


def going_on(rewards: torch.Tensor, offsets: torch.Tensor, gamma: float, last: torch.Tensor) -> torch.Tensor:
    """Rewards [N] of responses whose last judged reward is earned again for ever: last[i] gamma / (1 - gamma)
    beside what trajectory i's last token has. `last` [trajectories] is mostly that token's own reward; not
    where it completes several judged prefixes, or none.

    The absorbing state of Kostrikov et al. 2019 ("Discriminator-Actor-Critic", sec. 4.1). A return that ends
    with the response is larger the more tokens follow where rewards are positive, and smaller where they are
    negative, whatever the tokens: it pays for not ending, or for ending. So continued, equal rewards make
    equal returns at any length. Raises ValueError for gamma = 1, where the sum has no bound.
    """
    if gamma >= 1:
        raise ValueError("a reward that goes on for ever needs gamma < 1")
    result = rewards.clone()
    some = offsets.diff() > 0
    result[offsets[1:][some] - 1] += last[some] * (gamma / (1 - gamma))
    return result


def undiscounted(whole: torch.Tensor, offsets: torch.Tensor, gamma: float) -> torch.Tensor:
    """Rewards [N] whose return is whole[i] at every token of trajectory i, for any gamma: r_T = R at the last
    token and r_t = (1 - gamma) R before, since (1 - gamma) (1 + gamma + ... + gamma^(T-t-1)) + gamma^(T-t) =
    1. What a response earns as a whole is every token's, however near the discount makes the discriminator's
    rewards.
    """
    lengths = offsets.diff()
    result = torch.repeat_interleave(whole * (1 - gamma), lengths)
    result[offsets[1:][lengths > 0] - 1] = whole[lengths > 0]
    return result


def paid(
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    gamma: float,
    *,
    last: torch.Tensor | None = None,
    whole: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token rewards [N] as the policy is paid them: the discriminator's, `going_on` where there is a `last`,
    and beside them what a response earns as a `whole`, `undiscounted`."""
    if last is not None:
        rewards = going_on(rewards, offsets, gamma, last)
    if whole is not None:
        rewards = rewards + undiscounted(whole, offsets, gamma)
    return rewards


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
    return whitened(result) if whiten else result


FLAT_STD = 1e-6
"""Values with less spread than this are all the same: scaling does not blow up their rounding noise."""


def whitened(values: torch.Tensor) -> torch.Tensor:
    """Values [N] centred and divided by their standard deviation; only centred where that is nothing. Of
    returns over all tokens of a step, with the KL in the rewards, the advantage of REINFORCE++ (Hu et al.
    2025, arXiv 2501.03262).
    """
    if len(values) == 0:
        return values.clone()
    exact = values.double()
    std = exact.std(unbiased=False)
    return ((exact - exact.mean()) / (std if std > FLAT_STD else 1.0)).to(values.dtype)


def leave_one_out(returns: torch.Tensor, offsets: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """RLOO: G_t - mean of R_j over the group's other trajectories, [N] (Ahmadian et al. 2024, "Back to
    Basics").

    The only trajectory with tokens of its group has nobody to be compared with: its advantage is zero.
    """
    score, number, key, trajectory = _group_scores(returns, offsets, groups)
    others = (_sum_by(score, key)[key] - score) / (number - 1).clamp_min(1)
    compared = (number > 1).double()
    return ((returns.double() - others[trajectory]) * compared[trajectory]).to(returns.dtype)


def group_standardised(returns: torch.Tensor, offsets: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """GRPO: (G_t - mean of the group's R) / standard deviation in the group, [N] (Shao et al. 2024,
    "DeepSeekMath", sec. 4.1.2).

    The spread is that of the tokens' returns around the mean, in which every trajectory weighs the same and
    the variance divides by trajectories - 1: of returns that are constant within trajectories, the standard
    deviation of R. A group without spread, or with one trajectory that has tokens, gets zero.
    """
    score, number, key, trajectory = _group_scores(returns, offsets, groups)
    mean = _sum_by(score, key)[key] / number.clamp_min(1)
    apart = returns.double() - mean[trajectory]
    lengths = offsets.diff().clamp_min(1)
    squares = torch.zeros_like(score).index_add_(0, trajectory, apart.square()) / lengths
    std = (_sum_by(squares, key)[key] / (number - 1).clamp_min(1)).sqrt()
    scale = torch.where((number > 1) & (std > FLAT_STD), 1.0 / (std + 1e-6), 0.0)
    return (apart * scale[trajectory]).to(returns.dtype)


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """GAE: A_t = sum_k (gamma lam)^k d_{t+k}, d_t = r_t + gamma V_{t+1} - V_t, [N] (Schulman et al. 2016, eq.
    16).

    `values` [N] are the critic's, of the state before each token; a response ends its episode, V = 0.
    """
    following = torch.zeros_like(values)
    following[:-1] = values[1:]
    last = offsets[1:][offsets.diff() > 0] - 1
    following[last] = 0.0
    return discounted_returns(rewards + gamma * following - values, offsets, gamma * lam)


def estimate_advantages(
    advantage: Advantage,
    rewards: torch.Tensor,
    offsets: torch.Tensor,
    groups: torch.Tensor,
    *,
    gamma: float = 1.0,
    baseline: Literal["none", "batch", "group"] = "batch",
    whiten: bool = False,
    values: torch.Tensor | None = None,
    gae_lambda: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages by the estimator's name (`LearnerConfig.advantage`) and the returns behind them, both [N].

    `baseline` counts for "return" only, `values` and `gae_lambda` for "gae", whose returns A + V are what its
    critic is to predict. Raises ValueError for an unknown name, or "gae" without values.
    """
    if advantage == "gae":
        if values is None:
            raise ValueError('advantage = "gae" needs the values of a critic')
        result = generalised_advantages(rewards, values, offsets, gamma, gae_lambda)
        return whitened(result) if whiten else result, result + values
    returns = discounted_returns(rewards, offsets, gamma)
    if advantage == "return":
        result = advantages(returns, offsets, groups, baseline=baseline)
    elif advantage == "rloo":
        result = leave_one_out(returns, offsets, groups)
    elif advantage == "grpo":
        result = group_standardised(returns, offsets, groups)
    elif advantage == "dr_grpo":
        result = advantages(returns, offsets, groups, baseline="group")
    elif advantage == "reinforce_plus_plus":
        result = whitened(returns)
    else:
        raise ValueError(f"unknown advantage {advantage!r}; choose one of {', '.join(get_args(Advantage))}")
    return whitened(result) if whiten else result, returns


def _group_scores(
    returns: torch.Tensor, offsets: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score of each trajectory, number of scored trajectories of its group, its group's number (all
    [trajectories], the first in double precision: equal scores must leave no spread) and the trajectory of
    each token."""
    lengths = offsets.diff()
    trajectory = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    _, key = torch.unique(groups, return_inverse=True)
    total = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, trajectory, returns.double())
    number = _sum_by((lengths > 0).double(), key)[key]
    return total / lengths.clamp_min(1), number, key, trajectory


def _sum_by(values: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.zeros(int(key.max()) + 1, dtype=values.dtype).index_add_(0, key, values)


def importance_weights(
    old: torch.Tensor,
    sampler: torch.Tensor,
    cap: float | None,
    *,
    masked: bool = False,
    floor: float = 0.0,
) -> torch.Tensor:
    """Weight w = p_learner / p_sampler per token, detached; ones without a cap.

    Truncated: min(w, cap) (Ionides 2008, "Truncated importance sampling"). `masked`: w where floor <= w <=
    cap, else 0, so that the token teaches nothing (IcePop, Ling Team 2025, "Every Step Evolves").
    """
    if cap is None:
        return torch.ones_like(old)
    weight = (old - sampler).detach().exp()
    if masked:
        return torch.where((weight >= floor) & (weight <= cap), weight, 0.0)
    return weight.clamp(max=cap)
