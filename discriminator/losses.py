"""Discriminator losses: plain functions of scores and sides.

Losses by name are per-score functions (`POINTWISE`) or compare responses (`bradley_terry`). Each response
carries a weight; the weights of a step's demonstrations sum to 1/2 and those of its rollouts to 1/2, over all
micro-batches and ranks. Losses and metrics are sums with these weights, so the parts of a step add up to the
step. A pairwise loss is no sum over responses, but its gradient is: it is made of the scores of the whole
step, read in a first pass (`discriminator.objective`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from discriminator.config import Level, LossName
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


def cross_entropy(scores: Tensor, is_demonstration: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(t log D + (1 - t) log(1 - D)) with D = sigmoid(score); t = 1 - label_smoothing for a demonstration
    and 0 for a rollout (one-sided smoothing; Salimans et al. 2016, sec. 3.4)."""
    target = is_demonstration.to(scores.dtype) * (1 - label_smoothing)
    return target * softplus(-scores) + (1 - target) * softplus(scores)


def least_squares(scores: Tensor, is_demonstration: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(score - t)^2 / 2 with t = 1 for a demonstration and -1 for a rollout (Mao et al. 2017, eq. 2 and 8); a
    demonstration's target moves to 1 - 2 label_smoothing, the same share of the way as in `cross_entropy`."""
    target = torch.where(is_demonstration, 1.0 - 2.0 * label_smoothing, -1.0).to(scores.dtype)
    return (scores - target).square() / 2


def hinge(scores: Tensor, is_demonstration: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - s) for a demonstration, max(0, 1 + s) for a rollout (Lim, Ye 2017; Miyato et al. 2018,
    eq. 16). It has no targets to smooth."""
    return relu(1 - torch.where(is_demonstration, scores, -scores))


def wasserstein(scores: Tensor, is_demonstration: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-s for a demonstration, s for a rollout: with weights of 1/2 a side, half the negated estimate of the
    distance (Arjovsky et al. 2017, eq. 3). It has no targets to smooth and needs a bounded slope."""
    return torch.where(is_demonstration, -scores, scores)


POINTWISE: dict[LossName, Callable[[Tensor, Tensor, float], Tensor]] = {
    "bce": cross_entropy,
    "least_squares": least_squares,
    "hinge": hinge,
    "wasserstein": wasserstein,
}


def pointwise(
    name: LossName,
    scores: Tensor,
    response: Tensor,
    last: Tensor,
    is_demonstration: Tensor,
    weight: Tensor,
    *,
    level: Level,
    label_smoothing: float,
    counted: Tensor | None = None,
) -> LossOutput:
    """The named loss of `POINTWISE` over a part of a step.

    Args:
        name: of the loss.
        scores: [T] score of each response token.
        response: [T] int64, which of the R responses a token belongs to.
        last: [R] int64, index into [T] of each response's last token.
        is_demonstration: [R] bool.
        weight: [R] share of the step (see `balanced_weights`); 0 switches a response off.
        level: "sequence" takes the last token's loss, "token" the mean over the response's prefixes.
        label_smoothing: see the loss.
        counted: [R] weights of the metrics (None: those of the loss).

    Returns:
        This part's loss, and as sums `side_metrics` and the loss.
    """
    form = POINTWISE[name]
    sequence = scores[last]
    if level == "sequence":
        per_response = form(sequence, is_demonstration, label_smoothing)
    else:
        per_token = form(scores, is_demonstration[response], label_smoothing)
        per_response = response_means(per_token, response, len(last))
    loss = (weight * per_response).sum()
    metrics = side_metrics(sequence.detach(), is_demonstration, weight if counted is None else counted)
    return LossOutput(loss, metrics | {"loss": loss.detach()}, {})


def response_means(values: Tensor, response: Tensor, count: int) -> Tensor:
    """[count] mean over each response's tokens of values [T]."""
    zeros = torch.zeros(count, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, response, values) / zeros.index_add(0, response, torch.ones_like(values))


def pair_weights(is_demonstration: Tensor, weight: Tensor, prompt: Tensor) -> Tensor:
    """[R, R] weight of the comparison of row i (a demonstration) with row j (a rollout); they sum to 1.

    A demonstration brings its share of its side. It is compared with the rollouts of its prompt in
    proportion to their weights, and with all rollouts where its prompt has none (of positive weight).

    Args:
        is_demonstration: [R] bool.
        weight: [R] shares, 1/2 a side.
        prompt: [R] int64, equal for equal prompts.
    """
    rival = (~is_demonstration * weight)[None, :].expand(len(weight), -1)
    same = rival * (prompt[:, None] == prompt[None, :])
    against = torch.where(same.sum(1, keepdim=True) > 0, same, rival)
    return 2 * (is_demonstration * weight)[:, None] * against / against.sum(1, keepdim=True)


def bradley_terry(values: Tensor, pairs: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """sum over pairs of p_ij [-(1 - e) log sigmoid(s_i - s_j) - e log sigmoid(s_j - s_i)] (Bradley, Terry
    1952; as a training loss Christiano et al. 2017, eq. 1; with a share e of flipped labels Mitchell 2023,
    "cDPO").

    Args:
        values: [R] one score per response of the whole step.
        pairs: [R, R] from `pair_weights`.
        label_smoothing: e.
    """
    ahead = values[:, None] - values[None, :]
    smooth = (1 - label_smoothing) * softplus(-ahead) + label_smoothing * softplus(ahead)
    return (pairs * smooth).sum()


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


def judged_metrics(
    loss: LossName, sequence: Tensor, is_demonstration: Tensor, weight: Tensor, prompt: Tensor
) -> dict[str, Tensor]:
    """`side_metrics` of a whole step or evaluation, read as the loss allows.

    `bradley_terry` judges comparisons: the accuracies are the share of pairs ranked right, the margin is the
    mean lead within pairs and saturation the share of pairs decided beyond .99. `wasserstein` scores count
    from the middle between the sides' means, since their own zero means nothing.

    Args:
        loss: the discriminator's loss.
        sequence: [R] sequence scores.
        is_demonstration, weight, prompt: see `pair_weights`.
    """
    metrics = side_metrics(sequence, is_demonstration, weight)
    if loss == "bradley_terry":
        pairs = pair_weights(is_demonstration, weight, prompt)
        lead = sequence[:, None] - sequence[None, :]
        right = (pairs * _share(lead)).sum()
        return metrics | {
            "accuracy": right,
            "accuracy_demonstration": right,
            "accuracy_rollout": right,
            "margin": (pairs * lead).sum(),
            "saturation": (pairs * (lead.abs() > SATURATED_LOGIT)).sum(),
        }
    if loss == "wasserstein":
        middle = (metrics["score_demonstration"] + metrics["score_rollout"]) / 2
        centred = side_metrics(sequence - middle, is_demonstration, weight)
        return metrics | {name: v for name, v in centred.items() if name.startswith(("accuracy", "satur"))}
    return metrics


def _share(signed: Tensor) -> Tensor:
    """1 where the side is right, 1/2 on the fence."""
    return (signed > 0).float() + 0.5 * (signed == 0).float()


def numbered(keys: list[str]) -> Tensor:
    """int64 [len(keys)], equal for equal keys."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)
