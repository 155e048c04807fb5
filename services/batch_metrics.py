"""What a step's metrics say about its rewards and responses."""

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from learner.advantages import discounted_returns, paid
from services.evaluation.monitors import spearman


def reward_metrics(scored: pa.Table, gamma: float, *, absorbing_end: bool = False) -> dict[str, float]:
    """Mean and range of a batch's summed rewards; and of what the policy is paid, a response's mean return
    over its tokens, the spread and the correlations with length. At the sequence level (gamma = 1) that is
    the sum; per token a sum of rewards of one sign goes with length whatever the discriminator says."""
    rows = scored["token_rewards"].to_pylist()
    total = np.array([float(np.sum(row)) for row in rows])
    if "response_reward" in scored.column_names:
        total += scored["response_reward"].to_numpy()
    length = np.array([len(ids) for ids in scored["response_ids"].to_pylist()], dtype=float)
    returns = _mean_returns(scored, gamma, absorbing_end)
    spread = float(returns.std())
    related = float(np.corrcoef(returns, length)[0, 1]) if spread > 0 and length.std() > 0 else 0.0
    return {
        "mean": float(total.mean()),
        "std": spread,
        "min": float(total.min()),
        "max": float(total.max()),
        "score_mean": float(np.mean(scored["score"].to_numpy())),
        "length_correlation": related,
        "length_spearman": spearman(returns, length),
    }


def _mean_returns(scored: pa.Table, gamma: float, absorbing_end: bool) -> NDArray[np.float64]:
    """Per response the mean of its tokens' discounted returns, 0 where it has none."""
    rows = scored["token_rewards"].to_pylist()
    lengths = torch.tensor([len(row) for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    last = torch.tensor(scored["last_reward"].to_pylist()).double() if absorbing_end else None
    whole = scored["response_reward"].to_pylist() if "response_reward" in scored.column_names else None
    rewards = paid(
        flat, offsets, gamma, last=last, whole=None if whole is None else torch.tensor(whole).double()
    )
    returns = discounted_returns(rewards, offsets, gamma)
    row = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, returns)
    return (sums / lengths.clamp_min(1)).numpy()


def response_metrics(batch: pa.Table) -> dict[str, float]:
    """Lengths in tokens and the share cut by the length limit."""
    length = np.array([len(ids) for ids in batch["response_ids"].to_pylist()], dtype=float)
    cut = np.array([reason == "length" for reason in batch["finish_reason"].to_pylist()])
    return {
        "length_mean": float(length.mean()),
        "length_p10": float(np.percentile(length, 10)),
        "length_p90": float(np.percentile(length, 90)),
        "truncated_rate": float(cut.mean()),
    }
