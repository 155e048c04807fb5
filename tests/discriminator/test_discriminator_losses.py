import math

import pytest
import torch

from discriminator.losses import balanced_weights, bce

SCORES = torch.tensor([0.3, 2.0, -1.0, 0.5, -0.2, 1.5], requires_grad=True)
RESPONSE = torch.tensor([0, 0, 1, 2, 2, 2])
LAST = torch.tensor([1, 2, 5])
SIDE = torch.tensor([True, False, False])


def slow_bce(score: float, demonstration: bool, smoothing: float) -> float:
    d = 1 / (1 + math.exp(-score))
    target = 1 - smoothing if demonstration else 0.0
    return -(target * math.log(d) + (1 - target) * math.log(1 - d))


def test_weights_are_half_and_half() -> None:
    weight = balanced_weights(torch.tensor([True, False, False, False]))
    torch.testing.assert_close(weight, torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6]))
    with pytest.raises(ValueError, match="both sides"):
        balanced_weights(torch.tensor([True, True]))


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_loss_equals_a_loop(level) -> None:
    out = bce(SCORES, RESPONSE, LAST, SIDE, balanced_weights(SIDE), level=level, label_smoothing=0.1)
    values = SCORES.tolist()
    tokens = [[1], [2], [5]] if level == "sequence" else [[0, 1], [2], [3, 4, 5]]
    per_response = [
        sum(slow_bce(values[t], bool(SIDE[r]), 0.1) for t in tokens[r]) / len(tokens[r]) for r in range(3)
    ]
    assert out.loss.item() == pytest.approx(
        0.5 * per_response[0] + 0.25 * (per_response[1] + per_response[2])
    )


def test_metrics() -> None:
    sums = bce(
        SCORES, RESPONSE, LAST, SIDE, balanced_weights(SIDE), level="sequence", label_smoothing=0.0
    ).sums
    assert sums["accuracy_demonstration"].item() == 1.0
    assert sums["accuracy_rollout"].item() == 0.5
    assert sums["accuracy"].item() == 0.75
    assert sums["margin"].item() == pytest.approx(2.0 - (-1.0 + 1.5) / 2)
    assert sums["saturation"].item() == 0.0


def test_parts_of_a_step_add_up() -> None:
    weight = balanced_weights(SIDE)

    def part(tokens: slice, rows: slice) -> torch.Tensor:
        return bce(
            SCORES[tokens],
            RESPONSE[tokens] - RESPONSE[tokens][0],
            LAST[rows] - tokens.start,
            SIDE[rows],
            weight[rows],
            level="token",
            label_smoothing=0.1,
        ).loss

    whole = bce(SCORES, RESPONSE, LAST, SIDE, weight, level="token", label_smoothing=0.1).loss
    torch.testing.assert_close(part(slice(0, 3), slice(0, 2)) + part(slice(3, 6), slice(2, 3)), whole)


def test_smoothed_optimum_is_the_smoothed_odds() -> None:
    """With equal density on both sides D* = (1 - e) / 2: the gradient vanishes at its logit."""
    smoothing = 0.1
    optimum = (1 - smoothing) / 2
    score = torch.full((2,), math.log(optimum / (1 - optimum)), requires_grad=True)
    side = torch.tensor([True, False])
    index = torch.arange(2)
    bce(
        score, index, index, side, balanced_weights(side), level="sequence", label_smoothing=smoothing
    ).loss.backward()
    assert score.grad is not None
    assert score.grad.sum().item() == pytest.approx(0.0, abs=1e-7)
