"""Rewards: pure functions of the score s, the discriminator's raw logit, with D = sigmoid(s).

Forms are increasing in s and stable for any finite s. One response's reward is made in this order:

    form(score) -> clip -> whiten over the step -> length control -> + user_weight * user's reward

The first three act on every judged score (the sequence score, or every prefix), the last two once per
response, on its last sampled token. Discounting is the learner's business.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from discriminator.canonical import Span, spread_to_sampled
from discriminator.config import Level
from discriminator.reward_config import RewardConfig, RewardForm

Array = NDArray[np.float64]


def prob(score: Array) -> Array:
    """D = 1 / (1 + exp(-s)), in (0, 1) (SeqGAN; Yu et al. 2017, sec. 3.1)."""
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


def bradley_terry(score: Array) -> Array:
    """s itself, the log-odds of being preferred up to a constant per prompt (Bradley, Terry 1952), as GAD
    rewards it (arXiv 2511.10643). The same as `logit`; the discriminator's loss differs."""
    return score


def relativistic(score: Array, reference: float = 0.0) -> Array:
    """s - s*, with s* the score of the prompt's demonstration: how far the response is taken for more human
    than it (Jolicoeur-Martineau 2018, sec. 4.1, before the sigmoid)."""
    return score - reference


FORMS: dict[RewardForm, Callable[[Array], Array]] = {
    "prob": prob,
    "logit": logit,
    "log_d": log_d,
    "neg_log_one_minus_d": neg_log_one_minus_d,
    "bradley_terry": bradley_terry,
    "relativistic": relativistic,
}

FLAT_STD = 1e-6
"""Rewards with less spread than this are all the same: whitening does not blow up their rounding noise."""


def demonstration_score(scores: Sequence[float] | NDArray[np.floating], level: Level) -> float:
    """The scalar of a scored demonstration that `relativistic` subtracts: its sequence score, or per token
    the mean over its prefixes, which is what a prefix of a rollout is comparable with."""
    return float(scores[-1]) if level == "sequence" else float(np.mean(scores))


