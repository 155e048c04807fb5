"""Reward forms: pure functions of the score s, the discriminator's raw logit, with D = sigmoid(s).

All are increasing in s and stable for any finite s. Discounting is the learner's business.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from discriminator.canonical import Span, spread_to_sampled
from discriminator.config import Level, RewardConfig, RewardForm

Array = NDArray[np.float64]


def prob(score: Array) -> Array:
    """D = 1 / (1 + exp(-s)), in (0, 1)."""
    decay = np.exp(-np.abs(score))
    return np.where(score >= 0, 1.0, decay) / (1.0 + decay)


def logit(score: Array) -> Array:
    """log D - log(1 - D) = s (AIRL; Fu, Luo, Levine 2018, eq. 4 onwards)."""
    return score


def log_d(score: Array) -> Array:
    """log D = -log(1 + exp(-s)), never positive (the generator's non-saturating gain; Goodfellow et al. 2014,
    sec. 3)."""
    return -np.logaddexp(0.0, -score)


def neg_log_one_minus_d(score: Array) -> Array:
    """-log(1 - D) = log(1 + exp(s)), never negative (GAIL; Ho, Ermon 2016, eq. 16, D for the expert's
    side)."""
    return np.logaddexp(0.0, score)


FORMS: dict[RewardForm, Callable[[Array], Array]] = {
    "prob": prob,
    "logit": logit,
    "log_d": log_d,
    "neg_log_one_minus_d": neg_log_one_minus_d,
}


def reward(score: Sequence[float] | NDArray[np.floating], config: RewardConfig) -> Array:
    """The configured form of each score, clipped to [-clip, clip]; same shape, float64.

    Raises:
        ValueError: a score is not finite.
    """
    scores = np.asarray(score, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("the discriminator gave a score that is not finite")
    return np.clip(FORMS[config.form](scores), -config.clip, config.clip)


def token_rewards(
    scores: Sequence[float] | NDArray[np.floating],
    spans: Sequence[Span],
    token_ends: Sequence[int],
    *,
    level: Level,
    config: RewardConfig,
) -> NDArray[np.float32]:
    """Reward of each sampled token of one response.

    Args:
        scores: per canonical token, the last one being the sequence score.
        spans: the canonical tokens' character spans in the raw response text.
        token_ends: per sampled token, the characters of the raw text complete after it.
        level: "sequence" puts the reward of the sequence score on the last sampled token; "token" puts the
            reward of every prefix on the sampled token that completes it (several prefixes completed by one
            token add up).
        config: form and clip.

    Returns:
        float32 of len(token_ends).
    """
    if level == "sequence":
        out = np.zeros(len(token_ends), dtype=np.float64)
        out[-1] = reward(scores[-1:], config)[0]
    else:
        out = spread_to_sampled(reward(scores, config), spans, token_ends)
    return out.astype(np.float32)


def stamp(
    table: pa.Table,
    version: int,
    scores: Sequence[Sequence[float] | NDArray[np.floating]],
    spans: Sequence[Sequence[Span]],
    *,
    level: Level,
    config: RewardConfig,
) -> pa.Table:
    """Trajectories with the columns disc_version, score (sequence score) and token_rewards.

    Args:
        table: trajectories; `token_ends` is read.
        version: discriminator version that gave the scores.
        scores: per row, one score per canonical token.
        spans: per row, their spans.
        level, config: see `token_rewards`.
    """
    ends = table["token_ends"].to_pylist()
    rewards = [
        token_rewards(score, span, end, level=level, config=config)
        for score, span, end in zip(scores, spans, ends, strict=True)
    ]
    columns = {
        "disc_version": pa.array([version] * table.num_rows, pa.int32()),
        "score": pa.array([float(score[-1]) for score in scores], pa.float32()),
        "token_rewards": pa.array(rewards, pa.list_(pa.float32())),
    }
    for name, column in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table
