"""What a step's metrics say about its rewards and responses."""

import numpy as np
import pyarrow as pa

from services.evaluation.monitors import spearman


def reward_metrics(scored: pa.Table) -> dict[str, float]:
    """Mean, spread and range of a batch's summed rewards, and their correlations with length."""
    total = np.array([float(np.sum(row)) for row in scored["token_rewards"].to_pylist()])
    if "response_reward" in scored.column_names:
        total += scored["response_reward"].to_numpy()
    length = np.array([len(ids) for ids in scored["response_ids"].to_pylist()], dtype=float)
    spread = float(total.std())
    related = float(np.corrcoef(total, length)[0, 1]) if spread > 0 and length.std() > 0 else 0.0
    return {
        "mean": float(total.mean()),
        "std": spread,
        "min": float(total.min()),
        "max": float(total.max()),
        "score_mean": float(np.mean(scored["score"].to_numpy())),
        "length_correlation": related,
        "length_spearman": spearman(total, length),
    }


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
