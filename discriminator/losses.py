"""Discriminator losses: plain functions of scores and sides.

A demonstration has target 1 - label_smoothing, a rollout 0 (one-sided smoothing; Salimans et al. 2016, sec.
3.4). Each response carries a weight; the weights of a step's demonstrations sum to 1/2 and those of its
rollouts to 1/2, over all micro-batches and ranks. Losses and metrics are sums with these weights, so the
parts of a step add up to the step.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from discriminator.config import Level
from learner.losses import LossOutput

SATURATED_LOGIT = 4.59511985
"""log(.99 / .01): beyond it the probability lies outside [.01, .99]."""


def balanced_weights(is_demonstration: Tensor) -> Tensor:
    """float32 [R]: 1/2 shared by the demonstrations, 1/2 by the rollouts of a whole step, whatever their
    counts.

    Raises:
        ValueError: a side is empty.
    """
    demonstrations = int(is_demonstration.sum())
    rollouts = is_demonstration.numel() - demonstrations
    if not demonstrations or not rollouts:
        raise ValueError(
            f"a discriminator step needs both sides: {demonstrations} demonstrations, {rollouts} rollouts"
        )
    return torch.where(is_demonstration, 0.5 / demonstrations, 0.5 / rollouts).to(torch.float32)


def bce(
    scores: Tensor,
    response: Tensor,
    last: Tensor,
    is_demonstration: Tensor,
    weight: Tensor,
    *,
    level: Level,
    label_smoothing: float,
) -> LossOutput:
    """Binary cross-entropy, -(t log D + (1 - t) log(1 - D)).

    Args:
        scores: [T] score of each response token.
        response: [T] int64, which of the R responses a token belongs to.
        last: [R] int64, index into [T] of each response's last token.
        is_demonstration: [R] bool.
        weight: [R] share of the step (see `balanced_weights`); 0 switches a response off.
        level: "sequence" takes the last token's loss, "token" the mean over the response's prefixes.
        label_smoothing: taken off the demonstrations' target.

    Returns:
        This part's loss, and as sums `side_metrics` and the loss.
    """
    sequence = scores[last]
    if level == "sequence":
        per_response = _cross_entropy(sequence, is_demonstration, label_smoothing)
    else:
        per_token = _cross_entropy(scores, is_demonstration[response], label_smoothing)
        zeros = torch.zeros_like(sequence)
        counts = zeros.index_add(0, response, torch.ones_like(scores))
        per_response = zeros.index_add(0, response, per_token) / counts
    loss = (weight * per_response).sum()
    sums = side_metrics(sequence.detach(), is_demonstration, weight) | {"loss": loss.detach()}
    return LossOutput(loss, sums, {})


def _cross_entropy(scores: Tensor, is_demonstration: Tensor, label_smoothing: float) -> Tensor:
    target = is_demonstration.to(scores.dtype) * (1 - label_smoothing)
    return target * softplus(-scores) + (1 - target) * softplus(scores)


def side_metrics(sequence: Tensor, is_demonstration: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Weighted sums over [R] sequence scores that become, added up over a step:

    accuracy_demonstration, accuracy_rollout, accuracy (balanced), score_demonstration and score_rollout
    (means), margin (their difference) and saturation (balanced share of D outside [.01, .99]).
    """
    on_demonstration = 2 * weight * is_demonstration
    on_rollout = 2 * weight * ~is_demonstration
    accuracy_demonstration = (on_demonstration * _share(sequence)).sum()
    accuracy_rollout = (on_rollout * _share(-sequence)).sum()
    score_demonstration = (on_demonstration * sequence).sum()
    score_rollout = (on_rollout * sequence).sum()
    return {
        "accuracy_demonstration": accuracy_demonstration,
        "accuracy_rollout": accuracy_rollout,
        "accuracy": (accuracy_demonstration + accuracy_rollout) / 2,
        "score_demonstration": score_demonstration,
        "score_rollout": score_rollout,
        "margin": score_demonstration - score_rollout,
        "saturation": (weight * (sequence.abs() > SATURATED_LOGIT)).sum(),
    }


def _share(signed: Tensor) -> Tensor:
    """1 where the side is right, 1/2 on the fence."""
    return (signed > 0).float() + 0.5 * (signed == 0).float()
