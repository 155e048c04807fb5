"""Whether the discriminator's probabilities are frequencies: expected calibration error."""

import torch
from torch import Tensor

from discriminator.config import LossName
from discriminator.losses import pair_weights, side_metrics

CALIBRATION_BINS = 10


def calibration(
    loss: LossName, sequence: Tensor, is_demonstration: Tensor, weight: Tensor, prompt: Tensor
) -> float:
    """`calibration_error` of what a discriminator trained with `loss` says: of sigmoid(s), for
    `bradley_terry` of the outcome of comparisons, for `wasserstein` with s counted from the middle between
    the sides' means. Only the losses with a likelihood (bce, bradley_terry) aim at a small one.

    Args:
        loss: the discriminator's loss.
        sequence: [R] sequence scores.
        is_demonstration, weight, prompt: see `losses.pair_weights`.
    """
    if loss == "bradley_terry":
        return calibration_error(*comparisons(sequence, pair_weights(is_demonstration, weight, prompt)))
    if loss == "wasserstein":
        sides = side_metrics(sequence, is_demonstration, weight)
        sequence = sequence - (sides["score_demonstration"] + sides["score_rollout"]) / 2
    return calibration_error(sequence, is_demonstration, weight)


def comparisons(sequence: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leads, outcomes and weights of all pairs, each seen from both ends, as `calibration_error` takes
    them.

    Args:
        sequence: [R] sequence scores.
        pairs: [R, R] from `losses.pair_weights`.
    """
    first, second = pairs.nonzero(as_tuple=True)
    lead, weight = sequence[first] - sequence[second], pairs[first, second] / 2
    won = torch.ones(len(lead), dtype=torch.bool)
    return torch.cat([lead, -lead]), torch.cat([won, ~won]), torch.cat([weight, weight])


def calibration_error(sequence: Tensor, is_demonstration: Tensor, weight: Tensor) -> float:
    """Expected calibration error: sum over equal bins of D of |weight of demonstrations - weight times D|.

    Args:
        sequence: [R] sequence scores.
        is_demonstration: [R] bool.
        weight: [R], adding up to 1.
    """
    probability = torch.sigmoid(sequence.double())
    bins = (probability * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = weight.double() * (is_demonstration.double() - probability)
    return float(torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, gap).abs().sum())
