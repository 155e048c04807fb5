"""MAUVE against its closed forms, and on clouds of points that are alike, apart, or one inside the other."""

import math

import numpy as np
import pytest

from services.evaluation.mauve import frontier_area, mauve


def test_equal_histograms_score_one() -> None:
    p = np.array([0.5, 0.3, 0.2])
    assert frontier_area(p, p) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
def test_histograms_with_nothing_in_common(scale: float) -> None:
    """The curve is ((1−λ)^c, λ^c), and the area below it c·B(c+1, c)."""
    p, q = np.array([0.7, 0.3, 0.0, 0.0]), np.array([0.0, 0.0, 0.4, 0.6])
    area = scale * math.gamma(scale + 1) * math.gamma(scale) / math.gamma(2 * scale + 1)
    assert frontier_area(p, q, scale) == pytest.approx(area, rel=2e-3)
    assert frontier_area(q, p, scale) == pytest.approx(area, rel=2e-3)


def test_a_lost_half_costs_more_than_a_little_noise() -> None:
    p = np.array([0.25, 0.25, 0.25, 0.25])
    lost, noisy = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.28, 0.22, 0.24, 0.26])
    assert frontier_area(p, lost) < 0.5 < 0.95 < frontier_area(p, noisy) < 1


def test_samples_of_one_cloud_and_of_two() -> None:
    rng = np.random.default_rng(0)
    first, same = rng.normal(size=(2, 400, 8)).astype(np.float32)
    apart = first[::-1] + np.float32(8) * np.eye(8, dtype=np.float32)[0]
    assert mauve(first, same, 0) > 0.9
    assert mauve(first, -10 * np.abs(first) - 10, 0) < 0.1
    assert mauve(first, apart, 0) < 0.3
    assert mauve(first, same, 0) == mauve(first, same, 0)
    assert mauve(first[:1].repeat(5, 0), first[:1].repeat(3, 0), 0) == 1.0
    with pytest.raises(ValueError, match="two texts"):
        mauve(first[:1], same, 0)