def reward(
    score: Sequence[float] | NDArray[np.floating], config: RewardConfig, reference: float | None = None
) -> Array:
    """The configured form of each score, clipped to [-clip, clip] (None: not clipped); same shape, float64.

    Args:
        score: of any shape.
        config: form and clip.
        reference: for `relativistic`, the score of the prompt's demonstration (see `demonstration_score`).

    Raises:
        ValueError: a score is not finite, or `relativistic` has no reference.
    """
    scores = np.asarray(score, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("the discriminator gave a score that is not finite")
    if config.form == "relativistic":
        if reference is None or not np.isfinite(reference):
            raise ValueError('reward form "relativistic" needs the score of the prompt\'s demonstration')
        values = relativistic(scores, reference)
    else:
        values = FORMS[config.form](scores)
    return values if config.clip is None else np.clip(values, -config.clip, config.clip)


def whitened(values: Array, config: RewardConfig) -> Array:
    """(r - mean) / std over all of `values` ("full") or r / std ("scale"), std the population's; the step's
    own moments, so nothing is carried from step to step (Huang et al. 2024, "whiten_rewards"). Rewards that
    are all equal keep their scale."""
    if config.whiten == "off" or not values.size:
        return values
    spread = float(values.std())
    shift = float(values.mean()) if config.whiten == "full" else 0.0
    return (values - shift) / (spread if spread > FLAT_STD else 1.0)


def length_penalty(tokens: int, config: RewardConfig) -> float:
    """What length control adds to a response of `tokens` sampled tokens; never positive.

    deviation: -c |L - T| / T, with T = length_target (LCPO-exact with a = c / T; Aggarwal, Welleck 2025,
    "L1", eq. 1).
    overlong: c times 0 up to T - S, ((T - S) - L) / S up to T, -1 beyond, with S = length_slack (soft
    overlong punishment; Yu et al. 2025, DAPO, eq. 13).
    """
    target = config.length_target
    if config.length_control == "off" or target is None:
        return 0.0
    if config.length_control == "deviation":
        return -config.length_coefficient * abs(tokens - target) / target
    free = config.free_tokens
    assert free is not None, "length control is overlong"
    return -config.length_coefficient * min(max((tokens - free) / (target - free), 0.0), 1.0)


def token_rewards(
    scores: Sequence[float] | NDArray[np.floating],
    spans: Sequence[Span],
    token_ends: Sequence[int],
    *,
    level: Level,
    config: RewardConfig,
) -> NDArray[np.float32]:
    """Reward of each sampled token of one response, from its scores alone (neither whitening, length control
    nor a user's reward).

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
    judged = reward(scores[-1:] if level == "sequence" else scores, config)
    return _placed(judged, spans, token_ends, level).astype(np.float32)


def _placed(values: Array, spans: Sequence[Span], token_ends: Sequence[int], level: Level) -> Array:
    """Rewards of the judged scores at the sampled tokens: the last one's alone, or every prefix's."""
    if level == "token":
        return spread_to_sampled(values, spans, token_ends)
    out = np.zeros(len(token_ends), dtype=np.float64)
    out[-1] = values[0]
    return out


def stamp(
    table: pa.Table,
    version: int,
    scores: Sequence[Sequence[float] | NDArray[np.floating]],
    spans: Sequence[Sequence[Span]],
    *,
    level: Level,
    config: RewardConfig,
    references: Sequence[float] | None = None,
    user_rewards: Sequence[float] | None = None,
) -> pa.Table:
    """Trajectories with the columns disc_version, score (sequence score), token_rewards, and last_reward,
    that of the last judged prefix: the discriminator's. What length control and the user's function add to a
    whole response is response_reward, where there is such a thing, and user_reward the function's own.

    Args:
        table: trajectories of a whole step (whitening takes its moments over them); `token_ends` is read.
        version: discriminator version that gave the scores.
        scores: per row, one score per canonical token, of which every response has at least one.
        spans: per row, their spans.
        level: see `token_rewards`.
        config: the whole reward section.
        references: per row, `demonstration_score` of the prompt's demonstration under the same version; for
            form "relativistic" and only for it.
        user_rewards: per row, the user's reward; when `user_reward` is set and only then.

    Raises:
        ValueError: references or user rewards are missing, not asked for, or not finite.
    """
    _check_column("references", references, table.num_rows, config.form == "relativistic", config.form)
    _check_column("user_rewards", user_rewards, table.num_rows, bool(config.user_reward), config.user_reward)
    ends = table["token_ends"].to_pylist()
    judged = [
        reward(
            score[-1:] if level == "sequence" else score,
            config,
            None if references is None else references[row],
        )
        for row, score in enumerate(scores)
    ]
    flat = whitened(np.concatenate(judged), config) if judged else np.zeros(0)
    parts = np.split(flat, np.cumsum([len(part) for part in judged])[:-1]) if judged else []
    rewards = [
        _placed(values, span, end, level).astype(np.float32)
        for values, span, end in zip(parts, spans, ends, strict=True)
    ]
    columns = {
        "disc_version": pa.array([version] * table.num_rows, pa.int32()),
        "score": pa.array([float(score[-1]) for score in scores], pa.float32()),
        "token_rewards": pa.array(rewards, pa.list_(pa.float32())),
        "last_reward": pa.array([float(values[-1]) for values in parts], pa.float32()),
    }
    if user_rewards is not None:
        columns["user_reward"] = pa.array(user_rewards, pa.float32())
    if user_rewards is not None or config.length_control != "off":
        whole = np.array([length_penalty(len(end), config) for end in ends])
        if user_rewards is not None:
            whole += config.user_weight * np.array(user_rewards)
        columns["response_reward"] = pa.array(whole, pa.float32())
    for name, column in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def _check_column(name: str, values: Sequence[float] | None, rows: int, wanted: bool, setting: str) -> None:
    """Refuse a per-row column that is missing, not asked for, of another length or not finite."""
    if wanted != (values is not None):
        raise ValueError(
            f"the configured reward ({setting or 'without user_reward'}) "
            f"{'needs' if wanted else 'takes no'} {name}"
        )
    if values is None:
        return
    if len(values) != rows:
        raise ValueError(f"{len(values)} {name} for {rows} responses")
    for row, value in enumerate(values):
        if not np.isfinite(value):
            raise ValueError(f"{name} of row {row} is {value}, not a finite number")
