import numpy as np
import pytest
from judging import judged

from discriminator.negatives import length_matched_weights, perturb, perturbed

TEXT = "the cat sat on\nthe old mat"


def test_each_kind_of_perturbation_does_what_it_says() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        shuffled, cut, dropped = (perturb(TEXT, kind, rng) for kind in range(3))
        assert shuffled is not None
        assert cut is not None
        assert dropped is not None
        assert sorted(shuffled.split()) == sorted(TEXT.split())
        assert shuffled != TEXT
        assert TEXT.startswith(cut)
        assert 1 <= len(cut.split()) < 7
        assert len(dropped.split()) == 6
        words = iter(TEXT.split())
        assert all(word in words for word in dropped.split()), "what stays keeps its order"


def test_what_cannot_be_shuffled_is_cut_and_single_words_are_left_out() -> None:
    rng = np.random.default_rng(0)
    assert perturb("no no no", 0, rng) in ("no", "no no")
    assert perturb("word", 0, rng) is None
    assert perturbed(judged([("p", "word")]), 3, rng).num_rows == 0


def test_perturbed_tables_depend_on_the_seed_alone() -> None:
    table = judged([("a", TEXT), ("b", "one"), ("c", "a dog lay by the door")])
    draws = [perturbed(table, 5, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert draws[0].equals(draws[1])
    assert not draws[0].equals(draws[2])
    assert draws[0].schema.equals(table.schema)
    assert set(draws[0]["prompt_id"].to_pylist()) == {"a", "c"}
    assert not set(draws[0]["response_text"].to_pylist()) & set(table["response_text"].to_pylist())


def test_matched_weights_give_both_sides_one_length_distribution() -> None:
    rng = np.random.default_rng(0)
    side = np.arange(400) < 150
    lengths = np.where(side, rng.poisson(12, 400), rng.poisson(9, 400)) + 1
    weight, overlap = length_matched_weights(lengths.tolist(), side, 6)
    assert weight[side].sum() == pytest.approx(0.5)
    assert weight[~side].sum() == pytest.approx(0.5)
    edges = np.unique(np.quantile(lengths, np.arange(1, 6) / 6))
    bins = np.searchsorted(edges, lengths)
    for b in range(6):
        assert weight[side & (bins == b)].sum() == pytest.approx(weight[~side & (bins == b)].sum())
    assert 0.4 < overlap < 0.9
    plain = np.where(side, 0.5 / 150, 0.5 / 250)
    assert (weight <= plain / overlap + 1e-12).all()
    mean = [np.average(lengths[s], weights=weight[s]) for s in (side, ~side)]
    before = lengths[side].mean() - lengths[~side].mean()
    assert abs(mean[0] - mean[1]) < 0.2 * before


def test_equal_lengths_and_disjoint_ones() -> None:
    side = np.array([True, False, False])
    weight, overlap = length_matched_weights([5, 5, 5], side, 4)
    np.testing.assert_allclose(weight, [0.5, 0.25, 0.25])
    assert overlap == 1.0
    weight, overlap = length_matched_weights([9, 1, 2], side, 4)
    np.testing.assert_allclose(weight, [0.5, 0.25, 0.25])
    assert overlap == 0.0
    with pytest.raises(ValueError, match="one of them is empty"):
        length_matched_weights([1, 2], np.array([True, True]), 4)
