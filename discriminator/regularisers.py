"""Regularisers of the discriminator as functions of tensors.

What they add to the loss is a sum over responses, so that the parts of a step add up to the step.
"""

import torch
from torch import Tensor

from discriminator.config import Level


def r1_direction(response: Tensor, last: Tensor, is_demonstration: Tensor, *, level: Level) -> Tensor:
    """float32 [T]: d(sum of the demonstrations' values) / d(token scores).

    A response's value is its last score at the sequence level, the mean of its prefix scores per token. The
    gradient of the sum in a demonstration's own response embeddings is that of its own value, because
    responses do not see one another; the prompt is given, not judged, and is left out.

    Args:
        response: [T] int64, which of the R responses a token belongs to.
        last: [R] int64, index into [T] of each response's last token.
        is_demonstration: [R] bool.
        level: of the discriminator.
    """
    on_side = is_demonstration[response].to(torch.float32)
    if level == "sequence":
        return torch.zeros_like(on_side).index_fill(0, last, 1.0) * on_side
    lengths = torch.zeros(len(last), device=response.device).index_add(0, response, torch.ones_like(on_side))
    return on_side / lengths[response]


def r1_penalty(squared: Tensor, response: Tensor, is_demonstration: Tensor, weight: Tensor) -> Tensor:
    """E_demonstration |dD/dx|^2 / 2, x the embeddings of the response (Mescheder et al. 2018, eq. 9 without
    its gamma).

    Args:
        squared: [T] squared gradient at each response token.
        response: [T] int64, which of the R responses a token belongs to.
        is_demonstration: [R] bool.
        weight: [R] share of the step, 1/2 for all demonstrations together.
    """
    per_response = torch.zeros_like(weight).index_add(0, response, squared)
    return (weight * is_demonstration * per_response).sum()


def spectrally_bounded(weight: Tensor, bound: float) -> Tensor:
    """The matrix [1, H] scaled down to spectral norm `bound` if it exceeds it (Gouk et al. 2018; Miyato
    et al. 2018 always divide). The spectral norm of one row is its length, so nothing is estimated; the
    gradient goes through the norm.

    Bounding rather than dividing keeps a new head near zero: an untrained discriminator must give no rewards.
    """
    return weight * (bound / weight.norm()).clamp(max=1.0)


def centring_slope(sequence: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The squared mean score (sum_i w_i s_i)^2 of a whole step and its gradient 2 (sum_j w_j s_j) w_i, [R].

    The pairwise form is Eisenstein et al. 2023; here the mean is over the step.

    Args:
        sequence: [R] one score per response.
        weight: [R] adding up to 1.
    """
    mean = (weight * sequence).sum()
    return mean.square(), 2 * mean * weight
