import math
from functools import partial

import pytest
import torch

from discriminator.losses import (
    POINTWISE,
    balanced_weights,
    bradley_terry,
    judged_metrics,
    pair_weights,
    pointwise,
)

bce = partial(pointwise, "bce")
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


SLOW = {
    "bce": lambda s, side, e: slow_bce(s, side, e),
    "hinge": lambda s, side, e: max(0.0, 1 - s) if side else max(0.0, 1 + s),
    "least_squares": lambda s, side, e: 0.5 * (s - ((1 - e) * 1 + e * -1 if side else -1)) ** 2,
    "wasserstein": lambda s, side, e: -s if side else s,
}


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("name", list(POINTWISE))
def test_each_loss_equals_its_formula_in_a_loop(name, level) -> None:
    smoothing = 0.1 if name in ("bce", "least_squares") else 0.0
    out = pointwise(
        name,
        SCORES,
        RESPONSE,
        LAST,
        SIDE,
        torch.tensor([0.5, 0.2, 0.3]),
        level=level,
        label_smoothing=smoothing,
    )
    tokens = [[1], [2], [5]] if level == "sequence" else [[0, 1], [2], [3, 4, 5]]
    means = [
        sum(SLOW[name](SCORES[t].item(), bool(SIDE[r]), smoothing) for t in tokens[r]) / len(tokens[r])
        for r in range(3)
    ]
    assert out.loss.item() == pytest.approx(0.5 * means[0] + 0.2 * means[1] + 0.3 * means[2], rel=1e-5)
    assert out.sums["loss"].item() == out.loss.item()


def test_pairs_stay_with_their_prompt_and_reach_out_where_it_has_no_rollout() -> None:
    side = torch.tensor([True, False, True, False, False])
    prompt = torch.tensor([0, 0, 1, 0, 2])
    pairs = pair_weights(side, torch.tensor([0.3, 0.1, 0.2, 0.3, 0.1]), prompt)
    expected = torch.zeros(5, 5)
    expected[0, 1], expected[0, 3] = 0.6 * 0.25, 0.6 * 0.75
    expected[2, 1], expected[2, 3], expected[2, 4] = 0.4 * 0.2, 0.4 * 0.6, 0.4 * 0.2
    torch.testing.assert_close(pairs, expected)


def test_bradley_terry_is_the_likelihood_of_the_comparisons() -> None:
    side = torch.tensor([True, False, True, False, False])
    pairs = pair_weights(side, balanced_weights(side), torch.tensor([0, 0, 1, 1, 1]))
    scores = torch.tensor([0.4, -0.3, 1.1, 2.0, 0.1])

    def odds(i: int, j: int) -> float:
        return 1 / (1 + math.exp(scores[j].item() - scores[i].item()))

    wins = 0.5 * math.log(odds(0, 1)) + 0.25 * (math.log(odds(2, 3)) + math.log(odds(2, 4)))
    losses = 0.5 * math.log(odds(1, 0)) + 0.25 * (math.log(odds(3, 2)) + math.log(odds(4, 2)))
    assert bradley_terry(scores, pairs).item() == pytest.approx(-wins)
    assert bradley_terry(scores, pairs, 0.2).item() == pytest.approx(-0.8 * wins - 0.2 * losses)
    assert bradley_terry(scores + 9, pairs, 0.2).item() == pytest.approx(
        bradley_terry(scores, pairs, 0.2).item(), rel=1e-5
    )


@pytest.mark.parametrize("loss", ["bradley_terry", "wasserstein"])
def test_metrics_of_losses_without_a_zero_do_not_depend_on_one(loss) -> None:
    side = torch.tensor([True, True, False, False])
    arguments = (side, balanced_weights(side), torch.tensor([0, 1, 0, 1]))
    scores = torch.tensor([5.0, -3.0, 4.0, -2.0])
    here = judged_metrics(loss, scores, *arguments)
    there = judged_metrics(loss, scores + 100, *arguments)
    for name in ("accuracy", "accuracy_demonstration", "accuracy_rollout", "margin", "saturation"):
        assert there[name].item() == pytest.approx(here[name].item(), abs=1e-4), name
    assert here["accuracy"].item() == 0.5
    assert here["margin"].item() == pytest.approx(0.0)
    ranked = judged_metrics("bradley_terry", torch.tensor([5.0, -3.0, 4.0, -4.0]), *arguments)
    assert ranked["accuracy"].item() == 1.0, "each demonstration leads its own prompt's rollout"
